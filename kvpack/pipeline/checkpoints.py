"""A video of the command line that is saved every few chunks, and gone on with after anything that ends its process."""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvpack.checkpoints.text import read_json
from kvpack.errors import OutputError, SnapshotError
from kvpack.media.files import make_folder, save_bytes
from kvpack.media.segments import SegmentedVideo, clear
from kvpack.pipeline.enable import enable
from kvpack.pipeline.stream import Stream
from kvpack.pipeline.track import Track, load_pipeline
from kvpack.plugins.resolve import resolve_stack
from kvpack.snapshots.folder import SnapshotFolder
from kvpack.snapshots.lock import LOCK
from kvpack.snapshots.resuming import saved_stack
from kvpack.snapshots.types import fits

#: Frames a second, or chunks between two checkpoints.
_MOST = 1e6
_JOB, _SEGMENTS = "generate.json", "segments"


@dataclass(frozen=True)
class Job:
    """What a folder of checkpoints says beside its snapshots.

    Args:
        model: folder of the pipeline.
        output: the mp4 to write.
        prompt: what was asked for, for the report.
        seed: of the noise, for the report.
        fps: frames a second.
        every: chunks between two checkpoints.
        dtype: of the model.
        device: where it runs.
    """

    model: str
    output: str
    prompt: str
    seed: int
    fps: float
    every: int
    dtype: str
    device: str

    def write(self, folder: Path) -> None:
        """Write it into a folder of checkpoints that holds no snapshot.

        Raises:
            OutputError: if the folder holds another generation, or cannot be written.
        """
        require_free(folder)
        save_bytes(json.dumps(asdict(self), indent=2).encode(), make_folder(folder) / _JOB)

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """Return what is written in a folder.

        Raises:
            SnapshotError: if nothing of the kind is.
        """
        path = folder / _JOB
        try:
            job = cls(**read_json(path))
        except OSError as error:
            raise SnapshotError(
                f"{folder} holds no generation: {path} cannot be read ({error.strerror}); "
                "give the folder that `kvpack generate --checkpoint-every` wrote"
            ) from error
        except (ValueError, TypeError) as error:
            raise SnapshotError(f"{path} is damaged: {str(error)[:200]}") from error
        wrong = [name for name, _ in fits(cls, asdict(job))]
        if wrong := wrong or [name for name in ("every", "fps") if not 0 < getattr(job, name) < _MOST]:
            raise SnapshotError(f"{path} is damaged: its {wrong[0]} is {str(getattr(job, wrong[0]))[:80]!r}")
        if Path(job.output).suffix.lower() != ".mp4":  # a stranger's folder replaces no other file
            raise SnapshotError(f"{path} is damaged: its output is {job.output[:80]!r}, which is no mp4")
        return job


def require_free(folder: Path) -> None:
    """Raise `OutputError` if a folder of checkpoints holds another generation already."""
    if SnapshotFolder(folder).numbers():  # a job without one is left where the first could not be written
        raise OutputError(
            f"{folder} holds a generation that is not finished; go on with it by 'kvpack resume {folder}', remove it, "
            "or give another --checkpoint"
        )


def checkpointed(track: Track, job: Job, folder: Path, on_chunk: Callable[[Track], None]) -> int:
    """Generate a track to its end, saved every few chunks, and return the pixel frames of the whole video.

    After an interrupt the video holds what was made so far, and the folder stays. At the end the folder is removed.
    """
    chunks = checkpointing(track, job, folder)
    made = next(chunks)
    for frames in chunks:
        made = frames
        try:
            on_chunk(track)
        except BaseException as error:
            # Inside of the loop, where an interrupt joins what was made.
            chunks.throw(error)
    return made


def checkpointing(track: Track, job: Job, folder: Path, *, partial: bool = True) -> Generator[int, None, None]:
    """Do the same chunk by chunk: yield the pixel frames that the video has, before the first one and behind each.

    Args:
        track: the generation.
        job: what was asked for.
        folder: of the checkpoints.
        partial: whether an interrupt leaves a video of what was made so far.
    """
    stream: Any = track.stream
    output = Path(job.output)
    done = stream.note["segments"] if isinstance(stream.note, dict) and "segments" in stream.note else []
    stream.save(folder, {"segments": done})  # from here on the folder is this process's, and can be gone on with
    whole = SegmentedVideo(folder / _SEGMENTS, job.fps, done)
    with _joined_if_interrupted(whole, output if partial else None, folder) as video:
        yield video.frames
        while (chunk := track.next_frames()) is not None:
            video.write(chunk)
            if len(track.chunk_seconds) % job.every == 0:
                # Cut first: a snapshot never lists a segment that is not whole; one that none lists is made again.
                stream.save(folder, {"segments": video.cut()})
            yield video.frames
    video.join(output)
    stream.close()  # lets go of the lock, which is among what is removed
    remove(folder)  # last, when the video is on the disk


@contextmanager
def _joined_if_interrupted(video: SegmentedVideo, output: Path | None, folder: Path) -> Iterator[SegmentedVideo]:
    try:
        with video:
            yield video
    except (KeyboardInterrupt, SystemExit) as error:
        if video.frames and output is not None:
            video.join(output)
            error.add_note(f"{output} holds the {video.frames / video.fps:.1f} s that were made")
        error.add_note(f"'kvpack resume {folder}' goes on from the last checkpoint")
        raise


@contextmanager
def reopened(folder: Path, job: Job, dtype: torch.dtype, device: str, pipeline: Any = None) -> Iterator[Track]:
    """Go on with the generation of a folder of checkpoints.

    Args:
        folder: of the checkpoints.
        job: what it says.
        dtype: of the model.
        device: where to run.
        pipeline: its model, if that is loaded already.

    Raises:
        SnapshotError: if it holds none that can be read.
        InvalidOptionError: if the model does not load, or is another one.
    """
    memory = resolve_stack(saved_stack(folder), {})
    pipeline = pipeline or load_pipeline(Path(job.model), dtype, device)
    pipeline.set_progress_bar_config(disable=True)  # the command line has a display of its own
    enable(pipeline, memory).packforcing.fps = job.fps
    stream: Stream = pipeline.packforcing.resume(folder)
    try:
        yield Track(pipeline, memory, stream.chunks or 0, stream, before=stream.before)
    finally:
        stream.close()


def started_job(folder: Path) -> Job | None:
    """Return what a folder of checkpoints goes on with; None if it has nothing, as where its process ended too early.

    Raises:
        SnapshotError: if what it says is damaged.
    """
    return Job.read(folder) if (folder / _JOB).exists() and SnapshotFolder(folder).numbers() else None


def remove(folder: Path) -> None:
    """Remove the files of a generation, and what folders have nothing else in them."""
    with suppress(OSError):  # first: without it nobody takes what a process that ends here leaves for unfinished
        (folder / _JOB).unlink()
    SnapshotFolder(folder).clear()
    clear(folder / _SEGMENTS)
    with suppress(OSError):
        (folder / LOCK).unlink()
    for each in (folder / _SEGMENTS, folder):
        with suppress(OSError):
            each.rmdir()
