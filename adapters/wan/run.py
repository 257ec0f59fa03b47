"""One call of a `WanPipeline`: a chunk of it has latents, embeddings and a length of its own."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from kvpack.adapters.wan.conditioning import check_conditioning, conditioning_latents
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.adapters.wan.experts import ExpertsDenoiser
from kvpack.adapters.wan.prompt_cache import PromptCache
from kvpack.adapters.wan.vae import StreamingDecoder, WholeDecoder, is_own, require_vae
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, plain, require_choice, require_int
from kvpack.generation.prompts import Prompt
from kvpack.generation.run import Run
from kvpack.logging import get_logger
from kvpack.memory.geometry import Geometry

logger = get_logger(__name__)


class WanRun(Run):
    """Generates a video chunk by chunk; arguments are those of `Run`."""

    output_class = WanPipelineOutput
    spent = ("image", "video", "video_latents", "last_image")  # large, and not needed again: a snapshot leaves them out
    denoiser: WanDenoiser

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of the call, height and width as the pipeline adjusts them.

        Raises:
            InvalidOptionError: if an argument cannot work.
            NonFiniteLatentsError: if `latents` hold NaN or infinity.
            ValueError: if the pipeline's own check says so.
        """
        pipeline, call = self.pipeline, dict(arguments)
        self.check_beginning(call)
        if hasattr(call["callback_on_step_end"], "tensor_inputs"):
            # As the pipeline's call does with a PipelineCallback.
            call["callback_on_step_end_tensor_inputs"] = call["callback_on_step_end"].tensor_inputs
        own = {**call, "num_frames": 1}  # any number will do
        # By name, since each family's check takes arguments of its own.
        pipeline.check_inputs(**{name: own[name] for name in inspect.signature(pipeline.check_inputs).parameters})
        if isinstance(call["prompt"], list) and not call["prompt"]:  # check_inputs lets it through
            raise InvalidOptionError("prompt is an empty list; give at least one prompt")
        require_choice("output_type", call["output_type"], ("latent", "np", "pt", "pil"))
        _check_guidance(call["guidance_scale"])
        require_int("num_inference_steps", call["num_inference_steps"], minimum=1)
        videos = require_int("num_videos_per_prompt", call["num_videos_per_prompt"] or 1, minimum=1)
        if call["num_frames"] is not None:
            require_int("num_frames", call["num_frames"], minimum=1)
        elif not self.streaming and call["latents"] is None:
            raise InvalidOptionError("num_frames None is endless; use pipe.packforcing.stream(...) or give a number")
        _check_latents(pipeline, call["latents"])
        height, width = _adjusted(pipeline, call["height"], call["width"])
        return {**call, "num_videos_per_prompt": videos, "height": height, "width": width}

    def check_beginning(self, call: dict[str, Any]) -> None:
        """Raise `InvalidOptionError` if a video cannot begin with the call's image or clip."""
        check_conditioning(self.pipeline, call)

    def latent_frames(self) -> int | None:
        """Return the latent frames of the whole video, as the pipeline counts them."""
        if self.call["latents"] is not None:
            return int(self.call["latents"].shape[2])
        frames, scale = self.call["num_frames"], self.pipeline.vae_scale_factor_temporal
        if frames is None:
            return None
        if frames % scale != 1:
            logger.warning(f"`num_frames - 1` has to be divisible by {scale}. Rounding to the nearest number.")
        return int(frames) // scale + 1

    def frame_size(self) -> tuple[int, int]:
        """Return height and width in pixels; those of `latents` where they are given."""
        if self.call["latents"] is None:
            return self.call["height"], self.call["width"]
        height, width = self.call["latents"].shape[3:]
        return height * self.pipeline.vae_scale_factor_spatial, width * self.pipeline.vae_scale_factor_spatial

    def decoder(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        """Return a decoder with a feature cache of its own; another one in the VAE's place decodes the whole.

        Raises:
            UnsupportedPipelineError: if there is no VAE, or another one where chunks must be decoded as they come.
        """
        vae = self.pipeline.vae
        require_vae(vae, f'output_type="{self.output_type}"')
        if is_own(vae) or self.streaming or self.stack.needs_pixels:  # the latter two raise for another VAE
            return StreamingDecoder(vae, height, width)
        return WholeDecoder(vae)

    def decoded(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Return the pixels of a whole video: chunk by chunk, or at once by a decoder that knows no chunks."""
        whole = isinstance(self._decode, WholeDecoder)
        return super().decoded([torch.cat(latents, dim=2)] if whole else latents)

    @torch.no_grad()
    def encode(self, prompt: Prompt | None) -> dict[str, Tensor]:
        """Return text embeddings of each guidance branch, `[batch, tokens, width]`, a row for each video.

        Raises:
            InvalidOptionError: if the batch of `latents` does not go with that of the prompts, or given embeddings do
                not go with the model.
            NonFiniteLatentsError: if embeddings hold NaN or infinity.
        """
        pipeline, call = self.pipeline, self.call
        # As the pipeline's do_classifier_free_guidance.
        guided, videos = call["guidance_scale"] > 1.0, call["num_videos_per_prompt"]
        # A schedule may have embeddings, which encode_prompt takes by another name.
        given = prompt if isinstance(prompt, Tensor) else None
        cond, uncond = pipeline.encode_prompt(
            prompt=prompt if given is None else None,
            negative_prompt=call["negative_prompt"],
            do_classifier_free_guidance=guided,
            num_videos_per_prompt=videos,
            prompt_embeds=given,
            negative_prompt_embeds=call["negative_prompt_embeds"],
            max_sequence_length=call["max_sequence_length"],
            device=pipeline._execution_device,
        )
        branches = {"cond": (cond, given)}
        if guided:
            branches["uncond"] = (uncond, call["negative_prompt_embeds"])
        # The pipeline repeats prompts for videos, but not embeddings that are given.
        embeds = {
            name: each.to(pipeline._execution_device, pipeline.transformer.dtype).repeat_interleave(
                1 if own is None else videos, dim=0
            )
            for name, (each, own) in branches.items()
        }
        _check_embeds(embeds, pipeline.transformer)
        return _same_batch(embeds, call["latents"])

    def new_denoiser(self, geometry: Geometry, conditioning: dict[str, Tensor]) -> WanDenoiser:
        """Return the transformer over a new memory.

        Raises:
            InvalidOptionError: if `attention_kwargs` are none.
        """
        kwargs = self.call["attention_kwargs"]
        if not isinstance(kwargs, Mapping | None):
            raise InvalidOptionError(f"attention_kwargs must be a dict or None, got {type(kwargs).__name__}")
        return self.denoiser_class()(
            self.pipeline, self.stack, geometry, conditioning, attention_kwargs=kwargs, prompt=PromptCache()
        )

    def denoiser_class(self) -> Callable[..., WanDenoiser]:
        """Return what makes the denoiser, given the arguments of `WanDenoiser`."""
        return ExpertsDenoiser if getattr(self.pipeline, "transformer_2", None) is not None else WanDenoiser

    def beginning(self) -> Tensor | None:
        """Return the latents of the image or clip that the video begins with."""
        return conditioning_latents(self.pipeline, self.call, self.frame_size(), self.rows)

    def noise(self, first: int, frames: int) -> Tensor:
        """Return the noise of a chunk, drawn for it alone: a video's beginning does not depend on its length."""
        given, pipeline = self.call["latents"], self.noise_pipeline
        part = given[:, :, first : first + frames] if given is not None else None
        if part is not None and part.shape[2] == frames:  # given latents go before the generator, as in the call
            return part
        pixel_frames = self.scale * (frames - 1) + 1  # of which prepare_latents makes `frames` latent ones
        shape = self.rows, pipeline.transformer.config.in_channels, *self.frame_size(), pixel_frames
        device, generator = pipeline._execution_device, self.call["generator"]
        # As of stock, latents alone make a video: what a last chunk needs besides is the same each time.
        if part is not None and generator is None:
            generator = torch.Generator().manual_seed(0)
        # In float32, as the call draws it, for its very bits.
        noise = pipeline.prepare_latents(*shape, torch.float32, device, generator, None)
        noise = noise[0] if isinstance(noise, tuple) else noise  # some pipelines tell their lengths too
        return noise if part is None else torch.cat([part.to(noise), noise[:, :, part.shape[2] :]], dim=2)

    @property
    def noise_pipeline(self) -> Any:
        """The pipeline whose `prepare_latents` draws noise."""
        return self.pipeline

    def stock_call(self, noise: Tensor) -> dict[str, Any]:
        """Return the call's own arguments, but for the chunk's latents and length, and the embeddings that hold now."""
        embeds = self.denoiser.conditioning
        changed = {
            "prompt": None,  # its embeddings are given, and check_inputs takes one of the two
            "negative_prompt": None,
            "prompt_embeds": embeds["cond"],
            "negative_prompt_embeds": embeds.get("uncond"),
            "num_videos_per_prompt": 1,  # embeddings have a row for each video already
            "latents": noise,
            "num_frames": self.scale * (noise.shape[2] - 1) + 1,
            "output_type": "latent",
            "return_dict": False,
            # Only where there is one: each call of it forgets the prompt's keys and values.
            "callback_on_step_end": self.step_done if self.call["callback_on_step_end"] is not None else None,
        }
        # Arguments of kvpack's own, which the stock call would not take.
        own = {name: value for name, value in self.call.items() if name not in self.adapter.extra_arguments}
        return {**own, **changed}

    def step_done(self, _: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Call the user's callback; embeddings that it replaces stay replaced for the chunks to come."""
        denoiser = self.denoiser
        with denoiser.during(None):  # another pipeline's forward would be one of this video
            outputs = self.call["callback_on_step_end"](self.pipeline, step, timestep, tensors)
        denoiser.forget_prompt()  # a callback may change weights
        for branch, name in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            if outputs.get(name) is not None and branch in denoiser.conditioning:
                # Not in place: a fork, and a schedule, may hold the same.
                replaced = outputs[name].to(self.pipeline.transformer.dtype)
                denoiser.conditioning = {**denoiser.conditioning, branch: replaced}
        return outputs


def _adjusted(pipeline: Any, *given: int) -> tuple[int, ...]:
    """Return height and width as multiples of a token's."""
    patch, scale = pipeline.transformer.config.patch_size[1:], pipeline.vae_scale_factor_spatial
    # Rounded down, as the pipeline does.
    sides = tuple(side // (scale * size) * (scale * size) for side, size in zip(given, patch, strict=True))
    if given != sides:
        logger.warning(f"height and width {given} are adjusted to {sides} for patchification")
    return sides


def _check_latents(pipeline: Any, latents: Any) -> None:
    if latents is None:
        return
    config, shape = pipeline.transformer.config, tuple(latents.shape) if isinstance(latents, Tensor) else ()
    _, *patch = config.patch_size
    if len(shape) != 5 or shape[1] != config.in_channels or 0 in shape or shape[3] % patch[0] or shape[4] % patch[1]:
        raise InvalidOptionError(
            f"latents must be [batch, {config.in_channels} channels, frames, height, width] with height and width "
            f"multiples of {patch[0]} and {patch[1]}, got {list(shape) or type(latents).__name__}"
        )
    if not bool(latents.isfinite().all()):
        raise NonFiniteLatentsError("latents hold NaN or infinity; give finite noise")


def _same_batch(embeds: dict[str, Tensor], latents: Tensor | None) -> dict[str, Tensor]:
    """Repeat what is one row, as the pipeline: a prompt serves any batch of latents, a negative one any of prompts."""
    rows = max(each.shape[0] for each in embeds.values())
    if latents is not None and rows == 1:
        rows = latents.shape[0]
    batches = {f"{name} embeddings": each.shape[0] for name, each in embeds.items()}
    if any(batch not in (1, rows) for batch in batches.values()) or (latents is not None and latents.shape[0] != rows):
        if latents is not None:
            batches["latents"] = latents.shape[0]
        raise InvalidOptionError(f"batches do not go together: {', '.join(f'{k} {v}' for k, v in batches.items())}")
    return {name: each if each.shape[0] == rows else each.repeat(rows, 1, 1) for name, each in embeds.items()}


def _check_guidance(scale: Any) -> None:
    if isinstance(plain(scale), bool) or not isinstance(plain(scale), int | float) or not math.isfinite(scale):
        raise InvalidOptionError(f"guidance_scale must be a finite number, e.g. 5.0, got {scale!r}")


def _check_embeds(embeds: dict[str, Tensor], transformer: Any) -> None:
    width = transformer.config.text_dim
    for name, each in embeds.items():
        what = "the prompt" if name == "cond" else "the negative prompt"
        if each.ndim != 3 or each.shape[2] != width:
            raise InvalidOptionError(f"embeddings of {what} must be [batch, tokens, {width}], got {list(each.shape)}")
        if not bool(each.isfinite().all()):
            raise NonFiniteLatentsError(f"embeddings of {what} hold NaN or infinity; check the text encoder's dtype")
