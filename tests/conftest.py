"""Shapes in signatures are checked in every test: wrong ones raise where they happen."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # the tensors are tiny; threads only wait for each other

with install_import_hook("kvpack", "beartype.beartype"):
    import kvpack
    import kvpack.adapters
    import kvpack.policies
    import kvpack.testing  # noqa: F401
