"""Files of a pretrained network by its name, from the Hugging Face hub or torchvision's server.

They are fetched once and kept where other programs look for them, too: in ``huggingface_hub``'s
cache and in that of ``torch.hub``.
"""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, TypeGuard

from resnet_flax.errors import InputError, reason

logger = logging.getLogger(__name__)

LOGIN = "by `hf auth login` or HF_TOKEN"
TIMEOUT = 10  # seconds for a server's first answer
TORCHVISION_SERVER = "https://download.pytorch.org/models"

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(
    rf"(?!.*\.\.|[^@]*(?:--|\.git(?:@|$)))({_PART})/{_PART}(?:@\w[\w./-]*)?", re.ASCII
)


class TorchvisionWeights(NamedTuple):
    """One of torchvision's sets of weights, all of ImageNet's 1,000 classes.

    Attributes:
        architecture: its name, as of `ARCHITECTURES`.
        version: 1, or 2 for the newer recipe.
        sha256: the first eight digits of its file's.
        resize: for evaluation, the shorter side in pixels before the middle 224x224 are taken.
    """

    architecture: str
    version: int
    sha256: str
    resize: int

    @property
    def file(self) -> str:
        """The file's name on the server and in the cache."""
        return f"{self.architecture}-{self.sha256}.pth"


TORCHVISION = {
    f"{row[0]}.imagenet1k_v{row[1]}": TorchvisionWeights(*row)
    for row in (
        ("resnet18", 1, "f37072fd", 256),
        ("resnet34", 1, "b627a593", 256),
        ("resnet50", 1, "0676ba61", 256),
        ("resnet50", 2, "11ad3fa6", 232),
        ("resnet101", 1, "63fe2227", 256),
        ("resnet101", 2, "cd907fc2", 232),
        ("resnet152", 1, "394f9c45", 256),
        ("resnet152", 2, "f82ba261", 232),
        ("resnext50_32x4d", 1, "7cdf4587", 256),
        ("resnext50_32x4d", 2, "1a0047aa", 232),
        ("resnext101_32x8d", 1, "8ba56ff5", 256),
        ("resnext101_32x8d", 2, "110c445d", 232),
        ("resnext101_64x4d", 1, "173b62eb", 232),
        ("wide_resnet50_2", 1, "95faca4d", 256),
        ("wide_resnet50_2", 2, "9ba9bcbe", 232),
        ("wide_resnet101_2", 1, "32ee1156", 256),
        ("wide_resnet101_2", 2, "d733dc28", 232),
    )
}


def is_name(text: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether it names something to fetch: ``OWNER/NAME``, or ``OWNER/NAME@REVISION``.

    Where ``OWNER`` is a folder here it is a path, and so is every path object.
    """
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    return match is not None and not Path(match[1]).is_dir()


def fetch(name: str, filename: str) -> Path | None:
    """Returns a file of a repository on the Hugging Face hub, or None if it has no such file.

    Cache, token, offline mode and ``HF_ENDPOINT`` are those of ``huggingface_hub``. What was
    fetched before is found without a network.

    Raises:
        InputError: when it cannot be had, or is damaged; then it is not kept.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository, _, revision = name.partition("@")
    revision = revision or "main"
    try:
        # Without a network hf_hub_download alone would try again for 23 s; that a file is missing
        # it notes in its cache.
        with contextlib.suppress(RemoteEntryNotFoundError):
            get_hf_file_metadata(
                hf_hub_url(repository, filename, revision=revision), timeout=TIMEOUT
            )
        found = hf_hub_download(repository, filename, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # of many kinds: its HTTP library changes with its version
        cached = try_to_load_from_cache(repository, filename, revision=revision)
        if cached is None:
            raise InputError(_failure(name, filename, error)) from error
        if not isinstance(cached, str):  # it is known to be missing
            return None
        found = cached
    path = Path(found)
    # The client compares the size alone. Large files are kept under their SHA-256.
    digest = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", digest):
        _verify(path, digest)
    return path


def fetch_weights(name: str) -> list[Path]:
    """Returns the files that together hold a repository's tensors, safetensors if there are any.

    Raises:
        InputError: as `fetch`, and when the repository has no weights.
    """
    if single := fetch(name, "model.safetensors"):
        return [single]
    if index := fetch(name, "model.safetensors.index.json"):
        return _fetch_shards(name, index)
    if single := fetch(name, "pytorch_model.bin"):
        return [single]
    raise InputError(
        f"{name} has neither model.safetensors nor pytorch_model.bin: name a repository that has"
    )


def torchvision_set(name: str) -> TorchvisionWeights:
    """Which weights ``torchvision/resnet50`` (the newest) or ``…50.imagenet1k_v1`` means.

    Raises:
        InputError: when there are none of this name.
    """
    wanted = name.partition("/")[2].lower()
    found = [key for key in TORCHVISION if wanted in (key, key.partition(".")[0])]
    if not found:
        raise InputError(f"{name} is none of torchvision's ResNets: {', '.join(TORCHVISION)}")
    return TORCHVISION[max(found)]


def torchvision_weights(name: str) -> Path:
    """Returns the file of torchvision's weights of this name, in PyTorch's own format.

    Raises:
        InputError: when it cannot be had, or its SHA-256 differs (then it is not kept), or without
            PyTorch.
    """
    weights = torchvision_set(name)
    try:
        import torch.hub
    except ImportError as error:
        twin = "tv_in1k" if weights.version == 1 else f"tv{weights.version}_in1k"
        raise InputError(
            f"{name} needs PyTorch, which is not installed: install torch, or take "
            f"timm/{weights.architecture}.{twin}, the same weights without it"
        ) from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    url = f"{TORCHVISION_SERVER}/{weights.file}"
    if not path.exists():
        logger.info(f"fetching {url}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # torch.hub would wait for an answer without end.
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT
            ):
                pass
            torch.hub.download_url_to_file(url, str(path), weights.sha256)
        # A hash that differs is its RuntimeError.
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # its connection
            raise InputError(
                f"cannot fetch {url} to {path.parent} (a place that TORCH_HOME sets): "
                f"{reason(error)}: try again, or put the file there"
            ) from error
    _verify(path, weights.sha256)
    return path


def upload(folder: Path, names: Collection[str], repository: str, private: bool) -> str:
    """Uploads a folder's files of these names to the Hugging Face hub; returns their address.

    The repository, ``OWNER/NAME``, is made if there is none. The token is ``huggingface_hub``'s.

    Raises:
        InputError: when it cannot be done.
    """
    from huggingface_hub import HfApi, constants, errors

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[*names],
            commit_message="A network from resnet_flax",
        )
    except Exception as error:  # of many kinds, as in `fetch`
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused or isinstance(error, errors.LocalTokenNotFoundError):
            why = f"it needs a token that may write there, {LOGIN}"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE keeps it from that: unset it"
        else:
            why = _first_sentence(error)
        raise InputError(
            f"cannot upload to {repository!r:.200} at {constants.ENDPOINT}: {why}"
        ) from error
    return str(made)


def _fetch_shards(name: str, index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII) for shard in shards):
            raise ValueError("it names files that are none of safetensors")
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{index} is no index of safetensors files: {reason(error)}") from error
    # Of the index's own commit, after which its folder is named.
    pinned = f"{name.partition('@')[0]}@{index.parent.name}"
    paths = {shard: fetch(pinned, shard) for shard in shards}
    if missing := [shard for shard, path in paths.items() if path is None]:
        raise InputError(f"{name} lacks {missing[0]}, which its {index.name} names")
    return [path for path in paths.values() if path]


def _verify(path: Path, sha256: str) -> None:
    """Removes a file whose SHA-256 does not begin so."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256):
            path.resolve().unlink()
    except OSError as error:
        raise InputError(f"cannot check {path}: {reason(error)}") from error
    if not found.startswith(sha256):
        raise InputError(
            f"{path} was damaged (its SHA-256 began with {found[:8]}, not {sha256[:8]}) and is "
            "removed: fetch it again"
        )


def _failure(name: str, filename: str, error: Exception) -> str:
    """Why a file cannot be had from the hub, and what mends it, in one line."""
    from huggingface_hub import constants, errors

    repository, _, revision = name.partition("@")
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, errors.GatedRepoError):
        page = f"{hub}/{repository}"
        return f"{repository} is gated: ask for access at {page}, then give a token {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither a folder here nor a repository of models at {hub} "
            f"(a private one needs a token, {LOGIN})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} at {hub} has no branch, tag or commit {revision or 'main'}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{name} is no folder here, its {filename} is not in {cache}, and HF_HUB_OFFLINE keeps "
            "it from being fetched: unset it once"
        )
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"{hub} refuses access to {repository}: give a token that may read it, {LOGIN}"
    if isinstance(error, OSError) and error.errno:
        return (
            f"cannot keep {filename} of {name} in {cache}: {reason(error)}: make room, or set "
            "HF_HOME to another place"
        )
    return (
        f"{name} is no folder here, and its {filename} cannot be fetched from {hub}: "
        f"{_first_sentence(error)}: check the network, and HF_ENDPOINT if it is set"
    )


def _first_sentence(error: Exception) -> str:
    why = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
    return f"{why.rstrip('.'):.200}"
