"""The three tasks with pretrained weights in KerasHub (Keras on JAX), without TensorFlow."""

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, PHOTO, PICTURES

# --- Task 1: classify a photo.
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
import keras_hub
import numpy as np

name = "hf://timm/resnet50.a1_in1k"
classifier = keras_hub.models.ImageClassifier.from_preset(name, activation="softmax")
image = np.array([keras.utils.load_img(PHOTO)])
(answer,) = keras_hub.utils.decode_imagenet_predictions(classifier.predict(image), top=3)
# --- Check.
# It resizes the photo to 224 pixels and drops the weights' crop share: its pixels are not timm's,
# but for these, which it leaves alone, its answer is.
assert len(answer) == 3, answer
image = np.array([keras.utils.load_img(PHOTO).crop((6, 6, 230, 230))])
given.check_classified(np.sort(classifier.predict(image)[0])[:-4:-1])

# --- Task 2: features of a trunk.
backbone = keras_hub.models.Backbone.from_preset(name)
features = backbone.predict(classifier.preprocessor(image)).mean((1, 2))
# --- Check.
given.check_features(features)

# --- Task 3: fine-tune on a folder.
settings = {"image_size": (224, 224), "crop_to_aspect_ratio": True, "format": "grain"}
pictures = keras.utils.image_dataset_from_directory(PICTURES, **settings)
model = keras_hub.models.ImageClassifier.from_preset("hf://timm/resnet18.a1_in1k", num_classes=2)
losses = model.fit(pictures, epochs=2).history["loss"]
model.save_to_preset(FOLDER / "tuned")
# --- Check.
given.check_fine_tuned(losses, model.num_classes)
