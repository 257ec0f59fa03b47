"""Checkpoints, LoRA and settings from strangers: one line of an error, no code, no memory beyond the file's size."""

import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import DEEP, JSON, LARGE, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import taken
from kvpack.checkpoints.config import FILE, Settings
from kvpack.checkpoints.lora import merge, read_lora
from kvpack.checkpoints.reading import read_checkpoint
from kvpack.compressors.weights import load_branch
from kvpack.errors import InvalidOptionError
from kvpack.planning.presets import from_folder
from kvpack.plugins.resolve import resolve_stack

MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# Pickles


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    return b"\x8a" + bytes([len(pickle.encode_long(value))]) + pickle.encode_long(value)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def archive(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for entry, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{entry}", data)
    return path


CALL = number(2**36) + b"\x85R"
MAKERS = {
    "bytearray": name("__builtin__", "bytearray") + CALL,
    "a bytearray of another name": name("builtins", "bytearray") + CALL,
    "a tensor": name("torch", "Tensor") + CALL,
    "a tensor of floats": name("torch", "FloatTensor") + CALL,
    "a storage": name("torch.storage", "UntypedStorage") + CALL,
    "a storage by half its name": name("torch", "storage.UntypedStorage") + CALL,
    "a tensor from the memo": name("torch", "Tensor") + b"q\x010h\x01" + CALL,
    "a new object": name("builtins", "bytearray") + number(2**36) + b"\x85\x81",
    "a codec that doubles": name("_codecs", "encode") + text("ab") + text("hex") + b"\x86R",
    "a tensor by another call": name("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + name("torch", "Tensor") * 2
    + number(2**36)
    + b"\x85}tR",
    "a tensor without a storage": name("torch._utils", "_rebuild_tensor_v2") + CALL,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_memory_of_a_number_is_refused_before_it_is_made(maker, tmp_path):
    path = archive(tmp_path / "model.pt", b"\x80\x02" + MAKERS[maker] + b".")
    with pytest.raises(InvalidOptionError, match=r"it calls .*; save its state dict alone|larger than its storage"):
        read_checkpoint(path)


def test_a_pickle_that_python_and_torch_find_in_two_places(tmp_path):
    """By the case of its name, under two names, or by one of two lists of files: what torch would read is looked at."""
    harm, path = b"\x80\x02" + MAKERS["bytearray"] + b".", tmp_path / "model.pt"
    for names in (["DATA.PKL"], ["data.pkl", "DATA.PKL"], ["DATA.PKL", "data.pkl"]):
        with zipfile.ZipFile(path, "w") as file:
            for each in names:
                file.writestr(f"archive/{each}", b"\x80\x02}." if each == "data.pkl" else harm)
            file.writestr("archive/version", b"3\n")
        with pytest.raises(InvalidOptionError, match=r"it calls builtin|it calls __builtin__|named as torch\.save"):
            read_checkpoint(path)
    whole, other = (archive(tmp_path / "zip", each).read_bytes() for each in (harm, b"\x80\x02}."))
    path.write_bytes(whole[:-22] + other)  # torch goes by the place, Python by what is in front of the end
    with pytest.raises(InvalidOptionError, match="two lists of files"):
        read_checkpoint(path)


def test_archives_of_torch_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a.weight": torch.ones(5, 3)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "model.pt").tensors["a.weight"].sum() == 15


def old(tensor):
    buffer = io.BytesIO()
    torch.save({"a.weight": tensor}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_sizes_that_a_file_of_old_torch_only_announces(tmp_path):
    path, whole = tmp_path / "model.pt", old(torch.ones(5, 3))
    path.write_bytes(whole)
    assert read_checkpoint(path).tensors["a.weight"].shape == (5, 3)
    path.write_bytes(whole.replace(b"K\x05K\x03\x86", b"J\x00\x00\x00\x40K\x03\x86"))
    with pytest.raises(InvalidOptionError, match="larger than its storage"):
        read_checkpoint(path)
    path.write_bytes(whole.replace(b"K\x0fN", b"J\x00\x00\x00\x40N"))
    with pytest.raises(InvalidOptionError, match="announces storages of 4294967296"):
        read_checkpoint(path)
    archive(tmp_path / "zip", b"\x80\x02}.")
    hidden = whole.replace(b"K\x05K\x03\x86", b"J\x00\x00\x00\x40K\x03\x86")
    path.write_bytes(hidden + (tmp_path / "zip").read_bytes())  # an archive for Python, but not for torch
    with pytest.raises(InvalidOptionError, match="larger than its storage"):
        read_checkpoint(path)


def test_what_is_compressed_or_long_beside_the_tensors(tmp_path):
    path = archive(tmp_path / "model.pt", b"\x80\x02" + b"]" * 2**24 + b".", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidOptionError, match=r"compressed, which torch\.save never does"):
        read_checkpoint(path)
    path = archive(tmp_path / "model.pt", b"\x80\x02(" + b"]" * 2**24 + b"t.")
    with pytest.raises(InvalidOptionError, match="bytes beside its tensors"):
        read_checkpoint(path)


def test_one_stretch_of_the_file_again_and_again(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.ones(1).expand(2**20, 2**20)}, path)
    with pytest.raises(InvalidOptionError, match="but its weights would take 4398046511104"):
        read_checkpoint(path)
    flat = torch.ones(2**18)
    torch.save({f"{index}.weight": flat.view(512, 512) for index in range(8)}, path)
    with pytest.raises(InvalidOptionError, match="but its weights would take 8388608"):
        read_checkpoint(path)


def called_again(call, given, count=10_000):
    """A pickle of a list with as many results of one call, whose function and arguments are named again and again."""
    return b"\x80\x02(" + call + b"q\x01" + given + b"q\x02" + b"h\x01h\x02R" * count + b"t."


MANY_NUMBERS = b"](" + b"".join(b"M" + index.to_bytes(2, "little") for index in range(4000)) + b"e"
COPIES = {
    "a text": called_again(name("_codecs", "encode"), text("a" * 20_000) + text("latin1") + b"\x86"),
    "a list": called_again(name("builtins", "set"), MANY_NUMBERS + b"\x85"),
    "a list of another name": called_again(name("UserDict", "Counter"), MANY_NUMBERS + b"\x85"),
}


@pytest.mark.parametrize("what", COPIES)
def test_calls_that_copy_one_argument_again_and_again(what, tmp_path):
    with pytest.raises(InvalidOptionError, match="copies more than"):
        read_checkpoint(archive(tmp_path / "model.pt", COPIES[what]))


def test_tuples_of_one_tuple_twice_which_are_hashed_for_ever(tmp_path):
    nested = b"K\x00\x85" + b"q\x01h\x01\x86" * 60
    with pytest.raises(InvalidOptionError, match="tuples in tuples of more than"):
        read_checkpoint(archive(tmp_path / "model.pt", b"\x80\x02}" + nested + b"K\x00s."))


def test_tensors_with_attributes_of_python(tmp_path):
    path, tensor = tmp_path / "model.pt", torch.ones(5, 3)
    tensor.note = "of a trainer"
    torch.save({"a.weight": tensor}, path)
    assert read_checkpoint(path).tensors["a.weight"].sum() == 15
    with zipfile.ZipFile(path) as file:
        whole = file.read("model/data.pkl")
    larger = whole.replace(b"K\x05K\x03\x86", b"J\x00\x00\x00\x40K\x03\x86")
    assert larger != whole
    with pytest.raises(InvalidOptionError, match="larger than its storage"):
        read_checkpoint(archive(path, larger))


def test_a_tensor_that_is_set_anew(tmp_path):
    """By the rules of very old torch a state is a storage and sizes, for which the storage grows."""
    torch.save([torch.ones(4)], tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        whole = file.read("model/data.pkl")
    with pytest.raises(InvalidOptionError, match="sets a tensor anew"):
        read_checkpoint(archive(tmp_path / "model.pt", whole.replace(b"a.", b")ba.")))


def small_tensors(path, count):
    header = {f"t{index}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(count)}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return path


MIB = 2**20
WRITTEN = {
    "lists in a pickle": lambda folder: archive(folder / "a.pt", b"\x80\x02(" + b"]" * 2**18 + b"t."),
    "lists in a large pickle": lambda folder: archive(folder / "a.pt", b"\x80\x02(" + b"]" * 2**24 + b"t."),
    "tuples": lambda folder: archive(folder / "a.pt", b"\x80\x02(" + b"N\x85\x85" * (2**18 // 3) + b"t."),
    "empty tuples": lambda folder: archive(folder / "a.pt", b"\x80\x02(" + b")" * 2**18 + b"t."),
    "a tuple in a tuple, and so on": lambda folder: archive(folder / "a.pt", b"\x80\x02N" + b"\x85" * 2**18 + b"."),
    "a text again and again": lambda folder: archive(folder / "a.pt", COPIES["a text"]),
    "a list again and again": lambda folder: archive(folder / "a.pt", COPIES["a list"]),
    "a short header": lambda folder: small_tensors(folder / "a.safetensors", 14_000),
    "a long header": lambda folder: small_tensors(folder / "a.safetensors", 100_000),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", WRITTEN)
def test_no_more_memory_than_twice_the_file(what, tmp_path):
    path = WRITTEN[what](tmp_path)
    assert taken(lambda: read_checkpoint(path)) < 2 * path.stat().st_size + 32 * MIB


PICKLED = st.lists(
    st.sampled_from(
        [*MAKERS.values(), b"(", b"}", b"]", b")", b"N", b"u", b"t", b"R", b"\x85", b"\x86", b"q\x00", b"h\x00"]
    )
    | st.text(max_size=5).map(text)
    | st.integers(0, 2**70).map(number)
    | st.binary(max_size=4),
    max_size=12,
).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


@MANY
@given(content=PICKLED, zipped=st.booleans(), suffix=st.sampled_from([".pt", ".bin", ".ckpt"]))
def test_any_pickle(content, zipped, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    archive(path, content) if zipped else path.write_bytes(content)
    assert tried(read_checkpoint, path) is None


@MANY
@given(data=st.data(), kind=st.sampled_from([".pt", ".old.pt", ".safetensors"]))
def test_any_bytes_in_a_checkpoint(data, kind, tmp_path):
    path, tensor = tmp_path / f"model{kind}", torch.arange(15.0).view(5, 3)
    if kind == ".safetensors":
        save_file({"a.weight": tensor}, path)
    elif kind == ".pt":
        torch.save({"a.weight": tensor}, path)
    else:
        path.write_bytes(old(tensor))
    whole = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(whole) - 1))
    whole[start : start + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    path.write_bytes(whole)
    found = tried(read_checkpoint, path)
    if found is not None:
        assert sum(each.nbytes for each in found.tensors.values()) <= 2 * len(whole) + 2**20


@MANY
@given(shape=st.lists(st.sampled_from([0, 1, 5, LARGE, 2**63]), max_size=3), end=st.sampled_from([0, 4, LARGE, 2**63]))
def test_headers_that_announce_terabytes(shape, end, tmp_path):
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    found = tried(read_checkpoint, tmp_path / "model.safetensors")
    assert found is None or found.tensors["a.weight"].nbytes <= 4
    (tmp_path / "model.safetensors").write_bytes(end.to_bytes(8, "little") + header)
    assert tried(read_checkpoint, tmp_path / "model.safetensors") is None


@MANY
@given(tree=JSON)
def test_any_index_of_shards(tree, tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    for content in (tree, {"weight_map": tree}, {"weight_map": {"a.weight": "../outside.safetensors"}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        assert tried(read_checkpoint, tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    assert tried(read_checkpoint, tmp_path) is None


# LoRA

MODULES = st.sampled_from(["blocks.0.attn1.to_q", "lora_unet_blocks_0_ffn_0", "a", "", ".", "blocks.0.modulation"])
KEYS = st.sampled_from(
    [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_up.weight",
        ".lora_down.weight",
        ".lora_B.bias",
        ".alpha",
        ".diff",
        ".diff_b",
        ".diff_m",
        ".lora.up.weight",
        "",
    ]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=5)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("lora_alpha", "r", "peft_type", "init_lora_weights", "use_rslora", "use_dora"), JSON),
        **{
            key: JSON | st.dictionaries(st.sampled_from(["to_q", "(", "(a+)+$", "(.*)*x", ""]), JSON, max_size=2)
            for key in ("rank_pattern", "alpha_pattern")
        },
    },
)


@MANY
@given(
    tensors=st.dictionaries(st.tuples(MODULES, KEYS).map("".join), SHAPES, min_size=1, max_size=4),
    config=st.none() | JSON | CONFIGS,
    place=st.sampled_from(["header", "file"]),
    note=st.none() | st.text(max_size=6),
    alpha=st.none() | st.just(2.0),
)
def test_any_lora(tensors, config, place, note, alpha, tmp_path):
    path, beside = tmp_path / "lora.safetensors", tmp_path / "adapter_config.json"
    beside.unlink(missing_ok=True)
    told = {} if note is None else {"ss_network_alpha": note}
    if config is not None and place == "header":
        told["lora_adapter_metadata"] = json.dumps(config)
    elif config is not None:
        beside.write_text(json.dumps(config))
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path, told)

    def work():
        return merge({"blocks.0.attn1.to_q.weight": torch.ones(3, 2)}, read_lora(path, alpha, dict), None)

    merged = tried(work)
    assert merged is None or merged["blocks.0.attn1.to_q.weight"].shape == (3, 2)


def test_a_delta_that_is_larger_than_its_factors_is_never_made(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"a.lora_A.weight": torch.ones(1, 2**17), "a.lora_B.weight": torch.ones(2**17, 1)}, path)
    with pytest.raises(InvalidOptionError, match="the weight is"):
        merge({"a.weight": torch.ones(2, 2)}, read_lora(path, None, dict), None)


def with_pattern(folder, module, pattern):
    """A LoRA of one module of rank 1, for which PEFT's config has one pattern."""
    factors = {f"{module}.lora_A.weight": torch.ones(1, 2), f"{module}.lora_B.weight": torch.ones(2, 1)}
    save_file(factors, folder / "l.safetensors")
    config = {"lora_alpha": 1, "alpha_pattern": {pattern: 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "l.safetensors"


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (r".*blocks\.(?:0|1|2)\.(?:attn1|attn2)\.(?:to_q|to_k)", True),
        (r"^(?!.*text).*blocks\.\d+\.attn1.*", True),
        (r"^(?!.*attn1).*blocks\.\d+\.attn1.*", False),
        (r"(?:blocks\.)?0\.attn1\.to_q", True),
        (rf"blocks\.({'|'.join(map(str, range(40)))})\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)", True),
        (r"to_q\+", False),
        (r"[+*]*(\+\+\+\+)?to_q", True),
    ],
)
def test_usual_patterns_are_taken(pattern, matched, tmp_path):
    path = with_pattern(tmp_path, "blocks.0.attn1.to_q", pattern)
    (delta,) = read_lora(path, None, dict).values()
    assert delta.scale == (3 if matched else 1)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [(".*.*.*.*x", 250), (".*a.*a.*a.*a.*x", 250), ("(a|a)" * 60 + "x", 250), ("(a?b?a|a)?" * 30 + "x", 100)],
)
def test_a_pattern_that_takes_long_for_long_names(pattern, length, tmp_path):
    with pytest.raises(InvalidOptionError, match=r"take too long for 1 modules .*fewer \* \+ \? \{\}"):
        read_lora(with_pattern(tmp_path, "a" * length, pattern), None, dict)
    with pytest.raises(InvalidOptionError, match="name has 300 characters; at most 256"):
        read_lora(with_pattern(tmp_path, "a" * 300, ".*x"), None, dict)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*.*.*.*.*)*x", "a" * 5000])
def test_a_pattern_that_would_be_matched_for_ever(pattern, tmp_path):
    key = f"{'a' * 60}b"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(1, 2), f"{key}.lora_B.weight": torch.ones(2, 1)}, tmp_path / "l.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1, "rank_pattern": {pattern: 1}}))
    with pytest.raises(InvalidOptionError, match=r"no pattern of PEFT's .*at most 500 characters"):
        read_lora(tmp_path / "l.safetensors", None, dict)


# Settings

STACK = st.fixed_dictionaries(
    {},
    optional={
        "name": JSON | st.sampled_from(["packforcing", "os.system", "../packforcing", "h2o"]),
        "options": JSON
        | st.dictionaries(
            st.sampled_from(
                ["topk", "chunk_frames", "compressor", "selector", "store", "tier", "sink_frames", "weights"]
            ),
            JSON | st.sampled_from(["builtins.eval", "os:system", "int8", "host", "dual", "../../etc"]),
            max_size=3,
        ),
    },
)
SETTINGS = st.fixed_dictionaries(
    {}, optional={"stack": JSON | STACK, **dict.fromkeys(("fps", "first_chunk_frames", "call", "recipe", "x"), JSON)}
)


@MANY
@given(tree=JSON | SETTINGS, deep=st.sampled_from([False] * 9 + [True]))
def test_any_settings(tree, deep, tmp_path, monkeypatch):
    """Whatever a model's folder says, a memory that is installed is made of it, or nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / FILE).write_text(DEEP if deep else json.dumps(tree))

    def work():
        own = Settings.of_folder(tmp_path)
        return resolve_stack(None, {}, own), own

    made = tried(work)
    if made is not None:
        assert type(made[0]).__module__.startswith("kvpack")
        assert made[1].fps > 0
        assert made[1].fps < float("inf")


def test_settings_that_are_a_gigabyte(tmp_path):
    with open(tmp_path / FILE, "wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(InvalidOptionError, match="has 1073741824 bytes"):
        Settings.of_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# Folders of compressors


@pytest.fixture(scope="module")
def branch(tmp_path_factory):
    from kvpack.compressors.network import HighResolutionBranch

    folder = tmp_path_factory.mktemp("branch")
    HighResolutionBranch(channels=4, width=6, patch=(2, 2), hidden=4).save_pretrained(folder)
    return folder


@MANY
@given(data=st.data())
def test_any_folder_of_a_compressor(data, branch, tmp_path):
    whole = json.loads((branch / "config.json").read_text())
    key = data.draw(st.sampled_from([*whole, "seed", "x"]))
    config = data.draw(JSON) if data.draw(st.integers(0, 9)) == 0 else {**whole, key: data.draw(JSON)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((branch / "model.safetensors").read_bytes())
    made = tried(load_branch, str(tmp_path))
    assert made is None or sum(each.nbytes for each in made.parameters()) < 2**16


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_compressor_that_is_only_announced(branch, tmp_path):
    """A gigabyte of weights is said in the config, and the file has none of it."""
    whole = json.loads((branch / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**whole, "hidden": 3000, "width": 30000}))
    (tmp_path / "model.safetensors").write_bytes((branch / "model.safetensors").read_bytes())
    assert tried(load_branch, str(tmp_path)) is None
    assert taken(lambda: load_branch(str(tmp_path))) < 32 * MIB


def test_any_config_of_a_transformer(model, tmp_path):
    """What `kvpack plan` reads of a folder is numbers, and refused in one line where they are not."""
    config = json.loads((model / "transformer/config.json").read_text())
    for key in config:
        for value in (None, -1, "x", [], {}, 10**30, 1e300):
            folder = tmp_path / "tiny"
            (folder / "transformer").mkdir(parents=True, exist_ok=True)
            (folder / "model_index.json").write_text((model / "model_index.json").read_text())
            (folder / "transformer/config.json").write_text(json.dumps({**config, key: value}))
            tried(from_folder, folder)
