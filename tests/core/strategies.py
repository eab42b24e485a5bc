"""What the property tests draw from: headers, and files that have them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from weightcache.core.layout import CHUNK, CUT, DTYPE_BITS
from weightcache.core.source import Source


@dataclass(frozen=True)
class Shaped:
    """A safetensors file of which only the head and the size exist: (name, bytes) of each tensor, in order."""

    head: bytes
    size: int
    tensors: tuple[tuple[str, int], ...]

    @property
    def data_start(self) -> int:
        return len(self.head)


def head_of(fields: object, padding: int = 0) -> bytes:
    """Length and JSON, as the writer makes them; ``padding`` spaces at the end."""
    text = json.dumps(fields).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text


def file_of(lengths: Sequence[int], *, shuffled: int = 0, padding: int = 0, metadata: object = None) -> Shaped:
    """A file of U8 tensors of these lengths, whose header names them in an order drawn from ``shuffled``."""
    fields: dict[str, object] = {}
    at = 0
    for number, length in enumerate(lengths):
        fields[f"t{number}"] = {"dtype": "U8", "shape": [length], "data_offsets": [at, at + length]}
        at += length
    names = list(fields)
    random.Random(shuffled).shuffle(names)
    ordered = {name: fields[name] for name in names} | ({"__metadata__": metadata} if metadata is not None else {})
    head = head_of(ordered, padding)
    return Shaped(head, len(head) + at, tuple((f"t{number}", length) for number, length in enumerate(lengths)))


# Lengths around each limit of the plan, and ordinary ones.
lengths = st.lists(
    st.one_of(
        st.integers(0, 64),
        st.integers(0, 3 * CUT),
        st.integers(0, 4 * CHUNK),
        st.builds(
            lambda base, times, off: max(0, base * times + off),
            st.sampled_from([CUT, CHUNK]),
            st.integers(1, 9),
            st.integers(-2, 2),
        ),
    ),
    max_size=40,
)
files = st.builds(
    lambda lengths, shuffled, padding, metadata: file_of(
        lengths, shuffled=shuffled, padding=padding, metadata=metadata
    ),
    lengths,
    st.integers(0, 5),
    st.sampled_from([0, 3, 7, CHUNK]),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)

dtypes = st.sampled_from(sorted(DTYPE_BITS))

_part = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)
_tail = st.lists(_part, max_size=4).map("/".join)
_word = st.from_regex(r"[a-z0-9][a-z0-9.-]{1,12}[a-z0-9]", fullmatch=True).filter(
    lambda word: ".." not in word and "--" not in word
)


def _source(scheme: str, authority: str, path: str, tree: bool, revision: str, query: str) -> Source:
    return Source(
        scheme,
        {"file": "", "hf": f"{authority}/{authority}"}.get(scheme, authority),
        path + ("/" if tree and path else ""),
        revision if scheme == "hf" else "",
        query if scheme in ("http", "https") else "",
    )


sources = st.builds(
    _source,
    st.sampled_from(["s3", "gs", "az", "hf", "https", "http", "file"]),
    _word,
    _tail,
    st.booleans(),
    st.one_of(st.just("main"), _tail.filter(bool)),
    st.sampled_from(["", "a=b&c=%20", "X-Amz-Signature=0123"]),
)
