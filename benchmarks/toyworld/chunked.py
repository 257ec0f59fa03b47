"""Training forward of the stock transformer: noisy copies of every chunk beside their clean history, without a mask.

Tokens are grouped as [batch, group, 64, width], chunk by chunk, the noisy copies of a chunk first and its clean
version behind them. Each group attends to the clean chunks before it and to itself, by plain attention calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

CHUNK, CHUNKS = 4, 5
FRAMES = CHUNK * CHUNKS
CONFIG = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 48,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 1024,
}


def build() -> WanTransformer3DModel:
    """Build the stock class at 1.75 M parameters."""
    return WanTransformer3DModel(**CONFIG)


@dataclass(frozen=True)
class Layout:
    """How many noisy copies each chunk has; every chunk but the last has a clean version too."""

    copies: tuple[int, ...]

    def members(self, chunk: int) -> int:
        """Return the groups of one chunk."""
        return self.copies[chunk] + (chunk + 1 < len(self.copies))

    @property
    def chunk_of(self) -> list[int]:
        """The chunk of every group."""
        return [c for c in range(len(self.copies)) for _ in range(self.members(c))]

    @property
    def clean(self) -> list[int]:
        """The groups that hold clean chunks."""
        ends = [sum(self.members(j) for j in range(c + 1)) for c in range(len(self.copies) - 1)]
        return [end - 1 for end in ends]

    @property
    def noisy(self) -> list[int]:
        """The groups that hold noisy chunks."""
        clean = set(self.clean)
        return [g for g in range(len(self.chunk_of)) if g not in clean]


def group(latents: Tensor) -> Tensor:
    """Reshape latents [B, 16, 20, 4, 4] to tokens [B, 5, 64, 16]."""
    return latents.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(1, (latents.shape[2] // CHUNK, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply interleaved RoPE to [B, G, 64, H, D] with tables [G, 64, 1, D / 2]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def self_attention(attn: WanAttention, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Attend from every group to its clean history and itself."""
    heads = attn.heads
    q = rotate(attn.norm_q(attn.to_q(x)).unflatten(-1, (heads, -1)), cos, sin).transpose(2, 3)
    k = rotate(attn.norm_k(attn.to_k(x)).unflatten(-1, (heads, -1)), cos, sin).transpose(2, 3)
    v = attn.to_v(x).unflatten(-1, (heads, -1)).transpose(2, 3)
    clean, start, out = layout.clean, 0, []
    for chunk in range(len(layout.copies)):
        many = layout.members(chunk)
        mine = slice(start, start + many)
        keys, values = [k[:, mine]], [v[:, mine]]
        for past in clean[:chunk]:
            keys.append(k[:, past : past + 1].expand(-1, many, -1, -1, -1))
            values.append(v[:, past : past + 1].expand(-1, many, -1, -1, -1))
        key, value = torch.cat(keys, 3).flatten(0, 1), torch.cat(values, 3).flatten(0, 1)
        y = F.scaled_dot_product_attention(q[:, mine].flatten(0, 1), key, value)
        out.append(y.unflatten(0, (-1, many)))
        start += many
    y = torch.cat(out, 1).transpose(2, 3).flatten(3)
    result: Tensor = attn.to_out[0](y)
    return result


def cross_attention(attn: WanAttention, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """Attend from all tokens to the caption; `bias` [B, 1, 1, T] stands for repeated padding."""
    heads = attn.heads
    q = attn.norm_q(attn.to_q(x.flatten(1, 2))).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = attn.norm_k(attn.to_k(text)).unflatten(-1, (heads, -1)).transpose(1, 2)
    v = attn.to_v(text).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    result: Tensor = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2)).view_as(x)
    return result


class GroupedBlock(nn.Module):
    """A stock block on grouped tokens; it holds no weights of its own."""

    def __init__(self, block: WanTransformerBlock, layout: Layout) -> None:
        super().__init__()
        self.block, self.layout = block, layout

    def forward(self, x: Tensor, text: Tensor, bias: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the block on `x` [B, G, 64, C] at `time` [B, G, 6, C]."""
        block = self.block
        shift, scale, gate, c_shift, c_scale, c_gate = (block.scale_shift_table + time).chunk(6, dim=2)
        y = block.norm1(x) * (1 + scale) + shift
        x = x + self_attention(block.attn1, y, cos, sin, self.layout) * gate
        x = x + cross_attention(block.attn2, block.norm2(x), text, bias)
        y = block.norm3(x) * (1 + c_scale) + c_shift
        result: Tensor = x + block.ffn(y) * c_gate
        return result


class ChunkedForward(nn.Module):
    """The whole model on grouped tokens, equal to the stock forward under a block-causal mask."""

    def __init__(self, model: WanTransformer3DModel, copies: tuple[int, ...], compiled: bool = False) -> None:
        super().__init__()
        self.layout, self.model = Layout(copies), model
        self.blocks = nn.ModuleList(GroupedBlock(block, self.layout) for block in model.blocks)
        if compiled:
            for block in self.blocks:
                block.compile(dynamic=False)
        cos, sin = model.rope(torch.empty(1, 16, CHUNK * len(copies), 4, 4))
        chunks = torch.tensor(self.layout.chunk_of)
        self.register_buffer("cos", cos[0, :, :, 0::2].unflatten(0, (len(copies), -1))[chunks], persistent=False)
        self.register_buffer("sin", sin[0, :, :, 1::2].unflatten(0, (len(copies), -1))[chunks], persistent=False)

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor, real: Tensor, length: Tensor) -> Tensor:
        """Return velocities of the noisy groups; `text` [B, T, 48] has `real` [B] tokens, padded to `length` [B]."""
        model, embedder = self.model, self.model.condition_embedder
        x = F.linear(tokens, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
        embedded = embedder.time_embedder(embedder.timesteps_proj(t.flatten())).unflatten(0, t.shape)
        time = embedder.time_proj(F.silu(embedded)).unflatten(-1, (6, -1))
        words, bias = pad_once(text, real, length)
        words = embedder.text_embedder(words)
        for block in self.blocks:
            x = block(x, words, bias, time, self.cos, self.sin)
        x, embedded = x[:, self.layout.noisy], embedded[:, self.layout.noisy]
        shift, scale = (model.scale_shift_table + embedded[:, :, None]).chunk(2, dim=2)
        velocity: Tensor = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
        return velocity


def pad_once(text: Tensor, real: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Pad with one zero token and a bias of log(n) instead of n zero tokens, which is the same attention."""
    index = torch.arange(text.shape[1])
    bias = torch.zeros(text.shape[0], text.shape[1]).masked_fill(index >= real[:, None], float("-inf"))
    words = F.pad(text * (index < real[:, None])[..., None], (0, 0, 0, 1))
    return words, torch.cat([bias, (length - real).float().log()[:, None]], 1)[:, None, None]
