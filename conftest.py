"""Leave out of the doctests what needs a package that is not there."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["kvpack/memory/rotation_kernel.py"]
