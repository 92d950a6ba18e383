"""The Hugging Face hub and torchvision's server, on loopback, for their real clients.

What the fake does not do, or does in a simpler way: it speaks HTTP/1.0, one connection a request,
without TLS; it knows no Xet (the real hub offers it for large files, and ``hf_xet`` then fetches
and checks them), no list of a repository's folders, no rate limits. What is uploaded comes in the
commit itself, as only small files do there, and replaces the whole revision. A file is large (in
Git LFS, redirected to the CDN) by its ending. The CDN is this server under another name of this
machine, its addresses are not signed and never expire. Commits have no parents, a revision is
whatever `serve` was told.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_flax.inference import hub as client

LARGE = {".safetensors", ".bin", ".pth", ".h5"}
# Tokens: may read what is gated, or not, or may write.
READER, STRANGER, WRITER = "hf_reader", "hf_stranger", "hf_writer"


@dataclasses.dataclass
class _Repository:
    kind: str
    gated: bool
    private: bool = False  # as it was made; nobody is kept out
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> commit
    commits: dict[str, Path] = dataclasses.field(default_factory=dict)  # commit -> folder


class HubServer:
    """The server, what it serves, and its faults.

    Attributes:
        endpoint: its address, for ``HF_ENDPOINT``.
        requests: what was asked: ``(method, path, headers)``, these in small letters.
        cuts: a file's name to the numbers of bytes after which its next downloads end.
        damaged: names of files of which one bit is wrong.
    """

    def __init__(self, uploads: Path) -> None:
        self.uploads = uploads
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.cuts: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.status: int | None = None  # that every request is answered with
        self._repositories: dict[str, _Repository] = {}
        self._renamed: dict[str, str] = {}
        self._blobs: dict[str, Path] = {}  # SHA-256 -> large file
        self._torchvision: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def serve(
        self,
        name: str,
        folder: Path,
        *,
        revision: str = "main",
        kind: str = "model",
        gated: bool = False,
    ) -> str:
        """Serves a folder as a revision of a repository; returns the commit, which is its own."""
        repository = self._repositories.setdefault(name, _Repository(kind, gated))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listing = [(str(path.relative_to(folder)), _etag(path)) for path in files]
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        repository.commits[commit] = folder
        repository.revisions[revision] = commit
        self._blobs |= {_etag(path): path for path in files if path.suffix in LARGE}
        return commit

    def rename(self, old: str, new: str) -> None:
        """Leads whoever asks for the old name to the new one."""
        self._renamed[old] = new

    def serve_torchvision(self, name: str, content: bytes) -> str:
        """Serves this as the file of a row of `TORCHVISION`, whose hash it takes; its name."""
        sha256 = hashlib.sha256(content).hexdigest()[:8]
        client.TORCHVISION[name] = client.TORCHVISION[name]._replace(sha256=sha256)
        file = client.TORCHVISION[name].file
        self._torchvision[file] = content
        return file

    def asked(self, method: str, filename: str) -> list[dict[str, str]]:
        """The headers of the requests for a file, without those that were led elsewhere."""
        return [
            headers for how, path, headers in self.requests if how == method and filename in path
        ]

    def stop(self) -> None:
        """The network is gone."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(
            (self.command, path, {k.lower(): v for k, v in self.headers.items()})
        )
        if self.hub.status:
            return self._answer(self.hub.status)
        if match := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            return self._send(match[2], self.hub._blobs[match[1]].read_bytes(), {})
        if match := re.fullmatch(r"/models/([^/]+\.pth)", path):
            content = self.hub._torchvision.get(match[1])
            return self._answer(404) if content is None else self._send(match[1], content, {})
        prefix = r"(?:(datasets|spaces)/)?([^/]+/[^/]+)"
        if match := re.fullmatch(rf"/{prefix}/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._describe(match[1], match[2] or "main")
        return self._answer(404)

    do_HEAD = do_GET  # noqa: N815 (as http.server calls it)

    def do_POST(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(
            (self.command, path, {k.lower(): v for k, v in self.headers.items()})
        )
        if self.hub.status:
            return self._answer(self.hub.status)
        if path == "/api/validate-yaml":
            return self._tell({"errors": [], "warnings": []})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != WRITER:
            return self._refuse(403 if token else 401, "", "You have no right to write")
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path)
        if match is None or match[1] not in self.hub._repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if match[2] == "commit":
            return self._commit_upload(match[1], match[3], content)
        told = {"uploadMode": "regular", "shouldIgnore": False}
        return self._tell(
            {"files": [told | {"path": file["path"]} for file in json.loads(content)["files"]]}
        )

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub._repositories:
            return self._tell(url | {"error": "You already created this repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub._repositories[name] = _Repository("model", gated=False, private=bool(private))
        return self._tell(url)

    def _commit_upload(self, name: str, revision: str, content: bytes) -> None:
        folder = self.hub.uploads / str(len(self.hub.requests))
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                path = folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.hub.serve(name, folder, revision=revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        return self._tell({"commitUrl": url, "commitOid": commit})

    def _tell(self, content: dict[str, Any], status: int = 200) -> None:
        return self._answer(
            status, {"Content-Type": "application/json"}, json.dumps(content).encode()
        )

    def _resolve(self, kind: str | None, name: str, revision: str, filename: str) -> None:
        if new := self.hub._renamed.get(name):
            return self._answer(307, {"Location": self.path.replace(name, new, 1)})
        commit = self._commit((kind or "models")[:-1], name, revision, gate=True)
        if commit is None:
            return None
        folder = self.hub._repositories[name].commits[commit]
        path, headers = folder / filename, {"X-Repo-Commit": commit}
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if path.suffix not in LARGE:
            return self._send(filename, path.read_bytes(), headers | {"ETag": f'"{_etag(path)}"'})
        # Another host for the client, which must not send it the token.
        cdn = f"http://localhost:{self.hub.port}/cdn/{_etag(path)}/{urllib.parse.quote(filename)}"
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{_etag(path)}"'}
        return self._answer(302, headers | linked | {"Location": cdn})

    def _describe(self, name: str, revision: str) -> None:
        commit = self._commit("model", name, revision, gate=False)
        if commit is None:
            return None
        repository = self.hub._repositories[name]
        folder = repository.commits[commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": False,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "siblings": [{"rfilename": str(path.relative_to(folder))} for path in files],
        }
        return self._tell(content)

    def _commit(self, kind: str, name: str, revision: str, *, gate: bool) -> str | None:
        """The commit that is asked for; None when the request has been refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.hub._repositories.get(name)
        if token not in ("", READER, STRANGER, WRITER):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or repository.kind != kind:
            # Whoever is not known is not told which private repositories there are.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif gate and repository.gated and token != READER:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to {name} is restricted")
        elif revision in repository.commits:
            return revision
        elif revision in repository.revisions:
            return repository.revisions[revision]
        else:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _send(self, filename: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that is asked for; cut off or damaged if that is ordered."""
        if filename in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, total = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers = headers | {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
            status, content = 206, content[start:]
        cuts = self.hub.cuts.get(filename, []) if self.command == "GET" else []
        length = cuts.pop(0) if cuts else len(content)
        headers = headers | {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
        self._answer(status, headers, content[:length])

    def _refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        told = {"X-Error-Code": code} if code else {}
        self._answer(status, (headers or {}) | told | {"X-Error-Message": message})

    def _answer(
        self, status: int, headers: dict[str, str] | None = None, content: bytes = b""
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Tests print nothing."""


def _etag(path: Path) -> str:
    """The SHA-256 of a large file, Git's own hash of a small one."""
    content = path.read_bytes()
    if path.suffix in LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def hub_server(cache: Path) -> Iterator[HubServer]:
    """The server, as the one that this process and its children ask, with an empty cache."""
    # Its constants are read from the environment when it is first imported.
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = HubServer(cache / "uploads")
    home = cache / "huggingface"
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_HOME": str(cache / "torch"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
    }
    close_session()  # one that an earlier test made may know a proxy
    try:
        with pytest.MonkeyPatch.context() as patch:
            for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
                patch.delenv(key, raising=False)
            for key, value in environment.items():
                patch.setenv(key, value)
            for key, value in settings.items():
                patch.setattr(constants, key, value)
            patch.setattr(client, "TORCHVISION_SERVER", f"{hub.endpoint}/models")
            patch.setattr(client, "TORCHVISION", dict(client.TORCHVISION))
            yield hub
    finally:
        close_session()
        hub.stop()
