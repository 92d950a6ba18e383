"""The same tasks in several libraries: lines of code, and whether they run.

``python -m benchmarks.ease`` makes the two tables of ``docs/comparison.md``: six tasks in four
libraries, and three with pretrained weights by name, random ones from a hub on loopback. A library
that this interpreter lacks runs with another: ``--python keras_hub=PATH flaxmodels=PATH``.

A line is a line of code as ``ruff format`` lays it out, imports included; comments, blank lines and
the checks do not count. Statements, in brackets, depend on no layout.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.tables import PACKAGES, ROOT, Table, output_flag
from tests.support.hub_server import HubServer, hub_server
from tests.support.torch_reference import TorchvisionResNet, randomise_norms

HERE = Path(__file__).parent
LIBRARIES = ("resnet_flax", "timm", "keras_hub", "flaxmodels")
PRETRAINED = tuple(f"{library}_pretrained" for library in LIBRARIES)
SECTIONS = re.compile(r"^# --- Task (\d): ([^\n]*)\.\n(.*?)^# --- Check\.$", re.M | re.S)


class Task(NamedTuple):
    """What one task takes in one library."""

    name: str
    lines: int
    statements: int


def count(library: str) -> list[Task]:
    """Lines and statements of the tasks' code."""
    tasks = []
    for number, name, code in SECTIONS.findall((HERE / f"{library}_tasks.py").read_text()):
        lines = [line for line in code.splitlines() if line and not line.startswith("#")]
        statements = sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(code)))
        tasks.append(Task(f"{number}. {name}", len(lines), statements))
    return tasks


def count_all(libraries: Sequence[str] = LIBRARIES) -> Table:
    """The table of lines and, in brackets, statements."""
    tasks = {library: count(library) for library in libraries}
    table = Table("task", *(library.removesuffix("_pretrained") for library in libraries))
    for row in zip(*tasks.values(), strict=True):
        table.add(row[0].name, *(f"{task.lines} ({task.statements})" for task in row))
    sums = [
        f"{sum(task.lines for task in each)} ({sum(task.statements for task in each)})"
        for each in tasks.values()
    ]
    table.add("together", *sums)
    return table


def make_given(folder: Path) -> None:
    """Random weights under torchvision's names, images, and what PyTorch makes of both."""
    torch.manual_seed(0)
    network = randomise_norms(TorchvisionResNet((2, 2, 2, 2), 3, 1000, "imagenet")).eval()
    save_file(network.state_dict(), folder / "resnet18.safetensors")
    images = torch.randint(0, 256, (8, 3, 64, 64)) / 255
    expected = {"colour": images.permute(0, 2, 3, 1).numpy()}

    def keep(name: str, output: torch.Tensor) -> None:
        expected[name] = output.permute(0, 2, 3, 1).numpy()

    for stage in (1, 2, 3, 4):
        layer = network.get_submodule(f"layer{stage}")
        layer.register_forward_hook(lambda _, inputs, out, stage=stage: keep(f"stage{stage}", out))
    with torch.no_grad():
        expected["logits"] = network(images).numpy()
    np.savez(folder / "expected.npz", **expected)  # type: ignore[arg-type]


def make_pretrained(folder: Path, hub: HubServer) -> None:
    """Networks of random weights on the hub, a photo, pictures, and what PyTorch makes of it."""
    torch.manual_seed(0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    trained = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.95}
    trained |= {"mean": mean, "std": std}
    for name, sizes in {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}.items():
        network = TorchvisionResNet(sizes, 3, 1000, bottleneck=name == "resnet50")
        randomise_norms(network).eval()
        served = folder / f"{name}.a1_in1k"
        served.mkdir()
        config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": trained}
        (served / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), served / "model.safetensors")
        hub.serve(f"timm/{name}.a1_in1k", served)

    # Its shorter side is what the networks' images are resized to: only a crop is left.
    pixels = np.random.default_rng(0).integers(0, 256, (235, 235, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    seen = torch.from_numpy(pixels[6:230, 6:230] / np.float32(255))
    seen = (seen - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        shares = network(seen.permute(2, 0, 1)[None]).softmax(-1)[0].topk(3).values
        network.fc = torch.nn.Identity()
        features = network(seen.permute(2, 0, 1)[None])
    np.savez(folder / "expected.npz", shares=shares.numpy(), features=features.numpy())
    for kind in ("cats", "dogs"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for number in range(5):
            picture = Image.fromarray(np.roll(pixels, number, axis=0)[:, :200])
            picture.save(folder / "pictures" / kind / f"{number}.png")


def run(library: str, python: str, folder: Path) -> str:
    """Runs a library's script; returns which tasks it did, or why it stopped."""
    command = [python, "-m", f"benchmarks.ease.{library}_tasks", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    passed = re.findall(r"^(\d) ok$", done.stdout, re.M)
    if done.returncode == 0 and len(passed) == len(count(library)):
        return "all run"
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"{len(passed)} run; then {reason}"


def versions_in(python: str) -> dict[str, str]:
    """What an interpreter has of what the scripts depend on."""
    code = "import json, sys; from benchmarks.tables import versions as of; "
    code += "print(json.dumps(of(sys.argv[1:])))"
    command = [python, "-c", code, *PACKAGES, "timm", "keras", "keras-hub", "flaxmodels"]
    return json.loads(subprocess.check_output(command, cwd=ROOT))


def main() -> None:
    """Runs each script, prints how it fared, and prints and keeps the tables of what was run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", nargs="*", default=[], metavar="LIBRARY=PATH")
    output_flag(parser, "ease")
    options = parser.parse_args()
    pythons = dict.fromkeys(LIBRARIES, sys.executable)
    pythons |= dict(each.split("=") for each in options.python)

    with tempfile.TemporaryDirectory() as folder, hub_server(Path(folder) / "caches") as hub:
        given, pretrained = Path(folder) / "given", Path(folder) / "pretrained"
        given.mkdir()
        make_given(given)
        pretrained.mkdir()
        make_pretrained(pretrained, hub)
        for libraries, files, output in (
            (LIBRARIES, given, options.output),
            (PRETRAINED, pretrained, options.output.with_stem(options.output.stem + "_pretrained")),
        ):
            ran = {}
            for library in libraries:
                python = pythons[library.removesuffix("_pretrained")]
                ran[library] = {"result": run(library, python, files), **versions_in(python)}
                print(f"{library}: {ran[library]['result']}", flush=True)
            print()
            count_all(libraries).keep(output, ran=ran)
            print()


if __name__ == "__main__":
    main()
