"""Pictures and clips as a person sees them: upright, in their proportions, RGB, in range, at a frame rate."""

import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.media.pixels import covered, image_pixels, video_pixels
from kvpack.media.reading import count_frames, is_picture, opened, read_clip
from kvpack.testing import tiny_wan_pipeline

UNIT = 65536
#: Display matrices of a 64x32 video, and what NumPy does to turn it so.
TURNS = {
    "as it is": (None, lambda a: a),
    "90": ((0, UNIT, 0, -UNIT, 0, 0, 32 * UNIT, 0, 1 << 30), lambda a: np.rot90(a, -1)),
    "180": ((-UNIT, 0, 0, 0, -UNIT, 0, 64 * UNIT, 32 * UNIT, 1 << 30), lambda a: np.rot90(a, 2)),
    "270": ((0, -UNIT, 0, UNIT, 0, 0, 0, 64 * UNIT, 1 << 30), lambda a: np.rot90(a, 1)),
    "mirrored": ((-UNIT, 0, 0, 0, UNIT, 0, 64 * UNIT, 0, 1 << 30), lambda a: a[:, ::-1]),
    "upside down": ((UNIT, 0, 0, 0, -UNIT, 0, 0, 32 * UNIT, 1 << 30), lambda a: a[::-1]),
    "transposed": ((0, UNIT, 0, UNIT, 0, 0, 0, 0, 1 << 30), lambda a: a.swapaxes(0, 1)),
}
#: EXIF orientations as the standard has them.
EXIF = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def quarters(height=32, width=64):
    frame = np.full((height, width, 3), 255, np.uint8)
    frame[: height // 2, : width // 2] = 200, 30, 40
    frame[: height // 2, width // 2 :] = 30, 180, 60
    frame[height // 2 :, : width // 2] = 20, 60, 200
    return frame


def write(path, frames, fps=16, matrix=None, aspect=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if path.suffix == ".mkv" else "libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24" if path.suffix == ".mkv" else "yuv444p"
        stream.options = {"crf": "0"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if matrix is not None:
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd")
        at += 8 + (32 if data[at + 4] else 20) + 16
        data[at : at + 36] = struct.pack(">9i", *matrix)
        path.write_bytes(data)
    return path


def numbered(count, side=32):
    """Frames whose brightness is their number."""
    return [np.full((side, side, 3), 2 * index, np.uint8) for index in range(count)]


def numbers(pixels):
    return (pixels[0].mean((1, 2, 3)) * 255 / 2).round().int().tolist()


@pytest.mark.parametrize("turn", TURNS)
def test_a_clip_is_read_as_its_display_matrix_turns_it(turn, tmp_path):
    matrix, turned = TURNS[turn]
    pixels = video_pixels(write(tmp_path / "phone.mp4", [quarters()] * 2, matrix=matrix))
    wanted = turned(quarters())
    assert tuple(pixels.shape) == (1, 2, 3, *wanted.shape[:2])
    assert np.abs(pixels[0, 1].movedim(0, -1).numpy() * 255 - wanted).max() < 6
    with opened(tmp_path / "phone.mp4") as file:  # as evaluate reads it
        assert next(iter(file.frames)).shape[1:] == wanted.shape


@pytest.mark.parametrize("orientation", EXIF)
def test_a_picture_is_read_as_its_exif_turns_it(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quarters()).save(tmp_path / "p.png", exif=exif)
    pixels = image_pixels(tmp_path / "p.png")
    assert np.array_equal(pixels[0].movedim(0, -1).mul(255).round().numpy(), EXIF[orientation](quarters()))
    assert torch.equal(video_pixels(tmp_path / "p.png")[0], pixels)


@pytest.mark.parametrize(("aspect", "size"), [("4/3", (32, 85)), ("1/2", (64, 64)), ("1/1", (32, 64))])
def test_stored_pixels_that_are_not_square_are_shown_square(aspect, size, tmp_path):
    from fractions import Fraction

    pixels = video_pixels(write(tmp_path / "a.mp4", [quarters()] * 2, aspect=Fraction(aspect)))
    assert tuple(pixels.shape[-2:]) == size


@pytest.mark.parametrize(
    ("source", "fps", "wanted"),
    [
        (32, 16, list(range(0, 33, 2))),
        (16, 16, list(range(33))),
        (8, 16, [round(index / 2 - 0.01) for index in range(66)]),
        (30, 24, [round(index * 1.25 - 0.01) for index in range(27)]),
        (None, 16, list(range(33))),
    ],
)
def test_frames_are_those_that_are_shown_at_the_wanted_rate(source, fps, wanted, tmp_path):
    path = write(tmp_path / "a.mkv", numbered(33), fps=source or 16)
    pixels = video_pixels(path, fps=fps if source else None)
    assert numbers(pixels) == wanted
    assert count_frames(path, fps) == len(wanted)
    assert numbers(video_pixels(path, fps=fps, last=5)) == wanted[-5:]
    assert numbers(video_pixels(path, fps=fps, first=5)) == wanted[:5]


def test_a_clip_in_memory_has_its_frame_rate_told():
    clip = np.stack(numbered(31))
    assert numbers(video_pixels(clip, fps=16, source_fps=32)) == list(range(0, 31, 2))
    assert numbers(video_pixels(clip, fps=16)) == list(range(31))


def plain(picture):
    """The reference: what Pillow shows, as floats."""
    return np.asarray(picture.convert("RGB"), np.float32) / 255


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "PA", "RGBX"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 99),
    orientation=st.sampled_from([None, *EXIF]),
    several=st.integers(0, 3),
)
def test_every_mode_and_orientation(mode, size, seed, orientation, several):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    picture = picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode)
    wanted = plain(picture)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.info["exif"] = exif.tobytes()
        wanted = EXIF[orientation](wanted)
    pixels = image_pixels([picture] * several if several else picture)
    assert pixels.shape[0] == max(1, several)
    for each in pixels:
        assert np.array_equal(each.movedim(0, -1).numpy(), wanted)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kind=st.sampled_from(["uint8", "uint16", "bool", "unit", "signed", "half"]),
    form=st.sampled_from(["array", "tensor", "arrays", "tensors", "batch"]),
    seed=st.integers(0, 99),
)
def test_every_channel_count_and_range(channels, size, kind, form, seed):
    bytes_ = np.random.default_rng(seed).integers(0, 256, (2, *size, channels)).astype(np.uint8)
    bytes_[0, 0, 0, 0] = 0  # so that a signed picture can be told
    rgb = bytes_[..., :3] if channels > 2 else bytes_[..., :1].repeat(3, -1)
    wanted = rgb.astype(np.float32) / 255
    values = {
        "uint8": lambda: bytes_,
        "uint16": lambda: bytes_.astype(np.uint16) * 257,
        "bool": lambda: bytes_ > 127,
        "unit": lambda: bytes_ / 255,
        "signed": lambda: bytes_ / 127.5 - 1,
        "half": lambda: (bytes_ / 255).astype(np.float16),
    }[kind]()
    wanted = (rgb > 127).astype(np.float32) if kind == "bool" else wanted
    tensor = torch.from_numpy(values).movedim(-1, 1)
    given_ = {
        "array": values[0],
        "tensor": tensor[0],
        "arrays": list(values),
        "tensors": list(tensor),
        "batch": values,
    }[form]
    pixels = image_pixels(given_).movedim(1, -1).numpy()
    assert np.allclose(pixels, wanted[: len(pixels)], atol=1e-3)
    clip = video_pixels(values)
    assert np.array_equal(clip[0].movedim(1, -1).numpy(), image_pixels(values).movedim(1, -1).numpy())


@pytest.mark.parametrize(
    ("mode", "dtype", "largest"),
    [
        ("I;16", np.uint16, 65535),
        ("I", np.int32, 65535),
        ("I", np.int32, 255),
        ("F", np.float32, 1.0),
        ("F", np.float32, 255),
    ],
)
def test_deep_pictures_keep_their_brightness(mode, dtype, largest):
    values = (np.linspace(0, 1, 64).reshape(8, 8) * largest).astype(dtype)
    picture = Image.fromarray(values)
    assert picture.mode == mode
    assert np.allclose(image_pixels(picture)[0, 1], values / largest, atol=1e-6)


def test_a_16_bit_png_is_as_bright_as_its_copy_of_8_bits(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.allclose(image_pixels(tmp_path / "deep.png")[0, 0], values / 65535, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (48, 48), (30, 70), (16, 200)])
def test_a_circle_stays_a_circle_whatever_the_proportions(size):
    y, x = np.mgrid[:128, :64]
    disc = (((x - 31.5) ** 2 + (y - 63.5) ** 2 < 12**2) * 255).astype(np.uint8)
    for given_ in (Image.fromarray(disc), disc[..., None], torch.from_numpy(disc)[None]):
        shown = image_pixels(given_, *size)[0, 0] > 0.5
        ratio = max(size[0] / 128, size[1] / 64)
        assert tuple(shown.shape) == size
        assert abs(int(shown.any(0).sum()) - min(size[1], 24 * ratio)) <= 1
        assert abs(int(shown.any(1).sum()) - min(size[0], 24 * ratio)) <= 1


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_covered_has_the_size_and_stays_in_range(height, width, size):
    found = covered(torch.rand(2, 3, height, width), size)
    assert tuple(found.shape) == (2, 3, *size)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1 + 1e-6


@pytest.mark.parametrize("form", ["pil", "list of arrays", "list of tensors", "array", "tensor", "batch", "clips"])
def test_every_form_of_a_clip(form):
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    tensor = torch.from_numpy(frames).movedim(-1, 1)
    forms = {
        "pil": [Image.fromarray(each) for each in frames],
        "list of arrays": list(frames),
        "list of tensors": list(tensor),
        "array": frames,
        "tensor": tensor,
        "batch": frames[None].repeat(2, 0),
        "clips": [[Image.fromarray(each) for each in frames]] * 2,
    }
    pixels = video_pixels(forms[form])
    assert pixels.shape[0] == (2 if form in ("batch", "clips") else 1)
    assert np.array_equal(pixels[-1].mul(255).round().movedim(1, -1).numpy(), frames)


def test_a_signed_clip_is_signed_in_every_frame():
    """A frame that is bright all over is still of a clip in -1..1."""
    dark, bright = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 0.5)
    pixels = video_pixels([dark, bright])
    assert torch.equal(pixels[0, :, 0, 0, 0], torch.tensor([0.0, 0.75]))


@pytest.mark.parametrize(
    ("given_", "error", "words"),
    [
        ([], InvalidOptionError, "video must have frames, got an empty list"),
        (np.zeros((0, 8, 8, 3), np.uint8), InvalidOptionError, "must hold pictures"),
        ([[]], InvalidOptionError, "got an empty list"),
        (3, InvalidOptionError, "got int"),
        (np.zeros((3, 8, 8, 7)), InvalidOptionError, r"got the shape \[8, 8, 7\]"),
        (np.zeros((8, 8, 3)), InvalidOptionError, r"got the shape \[8, 8, 3\]"),
        (np.full((2, 8, 8, 3), 200.0), InvalidOptionError, "got 200 to 200; divide them by 255, or give uint8"),
        (np.zeros((2, 8, 8, 3), np.int64), InvalidOptionError, "got .*int64"),
        (np.zeros((2, 8, 8, 3), complex), InvalidOptionError, "complex"),
        (np.full((2, 8, 8, 3), np.nan), NonFiniteLatentsError, "NaN"),
        ([np.zeros((2, 8, 8, 3)), np.zeros((3, 8, 8, 3))], InvalidOptionError, "one length, got 2 and 3 frames"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], InvalidOptionError, "must have one size"),
        ("nothing.mp4", InvalidOptionError, "no video nothing.mp4"),
    ],
)
def test_what_is_no_clip_is_refused_by_name(given_, error, words):
    with pytest.raises(error, match=words):
        video_pixels(given_)


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("nothing")
    with pytest.raises(InvalidOptionError, match=r"notes\.png must be a picture"):
        image_pixels(tmp_path / "notes.png")
    with pytest.raises(InvalidOptionError, match=r"no picture nothing\.png"):
        image_pixels("nothing.png")
    with pytest.raises(InvalidOptionError, match="no picture or clip"):
        is_picture(tmp_path / "nothing.png")
    with pytest.raises(InvalidOptionError, match="mode La"):
        image_pixels(Image.new("La", (4, 4)))


def test_a_picture_that_is_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    Image.new("1", (200, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidOptionError, match=r"a\.png must be a picture, got: Image size"):
        image_pixels(tmp_path / "a.png")


def test_a_title_in_another_encoding_than_utf_8_does_no_harm(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        file.metadata["title"] = "caf_"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode())
    path = tmp_path / "a.mkv"
    path.write_bytes(path.read_bytes().replace(b"caf_", "café".encode("latin-1")))
    assert count_frames(path) == 1


def test_pictures_are_told_from_clips(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    frames = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(3)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    clip = write(tmp_path / "c.mp4", numbered(3))
    assert [is_picture(tmp_path / name) for name in ("p.png", "moves.gif")] == [True, False]
    assert not is_picture(clip)
    assert len(list(read_clip(clip))) == 3
    paths = [tmp_path / "p.png"] * 3
    assert tuple(video_pixels(paths).shape) == (1, 3, 3, 8, 8)


def test_memory_is_bounded_by_what_is_used(tmp_path):
    """Ten seconds at 640x360 are 207 MB of bytes; five frames of them are asked for."""
    path = write(tmp_path / "long.mp4", [np.zeros((360, 640, 3), np.uint8)] * 300, fps=30)
    code = (
        "import resource, sys; from kvpack.media.pixels import video_pixels as v; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; v(sys.argv[1], 64, 64, 16, first=2); before = peak(); "
        "a = v(sys.argv[1], 64, 64, 16); b = v(sys.argv[1], 360, 640, 16, last=5); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # kB


def seeded():
    return torch.Generator().manual_seed(0)


CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
    "num_frames": 17,
}


@pytest.fixture(scope="module")
def pipe():
    made = tiny_wan_pipeline()
    made.set_progress_bar_config(disable=True)
    return made.enable_packforcing("full")


@pytest.mark.parametrize("form", ["RGBA", "L", "array", "tensor", "path", "signed"])
def test_an_image_is_the_same_in_every_form(form, pipe, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    picture.save(tmp_path / "p.png")
    forms = {
        "RGBA": picture.convert("RGBA"),
        "L": picture.convert("L"),
        "array": np.asarray(picture),
        "tensor": torch.from_numpy(grey)[None].expand(4, -1, -1),
        "path": tmp_path / "p.png",
        "signed": torch.from_numpy(grey)[None] / 127.5 - 1,
    }
    wanted = pipe(image=picture, generator=seeded(), **CALL).frames
    assert torch.allclose(pipe(image=forms[form], generator=seeded(), **CALL).frames, wanted, atol=1e-4)


def test_a_clip_on_disk_is_read_at_the_models_rate(pipe, tmp_path):
    frames = [np.full((16, 16, 3), 3 * index, np.uint8) for index in range(25)]
    path = write(tmp_path / "fast.mkv", frames, fps=48)
    wanted = pipe(video=np.stack(frames)[:25:3], generator=seeded(), **CALL).frames
    assert torch.allclose(pipe(video=path, generator=seeded(), **CALL).frames, wanted, atol=1e-4)


def test_an_empty_clip_is_refused_by_name(pipe):
    with pytest.raises(InvalidOptionError, match="video must have frames"):
        pipe(video=[], **CALL)
