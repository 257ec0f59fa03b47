"""Stock models, block-causal by recomputation: slow, without a cache, and the reference for everything cached."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from benchmarks.toyworld.chunked import CHUNK


class BlockCausalProcessor(WanAttnProcessor):
    """The stock processor under a block-causal mask; `tokens` are the tokens of a chunk."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend as upstream does, with a mask in self-attention only."""
        if encoder_hidden_states is None:
            chunk = torch.arange(hidden_states.shape[1], device=hidden_states.device) // self.tokens
            attention_mask = chunk[:, None] >= chunk
        out: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return out


def velocity(model: WanTransformer3DModel, history: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Predict the velocity of the last chunk behind clean history at t = 0."""
    latents = torch.cat([history, noisy], 2)
    tokens = latents.shape[3] * latents.shape[4]
    past = torch.zeros(latents.shape[0], history.shape[2] * tokens)
    now = t * torch.ones(latents.shape[0], noisy.shape[2] * tokens)
    out: Tensor = model(latents, torch.cat([past, now], 1), text, return_dict=False)[0]
    return out[:, :, history.shape[2] :]


@torch.no_grad()
def sample(
    pipe: WanPipeline, captions: list[str], frames: int, seed: int, steps: int = 4, text_length: int = 16
) -> Tensor:
    """Sample latents [B, 16, frames, 4, 4], chunk after chunk; the processors are put back."""
    model: Any = pipe.transformer
    text = pipe.encode_prompt(captions, None, False, max_sequence_length=text_length)[0]
    side = 4
    noise = torch.randn(len(captions), 16, frames, side, side, generator=torch.Generator().manual_seed(seed))
    before = model.attn_processors
    model.set_attn_processor(BlockCausalProcessor(CHUNK * side * side))
    try:
        history = noise[:, :, :0]
        for x in noise.split(CHUNK, 2):
            pipe.scheduler.set_timesteps(steps)
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(velocity(model, history, x, t, text), t, x, return_dict=False)[0]
            history = torch.cat([history, x], 2)
    finally:
        model.set_attn_processor(before)
    return history


@torch.no_grad()
def decode(pipe: WanPipeline, latents: Tensor) -> Tensor:
    """Decode videos [B, T, H, W, 3] as uint8, as the pipeline does."""
    config = pipe.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    video = torch.cat([pipe.vae.decode(z * std + mean, return_dict=False)[0] for z in latents.split(1)])
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
