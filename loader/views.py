"""Tensors that are views of a mapped file: nothing is copied, every piece under them is proven first.

What a view is worth: its bytes were right when it was handed out, and stay so while nobody writes to the inode. The store
never does, and files of others are copied instead (`shard.way_of`). Each tensor has a storage of exactly its own size, so
that saving one does not save the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.hashing import Workers, pieces_per_run
from modelp2p.loader.mapped import mapped_bytes
from modelp2p.loader.pieces import runs_of

if TYPE_CHECKING:
    from modelp2p.loader.hashers import Hashers
    from modelp2p.loader.parts import Part
    from modelp2p.loader.shard import Shard


def view_parts(
    shard: Shard, parts: Sequence[Part], workers: Workers, hashers: Hashers, on_bytes: Callable[[int], None]
) -> list[tuple[Part, torch.Tensor, bool]]:
    """Each part, its tensor, and whether that is a view (else a copy, made because the file does not align it).

    Args:
        shard: of a way that says view.
        parts: stretches of it.
        workers: threads that hash.
        hashers: processes that hash.
        on_bytes: told how many bytes were hashed, after each run.

    Raises:
        IntegrityError: a piece is bad, or the file changed; none of the tensors is handed out then.
    """
    if shard.mapped is None:
        shard.mapped = shard.source.mapping()
    data = shard.mapped
    if shard.way.is_hashed:
        _prove(shard, data, parts, workers, hashers, on_bytes)
    tensors = [_tensor(data, part) for part in parts]
    shard.source.check_unchanged()
    return tensors


def _prove(
    shard: Shard,
    data: memoryview,
    parts: Sequence[Part],
    workers: Workers,
    hashers: Hashers,
    on_bytes: Callable[[int], None],
) -> None:
    table, source = shard.table, shard.source
    needed = table.covering((part.begin, part.end) for part in parts).minus(shard.checked)

    def task(run: range) -> None:
        # Most truncations become an error here; hashing a mapping that was cut short is SIGBUS.
        source.check_size()
        begin, end = table.span(run)
        hashers.prove(table, run, data[begin:end], source.fileno())

    def on_done(run: range) -> None:
        begin, end = table.span(run)
        on_bytes(end - begin)

    workers.run(task, runs_of(needed, pieces_per_run(table.piece_length)), on_done)
    shard.checked = shard.checked.union(needed)


def _tensor(data: memoryview, part: Part) -> tuple[Part, torch.Tensor, bool]:
    if part.size == 0:
        return part, torch.empty(part.shape, dtype=part.dtype, device="cpu"), True
    raw = mapped_bytes(data, part.begin, part.size)
    is_aligned = raw.data_ptr() % part.dtype.itemsize == 0
    return part, part.shaped(raw if is_aligned else raw.clone()), is_aligned
