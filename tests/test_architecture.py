"""The package's imports: in one direction, and never PyTorch or TensorFlow."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import resnet_flax

PACKAGE = Path(resnet_flax.__file__).parent
FILES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
# Leaves know only the exceptions; what composes them is further up.
LEAVES = {"operations", "winograd", "preprocessing", "raw_files", "runtime", "metrics", "checks"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    graph = {
        name: {other for other in FILES if f"resnet_flax.{other}" in imported_modules(path)}
        for name, path in FILES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises on a cycle
    for leaf in LEAVES:
        assert graph[leaf] <= {"errors", "checks"}, leaf
    assert graph["data"] <= {"errors", "raw_files", "tfds_records"}


def test_modules_import_from_modules_and_not_from_the_package():
    for path in FILES.values():
        assert "resnet_flax" not in imported_modules(path), path.name


def test_only_the_converter_knows_pytorch_and_nobody_tensorflow():
    for name, path in FILES.items():
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert "tensorflow" not in roots, name
        assert "torch" not in roots or name == "convert", name


def test_modules_stay_small():
    sizes = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > 300} == {}
