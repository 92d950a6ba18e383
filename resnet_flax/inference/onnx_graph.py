"""The network as an ONNX graph, of the plain operators that every runtime optimises.

None of jax2onnx's releases, which export from JAX, fits beside this package: 0.17.1 asks for
orbax-checkpoint < 0.11.37, and 0.13.0, the newest that does not, uses what JAX 0.10 has removed. So
the operators are written out here; who calls this runs the graph beside the network, and compares.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resnet_flax.inference.pretrained import Network
from resnet_flax.nn.blocks import Bottleneck
from resnet_flax.nn.resnet import STEMS, ResNet
from resnet_flax.weights.state_dict import to_torch

OPERATORS = 17  # the version of ONNX' set of operators: of 2022, known everywhere


def onnx_model(network: Network, variables: Any) -> onnx.ModelProto:
    """The network in evaluation, in float32: ``images`` (N, H, W, C) to ``logits`` (N, classes)."""
    graph = _Graph(network.model, variables)
    graph.evaluation(network)
    size, channels = network.image_size, network.image_shape[-1]
    images = _float32("images", "N", size, size, channels)
    logits = _float32("logits", "N", len(network.classes))
    weights = list(graph.weights.values())
    model = helper.make_model(
        helper.make_graph(graph.nodes, "resnet", [images], [logits], weights),
        producer_name="resnet_flax",
        opset_imports=[helper.make_opsetid("", OPERATORS)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _float32(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class _Graph:
    """Nodes and weights so far; images in between are NCHW. Each method returns its output's name.

    The weights are those of PyTorch's state dict, whose order of axes is ONNX' too.
    """

    def __init__(self, model: ResNet, variables: Any) -> None:
        self.model = model
        self.values = to_torch(model, variables, dtype=np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def evaluation(self, network: Network) -> str:
        """As `resnet_flax.nn.preprocessing.mirrored_logits`; both passes have the same weights."""
        images = "images"
        if network.normalization:
            mean, std = (
                self.constant(name, np.array(values, np.float32))
                for name, values in network.normalization._asdict().items()
            )
            images = self.add("Div", self.add("Sub", images, mean), std)
        images = self.add("Transpose", images, perm=(0, 3, 1, 2))
        if not network.flip:
            return self.network(images, "logits")
        # Along the width, from the last column down to the first.
        span = {"start": -1, "end": np.iinfo(np.int64).min, "axis": 3, "step": -1}
        numbers = (self.constant(name, np.array([n])) for name, n in span.items())
        mirrored = self.add("Slice", images, *numbers)
        return self.add("Mean", self.network(images), self.network(mirrored), output="logits")

    def network(self, x: str, output: str = "") -> str:
        model = self.model
        _, strides, pooled = STEMS[model.stem]
        if model.stem == "deep":
            for number, step in ((0, strides), (3, 1)):
                x = self.conv(x, f"conv1.{number}", step)
                x = self.relu(self.norm(x, f"conv1.{number + 1}"))
            x = self.conv(x, "conv1.6", 1)
        else:
            x = self.conv(x, "conv1", strides)
        if not model.preactivation:
            x = self.relu(self.norm(x, "bn1"))
        if pooled:
            x = self.add("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
        for stage, blocks in enumerate(model.stage_sizes, start=1):
            first, others = model.dilations[stage - 1]
            for index in range(blocks):
                strides = 2 if stage > 1 and index == 0 and first == others else 1
                dilation = others if index else first
                x = self.block(x, f"layer{stage}.{index}", strides, dilation)
        if model.preactivation:
            x = self.relu(self.norm(x, "norm"))
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        return self.add("Gemm", x, *self.weight("fc", "weight", "bias"), output=output, transB=1)

    def block(self, x: str, name: str, strides: int, dilation: int) -> str:
        model = self.model
        all_strides = [strides, 1]
        if model.block is Bottleneck:
            all_strides = [strides, 1, 1] if model.stride_first else [1, strides, 1]
        number = 1 if model.average_shortcut else 0  # of the shortcut's convolution
        projected = f"{name}.downsample.{number}.weight" in self.values
        y = shortcut = x
        for index, step in enumerate(all_strides, start=1):
            kind = {"dilation": dilation, "groups": model.groups} if index == 2 else {}
            if model.preactivation:
                y = self.relu(self.norm(y, f"{name}.bn{index}"))
                shortcut = y if index == 1 and projected else shortcut
                y = self.conv(y, f"{name}.conv{index}", step, **kind)
            else:
                y = self.conv(y, f"{name}.conv{index}", step, **kind)
                y = self.norm(y, f"{name}.bn{index}")
                y = self.relu(y) if index < len(all_strides) else y
        if projected:
            if model.average_shortcut and strides > 1:
                shortcut, strides = self.average_pool(shortcut, strides), 1
            shortcut = self.conv(shortcut, f"{name}.downsample.{number}", strides)
            if model.norm_shortcut:
                shortcut = self.norm(shortcut, f"{name}.downsample.{number + 1}")
        y = self.add("Add", shortcut, y)
        return y if model.preactivation else self.relu(y)

    def conv(self, x: str, name: str, strides: int, dilation: int = 1, groups: int = 1) -> str:
        weights = self.weight(name, "weight", *(["bias"] if self.model.use_bias else []))
        return self.add(
            "Conv",
            x,
            *weights,
            strides=(strides, strides),
            pads=(dilation * (self.values[f"{name}.weight"].shape[-1] // 2),) * 4,
            dilations=(dilation, dilation),
            group=groups,
        )

    def average_pool(self, x: str, size: int) -> str:
        square = (size, size)
        edges: dict[str, Any] = {"ceil_mode": 1, "count_include_pad": 0}
        return self.add("AveragePool", x, kernel_shape=square, strides=square, **edges)

    def norm(self, x: str, name: str) -> str:
        weights = self.weight(name, "weight", "bias", "running_mean", "running_var")
        return self.add("BatchNormalization", x, *weights, epsilon=self.model.epsilon)

    def relu(self, x: str) -> str:
        return self.add("Relu", x)

    def weight(self, layer: str, *parts: str) -> list[str]:
        keys = [f"{layer}.{part}" for part in parts]
        return [self.constant(key, self.values[key]) for key in keys]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = numpy_helper.from_array(value, name)
        return name

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output
