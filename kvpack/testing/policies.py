"""`check_policy` and `check_memory`: what must hold for every policy, without a model."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from kvpack.errors import PolicyError
from kvpack.memory.base import Event, Memory
from kvpack.memory.blocks import LatentChunk
from kvpack.memory.checks import vetoes
from kvpack.memory.codec import Codec
from kvpack.memory.geometry import Geometry
from kvpack.memory.policy import Policy
from kvpack.memory.roles import Compressor, LatentCompressor, Partitioner, Reindexer, Selector
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry, require_instance
from kvpack.testing.codecs import check_codec
from kvpack.testing.faults import named_failure, own_noise, require_data, require_kind
from kvpack.testing.partitions import check_parts
from kvpack.testing.watching import watched

TINY = Geometry(layers=2, heads=2, head_dim=12, grid=(4, 5), rope_split=(4, 4, 4))


def run_session(
    session: Session,
    chunks: int,
    batch: int = 1,
    seed: int = 0,
    steps: int = 2,
    rows: slice = slice(None),
    inspect: Callable[[Session], None] | None = None,
) -> list[Tensor]:
    """Drive a session without a model, with random queries, keys and values.

    Args:
        session: fresh, or a snapshot to go on from.
        chunks: chunks to run.
        batch: rows of the random tensors.
        seed: of the random tensors.
        steps: denoising steps a chunk.
        rows: which rows the session sees.
        inspect: called with the session once a chunk, right before it is committed.

    Returns:
        Each chunk's attention output in the last layer, of the forward that is committed.
    """
    geometry, stack = session.geometry, session.stack
    generator = torch.Generator().manual_seed(seed)

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in (queries, keys, values))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def forward(count: int) -> Tensor:
        out = torch.empty(0)
        for layer in session.layers:
            shape = (3, batch, count, geometry.heads, geometry.head_dim)
            qkv = torch.randn(shape, generator=generator)[:, rows].to(geometry.dtype)
            out = layer.attend(qkv[0], qkv[1], qkv[2], attention)
        return out

    outputs = []
    for _ in range(chunks):
        out, tokens = torch.empty(0), session.coming_frames * geometry.tokens_per_frame
        for step in range(steps):
            session.denoise(step)
            out = forward(tokens)
        if stack.commit == "rerun":
            session.commit()
            out = forward(tokens)
        outputs.append(out)
        for piece in session.pending_compressions():
            session.compress(piece)
            forward(session.twin_span(piece).tokens)
        if inspect is not None:
            inspect(session)
        session.finish_commit()
    return outputs


def check_policy(policy: Policy, chunk_frames: int = 4) -> None:
    """Test a policy of one's own against its role's contract; the whole test of a plugin can be this one line.

    Runs a dozen chunks of random keys through a stack with the policy in it, at sizes that are and that are not
    multiples of the chunk, in float32 and bfloat16, and checks that it is frozen data, deterministic, independent of
    the rest of the batch, writes into nothing that it is given, and gives back what its role announces.

    Args:
        policy: the policy, with its options set.
        chunk_frames: latent frames of a chunk.

    Raises:
        PolicyError: if the contract is broken; the message says how.
        InvalidOptionError: if it is no policy.

    >>> from kvpack.policies import RecencySelector
    >>> check_policy(RecencySelector(topk=2))
    """
    require_kind(policy, Policy, "check_policy")
    if isinstance(policy, Memory):
        check_memory(policy)
        return
    name = type(policy).__name__
    require_data(policy)
    if isinstance(policy, Codec):
        check_codec(policy)
    policy = watched(policy)
    for sizes in ((8, 4), (3, 5)):
        stack = _stack_with(policy, sizes, chunk_frames)
        _check_same(name, partial(_outputs, stack, policy))
        _require_finite(name, _outputs(stack, policy, slice(0, 2), torch.bfloat16))
    if isinstance(policy, Compressor) and policy.merges:
        merging = replace(_stack_with(policy, (8, 4), chunk_frames), archive_blocks=2, eviction="merged")
        _check_same(name, partial(_outputs, merging, policy))
    if isinstance(policy, Partitioner):
        check_parts(policy, chunk_frames)
    if isinstance(policy, LatentCompressor):
        _check_tokens(policy, chunk_frames)


def check_memory(memory: Memory, most_frames: int | None = None) -> None:
    """Test a memory of one's own as `check_policy` does a policy, in a dozen chunks of random keys.

    Args:
        memory: the memory, with its options set.
        most_frames: latent frames' worth of tokens that a chunk may attend beside itself; None does not look.

    Raises:
        PolicyError: if it is not deterministic, lets rows influence each other, writes into what it is given, goes on
            otherwise from a snapshot, changes dtype, attends a token twice or too many, cannot be replayed, or vetoes
            anything but rows.
        InvalidOptionError: if it is not a memory, or has no chunk length.

    >>> from kvpack.policies import MemRoPE
    >>> check_memory(MemRoPE())
    """
    require_kind(memory, Memory, "check_memory")
    require_instance("memory", memory)
    require_data(memory)
    memory = watched(memory)
    with named_failure(memory, TINY.dtype), own_noise(memory):
        _check_snapshot(memory)
    for dtype in (torch.float32, torch.bfloat16):
        with named_failure(memory, dtype):
            session = Session(memory, replace(TINY, dtype=dtype))
            for chunk in range(12):  # a dtype that is not kept raises
                run_session(session, 1, batch=2, seed=chunk, inspect=partial(_check_attended, memory, most_frames))
            _check_replay(memory, session)
            _check_veto(memory, session)


def _check_snapshot(memory: Memory) -> None:
    """Raise `PolicyError` if a memory gives something else again, to a row alone, or behind a snapshot."""
    name = type(memory).__name__
    _check_same(name, lambda rows: run_session(Session(memory, TINY), 12, batch=2, rows=rows))
    session = Session(memory, TINY)
    run_session(session, 8, batch=2)
    fork = session.snapshot()
    first, second = (run_session(each, 4, batch=2, seed=1) for each in (session, fork))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise PolicyError(f"{name} goes on otherwise from a snapshot: something is changed in place")


def _check_same(name: str, run: Callable[[slice], list[Tensor]]) -> None:
    """Raise `PolicyError` if two runs differ, their second row alone gives something else, or they are not finite."""
    whole, again, row = (run(slice(*rows)) for rows in ((0, 2), (0, 2), (1, 2)))
    _require_finite(name, whole)
    if not all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)):
        raise PolicyError(f"{name} is not deterministic: the same run gave other bits")
    if not all(torch.allclose(a[1:], b, atol=1e-5) for a, b in zip(whole, row, strict=True)):
        raise PolicyError(f"{name} lets batch rows influence each other: a row alone gave another result")


def _require_finite(name: str, outputs: list[Tensor]) -> None:
    if any(not bool(out.isfinite().all()) for out in outputs):
        raise PolicyError(f"{name} made the output of attention infinite or NaN")


def _check_attended(memory: Memory, most_frames: int | None, session: Session) -> None:
    """Raise `PolicyError` if the chunk in progress attends a token twice, or more tokens than it may."""
    name, tokens = type(memory).__name__, session.stats()["attended_tokens"]
    if most_frames is not None and tokens > most_frames * TINY.tokens_per_frame:
        raise PolicyError(
            f"{name} attends {tokens} tokens, but at most {most_frames * TINY.tokens_per_frame} are allowed"
        )
    for cache in (leaf for each in session.caches for leaf in each.leaves):
        assert cache.context is not None
        keys, _ = cache.context.history()
        for row, length in enumerate(cache.context.lengths):
            for head in range(keys.shape[2]):
                # Random keys after RoPE are equal only if both token and place are.
                if keys[row, :length, head].unique(dim=0).shape[0] < length:
                    raise PolicyError(f"{name} attends a token twice at one place in layer {cache.index}")


def _check_replay(memory: Memory, session: Session) -> None:
    """Raise `PolicyError` if a chunk attends more or less after a replay than it would have without."""
    plain = session.snapshot()
    _replay(session)
    for each in (plain, session):
        run_session(each, 1, batch=2)
    before, after = (each.stats()["attended_tokens"] for each in (plain, session))
    if before != after:
        raise PolicyError(f"{type(memory).__name__} attends {after} tokens after a replay, but {before} without one")
    for seed, event in enumerate(get_args(Event), 1):  # a replay follows, whatever the memory has dropped
        session.notify(event)
        _replay(session)
        run_session(session, 1, batch=2, seed=seed)


def _replay(session: Session) -> None:
    """Commit the last frames anew, as behind a new prompt."""
    plan = session.replays()
    if plan:
        session.rewind(sum(plan))
    for part in plan:
        session.commit((), torch.zeros(2, 16, part, 8, 10))
        for layer in session.layers:
            shape = (3, 2, part * TINY.tokens_per_frame, TINY.heads, TINY.head_dim)
            queries, keys, values = torch.ones(shape, dtype=session.geometry.dtype)
            layer.attend(queries, keys, values, lambda queries, keys, values: queries)
        session.finish_commit()


def _check_veto(memory: Memory, session: Session) -> None:
    """Raise `PolicyError` if layers veto anything but the same rows; make a chunk from the states to try again with."""
    if type(memory).veto is Memory.veto and not memory.max_retries:
        return
    latents = torch.randn(2, 16, memory.chunk_frames, 8, 10, generator=torch.Generator().manual_seed(0))
    _, states = vetoes(memory, [memory.veto(state, latents) for state in session.past.states], 2)
    run_session(Session(memory, session.geometry, replace(session.past, states=states)), 1, batch=2)


def _outputs(stack: Stack, policy: Policy, rows: slice, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return what a dozen chunks give."""
    before = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    with named_failure(policy, dtype), own_noise(policy):
        outputs = run_session(Session(stack, replace(TINY, dtype=dtype)), 12, batch=2, rows=rows)
    if before != {f.name: getattr(policy, f.name) for f in fields(policy)}:  # type: ignore[arg-type]
        raise PolicyError(f"{type(policy).__name__} changed its own fields")
    return outputs


def _stack_with(policy: Policy, sizes: tuple[int, int], chunk_frames: int) -> Stack:
    roles: dict[str, Any] = {
        "partitioner": registry().policy(
            "partitioner", "sink-mid-recent", {"sink_frames": sizes[0], "recent_frames": sizes[1]}
        ),
        "compressor": registry().policy("compressor", "pool"),
        "selector": registry().policy("selector", "topk", {"topk": 3}),  # rows choose differently
        "reindexer": registry().policy("reindexer", "contiguous"),
    }
    if not isinstance(policy, (Partitioner, Compressor, Selector, Reindexer, Codec)):
        raise PolicyError(f"{type(policy).__name__} fills none of the roles {', '.join(roles)}")
    roles["store" if isinstance(policy, Codec) else policy.role] = policy
    return Stack("check", **roles, chunk_frames=chunk_frames)


def _check_tokens(policy: LatentCompressor, frames: int) -> None:
    grid, pixels_per_token, width = (4, 6), (16, 16), 24
    latents = torch.randn(2, 16, frames, 8, 12, generator=torch.Generator().manual_seed(0))

    def encode(pixels: Tensor) -> Tensor:
        latent_frames, height, pixel_width = (pixels.shape[2] - 1) // 4 + 1, pixels.shape[3] // 8, pixels.shape[4] // 8
        return torch.nn.functional.adaptive_avg_pool3d(pixels, (latent_frames, height, pixel_width)).repeat(
            1, 6, 1, 1, 1
        )[:, :16]

    def embed(small: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool3d(small, (1, 2, 2)).flatten(2).transpose(1, 2)  # [batch, cells, channels]
        return cells.repeat(1, 1, 2)[..., :width]

    def pixels() -> Tensor:
        if not policy.needs_pixels:
            raise PolicyError(f"{type(policy).__name__}.tokens asked for pixels, but its needs_pixels is False")
        return torch.rand(2, 3, 4 * frames, 64, 96) * 2 - 1

    def native(latents: Tensor) -> Tensor:
        return embed(torch.nn.functional.avg_pool3d(latents, (1, 2, 2)))

    policy.check(latents.shape[1], width, (2, 2), (2, 2))
    chunk = LatentChunk(latents, 8, grid, pixels, encode, embed, pixels_per_token, width, torch.float32, native)
    given, wanted = tuple(policy.tokens(chunk).shape), (2, policy.span(8, frames, grid).tokens, width)
    if given != wanted:
        raise PolicyError(f"{type(policy).__name__}.tokens returned {given}, but span() announces {wanted}")
