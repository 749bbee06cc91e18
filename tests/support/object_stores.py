"""A real S3 server on this machine, behind a proxy that counts requests and injects faults."""

from __future__ import annotations

import http.client
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from megaconsa.data import store_connections
from megaconsa.object_store import connection

BUCKET = "bucket"
NO_BODY = (204, 304)

Fault = Callable[["Handler", bytes], bytes | None]
"""Changes the body of an answer. None if the fault has answered itself, or hung up."""


class ObjectStore:
    """The server, and what happens to its answers."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{server[0]}:{server[1]}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)
        self.gets: Counter[str] = Counter()
        """Number of GET requests by the name of the file."""
        self.sent: Counter[str] = Counter()
        """Bytes of their answers."""
        self.requests = 0
        """Number of all requests."""
        self.faults: dict[str, list[Fault]] = {}
        """The faults of a file's next GET requests. The name `*` means every file."""
        handler = type("Bound", (Handler,), {"store": self})
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def use(self, patch: pytest.MonkeyPatch, temporary: Path) -> None:
        """Makes this process read s3:// from this server, without faults, and counts anew.

        temporary: the default cache is made in it.
        """
        for name, value in {
            "S3_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            # botocore would retry for seconds before we do.
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(temporary))
        # Connections keep the environment in which they were made.
        connection.cache_clear()
        store_connections.connect.cache_clear()
        self.gets.clear()
        self.faults.clear()

    def upload(self, folder: Path, key: str) -> str:
        """Uploads a folder. Returns its address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = f"{key}/{file.relative_to(folder)}"
                self.client.put_object(Bucket=BUCKET, Key=name, Body=file.read_bytes())
        return f"s3://{BUCKET}/{key}"

    def change(self, key: str, change: Callable[[bytearray], bytearray]) -> None:
        """Replaces a file by a changed one."""
        content = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        changed = bytes(change(bytearray(content)))
        self.client.put_object(Bucket=BUCKET, Key=key, Body=changed)

    def next_fault(self, name: str) -> Fault | None:
        for faults in (self.faults.get(name), self.faults.get("*")):
            if faults:
                return faults.pop(0)
        return None

    def forward(self, handler: Handler) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer to a request: status, headers and body."""
        self.requests += 1
        connection = http.client.HTTPConnection(*self._server)
        connection.request(handler.command, handler.path, headers=dict(handler.headers.items()))
        answer = connection.getresponse()
        found = answer.status, answer.getheaders(), answer.read()
        connection.close()
        return found

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()


class Handler(BaseHTTPRequestHandler):
    """Forwards a request, or does what the next fault says."""

    store: ObjectStore
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(*self.store.forward(self))

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        self.store.gets[name] += 1
        fault = self.store.next_fault(name)
        status, headers, body = self.store.forward(self)
        self.store.sent[name] += len(body)
        if fault is None:
            self._answer(status, headers, body)
            return
        changed = fault(self, body)
        if changed is not None:
            self._answer(status, headers, changed)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def answers(status: int) -> Fault:
    """The server answers with an error."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.send_header("Connection", "close")
        handler.end_headers()

    return fault


def hangs_up(handler: Handler, body: bytes) -> None:
    """The connection is closed without an answer."""
    handler.close_connection = True
    handler.connection.close()


def halves(handler: Handler, body: bytes) -> bytes:
    """The connection ends after half of the file."""
    return body[: len(body) // 2]


def stalls(seconds: float) -> Fault:
    """No answer comes for some time."""

    def fault(handler: Handler, body: bytes) -> bytes:
        time.sleep(seconds)
        return body

    return fault


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    store = ObjectStore(server.get_host_and_port())
    try:
        yield store
    finally:
        store.close()
        server.stop()
