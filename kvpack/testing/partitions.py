"""Whether the parts that a partitioner gives its frames are as its horizon says."""

from kvpack.errors import PolicyError
from kvpack.memory.roles import Partitioner


def check_parts(policy: Partitioner, chunk_frames: int) -> None:
    """Raise `PolicyError` if a frame changes its part behind the horizon, or has one again after it had none."""
    name, horizon = type(policy).__name__, policy.horizon_frames
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 0:
        raise PolicyError(f"{name}.horizon_frames is {horizon!r}, but it must be a whole number of frames >= 0")
    settled = -(-horizon // chunk_frames) * chunk_frames  # ages are counted from the end of a frame's chunk
    before: dict[int, str | None] = {}
    for history in range(chunk_frames, settled + 12 * chunk_frames, chunk_frames):
        segments = policy.partition(history, chunk_frames)
        now = {frame: each.part for each in segments for frame in each.frames}
        for frame, part in before.items():
            found, age = now.get(frame), history - (frame // chunk_frames + 1) * chunk_frames
            if found != part and (part is None or age > settled):
                raise PolicyError(
                    f"{name} has frame {frame} in {part or 'no part'} of {history - chunk_frames} frames and in "
                    f"{found or 'no part'} of {history}, but at an age of horizon_frames = {horizon} its part must be "
                    "final, and a frame without a part stays without"
                )
        before = {frame: now.get(frame) for frame in range(history)}
