"""Who owns which page of the K/V cache, and which pages can be used again.

A page holds `page_size` committed tokens. Full pages carry a chained hash of all tokens up to their end, salted by whoever may share them; a sequence
that begins with the same tokens takes the same pages. Pages nobody holds stay findable until their room is needed, least recently used first.
Knows nothing of tensors: it deals in page numbers. Invariants (`check`): every page is free, idle or held, and is held exactly as often as
tables list it; a page that others can find is full and is never written again.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


class OutOfPages(Exception):
    """More pages are wanted than are free or idle; nothing was taken."""


@dataclass(frozen=True, slots=True)
class Cached:
    """What a findable page holds; a hit is believed only if the tokens agree."""

    key: bytes
    tokens: tuple[int, ...]


class PageTable:
    """The pages of one sequence, in order; made by `PagePool.open`."""

    def __init__(self, pool: "PagePool", salt: bytes) -> None:
        self._pool = pool
        self._key = salt  # chained hash of the pages that are full
        self._full = 0
        self.pages: list[int] = []

    def grow(self, tokens: int) -> None:
        """Hold pages for the first `tokens` tokens; OutOfPages if there are not enough."""
        missing = self._pool.pages_for(tokens) - len(self.pages)
        if missing > 0:
            self.pages += self._pool.take(missing)

    def locate(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Page and offset of tokens start .. stop-1."""
        size = self._pool.page_size
        at = range(start, stop)
        return [self.pages[t // size] for t in at], [t % size for t in at]

    def fill(self, tokens: list[int], computed: int) -> None:
        """Make pages findable that are full now that the K/V of the first `computed` of `tokens` is in them."""
        size = self._pool.page_size
        while (self._full + 1) * size <= computed:
            own = tuple(tokens[self._full * size : (self._full + 1) * size])
            self._key = chain(self._key, own)
            self._pool.publish(self.pages[self._full], Cached(self._key, own))
            self._full += 1

    def share(self, tokens: list[int]) -> int:
        """Take the findable pages that `tokens` begin with; returns how many tokens they hold. For a table without pages."""
        size = self._pool.page_size
        while (self._full + 1) * size <= len(tokens):
            own = tuple(tokens[self._full * size : (self._full + 1) * size])
            key = chain(self._key, own)
            page = self._pool.find(Cached(key, own))
            if page is None:
                break
            self.pages.append(page)
            self._key, self._full = key, self._full + 1
        return self._full * size

    def close(self) -> None:
        """Give everything back, the last page first, so that the end of a text is forgotten before its beginning."""
        self._pool.release(self)
        self.pages, self._full = [], 0


class PagePool:
    """`pages` pages of `page_size` tokens, and the tables that share them."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, held by nobody; least recently used first
        self._held = [0] * pages
        self._content: dict[int, Cached] = {}  # of findable pages
        self._place: dict[bytes, int] = {}
        self._tables: set[PageTable] = set()
        self.hits = 0  # tokens that were found

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return len(self._free) + len(self._idle)

    def open(self, tokens: list[int], salt: bytes = b"") -> tuple[PageTable, int]:
        """A table, and how many of `tokens` have their K/V in it already; the last one never has, for its row makes the next token."""
        table = PageTable(self, hashlib.sha256(salt).digest())
        self._tables.add(table)
        shared = table.share(tokens[:-1])
        self.hits += shared
        return table, shared

    def keys(self, tokens: list[int], salt: bytes = b"") -> list[bytes]:
        """The chained hashes of the pages that `tokens` fill, but for the last token: under these they can be found."""
        size, key, found = self.page_size, hashlib.sha256(salt).digest(), list[bytes]()
        for at in range(0, (len(tokens) - 1) // size * size, size):
            key = chain(key, tuple(tokens[at : at + size]))
            found.append(key)
        return found

    def take(self, n: int) -> list[int]:
        """`n` pages that nobody holds, idle ones last."""
        if n > self.available:
            raise OutOfPages(f"{n} pages wanted, {self.available} there")
        pages = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._place[self._content.pop(page).key]
            self._held[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, content: Cached) -> None:
        """Let `page` be found, unless another page with the same content is."""
        if content.key not in self._place and page not in self._content:
            self._place[content.key], self._content[page] = page, content

    def find(self, content: Cached) -> int | None:
        """Hold the page with this content, if there is one."""
        page = self._place.get(content.key)
        if page is None or self._content[page].tokens != content.tokens:
            return None
        self._idle.pop(page, None)
        self._held[page] += 1
        return page

    def release(self, table: PageTable) -> None:
        """Hold a table's pages no more."""
        self._tables.discard(table)
        for page in reversed(table.pages):
            self._held[page] -= 1
            if self._held[page] == 0:
                if page in self._content:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        listed = [0] * self.total
        for table in self._tables:
            for page in table.pages:
                listed[page] += 1
        assert listed == self._held, "a page is held by nobody, or by more than it counts"
        used = [p for p in range(self.total) if self._held[p]]
        assert sorted([*used, *self._free, *self._idle]) == list(range(self.total)), "a page is lost or owned twice"
        assert {c.key: p for p, c in self._content.items()} == self._place and set(self._idle) <= set(self._content)


def chain(key: bytes, tokens: tuple[int, ...]) -> bytes:
    """Hash of a page's tokens and of all before it."""
    return hashlib.sha256(key + np.array(tokens, "<u4").tobytes()).digest()
