"""The three calls a user makes: `load`, `stream`, `open_release`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from modelp2p.loader.copier import copier_for
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import locate
from modelp2p.loader.release import OpenRelease, Progress
from modelp2p.protocol.safetensors import DEFAULT_MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch


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
) -> OpenRelease:
    """A handle on a release that is here: names, single tensors, slices, stream.

    Args:
        ref: a name, link, bundle or folder (see `locate`).
        device: `cpu`, `cuda` or `cuda:N`.
        verify: `auto`, `cpu`, `record` or `off` (see `OpenRelease`).
        mapping: `auto`, `mmap` or `pread` (see `OpenRelease`).
        files: globs over file paths, where a release holds several models.
        publisher: the publisher id that must have signed; without it the pins of `home` decide.
        home: the modelp2p home; `MODELP2P_HOME` or the user's data folder by default.
        workers: threads that read and hash; all cores by default.
        max_header_bytes: limit of one file's header.

    Raises:
        NotFoundError: the release, or one of its files, is not here.
        UntrustedError: the statement does not hold, or nobody vouches for its publisher.
        IntegrityError: bytes on disk are not what was signed.
        UsageError: an argument is wrong, or the device is not here.
    """
    place = default_home() if home is None else os.path.abspath(os.path.expanduser(os.fspath(home)))
    copier = copier_for(device)
    located = locate(ref, publisher=publisher, home=place)
    return OpenRelease(
        located, copier, verify=verify, mapping=mapping, files=files, workers=workers, max_header_bytes=max_header_bytes
    )


def load(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    include: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    verify: str = "auto",
    mapping: str = "auto",
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a release by name; on the CPU, views of the store's files that must not be written to.

    `include`: names or globs of tensors. `dtype`: cast floating-point tensors. `progress`: called with bytes done and in all.
    The rest, and what it raises: see `open_release`.
    """
    with open_release(
        ref, device, verify=verify, mapping=mapping, files=files, publisher=publisher, home=home, workers=workers
    ) as release:
        return release.load(include, dtype, progress)


def stream(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    include: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    verify: str = "auto",
    mapping: str = "auto",
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `load`, one tensor at a time, each as soon as it is proven. The release is opened at the first `next`."""
    with open_release(
        ref, device, verify=verify, mapping=mapping, files=files, publisher=publisher, home=home, workers=workers
    ) as release:
        yield from release.stream(include, dtype, progress)
