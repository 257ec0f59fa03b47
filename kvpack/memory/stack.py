"""A memory policy: four roles and the chunk length, without state."""

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from kvpack.errors import InvalidOptionError, require_choice, require_int
from kvpack.memory.base import Commit, Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.roles import Compressor, LatentCompressor, Partitioner, Policy, Reindexer, Selector
from kvpack.memory.store import PackedBuffer

if TYPE_CHECKING:
    from kvpack.memory.session import Session

ROLES: dict[str, type[Policy]] = {
    "partitioner": Partitioner,
    "compressor": Compressor,
    "selector": Selector,
    "reindexer": Reindexer,
}

Selection = Literal["layer", "chunk"]


@dataclass(frozen=True)
class Stack(Memory):
    """The four roles under a name.

    Args:
        name: what `stats()` and tables call it.
        partitioner: what of the history is kept whole, compressed or dropped.
        compressor: how mid blocks get smaller.
        selector: which mid blocks a chunk attends.
        reindexer: temporal positions of everything attended.
        chunk_frames: latent frames generated together; the length that the model was trained with.
        archive_blocks: most compressed blocks kept, the oldest go first; None keeps all.
        selection: whose queries choose mid blocks: each "layer" its own, or the first layer's once a "chunk" for all
            layers; for each batch row either way.
        commit: which keys and values of a chunk become history: those of a "rerun" of the clean chunk at t = 0, or
            those of the "last-step" of denoising, which saves a forward but keeps what is left of its noise.
        replay_frames: last latent frames that are computed anew under a new prompt, as far as they are still whole.

    Raises:
        InvalidOptionError: if a size or word is wrong, a policy is in the wrong role, or the roles do not fit together.
    """

    name: str  # type: ignore[misc]  # a memory's is its class's
    partitioner: Partitioner
    compressor: Compressor
    selector: Selector
    reindexer: Reindexer
    chunk_frames: int = 4
    archive_blocks: int | None = None
    selection: Selection = "layer"
    commit: Commit = "rerun"  # type: ignore[misc]
    replay_frames: int = 21

    def __post_init__(self) -> None:
        for role, base in ROLES.items():
            policy = getattr(self, role)
            if not isinstance(policy, base):
                raise InvalidOptionError(f"{role} must be a {base.__name__}, got {policy!r}")
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        if self.archive_blocks is not None:
            require_int("archive_blocks", self.archive_blocks)
        require_int("replay_frames", self.replay_frames)
        require_choice("selection", self.selection, get_args(Selection))
        require_choice("commit", self.commit, get_args(Commit))
        self.partitioner.check(self.chunk_frames)
        self.reindexer.check(self.partitioner, self.chunk_frames)

    @property
    def latent_compressor(self) -> LatentCompressor | None:
        """The compressor, if it works on latents."""
        return self.compressor if isinstance(self.compressor, LatentCompressor) else None

    def session(self, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> "Session":
        """A session that keeps blocks in slots."""
        from kvpack.memory.session import Session

        return Session(self, geometry, buffer)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it; `stack_from_dict` reads it back.

        Raises:
            InvalidOptionError: if a policy is not a dataclass, or holds a module.
        """
        roles = {role: _policy_dict(getattr(self, role)) for role in ROLES}
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("name", *ROLES)}
        return {"name": self.name, **roles, **others}


def _policy_dict(policy: Policy) -> dict[str, Any]:
    if not is_dataclass(policy):
        raise InvalidOptionError(f"{type(policy).__name__} must be a dataclass to be written as data")
    options = {field.name: getattr(policy, field.name) for field in fields(policy)}
    for option, value in options.items():
        if isinstance(value, nn.Module):
            raise InvalidOptionError(
                f"{option} of {policy.role} {policy.name} is a {type(value).__name__}, which is no data to write; "
                "save it with save_pretrained and give the folder instead"
            )
    return {"policy": policy.name, **options}
