"""Every adapter does what all must do; a broken one is told what is wrong."""

import pytest
import torch

from kvpack.adapters.wan.run import WanRun
from kvpack.errors import AdapterError
from kvpack.pipeline.enabled import PackForcing
from kvpack.plugins.registry import registry
from kvpack.testing import check_adapter, tiny_wan_pipeline


def wan_call(chunks):
    return {
        "prompt": "a red circle",
        "height": 16,
        "width": 16,
        "num_frames": 16 * chunks - 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }


def test_wan():
    check_adapter(tiny_wan_pipeline(), wan_call)


def unseeded(run, first, frames):
    return torch.randn(1, 16, frames, 2, 2)


def counting(steps):
    """Denoising that leaves a hook behind."""

    def denoised(run, *args):
        run.pipeline.transformer.norm_out.register_forward_hook(lambda *_: None)
        return steps(run, *args)

    return denoised


def longer(stream):
    """A stream whose first chunk is another one than that of the call."""

    def streamed(self, *args, **kwargs):
        return iter([part + 1e-3 for part in stream(self, *args, **kwargs)])

    return streamed


BROKEN = {
    "is not deterministic": lambda patch: patch.setattr(WanRun, "noise", unseeded),
    "leaves other hooks": lambda patch: patch.setattr(WanRun, "_denoised", counting(WanRun._denoised)),
    "streams other latents": lambda patch: patch.setattr(PackForcing, "stream", longer(PackForcing.stream)),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_adapter_is_told(words, monkeypatch):
    BROKEN[words](monkeypatch)
    with pytest.raises(AdapterError, match=f"the adapter wan {words}"):
        check_adapter(tiny_wan_pipeline(), wan_call)


def test_a_memory_that_grows_is_told():
    with pytest.raises(AdapterError, match=r"attended \[\d+, .*\] tokens in the second half of 6 chunks"):
        check_adapter(tiny_wan_pipeline(), wan_call, stack="full", chunks=6)


def test_a_difference_from_upstream_is_told():
    pipe = tiny_wan_pipeline()
    full = registry().stack("full", {})
    with pytest.raises(AdapterError, match=r"differs from upstream by .* with a memory that forgets nothing"):
        check_adapter(pipe, wan_call, identity=(full, pipe(**wan_call(3)).frames))  # stock Wan is not causal
    assert "_kvpack" not in vars(pipe)
