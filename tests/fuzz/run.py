"""Builds the fuzz targets, runs them for a time, and adds up: see tests/fuzz/run.

Owns .build/fuzz and .build/fuzz-thread (programs), .build/fuzz-daemon-* (the daemon with
sanitizers) and .cache/fuzz (corpora that grow, findings). Exit status 0: no findings; 1:
findings; 2: wrong arguments or a build that failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = {"address": ROOT / ".build" / "fuzz", "thread": ROOT / ".build" / "fuzz-thread"}
CACHE = ROOT / ".cache" / "fuzz"

IN_CORE = {"ring": ["seam"], "journal": ["seam", "history", "plain"],
           "arena": ["seam", "history", "plain"]}
"""libFuzzer targets and the other files in this folder that they are made of."""
ON_DAEMON = ("vhost", "control")
LENGTH = {"ring": 1024, "journal": 256, "arena": 256}
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
GRACE_S = 60


@dataclass
class Outcome:
    """What a target did."""

    name: str
    executions: int
    seconds: float
    findings: list[str]


def fail(text: str) -> None:
    print(f"tests/fuzz/run: {text}", file=sys.stderr)
    sys.exit(2)


def checked(command: Sequence[str], **settings: object) -> str:
    """Run a command that has to work; its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False, **settings)  # type: ignore[call-overload]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
        fail(f"this failed: {' '.join(command)}")
    return str(done.stdout)


# ---- libFuzzer targets -------------------------------------------------------------------------


def native_sources() -> list[str]:
    """The core's files, as its own build lists them."""
    text = (ROOT / "native" / "meson.build").read_text()
    found = re.search(r"native_sources = files\((.*?)\)", text, re.DOTALL)
    if found is None:
        fail("native/meson.build has no list native_sources")
        raise AssertionError
    return re.findall(r"'(\w+)\.c'", found.group(1))


def ninja_file(kind: str) -> str:
    """Core with coverage, loads told to the target, and memcpy() and munmap() given to it."""
    sanitizers = SANITIZERS[kind]
    libraries = checked(["pkg-config", "--libs", "liburing", "libzstd", "libisal"]).strip()
    flags = checked(["pkg-config", "--cflags", "liburing", "libzstd", "libisal"]).strip()
    flags += f" -g -O1 -std=gnu11 -D_GNU_SOURCE -I{ROOT}/native -fno-omit-frame-pointer -Wall"
    core = (f"{flags} {sanitizers} -fsanitize=fuzzer-no-link -fsanitize-coverage=trace-loads "
            "-Dmemcpy=fuzz_memcpy -Dmunmap=fuzz_munmap -DEPOCHD_PLAIN_COPY")
    lines = [
        f"core_flags = {core}",
        f"target_flags = {flags} -I{HERE} {sanitizers}",
        "rule core", "  command = clang $core_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc", "  description = $in",
        "rule target", "  command = clang $target_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc", "  description = $in",
        "rule link", f"  command = clang {sanitizers} -fsanitize=fuzzer $in {libraries} -lpthread "
        "-o $out", "  description = $out",
    ]
    core_names = native_sources()
    for name in core_names:
        lines.append(f"build core-{name}.o: core {ROOT}/native/{name}.c")
    for name in sorted({*IN_CORE, *(part for parts in IN_CORE.values() for part in parts)}):
        lines.append(f"build {name}.o: target {HERE}/{name}.c")
    for name, parts in IN_CORE.items():
        # The ring target includes reactor.c, for its loop.
        objects = [f"core-{n}.o" for n in core_names if (name, n) != ("ring", "reactor")]
        lines.append(f"build {name}: link {name}.o {' '.join(f'{p}.o' for p in parts)} "
                     f"{' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_core(kind: str) -> None:
    build = BUILD[kind]
    build.mkdir(parents=True, exist_ok=True)
    text = ninja_file(kind)
    file = build / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    checked([tool("ninja"), "-C", str(build)])


def tool(name: str) -> str:
    """A program of the virtual environment, or of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def run_core(name: str, seconds: float, seed: int | None, kind: str) -> Outcome:
    corpus = CACHE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts = CACHE / "findings"
    artifacts.mkdir(parents=True, exist_ok=True)
    log = CACHE / f"{name}-{kind}.log"
    command = [str(BUILD[kind] / name), f"-max_total_time={max(1, round(seconds))}",
               f"-max_len={LENGTH[name]}", "-len_control=0", "-timeout=25", "-print_final_stats=1",
               f"-artifact_prefix={artifacts}/{name}-", str(corpus)]
    kept = HERE / "corpus" / name
    command += [str(kept)] if kept.is_dir() else []
    command += [] if seed is None else [f"-seed={seed}"]
    options = {"ASAN_OPTIONS": "quarantine_size_mb=16:detect_leaks=1",
               "UBSAN_OPTIONS": "print_stacktrace=1",
               "TSAN_OPTIONS": "halt_on_error=1"}
    began = time.monotonic()
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                                env={**os.environ, **options}, check=False,
                                timeout=seconds + 10 * GRACE_S).returncode
    text = log.read_text(errors="replace")
    counts = re.findall(r"stat::number_of_executed_units: (\d+)|^#(\d+)\t", text, re.MULTILINE)
    executions = max((int(a or b) for a, b in counts), default=0)
    findings = []
    if status:
        named = re.search(r"Test unit written to (\S+)", text)
        what = re.search(r"^(FINDING: .*|SUMMARY: .*|.*assertion failed.*)$", text, re.MULTILINE)
        findings.append(f"{what.group(1) if what else f'exit status {status}'} "
                        f"({named.group(1) if named else log})")
    elif executions == 0:
        findings.append(f"nothing was executed ({log})")
    return Outcome(name, executions, time.monotonic() - began, findings)


# ---- The daemon --------------------------------------------------------------------------------


def sanitized_daemon(kind: str) -> str:
    """Build the daemon with sanitizers; the command that starts it."""
    build = ROOT / ".build" / f"fuzz-daemon-{kind}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    site = build / "site"
    sanitize = {"address": "address,undefined", "thread": "thread"}[kind]
    if not (build / "build.ninja").exists():
        checked([tool("meson"), "setup", str(build), str(ROOT), f"-Db_sanitize={sanitize}",
                 "-Db_lundef=false", "-Dbuildtype=debugoptimized", f"--prefix={build}/root",
                 f"-Dpython.purelibdir={site}", f"-Dpython.platlibdir={site}"], env=environment)
    checked([tool("meson"), "install", "--quiet", "-C", str(build)], env=environment)
    library = checked(["gcc", f"-print-file-name=lib{'asan' if kind == 'address' else 'tsan'}.so"])
    options = ("ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 "
               "UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "
               "TSAN_OPTIONS=halt_on_error=0:exitcode=66")
    return (f"env LD_PRELOAD={Path(library.strip()).resolve()} PYTHONPATH={site} {options} "
            f"{sys.executable} -m epochd")


def run_daemon(name: str, seconds: float, seed: int | None, kind: str) -> Outcome:
    if "EPOCHD_COMMAND" not in os.environ or kind == "thread":
        os.environ["EPOCHD_COMMAND"] = sanitized_daemon(kind)
    from fuzz import protocol

    began = time.monotonic()
    executions, findings = protocol.fuzz(name, seconds, seed, CACHE)
    return Outcome(name, executions, time.monotonic() - began, findings)


# ---- All of it ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz/run", add_help=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--sanitize", choices=("address", "thread"), default="address")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options = parser.parse_args()
    known = [*IN_CORE, *ON_DAEMON]
    if unknown := sorted(set(options.targets) - set(known)):
        fail(f"there is no target {unknown[0]!r}; there are {', '.join(known)}")
    targets = options.targets or known
    if set(targets) & set(IN_CORE):
        build_core(options.sanitize)
    outcomes = []
    for name in targets:
        share = options.seconds / len(targets)
        print(f"fuzz: {name} for {share:g} s", file=sys.stderr, flush=True)
        if name in IN_CORE:
            outcomes.append(run_core(name, share, options.seed, options.sanitize))
        else:
            outcomes.append(run_daemon(name, share, options.seed, options.sanitize))
    print(f"{'target':10} {'executions':>11} {'per second':>11} {'findings':>9}")
    for done in outcomes:
        rate = done.executions / max(done.seconds, 0.001)
        print(f"{done.name:10} {done.executions:11} {rate:11.0f} {len(done.findings):9}")
    for done in outcomes:
        for finding in done.findings:
            print(f"{done.name}: {finding}")
    total = sum(len(done.findings) for done in outcomes)
    print(f"executions: {sum(done.executions for done in outcomes)}, findings = {total}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
