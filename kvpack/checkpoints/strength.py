"""How strong a LoRA is: every place where its files may say so, read in one function."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import Any

from kvpack.checkpoints.patterns import compiled, require_quick
from kvpack.checkpoints.reading import header
from kvpack.checkpoints.text import parsed_json, read_json
from kvpack.errors import InvalidOptionError

#: Where `save_lora_weights` of diffusers keeps PEFT's config in a safetensors header.
_METADATA = "lora_adapter_metadata"
#: Where trainers note alpha in a header beside their `.alpha` tensors.
_NOTES = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
#: What PEFT computes otherwise than as `scale * up @ down`, and starts that change the model's own weights.
_OTHER = ("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens")
_PATTERNS = ("alpha_pattern", "rank_pattern")
_STARTS = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Strength:
    """How strong each module's delta is, in the order in which it is looked up.

    Alpha is what was asked for, else the module's own `.alpha`, else that of PEFT's config: `lora_adapter_metadata` in
    a safetensors header, or an `adapter_config.json` beside the file. It is divided by the rank, or under `use_rslora`
    by its root (arXiv 2312.03732). The factor is 1 where nothing says anything, as in diffusers.

    Args:
        path: the LoRA, for errors.
        asked: alpha of all modules.
        config: PEFT's config.
        place: where the config is, "header" or "file".
        note: alpha in a header, which says nothing that diffusers would follow.
    """

    path: Path
    asked: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = None
    note: float | None = None

    @classmethod
    def read(cls, path: Path, asked: float | None) -> "Strength":
        """Read what the LoRA's files say beside its tensors.

        Raises:
            InvalidOptionError: if a config is broken, or asks for what cannot be merged, or two differ.
        """
        told, beside = header(path), (path if path.is_dir() else path.parent) / "adapter_config.json"
        found: dict[str, dict[str, Any]] = {}
        if _METADATA in told:
            found["header"] = _config(f"{_METADATA} of {path}", partial(parsed_json, told[_METADATA]))
        if beside.is_file():
            found["file"] = _config(str(beside), partial(read_json, beside))
        if len(found) == 2 and _said(found["header"]) != _said(found["file"]) and asked is None:
            raise InvalidOptionError(f"{path} and {beside} differ in the LoRA's strength; move one away")
        place, config = next(iter(found.items()), (None, {}))
        note = next((told[name] for name in _NOTES if name in told), None)
        return cls(path, asked, config, place, _number(path, note))

    def require_quick(self, modules: Collection[str]) -> None:
        """Raise `InvalidOptionError` if looking up all modules' strength may take too long."""
        patterns = [each for name in _PATTERNS for each in self.config.get(name, ())]
        try:
            require_quick(patterns, modules if patterns else ())
        except ValueError as error:
            raise InvalidOptionError(f"PEFT's config of {self.path} is not followed: {error}") from error

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Return the factor of a module's `up @ down`, given its name in the file, its rank, and its own `.alpha`.

        Raises:
            InvalidOptionError: if the file does not say for sure.
        """
        if self.asked is None and alpha is not None and self.place == "header":
            raise InvalidOptionError(
                f"{self.path} has {module}.alpha and {_METADATA} in its header; give the alpha that is meant"
            )
        expected = _matched(self.config.get("rank_pattern"), module, self.config.get("r"))
        if expected not in (None, rank):
            raise InvalidOptionError(f"{module} of {self.path} has rank {rank}, but its config says {expected}")
        configured = _matched(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        alpha = next((float(each) for each in (self.asked, alpha, configured) if each is not None), None)
        if alpha is None:
            if self.note not in (None, rank):  # with alpha = rank the factor is 1 either way
                raise InvalidOptionError(
                    f"the header of {self.path} notes alpha {self.note:g} beside rank {rank}, but nothing says whether "
                    "the factors have it inside; give the alpha that is meant"
                )
            return 1.0
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _config(where: str, read: Callable[[], Any]) -> dict[str, Any]:
    """Return PEFT's config, without the name of the component that diffusers puts before each key."""
    try:
        data = {name.removeprefix("transformer."): value for name, value in read().items()}
        other = [name for name in _OTHER if data.get(name)]
        if data.get("lora_alpha") is None:
            raise ValueError("it has no lora_alpha")
        for value in (data["lora_alpha"], *(data.get("alpha_pattern") or {}).values()):
            if not isfinite(float(value)):
                raise ValueError(f"an alpha in it is {value}")
        for name in _PATTERNS:
            data[name] = {compiled(pattern): value for pattern, value in (data.get(name) or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidOptionError(f"{where} is not PEFT's: {' '.join(str(error).split())[:300]}") from error
    if str(data.get("peft_type") or "LORA").upper() != "LORA":
        other.append(f"peft_type {data['peft_type']}")
    if str(data.get("init_lora_weights")).lower().startswith(_STARTS):
        other.append(f"init_lora_weights {data['init_lora_weights']}")
    if other:
        raise InvalidOptionError(f"{where} asks for {', '.join(other)}, which is not merged; merge it with PEFT")
    return data


def _said(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        config.get(name) or None for name in ("lora_alpha", "alpha_pattern", "r", "rank_pattern", "use_rslora")
    )


def _matched(patterns: Mapping[re.Pattern[str], Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as PEFT matches them."""
    return next((value for key, value in (patterns or {}).items() if key.match(module)), otherwise)


def _number(path: Path, note: str | None) -> float | None:
    if note is None or note == "None":
        return None
    try:
        number = float(note)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise InvalidOptionError(f"the header of {path} notes alpha as {note[:80]!r}, which is no number")
    return number
