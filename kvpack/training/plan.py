"""What training a compressor will hold and compute, from configs alone: no model, no weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kvpack.memory.costs import LatentShape, ModelCost
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import LatentCompressor
from kvpack.memory.stack import Stack
from kvpack.planning.planner import attended_tokens, twin_tokens
from kvpack.training.targets import targets

#: Weight, gradient and the two moments of AdamW, in float32.
_TRAINED_BYTES = 16
#: Latents of clips are in float32.
_LATENT_BYTES = 4
#: A backward pass costs about two forwards.
_BACKWARD = 2


@dataclass(frozen=True)
class TrainingPlan:
    """Memory and operations of context distillation on one batch, for the last chunk of its clips: the largest step.

    Args:
        model_parameters: transformer and VAE, frozen.
        model_bytes: the same in the model's dtype.
        trained_parameters: the compressor.
        trained_bytes: its weights, gradients and AdamW's moments, in float32.
        graph_bytes: what is kept for the backward pass: of one denoising step of the chunk, and of the twins.
        kv_bytes: keys and values of the history, packed and whole.
        batch_bytes: latents and captions' embeddings of a batch, and features that a decoder keeps for a compressor
            that looks at pixels; other clips are on the disk, and other captions on the host.
        flops_per_step: both rollouts, and the backward passes of one of them.
    """

    model_parameters: int
    model_bytes: int
    trained_parameters: int
    trained_bytes: int
    graph_bytes: int
    kv_bytes: int
    batch_bytes: int
    flops_per_step: int

    @property
    def total_bytes(self) -> int:
        """All that is held at once, except the temporary memory of single operations."""
        return self.model_bytes + self.trained_bytes + self.graph_bytes + self.kv_bytes + self.batch_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def training_plan(
    geometry: Geometry,
    stack: Stack,
    latents: LatentShape,
    cost: ModelCost,
    flops: Callable[[int, int], int],
    *,
    frames: int = 20,
    batch: int = 1,
    steps: int = 4,
) -> TrainingPlan:
    """Plan context distillation.

    Args:
        geometry: the model at the clips' size; its dtype is that of the frozen model.
        stack: the memory, with the compressor that is trained.
        latents: what the cost of compressing latents depends on.
        cost: parameters of the model, and what its graph keeps.
        flops: operations of one forward, given query tokens and attended tokens.
        frames: latent frames of a clip.
        batch: clips a backward pass.
        steps: denoising steps.

    Raises:
        InvalidOptionError: if clips of this length attend nothing compressed.
    """
    last, chunk = targets(stack, frames)[-1], stack.chunk_frames * geometry.tokens_per_frame
    ledger, histories, twins = stack.ledger(), [], []
    for _ in range(last):
        histories.append(attended_tokens(geometry, stack, ledger))
        twins.append(twin_tokens(geometry, stack, ledger))
        ledger = ledger.commit().ledger
    packed, whole = attended_tokens(geometry, stack, ledger), last * chunk
    itemsize, compressor = geometry.dtype.itemsize, stack.compressor
    branches = {}
    if isinstance(compressor, LatentCompressor):
        branches = compressor.costs(stack.chunk_frames, geometry, latents)
    trained = sum(each.parameters for each in branches.values())
    made = [(count, history) for counts, history in zip(twins, histories, strict=True) for count in counts]
    graph = cost.graph_elements(chunk, packed + chunk)
    graph += sum(cost.graph_elements(count, history + count) for count, history in made)
    teacher = sum(flops(chunk, (index + 1) * chunk) for index in range(last)) + steps * flops(chunk, whole + chunk)
    student = sum(flops(chunk, history + chunk) for history in histories)
    learned = steps * flops(chunk, packed + chunk) + sum(flops(count, history + count) for count, history in made)
    learned += len(made) * sum(each.flops for each in branches.values())
    decoded = cost.decode_flops(last * stack.chunk_frames) if "lr" in branches else 0
    rows, columns = (tokens * patch for tokens, patch in zip(geometry.grid, latents.patch, strict=True))
    kept = cost.text_elements + (cost.decoder_elements if stack.needs_pixels else 0)
    return TrainingPlan(
        model_parameters=cost.parameters,
        model_bytes=cost.parameters * itemsize,
        trained_parameters=trained,
        trained_bytes=trained * _TRAINED_BYTES,
        graph_bytes=graph * itemsize * batch,
        kv_bytes=(packed + whole) * geometry.kv_bytes_per_token * batch,
        batch_bytes=(latents.channels * frames * rows * columns * _LATENT_BYTES + kept * itemsize) * batch,
        # A forward and a backward of what is learned; the rest is forwards alone.
        flops_per_step=(teacher + student + (1 + _BACKWARD) * learned + decoded) * batch,
    )
