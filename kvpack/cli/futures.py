"""`kvpack generate --fork-at`: several videos that share their beginning, which is generated once."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.checkpoints.text import prompt_lines
from kvpack.cli.support import refuse_beside
from kvpack.errors import InvalidOptionError, require_seed
from kvpack.media.video import VideoWriter

if TYPE_CHECKING:
    from kvpack.pipeline.track import Track

_FORM = """a prompt, or {"prompt": "it rests", "seed": 7, "cut": true}, of which each part may be left out"""


@dataclass(frozen=True)
class Future:
    """What one of the videos goes on with.

    Args:
        prompt: from the fork on; None goes on under the one in force.
        seed: of the noise from the fork on; None draws the same as the other futures.
        cut: whether another scene begins.
    """

    prompt: str | None = None
    seed: int | None = None
    cut: bool = False


def read_futures(path: Path) -> list[Future]:
    """Return the futures of a text file, one a line.

    Raises:
        InvalidOptionError: if it cannot be read, a line is none, or there are not two different ones.
    """
    futures = [_future(line, f"{path}, line {number}") for number, line in prompt_lines(path)]
    if len(futures) < 2 or len(set(futures)) < len(futures):
        raise InvalidOptionError(f"--prompts {path} has {len(futures)} lines; give two or more, each another one")
    return futures


def _future(line: str, where: str) -> Future:
    if not line.startswith("{"):
        return Future(line)
    try:
        future = Future(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidOptionError(f"{where} must be {_FORM}, got {line[:80]}") from error
    kinds = {"prompt": str | None, "seed": int | None, "cut": bool}
    numbered = isinstance(future.seed, bool)
    if numbered or not all(isinstance(value, kinds[name]) for name, value in asdict(future).items()):
        raise InvalidOptionError(f"{where} must be {_FORM}, got {line[:80]}")
    if future.seed is not None:
        require_seed(future.seed)
    return future


def futures_of(
    fork_at: float | None, prompts: Path | None, seconds: float, output: Path, others: Mapping[str, object]
) -> dict[Path, Future]:
    """Return what is to be written where, by names made of that of `output`: nothing if there is no fork.

    Raises:
        InvalidOptionError: if one is given without the other, or they do not fit the rest.
        OutputError: if a file cannot be written.
    """
    if fork_at is None:
        return {}
    if prompts is None:
        raise InvalidOptionError("--fork-at says when the videos part, and --prompts, how; give both")
    if not 0 < fork_at < seconds:
        raise InvalidOptionError(f"--fork-at must be > 0 and < --seconds {seconds:g}, got {fork_at:g}")
    refuse_beside("--fork-at", others)
    futures = {output.with_stem(f"{output.stem}-{n}"): each for n, each in enumerate(read_futures(prompts), 1)}
    for path in futures:
        VideoWriter(path, 1)
    return futures


def written_futures(
    track: "Track", futures: dict[Path, Future], fork_at: float, fps: float, on_chunk: Callable[["Track"], None]
) -> list[dict[str, Any]]:
    """Write the videos, one future after the other behind what they share, and return a report of each.

    They part at the end of the chunk that shows the second `fork_at`, but before the last chunk.

    Raises:
        InvalidOptionError: if the whole video is one chunk.
    """
    if track.chunks < 2:
        raise InvalidOptionError("the whole video is one chunk, of which nothing can be shared; give more --seconds")
    with ExitStack() as whole:
        each = [(path, future, whole.enter_context(ExitStack())) for path, future in futures.items()]
        writers = [stack.enter_context(VideoWriter(path, fps)) for path, _, stack in each]
        while track.frames < fork_at * fps and len(track.chunk_seconds) < track.chunks - 1:
            if not _chunk_written(track, writers, on_chunk):
                break
        branches = list(_forked(track, [future for _, future, _ in each]))
        reports = []
        for (path, future, stack), writer, branch in zip(each, writers, branches, strict=True):
            with branch.stream:  # type: ignore[attr-defined]  # it is a Stream
                while _chunk_written(branch, [writer], on_chunk):
                    pass
            stack.close()  # the file is whole, whatever becomes of the others
            reports.append({"output": str(path), **asdict(future), **branch.report(), "frames": writer.frames})
        return reports


def _chunk_written(track: "Track", writers: Sequence[VideoWriter], on_chunk: Callable[["Track"], None]) -> bool:
    """Write a track's next chunk; return whether there was one."""
    chunk = track.next_frames()
    if chunk is None:
        return False
    for writer in writers:
        writer.write(chunk)
    on_chunk(track)
    return True


def _forked(track: "Track", futures: Sequence[Future]) -> Iterator["Track"]:
    """Yield a track for each future, and end the one that they come from."""
    stream: Any = track.stream
    left = track.chunks - len(track.chunk_seconds)
    for future in futures:
        yield type(track)(track.pipeline, track.stack, left, stream.fork(**asdict(future)))
    stream.close()
