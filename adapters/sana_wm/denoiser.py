"""The refiner's transformer over kvpack's memory: each forward's phase told, each chunk committed."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from torch import Tensor

from kvpack.adapters.sana_wm.attention import attached
from kvpack.adapters.sana_wm.call import Text
from kvpack.errors import GradientError
from kvpack.generation.replay import CleanFrames
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import AttendingLayer
from kvpack.memory.session import Session, finish_commits

#: Modes of upstream's own cache, by which it says what a forward is: raw sink frames, a denoising step, a clean block.
_SINK, _DENOISE, _CLEAN = "capture_pre_rope", "inject", "inject_and_capture_post_rope"


class SanaWMMemory:
    """Memory of one generation.

    Args:
        pipeline: a `SanaWMLTX2Refiner`.
        stack: the memory policy.
        geometry: of its transformer.
        text: what it hears.
        fps: pixel frames a second.
    """

    def __init__(self, pipeline: Any, stack: Memory, geometry: Geometry, text: Text, fps: float) -> None:
        self.pipeline, self.stack, self.text, self.fps = pipeline, stack, text, fps
        self.session = Session(stack, geometry)
        self.seconds = {"denoise": 0.0, "commit": 0.0, "decode": 0.0}
        self._clean = CleanFrames(stack.replay_frames)
        self._step, self._committing = 0, torch.empty(0)

    def attached(self) -> AbstractContextManager[None]:
        """Kvpack's processors in the transformer."""
        return attached(self.pipeline.transformer, self._memory_for)

    def begin(self, frames: int) -> None:
        """The coming forwards are denoising steps of a chunk of so many frames."""
        if frames != self.session.coming_frames:
            self.session.expect(frames)
        self._step = 0

    def sink(self, latents: Tensor) -> None:
        """Commits the raw frames that a video begins with; they attend nothing but themselves."""
        self.begin(latents.shape[2])
        with self._whole():
            self._forward(latents, _SINK)
            finish_commits([self.session])
        self._clean = self._clean.with_chunk(latents, {}, None)

    def commit(self, latents: Tensor) -> None:
        """The clean chunk at sigma 0: the only write to history.

        Args:
            latents: the chunk's clean latents.
        """
        clean = self._clean.with_chunk(latents, {}, None)
        with self._whole():
            if self.stack.replays_always:
                self._replay(clean, latents.shape[2])
            else:
                if self.stack.commit == "rerun":
                    self._forward(latents, _CLEAN)
                finish_commits([self.session])
        self._clean = clean

    def turn(self, text: Text, *, cut: bool = False) -> None:
        """Goes on under another prompt: the memory is told, and what of it is to be computed anew is.

        Args:
            text: what is heard from now on.
            cut: whether a new scene begins.
        """
        before = self.text
        try:
            with self._whole():
                self.text = text
                self.session.tell("prompt-changed")
                if cut:
                    self.session.tell("scene-cut")
                self._replay(self._clean)
        except BaseException:
            self.text = before
            raise

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to those of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All of it is committed or nothing."""
        session: Any = self.session
        past = session.past
        try:
            yield
        except BaseException:
            session.adopt(past)
            raise

    def _replay(self, clean: CleanFrames, coming: int = 0) -> None:
        """Commits the last frames again; the last of them for the first time, if a chunk is coming."""
        plan = self.session.replays(coming)
        if not plan:
            return
        self.session.rewind(sum(plan) - coming)
        for part in clean.last(sum(plan)).split(plan, dim=2):
            self._forward(part, _CLEAN)
            finish_commits([self.session])

    def _forward(self, latents: Tensor, mode: str) -> None:
        """The pipeline's own forward of clean frames, whose cache stays empty."""
        pipeline = self.pipeline
        first = self.session.frames
        self._committing = latents
        with self.timed("commit"), torch.no_grad():
            pipeline._capture_block_kv(
                clean_block=latents,
                frame_positions=list(range(first, first + latents.shape[2])),
                prompt_embeds=self.text.embeds,
                prompt_attention_mask=self.text.mask,
                fps=self.fps,
                kv_cache=SanaWMRefinerKVCache(len(pipeline.transformer.transformer_blocks)),
                kv_cache_mode=mode,
                device=latents.device,
            )

    def _memory_for(self, mode: str) -> Sequence[AttendingLayer]:
        """Tells the session what the coming forward is."""
        if torch.is_grad_enabled():
            raise GradientError(
                "gradients are enabled inside generation, where recomputation would commit a chunk twice; "
                "remove torch.enable_grad() and torch.set_grad_enabled(True) from hooks and wrappers"
            )
        if mode == _DENOISE:
            self.session.denoise(self._step)
            self._step += 1
        else:
            self.session.commit((), self._committing)
        return self.session.layers
