"""The three tasks with pretrained weights in timm (PyTorch)."""

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, PHOTO, PICTURES
from tests.support.foreign import import_timm

import_timm()  # where torchvision's operators do not load, timm needs help

# --- Task 1: classify a photo.
import timm
import torch
from PIL import Image

model = timm.create_model("resnet50.a1_in1k", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open(PHOTO).convert("RGB"))
with torch.no_grad():
    shares, indices = model(image[None]).softmax(-1)[0].topk(3)
info = timm.data.ImageNetInfo()
answer = [info.index_to_description(index) for index in indices.tolist()]
# --- Check.
given.check_classified(shares)

# --- Task 2: features of a trunk.
trunk = timm.create_model("resnet50.a1_in1k", pretrained=True, num_classes=0).eval()
with torch.no_grad():
    features = trunk(image[None])
# --- Check.
given.check_features(features)

# --- Task 3: fine-tune on a folder.
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

model = timm.create_model("resnet18.a1_in1k", pretrained=True, num_classes=2)
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=True)
loader = DataLoader(ImageFolder(PICTURES, transform), batch_size=32, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
model.train()
losses = []
for _ in range(2):
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(loss.item())
torch.save(model.state_dict(), FOLDER / "tuned.pth")
# --- Check.
given.check_fine_tuned(losses, model.num_classes)
