"""What a check is given: a policy of its kind, and no class."""

from kvpack.errors import InvalidOptionError
from kvpack.memory.roles import Policy


def require_kind(given: object, kind: type, check: str) -> None:
    """Raise `InvalidOptionError` unless it is an instance of `kind`, with the check that would be right.

    Args:
        given: what the check was called with.
        kind: `Policy`, or `Memory` where it must be a whole memory.
        check: name of the check.
    """
    name = type(given).__name__
    if isinstance(given, type):
        raise InvalidOptionError(f"{check} tests an instance, got the class {given.__name__}; give {given.__name__}()")
    if not isinstance(given, Policy):
        raise InvalidOptionError(f"{check} tests a {kind.__name__.lower()}, got {given!r}")
    if not isinstance(given, kind):
        right = f"check_policy({name}(...))"
        raise InvalidOptionError(f"{check} tests memories, but {name} is a {given.role}; call {right}")
