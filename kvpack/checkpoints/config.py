"""`kvpack_config.json`: what a model was trained for, in its folder, for those who enable it without arguments."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from kvpack.checkpoints.hub import model_folder
from kvpack.checkpoints.text import read_json
from kvpack.errors import InvalidOptionError, require_int
from kvpack.version import __version__

FILE = "kvpack_config.json"
#: Where it may be in a model's folder. Of a Hub repository diffusers fetches only what belongs to a component.
PLACES = (FILE, f"scheduler/{FILE}")


@dataclass(frozen=True)
class Settings:
    """The memory, frame rate and call arguments that a model was trained for.

    Args:
        stack: name of an installed stack.
        options: its options; among them the chunk length that the model was trained with.
        fps: pixel frames a second.
        first_chunk_frames: latent frames of a video's first chunk; None if it is as long as the rest.
        call: arguments of the pipeline's call, e.g. `num_inference_steps`.
        recipe: the known checkpoint that it was converted from.
    """

    stack: str = "packforcing"
    options: Mapping[str, Any] = field(default_factory=dict)
    fps: float = 16.0
    first_chunk_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    def write(self, folder: Path) -> None:
        """Write the settings into a model's folder, which has a `scheduler`."""
        data = {
            "kvpack_version": __version__,
            "recipe": self.recipe,
            "stack": {"name": self.stack, "options": dict(self.options)},
            "fps": self.fps,
            "first_chunk_frames": self.first_chunk_frames,
            "call": dict(self.call),
        }
        for place in PLACES:  # twice, for a download by diffusers has the folders of components only
            (folder / place).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Read settings from a file.

        Raises:
            InvalidOptionError: if it does not hold settings.
        """
        try:
            data = read_json(path)
            stack, known = data["stack"], {"fps", "first_chunk_frames", "call", "recipe"}
            settings = cls(stack["name"], stack.get("options", {}), **{key: data[key] for key in known & set(data)})
            settings._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InvalidOptionError(f"{path} does not hold kvpack's settings: {error!r}; write it anew") from error
        return settings

    def _check(self) -> None:
        """Raise `ValueError` if something is of another kind than it must be."""
        if not (isinstance(self.stack, str) and isinstance(self.recipe, str | None)):
            raise ValueError("stack must have a name, and recipe be one")
        if isinstance(self.fps, bool) or not (self.fps > 0 and isfinite(self.fps)):
            raise ValueError("fps must be a number above 0")
        if not (isinstance(self.options, dict) and isinstance(self.call, dict)):
            raise ValueError("options and call must be objects")
        if self.first_chunk_frames is not None:
            require_int("first_chunk_frames", self.first_chunk_frames, minimum=1)

    @classmethod
    def of_folder(cls, folder: Path) -> "Settings | None":
        """Return the settings in a model's folder, or None if it has none."""
        return next((cls.read(folder / place) for place in PLACES if (folder / place).is_file()), None)

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> "Settings | None":
        """Return the settings in the folder, or the Hub's local cache, that a pipeline was loaded from, or None.

        The network is not asked.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        name = getattr(pipeline, "name_or_path", None)
        if not name:
            return None
        if Path(name).is_dir():
            return cls.of_folder(Path(name))
        try:
            # Of the main revision; a pipeline does not say from which it was loaded.
            cached = [try_to_load_from_cache(str(name), place) for place in PLACES]
        except HFValidationError:  # a folder that is gone
            return None
        return next((cls.read(Path(path)) for path in cached if isinstance(path, str)), None)


def frame_rate(pipeline_class: str, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the pixel frames a second that a stock model was trained with: 24 or 16.

    >>> frame_rate("SkyReelsV2DiffusionForcingPipeline", {}), frame_rate("WanPipeline", {})
    (24.0, 16.0)
    """
    # Of Wan's models only 2.2 TI2V 5B has 24; a VAE of 48 channels tells it.
    wan_5b = pipeline_class.startswith("Wan") and configs.get("transformer", {}).get("in_channels") == 48
    return 24.0 if pipeline_class.startswith("SkyReelsV2") or wan_5b else 16.0


def require_model_folder(name: Path, only: list[str] | None = None) -> Path:
    """Return the folder of a whole diffusers pipeline, given it or its Hub id (see `model_folder`).

    Raises:
        InvalidOptionError: if there is none.
    """
    folder = model_folder(name, only=only)
    if not (folder / "model_index.json").is_file():
        raise InvalidOptionError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline")
    return folder
