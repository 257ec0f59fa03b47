"""Files appear whole or not at all, and say so before anything is computed."""

from __future__ import annotations

import ctypes
import errno
import inspect
import io
import multiprocessing
import os
import resource
from pathlib import Path
from typing import IO, Any, cast

import av
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import pixels
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, OutputError
from kvpack.media import files, video
from kvpack.media.contact_sheet import Row, banner, contact_sheet, side_by_side
from kvpack.media.files import require_writable, save_bytes, whole_file
from kvpack.media.video import Frames, VideoWriter


def noise(frames: int, height: int = 64, width: int = 48, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def flat(frames: int, colour: tuple[int, int, int], side: int = 32) -> Any:
    return np.full((frames, side, side, 3), colour, dtype=np.uint8)


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Lets files grow to `room` bytes only."""
    real = files.PartialFile.write
    written = {"bytes": 0}

    def write(self: files.PartialFile, data: bytes) -> int:
        written["bytes"] += len(data)
        if written["bytes"] > room:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return real(self, data)

    monkeypatch.setattr(files.PartialFile, "write", write)


def test_frames_come_back_at_their_rate_and_size(tmp_path: Path) -> None:
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    with VideoWriter(tmp_path / "a.mp4", 16, upscale=2) as writer:
        for colour in colours:
            writer.write(flat(5, colour))
    back = pixels(tmp_path / "a.mp4")
    assert back.shape == (15, 64, 64, 3)
    assert writer.frames == 15
    for index, colour in enumerate(colours):
        assert np.abs(back[5 * index + 2].astype(int) - colour).max() < 12
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert stream.duration is not None
        assert stream.time_base is not None
        assert float(stream.duration * stream.time_base) == pytest.approx(15 / 16)


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(noise(3, 33, 47))
    assert pixels(tmp_path / "a.mp4").shape == (3, 34, 48, 3)


def test_fractional_rates(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 23.976) as writer:
        writer.write(noise(2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_any_codec_that_is_there_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    monkeypatch.setattr(video, "CODECS", ("no-such-codec", codec))
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(flat(4, (200, 100, 50)))
    assert len(pixels(tmp_path / "a.mp4")) == 4


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"the old one")
    with VideoWriter(target, 16) as writer:
        writer.write(noise(4))
        assert target.read_bytes() == b"the old one"
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [target]
    assert len(pixels(target)) == 4


@pytest.mark.parametrize("error", [GeneratorExit, RuntimeError])
def test_a_video_that_fails_keeps_its_frames_beside_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"the old one")
    writer = VideoWriter(target, 16).__enter__()
    writer.write(noise(4))
    failure = error()
    writer.__exit__(error, failure, None)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.part.mp4"}
    assert target.read_bytes() == b"the old one"
    assert len(pixels(tmp_path / "a.part.mp4")) == 4
    assert failure.__notes__ == [f"{tmp_path / 'a.part.mp4'} holds the 0.2 s that were made"]


def test_frames_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    frames = np.full((2, 32, 32, 3), 0.5)
    frames[1, 0, 0, 0] = np.nan
    with (
        pytest.raises(NonFiniteLatentsError, match="use a VAE in float32 or bfloat16"),
        VideoWriter(tmp_path / "a.mp4", 16) as writer,
    ):
        writer.write(frames)
    assert not list(tmp_path.iterdir())


def test_a_video_without_frames_is_none(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no frame was generated"), VideoWriter(tmp_path / "a.mp4", 16):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 20, 30_000])
def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    def write() -> None:
        with VideoWriter(tmp_path / "a.mp4", 16, upscale=4) as writer:
            for seed in range(12):
                writer.write(noise(8, seed=seed))

    fill_disk(monkeypatch, room)
    with pytest.raises(OutputError, match=r"cannot write .*a\.mp4: No space left on device; nothing of it was kept"):
        write()
    assert list(tmp_path.iterdir()) == []


class ShortWrites(io.FileIO):
    """A file each of whose writes takes a few bytes only, as the system's take 2 GiB, until the disk is full."""

    most, room = 1000, 1 << 40

    def write(self, data: Any) -> int:
        taken = min(len(data), self.most, self.room - self.tell())
        return super().write(data[:taken])


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> type[ShortWrites]:
    class File(ShortWrites):
        pass

    monkeypatch.setattr(files, "open", lambda path, mode, buffering: File(path, "w+"), raising=False)
    return File


def save_tensor(tensor: torch.Tensor, path: Path) -> None:
    with whole_file(path) as file:
        torch.save(tensor, cast(IO[bytes], file))


@pytest.mark.usefixtures("short_writes")
def test_all_is_written_where_the_system_takes_a_part_at_a_time(tmp_path: Path) -> None:
    data, tensor = os.urandom(12345), torch.randn(5000)
    save_bytes(data, tmp_path / "bytes")
    assert (tmp_path / "bytes").read_bytes() == data
    save_tensor(tensor, tmp_path / "tensor")
    assert torch.equal(torch.load(tmp_path / "tensor"), tensor)
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(noise(20))
    assert len(pixels(tmp_path / "a.mp4")) == 20


@pytest.mark.parametrize("room", [0, 100, 15_000])
def test_a_disk_that_fills_within_a_write_keeps_what_was_there(
    room: int, tmp_path: Path, short_writes: type[ShortWrites]
) -> None:
    for name in ("bytes", "tensor"):
        (tmp_path / name).write_bytes(b"good")
    short_writes.room = room
    message = "No space left on device; nothing of it was kept"
    with pytest.raises(OutputError, match=message):
        save_bytes(bytes(20_000), tmp_path / "bytes")
    with pytest.raises(OutputError, match=message):
        save_tensor(torch.randn(5000), tmp_path / "tensor")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == dict.fromkeys(("bytes", "tensor"), b"good")


def test_a_real_device_that_takes_a_part_of_a_write(tmp_path: Path) -> None:
    """A limit on the size of files is met as a full disk is: by a write that is cut short, and an error at the next."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"good")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(OutputError, match="File too large; nothing of it was kept"):
            save_bytes(bytes(20_000), path)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"good"]


def test_a_disk_that_is_full_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OutputError, match="No space left"), VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(noise(2))
    with pytest.raises(OutputError, match="No space left"):
        save_bytes(b"text", tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match=r"folder\.mp4: it is a directory"):
        VideoWriter(tmp_path / "folder.mp4", 16)
    with pytest.raises(OutputError, match=r"absent does not exist; give a file in a directory that exists"):
        VideoWriter(tmp_path / "absent" / "a.mp4", 16)
    with pytest.raises(OutputError, match="file is not a directory"):
        VideoWriter(tmp_path / "file" / "a.mp4", 16)
    with pytest.raises(OutputError, match=r"give a name that ends in \.mp4"):
        VideoWriter(tmp_path / "a.avi", 16)
    with pytest.raises(OutputError, match="File name too long"):
        VideoWriter(tmp_path / ("a" * 300 + ".mp4"), 16)


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (np.zeros((1, 3, 16, 16, 3)), r"got float64 \(1, 3, 16, 16, 3\); .* e\.g\. frames\[0\]"),
        (torch.zeros(3, 3, 16, 16), "got a Tensor"),
        ([Image.new("RGB", (16, 16))], "got a list"),
        (np.zeros((3, 16, 16, 3), np.int64), "got int64"),
        (np.full((3, 16, 16, 3), 128.0), "got float64 up to 128; divide them by 255"),
        (np.zeros((3, 32, 16, 3), np.uint8), "frames must stay 16x16, as the first ones were"),
    ],
)
def test_what_are_no_frames_is_refused(frames: Any, said: str, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
        with pytest.raises(InvalidOptionError, match=said):
            inspect.unwrap(VideoWriter.write)(writer, frames)  # which tests check by its types otherwise
        writer.write(np.ones((2, 16, 16, 3)))
    assert writer.frames == 4


@pytest.mark.parametrize("fps", [0, -1, "16", None, float("nan"), float("inf")])
def test_what_is_no_frame_rate_is_refused(fps: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="fps must be a number of frames a second above 0"):
        inspect.unwrap(VideoWriter.__init__)(object.__new__(VideoWriter), tmp_path / "a.mp4", fps)


def test_a_rate_may_be_numpys(tmp_path: Path) -> None:
    for fps in (np.int64(16), np.float32(16)):
        writer = object.__new__(VideoWriter)
        inspect.unwrap(VideoWriter.__init__)(writer, tmp_path / "a.mp4", fps)
        assert writer.fps == 16


def test_nothing_is_written_outside_of_the_block(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.mp4 is not open; write inside of `with VideoWriter"):
        VideoWriter(tmp_path / "a.mp4", 16).write(np.zeros((2, 16, 16, 3), np.uint8))


def test_directories_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", touch)  # root may write everywhere
    with pytest.raises(OutputError, match="Permission denied; give a file in a writable directory"):
        require_writable(tmp_path / "a.mp4")


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    assert require_writable(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    assert list(tmp_path.iterdir()) == []


def test_a_contact_sheet_holds_every_picture(tmp_path: Path) -> None:
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    rows = [Row("one", [flat(1, c)[0] for c in colours]), Row("two\nlines", [flat(1, c)[0] for c in colours[::-1]])]
    save_bytes(
        contact_sheet("a title that is much longer than the pictures are wide, " * 3, "abc", rows, side=40),
        tmp_path / "a.png",
    )
    sheet = np.asarray(Image.open(tmp_path / "a.png")).reshape(-1, 3)
    for colour in colours:
        assert (sheet == colour).all(axis=1).sum() == 2 * 40 * 40


def test_panels_stand_side_by_side_under_their_labels() -> None:
    top = banner(["left", "right"], width=64, gap=8)
    frames = side_by_side([flat(3, (250, 20, 20)), flat(3, (20, 20, 250))], upscale=2, top=top, gap=8)
    assert frames.shape == (3, 28 + 64, 64 + 8 + 64, 3)
    assert (frames[:, 28:, :64] == (250, 20, 20)).all()
    assert (frames[:, 28:, 64:72] == 255).all()
    assert (frames[:, 28:, 72:] == (20, 20, 250)).all()
    assert (top[:, :64] < 128).any()
    assert (top[:, 72:] < 128).any()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_narrow_frames_are_encoded_to_the_same_bits_whatever_the_memory_held(tmp_path: Path) -> None:
    """x264's vector code reads beyond them."""
    frames, found, perturb = noise(24, 8, 8).repeat(8, axis=1).repeat(8, axis=2), set(), -6
    try:
        for byte in (1, 77):
            ctypes.CDLL(None).mallopt(perturb, byte)  # new memory holds this
            with VideoWriter(tmp_path / "a.mp4", 16) as writer:
                writer.write(frames)
            found.add((tmp_path / "a.mp4").read_bytes())
    finally:
        ctypes.CDLL(None).mallopt(perturb, 0)
    assert len(found) == 1
