"""Line: who has pages and runs, who waits for some, and who gives them up.

Sequences are admitted in order of arrival, those of batch last, while there is room for what they hold already. When pages run out the latest
arrival is preempted and computed again later: that gives the same bits, so no text changes. Knows nothing of rows, trees or clocks: times are told.
Invariants: whoever came first is not preempted for another's growth, so somebody always gets on; who waits behind n others runs after n turns of at
most 2 * TURN, and the time that reading their tokens takes.
"""

from specedge.engine.pages import OutOfPages, PagePool
from specedge.engine.request import Sequence

TURN = 10.0  # seconds that sequences have pages, once their known tokens are computed, before they give them up to who has waited as long


class Line:
    """The sequences of one engine. At most `most` run."""

    def __init__(self, pool: PagePool, most: int) -> None:
        self.waiting: list[Sequence] = []  # by their order
        self.running: list[Sequence] = []  # longest waiting for a step first
        self.pool, self._most = pool, most
        self.opened = 0  # sequences so far
        self._places = 0  # in the line that were given

    def join(self, s: Sequence, now: float) -> None:
        """A new sequence waits."""
        self.opened += 1
        s.number, s.since, s.keys = self.opened, now, self.pool.keys(s.tokens, s.account.name)
        self._to_the_end(s)
        self.waiting.append(s)

    def leave(self, s: Sequence) -> None:
        """Forget a sequence, if it is here, and free what it holds."""
        for group in (self.waiting, self.running):
            if s in group:
                group.remove(s)
        if s.table is not None:
            s.table.close()
            s.table = None

    def served(self, s: Sequence) -> None:
        """It got a token: among those who run it is the last again."""
        self.running.remove(s)
        self.running.append(s)

    def admit(self, now: float) -> None:
        """Move sequences from waiting to running while there is room. Who makes room goes to the end of the line."""
        for s in self.waiting:
            if not s.wants_pages:
                s.since = now
        while (first := self.admissible(now)) is not None:
            while not self._fits(first, self.running):
                last = min((r for r in self.running if _yields(r, first, now)), key=lambda r: (not r.batch, r.since))
                self._to_the_end(last)
                self.preempt(last, now)
            self.waiting.remove(first)
            first.table, first.computed = self.pool.open(first.tokens, first.account.name)
            first.parked, first.since = False, now
            self.running.append(first)

    def _to_the_end(self, s: Sequence) -> None:
        self._places += 1
        s.order = self._places

    def admissible(self, now: float) -> Sequence | None:
        """The next that waits, if there is room beside those who do not yield to it."""
        first = self.next()
        return first if first is not None and self._fits(first, [s for s in self.running if not _yields(s, first, now)]) else None

    def next(self) -> Sequence | None:
        """The first that waits and would run, those of batch last. One that begins with a page which is being computed right now lets others pass:
        soon it finds that page and need not compute it again."""
        if not self.waiting:
            return None
        size = self.pool.page_size
        started = [r for r in self.running if not r.held and r.computed // size < len(r.keys)]
        coming = {r.keys[r.computed // size] for r in started}
        soon = {r.keys[r.computed // size] for r in started if not r.batch}  # batch may stand still
        for batch, pages in ((False, soon), (True, coming)):
            for s in self.waiting:
                if s.batch == batch and s.wants_pages and pages.isdisjoint(s.keys):
                    return s
        return None

    def _fits(self, s: Sequence, others: list[Sequence]) -> bool:
        """Whether there is room for `s` if of those who run `others` alone stay, with all their tokens and a page to spare for each: else it would be
        preempted soon."""
        room = self.pool.available
        if len(others) < len(self.running):
            room += len(_pages(self.running) - _pages(others))
        owed = sum(1 + max(0, self.pool.pages_for(len(o.tokens)) - len(o.table.pages)) for o in others if o.table)
        return len(others) < self._most and (not others or self.pool.pages_for(len(s.tokens)) + owed <= room)

    def reserve(self, s: Sequence, tokens: int, at_work: list[Sequence], now: float) -> bool:
        """Pages for the first `tokens` of `s`, taken from the latest arrivals that are not `at_work` if need be, those of batch sequences first;
        False: `s` itself has to wait."""
        while s.table is not None:
            try:
                s.table.grow(tokens)
                return True
            except OutOfPages:
                busy = set(map(id, at_work))
                victim = max((r for r in self.running if id(r) not in busy), key=lambda r: (r.batch, r.order))
                if victim is s and len(self.running) == 1:
                    raise
                self.preempt(victim, now)
        return False

    def preempt(self, s: Sequence, now: float) -> None:
        """Back to those who wait, without pages; one that is idle waits for something to do first."""
        assert s.table is not None
        s.parked, s.since = s.idle, now
        s.table.close()
        s.table, s.read, s.computed = None, max(s.read, s.computed), 0
        self.running.remove(s)
        self.waiting.insert(sum(w.order < s.order for w in self.waiting), s)


def _yields(s: Sequence, other: Sequence, now: float) -> bool:
    """Whether `s`, which runs, gives way to `other`, which waits: batch to what is not, and who has had a turn to who has waited for as long."""
    return s.batch > other.batch or (s.batch == other.batch and now - max(s.since, other.since) > TURN)


def _pages(sequences: list[Sequence]) -> set[int]:
    """What they hold together."""
    return {page for s in sequences if s.table for page in s.table.pages}
