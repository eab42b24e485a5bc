"""The order in which a pipeline uses its files."""

from __future__ import annotations

SMALL = 1 << 20  # bytes: such files go ahead of all others
# Bytes of a file in no folder, such as a LoRA: soon done, and it is wanted now, whatever large load is under way.
LIGHT = 512 << 20

# In the order of their use by a pipeline: what is needed first comes first.
_RANKS = (("text_encoder", 1), ("tokenizer", 1), ("image_encoder", 1), ("vae", 3), ("safety_checker", 4))
_USUAL = 2


def rank(path: str, size: int) -> int:
    """How soon a file of a snapshot is needed; a lower rank goes first."""
    component, folder, _ = path.partition("/")
    if size < (SMALL if folder else LIGHT):
        return 0
    return next((rank for name, rank in _RANKS if component.startswith(name)), _USUAL)
