"""The command line: perf/blkload, or python -m perf.load. Exit status: see the epilogue below."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import LoadError, MissingError, UsageError
from .options import Target, Workload, parse_mix, parse_pattern, parse_size

EPILOGUE = """\
sizes: 4096, 4k, 16M, 1G (powers of 1024). Several --socket are several disks; queues and depth
are of each disk and of each queue. --rw write and read go through the disk in order, each queue
through a part of its own; randwrite, randread and mix jump (--pattern changes either).

--ios N with --seed S sends precisely N requests, in each queue in a fixed order; with --lockstep
also in fixed batches, for profilers that count instructions.

--verify stamps each written block with its disk, sector, generation and a checksum, checks each
block that is read against what was last written to it, and at the end reads back and checks all
that was written. Blocks that an earlier run wrote with --verify are checked by their stamps.

exit status: 0 all well; 1 a request failed, data was wrong or the back end went away;
2 the options make no sense; 3 something is missing: socket, feature, memory; 130 interrupted
"""
DEFAULT_SECONDS = 10.0
RW = {
    "write": ("write", "seq"),
    "read": ("read", "seq"),
    "randwrite": ("write", "rand"),
    "randread": ("read", "rand"),
    "mix": (None, "rand"),
}
T = TypeVar("T")


def _checked(parse: Callable[[str], T], name: str) -> Callable[[str], T]:
    def convert(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    convert.__name__ = name
    return convert


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    size = _checked(parse_size, "size")
    parser = argparse.ArgumentParser(
        prog="blkload",
        description="Put a load on vhost-user-blk back ends and measure it.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--socket", action="append", required=True, metavar="PATH", help="a back end's socket")
    add("--rw", choices=RW, default="randwrite", help="what to do (default: %(default)s)")
    add(
        "--mix",
        type=_checked(parse_mix, "mix"),
        metavar="OP=N,...",
        help="for --rw mix: weights of read, write, zero, discard (default: read=70,write=30)",
    )
    add(
        "--pattern",
        type=_checked(parse_pattern, "pattern"),
        metavar="seq|rand|zipf[:EXP]",
        help="where on the disk (default: as --rw says)",
    )
    add("--bs", type=size, default=4096, help="bytes a request (default: 4k)")
    add("--iodepth", type=_count, default=32, help="in flight on each queue (default: 32)")
    add("--queues", type=_count, default=1, help="of each disk (default: 1)")
    add("--size", type=size, help="bytes of each disk that are used (default: all)")
    add("--offset", type=size, default=0, help="where these begin (default: 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=_above_zero, help="how long (default: 10)")
    length.add_argument("--ios", type=_count, help="how many requests instead")
    length.add_argument("--bytes", type=size, help="how many bytes instead")
    add("--ramp", type=float, default=0.0, metavar="SECONDS", help="before counting begins")
    add("--rate", type=_above_zero, metavar="IOPS", help="requests a second, all queues together")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--compress", type=int, default=0, metavar="PERCENT", help="how compressible (default: 0)"
    )
    data.add_argument("--data", metavar="FILE", help="cut the data from this file")
    add("--pool", type=size, default=4 << 20, help="bytes of prepared data (default: 4M)")
    add("--in-place", action="store_true", help="block n gets the prepared data's block n")
    add("--verify", action="store_true", help="check data; see below")
    add("--fill", action="store_true", help="first write all of --size once, in order")
    add("--seed", type=int, default=1, help="of order and data (default: 1)")
    wait = parser.add_mutually_exclusive_group()
    wait.add_argument("--poll", action="store_true", help="poll the used rings (default)")
    wait.add_argument("--eventfd", action="store_true", help="sleep and be called, as guests do")
    add("--lockstep", action="store_true", help="full batches, one after the other")
    add("--hugepages", action="store_true", help="guest memory in huge pages, as SPDK needs")
    add("--no-indirect", action="store_true", help="chain descriptors in the ring itself")
    add("--no-event-idx", action="store_true", help="suppress calls and kicks by flags")
    add("--ring-size", type=_count, help="entries a queue (default: 128, more if need be)")
    add("--cpu", type=int, help="pin the loop to this CPU")
    add("--errors", type=_count, default=1, metavar="N", help="give up after N (default: 1)")
    add("--timeout", type=_above_zero, default=30.0, help="give up after so many idle seconds")
    add("--interval", type=_above_zero, default=0.1, help="seconds of the series (default: 0.1)")
    add("--json", metavar="FILE", help="write the result there; - is standard output")
    add("--progress", action="store_true", help="a line a second on standard error")
    return parser


def _target(args: argparse.Namespace) -> Target:
    return Target(
        sockets=args.socket,
        queues=args.queues,
        iodepth=args.iodepth,
        bs=args.bs,
        offset=args.offset,
        size=args.size,
        pool=args.pool,
        compress=args.compress,
        data=args.data,
        in_place=args.in_place,
        verify=args.verify,
        seed=args.seed,
        hugepages=args.hugepages,
        indirect=not args.no_indirect,
        event_idx=not args.no_event_idx,
        ring_size=args.ring_size,
    )


def _workload(args: argparse.Namespace) -> Workload:
    op, pattern = RW[args.rw]
    if args.mix and op:
        raise UsageError(f"--mix belongs to --rw mix, not to --rw {args.rw}")
    name, theta = args.pattern or (pattern, 1.0)
    ios = args.ios or (-(-args.bytes // args.bs) if args.bytes else None)
    if not 0 <= args.seed < 1 << 64:
        raise UsageError(f"--seed {args.seed}: give 0 to 2^64 - 1")
    return Workload(
        mix={op: 1} if op else args.mix or {"read": 70, "write": 30},
        pattern=name,
        theta=theta,
        seed=args.seed,
        seconds=None if ios else args.seconds or DEFAULT_SECONDS,
        ios=ios,
        ramp=args.ramp,
        rate=args.rate,
        lockstep=args.lockstep,
        sleep=args.eventfd,
        stuck_s=args.timeout,
        errors_max=args.errors,
        interval_s=args.interval,
    )


def _run(args: argparse.Namespace) -> int:
    # Late: --help works before the C part is built.
    from .engine import Load
    from .report import Result

    interrupted = False

    def watched(load: Load, work: Workload, what: str) -> Result:
        nonlocal interrupted
        load.start(work)
        before, at = 0, time.monotonic()
        while True:
            try:
                if load.wait(1.0):
                    return load.result()
                done, bad, flying = load.progress()
                now = time.monotonic()
                if args.progress:
                    # A ramp's end sets the counters back.
                    rate = max(done - before, 0) / (now - at)
                    print(
                        f"{what}: {done} done, {rate:.0f} IOPS, "
                        f"{rate * args.bs / (1 << 20):.1f} MiB/s, {flying} in flight, {bad} errors",
                        file=sys.stderr,
                        flush=True,
                    )
                before, at = done, now
            except KeyboardInterrupt:
                interrupted = True
                load.stop()

    work = _workload(args)
    with Load(_target(args), cpu=args.cpu) as load:
        limits = {"stuck_s": args.timeout, "errors_max": args.errors}
        result = None
        if args.fill:
            result = watched(load, Workload(mix={"write": 1}, once=True, **limits), "fill")
        if (result is None or result.ok) and not interrupted:
            result = watched(load, work, "run")
        assert result is not None
        if args.verify and result.ok and not interrupted:
            back = watched(
                load,
                Workload(mix={"read": 1}, once=True, written_only=True, **limits),
                "read back",
            )
            result.verified += back.verified
            result.verify_errors += back.verify_errors
            result.errors += back.errors
            if back.failure:
                result.ended, result.failure = back.ended, f"read back: {back.failure}"
    result.options["command"] = args.command
    if args.json != "-":
        print(result.table())
    if args.json:
        text = json.dumps(result.as_dict())
        if args.json == "-":
            print(text)
        else:
            _write(args.json, text)
    if result.failure:
        print(f"blkload: {result.failure}", file=sys.stderr)
        return 1
    return 130 if interrupted else 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MissingError(f"--json {path}: {error.strerror}") from None


def main(words: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process; returns the exit status.
    SystemExit when they cannot be parsed."""
    args = _parser().parse_args(words)
    args.command = list(sys.argv[1:] if words is None else words)
    try:
        return _run(args)
    except UsageError as error:
        status, text = 2, str(error)
    except MissingError as error:
        status, text = 3, str(error)
    except LoadError as error:
        status, text = 1, str(error)
    except KeyboardInterrupt:
        status, text = 130, "interrupted"
    print(f"blkload: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
