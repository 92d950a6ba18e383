"""The six tasks in KerasHub (Keras on JAX)."""

import numpy as np

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, WEIGHTS, colour, grey, labels

# --- Task 1: build.
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
import keras_hub

backbone = keras_hub.models.ResNetBackbone(
    input_conv_filters=[64],
    input_conv_kernel_sizes=[7],
    stackwise_num_filters=[64, 128, 256, 512],
    stackwise_num_blocks=[2, 2, 2, 2],
    stackwise_num_strides=[1, 2, 2, 2],
    block_type="basic_block",
    image_shape=(64, 64, 1),
)
model = keras_hub.models.ResNetImageClassifier(backbone, num_classes=10)
parameters = sum(weight.value.size for weight in model.trainable_weights)
# --- Check.
given.check_built(parameters)
mean_before = np.array(backbone.get_layer("conv1_bn").moving_mean)

# --- Task 2: train a step.
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.05), loss)
value = model.train_on_batch(grey, labels)
# --- Check.
given.check_step(value[0], mean_before, backbone.get_layer("conv1_bn").moving_mean)

# --- Task 3: load torchvision's weights.
import json
import shutil

preset = FOLDER / "preset"  # a folder as timm's on Hugging Face
preset.mkdir(exist_ok=True)
shutil.copy(WEIGHTS, preset / "model.safetensors")
(preset / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 1000}))
model = keras_hub.models.ImageClassifier.from_preset(str(preset), preprocessor=None)
logits = model.predict(colour)
# --- Check.
given.check_loaded(logits)

# --- Task 4: feature maps.
trunk = keras.Model(model.backbone.input, list(model.backbone.pyramid_outputs.values()))
maps = trunk.predict(colour)
# --- Check.
given.check_maps(maps)
before = [np.array(weight) for weight in model.backbone.weights]

# --- Task 5: tune a new head.
model = keras_hub.models.ImageClassifier.from_preset(str(preset), num_classes=10, preprocessor=None)
model.backbone.trainable = False
model.compile(keras.optimizers.Adam(1e-2), loss)
losses = model.fit(colour, labels, epochs=5).history["loss"]
# --- Check.
given.check_tuned(losses, before, [np.array(weight) for weight in model.backbone.weights])

# --- Task 6: save and reload.
model.save(FOLDER / "tuned.keras")
reloaded = keras.saving.load_model(FOLDER / "tuned.keras")
# --- Check.
given.check_reloaded(model.predict(colour), reloaded.predict(colour))
