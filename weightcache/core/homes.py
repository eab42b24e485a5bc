"""Homes: which member of a swarm reads which part of a blob from the origin, by rendezvous hashing.

Theory of operation. Every member gives every *part* of the blob a weight; a part's home is the member that weighs it
least. All who see the same members agree, without a word; who comes or goes moves only its own share.

The weights of a member are a permutation: part p stands at place (stride * p + start) mod a prime, both drawn from a
hash of member and blob; a second hash decides between members that give a part the same place. So a member's first
places can be walked without looking at the others: one that joins a thousand looks at the few parts that it may win,
not at all of them.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

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
    """The homes of ``parts`` parts of a blob, as ``me`` sees them; ``me`` is a member from the start, and stays."""

    def __init__(self, me: bytes, blob: bytes, parts: int) -> None:
        self.mine = (1 << parts) - 1  # the parts whose home is here, a bit each
        self._me = me
        self._blob = blob
        self._prime = prime_from(parts)
        self._orders = {me: Order.of(me, blob, self._prime)}
        self._homes = [me] * parts
        order = self._orders[me]
        self._least = [order.weight(part, order.place(part, self._prime)) for part in range(parts)]

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._orders)

    def home(self, part: int) -> bytes:
        return self._homes[part]

    def join(self, member: bytes) -> None:
        """A member more: it takes its share from all others."""
        if member in self._orders:
            return
        order = self._orders[member] = Order.of(member, self._blob, self._prime)
        step, part = self._walk(order)
        for place in range((max(self._least, default=0) >> _PLACE) + 1):
            if part < len(self._homes) and place <= self._least[part] >> _PLACE:
                weight = order.weight(part, place)
                if weight < self._least[part]:
                    self._give(part, member, weight)
            part = (part + step) % self._prime

    def quit(self, member: bytes) -> None:
        """A member less: its share falls to all others."""
        if member == self._me or self._orders.pop(member, None) is None:
            return
        orders, prime = self._orders.items(), self._prime
        for part in [part for part, home in enumerate(self._homes) if home == member]:
            nearest = min(order.place(part, prime) for _, order in orders)
            equals = [(name, order) for name, order in orders if order.place(part, prime) == nearest]
            weight, heir = min((order.weight(part, nearest), name) for name, order in equals)
            self._give(part, heir, weight)

    def reach(self, rank: float) -> int:
        """The parts, a bit each, of which ``me`` is among the first ``rank`` members, as far as its own weight tells:
        so many members expect a part to be in their reach."""
        order = self._orders[self._me]
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

    def _give(self, part: int, member: bytes, weight: int) -> None:
        self._homes[part], self._least[part] = member, weight
        bit = 1 << part
        self.mine = self.mine | bit if member == self._me else self.mine & ~bit


def prime_from(parts: int) -> int:
    """The modulus of places."""
    return next(number for number in count(max(parts, 2)) if _is_prime(number))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, int(number**0.5) + 1))
