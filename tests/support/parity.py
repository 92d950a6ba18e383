"""What the parity tests compare: our modules, PyTorch's, and the differences at five levels.

(a) the output in eval mode, (b) the output in train mode, (c) the gradient of every parameter and
of the input, (d) the running statistics, (e) parameters and statistics over 20 steps of SGD on real
images. Both sides start from the same random weights.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict
from PIL import Image
from torch import nn

from resnet_flax import Bottleneck, Residual, ResNet, Stage, build_model
from resnet_flax.data import Dataset
from resnet_flax.nn.layers import BatchNorm, Conv
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION, Normalization, prepare_images
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.recipes import Recipe, build_optimizer
from resnet_flax.training.step import TrainState, train_step
from resnet_flax.weights.keys import torch_keys
from resnet_flax.weights.state_dict import from_torch, to_torch
from tests.support import torch_reference as reference


@dataclass(frozen=True)
class Case:
    """One of our modules and its PyTorch counterpart.

    Attributes:
        name: as in the tests' ids.
        channels: of the input.
        ours: makes our module for a dtype.
        theirs: makes PyTorch's.
        layout: of PyTorch's keys.
    """

    name: str
    channels: int
    ours: Callable[[str], Any]
    theirs: Callable[[], nn.Module]
    layout: str = "torchvision"


def layers(dtype: str, use_bias: bool) -> dict[str, Any]:
    """The fields of a block that computes in a dtype."""
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    return {
        "conv": partial(Conv, use_bias=use_bias, **dtypes),
        "norm": partial(BatchNorm, **dtypes),
        "norm_shortcut": not use_bias,
    }


def d2l_block(name: str, channels: int, num_channels: int, strides: int) -> Case:
    def ours(dtype: str) -> Residual:
        return Residual(num_channels, strides != 1, strides, **layers(dtype, use_bias=True))

    def theirs() -> nn.Module:
        return reference.Residual(channels, num_channels, strides != 1, strides)

    return Case(name, channels, ours, theirs, "d2l")


def block(
    name: str,
    kind: type[Residual | Bottleneck],
    channels: int,
    num_channels: int,
    strides: int,
    use_bias: bool = False,
    **fields: bool | int,
) -> Case:
    def ours(dtype: str) -> Any:
        use_1x1conv = strides != 1 or channels != kind(num_channels).features
        return kind(num_channels, use_1x1conv, strides, **fields, **layers(dtype, use_bias))

    def theirs() -> nn.Module:
        fields_of_theirs = {"bias": use_bias, "norm_shortcut": not use_bias, **fields}
        return reference.TorchvisionBlock(
            channels, num_channels, strides, bottleneck=kind is Bottleneck, **fields_of_theirs
        )

    return Case(name, channels, ours, theirs)


def d2l_stage(number: int) -> Case:
    """Two blocks with an eighth of the network's channels, as in the two below."""
    num_channels = 4 * 2**number
    channels, first = max(8, num_channels // 2), number == 1

    def ours(dtype: str) -> Stage:
        return Stage(num_channels, 2, first, partial(Residual, **layers(dtype, use_bias=True)))

    def theirs() -> nn.Module:
        return reference.resnet_block(channels, num_channels, 2, first)

    return Case(f"stage{number}-d2l", channels, ours, theirs, "d2l")


def stage(
    number: int,
    kind: type[Residual | Bottleneck],
    name: str,
    dilations: tuple[int, int] = (1, 1),
    **fields: bool | int,
) -> Case:
    num_channels = 4 * 2**number
    channels = 8 if number == 1 else kind(num_channels // 2).features
    first = number == 1

    def ours(dtype: str) -> Stage:
        blocks = partial(kind, **fields, **layers(dtype, use_bias=False))
        return Stage(num_channels, 2, first, blocks, dilations=dilations)

    def theirs() -> nn.Module:
        strides = 1 if first or dilations[0] != dilations[1] else 2
        bottleneck = kind is Bottleneck
        return reference.torchvision_stage(
            channels, num_channels, 2, strides, dilations, bottleneck=bottleneck, **fields
        )

    return Case(f"stage{number}-{name}", channels, ours, theirs)


def network(name: str, flavour: str, inputs: int = 1, **fields: Any) -> Case:
    d2l = (name, flavour, fields) == ("resnet18", "d2l", {})

    def ours(dtype: str) -> ResNet:
        return build_model(name, flavour, dtype=dtype, param_dtype=dtype, **fields)

    def theirs() -> nn.Module:
        return reference.d2l_resnet18(inputs) if d2l else same_network(ours("float32"), inputs)

    options = "".join(f"-{key}={value}" for key, value in fields.items())
    layout = "d2l" if d2l else "torchvision"
    return Case(f"{name}-{flavour}{options}", inputs, ours, theirs, layout)


def small_network(name: str, **fields: Any) -> Case:
    """A network of torchvision's flavour, of two blocks and few channels."""

    def ours(dtype: str) -> ResNet:
        torchvision = {"use_bias": False, "norm_shortcut": True, "channels": 8}
        return ResNet((1, 1), **torchvision, dtype=dtype, param_dtype=dtype, **fields)

    return Case(name, 1, ours, lambda: same_network(ours("float32"), 1))


def same_network(model: ResNet, channels: int) -> nn.Module:
    """PyTorch's network with the fields of ours."""
    return reference.TorchvisionResNet(
        model.stage_sizes,
        channels,
        model.num_classes,
        model.stem,
        model.channels,
        model.replace_stride_with_dilation,
        bottleneck=model.block is Bottleneck,
        bias=model.use_bias,
        norm_shortcut=model.norm_shortcut,
        average_shortcut=model.average_shortcut,
        width=model.width_multiplier,
        groups=model.groups,
        width_per_group=model.width_per_group,
        stride_first=model.stride_first,
        preactivation=model.preactivation,
    )


BLOCKS = [
    d2l_block("Residual-d2l", 8, 8, 1),
    d2l_block("Residual-d2l-stride2", 8, 16, 2),
    block("Residual-torchvision-stride2", Residual, 8, 16, 2),
    block("Residual-preactivation-stride2", Residual, 8, 16, 2, preactivation=True),
    block("Bottleneck-torchvision", Bottleneck, 32, 8, 1),
    block("Bottleneck-torchvision-stride2", Bottleneck, 8, 8, 2),
    block("Bottleneck-d2l-stride2", Bottleneck, 8, 8, 2, use_bias=True),
    block("Bottleneck-v1-stride2", Bottleneck, 8, 8, 2, stride_first=True),
    block("Bottleneck-preactivation-stride2", Bottleneck, 8, 8, 2, preactivation=True),
    block(
        "Bottleneck-groups-dilation-stride2",
        Bottleneck,
        8,
        8,
        2,
        groups=4,
        width_per_group=32,
        dilation=2,
    ),
    block(
        "Bottleneck-average_shortcut-stride2",
        Bottleneck,
        8,
        8,
        2,
        average_shortcut=True,
        preactivation=True,
    ),
]
STAGES = [
    *(d2l_stage(number) for number in (1, 2, 3, 4)),
    *(stage(number, Residual, "torchvision") for number in (1, 2, 3, 4)),
    *(stage(number, Bottleneck, "bottleneck") for number in (1, 2, 3, 4)),
    stage(2, Bottleneck, "groups-dilation", (1, 2), groups=4, width_per_group=32),
    stage(2, Residual, "average_shortcut", average_shortcut=True),
    small_network(
        "deep-stem",
        block=Bottleneck,
        stem="deep",
        average_shortcut=True,
        groups=2,
        replace_stride_with_dilation=(True,),
    ),
]
NETWORKS = [
    network("resnet18", "d2l"),
    network("resnet18", "torchvision", inputs=3),
    network("resnet50", "torchvision", inputs=3),
    network("resnet50", "d2l"),
    network("resnet34", "d2l"),
    network("resnet34", "torchvision"),
    network("resnet101", "torchvision"),
    network("resnet101", "d2l"),
    network("resnet152", "torchvision"),
    network("resnet152", "d2l"),
    network("resnet50", "torchvision", width_multiplier=2),
    network("resnet50", "torchvision", stride_first=True),
    network("resnet18", "d2l", stem="cifar"),
    network("resnet18", "torchvision", preactivation=True),
    *(network(name, "torchvision", inputs=3) for name in ("resnext50_32x4d", "wide_resnet50_2")),
    *(network(f"resnet{n}d", "torchvision", inputs=3) for n in (18, 50)),
    network("resnet50", "torchvision", replace_stride_with_dilation=(False, True, True)),
]
# D2L's network with an eighth of its channels: as deep, and compiled in a third of the time.
NARROW = network("resnet18", "d2l", channels=8)


@functools.cache
def differences(case: Case, size: int, batch: int, dtype: str) -> dict[str, dict[str, float]]:
    """Levels (a) to (d) on random images of ``size`` pixels: level -> tensor -> difference."""
    with jax.enable_x64(dtype == "float64"):
        net, seed = make_reference(case, dtype)
        model = case.ours(dtype)
        variables = from_torch(model, net.state_dict(), in_channels=case.channels)
        generator = torch.Generator().manual_seed(seed + 1)
        images = torch.rand((batch, case.channels, size, size), generator=generator)
        images = images.to(getattr(torch, dtype)).requires_grad_()

        expected = {"eval": {"output": array(net.eval()(images))}}
        output = net.train()(images)
        cotangent = torch.rand(output.shape, generator=generator).to(images.dtype) - 0.5
        (output * cotangent).sum().backward()
        expected["train"] = {"output": array(output)}
        gradients = {key: array(p.grad) for key, p in net.named_parameters()}
        expected["gradients"] = gradients | {"input": array(images.grad)}
        expected["statistics"] = running_statistics(net)

        found = compute_levels(case, model, variables, nhwc(images), nhwc(cotangent))
    return {level: compare(found[level], expected[level]) for level in expected}


def compute_levels(
    case: Case, model: Any, variables: Any, images: np.ndarray, cotangent: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Our side of levels (a) to (d), under PyTorch's keys and in its order of axes."""

    @jax.jit
    def levels(variables: Any, images: Any, cotangent: Any) -> Any:
        def loss(params: Any, images: Any) -> Any:
            output, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return (output * cotangent).sum(), (output, updates["batch_stats"])

        gradients, aux = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], images)
        return model.apply(variables, images), *gradients, *aux

    evaluated, gradients, input_gradient, trained, statistics = levels(variables, images, cotangent)
    tensors = to_torch(model, {"params": gradients, "batch_stats": statistics}, case.layout)
    gradients = {key: value for key, value in tensors.items() if key.endswith(("weight", "bias"))}
    return {
        "eval": {"output": nchw(evaluated)},
        "train": {"output": nchw(trained)},
        "gradients": gradients | {"input": nchw(input_gradient)},
        "statistics": {key: value for key, value in tensors.items() if "running" in key},
    }


STEPS = 20
OPTIMISERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "decay": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "small-steps": {"lr": 1e-4},
    "tiny-steps": {"lr": 1e-6},
}
"""Options of `torch.optim.SGD`."""


def optax_sgd(lr: float, weight_decay: float = 0.0, **options: Any) -> optax.GradientTransformation:
    """Optax's counterpart of `torch.optim.SGD`: the decay is part of the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(lr, **options))


def sgd_differences(
    case: Case, options: dict[str, Any], dtype: str, data: Dataset, batch: int
) -> dict[str, float]:
    """Level (e): the statistics after each step, and the parameters after the last.

    A block that wants more channels gets copies of the image, each shifted by one pixel more; what
    it returns is pooled, and taken for logits.
    """
    shifted = [np.roll(data.images, shift, axis=2) for shift in range(case.channels)]
    images = np.concatenate(shifted, axis=-1).astype(dtype) / 255
    with jax.enable_x64(dtype == "float64"):
        net, _ = make_reference(case, dtype)
        their_optimiser = torch.optim.SGD(net.parameters(), **options)
        model = case.ours(dtype)
        variables = from_torch(model, net.state_dict(), in_channels=case.channels)
        params, statistics = variables["params"], variables["batch_stats"]
        optimiser = optax_sgd(**options)
        state = optimiser.init(params)
        update = jax.jit(optimiser.update)
        apply_updates = jax.jit(optax.apply_updates)
        keys = torch_keys(flatten_dict(variables), case.layout)

        worst: dict[str, float] = {}
        for start in range(0, STEPS * batch, batch):
            x, labels = images[start : start + batch], data.labels[start : start + batch]
            variables = {"params": params, "batch_stats": statistics}
            gradients, statistics = gradient_function(case, dtype)(variables, x, labels)
            updates, state = update(gradients, state, params)
            params = apply_updates(params, updates)
            # Not a view: oneDNN's gradients on transposed images may end the process.
            their_images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
            step_of_theirs(net, their_optimiser, their_images, labels)

            leaves = flatten_dict({"batch_stats": statistics})
            found = {keys[leaf]: value for leaf, value in leaves.items()}
            for key, value in compare(found, running_statistics(net)).items():
                worst[key] = max(value, worst.get(key, 0.0))
        found = to_torch(model, {"params": params, "batch_stats": statistics}, case.layout)
    expected = {key: array(parameter) for key, parameter in net.named_parameters()}
    return worst | compare({key: found[key] for key in expected}, expected)


@functools.cache
def gradient_function(case: Case, dtype: str) -> Callable[..., Any]:
    """The gradient of the cross-entropy's mean, and the new statistics."""
    model = case.ours(dtype)

    @jax.jit
    def gradients(variables: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            output, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            logits = output.mean((1, 2)) if output.ndim == 4 else output
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    return gradients


def step_of_theirs(
    net: nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor, labels: np.ndarray
) -> None:
    """One step of PyTorch's training."""
    output = net(images)
    logits = output.mean((2, 3)) if output.ndim == 4 else output
    optimiser.zero_grad()
    nn.functional.cross_entropy(logits, torch.from_numpy(labels).long()).backward()
    optimiser.step()


def training_differences(
    case: Case, options: dict[str, Any], dtype: str, data: Dataset, batch: int, image_size: int
) -> dict[str, float]:
    """Level (e) through the library's own `train_step`, resizing included; PyTorch's by Pillow."""
    with jax.enable_x64(dtype == "float64"):
        net, seed = make_reference(case, dtype)
        their_optimiser = torch.optim.SGD(net.parameters(), **options)
        model = case.ours(dtype)
        variables = from_torch(model, net.state_dict())
        state = TrainState.create(
            apply_fn=model.apply, tx=optax_sgd(**options), seed=np.uint32(seed), **variables
        )
        for start in range(0, STEPS * batch, batch):
            ours, labels = (part[start : start + batch] for part in (data.images, data.labels))
            state, _ = train_step(state, Metrics.empty(), ours, labels, image_size=image_size)
            pixels = [pillow_resize(image, image_size) for image in ours]
            # Scaled in float32, as torchvision's ToTensor does, whatever the network's dtype.
            images = torch.from_numpy(np.stack(pixels)[:, None]).float() / 255
            step_of_theirs(net, their_optimiser, images.to(getattr(torch, dtype)), labels)
        found = to_torch(model, state.variables, case.layout, num_batches_tracked=STEPS)
    expected = {key: array(value) for key, value in net.state_dict().items()}
    return compare(found, expected)


def recipe_differences(
    case: Case, recipe: Recipe, data: Dataset, image_size: int
) -> dict[str, float]:
    """Level (e) for a recipe without its random crops, on the same images in each step, in float64.

    PyTorch's side is that of torchvision's references/classification/train.py, but for a warm-up by
    steps. The differences of the losses are a share of the largest.
    """
    normalization = Normalization(*((sum(v) / 3,) * case.channels for v in IMAGENET_NORMALIZATION))
    options = {"label_smoothing": recipe.label_smoothing, "normalization": normalization}
    rate = recipe.defaults(len(data))["learning_rate"]
    with jax.enable_x64(True):
        net, seed = make_reference(case, "float64")
        kernels = [parameter for parameter in net.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in net.parameters() if parameter.ndim < 2]
        groups = [
            {"params": kernels, "weight_decay": 1e-4},
            {"params": others, "weight_decay": 0.0},
        ]
        their_optimiser = torch.optim.SGD(groups, rate, momentum=0.9)
        warm_up = round(recipe.warm_up * STEPS)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            their_optimiser,
            [
                torch.optim.lr_scheduler.LinearLR(their_optimiser, 0.01, total_iters=warm_up),
                torch.optim.lr_scheduler.CosineAnnealingLR(their_optimiser, STEPS - warm_up),
            ],
            [warm_up],
        )
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        model = case.ours("float64")
        variables = from_torch(model, net.state_dict(), in_channels=case.channels)
        optimiser = build_optimizer(recipe, rate, STEPS)
        state = TrainState.create(
            apply_fn=model.apply, tx=optimiser, seed=np.uint32(seed), **variables
        )
        # From a count of 32 bits Optax computes rates in float32; 20 steps make 1e-3 of their 1e-7.
        wide = jax.tree.map(
            lambda leaf: leaf.astype(np.int64) if leaf.dtype == np.int32 else leaf, state.opt_state
        )
        state = state.replace(opt_state=wide)
        inputs = prepare_images(data.images, image_size, normalization)
        images = torch.from_numpy(np.array(inputs)).permute(0, 3, 1, 2).contiguous().double()
        labels = torch.from_numpy(data.labels).long()
        losses = []
        for _ in range(STEPS):
            state, metrics = train_step(
                state, Metrics.empty(), data.images, data.labels, image_size=image_size, **options
            )
            logits = net(images)
            losses.append((metrics.loss, nn.functional.cross_entropy(logits, labels).item()))
            their_optimiser.zero_grad()
            criterion(logits, labels).backward()
            their_optimiser.step()
            schedule.step()
        found = to_torch(model, state.variables, case.layout, num_batches_tracked=STEPS)
    ours, theirs = np.array(losses).T
    expected = {key: array(value) for key, value in net.state_dict().items()}
    return compare(found, expected) | {"losses": np.abs(ours - theirs).max() / theirs.max()}


def pillow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 1) to (size, size), as D2L's transforms do it."""
    resized = Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BILINEAR)
    return np.array(resized)


def make_reference(case: Case, dtype: str) -> tuple[nn.Module, int]:
    """PyTorch's side with random weights, and the seed they came from."""
    seed = zlib.crc32(case.name.encode())
    torch.manual_seed(seed)
    net = reference.randomise_norms(reference.d2l_init(case.theirs()))
    return net.to(getattr(torch, dtype)), seed


def compare(found: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The norm of each tensor's difference, as a share of its layer's norm.

    Of the layer's, since the gradient of a bias before a BN is zero but for rounding.
    """
    assert found.keys() == expected.keys()
    scales: dict[str, float] = {}
    for key, value in expected.items():
        layer = key.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 0.0), float(np.linalg.norm(value)))
    return {
        key: float(np.linalg.norm(np.asarray(found[key]) - value)) / scales[key.rpartition(".")[0]]
        for key, value in expected.items()
    }


def running_statistics(net: nn.Module) -> dict[str, np.ndarray]:
    return {key: array(value) for key, value in net.named_buffers() if "running" in key}


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().clone().numpy()


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return array(tensor.permute(0, 2, 3, 1)) if tensor.ndim == 4 else array(tensor)


def nchw(value: jax.Array) -> np.ndarray:
    array = np.asarray(value)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
