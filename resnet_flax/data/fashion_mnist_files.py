"""Fashion-MNIST's four raw .gz files: found or fetched, and verified by their SHA-256."""

import hashlib
import http.client
import logging
import os
import struct
import subprocess
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resnet_flax.data.tfds import NETWORK_TIMEOUT
from resnet_flax.errors import InputError, reason

logger = logging.getLogger(__name__)

_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
COMMAND_TIMEOUT = 300  # seconds for one apt-get or dpkg-deb


class _SourceError(Exception):
    """Why a source does not have the raw files; the next one is tried."""


def gather_raw_files(registered: Mapping[str, Any], *, manual: Path, scratch: Path) -> Path:
    """Gathers the registered files, byte for byte, in a folder in `scratch`, which is returned.

    `registered` is TFDS' table: URL, ending in the file's name, to its `checksum` (SHA-256 in hex)
    and `size`. `manual` holds what the user supplied by hand, if it exists.

    Raises:
        InputError: if no source has the files, or one in `manual` is not the registered one.
    """
    raw = scratch / "raw"
    raw.mkdir()
    sources: dict[str, Callable[[], None]] = {
        f"files in {manual}": lambda: _copy_files(manual, raw, registered),
        f"files in {_DEBIAN_FOLDER}": lambda: _copy_files(_DEBIAN_FOLDER, raw, registered),
        "TFDS' registered URLs": lambda: _download(raw, registered),
        f"Debian's package {_DEBIAN_PACKAGE}": lambda: _fetch_debian(raw, scratch, registered),
    }
    reasons: list[str] = []
    for source, fill in sources.items():
        logger.info(f"Fashion-MNIST: trying {source}")
        try:
            fill()
            return raw
        except (_SourceError, InputError) as failure:
            if isinstance(failure, InputError) and not reasons:  # the user's own file
                raise InputError(f"{manual}: {failure}: replace it or remove it") from failure
            reasons.append(f"{source} ({failure})")
    names = ", ".join(Path(url).name for url in registered)
    raise InputError(
        f"no source has Fashion-MNIST: {'; '.join(reasons)}. "
        f"To supply it by hand, put {names} into {manual}"
    )


def _copy_files(source: Path, raw: Path, registered: Mapping[str, Any]) -> None:
    if not source.is_dir():
        raise _SourceError("no such folder")
    missing = []
    for url, info in registered.items():
        path = source / Path(url).name
        if path.exists():
            (raw / path.name).write_bytes(_verified(path.read_bytes(), path.name, info.checksum))
        else:
            missing.append(path.name)
    if missing:
        raise _SourceError(f"no {', '.join(missing)} there")


def _download(raw: Path, registered: Mapping[str, Any]) -> None:
    for url, info in sorted(registered.items(), key=lambda item: int(item[1].size)):
        try:
            with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _SourceError(reason(error)) from error
        name = Path(url).name
        (raw / name).write_bytes(_verified(data, name, info.checksum))


def _fetch_debian(raw: Path, scratch: Path, registered: Mapping[str, Any]) -> None:
    """Needs no root and writes into `scratch` alone."""
    config = scratch / "apt.conf"
    config.write_text(
        f'Dir::Cache "{scratch}/apt"; Acquire::Retries "0"; APT::Sandbox::User "";\n'
        f'Acquire::http::Timeout "{NETWORK_TIMEOUT}"; #clear APT::Update;\n'
    )
    apt = ["apt-get", f"--config-file={config}"]
    (scratch / "apt" / "archives" / "partial").mkdir(parents=True)
    try:
        _run([*apt, "download", _DEBIAN_PACKAGE], scratch)
    except _SourceError:  # no package lists, or stale ones: fetch our own
        lists = scratch / "apt" / "lists"
        (lists / "partial").mkdir(parents=True)
        apt += ["-o", f"Dir::State::Lists={lists}"]
        _run([*apt, "update"], scratch)
        _run([*apt, "download", _DEBIAN_PACKAGE], scratch)
    (package,) = scratch.glob("*.deb")
    _run(["dpkg-deb", "--extract", str(package), str(scratch / "debian")], scratch)
    _copy_files(scratch / "debian" / _DEBIAN_FOLDER.relative_to("/"), raw, registered)


def _run(command: list[str], cwd: Path) -> None:
    options: dict[str, Any] = {"env": {**os.environ, "LC_ALL": "C"}, "timeout": COMMAND_TIMEOUT}
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, **options)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error).encode()
        raise _SourceError(output.decode(errors="replace").strip().splitlines()[-1]) from error


def _verified(data: bytes, name: str, checksum: str) -> bytes:
    """The file as TFDS registered it, from its own bytes or from Debian's version of it."""
    for candidate in (data, _restore_gzip_header(data, name)):
        if sha256(candidate) == checksum:
            return candidate
    raise InputError(f"{name} has SHA-256 {sha256(data)}, not Fashion-MNIST's {checksum}")


def _restore_gzip_header(data: bytes, name: str) -> bytes:
    """Puts back the name and the time that Debian's packaging takes out of a gzip header."""
    modified = 1504176606 if name.startswith("train") else 1504176627
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", modified) + b"\x00\x03"
    return header + name.removesuffix(".gz").encode() + b"\x00" + data[10:]


def sha256(data: bytes | memoryview) -> str:
    """In hex, as TFDS registers it."""
    return hashlib.sha256(data).hexdigest()
