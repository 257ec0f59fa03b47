"""A Wan transformer over kvpack's memory, with the tokens of a latent-space compressor in its commits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from kvpack.adapters.parallel import shard_of
from kvpack.adapters.wan.attention import attached
from kvpack.adapters.wan.compression import (
    appended_tokens,
    check_compressor,
    forward_tokens,
    hidden_tokens,
    project_tokens,
)
from kvpack.adapters.wan.prompt_cache import PromptCache, PromptedLayers
from kvpack.adapters.wan.vae import encode
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError, UnusedOptionError
from kvpack.generation.denoiser import Denoiser
from kvpack.generation.guidance import Guidance
from kvpack.generation.phase import Phase
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import AttendingLayer, LayerCache
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.sharded import require_by_head


class WanDenoiser(Denoiser):
    """A `WanTransformer3DModel` over the sessions of all guidance branches.

    Args:
        pipeline: a `WanPipeline`.
        stack: the memory policy.
        geometry: of its transformer.
        conditioning: text embeddings of each guidance branch, `[batch, tokens, width]`.
        attention_kwargs: passed on to the transformer.
        buffer: what a layer attends; another one lets gradients through.
        prompt: keys and values of the prompt; None where somebody else's code runs between two forwards.

    Raises:
        InvalidOptionError: if the compressor cannot work with this model.
    """

    #: Processor of the family's cross-attentions.
    cross_processor: ClassVar[type] = WanAttnProcessor

    def __init__(
        self,
        pipeline: Any,
        stack: Memory,
        geometry: Geometry,
        conditioning: dict[str, Tensor],
        attention_kwargs: Mapping[str, Any] | None = None,
        buffer: type[LayerCache] = LayerCache,
        prompt: PromptCache | None = None,
    ) -> None:
        check_compressor(pipeline.transformer, stack)
        super().__init__(pipeline, stack, geometry, conditioning, buffer)
        self.attention_kwargs, self.compressor, self.prompt = attention_kwargs, stack.latent_compressor, prompt
        self.shard = shard_of(self.transformer)
        if self.shard is not None:
            require_by_head(stack)
            if buffer.differentiable:
                raise UnsupportedPipelineError("training runs in one process; take enable_parallelism() away")
            if self.writer not in (None, self.transformer):
                raise UnsupportedPipelineError(
                    "a writer commits in one process; set packforcing.writer to None, or take enable_parallelism() away"
                )
        self.guidance = self._guidance()
        self._writers_prompt = None if prompt is None else PromptCache()  # other weights make other keys of one prompt
        if self.writer is not None and stack.commit != "rerun":
            raise UnusedOptionError("writer", f"{stack.name} keeps what the last denoising step computed, not a commit")

    @property
    def writer(self) -> Any:
        """The transformer that commits in the place of the pipeline's own; None if there is none."""
        return getattr(vars(self.pipeline).get("_kvpack"), "writer", None)  # a modular pipeline has no `_kvpack`

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the writer, if there is one, stand in for the transformer, with a prompt's keys and values of its own."""
        if self.writer is None or self.writer is self.transformer:
            yield
            return
        before = self.transformer, self.prompt
        self.transformer, self.prompt = self.writer, self._writers_prompt
        try:
            with self.seam():  # into the writer: the processors of the block around are in the pipeline's own model
                yield
        finally:
            self.transformer, self.prompt = before

    def _guidance(self) -> Guidance | None:
        group = getattr(vars(self.pipeline).get("_kvpack"), "guidance_group", None)
        if group is None:
            return None
        for refused, why in (
            (self.shard is not None, "enable_parallelism() splits each branch already; take one of the two"),
            (self.buffer.differentiable, "training runs in one process"),
            (self.stack.max_retries, f"{self.stack.name} vetoes chunks by what one branch has seen"),
            (len(self.branches) != len(self.conditioning), "two experts have a memory each"),
        ):
            if refused:
                raise UnsupportedPipelineError(f"guidance branches cannot be split: {why}")
        return Guidance(group, tuple(self.conditioning), self.pipeline._execution_device)

    def seam(self) -> AbstractContextManager[None]:
        """Put kvpack's processors into the transformer for the block."""
        # Layers hold the heads that were this process's when the generation began.
        if self.shard != shard_of(self.transformer):
            raise UnsupportedPipelineError("enable_parallelism() was called inside a generation; begin another one")
        guided = None if self.guidance is None else self._guided
        return attached(self.transformer, self.layers_for, self._prompted(), self.shard, guided)

    def _guided(self, branch: str, forward: Callable[[], Any], latents: Tensor) -> Any:
        """Return what a forward gives, of which another process may have the memory."""
        if self.phase is None or self.phase.kind != "denoise":
            return forward()  # a commit, of the process's own branch

        def room() -> Tensor:
            channels = self.transformer.config.out_channels
            return latents.new_empty(latents.shape[0], channels, *latents.shape[2:])

        assert self.guidance is not None
        return (self.guidance.predicted(branch, lambda: forward()[0], room),)  # a tuple, as with return_dict=False

    def agreed(self, latents: Tensor) -> Tensor:
        """Return a chunk's latents, in which all guidance branches have a part."""
        if self.guidance is not None:
            self.guidance.require_settled()
        return super().agreed(latents)

    def layers_for(self, branch: str, step: int | None = None) -> Sequence[AttendingLayer]:
        """Return each layer's memory, none for a branch that another process runs."""
        if self.guidance is not None and branch != self.guidance.own:
            return ()  # its forward is not run: `_guided` gives room for what the other process sends
        return super().layers_for(branch, step)

    def expect(self, frames: int) -> None:
        """Announce the length of the coming chunk, of which each process has as many tokens."""
        tokens = frames * self.geometry.tokens_per_frame
        if self.shard is not None and self.shard.missing(tokens):
            raise InvalidOptionError(
                f"a chunk of {frames} latent frames with {self.geometry.tokens_per_frame} tokens each cannot be split "
                f"over {self.shard.ranks} ranks; give a height and width, or chunk_frames, so that it can"
            )
        super().expect(frames)

    def _prompted(self) -> PromptedLayers:
        return PromptedLayers(self.transformer, self.prompt, self.cross_processor)

    def forget_prompt(self) -> None:
        """Compute the prompt's keys and values anew when they are needed next."""
        for each in (self.prompt, self._writers_prompt):
            if each is not None:
                each.forget()

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the transformer's output for latents of one branch."""
        model, name = self.model_of(branch)
        with model.cache_context(name):  # without a step, which the phase then counts
            (output,) = model(
                hidden_states=latents,
                timestep=timesteps,
                encoder_hidden_states=self.conditioning[name],
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )
        return output

    def model_of(self, branch: str) -> tuple[Any, str]:
        """Return the transformer whose session has this name, and its guidance branch."""
        return self.transformer, branch

    def forward_clean(self, branch: str, latents: Tensor) -> None:
        """Run a clean chunk at t = 0."""
        # With the call's attention_kwargs too: a LoRA's scale must be that of the denoising steps.
        self.forward(branch, latents.to(self.geometry.dtype), self._clean_times(latents))

    def _clean_times(self, rows: Tensor) -> Tensor:
        """Return the timestep t = 0 of every row."""
        return torch.zeros(rows.shape[0], dtype=self.pipeline.scheduler.timesteps.dtype, device=rows.device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the normalised latents of pixel frames."""
        return encode(self.pipeline.vae, pixels)

    def compress(self, piece: BlockEntry, latents: Tensor, pixels: Tensor | None) -> Tensor:
        """Return a latent-space compressor's tokens for a piece of the chunk, `[batch, tokens, width]`."""
        return hidden_tokens(self, piece, latents, pixels, self.native_embedding())

    def native_embedding(self) -> Callable[[Tensor], Tensor] | None:
        """Return the model's own embedding for compressed latents, if it has one."""
        return None

    @property
    def appends_tokens(self) -> bool:
        """Whether compressed tokens go through the layers behind those of their chunk, which costs next to nothing."""
        # A commit has no graph; tokens of a compressor in training need one, and so a forward of their own.
        return self.compressor is not None and self.compressor.project == "layers" and not self.buffer.differentiable

    def commit_branch(self, branch: str, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, rerun: bool) -> None:
        """Run the forwards of a clean chunk and of its compressed tokens, in one forward if they can be appended."""
        appended = tokens if rerun and self.appends_tokens else {}
        # In the order of `Phase.pieces`, by which a layer tells them apart.
        with self._appended(list(appended.values())):
            super().commit_branch(branch, latents, appended, rerun=rerun)
        if not appended:
            with self.timed("compress"):
                for piece, each in tokens.items():
                    self._commit_tokens(branch, piece, each)

    def _appended(self, tokens: list[Tensor]) -> AbstractContextManager[None]:
        return appended_tokens(self.transformer, self._filled(torch.cat(tokens, dim=1))) if tokens else nullcontext()

    def _filled(self, tokens: Tensor) -> Tensor:
        """Return hidden tokens, and behind them as many zeros as give each process as many."""
        return tokens if self.shard is None else pad(tokens, (0, 0, 0, self.shard.missing(tokens.shape[1])))

    def _commit_tokens(self, branch: str, piece: BlockEntry, tokens: Tensor) -> None:
        """Keep keys and values of a piece's hidden tokens: through all layers, or of each layer's projections alone."""
        assert self.compressor is not None
        if self.compressor.project == "layers":
            with self.during(Phase("compress", pieces=(piece,))):
                forward_tokens(self.transformer, self._filled(tokens), lambda dummy: self.forward_clean(branch, dummy))
            return
        layers = self.session(branch).compress(piece)  # no forward will ask for these: keys and values come from here
        modulation = partial(self.modulation, branch, self._clean_times(tokens))
        projected = project_tokens(self.transformer, tokens, modulation, attention_kwargs=self.attention_kwargs)
        own = self.own_geometry.own_heads  # projections are of all heads, a layer's memory is of this process's
        for layer, (keys, values) in zip(layers, projected, strict=True):
            layer.capture(own(keys), own(values))

    def modulation(self, branch: str, times: Tensor) -> Tensor:
        """Return shifts and scales of a layer's input at these times, `[batch, 6, width]`."""
        _, modulation, *_ = self.transformer.condition_embedder(times, self.conditioning[branch])
        return modulation.unflatten(1, (6, -1))  # (b, 6, width)
