"""Pages are never lost, never shared, and never promised twice."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from specedge.engine.pages import PagePool, PageTable


class Pool(RuleBasedStateMachine):
    """Any order of opening, growing and closing."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(20, 16)
        self.longest: dict[PageTable, int] = {}

    @rule(target=tables, tokens=st.integers(1, 200))
    def open(self, tokens: int) -> PageTable | None:
        room = 20 - sum(t.limit for t in self.longest)
        table = self.pool.open(tokens)
        assert (table is not None) == (-(-tokens // 16) <= room)
        if table is not None:
            self.longest[table] = tokens
        return table

    @rule(table=tables, share=st.floats(0, 1))
    def grow(self, table: PageTable | None, share: float) -> None:
        if table in self.longest:
            tokens = int(self.longest[table] * share)
            table.grow(tokens)
            assert len(table.pages) >= -(-tokens // 16)

    @rule(table=consumes(tables))
    def close(self, table: PageTable | None) -> None:
        if table in self.longest:
            del self.longest[table]
            table.close()

    @invariant()
    def check(self) -> None:
        self.pool.check()


TestPool = Pool.TestCase


def test_locate_crosses_pages() -> None:
    pool = PagePool(4, 16)
    table = pool.open(40)
    assert table is not None
    table.grow(40)
    assert table.locate(14, 18) == ([table.pages[0]] * 2 + [table.pages[1]] * 2, [14, 15, 0, 1])


def test_a_table_cannot_grow_past_its_promise() -> None:
    table = PagePool(4, 16).open(16)
    assert table is not None
    with pytest.raises(AssertionError, match="promised"):
        table.grow(17)


def test_check_finds_a_lost_page() -> None:
    pool = PagePool(4, 16)
    pool.take()
    with pytest.raises(AssertionError, match="lost"):
        pool.check()
