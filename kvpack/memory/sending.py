"""What the host tells the device: places, slots, counts."""

import torch
from torch import Tensor


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for what the device has yet to do.

    From memory that is not pinned a copy waits for everything that was launched before it.

    Args:
        numbers: the tensor, which may be there already.
        device: where it is needed.
    """
    if device.type == "cuda" and numbers.device.type == "cpu" and numbers.numel():
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)
