"""Sources in a repository of Hugging Face: a stand-in for its server."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from megaconsa.data import pieces, source_store, store_connections
from megaconsa.data.pieces import cut, identity
from megaconsa.data.sources import find_files
from megaconsa.errors import InputError, UnreachableError
from tests.support.source_files import write_texts
from tests.support.texts import read_texts

pytestmark = pytest.mark.usefixtures("impatient")
REPOSITORY = "hf://datasets/owner/name"


class Hub(BaseHTTPRequestHandler):
    """Answers what is asked about the files of one dataset."""

    folder: Path
    status = 200
    asked: list[str]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if self.status != 200:
            self._answer(self.status, b"")
        elif path.startswith("/api/datasets/owner/name/tree/main"):
            inner = path.removeprefix("/api/datasets/owner/name/tree/main").strip("/")
            self._answer(200, json.dumps(self._tree(inner)).encode())
        elif path in ("/api/datasets/owner/name", "/api/datasets/owner/name/revision/main"):
            self._answer(200, b'{"id": "owner/name", "sha": "0"}')
        elif path.startswith("/datasets/owner/name/resolve/main/"):
            content = self.folder / path.removeprefix("/datasets/owner/name/resolve/main/")
            begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self._answer(206, content.read_bytes()[begin : end + 1])
        else:
            self._answer(404, b"", ("X-Error-Code", "RepoNotFound"))

    def _tree(self, inner: str) -> list[dict[str, Any]]:
        recursive = "recursive=True" in self.path
        found = []
        for path in sorted((self.folder / inner).glob("**/*" if recursive else "*")):
            content = path.read_bytes() if path.is_file() else b""
            found.append(
                {
                    "path": path.relative_to(self.folder).as_posix(),
                    "type": "file" if path.is_file() else "directory",
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
            )
        return found

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[Hub]]:
    write_texts(tmp_path / "name", documents[:60])
    handler = type("Bound", (Hub,), {"folder": tmp_path / "name", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    to_it = partial(huggingface_hub.HfFileSystem, endpoint=endpoint)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", to_it)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    store_connections.connect.cache_clear()
    yield handler
    server.shutdown()
    server.server_close()
    store_connections.connect.cache_clear()


def test_a_repository_and_its_parts(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(source_store, "BUFFER_BYTES", 1000)
    for inner in ("", "/deep", "/deep/lines.jsonl", "/lines", "/deep/er/table.parquet"):
        here = find_files([f"{hub.folder}{inner}"]).files
        for address in (f"{REPOSITORY}{inner}", f"{REPOSITORY}@main{inner}"):
            found = find_files([address]).files
            assert str(found[0].path).startswith(address)
            parts = [text for piece in cut(found) for text in read_texts(piece.files)]
            assert parts == read_texts(here)


def test_processes_read_at_the_same_time(hub: type[Hub]) -> None:
    files = find_files([REPOSITORY]).files
    expected = read_texts(files)

    def read() -> None:
        assert read_texts(files) == expected

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_file_that_was_replaced_is_another(hub: type[Hub]) -> None:
    before = [identity(file) for file in find_files([REPOSITORY]).files]
    assert before == [identity(file) for file in find_files([REPOSITORY]).files]
    text = (hub.folder / "deep" / "lines.jsonl").read_text()
    (hub.folder / "deep" / "lines.jsonl").write_text(text.replace("e", "a", 1))
    after = [identity(file) for file in find_files([REPOSITORY]).files]
    (changed,) = [one for one, other in zip(before, after, strict=False) if one != other]
    assert str(changed[0]).endswith("/deep/lines.jsonl")
    assert identity(find_files([f"{REPOSITORY}/deep/er/table.parquet"]).files[0]) in after


def test_what_is_not_there_or_not_shown(hub: type[Hub]) -> None:
    for source in ("hf://datasets/owner/other/x", "hf://datasets/owner", f"{REPOSITORY}/gone.txt"):
        with pytest.raises(InputError, match=rf"^source {source}: no such file or folder"):
            find_files([source])
    hub.status = 403
    with pytest.raises(InputError, match=rf"^{REPOSITORY}: access is refused, or credentials"):
        find_files([REPOSITORY])
    hub.status = 500
    with pytest.raises(UnreachableError, match=rf"^{REPOSITORY} could not be read"):
        find_files([REPOSITORY])
