"""A plain model of a consistency group: what every sector must hold.

One bytearray a disk for what the front end sees, and a copy of all of them for the committed
state and for each sealed epoch. Slow, and too simple to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

State = list[bytes]
"""The contents of all disks at one moment."""


@dataclass
class Model:
    """Disks of the given sizes (bytes), zero at first; epochs as the daemon numbers them."""

    sizes: Sequence[int]
    open: int
    now: list[bytearray] = field(init=False)
    committed: State = field(init=False)
    committed_epoch: int = 0
    sealed: list[tuple[int, State]] = field(default_factory=list)
    empty: bool = True  # nothing was written into the open epoch

    def __post_init__(self) -> None:
        self.now = [bytearray(size) for size in self.sizes]
        self.committed = [bytes(size) for size in self.sizes]

    def write(self, disk: int, start: int, data: bytes) -> None:
        """Bytes of a disk change in the open epoch."""
        self.now[disk][start : start + len(data)] = data
        self.empty = False

    def seal(self, epoch: int) -> None:
        """The open epoch, which is `epoch`, is closed."""
        if epoch != self.open:
            raise AssertionError(f"epoch {epoch} was sealed, {self.open} was open")
        self.sealed.append((epoch, [bytes(disk) for disk in self.now]))
        self.open = epoch + 1
        self.empty = True

    def commit(self, epoch: int) -> None:
        """All sealed epochs up to `epoch` are committed."""
        for number, state in self.sealed:
            if number <= epoch:
                self.committed, self.committed_epoch = state, number
        self.sealed = [(number, state) for number, state in self.sealed if number > epoch]

    def discard(self, opened: int) -> list[int]:
        """Everything not committed is gone, and `opened` is open; returns what went."""
        if not self.sealed and self.empty and opened == self.open:
            return []
        gone = [number for number, _ in self.sealed] + [self.open]
        self.now = [bytearray(disk) for disk in self.committed]
        self.sealed = []
        if opened <= self.open:
            raise AssertionError(f"epoch {opened} is open, {self.open} was before the discard")
        self.open = opened
        self.empty = True
        return gone
