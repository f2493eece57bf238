"""The ids git gives to contents, and what it keeps of a file in LFS. Pure.

Spec: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import hashlib


def object_id(kind: bytes, content: bytes) -> bytes:
    """The 20-byte id of an object: a `blob`, or a `tree` of what lies in a folder."""
    return hashlib.sha1(b"%b %d\0%b" % (kind, len(content), content), usedforsecurity=False).digest()


def blob_id(content: bytes) -> bytes:
    """The id of a file of this content."""
    return object_id(b"blob", content)


def lfs_pointer(sha256: bytes, size: int) -> bytes:
    """The file that git itself keeps in the place of one in LFS."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (sha256.hex().encode("ascii"), size)
