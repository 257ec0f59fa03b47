"""Known causal checkpoints: how they were trained, from their repositories' configs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin, UniPCMultistepScheduler

from kvpack.checkpoints.causality import ends, why_not_causal
from kvpack.checkpoints.config import Settings
from kvpack.errors import InvalidOptionError, unknown_name
from kvpack.scheduler import FlowMatchFewStepScheduler

_FOUR_STEPS = (1.0, 0.75, 0.5, 0.25)  # under a shift of 5 these are t = 1000, 937.5, 833.3 and 625
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
        files: patterns of what the paths of its released files end with, as `plain` writes them.
        stack: the memory that it was trained with, or `packforcing` fitted to it.
        options: of the stack, the chunk length among them.
        sigmas: noise levels before the shift, a denoising step each.
        shift: time shift of the flow.
        solver: whether its code samples by UniPC (arXiv 2302.04867), as stock Wan does, and not by re-noising.
        fps: pixel frames a second that it was trained with.
        base: preset of the model that it was made of.
        nesting: which weights its own code loads, where the checkpoint has several.
        lora: whether a LoRA belongs to it.
        note: what a user should know.
    """

    name: str
    source: str
    files: tuple[str, ...]
    stack: str = "packforcing"
    options: dict[str, Any] = field(default_factory=lambda: dict(_PACKED))
    sigmas: tuple[float, ...] = _FOUR_STEPS
    shift: float = 5.0
    solver: bool = False
    fps: float = 16.0
    base: str = "wan2.1-t2v-1.3b"
    nesting: str | None = None
    lora: bool = False
    note: str = ""

    @property
    def settings(self) -> Settings:
        """What goes into `kvpack_config.json`; guidance is distilled into the weights, so its scale is 1."""
        call = {"num_inference_steps": len(self.sigmas), "guidance_scale": 1.0}
        return Settings(self.stack, self.options, self.fps, call=call, recipe=self.name)

    @property
    def scheduler(self) -> SchedulerMixin:
        """The sampler that its own code uses."""
        if not self.solver:
            return FlowMatchFewStepScheduler(self.sigmas, self.shift)
        # As in stock Wan's config.
        flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return UniPCMultistepScheduler(flow_shift=self.shift, **flow)


_CAUSAL_FORCING = "github.com/thu-ml/Causal-Forcing, zhuhz22/Causal-Forcing"
_CAUSVID = "github.com/tianweiy/CausVid, tianweiy/CausVid"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("self-forcing", "github.com/guandeh17/Self-Forcing, gdhe17/Self-Forcing", ("selfforcingdmd",)),
        Recipe(
            "causal-forcing-chunkwise",
            f"{_CAUSAL_FORCING} chunkwise/causal_forcing.pt",
            ("chunkwise/causalforcing",),
            nesting="generator",
        ),
        Recipe(
            "causal-forcing-framewise",
            f"{_CAUSAL_FORCING} framewise/causal_forcing.pt",
            ("framewise/causalforcing",),
            options=_PACKED_FRAMEWISE,
        ),
        Recipe(
            "causal-forcing-framewise-2step",
            f"{_CAUSAL_FORCING}, Causal-Forcing++",
            ("causalforcing/framewise2step", "framewise2step/causalforcing"),
            options=_PACKED_FRAMEWISE,
            sigmas=(1.0, 0.5),
        ),
        Recipe(
            "causal-forcing-framewise-1step",
            f"{_CAUSAL_FORCING}, Causal-Forcing++",
            ("causalforcing/framewise1step", "framewise1step/causalforcing"),
            options=_PACKED_FRAMEWISE,
            sigmas=(1.0,),
            note="its config was not seen: a single step starts from noise alone",
        ),
        Recipe(
            "causvid",
            f"{_CAUSVID} autoregressive_checkpoint, configs/wan_causal_dmd.yaml",
            ("causvid/([^/]*/)*autoregressivecheckpoint(/model)?",),
            sigmas=(1.0, 0.28, 0.12),
            shift=8.0,
            note="its steps 1000, 757 and 522 are the flow's 1000, 756.76 and 521.74",
        ),
        Recipe(
            "causvid-4step",
            f"{_CAUSVID} autoregressive_checkpoint_warp_4step_cfg2",
            ("causvid/([^/]*/)*autoregressivecheckpointwarp4stepcfg2(/model)?",),
            shift=8.0,
        ),
        Recipe(
            "longlive",
            "github.com/NVlabs/LongLive v1.0, Efficient-Large-Model/LongLive longlive_base.pt with lora.pt",
            ("longlivebase",),
            "longlive",
            {"chunk_frames": 3, "window_frames": 12, "sink_frames": 3, "global_sink": True},
            nesting="generator",
            lora=True,  # of rank 256 and alpha 256, so that its factor is the default, 1
            note="trained in chunks of 3; a later config of its repository generates in chunks of 6",
        ),
        Recipe(
            "longlive-2-5b",
            "github.com/NVlabs/LongLive main, Efficient-Large-Model/LongLive-2.0-5B model_bf16.pt",
            ("longlive205b/([^/]*/)*modelbf16",),
            "longlive",
            {"chunk_frames": 8, "window_frames": 32, "sink_frames": 8, "global_sink": True},
            solver=True,
            fps=24.0,
            base="wan2.2-ti2v-5b",
            nesting="generator",
            note="its own code keeps a chunk as a second sink at every scene cut, and shifts positions by 8 frames; "
            "here a cut is the stack's. Its weights were not at hand",
        ),
        Recipe(
            "infinite-forcing",
            "github.com/SOTAMak1r/Infinite-Forcing, SOTAMak1r/Infinite-Forcing",
            ("infiniteforcing/(ema)?model",),
            "infinite-forcing",
            {"chunk_frames": 3, "window_frames": 6, "sink_frames": 1},
        ),
        Recipe(
            "krea-14b",
            "github.com/krea-ai/realtime-video, krea/krea-realtime-video krea-realtime-video-14b.safetensors",
            ("krearealtimevideo14b",),
            "krea",
            {"chunk_frames": 3, "context_frames": 3},
            base="wan2.1-t2v-14b",
            note="the bias on past frames that its text names has no published value: 0",
        ),
    )
}


#: Released files that are no recipe's, and causal: what they are, by what their paths end with.
_OTHERS = {
    "wan(causal)?odecheckpoint[^/]*(/model)?": "CausVid's initialisation, which was not distilled",
    "odeinit": "an initialisation from ODE pairs, which was not distilled",
    "(chunkwise|framewise)/causal(ode|cd)": "an initialisation of Causal-Forcing, which was not distilled",
    "(chunkwise|framewise)/ardiffusion": "a teacher of many steps and guidance, which was not distilled",
    "chunkwise/longvideo": "Causal-Forcing's long-video weights, trained for a memory that is not here",
}


def recipe_for(source: Path, name: str | None, causal: bool = False) -> Recipe:
    """Return a recipe by name, or the one whose released file the checkpoint's path is that of.

    Args:
        source: the checkpoint.
        name: of the recipe; None goes by the path.
        causal: whether somebody says that the weights are causal, whatever their path tells.

    Raises:
        UnknownNameError: if there is no recipe of that name.
        InvalidOptionError: if the path is that of no recipe's file, or of weights that are not causal.
    """
    path = "/".join(source.absolute().parts[-3:])
    if not causal and (what := why_not_causal(source)):
        raise InvalidOptionError(
            f"{path} is not causal: {what}. It was never taught to work chunk by chunk; give a checkpoint that was, or "
            "--causal if the path is wrong about it"
        )
    if name is not None:
        if name not in RECIPES:
            raise unknown_name("recipe", name, RECIPES)
        return RECIPES[name]
    found = [each for each in RECIPES.values() if any(ends(source, pattern) for pattern in each.files)]
    if len(found) == 1:  # two that match tell no more than none
        return found[0]
    told = next((f"{what}, that no recipe is for" for each, what in _OTHERS.items() if ends(source, each)), "none")
    raise InvalidOptionError(f"the path {path} tells {told}; give --recipe, one of {', '.join(RECIPES)}")
