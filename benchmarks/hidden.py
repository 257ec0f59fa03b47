"""How far keys and values of a compressed block are from those at its commit, if they are made anew when it is chosen.

A latent-space compressor's hidden tokens could be stored in place of keys and values of all layers. Videos of the
shipped pipeline; at each commit the tokens of the blocks of 0, 4 and 12 chunks before run through the model again, in
the context of that commit. Relative L2 by layer: the norm of the difference over that of what the commit made. 0 chunks
is a check of the measurement. Values are means over blocks; low and high are the least and the greatest block.

With `project="direct"` no layer sees a context, so keys and values are the same bits whenever they are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.leaderboard.rollout import pipeline
from benchmarks.report import Bar, Row, say, script
from benchmarks.toyworld import world
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.roles import Compressor
from kvpack.memory.store import KeysValues
from kvpack.policies import LowResolutionCompressor
from kvpack.shipped import CALL, TRAINING, shipped_compressor, shipped_folder

AGES = 0, 4, 12
COMPRESSORS: dict[str, Compressor | str] = {
    "lr": "lr",
    "dual, trained": str(shipped_compressor()),
    "lr, direct": LowResolutionCompressor(project="direct"),
}
BARS: tuple[Bar, ...] = ()


@contextmanager
def watched(found: dict[tuple[int, int, str], list[float]]) -> Iterator[None]:
    """Add the relative distances of each (age in chunks, layer, what) to `found` while a video is made."""
    blocks: dict[int, tuple[BlockEntry, Tensor, list[KeysValues]]] = {}
    commit = WanDenoiser.commit_branch

    def commit_branch(
        self: WanDenoiser, branch: str, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, rerun: bool
    ) -> None:
        commit(self, branch, latents, tokens, rerun=rerun)
        caches = self.session(branch).caches
        for piece, each in tokens.items():
            blocks[piece.first_frame] = piece, each, [cache.twins[piece] for cache in caches]
        pending = [dict(cache.twins) for cache in caches]
        for age in AGES:
            if (first := self.frames - age * TRAINING["chunk_frames"]) in blocks:
                piece, hidden, before = blocks[first]
                self._commit_tokens(branch, piece, hidden)
                for layer, (cache, old) in enumerate(zip(caches, before, strict=True)):
                    for what, one, other in zip(("keys", "values"), old, cache.twins[piece], strict=True):
                        found[age, layer, what].append(float((other - one).norm() / one.norm()))
        for cache, twins in zip(caches, pending, strict=True):
            cache.twins = twins

    with patch.object(WanDenoiser, "commit_branch", commit_branch):
        yield


@torch.no_grad()
def measure(small: bool) -> list[Row]:
    """Make videos of some captions with each compressor."""
    captions, frames = (1, 129) if small else (4, 481)
    torch.set_num_threads(1)  # tensors this small are slower on several
    pipe = pipeline(shipped_folder())
    rows = []
    for name, compressor in COMPRESSORS.items():
        found: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        for seed, scene in enumerate(world.HELD_OUT[:captions]):
            say(f"hidden: {name}, video {seed + 1} of {captions}")
            pipe.enable_packforcing(compressor=compressor)
            call = {**CALL, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(seed)}
            with watched(found):
                for _ in pipe.packforcing.stream(scene.caption, num_frames=frames, output_type="latent", **call):
                    pass
            pipe.disable_packforcing()
        for (age, layer, what), far in sorted(found.items()):
            metric = f"{what}, {age} chunks later"
            rows.append(Row(f"{name}, layer {layer}", metric, fmean(far), min(far), max(far), "ratio", len(far)))
    return rows


if __name__ == "__main__":
    script("hidden", __doc__ or "", measure, BARS)
