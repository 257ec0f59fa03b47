"""What tests look into that users do not: one function each."""

from kvpack.memory.ledger import Ledger
from kvpack.memory.session import Session


def ledger(session: Session) -> Ledger:
    """Bookkeeping of a stack's session."""
    return session.past.book.ledger


def archive(session: Session, layer: int = 0):
    """Archive of a layer of a stack's session."""
    return session.past.states[layer].archive


def whole(session: Session, layer: int = 0):
    """Blocks that a layer of a stack's session keeps whole."""
    return [kept.block for kept in session.past.states[layer].whole]


def chosen(session: Session, layer: int = 0):
    """Indices of the mid blocks that a layer has chosen last."""
    return session.caches[layer].selected
