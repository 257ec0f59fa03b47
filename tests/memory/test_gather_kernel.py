"""The Triton kernel that reads pinned memory in Triton's interpreter, against what a CPU selects."""

import importlib
import sys

import pytest
import torch

from kvpack.memory import archive as archive_module
from kvpack.memory.archive import Archive
from kvpack.plugins.registry import registry

triton = pytest.importorskip("triton")
NAME = "kvpack.memory.gather_kernel"


@pytest.fixture(scope="module")
def kernel():
    """The kernel's module, read anew under the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop(NAME, None)
        yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize("kind", ["*i32", "*u8"])
@pytest.mark.parametrize("one", [{}, {"parts": 1}, {"words": 1, "parts": 1}], ids=str)  # Triton makes ones constants
def test_it_compiles_for_cards(kind, one, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does, which needs no card."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernel = importlib.import_module(NAME)
    types = {"stored": kind, "index": "*i64", "out": kind, "words": "i32", "parts": "i32", "block": "i32"}
    constants = {**one, "block": kernel._WORDS}
    signature = {name: "constexpr" if name in constants else each for name, each in types.items()}
    source = triton.compiler.ASTSource(kernel._gather, signature, constants)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
    assert "ld.global" in made.asm["ptx"]
    assert made.asm["cubin"]


# A slot of a word, of odd bytes, of less than what is copied at once, of a little more, and of several times that.
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 2, 12), (4099,), (4, 4096)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool], ids=str
)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_the_kernel_copies_the_bytes_of_the_slots(shape, dtype, kind, kernel):
    size, numbers = 6 * torch.Size(shape).numel() * dtype.itemsize, 2 if dtype == torch.bool else 256
    drawn = torch.randint(numbers, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = drawn.view(dtype).view(6, *shape)[1:]  # some rows of an archive lie behind others
    index = torch.tensor([4, 0, 0, 2], dtype=kind)
    found = kernel.gather_slots(stored, index)
    assert found.shape == (4, *shape)
    assert found.dtype == dtype
    assert torch.equal(found.view(-1).view(torch.uint8), stored.view(torch.uint8).view(5, -1)[index.long()].flatten())


def test_nothing_chosen_and_nothing_stored_are_no_work(kernel):
    assert kernel.gather_slots(torch.ones(3, 4), torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    assert kernel.gather_slots(torch.ones(3, 0, 2), torch.tensor([1, 2])).shape == (2, 0, 2)


def test_a_slot_may_lie_behind_more_bytes_than_31_bits_count(kernel):
    stored = torch.empty(2**19 + 9, 4099, dtype=torch.uint8)  # no memory is taken until it is written
    stored[-1] = torch.arange(4099).to(torch.uint8)
    assert torch.equal(kernel.gather_slots(stored, torch.tensor([2**19 + 8]))[0], stored[-1])


def test_torch_s_allocator_learns_which_stream_reads_the_memory(kernel, monkeypatch):
    """It hands freed pinned memory on behind its own copies alone: each of them must be beside one that it sees."""
    stored, copies, copy = torch.ones(3, 4), [], torch.Tensor.copy_

    def noted(self, source, non_blocking=False):
        copies.append((source.untyped_storage().data_ptr(), source.numel(), non_blocking))
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    kernel.gather_slots(stored, torch.tensor([2]))
    assert (stored.untyped_storage().data_ptr(), 1, True) in copies


@pytest.mark.parametrize("store", ["dense", "int8", "int4", "residual", "fp8"])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 2)], ids=str)
def test_an_archive_gives_the_same_bits_through_the_kernel(store, rows, kernel, monkeypatch):
    archive, draw = Archive(5, registry().policy("codec", store), "host"), torch.Generator().manual_seed(0)
    for slot in range(4):
        block = torch.randn(2, 2, 5, 2, 12, generator=draw)
        archive.reserve(slot + 1, block[0])
        archive.write(slot, archive.encoded(*block))
    slots = torch.tensor([[0, 2, 1], [2, 3, 0]])[rows]
    keys, values, _ = archive.gather(rows, slots, 4)
    monkeypatch.setattr(archive_module, "selecting", lambda *_: kernel.gather_slots)
    again = archive.gather(rows, slots, 4)
    assert torch.equal(again[0], keys)
    assert torch.equal(again[1], values)
