"""A folder of snapshots: the last two of one generation, each a JSON file and the tensor files that it lists."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from kvpack.errors import OutputError, SnapshotError, SnapshotWarning
from kvpack.media.files import make_folder, sync_folder
from kvpack.snapshots.tensors import TensorFiles, tensor_parts, write_file

FORMAT = 2
KEPT = 2
_NAME, _TENSORS = re.compile(r"snapshot-(\d{6})\.json"), re.compile(r"(blocks|tensors)-\d{6}\.safetensors")
_MOST_JSON = 1 << 26  # 64 MiB: it is parsed in memory, whoever wrote it
#: Bytes that any JSON may take beyond twice the files of its folder.
_SPARE = 1 << 24
T = TypeVar("T")


def tensor_files(number: int) -> tuple[str, str]:
    """Return the names of the files that a snapshot writes: of blocks, which later ones may share, and of the rest."""
    return f"blocks-{number:06d}.safetensors", f"tensors-{number:06d}.safetensors"


class SnapshotFolder:
    """A folder with the last two snapshots of one generation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: What the snapshots list that were written from here.
        self._files: dict[int, dict[str, Any]] = {}

    def numbers(self) -> list[int]:
        """Return the numbers of the snapshots in it, the newest first."""
        try:
            names = [_NAME.fullmatch(name) for name in os.listdir(self.path)]
        except OSError:
            names = []
        return sorted((int(each[1]) for each in names if each), reverse=True)

    def write(self, number: int, content: Mapping[str, Any], tensors: Mapping[str, Any], used: Iterable[str]) -> None:
        """Write a snapshot, and remove all but the last two.

        Args:
            number: its number, larger than those of all before.
            content: what its JSON says.
            tensors: what goes into each of its own tensor files.
            used: names of all tensor files that it refers to.

        Raises:
            OutputError: if it cannot be written; those before are still there.
        """
        make_folder(self.path)
        older = self._listed(self.numbers())
        files = {name: older[name] for name in used if name not in tensors}
        for name, each in tensors.items():
            if each:
                # Before the JSON, so that a snapshot is there only when all of it is.
                files[name] = write_file(self.path / name, tensor_parts(each))
        whole = {"format": FORMAT, "number": number, **content, "files": files}
        text = json.dumps({**whole, "sha256": _digest(whole)}, allow_nan=False).encode()
        self._require_readable(text, files)  # before there is a snapshot that nobody can resume
        self._files[number] = files
        write_file(self.path / _name(number), [text])
        sync_folder(self.path)  # a name is on the disk only when its folder is
        self._prune()  # last: the older one goes when the newer one is safe

    def read(self, use: Callable[[dict[str, Any], TensorFiles], T], number: int | None = None) -> T:
        """Return what `use` makes of the newest snapshot, or of the one before where that is damaged.

        Args:
            use: given the JSON and what reads tensors; whatever `SnapshotError` it raises itself goes through.
            number: of the one snapshot to read.

        Raises:
            SnapshotError: if no snapshot can be read.
        """
        problems = []
        for each in self.numbers() if number is None else [number]:
            try:
                content = self.content(each)
                files = TensorFiles(self.path, content["files"])
                files.check()  # all of them now: behind `use` there is no way back to the snapshot before
            except SnapshotError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{'; '.join(problems)}; snapshot {each} is used", SnapshotWarning, stacklevel=4)
            try:
                return use(content, files)
            except SnapshotError as error:
                raise SnapshotError(f"{self.path / _name(each)}: {error}") from error
        raise SnapshotError(
            "; ".join(problems) or f"{self.path} holds no snapshot; give a folder that one was saved in"
        )

    def content(self, number: int) -> dict[str, Any]:
        """Return what the JSON of a snapshot says, once it is known to be what was written.

        Raises:
            SnapshotError: if it is damaged, of another version, or another number's.
        """
        path = self.path / _name(number)
        try:
            if path.stat().st_size > _MOST_JSON:  # before it is read
                raise SnapshotError(f"{path} is larger than any snapshot's JSON, {_MOST_JSON} bytes")
            text = path.read_bytes()
            # Before it is parsed: small JSON can be large objects.
            if _parsed_bytes(text) > 2 * sum(each.stat().st_size for each in self.path.iterdir()) + _SPARE:
                raise SnapshotError(
                    f"{path} is no snapshot: it would take more than twice the memory of all files there"
                )
            content = json.loads(text)
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"{path} is no JSON ({str(error)[:200]})") from error
        if not isinstance(content, dict) or "format" not in content:
            raise SnapshotError(f"{path} is no snapshot: it does not say its format")
        if content["format"] != FORMAT:
            by = str(content.get("kvpack"))[:40]
            raise SnapshotError(
                f"{path} has format {str(content['format'])[:40]}, written by kvpack {by}; this one reads {FORMAT}"
            )
        digest = content.pop("sha256", None)  # the checksum is of all but itself
        if digest != _digest(content):
            raise SnapshotError(f"{path} is not what was written: its checksum differs")
        if content.get("number") != number:  # a file that was renamed would pass every other check
            raise SnapshotError(f"{path} was written as snapshot {str(content.get('number'))[:40]}")
        files = content.get("files")
        if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
            raise SnapshotError(f"{path} does not list its files")
        return content

    def require_own(self, generation: str) -> None:
        """Raise `OutputError` if the newest snapshot that can be read is another generation's."""
        for number in self.numbers():
            with suppress(SnapshotError):
                if str(self.content(number).get("generation")) == generation:
                    return
                raise OutputError(
                    f"{self.path} holds snapshots of another generation; give an empty folder, or resume that one"
                )

    def chunks(self) -> dict[int, int]:
        """Return the number of the newest snapshot behind each count of chunks."""
        behind: dict[int, int] = {}
        for number in reversed(self.numbers()):
            with suppress(SnapshotError):
                behind[int(self.content(number)["chunks"])] = number
        return behind

    def forget_after(self, number: int) -> None:
        """Remove the snapshots that are newer than one."""
        for each in self.numbers():
            if each > number:
                _remove(self.path / _name(each))

    def clear(self) -> None:
        """Remove all snapshots, and nothing else."""
        self.forget_after(-1)
        self._prune()

    def _require_readable(self, text: bytes, files: Mapping[str, Any]) -> None:
        """Raise `OutputError` if the JSON of a snapshot is one that `content` would refuse to read."""
        stored = len(text) + sum(each["bytes"] for each in files.values())
        if len(text) > _MOST_JSON or _parsed_bytes(text) > 2 * stored + _SPARE:
            self._prune()  # its tensor files are there already
            raise OutputError(
                f"the snapshot would have {len(text)} bytes of JSON, too many to be resumed; shorten the note"
            )

    def _listed(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Return the tensor files that some snapshots list; damaged ones list nothing."""
        files: dict[str, Any] = {}
        for number in numbers:
            with suppress(SnapshotError):
                # What was written from here need not be read again.
                files.update(self._files.get(number) or self.content(number)["files"])
        return files

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor file that a snapshot here lists, as far as it is there."""
        sizes = {}
        for name in self._listed(self.numbers()):
            with suppress(OSError):
                sizes[name] = (self.path / name).stat().st_size
        return sizes

    def _prune(self) -> None:
        """Remove what no kept snapshot needs; the JSON first, so that none is there without its tensors."""
        numbers = self.numbers()
        kept = set(self._listed(numbers[:KEPT]))
        for number in numbers[KEPT:]:
            _remove(self.path / _name(number))
        for name in os.listdir(self.path):
            # Left by a process that was killed while it wrote.
            stale = name.startswith((".snapshot-", ".blocks-", ".tensors-")) and name.endswith(".part")
            if stale or (_TENSORS.fullmatch(name) and name not in kept):
                _remove(self.path / name)


def _parsed_bytes(text: bytes) -> int:
    """Return what some JSON takes at most once it is parsed and its checksum computed: objects of Python, and texts."""
    return 64 * sum(text.count(each) for each in (b"[", b"{", b",", b":")) + 4 * len(text)


def _name(number: int) -> str:
    return f"snapshot-{number:06d}.json"


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
