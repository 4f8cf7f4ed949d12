"""The command behind tests/crash/run."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from . import build
from .campaign import Campaign, Lost
from .guest import GuestCampaign

KILLS = 300
GUEST_KILLS = 25


def _front_end(folder: Path, kills: int, seed: int) -> list[str]:
    campaign = Campaign(folder, seed, build.command())
    campaign.progress = lambda done: _progress(done, kills)
    try:
        return [*campaign.run(kills).lines(), "lost = 0"]
    finally:
        campaign.close()


def _guest(folder: Path, kills: int, seed: int) -> list[str]:
    campaign = GuestCampaign(folder, seed)
    campaign.progress = lambda done: _progress(done, kills)
    try:
        return [*campaign.run(kills), "lost = 0", "guest errors = 0"]
    finally:
        campaign.close()


def _progress(done: int, kills: int) -> None:
    if done % 25 == 0 or done == kills:
        print(f"{done} of {kills} kills", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/crash/run")
    parser.add_argument("--kills", type=int, help=f"default {KILLS}, with --guest {GUEST_KILLS}")
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    parser.add_argument("--guest", action="store_true", help="load from a guest in QEMU")
    options = parser.parse_args()
    kills = options.kills or (GUEST_KILLS if options.guest else KILLS)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed = {seed}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="epochd-crash-") as folder:
        try:
            lines = (_guest if options.guest else _front_end)(Path(folder), kills, seed)
        except Lost as lost:
            print(f"LOST: {lost}")
            return 1
    print("\n".join(lines))
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
