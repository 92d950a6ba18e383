"""Compiles a run's programs for an H100, on a machine without one.

``python -m tests.support.compile_for_gpu MODEL FLAVOUR IMAGE_SIZE DTYPE``: JAX's plugin for CUDA
does all that it does for a GPU, but for measuring which kernels are the quickest.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin is there, and looks for no GPU

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from resnet_flax.nn.ops.platform import traced_for
from resnet_flax.nn.resnet import build_model
from resnet_flax.training import Images, Metrics, create_train_state, train_steps
from resnet_flax.training.step import eval_by_index

# NVIDIA's figures of the chip, in the form of XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BATCH, LAST, STEPS, EXAMPLES = 256, 96, 8, 1000


def main(name: str, flavour: str, image_size: str, dtype: str) -> None:
    """Compiles the training steps, an epoch's last step, and the evaluation."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    place = SingleDeviceSharding(topology.devices[0])
    model, size = build_model(name, flavour, dtype=dtype), int(image_size)
    side, channels = (28, 1) if size < 100 else (224, 3)

    def shaped(*shape: int, dtype: object = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    data = Images(shaped(EXAMPLES, side, side, channels, dtype=jnp.uint8), shaped(EXAMPLES))
    few = np.zeros((1, side, side, channels), np.uint8), np.zeros(1, np.int32)
    state = jax.eval_shape(lambda: create_train_state(model, optax.sgd(0.05), few))
    sums = jax.eval_shape(Metrics.empty)
    jit = partial(jax.jit, in_shardings=place, out_shardings=place)
    train = jit(partial(train_steps, image_size=size), donate_argnums=0)
    for batch in ((STEPS, BATCH), (1, LAST)):
        train.lower(state, sums, data, shaped(*batch), shaped()).compile()
        print("training", *batch, flush=True)
    weights = shaped(BATCH, dtype=jnp.float32)
    evaluate = jit(partial(eval_by_index, image_size=size))
    evaluate.lower(state, sums, data, shaped(BATCH), weights).compile()
    print("evaluation", flush=True)


if __name__ == "__main__":
    with traced_for("gpu"):  # as a run there is
        main(*sys.argv[1:])
