"""The three tasks with pretrained weights in flaxmodels."""

import re
import tempfile

import h5py
from safetensors.numpy import load_file

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, PHOTO, PICTURES

# Its own weights lie on its author's Dropbox. These lie where it keeps what it has fetched.
AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
tempfile.tempdir = str(FOLDER)
(FOLDER / "flaxmodels").mkdir()
for architecture in ("resnet18", "resnet50"):
    weights = load_file(FOLDER / f"{architecture}.a1_in1k" / "model.safetensors")
    with h5py.File(FOLDER / "flaxmodels" / f"{architecture}_weights.h5", "w") as file:
        for key, value in weights.items():
            key = re.sub(r"(layer\d)\.", r"\1.block", key)
            key = key.replace("downsample.0", "downsample.conv")
            key = key.replace("downsample.1", "downsample.bn").replace("running_", "")
            if value.ndim == 1:
                key = re.sub("weight$", "scale", key)
            if value.ndim:
                file[key.replace(".", "/")] = value.transpose(AXES[value.ndim])

# --- Task 1: classify a photo.
import flaxmodels
import jax
import numpy as np
from PIL import Image, ImageOps

photo = ImageOps.fit(Image.open(PHOTO).convert("RGB"), (235, 235)).crop((6, 6, 230, 230))
image = np.array(photo)[None] / np.float32(255)
model = flaxmodels.ResNet50(output="softmax", pretrained="imagenet")
variables = model.init(jax.random.key(0), image)
shares, indices = jax.lax.top_k(model.apply(variables, image, train=False)[0], 3)
# --- Check.
given.check_classified(shares)

# --- Task 2: features of a trunk.
trunk = flaxmodels.ResNet50(output="activations", pretrained="imagenet")
variables = trunk.init(jax.random.key(0), image)
features = trunk.apply(variables, image, train=False)["block4_2"].mean((1, 2))
# --- Check.
given.check_features(features)

# --- Task 3: fine-tune on a folder.
import optax
from flax import serialization

classes = sorted(path.name for path in PICTURES.iterdir())
paths = sorted(PICTURES.glob("*/*"))
pictures = [Image.open(path).convert("RGB") for path in paths]
images = np.stack([ImageOps.fit(picture, (224, 224)) for picture in pictures]) / np.float32(255)
labels = np.array([classes.index(path.parent.name) for path in paths])
model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=len(classes))
variables = flaxmodels.ResNet18(pretrained="imagenet").init(jax.random.key(0), images[:1])
head = model.init(jax.random.key(0), images[:1])["params"]["Dense_0"]
variables = {**variables, "params": {**variables["params"], "Dense_0": head}}
optimizer = optax.sgd(0.01, momentum=0.9, nesterov=True)
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


random = np.random.default_rng(0)
losses = []
for _ in range(2):
    order = random.permutation(len(images))
    for rows in np.split(order, range(32, len(order), 32)):
        batch = images[rows], labels[rows]
        variables, optimizer_state, loss = train_step(variables, optimizer_state, *batch)
    losses.append(loss.item())
(FOLDER / "tuned.msgpack").write_bytes(serialization.to_bytes(variables))
# --- Check.
given.check_fine_tuned(losses, len(classes))
