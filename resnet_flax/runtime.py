"""Settings that must stand in the environment before JAX starts its backend."""

import os

import jax

# jaxlib 0.10.2 hands reductions, products and convolutions to YNNPACK, which gets some large
# reductions wrong (jax#39103; tests/test_runtime.py shows it) and trains this network at two thirds
# of the speed of XLA's own path.
YNNPACK_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def configure_runtime() -> None:
    """Chooses sound compiler settings; call it before the first JAX computation.

    ``train.py`` calls it. Programs that import the library may, in their first lines; once JAX has
    started its backend it has no effect. What the user has set in the environment always wins.

    * YNNPACK is turned off on CPUs (``XLA_FLAGS``): some of its reductions are wrong.
    * The GPU's memory is taken as needed instead of three quarters of it at once
      (``XLA_PYTHON_CLIENT_PREALLOCATE``).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if YNNPACK_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {YNNPACK_FLAG}=".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def device_name() -> str:
    """The device that computes, in PyTorch's words: ``cpu`` or ``cuda:0``."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else f"cuda:{device.id}"
