"""A pytest plugin for diffusers' own test suites: kvpack in every pipeline, tiny local models for those of the Hub.

Options: `--kvpack '{"stack": "full", "chunk_frames": 3}'` enables, and without it nothing is changed; `--outcomes FILE`
keeps each test's outcome.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import T5Config, T5EncoderModel

import kvpack
from kvpack.errors import UnsupportedPipelineError
from kvpack.testing.pipelines import tiny_tokenizer

#: Text encoders that the suites take from the Hub.
_T5 = ("hf-internal-testing/tiny-random-t5", "hf-internal-testing/tiny-random-umt5")


def _tiny_config() -> Any:
    # Some suites leave the encoder in training mode.
    return T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0)


def _tiny_encoder() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5EncoderModel(_tiny_config())


class Upstream:
    """What is done to a session of pytest.

    Args:
        options: of `kvpack.pipeline.enable`, or None.
        outcomes: where outcomes are written.
    """

    def __init__(self, options: dict[str, Any] | None, outcomes: Path) -> None:
        self.options, self.outcomes = options, outcomes
        self.patch, self.enabled, self.refused = pytest.MonkeyPatch(), 0, dict[str, int]()
        self.seen: dict[str, str] = {}
        self._classes: set[type] = set()

    def pytest_sessionstart(self) -> None:
        """Puts local models in the place of the Hub's."""
        local = {"AutoConfig": _tiny_config, "AutoTokenizer": tiny_tokenizer, "T5EncoderModel": _tiny_encoder}
        for name, make in local.items():
            cls = getattr(transformers, name)
            self.patch.setattr(cls, "from_pretrained", _locally(cls.from_pretrained, make))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Lets every pipeline that the tests make be enabled as it is made."""
        for item in items:
            cls = getattr(getattr(item, "cls", None), "pipeline_class", None)
            if self.options is not None and isinstance(cls, type) and cls not in self._classes:
                self._classes.add(cls)
                self.patch.setattr(cls, "__init__", self._enabling(vars(cls)["__init__"]))

    def _enabling(self, construct: Callable[..., None]) -> Callable[..., None]:
        stack, options = self.options.get("stack", "full"), {**(self.options or {})}  # type: ignore[union-attr]
        options.pop("stack", None)

        @functools.wraps(construct)
        def enabling(pipeline: Any, *args: Any, **kwargs: Any) -> None:
            construct(pipeline, *args, **kwargs)
            try:
                kvpack.enable(pipeline, stack, **options)
                self.enabled += 1
            except UnsupportedPipelineError as error:
                self.refused[str(error)] = self.refused.get(str(error), 0) + 1

        return enabling

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps the outcome of a test, which is the worst of its phases."""
        if report.when == "call" or report.outcome != "passed":
            failed = "failed" in (report.outcome, self.seen.get(report.nodeid))
            self.seen[report.nodeid] = "failed" if failed else report.outcome

    def pytest_sessionfinish(self) -> None:
        """Writes what was seen."""
        self.patch.undo()
        counts = {"enabled": self.enabled, "refused": self.refused}
        self.outcomes.write_text(json.dumps({"tests": self.seen, **counts}))


def _locally(load: Callable[..., Any], make: Callable[[], Any]) -> Callable[..., Any]:
    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        return make() if name in _T5 else load(name, *args, **kwargs)

    return from_pretrained


def pytest_addoption(parser: Any) -> None:
    """The two options."""
    parser.addoption("--kvpack", type=json.loads, default=None)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: Any) -> None:
    """Takes the suite's own markers for known."""
    config.pluginmanager.register(Upstream(config.getoption("--kvpack"), config.getoption("--outcomes")))
