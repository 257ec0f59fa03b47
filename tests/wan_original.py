"""Weights of a diffusers Wan transformer under the names of the original code."""

import re

#: The key map of the original code, from diffusers' names.
_NAMES = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"\.norm2\.", ".norm3."),  # the norm in front of cross attention
)


def original_name(name):
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def original(weights):
    """A copy of the dict with other keys."""
    return {original_name(name): tensor for name, tensor in weights.items()}
