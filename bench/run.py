"""What a comparison is given: where to work, how large, how often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """``folder`` is empty and on the disk that is measured; ``rounds`` are counted, one more warms up."""

    folder: Path
    quick: bool = False
    rounds: int = 5

    def size(self, full: int, quick: int) -> int:
        """Bytes to move."""
        return quick if self.quick else full
