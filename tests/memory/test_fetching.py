"""What is chosen of an archive elsewhere comes by a kernel where there is one that works, with the same bits."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from kvpack import Session
from kvpack.memory import archive as archive_module
from kvpack.memory import fetching
from kvpack.plugins.registry import registry
from kvpack.testing import TINY, run_session

CUDA = torch.device("cuda", 0)


def gather_slots(stored, index):
    return stored.index_select(0, index)


@pytest.mark.parametrize("works", [True, False])
def test_a_kernel_reads_nothing_but_pinned_memory_without_gradients_and_only_for_cuda(works, monkeypatch):
    monkeypatch.setattr(fetching, "_kernel", lambda device: gather_slots if works else None)

    def tensor(pinned=True, requires_grad=False):
        return SimpleNamespace(is_pinned=lambda: pinned, requires_grad=requires_grad)

    pinned, pageable = tensor(), tensor(pinned=False)
    assert fetching.selecting("host", (pinned, pinned), CUDA) is (gather_slots if works else None)
    assert fetching.selecting("host", (pinned, pageable), CUDA) is None
    assert fetching.selecting("host", (pinned, tensor(requires_grad=True)), CUDA) is None
    assert fetching.selecting("disk", (pageable,), CUDA) is None
    assert fetching.selecting("host", (pinned,), torch.device("cpu")) is None
    for device in (CUDA, torch.device("cpu")):
        beside = fetching.selecting("device", (), device)
        assert beside is not None
        assert torch.equal(beside(torch.arange(6).view(3, 2), torch.tensor([2, 0])), torch.tensor([[4, 5], [0, 1]]))


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (None, None),
        (ImportError("no triton"), None),
        (ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)"), "(cpu tensor?)"),
        ("other bits", "pinned memory is read wrong"),
    ],
    ids=repr,
)
def test_a_kernel_that_fails_or_gives_other_bits_is_done_without(fails, said, monkeypatch, caplog):
    def fake(stored, index):
        if isinstance(fails, Exception):
            raise fails
        return gather_slots(stored, index) + (fails is not None)

    given = SimpleNamespace() if isinstance(fails, ImportError) else SimpleNamespace(gather_slots=fake)
    monkeypatch.setitem(sys.modules, "kvpack.memory.gather_kernel", given)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(logging.getLogger("kvpack"), "propagate", True)
    assert fetching._kernel.__wrapped__(torch.device("cpu")) is (None if fails else fake)
    assert ("copied by the host, without Triton, which fails here" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


def test_where_nothing_can_be_pinned_there_is_no_kernel(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("it can here")
    monkeypatch.setitem(sys.modules, "kvpack.memory.gather_kernel", SimpleNamespace(gather_slots=gather_slots))
    assert fetching._kernel.__wrapped__(torch.device("cpu")) is None


@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"share_selection": True}], ids=str)
def test_a_video_is_the_same_through_a_kernel(options, monkeypatch):
    """Of two rows, whose choices differ, with an archive that is full and one that grows."""
    calls = []

    def selected(stored, index):
        calls.append(index)
        assert stored.is_contiguous()  # a kernel goes by that
        return gather_slots(stored, index)

    for most in (3, None):
        stack = registry().stack("packforcing", {"topk": 2, "tier": "host", "archive_blocks": most, **options})
        wanted = run_session(Session(stack, TINY), 10, batch=2)
        with monkeypatch.context() as patch:
            patch.setattr(archive_module, "selecting", lambda *_: selected)
            given = run_session(Session(stack, TINY), 10, batch=2)
        assert all(torch.equal(one, two) for one, two in zip(wanted, given, strict=True))
    assert calls


@pytest.mark.parametrize(
    ("slots", "copies"), [([2], 1), ([1, 2, 3], 1), ([4, 5, 0, 1], 2), ([3, 2, 1], 3), ([0, 2, 3, 1], 3)]
)
def test_slots_in_a_row_come_in_one_copy(slots, copies, monkeypatch):
    stored, seen, to = torch.arange(24.0).view(2, 6, 2), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda each, *args, **named: seen.append(each) or to(each, *args, **named))
    found = fetching.in_order(stored, slots, torch.device("cpu"))
    assert torch.equal(found, stored[:, slots])
    assert len(seen) == copies
    assert (found.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()) == (copies == 1)
