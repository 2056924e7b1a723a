"""A folder of made-up texts, and a small Hugging Face hub with the faults of the real one."""

import hashlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
from huggingface_hub import constants, file_download

from tests.data.sources.stories import story

Fault = Literal["empty", "short", "head_503", "get_503", "dies"]


class HubServer(ThreadingHTTPServer):
    """Serves ``files`` of one data set repository and misbehaves as ``faults`` say, in order.

    ``empty`` and ``short``: the stored file itself is damaged, so the length that HEAD announces
    agrees with what GET sends after it (the client may not even ask for an empty one).
    ``head_503``, ``get_503``: the service is unavailable. ``dies``: the connection breaks midway.
    """

    daemon_threads = True

    def __init__(self, repo_id: str) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repo_id = repo_id
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.announced: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.lock = threading.Lock()

    def take_fault(self, name: str, *kinds: Fault) -> Fault | None:
        with self.lock:
            if self.faults[name] and self.faults[name][0] in kinds:
                return self.faults[name].popleft()
        return None

    def gets(self) -> list[str]:
        return [name for method, name in self.requests if method == "GET"]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        name = self._name()
        if name is None:
            return
        if self.server.take_fault(name, "head_503"):
            self._refuse(503)
            return
        content = self.server.files[name]
        damage = self.server.take_fault(name, "empty", "short")
        if damage is not None:
            content = b"" if damage == "empty" else content[: len(content) // 2]
        self.server.announced[name] = content
        self._headers(200, name, content)

    def do_GET(self) -> None:
        name = self._name()
        if name is None:
            return
        fault = self.server.take_fault(name, "get_503", "dies")
        if fault == "get_503":
            self._refuse(503)
            return
        content = self.server.announced[name]
        start = 0
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self._headers(206 if start else 200, name, content, start)
        if fault == "dies":
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _name(self) -> str | None:
        self.server.requests.append((self.command, self.path.split("/main/", 1)[-1]))
        prefix = f"/datasets/{self.server.repo_id}/resolve/main/"
        if not self.path.startswith(prefix):
            self._refuse(401, "RepoNotFound")
            return None
        name = self.path.removeprefix(prefix)
        if name not in self.server.files:
            self._refuse(404, "EntryNotFound")
            return None
        return name

    def _headers(self, status: int, name: str, content: bytes, start: int = 0) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(name.encode() + content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            end = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.end_headers()

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[HubServer]:
    """A running server that huggingface_hub takes for the hub."""
    server = HubServer("someone/golf")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for module in (constants, file_download):  # older versions have a copy in the second
        monkeypatch.setattr(
            module, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template, raising=False
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    # The client pauses a second before it takes up a broken connection again.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "text"
    (root / "deep" / "er").mkdir(parents=True)
    for index in range(10):
        (root / "deep" / f"{index}.txt").write_text(story(index))
    lines = [json.dumps({"text": story(index), "id": index}) for index in range(100, 160)]
    (root / "deep" / "er" / "more.jsonl").write_text("\n".join(lines) + "\n\n")
    (root / "readme.md").write_text("not read")
    return root
