"""The model families that come with kvpack, registered as any third party's."""

from collections.abc import Callable
from typing import Any

from kvpack.adapters.anyflow_far import AnyFlowFARAdapter
from kvpack.adapters.sana_wm import SanaWMAdapter
from kvpack.adapters.skyreels import SkyReelsV2Adapter
from kvpack.adapters.wan import WanAdapter
from kvpack.hookspecs import hookimpl


@hookimpl
def kvpack_register_adapters(register: Callable[[Any], None]) -> None:
    """All built-in adapters."""
    register(WanAdapter())
    register(SanaWMAdapter())
    register(SkyReelsV2Adapter())
    register(AnyFlowFARAdapter())
