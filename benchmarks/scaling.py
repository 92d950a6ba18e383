"""How training would scale to many devices: what they send is counted, its time worked out.

``python -m benchmarks.scaling`` compiles the training step of ResNet-50 for eight simulated devices
and counts its all-reduces: one or more for each batch normalisation, whose statistics are those of
the whole batch, and the gradients. From them, the rate of one device and the network's figures (the
flags; the defaults are assumptions, put yours) follow the seconds of a step on 8, 64, 512 devices,
as if nothing overlapped: the gradients at the network's bandwidth (a ring, Patarasuk & Yuan, 2009),
each small all-reduce at its latency.
"""

import argparse
import math
import os
import re
from functools import partial

from benchmarks.tables import Table, output_flag

DEVICES = 8
BYTES = {"f32": 4, "s32": 4}
SMALL = 100_000  # bytes; below, an all-reduce takes its latency


def count_all_reduces(model_name: str, image_size: int) -> list[int]:
    """Bytes of each all-reduce of the compiled step."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    from resnet_flax.machine.runtime import configure_runtime

    configure_runtime()
    import jax
    import numpy as np
    import optax

    from resnet_flax.machine.devices import data_mesh, replicate, replicated, split_batch
    from resnet_flax.nn.resnet import build_model
    from resnet_flax.training.metrics import Metrics
    from resnet_flax.training.step import Images, create_train_state, train_steps

    mesh = data_mesh()
    images, labels = np.zeros((DEVICES, 28, 28, 1), np.uint8), np.zeros(DEVICES, np.int32)
    model = build_model(model_name)
    state = create_train_state(model, optax.sgd(0.05), Images.place(images, labels), 0)
    data = Images.place(images, labels, mesh)
    state = replicate(state, mesh)
    indices = split_batch(np.arange(DEVICES, dtype=np.int32)[None], mesh)
    steps = jax.jit(partial(train_steps, image_size=image_size), out_shardings=replicated(mesh))
    lowered = steps.lower(state, replicate(Metrics.empty(), mesh), data, indices, 1)
    program = lowered.compile().as_text() or ""
    sizes = []
    for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", program):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes.append(
            sum(
                BYTES.get(dtype, 8) * math.prod(map(int, filter(None, dimensions.split(","))))
                for dtype, dimensions in arrays
            )
        )
    return sizes


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=64, help="of the compiled step, pixels")
    parser.add_argument("--batch-size", type=int, default=256, help="images of each device")
    parser.add_argument("--images-per-second", type=float, default=3000, help="of one device")
    parser.add_argument("--bandwidth", type=float, default=50, help="of each device, GB/s")
    parser.add_argument("--latency", type=float, default=10, help="of a message, microseconds")
    output_flag(parser, "scaling")
    options = parser.parse_args()

    sizes = count_all_reduces(options.model, options.image_size)
    small, large = [s for s in sizes if s < SMALL], [s for s in sizes if s >= SMALL]
    print(f"{options.model}: {len(small)} all-reduces of {sum(small) / 1e3:.0f} kB together, and")
    print(f"{len(large)} of {sum(large) / 1e6:.0f} MB together\n")
    columns = ("compute, ms", "gradients, ms", "small all-reduces, ms", "efficiency")
    table = Table("devices", *columns)
    compute = options.batch_size / options.images_per_second
    for devices in (1, 8, 64, 512):
        gradients = 2 * (devices - 1) / devices * sum(large) / (options.bandwidth * 1e9)
        latency = (
            len(small) * 2 * math.log2(devices) * options.latency * 1e-6
        )  # a tree, up and down
        share = compute / (compute + gradients + latency)
        figures = (f"{1e3 * seconds:.1f}" for seconds in (compute, gradients, latency))
        table.add(f"{devices}", *figures, f"{share:.0%}")
    table.keep(options.output)


if __name__ == "__main__":
    main()
