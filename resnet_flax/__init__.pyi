from .inference.pretrained import from_pretrained as from_pretrained
from .machine.runtime import configure_runtime as configure_runtime
from .nn.blocks import Bottleneck as Bottleneck
from .nn.blocks import Residual as Residual
from .nn.blocks import Stage as Stage
from .nn.resnet import (
    ARCHITECTURES as ARCHITECTURES,
)
from .nn.resnet import (
    FLAVOURS as FLAVOURS,
)
from .nn.resnet import (
    ResNet as ResNet,
)
from .nn.resnet import (
    build_model as build_model,
)
from .nn.resnet import (
    resnet18 as resnet18,
)
from .nn.resnet import (
    resnet34 as resnet34,
)
from .nn.resnet import (
    resnet50 as resnet50,
)
from .nn.resnet import (
    resnet101 as resnet101,
)
from .nn.resnet import (
    resnet152 as resnet152,
)
from .runs.config import TrainConfig as TrainConfig
from .runs.train import Run as Run
from .runs.train import train as train
from .training.metrics import Metrics as Metrics
from .training.step import (
    Images as Images,
)
from .training.step import (
    TrainState as TrainState,
)
from .training.step import (
    create_train_state as create_train_state,
)
from .training.step import (
    eval_step as eval_step,
)
from .training.step import (
    train_step as train_step,
)
from .weights.files import (
    load_safetensors as load_safetensors,
)
from .weights.files import (
    save_safetensors as save_safetensors,
)
from .weights.state_dict import (
    from_torch as from_torch,
)
from .weights.state_dict import (
    to_torch as to_torch,
)
