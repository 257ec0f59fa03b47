"""The refiner of SANA-WM (`SanaWMLTX2Refiner`, arXiv 2605.15178), stacks instead of its fixed sink and window."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SanaWMLTX2Refiner

from kvpack.adapters.compatibility import check_placement
from kvpack.adapters.sana_wm.rope import LTX2Rotary
from kvpack.adapters.sana_wm.run import SanaWMRun
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.generation.adapter import Adapter
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry

_TEXT_TOKENS = 1024  # the refiner's text_max_sequence_length, to which it pads


class SanaWMAdapter(Adapter):
    """Drives `SanaWMLTX2Refiner` block by block; its `block_size` is the chunk, its sink the first, shorter chunk."""

    name = "sana-wm-refiner"
    pipelines = (SanaWMLTX2Refiner,)  # the first stage of SANA-WM has no keys and values to keep
    run_class = SanaWMRun

    def check(self, pipeline: Any) -> None:
        """Refuse what would silently give wrong keys."""
        transformer = pipeline.transformer
        if transformer is None:
            raise UnsupportedPipelineError("kvpack drives the refiner's transformer, but this pipeline has none")
        attentions = [each for block in transformer.transformer_blocks for each in (block.attn1, block.attn2)]
        check_placement(transformer, attentions, pipeline._execution_device, transformer.config.attention_head_dim)
        if transformer.config.patch_size_t != 1:
            raise UnsupportedPipelineError(
                f"kvpack needs one token grid a latent frame, but patch_size_t is {transformer.config.patch_size_t}"
            )

    def check_stack(self, pipeline: Any, stack: Memory) -> None:
        """Refuse compressors of latents, which are made for a Wan VAE and patch embedding."""
        if stack.latent_compressor is not None or stack.needs_pixels:
            raise InvalidOptionError(
                f"{stack.name} looks at latents or pixels, which the refiner's adapter cannot give it; "
                'give a memory of keys and values alone, e.g. packforcing with compressor="pool"'
            )

    def geometry(
        self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int, dtype: torch.dtype
    ) -> Geometry:
        """Return the geometry from `transformer/config.json`; frames a second, which a call gives, are 24."""
        config = configs["transformer"]
        long, *spatial = config["vae_scale_factors"]
        rows, columns = (side * config["patch_size"] for side in spatial)
        if height < rows or width < columns or height % rows or width % columns:
            raise InvalidOptionError(
                f"height and width must be multiples of {rows} and {columns} for this model, got {height}x{width}"
            )
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        rotary = LTX2Rotary(
            heads,
            head_dim,
            pixels=(long, rows, columns),
            extents=(config["pos_embed_max_pos"], config["base_height"], config["base_width"]),
            causal_offset=config["causal_offset"],
            theta=config["rope_theta"],
            double_precision=config["rope_double_precision"],
        )
        grid = (height // rows, width // columns)
        return Geometry(config["num_layers"], heads, head_dim, grid, dtype=dtype, rotary=rotary)

    def forward_flops(self, configs: Mapping[str, Mapping[str, Any]], query_tokens: int, attended_tokens: int) -> int:
        """Return multiplications and additions of all layers: projections, both attentions and feed-forward."""
        config = configs["transformer"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        text = _TEXT_TOKENS * 2 * config["cross_attention_dim"] * width
        # Four projections of self-attention, two of cross-attention, and a feed-forward four times as wide.
        linear = query_tokens * 14 * width * width + text
        attention = 2 * query_tokens * (attended_tokens + _TEXT_TOKENS) * width
        return 2 * config["num_layers"] * (linear + attention)

    def temporal_scale(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Return it from `transformer/config.json`; a refiner may have no VAE."""
        return int(configs["transformer"]["vae_scale_factors"][0])
