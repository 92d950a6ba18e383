"""A Fashion-MNIST of 30 + 10 random images, in every form that the package reads, and sources."""

import functools
import gzip
import hashlib
import http.server
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from resnet_flax.data import fashion_mnist_files as raw_files

SIZES = {"train": 30, "test": 10}
PREFIXES = {"train": "train", "test": "t10k"}
FILES = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]
NO_SERVER = "http://127.0.0.1:9/"  # the port that discards


class TinyFashionMNIST:
    """Random images and labels, and the gzip files that carry them."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.images, self.labels = {}, {}
        self.payloads: dict[str, bytes] = {}  # file name -> IDX bytes
        for split, size in SIZES.items():
            images = random.integers(0, 256, (size, 28, 28, 1), dtype=np.uint8)
            labels = random.integers(0, 10, size, dtype=np.uint8)
            self.images[split], self.labels[split] = images, labels
            name = PREFIXES[split]
            self.payloads[f"{name}-images-idx3-ubyte.gz"] = (
                struct.pack(">4I", 2051, size, 28, 28) + images.tobytes()
            )
            self.payloads[f"{name}-labels-idx1-ubyte.gz"] = (
                struct.pack(">2I", 2049, size) + labels.tobytes()
            )
        content = b"".join(
            self.images[split].tobytes() + self.labels[split].tobytes() for split in SIZES
        )
        self.content_sha256 = hashlib.sha256(content).hexdigest()
        self.debian = {name: gzip.compress(data, mtime=0) for name, data in self.payloads.items()}
        self.original = {name: with_header(data, name) for name, data in self.debian.items()}


def with_header(debian: bytes, name: str) -> bytes:
    """The file as its author compressed it: named, dated, by a program on Unix (system 3)."""
    seconds = 1504176606 if "train" in name else 1504176627
    fields = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, 0b1000, seconds, 0, 3)
    return fields + name[: -len(".gz")].encode("ascii") + b"\0" + debian[10:]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def shut_off_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away Debian's package where it is installed, and the programs that would fetch it."""
    monkeypatch.setattr(raw_files, "_DEBIAN_FOLDER", Path("/absent"))
    monkeypatch.setenv("PATH", "/no-programs")


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serves `folder` on this machine and yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def write_debian_tools(folder: Path, installed: Path) -> Path:
    """Writes an `apt-get` without package lists until its `update`, and a `dpkg-deb`.

    `dpkg-deb` unpacks the package by copying `installed`; `apt-get` notes its calls in `calls`.
    """
    folder.mkdir()
    apt_get = f"""
        if "update" in sys.argv:
            (lists,) = (a.partition("=")[2] for a in sys.argv if a.startswith("Dir::State::Lists="))
            pathlib.Path(lists, "index").touch()
        elif any(pathlib.Path.cwd().rglob("index")):
            pathlib.Path("{installed.name}_1_all.deb").touch()
        else:
            sys.exit("E: Unable to locate package")
        """
    dpkg_deb = f"""
        target = pathlib.Path(sys.argv[-1], "usr/share/datasets/fashion-mnist")
        shutil.copytree("{installed}", target)
        """
    for name, body in {"apt-get": apt_get, "dpkg-deb": dpkg_deb}.items():
        lines = "\n".join(line[8:] for line in body.splitlines())
        log = f"open('{folder / 'calls'}', 'a').write(' '.join(sys.argv) + '\\n')"
        script = f"#!{sys.executable}\nimport pathlib, shutil, sys\n{log}\n{lines}\n"
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder
