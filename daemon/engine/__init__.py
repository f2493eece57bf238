"""The engine: a child process that hosts one libtorrent session and nothing else.

It holds no key and decides no path; it may crash, and `daemon.supervisor` starts another. It talks to the daemon in
`protocol.engine_wire` messages over one inherited socket.
"""
