"""`torch.compile` of repeated blocks over kvpack's memory: few graphs, none broken, the same video."""

import gc
import inspect
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.utils import counters

import kvpack
from helpers import quiet
from kvpack.adapters import attention as processor
from kvpack.adapters.wan import WanAdapter
from kvpack.adapters.wan import prompt_cache as wan_prompt
from kvpack.generation import compile_boundary
from kvpack.plugins.resolve import resolve_stack
from kvpack.testing import tiny_wan_pipeline
from kvpack.training.buffer import GraphLayer

CALL = {
    "prompt": ["a red circle", "the green square"],
    "height": 16,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
PACKED = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 1}

blocks_compile = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch compiles each processor anew, stock too")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """The tests' own checks of shapes can't be traced."""
    attend = inspect.unwrap(compile_boundary.attend)
    for module in (compile_boundary, processor, wan_prompt):
        monkeypatch.setattr(module, "attend", attend)
    base, prompt = processor.PackedAttnProcessor, wan_prompt.PromptWanAttnProcessor
    for cls, name in ((base, "__call__"), (base, "project"), (base, "output"), (prompt, "__call__")):
        monkeypatch.setattr(cls, name, inspect.unwrap(getattr(cls, name)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pipeline(layers=2):
    return quiet(tiny_wan_pipeline(num_layers=layers))


def generate(pipe, chunks=6, **changed):
    frames = chunks * (pipe.packforcing.stack.chunk_frames if hasattr(pipe, "packforcing") else 2)
    call = {"generator": torch.Generator().manual_seed(0), "num_frames": 4 * frames - 3, **CALL, **changed}
    return pipe(**call).frames


def compile_blocks(pipe):
    """Compiles with a backend that counts, and runs what dynamo recorded as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return graphs


STACKS = [
    ("packforcing", PACKED, 1.0, 1),
    # A compressor in latent space, whose tokens ride in the commit: two sequence lengths
    ("packforcing", {**PACKED, "compressor": "lr"}, 1.0, 2),
    # Compressed blocks of unequal size, of which rows choose unequally
    ("packforcing", {**PACKED, "chunk_frames": 3, "sink_frames": 1, "topk": 2}, 4.0, 1),
    ("memrope", {}, 4.0, 1),
    pytest.param("packforcing-paper", {}, 4.0, 2, marks=pytest.mark.slow),
    pytest.param("deep-forcing", {}, 4.0, 1, marks=pytest.mark.slow),
    *(
        pytest.param(name, {}, 1.0, 1, marks=pytest.mark.slow)
        for name in ("flowcache", "framepack", "full", "h2o", "krea", "magi", "token-trim")
    ),
]


@blocks_compile
@pytest.mark.parametrize(("stack", "options", "guidance_scale", "most"), STACKS)
def test_few_graphs_and_the_same_bits(stack, options, guidance_scale, most):
    gc.collect()  # what other tests have left in circles
    before = set(compile_boundary._alive)
    pipe = kvpack.enable(pipeline(), stack, **options)
    frames = generate(pipe, guidance_scale=guidance_scale)
    graphs = compile_blocks(pipe)
    for _ in range(2):
        assert torch.equal(generate(pipe, guidance_scale=guidance_scale), frames)
    assert len(graphs) <= most
    assert not counters["graph_break"]
    assert set(compile_boundary._alive) <= before  # nothing outlives its chunk


@blocks_compile
@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["pool", "lr"])
def test_twelve_layers_over_thirty_chunks(compressor):
    pipe = kvpack.enable(pipeline(layers=12), "packforcing", **PACKED, compressor=compressor)
    frames = generate(pipe, chunks=30)
    graphs = compile_blocks(pipe)
    assert torch.equal(generate(pipe, chunks=30), frames)
    assert len(graphs) <= 2
    assert not counters["graph_break"]


@blocks_compile
def test_compiled_blocks_stay_when_kvpack_goes():
    pipe = pipeline()
    stock = generate(pipe)
    graphs = compile_blocks(pipe)
    assert torch.equal(generate(pipe), stock)
    before = len(graphs)
    for _ in range(2):
        pipe.enable_packforcing("packforcing", **PACKED)
        generate(pipe)
        pipe.disable_packforcing()
        assert torch.equal(generate(pipe), stock)
    assert (before, len(graphs)) == (1, 2)
    assert not counters["graph_break"]


@blocks_compile
def test_a_stream_a_callback_and_another_prompt_compile_nothing_anew():
    pipe = kvpack.enable(pipeline(), "packforcing", **PACKED)
    graphs = compile_blocks(pipe)
    generate(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: tensors)
    stream = pipe.packforcing.stream(**CALL)
    next(stream)
    stream.send(["a blue triangle", "the grass"])
    next(stream)
    stream.close()
    assert len(graphs) <= 2  # another prompt's replay may be longer than a chunk
    assert not counters["graph_break"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_whole_transformer(wrapped):
    """Its hooks break the graph; repeated blocks are the better choice."""
    pipe = kvpack.enable(pipeline(), "packforcing", **PACKED)
    frames = generate(pipe)
    whole = pipe.transformer
    if wrapped:
        pipe.transformer = torch.compile(whole, backend="eager")
    else:
        whole.compile(backend="eager")
    assert torch.equal(generate(pipe), frames)
    assert counters["stats"]["unique_graphs"] > 0
    assert isinstance(whole.blocks[0].attn1.processor, WanAttnProcessor)


def test_gradients_pass_outside_the_graph():
    """Training calls the memory itself: the graph breaks there, and the gradient is that of eager."""

    class Memory(compile_boundary.OpaqueAttention):
        def attended(self, queries, others):
            return queries * others[0]

    memory, queries = Memory(), torch.ones(3, requires_grad=True)

    @torch.compile(backend="eager")
    def run(queries, others):
        return compile_boundary.attend(memory, queries * 1, [others]) + 1

    run(queries, torch.arange(3.0)).sum().backward()
    assert queries.grad.tolist() == [0.0, 1.0, 2.0]
    assert counters["graph_break"]


def test_training_over_compiled_blocks():
    def gradient(compiled):
        pipe = pipeline()
        if compiled:
            pipe.transformer.compile_repeated_blocks(backend="eager")
        trainee = WanAdapter().trainee(pipe, max_sequence_length=8)
        rollout = trainee.rollout(
            resolve_stack("packforcing", PACKED), trainee.embed(["a red circle"]), (2, 4), GraphLayer
        )
        clean, loss = torch.randn(4, 1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(())
        with rollout.attached():
            for chunk in clean:
                loss = loss + rollout.predict(chunk, 500.0, 0).square().mean()
                rollout.commit(chunk)
        loss.backward()
        return pipe.transformer.blocks[0].attn1.to_k.weight.grad

    wanted = gradient(compiled=False)
    assert torch.equal(gradient(compiled=True), wanted)
    assert wanted.abs().max() > 0


def test_blocks_are_seen_to_be_compiled_however_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    assert not compile_boundary.has_compiled_parts(model)
    model[0].compile(backend="eager")
    assert compile_boundary.has_compiled_parts(model)
    wrapped = torch.nn.Sequential(torch.compile(torch.nn.Linear(1, 1), backend="eager"))
    assert compile_boundary.has_compiled_parts(wrapped)


def test_a_cuda_graph_is_told_to_leave_the_memory_out():
    """Where torch has the word for it: what is around the operator can be replayed."""
    tags = torch.ops.kvpack.attend.default.tags
    assert not hasattr(torch.Tag, "cudagraph_unsafe") or torch.Tag.cudagraph_unsafe in tags


@pytest.mark.parametrize(("cuda", "loaded", "in_parts"), itertools.product([False, True], repeat=3))
def test_where_cuda_graphs_replay_each_forward_is_a_step_of_theirs_and_its_output_outlives_it(
    cuda, loaded, in_parts, monkeypatch
):
    graphs, steps, put_out, pipe = cuda and (loaded or in_parts), [], [], pipeline()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace())
    else:
        monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
    if in_parts:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(len(put_out)))
    forward = pipe.transformer.proj_out.forward
    monkeypatch.setattr(pipe.transformer.proj_out, "forward", lambda *given: put_out.append(1) or forward(*given))
    generate(pipe, chunks=2, guidance_scale=3.0, prompt="a red circle", negative_prompt="blur")
    assert not steps  # a pipeline that is not enabled is left alone
    put_out.clear()
    pipe.enable_packforcing("packforcing", **PACKED)
    generate(pipe, chunks=2, guidance_scale=3.0, prompt="a red circle", negative_prompt="blur")
    assert put_out
    assert steps == (list(range(len(put_out))) if graphs else [])  # one before each forward
    with torch.no_grad():  # a rollout that learns: a backward pass is yet to read what its forwards put out
        steps.clear()
        trainee = WanAdapter().trainee(pipe, max_sequence_length=8)
        rollout = trainee.rollout(resolve_stack("full", {}), trainee.embed(["a red circle"]), (2, 4), GraphLayer)
        with rollout.attached():
            rollout.predict(torch.zeros(1, 16, 4, 2, 4), 500.0, 0)
        assert not steps
    given = torch.ones(2)
    (kept,) = compile_boundary.end_forward((given,))
    assert (kept is given) == (not (cuda and loaded))
    assert torch.equal(kept, given)


@blocks_compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "options", "mode"),
    [
        ("packforcing", PACKED, None),
        ("packforcing", {**PACKED, "compressor": "lr"}, None),
        ("h2o", {}, None),
        ("memrope", {}, None),
        # On a CPU there are no graphs to replay: that it is traced whole, once, and gives the same
        ("packforcing", PACKED, "reduce-overhead"),
    ],
)
def test_inductor(stack, options, mode):
    """What a commit keeps is not written over, as inductor does with tensors that it has no more use for."""
    pipe = kvpack.enable(pipeline(), stack, **options)
    frames = generate(pipe, guidance_scale=3.0)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, mode=mode)
    compiled = generate(pipe, guidance_scale=3.0)
    assert float((compiled - frames).norm() / frames.norm()) < 1e-5
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
