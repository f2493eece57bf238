"""Who tells good pieces from bad ones where they lie: the device itself, or hashlib for memory of the host.

Invariants:
- a piece is good only by its hash: a run that could not be ordered raises, and none is skipped;
- `bad` is written for differing pieces only, so that several batches may share one tensor of zeros;
- the order is that of the current stream: behind the copy into the slot, before whatever reads the slot next.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

import torch

from modelp2p.loader.gpu.build import compile_kernels
from modelp2p.loader.gpu.shape import FOLD_THREADS, LEAF_BLOCKS, LEAF_THREADS, TAIL_THREADS, Shape, arch_of, blocks_for
from modelp2p.loader.gpu.way import WayError
from modelp2p.loader.staging import bytes_of
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.merkle import HASH_BYTES, LEAF_BYTES, piece_hash, pieces_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelp2p.loader.gpu.way import Kernels, Way

ALIGNMENT = 16
"""Bytes a thread loads at once. Fresh torch memory is aligned to 64 at least; slices of it at odd places are not."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive pieces of one file, lying at the start of one slot.

    Raises:
        ValueError: no such run of pieces exists, or `expected` does not fit it.
        FormatError: `piece_length` is no piece length.
    """

    size: int
    """Bytes, above 0; no multiple of `piece_length` only where the file ends."""
    piece_length: int
    is_whole_file: bool
    """The file has one piece: padded only to its own tree."""
    expected: torch.Tensor
    """(32 * pieces,) uint8 on the verifier's device, contiguous, 16-byte aligned: the entries of the layer."""

    def __post_init__(self) -> None:
        _check_memory("expected", self.expected, torch.uint8)
        if self.expected.numel() != self.shape.pieces * HASH_BYTES:
            raise ValueError(f"{self.expected.numel()} expected bytes for {self.shape.pieces} pieces")

    @property
    def shape(self) -> Shape:
        """Leaves, pieces and levels."""
        return Shape.of(self.size, self.piece_length, self.is_whole_file)


class Verifier(Protocol):
    """Checks batches on one device. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """As `LoadStats.verifier` shows it: `cuda-torch`, `cuda-nvrtc` or `cpu`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why not a better way, in words; empty when all is well."""

    def submit(self, slot: torch.Tensor, batch: Batch, bad: torch.Tensor) -> None:
        """Order the check of `slot[:batch.size]` on the current stream of the verifier's device.

        May return before it is done: until work ordered here has ended, `slot` and `batch.expected` must stay as they are and
        `bad` must not be read by another stream or the host.

        Args:
            slot: (at least batch.size,) uint8 on the device, contiguous, 16-byte aligned. What lies behind the batch is not read.
            batch: the pieces.
            bad: (at least pieces,) int32 on the device, contiguous, zeroed before. bad[i] becomes 1 where piece i differs.

        Raises:
            ValueError: a tensor is not as it has to be; nothing was ordered.
            RuntimeError: the device refuses, as torch raises it.
        """


class HostVerifier:
    """hashlib on host memory: the reference, and the verifier of devices that are none. Done when it returns."""

    name = "cpu"
    notes = ()

    def submit(self, slot: torch.Tensor, batch: Batch, bad: torch.Tensor) -> None:
        _check_submitted(slot, batch, bad, torch.device("cpu"))
        data, signed = bytes_of(slot)[: batch.size], bytes_of(batch.expected)
        for piece in range(batch.shape.pieces):
            begin = piece * batch.piece_length
            got = piece_hash(data[begin : begin + batch.piece_length], batch.piece_length, batch.is_whole_file)
            if got != signed[piece * HASH_BYTES : (piece + 1) * HASH_BYTES]:
                bad[piece] = 1


class GpuVerifier:
    """The kernels of sha256.cu on one device.

    Resources: 32 bytes of device memory per leaf of the largest slot (1/512 of it), for each stream it was used on; kept.
    """

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        self.device = device
        self.name = kernels.name
        self.notes = kernels.notes
        self._functions = kernels.functions
        self._zeros = _zero_subtrees().to(device)
        self._scratch: dict[int, torch.Tensor] = {}

    def submit(self, slot: torch.Tensor, batch: Batch, bad: torch.Tensor) -> None:
        _check_submitted(slot, batch, bad, self.device)
        if self.device.type != "cuda":  # the same source built for the host, in tests
            self._order(slot, batch, bad, self._nodes(slot, 0))
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            # A call of the runtime makes its context the thread's current one. The driver's own launch call would not, and fails
            # in a thread that did nothing with this device before.
            stream.query()
            self._order(slot, batch, bad, self._nodes(slot, stream.cuda_stream))

    def _order(self, slot: torch.Tensor, batch: Batch, bad: torch.Tensor, nodes: torch.Tensor) -> None:
        shape = batch.shape
        if shape.full_leaves:
            grid = blocks_for(shape.full_leaves, LEAF_THREADS)
            self._functions["sha256_leaves"](grid, LEAF_THREADS, (slot, LEAF_BLOCKS, shape.full_leaves, nodes))
        if shape.tail_bytes:
            tail = (slot, LEAF_BLOCKS, shape.full_leaves, shape.tail_bytes, nodes)
            self._functions["sha256_tail"](1, TAIL_THREADS, tail)
        if shape.levels:
            rows = (nodes, shape.leaves, shape.piece_leaves, shape.levels, self._zeros)
            self._functions["fold"](shape.pieces, FOLD_THREADS, rows)
        hashes = (nodes, shape.piece_leaves, batch.expected, shape.pieces, bad)
        self._functions["compare"](blocks_for(shape.pieces, LEAF_THREADS), LEAF_THREADS, hashes)

    def _nodes(self, slot: torch.Tensor, stream: int) -> torch.Tensor:
        """Room for the digests of a slot. One for each stream: batches on one stream follow each other, those on two may not."""
        needed = HASH_BYTES * pieces_in(slot.numel(), LEAF_BYTES)
        nodes = self._scratch.get(stream)
        if nodes is None or nodes.numel() < needed:
            nodes = self._scratch[stream] = torch.empty(needed, dtype=torch.uint8, device=self.device)
        return nodes


def verifier_for(device: torch.device, tried: Sequence[Way] | None = None) -> Verifier:
    """The verifier of a device; on a GPU by the first way that compiles and tells good from bad.

    Cost: on a GPU that of `build.compile_kernels`, and a few milliseconds for the trial.

    Args:
        device: `cpu`, or a CUDA device.
        tried: ways to the kernels, best first; those of this machine by default.

    Raises:
        UsageError: no way is open, with the reason of each; or not a device this loader serves.
    """
    if device.type == "cpu":
        return HostVerifier()
    if device.type != "cuda":
        raise UsageError(f"device '{device}' is not served", hint="Load to the cpu and move the tensors with .to().")
    if not torch.cuda.is_available():
        raise UsageError("this torch finds no CUDA device", hint="Load with verify='cpu', or check the driver with nvidia-smi.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no CUDA device {device.index}; this process sees {torch.cuda.device_count()}")
    with torch.cuda.device(device):
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize()  # the context exists from here on, which loading needs
        made: list[GpuVerifier] = []

        def accept(kernels: Kernels) -> None:
            made.append(tried_out(GpuVerifier(device, kernels)))

        compile_kernels(arch_of(torch.cuda.get_device_capability()), tried, accept)
    return made[-1]


def tried_out(verifier: GpuVerifier) -> GpuVerifier:
    """The same verifier, after it called two good pieces good and a bad one bad.

    All kernels run once: full leaves, a short last one, missing ones. Kernels that do nothing would otherwise pass everything,
    for `bad` starts as zeros.

    Raises:
        WayError: it did not, or could not run.
    """
    length = 4 * LEAF_BYTES
    # No divisor of a leaf, so that no two leaves are alike.
    data = torch.arange(2 * length + LEAF_BYTES + 1000, dtype=torch.int32, device="cpu").remainder_(251).to(torch.uint8)
    view = bytes_of(data)
    hashes = b"".join(piece_hash(view[begin : begin + length], length, False) for begin in range(0, data.numel(), length))
    data[length + 70] ^= 1
    try:
        expected = torch.tensor(list(hashes), dtype=torch.uint8, device=verifier.device)
        bad = torch.zeros(3, dtype=torch.int32, device=verifier.device)
        batch = Batch(data.numel(), length, False, expected)
        verifier.submit(data.to(verifier.device), batch, bad)
        found = bad.tolist()
    except RuntimeError as exc:
        raise WayError(f"a trial failed: {' '.join(str(exc).split())[:300]}", way=verifier.name, stage="answer") from exc
    if found != [0, 1, 0]:
        raise WayError(f"a trial with one bad piece of three gave {found}", way=verifier.name, stage="answer")
    return verifier


def _zero_subtrees() -> torch.Tensor:
    """Trees over zero leaves by height, as `protocol.merkle` has them: (32 * 48,) uint8."""
    rows = [bytes(HASH_BYTES)]
    while len(rows) < 48:  # piece_height allows no more
        rows.append(sha256(rows[-1] * 2).digest())
    return torch.tensor(list(b"".join(rows)), dtype=torch.uint8, device="cpu")


def _check_submitted(slot: torch.Tensor, batch: Batch, bad: torch.Tensor, device: torch.device) -> None:
    _check_memory("slot", slot, torch.uint8)
    _check_memory("bad", bad, torch.int32)
    for what, tensor in (("slot", slot), ("expected", batch.expected), ("bad", bad)):
        if tensor.device != device:
            raise ValueError(f"{what} is on {tensor.device}, the verifier on {device}")
    if slot.numel() < batch.size or bad.numel() < batch.shape.pieces:
        raise ValueError(f"{batch.size} bytes in a slot of {slot.numel()}, {batch.shape.pieces} pieces for {bad.numel()} answers")


def _check_memory(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    # `bad` is written by single words: torch gives it what they need.
    alignment = ALIGNMENT if dtype is torch.uint8 else dtype.itemsize
    if tensor.dtype is not dtype or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.data_ptr() % alignment:
        raise ValueError(f"{what} has to be one contiguous row of {dtype}, aligned to {alignment} bytes")
