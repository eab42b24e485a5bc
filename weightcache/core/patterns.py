"""Which files of a snapshot are meant: glob patterns, read as huggingface_hub reads its ``allow_patterns``.

``*`` crosses "/", case counts, a pattern that ends in "/" means everything below, and a backslash is a slash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAX_PATTERNS = 1000
MAX_PATTERN = 1024  # characters of one


@dataclass(frozen=True, slots=True)
class Patterns:
    """``allow``: a path must match one of them; None: any will do. ``ignore``: it must match none of them."""

    allow: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, allow: Sequence[str] | str | None, ignore: Sequence[str] | str | None) -> Patterns:
        """From what a caller gives: one pattern, several, or None. An empty ``allow`` admits nothing."""
        return cls(None if allow is None else _spelled(allow), _spelled(ignore or ()))

    def __bool__(self) -> bool:
        """Whether they leave anything out at all."""
        return self.allow is not None or bool(self.ignore)

    def admit(self, path: str) -> bool:
        """Whether the file at ``path`` (relative to the snapshot) is meant."""
        if self.allow is not None and not any(fnmatchcase(path, pattern) for pattern in self.allow):
            return False
        return not any(fnmatchcase(path, pattern) for pattern in self.ignore)

    def __str__(self) -> str:
        said = [f"allow {', '.join(self.allow) or 'nothing'}"] if self.allow is not None else []
        said += [f"ignore {', '.join(self.ignore)}"] if self.ignore else []
        return "; ".join(said)


def _spelled(patterns: Sequence[str] | str) -> tuple[str, ...]:
    listed = [patterns] if isinstance(patterns, str) else patterns
    slashed = [pattern.replace("\\", "/") for pattern in listed]
    return tuple(pattern + "*" if pattern.endswith("/") else pattern for pattern in slashed)


EVERYTHING = Patterns()
