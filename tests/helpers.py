"""What many tests do: seeds, distances, calls of a pipeline and of the command line."""

import json
import multiprocessing
import os
import re
import signal
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app, main
from kvpack.compressors.network import HighResolutionBranch
from kvpack.errors import KVPackError
from kvpack.memory.layer import ForwardLayer
from kvpack.memory.stack import Stack
from kvpack.policies import ContiguousReindexer, PoolCompressor, QueryTopK, SinkMidRecentPartitioner

# Numbers


#: A call whose chunks are many and small, and a memory that a few of them fill.
SMALL_CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "pt",
}
SMALL = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 3}


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


def same(parts, others):
    """Whether two lists of tensors are the same bits."""
    return len(parts) == len(others) and all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


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
    """Enable packforcing at sizes at which a few chunks fill every part of the memory.

    Blocks are averages, unless a test wants other ones: a rounding must not keep other tokens.
    """
    sizes = {"chunk_frames": 2, "sink_frames": 1, "recent_frames": 1, "topk": 1}
    return kvpack.enable(pipe, "packforcing", **{**sizes, "compressor": "pool", "selector": "topk", **options})


def pool_stack(partitioner=None, name="test", chunk_frames=4, **others):
    roles = {"compressor": PoolCompressor(), "selector": QueryTopK(2), "reindexer": ContiguousReindexer()}
    partitioner = partitioner or SinkMidRecentPartitioner(8, 4)
    return Stack(name=name, partitioner=partitioner, chunk_frames=chunk_frames, **{**roles, **others})


def random_branch(width=24):
    """A learned branch that fits the tiny models, and whose tokens are not zero."""
    branch = HighResolutionBranch(channels=16, width=width, patch=(2, 2), hidden=8, base_model="tiny")
    with torch.no_grad():
        branch.projection.weight.copy_(torch.randn(width, 8, generator=seeded()))
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


def forked(*words, told=os.devnull, **environment):
    """`kvpack` with these words in a process of its own that writes to the file `told`; a fork imports nothing anew."""
    # Threads that torch begins for CUDA, be there a card or not, do not survive a fork.
    context = multiprocessing.get_context("spawn" if torch.version.cuda else "fork")
    process = context.Process(target=_command, args=(list(map(str, words)), told, environment))
    process.start()
    return process


def _command(words, told, environment):
    sys.stdout = sys.stderr = Path(told).open("w")  # noqa: SIM115
    # In the background a shell lets SIGINT be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = ["kvpack", *words]
    main()


def pixels(path: Path) -> np.ndarray:
    """All frames of a video file."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# What files from strangers cost


def peak():
    """The most memory that this process has had since it was last asked."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def taken(work):
    """Memory that some work takes at its peak in a process of its own, be it refused or not; needs Linux."""
    readable, writable = os.pipe()
    if not (child := os.fork()):
        try:
            peak()
            before = peak()
            with suppress(KVPackError):
                work()
            os.write(writable, str(peak() - before).encode())
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    with os.fdopen(readable) as told:
        return int(told.read())


# Inside a session: nothing else in the tests looks there


def ledger(session):
    """A stack's bookkeeping in host integers."""
    return session.past.book.ledger


def state(session, layer=0):
    """What a memory has made of a layer's past."""
    return session.past.states[layer]


def context(session, layer=0):
    """The memory's answer to what a layer attends in the chunk in progress: tokens, their places, the chunk's start."""
    return session.caches[layer].attended


def placement(session, layer=0):
    """Where a stack's re-indexer has put the blocks that a layer attends in the chunk in progress."""
    return session.plan.place(session.caches[layer].selected, torch.device("cpu")).placement


def held(session):
    """Each block that a stack holds whole: its piece of the ledger, and copies of its keys and values by layer."""
    blocks = zip(*(each.whole for each in session.past.states), strict=True)
    copies = ([(each.block.keys.clone(), each.block.values.clone()) for each in layers] for layers in blocks)
    return list(zip(ledger(session).whole, copies, strict=True))


def archive(session, layer=0):
    """A layer's archive of compressed blocks."""
    return state(session, layer).archive


def whole(session, layer=0):
    """Handles of the blocks that a layer keeps whole."""
    return [kept.block for kept in state(session, layer).whole]


def chosen(session, layer=0):
    """Indices of the mid blocks that a layer has chosen last."""
    return session.caches[layer].selected


def twins(session, layer=0):
    """Compressed keys and values that wait beside each block that is held whole; None where there are none."""
    return [each.twin for each in state(session, layer).whole]


def archived(session, layer=0):
    """Copies of keys and values of each compressed block, the oldest first."""
    archive, span = state(session, layer).archive, session.stack.compressor.span
    found = []
    for piece in ledger(session).archive:
        tokens = span(piece.first_frame, piece.frames, session.geometry.grid).tokens
        found.append(tuple(each(piece.slot, tokens).clone() for each in (archive.block_keys, archive.block_values)))
    return found


def archive_bytes(session):
    """Bytes that are allocated for compressed blocks."""
    archives = [each.archive for each in session.past.states]
    parts = [(*a.keys, *a.values, a.key_sums, *([] if a.coordinates is None else [a.coordinates])) for a in archives]
    return sum(each.nbytes for part in parts for each in part)


def room(session):
    """Tokens, current ones included, that the first layer has room for."""
    return session.caches[0].arena.values.shape[1]


def places(session):
    """Where the memory of a stack lies."""
    arenas = [each for cache in session.caches for each in (cache.arena.keys, cache.arena.values)]
    archives = [each for one in session.past.states for each in (*one.archive.keys, *one.archive.values)]
    return [each.data_ptr() for each in arenas + archives]


def spoil(session):
    """Fill with NaN whatever room holds nothing."""
    session.workspace.owner = None
    for each in (session.workspace._keys, session.workspace._values):
        each.fill_(torch.nan)
    for cache in session.caches:
        arena = cache.arena
        for each, place in ((arena.keys, arena.key_place), (arena.values, int)):
            free = torch.ones(each.shape[1] if each.ndim == 4 else 0, dtype=torch.bool)
            for block in (each() for each in arena._residents):
                if block is not None:
                    first = place(block.places[arena])
                    free[first : first + len(block)] = False
            if free.any():
                each[:, free] = torch.nan


def record_forwards(monkeypatch, inspect=lambda keys, values: None):
    """Return a function that lists the forwards of a layer from here on: first frame of the chunk, keys, values.

    Args:
        inspect: called with what each forward gives the attention kernel.
    """
    forwards, attend = defaultdict(list), ForwardLayer.attend

    def recorded(self, queries, keys, values, attention):
        def seen(q, k, v):
            inspect(k, v)
            return attention(q, k, v)

        forwards[id(self.cache)].append((self.forward.plan.book.frames, keys.clone(), values.clone()))
        return attend(self, queries, keys, values, seen)

    monkeypatch.setattr(ForwardLayer, "attend", recorded)
    return lambda session, layer=0: forwards[id(session.caches[layer])]
