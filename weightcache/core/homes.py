"""Homes: which member of a swarm reads which part of a blob from the origin, by rendezvous hashing.

Theory of operation. Every member gives every *part* of the blob a weight; a part's home is the member that weighs it
least. All who see the same members agree, without a word; who comes or goes moves only its own share.

The weights of a member are a permutation: part p stands at place (stride * p + start) mod a prime, both drawn from a
hash of member and blob; a second hash decides between members that give a part the same place. So a member's first
places can be walked without looking at the others: one that joins a thousand looks at the few parts that it may win,
not at all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from typing import NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from weightcache.core.bits import members

_PLACE = 64  # bits below a weight's place: the second hash


class Order(NamedTuple):
    """In which order a member would take the parts."""

    key: bytes
    stride: int
    start: int

    @classmethod
    def of(cls, member: bytes, blob: bytes, prime: int) -> Order:
        key = blob + member
        drawn = xxh3_128_intdigest(key)
        return cls(key, 1 + (drawn >> 64) % (prime - 1), drawn % (1 << 64) % prime)

    def places(self, parts: int, prime: int) -> list[int]:
        """The places of all parts."""
        stride, start = self.stride, self.start
        return [(stride * part + start) % prime for part in range(parts)]

    def place(self, part: int, prime: int) -> int:
        return (self.stride * part + self.start) % prime

    def weight(self, part: int, place: int) -> int:
        return place << _PLACE | xxh3_64_intdigest(self.key, part)


class Homes:
    """The homes of ``parts`` parts of a blob, among those who have joined. It knows nothing of its owner: hosts that
    see the same members may share one."""

    def __init__(self, blob: bytes, parts: int) -> None:
        self._blob = blob
        self._prime = prime_from(parts)
        self._nobodys = self._prime << _PLACE  # heavier than any weight
        self._orders: dict[bytes, Order] = {}
        self._homes: list[bytes | None] = [None] * parts
        self._least = [self._nobodys] * parts
        self._shares: dict[bytes, int] = {}  # the parts of each member that has any, a bit each

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._orders)

    def __contains__(self, member: bytes) -> bool:
        return member in self._orders

    def home(self, part: int) -> bytes | None:
        return self._homes[part]

    def share(self, member: bytes) -> int:
        """The parts whose home a member is, a bit each."""
        return self._shares.get(member, 0)

    def join(self, member: bytes) -> None:
        """A member more: it takes its share from all others."""
        if member in self._orders:
            return
        order = self._orders[member] = Order.of(member, self._blob, self._prime)
        step, part = self._walk(order)
        for place in range(min(max(self._least, default=0) >> _PLACE, self._prime - 1) + 1):
            if part < len(self._homes) and place <= self._least[part] >> _PLACE:
                weight = order.weight(part, place)
                if weight < self._least[part]:
                    self._give(part, member, weight)
            part = (part + step) % self._prime

    def quit(self, member: bytes) -> None:
        """A member less: its share falls to all others."""
        if self._orders.pop(member, None) is None:
            return
        orders, prime = self._orders.items(), self._prime
        for part in members(self.share(member)):
            nearest = min((order.place(part, prime) for _, order in orders), default=None)
            if nearest is None:
                self._give(part, None, self._nobodys)
                continue
            equals = [(name, order) for name, order in orders if order.place(part, prime) == nearest]
            weight, heir = min((order.weight(part, nearest), name) for name, order in equals)
            self._give(part, heir, weight)

    def inherited(self, member: bytes, absent: Collection[bytes]) -> int:
        """The parts, a bit each, of which ``member`` would be the home if the ``absent`` were none."""
        found, prime = 0, self._prime
        order = self._orders[member]
        others = [other for name, other in self._orders.items() if name not in absent and name != member]
        for part in members(sum(self.share(name) for name in absent)):
            place = order.place(part, prime)
            weight = order.weight(part, place)
            rivals = ((other, other.place(part, prime)) for other in others)
            if not any(at <= place and other.weight(part, at) < weight for other, at in rivals):
                found |= 1 << part
        return found

    def reach(self, member: bytes, rank: float) -> int:
        """The parts, a bit each, of which ``member`` is among the first ``rank``, as far as its own weight tells: so
        many members expect a part to be in their reach."""
        order = self._orders[member]
        limit = int(rank / len(self._orders) * self._prime * (1 << _PLACE))
        step, part = self._walk(order)
        found = 0
        for place in range(min(limit >> _PLACE, self._prime - 1) + 1):
            if part < len(self._homes) and order.weight(part, place) < limit:
                found |= 1 << part
            part = (part + step) % self._prime
        return found

    def _walk(self, order: Order) -> tuple[int, int]:
        """How to visit the parts in a member's order: the step from one to the next, and the first."""
        step = pow(order.stride, -1, self._prime)
        return step, -order.start * step % self._prime

    def _give(self, part: int, member: bytes | None, weight: int) -> None:
        bit, before = 1 << part, self._homes[part]
        if before is not None:
            self._shares[before] ^= bit
            if not self._shares[before]:
                del self._shares[before]
        if member is not None:
            self._shares[member] = self._shares.get(member, 0) | bit
        self._homes[part], self._least[part] = member, weight


def prime_from(parts: int) -> int:
    """The modulus of places."""
    return next(number for number in count(max(parts, 2)) if _is_prime(number))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, int(number**0.5) + 1))
