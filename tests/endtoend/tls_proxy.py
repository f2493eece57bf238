"""The least reverse proxy there is: TLS in front, the same bytes behind. Run by tests.

    python tls_proxy.py CERTIFICATE HOST PORT

Listens on a free port of loopback, prints it, and relays every connection to HOST:PORT until it is stopped.
"""

from __future__ import annotations

import ssl
import sys

import trio

READ_BYTES = 64 << 10


async def main() -> None:
    """Listen, say where, relay."""
    certificate, host, port = sys.argv[1:]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    (listener,) = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)
    assert isinstance(listener.transport_listener, trio.SocketListener)
    print(listener.transport_listener.socket.getsockname()[1], flush=True)

    async def relay(client: trio.abc.Stream) -> None:
        try:
            async with client, await trio.open_tcp_stream(host, int(port)) as server, trio.open_nursery() as nursery:
                for source, sink in ((client, server), (server, client)):
                    nursery.start_soon(copy, source, sink, nursery.cancel_scope)
        except* trio.BrokenResourceError:
            pass  # one of the two hung up, which is the end of both

    await trio.serve_listeners(relay, [listener])


async def copy(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream, both: trio.CancelScope) -> None:
    """Carry bytes until one side ends, then end the other."""
    while data := await source.receive_some(READ_BYTES):
        await sink.send_all(data)
    both.cancel()


if __name__ == "__main__":
    trio.run(main)
