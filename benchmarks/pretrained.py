"""The same photos through our road and through each library's own, from files to logits.

``python -m benchmarks.pretrained`` writes each network as its library does (``timm``'s
``save_for_hf``, transformers' ``save_pretrained``, torchvision's state dict in its cache), reads it
back by its name from a hub on loopback, and lets both classify image files of several shapes. The
weights and running statistics are random: no network here is trained, and nothing is fetched. Needs
the extra ``foreign``.

Pixels are float32 after normalisation; logits' differences are shares of the largest logit.
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from PIL import Image

from benchmarks.tables import Table, output_flag
from resnet_flax.inference import read_images, read_pretrained
from resnet_flax.machine.runtime import configure_runtime
from tests.support.foreign import import_timm
from tests.support.hub_server import HubServer, hub_server
from tests.support.torch_reference import randomise_norms

SHAPES = ((256, 256), (500, 375), (375, 500), (225, 333), (333, 1001), (640, 201))
TORCHVISION = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
TIMM = (
    *("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *(f"resnet{depth}d" for depth in (18, 26, 34, 50, 101, 152)),
)
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "basic": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "bottleneck": {},
    "bottleneck, stride first": {"downsample_in_bottleneck": True},
}


class Served(NamedTuple):
    """A network that the hub serves, and its own library's way with it."""

    name: str
    net: torch.nn.Module
    see: Callable[[Image.Image], torch.Tensor]


def served_by_timm(hub: HubServer, folder: Path) -> Iterator[tuple[str, Callable[[], Served]]]:
    """Networks of timm."""
    timm = import_timm()
    from timm.models._hub import save_for_hf

    for architecture in TIMM:

        def make(architecture: str = architecture) -> Served:
            net = randomised(timm.create_model(architecture))
            save_for_hf(net, folder / architecture, safe_serialization=True)
            hub.serve(f"timm/{architecture}", folder / architecture)
            told = timm.data.resolve_model_data_config(net)
            see = timm.data.create_transform(**told, is_training=False)
            return Served(f"timm/{architecture}", net, see)

        yield architecture, make


def served_by_torchvision(
    hub: HubServer, folder: Path
) -> Iterator[tuple[str, Callable[[], Served]]]:
    """Networks of torchvision, with the evaluation of their newest weights."""
    import_timm()  # torchvision, even where its operators do not load
    import torchvision

    for architecture in TORCHVISION:

        def make(architecture: str = architecture) -> Served:
            net = randomised(torchvision.models.get_model(architecture))
            weights = torchvision.models.get_model_weights(architecture).DEFAULT
            file = io.BytesIO()
            torch.save(net.state_dict(), file)
            hub.serve_torchvision(f"{architecture}.{weights.name.lower()}", file.getvalue())
            return Served(f"torchvision/{architecture}", net, weights.transforms())

        yield architecture, make


def served_by_transformers(
    hub: HubServer, folder: Path
) -> Iterator[tuple[str, Callable[[], Served]]]:
    """ResNets of transformers, with its processor on Pillow."""
    import_timm()
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.models.convnext.image_processing_pil_convnext import (
        ConvNextImageProcessorPil,
    )

    for kind, fields in TRANSFORMERS.items():

        def make(kind: str = kind, fields: dict[str, Any] = fields) -> Served:
            net: Any = randomised(
                ResNetForImageClassification(ResNetConfig(**fields, num_labels=1000))
            )
            place = folder / kind.replace(", ", "-").replace(" ", "-")
            net.save_pretrained(place)
            size = {"shortest_edge": 224}
            processor = ConvNextImageProcessorPil(size=size, crop_pct=0.875, resample=3)
            processor.save_pretrained(place)
            hub.serve(f"microsoft/{place.name}", place)

            def see(image: Image.Image) -> torch.Tensor:
                return processor(image, return_tensors="pt")["pixel_values"][0]

            return Served(f"microsoft/{place.name}", net, see)

        yield kind, make


SOURCES = {
    "timm": served_by_timm,
    "torchvision": served_by_torchvision,
    "transformers": served_by_transformers,
}


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """With running statistics that a wrong epsilon, mean or variance would show in."""
    return randomise_norms(net).eval()


def photos(folder: Path) -> list[Path]:
    """Pictures with edges and with smooth parts, as PNG and as JPEG."""
    random = np.random.default_rng(0)
    files = []
    for number, (width, height) in enumerate(SHAPES):
        coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        image.paste(coarse, (width // 3, height // 4))
        files.append(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
        image.save(files[-1])
    return files


def differences(served: Served, files: list[Path]) -> tuple[float, float]:
    """The largest of a pixel, and of a logit as a share of the largest logit."""
    network, variables = read_pretrained(served.name)
    ours = read_images(network, files)
    logits = np.asarray(jax.jit(network.model.apply)(variables, ours))
    pictures = [Image.open(file).convert("RGB") for file in files]
    theirs = torch.stack([served.see(picture) for picture in pictures])
    with torch.no_grad():
        expected = served.net(theirs)
    expected = np.asarray(getattr(expected, "logits", expected))
    pixels = np.abs(np.asarray(ours).transpose(0, 3, 1, 2) - np.asarray(theirs)).max()
    return float(pixels), float(np.abs(logits - expected).max() / np.abs(expected).max())


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=[*SOURCES])
    parser.add_argument("--only", nargs="+", help="these architectures (default: all)")
    output_flag(parser, "pretrained")
    options = parser.parse_args()
    configure_runtime()
    table = Table("architecture", "source", "pixels", "logits")
    with tempfile.TemporaryDirectory() as temporary, hub_server(Path(temporary)) as hub:
        files = photos(Path(temporary))
        for source in options.sources:
            folder = Path(temporary) / source
            folder.mkdir()
            for architecture, make in SOURCES[source](hub, folder):
                if options.only and architecture not in options.only:
                    continue
                torch.manual_seed(0)
                pixels, logits = differences(make(), files)
                table.add(architecture, source, f"{pixels:.0e}", f"{logits:.0e}")
                caches = (Path(temporary) / name for name in ("huggingface", "torch"))
                for used in (*folder.iterdir(), *filter(Path.exists, caches)):
                    shutil.rmtree(used)  # up to 340 MB each, and as much in a cache
    table.keep(options.output)


if __name__ == "__main__":
    main()
