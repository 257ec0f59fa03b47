"""The policies that come with kvpack, registered as any third party's."""

from collections.abc import Callable
from typing import Any

from kvpack.memory.codec import DenseCodec
from kvpack.memory.policy import Policy
from kvpack.plugins.hookspecs import hookimpl
from kvpack.policies.absolute import AbsoluteReindexer
from kvpack.policies.all_blocks import AllSelector
from kvpack.policies.contiguous import ContiguousReindexer
from kvpack.policies.deep_forcing import DeepForcing
from kvpack.policies.dual import DualCompressor
from kvpack.policies.fademem import FadeMem
from kvpack.policies.fit import FitReindexer
from kvpack.policies.flowcache import FlowCache
from kvpack.policies.framepack import GeometricCompressor, framepack
from kvpack.policies.full import FullPartitioner
from kvpack.policies.h2o import HeavyHitters
from kvpack.policies.hr import HighResolutionCompressor
from kvpack.policies.identity import IdentityCompressor
from kvpack.policies.infinite_forcing import infinite_forcing
from kvpack.policies.infinity_rope import InfinityRoPE
from kvpack.policies.keep_attended import AttendedCompressor
from kvpack.policies.keep_farthest import FarthestCompressor
from kvpack.policies.keep_grid import GridCompressor
from kvpack.policies.keep_keydiff import KeyDiffCompressor
from kvpack.policies.keep_merge import MergeCompressor
from kvpack.policies.keep_random import RandomTokensCompressor
from kvpack.policies.krea import Krea
from kvpack.policies.longlive import LongLive
from kvpack.policies.longlive_rag import LongLiveRAG
from kvpack.policies.lr import LowResolutionCompressor
from kvpack.policies.magi import Magi
from kvpack.policies.memrope import MemRoPE
from kvpack.policies.mixed_windows import MixedWindows
from kvpack.policies.native import NativeCompressor
from kvpack.policies.packed import PackedReindexer
from kvpack.policies.pool import PoolCompressor
from kvpack.policies.pool_time import TimePoolCompressor
from kvpack.policies.quantized import Float8Codec, Int4Codec, Int8Codec, ResidualCodec
from kvpack.policies.random_blocks import RandomSelector
from kvpack.policies.recency import RecencySelector
from kvpack.policies.rolling_sink import RollingSink
from kvpack.policies.sana_wm import sana_wm
from kvpack.policies.sink_mid_recent import SinkMidRecentPartitioner
from kvpack.policies.sink_shift import SinkShiftReindexer
from kvpack.policies.softmax_mass import SoftmaxMassSelector
from kvpack.policies.stacks import full, packforcing, packforcing_paper, self_forcing
from kvpack.policies.streaming_llm import streaming_llm
from kvpack.policies.token_trim import TokenTrim
from kvpack.policies.topk import QueryTopK
from kvpack.policies.uniform import UniformSelector
from kvpack.policies.window import WindowPartitioner


@hookimpl
def kvpack_register_policies(register: Callable[[Any], None]) -> None:
    """Register every policy that is imported above."""
    for each in list(globals().values()):
        if isinstance(each, type) and issubclass(each, Policy) and each is not Policy:
            register(each)


@hookimpl
def kvpack_register_stacks(register: Callable[[str, Any], None]) -> None:
    """Register all built-in stacks."""
    register("framepack", framepack)
    register("full", full)
    register("infinite-forcing", infinite_forcing)
    register("sana-wm", sana_wm)
    register("streaming-llm", streaming_llm)
    register("self-forcing", self_forcing)
    register("packforcing", packforcing)
    register("packforcing-paper", packforcing_paper)
