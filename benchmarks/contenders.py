"""The contenders of `throughput`, each in a process of its own: settings differ, buffers are apart.

``python -m benchmarks.contenders NAME OPTIONS`` compiles, says so, and then trains or evaluates as
many images as each line on its standard input asks for; it answers in JSON, one line each.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from resnet_flax.data import Dataset, load_fashion_mnist, shuffled_batches

# Reads a batch and trains on it; returns the seconds of the step alone, as D2L counts them.
TrainBatch = Callable[[np.ndarray], float]
# Reads a batch and counts the correct predictions.
EvaluateBatch = Callable[[np.ndarray], int]
Contender = tuple[TrainBatch, EvaluateBatch]


def resnet_flax(options: argparse.Namespace, data: Dataset) -> Contender:
    """This library: `train_step` and `eval_step` as `train.py` runs them."""
    from resnet_flax.machine.runtime import configure_runtime

    configure_runtime()
    import jax
    import optax

    from resnet_flax.nn.resnet import build_model
    from resnet_flax.training.metrics import Metrics
    from resnet_flax.training.step import Images, create_train_state, eval_step, train_steps

    size = options.image_size
    placed = Images.place(data.images, data.labels)
    model = build_model(options.model, dtype=options.dtype)
    state = create_train_state(model, optax.sgd(0.05), placed, 0)
    steps = jax.jit(partial(train_steps, image_size=size), donate_argnums=0)

    def train(indices: np.ndarray) -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = steps(state, Metrics.empty(), placed, jax.device_put(indices[None]), 1)
        assert np.isfinite(metrics.loss)
        return time.perf_counter() - start

    def evaluate(indices: np.ndarray) -> int:
        weights = np.ones(len(indices), np.float32)
        images, labels = placed.images[indices], placed.labels[indices]
        metrics = eval_step(state, Metrics.empty(), images, labels, weights, image_size=size)
        return int(metrics.correct)

    return train, evaluate


def plain_flax(options: argparse.Namespace, data: Dataset) -> Contender:
    """Flax's own layers in a plain training step; images are resized inside it as well."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.plain_flax import PlainResNet
    from resnet_flax.nn.preprocessing import prepare_images
    from resnet_flax.nn.resnet import build_model

    ours = build_model(options.model)
    model = PlainResNet(ours.stage_sizes, ours.block.__name__ == "Bottleneck")
    images, labels = jax.device_put((data.images, data.labels))
    shape = (1, options.image_size, options.image_size, 1)
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), jnp.zeros(shape), True)
    optimizer = optax.sgd(0.05)
    optimizer_state = optimizer.init(variables["params"])

    @jax.jit
    def train_step(variables: Any, optimizer_state: Any, indices: jax.Array) -> Any:
        pixels = prepare_images(images[indices], options.image_size)

        def loss(params: Any) -> Any:
            logits, updates = model.apply(
                {**variables, "params": params}, pixels, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices])
            return losses.mean(), updates["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, optimizer_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": statistics}, state, value

    @jax.jit
    def eval_step(variables: Any, indices: jax.Array) -> jax.Array:
        pixels = prepare_images(images[indices], options.image_size)
        logits: Any = model.apply(variables, pixels, train=False)
        return (logits.argmax(-1) == labels[indices]).sum()

    def train(indices: np.ndarray) -> float:
        nonlocal variables, optimizer_state
        start = time.perf_counter()
        variables, optimizer_state, value = train_step(variables, optimizer_state, indices)
        assert np.isfinite(float(value))
        return time.perf_counter() - start

    return train, lambda indices: int(eval_step(variables, indices))


def pytorch(options: argparse.Namespace, data: Dataset) -> Contender:
    """The PyTorch reference; its images are resized beforehand, which counts in its favour."""
    import torch
    from PIL import Image

    from resnet_flax.nn.resnet import build_model
    from tests.support.torch_reference import TorchvisionResNet, d2l_init

    ours = build_model(options.model)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    bottleneck = ours.block.__name__ == "Bottleneck"
    fields: Any = {"bottleneck": bottleneck, "bias": True, "norm_shortcut": False}
    network: Any = d2l_init(TorchvisionResNet(ours.stage_sizes, 1, 10, **fields))
    network = network.to(device=device, memory_format=layout)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
    optimizer = torch.optim.SGD(network.parameters(), 0.05)

    side = (options.image_size, options.image_size)
    resized = [
        np.asarray(Image.fromarray(image[..., 0]).resize(side, Image.Resampling.BILINEAR))
        for image in data.images
    ]
    pixels = torch.from_numpy(np.stack(resized)[:, None]).to(device)
    classes = torch.from_numpy(data.labels).long().to(device)

    def batch(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(indices).long().to(device)
        images = (pixels[chosen].float() / 255).contiguous(memory_format=layout)
        return images, classes[chosen]

    def train(indices: np.ndarray) -> float:
        images, labels = batch(indices)
        start = time.perf_counter()
        network.train()
        with mixed:
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert np.isfinite(loss.item())
        return time.perf_counter() - start

    @torch.no_grad()
    def evaluate(indices: np.ndarray) -> int:
        images, labels = batch(indices)
        network.eval()
        return int((network(images).argmax(-1) == labels).sum())

    return train, evaluate


CONTENDERS = {"resnet_flax": resnet_flax, "plain_flax": plain_flax, "pytorch": pytorch}


def matrix_product_roof() -> float:
    """GFLOP/s of the quickest of PyTorch's products of two 4096x4096 float32 matrices."""
    import torch

    a = torch.randn(4096, 4096, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(seconds) / 1e9


def main() -> None:
    """Answers the orders on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*CONTENDERS, "roof"])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    if options.name == "roof":
        print(json.dumps(matrix_product_roof()), flush=True)
        return

    size = options.batch_size
    data = load_fashion_mnist()[0].take(max(4096, 4 * size))
    batches = shuffled_batches(len(data), size, seed=0, epoch=1)
    batches = [indices for indices in batches if len(indices) == size]
    start = time.perf_counter()
    train, evaluate = CONTENDERS[options.name](options, data)
    train(batches[0])
    evaluate(batches[0])
    ready = time.perf_counter() - start
    train(batches[1])  # the first step also fills the allocator's pools
    print(json.dumps({"ready": ready}), flush=True)

    position = 0
    for line in sys.stdin:
        steps, evaluations = json.loads(line)
        start, training = time.perf_counter(), 0.0
        for _ in range(steps):
            position += 1
            training += train(batches[position % len(batches)])
        trained = time.perf_counter() - start
        for index in range(evaluations):
            evaluate(batches[index % len(batches)])
        answer = {
            "train": steps * size / training,
            "both": steps * size / (time.perf_counter() - start),
            "trained": trained,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
