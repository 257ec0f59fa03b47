"""One generation of a `SanaWMLTX2Refiner`: the upstream call once a block, a commit forward after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpack.adapters.sana_wm.call import Text, checked, encoded, spoken, with_chunks
from kvpack.adapters.sana_wm.denoiser import SanaWMMemory
from kvpack.adapters.sana_wm.rope import LTX2Rotary
from kvpack.adapters.wan.call import rewinding
from kvpack.errors import NonFiniteLatentsError, UnsupportedPipelineError
from kvpack.generation.adapter import Adapter, Chunk, Run
from kvpack.generation.prompts import Prompt
from kvpack.generation.stats import branch_stats
from kvpack.memory.base import Memory


class SanaWMRun(Run):
    """Refines a video block by block.

    Args:
        adapter: the family's adapter.
        pipeline: a `SanaWMLTX2Refiner`.
        stack: the memory policy; its chunks are as long as the call's `block_size`.
        arguments: all arguments of the pipeline's call.
        streaming: whether blocks are wanted as they come.

    Raises:
        InvalidOptionError: if an argument cannot work.
        NonFiniteLatentsError: if `sana_latent` holds NaN or infinity.
    """

    def __init__(
        self, adapter: Adapter, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool
    ) -> None:
        schedule = spoken(arguments["prompt"])
        call = checked(pipeline, arguments, streaming=streaming)
        self.adapter, self.pipeline, self.arguments = adapter, pipeline, call
        self.stack = with_chunks(stack, call["block_size"])
        adapter.check_stack(pipeline, self.stack)
        self.sink_frames, self.block_frames = call["sink_size"], call["block_size"]
        batch, _, self.total_frames, height, width = call["sana_latent"].shape
        config = pipeline.transformer.config
        _, rows, columns = config.vae_scale_factors
        geometry = adapter.geometry({"transformer": config}, height * rows, width * columns, pipeline.transformer.dtype)
        assert isinstance(geometry.rotary, LTX2Rotary)
        geometry = replace(geometry, rotary=replace(geometry.rotary, fps=float(call["fps"])))
        text = encoded(pipeline, schedule[0].prompt, batch)
        self.memory = SanaWMMemory(pipeline, self.stack, geometry, text, float(call["fps"]))
        self.sessions = {"cond": self.memory.session}
        #: What is to come: the block that it begins with, what is heard, and whether the scene changes.
        long, first = config.vae_scale_factors[0], self.sink_frames + self.block_frames
        self._turns = [
            (shot.chunk(call["fps"], self.block_frames, long, first), self._text(shot.prompt), shot.cut)
            for shot in schedule[1:]
        ]
        self._bar: Any = None

    def chunks(self) -> Iterator[Chunk]:
        """Refines block after block, the first one behind the raw sink; between two the pipeline is the stock one."""
        starts = range(self.sink_frames, self.total_frames, self.block_frames)
        self._bar = self.pipeline._kvpack_base.progress_bar(self.pipeline, total=len(starts))
        for index, start in enumerate(starts):
            while self._turns and self._turns[0][0] <= index:
                self._turn(*self._turns.pop(0)[1:])
            yield self._generate(index, start)

    def turn(self, prompt: Prompt, *, cut: bool = False) -> None:
        """Another prompt, or another scene, from the next block on; what a schedule says for later still holds."""
        (shot,) = spoken([(0, prompt)])
        self._turn(self._text(shot.prompt), cut)

    def decode(self, latents: Tensor) -> Tensor:
        """Refused: the decoder looks at frames to come."""
        raise UnsupportedPipelineError("the refiner's decoder looks at frames to come; decode the whole video at once")

    def decoded(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Pixels in [-1, 1] of the whole video at once, without the sink, as upstream's."""
        with torch.no_grad(), self.memory.timed("decode"):
            pixels = self.pipeline._decode_latents(torch.cat(latents, dim=2))[:, :, self.sink_frames :]
        return iter([pixels])

    def postprocess(self, pixels: Tensor) -> Any:
        """Frames in the call's `output_type`, batch first."""
        return self.pipeline.video_processor.postprocess_video(pixels, output_type=self.arguments["output_type"])

    def output(self, frames: Any) -> Any:
        """What the pipeline's call returns: latents of all videos, or the frames of one."""
        return frames if self.arguments["output_type"] == "latent" else frames[0]

    def advance(self) -> None:
        """One block is done."""
        self._bar.update()

    def close(self) -> None:
        """Closes the progress bar and lets offloading free the models."""
        if self._bar is not None:
            self._bar.close()
        self.pipeline.maybe_free_model_hooks()

    def stats(self) -> dict[str, Any]:
        """Tokens, bytes and seconds of each phase."""
        return branch_stats(self.stack.name, self.sessions, self.memory.seconds)

    def _text(self, prompt: Prompt | None) -> Text:
        return encoded(self.pipeline, prompt, self.arguments["sana_latent"].shape[0])

    @torch.no_grad()
    def _turn(self, text: Text, cut: bool) -> None:
        with self._driving():
            self.memory.turn(text, cut=cut)

    @torch.no_grad()
    def _generate(self, index: int, start: int) -> Chunk:
        given = self.arguments["sana_latent"]
        sink, block = given[:, :, : self.sink_frames], given[:, :, start : start + self.block_frames]
        with self._driving():
            if index == 0:
                transformer = self.pipeline.transformer
                self.memory.sink(sink.to(self.pipeline._execution_device, transformer.dtype).contiguous())
            latents = self._reviewed(index, torch.cat([sink, block], dim=2))
            refined = latents[:, :, self.sink_frames :]
            if refined.shape[2] == self.block_frames:  # nothing follows a shorter one
                self.memory.commit(refined)
        return Chunk(index, latents if index == 0 else refined, None)

    def _reviewed(self, index: int, raw: Tensor) -> Tensor:
        """Sink and refined block that the memory accepts; rows that it vetoes are refined again of the same noise."""
        session, rewind = self.memory.session, rewinding(self.arguments["generator"])
        latents = self._refined(index, raw)
        for _ in range(self.stack.max_retries):
            vetoed = session.review(latents[:, :, self.sink_frames :])
            if vetoed is None:
                return latents
            self._bar.total += 1
            rewind()
            again = self._refined(index, raw)
            latents = torch.where(vetoed[:, None, None, None, None].to(latents.device), again, latents)
        session.settle()
        return latents

    def _refined(self, index: int, raw: Tensor) -> Tensor:
        """The upstream call for one block, which is spared the encoder and the commits."""
        pipeline, memory = self.pipeline, self.memory
        memory.begin(raw.shape[2] - self.sink_frames)
        call = {**self.arguments, "sana_latent": raw, "output_type": "latent"}
        shadows: dict[str, Callable[..., Any]] = {
            "_encode_prompt": lambda *_, **__: (memory.text.embeds, memory.text.mask),
            "_capture_block_kv": _skip,
        }
        with memory.timed("denoise"), _shadowed(pipeline, shadows):
            latents: Tensor = pipeline._kvpack_base.__call__(pipeline, **call)
        if not bool(latents.isfinite().all()):
            memory.session.check_policies()  # a policy is the likelier cause
            raise NonFiniteLatentsError(
                f"block {index} holds NaN or infinity after denoising; nothing of it was committed. "
                "Check the weights and the dtype"
            )
        return latents

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """Kvpack's processors in the transformer, and the pipeline's own bar and freeing silenced, for one block."""
        enabled = vars(self.pipeline).get("_kvpack")
        if enabled is None:
            raise UnsupportedPipelineError("packforcing was disabled while a stream was open; close the stream first")
        self.adapter.check(self.pipeline)  # again for each block: anything may be switched on between two of them
        enabled.driving = self
        try:
            with self.memory.attached():
                yield
        finally:
            enabled.driving = None


@contextmanager
def _shadowed(pipeline: Any, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Lets a pipeline's call find other methods on the instance than on its class."""
    before = dict(vars(pipeline))
    vars(pipeline).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(pipeline)[name]
        vars(pipeline).update({name: before[name] for name in methods if name in before})


def _skip(*, clean_block: Tensor, kv_cache: Any, **_: Any) -> None:
    """Upstream's capture of keys and values, which kvpack keeps instead: upstream reads back none at all."""
    nothing = clean_block.new_empty(clean_block.shape[0], 0, 1)
    for index in range(len(kv_cache)):
        kv_cache.get(index).store_captured_pre_rope(nothing, nothing)
        kv_cache.get(index).store_captured_post_rope(nothing, nothing)
