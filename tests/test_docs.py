"""What the documents say is so; that their code runs is told in `test_doc_blocks`."""

import ast
import json
import math
import re
import tomllib
from dataclasses import fields
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet

from helpers import enable_small, generated, quiet, told
from kvpack.checkpoints.config import FILE, Settings
from kvpack.cli.support import size_text
from kvpack.pipeline.progress import Progress
from kvpack.planning.fit import GIB
from kvpack.plugins.registry import Registry, registry
from kvpack.testing import tiny_wan_pipeline

ROOT = Path(__file__).parent.parent


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def plan(*words, preset="wan2.1-t2v-1.3b"):
    return told("plan", "--preset", preset, *words, "--json")


def without_text_encoder(fit):
    """Bytes with model offload of a pipeline that is given embeddings."""
    return fit["kv"] + max(fit["transformer"] + fit["denoising"] + fit["features"], fit["vae"] + fit["decoding"])


def rows(text, head):
    """The cells of the table whose first line begins so."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_the_readme_is_one_screen():
    data = (ROOT / "README.md").read_bytes()
    assert len(data) <= 9_000
    assert data.count(b"\n") <= 160


def test_the_readmes_line_of_memory_is_what_is_planned():
    first, endless = (plan("--seconds", seconds) for seconds in (120, 3600))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{first['full_tokens']:,} tokens, or {first['full_kv_bytes'] / 1e9:.0f} GB" in text
    attended = first["attended_tokens"] * first["kv_bytes_per_token"]  # the chunk's own with the history's
    assert f"**{first['attended_tokens']:,} tokens ({attended / 1e9:.1f} GB)**" in text
    assert f"**{first['resident_kv_bytes'] / 1e9:.1f} GB are held**" in text
    assert f"never more than {math.ceil(endless['resident_kv_bytes'] / 1e8) / 10} GB" in text
    assert endless["resident_kv_bytes"] == plan("--seconds", 36_000)["resident_kv_bytes"]


def test_the_readmes_table_of_cards_is_what_is_planned():
    table = {int(row[0].split()[0]): row[1:] for row in rows((ROOT / "README.md").read_text(), "| card |")}
    assert sorted(table) == [8, 12, 24, 80]
    for card, (size, what) in table.items():
        found = plan("--size", size, "--gpu-memory", card, preset="self-forcing-1.3b")["fit"]
        room, totals = (card - 1) * GIB, found["totals"]
        assert ("nothing else" in what) == (card == 80)
        if card == 8:  # the plan counts the text encoder
            assert without_text_encoder(found) < room < totals["pipe.enable_model_cpu_offload()"]
        else:
            assert totals["pipe.enable_model_cpu_offload()"] < room
            assert ("all of it fits" in what) == (totals["the whole pipeline on the card"] < room)
        if spare := re.search(r"with ([.\d]+) GB to spare", what):
            assert float(spare[1]) == round((room - totals["the whole pipeline on the card"]) / 1e9, 1)


def test_the_figures_of_memory_and_budgets_are_what_is_planned():
    text = (ROOT / "docs/memory.md").read_text()
    names = ["transformer", "vae", "text_encoder", "kv", "passing", "denoising", "decoding", "features"]
    found = [plan("--size", size, "--gpu-memory", 80)["fit"] for size in ("832x480", "640x352", "480x272")]
    table = rows(text, "| two minutes of")
    assert [row[1:] for row in table] == [[size_text(each[name]) for each in found] for name in names]
    told_of = plan("--cards", "--tflops", 400, "--bandwidth", 2000)
    assert {card.split()[0]: advice for card, advice in rows(text, "| card |")} == told_of["cards"]
    speed = told_of["roofline"]
    said = " ".join(text.split())
    assert (
        f"at least {speed['seconds']:.3g} s, and {speed['limit']} limit it: bytes take {speed['bytes']:.3g} s" in said
    )
    small = "fits 8 GiB with pipe.enable_model_cpu_offload() and -o tier=host -o sink_frames=0, as"
    assert plan("--cards", "--weights", "int4")["cards"]["8"].startswith(small)
    budget = plan("--budget-gb", 4)["budget"]
    assert "\n".join(budget["lines"]) + "\npackforcing holds at most 3.947 GB of 4 GB\n" in text
    assert f"{without_text_encoder(found[2]) / GIB + 1:.1f} GiB" in text


def test_the_plugin_of_the_guide_loads(tmp_path, monkeypatch):
    page = "docs/extend/plugin.md"
    group = tomllib.loads("".join(blocks(page, "toml")))["project"]["entry-points"]["kvpack"]
    ((name, module),) = group.items()
    (tmp_path / f"{module}.py").write_text("\n".join(blocks(page, "python")))
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry([EntryPoint(name, module, "kvpack")])
    assert sorted(found.origins) == [("adapter", "acme"), ("selector", "acme-topk"), ("stack", "acme-topk")]
    stack = found.stack("acme-topk", {"topk": 3})
    assert (stack.name, stack.selector.topk) == ("acme-topk", 3)


def test_the_settings_of_a_folder_of_ones_own_are_taken(tmp_path):
    (text,) = blocks("docs/convert.md", "json")
    (tmp_path / FILE).write_text(text)
    settings = Settings.of_folder(tmp_path)
    stack = registry().stack(settings.stack, dict(settings.options))
    assert (stack.name, stack.chunk_frames, settings.fps) == ("packforcing", 3, 16.0)
    assert settings.call == {"num_inference_steps": 4, "guidance_scale": 1.0}


def test_every_key_of_stats_and_field_of_progress_is_explained():
    text = (ROOT / "docs/trace.md").read_text().split("## Stats")[1]
    tables = [rows(text, f"| {head} | what |") for head in ("key", "field")]
    pipe = enable_small(quiet(tiny_wan_pipeline()))
    generated(pipe, prompt="a red circle", height=32, width=32, num_frames=29, num_inference_steps=1)
    wanted = {*pipe.packforcing.stats(), "sent_bytes"}, {each.name for each in fields(Progress)}
    assert [{name for row in table for name in re.findall(r"`(\w+)`", row[0])} for table in tables] == list(wanted)


def test_the_commands_of_the_readme_are_targets():
    commands = re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"install", "test", "demo", "docs"} <= set(commands) <= set(targets)


def test_the_documents_name_every_stack_and_policy():
    text = (ROOT / "docs/memories.md").read_text()
    named = [name for kind, name in registry().origins if kind != "adapter"]
    assert [name for name in named if f"`{name}`" not in text] == []
    count = len(registry().names("stack"))
    numbers = {18: "Eighteen", 19: "Nineteen", 20: "Twenty", 21: "Twenty-one"}
    for page in ("README.md", "docs/index.md"):
        assert f"{numbers[count]} memories, one call" in (ROOT / page).read_text()


def test_the_readmes_memories_and_pipelines_are_there():
    text = (ROOT / "README.md").read_text()
    chosen = [row[0].strip("`") for row in rows(text, "| name | choose it if")]
    assert len(chosen) == 6
    assert set(chosen) <= set(registry().names("stack"))
    pipelines = rows(text, "| pipeline |")
    assert len(pipelines) == len(registry().names("adapter")) == 4


def test_every_answer_about_compatibility_is_held_by_a_test():
    lines = (ROOT / "docs/compatibility.md").read_text().splitlines()
    lines = lines[lines.index("| what | with kvpack |") + 2 :]
    lines = lines[: lines.index("")]
    assert len(lines) > 20
    without = []
    for line in lines:
        named = re.search(r"<!-- (\S+)::(\w+) -->$", line)
        if named is None:
            without.append(line)
            continue
        assert f"def {named[2]}(" in (ROOT / named[1]).read_text(), line
        assert re.match(r"\| .+ \| (yes|no|refused)\b", line), line
    assert len(without) == 3  # what fails without kvpack as well, what was never run, and what a card has run


def texts(tree):
    """Every text in the code; what is put into an f-string is an ellipsis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_of_troubleshooting_are_in_the_code():
    wanted = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    paths = [path for folder in ("kvpack", "adapters") for path in (ROOT / folder).rglob("*.py")]
    # Two texts that stand beside each other are one; a part of an f-string may hold text of its own.
    said = "\n".join(text for path in paths for text in texts(ast.parse(path.read_text())))
    assert len(wanted) >= 25
    assert [each for each in wanted if each not in said] == []


def test_the_guides_name_every_hook_role_and_option_of_a_memory():
    from kvpack.memory import StateMemory
    from kvpack.plugins import hookspecs

    text = "".join((ROOT / f"docs/extend/{page}.md").read_text() for page in ("policy", "memory", "plugin"))
    hooks = [name for name in vars(hookspecs) if name.startswith("kvpack_")]
    roles = {kind for kind, _ in registry().origins} - {"stack", "adapter"}
    hooked = {"attend", "remember", "start", "session", "to_dict", "chunk_frames", "commit", "role", "name"}
    hooked |= {"latent_compressor", "needs_pixels"}
    # What a stack has of its own; the defaults are right for every `StateMemory`.
    hooked |= {"book", "plan", "committed", "rewound", "replays", "written", "fork", "explain"}
    hooked |= {"remember_all", "composite", "in_place", "keeps_rotated", "committed_queries"}
    options = {name for cls in StateMemory.__mro__[:2] for name in vars(cls) if not name.startswith("_")} - hooked
    assert len(hooks) == 3
    assert len(roles) == 6
    assert {"veto", "forget", "replay_frames"} <= options
    assert [word for word in [*hooks, *roles, *options] if f"`{word}" not in text and f"{word}(" not in text] == []


def test_the_leaderboard_of_the_results_is_the_one_that_was_measured():
    rows = json.loads((ROOT / "benchmarks/results/leaderboard.json").read_text())
    measured = {(row["subject"], row["seconds"], row["metric"]): row for row in rows}
    text = (ROOT / "docs/results.md").read_text()
    table = text.split("| memory, 120 s |")[1].split("\n\n")[0].splitlines()[2:]
    columns = ("subject_consistency", "drift subject_consistency", "background_consistency")

    def short(number, digits):
        return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{digits}f}")

    for line in table:
        name, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        key = ("packforcing, pool", 600) if name == "the same at 600 s" else (name, 120)
        for cell, metric in zip([*cells[:3], cells[4]], [*columns, "revisit_consistency"], strict=True):
            row = measured[*key, metric]
            assert cell == f"{short(row['value'], 3)} [{short(row['low'], 2)}, {short(row['high'], 2)}]"
        tokens = measured.get((*key, "attended_tokens"))
        assert cells[5] == (f"{tokens['value']:,.0f}" if tokens else "")
        motion = measured.get((*key, "dynamic_degree / truth"))
        assert cells[3] == (short(motion["value"], 3) if motion else "")
    assert len(table) >= 9


def test_the_figures_of_anyflow_are_those_that_were_measured():
    rows = json.loads((ROOT / "benchmarks/results/anyflow.json").read_text())
    found = {(row["subject"], row["metric"]): row for row in rows}
    text = (ROOT / "docs/results.md").read_text()

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
    wanted = project["dependencies"] + [
        each for name in ("dev", "docs") for each in project["optional-dependencies"][name]
    ]
    assert {re.split(r"[\[<>=~!;]", each)[0] for each in wanted} <= pinned


def test_what_is_pinned_installs_on_the_oldest_python():
    """Of what dependencies need too: some ask for a patch release that distributions do not have."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pinned = [each for each in distributions() if f"{each.name}=={each.version}".lower().replace("_", "-") in lines]
    needs = {each.name: each.metadata["Requires-Python"] or "" for each in pinned}
    assert "diffusers" in needs
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(f"{oldest}.0")} == {}


def test_the_oldest_versions_are_the_floors_of_all_dependencies():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    assert [each.split(",")[0].replace(">=", "==") for each in wanted] == lines[1:]
