"""A stand-in of the Hugging Face hub's HTTP API: repositories in memory, on a port of this machine.

Reading, and writing as huggingface_hub does it without hf_xet: large files by the LFS batch API, then one commit.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
LARGE = 1000  # bytes from which a file is one of LFS
TOKEN = "hf_ThisIsTheSecretOfTheTests"


@dataclass
class Repository:
    files: dict[str, bytes]
    licence: str | None = None
    gated: str | bool = False  # as the hub says it: False, "auto" or "manual"
    refuses: int = 0  # the status that files and the access check of a gated repository are answered with
    private: bool = False


@dataclass
class Hub:
    """repositories: "models/owner/name" or "datasets/owner/name" -> what it holds."""

    repositories: dict[str, Repository]
    expired: int = 0  # how many of the next requests for the rest of a file are refused
    cuts: int = 0  # how many of the next answers that carry a large file end half way
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    sent: int = 0  # bytes of files
    user: str = "me"  # whom TOKEN belongs to
    role: str = "write"  # of TOKEN
    forbids: str = ""  # a part of the paths that are answered with 403 to writers
    faults: list[str] = field(default_factory=list)  # that it finds in the header of a README.md
    drops: int = 0  # how many of the next uploads of a large file end half way, without an answer
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by SHA-256
    taken: int = 0  # bytes of large files that came
    storage: str = ""  # address of another host that large files are fetched from
    tokens: list[tuple[str, str | None]] = field(default_factory=list)  # host asked for a large file, token sent to it
    xet_status: int = 404  # that a token for the store of hf_xet is answered with; 404: this hub has none

    def paths(self, method: str = "GET") -> list[str]:
        return [path for asked, path, _ in self.asked if asked == method]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hashes(content: bytes, small: str, large: str) -> dict:
    """Name a file as the hub does: by a hash of git, and of LFS if it is large."""
    found: dict = {small: git_hash(content)}
    if len(content) >= LARGE:
        found["lfs"] = {large: digest(content), "size": len(content), "pointerSize": 9}
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("api/"):
            self._api(path.removeprefix("api/").split("/"))
        else:
            self._file(path if path.startswith("datasets/") else f"models/{path}")

    def do_POST(self):
        path, body = self._received()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        if self.hub.forbids and self.hub.forbids in path:
            return self._refuse(403, "")
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path == "api/validate-yaml":
            faults = [{"message": text} for text in self.hub.faults]
            return self._send(400 if faults else 200, json.dumps({"errors": faults, "warnings": []}).encode())
        if path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        parts = path.split("/")
        repository = self.hub.repositories.get("/".join(parts[1:4]))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if parts[4] == "preupload":
            return self._modes(repository, json.loads(body)["files"])
        self._commit("/".join(parts[2:4]), repository, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self):
        size = int(self.headers["Content-Length"])
        if self.hub.drops:
            self.hub.drops -= 1
            self.hub.taken += len(self.rfile.read(size // 2))
            self.close_connection = True
            return self.connection.shutdown(2)
        path, body = self._received()
        self.hub.taken += len(body)
        self.hub.objects[path.split("/")[1]] = body
        self._send(200, b"")

    def _received(self):
        path = self.path.split("?")[0].strip("/")
        self.hub.asked.append((self.command, path, None))
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _create(self, wanted):
        name = f"models/{wanted['organization']}/{wanted['name']}"
        address = f"http://{self.headers['Host']}/{name.removeprefix('models/')}"
        if name in self.hub.repositories:
            return self._send(409, json.dumps({"error": "exists", "url": address}).encode())
        self.hub.repositories[name] = Repository({".gitattributes": b""}, private=wanted["visibility"] == "private")
        self._send(200, json.dumps({"url": address}).encode())

    def _batch(self, wanted):
        objects = []
        for one in wanted["objects"]:
            action = {"upload": {"href": f"http://{self.headers['Host']}/objects/{one['oid']}", "header": {}}}
            objects.append(one if one["oid"] in self.hub.objects else one | {"actions": action})
        self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def _modes(self, repository, files):
        def oid(name):
            content = repository.files.get(name)
            return None if content is None else (digest if len(content) >= LARGE else git_hash)(content)

        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular", "shouldIgnore": False,
             "oid": oid(one["path"])}
            for one in files
        ]  # fmt: skip
        self._send(200, json.dumps({"files": modes}).encode())

    def _commit(self, name, repository, lines):
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            content = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
            repository.files[value["path"]] = content
        self._send(
            200,
            json.dumps(
                {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            ).encode(),
        )

    def _whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        token = {"displayName": "laptop", "role": self.hub.role}
        user = {"name": self.hub.user, "type": "user", "orgs": [{"name": "group"}], "auth": {"accessToken": token}}
        self._send(200, json.dumps(user).encode())

    def _api(self, parts):
        if parts == ["whoami-v2"]:
            return self._whoami()
        repository = self.hub.repositories.get("/".join(parts[:3]))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if parts[3:4] == ["xet-write-token"]:
            return self._send(self.hub.xet_status, b"{}")
        if parts[3:] == ["auth-check"]:
            return self._refuse(repository.refuses, "GatedRepo") if repository.refuses else self._send(200, b"{}")
        files = repository.files.items()
        if parts[3:4] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(c)} | _hashes(c, "oid", "oid") for n, c in files]
            return self._send(200, json.dumps(tree).encode())
        siblings = [{"rfilename": n, "size": len(c)} | _hashes(c, "blobId", "sha256") for n, c in files]
        info = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings, "gated": repository.gated}
        info |= {"private": repository.private, "tags": [], "downloads": 0, "likes": 0}
        if repository.licence:
            info["cardData"] = {"license": repository.licence}
        self._send(200, json.dumps(info).encode())

    def _file(self, path):
        name, _, rest = path.partition("/resolve/")
        repository, file = self.hub.repositories.get(name), rest.partition("/")[2]
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.refuses:
            return self._refuse(repository.refuses, "GatedRepo")
        if file not in repository.files:
            return self._refuse(404, "EntryNotFound")
        content = repository.files[file]
        large = len(content) >= LARGE
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content) if large else git_hash(content)}"'}
        if large:
            self.hub.tokens.append((self.headers["Host"], self.headers.get("Authorization")))
        if large and self.hub.storage and not self.hub.storage.endswith(f"//{self.headers['Host']}"):
            return self._send(302, b"", headers | {"Location": f"{self.hub.storage}{self.path}"}, 0)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start and self.hub.expired:
            self.hub.expired -= 1
            return self._send(403, b"")
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body, size = content[start:], len(content) - start
        if large and self.command == "GET" and self.hub.cuts:
            self.hub.cuts -= 1
            body = body[: size // 2]
        self._send(206 if start else 200, body, headers, size)

    def _refuse(self, status, code):
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status, body, headers=None, size=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        if headers and "ETag" in headers:
            self.hub.sent += len(body)
        self.wfile.write(body)
        if size is not None and len(body) < size:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)


def serve(hub: Hub) -> tuple[ThreadingHTTPServer, str]:
    """Start the server. Returns it and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def point_to(monkeypatch, address: str, cache) -> None:
    """Do what HF_ENDPOINT and HF_HUB_CACHE do, which are read when huggingface_hub is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
