"""The six tasks in resnet_flax."""

from benchmarks.ease.given import (
    FOLDER,
    WEIGHTS,
    check_built,
    check_loaded,
    check_maps,
    check_reloaded,
    check_step,
    check_tuned,
    colour,
    grey,
    grey_bytes,
    labels,
)

# --- Task 1: build.
import jax

from resnet_flax import resnet18

model = resnet18("torchvision")
variables = jax.jit(model.init)(jax.random.key(0), grey)
parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
# --- Check.
check_built(parameters)

# --- Task 2: train a step.
import numpy as np
import optax

from resnet_flax.metrics import Metrics
from resnet_flax.training import Images, create_train_state, train_step

data = Images.place(grey_bytes, labels)
state = create_train_state(model, optax.sgd(0.05), data, seed=0)
state, metrics = train_step(state, Metrics.empty(), data, np.arange(8), image_size=64)
# --- Check.
mean_before = variables["batch_stats"]["bn1"]["mean"]
check_step(metrics.loss, mean_before, state.batch_stats["bn1"]["mean"])

# --- Task 3: load torchvision's weights.
from resnet_flax.torch_weights import from_torch, load_safetensors

model = resnet18("torchvision", num_classes=1000)
variables = from_torch(model, load_safetensors(WEIGHTS))
logits = jax.jit(model.apply)(variables, colour)
# --- Check.
check_loaded(logits)

# --- Task 4: feature maps.
maps = model.apply(variables, colour, features=True)
# --- Check.
check_maps(maps)

# --- Task 5: tune a new head.
model = resnet18("torchvision", num_classes=10)
variables = from_torch(model, load_safetensors(WEIGHTS), new_head=0)
head, optimizer = variables["params"]["fc"], optax.adam(1e-2)
optimizer_state = optimizer.init(head)


def with_head(variables, head):
    return {**variables, "params": {**variables["params"], "fc": head}}


@jax.jit
def step(head, optimizer_state, variables, images, labels):
    def loss_function(head):
        logits = model.apply(with_head(variables, head), images)
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
loaded = from_torch(resnet18("torchvision", num_classes=1000), load_safetensors(WEIGHTS))
trunks = [{**v, "params": {**v["params"], "fc": {}}} for v in (loaded, tuned)]
check_tuned(losses, *map(jax.tree.leaves, trunks))

# --- Task 6: save and reload.
from resnet_flax.torch_weights import save_safetensors, to_torch

save_safetensors(FOLDER / "tuned.safetensors", to_torch(model, tuned))
reloaded = from_torch(model, load_safetensors(FOLDER / "tuned.safetensors"))
# --- Check.
check_reloaded(model.apply(tuned, colour), model.apply(reloaded, colour))
