"""A Wan transformer over kvpack's memory, with the tokens of a latent-space compressor in its commits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from kvpack.adapters.compatibility import compiled_from
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
from kvpack.errors import UnusedOptionError
from kvpack.generation.denoiser import Denoiser
from kvpack.generation.phase import Phase
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import LayerCache
from kvpack.memory.ledger import BlockEntry


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
        self._writers_prompt = None if prompt is None else PromptCache()
        if self.writer is not None and stack.commit != "rerun":
            raise UnusedOptionError("writer", f"{stack.name} keeps what the last denoising step computed, not a commit")

    @property
    def writer(self) -> Any:
        """The transformer that commits in the place of the pipeline's own; None if there is none."""
        return getattr(vars(self.pipeline).get("_kvpack"), "writer", None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the writer, if there is one, stand in for the transformer, with a prompt's keys and values of its own."""
        if self.writer is None or self.writer is self.transformer:
            yield
            return
        before = self.transformer, self.prompt
        self.transformer, self.prompt = self.writer, self._writers_prompt
        try:
            with self.seam():
                yield
        finally:
            self.transformer, self.prompt = before

    def seam(self) -> AbstractContextManager[None]:
        """Put kvpack's processors into the transformer for the block."""
        return attached(self.transformer, self.layers_for, self._prompted())

    def _prompted(self) -> PromptedLayers:
        return PromptedLayers(compiled_from(self.transformer), self.prompt, self.cross_processor)

    def forget_prompt(self) -> None:
        """Compute the prompt's keys and values anew when they are needed next."""
        for each in (self.prompt, self._writers_prompt):
            if each is not None:
                each.forget()

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the transformer's output for latents of one branch."""
        with self.transformer.cache_context(branch):
            (output,) = self.transformer(
                hidden_states=latents,
                timestep=timesteps,
                encoder_hidden_states=self.conditioning[branch],
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )
        return output

    def forward_clean(self, branch: str, latents: Tensor) -> None:
        """Run a clean chunk at t = 0."""
        self.forward(branch, latents.to(self.transformer.dtype), self._clean_times(latents))

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
        return self.compressor is not None and self.compressor.project == "layers" and not self.buffer.differentiable

    def commit_branch(self, branch: str, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, rerun: bool) -> None:
        """Run the forwards of a clean chunk and of its compressed tokens, in one forward if they can be appended."""
        appended = tokens if rerun and self.appends_tokens else {}
        with self._appended(list(appended.values())):
            super().commit_branch(branch, latents, appended, rerun=rerun)
        if not appended:
            with self.timed("compress"):
                for piece, each in tokens.items():
                    self._commit_tokens(branch, piece, each)

    def _appended(self, tokens: list[Tensor]) -> AbstractContextManager[None]:
        return appended_tokens(self.transformer, torch.cat(tokens, dim=1)) if tokens else nullcontext()

    def _commit_tokens(self, branch: str, piece: BlockEntry, tokens: Tensor) -> None:
        """Keep keys and values of a piece's hidden tokens: through all layers, or of each layer's projections alone."""
        assert self.compressor is not None
        if self.compressor.project == "layers":
            with self.during(Phase("compress", pieces=(piece,))):
                forward_tokens(self.transformer, tokens, lambda dummy: self.forward_clean(branch, dummy))
            return
        layers = self.session(branch).compress(piece)
        modulation = partial(self.modulation, branch, self._clean_times(tokens))
        projected = project_tokens(self.transformer, tokens, modulation, attention_kwargs=self.attention_kwargs)
        for layer, (keys, values) in zip(layers, projected, strict=True):
            layer.capture(keys, values)

    def modulation(self, branch: str, times: Tensor) -> Tensor:
        """Return shifts and scales of a layer's input at these times, `[batch, 6, width]`."""
        _, modulation, *_ = self.transformer.condition_embedder(times, self.conditioning[branch])
        return modulation.unflatten(1, (6, -1))  # (b, 6, width)
