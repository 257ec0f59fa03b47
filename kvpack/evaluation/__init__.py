"""Measures of any video by plain vision: who is in it, where, how it moves, and what it looks like when it is back.

The names are those of VBench where the question is the same; no network answers it, so the figures aren't VBench's.
"""

from kvpack.evaluation.facts import Facts
from kvpack.evaluation.measures import METRICS, drift, measures
from kvpack.evaluation.observation import Observation
from kvpack.evaluation.observer import Observer

__all__ = ["METRICS", "Facts", "Observation", "Observer", "drift", "measures"]
