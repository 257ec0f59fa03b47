"""The device that is measured: its clock, its memory and its name. What only CUDA has is None elsewhere."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import commit
from kvpack import __version__

PACKAGES = ("diffusers", "triton", "flashdreams", "flash-attn", "sageattention", "xformers")
GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """The most bytes of the device's memory that were in use at once.

    Args:
        allocated: by tensors.
        reserved: by torch's allocator, which is what `nvidia-smi` shows, less CUDA's own.
    """

    allocated: int
    reserved: int


@dataclass(frozen=True)
class Machine:
    """A device, CUDA or not."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        """Wait for all that was launched."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds of a call, from an idle device to an idle device."""
        self.sync()
        start = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - start

    def median(self, call: Callable[[], Any], times: int, warm: int = 1) -> float:
        """Return the median seconds of a call that was made before."""
        return median(self.each(call, times, warm))

    def each(self, call: Callable[[], Any], times: int, warm: int = 1) -> list[float]:
        """Return the seconds of each call but the first ones."""
        return [self.seconds(call) for _ in range(warm + times)][warm:]

    def busy(self, call: Callable[[], Any]) -> float | None:
        """Return the seconds that the device's kernels and copies take in a call, without what it waits for."""
        if not self.cuda:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            self.seconds(call)
        events = [each for each in seen.key_averages() if each.device_type == DeviceType.CUDA]
        return sum(each.self_device_time_total for each in events) / 1e6

    def waits(self, call: Callable[[], Any]) -> int:
        """Return how often the host waits for the device in a call; CUDA alone counts it."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in found)

    def begin_peak(self) -> None:
        """Measure the peak from here on."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> Peak | None:
        """Return the peak since `begin_peak`."""
        if not self.cuda:
            return None
        return Peak(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))

    def counter(self, *names: str) -> int | None:
        """Return the first of these counters that this version of torch has."""
        stats = torch.cuda.memory_stats(self.device) if self.cuda else {}
        return next((int(stats[name]) for name in names if name in stats), None)

    def facts(self) -> dict[str, Any]:
        """Return what a reader must know of the device and of the software on it; nothing of its owner."""
        facts: dict[str, Any] = {
            "device": self.device.type,
            "card": platform.machine(),
            "python": platform.python_version(),
            "system": platform.system(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "kvpack": __version__,
            "commit": commit(),
            "threads": torch.get_num_threads(),
            **{name: installed(name) for name in PACKAGES},
        }
        if self.cuda:
            card = torch.cuda.get_device_properties(self.device)
            facts["card"], facts["memory_bytes"] = card.name, card.total_memory
            facts["capability"], facts["processors"] = f"{card.major}.{card.minor}", card.multi_processor_count
            facts["cudnn"] = torch.backends.cudnn.version()
        return facts


def installed(package: str) -> str | None:
    """Return the version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def milliseconds(seconds: Sequence[float]) -> list[float]:
    return [1e3 * each for each in seconds]
