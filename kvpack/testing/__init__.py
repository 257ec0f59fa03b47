"""For tests: tiny pipelines made in code, `check_policy` for a policy of one's own, `check_adapter` for a family."""

from kvpack.testing.adapters import check_adapter
from kvpack.testing.codecs import check_codec
from kvpack.testing.pipelines import (
    tiny_anyflow_far_pipeline,
    tiny_skyreels_v2_pipeline,
    tiny_tokenizer,
    tiny_wan_pipeline,
    tiny_wan_transformer,
)
from kvpack.testing.policies import TINY, check_memory, check_policy, run_session
from kvpack.testing.sana_wm import tiny_sana_wm_refiner, tiny_sana_wm_transformer

__all__ = [
    "TINY",
    "check_adapter",
    "check_codec",
    "check_memory",
    "check_policy",
    "run_session",
    "tiny_anyflow_far_pipeline",
    "tiny_sana_wm_refiner",
    "tiny_sana_wm_transformer",
    "tiny_skyreels_v2_pipeline",
    "tiny_tokenizer",
    "tiny_wan_pipeline",
    "tiny_wan_transformer",
]
