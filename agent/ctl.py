"""The command `epochctl`: a small QMP client for people and scripts.

Contract. One command a call, over the public client `qemu.qmp`. With --json the `return`
value is printed as JSON on one line (`watch`: one event a line); without it the output is
for people and may change. Exit status: 0 done, 1 the agent refused (its reason is on
stderr), 2 usage, 3 no agent: socket missing, refused, or the connection was lost.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from . import __version__, top, train
from .errors import EpochdError

EXIT_OK = 0
EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_NO_AGENT = 3

Json = dict[str, Any]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _ids(ids: Sequence[int]) -> str:
    if not ids:
        return "none"
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]}..{ids[-1]} ({len(ids)})"


def _rows(rows: Sequence[tuple[str, object]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def show_status(status: Json) -> str:
    """query-status for a person."""
    arena, index, journal = status["arena"], status["index"], status["journal"]
    ratio = ""
    if status["stored-bytes"]:
        ratio = f" ({status['logical-bytes'] / status['stored-bytes']:.2f} : 1)"
    rows: list[tuple[str, object]] = [
        ("group", f"{status['name']} ({status['uuid']})"),
        ("mode", f"{status['mode']}, generation {status['generation']}"),
        ("open", status["open"]),
        ("sealed", _ids(status["sealed"])),
        ("committed", status["committed"]),
        ("applied", status["applied"]),
        ("arena", f"{_bytes(arena['used'])} of {_bytes(arena['size'])} "
                  f"({arena['percent']} %), /dev/shm{arena['name']}"),
        ("index", f"{_bytes(index['used'])} of {_bytes(index['size'])}"),
        ("contents", f"{_bytes(status['logical-bytes'])} written, "
                     f"{_bytes(status['stored-bytes'])} stored{ratio}"),
        ("journal", f"{_bytes(journal['used'])} of {_bytes(journal['size'])}, {journal['path']}"),
        ("front ends", f"{status['clients']} of {status['disks']}"),
    ]
    if status["held"]:
        rows.append(("held", f"{status['held']} writes wait for room in arena or index"))
    if status["error"]:
        rows.append(("error", status["error"]))
    return _rows(rows)


def show_stats(stats: Json) -> str:
    """query-stats for a person."""
    rows: list[tuple[str, object]] = []
    for part in ("group", "disks", "compression", "rejections"):
        for name, value in stats[part].items():
            if "-ns" in name:
                shown: object = f"{value / 1e6:.3f} ms"
            else:
                shown = f"{value} ({_bytes(value)})" if "bytes" in name else value
            rows.append((name.replace("-ns", "-time"), shown))
    return _rows(rows)


def show_event(event: Json) -> str:
    """An event for a person."""
    stamp = event["timestamp"]
    when = datetime.fromtimestamp(stamp["seconds"] + stamp["microseconds"] / 1e6)
    data = " ".join(f"{key}={json.dumps(value)}" for key, value in event["data"].items())
    return f"{when:%H:%M:%S.%f} {event['event']} {data}".rstrip()


def _discarded(result: Json) -> str:
    return f"discarded {_ids(result['discarded'])}; committed is {result['committed']}"


COMMANDS: dict[str, tuple[str, str, Any]] = {
    "status": ("query-status", "show mode, epochs, arena and journal", show_status),
    "seal": ("epoch-seal", "close the open epoch and open the next",
             lambda r: f"sealed {r['epoch']}"),
    "commit": ("epoch-commit", "make sealed epochs durable (default: all of them)",
               lambda r: f"committed {r['committed']}"),
    "discard": ("epoch-discard", "drop everything newer than the last commit", _discarded),
    "promote": ("promote", "drop what is not committed and serve the VM alone",
                lambda r: f"mode {r['mode']}, generation {r['generation']}"),
    "stats": ("query-stats", "show counters since start", show_stats),
    "quit": ("quit", "stop the agent cleanly", lambda r: "stopping"),
}


def _epoch(text: str) -> int:
    try:
        epoch = int(text)
    except ValueError:
        epoch = 0
    if epoch < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an epoch (1, 2, ...)")
    return epoch


def build_parser() -> argparse.ArgumentParser:
    """The command line, a contract: scripts rely on it."""
    parser = argparse.ArgumentParser(
        prog="epochctl",
        description="Control a running epochd.",
        epilog="Exit status: 0 done, 1 refused by the agent, 2 usage, 3 no agent there.",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                        help="print JSON, one document a line")
    common.add_argument("-s", "--socket", metavar="SOCK", default=argparse.SUPPRESS,
                        help="the agent's control socket")
    parser.add_argument("-s", "--socket", metavar="SOCK",
                        help="the agent's control socket; only top can do without")
    parser.add_argument("--json", action="store_true", help="print JSON, one document a line")
    parser.add_argument("--version", action="version", version=f"epochctl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for name, (_, text, _) in COMMANDS.items():
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        if name == "commit":
            verb.add_argument("epoch", metavar="EPOCH", nargs="?", type=_epoch,
                              help="newest epoch to commit")
    verbs.add_parser("watch", help="print events until interrupted", parents=[common],
                     description="print events until interrupted or until the agent stops")
    top.add_parser(verbs, common)
    train.add_parser(verbs, common)
    return parser


async def _command(client: QMPClient, options: argparse.Namespace) -> int:
    command, _, show = COMMANDS[options.verb]
    arguments: dict[str, object] = {}
    if getattr(options, "epoch", None) is not None:
        arguments["epoch"] = options.epoch
    result = await client.execute(command, arguments)
    print(json.dumps(result) if options.json else show(result), flush=True)
    return EXIT_OK


async def _watch(client: QMPClient, options: argparse.Namespace) -> int:
    """Print events; the agent's own farewell is a good end, a lost connection is not."""
    stopping = False
    lost = asyncio.ensure_future(client.runstate_changed())
    with client.listener() as events:
        while True:
            get = asyncio.ensure_future(events.get())
            await asyncio.wait({get, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not get.done():
                get.cancel()
                break
            event = dict(get.result())
            print(json.dumps(event) if options.json else show_event(event), flush=True)
            stopping = stopping or event["event"] == "SHUTDOWN"
    if stopping:
        return EXIT_OK
    print("epochctl: the connection to the agent was lost", file=sys.stderr)
    return EXIT_NO_AGENT


async def _train(client: QMPClient, options: argparse.Namespace) -> int:
    result = await train.run(client, options)
    print(json.dumps(result) if options.json else train.show(result), flush=True)
    return EXIT_OK


SPECIAL = {"watch": _watch, "train-dictionary": _train}


async def _run(options: argparse.Namespace) -> int:
    client = QMPClient("epochctl")
    try:
        await client.connect(options.socket)
    except ConnectError as error:
        reason = getattr(error.exc, "strerror", None) or error.exc
        print(f"epochctl: no agent answers at {options.socket}: {reason}; is epochd running "
              "with this --control?", file=sys.stderr)
        return EXIT_NO_AGENT
    try:
        return await SPECIAL.get(options.verb, _command)(client, options)
    except (ExecuteError, EpochdError) as error:
        print(f"epochctl: {options.verb}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except QMPError as error:
        print(f"epochctl: the connection to the agent was lost: {error}", file=sys.stderr)
        return EXIT_NO_AGENT
    finally:
        if client.runstate != Runstate.IDLE:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()


def main() -> int:
    """Entry point of the console script."""
    parser = build_parser()
    options = parser.parse_args()
    if options.verb == "top" and options.interval == 0 and not options.once:
        parser.error("top: --interval 0 needs --once")
    if options.verb != "top" and options.socket is None:
        parser.error("the following arguments are required: -s/--socket")
    # The client library reports lost connections itself; we say it once, in our words.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return top.run(options) if options.verb == "top" else asyncio.run(_run(options))
    except KeyboardInterrupt:
        return EXIT_OK if options.verb in ("watch", "top") else 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
