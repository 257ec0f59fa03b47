"""The code in the documents runs."""

import json
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvpack.plugins.registry import Registry, registry

ROOT = Path(__file__).parent.parent


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_policy_of_the_contributing_guide_keeps_the_contract():
    from kvpack.testing import check_policy

    names: dict = {}
    exec(blocks("CONTRIBUTING.md", "python")[0], names)
    check_policy(names["StrideSelector"](topk=3))


def test_the_memory_of_the_contributing_guide_keeps_the_contract():
    from kvpack.testing import check_memory

    names: dict = {}
    exec(blocks("CONTRIBUTING.md", "python")[1], names)
    check_memory(names["EverySecondFrame"]())


def test_the_plugin_of_the_contributing_guide_loads(tmp_path, monkeypatch):
    group = tomllib.loads("".join(blocks("CONTRIBUTING.md", "toml")))["project"]["entry-points"]["kvpack"]
    ((name, module),) = group.items()
    (tmp_path / f"{module}.py").write_text("\n".join(blocks("CONTRIBUTING.md", "python")))
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry([EntryPoint(name, module, "kvpack")])
    assert sorted(found.origins) == [("adapter", "acme"), ("selector", "acme-stride"), ("stack", "acme-stride")]
    stack = found.stack("acme-stride", {"topk": 3})
    assert (stack.name, stack.selector.topk) == ("acme-stride", 3)


def test_the_readme_has_the_two_commands_and_they_are_targets():
    commands = "".join(blocks("README.md", "console"))
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in ("make demo", "make test"):
        assert command in commands
        assert command.split()[1] in targets


def test_the_readme_names_every_stack_and_policy():
    text = (ROOT / "README.md").read_text()
    named = [name for kind, name in registry().origins if kind != "adapter"]
    assert [name for name in named if f"`{name}`" not in text] == []


def test_the_contributing_guide_names_every_hook_role_and_option_of_a_memory():
    from kvpack.memory import StateMemory
    from kvpack.plugins import hookspecs

    text = (ROOT / "CONTRIBUTING.md").read_text()
    hooks = [name for name in vars(hookspecs) if name.startswith("kvpack_")]
    roles = {kind for kind, _ in registry().origins} - {"stack", "adapter"}
    hooked = {"attend", "remember", "start", "session", "to_dict", "chunk_frames", "commit", "role", "name"}
    hooked |= {"latent_compressor", "needs_pixels"}
    # What a stack has of its own; the defaults are right for every `StateMemory`.
    hooked |= {"book", "plan", "committed", "rewound", "replays", "written", "fork", "explain"}
    hooked |= {"composite", "in_place", "keeps_rotated", "committed_queries"}
    options = {name for cls in StateMemory.__mro__[:2] for name in vars(cls) if not name.startswith("_")} - hooked
    assert len(hooks) == 3
    assert len(roles) == 5
    assert {"veto", "forget", "replay_frames"} <= options
    assert [word for word in [*hooks, *roles, *options] if f"`{word}" not in text and f"{word}(" not in text] == []


def test_the_readmes_leaderboard_is_the_one_that_was_measured():
    rows = json.loads((ROOT / "benchmarks/results/leaderboard.json").read_text())
    measured = {(row["subject"], row["seconds"], row["metric"]): row for row in rows}
    text = (ROOT / "README.md").read_text()
    table = text.split("| memory, 120 s |")[1].split("\n\n")[0].splitlines()[2:]
    columns = ("subject_consistency", "drift subject_consistency", "background_consistency")

    def short(number, digits):
        return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{digits}f}")

    for line in table:
        name, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        key = ("packforcing", 600) if name == "the same at 600 s" else (name, 120)
        for cell, metric in zip([*cells[:3], cells[4]], [*columns, "revisit_consistency"], strict=True):
            row = measured[*key, metric]
            assert cell == f"{short(row['value'], 3)} [{short(row['low'], 2)}, {short(row['high'], 2)}]"
        tokens = measured.get((*key, "attended_tokens"))
        assert cells[5] == (f"{tokens['value']:,.0f}" if tokens else "")
        motion = measured.get((*key, "dynamic_degree / truth"))
        assert cells[3] == (short(motion["value"], 3) if motion else "")
    assert len(table) >= 9


def test_the_readmes_figures_of_anyflow_are_those_that_were_measured():
    rows = json.loads((ROOT / "benchmarks/results/anyflow.json").read_text())
    found = {(row["subject"], row["metric"]): row for row in rows}
    text = (ROOT / "README.md").read_text()

    def ratio(subject):
        row = found[subject, "time, chunk 40 / chunk 10"]
        low, high = (re.sub(r"^0\.", ".", f"{row[end]:.2f}") for end in ("low", "high"))
        return f"{row['value']:.2f} [{low}, {high}]"

    def tokens(subject):
        return ", ".join(f"{found[subject, f'tokens, chunk {chunk}']['value']:,.0f}" for chunk in (10, 20, 40))

    for shown in (ratio, tokens):
        assert f"| {shown('kvpack')}; {shown('upstream')} |" in text


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[\[<>=~!;]", each)[0] for each in wanted} <= pinned


@pytest.mark.slow
def test_the_readme_example_makes_a_video():
    names: dict = {}
    example = blocks("README.md", "python")[0].replace("num_frames=1917", "num_frames=141")
    exec(example, names)
    assert names["video"].shape == (141, 64, 64, 3)
    assert 0 <= names["video"].min() < names["video"].max() <= 1
