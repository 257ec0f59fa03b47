"""A memory that differs by layer, and by head: each of its stacks serves some heads of some layers."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from torch import Tensor

from kvpack.errors import InvalidOptionError
from kvpack.memory.base import Chunk, Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.plan import Book, Plan
from kvpack.memory.stack import Stack


@dataclass(frozen=True)
class Part:
    """Heads of a layer that one stack serves.

    Args:
        stack: index of the stack.
        heads: indices of the heads, ascending.
    """

    stack: int
    heads: tuple[int, ...]

    @property
    def kind(self) -> tuple[int, int]:
        """The stack and how many heads it serves: parts that are alike in both have one plan and one workspace."""
        return self.stack, len(self.heads)


@dataclass(frozen=True)
class DividedBook(Book):
    """The past in host integers, as each stack sees it."""

    books: tuple[Book, ...] = ()

    def counting(self, seconds: dict[str, float]) -> "DividedBook":
        """Return the same past, of which all stacks count in one dict."""
        return replace(self, seconds=seconds, books=tuple(each.counting(seconds) for each in self.books))


class DividedPlan(Plan):
    """The plans of all stacks for one chunk, one for each number of heads that a stack serves anywhere."""

    def __init__(self, memory: "Divided", book: DividedBook, coming: int, geometry: Geometry) -> None:
        super().__init__(book, coming, geometry)
        layers = memory.parts(geometry)
        kinds = dict.fromkeys(part.kind for layer in layers for part in layer)
        # A stack that serves no layer of this model goes on all the same.
        idle = set(range(len(memory.stacks))) - {stack for stack, _ in kinds}
        kinds.update(dict.fromkeys((stack, geometry.heads) for stack in sorted(idle)))
        self.plans = {
            (stack, heads): memory.stacks[stack].plan(book.books[stack], coming, narrowed(geometry, heads))
            for stack, heads in kinds
        }


class Divided(Memory):
    """Stacks of which each serves some heads of some layers; none of them archives anything.

    Attention is called once for each stack that serves heads of a layer, with these heads, and the outputs are put
    together. Keys and values of a head are held as long as its own stack wants them.

    A subclass is a frozen dataclass that says `stacks` and `shares`.
    """

    composite = in_place = True

    @property
    @abstractmethod
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks; all have chunks of one length and commit alike."""

    #: Of each layer, the index of the stack that serves each head; heads and layers go through it again and again.
    shares: Sequence[Sequence[int]]

    def check(self) -> None:
        """Raise `InvalidOptionError` if stacks do not go together, or a share names none of them."""
        for stack in self.stacks:
            if stack.archives or (stack.chunk_frames, stack.commit) != (self.chunk_frames, self.commit):
                raise InvalidOptionError(
                    f"stack {stack.name} of {self.name} must archive nothing, have chunks of {self.chunk_frames} "
                    f"frames, and commit a {self.commit}, got {stack!r}"
                )
        known = set(range(len(self.stacks)))
        layers = [isinstance(layer, tuple) and layer and _whole(layer) and set(layer) <= known for layer in self.shares]
        if not layers or not all(layers):
            raise InvalidOptionError(
                f"shares must be, for each layer, a list of numbers from 0 to {len(self.stacks) - 1}, one for each "
                f"head, e.g. [[0], [0, 1]], got {self.shares!r}"
            )
        unused = sorted(known.difference(*self.shares))
        if unused:
            raise InvalidOptionError(f"no share of {self.name} names {unused}, so that it would have no effect")

    @cached_property
    def by_head(self) -> bool:  # type: ignore[override]
        """Whether heads can be on several processes: those of a layer are all alike."""
        return all(len(set(layer)) == 1 for layer in self.shares)

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """As many as the stack that replays most."""
        return max(stack.replay_frames for stack in self.stacks)

    def parts(self, geometry: Geometry) -> tuple[tuple[Part, ...], ...]:
        """Return the parts of each layer of a model, by stack.

        Raises:
            InvalidOptionError: if heads of a layer are to differ, but their rotations do so already.
        """
        if not self.by_head and geometry.rotary is not None:
            raise InvalidOptionError(
                f"{self.name} gives heads of a layer different windows, but in this model each head has rotations of "
                "its own, which are not divided; give shares of one number a layer, e.g. [[0], [1]]"
            )
        layers = []
        for layer in range(geometry.layers):
            share = self.shares[layer % len(self.shares)]
            each = [share[head % len(share)] for head in range(geometry.heads)]
            groups = {
                stack: tuple(head for head, one in enumerate(each) if one == stack) for stack in sorted(set(each))
            }
            layers.append(tuple(Part(stack, heads) for stack, heads in groups.items()))
        return tuple(layers)

    def book(self) -> DividedBook:
        """Return the book of an empty past."""
        return DividedBook(books=tuple(stack.book() for stack in self.stacks)).counting({})  # all count in one dict

    def plan(self, book: Book, coming: int, geometry: Geometry) -> DividedPlan:
        """Plan the chunk for all stacks."""
        assert isinstance(book, DividedBook)
        return DividedPlan(self, book, coming, geometry)

    def committed(self, plan: Plan, selected: Sequence[Tensor] = ()) -> DividedBook:
        """Return the book with the planned chunk in it."""
        assert isinstance(plan, DividedPlan)
        plans = {stack: each for (stack, _), each in plan.plans.items()}  # all of a stack say the same in host integers
        return _together([stack.committed(plans[index]) for index, stack in enumerate(self.stacks)])

    def rewound(self, book: Book, frames: int) -> DividedBook:
        """Return the book without its last frames."""
        assert isinstance(book, DividedBook)
        return _together([stack.rewound(each, frames) for stack, each in zip(self.stacks, book.books, strict=True)])

    def replays(self, book: Book, coming: int = 0) -> tuple[int, ...]:
        """Return the longest of the stacks' replays; what a shorter window has dropped by then stays out of it."""
        assert isinstance(book, DividedBook)
        each = [stack.replays(one, coming) for stack, one in zip(self.stacks, book.books, strict=True)]
        return max(each, key=sum)

    def start(self, geometry: Geometry, layer: int) -> tuple[Any, ...]:
        """Return an empty state of each part of a layer."""
        return tuple(
            self.stacks[part.stack].start(narrowed(geometry, len(part.heads)), layer)
            for part in self.parts(geometry)[layer]
        )

    def attend(self, state: Any, chunk: Chunk) -> NoReturn:
        """Refuse: each part of a layer asks its stack (`DividedLayer`)."""
        raise NotImplementedError("a divided memory is attended by its parts")

    def remember(self, state: Any, chunk: Chunk) -> NoReturn:
        """Refuse, as `attend`."""
        raise NotImplementedError("a divided memory remembers by its parts")

    def remember_all(self, committed: Iterable[tuple[Any, Any]]) -> tuple[Any, ...]:
        """Return the states of all layers with the clean chunk in them, in each layer those of all parts."""
        return tuple(
            # A part's chunk was made under the plan of its own stack.
            tuple(chunk.plan.stack.remember(each, chunk) for each, chunk in zip(*layer, strict=True))
            for layer in committed
        )

    def forget(self, state: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
        """Return the states without the newest tokens."""
        # Any of them: `forget` looks at the state alone.
        return tuple(self.stacks[0].forget(each, tokens) for each in state)

    def fork(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return states that do not notice what becomes of these."""
        return tuple(self.stacks[0].fork(each) for each in state)  # so does `fork`


def narrowed(geometry: Geometry, heads: int) -> Geometry:
    """Return the geometry of so many heads of a model."""
    return geometry if heads == geometry.heads else replace(geometry, heads=heads)


def _whole(numbers: tuple[object, ...]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in numbers)


def _together(books: Sequence[Book]) -> DividedBook:
    return DividedBook(books[0].frames, books[0].chunks, books[0].seconds, tuple(books))
