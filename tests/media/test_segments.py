"""A video in segments, joined without encoding anew."""

import av
import numpy as np
import pytest

from helpers import pixels
from kvpack.errors import OutputError
from kvpack.media.segments import SegmentedVideo, clear


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)


def written(folder, counts, done=()):
    video = SegmentedVideo(folder, 16, done)
    for index, count in enumerate(counts):
        video.write(frames(count, index))
        done = video.cut()
    return video, done


@pytest.mark.parametrize("counts", [[21], [13, 12, 12, 5], [1, 1, 2], [13, 1, 12, 2], [1, 12, 12]])
def test_joined_frames_are_those_of_the_segments(counts, tmp_path):
    video, done = written(tmp_path / "segments", counts)
    video.join(tmp_path / "a.mp4")
    each = [pixels(tmp_path / "segments" / segment["name"]) for segment in done]
    assert [len(part) for part in each] == counts
    assert np.array_equal(pixels(tmp_path / "a.mp4"), np.concatenate(each))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert np.allclose(np.diff(times), 1 / 16)
    assert video.frames == sum(counts)


def test_what_no_checkpoint_knows_is_written_again(tmp_path):
    whole, _ = written(tmp_path / "whole", [13, 12, 12])
    whole.join(tmp_path / "whole.mp4")
    _, done = written(tmp_path / "broken", [13, 12])
    (tmp_path / "broken" / "segment-000003.mp4").write_bytes(b"half")
    (tmp_path / "broken" / "segment-000003.77.part.mp4").write_bytes(b"half")
    video = SegmentedVideo(tmp_path / "broken", 16, done[:1])
    assert [path.name for path in sorted((tmp_path / "broken").iterdir())] == ["segment-000001.mp4"]
    for index in (1, 2):
        video.write(frames(12, index))
        video.cut()
    video.join(tmp_path / "broken.mp4")
    assert np.array_equal(pixels(tmp_path / "whole.mp4"), pixels(tmp_path / "broken.mp4"))


def test_what_is_no_segment_stays(tmp_path):
    written(tmp_path / "segments", [2])
    (tmp_path / "segments" / "notes.txt").touch()
    clear(tmp_path / "segments", {"segment-000001.mp4"})
    assert len(list((tmp_path / "segments").iterdir())) == 2
    clear(tmp_path / "segments")
    assert [each.name for each in (tmp_path / "segments").iterdir()] == ["notes.txt"]


def test_an_error_throws_the_open_segment_away_and_an_interrupt_keeps_it(tmp_path):
    for error, kept in ((ZeroDivisionError, 1), (KeyboardInterrupt, 2)):
        folder = tmp_path / error.__name__

        def fail(folder=folder, error=error):
            with SegmentedVideo(folder, 16) as video:
                video.write(frames(5))
                video.cut()
                video.write(frames(3))
                raise error

        with pytest.raises(error):
            fail()
        assert len(list(folder.iterdir())) == kept


def test_damaged_missing_and_other_segments_are_refused(tmp_path):
    _, done = written(tmp_path, [5, 5])
    path = tmp_path / "segment-000002.mp4"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(OutputError, match=r"segment-000002\.mp4 is missing or not what was written"):
        SegmentedVideo(tmp_path, 16, done)
    with pytest.raises(OutputError, match="does not list segments"):
        SegmentedVideo(tmp_path, 16, [{"name": "segment-000001.mp4"}])
    with pytest.raises(OutputError, match="is missing"):
        SegmentedVideo(tmp_path / "segments", 16, [{**done[0], "name": "../segment-000001.mp4"}])
    with pytest.raises(OutputError, match="no frame was generated"):
        SegmentedVideo(tmp_path / "empty", 16).join(tmp_path / "a.mp4")
