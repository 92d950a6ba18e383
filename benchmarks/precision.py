"""How precise float32 gradients are, here and in PyTorch, against float64 in PyTorch.

``python -m benchmarks.precision`` takes D2L's ResNet-18, one batch of 256 images of 96x96 pixels,
and prints the relative error (2-norm) of logits and of some weights' gradients. The gradients of
early layers differ by more than rounding, because values near zero fall on the other side of a
ReLU; how many do tells how precise the forward pass is.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from resnet_flax.data import load_fashion_mnist
from resnet_flax.machine.runtime import configure_runtime
from resnet_flax.nn.preprocessing import prepare_images
from resnet_flax.nn.resnet import resnet18
from resnet_flax.weights.state_dict import to_torch
from tests.support.torch_reference import d2l_resnet18

SHOWN = ("logits", "7.weight", "4.0.conv1.weight", "2.0.conv1.weight", "0.0.weight")


def flax_gradients(variables: Any, pixels: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Logits and gradients in float32, under PyTorch's names."""
    model = resnet18()

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, _ = model.apply(
                {**variables, "params": params}, pixels, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    found, logits = gradients(variables["params"])
    named = to_torch(model, {**variables, "params": found}, "d2l")
    return {**named, "logits": np.asarray(logits)}


def torch_gradients(
    variables: Any, pixels: np.ndarray, labels: np.ndarray, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """The same in PyTorch."""
    network = d2l_resnet18()
    weights = to_torch(resnet18(), variables, "d2l")
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    network.to(dtype)
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(dtype)
    logits = network(images)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long()).backward()
    named = {key: np.asarray(value.grad) for key, value in network.named_parameters()}
    return {**named, "logits": logits.detach().numpy()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=96, help="in pixels")
    options = parser.parse_args()

    configure_runtime()
    data = load_fashion_mnist()[0].take(options.batch_size)
    pixels = np.asarray(prepare_images(jnp.asarray(data.images), options.image_size))
    variables = jax.jit(resnet18().init)(jax.random.key(0), pixels[:1])
    exact = torch_gradients(variables, pixels, data.labels, torch.float64)
    columns = {
        f"resnet_flax, jax {jax.__version__}": flax_gradients(variables, pixels, data.labels),
        f"PyTorch {torch.__version__}": torch_gradients(
            variables, pixels, data.labels, torch.float32
        ),
    }
    print(f"{'':<18}", *(f"{name:>28}" for name in columns))
    for name in SHOWN:
        norm = np.linalg.norm(exact[name])
        errors = [np.linalg.norm(column[name] - exact[name]) / norm for column in columns.values()]
        print(f"{name:<18}", *(f"{error:>28.1e}" for error in errors))


if __name__ == "__main__":
    main()
