"""A trained network for programs without this package.

Either file holds the network with its weights, from images, float32 in [0, 1] of shape
(N, H, W, C), to logits, for any N; normalisation is in the file too, and where the network's
accuracy is that of logits averaged with the mirror image's, so is that. It is run and compared with
the network before it is kept.

* ``model.stablehlo`` is a program of JAX, for CPUs, GPUs and TPUs, without this package or Flax:
  ``jax.export.deserialize(bytearray(content)).call(images)``.
* ``model.onnx`` is for ONNX Runtime and other engines, in float32; writing it needs the extra
  ``onnx``.

``huggingface`` is a folder for timm and transformers, as `resnet_flax.inference.hand_back` has it.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from resnet_flax.errors import InputError
from resnet_flax.inference.hand_back import hand_back
from resnet_flax.inference.hub import is_name
from resnet_flax.inference.pretrained import Network, read_pretrained
from resnet_flax.machine.files import whole_file
from resnet_flax.nn.preprocessing import mirrored_logits

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Largest difference of a logit, as a share of the largest logit.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def export(
    where: str | os.PathLike[str], to: str, output: str | os.PathLike[str] | None = None
) -> tuple[Path, Network]:
    """Writes the network of a folder or a name into a file or folder, and returns both.

    That is by default ``model.stablehlo``, ``model.onnx`` or ``huggingface`` in the folder, or here
    if the network came by name.

    Raises:
        InputError: when the network cannot be read, or the file not be written.
        RuntimeError: when the file's logits are not the network's.
    """
    if to not in CHOICES:
        raise InputError(f"unknown format {to!r}: choose from {', '.join(CHOICES)}")
    network, variables = read_pretrained(where)
    home = Path("" if is_name(where) else where)
    if to == HUGGINGFACE:
        path = Path(output or home / HUGGINGFACE)
        if path.resolve() == home.resolve():
            raise InputError(f"cannot write {path}: the network is read from it: name a new folder")
        hand_back(network, variables, path)
        return path, network
    content = FORMATS[to](network, variables)
    path = Path(output or home / f"model.{to}")
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)
    return path, network


def export_stablehlo(network: Network, variables: Any) -> bytes:
    """Serialises a network in evaluation as StableHLO, for `jax.export.deserialize`.

    Raises:
        RuntimeError: when the file's logits are not the network's.
    """
    shape = (*jax_export.symbolic_shape("N"), *image_shape(network))
    program = jax.jit(partial(_classify, network, variables))
    export_for = jax_export.export(program, platforms=PLATFORMS)
    content = bytes(export_for(jax.ShapeDtypeStruct(shape, jnp.float32)).serialize())
    run = jax_export.deserialize(bytearray(content)).call
    check(network, variables, lambda images: np.asarray(run(images)))
    return content


def export_onnx(network: Network, variables: Any) -> bytes:
    """Writes a network in evaluation as an ONNX file, in float32, whatever its dtype.

    Raises:
        InputError: when the extra ``onnx`` is not installed.
        RuntimeError: when the file's logits are not the network's.
    """
    try:
        import onnxruntime

        from resnet_flax.inference.onnx_graph import onnx_model
    except ImportError as error:
        mend = "install it by pip install 'resnet_flax[onnx]'"
        raise InputError(f"ONNX needs {error.name}: {mend}") from error
    content: bytes = onnx_model(network, variables).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    check(network, variables, lambda images: session.run(["logits"], {"images": images})[0])
    return content


FORMATS = {"stablehlo": export_stablehlo, "onnx": export_onnx}
HUGGINGFACE = "huggingface"
CHOICES = (*FORMATS, HUGGINGFACE)


def check(network: Network, variables: Any, run: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raises `RuntimeError` when a program's logits, of one image and of three, are others."""
    images = np.random.default_rng(0).random((3, *image_shape(network)), np.float32)
    expected = np.asarray(jax.jit(partial(_classify, network))(variables, images))
    for count in (1, 3):
        difference = np.abs(run(images[:count]) - expected[:count]).max() / np.abs(expected).max()
        if not difference <= TOLERANCES[jnp.dtype(network.model.dtype).name]:
            raise RuntimeError(f"the exported program's logits differ by {difference:.1e}")


def image_shape(network: Network) -> tuple[int, int, int]:
    """(H, W, C) of the images that the network itself takes."""
    return (network.image_size, network.image_size, network.image_shape[-1])


def _classify(network: Network, variables: Any, images: jax.Array) -> jax.Array:
    images = network.normalization(images) if network.normalization else images
    return mirrored_logits(partial(network.model.apply, variables), images, network.flip)
