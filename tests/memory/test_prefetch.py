"""Archived keys of the next layer come while one works; a stand-in for CUDA's streams notes the order."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from kvpack import Session
from kvpack.memory import archive as archive_module
from kvpack.memory import prefetch
from kvpack.memory.archive import Archive
from kvpack.memory.prefetch import Prefetch, overlaps
from kvpack.plugins.registry import registry
from kvpack.testing import TINY, run_session

CPU = torch.device("cpu")


class Event:
    waited: list["Event"] = []  # by the host

    def record(self, stream):
        stream.log.append((stream.name, "records", self))

    def synchronize(self):
        self.waited.append(self)


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))


def archives_of(session):
    return [state.archive for state in session.past.states]


@pytest.fixture
def log(monkeypatch):
    """Return what streams did, of a CPU that takes itself for a card."""
    log, streams = [], [None]
    main, side = (Stream(name, log) for name in ("main", "side"))
    streams[0] = main

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    copy = prefetch._copy

    def copied(room, stored, slots):
        assert streams[-1] is side
        log.append(("side", "copies", tuple(slots)))
        copy(room, stored, slots)

    monkeypatch.setattr(prefetch, "_copy", copied)
    monkeypatch.setattr(prefetch, "_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda each, stream: log.append((stream.name, "uses", None)))
    return log


def test_only_pinned_memory_beside_cuda_is_read_ahead():
    assert overlaps("host", torch.device("cuda", 0))
    assert not any(overlaps(tier, torch.device("cuda", 0)) for tier in ("device", "disk"))
    assert not overlaps("host", CPU)


@pytest.mark.parametrize("selector", [{"selector": "softmax-mass"}, {"selector": "softmax-mass", "share_selection": 1}])
@pytest.mark.parametrize("store", ["dense", "int8"])
def test_each_layer_but_the_first_finds_its_keys_there(selector, store, log, monkeypatch):
    options = {"selector": selector["selector"], "share_selection": "share_selection" in selector}
    stack = registry().stack("packforcing", {"topk": 2, "archive_blocks": 4, "tier": "host", "store": store, **options})
    wanted = run_session(Session(stack, TINY), 12, batch=2)
    monkeypatch.setattr(archive_module, "overlaps", lambda tier, device: tier == "host")
    found, take = [], Prefetch.take

    def taken(self, owner, slots, device):
        parts = take(self, owner, slots, device)
        found.append(parts is not None)
        return parts

    monkeypatch.setattr(Prefetch, "take", taken)
    given = run_session(Session(stack, TINY), 12, batch=2)
    assert all(map(torch.equal, wanted, given))
    assert found
    per_chunk = TINY.layers if not options["share_selection"] else 1
    for first in range(0, len(found), per_chunk):
        assert found[first : first + per_chunk] == [False] + [True] * (per_chunk - 1)
    assert any(did == "copies" for _, did, _ in log) == any(found)


def asked(ahead, owner, runs):
    for slots in runs:
        assert ahead.take(owner, slots, CPU) is None


def test_copies_lie_where_those_of_the_layer_before_lay_once_they_were_read(log):
    first, second = ((torch.randn(2, 6, 2, 1),), (torch.randn(2, 6, 2, 1),))
    ahead, runs = Prefetch(), [[4, 5, 0], [2]]
    asked(ahead, "before", [*runs, *runs])  # what is asked for twice is begun once
    ahead.begin("first", first, CPU)
    events = [what for _, did, what in log if did == "records"]
    assert log.index(("side", "waits for", "main")) < log.index(("side", "copies", (4, 5, 0)))
    assert ahead.take("second", runs[0], CPU) is None
    rooms = []
    for slots, event in zip(runs, events, strict=True):
        (room,) = ahead.take("first", slots, CPU)
        assert torch.equal(room, first[0][:, slots])
        assert log[-1] == ("main", "waits for", event)
        rooms.append(room)
    log.clear()
    ahead.begin("second", second, CPU)
    assert log[0] == ("side", "waits for", "main")  # no memory is got anew
    for slots, room in zip(runs, rooms, strict=True):
        (again,) = ahead.take("second", slots, CPU)
        assert again is room
        assert torch.equal(again, second[0][:, slots])
    assert ahead.take("first", runs[0], CPU) is None
    assert ahead.take("second", [0], CPU) is None
    ahead.drop()
    assert ahead.take("second", runs[0], CPU) is None


def test_no_question_needs_no_stream(log):
    Prefetch().begin("it", (torch.zeros(1, 2, 1, 1),), CPU)
    assert not log


def test_the_host_waits_for_what_it_looks_at_and_for_nothing_else(log, monkeypatch):
    """A write to pinned memory is on its way until an archive grows, or a fork gets memory of its own."""
    monkeypatch.setattr(archive_module, "overlaps", lambda tier, device: tier == "host")
    stack = registry().stack("packforcing", {"topk": 2, "archive_blocks": 3, "tier": "host"})
    session = Session(stack, TINY)
    run_session(session, 12)
    Event.waited.clear()
    run_session(session, 2)  # slots are written over
    assert not Event.waited
    pending = [archive._written for archive in archives_of(session)]
    fork = session.snapshot()
    run_session(fork, 1)
    assert Event.waited[: len(pending)] == pending
    for archive in archives_of(session):
        archive.settle()
    Event.waited.clear()
    archives_of(session)[0].settle()
    assert not Event.waited


def test_where_memory_is_short_it_is_left_to_the_model(log, monkeypatch):
    rooms, empty = [], torch.empty

    def short(*what, **named):
        if rooms:
            raise torch.OutOfMemoryError("no")
        rooms.append(weakref.ref(room := empty(*what, **named)))
        return room

    ahead, stored = Prefetch(), (torch.zeros(1, 6, 2, 1),)
    asked(ahead, "before", [[1], [4]])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", short)
        ahead.begin("it", stored, CPU)
    assert rooms[0]() is None
    asked(ahead, "it", [[1], [4]])
    ahead.begin("next", stored, CPU)  # nor in the rest of the chunk
    asked(ahead, "next", [[1], [4]])
    assert not [did for _, did, _ in log if did == "copies"]


@pytest.mark.parametrize("rows", [1, 2])
def test_only_what_lies_in_one_piece_is_written_without_a_wait(rows, log, monkeypatch):
    archive, block, waits = Archive(2, tier="host"), torch.randn(2, rows, 2, 1, 4), []
    archive.reserve(2, block[0])
    monkeypatch.setattr(archive_module, "overlaps", lambda tier, device: tier == "host")
    copy = torch.Tensor.copy_

    def copied(place, part, non_blocking=False):
        waits.append(not non_blocking)
        return copy(place, part)

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    archive.write(0, archive.encoded(*block))
    assert waits == [rows > 1] * 2
