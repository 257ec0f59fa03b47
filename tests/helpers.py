"""What many tests do: seeds, distances, calls of a pipeline and of the command line."""

import json
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.compressors.network import HighResolutionBranch
from kvpack.memory.stack import Stack
from kvpack.policies import ContiguousReindexer, PoolCompressor, QueryTopK, SinkMidRecentPartitioner

# Numbers


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def row_seeds(seed=0, rows=2):
    """A generator for each row of a batch."""
    return [seeded(seed + row) for row in range(rows)]


def rel_l2(given, wanted):
    return float((given - wanted).norm() / wanted.norm())


def distance(given, wanted):
    """The largest difference, as a part of the largest number."""
    assert given.shape == wanted.shape
    return float((given - wanted).abs().max() / wanted.abs().max())


def attention(queries, keys, values):
    """Plain attention of `[rows, tokens, heads, head_dim]`."""
    return scaled_dot_product_attention(*(each.transpose(1, 2) for each in (queries, keys, values))).transpose(1, 2)


def picture(size, seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def clip(frames, size, rows=1, seed=1):
    return torch.rand(rows, frames, 3, size, size, generator=seeded(seed))


# Pipelines


def quiet(pipe):
    """The pipeline, without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, seed=0, **call):
    """The video of a call."""
    return pipe(**{"generator": seeded(seed), **call}).frames


def enable_small(pipe, **options):
    """Enable packforcing at sizes at which a few chunks fill every part of the memory."""
    return kvpack.enable(pipe, "packforcing", chunk_frames=2, sink_frames=1, recent_frames=1, topk=1, **options)


def pool_stack(partitioner=None, name="test", chunk_frames=4, **others):
    roles = {"compressor": PoolCompressor(), "selector": QueryTopK(2), "reindexer": ContiguousReindexer()}
    partitioner = partitioner or SinkMidRecentPartitioner(8, 4)
    return Stack(name=name, partitioner=partitioner, chunk_frames=chunk_frames, **{**roles, **others})


def random_branch():
    """A learned branch that fits the tiny models, and whose tokens are not zero."""
    branch = HighResolutionBranch(channels=16, width=24, patch=(2, 2), hidden=8, base_model="tiny")
    with torch.no_grad():
        branch.projection.weight.copy_(torch.randn(24, 8, generator=seeded()))
    return branch


# The command line, and what it writes


def command(*words):
    """The result of `kvpack` with these words."""
    return CliRunner().invoke(app, [str(word) for word in words])


def told(*words):
    """What a command prints as JSON."""
    result = command(*words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def complaint(*words):
    """The one line that a wrong command prints."""
    result = command(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def pixels(path: Path) -> np.ndarray:
    """All frames of a video file."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
