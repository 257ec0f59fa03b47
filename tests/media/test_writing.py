"""What a player shows of a file, and what is left of one whose process ends early."""

import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from kvpack.media.reading import opened
from kvpack.media.video import VideoWriter

COLOUR = (200, 30, 40)
#: Red and blue weights of luma.
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}


def shown(path):
    """What a player shows: by the file's colour tags, and by the size where it has none; plain arithmetic."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = frame.to_ndarray(format="yuv444p").astype(float)
        tag = int(frame.colorspace)
        red, blue = MATRICES[tag if tag in MATRICES else 1 if frame.height >= 720 or frame.width >= 1280 else 6]
    y, cb, cr = ((planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224)
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.stack([r, g, b], -1) * 255


@pytest.mark.parametrize(
    ("size", "tag"), [((64, 64), 6), ((480, 832), 6), ((704, 1280), 1), ((720, 1280), 1), ((1280, 720), 1)]
)
def test_a_player_shows_the_colours_that_were_written(size, tag, tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(np.full((2, *size, 3), COLOUR, np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (tag, 1)
    assert np.abs(shown(tmp_path / "a.mp4") - COLOUR).max() < 5
    with opened(tmp_path / "a.mp4") as file:
        assert np.abs(next(iter(file.frames)).astype(int) - COLOUR).max() < 5


@pytest.mark.parametrize("size", [(64, 64), (720, 1280)])
def test_a_file_that_does_not_say_is_read_as_players_show_it(size, tmp_path):
    path = tmp_path / "untagged.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((*size, 3), COLOUR, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with opened(path) as file:
        assert np.abs(next(iter(file.frames))[0] - shown(path)).max() < 5


WRITES = """
import sys, time, signal
import numpy as np
from kvpack.media.video import VideoWriter
def stop(*_): raise SystemExit(143)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, signal.default_int_handler)
noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
try:
    with VideoWriter(sys.argv[1], 16) as writer:
        for second in range(10000):
            writer.write(noise)
            if second == 6: print("going", flush=True)
except BaseException as error:
    print(writer.frames, *error.__notes__, flush=True)
"""


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_made_is_kept_by_whatever_ends_the_process(signalled, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path / "a.mp4")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    time.sleep(0.3)
    process.send_signal(signalled)
    told, _ = process.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    with av.open(str(left)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    if signalled == signal.SIGKILL:
        assert left.name == f"a.{process.pid}.part.mp4"
        assert frames >= 4 * 16
    else:
        assert left.name == "a.mp4"
        assert told == f"{frames} {left} holds the {frames / 16:.1f} s that were made\n"


def test_a_whole_file_is_a_plain_mp4(tmp_path):
    with VideoWriter(str(tmp_path / "a.mp4"), 16) as writer:
        writer.write(np.zeros((100, 64, 64, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 100
