"""What plugins and users hand in: used, or refused in one line that says what would be right."""

import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch

from kvpack.adapters.wan import WanAdapter
from kvpack.checkpoints.config import Settings
from kvpack.cli.tables import described
from kvpack.errors import InvalidOptionError, PluginWarning, UnusedOptionError
from kvpack.memory import Attended, StateMemory
from kvpack.plugins.registry import Registry, registry
from kvpack.plugins.resolve import resolve_policy, resolve_stack
from kvpack.policies import FitReindexer, MemRoPE, PoolCompressor, QueryTopK, RecencySelector, packforcing
from kvpack.testing import tiny_wan_pipeline

BUILT_INS = entry_points(group="kvpack")

MEMORY = """
from dataclasses import dataclass
import kvpack
from kvpack.memory import Attended, StateMemory

@dataclass(frozen=True)
class Nothing(StateMemory):
    chunk_frames: int = 4
    size: int = 0
    name = "acme-nothing"

    def attend(self, state, chunk):
        return Attended((), 0.0, state)

    def remember(self, state, chunk):
        return state
"""
AS_POLICY = """
@kvpack.hookimpl
def kvpack_register_policies(register):
    register(Nothing)
"""
AS_STACK = """
@kvpack.hookimpl
def kvpack_register_stacks(register):
    register("acme-nothing", {factory})
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Makes an installed package of a plugin's source."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source, module="acme_module"):
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return EntryPoint("acme", module, "kvpack")

    yield make
    sys.modules.pop("acme_module", None)


@pytest.mark.parametrize(
    ("factory", "size"), [("Nothing", 0), ("lambda size=3: Nothing(size=size)", 3), (None, 0)], ids=str
)
def test_a_memory_is_a_policy_and_a_stack_under_one_name(factory, size, plugin):
    source = MEMORY + AS_POLICY + ("" if factory is None else AS_STACK.format(factory=factory))
    found = Registry([*BUILT_INS, plugin(source)])
    assert found.failures == []
    assert found.stack("acme-nothing", {}).size == size
    assert found.stack("acme-nothing", {"size": 5}) == found.policy("memory", "acme-nothing", {"size": 5})
    assert {kind for kind, name in found.origins if name == "acme-nothing"} == {"memory", "stack"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (MEMORY + AS_POLICY.replace("register(Nothing)", "register(Nothing); register(Nothing)"), "memory .* twice"),
        (MEMORY + AS_STACK.format(factory="Nothing()"), "registers a name and a function that returns a memory"),
        (MEMORY + AS_POLICY.replace("register(Nothing)", "register(Nothing())"), "registers classes of policies"),
        (
            "import kvpack\nfrom kvpack.adapters.wan import WanAdapter\n@kvpack.hookimpl\n"
            "def kvpack_register_adapters(register):\n    register(WanAdapter)",
            "registers instances of Adapter, got <class",
        ),
    ],
)
def test_what_is_no_plugin_is_told_at_once(source, message, plugin):
    with pytest.warns(PluginWarning, match=message) as caught:
        found = Registry([*BUILT_INS, plugin(source)])
    assert (len(caught), len(found.failures)) == (1, 1)


@pytest.mark.parametrize(
    "body",
    [
        "STACK = packforcing(topk=3)\n1 / 0",
        "@kvpack.hookimpl\ndef kvpack_register_stacks(register):\n    packforcing(topk=3)\n    1 / 0",
    ],
)
def test_a_plugin_that_asks_for_names_while_it_loads_is_loaded_once(body, tmp_path, python):
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpack]\nacme = acme_module\n")
    source = f"import kvpack\nfrom kvpack.policies.stacks import packforcing\nprint('loaded')\n{body}\n"
    (tmp_path / "acme_module.py").write_text(source)
    code = "import warnings; warnings.simplefilter('always'); import kvpack"
    code += "; from kvpack.plugins.registry import registry as found"
    code += "; print(len(found().failures), found().stack('full', {}).name)"
    done = python(code, path=[tmp_path])
    assert done.stdout.split() == ["loaded", "1", "full"], done.stderr
    assert done.stderr.count("was left out") == 1


def test_a_stack_has_the_name_under_which_it_is_installed(plugin):
    source = (
        "import kvpack\nfrom kvpack.policies import packforcing, QueryTopK\n@kvpack.hookimpl\n"
        "def kvpack_register_stacks(register):\n"
        "    register('acme-stride', lambda topk=4: packforcing(selector=QueryTopK(topk)))"
    )
    stack = Registry([*BUILT_INS, plugin(source)]).stack("acme-stride", {"topk": 2})
    assert (stack.name, stack.to_dict()["name"], stack.selector) == ("acme-stride", "acme-stride", QueryTopK(2))
    assert replace(stack, name="packforcing") == packforcing(selector=QueryTopK(2))


@dataclass(frozen=True)
class Lengthless(StateMemory):
    name = "acme-lengthless"

    def attend(self, state, chunk):
        return Attended((), 0.0, state)

    def remember(self, state, chunk):
        return state


@dataclass(frozen=True)
class Wordy(Lengthless):
    chunk_frames: str = "four"


WRONG = {
    "a class of a memory": (MemRoPE, "memory must be an instance, got the class MemRoPE; give MemRoPE()"),
    "a selector": (QueryTopK(2), "QueryTopK is a selector; give it to a stack, selector=QueryTopK(...)"),
    "a class of a selector": (QueryTopK, "memory must be an instance, got the class QueryTopK"),
    "a number": (3, "memory must be a name or an instance, got 3"),
    "an adapter": (WanAdapter(), "memory must be a name or an instance, got"),
    "a function": (packforcing, "memory must be a name or an instance, got <function packforcing"),
    "no chunk length": (Lengthless(), "Lengthless has no chunk_frames, the latent frames generated together"),
    "a chunk length in words": (Wordy(), "chunk_frames of Wordy must be a whole number >= 1, got 'four'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_memory_is_refused_in_a_line(case):
    given, message = WRONG[case]
    pipe = tiny_wan_pipeline()
    with pytest.raises(InvalidOptionError) as caught:
        pipe.enable_packforcing(given)
    assert message in str(caught.value)
    assert not hasattr(pipe, "packforcing")


ROLES = {
    "selector": (QueryTopK, PoolCompressor()),
    "compressor": (PoolCompressor, QueryTopK()),
    "reindexer": (FitReindexer, QueryTopK()),
}


@pytest.mark.parametrize("role", ROLES)
def test_what_is_no_policy_of_a_role_is_refused_in_a_line(role):
    cls, other = ROLES[role]
    for given, message in (
        (cls, f"{role} must be an instance, got the class {cls.__name__}; give {cls.__name__}()"),
        (other, f"{role} must be a {role}, but {type(other).__name__} is a {other.role}"),
        (None, f"{role} must be a name or an instance, got None"),
        (["topk"], f"{role} must be a name or an instance, got ['topk']"),
    ):
        with pytest.raises(InvalidOptionError) as caught:
            resolve_policy(role, given, {})
        assert message in str(caught.value)


UNUSED = {
    "packforcing": [
        ({"selector": RecencySelector(3), "topk": 4}, "topk"),
        ({"selector": RecencySelector(3), "topk": 16}, "topk"),
        ({"selector": "all", "topk": 4}, "topk"),
        ({"reindexer": FitReindexer(20), "train_frames": 20}, "train_frames"),
        ({"reindexer": "contiguous", "train_frames": 20}, "train_frames"),
        ({"compressor": PoolCompressor(), "coordinates": "strided"}, "coordinates"),
        ({"compressor": "identity", "coordinates": "centered"}, "coordinates"),
        ({"topk": 0, "archive_blocks": 8}, "archive_blocks"),
    ],
    "self-forcing": [({"train_frames": 20}, "train_frames"), ({"reindexer": FitReindexer(), "train_frames": 9}, None)],
    "full": [({"train_frames": 20}, "train_frames")],
    "framepack": [({"train_frames": 20}, "train_frames")],
}


@pytest.mark.parametrize(("stack", "options", "unused"), [(s, *case) for s, cases in UNUSED.items() for case in cases])
def test_an_option_without_effect_is_refused(stack, options, unused):
    with pytest.raises(UnusedOptionError, match=f"{unused or 'train_frames'} has no effect: "):
        tiny_wan_pipeline().enable_packforcing(stack, **options)


def test_an_option_with_effect_is_used():
    stack = packforcing(
        selector="recency", topk=4, reindexer="fit", train_frames=24, compressor="lr", coordinates="strided"
    )
    assert (stack.selector, stack.reindexer) == (RecencySelector(4), FitReindexer(24))
    assert stack.compressor.coordinates == "strided"
    plain = packforcing(compressor="pool", selector="topk")
    assert (plain.selector.topk, plain.reindexer.train_frames, plain.compressor.coordinates) == (16, 20, "centered")
    assert packforcing(topk=0, archive_blocks=0) == packforcing(topk=0)
    assert registry().stack("self-forcing", {"reindexer": "fit", "train_frames": 24}).reindexer == FitReindexer(24)


def test_options_of_a_models_file_give_way_to_what_is_asked_for():
    settings = Settings("packforcing", {"topk": 4, "train_frames": 21, "sink_frames": 6})
    stack = resolve_stack(None, {"reindexer": "contiguous", "selector": RecencySelector(2)}, settings)
    assert (stack.selector, stack.reindexer.name, stack.partitioner.sink_frames) == (
        RecencySelector(2),
        "contiguous",
        6,
    )
    assert resolve_stack(None, {"sink_frames": 7}, settings).reindexer == FitReindexer(21)
    with pytest.raises(InvalidOptionError, match="no option of stack packforcing named 'top_k'"):
        resolve_stack(None, {"sink_frames": 7}, Settings("packforcing", {"top_k": 4}))
    with pytest.raises(UnusedOptionError, match="train_frames has no effect"):
        resolve_stack(None, {}, Settings("packforcing", {"reindexer": "contiguous", "train_frames": 21}))


def test_options_of_a_family_give_way_too():
    options = {"topk": 3, "train_frames": 21, "archive_blocks": 32}
    stack = resolve_stack("packforcing", {"topk": 0}, None, lambda name: options)
    assert (stack.selector.topk, stack.archive_blocks, stack.reindexer.train_frames) == (0, 0, 21)
    assert resolve_stack("full", {}, None, lambda name: options).reindexer.name == "absolute"


def test_a_video_through_an_instance_of_ones_own():
    pipe = tiny_wan_pipeline().enable_packforcing(selector=RecencySelector(2))
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
    pipe("a red circle", num_frames=125, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    assert [len(row) for layer in pipe.packforcing.stats()["selected"] for row in layer] == [2, 2]


def test_a_factory_that_fails_is_named_and_its_options_are_listed(monkeypatch):
    def acme(topk=4):
        return {}[topk]

    monkeypatch.setitem(registry().stacks, "acme", acme)
    monkeypatch.setitem(registry().origins, ("stack", "acme"), "acme-package")
    with pytest.raises(KeyError) as caught:
        registry().stack("acme", {})
    assert caught.value.__notes__ == ["raised while stack acme was made"]
    (row,) = described("acme")
    assert [each["option"] for each in row["options"]] == ["topk"]
