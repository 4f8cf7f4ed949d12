"""The command behind tests/soak/run."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from .soak import Exceeded, Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/soak/run")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed = {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="epochd-soak-") as folder:
        soak = Soak(Path(folder), seed)
        try:
            soak.run(options.seconds)
        except Exceeded as error:
            print(f"EXCEEDED: {error}")
            return 1
        finally:
            print(*soak.lines(), sep="\n")
            soak.close()
    print("within its limits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
