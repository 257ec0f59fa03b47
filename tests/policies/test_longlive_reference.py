"""LongLive against a cache of its own, written down as its released code works: rotated keys in slots, shifted left."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

import helpers
from kvpack.adapters import WanAdapter
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.policies import LongLive
from kvpack.testing import tiny_wan_pipeline

CHUNK, HEIGHT, WIDTH = 3, 32, 48


class Cache:
    """One layer's slots, as the attention processor of its layer."""

    def __init__(self, rules, geometry):
        self.rules, self.geometry = rules, geometry
        self.keys = self.values = None
        self.start, self.write = 0, "new"

    def turn(self, tensor, frames):
        """Complex rotation of pairs by absolute frame, row and column, in float64."""
        rows, columns = self.geometry.grid
        places = torch.cartesian_prod(*(torch.arange(n).double() for n in (frames, rows, columns)))
        places[:, 0] += self.start
        angles = [
            places[:, axis : axis + 1] * 10000.0 ** -(torch.arange(0, size, 2).double() / size)
            for axis, size in enumerate(self.geometry.rope_split)
        ]
        turns = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=-1))[None, :, None]
        pairs = torch.view_as_complex(tensor.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(tensor)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (each.unflatten(2, (attn.heads, -1)) for each in (q, k, v))
        each = self.geometry.tokens_per_frame
        frames = q.shape[1] // each
        q, k = self.turn(q, frames), self.turn(k, frames)
        window, sink = self.rules.window_frames * each, self.rules.sink_frames * each
        if self.write == "recache":
            keep = sink if self.rules.global_sink and self.start > 0 else 0  # old sink slots; the rest is overwritten
            self.keys = torch.cat([self.keys[:, :keep], k[:, keep:]], dim=1)
            self.values = torch.cat([self.values[:, :keep], v[:, keep:]], dim=1)
        elif self.keys is None:
            self.keys, self.values = k, v
        elif self.write == "new":
            over = max(0, self.keys.shape[1] + k.shape[1] - window)
            shift = lambda old, new: torch.cat([old[:, :sink], old[:, sink + over :], new], dim=1)  # noqa: E731
            self.keys, self.values = shift(self.keys, k), shift(self.values, v)
        else:
            self.keys = torch.cat([self.keys[:, : -k.shape[1]], k], dim=1)
            self.values = torch.cat([self.values[:, : -v.shape[1]], v], dim=1)
        out = dispatch_attention_fn(q, self.keys, self.values)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


def reference(transformer, rules, geometry, clean, noisy, embeds, switch):
    """Outputs of every noisy forward; `embeds` changes before chunk `switch`."""
    stock = [block.attn1.processor for block in transformer.blocks]
    caches = [Cache(rules, geometry) for _ in transformer.blocks]
    for block, cache in zip(transformer.blocks, caches, strict=True):
        block.attn1.processor = cache

    def forward(latents, t, prompt, start, write):
        for cache in caches:
            cache.start, cache.write = start, write
        return transformer(latents, torch.full((1,), t), prompt, return_dict=False)[0]

    outputs = []
    for index in range(len(noisy)):
        start, prompt = index * CHUNK, embeds[index >= switch]
        if index == switch:
            frames = min(rules.window_frames, start)
            forward(torch.cat(clean, dim=2)[:, :, start - frames : start], 0.0, prompt, start - frames, "recache")
        for step, t in enumerate((1000.0, 500.0)):
            outputs.append(forward(noisy[index][step], t, prompt, start, "new" if step == 0 else "again"))
        forward(clean[index], 0.0, prompt, start, "again")
    for block, processor in zip(transformer.blocks, stock, strict=True):
        block.attn1.processor = processor
    return outputs, caches


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize(("window", "sink"), [(9, 3), (12, 3), (7, 1), (6, 0), (100, 3)])
@pytest.mark.parametrize("switch", [1, 4, 6])
@torch.no_grad()
def test_every_forward_is_the_same(window, sink, global_sink, switch):
    pipe = tiny_wan_pipeline()
    rules = LongLive(CHUNK, window, sink, global_sink)
    configs = {"transformer": pipe.transformer.config, "vae": pipe.vae.config}
    geometry = WanAdapter().geometry(configs, HEIGHT, WIDTH, torch.float32)
    source = torch.Generator().manual_seed(switch)
    shape = (1, 16, CHUNK, HEIGHT // 8, WIDTH // 8)
    clean = [torch.randn(shape, generator=source) for _ in range(8)]
    noisy = [[torch.randn(shape, generator=source) for _ in range(2)] for _ in range(8)]
    embeds = [torch.randn(1, 6, 32, generator=source) for _ in range(2)]
    memory = WanDenoiser(pipe, rules, geometry, {"cond": embeds[0]})
    outputs = []
    with memory.seam():
        for index, steps in enumerate(noisy):
            if index == switch:
                memory.set_prompt({"cond": embeds[1]})
            for step, (latents, t) in enumerate(zip(steps, (1000.0, 500.0), strict=True)):
                outputs.append(memory.predict("cond", latents, torch.full((1,), t), step))
            memory.commit(clean[index], None)
    wanted, caches = reference(pipe.transformer, rules, geometry, clean, noisy, embeds, switch)
    for place, (given, each) in enumerate(zip(outputs, wanted, strict=True)):
        assert float((given - each).norm() / each.norm()) < 2e-5, place
    for layer, cache in enumerate(caches):
        state = helpers.state(memory.session("cond"), layer)
        values = torch.cat([state.sink.values, state.recent.values], dim=1)
        assert float((values - cache.values).norm() / cache.values.norm()) < 2e-5
