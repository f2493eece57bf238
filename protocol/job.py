"""A detached fetch as a file: everything the daemon needs to go on with it after a restart, without a client.

Invariants of a `Job` that exists:
- its link, where it was asked for by one, is about its content; trackers and web seeds of the link are left out, since the
  statement is kept already and holds the publisher's own;
- `encode_job(decode_job(data)) == data`, so one request has one encoding, and its SHA-256 is the job's id: asking twice for
  the same is one job.

A job is no trust anchor: the kept statement is verified and admitted again whenever the job is taken up.
Byte form: `MP2PJOB` and a line feed, then canonical msgpack.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.links import Link, PeerAddress, parse_link

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

MAGIC = b"MP2PJOB\n"
VERSION = 1
MAX_JOB_BYTES = 2 << 20
"""Twice a control frame, the only way in which a request comes."""
MAX_PATTERNS = 1000
MAX_PEERS = 1000
MAX_RATE = 2**31 - 1
"""libtorrent's limits are 32-bit; 2 GB/s is beyond one network thread anyway."""
MAX_TIMEOUT_S = 10**9
"""Thirty years: as good as never, and far from where clocks overflow."""
_FIELDS = frozenset(
    {
        "v",
        "info_hash",
        "statement",
        "link",
        "include",
        "exclude",
        "peers",
        "timeout_s",
        "allow_code",
        "seed",
        "max_up",
        "max_down",
        "peers_only",
    }
)


@dataclass(frozen=True, slots=True)
class Job:
    """One detached fetch. Rates in bytes per second, 0 is unlimited."""

    info_hash: bytes
    """v2 info-hash of the content, 32 bytes."""
    statement: bytes
    """SHA-256 of the envelope of the kept statement, 32 bytes."""
    link: Link | None = None
    """The link that authorised the publisher; None where the trust book has to."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    peers: tuple[PeerAddress, ...] = ()
    timeout_s: int = 300
    allow_code: bool = False
    seed: bool = True
    max_up: int = 0
    max_down: int = 0
    peers_only: bool = False
    """No web seed is asked; written only where it is so, because jobs that an earlier version kept have no such field."""

    def __post_init__(self) -> None:
        if len(self.info_hash) != 32 or len(self.statement) != 32:
            raise FormatError("job: info-hash and statement have 32 bytes")
        if self.link is not None and self.link.info_hash != self.info_hash:
            raise FormatError("job: the link is about other content")
        if self.link is not None and (self.link.trackers or self.link.web_seeds):
            raise FormatError("job: the link carries trackers or web seeds")
        for key, items, limit in (
            ("include", self.include, MAX_PATTERNS),
            ("exclude", self.exclude, MAX_PATTERNS),
            ("peers", self.peers, MAX_PEERS),
        ):
            if len(items) > limit:
                raise FormatError(f"job: field '{key}' has {len(items)} items, more than the limit of {limit}")
        if not 1 <= self.timeout_s <= MAX_TIMEOUT_S:
            raise FormatError(f"job: a timeout of {self.timeout_s} s is out of range")
        if not (0 <= self.max_up <= MAX_RATE and 0 <= self.max_down <= MAX_RATE):
            raise FormatError("job: a rate is out of range")

    @property
    def id(self) -> bytes:
        """SHA-256 of the job's bytes."""
        return job_id(encode_job(self))


def job_id(data: bytes) -> bytes:
    """The id of the job with these bytes."""
    return hashlib.sha256(data).digest()


def encode_job(job: Job) -> bytes:
    """Canonical bytes of a job file."""
    include: list[Value] = list(job.include)
    exclude: list[Value] = list(job.exclude)
    peers: list[Value] = [str(peer) for peer in job.peers]
    fields: Map = {
        "v": VERSION,
        "info_hash": job.info_hash,
        "statement": job.statement,
        "link": "" if job.link is None else str(job.link),
        "include": include,
        "exclude": exclude,
        "peers": peers,
        "timeout_s": job.timeout_s,
        "allow_code": job.allow_code,
        "seed": job.seed,
        "max_up": job.max_up,
        "max_down": job.max_down,
    }
    if job.peers_only:
        fields["peers_only"] = True
    return MAGIC + codec.pack(fields)


def decode_job(data: bytes) -> Job:
    """The job in a job file.

    Raises:
        FormatError: malformed, truncated, or of a newer version.
        UntrustedError: its link carries no signed manifest.
    """
    if not data.startswith(MAGIC):
        raise FormatError("not a modelp2p job")
    source = codec.unpack_map(memoryview(data)[len(MAGIC) :], max_bytes=MAX_JOB_BYTES)
    if codec.take_uint(source, "v", maximum=2**32, where="job") != VERSION:
        raise FormatError("this job has a version that is not known here", hint="Update modelp2p.")
    codec.only_fields(source, _FIELDS, "job")
    link = codec.take(source, "link", str, "job")
    job = Job(
        codec.take_bytes(source, "info_hash", 32, "job"),
        codec.take_bytes(source, "statement", 32, "job"),
        parse_link(link) if link else None,
        tuple(codec.take_list(source, "include", str, maximum=MAX_PATTERNS, where="job")),
        tuple(codec.take_list(source, "exclude", str, maximum=MAX_PATTERNS, where="job")),
        tuple(map(PeerAddress.parse, codec.take_list(source, "peers", str, maximum=MAX_PEERS, where="job"))),
        codec.take_uint(source, "timeout_s", maximum=MAX_TIMEOUT_S, where="job"),
        codec.take(source, "allow_code", bool, "job"),
        codec.take(source, "seed", bool, "job"),
        codec.take_uint(source, "max_up", maximum=MAX_RATE, where="job"),
        codec.take_uint(source, "max_down", maximum=MAX_RATE, where="job"),
        "peers_only" in source and codec.take(source, "peers_only", bool, "job"),
    )
    if encode_job(job) != data:
        # Links and addresses can be spelt in several ways; a job is spelt in one.
        raise FormatError("job: not in canonical form")
    return job
