"""For other programs: ``python -m resnet_flax.export RUN_DIR --to onnx``, or ``--to stablehlo``.

Either file holds the network with its weights, from images, float32 in [0, 1] of shape
(N, H, W, C), to logits, for any N. It is run and compared with the network before it is kept.

* ``model.stablehlo`` is a program of JAX, for CPUs, GPUs and TPUs, without this package or Flax:
  ``jax.export.deserialize(bytearray(content)).call(images)``.
* ``model.onnx`` is for ONNX Runtime and other engines, in float32; writing it needs the extra
  ``onnx``.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from resnet_flax.commands.command_line import OneLineParser, run_command
from resnet_flax.errors import InputError
from resnet_flax.inference.pretrained import Network, read_pretrained
from resnet_flax.machine.runtime import configure_runtime

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Largest difference of a logit, as a share of the largest logit.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def export_stablehlo(network: Network, variables: Any) -> bytes:
    """Serialises the forward pass in evaluation as StableHLO, for any number of images.

    Args:
        network: what to export.
        variables: of ``network.model``.

    Returns:
        What `jax.export.deserialize` takes.
    """
    shape = (*jax_export.symbolic_shape("N"), *image_shape(network))
    exported = jax_export.export(
        jax.jit(lambda images: network.model.apply(variables, images)), platforms=PLATFORMS
    )(jax.ShapeDtypeStruct(shape, jnp.float32))
    content = bytes(exported.serialize())
    run = jax_export.deserialize(bytearray(content)).call
    check(network, variables, lambda images: np.asarray(run(images)))
    return content


def export_onnx(network: Network, variables: Any) -> bytes:
    """Writes the forward pass in evaluation as an ONNX file, for any number of images.

    Args:
        network: what to export; computes in float32, whatever its dtype.
        variables: of ``network.model``.

    Returns:
        The file's content.

    Raises:
        InputError: when the extra ``onnx`` is not installed.
    """
    try:
        import onnxruntime

        from resnet_flax.inference.onnx_graph import onnx_model
    except ImportError as error:
        raise InputError(
            f"--to onnx needs {error.name}: install it by pip install 'resnet_flax[onnx]'"
        ) from error
    content: bytes = onnx_model(network, variables).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    check(network, variables, lambda images: session.run(["logits"], {"images": images})[0])
    return content


def check(network: Network, variables: Any, run: Callable[[np.ndarray], np.ndarray]) -> None:
    """Holds an exported program against the network, with one image and with three.

    Raises:
        RuntimeError: when their logits differ.
    """
    images = np.random.default_rng(0).random((3, *image_shape(network)), np.float32)
    expected = np.asarray(jax.jit(network.model.apply)(variables, images))
    for count in (1, 3):
        difference = np.abs(run(images[:count]) - expected[:count]).max() / np.abs(expected).max()
        if not difference <= TOLERANCES[jnp.dtype(network.model.dtype).name]:
            raise RuntimeError(f"the exported program's logits differ by {difference:.1e}")


def image_shape(network: Network) -> tuple[int, int, int]:
    """(H, W, C) of the images that the network itself takes."""
    return (network.image_size, network.image_size, network.image_shape[-1])


FORMATS = {"stablehlo": export_stablehlo, "onnx": export_onnx}


def main() -> None:
    """Reads the command line, exports, and says where to."""
    parser = OneLineParser(
        prog="python -m resnet_flax.export",
        description="Writes a trained network for programs without this package.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, help="(default: model.stablehlo, .onnx in RUN_DIR)")
    options = parser.parse_args()
    configure_runtime()
    network, variables = read_pretrained(options.run)
    content = FORMATS[options.to](network, variables)
    output = options.output or options.run / f"model.{options.to}"
    write(output, content)
    images = ", ".join(map(str, ("N", *image_shape(network))))
    print(f"{output}: from images ({images}) to {len(network.classes)} logits, checked")


def write(path: Path, content: bytes) -> None:
    """Writes a file, which appears under its name only when it is complete.

    Raises:
        InputError: when it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("xb") as file:  # a new file, not a link that came with the folder
            file.write(content)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
