"""Discovery: built-ins and third parties through one door, and a broken plugin costs a warning."""

import json
import sys
import textwrap
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch

from kvpack.errors import InvalidOptionError, PluginWarning, UnknownNameError
from kvpack.plugins.registry import Registry, registry
from kvpack.plugins.resolve import resolve_stack, stack_from_dict
from kvpack.policies import PoolCompressor, QueryTopK

BUILT_INS = entry_points(group="kvpack")

PLUGIN = """
    from dataclasses import dataclass
    import torch
    import kvpack

    @dataclass(frozen=True)
    class Stride(kvpack.Selector):
        topk: int = 4
        name = "acme-stride"

        def limit(self, candidates):
            return min(self.topk, candidates)

        def select(self, query, candidates):
            picks = torch.linspace(0, candidates.count - 1, self.limit(candidates.count)).round().long()
            return picks.expand(query.queries.shape[0], -1)

    @kvpack.hookimpl
    def kvpack_register_policies(register):
        register(Stride)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Makes a module of a plugin's source and returns its entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(source, name="acme"):
        module = f"kvpack_test_plugin_{len(made)}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        made.append(module)
        return EntryPoint(name, module, "kvpack")

    yield make
    for module in made:
        sys.modules.pop(module, None)


def test_built_ins_come_through_the_entry_point_group():
    assert {"policies", "adapters"} <= {entry_point.name for entry_point in BUILT_INS}
    assert registry().origins["selector", "topk"] == "kvpack"
    assert set(registry().stacks) >= {"full", "self-forcing", "packforcing", "packforcing-paper"}
    assert Registry([]).origins == {}


def test_a_plugin_of_twenty_lines(plugin):
    found = Registry([*BUILT_INS, plugin(PLUGIN)])
    stride = found.policy("selector", "acme-stride", {"topk": 3})
    assert stride.topk == 3
    from kvpack.testing import check_policy

    check_policy(stride)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("1 / 0", "ZeroDivisionError"),
        (PLUGIN.replace("kvpack_register_policies", "kvpack_register_policy"), "kvpack_register_policy"),
        (PLUGIN.replace("acme-stride", "topk"), "selector 'topk' is already installed by kvpack"),
        (PLUGIN.replace("@kvpack.hookimpl", ""), "mark kvpack_register_policies with @kvpack.hookimpl"),
        (PLUGIN.replace("acme-stride", "Acme A!"), "the name of Stride is 'Acme A!', but it must be kebab-case"),
        (PLUGIN.replace('name = "acme-stride"', ""), "the name of Stride is None"),
    ],
)
def test_a_broken_plugin_costs_a_warning_that_names_it(plugin, source, words):
    with pytest.warns(PluginWarning, match="acme-broken") as caught:
        found = Registry([*BUILT_INS, plugin(source, "acme-broken"), plugin(PLUGIN)])
    assert words in str(caught[0].message)
    assert found.policies["selector", "topk"] is QueryTopK
    assert ("selector", "acme-stride") in found.policies


def test_a_missing_entry_point_target_is_a_warning():
    with pytest.warns(PluginWarning, match="gone"):
        Registry([EntryPoint("gone", "kvpack.no_such_module", "kvpack")])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: registry().stack("packforcin", {}), "no stack named 'packforcin'; did you mean 'packforcing'"),
        (
            lambda: registry().policy("selector", "top_k"),
            "no selector named 'top_k'; did you mean 'topk'? Installed: all",
        ),
        (lambda: registry().policy("reindexer", "zzz"), "no reindexer named 'zzz'. Installed: absolute"),
        (lambda: registry().stack("packforcing", {"top_k": 3}), "'top_k'; did you mean 'topk'"),
        (
            lambda: registry().stack("packforcing", {"compressor": "pol"}),
            "no compressor named 'pol'; did you mean 'pool'",
        ),
        (lambda: registry().stack("packforcing", {"stor": "int8"}), "did you mean 'store'? Options: archive_blocks,"),
        (lambda: registry().stack("self-forcing", {"topk": 3}), "no option of stack self-forcing named 'topk'"),
    ],
)
def test_unknown_names_offer_the_nearest(call, message):
    with pytest.raises(UnknownNameError) as caught:
        call()
    assert message in str(caught.value)


def test_stacks_are_plain_data_and_come_back():
    for name in registry().stacks:
        stack = registry().stack(name, {})
        data = stack.to_dict()
        assert data.get("memory", data.get("name")) == name
        assert resolve_stack(json.loads(json.dumps(data)), {}) == stack
    changed = replace(registry().stack("packforcing", {}), selector=QueryTopK(3), archive_blocks=9)
    assert stack_from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize(
    "change", [{"colour": 1}, {"selector": {"policy": "nope"}}, {"selector": {"policy": "topk", "k": 1}}]
)
def test_bad_stack_data_is_refused(change):
    data = registry().stack("packforcing", {}).to_dict()
    with pytest.raises(InvalidOptionError):
        stack_from_dict({**data, **change})


def test_stack_data_without_a_role_is_refused():
    data = registry().stack("packforcing", {}).to_dict()
    del data["reindexer"]
    with pytest.raises(InvalidOptionError, match="missing \\['reindexer'\\]"):
        stack_from_dict(data)


STACK = """
    import kvpack
    from kvpack.policies import packforcing

    def tiers(tier: int = 2):
        if tier % 2:
            raise ValueError(f"tier must be even, got {tier}")
        return packforcing(chunk_frames=tier)

    @kvpack.hookimpl
    def kvpack_register_stacks(register):
        register("acme-tiers", tiers)
        register("acme-none", lambda: None)
"""


def test_an_option_of_a_stack_is_its_own_whatever_its_name(plugin):
    found = Registry([*BUILT_INS, plugin(STACK)])
    assert found.stack("acme-tiers", {"tier": 4}).chunk_frames == 4
    with pytest.raises(InvalidOptionError, match="stack acme-tiers: tier must be even, got 3; options: tier"):
        found.stack("acme-tiers", {"tier": 3})
    with pytest.raises(InvalidOptionError, match="stack 'acme-none' returned None, but it must return a memory"):
        found.stack("acme-none", {})


def test_a_policy_without_a_name_is_refused():
    class Nameless(QueryTopK):
        name = None

    with pytest.raises(InvalidOptionError, match="the name of Nameless is None"):
        replace(registry().stack("packforcing", {}), selector=Nameless())


def test_where_tokens_sit_is_one_of_three():
    class Elsewhere(PoolCompressor):
        places = "heads"

    with pytest.raises(InvalidOptionError, match="places of pool must be one of span, row, head, got 'heads'"):
        replace(registry().stack("packforcing", {}), compressor=Elsewhere())


def test_a_tensor_is_no_option_to_write():
    @dataclass(frozen=True)
    class Weighted(QueryTopK):
        weights: object = None

    with pytest.raises(InvalidOptionError, match="weights of selector topk is a Tensor, which is no data to write"):
        Weighted(weights=torch.ones(2)).to_dict()
