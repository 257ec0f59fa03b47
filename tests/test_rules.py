"""The rules that hold for the code as a whole; the others are tested where they live."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from kvpack.policies.softmax_mass import products

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_tests_check_the_shapes_of_signatures():
    """These products would be made without a word: one row of queries, and keys of two."""
    with pytest.raises(TypeCheckError, match="keys"):
        products(torch.zeros(1, 3, 2, 4), torch.zeros(2, 5, 3, 2, 4))


def test_importing_kvpack_loads_no_policy_and_no_model(python):
    """Beyond what diffusers itself loads for its pipelines."""
    done = python(
        "import sys; from diffusers import DiffusionPipeline, FlowMatchLCMScheduler; before = set(sys.modules); "
        "import kvpack; wrong = ('kvpack.policies', 'kvpack.adapters', 'diffusers.models', 'diffusers.pipelines'); "
        "print([m for m in set(sys.modules) - before if m.startswith(wrong)])",
        folder=ROOT.parent,
    )
    assert done.stdout == "[]\n", done.stderr


def test_policies_and_adapters_import_only_public_core():
    for path in [*(ROOT / "policies").glob("*.py"), *(ROOT / "adapters").rglob("*.py")]:
        wrong = [name for name in imports(path) if name.split(".")[-1].startswith("_") and name.startswith("kvpack")]
        assert not wrong, path


def test_import_enable_and_disable_change_nothing_for_the_process():
    code = """
import torch, diffusers, sys, warnings
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.models.transformers import transformer_wan
import torch.nn.functional as F
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().tolist(),
            torch.is_grad_enabled(), F.scaled_dot_product_attention, transformer_wan.dispatch_attention_fn,
            list(warnings.filters),
            dict(vars(WanPipeline)), dict(vars(transformer_wan.WanAttnProcessor)),
            {n: v for n, v in vars(transformer_wan.WanTransformer3DModel).items()})
before, methods = state(), set(vars(DiffusionPipeline))
import kvpack
from kvpack.testing import tiny_wan_pipeline
pipe = tiny_wan_pipeline()
pipe.enable_packforcing()
pipe.disable_packforcing()
after = state()
assert before == after, [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
print(sorted(set(vars(DiffusionPipeline)) - methods))
"""
    command = [sys.executable, "-P", "-c", code]  # nothing is imported there yet
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.stdout == "['disable_packforcing', 'enable_packforcing']\n", done.stderr


def test_packages_are_those_of_the_folders():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    code = [path for path in (ROOT / "kvpack").rglob("*.py") if "data" not in path.parts]
    code += [
        ROOT / "kvpack" / path.relative_to(ROOT)
        for name in ("adapters", "policies")
        for path in (ROOT / name).rglob("*.py")
    ]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in code}
    assert listed == sorted(folders)


@pytest.mark.parametrize("name", ["adapters", "policies"])
def test_links_show_checkers_where_the_code_is(name):
    assert (ROOT / "kvpack" / name).resolve() == ROOT / name


def test_files_are_small():
    long = {
        p.name: n
        for f in ("kvpack", "adapters", "policies")
        for p in (ROOT / f).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long


def test_no_pickle_and_no_network():
    for folder in ("kvpack", "adapters", "policies", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not {"pickle", "requests", "urllib", "socket"} & {n.split(".")[0] for n in imports(path)}, path
            assert text.count("torch.load(") == text.count("weights_only=True"), path
            assert not re.search(r"""\.cuda\(|device=["']cuda|\.to\(["']cuda""", text), path


def test_public_names_are_few_and_documented():
    import kvpack

    assert len(kvpack.__all__) <= 20
    assert all(getattr(kvpack, name).__doc__ for name in kvpack.__all__ if name != "hookimpl")


def test_every_hook_is_in_the_docs():
    text = (ROOT / "docs/extend/plugin.md").read_text()
    from kvpack.plugins import hookspecs

    hooks = [name for name in vars(hookspecs) if name.startswith("kvpack_")]
    assert len(hooks) == 3
    assert all(hook in text for hook in hooks)


def test_every_policy_cites_its_paper_or_is_ours():
    """A policy file says in its first lines where it comes from, or is one of the few that need no source."""
    ours = {"__init__", "all_blocks", "fit", "identity", "pool", "recency", "stacks"}
    ours |= {"keep", "keep_grid", "keep_random", "packed", "pool_time"}
    for path in (ROOT / "policies").glob("*.py"):
        assert path.stem in ours or any(each in path.read_text().split('"""')[1] for each in ("arXiv", "github.com")), (
            path
        )
