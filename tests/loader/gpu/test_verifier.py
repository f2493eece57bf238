"""One suite over every verifier: hashlib, the kernels built for the host, and both ways to them on a GPU where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from modelp2p.loader.gpu.build import NvrtcWay, ways
from modelp2p.loader.gpu.verifier import Batch, GpuVerifier, HostVerifier, Verifier, tried_out, verifier_for
from modelp2p.protocol.errors import FormatError, UsageError
from modelp2p.protocol.merkle import HASH_BYTES, LEAF_BYTES, leaf_hashes, piece_hash, piece_layer
from tests.loader.gpu.host import row
from tests.sizes import INTERESTING_SIZES, PIECE, seeded_bytes

if TYPE_CHECKING:
    from modelp2p.loader.gpu.way import Kernels

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
POISON = 0xA5

Make = Callable[["Kernels"], tuple[Verifier, torch.device]]
VERIFIERS = [
    pytest.param(lambda kernels: (HostVerifier(), CPU), id="cpu"),
    pytest.param(lambda kernels: (GpuVerifier(CPU, kernels), CPU), id="host", marks=pytest.mark.slow),
    pytest.param(lambda _: (verifier_for(CUDA, [NvrtcWay()]), CUDA), id="cuda-nvrtc", marks=pytest.mark.gpu),
    pytest.param(lambda _: (verifier_for(CUDA, ways()[1:]), CUDA), id="cuda-torch", marks=pytest.mark.gpu),
]
every_verifier = pytest.mark.parametrize("make", VERIFIERS)

BIG = 5 * PIECE + LEAF_BYTES + 55


def verdict(
    verifier: Verifier, device: torch.device, data: bytes, layer: bytes, *, whole: bool = False, stale: bytes = b"\xff" * 80
) -> list[int]:
    """What `bad` says of pieces that lie in a slot with rubbish behind them."""
    slot, expected = row(data + stale).to(device), row(layer).to(device)
    bad = torch.zeros(len(layer) // HASH_BYTES, dtype=torch.int32, device=device)
    verifier.submit(slot, Batch(len(data), PIECE, whole, expected), bad)
    return [int(number) for number in bad.tolist()]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@every_verifier
def test_files_of_all_interesting_sizes(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    for size in (size for size in INTERESTING_SIZES if size):
        data = seeded_bytes("file", size)
        layer = piece_layer(leaf_hashes(data), PIECE)
        good = [0] * (len(layer) // HASH_BYTES)
        assert verdict(verifier, device, data, layer, whole=size <= PIECE) == good, size
        assert verdict(verifier, device, flipped(data, size - 1, 7), layer, whole=size <= PIECE) == [*good[:-1], 1], size


@every_verifier
def test_the_last_piece_of_a_larger_file_alone_in_a_slot(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    for size in (1, 55, 56, 64, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES, PIECE - 1, PIECE):
        data = seeded_bytes("end", size)
        assert verdict(verifier, device, data, piece_hash(data, PIECE, False)) == [0], size
        if size < PIECE // 2:
            assert verdict(verifier, device, data, piece_hash(data, PIECE, True)) == [1], "padded to its own tree is another hash"


@every_verifier
def test_a_flipped_bit_is_found_in_exactly_its_piece(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("flip", BIG)
    layer = piece_layer(leaf_hashes(data), PIECE)
    edges = [edge + step for edge in (PIECE, 2 * PIECE, 2 * PIECE + LEAF_BYTES, 5 * PIECE + LEAF_BYTES) for step in (-1, 0)]
    for number, at in enumerate([0, 63, 64, *edges, 3 * PIECE + 12_345, BIG - 2, BIG - 1]):
        want = [0] * 6
        want[at // PIECE] = 1
        assert verdict(verifier, device, flipped(data, at, number % 8), layer) == want, at


@every_verifier
def test_swapped_missing_and_cut_pieces_are_bad(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("swap", BIG)
    layer = piece_layer(leaf_hashes(data), PIECE)
    swapped = data[PIECE : 2 * PIECE] + data[:PIECE] + data[2 * PIECE :]
    assert verdict(verifier, device, swapped, layer) == [1, 1, 0, 0, 0, 0]
    assert verdict(verifier, device, bytes(3 * PIECE) + data[3 * PIECE :], layer) == [1, 1, 1, 0, 0, 0]
    assert verdict(verifier, device, data[:-1], layer) == [0, 0, 0, 0, 0, 1], "one byte short"
    assert verdict(verifier, device, data + b"\0", layer) == [0, 0, 0, 0, 0, 1], "one byte too many"


@every_verifier
def test_a_wrong_signed_hash_is_found(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("layer", 2 * PIECE)
    layer = piece_layer(leaf_hashes(data), PIECE)
    for at in (0, 15, 16, HASH_BYTES - 1, HASH_BYTES, 2 * HASH_BYTES - 1):
        want = [int(at < HASH_BYTES), int(at >= HASH_BYTES)]
        assert verdict(verifier, device, data, flipped(layer, at, at % 8)) == want, at


@every_verifier
def test_a_former_batch_leaves_no_trace(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    long, short = seeded_bytes("long", BIG), seeded_bytes("short", PIECE + LEAF_BYTES + 1)
    for data in (long, short, long, short):
        layer = piece_layer(leaf_hashes(data), PIECE)
        assert not any(verdict(verifier, device, data, layer))
        assert verdict(verifier, device, data, bytes(len(layer))) == [1] * (len(layer) // HASH_BYTES)


@every_verifier
def test_what_lies_behind_the_batch_does_not_count(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("stale", PIECE + LEAF_BYTES + 9)
    layer = piece_layer(leaf_hashes(data), PIECE)
    for stale in (b"", b"\0" * 7, b"\x80" + b"\0" * 100, bytes([POISON]) * PIECE):
        assert verdict(verifier, device, data, layer, stale=stale) == [0, 0]


@every_verifier
def test_answers_are_added_to_what_is_there(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("shared", 3 * PIECE)
    layer = piece_layer(leaf_hashes(data), PIECE)
    bad = torch.zeros(6, dtype=torch.int32, device=device)
    bad[5] = 9
    slot, expected = row(flipped(data, PIECE)).to(device), row(layer).to(device)
    verifier.submit(slot, Batch(3 * PIECE, PIECE, False, expected), bad[2:])
    assert bad.tolist() == [0, 0, 0, 1, 0, 9]


@every_verifier
def test_tensors_that_do_not_fit_are_refused(make: Make, kernels: Kernels) -> None:
    verifier, device = make(kernels)
    data = seeded_bytes("fit", PIECE + 1)
    batch = Batch(len(data), PIECE, False, row(piece_layer(leaf_hashes(data), PIECE)).to(device))
    slot, bad = torch.zeros(2 * PIECE, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    elsewhere = torch.empty(2 * PIECE, dtype=torch.uint8, device="meta")
    wrong = {
        "short slot": (slot[:PIECE], bad),
        "odd place": (slot[1 : PIECE + 2], bad),
        "strided": (slot[::2], bad),
        "other dtype": (slot.view(torch.int32), bad),
        "two dimensions": (slot.view(2, PIECE), bad),
        "other device": (elsewhere, bad),
        "too few answers": (slot, bad[:1]),
        "answers of another dtype": (slot, bad.to(torch.int64)),
    }
    for slot_, bad_ in wrong.values():
        with pytest.raises(ValueError, match=r"slot|bad"):
            verifier.submit(slot_, batch, bad_)


@pytest.mark.parametrize("size", [0, -1, PIECE + 1])
def test_a_batch_that_can_not_exist_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="no run of pieces"):
        Batch(size, PIECE, True, row(bytes(32)))


def test_a_batch_needs_a_hash_for_every_piece() -> None:
    with pytest.raises(ValueError, match="64 expected bytes for 1 pieces"):
        Batch(PIECE, PIECE, False, row(bytes(64)))
    with pytest.raises(ValueError, match="expected has to be"):
        Batch(PIECE, PIECE, False, torch.zeros(8, dtype=torch.int32))
    with pytest.raises(FormatError):
        Batch(PIECE, PIECE + 1, False, row(bytes(32)))


def test_scratch_is_made_once_for_a_slot_size(kernels: Kernels) -> None:
    verifier = GpuVerifier(CPU, kernels)
    first = verifier._nodes(row(bytes(PIECE)), 1)
    assert first.numel() == 4 * HASH_BYTES
    assert verifier._nodes(row(bytes(PIECE)), 1) is first
    assert verifier._nodes(row(bytes(PIECE - 1)), 1) is first
    assert verifier._nodes(row(bytes(PIECE)), 2) is not first, "two streams run at once"
    assert verifier._nodes(row(bytes(PIECE + 1)), 1).numel() == 5 * HASH_BYTES


@pytest.mark.parametrize("silent", ["sha256_leaves", "sha256_tail", "fold", "compare"])
def test_a_kernel_that_does_nothing_fails_the_trial(kernels: Kernels, silent: str) -> None:
    tried_out(GpuVerifier(CPU, kernels))
    lazy = replace(kernels, functions={**kernels.functions, silent: lambda grid, block, args: None})
    verifier = GpuVerifier(CPU, lazy)
    # What memory happens to hold must not decide the test: the digests of an earlier, honest run may still lie there.
    verifier._nodes(row(bytes(16 * LEAF_BYTES)), 0).fill_(POISON)
    with pytest.raises(UsageError, match="one bad piece of three") as caught:
        tried_out(verifier)
    assert caught.value.facts == {"way": "host", "stage": "answer"}


def test_a_device_that_refuses_fails_the_trial(kernels: Kernels) -> None:
    def refuse(grid: int, block: int, args: object) -> None:
        raise RuntimeError("CUDA error: misaligned address")

    broken = replace(kernels, functions={**kernels.functions, "fold": refuse})
    with pytest.raises(UsageError, match="misaligned address"):
        tried_out(GpuVerifier(CPU, broken))


def test_verifiers_of_devices() -> None:
    assert isinstance(verifier_for(CPU), HostVerifier)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in (absent, "meta"):
        with pytest.raises(UsageError):
            verifier_for(torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize("way", [0, 1], ids=["cuda-nvrtc", "cuda-torch"])
def test_a_full_slot_on_two_streams_from_a_thread_of_its_own(way: int) -> None:
    verifier = verifier_for(CUDA, ways()[way : way + 1])
    length, pieces = 4 << 20, 16
    host = torch.randint(0, 256, (length * pieces,), dtype=torch.uint8)
    layer = b"".join(piece_hash(host[at : at + length].numpy().data, length, False) for at in range(0, host.numel(), length))
    found: list[list[int]] = []

    def check() -> None:
        streams = [torch.cuda.Stream(CUDA), torch.cuda.Stream(CUDA)]  # type: ignore[no-untyped-call]
        answers = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                slot, expected = host.to(CUDA), row(layer).to(CUDA)
                slot[(3 + number) * length + 77] ^= 1
                bad = torch.zeros(pieces, dtype=torch.int32, device=CUDA)
                verifier.submit(slot, Batch(host.numel(), length, False, expected), bad)
                answers.append((slot, expected, bad))
        torch.cuda.synchronize()
        found.extend(bad.tolist() for _, _, bad in answers)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert found == [[int(piece == 3 + number) for piece in range(pieces)] for number in range(2)]
