"""Figures of a generation: those of its guidance branches together."""

from collections.abc import Mapping
from typing import Any

from kvpack.memory.session import AnySession


def branch_stats(stack: str, sessions: Mapping[str, AnySession], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return tokens of one branch, bytes of all, and seconds of each part of the work.

    Args:
        stack: name of the memory.
        sessions: memory of each guidance branch.
        seconds: of each part of the work.
    """
    each = [session.stats() for session in sessions.values()]
    if not each:
        shared = {"branches": [], "seconds": dict(seconds), "policy_seconds": {}}
        return {"stack": stack, "chunks": 0, **shared}
    total = {key: sum(stats[key] for stats in each) for key in each[0] if key.endswith("_bytes")}
    spent = [stats["policy_seconds"] for stats in each]  # the first branch runs every policy that any branch runs
    policies = {name: sum(part.get(name, 0.0) for part in spent) for name in spent[0]}
    shared = {"branches": list(sessions), "seconds": dict(seconds), "policy_seconds": policies}
    return {**each[0], **total, **shared}
