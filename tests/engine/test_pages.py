"""Pages are never lost or written by two, and what is found again holds exactly the tokens that were asked for."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from specedge.engine import pages as pages_module
from specedge.engine.pages import OutOfPages, PagePool, PageTable

SIZE = 16


class Pool(RuleBasedStateMachine):
    """Any order of opening, growing, filling and closing, over texts that share beginnings. `written` is what the K/V of a page would hold."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE)
        self.texts: dict[PageTable, tuple[list[int], bytes]] = {}
        self.computed: dict[PageTable, int] = {}
        self.written: dict[int, dict[int, tuple[bytes, tuple[int, ...]]]] = {p: {} for p in range(12)}

    @rule(target=tables, stem=st.integers(0, 2), length=st.integers(1, 150), salt=st.sampled_from([b"", b"a"]))
    def open(self, stem: int, length: int, salt: bytes) -> PageTable:
        tokens = [min(stem, i // 40) for i in range(length)]
        table, shared = self.pool.open(tokens, salt)
        assert shared % SIZE == 0 and shared < length
        self.texts[table], self.computed[table] = (tokens, salt), shared
        self.right(table)
        return table

    @rule(table=tables, n=st.integers(1, 60))
    def compute(self, table: PageTable, n: int) -> None:
        if table not in self.texts:
            return
        tokens, salt = self.texts[table]
        start, stop = self.computed[table], min(len(tokens) - 1, self.computed[table] + n)
        before = self.pool.available
        try:
            table.grow(stop)
        except OutOfPages:
            assert self.pool.available == before
            return
        for t, page, offset in zip(range(start, stop), *table.locate(start, stop), strict=True):
            assert self.pool._held[page] == 1, "a page that others hold is written"
            self.written[page][offset] = salt, tuple(tokens[: t + 1])
        self.computed[table] = max(start, stop)
        table.fill(tokens, self.computed[table])
        self.right(table)

    @rule(table=consumes(tables))
    def close(self, table: PageTable) -> None:
        if table in self.texts:
            table.close()
            del self.texts[table], self.computed[table]

    def right(self, table: PageTable) -> None:
        tokens, salt = self.texts[table]
        n = self.computed[table]
        for t, page, offset in zip(range(n), *table.locate(0, n), strict=True):
            assert self.written[page][offset] == (salt, tuple(tokens[: t + 1]))

    @invariant()
    def all_is_right(self) -> None:
        self.pool.check()
        for table in self.texts:
            self.right(table)


def filled(pool: PagePool, tokens: list[int], salt: bytes = b"") -> PageTable:
    table, shared = pool.open(tokens, salt)
    table.grow(len(tokens) - 1)
    table.fill(tokens, len(tokens) - 1)
    return table


def test_a_closed_text_is_found_again_but_for_its_last_token() -> None:
    pool = PagePool(8, SIZE)
    text = list(range(33))
    filled(pool, text).close()
    assert pool.available == 8
    assert pool.open(text)[1] == 32
    assert pool.open(text[:32])[1] == 16, "the last token's row is needed, so its page is not taken"
    assert pool.open([0, *text])[1] == 0 and pool.open(text, b"other")[1] == 0
    pool.check()


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4, SIZE)
    old, new = [1] * 33, [2] * 33
    filled(pool, old).close()
    filled(pool, new).close()
    table, _ = pool.open([3] * 17)
    table.grow(16)
    assert pool.open(new)[1] == 32
    assert pool.open(old)[1] == 16
    pool.check()


def test_a_hash_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "chain", lambda key, tokens: b"always the same")
    pool = PagePool(4, SIZE)
    filled(pool, [1] * 17).close()
    assert pool.open([2] * 17)[1] == 0 and pool.open([1] * 17)[1] == 16


def test_locate_crosses_pages() -> None:
    table, _ = PagePool(4, SIZE).open([0])
    table.grow(40)
    assert table.locate(14, 18) == ([table.pages[0]] * 2 + [table.pages[1]] * 2, [14, 15, 0, 1])


def test_more_than_there_is_takes_nothing() -> None:
    pool = PagePool(2, SIZE)
    table, _ = pool.open([0])
    with pytest.raises(OutOfPages):
        table.grow(33)
    assert pool.available == 2 and not table.pages
    pool.check()


def test_check_finds_a_lost_page() -> None:
    pool = PagePool(4, SIZE)
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check()
