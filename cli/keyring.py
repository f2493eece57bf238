"""The user's publisher keys on disk: one folder a key, and the rules under which this process will use them.

    <keys>/<NAME>/            0700
        release.key           0600  signs manifests and root documents
        pointer.key           0600  signs what expires
        publisher             the root documents 1..N
        sequences             model name -> highest sequence ever signed

Invariants:
- a key that others may read is not used, and never silently repaired;
- a key folder appears whole or not at all, and is never overwritten;
- a sequence number is recorded, durably, before anything signed under it leaves this process.

Keys never leave the process that signs; the daemon has no way to ask for them.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import DeniedError, FormatError, NotFoundError, UsageError

if TYPE_CHECKING:
    import datetime

    from modelp2p.protocol.keyfile import SealedKey
    from modelp2p.protocol.publisher import RootChain

RELEASE, POINTER, PUBLISHER, SEQUENCES = "release.key", "pointer.key", "publisher", "sequences"
MAX_SEQUENCES_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """One publisher's keys."""

    name: str
    path: str

    def chain(self) -> RootChain:
        """The verified root chain."""
        from modelp2p.protocol.publisher import MAX_CHAIN_BYTES, decode_chain

        return decode_chain(self._read(PUBLISHER, MAX_CHAIN_BYTES))

    def release_key(self) -> SealedKey:
        """The release key, still sealed.

        Raises:
            DeniedError: others than the owner can read it.
        """
        from modelp2p.protocol.keyfile import MAX_KEYFILE_BYTES, parse_key

        return parse_key(self._read(RELEASE, MAX_KEYFILE_BYTES, secret=True))

    def highest_sequence(self, model: str) -> int:
        """The highest sequence ever signed for a model's name; 0 before the first."""
        with self._locked():
            return self._sequences().get(model, 0)

    def record_sequence(self, model: str, sequence: int) -> None:
        """Note, durably, that `sequence` is about to be signed.

        Raises:
            UsageError: it or a higher one was signed already: two statements under one number look like a forgery.
        """
        from modelp2p.protocol import codec

        with self._locked():
            known = self._sequences()
            if sequence <= known.get(model, 0):
                raise UsageError(
                    f"sequence {sequence} of {model} is used: this key has signed {known[model]} already",
                    hint="Leave --sequence out to get the next one. If another publish runs, try again.",
                )
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                temporary = f".{SEQUENCES}.{secrets.token_hex(8)}"
                _write_new(folder, temporary, codec.pack({**known, model: sequence}))
                os.rename(temporary, SEQUENCES, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            finally:
                os.close(folder)

    def _sequences(self) -> dict[str, int]:
        from modelp2p.protocol import codec

        source = codec.unpack_map(self._read(SEQUENCES, MAX_SEQUENCES_BYTES), max_bytes=MAX_SEQUENCES_BYTES)
        return {model: codec.take_uint(source, model, maximum=2**53 - 1, where="sequences") for model in source}

    def _read(self, file: str, limit: int, *, secret: bool = False) -> bytes:
        path = os.path.join(self.path, file)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NotFoundError(f"key '{self.name}' is incomplete: {path} is missing") from exc
        with os.fdopen(fd, "rb") as opened:
            found = os.fstat(fd)
            if secret and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise DeniedError(
                    f"{path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}): it may be known already",
                    hint=f"chmod 600 {path}",
                    path=path,
                )
            data = opened.read(limit + 1)
        if len(data) > limit:
            raise FormatError(f"{path} is larger than {limit} bytes")
        return data

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the publishing processes of this machine."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def key_names(keys: str) -> list[str]:
    """Names of all keys in the folder `keys`."""
    try:
        entries = os.listdir(keys)
    except FileNotFoundError:
        return []
    return sorted(name for name in entries if _NAME.fullmatch(name) and os.path.isfile(os.path.join(keys, name, PUBLISHER)))


def key_of(keys: str, name: str | None) -> KeyFolder:
    """The key called `name`, or the only one.

    Raises:
        NotFoundError: there is none, or none of that name.
        UsageError: there are several, and no name.
    """
    known = key_names(keys)
    hint = "Make one: modelp2p keys init NAME."
    if name is None:
        if not known:
            raise NotFoundError(f"there is no key in {keys}", hint=hint)
        if len(known) > 1:
            raise UsageError("there are several keys", hint=f"Choose one with --key: {', '.join(known)}.")
        name = known[0]
    if name not in known:
        raise NotFoundError(f"there is no key '{name}' in {keys}", hint=f"Known: {', '.join(known)}." if known else hint)
    return KeyFolder(name, os.path.join(keys, name))


def create_key(keys: str, name: str, passphrase: str | None, expires: datetime.datetime) -> KeyFolder:
    """A new publisher: two fresh keys and the root document that names them.

    Raises:
        UsageError: not a name for a key, or it is taken.
    """
    from modelp2p.protocol import codec
    from modelp2p.protocol.keyfile import NONCE_BYTES, SALT_BYTES, seal_key
    from modelp2p.protocol.publisher import POINTER_ROLE, RELEASE_ROLE, encode_chain, make_solo_root
    from modelp2p.protocol.signing import KEY_BYTES, PrivateKey

    if not _NAME.fullmatch(name):
        raise UsageError(f"'{name[:80]}' is not a name for a key", hint="Use letters, digits, '.', '_' and '-', at most 64.")
    path = os.path.join(keys, name)
    if os.path.lexists(path):
        raise UsageError(f"there is a key '{name}' already: {path}", hint="Choose another name. A lost key cannot be made again.")
    release_seed, pointer_seed = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
    root = make_solo_root(PrivateKey(release_seed), PrivateKey(pointer_seed), expires)
    files = {
        RELEASE: seal_key(
            release_seed, RELEASE_ROLE, passphrase, secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES)
        ),
        POINTER: seal_key(
            pointer_seed, POINTER_ROLE, passphrase, secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES)
        ),
        PUBLISHER: encode_chain([root]),
        SEQUENCES: codec.pack({}),
    }
    os.makedirs(keys, mode=0o700, exist_ok=True)
    temporary = os.path.join(keys, f".{name}.{secrets.token_hex(8)}")
    os.mkdir(temporary, 0o700)
    try:
        folder = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for file, data in files.items():
                _write_new(folder, file, data)
            os.fsync(folder)
        finally:
            os.close(folder)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return KeyFolder(name, path)


def _write_new(folder: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
