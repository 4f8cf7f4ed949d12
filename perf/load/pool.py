"""The data that writes carry, made once before a run."""

from __future__ import annotations

import random
from pathlib import Path

from .errors import MissingError, UsageError

CHUNK = 512
"""Compressible and incompressible parts alternate in pieces of this many bytes."""


def compressible(size: int, percent: int, seed: int) -> bytes:
    """`size` bytes (a multiple of 512) that a good compressor makes `percent` per cent shorter.

    Each 512 bytes hold random ones first, then one random word over and over; no byte of that
    word is zero, so that no block is ever all zeroes. The same seed gives the same bytes."""
    if not 0 <= percent <= 100:
        raise UsageError(f"--compress {percent}: give per cent, 0 to 100")
    generator = random.Random(seed)
    if percent == 0:
        return generator.randbytes(size)
    fresh = CHUNK * (100 - percent) // 100
    word = bytes(generator.randrange(1, 256) for _ in range(8)) * (CHUNK // 8)
    tail = word[fresh:]
    return b"".join(generator.randbytes(fresh) + tail for _ in range(size // CHUNK))


def from_file(path: str, size: int) -> bytes:
    """`size` bytes from all over a file: pieces of 64 KiB at even distances; short files repeat."""
    piece = 65536
    try:
        with Path(path).open("rb") as file:
            total = file.seek(0, 2)
            if total == 0:
                raise UsageError(f"--data {path}: the file is empty")
            pieces = []
            count = -(-size // piece)
            for i in range(count):
                file.seek(max(total - piece, 0) * i // max(count - 1, 1) // 4096 * 4096)
                pieces.append(file.read(piece))
    except OSError as error:
        raise MissingError(f"--data {path}: {error.strerror}") from None
    data = b"".join(pieces)
    if len(data) < size:
        data *= -(-size // len(data))
    return data[:size]
