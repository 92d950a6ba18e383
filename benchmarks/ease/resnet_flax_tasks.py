"""The six tasks in resnet_flax."""

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, WEIGHTS, colour, colour_bytes, grey, grey_bytes, labels

# --- Task 1: build.
import jax

from resnet_flax import resnet18

model = resnet18("torchvision")
variables = jax.jit(model.init)(jax.random.key(0), grey)
parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
# --- Check.
given.check_built(parameters)

# --- Task 2: train a step.
import optax

from resnet_flax import Metrics, create_train_state, train_step

state = create_train_state(model, optax.sgd(0.05), (grey_bytes, labels))
state, metrics = train_step(state, Metrics.empty(), grey_bytes, labels, image_size=64)
# --- Check.
mean_before = variables["batch_stats"]["bn1"]["mean"]
given.check_step(metrics.loss, mean_before, state.batch_stats["bn1"]["mean"])

# --- Task 3: load torchvision's weights.
from resnet_flax import from_torch, load_safetensors

model = resnet18("torchvision", num_classes=1000)
variables = from_torch(model, load_safetensors(WEIGHTS))
logits = jax.jit(model.apply)(variables, colour)
# --- Check.
given.check_loaded(logits)

# --- Task 4: feature maps.
maps = model.apply(variables, colour, features=True)
# --- Check.
given.check_maps(maps)
loaded = variables

# --- Task 5: tune a new head.
from resnet_flax.training.recipes import freeze

model = resnet18("torchvision", num_classes=10, frozen_stages=5)
variables = from_torch(model, load_safetensors(WEIGHTS), new_head=0)
data, optimizer = (colour_bytes, labels), freeze(optax.adam(1e-2), model)
state = create_train_state(model, optimizer, data, variables=variables)
losses = []
for _ in range(5):
    state, metrics = train_step(state, Metrics.empty(), *data, image_size=64)
    losses.append(metrics.loss)
# --- Check.
trunks = [{**v, "params": {**v["params"], "fc": {}}} for v in (loaded, state.variables)]
given.check_tuned(losses, *map(jax.tree.leaves, trunks))

# --- Task 6: save and reload.
from resnet_flax import save_safetensors, to_torch

save_safetensors(FOLDER / "tuned.safetensors", to_torch(model, state.variables))
reloaded = from_torch(model, load_safetensors(FOLDER / "tuned.safetensors"))
# --- Check.
given.check_reloaded(model.apply(state.variables, colour), model.apply(reloaded, colour))
