"""Models that can be planned for: well-known ones by name, any other from its folder's configs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.checkpoints.config import Settings, frame_rate, require_model_folder
from kvpack.checkpoints.experts import require_one_in_index
from kvpack.checkpoints.recipes import RECIPES, Recipe
from kvpack.checkpoints.text import read_config
from kvpack.errors import KVPackError, UnsupportedPipelineError, unknown_name

Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ModelDescription:
    """A model's pipeline class, configs and settings, from which a plan is made.

    Args:
        name: preset or folder.
        pipeline_class: diffusers class that runs it.
        configs: the configs of its transformer and its VAE.
        settings: its own memory and steps.
    """

    name: str
    pipeline_class: str
    configs: Configs
    settings: Settings = field(default_factory=Settings)


#: The VAE of Wan 2.2 TI2V; that of the other presets is the stock `AutoencoderKLWan`.
_VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
}


def _wan(layers: int, heads: int, ffn_dim: int, *, channels: int = 16, spatial: int = 8, **vae: Any) -> Configs:
    return {
        "transformer": {
            "patch_size": (1, 2, 2),
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "ffn_dim": ffn_dim,
            "in_channels": channels,
        },
        "vae": {"z_dim": channels, "scale_factor_temporal": 4, "scale_factor_spatial": spatial, **vae},
    }


def _far(wan: Configs) -> Configs:
    """Add the config of AnyFlow-FAR, a causal model that compresses old frames itself."""
    far = {
        "compressed_patch_size": (1, 4, 4),
        "full_chunk_limit": 3,
        "chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2),
    }
    return {**wan, "transformer": {**wan["transformer"], **far}}


def _stock(name: str, pipeline_class: str, configs: Configs) -> ModelDescription:
    """Describe a model that has no settings of its own but its family's frame rate."""
    return ModelDescription(name, pipeline_class, configs, Settings(fps=frame_rate(pipeline_class, configs)))


_SKYREELS = "SkyReelsV2DiffusionForcingPipeline"
PRESETS = {
    each.name: each
    for each in (
        _stock("wan2.1-t2v-1.3b", "WanPipeline", _wan(30, 12, 8960)),
        _stock("wan2.1-t2v-14b", "WanPipeline", _wan(40, 40, 13824)),
        _stock("wan2.2-ti2v-5b", "WanPipeline", _wan(30, 24, 14336, channels=48, spatial=16, **_VAE_2_2)),
        _stock("skyreels-v2-df-1.3b", _SKYREELS, _wan(30, 12, 8960)),
        _stock("skyreels-v2-df-14b", _SKYREELS, _wan(40, 40, 13824)),
        _stock("anyflow-far-1.3b", "AnyFlowFARPipeline", _far(_wan(30, 12, 8960))),
    )
}


def _checkpoint(recipe: Recipe) -> ModelDescription:
    """Describe a checkpoint that `kvpack convert` knows; it has the shape of the model that it was made of."""
    # A checkpoint's name need not say its size: the base's does.
    of, size = PRESETS[recipe.base], recipe.base.rpartition("-")[2]
    name = recipe.name if recipe.name.endswith(f"-{size}") else f"{recipe.name}-{size}"
    return ModelDescription(name, of.pipeline_class, of.configs, recipe.settings)


PRESETS |= {each.name: each for each in map(_checkpoint, RECIPES.values())}


def preset(name: str) -> ModelDescription:
    """Return a model by name.

    Raises:
        UnknownNameError: if there is no preset of that name.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def from_folder(name: Path) -> ModelDescription:
    """Read the configs in a diffusers folder, or under a Hub id; weights need not be there.

    Raises:
        InvalidOptionError: if the folder, or a config in it, is missing or broken.
        UnsupportedPipelineError: if the pipeline has two transformers.
    """
    folder = require_model_folder(name, only=["*.json"])
    index = read_config(folder / "model_index.json")
    require_one_in_index(folder, index)
    absent = [None, None]  # what diffusers writes for an optional part
    configs = {
        part: {} if index.get(part) == absent else read_config(folder / part / "config.json")
        for part in ("transformer", "vae")
    }
    pipeline_class = str(index.get("_class_name"))
    settings = Settings.of_folder(folder) or Settings(fps=frame_rate(pipeline_class, configs))
    return ModelDescription(str(name), pipeline_class, configs, settings)


def text_encoder_config(name: Path) -> dict[str, Any]:
    """Read the config of the text encoder in a diffusers folder, or under a Hub id.

    Raises:
        InvalidOptionError: if it is missing or broken.
    """
    return read_config(require_model_folder(name, only=["*.json"]) / "text_encoder" / "config.json")


def adapter_for(model: ModelDescription) -> Any:
    """Return the installed adapter that drives pipelines of the model's class.

    Raises:
        UnsupportedPipelineError: if there is none.
    """
    import diffusers

    from kvpack.plugins.registry import registry

    cls: Any = getattr(diffusers, model.pipeline_class, None)
    adapter = registry().adapter(cls) if isinstance(cls, type) else None
    if adapter is None:
        raise UnsupportedPipelineError(
            f"kvpack has no adapter for {model.pipeline_class}, the pipeline of {model.name}. "
            f"Installed: {', '.join(registry().names('adapter'))}. See docs/extend/adapter.md"
        )
    return adapter


def timing(folder: Path) -> tuple[Settings, int]:
    """Return the settings of a model's folder, and the pixel frames of its latent frame.

    What is wrong with the folder, but for the settings, is told when it is loaded: the family's usual 16 and 4 hold.

    Raises:
        InvalidOptionError: if it has settings that cannot be read.
    """
    own = Settings.of_folder(folder)
    try:
        described = from_folder(folder)
        return described.settings, adapter_for(described).temporal_scale(described.configs)
    except KVPackError:
        return own or Settings(), 4
