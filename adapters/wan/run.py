"""One call of a `WanPipeline`: a chunk of it has latents, embeddings and a length of its own."""

from collections.abc import Callable
from typing import Any

from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from kvpack.adapters.wan.call import checked, chunk_noise, encode_prompts, frame_size, latent_frames
from kvpack.adapters.wan.conditioning import check_conditioning, conditioning_latents
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.prompt_cache import PromptCache
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.generation.prompts import Prompt
from kvpack.generation.run import Run
from kvpack.memory.geometry import Geometry


class WanRun(Run):
    """Generates a video chunk by chunk; arguments are those of `Run`."""

    output_class = WanPipelineOutput
    denoiser: WanDenoiser

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, checked before anything is computed."""
        check_conditioning(self.pipeline, arguments)
        return checked(self.pipeline, arguments, streaming=self.streaming)

    def latent_frames(self) -> int | None:
        """Return the latent frames of the whole video, as the pipeline counts them."""
        return latent_frames(self.pipeline, self.call)

    def frame_size(self) -> tuple[int, int]:
        """Return height and width in pixels; those of `latents` where they are given."""
        return frame_size(self.pipeline, self.call)

    def decoder(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        """Return a decoder with a feature cache of its own."""
        return StreamingDecoder(self.pipeline.vae, height, width)

    def encode(self, prompt: Prompt | None) -> dict[str, Tensor]:
        """Return text embeddings of each guidance branch, a row for each video."""
        name, other = ("prompt_embeds", "prompt") if isinstance(prompt, Tensor) else ("prompt", "prompt_embeds")
        return encode_prompts(self.pipeline, {**self.call, name: prompt, other: None})

    def new_denoiser(self, geometry: Geometry, conditioning: dict[str, Tensor]) -> WanDenoiser:
        """Return the transformer over a new memory."""
        kwargs = self.call["attention_kwargs"]
        return WanDenoiser(self.pipeline, self.stack, geometry, conditioning, kwargs, prompt=PromptCache())

    def beginning(self) -> Tensor | None:
        """Return the latents of the image or clip that the video begins with."""
        return conditioning_latents(self.pipeline, self.call, self.frame_size(), self.rows)

    def noise(self, first: int, frames: int) -> Tensor:
        """Return the noise of a chunk."""
        return chunk_noise(self.pipeline, self.call, self.rows, first, frames)

    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return the call's own arguments, but for the chunk's latents and length, and the embeddings that hold now."""
        embeds = self.denoiser.conditioning
        changed = {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": embeds["cond"],
            "negative_prompt_embeds": embeds.get("uncond"),
            "num_videos_per_prompt": 1,
            "latents": noise,
            "num_frames": self.scale * (noise.shape[2] - 1) + 1,
            "output_type": "latent",
            "return_dict": False,
            "callback_on_step_end": self.step_done if self.call["callback_on_step_end"] is not None else None,
        }
        own = {name: value for name, value in self.call.items() if name not in self.adapter.extra_arguments}
        return {**own, **changed}

    def step_done(self, _: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Call the user's callback; embeddings that it replaces stay replaced for the chunks to come."""
        outputs = self.call["callback_on_step_end"](self.pipeline, step, timestep, tensors)
        self.denoiser.forget_prompt()  # a callback may change weights
        conditioning = self.denoiser.conditioning
        for branch, name in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            if outputs.get(name) is not None and branch in conditioning:
                conditioning[branch] = outputs[name].to(self.pipeline.transformer.dtype)
        return outputs
