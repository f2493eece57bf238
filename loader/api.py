"""The three calls a user makes: `load`, `stream`, `open_release`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from modelp2p.loader.arriving import DEFAULT_TIMEOUT_S
from modelp2p.loader.device import device_for
from modelp2p.loader.following import follow
from modelp2p.loader.home import home_at
from modelp2p.loader.locate import locate
from modelp2p.loader.release import OpenRelease
from modelp2p.loader.repairing import DaemonRepair
from modelp2p.protocol.errors import IntegrityError, NotFoundError
from modelp2p.protocol.safetensors import DEFAULT_MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.delivery import Progress
    from modelp2p.loader.locate import Located
    from modelp2p.loader.plan import Cuts
    from modelp2p.loader.tools import OnBad


def open_release(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    verify: str = "auto",
    mapping: str = "auto",
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
    reader: str = "auto",
    transfer: str = "auto",
    on_bad: OnBad | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> OpenRelease:
    """A handle on a release that is here, or that the home's daemon is fetching: names, single tensors, slices, stream.

    Of one that is being fetched, everything is hashed and copied, and whatever is asked for waits until it has arrived.

    Args:
        ref: a name, link, bundle or folder (see `locate`).
        device: `cpu`, `cuda` or `cuda:N`.
        verify: `auto`, `gpu`, `cpu`, `record` or `off` (see `OpenRelease`).
        mapping: `auto`, `mmap` or `pread` (see `OpenRelease`).
        files: globs over file paths, where a release holds several models.
        publisher: the publisher id that must have signed; without it the pins of `home` decide.
        home: the modelp2p home; `MODELP2P_HOME` or the user's data folder by default.
        workers: threads that read and hash; all cores by default.
        max_header_bytes: limit of one file's header.
        reader: `auto`, `preadv`, `mmap` or `direct` (see `readers`).
        transfer: `auto`, `ring` or `register` (see `OpenRelease`).
        on_bad: repairs a bad piece (see `OpenRelease`), also one that a file is opened with. By default the home's daemon does,
            but not of what it is still fetching (see `DaemonRepair`).
        timeout: seconds without a newly proven piece after which the wait for a fetch, or for a repair, ends.

    Raises:
        NotFoundError: the release, or one of its files, is not here, and nobody fetches it.
        UntrustedError: the statement does not hold, or nobody vouches for its publisher.
        IntegrityError: bytes on disk are not what was signed.
        UsageError: an argument is wrong, or the device is not here.
        ModelP2PError: how the fetch, or the daemon, ended before everything was here.
    """
    place = home_at(home)
    target = device_for(device)
    open_located = partial(
        OpenRelease,
        device=target,
        verify=verify,
        mapping=mapping,
        files=files,
        workers=workers,
        max_header_bytes=max_header_bytes,
        reader=reader,
        transfer=transfer,
    )
    try:
        return _open_here(open_located, partial(locate, ref, publisher=publisher, home=place), on_bad, place, timeout)
    except NotFoundError as exc:
        absent = exc
    located, arrivals = follow(ref, publisher=publisher, home=place, timeout_s=timeout, absent=absent)
    try:
        return open_located(located, on_bad=on_bad, arrivals=arrivals)
    except BaseException:
        arrivals.close()
        raise


def load(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    include: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    plan: Cuts | None = None,
    verify: str = "auto",
    mapping: str = "auto",
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    reader: str = "auto",
    transfer: str = "auto",
    on_bad: OnBad | None = None,
    progress: Progress | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> dict[str, torch.Tensor]:
    """All tensors of a release by name; on the CPU, views of the store's files that must not be written to.

    `include`: names or globs of tensors. `dtype`: cast floating-point tensors. `plan`: cuts of tensors, as tensor parallelism
    makes them (see `OpenRelease.stream`). `progress`: called with bytes done and in all. The rest, and what it raises: see
    `open_release`.
    """
    return dict(
        stream(
            ref,
            device,
            include=include,
            dtype=dtype,
            plan=plan,
            verify=verify,
            mapping=mapping,
            files=files,
            publisher=publisher,
            home=home,
            workers=workers,
            reader=reader,
            transfer=transfer,
            on_bad=on_bad,
            progress=progress,
            timeout=timeout,
        )
    )


def stream(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    include: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    plan: Cuts | None = None,
    verify: str = "auto",
    mapping: str = "auto",
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    reader: str = "auto",
    transfer: str = "auto",
    on_bad: OnBad | None = None,
    progress: Progress | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `load`, one tensor at a time, each as soon as it is proven, also while the fetch is still running.

    The release is opened at the first `next`.
    """
    with open_release(
        ref,
        device,
        verify=verify,
        mapping=mapping,
        files=files,
        publisher=publisher,
        home=home,
        workers=workers,
        reader=reader,
        transfer=transfer,
        on_bad=on_bad,
        timeout=timeout,
    ) as release:
        yield from release.stream(include, dtype, progress, plan=plan)


def _open_here(
    open_located: Callable[..., OpenRelease], locate_it: Callable[[], Located], on_bad: OnBad | None, home: str, timeout_s: float
) -> OpenRelease:
    """The release that is here. A piece that is bad already when its file is opened is read again, and then repaired once."""
    met: Counter[tuple[str, int]] = Counter()
    while True:
        # Anew each time: a repair changes the record, and with it the way the file takes.
        located = locate_it()
        repair = DaemonRepair(located, home, timeout_s)
        mend = repair if on_bad is None else on_bad
        try:
            opened = open_located(located, on_bad=mend)
        except IntegrityError as exc:
            path, piece = exc.facts.get("path"), exc.facts.get("piece")
            if not isinstance(path, str) or not isinstance(piece, int):
                raise
            met[path, piece] += 1
            if met[path, piece] == 1 or (met[path, piece] == 2 and mend(path, piece)):
                continue
            raise repair.explained(exc) from exc
        repair.on_refusal = opened.stats.fallbacks.append
        opened.stats.rereads += len(met)
        opened.stats.refetches += sum(count > 1 for count in met.values())
        return opened
