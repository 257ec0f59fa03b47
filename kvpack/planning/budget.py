"""The memory that a budget holds: a table of steps, from what costs nothing to what costs most, taken until it fits."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context
from itertools import pairwise, takewhile
from typing import Any

from kvpack.errors import BudgetError, InvalidOptionError, plain, require_int
from kvpack.generation.chunks import with_chunk_frames
from kvpack.generation.run import Run
from kvpack.memory.base import Memory
from kvpack.memory.codec import Tier
from kvpack.memory.costs import channels_of
from kvpack.memory.geometry import Geometry
from kvpack.memory.stack import ROLES, Stack
from kvpack.planning.resident import most_resident
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import NamedStack

#: Options that count latent frames, which shrink together and in whole chunks.
_WINDOWS = ("window_frames", "budget_frames", "context_frames", "sink_frames", "recent_frames")
_TO_HALF = (7 / 8, 6 / 8, 5 / 8, 4 / 8)
_TO_LEAST = (3 / 8, 2 / 8, 1 / 8, 0.0)


@dataclass(frozen=True)
class Step:
    """Options that are changed together, and what that costs.

    Args:
        cost: in the reader's words.
        options: their names.
        values: what each becomes, mildest first.
        shares: or which shares of what was asked for they become, mildest first.
    """

    cost: str
    options: tuple[str, ...]
    values: tuple[Any, ...] = ()
    shares: tuple[float, ...] = ()

    def changes(self, free: Mapping[str, Any], chunk_frames: int) -> Iterator[dict[str, Any]]:
        """Yield the changes of the options that may be changed, mildest first, where there are any."""
        mine = {name: free[name] for name in self.options if name in free}
        found = [dict.fromkeys(mine, value) for value in self.values]
        found += [{name: _share(name, mine[name], share, chunk_frames) for name in mine} for share in self.shares]
        changed = [{name: value for name, value in each.items() if value != mine[name]} for each in found]
        yield from (changes for before, changes in pairwise([{}, *changed]) if changes != before)  # drops repeated ones


Taken = tuple[Step, dict[str, Any]]
#: The order of preference: what loses least comes first. Each step is taken only as far as it must be.
STEPS = (
    Step("the same bits; what is chosen is copied once a chunk and layer", ("tier",), ("host",)),
    Step("archived blocks are rounded to 8 bits", ("store",), ("int8",)),
    Step("archived blocks are rounded to 4 bits", ("store",), ("int4",)),
    Step("fewer compressed blocks are attended", ("topk",), shares=_TO_HALF),
    Step("fewer tokens of each block are kept", ("keep_tokens",), shares=_TO_HALF),
    Step("old blocks are forgotten earlier", ("archive_blocks",), shares=_TO_HALF),
    Step("windows are shorter", _WINDOWS, shares=_TO_HALF),
    Step("few compressed blocks are attended", ("topk",), shares=_TO_LEAST),
    Step("few tokens of each block are kept", ("keep_tokens",), shares=_TO_LEAST),
    Step("old blocks are forgotten early", ("archive_blocks",), shares=_TO_LEAST),
    Step("windows are short", _WINDOWS, shares=_TO_LEAST),
    Step("the first frames are not kept", ("sink_frames",), (0,)),
)


@dataclass(frozen=True)
class Choice:
    """What a budget has chosen for one generation.

    Args:
        memory: the policy.
        held_bytes: the most that it will hold behind any chunk, in all guidance branches.
        budget_bytes: what it may hold.
        changes: options that were changed.
        lines: each change, from which bytes to which, and what it costs; none if nothing had to change.
    """

    memory: Memory
    held_bytes: int
    budget_bytes: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def tier(self) -> Tier:
        """Where compressed blocks are archived."""
        return self.memory.tier if isinstance(self.memory, Stack) else "device"

    def __str__(self) -> str:
        held, budget = gigabytes(self.held_bytes), gigabytes(self.budget_bytes)
        return "\n".join([*self.lines, f"{self.memory.name} holds at most {held} of {budget}"])


@dataclass(frozen=True)
class Budget:
    """Bytes that a generation's memory may hold beside the model, whatever its length, batch and guidance.

    Options that the user gave himself are kept, and so is a memory that was given whole. The others are changed by
    `STEPS`, in that order, until it fits; then each change but the last is taken back as far as there is room. What is
    held is `stats()["resident_bytes"]`, behind every chunk; under context parallelism that of all processes together.

    Args:
        gigabytes: of 10^9 bytes.
        named: the stack by name, which can be made with other options; None if it was given whole.

    Raises:
        InvalidOptionError: if there is nothing to spend.
    """

    gigabytes: float
    named: NamedStack | None = None

    def __post_init__(self) -> None:
        given = plain(self.gigabytes)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise InvalidOptionError(f"budget_gb must be a number of gigabytes > 0, e.g. 4, got {self.gigabytes!r}")

    @property
    def bytes(self) -> int:
        """The same in bytes."""
        return round(float(self.gigabytes) * 1e9)

    def for_run(self, run: Run, conditioning: Mapping[str, Any]) -> Choice:
        """Return the memory for a generation that is about to begin.

        Args:
            run: the generation.
            conditioning: what the transformer is told, by guidance branch, a row for each video.
        """
        chunk_frames, first, chunks = run.stack.chunk_frames, run.first_frames, run.count
        if first > chunk_frames:  # it is committed in two
            first, chunks = first - chunk_frames, None if chunks is None else chunks + 1
        return self.choice(
            run.stack,
            run.new_geometry(*run.frame_size()),
            chunks,
            batch=len(next(iter(conditioning.values()))),
            branches=len(conditioning) * run.adapter.memories(run.pipeline),
            channels=channels_of(run.adapter.latent_shape(run.adapter.configs(run.pipeline))),
            first_frames=None if first == chunk_frames else first,
        )

    def choice(
        self,
        asked: Memory,
        geometry: Geometry,
        chunks: int | None,
        *,
        batch: int = 1,
        branches: int = 1,
        channels: int = 16,
        first_frames: int | None = None,
    ) -> Choice:
        """Return the memory that fits with the least change; a pure function of what is given.

        Args:
            asked: the memory as it was asked for.
            geometry: the model at the video's size.
            chunks: of the video; None is one without end.
            batch: videos generated together.
            branches: guidance branches.
            channels: of a latent.
            first_frames: latent frames of the first chunk, if it is shorter than the rest.

        Raises:
            BudgetError: if nothing fits; it says the least that would do.
            InvalidOptionError: if there is nothing to make.
        """
        for name, count in {"chunks": 1 if chunks is None else chunks, "batch": batch, "branches": branches}.items():
            require_int(name, count, minimum=1)
        free = {} if self.named is None else _free(self.named, asked, geometry, chunks)

        def made(taken: list[Taken]) -> Memory:
            changes = _merged(taken)
            if self.named is None or not changes:
                return asked
            return with_chunk_frames(self.named.made(**changes), asked.chunk_frames, "chunk_frames")

        geometry = replace(geometry, frames=chunks and chunks * asked.chunk_frames)  # the last one is made whole
        known: dict[frozenset[tuple[str, Any]], float] = {}  # rehearsed once for each set of options

        def held(taken: list[Taken]) -> float:
            changes = frozenset(_merged(taken).items())
            if changes not in known:
                try:
                    most = most_resident(geometry, made(taken), chunks, batch, channels, first_frames)
                except InvalidOptionError:  # there is no such memory
                    most = None
                known[changes] = math.inf if most is None else most.bytes(geometry.layers) * branches
            return known[changes]

        taken = _taken(held, lambda step: step.changes(free, asked.chunk_frames), self.bytes)
        if (least := held(taken)) > self.bytes:
            said = f"{_videos(batch, branches)}, {geometry.grid[0]}x{geometry.grid[1]} tokens a frame"
            raise BudgetError(self._refusal(asked, least, _merged(taken), said), least)
        steps = [held(taken[:count]) for count in range(len(taken) + 1)]
        lines, now = [], free
        for (step, changes), before, after in zip(taken, steps, steps[1:], strict=False):  # `steps` has one more
            told = ", ".join(f"{name} {now[name]} -> {value}" for name, value in changes.items())
            lines.append(f"{told}: {gigabytes(before)} -> {gigabytes(after)}; {step.cost}")
            now = {**now, **changes}
        return Choice(made(taken), int(steps[-1]), self.bytes, _merged(taken), tuple(lines))

    def _refusal(self, asked: Memory, least: float, changes: Mapping[str, Any], said: str) -> str:
        if least == math.inf:
            return f"{asked.name} grows without end, which no budget holds; give num_frames, or a bounded memory"
        told = ", ".join(f"{name}={value}" for name, value in changes.items()) or "nothing left to change"
        kept = sorted(self.named.asked) if self.named else ["all options of a memory that is given whole"]
        pinned = f"; kept as they were given: {', '.join(kept)}" if kept else ""
        return (
            f"budget_gb={self.gigabytes:g} is too little for {asked.name}: the least that would do is budget_gb="
            f"{_rounded_up(least)} ({said}; {told}{pinned}). Give that, a smaller size, or another memory"
        )


def gigabytes(count: float) -> str:
    """Format a count of bytes.

    >>> gigabytes(3987210240)
    '3.987 GB'
    """
    return "without end" if count == math.inf else f"{count / 1e9:.4g} GB"


def _taken(
    held: Callable[[list[Taken]], float], candidates: Callable[[Step], Iterator[dict[str, Any]]], room: int
) -> list[Taken]:
    """Return the steps that are taken, each as far as it must be; all that help if even they do not fit."""
    taken: list[Taken] = []
    now = held(taken)
    for step in STEPS:
        if now <= room:
            break
        furthest = None
        for changes in candidates(step):
            found = held([*taken, (step, changes)])
            if found < now:  # a step that frees nothing is not taken
                furthest, now = (step, changes), found
            if now <= room:
                break
        taken += [furthest] if furthest else []
    if now > room:
        return taken
    for index in reversed(range(len(taken) - 1)):  # from what costs most; the last is as mild as it can be
        step, far = taken[index]
        for milder in ({}, *takewhile(far.__ne__, candidates(step))):
            trial = [*taken[:index], (step, milder), *taken[index + 1 :]]
            if held(trial) <= room:
                taken = trial
                break
    return [each for each in taken if each[1]]  # steps taken back whole


def _merged(taken: list[Taken]) -> dict[str, Any]:
    return {name: value for _, changes in taken for name, value in changes.items()}


def _free(named: NamedStack, asked: Memory, geometry: Geometry, chunks: int | None) -> dict[str, Any]:
    """Return the options of the steps that the stack takes and the user did not give, and what they are."""
    roles = [getattr(asked, role) for role in ROLES] if isinstance(asked, Stack) else []
    options = dict.fromkeys(option for step in STEPS for option in step.options)
    taken = registry().taken(named.name, options)
    stored = {"tier", "store"} if isinstance(asked, Stack) and asked.archives else set()  # options of every archive
    found: dict[str, Any] = {}
    for option in options:
        holder = next((each for each in (asked, *roles) if hasattr(each, option)), None)
        value = named.default(option) if holder is None else getattr(holder, option)
        if option == "store":
            value = getattr(value, "name", None)
        elif option == "archive_blocks" and chunks is not None:  # or halving it might change nothing
            value = chunks if value is None else min(value, chunks)
        elif option == "keep_tokens" and isinstance(asked, Stack) and holder is not None:
            value = asked.compressor.span(0, asked.chunk_frames, geometry.grid).tokens
        if (option in taken or option in stored) and option not in named.asked and isinstance(value, int | str):
            found[option] = value
    return found


def _share(option: str, asked: int, share: float, chunk_frames: int) -> int:
    """Return a share of a number, rounded up to whole chunks where it counts frames, and to one at least."""
    unit = chunk_frames if option in _WINDOWS else 1
    return min(asked, unit * max(1, math.ceil(asked * share / unit)))  # rounding up must not make more of it


def _videos(batch: int, branches: int) -> str:
    return f"{batch} video{'s' * (batch > 1)}, {branches} guidance branch{'es' * (branches > 1)}"


def _rounded_up(count: float) -> str:
    """Return gigabytes in three digits that are at least so many bytes.

    >>> _rounded_up(3_987_210_240), _rounded_up(219_000)
    ('3.99', '0.000219')
    """
    return f"{Context(prec=3, rounding=ROUND_CEILING).create_decimal(int(count)).scaleb(-9):f}"
