"""The order in which a pipeline uses its files."""

from __future__ import annotations

SMALL = 1 << 20  # bytes: such files go ahead of all others

# In the order of their use by a pipeline: what is needed first comes first.
_RANKS = (("text_encoder", 1), ("tokenizer", 1), ("image_encoder", 1), ("vae", 3))
_USUAL = 2


def rank(path: str, size: int) -> int:
    """How soon a file of a snapshot is needed; a lower rank goes first."""
    if size < SMALL:
        return 0
    component = path.partition("/")[0]
    return next((rank for name, rank in _RANKS if component.startswith(name)), _USUAL)
