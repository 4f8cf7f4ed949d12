"""Writes the hand-made inputs of the ring target: `python tests/fuzz/seeds.py FOLDER`.

Each is an ordinary driver's doing, in the script that ring.c reads (see there): the fuzzer
knows from them what a request looks like. Everything else in corpus/ it found itself.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
SEAL, COMMIT, DISCARD_EPOCHS, PROMOTE = 0x0B, 0x1B, 0x2B, 0xFB
ROUND = b"\x0d"
FEATURES = 1 << 9 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30


def start(share: int = 0, size: int = 0x85, hidden: int = 0, features: int = FEATURES) -> bytes:
    """Two rings of 32 and 1 entries, all regions, no raw bytes."""
    return struct.pack("<BBBIB", share, size, hidden, features, 0)


def desc(index: int, region: int, offset: int, length: int, flags: int, then: int = 0) -> bytes:
    return struct.pack("<BHBHHBBH", 0, index, region, offset, length, 0, flags, then)


def header(offset: int, kind: int, sector: int, region: int = 1) -> bytes:
    return struct.pack("<BBHBH", 4, region, offset, kind, sector)


def available(head: int, queue: int = 0) -> bytes:
    return struct.pack("<BBH", 2, queue, head)


def memory(region: int, offset: int, data: bytes) -> bytes:
    return struct.pack("<BBBH", 5, region, len(data), offset) + data


def request(kind: int, sector: int, length: int, head: int = 0, region: int = 0) -> bytes:
    """Header and status in region 1, data in `region` from 0x4000 on."""
    data = WRITE if kind in (IN, GET_ID) else 0
    at = 64 * head
    if length:
        chain = desc(head, 1, at, 16, NEXT, head + 1)
        place = 0x4000 if region == 0 else 256
        chain += desc(head + 1, region, place, length, data | NEXT, head + 2)
    else:
        chain = desc(head, 1, at, 16, NEXT, head + 2)
    chain += desc(head + 2, 1, at + 32, 1, WRITE)
    return header(at, kind, sector) + chain + available(head)


def addresses(queue: int, avail_region: int, avail: int) -> bytes:
    words = [(0, 0x2000 * queue), (avail_region, avail), (0, 0x1000)]
    parts = b"".join(struct.pack("<BH", region, offset) for region, offset in words)
    return bytes([6, 4 | queue << 7, 0]) + parts + struct.pack("<BH", 0, 0x1000)


def seeds() -> dict[str, bytes]:
    """Name and input."""
    hold_image = bytes([0x2A])
    release = bytes([0x0A])
    segment = memory(0, 0x4000, struct.pack("<QII", 8, 200, 0))
    table = b"".join(
        memory(1, 1024 + 16 * i, struct.pack("<QIHH", *words))
        for i, words in enumerate(
            [(0x8000, 16, NEXT, 1), (0x4000, 4096, NEXT | WRITE, 2), (0x8020, 1, WRITE, 0)]
        )
    )
    read = request(IN, 0, 4096)
    return {
        "write-read": start() + request(OUT, 8, 4096) + ROUND + request(IN, 8, 4096, 3) + ROUND,
        "odd-sizes": start() + request(OUT, 3, 1536) + request(IN, 1, 4096, 3) + ROUND * 2,
        "epochs": start() + request(OUT, 8, 4096) + ROUND + bytes([SEAL]) + ROUND
        + request(OUT, 9, 512, 3) + bytes([COMMIT]) + ROUND + bytes([DISCARD_EPOCHS]) + ROUND,
        "get-id": start() + request(GET_ID, 0, 20) + ROUND,
        "discard": start() + segment + request(DISCARD, 0, 16) + ROUND,
        "zeroes": start() + segment + request(WRITE_ZEROES, 0, 16) + ROUND + read + ROUND,
        "indirect": start() + table + header(0, IN, 5) + desc(4, 1, 1024, 48, INDIRECT)
        + available(4) + ROUND,
        "reads-held": start() + hold_image + read + ROUND + release + ROUND,
        "read-fails": start() + bytes([0x49]) + read + ROUND * 2,
        "flush": start() + bytes([PROMOTE]) + ROUND + request(OUT, 8, 512) + request(FLUSH, 0, 0, 3)
        + ROUND * 2,
        "memory-again": start() + read + bytes([6, 5, 0xFF]) + ROUND * 2 + read + ROUND,
        "memory-in-flush": start() + bytes([PROMOTE]) + ROUND + request(OUT, 8, 512) + ROUND
        + bytes([0x1A]) + request(FLUSH, 0, 0, 3) + ROUND + bytes([6, 5, 0x0F]) + ROUND + release
        + ROUND * 2,
        "inflight-shrinks": start() + bytes([6, 6, 31, 0, 1, 0]) + ROUND + bytes([6, 9])
        + request(IN, 0, 4096, 12) + bytes([6, 6, 3, 0, 1, 0]) + ROUND * 2,
        "stop": start() + read + bytes([6, 8]) + ROUND + bytes([6, 9]) + read + ROUND,
        "disable": start() + hold_image + read + ROUND + bytes([6, 2, 0, 0]) + ROUND
        + addresses(0, 1, 0x1FFF) + ROUND + release + ROUND,
        "inflight": start() + bytes([6, 6, 31, 0, 1, 0]) + ROUND + bytes([6, 9]) + read + ROUND,
        "inflight-found": start() + bytes([6, 8]) + bytes([6, 6, 31, 0, 1, 1])
        + bytes([6, 9]) + read + ROUND,
        "log": start() + bytes([6, 7, 0, 8]) + ROUND + read + ROUND,
        "two-queues": start(size=0xAD) + read + ROUND + b"\x0c\x1c",
        "end-of-memory": start() + request(OUT, 8, 512, region=2) + request(IN, 8, 512, 3, region=3)
        + ROUND,
        "reset": start() + hold_image + read + ROUND + bytes([6, 10]) + ROUND + release + ROUND,
        "second-processor": start(share=128) + read + ROUND + bytes(range(60)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
