"""Who is next: members take turns, however much each of them has waiting. Knows no threads and no messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Items that wait: round robin over members, then over the lines of one member; first in, first out in a line.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._members: dict[str, dict[bytes, deque[Item]]] = {}

    def put(self, member: str, line: bytes, item: Item) -> None:
        """``item`` waits behind the others of its line."""
        self._members.setdefault(member, {}).setdefault(line, deque()).append(item)

    def put_back(self, member: str, line: bytes, item: Item) -> None:
        """``item``, which was taken, is the next of its line again, when the member has its turn."""
        self._members.setdefault(member, {}).setdefault(line, deque()).appendleft(item)

    def take(self, allowed: Callable[[str], bool] = lambda _: True) -> Item | None:
        """The next item of the members that are ``allowed`` one now; None if there is none."""
        member = next(filter(allowed, self._members), None)
        if member is None:
            return None
        lines = self._members.pop(member)
        name = next(iter(lines))
        line = lines.pop(name)
        item = line.popleft()
        if line:
            lines[name] = line
        if lines:
            self._members[member] = lines
        return item

    def waiting(self, member: str, line: bytes) -> int:
        """How many items are in this line."""
        return len(self._members.get(member, {}).get(line, ()))

    def lines(self) -> Iterator[tuple[bytes, deque[Item]]]:
        """Every line in which something waits."""
        for lines in self._members.values():
            yield from lines.items()

    def clear(self) -> None:
        """Drop all that waits."""
        self._members.clear()
