"""Who owns which page of the K/V cache.

A page holds `page_size` committed tokens of one sequence. A sequence is admitted only if its longest form fits beside what is promised
to the others, so a step never runs out of pages. Knows nothing of tensors: it deals in page numbers.
Invariant (`check`): every page is free or in exactly one table, and the promises to the tables can be kept.
"""


class PageTable:
    """The pages of one sequence, in order; made by `PagePool.open`."""

    def __init__(self, pool: "PagePool", limit: int) -> None:
        self._pool = pool
        self.limit = limit  # pages that it may come to hold
        self.pages: list[int] = []

    def grow(self, tokens: int) -> None:
        """Hold pages for the first `tokens` tokens."""
        need = self._pool.pages_for(tokens)
        assert need <= self.limit, f"{need} pages wanted, {self.limit} promised"
        while len(self.pages) < need:
            self.pages.append(self._pool.take())

    def locate(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Page and offset of tokens start .. stop-1."""
        size = self._pool.page_size
        at = range(start, stop)
        return [self.pages[t // size] for t in at], [t % size for t in at]

    def close(self) -> None:
        """Give everything back. A closed table is empty and promised nothing."""
        self._pool.release(self)
        self.pages, self.limit = [], 0


class PagePool:
    """`pages` pages of `page_size` tokens, and the tables that share them."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._tables: set[PageTable] = set()

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def promised(self) -> int:
        """Pages that tables may still take."""
        return sum(t.limit - len(t.pages) for t in self._tables)

    def fits(self, tokens: int) -> bool:
        """Whether there is room for a sequence of at most `tokens` tokens."""
        return self.pages_for(tokens) <= len(self._free) - self.promised

    def open(self, tokens: int) -> PageTable | None:
        """A table for a sequence of at most `tokens` tokens, or None while there is no room for it."""
        if not self.fits(tokens):
            return None
        table = PageTable(self, self.pages_for(tokens))
        self._tables.add(table)
        return table

    def take(self) -> int:
        return self._free.pop()

    def release(self, table: PageTable) -> None:
        self._free.extend(reversed(table.pages))
        self._tables.discard(table)

    def check(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        used = [p for t in self._tables for p in t.pages]
        assert sorted(used + self._free) == list(range(self.total)), "a page is lost or owned twice"
        assert 0 <= self.promised <= len(self._free), "more pages are promised than are free"
