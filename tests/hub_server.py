"""A Hugging Face hub on this machine: repositories are made, files are committed, listed and downloaded."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest

COMMIT = "0" * 39 + "1"


class HubServer(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Content by path, by repository.
        revisions: Revisions that were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.revisions: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif self.path.endswith("/yaml") or self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{match[1]}/commit/{COMMIT}"
            self._answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._answer({"error": f"no POST {self.path}"}, 404)

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if match := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?$", path):
            return self._about(match[1], match[2])
        if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", path):
            found = self.server.files[match[1]].items()
            return self._answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in found])
        if match := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.server.files.get(match[1], {}).get(match[3])
            if content is not None:
                return self._answer(content)
        return self._answer({"error": f"no {path}"}, 404)

    do_HEAD = do_GET

    def _about(self, name: str, revision: str | None) -> None:
        if name not in self.server.files:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        self.server.revisions.add(revision or "main")
        siblings = [{"rfilename": path} for path in self.server.files[name]]
        return self._answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})

    def _answer(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server while it runs; the hub's client in this process talks to it, without a login."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
