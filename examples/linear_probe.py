"""What features are worth: a linear classifier on pixels, and on a network's pooled features.

``python examples/linear_probe.py`` trains a small network with the recipe ``fast``, leaves its
dense layer away, and fits logistic regression to what it pools from *other* images; beside it, the
same for the untrained network and for the pixels themselves. It takes a minute on two cores.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_flax import ResNet, build_model, configure_runtime
from resnet_flax.commands.command_line import run_command
from resnet_flax.data import Dataset, load_fashion_mnist, shuffled_batches
from resnet_flax.machine.runtime import keep_compiled_programs
from resnet_flax.nn.preprocessing import prepare_images
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.recipes import RECIPES, build_optimizer
from resnet_flax.training.step import TrainState, create_train_state, train_step

RECIPE = RECIPES["fast"]


def train_network(data: Dataset, epochs: int) -> tuple[ResNet, TrainState, TrainState]:
    """The network, its state before training, and after."""
    model = build_model(RECIPE.model, RECIPE.flavour)
    epoch_batches = partial(shuffled_batches, len(data), RECIPE.batch_size, seed=0)
    batches = [batch for epoch in range(1, epochs + 1) for batch in epoch_batches(epoch=epoch)]
    optimizer = build_optimizer(RECIPE, RECIPE.learning_rate, steps=len(batches))
    state = create_train_state(model, optimizer, (data.images, data.labels), average=True)
    untrained = jax.tree.map(jnp.copy, state)  # `train_step` takes the state's memory
    metrics = Metrics.empty()
    for batch in batches:
        state, metrics = train_step(
            state,
            metrics,
            data.images[batch],
            data.labels[batch],
            image_size=RECIPE.image_size,
            **RECIPE.step_options(),
        )
    print(f"trained on {len(data)} images: loss {metrics.loss:.3f}, acc {metrics.accuracy:.3f}")
    return model, untrained, state


def pooled_features(model: ResNet, state: TrainState, data: Dataset) -> jax.Array:
    """(N, C): what the network pools from each image; ``num_classes=0`` has no dense layer."""
    trunk = model.clone(num_classes=0)
    params = {name: leaf for name, leaf in state.variables["params"].items() if name != "fc"}
    extract = jax.jit(partial(trunk.apply, {**state.variables, "params": params}))
    parts = np.array_split(data.images, max(1, len(data) // 500))
    return jnp.concatenate([extract(scaled(part)) for part in parts])


def pixels(data: Dataset) -> jax.Array:
    """(N, 784): the images themselves."""
    return scaled(data.images).reshape(len(data), -1)


def scaled(images: np.ndarray) -> jax.Array:
    """Images as the network takes them: float32 in [0, 1]."""
    return prepare_images(jnp.asarray(images), RECIPE.image_size)


@partial(jax.jit, static_argnames="steps")
def fit_logistic_regression(features: jax.Array, labels: jax.Array, steps: int = 100) -> Any:
    """Weights and bias of ten linear classifiers, by L-BFGS, with a little weight decay."""
    optimizer = optax.lbfgs()

    def loss_function(params: Any) -> jax.Array:
        logits = features @ params["kernel"] + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + 1e-4 * (params["kernel"] ** 2).sum()

    value_and_grad = optax.value_and_grad_from_state(loss_function)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss_function
        )
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((features.shape[1], 10)), "bias": jnp.zeros(10)}
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params


def probe(fit_to: jax.Array, labels: np.ndarray, test: jax.Array, test_labels: np.ndarray) -> float:
    """Accuracy on the test features of a linear classifier fitted to others."""
    mean, deviation = fit_to.mean(0), fit_to.std(0) + 1e-6
    params = fit_logistic_regression((fit_to - mean) / deviation, labels)
    logits = (test - mean) / deviation @ params["kernel"] + params["bias"]
    return float((logits.argmax(-1) == test_labels).mean())


def main() -> None:
    """Trains, extracts, fits and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train-examples", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--probe-examples", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--epochs", type=int, default=1, help="(default: 1)")
    options = parser.parse_args()
    configure_runtime()
    keep_compiled_programs()
    train_data, test_data = load_fashion_mnist()
    test_data = test_data.take(2000)
    # The last training images, which the network has not seen.
    others = slice(-options.probe_examples, None)
    probe_data = Dataset(train_data.images[others], train_data.labels[others])
    model, untrained, trained = train_network(
        train_data.take(options.train_examples), options.epochs
    )

    extractors: dict[str, Callable[[Dataset], jax.Array]] = {
        "pixels": pixels,
        "random features": partial(pooled_features, model, untrained),
        "trained features": partial(pooled_features, model, trained),
    }
    print(f"a linear classifier of {len(probe_data)} other images:")
    for name, extract in extractors.items():
        features, tested = extract(probe_data), extract(test_data)
        accuracy = probe(features, probe_data.labels, tested, test_data.labels)
        print(f"{name:<16} {features.shape[1]:>4} numbers, test acc {accuracy:.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
