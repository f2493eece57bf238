"""A Hub on loopback: as much of its HTTP as huggingface_hub needs to download, list and verify one commit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

_PART = 64 << 10


def git_id(data: bytes) -> str:
    """The id git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Hub:
    """One commit of one model. Files in `lfs` are kept there, all others in git."""

    name: str
    commit: str
    files: Mapping[str, bytes]
    lfs: frozenset[str]
    requests: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """Bytes of files that left it, part by part."""

    def etag(self, path: str) -> str:
        data = self.files[path]
        return hashlib.sha256(data).hexdigest() if path in self.lfs else git_id(data)

    def row(self, path: str) -> dict[str, object]:
        """A file as `/tree` lists it."""
        data = self.files[path]
        if path not in self.lfs:
            return {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
        digest = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
        lfs = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "size": len(data), "oid": git_id(pointer), "lfs": lfs}

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Its endpoint, for the time of the block."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(has_body=True)

            def do_HEAD(self) -> None:
                self.answer(has_body=False)

            def answer(self, *, has_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                hub.requests.append(f"{self.command} {path}")
                status, headers, body = 404, {"X-Error-Code": "EntryNotFound"}, memoryview(b'{"error": "not here"}')
                if path in (f"/api/models/{hub.name}/revision/main", f"/api/models/{hub.name}"):
                    siblings = [{"rfilename": file} for file in hub.files]
                    info = {"id": hub.name, "sha": hub.commit, "private": False, "siblings": siblings}
                    status, headers, body = 200, {}, memoryview(json.dumps(info).encode())
                elif path.startswith(f"/api/models/{hub.name}/tree/"):
                    status, headers, body = 200, {}, memoryview(json.dumps([hub.row(file) for file in hub.files]).encode())
                elif (file := path.removeprefix(f"/{hub.name}/resolve/{hub.commit}/")) in hub.files:
                    status, body = 200, memoryview(hub.files[file])
                    headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.etag(file)}"', "Accept-Ranges": "bytes"}
                    if (begin := self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")).isdigit():
                        headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                        status, body = 206, body[int(begin) :]
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                try:
                    for at in range(0, len(body) if has_body else 0, _PART):
                        count = self.wfile.write(body[at : at + _PART])
                        if "ETag" in headers:
                            hub.sent.append(count)
                except ConnectionError:
                    # Who was killed reads no further.
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
