"""Snapshots that are damaged, of something else, or from strangers: one line, and the one before is used."""

import errno
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from peft import LoraConfig

from helpers import quiet, seeded
from kvpack.errors import (
    BusyPipelineError,
    InvalidOptionError,
    KVPackError,
    OutputError,
    SnapshotError,
    SnapshotWarning,
)
from kvpack.plugins.registry import registry
from kvpack.snapshots import folder as folders
from kvpack.snapshots import tensors as files
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 61,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
SMALL = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 3}


def make(scheduler=None, seed=0, stack=None, **config):
    pipe = quiet(tiny_wan_pipeline(seed, scheduler, **config))
    return pipe.enable_packforcing("packforcing", **{**SMALL, **(stack or {})})


def started(pipe=None, **changed):
    return (pipe or make()).packforcing.stream(**{**CALL, "generator": seeded(), **changed})


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.fixture(scope="module")
def whole(pipe):
    return list(started(pipe))


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """A folder with the snapshots behind chunk five and six."""
    folder = tmp_path_factory.mktemp("saved") / "snapshots"
    stream = started(pipe)
    for _ in islice(stream, 6):
        stream.save(folder)
    stream.close()
    return folder


@pytest.fixture
def snapshots(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def newest(folder, kind):
    return max(folder.glob(f"{kind}-*"))


def rewritten(path, change):
    """Change what a snapshot's JSON says, and its checksum with it, as a stranger would."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": folders._digest(content)}))


def refused(pipe, folder, words):
    with pytest.raises(KVPackError, match=words) as error:
        pipe.packforcing.resume(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def truncated(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def older(path):
    rewritten(path, lambda content: content.update(format=0, kvpack="0.0.9"))


DAMAGE = {
    "truncated tensors": ("tensors", truncated, "has .* bytes, but was written with"),
    "a bit of the tensors": ("tensors", flipped, "its checksum differs"),
    "no tensors": ("tensors", os.unlink, "is missing"),
    "a bit of the blocks": ("blocks", flipped, "its checksum differs"),
    "no blocks": ("blocks", os.unlink, "is missing"),
    "truncated JSON": ("snapshot", truncated, "is no JSON"),
    "a bit of the JSON": ("snapshot", flipped, "is no JSON|checksum differs|format"),
    "empty JSON": ("snapshot", lambda path: path.write_text(""), "is no JSON"),
    "older format": ("snapshot", older, r"has format 0, written by kvpack 0\.0\.9; this one reads 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_one_before_is_used(name, pipe, whole, snapshots):
    kind, damage, words = DAMAGE[name]
    damage(newest(snapshots, kind))
    with pytest.warns(SnapshotWarning, match=words) as told:
        stream = pipe.packforcing.resume(snapshots)
    assert "snapshot 5 is used" in str(told[0].message)
    rest = list(stream)
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


@pytest.mark.parametrize("name", DAMAGE)
def test_two_damaged_ones_are_refused_by_name(name, pipe, snapshots):
    kind, damage, words = DAMAGE[name]
    paths = list(snapshots.glob(f"{kind}-*"))
    for path in paths:
        damage(path)
    message = refused(pipe, snapshots, words)
    assert sum(str(path) in message for path in paths) == 2  # one of each snapshot


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tensors", "bytes, but was written with|its checksum differs"),
        ("snapshot", "was written as snapshot"),
    ],
)
def test_swapped_files(kind, words, pipe, snapshots):
    first, second = sorted(snapshots.glob(f"{kind}-*"))
    first.rename(snapshots / "aside")
    second.rename(first)
    (snapshots / "aside").rename(second)
    refused(pipe, snapshots, words)


def test_an_empty_folder_and_none(pipe, tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(pipe, folder, "holds no snapshot; give a folder that one was saved in")


def test_the_last_two_are_kept_and_nothing_else(saved):
    names = {path.name for path in saved.iterdir()}
    assert {name for name in names if name.startswith("snapshot")} == {"snapshot-000005.json", "snapshot-000006.json"}
    listed = [json.loads((saved / f"snapshot-00000{n}.json").read_text())["files"] for n in (5, 6)]
    assert names == {"lock", "snapshot-000005.json", "snapshot-000006.json", *listed[0], *listed[1]}
    assert not set(listed[0]) & set(listed[1])  # so that damage to one spares the other


LONG = {"recent_frames": 24, "sink_frames": 8, "train_frames": 60}


# Of something else


@dataclass(frozen=True)
class Other:
    words: str
    stack: dict
    config: dict


OTHERS = {
    "weights": Other("another (transformer|vae) than this WanPipeline has", {}, {"seed": 1}),
    "layers": Other("another transformer", {}, {"num_layers": 3}),
    "stack": Other("the stack of the generation was .*topk: 2.* but here it is .*topk: 3", {"topk": 3}, {}),
    "partition": Other("the stack of the generation was", {"sink_frames": 1}, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_or_stack(name, saved):
    other = OTHERS[name]
    refused(make(stack=other.stack, **other.config), saved, other.words)


def test_another_dtype_scheduler_lora_and_disabled(saved):
    refused(make().to(torch.bfloat16), saved, "another (transformer|vae) .* in the dtype")
    from diffusers import FlowMatchEulerDiscreteScheduler

    refused(make(FlowMatchEulerDiscreteScheduler(shift=4.0)), saved, "ran with the scheduler")
    adapted = make()
    adapted.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]), "mine")
    refused(adapted, saved, r"ran with LoRA none, but this pipeline has mine x \[2.0\]")


def test_another_geometry(pipe, snapshots):
    for path in snapshots.glob("snapshot-*"):
        rewritten(path, lambda content: content["geometry"]["fields"].update(heads=5))
    refused(pipe, snapshots, "the geometry of the generation was")


def test_other_versions_warn(pipe, snapshots):
    for path in snapshots.glob("snapshot-*"):
        rewritten(path, lambda content: content.update(torch="1.0"))
    with pytest.warns(SnapshotWarning, match=r"saved with torch 1\.0, and goes on with"):
        pipe.packforcing.resume(snapshots)


def test_other_versions_of_plugins_warn(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(registry().origins, ("partitioner", "sink-mid-recent"), "acme")
    for version in ("1.0", "2.0"):
        monkeypatch.setattr("kvpack.snapshots.saver.package_version", {"acme": version}.get)
        if version == "1.0":
            with started(pipe) as stream:
                next(stream)
                stream.save(tmp_path)
            with warnings.catch_warnings(action="error"):
                pipe.packforcing.resume(tmp_path).close()
    with pytest.warns(SnapshotWarning, match=r"saved with acme 1\.0, and goes on with 2\.0: bits may differ"):
        pipe.packforcing.resume(tmp_path).close()


def test_functions_are_given_again(pipe, tmp_path, saved):
    stream = started(pipe, callback_on_step_end=lambda *_: {})
    next(stream)
    stream.save(tmp_path)
    with pytest.raises(InvalidOptionError, match=r"functions are given again to resume\(\), here callback_on_step_end"):
        pipe.packforcing.resume(tmp_path)
    with pytest.raises(InvalidOptionError, match="here none; got callback_on_step_end"):
        pipe.packforcing.resume(saved, callback_on_step_end=print)


# When it cannot be saved


def test_not_within_a_chunk(pipe, tmp_path):
    streams = []

    def callback(*_):
        with pytest.raises(BusyPipelineError, match="called back from inside of it"):
            streams[0].save(tmp_path)
        return {}

    streams.append(started(pipe, callback_on_step_end=callback))
    next(streams[0])
    streams[0].save(tmp_path)


def test_not_after_an_error_or_an_interrupt(pipe, tmp_path):
    def fail(*_):
        raise ZeroDivisionError

    stream = started(pipe, callback_on_step_end=fail)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    with pytest.raises(SnapshotError, match="interrupted or failed"):
        stream.save(tmp_path)

    def interrupt(own, *_):
        own._interrupt = True
        return {}

    stream = started(pipe, callback_on_step_end=interrupt)
    next(stream)
    with pytest.raises(SnapshotError, match="interrupted or failed"):
        stream.save(tmp_path)


def test_what_is_no_data_is_named(pipe, tmp_path):
    stream = started(pipe, attention_kwargs={"mine": object()})
    next(stream)
    with pytest.raises(SnapshotError, match=r"call\.attention_kwargs\.mine is a object, which is no data to save"):
        stream.save(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_another_generations_folder(pipe, saved, snapshots):
    stream = started(pipe)
    next(stream)
    with pytest.raises(OutputError, match="holds snapshots of another generation"):
        stream.save(snapshots)
    pipe.packforcing.resume(snapshots).save(snapshots)  # its own goes on


def test_one_writer_at_a_time(pipe, tmp_path):
    stream = started(pipe)
    next(stream)
    stream.save(tmp_path)
    other = pipe.packforcing.resume(tmp_path)
    with pytest.raises(OutputError, match="is being written by another process or stream"):
        other.save(tmp_path)
    stream.close()
    other.save(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [".safetensors", ".json"])
def test_a_full_disk_leaves_what_was_there(failing, kind, pipe, whole, tmp_path, monkeypatch):
    stream = started(pipe)
    for _ in islice(stream, 3):
        stream.save(tmp_path / "one")
    next(stream)
    function, writing = getattr(os, failing), []

    def write_file(path, parts):
        writing.append(path.suffix)
        return written(path, parts)

    def full(*arguments):
        if writing and writing[-1] == kind:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments)

    written = folders.write_file
    monkeypatch.setattr(folders, "write_file", write_file)
    monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(OutputError, match="No space left on device; the snapshots that were there still are"):
        stream.save(tmp_path / "one")
    monkeypatch.undo()
    for folder, at in ((tmp_path / "one", 3), (tmp_path / "two", 4)):
        if at == 4:
            stream.save(folder)  # elsewhere
        rest = list(pipe.packforcing.resume(folder))
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[at:], strict=True))
    assert not list((tmp_path / "one").glob(".*.part"))


def test_a_save_writes_what_is_new(tmp_path):
    """Blocks never change, so those of the snapshot before the last are not written again."""
    pipe = make(stack=LONG)
    stream, sizes = started(pipe, num_frames=241), []
    for _ in islice(stream, 20):
        stream.save(tmp_path)
        files = [path.stat().st_size for path in tmp_path.glob("blocks-*")]
        sizes.append((newest(tmp_path, "blocks").stat().st_size, sum(files)))
    held = pipe.packforcing.stats()["resident_bytes"]
    written = sum(new for new, _ in sizes[12:]) / len(sizes[12:])
    assert written < 0.5 * held  # of two chunks that are new in each, and of sinks that are kept from worn files
    assert max(both for _, both in sizes) < 4 * held + 4000  # two snapshots that share nothing, half of each worn
    whole, rest = list(stream), list(make(stack=LONG).packforcing.resume(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


# From strangers


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/tensors.safetensors", "tensors.pt"])
def test_no_file_outside_the_folder(name, pipe, snapshots):
    for path in snapshots.glob("snapshot-*"):
        rewritten(path, lambda content: content["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(pipe, snapshots, "which is none of its own")


def test_no_link_out_of_the_folder(pipe, snapshots, tmp_path):
    for path in snapshots.glob("tensors-*"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    refused(pipe, snapshots, "is missing")


@pytest.mark.parametrize("length", [1 << 25, 1 << 62, 2**64 - 1])
def test_no_oversized_header(length, pipe, snapshots):
    import hashlib

    for path in snapshots.glob("tensors-*"):
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    for path in snapshots.glob("snapshot-*"):

        def change(content):
            for name, listed in content["files"].items():
                listed["sha256"] = hashlib.sha256((snapshots / name).read_bytes()).hexdigest()

        rewritten(path, change)
    refused(pipe, snapshots, "announces a header that is larger")


def test_no_class_but_those_of_memories(pipe, snapshots):
    for name in ("os.system", "subprocess.Popen", "kvpack.policies.hr.HighResolutionCompressor", "pathlib.Path"):
        for path in snapshots.glob("snapshot-*"):
            rewritten(path, lambda content, name=name: content["state"]["clean"].update({"class": name}))
        refused(pipe, snapshots, f"it holds a '{name}'")


def archived(node, change):
    """Change each archived block that a snapshot's JSON lists."""
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        archived(each, change)
    if isinstance(node, dict) and "BlockEntry" in str(node.get("class")) and node["fields"]["part"] == "mid":
        node["fields"].update(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({name: number}, "which is no block of") for name, number in [("blocks", 0), ("blocks", -1), ("blocks", 3)]),
        *(({name: number}, "which is no block of") for name, number in [("frames", 0), ("frames", 400)]),
        ({"first_frame": 500}, "which is no block of"),
        ({"slot": 0}, "has two blocks in a slot"),
        ({"offered": -4}, "a block was chosen 0 times of -4"),
        ({"chosen": 5}, "a block was chosen 5 times of 0"),
    ],
    ids=str,
)
def test_no_archive_that_cannot_be(change, words, pipe, snapshots):
    for path in snapshots.glob("snapshot-*"):
        rewritten(path, lambda content: archived(content, change))
    refused(pipe, snapshots, words)


@pytest.mark.parametrize("name", ["noise", "chunks", "rows", "__class__", "fps"])
def test_no_method_is_replaced(name, pipe, snapshots):
    for path in snapshots.glob("snapshot-*"):
        rewritten(path, lambda content: content["state"]["run"]["of"].append([name, 1]))
    refused(pipe, snapshots, "is nothing that a generation remembers")


def test_deep_and_large_json(pipe, snapshots, monkeypatch):
    monkeypatch.setattr(folders, "_MOST_JSON", 1 << 20)
    newest(snapshots, "snapshot").write_text("[" * 200_000)
    min(snapshots.glob("snapshot-*")).write_text(" " * ((1 << 20) + 1))
    message = refused(pipe, snapshots, "is no JSON")
    assert "larger than any snapshot's JSON" in message
