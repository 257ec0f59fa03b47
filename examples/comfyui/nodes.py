"""Load a folder, choose a memory, say what is shown when, and get frames or latents, chunk by chunk.

A pipeline is loaded once by its node, which ComfyUI keeps; each generation enables the memory that it is given. Between
two chunks ComfyUI is told how far it is, and may interrupt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_HERE = "kvpack"
_SHIPPED = "(the tiny model that comes with kvpack)"


def _stacks() -> list[str]:
    from kvpack.plugins.registry import registry

    return registry().names("stack")


class LoadPipeline:
    """Loads the folder of a diffusers pipeline, such as `kvpack convert` makes."""

    RETURN_TYPES, RETURN_NAMES = ("KVPACK_PIPELINE",), ("pipeline",)
    FUNCTION, CATEGORY = "load", _HERE

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return what it takes: folders in `models/diffusers`, or a path."""
        import folder_paths  # of ComfyUI

        found = sorted(
            path.parent.name
            for root in folder_paths.get_folder_paths("diffusers")
            for path in Path(root).glob("*/model_index.json")
        )
        given = {"folder": ([_SHIPPED, *found],), "dtype": (["bfloat16", "float16", "float32"],)}
        return {"required": given, "optional": {"path": ("STRING", {"default": ""})}}

    def load(self, folder: str, dtype: str, path: str = "") -> tuple[Any]:
        """Return the pipeline on ComfyUI's device; `path` goes before `folder`."""
        import comfy.model_management as management
        import folder_paths

        from kvpack.pipeline.track import load_pipeline
        from kvpack.shipped import shipped_folder

        roots = [Path(root) / folder for root in folder_paths.get_folder_paths("diffusers")]
        known = next((each for each in roots if each.is_dir()), roots[0] if roots else Path(folder))
        place = Path(path) if path else shipped_folder() if folder == _SHIPPED else known
        pipeline = load_pipeline(place, getattr(torch, dtype), str(management.get_torch_device()))
        pipeline.set_progress_bar_config(disable=True)
        return (pipeline,)


class Memory:
    """Chooses what the model remembers of the video so far."""

    RETURN_TYPES, RETURN_NAMES = ("KVPACK_MEMORY",), ("memory",)
    FUNCTION, CATEGORY = "choose", _HERE

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return what it takes: a name, and options such as `topk=8, store=int8`."""
        return {
            "required": {
                "name": (["(the model's own)", *_stacks()], {"default": "packforcing"}),
                "options": ("STRING", {"default": ""}),
            }
        }

    def choose(self, name: str, options: str) -> tuple[Any]:
        """Return name and options."""
        from kvpack.cli.support import parse_compared

        named = None if name.startswith("(") else name
        ((_, given),) = parse_compared(f"x:{options}" if options.strip() else "x")
        return ((named, given),)


class Prompts:
    """Says what the video shows, from which second on."""

    RETURN_TYPES, RETURN_NAMES = ("KVPACK_PROMPTS",), ("prompts",)
    FUNCTION, CATEGORY = "read", _HERE

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return what it takes: a line for each prompt."""
        text = "0: a red circle bouncing over dusk rings\n4: a blue square bouncing over dusk rings"
        return {"required": {"schedule": ("STRING", {"multiline": True, "default": text})}}

    def read(self, schedule: str) -> tuple[Any]:
        """Return a prompt, or a schedule of `[(second, prompt)]`; a line may begin `20 cut:`, where a scene begins.

        Raises:
            ValueError: if a line of several says no second.
        """
        lines = [line.strip() for line in schedule.splitlines() if line.strip()]
        found = [re.fullmatch(r"(\d+(?:\.\d+)?)\s*(cut)?\s*:\s*(.+)", line) for line in lines]
        if len(lines) == 1 and found[0] is None:
            return (lines[0],)
        for line, each in zip(lines, found, strict=True):
            if each is None:
                raise ValueError(f"a line must begin with a second, e.g. '4: a fox' or '20 cut: a bear', got {line!r}")
        return ([(float(each[1]), each[3], *(["cut"] if each[2] else [])) for each in found if each],)


class _Generate:
    """What both nodes that generate share."""

    FUNCTION, CATEGORY = "generate", _HERE

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return what it takes; 0 leaves size and steps to the model."""
        size = ("INT", {"default": 0, "min": 0, "max": 8192, "step": 8})
        return {
            "required": {
                "pipeline": ("KVPACK_PIPELINE",),
                "memory": ("KVPACK_MEMORY",),
                "prompts": ("KVPACK_PROMPTS",),
                "seconds": ("FLOAT", {"default": 10.0, "min": 0.1, "max": 36000.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
            },
            "optional": {"width": size, "height": size, "steps": ("INT", {"default": 0, "min": 0, "max": 1000})},
        }

    def chunks(
        self, output_type: str, pipeline: Any, memory: Any, prompts: Any, seconds: float, **given: int
    ) -> list[Any]:
        """Return all chunks in an `output_type` of the pipeline's call."""
        import comfy.model_management as management
        from comfy.utils import ProgressBar

        from kvpack.planning.planner import video_frames

        name, options = memory
        pipeline.enable_packforcing(name, **options)
        frames, _ = video_frames(seconds, pipeline.packforcing.fps, getattr(pipeline, "vae_scale_factor_temporal", 4))
        generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
        call = {"num_inference_steps" if key == "steps" else key: value for key, value in given.items() if value}
        call = {**call, "num_frames": frames, "generator": generator, "output_type": output_type}
        made, bar = [], None
        with pipeline.packforcing.stream(prompts, **call) as stream:
            for chunk in stream:
                made.append(chunk.cpu())
                bar = bar or ProgressBar(stream.chunks or 1)
                bar.update(1)
                management.throw_exception_if_processing_interrupted()
        return made


class Frames(_Generate):
    """Makes a video, decoded chunk by chunk."""

    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "FLOAT"), ("frames", "fps")

    def generate(self, pipeline: Any, **given: Any) -> tuple[torch.Tensor, float]:
        """Return frames, `[frames, height, width, 3]` in 0..1, and how many of them are a second."""
        videos = torch.cat(self.chunks("pt", pipeline, **given), dim=1)
        return videos[0].movedim(1, -1).float().clamp(0, 1), float(pipeline.packforcing.fps)


class Latents(_Generate):
    """Makes a video in the VAE's latent space, for ComfyUI's own decoders."""

    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latents",)

    def generate(self, pipeline: Any, **given: Any) -> tuple[dict[str, torch.Tensor]]:
        """Return latents, `[1, channels, frames, height, width]`, as ComfyUI passes them: not normalised."""
        latents = torch.cat(self.chunks("latent", pipeline, **given), dim=2).float()
        mean, spread = (
            torch.tensor(getattr(pipeline.vae.config, key)).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        return ({"samples": latents * spread + mean},)


NODE_CLASS_MAPPINGS = {
    "KVPackLoadPipeline": LoadPipeline,
    "KVPackMemory": Memory,
    "KVPackPrompts": Prompts,
    "KVPackFrames": Frames,
    "KVPackLatents": Latents,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "KVPackLoadPipeline": "Load pipeline (kvpack)",
    "KVPackMemory": "Memory (kvpack)",
    "KVPackPrompts": "Prompt schedule (kvpack)",
    "KVPackFrames": "Long video, frames (kvpack)",
    "KVPackLatents": "Long video, latents (kvpack)",
}
