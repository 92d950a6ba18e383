"""The three tasks with pretrained weights in resnet_flax."""

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, PHOTO, PICTURES

# --- Task 1: classify a photo.
from resnet_flax.inference import predict

(answer,) = predict("timm/resnet50.a1_in1k", [PHOTO])
# --- Check.
given.check_classified([share for _, share in answer.top])

# --- Task 2: features of a trunk.
from resnet_flax.inference import read_images, read_pretrained

network, variables = read_pretrained("timm/resnet50.a1_in1k")
trunk = network.model.clone(num_classes=0)
features = trunk.apply(variables, read_images(network, [PHOTO]))
# --- Check.
given.check_features(features)

# --- Task 3: fine-tune on a folder.
from resnet_flax import TrainConfig, train

settings = {"init": "timm/resnet18.a1_in1k", "epochs": 2, "run_dir": FOLDER / "run"}
run = train(TrainConfig(dataset=f"folder:{PICTURES}", **settings))
# --- Check.
given.check_fine_tuned([result.loss for result in run.results], run.model.num_classes)
