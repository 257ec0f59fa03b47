"""Files that are written whole or not at all."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvpack.errors import OutputError


def require_writable(path: Path) -> Path:
    """Return `path` if a file can be written there; an empty one beside it is tried.

    Raises:
        OutputError: if not.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, no error for names that are too long
        raise OutputError(f"cannot write {path}: it is a directory; give the name of a file in it")
    if not os.path.isdir(path.parent):
        what = "is not a directory" if os.path.exists(path.parent) else "does not exist"
        raise OutputError(f"cannot write {path}: {path.parent} {what}; give a file in a directory that exists")
    trial = _partial(path)  # beside it: whether a folder takes files is known only when one is made
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give a file in a writable directory") from error
    return path


def make_folder(folder: Path) -> Path:
    """Return a folder, made if it is not there.

    Raises:
        OutputError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {folder}: {error.strerror}; give another folder") from error
    return folder


class PartialFile:
    """A file that appears under its name only when it is complete.

    Args:
        path: where it will be.
        partial: where it is until then; beside it, and hidden, if None.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, path: Path, partial: Path | None = None) -> None:
        self.path, self._partial = require_writable(path), partial or _partial(path)
        #: What went wrong while writing; libav tells no more than that something did.
        self.error: OSError | None = None
        with self.reported():
            # Unbuffered, so that what is written is there if the process is killed; closed by commit or discard.
            self._file = open(self._partial, "w+b", buffering=0)  # noqa: SIM115
        self.seek, self.tell, self.read = self._file.seek, self._file.tell, self._file.read
        self.flush = self._file.flush

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the bytes, and return how many they are."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                # One system call takes 2 GiB at most, and less where the disk runs full.
                if not (taken := self._file.write(rest)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                rest = rest[taken:]
        except OSError as error:
            self.error = error
            raise
        return size

    def commit(self, path: Path | None = None, *, durable: bool = False) -> None:
        """Move the complete file to its name.

        Args:
            path: another name, of a file that is not all that it was to be.
            durable: whether it is on the disk for certain then, though the power fails.
        """
        with self.reported():
            if durable:
                os.fsync(self._file.fileno())  # before the rename, which may else reach the disk first
            self._file.close()
            os.replace(self._partial, path or self.path)  # in one step, on one file system
            if durable:
                sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._partial.unlink()

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Raise an `OutputError` for any failure to write, and discard the file."""
        import av

        try:
            yield
        except Exception as error:
            # Of an error while writing libav and torch make one of their own, or several.
            if self.error is None and not isinstance(error, OSError | av.FFmpegError):
                raise
            cause = self.error or error
            if hasattr(self, "_file"):
                self.discard()
            reason = getattr(cause, "strerror", None) or cause
            raise OutputError(f"cannot write {self.path}: {reason}; nothing of it was kept") from cause


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[PartialFile]:
    """Yield a file that appears under its name behind the block, whole or not at all; `durable` as `commit` has it.

    Raises:
        OutputError: if it cannot be written; what was there stays.
    """
    file = PartialFile(path)
    try:
        with file.reported():
            yield file
        file.commit(durable=durable)
    finally:
        file.discard()


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: if it cannot be written; what was there stays.
    """
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files come into `folder` behind the block, each whole and on the disk or not at all.

    Raises:
        OutputError: if they cannot be written; what was there stays.
    """
    from safetensors import SafetensorError

    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as made:
            yield Path(made)
            for path in Path(made).iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(path, folder / path.name)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write into {folder}: {reason}; what was there is kept") from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    # Two processes that write one file do not write into each other's.
    return path.with_name(f".{path.name}.{os.getpid()}.part")
