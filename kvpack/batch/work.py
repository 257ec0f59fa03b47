"""One process of a batch: a pipeline that is loaded once, and makes one video after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvpack.batch.folder import BatchFolder
from kvpack.batch.videos import Settings, Video
from kvpack.media.files import checksum
from kvpack.media.reading import count_frames
from kvpack.pipeline.checkpoints import Job, checkpointing, remove, reopened, started_job
from kvpack.pipeline.enable import enable
from kvpack.pipeline.track import load_pipeline, started


class Work:
    """A pipeline and the folder that its videos go into.

    Raises:
        InvalidOptionError: if the model does not load, or takes not this memory.
    """

    def __init__(self, settings: Settings, folder: BatchFolder) -> None:
        self.settings, self.folder = settings, folder
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.pipeline = load_pipeline(Path(settings.model), self.dtype, settings.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.stack = enable(self.pipeline, settings.stack, **settings.options).packforcing.stack
        self.pipeline.packforcing.fps = settings.fps

    def make(self, video: Video) -> Iterator[int]:
        """Make a video, from its last checkpoint where there is one, and yield the pixel frames that it has.

        Raises:
            KVPackError: if it cannot be made.
        """
        folder, output, settings = self.folder.checkpoint(video), self.folder.output(video), self.settings
        if (job := started_job(folder)) is not None:
            with reopened(folder, job, self.dtype, settings.device, self.pipeline) as track:
                yield from checkpointing(track, job, folder, partial=False)
            return
        if output.exists():  # whole: it appears at the end, where its checkpoint goes
            yield count_frames(output)
            return
        if folder.exists():  # without a snapshot it holds nothing to go on with
            remove(folder)
        given = {} if video.negative_prompt is None else {"negative_prompt": video.negative_prompt}
        arguments = {**settings.call, **given, "prompt": video.prompt}
        job = Job(
            settings.model,
            str(output),
            str(video.prompt),
            video.seed,
            settings.fps,
            settings.every,
            settings.dtype,
            settings.device,
        )
        with started(self.pipeline, self.stack, settings.frames(video), video.seed, arguments) as track:
            job.write(folder)  # behind the start, which may refuse the call
            yield from checkpointing(track, job, folder, partial=False)

    def entry(self, video: Video, frames: int) -> dict[str, Any]:
        """Return what the manifest says of a video."""
        path = self.folder.output(video)
        said = {"name": video.name, "prompt": video.prompt, "seed": video.seed, "frames": frames}
        return {**said, "fps": self.settings.fps, "bytes": path.stat().st_size, "sha256": checksum(path)}
