"""Whether a compressor goes with a Wan transformer."""

from collections.abc import Mapping
from typing import Any

from kvpack.memory import Memory


def check_compressor(transformer: Any, stack: Memory) -> None:
    """Raises `InvalidOptionError` if the stack's compressor cannot work with this transformer."""
    if stack.latent_compressor is not None:
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        stack.latent_compressor.check(config.in_channels, width, patch_of(config))


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent rows and columns of a token, from a transformer's config."""
    _, rows, columns = config["patch_size"]
    return rows, columns
