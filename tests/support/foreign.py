"""timm beside a build of PyTorch for which torchvision's compiled operators do not load.

timm needs torchvision, whose Python code describes two of its operators when it is imported, and
fails if they do not exist. Declared here, without an implementation, they exist; no network calls
them. Where torchvision's own operators load, nothing is declared.
"""

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

# Kept alive: the declarations vanish with the library.
_library = torch.library.Library("torchvision", "FRAGMENT")


def import_timm() -> ModuleType:
    """Imports timm, and torchvision with or without its operators."""
    spec = importlib.util.find_spec("torchvision")
    for path in Path(spec.origin).parent.glob("_C.so") if spec and spec.origin else ():
        with contextlib.suppress(OSError):  # it does not load
            torch.ops.load_library(path)
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm
