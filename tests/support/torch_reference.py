"""The project's only PyTorch network: what `resnet_flax` is measured against. NCHW throughout.

Written from the tables of the two originals: D2L's section "Residual Networks" (`Residual`,
`resnet_block`, `d2l_resnet18`) and He et al. (`TorchvisionResNet`, whose keys are torchvision's).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """D2L's block: biased convolutions, and no BN on the 1x1 convolution of the shortcut."""

    def __init__(
        self, inputs: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, num_channels, 3, strides, 1)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, 1, 1)
        self.conv3 = nn.Conv2d(inputs, num_channels, 1, strides) if use_1x1conv else None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inputs, H, W) to (N, num_channels, ceil(H / strides), ceil(W / strides))."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + (x if self.conv3 is None else self.conv3(x)))


def resnet_block(
    inputs: int, num_channels: int, num_residuals: int, first_block: bool = False
) -> nn.Sequential:
    """D2L's stage: the first block halves height and width, unless it is the network's first."""
    first = Residual(inputs, num_channels, not first_block, 1 if first_block else 2)
    others = [Residual(num_channels, num_channels) for _ in range(num_residuals - 1)]
    return nn.Sequential(first, *others)


def d2l_resnet18(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """D2L's ResNet-18, with D2L's keys: "0.0.weight", "1.0.conv1.weight", ..., "7.weight"."""
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(in_channels, 64, 7, 2, 3),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ),
        resnet_block(64, 64, 2, first_block=True),
        resnet_block(64, 128, 2),
        resnet_block(128, 256, 2),
        resnet_block(256, 512, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


def d2l_init(net: nn.Module) -> nn.Module:
    """D2L's start: Xavier-uniform weights, and PyTorch's default biases, as they already are."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return net


def randomise_norms(net: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draws scale, bias and running statistics of every BN: a fresh BN hides faults."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return net


class TorchvisionBlock(nn.Module):
    """He's block: 3x3, 3x3 or, as a bottleneck, 1x1, 3x3, 1x1 with four times the channels."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        stride: int = 1,
        *,
        bottleneck: bool = False,
        bias: bool = False,
        norm_shortcut: bool = True,
        average_shortcut: bool = False,
        width: float = 1.0,
        groups: int = 1,
        width_per_group: int = 64,
        dilation: int = 1,
        stride_first: bool = False,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        self.preactivation = preactivation
        middle = int(channels * width * width_per_group / 64) * groups
        # Each convolution as (kernel size, output channels, stride, dilation, groups).
        if bottleneck:
            first, second = (stride, 1) if stride_first else (1, stride)
            convolutions = [
                (1, middle, first, 1, 1),
                (3, middle, second, dilation, groups),
                (1, 4 * channels, 1, 1, 1),
            ]
        else:
            convolutions = [(3, middle, stride, 1, 1), (3, middle, 1, 1, 1)]
        self.outputs = convolutions[-1][1]
        self.depth = len(convolutions)

        channels_in = inputs
        for number, (size, channels_out, step, spread, parts) in enumerate(convolutions, 1):
            padding = spread * (size // 2)
            conv = nn.Conv2d(channels_in, channels_out, size, step, padding, spread, parts, bias)
            setattr(self, f"conv{number}", conv)
            setattr(
                self, f"bn{number}", nn.BatchNorm2d(channels_in if preactivation else channels_out)
            )
            channels_in = channels_out

        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != self.outputs:
            self.downsample = nn.Sequential()
            if average_shortcut:  # has a number even where it does nothing
                pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
                self.downsample.append(pool if stride == 2 else nn.Identity())
                stride = 1
            self.downsample.append(nn.Conv2d(inputs, self.outputs, 1, stride, bias=bias))
            if norm_shortcut:
                self.downsample.append(nn.BatchNorm2d(self.outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        layers = [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in self.numbers]
        if self.preactivation:
            (conv, norm), *others = layers
            activated = F.relu(norm(x))
            y = conv(activated)
            for conv, norm in others:
                y = conv(F.relu(norm(y)))
            return y + (x if self.downsample is None else self.downsample(activated))

        *others, (last_conv, last_norm) = layers
        y = x
        for conv, norm in others:
            y = F.relu(norm(conv(y)))
        y = last_norm(last_conv(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    @property
    def numbers(self) -> range:
        """1, 2 or 1, 2, 3: the numbers in the names of convolutions and BNs."""
        return range(1, self.depth + 1)


def torchvision_stage(
    inputs: int,
    channels: int,
    size: int,
    stride: int,
    dilations: tuple[int, int] = (1, 1),
    **fields: bool | float,
) -> nn.Sequential:
    """A stage of ``size`` blocks, the first with ``stride``; ``fields`` as in the block.

    The dilations are those of the first block, and of the others.
    """
    blocks = [TorchvisionBlock(inputs, channels, stride, dilation=dilations[0], **fields)]
    for _ in range(size - 1):
        inputs = blocks[-1].outputs
        blocks.append(TorchvisionBlock(inputs, channels, dilation=dilations[1], **fields))
    return nn.Sequential(*blocks)


def deep_stem(inputs: int, channels: int, bias: bool) -> nn.Sequential:
    """The first convolutions of timm's "D"."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(inputs, half, 3, 2, 1, bias=bias),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, half, 3, 1, 1, bias=bias),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, channels, 3, 1, 1, bias=bias),
    )


class TorchvisionResNet(nn.Module):
    """The family with torchvision's keys; ``fields`` as in `TorchvisionBlock`.

    With ``bias=True, norm_shortcut=False`` it is D2L's network under torchvision's keys. A
    pre-activation network has no stem BN ("bn1") but one before the pooling ("norm").
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        in_channels: int = 3,
        num_classes: int = 1000,
        stem: str = "imagenet",
        channels: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (),
        **fields: bool | float,
    ) -> None:
        super().__init__()
        bias, self.preactivation = bool(fields.get("bias")), bool(fields.get("preactivation"))
        if stem == "deep":
            self.conv1 = deep_stem(in_channels, channels, bias)
        else:
            size, stride, padding = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1)}[stem]
            self.conv1 = nn.Conv2d(in_channels, channels, size, stride, padding, bias=bias)
        if not self.preactivation:
            self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{number}" for number in range(1, len(stage_sizes) + 1)]
        planes, dilation = channels, 1
        replaced = (False, *(replace_stride_with_dilation or [False] * (len(stage_sizes) - 1)))
        for index, (name, size) in enumerate(zip(self.stages, stage_sizes, strict=True)):
            stride, before = 1 if index == 0 else 2, dilation
            if replaced[index]:
                stride, dilation = 1, dilation * stride
            dilations = (before, dilation)
            stage = torchvision_stage(
                channels, planes * 2**index, size, stride, dilations, **fields
            )
            setattr(self, name, stage)
            channels = stage[-1].outputs
        if self.preactivation:
            self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.conv1(x)
        if not self.preactivation:
            x = F.relu(self.bn1(x))
        x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.preactivation:
            x = F.relu(self.norm(x))
        return self.fc(x.mean((2, 3)))
