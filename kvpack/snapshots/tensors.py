"""Safetensors files: written tensor by tensor, with their checksum, and read after theirs has been compared."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpack.errors import OutputError, SnapshotError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MOST_HEADER = 1 << 24  # 16 MiB: the header is parsed in memory


def write_file(path: Path, parts: Any) -> dict[str, Any]:
    """Write a file that appears under its name when all of it is on the disk, and return its size and checksum.

    Raises:
        OutputError: if it cannot be written; what was there stays.
    """
    # Hidden: `SnapshotFolder._prune` removes what is left of it.
    partial, digest, size = path.with_name(f".{path.name}.part"), hashlib.sha256(), 0
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())  # first: a power cut must leave no such name without content
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; the snapshots that were there still are, and the "
            "generation can be saved elsewhere"
        ) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def tensor_parts(tensors: Mapping[str, Tensor]) -> Any:
    """Yield the bytes of a safetensors file: its header, and one tensor after the other.

    `safetensors.torch.save_file` holds all tensors a second time, and refuses views of one arena.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise SnapshotError(
                f"a tensor of {tensor.dtype} cannot be saved; its dtypes are {', '.join(_DTYPES.values())}"
            )
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin at multiples of 8, as safetensors has them
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            # One at a time on the host; as bytes, since numpy has no bfloat16.
            plain: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            yield memoryview(plain)


class TensorFiles:
    """The safetensors files that a snapshot lists, each compared with its checksum when it is first read.

    Args:
        folder: where they are.
        listed: size and checksum of each by name, as `write_file` gave them.
    """

    def __init__(self, folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._listed, self._open = folder, listed, dict[str, Any]()

    def check(self) -> None:
        """Raise `SnapshotError` if a file is missing or not what it was."""
        for name in self._listed:
            self._file(name)

    def __call__(self, file: str, name: str) -> Tensor:
        """Return a tensor of its own memory."""
        try:
            # A copy: what safetensors gives is a view of the mapped file.
            return self._file(file).get_tensor(name).clone()
        except SafetensorError as error:
            raise SnapshotError(f"{file} has no tensor {name[:40]!r} that can be read ({error})") from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            # A bare name, so that no path leads out of the folder.
            if name not in self._listed or Path(name).name != name or not name.endswith(".safetensors"):
                raise SnapshotError(f"it wants a file {name[:80]!r}, which is none of its own")
            path = self._folder / name
            compare(path, self._listed[name])  # before any of it is parsed
            try:
                self._open[name] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise SnapshotError(f"{path} is no safetensors file ({error})") from error
        return self._open[name]


def compare(path: Path, listed: Mapping[str, Any]) -> None:
    """Raise `SnapshotError` if a file is missing, or not of the size and checksum that are listed for it."""
    try:
        if path.is_symlink() or not path.is_file():  # a link may lead out of the folder
            raise SnapshotError(f"{path} is missing")
        size = path.stat().st_size
        if size != listed.get("bytes"):
            raise SnapshotError(f"{path} has {size} bytes, but was written with {str(listed.get('bytes'))[:40]}")
        with open(path, "rb") as file:
            # Looked at before safetensors allocates as much.
            if int.from_bytes(file.read(8), "little") > min(_MOST_HEADER, size):
                raise SnapshotError(f"{path} announces a header that is larger than any snapshot's")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest.hexdigest() != listed.get("sha256"):
        raise SnapshotError(f"{path} is not what was written: its checksum differs")
