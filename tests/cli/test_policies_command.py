"""`kvpack policies NAME` lists the options of what is installed, from its code."""

import inspect
import json

import pytest
from typer.testing import CliRunner

from kvpack.cli import app
from kvpack.cli.support import parse_compared, parse_prompt
from kvpack.errors import InvalidOptionError
from kvpack.plugins.registry import registry


def run(*words):
    return CliRunner().invoke(app, ["policies", *words])


@pytest.mark.parametrize("stack", sorted(registry().names("stack")))
def test_every_option_of_every_stack_has_default_and_meaning(stack):
    result = run(stack, "--json")
    assert result.exit_code == 0, result.output
    (found,) = [each for each in json.loads(result.stdout)["policies"] if each["role"] in ("stack", "memory")][:1]
    defaults = {name: each.default for name, each in inspect.signature(registry().stacks[stack]).parameters.items()}
    if stack in ("packforcing", "packforcing-paper", "framepack"):  # those that archive blocks
        defaults |= {"store": "dense", "tier": "device", "eviction": "oldest"}
    assert [each["option"] for each in found["options"]] == list(defaults)
    for each in found["options"]:
        assert each["default"] == repr(defaults[each["option"]])
        assert each["meaning"].endswith((".", ")"))


def test_a_table_for_a_reader():
    result = run("packforcing")
    assert result.exit_code == 0, result.output
    assert "mid blocks attended" in result.stdout
    assert "archive_blocks" in result.stdout


def test_an_unknown_name_is_one_line():
    result = run("packforcin")
    assert result.exit_code == 1
    assert "did you mean 'packforcing'" in result.stderr


@pytest.mark.parametrize(
    ("text", "stacks"),
    [
        ("packforcing:topk=4,self-forcing", [("packforcing", {"topk": 4}), ("self-forcing", {})]),
        (" full , , magi:previous_chunks=[3, 2],", [("full", {}), ("magi", {"previous_chunks": [3, 2]})]),
        (
            "packforcing:topk=4,archive_blocks=none,full",
            [("packforcing", {"topk": 4, "archive_blocks": None}), ("full", {})],
        ),
        ('a:b={"c": 1, "d": 2},e', [("a", {"b": {"c": 1, "d": 2}}), ("e", {})]),
        (",", []),
    ],
)
def test_compared_stacks_take_options(text, stacks):
    assert parse_compared(text) == stacks


def test_an_option_of_another_kind_is_told_plainly(ready_python):
    """In an interpreter of its own: here types are checked before the code can."""
    done = ready_python(
        "from kvpack.plugins.resolve import resolve_stack; resolve_stack('packforcing', {'compressor': {}})"
    )
    assert done.stderr.endswith("InvalidOptionError: compressor must be a name or an instance, got {}\n")


def test_prompts_that_are_no_schedule_are_text():
    for text in ("a fox", "[anime] a fox", "a [(0, 1)]"):
        assert parse_prompt(text) == text
    assert parse_prompt('[(0, "a"), (20, "b", "cut")]') == [(0, "a"), (20, "b", "cut")]
    with pytest.raises(InvalidOptionError, match="--prompt is a schedule"):
        parse_prompt("[(0, a)]")
    with pytest.raises(InvalidOptionError, match="one video is written"):
        parse_prompt('[[0, ["a", "b"]]]')


def test_demo_compares_stacks_with_options(tmp_path):
    words = ["demo", "--seconds", "0.5", "--steps", "1", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, [*words, "--compare", "packforcing:topk=4,packforcing:topk=2,sink_frames=4"])
    assert result.exit_code == 0, result.stderr
    found = [each["stack"] for each in json.loads(result.stdout)["stacks"]]
    assert [each["selector"]["topk"] for each in found] == [4, 2]
    assert [each["partitioner"]["sink_frames"] for each in found] == [8, 4]
    wrong = CliRunner().invoke(app, [*words, "--compare", "packforcing:topkk=4"])
    assert (wrong.exit_code, len(wrong.stderr.strip().splitlines())) == (1, 1)


def test_the_picture_of_a_short_video_has_no_time_twice(tmp_path, monkeypatch):
    from kvpack.cli import demo

    told = []
    monkeypatch.setattr(demo, "picture", lambda story: told.append(story) or b"png")
    for seconds in ("0.1", "0.5", "2.5"):
        words = ["demo", "--seconds", seconds, "--steps", "1", "--output", str(tmp_path)]
        assert CliRunner().invoke(app, words).exit_code == 0
        times = told[-1].times
        assert len(set(times)) == len(times) == {"0.1": 1, "0.5": 5, "2.5": 8}[seconds]
        assert all(len(seen.stills) == len(times) for seen in told[-1].seen)
