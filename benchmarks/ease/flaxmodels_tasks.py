"""The six tasks in flaxmodels."""

import numpy as np

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, WEIGHTS, colour, grey, labels

# --- Task 1: build.
import flaxmodels
import jax

settings = {"output": "logits", "pretrained": None, "normalize": False}
model = flaxmodels.ResNet18(num_classes=10, **settings)
variables = jax.jit(model.init)(jax.random.key(0), grey)
parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
# --- Check.
given.check_built(parameters)
mean_before = variables["batch_stats"]["BatchNorm_0"]["mean"]
stem = model.clone(output="activations").apply(variables, grey, train=False)["conv1"]

# --- Task 2: train a step.
import optax

optimizer = optax.sgd(0.05)
optimizer_state = optimizer.init(variables["params"])


@jax.jit
def train_step(variables, optimizer_state, images, labels):
    def loss_function(params):
        inputs = {**variables, "params": params}
        logits, updates = model.apply(inputs, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    params = variables["params"]
    (loss, updates), gradients = jax.value_and_grad(loss_function, has_aux=True)(params)
    changes, optimizer_state = optimizer.update(gradients, optimizer_state)
    return {"params": optax.apply_updates(params, changes), **updates}, optimizer_state, loss


variables, optimizer_state, loss = train_step(variables, optimizer_state, grey, labels)
# --- Check.
mean_after = variables["batch_stats"]["BatchNorm_0"]["mean"]
given.check_step(float(loss), mean_before, mean_after)
# Its momentum is PyTorch's number with Flax's meaning: the new batch counts 0.9 instead of 0.1.
np.testing.assert_allclose(mean_after, 0.9 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-6)

# --- Task 3: load torchvision's weights.
from safetensors.numpy import load_file

weights = load_file(WEIGHTS)


def conv(key):
    return {"kernel": weights[f"{key}.weight"].transpose(2, 3, 1, 0)}


params = {"Conv_0": conv("conv1")}
params["Dense_0"] = {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
statistics = {}


def add_norm(params, statistics, name, key):
    params[name] = {"scale": weights[f"{key}.weight"], "bias": weights[f"{key}.bias"]}
    mean, var = weights[f"{key}.running_mean"], weights[f"{key}.running_var"]
    statistics[name] = {"mean": mean, "var": var}


add_norm(params, statistics, "BatchNorm_0", "bn1")
for number in range(8):
    block, key = f"BasicBlock_{number}", f"layer{number // 2 + 1}.{number % 2}"
    params[block], statistics[block] = {}, {}
    layers = [("conv1", "bn1"), ("conv2", "bn2"), ("downsample.0", "downsample.1")]
    for index, (convolution, norm) in enumerate(layers):
        if f"{key}.{convolution}.weight" in weights:
            params[block][f"Conv_{index}"] = conv(f"{key}.{convolution}")
            names = (f"BatchNorm_{index}", f"{key}.{norm}")
            add_norm(params[block], statistics[block], *names)
variables = {"params": params, "batch_stats": statistics}
model = flaxmodels.ResNet18(num_classes=1000, **settings)
logits = model.apply(variables, colour, train=False)
# --- Check.
given.check_loaded(logits)

# --- Task 4: feature maps.
extractor = model.clone(output="activations")
activations = extractor.apply(variables, colour, train=False)
maps = [activations[f"block{stage}_1"] for stage in (1, 2, 3, 4)]
# --- Check.
given.check_maps(maps)

# --- Task 5: tune a new head.
model = flaxmodels.ResNet18(num_classes=10, **settings)
head = jax.jit(model.init)(jax.random.key(0), colour)["params"]["Dense_0"]
optimizer = optax.adam(1e-2)
optimizer_state = optimizer.init(head)


def with_head(variables, head):
    return {**variables, "params": {**variables["params"], "Dense_0": head}}


@jax.jit
def step(head, optimizer_state, variables, images, labels):
    def loss_function(head):
        logits = model.apply(with_head(variables, head), images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_function)(head)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state)
    return optax.apply_updates(head, updates), optimizer_state, loss


losses = []
for _ in range(5):
    head, optimizer_state, loss = step(head, optimizer_state, variables, colour, labels)
    losses.append(float(loss))
tuned = with_head(variables, head)
# --- Check.
trunks = [{**v, "params": {**v["params"], "Dense_0": {}}} for v in (variables, tuned)]
given.check_tuned(losses, *map(jax.tree.leaves, trunks))

# --- Task 6: save and reload.
from flax import serialization

(FOLDER / "tuned.msgpack").write_bytes(serialization.to_bytes(tuned))
like = jax.jit(model.init)(jax.random.key(0), colour)
reloaded = serialization.from_bytes(like, (FOLDER / "tuned.msgpack").read_bytes())
# --- Check.
given.check_reloaded(
    model.apply(tuned, colour, train=False), model.apply(reloaded, colour, train=False)
)
