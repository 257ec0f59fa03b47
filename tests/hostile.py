"""What tests of files from strangers share: JSON that holds anything, and a call that works or is refused in a line."""

from hypothesis import strategies as st

from kvpack.errors import KVPackError

LARGE = 2**40
NUMBERS = st.integers() | st.sampled_from([-1, 0, LARGE, 2**70, 10**400]) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["../../x", "a\0b", "/etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
DEEP = "[" * 100_000


def tried(work, *given):
    """What some work gives, or None where kvpack refuses it in one line."""
    try:
        return work(*given)
    except KVPackError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 4000
    return None
