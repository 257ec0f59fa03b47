"""One process at a time writes into a folder."""

import os
from contextlib import suppress
from pathlib import Path

from kvpack.errors import OutputError

#: Name of the file that is locked.
LOCK = "lock"


class FolderLock:
    """A lock that the system lets go where its process ends, however it does.

    Raises:
        OutputError: if another process, or another stream of this one, has it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        try:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._process = os.getpid()  # who may unlock: see `release`
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; give a writable folder") from error
        try:
            import fcntl
        except ImportError:  # a system without it
            return
        try:
            # Refused at once: the other may write for hours.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise OutputError(f"{folder} is being written by another process or stream; give another folder") from error

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            with suppress(OSError, ImportError):
                import fcntl

                if os.getpid() == self._process:  # a fork shares the lock, and may live longer
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()
