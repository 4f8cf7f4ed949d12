"""Guest memory: regions of shared memory that a front end shows to the back end.

A region is a piece of a memfd, mapped here and described to the back end by a guest address, a
user address (a number only, nothing is mapped there) and an offset in the file. The three
differ on purpose, so that a back end that mixes them up fails. A `GuestMemory` owns its
descriptors and mappings until `close()`. One thread uses it; the back end reads and writes the
same bytes at any time.

Allocation is first fit in a region and needs an explicit `free()`. Nothing is zeroed again.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .wire import REGION

PAGE = 4096
MIB = 1 << 20


@dataclass(frozen=True)
class RegionSpec:
    """Where a region shall lie. `size` and `offset` are bytes and multiples of a page."""

    guest: int
    size: int
    user: int
    offset: int = 0


@dataclass
class Region:
    """A mapped region. `view` covers exactly its `size` bytes."""

    spec: RegionSpec
    fd: int
    mapping: mmap.mmap
    view: memoryview
    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), sorted
    taken: dict[int, int] = field(default_factory=dict)  # offset -> size

    @property
    def guest(self) -> int:
        return self.spec.guest

    @property
    def end(self) -> int:
        return self.spec.guest + self.spec.size

    def wire(self) -> bytes:
        """The region as a message carries it (32 bytes)."""
        return REGION.pack(self.spec.guest, self.spec.size, self.spec.user, self.spec.offset)

    def alloc(self, size: int, align: int) -> int | None:
        """Offset of `size` free bytes, or None when there is no hole that large."""
        for place, (start, length) in enumerate(self.holes):
            offset = -(-start // align) * align
            if offset + size <= start + length:
                pieces = [(start, offset - start), (offset + size, start + length - offset - size)]
                self.holes[place : place + 1] = [piece for piece in pieces if piece[1]]
                self.taken[offset] = size
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give back what `alloc` gave at `offset`, joined with its neighbours."""
        size = self.taken.pop(offset)
        joined: list[tuple[int, int]] = []
        for start, length in sorted([*self.holes, (offset, size)]):
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self.holes = joined


DEFAULT_REGIONS = (
    RegionSpec(guest=0, size=16 * MIB, user=0x7F10_0000_0000),
    RegionSpec(guest=0x1_0000_0000, size=8 * MIB, user=0x7F30_0000_0000, offset=2 * MIB),
)
"""Low and high memory as in a guest with more than 3 GiB, the second one at a file offset."""


class GuestMemory:
    """All regions of one guest. Use as a context manager or call `close()`."""

    def __init__(self, specs: Sequence[RegionSpec] = DEFAULT_REGIONS) -> None:
        self.regions: list[Region] = []
        for spec in specs:
            self.add(spec)

    def add(self, spec: RegionSpec) -> Region:
        """Create one more region. The back end knows of it only when told."""
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, spec.offset + spec.size)
        mapping = mmap.mmap(fd, spec.size, offset=spec.offset)
        region = Region(spec, fd, mapping, memoryview(mapping), [(0, spec.size)])
        self.regions.append(region)
        return region

    def remove(self, region: Region) -> None:
        """Unmap and close a region. No ring may lie in it."""
        self.regions.remove(region)
        region.view.release()
        region.mapping.close()
        os.close(region.fd)

    def close(self) -> None:
        """Drop everything. May be called twice."""
        while self.regions:
            self.remove(self.regions[-1])

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- addresses -----------------------------------------------------------------------

    def region_of(self, guest: int) -> Region:
        """The region that holds a guest address; KeyError when none does."""
        for region in self.regions:
            if region.guest <= guest < region.end:
                return region
        raise KeyError(f"no region holds guest address {guest:#x}")

    def user(self, guest: int) -> int:
        """The user address of a guest address."""
        region = self.region_of(guest)
        return region.spec.user + guest - region.guest

    def _pieces(self, guest: int, size: int) -> Iterator[memoryview]:
        while size:
            region = self.region_of(guest)
            offset = guest - region.guest
            count = min(size, region.spec.size - offset)
            yield region.view[offset : offset + count]
            guest += count
            size -= count

    # ---- contents ------------------------------------------------------------------------

    def read(self, guest: int, size: int) -> bytes:
        """Copy out; may run over the border of adjacent regions."""
        return b"".join(bytes(piece) for piece in self._pieces(guest, size))

    def write(self, guest: int, data: bytes) -> None:
        """Copy in; may run over the border of adjacent regions."""
        for piece in self._pieces(guest, len(data)):
            piece[:] = data[: len(piece)]
            data = data[len(piece) :]

    def view(self, guest: int, size: int) -> memoryview:
        """The bytes themselves, within one region. Release it before `close()`."""
        (piece,) = self._pieces(guest, size)
        return piece

    # ---- allocation ----------------------------------------------------------------------

    def alloc(self, size: int, align: int = 1, region: int = 0) -> int:
        """Guest address of `size` bytes in the region with that number."""
        offset = self.regions[region].alloc(max(size, 1), align)
        if offset is None:
            raise MemoryError(f"guest memory region {region} has no {size} bytes left")
        return self.regions[region].guest + offset

    def free(self, guest: int) -> None:
        """Give back an address that `alloc` returned."""
        region = self.region_of(guest)
        region.free(guest - region.guest)
