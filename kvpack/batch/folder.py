"""The folder of a batch: its videos, what was asked for, and what was made."""

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpack.batch.videos import Settings, Video, is_name
from kvpack.checkpoints.text import parsed_json
from kvpack.errors import OutputError
from kvpack.media.files import checksum, make_folder, save_bytes

_ASKED, _MANIFEST = "batch.json", "manifest.jsonl"


class BatchFolder:
    """A folder whose videos are made in one call or several."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # workers may be in other working directories

    def output(self, video: Video) -> Path:
        """Return the file of a video."""
        return self.path / f"{video.name}.mp4"

    def checkpoint(self, video: Video) -> Path:
        """Return the folder of a video's checkpoints."""
        return self.path / f"{video.name}.mp4.checkpoint"

    def ask(self, settings: Settings, videos: Iterable[Video]) -> None:
        """Note what is asked for, or check that it goes on with what was asked for before.

        Raises:
            OutputError: if the folder cannot be written, holds other videos, or videos of other settings.
        """
        before = self._asked()
        wanted = {video.name: asdict(video) for video in videos}
        known = before["videos"] if before else {}
        if before:
            self._require_same("its settings were", before["settings"], asdict(settings))
        for video in videos:
            if video.name in known:
                self._require_same(f"of {video.name} it was", known[video.name], wanted[video.name])
            elif self.output(video).exists():
                raise OutputError(f"{self.output(video)} exists, and is not of this batch; give another --output")
        make_folder(self.path)
        asked = {"settings": asdict(settings), "videos": {**known, **wanted}}
        save_bytes(json.dumps(asked, indent=2).encode(), self.path / _ASKED)

    def made(self) -> dict[str, dict[str, Any]]:
        """Return what the manifest says of the videos that are there, by name.

        Raises:
            OutputError: if one of them is not what was written.
        """
        entries = {entry["name"]: entry for entry in self.entries() if "sha256" in entry}
        found = {name: entry for name, entry in entries.items() if (self.path / f"{name}.mp4").exists()}
        for name, entry in found.items():
            if checksum(path := self.path / f"{name}.mp4") != entry["sha256"]:
                raise OutputError(f"{path} is not what {_MANIFEST} says; remove it, and it is made again")
        return found

    def note(self, entry: dict[str, Any]) -> None:
        """Append a line to the manifest, in one piece, so that several processes may."""
        line = json.dumps(entry).encode() + b"\n"
        descriptor = os.open(self.path / _MANIFEST, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if (size := os.fstat(descriptor).st_size) and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # behind one that a full disk cut off
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError as error:
            raise OutputError(f"cannot write {self.path / _MANIFEST}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _asked(self) -> dict[str, Any] | None:
        path = self.path / _ASKED
        if not path.exists():
            return None
        try:
            asked = parsed_json(path.read_bytes().decode())
            videos = {name: dict(each) for name, each in dict(asked["videos"]).items()}
            return {"settings": dict(asked["settings"]), "videos": videos}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged ({str(error)[:200]}); give another --output") from error

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of the manifest; one that a full disk cut off is none."""
        path, entries = self.path / _MANIFEST, []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = parsed_json(line.decode())
            except ValueError:
                continue
            if isinstance(entry, dict) and is_name(entry.get("name")):
                entries.append(entry)
        return entries

    def _require_same(self, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now))  # as the file has it: tuples are lists there
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise OutputError(
                    f"{self.path} holds a batch that asked for something else: {what} {key} {before.get(key)!r}, now "
                    f"it is {now.get(key)!r}; ask for the same, or give another --output"
                )
