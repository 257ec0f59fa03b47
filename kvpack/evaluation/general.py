"""Measures of a video of which nothing is known but its pixels, under names of their own.

What docs/results.md calls `subject_consistency` is measured with facts of the world: which pixels are the subject,
which colours and shapes there are, where the landmarks are. Without them the same formulas answer other questions.
"""

from collections.abc import Mapping

from kvpack.evaluation.measures import drift, measures
from kvpack.evaluation.observation import Observation

#: What each measure is of where no facts are given; None where there is nothing to measure.
GENERAL: dict[str, str | None] = {
    "subject_consistency": "foreground_likeness",  # what differs from the median frame
    "background_consistency": "surroundings_likeness",  # all else, lamps and shadows included
    "dynamic_degree": "motion_speed",  # of that foreground, or of optical flow
    "prompt_alignment": None,
    "temporal_flickering": "steadiness",
    "revisit_consistency": "return_colour",  # of that foreground when it is back
}


def general_measures(observation: Observation) -> tuple[dict[str, float], dict[str, float]]:
    """Return the measures of all frames, and their drift, of a video that was observed without facts.

    All lie in 0..1 but `motion_speed`, which is in frame heights a second; what can't be said is NaN.
    """
    return _renamed(measures(observation, 0, observation.frames)), _renamed(drift(observation))


def _renamed(values: Mapping[str, float]) -> dict[str, float]:
    return {name: values[known] for known, name in GENERAL.items() if name is not None}
