"""Snapshots with anything in them: what is wrong is said, and nothing else happens."""

import copy
import json
import shutil
import warnings
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import quiet, seeded, taken
from kvpack.errors import KVPackError, SnapshotError
from kvpack.snapshots import folder as folders
from kvpack.testing import tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_frames": 61,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "pt",
}
MIB = 2**20
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def pipe():
    sizes = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 2}
    return quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **sizes)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """A folder with one snapshot, behind chunk five."""
    folder = tmp_path_factory.mktemp("saved")
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    for _ in islice(stream, 5):
        pass
    stream.save(folder)
    stream.close()
    return folder


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    return shutil.copytree(saved, tmp_path_factory.mktemp("hostile") / "copy")


def places(node, path=()):
    """The paths of all nodes of a tree."""
    yield path
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, each in parts:
        yield from places(each, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def resume(pipe, folder):
    """Resume and generate; whatever is refused is refused in one line by kvpack before anything is generated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pipe.packforcing.resume(folder)
        except KVPackError as error:
            said = str(error)
    assert said
    assert "\n" not in said
    return None


@MANY
@given(data=st.data())
def test_any_json_tree(data, pipe, saved, folder):
    (path,) = saved.glob("snapshot-*")
    content = json.loads(path.read_text())
    del content["sha256"]
    everywhere = list(places(content))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(everywhere[1:]))
        other = st.sampled_from(everywhere).map(lambda place: copy.deepcopy(at(content, place)))
        try:
            parent = at(content, where[:-1])
            if data.draw(st.booleans()) and isinstance(parent, dict):
                del parent[where[-1]]
            else:
                parent[where[-1]] = data.draw(JSON | other)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    text = json.dumps({**content, "sha256": folders._digest(content)})
    (folder / path.name).write_text(text)
    resume(pipe, folder)


@pytest.mark.parametrize("part", ["conditioning", "decoder"])
def test_a_key_that_is_no_name_is_refused_by_the_part_that_has_it(part, pipe, saved, folder):
    (path,) = saved.glob("snapshot-*")
    content = json.loads(path.read_text())
    del content["sha256"]
    content["state"][part]["of"][0][0] = 1
    (folder / path.name).write_text(json.dumps({**content, "sha256": folders._digest(content)}))
    with pytest.raises(SnapshotError, match=rf"{part} is a dict, but must be dict\[str, "):
        pipe.packforcing.resume(folder)


@pytest.mark.parametrize("name", ["height", "width"])
def test_a_size_that_is_no_number_is_refused(name, pipe, saved, folder):
    (path,) = saved.glob("snapshot-*")
    content = json.loads(path.read_text())
    del content["sha256"]
    attributes = dict(content["state"]["run"]["of"])
    call = next(pair for pair in attributes["call"]["of"] if pair[0] == name)
    call[1] = "0.1.0"
    (folder / path.name).write_text(json.dumps({**content, "sha256": folders._digest(content)}))
    with pytest.raises(SnapshotError, match=f"{name} of its call is a str, but must be a number"):
        pipe.packforcing.resume(folder)


def named(node, name):
    """The value of a name in what a writer makes of a dict."""
    return next(pair for pair in node["of"] if pair[0] == name)[1]


def of_class(content, name):
    """The nodes of a dataclass in a tree."""
    nodes = (at(content, path) for path in places(content))
    return [node for node in nodes if isinstance(node, dict) and str(node.get("class")).endswith(f".{name}")]


def without_a_state(content):
    of_class(content, "Past")[0]["fields"]["states"][0] = None


def without_blocks(content):
    of_class(content, "Ledger")[0]["fields"]["whole"][0]["fields"]["blocks"] = 0


def with_an_unknown_argument(content):
    named(content["state"]["run"], "call")["of"].append(["anything", 1])


def with_fewer_features(content):
    named(content["state"]["decoder"], "features")["of"].pop()


def with_other_features(content):
    named(content["state"]["decoder"], "features")["of"][0] = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_state, "a stack has a StackBook and, of a layer, a NoneType"),
        (without_blocks, r"it lists BlockEntry\(.*blocks=0.*\), which is no block of 10 frames"),
        (with_an_unknown_argument, "its call has 'anything', which a WanPipeline does not take"),
        (with_fewer_features, r"the VAE's decoder remembers \d+ tensors, but \d+ things are there"),
        (with_other_features, r"the VAE's decoder remembers \d+ tensors"),
    ],
)
def test_what_does_not_fit_the_generation_is_refused(change, message, pipe, saved, folder):
    (path,) = saved.glob("snapshot-*")
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    (folder / path.name).write_text(json.dumps({**content, "sha256": folders._digest(content)}))
    with pytest.raises(SnapshotError, match=message):
        pipe.packforcing.resume(folder)


@MANY
@given(data=st.data(), kind=st.sampled_from(["snapshot", "tensors", "blocks"]))
def test_any_bytes(data, kind, pipe, saved, folder):
    """Without a fitting checksum nothing but the same content is taken."""
    for path in saved.glob("*-*"):
        shutil.copy(path, folder / path.name)
    (path,) = saved.glob(f"{kind}-*")
    whole = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(whole) - 1))
    whole[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    (folder / path.name).write_bytes(whole)
    if resume(pipe, folder) is not None:
        before, after = (each / path.name for each in (saved, folder))
        if kind == "snapshot":
            assert json.loads(before.read_text()) == json.loads(after.read_text())
        else:
            assert before.read_bytes() == after.read_bytes()


LARGE = {
    "lists": "[" + "[]," * MIB + "0]",
    "objects": "[" + '{"a":{}},' * MIB + "0]",
    "numbers": "[" + "7," * (2 * MIB) + "0]",
    "keys": "{" + ",".join(f'"{index}":0' for index in range(MIB // 2)) + "}",
    "a text": '"' + "a" * 10 * MIB + '"',
    "a text with one wide letter": '"' + "a" * 10 * MIB + '\U0001f600"',
    "a number": "7" * MIB,
    "depth": "[" * MIB,
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", LARGE)
@pytest.mark.parametrize("place", ["note", "files"])
def test_no_more_memory_than_twice_the_files(what, place, pipe, saved, folder):
    (path,) = saved.glob("snapshot-*")
    content = {**json.loads(path.read_text()), place: 0, "sha256": "0" * 64}
    text = json.dumps(content).replace(f'"{place}": 0', f'"{place}": {LARGE[what]}')
    (folder / path.name).write_text(text)
    size = sum(each.stat().st_size for each in folder.iterdir())
    assert taken(lambda: resume(pipe, folder)) < 2 * size + 24 * MIB


@MANY
@given(name=st.sampled_from(["../x", "/etc/passwd", "..", ".", "", "a/b", "x.safetensors/../../y", "link.safetensors"]))
def test_no_file_outside_the_folder(name, pipe, saved, folder):
    """Not by a path, and not by a link; what a snapshot lists is opened nowhere else."""
    (path,) = saved.glob("snapshot-*")
    content = json.loads(path.read_text())
    del content["sha256"]
    (whole,) = saved.glob("tensors-*")
    (folder / "link.safetensors").unlink(missing_ok=True)
    (folder / "link.safetensors").symlink_to(whole)
    listed = content["files"].pop(whole.name)
    content = json.loads(json.dumps(content).replace(whole.name, name))
    content["files"][name] = listed
    (folder / path.name).write_text(json.dumps({**content, "sha256": folders._digest(content)}))
    with pytest.raises(SnapshotError, match=r"is none of its own|is missing"):
        pipe.packforcing.resume(folder)


@MANY
@given(junk=st.binary(max_size=300), json_too=st.booleans())
def test_any_safetensors(junk, json_too, pipe, saved, folder):
    """A file that is listed with its checksum, but is none."""
    import hashlib

    (path,), (tensors,) = saved.glob("snapshot-*"), saved.glob("tensors-*")
    if json_too:
        header = json.dumps({"t0": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        junk = len(header).to_bytes(8, "little") + header + junk
    content = json.loads(path.read_text())
    del content["sha256"]
    content["files"][tensors.name] = {"bytes": len(junk), "sha256": hashlib.sha256(junk).hexdigest()}
    (folder / tensors.name).write_bytes(junk)
    (folder / path.name).write_text(json.dumps({**content, "sha256": folders._digest(content)}))
    with pytest.raises(SnapshotError):
        pipe.packforcing.resume(folder)
