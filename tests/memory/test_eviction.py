"""What a full archive forgets."""

from itertools import pairwise

import pytest
import torch

from helpers import ledger
from kvpack import Session
from kvpack.errors import InvalidOptionError, UnusedOptionError
from kvpack.memory.eviction import evicted
from kvpack.planning.resident import most_resident, resident
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.testing import TINY, run_session

SIZES = {"topk": 2, "archive_blocks": 6}


def run(chunks, **options):
    session = Session(registry().stack("packforcing", {**SIZES, **options}), TINY)
    return run_session(session, chunks, batch=2), session


def firsts(session):
    return [piece.first_frame for piece in ledger(session).archive]


def test_the_oldest_go_or_the_archive_is_thinned_out():
    assert firsts(run(60)[1]) == list(range(212, 236, 4))
    spread = firsts(run(60, eviction="spread")[1])
    assert (len(spread), spread[0], spread[-1]) == (6, 8, 232)
    gaps = [later - earlier for earlier, later in pairwise(spread)]
    assert gaps == sorted(gaps, reverse=True)


def test_blocks_that_two_rules_keep_are_the_same_bits():
    """Until the archive is full nothing differs; then other blocks are chosen among."""
    (first, _), (other, _) = run(14), run(14, eviction="spread")
    same = [torch.equal(one, two) for one, two in zip(first, other, strict=True)]
    full = 2 + 1 + 6 + 1  # sink, recent, the archive, and the chunk that sees it full
    assert all(same[:full])
    assert not all(same[full:])


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_every_tier_gives_the_same_bits(tier):
    here, there = (torch.cat(run(20, eviction="spread", tier=each)[0], dim=1) for each in ("device", tier))
    assert torch.equal(here, there)


def test_a_resumed_session_forgets_the_same():
    _, session = run(12, eviction="spread")
    again = Session(session.stack, TINY, session.state())
    on, resumed = (run_session(each, 8, batch=2, seed=1) for each in (session, again))
    assert all(torch.equal(one, two) for one, two in zip(on, resumed, strict=True))
    assert firsts(session) == firsts(again)
    assert firsts(session)[0] == 8


def test_the_plan_is_the_same_whatever_goes():
    _, session = run(20, eviction="spread")
    held = resident(TINY, session.stack, 20, 2).bytes(TINY.layers)
    assert held == session.stats()["resident_bytes"]
    most = most_resident(TINY, session.stack, None, 2)
    assert most is not None
    assert most.bytes(TINY.layers) == held


def test_it_is_an_option_of_an_archive_with_a_bound():
    made = registry().stack("packforcing", {"eviction": "spread"})
    assert made.eviction == "spread"
    assert stack_from_dict(made.to_dict()) == made
    with pytest.raises(InvalidOptionError, match="eviction must be one of oldest, spread, got 'newest'"):
        registry().stack("packforcing", {"eviction": "newest"})
    with pytest.raises(UnusedOptionError, match="eviction has no effect: packforcing-paper keeps all blocks"):
        registry().stack("packforcing-paper", {"eviction": "spread"})
    with pytest.raises(UnusedOptionError, match="eviction has no effect: self-forcing archives no blocks"):
        registry().stack("self-forcing", {"eviction": "spread"})


def test_of_fewer_than_three_blocks_the_oldest_goes():
    assert [evicted([4, 8][:count], 20, "spread") for count in (1, 2)] == [0, 0]
