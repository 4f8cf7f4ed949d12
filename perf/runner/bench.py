"""A benchmark: its name, its target, its function; and what such a function works with.

A function gets a `Context` and fills `context.row`, usually by pairs(): A B A B. Whatever it
starts through the context ends with the benchmark, also when it fails. MissingError out of a
function skips the row, FailedError fails it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .agent import Agent
from .data import FsImage, fs_image
from .failures import FailedError, MissingError
from .load import Load, LoadResult, run_load
from .peers import StorageDaemon, spdk_socket
from .process import Server, running
from .result import Row, Sample, Target

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
VERIFY_BYTES = 32 * MIB

S = TypeVar("S", bound=Server)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    quick: bool
    repeat: int
    work: Path
    against: str | None
    spdk_socket: Path | None
    load_cpus: Sequence[int] | None
    agent_cpus: Sequence[int] | None


@dataclass(frozen=True)
class Bench:
    """One named benchmark. `peers`: those that it can be held against, the usual one first."""

    name: str
    title: str
    unit: str
    peers: tuple[str, ...]
    target: Target | None
    run: Callable[[Context], None]


@dataclass
class Context:
    """A benchmark at work."""

    bench: Bench
    options: Options
    row: Row
    folder: Path
    say: Callable[[str], None]
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def quick(self) -> bool:
        return self.options.quick

    def pick(self, full: float, quick: float) -> float:
        """A figure for the whole run, or for the quick one."""
        return quick if self.quick else full

    def size(self, name: str, full: int, quick: int) -> int:
        """The same for what is to be told in the results."""
        self.row.settings[name] = quick if self.quick else full
        return int(self.row.settings[name])

    # ---- what is started -----------------------------------------------------------------

    def sparse(self, name: str, size: int) -> Path:
        """A file without blocks."""
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def agent(
        self,
        image: Path,
        *,
        arena: int,
        level: int = 1,
        pinned: bool = True,
        folder: str = "",
        more: Sequence[Path] = (),
        reactors: int = 1,
    ) -> Agent:
        """A running agent. `pinned`: on the agent's CPU; otherwise wherever there is room, for
        what needs its helper thread too."""
        self.row.settings |= {"arena_bytes": arena, "compress_level": level, "pinned": pinned}
        home = self.folder / folder
        home.mkdir(exist_ok=True)
        cpus = self.options.agent_cpus if pinned else None
        agent = Agent(
            home, image, arena=arena, level=level, cpus=cpus, more=more, reactors=reactors
        )
        return self.serving(agent).start()

    def serving(self, server: S) -> S:
        """End this server with the benchmark."""
        self.stack.enter_context(running(server))
        return server

    def fs_image(self) -> FsImage:
        """The file-system image that gives the data, of the run's size."""
        size = self.size("data_image_bytes", 1024 * MIB, 256 * MIB)
        if not (self.options.work / "cache").exists():
            self.say("making the file-system image, once")
        image = fs_image(self.options.work / "cache", size)
        self.row.settings["data_zero_share"] = round(image.zero_share, 4)
        return image

    # ---- load ----------------------------------------------------------------------------

    def load(self, server: Server | None, socket: Path, /, **arguments: object) -> LoadResult:
        """One run of the load generator on its CPU."""
        result = run_load(server, socket, self.options.load_cpus, **arguments)
        if "ios" in arguments and result.ios != arguments["ios"]:
            raise FailedError(f"{result.ios} requests were done of {arguments['ios']}")
        return result

    def random_writes(self, agent: Agent, /, **arguments: object) -> LoadResult:
        """4 KiB random writes into the open epoch. FailedError when some had to wait for room in
        the arena: what was timed was not the path."""
        before = agent.held()
        result = self.load(agent, agent.socket, rw="randwrite", bs="4k", **arguments)
        not_held(agent, before)
        return result

    def background(self, server: Server, socket: Path, /, **arguments: object) -> Load:
        """The same while we do something else; use as a context manager."""
        return Load(server, socket, self.options.load_cpus, **arguments)

    def trust(self, agent: Agent) -> None:
        """Wrong data fails the run before any figure is taken: writes, zeroes, discards and
        reads of a small region, each read checked. What it wrote is dropped."""
        self.say("checking data")
        self.load(
            agent,
            agent.socket,
            rw="mix",
            mix="read=40,write=50,zero=5,discard=5",
            pattern="rand",
            verify=True,
            iodepth=16,
            size=VERIFY_BYTES,
            ios=int(self.pick(40000, 8000)),
        )
        agent.discard()

    # ---- peers ---------------------------------------------------------------------------

    @property
    def against(self) -> str:
        """The peer of this run."""
        return self.options.against or self.bench.peers[0]

    def skip(self, reason: object) -> None:
        """The comparison cannot be made; what is measured of ours stays."""
        self.row.status = "skipped"
        self.row.reason = str(reason)
        self.say(f"skipped: {reason}")

    def peer(self, start: Callable[[], T]) -> T | None:
        """What `start` returns. MissingError in it skips the comparison only: None."""
        if self.row.status == "skipped":
            return None
        try:
            return start()
        except MissingError as error:
            self.skip(error)
            return None

    def vhost_peer(self, size: int, image: Path | None = None) -> tuple[Server | None, Path] | None:
        """The chosen vhost-user-blk server: (process, if it is ours; socket). None: skipped."""

        def start() -> tuple[Server | None, Path]:
            if self.against == "spdk":
                return None, spdk_socket(self.options.spdk_socket)
            disk = image if self.against == "image" else None
            cpus = self.options.agent_cpus
            peer = self.serving(StorageDaemon(self.folder, disk, size, cpus)).start()
            return peer, peer.socket

        return self.peer(start)

    # ---- pairs ---------------------------------------------------------------------------

    def pairs(
        self,
        ours: Callable[[], Sample],
        theirs: Callable[[], Sample] | None,
        show: Callable[[float], str],
    ) -> None:
        """Measure A B A B. Without `theirs`: A A."""
        row, repeat = self.row, self.options.repeat
        for number in range(1, repeat + 1):
            a = ours()
            row.ours.append(a.value)
            detail = {"ours": a.detail}
            text = f"{number}/{repeat}: {show(a.value)}"
            self._keep_latency("epochd", a)
            if theirs is not None:
                b = theirs()
                row.theirs.append(b.value)
                detail["theirs"] = b.detail
                text += f", {self.against}: {show(b.value)}"
                self._keep_latency(self.against, b)
                if b.value:
                    text += f", ratio {a.value / b.value:.2f}"
            row.details.append(detail)
            self.say(text)

    def _keep_latency(self, name: str, sample: Sample) -> None:
        if sample.histogram:
            self.row.curves.setdefault("latency", {})[name] = list(sample.histogram)


def of_load(result: LoadResult, value: float) -> Sample:
    """A sample of a run of the load generator."""
    return Sample(value, result.short(), result.histogram)


def not_held(agent: Agent, before: int) -> None:
    """FailedError when writes had to wait for the arena: what was timed was not the path."""
    if agent.held() > before:
        raise FailedError("writes waited for room in the arena; this run measured that instead")


def execute(bench: Bench, options: Options, say: Callable[[str], None]) -> Row:
    """Run one benchmark in a folder of its own and return its row; nothing is raised for what
    the row can tell."""
    against = options.against or bench.peers[0]
    row = Row(bench.name, bench.title, bench.unit, against, bench.target)
    options.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.work, prefix=f"{bench.name}-"))
    context = Context(bench, options, row, folder, say)
    if against not in bench.peers:
        context.skip(f"{against} is no peer of it; those are: {', '.join(bench.peers)}")
    begin = time.monotonic()
    try:
        with context.stack:
            bench.run(context)
    except MissingError as error:
        context.skip(error)
    except FailedError as error:
        row.status, row.reason = "failed", str(error)
        say(f"FAILED: {error}")
    except OSError as error:
        row.status, row.reason = "failed", f"{error.strerror}: {error.filename}"
        say(f"FAILED: {row.reason}")
    finally:
        row.seconds = round(time.monotonic() - begin, 2)
        if row.status == "failed" and os.environ.get("PERF_KEEP"):
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return row
