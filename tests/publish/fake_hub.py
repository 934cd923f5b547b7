"""A Hub on this machine: it answers what huggingface_hub asks for when a folder is pushed, and keeps the files."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeHub(http.server.ThreadingHTTPServer):
    """
    A Hub with one user, me.

    Attributes:
        repos: What was asked for at the creation of each repository.
        branches: The branches that were made.
        files: The files of each branch by their names.
        refuses: Whether it refuses commits.
        cards: The model cards that it was asked to check.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.branches: list[str] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.cards: list[str] = []
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in hub.repos:
                self._answer({"url": f"{hub.url}/{repo}"}, 409)
            else:
                hub.repos[repo] = asked
                self._answer({"url": f"{hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            asked = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in asked]})
        elif "/branch/" in path:
            hub.branches.append(path.rpartition("/")[2])
            self._answer({})
        elif "/commit/" in path and not hub.refuses:
            lines = [json.loads(line) for line in body.splitlines()]
            files = hub.files.setdefault(path.rpartition("/")[2], {})
            files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            url = f"{hub.url}/me/model/commit/{'0' * 40}"
            self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})
        else:
            self._answer({"error": "no room left for you"}, 403)

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []} if "/api/models/" in self.path else {}, 200)

    def do_HEAD(self) -> None:
        self._answer({}, 404)

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 403:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def fake_hub(monkeypatch: Any) -> Iterator[FakeHub]:
    """Run a Hub, and let huggingface_hub ask it."""
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    # transformers keeps the first one, with the Hub that it was made for
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
