"""Known causal checkpoints: how they were trained, from their repositories' configs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.checkpoints.config import Settings
from kvpack.errors import InvalidOptionError, unknown_name

_FOUR_STEPS = (1.0, 0.75, 0.5, 0.25)
#: Self-Forcing and its kin were trained on 21 latent frames, in chunks of 3.
_PACKED = {"chunk_frames": 3, "sink_frames": 6, "recent_frames": 3, "train_frames": 21}
#: Chunks of a frame are blocks of a frame: twice as many of them are as many tokens as by default.
_PACKED_FRAMEWISE = {"chunk_frames": 1, "sink_frames": 6, "recent_frames": 3, "train_frames": 21, "topk": 32}


@dataclass(frozen=True)
class Recipe:
    """How a known checkpoint was trained, and how it is sampled.

    Args:
        name: what `--recipe` calls it.
        source: where its weights and its config come from.
        words: letters and digits that all occur in the checkpoint's file or folder names.
        stack: the memory that it was trained with, or `packforcing` fitted to it.
        options: of the stack, the chunk length among them.
        sigmas: noise levels before the shift, a denoising step each.
        shift: time shift of the flow.
        nesting: which weights its own code loads, where the checkpoint has several.
        lora: whether a LoRA belongs to it.
        note: what a user should know.
    """

    name: str
    source: str
    words: tuple[str, ...]
    stack: str = "packforcing"
    options: dict[str, Any] = field(default_factory=lambda: dict(_PACKED))
    sigmas: tuple[float, ...] = _FOUR_STEPS
    shift: float = 5.0
    nesting: str | None = None
    lora: bool = False
    note: str = ""

    @property
    def settings(self) -> Settings:
        """What goes into `kvpack_config.json`; guidance is distilled into the weights, so its scale is 1."""
        call = {"num_inference_steps": len(self.sigmas), "guidance_scale": 1.0}
        return Settings(self.stack, self.options, call=call, recipe=self.name)


_CAUSAL_FORCING = "github.com/thu-ml/Causal-Forcing, zhuhz22/Causal-Forcing"
_CAUSVID = "github.com/tianweiy/CausVid, tianweiy/CausVid"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("self-forcing", "github.com/guandeh17/Self-Forcing, gdhe17/Self-Forcing", ("selfforcing",)),
        Recipe(
            "causal-forcing-chunkwise",
            f"{_CAUSAL_FORCING} chunkwise/causal_forcing.pt",
            ("causalforcing", "chunkwise"),
            nesting="generator",
        ),
        Recipe(
            "causal-forcing-framewise",
            f"{_CAUSAL_FORCING} framewise/causal_forcing.pt",
            ("causalforcing", "framewise"),
            options=_PACKED_FRAMEWISE,
        ),
        Recipe(
            "causal-forcing-framewise-2step",
            f"{_CAUSAL_FORCING}, Causal-Forcing++",
            ("causalforcing", "framewise", "2step"),
            options=_PACKED_FRAMEWISE,
            sigmas=(1.0, 0.5),
        ),
        Recipe(
            "causal-forcing-framewise-1step",
            f"{_CAUSAL_FORCING}, Causal-Forcing++",
            ("causalforcing", "framewise", "1step"),
            options=_PACKED_FRAMEWISE,
            sigmas=(1.0,),
            note="its config was not seen: a single step starts from noise alone",
        ),
        Recipe(
            "causvid",
            f"{_CAUSVID} autoregressive_checkpoint, configs/wan_causal_dmd.yaml",
            ("causvid",),
            sigmas=(1.0, 0.28, 0.12),
            shift=8.0,
            note="its steps 1000, 757 and 522 are the flow's 1000, 756.76 and 521.74",
        ),
        Recipe(
            "causvid-4step",
            f"{_CAUSVID} autoregressive_checkpoint_warp_4step_cfg2",
            ("causvid", "4step"),
            shift=8.0,
        ),
        Recipe(
            "longlive",
            "github.com/NVlabs/LongLive v1.0, Efficient-Large-Model/LongLive longlive_base.pt with lora.pt",
            ("longlive",),
            "longlive",
            {"chunk_frames": 3, "window_frames": 12, "sink_frames": 3, "global_sink": True},
            nesting="generator",
            lora=True,  # of rank 256 and alpha 256, so that its factor is the default, 1
            note="trained in chunks of 3; a later config of its repository generates in chunks of 6",
        ),
        Recipe(
            "infinite-forcing",
            "github.com/SOTAMak1r/Infinite-Forcing, SOTAMak1r/Infinite-Forcing",
            ("infiniteforcing",),
            "infinite-forcing",
            {"chunk_frames": 3, "window_frames": 6, "sink_frames": 1},
        ),
        Recipe(
            "krea-14b",
            "github.com/krea-ai/realtime-video, krea/krea-realtime-video krea-realtime-video-14b.safetensors",
            ("krea",),
            "krea",
            {"chunk_frames": 3, "context_frames": 3},
            note="the bias on past frames that its text names has no published value: 0",
        ),
    )
}


def recipe_for(source: Path, name: str | None) -> Recipe:
    """Return a recipe by name, or guess it from the checkpoint's own name and those of two folders above it.

    Raises:
        UnknownNameError: if there is no recipe of that name.
        InvalidOptionError: if the path tells none, or several.
    """
    if name is not None:
        if name not in RECIPES:
            raise unknown_name("recipe", name, RECIPES)
        return RECIPES[name]
    path = "/".join(source.absolute().parts[-3:])
    letters = re.sub("[^a-z0-9]", "", path.lower())
    found = [recipe for recipe in RECIPES.values() if all(word in letters for word in recipe.words)]
    # "causvid" also occurs wherever "causvid" with "4step" does.
    found = [each for each in found if not any(set(each.words) < set(other.words) for other in found)]
    if len(found) != 1:
        told = "several: " + ", ".join(each.name for each in found) if found else "none"
        raise InvalidOptionError(f"the path {path} tells {told}; give --recipe, one of {', '.join(RECIPES)}")
    return found[0]
