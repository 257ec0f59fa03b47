"""Whether a compressor goes with a Wan transformer."""

from collections.abc import Mapping
from typing import Any

from kvpack.memory import Memory


def check_compressor(transformer: Any, stack: Memory) -> None:
    """Raises `InvalidOptionError` if the stack's compressor cannot work with this transformer."""
    if stack.latent_compressor is not None:
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        stack.latent_compressor.check(config.in_channels, width, patch_of(config), native_window(config))


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent rows and columns of a token, from a transformer's config."""
    _, rows, columns = config["patch_size"]
    return rows, columns


def native_window(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Token rows and columns of a token of the model's own embedding for compressed latents; None if it has none."""
    frames, *compressed = config.get("compressed_patch_size") or (0, 0, 0)
    rows, columns = (large // small for large, small in zip(compressed, patch_of(config), strict=True))
    return (rows, columns) if frames == 1 and rows and columns else None
