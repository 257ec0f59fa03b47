"""One chunk over n processes, simulated op by op; its constants are measured here, and it must give the measured times.

Each rank has a clock. A layer is the rank's share of all that is done token by token, an all-to-all of queries, keys
and values, attention of its heads, and an all-to-all back; a collective begins when the last rank is there. Constants
are of bare operations, of one process at a half and at a sixteenth of the size, and of a bare all-to-all of two
processes; a chunk in 1, 2 and 4 processes (gloo, one thread each) at the whole size is foretold.

measured             processor seconds of a chunk, of the rank that takes most
simulated            what the simulation says of it
off                  how far their ratio is from 1
formula / measured   what docs/scaling.md's formula makes of the time of one process

Processor time of all threads, for the machine is shared: waiting for others, or for a core, is not in it. Medians of n
rounds, each of which measures everything once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from timeit import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear, scaled_dot_product_attention

import kvpack
from benchmarks.report import SEED, Bar, Row, samples, say, script
from kvpack.memory.shard import Shard
from kvpack.testing import tiny_wan_pipeline
from kvpack.testing.ranks import enable_ulysses, run_ranks

BARS = (Bar("the simulation gives the measured times", "", "off", 0.15),)


@dataclass(frozen=True)
class Work:
    """A chunk of a model: its tokens, those that it attends, its own among them, the prompt's; its forwards."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    tokens: int
    attended: int
    text: int
    forwards: int
    itemsize: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def linear_flops(self) -> float:  # of a layer, as `WanAdapter.forward_flops` counts them
        width = self.width
        return 2.0 * (self.tokens * (6 * width * width + 2 * width * self.ffn) + 2 * self.text * width * width)

    @property
    def attention_flops(self) -> float:
        return 4.0 * self.tokens * (self.attended + self.text) * self.width


@dataclass(frozen=True)
class Machine:
    """Constants of a processor and of what joins several.

    Args:
        linear: operations a second in projections and feed-forward.
        attention: operations a second in attention.
        token_seconds: all else that is done with a token in a layer.
        layer_seconds: what a layer takes beside that, whatever its size.
        message_seconds: what a message takes, whatever its size; those of a collective go one behind the other.
        bandwidth: bytes a second out of a rank.
        launch_seconds: the least that a layer takes, which is that of a host that launches its kernels.
        spread: standard deviation of an operation's time, as a part of it.
    """

    linear: float
    attention: float
    token_seconds: float
    layer_seconds: float
    message_seconds: float
    bandwidth: float
    launch_seconds: float = 0.0
    spread: float = 0.0


def simulated(machine: Machine, work: Work, ranks: int) -> float:
    """Return the seconds of a chunk."""
    draw, clocks = random.Random(SEED), [0.0] * ranks
    share = -(-work.tokens // ranks)  # filled up to equal shares
    sent = 4 * share * work.width * work.itemsize * (ranks - 1) / ranks  # queries, keys, values and what comes out
    messages = 4 * (ranks - 1) * machine.message_seconds + sent / machine.bandwidth
    by_token = work.linear_flops / machine.linear / ranks + share * machine.token_seconds + machine.layer_seconds
    by_head = work.attention_flops / machine.attention / ranks
    least = max(0.0, machine.launch_seconds - by_token - by_head)
    for _ in range(work.forwards * work.layers):
        for seconds, moved in ((by_token + least, 3 / 4), (by_head, 1 / 4)):
            there = [clock + seconds * max(0.0, draw.gauss(1.0, machine.spread)) for clock in clocks]
            clocks = [max(there) + messages * moved] * ranks
    return max(clocks)


def formula(work: Work, ranks: int, alone: float, bandwidth: float) -> float:
    """Return the same as docs/scaling.md has it: a share of one rank's seconds, and bytes over a bandwidth."""
    sent = 4 * work.itemsize * work.tokens * work.width * (ranks - 1) / ranks**2
    return alone / ranks + work.forwards * work.layers * sent / bandwidth


RANKS = (1, 2, 4)
UNITS = {"linear": "op/s", "attention": "op/s", "token_seconds": "s", "layer_seconds": "s"}
UNITS |= {"message_seconds": "s", "bandwidth": "B/s"}
WORK = Work(layers=2, heads=4, head_dim=128, ffn=2048, tokens=768, attended=2304, text=8, forwards=3, itemsize=4)


def chunk_seconds(columns: int, chunks: int, ranks: int, _: int = 0) -> float:
    """Return a rank's processor seconds of a chunk behind a full window, of frames of 16 x `columns` tokens."""
    sizes = {"num_attention_heads": WORK.heads, "attention_head_dim": WORK.head_dim, "ffn_dim": WORK.ffn}
    pipe = tiny_wan_pipeline(**sizes, num_layers=WORK.layers)
    pipe.set_progress_bar_config(disable=True)
    if ranks > 1:
        enable_ulysses(pipe.transformer, ranks)
    kvpack.enable(pipe, "self-forcing", chunk_frames=3, window_frames=9, sink_frames=3)
    size = {"height": 256, "width": 16 * columns, "num_inference_steps": 2, "guidance_scale": 1.0}
    call = {**size, "max_sequence_length": 8, "num_frames": 4 * (3 * chunks - 1) + 1, "output_type": "latent"}
    stream = pipe.packforcing.stream(prompt="a red circle", generator=torch.Generator().manual_seed(SEED), **call)
    times = [time.process_time() for _ in stream][2:]  # the window is full
    return median(after - before for before, after in pairwise(times))


def usual(function: Callable[[], Any], count: int) -> float:
    """Return the processor seconds of a call."""
    return median(repeat(function, timer=time.process_time, number=1, repeat=count))


def exchange_seconds(tokens: int, count: int, rank: int) -> float:
    """Return the processor seconds of an all-to-all of two ranks, `tokens` of `WORK.width` in all."""
    shard = Shard(2, rank, dist.group.WORLD, torch.device("cpu"))
    mine = torch.ones(1, tokens // 2, WORK.heads, WORK.head_dim)
    return usual(lambda: shard.to_heads(mine, tokens), count)


def measured(chunks: int, count: int) -> dict[Any, float]:
    """Return processor seconds of each thing that is measured: bare operations, exchanges, and chunks."""
    x, w = torch.randn(WORK.tokens, WORK.width), torch.randn(WORK.ffn, WORK.width)
    q, k = (torch.randn(1, WORK.heads, each, WORK.head_dim) for each in (WORK.tokens, WORK.attended))
    found: dict[Any, float] = {
        "linear": usual(lambda: linear(x, w), count),
        "attention": usual(lambda: scaled_dot_product_attention(q, k, k), count),
    }
    for tokens in (16, 4096):
        found["exchange", tokens] = run_ranks(2, partial(exchange_seconds, tokens, count))[0]
    for columns, ranks in ((1, 1), (8, 1), *((16, ranks) for ranks in RANKS)):
        found[columns, ranks] = max(run_ranks(ranks, partial(chunk_seconds, columns, chunks, ranks)))
    return found


def machine_of(took: dict[Any, float]) -> Machine:
    """Return this machine's constants; what is done token by token is what bare operations leave of a chunk."""
    rate = 2 * WORK.tokens * WORK.width * WORK.ffn / took["linear"]
    attention = 4 * WORK.tokens * WORK.attended * WORK.width / took["attention"]
    works = [replace(WORK, tokens=48 * columns, attended=144 * columns) for columns in (1, 8)]
    few, many = (
        took[columns, 1] / (work.forwards * work.layers) - work.linear_flops / rate - work.attention_flops / attention
        for columns, work in zip((1, 8), works, strict=True)
    )
    token = max(0.0, (many - few) / (works[1].tokens - works[0].tokens))
    near, far = (took["exchange", tokens] for tokens in (16, 4096))
    bandwidth = (4096 - 16) * WORK.width * WORK.itemsize / 4 / (far - near)
    return Machine(rate, attention, token, max(0.0, few - works[0].tokens * token), near, bandwidth)


def run(small: bool = False) -> list[Row]:
    """Measure everything in rounds, and simulate."""
    torch.set_num_threads(1)
    rounds: list[dict[Any, float]] = []
    for index in range(1 if small else 6):
        say(f"simulation: round {index + 1}")
        rounds.append(measured(5 if small else 10, 15))
    took = {name: median(each[name] for each in rounds) for name in rounds[0]}
    machine = machine_of(took)
    figures = [("this machine", name, [getattr(machine, name)], unit) for name, unit in UNITS.items()]
    for ranks in RANKS:
        name, each, told = f"{ranks} processes", [one[16, ranks] for one in rounds], simulated(machine, WORK, ranks)
        off, paper = told / median(each) - 1, formula(WORK, ranks, took[16, 1], machine.bandwidth) / median(each)
        figures += [(name, "measured", each, "s"), (name, "simulated", [told], "s"), (name, "off", [abs(off)], "ratio")]
        figures.append((name, "formula / measured", [paper], "ratio"))
    return [samples(*each) for each in figures]


if __name__ == "__main__":
    script("simulation", __doc__, run, BARS)
