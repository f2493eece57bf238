"""Web servers for tests of web seeds: they serve ranges of files in memory, and misbehave as they are told.

Each runs in a thread; a test sees what was asked, in order, and says with `Reply` what becomes of it.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_VALID = datetime.timedelta(days=36_500)


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    target: str
    range: str | None
    token: str | None
    """The `Authorization` header."""

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])


@dataclass(frozen=True)
class Reply:
    """How an answer differs from the right one."""

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    content: bytes | None = None
    """Sent instead of the range."""
    length: int | None = None
    """Said in `Content-Length` instead of the truth, -1 for nothing; the connection ends behind the content."""
    wait: threading.Event | None = None
    """Nothing is sent before it is set."""


RIGHT = Reply()


def redirect(url: str, status: int = 302) -> Reply:
    """The answer that sends to another URL."""
    return Reply(status, (("Location", url),), b"")


class Origin:
    """A web server on loopback.

    Args:
        files: contents by path, unquoted, with a slash in front.
        respond: decides each reply.
        tls: makes it HTTPS.
        host: how it is called in URLs.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        respond: Callable[[Asked], Reply] = lambda _: RIGHT,
        *,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.asked: list[Asked] = []
        self.respond = respond
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin._answer(self, files)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, HTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that hangs up, or that refuses the certificate

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            # The handshake in the thread of its connection: a client that makes none must not stop the others.
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.place = f"{host}:{self._server.server_address[1]}"
        self.url = f"{'http' if tls is None else 'https'}://{self.place}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name=self.url)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def tokens(self) -> set[str | None]:
        """Every `Authorization` header it has seen, and None for a request without one."""
        return {asked.token for asked in self.asked}

    def _answer(self, handler: BaseHTTPRequestHandler, files: Mapping[str, bytes]) -> None:
        asked = Asked(handler.path, handler.headers["Range"], handler.headers["Authorization"])
        self.asked.append(asked)
        reply = self.respond(asked)
        if reply.wait is not None:
            reply.wait.wait(30)
        status, headers, content = _right_answer(files.get(asked.path), asked.range)
        if reply.status is not None and reply.status != status:
            # What describes a range does not belong to another answer.
            status, headers = reply.status, {}
        content = content if reply.content is None else reply.content
        headers |= {"Content-Length": str(len(content) if reply.length is None else reply.length)} | dict(reply.headers)
        handler.send_response(status)
        if reply.length == -1:
            del headers["Content-Length"]
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = reply.length is not None


def _right_answer(content: bytes | None, asked_range: str | None) -> tuple[int, dict[str, str], bytes]:
    if content is None:
        return 404, {}, b""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked_range or "")
    if match is None:
        return 200, {}, content
    begin, end = int(match[1]), min(int(match[2]) + 1, len(content))
    return 206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, content[begin:end]


def certificates(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A throw-away authority: what a server for 127.0.0.1 and localhost shows, and what a client that trusts it checks."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "throw-away")])
    now = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
    names = [x509.DNSName("localhost"), x509.DNSName("hub.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(pem + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem")
    client = ssl.create_default_context(cadata=pem.decode("ascii"))
    return server, client
