"""Any order of enable, call, stream, send, save, resume, fork, rewind, interrupt and disable, against what must hold.

The model of a stream is how it came about: its seed, and of each chunk the seeds and prompts that were given before it.
Its frames are those of a stream on another pipeline to which nothing else was done.
"""

import gc
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import SMALL_CALL, quiet, seeded
from kvpack.errors import SnapshotError, UnsupportedPipelineError
from kvpack.testing import tiny_wan_pipeline

CALL = {**SMALL_CALL, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 1, "archive_blocks": 2}
SHORT = {**CALL, "num_frames": 13}  # two chunks
SEEDS, PROMPTS = st.integers(0, 1), st.sampled_from(["a blue square", "a green triangle"])
MAYBE = st.none() | PROMPTS


@dataclass(frozen=True)
class Past:
    """Where a stream is: its first seed, what came before each chunk, and what has come since the last."""

    seed: int
    chunks: tuple = ()
    coming: tuple = ()

    def told(self, *events):
        """The same, told of seeds (integers) and prompts (texts); None is nothing."""
        return replace(self, coming=self.coming + tuple(each for each in events if each is not None))

    def drawn(self):
        return Past(self.seed, (*self.chunks, self.coming))


@dataclass
class Following:
    """A stream, the model of it, and those of its snapshots that are kept."""

    stream: object
    past: Past
    folder: Path | None = None
    kept: list = field(default_factory=list)
    failed: bool = False
    epoch: int = 0


class Reference:
    """Chunks of streams to which nothing but their own history is done."""

    def __init__(self):
        self.pipe, self.made, self.live = small().enable_packforcing("packforcing", **SIZES), {}, {}

    def chunk(self, past):
        """The last chunk of a past."""
        if past not in self.made:
            before = replace(past, chunks=past.chunks[:-1])
            stream = self.live.pop(before, None)
            if stream is None:
                stream = self.pipe.packforcing.stream(**CALL, generator=seeded(past.seed))
                for count in range(1, len(past.chunks)):
                    self.draw(stream, replace(past, chunks=past.chunks[:count]))
            self.draw(stream, past)
            self.live[past] = stream
        return self.made[past]

    def draw(self, stream, past):
        for event in past.chunks[-1]:
            if isinstance(event, int):
                stream._run.call["generator"].manual_seed(event)
            else:
                stream._run.set_prompt(event)
        self.made[past] = next(stream)


def small():
    return quiet(tiny_wan_pipeline(num_layers=1))


def traces(pipe):
    """Whatever could be left in a transformer between two chunks."""
    model = pipe.transformer
    processors = [type(each.processor).__name__ for block in model.blocks for each in (block.attn1, block.attn2)]
    own = [name for name in vars(model) if "kvpack" in name]
    hooks = vars(model)["_diffusers_hook"].hooks if "_diffusers_hook" in vars(model) else {}
    return processors, own, len(model._forward_pre_hooks), len(model._forward_hooks), list(hooks)


@pytest.fixture(scope="module", autouse=True)
def _shared():
    """What all examples compare with; it is gone behind the module."""
    Machine.reference, Machine.stock, Machine.pipe = Reference(), small(), small()
    Machine.clean = traces(Machine.stock)
    Machine.forward = Machine.stock(**{**SHORT, "num_frames": 5}, generator=seeded()).frames
    gc.collect()
    gc.freeze()  # so that what an example leaves is found quickly
    yield
    gc.unfreeze()
    del Machine.reference, Machine.stock, Machine.pipe


class Machine(RuleBasedStateMachine):
    """One pipeline, and some streams on it."""

    def __init__(self):
        super().__init__()
        self.enabled, self.epoch = False, 0
        self.streams, self.refs, self.fault = [], [], None
        self.root = Path(tempfile.mkdtemp())
        self.folders = map(str, count())

    def teardown(self):
        while self.streams:
            self.streams.pop().stream.close()
        self.disable()
        self.looks_stock()
        shutil.rmtree(self.root)
        gc.collect()
        assert not [each for each in self.refs if each() is not None]

    def callback(self, pipe, step, timestep, tensors):
        if self.fault is not None:
            raise self.fault
        return tensors

    def follow(self, stream, past):
        self.streams.append(Following(stream, past, epoch=self.epoch))
        self.refs.append(weakref.ref(stream._run))

    def advance(self, each, prompt=None):
        each.past = each.past.told(prompt).drawn()
        assert torch.equal(each.stream.send(prompt), self.reference.chunk(each.past))

    def one(self, data, alive=False):
        found = [each for each in self.streams if not (alive and each.failed)]
        return data.draw(st.sampled_from(found)) if found else None

    # The pipeline

    @initialize(seed=SEEDS)
    def start(self, seed):
        self.enable()
        self.begin(seed)

    @rule()
    def enable(self):
        self.pipe.enable_packforcing("packforcing", **SIZES)
        self.enabled, self.epoch = True, self.epoch + 1

    @precondition(lambda self: self.enabled)
    @rule(again=st.booleans())
    def disable(self, again=False):
        self.pipe.disable_packforcing()
        self.enabled = False
        made = self.pipe(**{**SHORT, "num_frames": 5}, generator=seeded()).frames
        assert torch.equal(made, self.forward)
        if again:
            self.enable()

    @precondition(lambda self: self.enabled)
    @rule(seed=SEEDS)
    def call(self, seed):
        made = self.pipe(**SHORT, generator=seeded(seed)).frames
        first, second = Past(seed).drawn(), Past(seed).drawn().drawn()
        assert torch.equal(made, torch.cat([self.reference.chunk(each) for each in (first, second)], dim=2))

    @precondition(lambda self: self.enabled)
    @rule(error=st.sampled_from([KeyboardInterrupt, ZeroDivisionError]))
    def call_that_fails(self, error):
        self.fault = error()
        with pytest.raises(error):
            self.pipe(**SHORT, callback_on_step_end=self.callback)
        self.fault = None

    # Streams

    @precondition(lambda self: self.enabled and len(self.streams) < 4)
    @rule(seed=SEEDS)
    def begin(self, seed):
        stream = self.pipe.packforcing.stream(**CALL, generator=seeded(seed), callback_on_step_end=self.callback)
        self.follow(stream, Past(seed))

    @rule(data=st.data(), prompt=MAYBE, chunks=st.integers(1, 3))
    def draw(self, data, prompt, chunks):
        each = self.one(data)
        if each is None:
            return
        if not self.enabled:
            with pytest.raises(UnsupportedPipelineError, match="disabled while a stream was open"):
                each.stream.send(prompt)
            return
        if each.failed:
            with pytest.raises(StopIteration):
                each.stream.send(prompt)
            return
        for number in range(chunks):
            self.advance(each, prompt if number == 0 else None)
        if each.epoch == self.epoch:
            stats = self.pipe.packforcing.stats()
            assert (stats["chunks"], stats["frames"]) == (len(each.past.chunks), 2 * len(each.past.chunks))

    @precondition(lambda self: self.enabled)
    @rule(data=st.data(), error=st.sampled_from([KeyboardInterrupt, ZeroDivisionError]))
    def interrupt(self, data, error):
        if (each := self.one(data, alive=True)) is None:
            return
        self.fault = error()
        with pytest.raises(error):
            next(each.stream)
        self.fault, each.failed = None, True

    @precondition(lambda self: self.enabled)
    @rule(data=st.data())
    def save(self, data):
        if (each := self.one(data)) is None:
            return
        folder = each.folder or self.root / next(self.folders)
        if each.failed:
            with pytest.raises(SnapshotError, match="between two chunks only"):
                each.stream.save(folder)
            return
        each.stream.save(folder)
        each.folder, each.kept = folder, [*each.kept, each.past][-2:]

    @precondition(lambda self: self.enabled and len(self.streams) < 4)
    @rule(data=st.data())
    def resume(self, data):
        if (each := self.one(data)) is None or not each.kept:
            return
        self.follow(self.pipe.packforcing.resume(each.folder, callback_on_step_end=self.callback), each.kept[-1])

    @precondition(lambda self: self.enabled and len(self.streams) < 4)
    @rule(data=st.data(), seed=st.none() | SEEDS, prompt=MAYBE, drawn=st.booleans())
    def fork(self, data, seed, prompt, drawn):
        if (each := self.one(data)) is None:
            return
        if each.failed:
            with pytest.raises(SnapshotError, match="between two chunks only"):
                each.stream.fork(seed=seed)
            return
        self.follow(each.stream.fork(seed=seed, prompt=prompt), each.past.told(seed, prompt))
        if drawn:
            self.advance(self.streams[-1])
            self.advance(each)

    @precondition(lambda self: self.enabled)
    @rule(data=st.data(), chunks=st.integers(0, 4), seed=st.none() | SEEDS, prompt=MAYBE)
    def rewind(self, data, chunks, seed, prompt):
        if (each := self.one(data)) is None:
            return
        behind = {len(past.chunks): past for past in each.kept}
        wanted = len(each.past.chunks) - chunks
        if wanted not in behind:
            with pytest.raises(SnapshotError, match=f"no snapshot is kept {chunks} chunks back"):
                each.stream.rewind(chunks, seed=seed)
            return
        each.stream.rewind(chunks, seed=seed, prompt=prompt)
        self.refs.append(weakref.ref(each.stream._run))
        past = behind[wanted]
        last = max(index for index, one in enumerate(each.kept) if one is past)
        each.kept, each.past, each.failed = each.kept[: last + 1], past.told(seed, prompt), False
        each.epoch = self.epoch
        self.advance(each)

    @rule(data=st.data())
    def close(self, data):
        if (each := self.one(data)) is not None:
            each.stream.close()
            self.streams.remove(each)

    @invariant()
    def looks_stock(self):
        assert traces(self.pipe) == self.clean


class TestFast(Machine.TestCase):
    settings = settings(max_examples=15, stateful_step_count=15)


@pytest.mark.slow
class TestSlow(Machine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40)
