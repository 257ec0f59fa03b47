"""Whether a generation fits a graphics card: weights, keys and values, activations, and how offloading adds them up."""

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpack.errors import InvalidOptionError, UnsupportedPipelineError, require_choice

GIB = 1 << 30
#: What CUDA's context and libraries take of a card before anything is computed.
RESERVED_BYTES = GIB
#: UMT5-XXL, the text encoder of every preset.
UMT5_XXL = {
    "model_type": "umt5",
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
_TEXT_TOKENS, _TEXT_WIDTH = 512, 4096
#: Calls that bring weights to the card, the fastest first.
WHOLE = "the whole pipeline on the card"
MODEL_OFFLOAD = "pipe.enable_model_cpu_offload()"
SEQUENTIAL_OFFLOAD = "pipe.enable_sequential_cpu_offload()"
#: Bits of a number in a quantised linear layer, its scales with it: one for 64 numbers in int4 (bitsandbytes' nf4), one
#: for each row, which is next to nothing, in int8 (torchao's weight-only).
WEIGHTS = {"int8": 8.0, "int4": 4.5}


@dataclass(frozen=True)
class Fit:
    """Bytes on the card, at the end of a generation; what cuDNN and fragmentation take is not in it.

    Args:
        transformer: weights.
        vae: weights.
        text_encoder: weights; it is needed before the first chunk only.
        block: weights of the largest block of the transformer.
        denoising: what one forward of a chunk holds beside weights, keys and values.
        decoding: what decoding a chunk holds beside weights, features among it.
        features: what a decoder that goes on chunk by chunk keeps meanwhile, as in a stream.
        kv: the most that the memory holds on the card.
        passing: what it keeps of a chunk until that is committed.
        copies: how often what it holds is there while a chunk is made.
    """

    transformer: int
    vae: int
    text_encoder: int
    block: int
    denoising: int
    decoding: int
    features: int = 0
    kv: int = 0
    passing: int = 0
    copies: int = 1

    @property
    def beside(self) -> dict[str, tuple[int, int]]:
        """What is on the card beside keys and values while a chunk is denoised, and while one is decoded.

        By the calls that bring it there; the fastest first.
        """
        work = self.denoising + self.features + self.passing, self.decoding
        whole = self.transformer + self.vae + self.text_encoder
        weights = {
            WHOLE: (whole, whole),
            # Denoising and decoding take turns; with model offload so do their weights.
            MODEL_OFFLOAD: (self.transformer, self.vae),
            SEQUENTIAL_OFFLOAD: (self.block, self.block),
        }
        return {call: (each[0] + work[0], each[1] + work[1]) for call, each in weights.items()}

    @property
    def totals(self) -> dict[str, int]:
        """The most that is on the card at once, by the same calls."""
        together = {
            call: max(denoising + self.copies * self.kv, decoding + self.kv)
            for call, (denoising, decoding) in self.beside.items()
        }
        # The text encoder has been there alone before.
        return {**together, MODEL_OFFLOAD: max(self.text_encoder, together[MODEL_OFFLOAD])}

    def room(self, call: str, gpu_memory: float) -> int:
        """Return the bytes that a card has for keys and values with a call; 0 where it has none.

        Args:
            call: one of `beside`.
            gpu_memory: the card's memory in GiB.

        Raises:
            InvalidOptionError: if the card has no memory.
        """
        if not 0 < gpu_memory < math.inf:
            raise InvalidOptionError(f"--gpu-memory must be a number above 0 GiB, e.g. 24, got {gpu_memory:g}")
        card = int(gpu_memory * GIB) - RESERVED_BYTES
        if call == MODEL_OFFLOAD and self.text_encoder > card:
            return 0
        denoising, decoding = self.beside[call]
        # Copies are there while a chunk is denoised, not while one is decoded.
        return max(0, min((card - denoising) // self.copies, card - decoding))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "totals": self.totals}


def fit(
    configs: Mapping[str, Mapping[str, Any]],
    text_encoder: Mapping[str, Any],
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    chunk_frames: int,
    rows: int,
    weights: str | None = None,
) -> Fit:
    """Add up a generation with a transformer of Wan's kind, which is built and run without numbers.

    Args:
        configs: of transformer and VAE.
        text_encoder: its config.
        size: height and width in pixels.
        dtype: of all weights and activations.
        chunk_frames: latent frames of a chunk.
        rows: videos generated together; guidance branches take turns.
        weights: how linear layers of transformer and text encoder are quantised, one of `WEIGHTS`; None is not at all.

    Raises:
        UnsupportedPipelineError: if the transformer is of another kind.
        InvalidOptionError: if nothing is known of such weights.

    Activations are those of the model's own code run on tensors without numbers: the most that is alive at once.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    if weights is not None:
        require_choice("--weights", weights, WEIGHTS)
    config = configs["transformer"]
    if not {"num_layers", "ffn_dim", "attention_head_dim"} <= set(config):
        raise UnsupportedPipelineError("whether a model fits a card can be said of transformers of Wan's kind only")
    with torch.device("meta"):
        # One block stands for all: weights are multiplied below, activations of blocks are not there together.
        model = _built(WanTransformer3DModel, {**config, "num_layers": 1, "image_dim": None}, dtype)
        vae = _built(AutoencoderKLWan, configs["vae"], dtype)
        spatial, channels = configs["vae"].get("scale_factor_spatial", 8), config["in_channels"]
        latents = torch.zeros(rows, channels, chunk_frames, size[0] // spatial, size[1] // spatial, dtype=dtype)
        # Of a video's first latent frame a decoder makes one picture, of each later one four.
        decoded = latents.new_zeros(rows, channels, max(chunk_frames, 3), *latents.shape[3:])
        text = torch.zeros(rows, _TEXT_TOKENS, config.get("text_dim", _TEXT_WIDTH), dtype=dtype)
        times = torch.zeros(rows)
    whole = _stored(model, dtype, weights)
    block = _stored(model.blocks, dtype, weights)
    # A layer's weights are there in `dtype` while it multiplies.
    largest = max(each.weight.numel() for each in _linears(model)) * dtype.itemsize if weights else 0
    return Fit(
        transformer=whole + block * (config["num_layers"] - 1),  # one block is in `whole` already
        vae=_stored(vae, dtype, None),
        text_encoder=_stored(_text_model(text_encoder), dtype, weights),
        block=block,
        denoising=peak_bytes(lambda: model(latents, times, text, return_dict=False)) + largest,
        decoding=peak_bytes(lambda: vae.decode(decoded, return_dict=False)),
        features=_kept_bytes(vae, decoded),
    )


def _kept_bytes(vae: Any, latents: Tensor) -> int:
    """Return the bytes of features that a decoder keeps of a chunk for the next one."""
    features: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    with torch.no_grad():
        # Frame by frame, as the streaming decoder goes.
        for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
            vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=index == 0)
    return sum(each.nbytes for each in features if isinstance(each, Tensor))


def _stored(model: torch.nn.Module, dtype: torch.dtype, weights: str | None) -> int:
    """Return the bytes of a model's weights."""
    numbers = sum(each.numel() for each in model.parameters())
    if weights is None:
        return numbers * dtype.itemsize
    linear = sum(each.weight.numel() for each in _linears(model))
    return (numbers - linear) * dtype.itemsize + math.ceil(linear * WEIGHTS[weights] / 8)


def _linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [each for each in model.modules() if isinstance(each, torch.nn.Linear)]


def _built(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    known = inspect.signature(kind.__init__).parameters  # a config says more than a model takes
    model = kind(**{name: value for name, value in config.items() if name in known}).eval()
    # Past diffusers' own `to`, which warns that some weights stay in float32: they are few.
    return torch.nn.Module.to(model, dtype)


def _text_model(config: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForTextEncoding

    with torch.device("meta"):
        model: Any = AutoModelForTextEncoding.from_config(AutoConfig.for_model(**config))
    model.tie_weights()  # transformers 5.0 leaves it out on this device
    return model


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes that the tensors hold at once which a function makes; attention is a fused kernel."""
    meter = _Meter()
    with torch.no_grad(), _FusedAttention(), meter:
        function()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the storages of tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()  # by storage, so that views are counted once
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Stands for attention that holds no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what a fused kernel would: one tensor as large as the queries."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))
