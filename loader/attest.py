"""What lies in a model's tensors now, against the manifest: pieces are put together out of tensors and hashed on the device.

A piece can be judged only where every byte of it is at hand: the header's, and those of all tensors it touches, as they were
stored. A tensor that was cast, cut, changed in shape or left out takes the pieces under it, and so the edges of its neighbours,
out of reach; `Attestation.skipped` says which and why.

It says what was true while it looked. Whoever can write to the memory can write afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.gpu import Batch
from modelp2p.loader.pieces import runs_of
from modelp2p.loader.plan import Move
from modelp2p.loader.shard import proven_header
from modelp2p.protocol.merkle import HASH_BYTES
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.loader.device import Device
    from modelp2p.loader.parts import Part
    from modelp2p.loader.ring import Lane, Ring
    from modelp2p.loader.shard import Shard


@dataclass(frozen=True, slots=True)
class BadPiece:
    """A piece that the tensors do not give as it was signed; at least one of them was changed."""

    path: str
    piece: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attestation:
    """What a look at a model's memory found."""

    attested: tuple[str, ...]
    """Tensors every byte of which is what was signed."""
    bad: tuple[BadPiece, ...]
    skipped: Mapping[str, str]
    """Tensors of the release that could not be judged whole, and why. Their pieces that could be judged were."""
    bytes: int
    """Tensor bytes in good pieces."""


@dataclass(slots=True)
class _Found:
    attested: list[str] = field(default_factory=list)
    bad: list[BadPiece] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def attest_tensors(
    files: Sequence[tuple[Shard, Sequence[Part]]],
    tensors: Mapping[str, torch.Tensor],
    device: Device,
    ring: Ring,
    max_header_bytes: int,
) -> Attestation:
    """Judge a model's tensors.

    Args:
        files: open files, each with all of its tensors in file order.
        tensors: the model's, by the release's names.
        device: where they are.
        ring: staging.
        max_header_bytes: limit of one header.

    Raises:
        UsageError: nobody can hash on this device.
        IntegrityError: a header on the disk is bad, so that no piece with it can be put together.
    """
    found = _Found()
    device.adopt()
    for shard, parts in files:
        reasons = {part.name: reason for part in parts if (reason := _reason(part, tensors.get(part.name), device.device))}
        lacking = [part for part in parts if part.name in reasons]
        whole = Ranges.span(0, shard.table.count).minus(shard.table.covering((part.begin, part.end) for part in lacking))
        bad = _bad_pieces(
            shard, [part for part in parts if part.name not in reasons], tensors, whole, device, ring, max_header_bytes
        )
        _judge(shard, parts, reasons, whole, bad, found)
    return Attestation(tuple(found.attested), tuple(found.bad), found.skipped, found.bytes)


def _reason(part: Part, tensor: torch.Tensor | None, device: torch.device) -> str:
    """Why a tensor does not hold its bytes as they were stored; empty if it may."""
    if tensor is None:
        return "not in the model"
    if tensor.device != device:
        return f"on {tensor.device}, not on {device}"
    if tensor.dtype != part.dtype:
        return f"cast to {tensor.dtype} from {part.dtype}"
    if tuple(tensor.shape) != part.shape:
        return f"of shape {tuple(tensor.shape)}, stored {part.shape}"
    return "" if tensor.is_contiguous() else "not contiguous"


def _bad_pieces(
    shard: Shard,
    parts: Sequence[Part],
    tensors: Mapping[str, torch.Tensor],
    pieces: Ranges,
    device: Device,
    ring: Ring,
    max_header_bytes: int,
) -> list[int]:
    table = shard.table
    runs = list(runs_of(pieces, max(1, device.slot_bytes // table.piece_length)))
    if not runs:
        return []
    # A long header reaches into pieces whose other bytes may be at hand while those of the first piece are not.
    has_header = table.span(runs[0])[0] < shard.header.data_offset
    header = device.constant(proven_header(shard, max_header_bytes)) if has_header else device.constant(b"")
    rows = [(part.begin, part.end, tensors[part.name].view(-1).view(torch.uint8)) for part in parts if part.size]
    rows.insert(0, (0, header.numel(), header))
    layer, verifier, bad, at = device.constant(table.layer), device.verifier(), [], 0
    # Nothing is read from a file, so no host slot is needed.
    with ring.lanes(max(end - begin for begin, end in map(table.span, runs)), is_bare=True) as lanes:
        for run in runs:
            begin, end = table.span(run)
            while at < len(rows) and rows[at][1] <= begin:
                at += 1
            _gather(rows, at, begin, end, lanes[0], device)
            expected = layer[run.start * HASH_BYTES : run.stop * HASH_BYTES]
            batch = Batch(end - begin, table.piece_length, table.count == 1, expected)
            verdict = device.verify(verifier, lanes[0].slot, batch)
            # One span at a time: nothing is read and nothing uploaded that could go on meanwhile.
            verdict.wait()
            bad += [run[number] for number in verdict.bad()]
    return bad


def _gather(rows: Sequence[tuple[int, int, torch.Tensor]], at: int, begin: int, end: int, lane: Lane, device: Device) -> None:
    """Put bytes `begin` up to `end` of a file together in a slot, from row `at` on."""
    while at < len(rows) and rows[at][0] < end:
        low, high, row = rows[at]
        first, last = max(low, begin), min(high, end)
        if first < last:
            device.move(lane.slot, row, Move(0, first - low, first - begin, last - first))
        at += 1


def _judge(
    shard: Shard, parts: Sequence[Part], reasons: Mapping[str, str], whole: Ranges, bad: Sequence[int], found: _Found
) -> None:
    table = shard.table
    good = whole.minus(Ranges.of_ints(bad))
    spans = [table.span(range(*run)) for run in good]
    for part in parts:
        under = table.covering([(part.begin, part.end)])
        found.bytes += sum(max(0, min(part.end, end) - max(part.begin, begin)) for begin, end in spans)
        if part.name in reasons:
            found.skipped[part.name] = reasons[part.name]
        elif left := under.minus(whole):
            found.skipped[part.name] = f"shares piece {left.spans[0][0]} of '{table.path}' with a tensor that is not as stored"
        elif not under.minus(good):
            found.attested.append(part.name)
    for piece in bad:
        begin, end = table.span(range(piece, piece + 1))
        names = tuple(part.name for part in parts if part.begin < end and part.end > begin and part.size)
        found.bad.append(BadPiece(table.path, piece, names))
