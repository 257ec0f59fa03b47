"""The model families that come with kvpack, registered as any third party's."""

from collections.abc import Callable
from typing import Any

from kvpack.adapters.anyflow_far.adapter import AnyFlowFARAdapter
from kvpack.adapters.sana_wm.adapter import SanaWMAdapter
from kvpack.adapters.skyreels.adapter import SkyReelsV2Adapter
from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.plugins.hookspecs import hookimpl


@hookimpl
def kvpack_register_adapters(register: Callable[[Any], None]) -> None:
    """All built-in adapters."""
    register(WanAdapter())
    register(SanaWMAdapter())
    register(SkyReelsV2Adapter())
    register(AnyFlowFARAdapter())
