"""The host waits for the device once a chunk: at its end, for one number that stands for all checks."""

import pytest
import torch
from torch import Tensor

from kvpack import Session
from kvpack.memory import archive as archive_module
from kvpack.plugins.registry import registry
from kvpack.testing import TINY, run_session

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def waited(session, monkeypatch, chunks):
    """How often a chunk waited, in the forwards and in the end of its commit."""
    found, finish = [], Session.finish_commit
    count = [0]

    def finished(self):
        forwards = count[0]
        finish(self)
        found.append((forwards, count[0] - forwards))
        count[0] = 0

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish_commit", finished)
        for name in WAITS:
            real = getattr(Tensor, name)

            def counted(tensor, *given, real=real):
                count[0] += 1
                return real(tensor, *given)

            patch.setattr(Tensor, name, counted)
        run_session(session, chunks, batch=2)
    return found


@pytest.mark.parametrize("stack", registry().names("stack"))
def test_a_chunk_waits_once(stack, monkeypatch):
    found = waited(Session(registry().stack(stack, {}), TINY), monkeypatch, 12)
    assert found[-1] == (0, 1)


@pytest.mark.parametrize("options", [{"selector": "softmax-mass"}, {"compressor": "pool"}, {"store": "int8"}], ids=str)
def test_nor_do_its_options_wait(options, monkeypatch):
    session = Session(registry().stack("packforcing", {"topk": 2, **options}), TINY)
    assert waited(session, monkeypatch, 12)[-1] == (0, 1)


@pytest.mark.parametrize("options", [{}, {"store": "int8"}], ids=str)
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_elsewhere_a_layer_waits_once_for_what_was_chosen(options, tier, monkeypatch):
    session = Session(registry().stack("packforcing", {"topk": 2, "tier": tier, **options}), TINY)
    assert waited(session, monkeypatch, 12)[-1] == (TINY.layers, 1)


@pytest.mark.parametrize("options", [{}, {"store": "int8"}], ids=str)
def test_nor_does_pinned_memory_that_a_kernel_reads(options, monkeypatch):
    session = Session(registry().stack("packforcing", {"topk": 2, "tier": "host", **options}), TINY)
    monkeypatch.setattr(archive_module, "selecting", lambda *_: lambda stored, index: stored.index_select(0, index))
    assert waited(session, monkeypatch, 12)[-1] == (0, 1)


def test_waits_are_seen(monkeypatch):
    denoise = Session.denoise

    def waits(session, step):
        assert torch.ones(()).item() == 1
        return denoise(session, step)

    monkeypatch.setattr(Session, "denoise", waits)
    assert waited(Session(registry().stack("self-forcing", {}), TINY), monkeypatch, 3)[-1] == (2, 1)
