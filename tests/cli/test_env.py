"""What a package shows of itself: environment, version, completion, citation, and forms for reports."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
import yaml

import kvpack
from helpers import command, told

ROOT = Path(__file__).parents[2]


def test_env_is_what_is_here():
    found = told("env", "--json")
    assert found["kvpack"] == kvpack.__version__
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["devices"][-1] == f"cpu, {torch.get_num_threads()} threads"
    (backends,) = [value for name, value in found.items() if name.startswith("attention backends")]
    assert "native" in backends
    assert ("xformers" in backends) is False or "xformers" in found
    assert not [name for name in backends if name.endswith("_hub")]
    assert found["plugins left out"] == []


def test_env_for_a_reader():
    result = command("env")
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(word in result.stdout for word in ("diffusers", "devices", "native"))


def test_the_package_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", "--version"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, kvpack.__version__, "")


def test_completion_is_offered():
    result = command("--help")
    assert "--install-completion" in result.stdout
    environment = {"_KVPACK_COMPLETE": "complete_bash", "COMP_WORDS": "kvpack pl", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from kvpack.cli import app; app(prog_name='kvpack')"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment, "PATH": ""},
    )
    assert done.stdout.split() == ["plan"], done.stderr


def test_the_citation_has_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"], cited["title"]) == (project["version"], project["license"], "kvpack")


def test_the_forms_ask_for_what_is_needed():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert {"new-memory", "wrong-video", "config"} == set(forms)
    assert "`kvpack env`" in str(forms["wrong-video"])
    for name in ("new-memory", "wrong-video"):
        assert {"name", "description", "body"} <= set(forms[name])
        ids = [part["id"] for part in forms[name]["body"]]
        assert len(ids) == len(set(ids))
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["all"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
