"""Options of the packforcing stacks: whose choice counts, an uncompressed mid, no mid at all, the paper's constants."""

from dataclasses import replace

import pytest
import torch

from helpers import archive_bytes, quiet, twins
from kvpack.errors import InvalidOptionError
from kvpack.memory.ledger import Ledger
from kvpack.memory.session import Session
from kvpack.memory.stack import Stack
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import ContiguousReindexer, LowResolutionCompressor, QueryTopK, SinkMidRecentPartitioner
from kvpack.shipped import shipped_compressor
from kvpack.testing import TINY, run_session, tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 125,  # 32 latent frames of 1 x 2 tokens: eight chunks
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline())


@pytest.mark.parametrize("sizes", [(0, 4), (0, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize("reindexer", ["absolute", "sink-shift", "contiguous", "fit"])
@pytest.mark.parametrize(("selector", "topk"), [("topk", 0), ("topk", 1), ("topk", 32), ("all", 1)])
def test_an_uncompressed_mid(sizes, reindexer, selector, topk, pipe):
    sink, recent = sizes
    options = {"topk": topk} if selector == "topk" else {}
    options |= {"train_frames": 24} if reindexer == "fit" else {}
    pipe.enable_packforcing(
        compressor="identity", selector=selector, reindexer=reindexer, sink_frames=sink, recent_frames=recent, **options
    )
    frames = pipe(generator=torch.Generator().manual_seed(0), **CALL).frames
    assert frames.shape[2] == 32
    assert bool(frames.isfinite().all())
    stats = pipe.packforcing.stats()
    mid = (28 - sink - recent) // 4  # blocks when the eighth chunk was generated
    attended = mid if selector == "all" else min(topk, mid)
    assert stats["attended_tokens"] == 2 * (sink + recent + 4 * attended)
    assert stats["archive_blocks"] == (mid + 1 if selector == "all" or topk else 0)


@pytest.mark.parametrize("compressor", ["pool", "identity", "lr"])
def test_nothing_is_archived_that_is_never_attended(compressor):
    session = Session(registry().stack("packforcing", {"topk": 0, "compressor": compressor}), TINY)
    run_session(session, 9)
    stats = session.stats()
    assert stats["attended_tokens"] == 12 * TINY.tokens_per_frame
    assert stats["archive_blocks"] == stats["archive_bytes"] == 0
    assert archive_bytes(session) == 0
    assert not any(twin for layer in range(2) for twin in twins(session, layer))
    assert session.pending_compressions() == ()


def test_a_block_that_is_not_kept_is_not_written():
    ledger = Ledger(SinkMidRecentPartitioner(4, 4), 4, archive_blocks=0)
    for _ in range(6):
        step = ledger.commit()
        assert step.leaving == ()
        ledger = step.ledger
    assert ledger.archive == ()


def choices(shared, **options):
    """What every layer and row chose, chunk by chunk."""
    stack = registry().stack("packforcing", {"topk": 2, "share_selection": shared, **options})
    session, made = Session(stack, replace(TINY, layers=3)), []
    for seed in range(12):
        run_session(session, 1, batch=2, seed=seed)
        if session.stats()["selected"]:
            made.append(session.stats()["selected"])
    assert len(made) >= 5
    return made


@pytest.mark.parametrize(
    "options", [{}, {"reindexer": "absolute"}, {"sink_frames": 7, "recent_frames": 5, "chunk_frames": 3}]
)
def test_selection_by_layer_or_by_chunk(options):
    chunk, layer = choices(True, **options), choices(False, **options)
    assert layer == choices(False, **options)
    for shared, own in zip(chunk, layer, strict=True):
        assert shared == [own[0]] * 3
    assert any(own[0] != own[1] for own in layer)
    assert any(shared[0][0] != shared[0][1] for shared in chunk)  # batch rows still choose for themselves


def test_by_layer_is_the_default_and_both_come_back_from_data():
    default = registry().stack("packforcing", {})
    assert default.share_selection is default.to_dict()["share_selection"] is False
    shared = registry().stack("packforcing", {"share_selection": True})
    assert stack_from_dict(shared.to_dict()) == shared != replace(shared, share_selection=False)
    with pytest.raises(InvalidOptionError, match="share_selection must be True or False, got 'head'"):
        replace(default, share_selection="head")


def test_the_paper_s_constants_are_fixed():
    """Every number is written out here and there; a default that changes must not change them."""
    stack = registry().stack("packforcing-paper", {})
    assert stack == Stack(
        "packforcing-paper",
        SinkMidRecentPartitioner(8, 4),
        LowResolutionCompressor(coordinates="centered"),
        QueryTopK(16, after_rope=False),
        ContiguousReindexer(),
        4,
        None,
        False,
        "rerun",
    )
    with pytest.raises(InvalidOptionError, match="no option of stack packforcing-paper named 'topk'"):
        registry().stack("packforcing-paper", {"topk": 8})


def test_the_folder_of_a_compressor_may_be_a_path():
    paths = registry().stack("packforcing", {"compressor": shipped_compressor()})
    texts = registry().stack("packforcing", {"compressor": str(shipped_compressor())})
    assert paths.compressor.to_dict() == texts.compressor.to_dict()
