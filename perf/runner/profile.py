"""`perf/run profile`: where the agent's time goes under writes and under reads of the arena.

Sampled by Linux' perf with the cpu-clock event, which virtual machines have too; a list by
function, and with --plot a flame graph. Where perf cannot be used, valgrind's callgrind counts
instructions under a fixed workload instead: exact, the same every time, but blind for caches.
"""

from __future__ import annotations

import contextlib
import html
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .agent import Agent
from .bench import GIB, MIB, Options
from .failures import FailedError
from .load import job, run_load
from .process import find, pinned, running

SAMPLES_A_SECOND = 4000
IOS = 300_000
TOP = 25
WIDTH, LINE, FONT = 1200, 17, 12
CALLGRIND_IOS = 20_000
STACK_BYTES = 8192


def run(options: Options, picture: Path | None, say: Callable[[str], None]) -> int:
    """Print the lists; write the flame graph to `picture` (svg). Returns the exit status."""
    folder = Path(tempfile.mkdtemp(dir=options.work, prefix="profile-"))
    try:
        program = usable_perf(folder)
        if program is None:
            say("perf cannot sample here; counting instructions with callgrind instead")
            print(_callgrind(folder, options, say))
            if picture:
                say("no flame graph: callgrind's counts have no stacks")
        else:
            stacks = _sampled(program, folder, options, say)
            for title, counts in stacks.items():
                print(f"\n{title}\n{top_list(counts)}")
            if picture:
                picture.write_text(flame_graph(stacks))
        return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def usable_perf(folder: Path) -> str | None:
    """Path of a perf that may sample here, or None."""
    program = shutil.which("perf")
    if program is None:
        return None
    probe = [program, "record", "-q", "-e", "cpu-clock", "-o", str(folder / "probe"), "true"]
    done = subprocess.run(probe, capture_output=True, check=False)
    return program if done.returncode == 0 else None


# ---- sampling ------------------------------------------------------------------------------


def _sampled(
    program: str, folder: Path, options: Options, say: Callable[[str], None]
) -> dict[str, Counter[tuple[str, ...]]]:
    """Title of the workload -> samples by stack, outermost function first."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(GIB)
    region = 256 * MIB
    agent = Agent(folder, image, arena=2 * GIB, level=0, cpus=options.agent_cpus)
    found: dict[str, Counter[tuple[str, ...]]] = {}
    with running(agent):
        agent.start()
        for rw, title in (
            ("randwrite", "4 KiB random writes, depth 32"),
            ("randread", "4 KiB random reads of the arena, depth 32"),
        ):
            say(title)
            # Reads find everything in the arena; writes that nothing has to wait for room.
            fill = job(rw="write", bs="4k", iodepth=32, bytes=region, size=region)
            run_load(agent, agent.socket, options.load_cpus, **fill)
            data = folder / f"{rw}.data"
            with _recording(program, agent.pid, data):
                for _ in range(2 if options.quick else 8):
                    load = job(rw=rw, bs="4k", iodepth=32, ios=IOS, size=region)
                    run_load(agent, agent.socket, options.load_cpus, **load)
                    if rw == "randwrite":
                        agent.discard()
            found[title] = _stacks(program, data)
    return found


@contextlib.contextmanager
def _recording(program: str, pid: int, data: Path) -> Iterator[None]:
    """perf record of a process meanwhile."""
    words = [program, "record", "-q", "-e", "cpu-clock", "-F", str(SAMPLES_A_SECOND)]
    words += ["--call-graph", f"dwarf,{STACK_BYTES}", "-o", str(data), "-p", str(pid)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield
            process.send_signal(signal.SIGINT)
            # It ends by our signal once the file is whole.
            if process.wait(60) not in (0, -signal.SIGINT, 128 + signal.SIGINT):
                errors.seek(0)
                raise FailedError(f"perf record: {errors.read().decode(errors='replace')}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _stacks(program: str, data: Path) -> Counter[tuple[str, ...]]:
    done = subprocess.run(
        [program, "script", "-i", str(data), "-F", "tid,ip,sym"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FailedError(f"perf script: {done.stderr.strip()}")
    return collapse(done.stdout)


def collapse(text: str) -> Counter[tuple[str, ...]]:
    """Samples by stack out of `perf script -F tid,ip,sym`, of the thread that has most of
    them: the reactor."""
    by_thread: dict[str, Counter[tuple[str, ...]]] = {}
    thread = ""
    stack: list[str] = []

    def close() -> None:
        if stack:
            by_thread.setdefault(thread, Counter())[tuple(reversed(stack))] += 1

    for line in text.splitlines():
        words = line.split(maxsplit=1)
        if not words:
            close()
            stack = []
        elif not line[0].isspace() or len(words) == 1:
            thread = words[0]
        else:
            stack.append(words[1].partition("+")[0])
    close()
    if not by_thread:
        raise FailedError("perf took no samples")
    return max(by_thread.values(), key=lambda counts: counts.total())


def top_list(counts: Counter[tuple[str, ...]]) -> str:
    """Functions by their own share of the samples; beside it the share with what they call."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, count in counts.items():
        own[stack[-1]] += count
        for name in set(stack):
            whole[name] += count
    total = counts.total()
    lines = [f"{'own':>7} {'with':>7}  function ({total} samples)"]
    lines += [
        f"{100 * n / total:6.1f}% {100 * whole[name] / total:6.1f}%  {name}"
        for name, n in own.most_common(TOP)
    ]
    return "\n".join(lines)


# ---- flame graph ----------------------------------------------------------------------------


@dataclass
class _Frame:
    count: int = 0
    callees: dict[str, _Frame] = field(default_factory=dict)

    def depth(self) -> int:
        return 1 + max((one.depth() for one in self.callees.values()), default=0)


def _tree(counts: Counter[tuple[str, ...]]) -> _Frame:
    root = _Frame()
    for stack, count in counts.items():
        at = root
        at.count += count
        for name in stack:
            at = at.callees.setdefault(name, _Frame())
            at.count += count
    return root


def flame_graph(stacks: dict[str, Counter[tuple[str, ...]]]) -> str:
    """An SVG: a graph for each workload, callers below, width is time."""
    parts: list[str] = []
    top = 0
    for title, counts in stacks.items():
        root = _tree(counts)
        height = (root.depth() + 2) * LINE
        parts.append(
            f'<text x="4" y="{top + FONT + 2}" font-weight="bold">{html.escape(title)}</text>'
        )
        _boxes(root, 0.0, WIDTH / root.count, top + height - LINE, root.count, parts)
        top += height + LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" '
        f'font-family="sans-serif" font-size="{FONT}">'
        f'<rect width="{WIDTH}" height="{top}" fill="white"/>' + "\n".join(parts) + "</svg>\n"
    )


def _boxes(
    frame: _Frame, left: float, scale: float, y: float, total: int, parts: list[str]
) -> None:
    for name, callee in sorted(frame.callees.items()):
        width = callee.count * scale
        if width >= 0.5:
            shade = 40 + sum(name.encode()) % 60
            label = name if len(name) * FONT * 0.6 < width else ""
            text = html.escape(name)
            parts.append(
                f"<g><title>{text}: {100 * callee.count / total:.1f} %</title>"
                f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 1}" '
                f'fill="hsl({shade % 50},85%,{55 + shade % 20}%)"/>'
                f'<text x="{left + 3:.1f}" y="{y + FONT}">{html.escape(label)}</text></g>'
            )
            _boxes(callee, left, scale, y - LINE, total, parts)
        left += width


# ---- callgrind -------------------------------------------------------------------------------


class _Counted(Agent):
    """The agent under callgrind: everything takes fifty times as long."""

    def spawn(self, words: Sequence[str], cpus: Sequence[int] | None) -> None:
        valgrind = find("valgrind", "valgrind")
        super().spawn(
            [
                valgrind,
                "--tool=callgrind",
                "--instr-atstart=no",
                "--fair-sched=yes",
                f"--callgrind-out-file={self.folder / 'callgrind.out'}",
                *words,
            ],
            cpus,
        )

    def counting(self, on: bool) -> None:
        control = find("callgrind_control", "valgrind")
        subprocess.run(
            [control, "-i", "on" if on else "off", str(self.pid)], capture_output=True, check=True
        )


def _callgrind(folder: Path, options: Options, say: Callable[[str], None]) -> str:
    """Instructions by function, for CALLGRIND_IOS writes and as many reads."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(GIB)
    agent = _Counted(folder, image, arena=256 * MIB, level=0)
    with running(agent):
        say("starting under valgrind")
        agent.start()
        agent.counting(True)
        for rw in ("randwrite", "randread"):
            say(f"{CALLGRIND_IOS} of {rw}")
            run_load(
                agent,
                agent.socket,
                options.load_cpus,
                rw=rw,
                bs="4k",
                iodepth=32,
                ios=CALLGRIND_IOS,
                size=64 * MIB,
            )
        agent.counting(False)
    annotate = find("callgrind_annotate", "valgrind")
    found = sorted(folder.glob("callgrind.out*"))
    done = subprocess.run(
        pinned([annotate, "--threshold=95", str(found[-1])], None),
        capture_output=True,
        text=True,
        check=False,
    )
    with contextlib.suppress(StopIteration):
        lines = done.stdout.splitlines()
        start = next(i for i, line in enumerate(lines) if "file:function" in line)
        return "\n".join(lines[start : start + TOP + 2])
    raise FailedError(f"callgrind_annotate: {done.stderr.strip() or done.stdout[-500:]}")
