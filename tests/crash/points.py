"""The named moments at which the agent may be told to die (native/crash.h).

Each has the highest visit at which it is worth dying: a point on the write path is passed
thousands of times, one in a commit once a commit.
"""

from __future__ import annotations

POINTS: dict[str, int] = {
    # A request's life: taken, run, its frame stored, shown in the index, answered.
    "take-before-run": 200,
    "frame-before-tail": 400,
    "frame-before-index": 400,
    "push-before-publish": 200,
    "publish-before-clear": 60,
    "clear-before-used": 60,
    "resubmit": 1,
    # Verbs.
    "seal-before-store": 2,
    "seal-after-store": 2,
    "discard-before-base": 1,
    "discard-before-open": 1,
    "discard-before-free": 1,
    # Commit: frames, then the record's header, then fdatasync, then the arena, then the answer.
    "commit-before-header": 2,
    "commit-before-sync": 2,
    "commit-after-sync": 2,
    "commit-before-arena": 2,
    "commit-before-answer": 2,
    # Apply, and the journal's head behind it.
    "apply-before-sync": 2,
    "apply-before-super": 2,
    "super-before-sync": 2,
    "apply-before-free": 2,
    # The helper's copy of a segment.
    "pack-before-index": 3,
    "pack-before-free": 3,
    # The start itself.
    "recover-before-super": 1,
    "recover-before-arena": 1,
}

SPILL_POINTS: dict[str, int] = {
    # A segment's move to the spill file, which the campaign's load has no need of.
    "spill-before-publish": 30,
    "spill-before-index": 30,
    "spill-before-free": 30,
}

MERGE_POINTS: dict[str, int] = {
    # Neighbours that were written far apart become clusters: only when the guest is idle.
    "merge-before-index": 2,
    "merge-before-free": 2,
}
