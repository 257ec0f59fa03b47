"""The archive of a file of `torch.save`, where torch and Python's `zipfile` are known to see the same one."""

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from kvpack.errors import InvalidOptionError, first_line

# An archive's end, the same in 64 bits, and what says where that is; without the comment behind the end.
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_UNSAID = 2**32 - 1  # what the end has where the one in 64 bits says it


def is_archive(path: Path) -> bool:
    """Return whether torch takes a file for an archive, by how it begins."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def archived_pickle(path: Path, most: int) -> bytes:
    """Return the pickle of at most `most` bytes that torch reads of an archive.

    Raises:
        InvalidOptionError: if it is no whole archive, not one of `torch.save`, or its pickle is larger.
    """
    try:
        with open(path, "rb") as file:
            _require_one_directory(file)
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            _require_stored(path, entries)
            file.seek(0)  # the reader measures from where the file stands
            reader = torch._C.PyTorchFileReader(file)
            # Behind the archive's own name.
            sizes = {each.filename.partition("/")[2]: each.file_size for each in entries}
            # Torch's reader looks names up whatever their case: of two that differ in it, it gives the first.
            if [*sizes] != reader.get_all_records() or len({name.lower() for name in sizes}) != len(entries):
                raise ValueError("its files are named as torch.save names none")
            if sizes.get("data.pkl", 0) > most:
                raise InvalidOptionError(f"{path} has more than {most} bytes beside its tensors; it is no checkpoint")
            return bytes(reader.get_record("data.pkl"))
    except InvalidOptionError:
        raise
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError, struct.error) as error:
        raise InvalidOptionError(f"{path} is no checkpoint, or not a whole one: {first_line(error)}") from error


def _require_stored(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    packed = [each.filename for each in entries if each.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InvalidOptionError(f"{path} holds {packed[0]!r} compressed, which torch.save never does")
    if any(each.file_size != each.compress_size for each in entries):
        raise ValueError("its sizes contradict each other")


def _require_one_directory(file: BinaryIO) -> None:
    """Raise `ValueError` unless the list of files ends where the archive's end begins, and begins where that says.

    Python takes the list in front of the end, torch the one at the place that is noted there: they are the same then.
    """
    behind = file.seek(0, os.SEEK_END) - _END.size
    mark, *_, size, begin, comment = _END.unpack(_at(file, behind, _END.size))
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("an archive of torch.save ends otherwise")
    place = max(behind - _LOCATOR.size, 0)
    located, _, noted, _ = _LOCATOR.unpack(_at(file, place, _LOCATOR.size))
    if located == b"PK\x06\x07":
        behind = place - _END64.size
        mark, *_, size64, begin64 = _END64.unpack(_at(file, max(behind, 0), _END64.size))
        same = size in (_UNSAID, size64) and begin in (_UNSAID, begin64)
        if mark != b"PK\x06\x06" or noted != behind or not same:
            raise ValueError("it has two ends")
        size, begin = size64, begin64
    if begin + size != behind:
        raise ValueError("it may have two lists of files")


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
