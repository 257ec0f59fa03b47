"""Measures of any video by plain vision: who is in it, where, how it moves, and what it looks like when it is back.

The names of `METRICS` are those of VBench where the question is the same; no network answers it, so the figures aren't
VBench's. They need facts of the world that is filmed; `general_measures` is for videos without. `recall` is about those
returns that only compressed history can know.
"""

from kvpack.evaluation.facts import Facts
from kvpack.evaluation.measures import METRICS, drift, general_measures, measures
from kvpack.evaluation.observation import Observation
from kvpack.evaluation.observer import Observer
from kvpack.evaluation.recall import RECALL, WholeFrames, recall

__all__ = [
    "METRICS",
    "RECALL",
    "Facts",
    "Observation",
    "Observer",
    "WholeFrames",
    "drift",
    "general_measures",
    "measures",
    "recall",
]
