"""The learned branch of the PackForcing compressor (arXiv 2603.25730, section 4): clean latents to hidden tokens."""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, silu

from kvpack.errors import require_choice, require_int
from kvpack.memory.blocks import Coordinates
from kvpack.memory.roles import Project
from kvpack.version import __version__

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
KERNEL = 3
_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")

Branches = Literal["dual", "hr"]


class HighResolutionBranch(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="kvpack",
    license="apache-2.0",
    pipeline_tag="text-to-video",
    tags=["kvpack", "packforcing", "video-generation", "kv-cache"],
    paper_url="https://arxiv.org/abs/2603.25730",
):
    """Four strided convolutions and a projection, from a chunk's latents to the tokens of `dual` and `hr`.

    The projection is zero at the start, so that training begins at the compressor without it. Saved and shared as any
    model of the Hub: `save_pretrained`, `from_pretrained`, `push_to_hub`; the config says how it is to be used.

    Differs from the paper: latents are pooled adaptively to the exact token grid, so that no row of an odd grid is
    dropped, and a model with another patch has as many 2x convolutions in space as it needs.

    Args:
        channels: channels of a latent.
        width: channels of a hidden token, heads times head_dim.
        patch: latent rows and columns of a token.
        hidden: channels between the convolutions.
        branches: "dual" if its tokens are added to those of `lr`, "hr" if they stand alone.
        project: how tokens become keys and values (see `LatentCompressor.project`).
        coordinates: where tokens sit (see `PoolCompressor`).
        chunk_frames: latent frames of the chunks that it was trained in; None if nobody knows.
        base_model: the model that it was trained for.
        kvpack_version: version that made it.
        seed: of the weights at the start; the process's random state is left alone.

    Raises:
        InvalidOptionError: if a size or word is wrong.

    >>> branch = HighResolutionBranch(channels=16, width=24, patch=(2, 2))
    >>> tokens = branch(torch.randn(1, 16, 4, 60, 104), (2, 7, 13))
    >>> tuple(tokens.shape), bool(tokens.any())
    ((1, 182, 24), False)
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        patch: tuple[int, int],
        hidden: int = 64,
        branches: Branches = "dual",
        project: Project = "layers",
        coordinates: Coordinates = "centered",
        chunk_frames: int | None = None,
        base_model: str | None = None,
        kvpack_version: str = __version__,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("hidden", hidden)):
            require_int(name, value, minimum=1)
        for side in patch:
            require_int("patch", side, minimum=1)
        if chunk_frames is not None:
            require_int("chunk_frames", chunk_frames, minimum=1)
        require_choice("branches", branches, get_args(Branches))
        require_choice("project", project, get_args(Project))
        require_choice("coordinates", coordinates, get_args(Coordinates))
        self.channels, self.width, self.patch, self.hidden = channels, width, patch, hidden
        self.branches, self.project, self.coordinates = branches, project, coordinates
        self.chunk_frames, self.base_model, self.kvpack_version = chunk_frames, base_model, kvpack_version
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds all devices, too
            convolutions = [
                nn.Conv3d(inputs, hidden, KERNEL, stride, padding=KERNEL // 2)
                for inputs, stride in zip((channels, hidden, hidden, hidden), strides(patch), strict=True)
            ]
            self.convolutions = nn.ModuleList(convolutions)
            self.projection = nn.Linear(hidden, width)
            for convolution in convolutions:
                # The default start halves the signal in every layer, and the projection would learn from the rest.
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                assert convolution.bias is not None  # narrows the type
                nn.init.zeros_(convolution.bias)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, latents: Float[Tensor, "b c t y x"], grid: tuple[int, int, int]) -> Float[Tensor, "b n d"]:
        """Return hidden tokens in row-major order, on the device and in the dtype of the weights.

        Args:
            latents: normalised clean latents.
            grid: frames, rows and columns of tokens.
        """
        weight = self.projection.weight
        hidden = latents.to(weight.device, weight.dtype)
        for convolution in self.convolutions:
            hidden = silu(convolution(hidden))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        cells = adaptive_avg_pool3d(hidden.to(wide), grid).to(hidden.dtype)
        return self.projection(cells.flatten(2).transpose(1, 2))  # [batch, cells, width]

    def flops(self, latents: tuple[int, int, int], tokens: int) -> int:
        """Count the operations for one video; a multiply-add counts as two.

        Args:
            latents: frames, rows and columns of the latents.
            tokens: tokens that are made.

        >>> HighResolutionBranch(channels=16, width=1536, patch=(2, 2)).flops((4, 60, 104), 182)
        1634500608
        """
        flops = 2 * self.hidden * self.width * tokens
        inputs = (self.channels, self.hidden, self.hidden, self.hidden)
        for count, stride in zip(inputs, strides(self.patch), strict=True):
            # Rounded up: with padding of half a kernel no row is lost.
            t, y, x = latents = tuple(-(-size // step) for size, step in zip(latents, stride, strict=True))  # type: ignore[assignment]
            flops += 2 * t * y * x * count * self.hidden * KERNEL**3
        return flops

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        strict: bool = True,
        **options: Any,
    ) -> "HighResolutionBranch":
        """Load as the mixin does, but never from a pickle, in the dtype of the file, and without printing."""
        hub = {name: options.pop(name) for name in _HUB}
        here = os.path.isdir(model_id)
        path = os.path.join(model_id, WEIGHTS_FILE) if here else hf_hub_download(model_id, WEIGHTS_FILE, **hub)
        # A config from a stranger may announce any size; the file has what it has, and all of it if that is asked for.
        with torch.device("meta") if strict else nullcontext():
            branch = cls(**{**options, "patch": tuple(options["patch"])})
        # Assigned, which keeps the file's dtype; into tensors on meta nothing could be copied.
        branch.load_state_dict(load_file(path, device=map_location), strict=strict, assign=True)
        return branch.eval()


def strides(patch: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the convolutions' strides: 2x in time, then 2x in space as often as it takes to reach 4 x 4 tokens.

    >>> strides((2, 2))
    [(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)]
    >>> strides((1, 1))
    [(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 1)]
    """
    rows, columns = (int(math.log2(4 * side)) for side in patch)
    return [(2, 1, 1), *((1, 1 + (index < rows), 1 + (index < columns)) for index in range(3))]
