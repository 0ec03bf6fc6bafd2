"""Drafter: one tree per session that never stops growing.

A node is a drafted token; it starts as a candidate on its session's heap, and becomes a live row when a draft forward expands it: then its K/V
stands in the row buffer and its best children join the heap. Submitting names the best nodes so far; while the verdict is in flight the same
heap goes on growing, so what grows next is the likeliest outcome. A verdict re-roots the tree: on a hit the subtree of the new root stays, K/V
and all; on a miss only the accepted path does. (Best-first growth: SpecExec, arXiv 2406.02532; the outcome cache is field rule 2.3.)

Knows nothing of sockets, clocks or the target. Invariant: pages hold the K/V of tokens 0 .. computed-1, the row buffer that of the live rows,
each as recomputation would give it; an unexpanded root has no live rows.
"""

import heapq
import math
import threading
import time
from bisect import insort
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from specedge.config import MAX_ROWS_PER_TREE, DraftConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.calibration import Calibration
from specedge.engine.graphs import make_scorer
from specedge.engine.growing import Node, Session
from specedge.engine.hub import locate
from specedge.engine.model import Abandoned
from specedge.engine.pace import Pace, Served, beyond, gain, optimum
from specedge.engine.pages import PagePool
from specedge.engine.runner import Runner
from specedge.engine.sampler import Ask
from specedge.engine.texts import UseError
from specedge.text import Tokenizer
from specedge.tree import EMPTY, NUMBERS, TokenTree, make_tree

START, BRIEF = 4, 0.03  # forwards of a tree, and seconds for them, as long as no round has been timed
TRIED, TRIES = (4, 1, 2), 48  # these parts of the rows that a tree may have, in turn, until it is known what they cost: so many rounds at most
OFTEN, SELDOM = 8, 0.004  # times in a round, and seconds between two, at most and least that a server is told what has grown
SHORT = 0.004  # seconds for which a verdict may be kept waiting by a forward
UNLIKELY = math.log(1e-3)  # a child below this is not kept: it would be the 1000th guess, and costs as much to sort as the first


class Drafter:
    """Grows trees for up to `config.max_sessions` sessions with one small model. One thread at a time may use it. Close it, or use it as a context
    manager."""

    def __init__(
        self, runner: Runner, config: DraftConfig, tokenizer: Tokenizer | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:  # fmt: skip
        self.runner, self.config, self.tokenizer = runner, config, tokenizer
        self.pace = Pace()
        self._clock = clock
        self._vocab = vocab = runner.model.config.vocab
        self.pool = PagePool(runner.sizes.pages, runner.sizes.page_size)
        ids = tokenizer.size if tokenizer else vocab
        self._score = make_scorer(runner, ids, config.max_sessions, config.width, config.tau, config.branch)
        self._regions = [i * MAX_ROWS_PER_TREE for i in range(config.max_sessions)][::-1]
        self._sessions: list[Session] = []
        self._made = 0  # nodes, for their order
        self._rounds = 0  # trees submitted
        self._ended = self._took = 0.0  # the last forward
        self.lock = threading.Lock()  # held by the Edge that drafts with it
        self.closed = False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: DraftConfig | None = None, *, device: str | None = None, dtype: str | None = None,
        revision: str | None = None, progress: bool = False,
    ) -> "Drafter":  # fmt: skip
        """Load a draft model from a Hugging Face directory or a hub id at a `revision`; errors as in Engine.from_pretrained."""
        config, path = config or DraftConfig(), locate(path, revision)
        rows = config.max_sessions * MAX_ROWS_PER_TREE
        runner = Runner.load(path, config.engine, rows, device, dtype, progress)
        return cls(runner, config, Tokenizer.from_dir(path, runner.model.config.vocab))

    def close(self) -> None:
        """Forget every session and let go of pages and weights; `open` raises UseError from then on. A second call does nothing."""
        if not self.closed:
            for session in list(self._sessions):
                self.cancel(session)
            self.closed = True
            del self.runner, self._score

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------
    # sessions

    def open(
        self, tokens: list[int], params: SamplingParams, limit: int, stop: frozenset[int] = frozenset(), vocab: int | None = None,
        prompt_len: int | None = None,
    ) -> Session | None:  # fmt: skip
        """A session on `tokens`, `prompt_len` of them the prompt (None: all), whose text ends before `limit` tokens or at an id of `stop`, for a
        target of `vocab` ids (None: those of the draft). None: no room, go on without drafts. Raises UseError once the drafter is closed."""
        if self.closed:
            raise UseError("this drafter is closed: load it again")
        limit = min(limit, self.runner.context)
        if not self._regions or len(tokens) >= limit or max(tokens) >= self._vocab:
            return None
        reserved = sum(max(self.pool.pages_for(s.limit), len(s.table.pages)) for s in self._sessions)
        if reserved + self.pool.pages_for(limit) > self.pool.total:
            return None
        table, computed = self.pool.open(tokens)
        root, base = self._node(tokens[-1], None, 0.0), self._regions.pop()
        p = prompt_len or len(tokens)
        calibration = Calibration(min(self.config.branch, self._vocab))
        session = Session(list(tokens), params.with_seed(), p, limit, stop, vocab or self._vocab, table, base, root, calibration, computed)
        self._sessions.append(session)
        return session

    def cancel(self, session: Session) -> None:
        """Forget a session and free what it holds; one that is not here any more is left as it is."""
        if session not in self._sessions:
            return
        self._sessions.remove(session)
        self._regions.append(session.base)
        session.table.close()

    def ready(self, *sessions: Session) -> bool:
        """Whether another forward before the next submit of these, which wait for each other, would not pay: it would if the tokens that it adds to
        their trees are more than all of them would get in its time."""
        live = [s for s in sessions if not s.exhausted and not s.asleep]
        if not live or self.config.tree_size == 0:
            return True
        if any(s.root.slot < 0 for s in live):
            return False
        growing = [s for s in live if self._growable(s)]
        if not growing or self.config.depth is not None:
            return all(s.forwards >= (self.config.depth or 0) for s in growing)
        if not self.pace.known:
            return all(s.forwards >= START or s.forwards * self._took >= BRIEF for s in growing)
        forward = self.pace.draft.predict(min(self.config.width, sum(len(s.heap) for s in growing)), sum(len(s.tokens) for s in growing))
        lost = 1 - self.pace.kept if self.config.proactive else 1.0  # what is not grown now will be in flight
        return lost * sum(map(self._gain, growing)) <= forward * sum(map(self._per_second, live))

    def behind(self, session: Session) -> bool:
        """Whether it takes more than one forward to read what the text has so far."""
        return len(session.tokens) - session.computed > MAX_ROWS_PER_TREE and not session.exhausted

    def size(self, session: Session, most: int) -> int:
        """How many nodes, at most `most`, the next tree should have."""
        most = min(most, self.config.tree_size)
        if self.config.depth is not None:
            return most
        if self.trying:
            return max(1, (most + 1) // TRIED[self._rounds % len(TRIED)]) - 1
        rate = session.rate
        outside = rate.outside / rate.rounds if rate.rounds else self.pace.around
        n = optimum(self._scores(session, most)[::-1], outside, self.pace.verify, session.others, len(session.tokens))
        return min(most, beyond(n, self.pace.verify, session.others))

    @property
    def trying(self) -> bool:
        """Whether trees of several sizes are tried in turn, because nobody knows yet what rows cost."""
        return not self.pace.verify.confident and self._rounds < TRIES

    def sleep(self, session: Session, asleep: bool) -> None:
        """Stop, or begin again, to draft for a session whose text somebody else continues; what comes of it is still told by `verdict`."""
        session.asleep = asleep
        session.since = None

    def submit(self, session: Session, nodes: int) -> TokenTree:
        """The best `nodes` nodes, in falling score order; the session then awaits `verdict`."""
        best = self._best(session, nodes)
        row = {id(n): i for i, n in enumerate(best, 1)} | {id(session.root): 0}
        session.submitted, session.size, session.sent, session.unasked = best, len(best), self._clock(), False
        session.number(best)
        session.tellings = 0
        self._rounds += 1
        return make_tree([n.token for n in best], [row[id(n.parent)] for n in best]) if best else EMPTY

    @property
    def tells(self) -> bool:
        """Whether servers are to hear what grows while they verify. Not with a `depth`: they would go on with other trees than were asked for."""
        return self.config.ahead and self.config.proactive and self.config.depth is None and self.config.tree_size > 0

    def more(self, session: Session) -> tuple[int, list[tuple[int, int, int]]]:
        """What has grown since a server was last told: the number of the first node, and the nodes as Session.news has them. None but at so many
        times in a round, spread over a step, or if there are no more numbers."""
        now, first = self._clock(), session.told + 1
        soon = now - session.told_at < max(SELDOM, self.pace.verify.predict(1, 0) / OFTEN)
        if soon or session.tellings >= OFTEN or session.told + len(session.nodes) >= NUMBERS:
            return first, []
        session.told_at, session.tellings = now, session.tellings + 1
        return first, session.news()

    def verdict(
        self, session: Session, tokens: list[int], served: Served | None = None, ahead: int | None = None, anew: bool = False
    ) -> bool:  # fmt: skip
        """By the target `tokens` follow the root: the path that was accepted and the token that closes it. `served`: how they were verified, if that
        is known. `ahead`: the server has begun the next round by itself, with a tree of so many nodes that it was told of; `anew`: but knows none
        below the new root. True: the new root had been drafted (a hit)."""
        self._timed(session, len(tokens), served)
        walked = [session.root]
        for token in tokens:
            for tried in walked[-1].children.values():  # one of them at most was right
                session.calibration.observe(tried.rank, tried.log_p, tried.token == token)
            child = walked[-1].children.get(token)
            if child is None:
                break
            walked.append(child)
        hit = len(walked) == len(tokens) + 1
        new = walked.pop() if hit else None
        self._commit(session, walked)
        session.tokens += tokens
        if max(tokens) >= self._vocab:
            session.limit = 0  # a token that this model does not know: nothing can follow it
        if session.submitted is not None and session.size:
            self.pace.rooted(new is not None and new.slot >= 0)
        session.submitted = None
        self._root(session, new or self._node(tokens[-1], None, 0.0), walked)
        if ahead is not None:
            session.submitted, session.size, session.sent, session.unasked, session.tellings = [], ahead, self._clock(), True, 0
            if anew:
                session.number([])
        depths = [n.depth for n in (session.root, *session.nodes) if n.slot >= 0]  # so deep have earlier forwards grown what is left
        session.forwards = max(depths) - session.root.depth + 1 if depths else 0
        return hit

    def _timed(self, session: Session, tokens: int, served: Served | None) -> None:
        """Learn from the times of a round."""
        now, since = self._clock(), session.since
        if served is not None:
            self.pace.verify.observe(served.rows, len(session.tokens), served.seconds)
        if session.submitted is None:
            session.since = None  # the next round does not begin where the last one with a tree has ended
            return
        if served is not None:
            session.others = served.others
            # it came during that forward, or in its second half; counted whole, forwards would grow
            hidden = self._took / (4 if self._score.stops else 2) if now - self._ended < SHORT / 4 else 0.0
            if not session.unasked and served.seconds <= now - session.sent:  # else the server began without asking, and nothing lies around the step
                self.pace.answered(now - session.sent - hidden - served.seconds)
            if since is not None and (session.unasked or served.seconds < now - since):  # rounds that nobody waits for last as long as their steps
                session.rate.add(tokens, max(now - since, served.seconds), served.seconds)
        session.since = now

    def _commit(self, session: Session, path: list[Node]) -> None:
        """Bring the K/V of the leading expanded nodes of `path`, which begins at the root, to pages."""
        rows = [session.base + n.slot for n in path if n.slot >= 0]  # below an unexpanded node there is no expanded one
        if rows:
            session.table.grow(session.computed + len(rows))
            self.runner.commit(rows, *session.table.locate(session.computed, session.computed + len(rows)))
            session.computed += len(rows)
            session.table.fill(session.tokens + [n.token for n in path[1:]], session.computed)

    def _root(self, session: Session, root: Node, path: list[Node]) -> None:
        """Make `root` the root: keep its subtree, free all other slots."""
        gone = sum(1 << n.slot for n in path if n.slot >= 0)
        root.parent, session.root = None, root
        kept, stack = list[Node](), [root]
        while stack:
            node = stack.pop()
            node.seen &= ~gone
            kept.append(node)
            stack.extend(node.children.values())
        session.nodes = kept[1:]
        live = {n.slot for n in kept if n.slot >= 0}
        session.free = [s for s in range(MAX_ROWS_PER_TREE) if s not in live]  # sorted, so a heap
        session.heap = [(-n.score, n.order, n) for n in session.nodes if n.slot < 0]
        heapq.heapify(session.heap)
        session.best = sorted(heapq.nlargest(self.config.tree_size, [n.score for n in session.nodes]))

    # ------------------------------------------------------------------------------------------------------------------
    # growth

    def grow(self, stop: Callable[[], bool] | None = None) -> bool:
        """One draft forward over all sessions; False if nothing has come of it. `stop`: whether a verdict is there. While nobody waits for a tree it
        is asked between layers, where the device allows that, and in the first half of a forward a yes ends it, as if it had never begun: beyond,
        more is lost than is left. (TPOT of one edge 65.0 ms without, 62.8 so, 62.6 if all of the forward may be lost, but then many sessions, whose
        verdicts come one after the other, would never get to grow.)"""
        begun = self._clock()
        batch = self.runner.batch()
        grown: list[tuple[Session, list[Node]]] = []  # the rows whose logits are wanted, in their order
        chains: list[tuple[Session, int]] = []
        for session in self._sessions:
            if session.root.slot < 0 and not session.exhausted and not session.asleep and batch.rows < self.runner.sizes.max_rows:
                chains.append((session, self._add_chain(batch, session, grown)))
        for session, nodes in self._pick():
            self._add_nodes(batch, session, nodes)
            grown.append((session, nodes))
        if batch.rows == 0:
            return False
        rows, context = batch.rows, sum(len(s.tokens) for s, _ in grown)
        asks = [Ask(s.params, s.tokens, s.prompt_len, s.stop, [n.path() for n in nodes]) for s, nodes in grown]
        half = begun + self.pace.draft.predict(rows, context) / 2
        heed = None if stop is None or chains or self._awaited else lambda: self._clock() < half and stop()
        try:
            children = self._score(batch, asks, heed)
        except Abandoned:
            self._ungrow(grown)
            return False
        for session, length in chains:
            read = list(range(session.base, session.base + length))
            self.runner.commit(read, *session.table.locate(session.computed, session.computed + length))
            session.computed += length
            session.table.fill(session.tokens, session.computed)
        if grown:
            self._branch(grown, *children)
        self._ended = self._clock()
        self._took = self._ended - begun
        self.pace.draft.observe(rows, context, self._took)
        return True

    def pause(self) -> float:
        """Seconds for which nothing should be grown, because a verdict is due before half of a forward were over: whoever waits for the next tree
        would wait for that forward."""
        left, forward = self._due(), self.pace.draft.predict(1, 0)
        return left + SHORT / 4 if 0 < left < forward / 2 else 0.0

    def _due(self) -> float:
        """Seconds until the next verdict is expected; infinite if somebody waits for a tree meanwhile, or nobody knows, negative if it is late."""
        flying = [s for s in self._sessions if s.submitted is not None and not s.asleep and not s.exhausted]
        if not flying or not self.pace.known or self._awaited:
            return math.inf
        verify, around = self.pace.verify, self.pace.around
        due = min(s.sent + (0.0 if s.unasked else around) + verify.predict(s.others + s.size + 1, len(s.tokens)) for s in flying)
        return due - self._clock()

    @property
    def _awaited(self) -> bool:
        """Whether somebody waits for a tree."""
        return any(s.submitted is None and not s.asleep and not s.exhausted for s in self._sessions)

    def _add_chain(self, batch: BatchBuilder, session: Session, grown: list[tuple[Session, list[Node]]]) -> int:
        """Rows for tokens that have no K/V, up to and with the root if they fit; returns how many are to be committed."""
        size = min(len(session.tokens) - session.computed, self.runner.sizes.max_rows - batch.rows, MAX_ROWS_PER_TREE)
        stop = session.computed + size
        last = stop == len(session.tokens)
        session.table.grow(stop)
        slots = [session.base + i for i in range(size)]
        batch.add(
            session.tokens[session.computed : stop], list(range(session.computed, stop)), slots, (session.base, size), session.computed,
            session.table.pages, None, [size - 1] if last else [],
        )  # fmt: skip
        if last:
            session.root.slot, session.root.seen = size - 1, 1 << size - 1
            session.free = [s for s in range(MAX_ROWS_PER_TREE) if s != size - 1]
            grown.append((session, [session.root]))
        return size - last

    def _growable(self, session: Session) -> bool:
        return session.root.slot >= 0 and bool(session.heap) and bool(session.free) and not session.asleep

    def _pick(self) -> list[tuple[Session, list[Node]]]:
        """The best candidates over all sessions; sessions that await no verdict come first, for somebody waits for them. As many as make the most of
        a second: the largest (sum of their scores) / (time of the forward), and at most `width`; that many until it is known what rows cost. A
        session whose best candidate is worth no row is passed over, for those behind may be worth theirs."""
        picked: dict[int, list[Node]] = {}
        front = [(s.submitted is not None, s.heap[0][0] + s.root.score, i) for i, s in enumerate(self._sessions) if self._growable(s)]
        if not self.config.proactive:
            front = [f for f in front if not f[0]]
        heapq.heapify(front)
        total, n, context, cost = 0.0, 0, 0, self.pace.draft
        while front and n < self.config.width:
            flying, score, i = heapq.heappop(front)
            session, p = self._sessions[i], math.exp(-score)
            if cost.confident and p * cost.predict(n, context) < total * cost.slope(n):
                continue
            total, n, context = total + p, n + 1, context + (0 if i in picked else len(session.tokens))
            node = heapq.heappop(session.heap)[2]
            node.slot = heapq.heappop(session.free)
            assert node.parent is not None
            node.seen = node.parent.seen | 1 << node.slot
            picked.setdefault(i, []).append(node)
            if self._growable(session):
                heapq.heappush(front, (flying, session.heap[0][0] + session.root.score, i))
        return [(self._sessions[i], nodes) for i, nodes in picked.items()]

    def _ungrow(self, grown: list[tuple[Session, list[Node]]]) -> None:
        """Make candidates again of nodes whose forward was given up."""
        for session, nodes in grown:
            for node in nodes:
                heapq.heappush(session.free, node.slot)
                heapq.heappush(session.heap, (-node.score, node.order, node))
                node.slot, node.seen = -1, 0

    def _add_nodes(self, batch: BatchBuilder, session: Session, nodes: list[Node]) -> None:
        """One row for each node; its keys are the session's pages and the live rows among its ancestors."""
        at = len(session.tokens) - 1 - session.root.depth
        span = max(n.seen for n in nodes).bit_length()
        batch.add(
            [n.token for n in nodes], [at + n.depth for n in nodes], [session.base + n.slot for n in nodes], (session.base, span),
            session.computed, session.table.pages, [n.seen for n in nodes], list(range(len(nodes))),
        )  # fmt: skip

    def _branch(self, grown: list[tuple[Session, list[Node]]], values: list[list[float]], tokens: list[list[int]]) -> None:
        """Give every grown node its best children: of each row their log-probabilities and ids."""
        log_p, first = np.array(values, np.float32), 0
        for session, nodes in grown:
            mine = slice(first, first := first + len(nodes))
            scores = session.calibration.log_acceptances(log_p[mine]).tolist()
            for node, raw, score, ids in zip(nodes, values[mine], scores, tokens[mine], strict=True):
                position = len(session.tokens) - session.root.depth + node.depth
                if position <= session.limit - 2:  # token limit-1 closes the text, so no node can be accepted there
                    self._add_children(session, node, raw, score, ids)
            session.forwards += 1

    def _add_children(self, session: Session, node: Node, raw: list[float], values: list[float], ids: list[int]) -> None:
        best, most = session.best, max(1, self.config.tree_size)
        for rank, (log_p, value, token) in enumerate(zip(raw, values, ids, strict=True)):
            if log_p > UNLIKELY and token < session.vocab and token not in session.stop:
                child = self._node(token, node, node.score + value, rank, log_p)
                node.children[token] = child
                session.nodes.append(child)
                heapq.heappush(session.heap, (-child.score, child.order, child))
                if len(best) < most or child.score > best[0]:
                    insort(best, child.score)
                    del best[:-most]

    # ------------------------------------------------------------------------------------------------------------------
    # nodes

    def _node(self, token: int, parent: Node | None, score: float, rank: int = 0, log_p: float = 0.0) -> Node:
        self._made += 1
        return Node(token, parent, score, self._made, parent.depth + 1 if parent else 0, rank, log_p)

    def _best(self, session: Session, n: int) -> list[Node]:
        if n <= len(session.best):
            nodes = [node for node in session.nodes if node.score >= session.best[len(session.best) - n]] if n else []
        else:
            nodes = session.nodes
        return sorted(nodes, key=lambda node: (-node.score, node.order))[:n]

    # ------------------------------------------------------------------------------------------------------------------
    # what pays

    def _scores(self, session: Session, n: int) -> list[float]:
        """Of the `n` best nodes, rising: the estimated probability that verification reaches them."""
        return [math.exp(score - session.root.score) for score in session.best[len(session.best) - min(n, len(session.best)) :]]

    def _gain(self, session: Session) -> float:
        """Expected tokens that another forward would add to the next tree."""
        first = sorted(session.heap[: 2 * self.config.width])[: self.config.width]  # nearly the best: the front of a heap, not its order
        rows = [math.exp(-score - session.root.score) for score, _, _ in first]
        size = max(1, session.size)
        return gain(self._scores(session, size), rows, session.calibration.usual[:4], size)

    def _per_second(self, session: Session) -> float:
        """Tokens per second: of the last rounds, or, while there are none, of this one."""
        if session.rate.seconds:
            return session.rate.per_second
        away = self.pace.away(session.others + session.size + 1, len(session.tokens))
        return (1 + sum(self._scores(session, session.size))) / away


def check_given(draft: object, **given: object) -> None:
    """ValueError for what would not be heeded beside a Drafter that is loaded already."""
    for name, value in given.items():
        if isinstance(draft, Drafter) and value is not None:
            raise ValueError(f"{name} is given, but the Drafter has its own already: leave one of them out")
