"""What a denoising step launches, allocates and sends behind a full context, and that its shapes never change.

Tensors without numbers stand for a device, so that what goes there from the host is seen.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import hotpath
from kvpack import Session
from kvpack.memory import plan as plan_module
from kvpack.memory import sending, stack_plan
from kvpack.plugins.registry import registry
from kvpack.testing import TINY, run_session

SMALL = {"archive_blocks": 4, "topk": 2}
#: Kernels of a later step and layer, of memories whose blocks lie in place: pieces of history, keys, queries, values.
IN_PLACE = {
    "framepack": 4,
    "infinite-forcing": 4,
    "packforcing": 6,
    "sana-wm": 4,
    "self-forcing": 3,
    "streaming-llm": 4,
}
#: The same of memories that are copied and whose angles are computed anew; 10 to 14 tensors are allocated.
GATHERED = {"deep-forcing": 15, "flowcache": 12, "h2o": 12, "longlive": 15, "magi": 16, "rolling-sink": 33}


def counted(stack, chunks=16):
    return hotpath.counted(stack, SMALL if stack == "packforcing" else {}, hotpath.SMALL, chunks)


@pytest.mark.parametrize("stack", [*IN_PLACE, *GATHERED])
def test_a_later_step_launches_little_and_sends_nothing(stack):
    found = counted(stack)
    later = found[hotpath.LATER]
    assert len(later.names) == {**IN_PLACE, **GATHERED}[stack]
    if stack != "magi":  # which attends another part of the past in each step
        assert later == found["later step again"]
    assert later.sent == 0
    assert found[hotpath.COMMIT].sent == 0
    # Rotated queries, which the transformer makes without kvpack too.
    assert later.allocations == 1 if stack in IN_PLACE else later.allocations <= 14


@pytest.mark.parametrize("stack", ["packforcing", "self-forcing", "streaming-llm"])
def test_no_chunk_does_more_than_the_one_before(stack):
    # A whole turn of the archive's slots later: blocks that lie one behind the other are read where they lie.
    assert counted(stack, 16) == counted(stack, 16 + SMALL["archive_blocks"])


@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"selector": "uniform"}, {"selector": "random"}], ids=str)
def test_nothing_is_sent_but_without_waiting(options, monkeypatch):
    """Every copy to the device is one by `sent`, and all layers share them."""
    calls = []

    def sent(numbers, device):
        if device.type == "meta" and numbers.device.type == "cpu":
            calls.append(numbers)
        return numbers.to(device)

    for module in (plan_module, stack_plan, *(_module(options))):
        monkeypatch.setattr(module, "sent", sent)
    hotpath.counted("packforcing", {**SMALL, **options}, hotpath.SMALL, 15)
    calls.clear()
    counts = hotpath.counted("packforcing", {**SMALL, **options}, hotpath.SMALL, 1)[hotpath.FIRST]
    assert counts.sent == len(calls) > 0


def _module(options):
    from kvpack.policies import random_blocks, uniform

    return {"uniform": [uniform], "random": [random_blocks]}.get(options.get("selector"), [])


def test_what_is_sent_is_what_was_given(monkeypatch):
    numbers = torch.arange(3)
    assert sending.sent(numbers, torch.device("cpu")) is numbers
    pinned = []

    class Cuda:
        type = "cuda"

    class Numbers:
        device = torch.device("cpu")

        def numel(self):
            return 3

        def pin_memory(self):
            return self

        def to(self, device, non_blocking=False):
            pinned.append((device, non_blocking))
            return self

    device = Cuda()
    sending.sent(Numbers(), device)  # type: ignore[arg-type]
    assert pinned == [(device, True)]


class Static:
    """Where and how keys and values lie that each layer attends, in every forward of a chunk."""

    def __init__(self, session):
        self.session, self.seen = session, []

    def attention(self, queries, keys, values):
        self.seen.append([(each.data_ptr(), each.shape, each.stride()) for each in (keys, values)])
        return queries

    def chunk(self):
        session, geometry = self.session, self.session.geometry
        self.seen = []
        shape = 3, 2, session.coming_frames * geometry.tokens_per_frame, geometry.heads, geometry.head_dim
        for announce in (lambda: session.denoise(0), lambda: session.denoise(1), session.commit):
            projected = torch.randn(shape)
            for layer in announce():
                layer.attend(*projected, self.attention)
        session.finish_commit()
        return self.seen


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        *((name, SMALL if name == "packforcing" else {}) for name in IN_PLACE),
        ("packforcing", {**SMALL, "store": "int8"}),
        ("packforcing", {**SMALL, "tier": "host"}),
    ],
    ids=str,
)
def test_what_is_attended_lies_at_one_place_in_one_shape(stack, options):
    session = Session(registry().stack(stack, options), TINY)
    run_session(session, 14, batch=2)
    static = Static(session)
    first = static.chunk()
    assert len(first) == 3 * TINY.layers
    for layer in range(TINY.layers):  # in all forwards of a chunk
        assert first[layer] == first[layer + TINY.layers] == first[layer + 2 * TINY.layers]
    assert all(static.chunk() == first for _ in range(4))


#: Operators whose result, or its shape, the host must wait for.
DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "bincount")


class Lists(TorchFunctionMode):
    """Lists that are an index, which a GPU is waited for to be sent."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [each for each in index if isinstance(each, list)]
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Names of operators that wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        indices = args[1] if name in ("index", "index_put_") else ()
        masks = any(each is not None and each.dtype == torch.bool for each in indices)
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in DEPENDENT or masks or repeats:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stack", registry().names("stack"))
def test_no_operator_of_a_forward_waits(stack, monkeypatch):
    session = Session(registry().stack(stack, {}), TINY)
    found, attend = [], type(session.caches[0]).attend

    def watched(cache, *given):
        with Waits() as waits:
            made = attend(cache, *given)
        found.extend(waits.found)
        return made

    run_session(session, 12, batch=2)
    monkeypatch.setattr(type(session.caches[0]), "attend", watched)
    run_session(session, 2, batch=2)
    assert found == []


@pytest.mark.parametrize("stack", registry().names("stack"))
def test_no_list_is_an_index_in_a_chunk(stack):
    session = Session(registry().stack(stack, {}), TINY)
    with Lists() as lists:
        run_session(session, 12)
    assert lists.found == []


@pytest.mark.parametrize("reindexer", registry().names("reindexer"))
def test_no_reindexer_indexes_by_a_list(reindexer):
    options = {"reindexer": reindexer, "compressor": "pool", "selector": "topk", "topk": 2}
    session = Session(registry().stack("packforcing", options), TINY)
    with Lists() as lists:
        run_session(session, 12)
    assert lists.found == []


def test_such_operators_are_seen():
    with Lists() as lists:
        torch.zeros(2, 3)[:, [0, 2]] += 1
    assert lists.found == [[0, 2], [0, 2]]
    with Waits() as waits:
        numbers = torch.arange(4)
        numbers[numbers > 1]
        numbers.repeat_interleave(numbers)
        numbers.sum().item()
        numbers.nonzero()
    assert set(waits.found) >= {"index", "repeat_interleave", "_local_scalar_dense", "nonzero"}
