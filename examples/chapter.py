"""D2L's section on residual networks as a program: blocks, table of shapes, a short training.

``python examples/chapter.py`` takes a minute on two cores: it trains the book's network on the
first images of Fashion-MNIST alone, at their own size. ``train.py`` is the whole training.
"""

import argparse
import sys
import time

import jax

from resnet_flax import Residual, configure_runtime, resnet18
from resnet_flax.commands.command_line import run_command
from resnet_flax.commands.summary import print_table
from resnet_flax.data import load_fashion_mnist, shuffled_batches
from resnet_flax.machine.runtime import device_name, keep_compiled_programs
from resnet_flax.nn.summary import summarize
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.recipes import RECIPES, build_optimizer
from resnet_flax.training.step import Images, create_train_state, evaluate, train_step


def show_blocks() -> None:
    """The shapes that the book shows: one block keeps them, the other halves height and width."""
    images = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
    for block in (Residual(3), Residual(6, use_1x1conv=True, strides=2)):
        output, _ = block.init_with_output(jax.random.key(1), images)
        print(f"Residual({block.num_channels}): {images.shape} -> {output.shape}")


def train(train_examples: int, test_examples: int, batch_size: int, image_size: int) -> None:
    """One epoch on the first images, with the book's optimiser, and the two lines it ends with."""
    train_data, test_data = load_fashion_mnist()
    train_data, test_data = train_data.take(train_examples), test_data.take(test_examples)
    test_set = Images.place(test_data.images, test_data.labels)

    recipe = RECIPES["d2l"]
    batches = shuffled_batches(len(train_data), batch_size, seed=0, epoch=1)
    optimizer = build_optimizer(recipe, recipe.learning_rate, steps=len(batches))
    state = create_train_state(resnet18(), optimizer, (train_data.images, train_data.labels))
    metrics = Metrics.empty()
    started = time.perf_counter()
    for batch in batches:
        images, labels = train_data.images[batch], train_data.labels[batch]
        state, metrics = train_step(state, metrics, images, labels, image_size=image_size)
    loss = metrics.loss  # waits for the device
    seconds = time.perf_counter() - started
    tested = evaluate(state, test_set, batch_size=batch_size, image_size=image_size)
    print(f"loss {loss:.3f}, train acc {metrics.accuracy:.3f}, test acc {tested.accuracy:.3f}")
    print(f"{len(train_data) / seconds:.1f} examples/sec on {device_name()}, compilation included")


def main() -> None:
    """The section, from the block to the trained network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train-examples", type=int, default=8192, help="(default: 8192)")
    parser.add_argument("--test-examples", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--image-size", type=int, default=28, help="in pixels (default: 28)")
    options = parser.parse_args()
    configure_runtime()
    keep_compiled_programs()
    show_blocks()
    print_table(summarize(resnet18(), image_size=224))
    train(**vars(options))


if __name__ == "__main__":
    sys.exit(run_command(main))
