"""A trained network, read and asked: what images show, how good it is, files for other programs."""

from resnet_flax.inference.evaluate import evaluate, load_test_set, read_weights
from resnet_flax.inference.export import export, export_onnx, export_stablehlo
from resnet_flax.inference.hand_back import hand_back, push
from resnet_flax.inference.predict import Prediction, classify, compute_logits, predict, read_images
from resnet_flax.inference.pretrained import (
    Network,
    from_pretrained,
    read_network,
    read_pretrained,
    save_weights,
)
from resnet_flax.inference.scores import Scores, score

__all__ = [
    "Network",
    "Prediction",
    "Scores",
    "classify",
    "compute_logits",
    "evaluate",
    "export",
    "export_onnx",
    "export_stablehlo",
    "from_pretrained",
    "hand_back",
    "load_test_set",
    "predict",
    "push",
    "read_images",
    "read_network",
    "read_pretrained",
    "read_weights",
    "save_weights",
    "score",
]
