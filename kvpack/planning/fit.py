"""Whether a generation fits a graphics card: weights, keys and values, activations, and how offloading adds them up."""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpack.errors import InvalidOptionError, UnsupportedPipelineError

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


@dataclass(frozen=True)
class Fit:
    """Bytes on the card, at the end of a generation; what cuDNN and fragmentation take is not in it.

    Args:
        transformer: weights.
        vae: weights.
        text_encoder: weights; it is needed before the first chunk only.
        block: weights of the largest block of the transformer.
        kv: all that the memory holds, the archive of compressed blocks with it.
        archive: the archive alone, which grows with the video unless `archive_blocks` bounds it; 0 on another tier.
        denoising: what one forward of a chunk holds beside weights, keys and values.
        decoding: what decoding a chunk holds beside weights.
    """

    transformer: int
    vae: int
    text_encoder: int
    block: int
    kv: int
    archive: int
    denoising: int
    decoding: int

    @property
    def totals(self) -> dict[str, int]:
        """The most that is on the card at once, by the calls that bring it there; the fastest first."""
        # Denoising and decoding take turns; with model offload so do their weights.
        apart = max(self.transformer + self.denoising, self.vae + self.decoding)
        return {
            "the whole pipeline on the card": self.transformer + self.vae + self.text_encoder + self.kv + self._work,
            "pipe.enable_model_cpu_offload()": max(self.text_encoder, self.kv + apart),
            "pipe.enable_sequential_cpu_offload()": self.kv + self.block + self._work,
        }

    @property
    def _work(self) -> int:
        return max(self.denoising, self.decoding)

    def advice(self, gpu_memory: float, archive_blocks: int) -> str:
        """Return how it fits a card.

        Args:
            gpu_memory: the card's memory in GiB.
            archive_blocks: compressed blocks in the archive.

        Raises:
            InvalidOptionError: if the card has no memory.
        """
        if not gpu_memory > 0:
            raise InvalidOptionError(f"--gpu-memory must be above 0 GiB, e.g. 24, got {gpu_memory:g}")
        room, whole = gpu_memory * GIB - RESERVED_BYTES, self.totals
        bounded = replace(self, kv=self.kv - self.archive).totals
        fast, slow = tuple(whole)[:-1], tuple(whole)[-1:]
        for calls in (fast, slow):  # sequential offload, which moves every block at every step, comes last
            for call in calls:
                if whole[call] <= room:
                    return f"fits {gpu_memory:g} GiB with {call}"
            for call in calls if archive_blocks and self.archive else ():
                blocks = int(archive_blocks * (room - bounded[call]) / self.archive)
                if blocks > 0:
                    ways = f"-o tier=host, or -o archive_blocks={blocks}"
                    return f"fits {gpu_memory:g} GiB with {call} and {ways}"
        missing = (min(bounded.values()) - room) / GIB
        return f"does not fit {gpu_memory:g} GiB, {missing:.1f} GiB too much; give a smaller --size or stack"

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
    kv: int,
    archive: int,
) -> Fit:
    """Add up a generation with a transformer of Wan's kind, which is built and run without numbers.

    Args:
        configs: of transformer and VAE.
        text_encoder: its config.
        size: height and width in pixels.
        dtype: of all weights and activations.
        chunk_frames: latent frames of a chunk.
        rows: videos generated together; guidance branches take turns.
        kv: bytes that the memory holds.
        archive: bytes of its archive.

    Raises:
        UnsupportedPipelineError: if the transformer is of another kind.

    Activations are those of the model's own code run on tensors without numbers: the most that is alive at once.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    config = configs["transformer"]
    if not {"num_layers", "ffn_dim", "attention_head_dim"} <= set(config):
        raise UnsupportedPipelineError("whether a model fits a card can be said of transformers of Wan's kind only")
    with torch.device("meta"):
        model = _built(WanTransformer3DModel, {**config, "num_layers": 1, "image_dim": None}, dtype)
        vae = _built(AutoencoderKLWan, configs["vae"], dtype)
        spatial, channels = configs["vae"].get("scale_factor_spatial", 8), config["in_channels"]
        latents = torch.zeros(rows, channels, chunk_frames, size[0] // spatial, size[1] // spatial, dtype=dtype)
        text = torch.zeros(rows, _TEXT_TOKENS, config.get("text_dim", _TEXT_WIDTH), dtype=dtype)
        times = torch.zeros(rows)
    each = dtype.itemsize
    block = sum(weight.numel() for weight in model.blocks.parameters())
    rest = sum(weight.numel() for weight in model.parameters()) - block
    return Fit(
        transformer=(rest + block * config["num_layers"]) * each,
        vae=sum(weight.numel() for weight in vae.parameters()) * each,
        text_encoder=_text_parameters(text_encoder) * each,
        block=block * each,
        kv=kv,
        archive=archive,
        denoising=peak_bytes(lambda: model(latents, times, text, return_dict=False)),
        decoding=peak_bytes(lambda: vae.decode(latents, return_dict=False)),
    )


def _built(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    known = inspect.signature(kind.__init__).parameters
    model = kind(**{name: value for name, value in config.items() if name in known}).eval()
    # Past diffusers' own `to`, which warns that some weights stay in float32: they are few.
    return torch.nn.Module.to(model, dtype)


def _text_parameters(config: Mapping[str, Any]) -> int:
    from transformers import AutoConfig, AutoModelForTextEncoding

    with torch.device("meta"):
        model = AutoModelForTextEncoding.from_config(AutoConfig.for_model(**config))
    return sum(weight.numel() for weight in model.parameters())


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
        key, size = storage._cdata, storage.nbytes()
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
