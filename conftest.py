"""Leave out of the doctests what needs a package that is not there."""

from importlib.util import find_spec

kernels = ["kvpack/memory/gather_kernel.py", "kvpack/memory/rotation_kernel.py"]
collect_ignore = [] if find_spec("triton") else kernels
