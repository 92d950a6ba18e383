"""D2L's recipe here and in PyTorch, from the same weights on the same order of images.

``python -m benchmarks.loss_curves`` trains both for one pass over the first 20,000 images and draws
both losses in one picture. It takes a quarter of an hour on two cores.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from matplotlib.figure import Figure

from resnet_flax.data import Dataset, load_fashion_mnist, shuffled_batches
from resnet_flax.machine.runtime import configure_runtime
from resnet_flax.nn.preprocessing import prepare_images
from resnet_flax.nn.resnet import resnet18
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import Images, create_train_state, train_step
from resnet_flax.weights.state_dict import to_torch
from tests.support.torch_reference import d2l_resnet18

LEARNING_RATE = 0.05


def train_both(
    data: Dataset, batches: list[np.ndarray], image_size: int, seed: int
) -> tuple[list[float], list[float]]:
    """Trains both networks, step by step in turn; returns the losses of each."""
    images = Images.place(data.images, data.labels)
    model = resnet18()
    state = create_train_state(model, optax.sgd(LEARNING_RATE), images, seed)
    network = d2l_resnet18()
    weights = to_torch(model, state.variables, "d2l")
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE)

    ours, theirs = [], []
    for step, batch in enumerate(batches, start=1):
        state, metrics = train_step(
            state,
            Metrics.empty(),
            images.images[batch],
            images.labels[batch],
            image_size=image_size,
        )
        ours.append(metrics.loss)

        pixels = np.asarray(prepare_images(images.images[batch], image_size))
        optimizer.zero_grad()
        logits = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        labels = torch.from_numpy(data.labels[batch]).long()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
        print(f"step {step}/{len(batches)}: {ours[-1]:.4f} here, {theirs[-1]:.4f} in PyTorch")
    return ours, theirs


def draw(ours: list[float], theirs: list[float], path: Path) -> None:
    """Draws both curves, and what is between them, into one picture."""
    steps = range(1, len(ours) + 1)
    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    curves, difference = figure.subplots(1, 2)
    curves.plot(steps, theirs, linewidth=4, alpha=0.35, label="PyTorch")
    curves.plot(steps, ours, linewidth=1.2, color="black", label="resnet_flax")
    curves.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    curves.legend()
    difference.semilogy(steps, np.abs(np.subtract(ours, theirs)), "k.-", linewidth=0.8)
    difference.set(xlabel="step", ylabel="absolute difference of the losses")
    for axes in (curves, difference):
        axes.grid(alpha=0.4)
    figure.savefig(path)


def main() -> None:
    """Trains, draws, and prints how far apart the losses are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-examples", type=int, default=20_000)
    parser.add_argument("--image-size", type=int, default=96, help="in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/loss_curves.png"))
    options = parser.parse_args()

    configure_runtime()
    data = load_fashion_mnist()[0].take(options.train_examples)
    batches = shuffled_batches(len(data), 256, seed=options.seed, epoch=1)
    ours, theirs = train_both(data, batches, options.image_size, options.seed)
    draw(ours, theirs, options.output)
    gaps = np.abs(np.subtract(ours, theirs))
    tenth = len(ours) // 10 or 1
    print(
        f"first loss {ours[0]:.6f} here, {theirs[0]:.6f} in PyTorch; mean of the last {tenth} "
        f"steps {np.mean(ours[-tenth:]):.4f} and {np.mean(theirs[-tenth:]):.4f}; largest "
        f"difference {gaps.max():.4f}, median {np.median(gaps):.1e} "
        f"(seed {options.seed}, jax {jax.__version__}, torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
