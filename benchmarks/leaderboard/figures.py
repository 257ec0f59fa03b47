"""Scores of what was observed: videos up to each length, bins of 5 s, and differences of two memories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.leaderboard.bootstrap import RESAMPLES, Array, Interval, mean, ratio, ratio_difference
from benchmarks.leaderboard.lengths import BIN, bins, frames, lengths
from benchmarks.leaderboard.store import COSTS, Result
from benchmarks.report import Score
from benchmarks.toyworld.world import FPS
from kvpack.evaluation import METRICS, RECALL, measures, recall

RELATIVE = "dynamic_degree / truth"
MOTION = "dynamic_degree"
EVENTS = "recall_events"  # returns that only the middle can know, in all videos together


@dataclass(eq=False)
class Measured:
    """The rollouts of one subject.

    Args:
        name: of the subject.
        seconds: length of its videos.
        results: one a seed.
    """

    name: str
    seconds: int
    results: Sequence[Result]
    _known: dict[tuple[int, int], dict[str, Array]] = field(default_factory=dict)
    _returned: dict[int, dict[str, tuple[Array, Array]]] = field(default_factory=dict)

    def between(self, begin: int, end: int) -> dict[str, Array]:
        """Return every measure of some frames, [captions, seeds]."""
        if (begin, end) not in self._known:
            found = [[measures(each, begin, end) for each in result.observations] for result in self.results]
            self._known[begin, end] = {
                name: np.array([[video[name] for video in seed] for seed in found]).T for name in METRICS
            }
        return self._known[begin, end]

    def whole(self, seconds: int) -> dict[str, Array]:
        """Return every measure of the videos up to a length, and its `drift`: the last five seconds less the first."""
        end, length = frames(seconds), BIN * FPS
        found = dict(self.between(0, end))
        if end >= 2 * length:
            first, last = self.between(0, length), self.between(end - length, end)
            found |= {f"drift {name}": last[name] - first[name] for name in METRICS}
        return found

    def returned(self, seconds: int) -> dict[str, tuple[Array, Array]]:
        """Return sums of the scores of all returns up to a length, and their number, each [captions, seeds].

        Their ratio is a mean over returns: videos with many of them count for more.
        """
        end = frames(seconds)
        if end not in self._returned:
            found = [[recall(each, 0, end) for each in result.observations] for result in self.results]
            self._returned[end] = {
                name: (
                    np.array([[float(sum(video[name])) for video in seed] for seed in found]).T,
                    np.array([[float(len(video[name])) for video in seed] for seed in found]).T,
                )
                for name in RECALL
            }
        return self._returned[end]

    @property
    def commit(self) -> str:
        """The commits that made the videos."""
        return " ".join(sorted({result.about["commit"] for result in self.results}))

    def score(self, seconds: int, metric: str, interval: Interval) -> Score:
        """Return a figure of this subject."""
        return Score(
            self.name, seconds, metric, interval.value, interval.low, interval.high, interval.n, commit=self.commit
        )


def scores(measured: Measured, truth: Measured | None, resamples: int = RESAMPLES) -> Iterator[Score]:
    """Yield all figures of a subject at every length that its videos have; those without a value are left out."""
    for seconds in lengths(measured.seconds):
        found = measured.whole(seconds)
        for metric, values in found.items():
            if interval := mean(values, resamples):
                yield measured.score(seconds, metric, interval)
        yield from _returns(measured, seconds, resamples)
        if truth is not None and truth.seconds >= seconds:
            interval = ratio(found[MOTION], truth.whole(seconds)[MOTION], resamples)
            if interval:
                yield measured.score(seconds, RELATIVE, interval)
        yield from _costs(measured, seconds)


def over_time(measured: Measured, resamples: int = RESAMPLES) -> Iterator[Score]:
    """Yield all figures of each bin of 5 s; `seconds` is its end."""
    for index, (begin, end) in enumerate(bins(measured.seconds)):
        for metric, values in measured.between(begin, end).items():
            if interval := mean(values, resamples):
                yield measured.score((index + 1) * BIN, metric, interval)


def differences(hero: Measured, rival: Measured, resamples: int = RESAMPLES) -> Iterator[Score]:
    """Yield `hero` less `rival` in every figure, over videos of the same caption and noise, at every common length."""
    both = Measured(f"{hero.name} minus {rival.name}", min(hero.seconds, rival.seconds), hero.results)
    for seconds in lengths(both.seconds):
        mine, theirs = hero.whole(seconds), rival.whole(seconds)
        for metric, values in mine.items():
            if interval := mean(values - theirs[metric], resamples):
                yield both.score(seconds, metric, interval)
        ours, others = hero.returned(seconds), rival.returned(seconds)
        for metric in RECALL:
            if interval := ratio_difference(ours[metric], others[metric], resamples):
                yield both.score(seconds, metric, interval)


def intervals(rows: Sequence[Score]) -> Mapping[tuple[str, int, str], Interval]:
    """Return figures by subject, seconds and metric."""
    return {(row.subject, row.seconds, row.metric): Interval(row.value, row.low, row.high, row.n) for row in rows}


def _returns(measured: Measured, seconds: int, resamples: int) -> Iterator[Score]:
    """Yield recall and what it is told from, and how many returns it is the mean of."""
    found = measured.returned(seconds)
    for metric, (scores, counts) in found.items():
        if interval := ratio(scores, counts, resamples):
            yield measured.score(seconds, metric, interval)
    if events := float(found["recall"][1].sum()):
        yield measured.score(seconds, EVENTS, Interval(events, events, events, found["recall"][1].size))


def _costs(measured: Measured, seconds: int) -> Iterator[Score]:
    """Yield the costs of the last chunk of a video; seconds, of its last five chunks, only where it ran alone."""
    for index, name in enumerate(COSTS):
        timed = name.startswith("seconds")
        chosen = [result for result in measured.results if len(result.costs) and (result.about["alone"] or not timed)]
        values = [
            float(result.costs[max(0, seconds - BIN) if timed else seconds - 1 : seconds, index].mean())
            for result in chosen
        ]
        if values:
            interval = Interval(float(np.mean(values)), min(values), max(values), len(values))
            yield measured.score(seconds, name, interval)
