"""The command line of the faults."""

import torch

from benchmarks import faults
from benchmarks.report import script

if __name__ == "__main__":
    torch.set_num_threads(1)  # forks, and tensors that are too small for more
    script("faults", faults.__doc__ or "", faults.run, faults.BARS)
