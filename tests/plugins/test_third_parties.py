"""What others install: named when it fails, lies or dawdles; and the example package, loaded as an installed one is."""

import time
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvpack.cli.tables import installed, paper
from kvpack.errors import InvalidOptionError, PluginWarning, PolicyError, UnknownNameError
from kvpack.memory import Attended, StateMemory
from kvpack.memory.blocks import KVBlock
from kvpack.memory.session import Session
from kvpack.plugins.registry import Registry, package_version
from kvpack.policies import (
    ContiguousReindexer,
    LowResolutionCompressor,
    MemRoPE,
    PoolCompressor,
    QueryTopK,
    RecencySelector,
    SinkMidRecentPartitioner,
    framepack,
    packforcing,
    streaming_llm,
)
from kvpack.policies.quantized import Int8Codec
from kvpack.testing import TINY, check_memory, check_policy, run_session, tiny_wan_pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "kvpack-coin"


@dataclass(frozen=True)
class Acme(RecencySelector):
    how: str = "raise"
    name = "acme"

    def select(self, query, candidates):
        if self.how == "raise":
            raise ZeroDivisionError("by acme")
        if self.how == "nonsense":
            return [0]
        time.sleep(0.01)
        return super().select(query, candidates)


def run(selector, chunks=6):
    session = Session(packforcing(selector=selector, chunk_frames=2, sink_frames=2, recent_frames=2), TINY)
    run_session(session, chunks, steps=1)
    return session


def test_a_policy_that_raises_is_named_and_its_error_stays():
    with pytest.raises(ZeroDivisionError, match="by acme") as error:
        run(Acme(topk=1))
    assert error.value.__notes__ == [f"raised in Acme.select of {__name__}, layer 0"]


def test_a_policy_that_returns_nonsense_is_named():
    with pytest.raises(PolicyError, match=r"Acme\.select returned list in layer 0"):
        run(Acme(topk=1, how="nonsense"))


EMPTY = KVBlock.__new__(KVBlock)  # past the check of shapes, which users do not have
vars(EMPTY).update(keys=None, values=None)


@pytest.mark.parametrize(
    ("role", "base", "method", "what"),
    [
        ("partitioner", SinkMidRecentPartitioner, "partition", None),
        ("compressor", PoolCompressor, "compress", EMPTY),
        ("reindexer", ContiguousReindexer, "place", None),
        ("selector", RecencySelector, "limit", -1),
    ],
)
def test_whatever_a_policy_raises_or_returns_its_method_is_named(role, base, method, what):
    def give(error):
        def call(self, *_):
            if error is not None:
                raise type(error)(*error.args)
            return what

        return call

    stack = packforcing(chunk_frames=2, sink_frames=2, recent_frames=2)
    for error in (None, KeyError("lost"), KeyboardInterrupt()):
        mine = dataclass(frozen=True)(type("Mine", (base,), {}))
        session = Session(replace(stack, **{role: mine()}), TINY)
        setattr(mine, method, give(error))
        with pytest.raises(PolicyError if error is None else type(error)) as caught:
            run_session(session, 9, steps=1)
        if error is None:
            assert f"Mine.{method} returned" in str(caught.value)
        else:
            notes = getattr(caught.value, "__notes__", [])
            assert [f"Mine.{method}" in note for note in notes] == [True] * isinstance(error, Exception)


@pytest.mark.parametrize("method", ["encode_keys", "encode_values", "decode_keys", "decode_values"])
@pytest.mark.parametrize("made", [packforcing(topk=2), packforcing(selector="recency", topk=2), framepack()])
def test_a_codec_that_raises_is_named(method, made):
    def call(self, given, *others):
        if not next(iter(given)).is_meta:
            raise KeyError("lost")
        return getattr(Int8Codec, method)(self, given, *others)

    mine = dataclass(frozen=True)(type("Mine", (Int8Codec,), {method: call}))
    with pytest.raises(KeyError) as caught:
        run_session(Session(replace(made, store=mine()), TINY), 9, steps=1)
    assert caught.value.__notes__[0].startswith(f"raised in Mine.{method if 'decode' in method else 'encode'} of ")


@pytest.mark.parametrize("method", ["encode_keys", "decode_values"])
def test_a_codec_whose_form_cannot_be_known_is_named(method):
    def call(self, *_):
        raise KeyError("lost")

    mine = dataclass(frozen=True)(type("Mine", (Int8Codec,), {method: call}))
    with pytest.raises(KeyError) as caught:
        Session(replace(packforcing(), store=mine()), TINY)
    assert caught.value.__notes__[0].startswith(f"raised in Mine.{method} of ")


@pytest.mark.parametrize(("tokens", "start"), [(None, 0.0), ((), None), ((), float("nan"))])
def test_a_memory_that_returns_nonsense_is_named(tokens, start):
    class Nonsense(MemRoPE):
        def attend(self, state, chunk):
            attended = super().attend(state, chunk)
            object.__setattr__(attended, "tokens", tokens)
            object.__setattr__(attended, "chunk_start", start)
            return attended

    with pytest.raises(PolicyError, match=r"Nonsense\.attend returned .* in layer 0"):
        run_session(Session(Nonsense(), TINY), 1)


def test_a_slow_policy_is_seen_in_stats():
    spent = run(Acme(topk=1, how="slow")).stats()["policy_seconds"]
    assert spent["Acme"] > 0.03
    assert max(spent, key=lambda name: spent[name]) == "Acme"
    assert {"SinkMidRecentPartitioner", "FarthestCompressor", "FitReindexer"} <= set(spent)


def test_a_memory_that_raises_is_named():
    @dataclass(frozen=True)
    class Broken(StateMemory):
        chunk_frames: int = 1
        name = "acme-broken"

        def attend(self, state, chunk):
            return Attended((), 0.0, state)

        def remember(self, state, chunk):
            raise KeyError("lost")

    session = Session(Broken(), TINY)
    with pytest.raises(KeyError) as error:
        run_session(session, 1)
    assert "raised in Broken.remember" in error.value.__notes__[0]
    assert session.frames == 0


@pytest.fixture
def coin(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    return EntryPoint("coin", "kvpack_coin", "kvpack")


def test_the_example_is_found_as_any_package_is(coin):
    found = Registry([coin])
    assert found.failures == []
    assert found.origins == {("selector", "coin-toss"): "kvpack_coin", ("stack", "coin-packforcing"): "kvpack_coin"}
    check_policy(found.policy("selector", "coin-toss", {"topk": 2}))
    assert found.stack("coin-packforcing", {"topk": 3}).selector.topk == 3


def test_two_packages_that_want_a_name_are_both_named(coin, monkeypatch, tmp_path):
    (tmp_path / "other_coin.py").write_text((EXAMPLE / "kvpack_coin.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    other = EntryPoint("other", "other_coin", "kvpack")
    with pytest.warns(PluginWarning, match="already installed by kvpack_coin; other_coin wants it too"):
        found = Registry([coin, other])
    assert [(each.plugin, each.package) for each in found.failures] == [("other", "other_coin")]
    for ask in (lambda: found.policy("selector", "coin-toss"), lambda: found.stack("coin-packforcing", {})):
        with pytest.raises(InvalidOptionError, match="in two packages, kvpack_coin and other_coin; uninstall one"):
            ask()


def test_a_name_of_a_plugin_that_failed_says_so(tmp_path, monkeypatch):
    (tmp_path / "acme_broken.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(PluginWarning, match="acme_broken"):
        found = Registry([EntryPoint("acme", "acme_broken", "kvpack")])
    assert "nothing_of_that_name" in found.failures[0].error
    with pytest.raises(UnknownNameError) as error:
        found.stack("acme", {})
    assert "plugin 'acme' of acme_broken was left out" in error.value.__notes__[0]


def test_the_table_has_papers_and_versions():
    rows = {(row["role"], row["name"]): row for row in installed()}
    assert rows["memory", "memrope"]["paper"] == paper(MemRoPE) == "arXiv 2603.12513"
    assert rows["stack", "streaming-llm"]["paper"] == paper(streaming_llm) == "arXiv 2309.17453"
    assert rows["selector", "topk"]["paper"] == paper(QueryTopK) == "arXiv 2603.25730"
    assert rows["selector", "topk"]["version"] == package_version("kvpack") != ""
    assert package_version("no-such-package") == ""


def test_check_memory_finds_what_breaks_the_contract():
    @dataclass(frozen=True)
    class Window(StateMemory):
        how: str = "right"
        chunk_frames: int = 1
        name = "acme-window"
        replay_frames = 1

        def attend(self, state, chunk):
            held = chunk.tokens[:0] if state is None else state
            twice = (held, held[:3]) if self.how == "twice" else (held,)
            return Attended(twice, chunk.first_frame, held)

        def remember(self, state, chunk):
            tokens = state + chunk.tokens
            return tokens if self.how == "grows" else tokens[-3 * chunk.geometry.tokens_per_frame :]

        def forget(self, state, tokens):
            return state[: len(state) - tokens]

    check_memory(Window(), most_frames=3)
    check_memory(Window("grows"))
    for how, message in (
        ("twice", "attends a token twice at one place in layer 0"),
        ("grows", "attends 80 tokens, but"),
    ):
        with pytest.raises(PolicyError, match=message):
            check_memory(Window(how), most_frames=3 if how == "grows" else None)

    class Growing(Window):
        def remember(self, state, chunk):
            return state + chunk.tokens

        def forget(self, state, tokens):
            return state

    with pytest.raises(PolicyError, match=r"attends 260 tokens after a replay, but 240 without one"):
        check_memory(Growing())

    class Forgetful(Window):
        def forget(self, state, tokens):
            raise IndexError("no such token")

    with pytest.raises(PolicyError, match=r"Forgetful fails in torch\.float32: IndexError: no such token"):
        check_memory(Forgetful())


def test_a_plugin_that_registers_a_name_twice_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "acme_twice.py").write_text(
        "import kvpack\n\n@kvpack.hookimpl\ndef kvpack_register_stacks(register):\n"
        "    register('acme', dict)\n    register('acme', list)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(PluginWarning, match="acme_twice registers stack 'acme' twice"):
        assert Registry([EntryPoint("acme", "acme_twice", "kvpack")]).origins == {}


@pytest.mark.parametrize("level", [-1, 0.5, None])
def test_a_level_that_is_none_is_named(level):
    class Levels(PoolCompressor):
        def level(self, age):
            return level

    stack = packforcing(chunk_frames=2, sink_frames=2, recent_frames=2)
    with pytest.raises(PolicyError, match=rf"Levels\.level returned {level} for age 0"):
        run_session(Session(replace(stack, compressor=Levels()), TINY), 6, steps=1)


def test_hidden_tokens_that_are_no_tensor_are_named():
    class Empty(LowResolutionCompressor):
        def tokens(self, chunk):
            return None

    pipe = tiny_wan_pipeline()
    pipe.enable_packforcing(compressor=Empty(), chunk_frames=1, sink_frames=1, recent_frames=1)
    size = {"num_frames": 13, "height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(PolicyError, match=r"Empty\.tokens returned NoneType, but it must be a tensor"):
        pipe("a fox", output_type="latent", max_sequence_length=16, **size)
