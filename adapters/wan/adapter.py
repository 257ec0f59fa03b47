"""Wan 2.1 and 2.2 text-to-video (`WanPipeline`) and everything trained from it in that format."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from kvpack.adapters.compatibility import check_placement
from kvpack.adapters.parallel import shard_of
from kvpack.adapters.wan.checkpoint import diffusers_names, transformer
from kvpack.adapters.wan.compression import check_compressor, native_window, patch_of
from kvpack.adapters.wan.experts import experts_of
from kvpack.adapters.wan.run import WanRun
from kvpack.adapters.wan.training import WanTrainee
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.generation.adapter import Adapter
from kvpack.generation.run import Run
from kvpack.generation.trainee import Trainee
from kvpack.memory.base import Memory
from kvpack.memory.costs import LatentShape, ModelCost
from kvpack.memory.geometry import Geometry
from kvpack.memory.shard import Shard

_TEXT_TOKENS = 512  # to which the pipeline's call pads every prompt
_SCALES = ("temporal", "spatial")


class WanAdapter(Adapter):
    """Drives `WanPipeline` chunk by chunk."""

    name = "wan"
    pipelines: ClassVar[tuple[type, ...]] = (WanPipeline,)  # image-to-video and VACE are pipelines of their own
    run_class: ClassVar[type[Run]] = WanRun
    extra_arguments = {"image": None, "video": None}
    #: Whether it follows Ulysses context parallelism.
    shards: ClassVar[bool] = True
    trainee_class: ClassVar[Callable[..., Trainee] | None] = WanTrainee
    takes_writer = True

    def check(self, pipeline: Any) -> None:
        """Refuse what would silently give wrong keys."""
        for model in experts_of(pipeline):
            # Of cross-attention too: a backend that cannot run there would fail in the middle of a chunk.
            attentions = [each for block in model.blocks for each in (block.attn1, block.attn2)]
            head_dim = model.config.attention_head_dim
            check_placement(model, attentions, pipeline._execution_device, head_dim, shards=self.shards)
        if model.config.patch_size[0] != 1:
            raise UnsupportedPipelineError(
                f"kvpack needs one token grid a latent frame, but patch_size is {tuple(model.config.patch_size)}"
            )

    def shard(self, pipeline: Any) -> Shard | None:
        """Return the process's part, if context parallelism is enabled."""
        return shard_of(pipeline.transformer)

    def memories(self, pipeline: Any) -> int:
        """Return how many experts there are."""
        return len(experts_of(pipeline))

    @staticmethod
    def configs(pipeline: Any) -> dict[str, Mapping[str, Any]]:
        """Return the components' configs; sizes of a latent are the pipeline's own, whatever its VAE is."""
        configs = Adapter.configs(pipeline)
        scales = {f"scale_factor_{name}": getattr(pipeline, f"vae_scale_factor_{name}") for name in _SCALES}
        return {**configs, "vae": {**configs.get("vae", {}), **scales}}

    def check_stack(self, pipeline: Any, stack: Memory) -> None:
        """Refuse compressor weights of another model."""
        check_compressor(pipeline.transformer, stack)

    def geometry(
        self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int, dtype: torch.dtype
    ) -> Geometry:
        """Return the geometry from `transformer/config.json` and `vae/config.json`."""
        config, spatial = configs["transformer"], configs["vae"].get("scale_factor_spatial", 8)
        rows, columns = (spatial * patch for patch in config["patch_size"][1:])
        if height < rows or width < columns or height % rows or width % columns:  # 0 is a multiple too
            raise InvalidOptionError(
                f"height and width must be multiples of {rows} and {columns} for this model, got {height}x{width}"
            )
        head_dim = config["attention_head_dim"]
        side = 2 * (head_dim // 6)  # as WanRotaryPosEmbed splits it: 44, 42 and 42 of 128
        return Geometry(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=head_dim,
            grid=(height // rows, width // columns),
            rope_split=(head_dim - 2 * side, side, side),
            dtype=dtype,
        )

    def forward_flops(self, configs: Mapping[str, Mapping[str, Any]], query_tokens: int, attended_tokens: int) -> int:
        """Return multiplications and additions of all layers: projections, both attentions and feed-forward."""
        config = configs["transformer"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        # A token: q, k, v and out of self-attention, q and out of cross-attention; its k and v are the text's.
        linear = query_tokens * (6 * width * width + 2 * width * config["ffn_dim"]) + _TEXT_TOKENS * 2 * width * width
        # Scores, and the sum of values.
        attention = 2 * query_tokens * (attended_tokens + _TEXT_TOKENS) * width
        return 2 * config["num_layers"] * (linear + attention)  # a multiplication and an addition each

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]]) -> LatentShape:
        """Return it from the configs; a VAE's operations are counted in a copy of it that holds no numbers."""
        vae = configs["vae"]

        def encode_flops(frames: int, height: int, width: int) -> int:
            with torch.device("meta"):
                model: Any = AutoencoderKLWan.from_config(dict(vae))
                clip = torch.zeros(1, 3, frames, height, width)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.encode(clip)
            return counter.get_total_flops()

        spatial, patch = vae.get("scale_factor_spatial", 8), patch_of(configs["transformer"])
        return LatentShape(
            channels=configs["transformer"]["in_channels"],
            patch=patch,
            pixels_per_token=(spatial * patch[0], spatial * patch[1]),
            encode_flops=encode_flops,
            native=native_window(configs["transformer"]),
        )

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> ModelCost | None:
        """Return it from the configs, counted in models that hold no numbers; None for what nobody trains."""
        if self.trainee_class is None:
            return None
        config, spatial = configs["transformer"], configs["vae"].get("scale_factor_spatial", 8)
        with torch.device("meta"):
            vae: Any = AutoencoderKLWan.from_config(dict(configs["vae"]))
            parts: list[Any] = [WanTransformer3DModel.from_config(dict(config)), vae]
        inner = config["num_attention_heads"] * config["attention_head_dim"]

        def graph_elements(query_tokens: int, attended_tokens: int) -> int:
            # Counted with frozen weights: 11 vectors a token, those of the feed-forward, attended keys and values.
            own = query_tokens * (11 * inner + config["ffn_dim"])
            return config["num_layers"] * (own + 2 * inner * (attended_tokens + _TEXT_TOKENS))

        def latents(frames: int) -> torch.Tensor:
            return torch.zeros(1, config["in_channels"], frames, height // spatial, width // spatial, device="meta")

        def decode_flops(frames: int) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                vae.decode(latents(frames))
            return counter.get_total_flops()

        decoder = StreamingDecoder(vae, height, width)
        with torch.no_grad():
            decoder(latents(3))  # what is kept of two frames behind the first is all that is ever kept
        kept = sum(each.numel() for each in decoder.features if isinstance(each, torch.Tensor))
        text = _TEXT_TOKENS * parts[0].config.text_dim
        parameters = sum(each.numel() for part in parts for each in part.parameters())
        return ModelCost(parameters, graph_elements, decode_flops, kept, text)

    def checkpoint_layout(self) -> tuple[Callable[..., dict[str, Any]], Callable[..., Any]]:
        """Return how the original checkpoints' weights are named, and what builds a transformer of them."""
        return diffusers_names, transformer
