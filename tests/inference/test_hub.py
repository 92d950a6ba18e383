"""The hub's and torchvision's real clients against a server on loopback."""

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from resnet_flax.errors import InputError
from resnet_flax.inference.hub import (
    TORCHVISION,
    fetch,
    fetch_weights,
    is_name,
    torchvision_set,
    torchvision_weights,
)
from tests.support.hub_server import READER, STRANGER

NAME = "timm/resnet18.a1_in1k"
CONTENT = bytes(range(256)) * 400
FILES = {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": CONTENT}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def refused(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


def cached_files() -> list[str]:
    """What lies in the cache, whole or in part."""
    blobs = Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*")
    return sorted(path.name for path in blobs)


@pytest.fixture
def served(hub, tmp_path):
    """A repository as timm's; its commit."""
    return hub.serve(NAME, write(tmp_path / "main", FILES))


# Names


@pytest.mark.parametrize(
    "text",
    [
        NAME,
        "microsoft/resnet-50",
        "torchvision/resnet50.imagenet1k_v1",
        "a/b",
        f"{NAME}@main",
        f"{NAME}@refs/pr/3",
        f"{NAME}@v1.0--final",
        f"{NAME}@{'0' * 40}",
    ],
)
def test_names(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resnet18",
        "/timm/resnet18",
        "./timm/resnet18",
        "../resnet18",
        "timm/resnet18/",
        "timm/../resnet18",
        "timm/a/b",
        "timm\\resnet18",
        "timm/-resnet",
        "timm/re--snet",
        "timm/resnet.git",
        "timm/resnet18@",
        "timm/resnet18@../../x",
        "timm/resnet18\n",
        "tïmm/resnet18",
        "timm/" + "x" * 97,
        "https://huggingface.co/timm/resnet18",
        Path("timm/resnet18"),
    ],
)
def test_paths(text):
    assert not is_name(text)


def test_what_may_lie_in_a_folder_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_name("runs/mine")
    (tmp_path / "runs").mkdir()
    assert not is_name("runs/mine")


# What is fetched


def test_files_are_fetched_once(hub, served):
    for _ in range(2):
        assert fetch(NAME, "config.json").read_bytes() == FILES["config.json"]
        (weights,) = fetch_weights(NAME)
        assert weights.read_bytes() == CONTENT
    assert weights.parent.name == served
    assert len(hub.asked("GET", "config.json")) == 1
    assert len(hub.asked("GET", "model.safetensors")) == 1  # at the CDN
    assert fetch(NAME, "preprocessor_config.json") is None


@pytest.mark.parametrize("offline", [False, True], ids=["server gone", "offline mode"])
def test_the_cache_serves_without_a_network(hub, served, monkeypatch, offline):
    def fetch_all():
        return [fetch(NAME, "config.json"), fetch_weights(NAME), fetch(NAME, "other.json")]

    first = fetch_all()
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.requests.clear()
    else:
        hub.stop()
    assert fetch_all() == first
    if offline:
        assert not hub.requests


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, served, tmp_path):
    newer = hub.serve(NAME, write(tmp_path / "new", {"config.json": b"{}"}), revision="refs/pr/1")
    for revision in ("refs/pr/1", newer):
        assert fetch(f"{NAME}@{revision}", "config.json").read_bytes() == b"{}"
    assert fetch(f"{NAME}@{served}", "config.json").read_bytes() == FILES["config.json"]
    assert f"{NAME} at {hub.endpoint} has no branch, tag or commit v9" in refused(
        fetch, f"{NAME}@v9", "config.json"
    )


def test_a_branch_that_moved_is_followed(hub, served, tmp_path):
    fetch(NAME, "config.json")
    hub.serve(NAME, write(tmp_path / "new", {"config.json": b"{}"}))
    assert fetch(NAME, "config.json").read_bytes() == b"{}"


def test_a_repository_that_was_renamed_is_followed(hub, served):
    hub.rename("old/name", NAME)
    assert fetch_weights("old/name")[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "model.safetensors.index.json", "b.safetensors", "a.safetensors"],
         ["a.safetensors", "b.safetensors"]),
    ],
)  # fmt: skip
def test_safetensors_go_before_pytorchs_own_format(hub, tmp_path, files, expected):
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    content = {name: name.encode() for name in files}
    if "a.safetensors" in files:
        content["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.serve(NAME, write(tmp_path / "main", content))
    assert [(path.name, path.read_text()) for path in fetch_weights(NAME)] == [
        (name, name) for name in expected
    ]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "is no index of safetensors files"),
        (b"[]", "is no index of safetensors files"),
        (b'{"weight_map": {"x": 1}}', "is no index of safetensors files"),
        (b'{"weight_map": {"x": "../../x.safetensors"}}', "is no index of safetensors files"),
        (b'{"weight_map": {"x": "x.bin"}}', "it names files that are none of safetensors"),
        (b'{"weight_map": {"x": "x.safetensors"}}', "lacks x.safetensors, which its model.safe"),
    ],
)
def test_a_broken_index_is_refused(hub, tmp_path, index, message):
    hub.serve(NAME, write(tmp_path / "main", {"model.safetensors.index.json": index}))
    assert message in refused(fetch_weights, NAME)


def test_the_fake_describes_a_repository_as_the_client_reads_it(hub, served):
    info = HfApi(endpoint=hub.endpoint).model_info(NAME)
    assert (info.id, info.sha, info.gated) == (NAME, served, False)
    assert [file.rfilename for file in info.siblings] == [*FILES]


# What is refused


def test_a_repository_that_is_missing(hub):
    line = refused(fetch, "timm/none", "config.json")
    assert line.startswith(
        f"timm/none is neither a folder here nor a repository of models at {hub.endpoint}"
    )


def test_a_repository_of_another_kind(hub, tmp_path):
    hub.serve(NAME, write(tmp_path / "main", FILES), kind="dataset")
    assert "nor a repository of models" in refused(fetch, NAME, "config.json")


def test_a_repository_without_weights(hub, tmp_path):
    hub.serve(NAME, write(tmp_path / "main", {"config.json": b"{}", "tf_model.h5": b"x"}))
    assert f"{NAME} has neither model.safetensors nor pytorch_model.bin" in refused(
        fetch_weights, NAME
    )


def test_a_gated_repository_needs_a_token(hub, tmp_path, monkeypatch):
    hub.serve(NAME, write(tmp_path / "main", FILES), gated=True)
    gated = f"{NAME} is gated: ask for access at {hub.endpoint}/{NAME}, then give a token by `hf"
    assert gated in refused(fetch_weights, NAME)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert gated in refused(fetch_weights, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    assert f"{hub.endpoint} refuses access to {NAME}: give a token that" in refused(
        fetch_weights, NAME
    )
    monkeypatch.setenv("HF_TOKEN", READER)
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT
    # The token is for the hub, not for the host that keeps its large files.
    assert "authorization" in hub.asked("HEAD", "model.safetensors")[-1]
    (request,) = hub.asked("GET", "/cdn/")
    assert "authorization" not in request


def test_no_network(hub, served):
    hub.stop()
    start = time.monotonic()
    line = refused(fetch, NAME, "config.json")
    assert time.monotonic() - start < 3
    assert f"{NAME} is no folder here, and its config.json cannot be fetched from" in line
    assert "refused: check the network" in line
    assert cached_files() == []


def test_offline_mode(hub, served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(fetch, NAME, "config.json")
    assert f"its config.json is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE keeps" in line
    assert not hub.requests


def test_a_server_in_trouble(hub, served):
    hub.status = 503
    line = refused(fetch, NAME, "config.json")
    assert "503 Service Unavailable" in line
    assert "more information" not in line
    hub.status = None
    assert fetch(NAME, "config.json")


@pytest.mark.parametrize(
    "endpoint", ["huggingface.co", "http://127.0.0.1:1", "ftp://x", "http://["]
)
def test_a_bad_endpoint(hub, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    line = refused(fetch, NAME, "config.json")
    assert f"cannot be fetched from {endpoint}: " in line
    assert line.endswith("check the network, and HF_ENDPOINT if it is set")


def test_a_server_that_is_no_hub(hub, served):
    hub.status = 200
    assert "X-Repo-Commit" in refused(fetch, NAME, "config.json")


def test_a_download_that_is_cut_off_goes_on(hub, served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is kept, in bytes
    hub.cuts["model.safetensors"] = [1000, 500]
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT
    ranges = [headers.get("range") for headers in hub.asked("GET", "/cdn/")]
    assert ranges == [None, "bytes=1000-", "bytes=1500-"]


def test_a_download_that_never_ends_leaves_nothing(hub, served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cuts["model.safetensors"] = [0] * 20
    assert "its model.safetensors cannot be fetched" in refused(fetch_weights, NAME)
    assert cached_files() == []
    hub.cuts.clear()
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT


def test_a_file_that_came_damaged_is_not_kept(hub, served):
    hub.damaged.add("model.safetensors")
    line = refused(fetch_weights, NAME)
    assert f"not {hashlib.sha256(CONTENT).hexdigest()[:8]}) and is removed: fetch it again" in line
    assert cached_files() == []
    hub.damaged.clear()
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT


def test_a_file_that_was_damaged_in_the_cache_is_not_kept(hub, served):
    (path,) = fetch_weights(NAME)
    path.write_bytes(CONTENT[:-1])
    assert "was damaged" in refused(fetch_weights, NAME)
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(hub, served):
    Path(constants.HF_HOME).parent.mkdir(exist_ok=True)
    Path(constants.HF_HOME).write_text("a file in its place")
    line = refused(fetch, NAME, "config.json")
    assert line.startswith(f"cannot keep config.json of {NAME} in {constants.HF_HUB_CACHE}: ")
    assert line.endswith("make room, or set HF_HOME to another place")


def test_a_full_disk(hub, served, monkeypatch):
    def http_get(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", http_get)
        assert "No space left on device: make room" in refused(fetch_weights, NAME)
    assert cached_files() == []
    assert fetch_weights(NAME)[0].read_bytes() == CONTENT


# torchvision


V1, V2 = "resnet50.imagenet1k_v1", "resnet50.imagenet1k_v2"


@pytest.mark.parametrize(
    ("name", "file", "resize"),
    [
        ("torchvision/resnet50", "resnet50-11ad3fa6.pth", 232),
        ("torchvision/resnet50.imagenet1k_v1", "resnet50-0676ba61.pth", 256),
        ("torchvision/resnet50.IMAGENET1K_V2", "resnet50-11ad3fa6.pth", 232),
        ("torchvision/resnet18", "resnet18-f37072fd.pth", 256),
    ],
)
def test_torchvisions_newest_weights_unless_told_otherwise(name, file, resize):
    weights = torchvision_set(name)
    assert (weights.file, weights.resize) == (file, resize)


@pytest.mark.parametrize(
    "name", ["resnet19", "resnet18.imagenet1k_v2", "", ".", "vit_b_16", "resnet"]
)
def test_what_torchvision_has_not(name):
    assert "is none of torchvision's ResNets: resnet18.imagenet1k_v1, " in refused(
        torchvision_set, f"torchvision/{name}"
    )


def test_torchvisions_file_is_fetched_once_and_checked_each_time(hub):
    file = hub.serve_torchvision(V2, CONTENT)
    for _ in range(2):
        path = torchvision_weights("torchvision/resnet50")
        assert (path.name, path.read_bytes()) == (file, CONTENT)
    assert len(hub.asked("GET", file)) == 1
    path.write_bytes(CONTENT[:-1])
    assert "was damaged" in refused(torchvision_weights, "torchvision/resnet50")
    assert torchvision_weights("torchvision/resnet50").read_bytes() == CONTENT


def test_torchvisions_file_without_a_network(hub):
    hub.serve_torchvision(V1, CONTENT)
    path = torchvision_weights(f"torchvision/{V1}")
    hub.stop()
    assert torchvision_weights(f"torchvision/{V1}") == path
    line = refused(torchvision_weights, "torchvision/resnet18")
    assert f"cannot fetch {hub.endpoint}/models/resnet18-f37072fd.pth to {path.parent}" in line
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["damaged", "cut off"])
def test_torchvisions_file_of_another_hash_is_not_kept(hub, fault):
    file = hub.serve_torchvision(V2, CONTENT)
    if fault == "damaged":
        hub.damaged.add(file)
    else:
        hub.cuts[file] = [1000]
    line = refused(torchvision_weights, "torchvision/resnet50")
    assert "invalid hash value" in line
    hub.damaged.clear()
    assert torchvision_weights("torchvision/resnet50").read_bytes() == CONTENT
    assert len(list(torchvision_weights("torchvision/resnet50").parent.iterdir())) == 1


def test_a_file_that_torchvisions_server_lacks(hub):
    assert "HTTP Error 404" in refused(torchvision_weights, "torchvision/resnet34")


def test_torchvisions_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    hub.serve_torchvision(V2, CONTENT)
    (tmp_path / "torch").write_text("a file in its place")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert "(a place that TORCH_HOME sets)" in refused(torchvision_weights, "torchvision/resnet50")


def test_without_pytorch(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "torch.hub", None)
    line = refused(torchvision_weights, "torchvision/resnet50")
    assert "install torch, or take timm/resnet50.tv2_in1k, the same weights without it" in line
    line = refused(torchvision_weights, f"torchvision/{V1}")
    assert "timm/resnet50.tv_in1k" in line


@pytest.mark.foreign
def test_the_table_is_torchvisions():
    from tests.support.foreign import import_timm

    import_timm()
    from torchvision.models import get_weight

    classes = {
        "resnet": "ResNet{}_Weights",
        "resnext": "ResNeXt{}_Weights",
        "wide_resnet": "Wide_ResNet{}_Weights",
    }
    for key, ours in TORCHVISION.items():
        kind = ours.architecture.rstrip("0123456789_xd").rstrip("_")
        number = ours.architecture.removeprefix(kind).upper()
        theirs = get_weight(f"{classes[kind].format(number)}.{key.partition('.')[2].upper()}")
        rule = theirs.transforms()
        assert theirs.url == f"https://download.pytorch.org/models/{ours.file}"
        assert (rule.resize_size, rule.crop_size) == ([ours.resize], [224])
