"""The command `perf/run`. Exit status: 0 done (targets missed and comparisons skipped are
told, they are no failure), 1 a run failed, 2 wrong usage, 3 something needed is missing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from . import curves, epochs, machine, paths, peers, plot, profile, report, scale
from .bench import Bench, Options, execute
from .failures import FailedError, MissingError
from .load import BLKLOAD
from .result import Row

OK, FAILED, USAGE, MISSING = 0, 1, 2, 3
REPEAT, REPEAT_QUICK = 5, 3
EPILOG = """\
examples:
  perf/run all --quick                      every row once, small, in under five minutes
  perf/run write-qd32 commit-64k --repeat 9
  perf/run all --json r.json --plot r.png   the whole, then its picture
  perf/run plot r.json r.png                the picture later
  perf/run profile --plot flames.svg        where the reactor's time goes

Exit status: 0 done, 1 a daemon died, returned wrong data or refused, 2 usage, 3 something
is missing without which nothing can be measured. A missing peer only skips its comparison.
"""


def all_benches() -> list[Bench]:
    return [*paths.benches(), *epochs.benches(), *scale.benches(), *curves.benches()]


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return value


def _cpus(text: str) -> list[int] | None:
    if text == "any":
        return None
    try:
        wanted = [int(word) for word in text.split(",")]
    except ValueError:
        wanted = [-1]
    if not set(wanted) <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give numbers of CPUs that may be used here, as in 2,3, or any"
        )
    return wanted


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    cpus = sorted(os.sched_getaffinity(0))
    first, second = (str(cpus[0]), str(cpus[1])) if len(cpus) > 1 else ("any", "any")
    parser = argparse.ArgumentParser(
        prog="perf/run",
        description="Measure epochd against its peers on this machine, in "
        "pairs A B A B. perf/METHOD.md says what is measured, how, and what was found.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "names",
        metavar="NAME",
        nargs="+",
        help="list; all; names from the list; profile; or plot RESULTS.json PICTURE.png",
    )
    add("--quick", action="store_true", help="small sizes and few pairs: does it work, roughly")
    add(
        "--repeat",
        type=_count,
        metavar="N",
        help=f"pairs of each benchmark (default: {REPEAT}, quick: {REPEAT_QUICK})",
    )
    add(
        "--against",
        metavar="PEER",
        choices=[name for name in peers.NAMES if name != "none"],
        help="compare with this peer instead of each benchmark's own: "
        + ", ".join(name for name in peers.NAMES if name != "none"),
    )
    add(
        "--spdk-socket",
        metavar="PATH",
        type=Path,
        help="vhost-user-blk socket of a running SPDK vhost target, over a malloc bdev",
    )
    add("--json", metavar="FILE", type=Path, help="write all results there")
    add("--plot", metavar="FILE", type=Path, help="draw the results (png, svg or pdf)")
    add(
        "--work",
        metavar="DIR",
        type=Path,
        default=Path(f"/var/tmp/epochd-perf-{os.getuid()}"),
        help="folder for images and journals, on the disk to be measured (default: %(default)s)",
    )
    add(
        "--load-cpus",
        type=_cpus,
        default=first,
        metavar="N[,N]",
        help="CPUs of the load generator, or any (default: %(default)s)",
    )
    add(
        "--agent-cpus",
        type=_cpus,
        default=second,
        metavar="N[,N]",
        help="CPUs of the agent and of its peers, or any (default: %(default)s)",
    )
    return parser


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_work(work: Path) -> None:
    """MissingError when nothing can be measured in this folder."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work).close()
    except OSError as error:
        raise MissingError(
            f"{work} cannot be used as work folder: {error.strerror}; see --work"
        ) from None


def _warnings(head: dict[str, object], busy: float) -> list[str]:
    warnings = []
    disk = head["disk"]
    assert isinstance(disk, dict)
    if not disk["o_direct"] or disk["type"] == "tmpfs":
        warnings.append(
            f"{disk['folder']} is on {disk['type']}: figures of the disk mean little "
            "there; choose a disk with --work"
        )
    if busy > machine.BUSY_SHARE:
        warnings.append(
            f"others use {100 * busy:.0f} % of the CPU time: believe ratios of pairs at best"
        )
    if head["cpus"] == 1:
        warnings.append("one CPU for load and agent: only `list` and failures mean anything")
    return warnings


def _measure(chosen: Sequence[Bench], options: Options, arguments: argparse.Namespace) -> int:
    _check_work(options.work)
    if not BLKLOAD.exists():
        raise MissingError(f"the load generator {BLKLOAD} is not there")
    head: dict[str, object] = machine.facts(options.work)
    busy = machine.foreign_load()
    warnings = _warnings(head, busy)
    for text in warnings:
        _progress(f"warning: {text}")
    head |= {
        "foreign_cpu_share": round(busy, 3),
        "warnings": warnings,
        "command": sys.argv[1:],
        "options": {
            "quick": options.quick,
            "repeat": options.repeat,
            "against": options.against,
            "spdk_socket": str(options.spdk_socket) if options.spdk_socket else None,
            "load_cpus": options.load_cpus,
            "agent_cpus": options.agent_cpus,
            "benches": [bench.name for bench in chosen],
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    begin, ticks = time.monotonic(), machine.Ticks()
    rows: list[Row] = []
    interrupted = False
    for number, bench in enumerate(chosen, 1):
        label = f"[{number}/{len(chosen)}] {bench.name}"
        _progress(f"{label}: {bench.title}")
        try:
            rows.append(
                execute(
                    bench,
                    options,
                    lambda text, label=label: (  # type: ignore[misc]
                        _progress(f"{label}: {text}")
                    ),
                )
            )
        except KeyboardInterrupt:
            interrupted = True
            _progress("interrupted: what was measured until here follows")
            break
    busy, stolen = ticks.shares()
    head |= {
        "seconds": round(time.monotonic() - begin, 1),
        "interrupted": interrupted,
        "stolen_cpu_share": round(stolen, 4),
    }
    print(report.table(rows))
    print(
        f"\n{head['cpu']}, {head['cpus']} CPUs, kernel {head['kernel']}, revision "
        f"{str(head['revision'])[:12]}, {head['seconds']} s"
        + (", quick: sizes are small" if options.quick else "")
    )
    for text in warnings:
        print(f"warning: {text}")
    document = report.document(head, rows)
    if arguments.json:
        report.write_json(arguments.json, document)
    failed = any(row.status == "failed" for row in rows)
    if arguments.plot:
        try:
            plot.draw(document, arguments.plot)
        except FailedError as error:
            print(f"perf/run: --plot: {error}", file=sys.stderr)
    return 130 if interrupted else FAILED if failed else OK


def _plot_file(source: str, target: str) -> int:
    try:
        plot.draw(json.loads(Path(source).read_text()), Path(target))
    except (OSError, ValueError, KeyError) as error:
        print(f"perf/run: {source}: not results of a run: {error}", file=sys.stderr)
        return USAGE
    return OK


def _choose(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[Bench]:
    known = {bench.name: bench for bench in all_benches()}
    if "all" in names:
        return list(known.values())
    for name in names:
        if name not in known:
            parser.error(f"there is no benchmark {name!r}; `perf/run list` names them")
    return [known[name] for name in dict.fromkeys(names)]


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; `words` is the command line."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    names: list[str] = arguments.names
    if names == ["list"]:
        print(report.listing(all_benches()))
        return OK
    try:
        if names[0] == "plot":
            if len(names) != 3:
                parser.error("plot takes RESULTS.json and PICTURE.png")
            return _plot_file(names[1], names[2])
        options = Options(
            quick=arguments.quick,
            repeat=arguments.repeat or (REPEAT_QUICK if arguments.quick else REPEAT),
            work=arguments.work.absolute(),
            against=arguments.against,
            spdk_socket=arguments.spdk_socket.absolute() if arguments.spdk_socket else None,
            load_cpus=arguments.load_cpus,
            agent_cpus=arguments.agent_cpus,
        )
        if names == ["profile"]:
            _check_work(options.work)
            return profile.run(options, arguments.plot, _progress)
        return _measure(_choose(parser, names), options, arguments)
    except MissingError as error:
        print(f"perf/run: {error}", file=sys.stderr)
        return MISSING
    except FailedError as error:
        print(f"perf/run: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
