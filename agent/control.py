"""The control verbs: what each QMP command checks, asks of the core, and returns.

Contract. Owner: the asyncio loop. A verb returns the object documented in the README or
raises QmpError; what the core refuses comes through in the core's own words. All verbs may
be repeated: the same question gives the same answer. Sizes are bytes, times nanoseconds.

To add a verb: a method, and its line in Control.commands().
"""

import errno
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import __version__, core, dictionary, qmp, rejections
from .config import Config
from .errors import EpochdError
from .port import Port
from .qmp import QmpError
from .storage import Group

EPOCH_MAX = (1 << 64) - 1


def _only(arguments: dict[str, Any], *known: str) -> None:
    for name in arguments:
        if name not in known:
            raise QmpError(f"unknown argument {name!r}; known: {', '.join(known) or 'none'}",
                           rejection=rejections.CONTROL_ARGUMENTS)


def _epoch(arguments: dict[str, Any]) -> int | None:
    """The optional argument `epoch`."""
    if "epoch" not in arguments:
        return None
    epoch = arguments["epoch"]
    if isinstance(epoch, bool) or not isinstance(epoch, int):
        raise QmpError(f"argument 'epoch' is not an integer: {epoch!r}",
                       rejection=rejections.CONTROL_ARGUMENTS)
    if not 0 < epoch <= EPOCH_MAX:
        raise QmpError(f"argument 'epoch' is {epoch}; epochs are numbered from 1",
                       rejection=rejections.CONTROL_ARGUMENTS)
    return epoch


def _dashed(record: Mapping[str, object]) -> dict[str, object]:
    """QMP's spelling of names."""
    return {name.replace("_", "-"): value for name, value in record.items()}


def _verb(function: Callable[..., Any], *known: str) -> qmp.Handler:
    """Wrap a verb: reject unknown arguments, put the core's refusals on the wire."""

    async def call(arguments: dict[str, Any]) -> object:
        _only(arguments, *known)
        try:
            result = function(arguments) if known else function()
            return await result if isinstance(result, Awaitable) else result
        except core.CoreError as error:
            raise QmpError(error.text, rejection=rejections.CONTROL_REFUSALS) from None

    return call


class Control:
    """The verbs of one group. `on_quit` begins the agent's clean stop."""

    def __init__(self, config: Config, group: Group, ports: list[Port],
                 on_quit: Callable[[], None]) -> None:
        self._config = config
        self._group = group
        self._core = group.core
        self._ports = ports
        self._on_quit = on_quit
        self._started = time.monotonic()

    def commands(self) -> dict[str, qmp.Handler]:
        """All verbs by name."""
        table = {
            "query-status": _verb(self.query_status),
            "query-epochs": _verb(self.query_epochs),
            "query-disks": _verb(self.query_disks),
            "query-stats": _verb(self.query_stats),
            "query-version": _verb(qmp.version),
            "epoch-seal": _verb(self.epoch_seal),
            "epoch-commit": _verb(self.epoch_commit, "epoch"),
            "epoch-discard": _verb(self.epoch_discard),
            "promote": _verb(self.promote),
            "dictionary-load": _verb(self.dictionary_load, "id"),
            "quit": _verb(self.quit),
        }
        names = [*table, "query-commands", "qmp_capabilities"]
        table["query-commands"] = _verb(lambda: [{"name": name} for name in sorted(names)])
        table["qmp_capabilities"] = _verb(self.negotiated, "enable")
        return table

    def negotiated(self, arguments: dict[str, Any]) -> None:
        """qmp_capabilities for the second time."""
        raise QmpError("capabilities negotiation is already complete", "CommandNotFound")

    # Verbs.

    async def epoch_seal(self) -> object:
        return {"epoch": await self._core.seal()}

    async def epoch_commit(self, arguments: dict[str, Any]) -> object:
        return {"committed": await self._core.commit(_epoch(arguments))}

    async def epoch_discard(self) -> object:
        discarded, committed = await self._core.discard()
        return {"discarded": list(discarded), "committed": committed}

    async def promote(self) -> object:
        return {"mode": "active", "generation": await self._core.promote()}

    def dictionary_load(self, arguments: dict[str, Any]) -> object:
        """Compress with the dictionary of that file in the state folder, from now on."""
        identity = arguments.get("id")
        if not isinstance(identity, str) or not re.fullmatch("[0-9a-f]{8}", identity):
            raise QmpError(f"argument 'id' is not eight hex digits: {identity!r}",
                           rejection=rejections.CONTROL_ARGUMENTS)
        path = dictionary.path_of(self._config.state_dir, self._config.name, int(identity, 16))
        try:
            one = dictionary.load(path, self._group.id.bytes)
            self._core.add_dictionary(one.id, one.data)
        except EpochdError as error:
            raise QmpError(str(error), rejection=rejections.CONTROL_REFUSALS) from None
        except core.CoreError as error:
            if error.errno != errno.EEXIST:
                raise
        return {"dictionary": identity, "size": len(one.data)}

    def quit(self) -> object:
        self._on_quit()
        return {}

    # Queries.

    def query_status(self) -> object:
        """The contract's fields, then what helps a person to judge the agent's state."""
        status = self._core.status()
        sealed = range(status.sealed_first, status.sealed_last + 1) if status.sealed_last else ()
        return {
            "mode": core.MODE_NAMES[status.mode],
            "generation": status.generation,
            "open": status.open,
            "sealed": list(sealed),
            "committed": status.committed,
            "applied": status.applied,
            "arena": {
                "size": status.arena_size,
                "used": status.arena_used,
                "percent": status.pressure,
                "name": self._group.arena.name,
            },
            "spill": self._spill(status),
            "index": {
                "size": status.index_size,
                "used": status.index_used,
            },
            "journal": {
                "size": status.journal_size,
                "used": status.journal_used,
                "direct": bool(status.direct_journal),
                "path": str(self._group.journal.path),
            },
            "live-view": self._group.live_view,
            "clients": status.clients,
            "held": status.held_requests,
            "logical-bytes": status.logical_bytes,
            "stored-bytes": status.stored_bytes,
            "index-bytes": status.index_bytes,
            "compress-level": self._config.compress_level,
            "error": status.error,
            "name": self._config.name,
            "uuid": str(self._group.id),
            "disks": len(self._ports),
            "reactors": status.reactors,
            "version": __version__,
            "uptime-seconds": int(time.monotonic() - self._started),
        }

    def _spill(self, status: core.Status) -> object:
        """The spill file; None when there is none."""
        if self._group.spill is None:
            return None
        return {
            "size": status.spill_size,
            "used": status.spill_used,
            "closed": self._group.spill.closed,
            "path": str(self._group.spill.path),
            "error": os.strerror(status.spill_fault) if status.spill_fault else "",
        }

    def query_epochs(self) -> object:
        """All epochs alive, oldest first."""
        epochs = []
        for info in self._core.epochs():
            record = _dashed(asdict(info))
            epochs.append({
                "epoch": record.pop("id"),
                "state": core.EPOCH_STATE_NAMES[info.state],
                **{name: value for name, value in record.items() if name != "state"},
            })
        return epochs

    def query_disks(self) -> object:
        """The disks, their front ends and the rings that a front end has touched."""
        disks = []
        for port, image in zip(self._ports, self._group.images, strict=True):
            info = self._core.disk(port.disk.index)
            session = port.session
            counters = {name: value for name, value in asdict(info).items()
                        if name not in ("queues", "size_bytes")}
            disks.append({
                "name": port.disk.name,
                "image": str(image.config.image),
                "socket": str(image.config.socket) if image.config.socket else None,
                "size": info.size_bytes,
                "logical-block-size": image.logical_block_bytes,
                "read-only": image.config.read_only,
                "direct": image.direct,
                "serial": image.config.serial,
                "connected": session is not None,
                "peer": session.peer if session else None,
                "features": session.features if session else 0,
                "stats": _dashed(counters),
                "queues": [
                    _queue(number, queue) for number, queue in enumerate(info.queues)
                    if queue.configured or queue.enabled or queue.broken or queue.requests
                ],
            })
        return disks

    def query_stats(self) -> object:
        """Counters of the group since the agent's start, and sums over its disks."""
        status = self._core.status()
        names = (
            "seals", "commits", "applies", "discards", "compressed_frames",
            "incompressible_frames", "zero_frames", "dropped_frames", "compress_ns",
            "seal_ns_last", "commit_ns_last", "apply_ns_last", "journal_bytes_written",
            "image_bytes_written", "spill_bytes_written", "logical_bytes", "stored_bytes",
            "index_bytes",
        )
        group: dict[str, object] = {name: getattr(status, name) for name in names}
        sums: dict[str, int] = {}
        for port in self._ports:
            for name, value in asdict(self._core.disk(port.disk.index)).items():
                if name not in ("queues", "size_bytes"):
                    sums[name] = sums.get(name, 0) + value
        packed = ("pack_bytes_in", "pack_bytes_out", "clusters", "pack_queue", "pack_level",
                  "wanted_bytes", "expanded_bytes", "cluster_hits", "cluster_misses", "merges",
                  "merged_blocks", "merge_bytes_in", "merge_bytes_out", "merge_queue")
        compression: dict[str, object] = {name: getattr(status, name) for name in packed}
        compression.update(
            dictionary=f"{status.dictionary:08x}" if status.dictionary else None,
            dictionary_bytes=status.dictionary_bytes,
            dictionaries=status.dictionaries,
            dictionary_frames=status.dictionary_frames,
            pack_ns=status.compress_ns,
        )
        compression["ratio"] = round(status.pack_bytes_in / max(status.pack_bytes_out, 1), 3)
        core_counts = {rejections.RINGS: sums["broken"],
                       rejections.REQUESTS: sums["rejected"] - sums["broken"]}
        return {
            "group": _dashed(group),
            "disks": _dashed(sums),
            "compression": _dashed(compression),
            "rejections": {**core_counts, **rejections.counts()},
        }


def _queue(number: int, info: core.QueueInfo) -> dict[str, object]:
    record: dict[str, object] = {"queue": number}
    for name, value in asdict(info).items():
        flag = name in ("configured", "enabled", "running", "broken")
        record[name] = bool(value) if flag else value
    return record


def event_message(event: core.Event, disk_names: list[str]) -> tuple[str, dict[str, object]] | None:
    """The QMP event of a core event; None for those that are not for controllers."""
    kind = core.EventType
    match event.type:
        case kind.SEALED:
            return "EPOCH_SEALED", {"epoch": event.value}
        case kind.COMMITTED:
            return "EPOCH_COMMITTED", {"epoch": event.value}
        case kind.APPLIED:
            return "EPOCH_APPLIED", {"epoch": event.value}
        case kind.DISCARDED:
            dropped = list(range(event.first, event.last + 1)) if event.first else []
            return "EPOCH_DISCARDED", {"epochs": dropped, "committed": event.value}
        case kind.PRESSURE:
            return "ARENA_PRESSURE", {"percent": event.value, "held": bool(event.first)}
        case kind.SPILL:
            return "ARENA_SPILL", {"active": bool(event.first), "used": event.value}
        case kind.IO_ERROR:
            data: dict[str, object] = {"errno": -event.result, "desc": event.text}
            if event.disk != core.NO_DISK:
                data["disk"] = disk_names[event.disk]
            return "IO_ERROR", data
        case _:
            return None
