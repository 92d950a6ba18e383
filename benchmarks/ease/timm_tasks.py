"""The six tasks in timm (PyTorch)."""

from benchmarks.ease import given
from benchmarks.ease.given import FOLDER, WEIGHTS, colour, grey, labels
from tests.support.foreign import import_timm

import_timm()  # where torchvision's operators do not load, timm needs help

# --- Task 1: build.
import timm

model = timm.create_model("resnet18", in_chans=1, num_classes=10)
parameters = sum(parameter.numel() for parameter in model.parameters())
# --- Check.
given.check_built(parameters)
mean_before = model.bn1.running_mean.clone()

# --- Task 2: train a step.
import torch
from torch.nn.functional import cross_entropy

optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model.train()
loss = cross_entropy(model(torch.from_numpy(grey).permute(0, 3, 1, 2)), torch.from_numpy(labels))
loss.backward()
optimizer.step()
# --- Check.
given.check_step(loss.item(), mean_before, model.bn1.running_mean)

# --- Task 3: load torchvision's weights.
model = timm.create_model("resnet18", checkpoint_path=WEIGHTS).eval()
images = torch.from_numpy(colour).permute(0, 3, 1, 2)
with torch.no_grad():
    logits = model(images)
# --- Check.
given.check_loaded(logits)

# --- Task 4: feature maps.
with torch.no_grad():
    _, *maps = model.forward_intermediates(images, intermediates_only=True)
# --- Check.
given.check_maps([part.permute(0, 2, 3, 1).numpy() for part in maps])
before = [value.clone() for key, value in model.state_dict().items() if "fc." not in key]

# --- Task 5: tune a new head.
model.requires_grad_(False)
model.reset_classifier(num_classes=10)
optimizer = torch.optim.Adam(model.fc.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = cross_entropy(model(images), torch.from_numpy(labels))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
# --- Check.
after = [value for key, value in model.state_dict().items() if "fc." not in key]
given.check_tuned(losses, before, after)

# --- Task 6: save and reload.
from safetensors.torch import save_file

save_file(model.state_dict(), FOLDER / "tuned.safetensors")
path = FOLDER / "tuned.safetensors"
reloaded = timm.create_model("resnet18", num_classes=10, checkpoint_path=path).eval()
# --- Check.
given.check_reloaded(model(images).detach(), reloaded(images).detach())
