"""A device without hardware: the `Copier` twin whose writes happen late, so that a loader that does not wait reads rubbish."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

POISON = 0xA5


@dataclass
class FakeDevice:
    """Reads a write's source only when a later fence is waited for; fresh memory is poisoned."""

    device = torch.device("cpu")
    is_host = False
    transfer = "cuda"
    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    issued: int = 0
    most_pending: int = 0

    def staging(self, size_bytes: int) -> torch.Tensor:
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.pending.append((target, source))
        self.issued += 1
        self.most_pending = max(self.most_pending, len(self.pending))

    def fence(self) -> FakeFence:
        return FakeFence(self, self.issued)


@dataclass
class FakeFence:
    """Behind the first `number` writes."""

    owner: FakeDevice
    number: int

    def wait(self) -> None:
        done = self.owner.issued - len(self.owner.pending)
        due = max(0, self.number - done)
        for target, source in self.owner.pending[:due]:
            target.copy_(source)
        del self.owner.pending[:due]
