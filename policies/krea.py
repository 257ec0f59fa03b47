"""The last frames computed anew for every chunk (Krea Realtime 14B, github.com/krea-ai/realtime-video)."""

from dataclasses import dataclass, replace

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens, consecutive


@dataclass(frozen=True)
class Krea(StateMemory):
    """Keys of a few clean frames that have seen nothing but each other, so that no dropped frame lives on in them.

    Every commit forwards the last `context_frames` chunk by chunk from an empty memory, at positions from 0 on. The
    first of them, once it is not the video's first, is encoded anew from its pixels as the first frame of a video is,
    which is what the model knows at position 0. Tokens of the past have a bias on their logits while a chunk is
    denoised.

    Differs from the released code, which forwards all of context at once under a block-causal mask: chunk by chunk is
    the same sum without a mask. The text that names a bias gives no value: 0 is none.

    Args:
        chunk_frames: latent frames generated together.
        context_frames: last latent frames attended, a multiple of the chunk.
        past_bias: added to the logits of tokens of the past; below 0 they count for less.

    Raises:
        InvalidOptionError: if the context is no multiple of the chunk.
    """

    chunk_frames: int = 3
    context_frames: int = 3
    past_bias: float = 0.0
    name = "krea"
    by_head = True
    replays_always = True
    reencodes = True

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        if self.context_frames < self.chunk_frames or self.context_frames % self.chunk_frames:
            raise InvalidOptionError(
                f"context_frames must be a multiple of chunk_frames, {self.chunk_frames}, got {self.context_frames}"
            )

    @property
    def replay_frames(self) -> int:  # type: ignore[override]
        """All of the context."""
        return self.context_frames

    def attend(self, state: Tokens | None, chunk: Chunk) -> Attended:
        """Attend the context from position 0 on."""
        held = chunk.tokens[:0] if state is None else state
        placed, start = consecutive([held], frame_tokens=chunk.geometry.tokens_per_frame)
        bias = self.past_bias if chunk.step >= 0 else 0.0  # while sampling only: not when context is computed
        return Attended(tuple(replace(part, bias=bias) for part in placed), start, held)

    def remember(self, state: Tokens, chunk: Chunk) -> Tokens:
        """Append the chunk to those of its replay."""
        tokens, room = state + chunk.tokens, self.context_frames * chunk.geometry.tokens_per_frame
        return tokens[len(tokens) - room :].compact() if len(tokens) > room else tokens

    def forget(self, state: Tokens | None, tokens: int) -> None:
        """Drop everything, for a replay begins with nothing."""
