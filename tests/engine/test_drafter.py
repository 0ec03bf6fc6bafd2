"""The drafter's books, with a fake model whose K/V tell what they were computed from, over hundreds of random rounds.

The K/V of a row is a hash of the whole path of tokens that it saw; a forward pass of the fake finds that path by reading the K/V it is shown,
so a wrong slot, page, ancestor bit or position shows up at once.
"""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specedge.config import MAX_ROWS_PER_TREE, DraftConfig, EngineConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.cost import CostModel
from specedge.engine.drafter import OFTEN, Drafter
from specedge.engine.growing import STEEP, STEPS, WORTHY, Session
from specedge.engine.mirror import Mirror
from specedge.engine.model import Abandoned
from specedge.engine.pace import Served
from specedge.kernels import gumbel
from specedge.tree import GROWN, NUMBERS

VOCAB = 24


def digests(path: list[int]) -> list[int]:
    """The fake's K/V of every token of `path`."""
    values = [0]
    for token in path:
        values.append((values[-1] * 1_000_003 + token + 1) % (2**61 - 1))
    return values[1:]


def digest(path: list[int]) -> int:
    """The fake's K/V of the last token of `path`."""
    return digests(path)[-1]


class FakeRunner:
    """Stands in for engine.runner.Runner: pages and row buffer hold (digest, position), logits are a table of the path's digest."""

    def __init__(self, rows: int, context: int = 400, page_size: int = 16, max_rows: int = 48, pages: int = 128) -> None:
        self.sizes = EngineConfig(kv_tokens=pages * page_size, page_size=page_size, max_rows=max_rows)
        self.context = context
        self.device = torch.device("cpu")
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB))
        self.k_pos = np.full(rows, -1, np.int32)
        self.rows: list[int | None] = [None] * rows
        self.pages = [[None] * page_size for _ in range(self.sizes.pages)]
        self.forwards: list[int] = []  # rows of every pass
        self.paths = {0: list[int]()}  # digest -> path

    def batch(self) -> BatchBuilder:
        return BatchBuilder(self.k_pos)

    def run(self, builder: BatchBuilder, stop: Callable[[], bool] | None = None) -> torch.Tensor:
        b = builder.build(self.device)
        self.forwards.append(len(b.tokens))
        size = self.sizes.page_size
        for s, (q0, nq, k0, nk, prefix, causal) in enumerate(b.segments.tolist()):
            pages = b.page_table[s].tolist()
            for i in range(nq):
                seen = {t: self.pages[pages[t // size]][t % size] for t in range(prefix)}
                own = int(b.slots[q0 + i]) - k0
                for j in range(nk):
                    visible = j <= nk - nq + i if causal else int(b.anc[q0 + i, j // 64]) >> j % 64 & 1
                    if visible and j != own:
                        at = int(b.k_pos[k0 + j])
                        assert at not in seen, "two keys at one position"
                        seen[at] = self.rows[k0 + j]
                position = int(b.positions[q0 + i])
                assert sorted(seen) == list(range(position)), "the keys are not exactly the positions before this one"
                assert causal or (int(b.anc[q0 + i, own // 64]) >> own % 64) & 1, "a row must see itself"
                before = self.paths[seen[position - 1] if position else 0]  # type: ignore[index]
                assert [seen[at] for at in range(position)] == digests(before), "a key of another text"
                path = [*before, int(b.tokens[q0 + i])]
                value = digest(path)
                self.paths[value] = path
                self.rows[int(b.slots[q0 + i])] = value
        if stop is not None and stop():
            raise Abandoned
        return torch.stack([table(self.paths[self.rows[int(b.slots[r])]]) for r in b.wanted.tolist()]) if len(b.wanted) else torch.empty(0, VOCAB)  # type: ignore[index]

    def commit(self, rows: list[int], pages: list[int], offsets: list[int]) -> None:
        for row, page, offset in zip(rows, pages, offsets, strict=True):
            self.pages[page][offset] = self.rows[row]  # type: ignore[call-overload]


def table(path: list[int], sharpness: float = 2.5) -> torch.Tensor:
    """Logits after `path`: a table by its last three tokens."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(digest(path[-3:]))) * sharpness


def target(text: list[int], params: SamplingParams, wild: float, rng: np.random.Generator) -> int:
    """The token that the target samples after `text`: mostly as the draft would, with a share of surprises."""
    if rng.random() < wild:
        return int(rng.integers(0, VOCAB))
    logits = table(text)
    if params.greedy:
        return int(logits.argmax())
    return int((logits / params.temperature + gumbel(params.seed or 0, len(text), VOCAB)).argmax())


def audit(d: Drafter, s: Session) -> None:
    """Pages and row buffer hold what recomputation gives, and every slot, page and node is accounted for."""
    fake: FakeRunner = d.runner  # type: ignore[assignment]
    size = fake.sizes.page_size
    assert [fake.pages[s.table.pages[t // size]][t % size] for t in range(s.computed)] == digests(s.tokens[: s.computed])
    assert s.computed <= len(s.tokens) - 1
    live = [n for n in [s.root, *s.nodes] if n.slot >= 0]
    assert len({n.slot for n in live}) == len(live) == s.live <= MAX_ROWS_PER_TREE
    assert sorted([n.slot for n in live] + s.free) == list(range(MAX_ROWS_PER_TREE))
    assert not live or s.computed == len(s.tokens) - 1
    for node in live:
        path, bits, at = list[int](), 0, node
        while at is not s.root:
            path.append(at.token)
            bits |= 1 << at.slot
            assert at.parent is not None and at.parent.children[at.token] is at
            at = at.parent
        bits |= 1 << s.root.slot
        assert node.seen == bits
        assert fake.rows[s.base + node.slot] == digest(s.tokens + path[::-1])
        assert fake.k_pos[s.base + node.slot] == len(s.tokens) - 1 + len(path)
    assert sorted(n.order for _, _, n in s.heap) == sorted(n.order for n in s.nodes if n.slot < 0)
    for n in s.nodes:
        assert n.parent is not None and n.score <= n.parent.score
    d.pool.check()


def make(sessions: int = 1, **config: object) -> Drafter:
    c = DraftConfig(max_sessions=sessions, **config)  # type: ignore[arg-type]
    return Drafter(FakeRunner(sessions * MAX_ROWS_PER_TREE), c)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("wild", [0.0, 0.3, 1.0])
def test_random_rounds_keep_the_books(temperature: float, wild: float) -> None:
    rng = np.random.default_rng(int(wild * 10))
    d = make(3, width=5, branch=4)
    params = SamplingParams(temperature, 300, seed=3)
    sessions = {}
    hits = misses = 0
    for round_ in range(150):
        while len(sessions) < 3:
            prompt = rng.integers(0, VOCAB, int(rng.integers(1, 80))).tolist()
            s = d.open(prompt, params, len(prompt) + 300)
            assert s is not None
            sessions[id(s)] = s
        for _ in range(int(rng.integers(0, 6))):
            d.grow()
        for s in list(sessions.values()):
            if rng.random() < 0.3:
                continue
            tree = d.submit(s, int(rng.integers(0, 32)))
            tree.check(VOCAB)
            for _ in range(int(rng.integers(0, 4))):  # in flight, where a forward may be given up
                d.grow((lambda: True) if rng.random() < 0.3 else None)
            cut = tree.cut(int(rng.integers(0, len(tree) + 1)))  # by the server
            text, row, children = list(s.tokens), 0, cut.children()
            while (token := target(text, params, wild, rng)) in children[row]:
                row = children[row][token]
                text.append(token)
            tokens = [token]
            for _ in range(int(rng.integers(0, 3)) * (rng.random() < 0.2)):  # the server went on alone
                tokens.append(target(text + tokens, params, wild, rng))
            if d.verdict(s, (text + tokens)[len(s.tokens) :]):
                hits += 1
            else:
                misses += 1
                assert s.live == 0 and not s.nodes
            assert s.tokens == text + tokens
            audit(d, s)
            if len(s.tokens) > 250 or rng.random() < 0.02:
                d.cancel(s)
                del sessions[id(s)]
                d.pool.check()
        if round_ % 10 == 0:
            for s in sessions.values():
                audit(d, s)
    assert misses > 20 if wild else hits > 100


def grown(d: Drafter, prompt: list[int], params: SamplingParams | None = None, forwards: int = 4) -> Session:
    s = d.open(prompt, params or SamplingParams(max_tokens=100, seed=1), len(prompt) + 100)
    assert s is not None
    for _ in range(forwards):
        d.grow()
    return s


def test_a_hit_keeps_the_subtree_and_computes_nothing_again() -> None:
    d = make()
    s = grown(d, [1, 2, 3], forwards=6)
    fake: FakeRunner = d.runner  # type: ignore[assignment]
    tree = d.submit(s, 15)
    child = next(n for n in s.nodes if n.parent is s.submitted[0] and n.slot >= 0)  # type: ignore[index]
    below = {id(n) for n in s.nodes if n.slot >= 0 and n is not child and _under(n, child)}
    passes = len(fake.forwards)
    assert d.verdict(s, child.path())
    assert len(fake.forwards) == passes and s.root is child
    assert {id(n) for n in s.nodes if n.slot >= 0} == below
    assert s.tokens == [1, 2, 3, int(tree.tokens[0]), child.token]
    audit(d, s)


def _under(node: object, top: object) -> bool:
    while node is not None and node is not top:
        node = node.parent  # type: ignore[attr-defined]
    return node is top


def test_a_token_that_the_server_cut_is_a_hit() -> None:
    d = make()
    s = grown(d, [4, 5], forwards=5)
    tree = d.submit(s, 20)
    assert d.verdict(s, [int(tree.tokens[0])])
    audit(d, s)


def test_the_last_accepted_row_may_have_no_kv() -> None:
    d = make()
    s = grown(d, [1, 2, 3], forwards=3)
    d.submit(s, 31)
    leaf = next(i for i, n in enumerate(s.submitted or [], 1) if n.slot < 0)
    path = len(s.tokens) + (s.submitted or [])[leaf - 1].depth
    assert not d.verdict(s, [*s.submitted[leaf - 1].path(), 7])  # type: ignore[index]
    assert len(s.tokens) == path + 1 and s.computed == path - 1, "the leaf and the new root are to be computed"
    audit(d, s)
    fake: FakeRunner = d.runner  # type: ignore[assignment]
    d.grow()
    assert fake.forwards[-1] == 2
    audit(d, s)


def test_growth_stops_at_256_rows_and_goes_on_after_a_verdict() -> None:
    d = make(width=40, branch=24)
    s = d.open([1], SamplingParams(1.0, 300, seed=2), 301)
    assert s is not None
    while d.grow():
        assert s.live <= MAX_ROWS_PER_TREE
    assert s.live == MAX_ROWS_PER_TREE and s.heap
    audit(d, s)
    d.submit(s, 255)
    assert d.verdict(s, [(s.submitted or [])[0].token])
    assert s.live < MAX_ROWS_PER_TREE and d.grow()
    audit(d, s)


def test_trees_are_the_best_nodes_in_falling_order() -> None:
    d = make(width=6)
    s = grown(d, [9, 8, 7], forwards=7)
    scores = sorted((n.score for n in s.nodes), reverse=True)
    tree = d.submit(s, 20)
    assert [n.score for n in s.submitted or []] == scores[:20]
    tree.check(VOCAB)


@pytest.mark.parametrize("wild", [0.0, 0.3])
def test_a_server_that_is_told_has_the_same_tree(wild: float) -> None:
    """Over many rounds that it begins by itself, with what it was told by then, or with the root alone: what it holds below its root are nodes of the
    edge, under the same numbers, and the best ones first."""
    rng = np.random.default_rng(10)
    d = make(width=6, branch=4)
    d._clock = itertools.count().__next__  # type: ignore[assignment]  # so that it is always time to tell
    params = SamplingParams(0.8, 400, seed=3)
    s = grown(d, [1, 2, 3], params)
    s.limit = 400
    ahead = anew = late = 0
    tree = d.submit(s, 9)
    mirror = Mirror(tree, 1)
    for _ in range(150):
        held = list[tuple[int, list[tuple[int, int, int]]]]()  # what is on its way when the verdict is given
        for _ in range(int(rng.integers(0, 8))):
            d.grow()
            held.append(d.more(s))
        arrived = max(0, len(held) - int(rng.integers(0, 3)))
        for first, nodes in held[:arrived]:
            assert first == mirror.next
            mirror.add(mirror.since, first, [n[0] for n in nodes], [n[1] for n in nodes], [n[2] for n in nodes])
        text, row, children = list(s.tokens), 0, tree.children()
        while (token := target(text, params, wild, rng)) in children[row]:
            row = children[row][token]
            text.append(token)
        tokens = [*text, token][len(s.tokens) :]
        known = mirror.move(tokens)
        tree = mirror.begin(int(rng.integers(0, 7)))
        d.verdict(s, tokens, None, len(tree), not known)
        ahead, anew = ahead + known, anew + (not known)
        for first, nodes in held[arrived:]:  # after a new beginning it is of no use
            late += known
            if known:
                assert first == mirror.next
                mirror.add(mirror.since, first, [n[0] for n in nodes], [n[1] for n in nodes], [n[2] for n in nodes])
        own = {n.number: n for n in s.nodes if n.number}
        assert s.told + 1 == mirror.next
        theirs = {n: node for n, node in mirror._nodes.items() if n != mirror._root}
        assert {n: node.token for n, node in theirs.items()} == {n: node.token for n, node in own.items()}
        assert all(theirs[n].children == {t: c.number for t, c in node.children.items() if c.number} for n, node in own.items())
        audit(d, s)
        if len(s.tokens) > 380:
            break
    assert ahead > 12 and late > 10 and anew > 5, (ahead, late, anew)


def test_what_is_told_is_worth_it() -> None:
    """Every node that is reached once in a thousand times, the likeliest first, and none twice; at most OFTEN times in a step."""
    d = make(width=6, branch=8)
    now = [0.0]
    d._clock = lambda: now[0]
    s = grown(d, [1, 2, 3], forwards=2)
    d.submit(s, 3)
    now[0] = 1.0
    first, nodes = d.more(s)
    worthy = sum(n.score >= WORTHY for n in s.nodes) - 3
    assert first == 4 and len(nodes) == s.told - 3 == min(worthy, GROWN) > 5
    assert s.told < len(s.nodes), "and not the others"
    steps = {n.number: n.score for n in s.nodes if n.number}
    assert [steps[i] for i in range(4, s.told + 1)] == sorted((steps[i] for i in range(4, s.told + 1)), reverse=True)
    for i, (token, parent, step) in enumerate(nodes, 4):
        node = next(n for n in s.nodes if n.number == i)
        assert (token, parent) == (node.token, node.parent.number)  # type: ignore[union-attr]
        assert step == min(STEEP, round(STEPS * (node.parent.score - node.score)))  # type: ignore[union-attr]
    d.grow()
    assert d.more(s) == (s.told + 1, [])
    now[0] += 1.01 * d.pace.verify.predict(1, 0) / OFTEN
    assert 0 < len(d.more(s)[1]) <= GROWN
    now[0] += 1.0
    told, s.told = s.told, NUMBERS - len(s.nodes)
    d.grow()
    assert d.more(s)[1] == [], "there are no more numbers"
    s.told = told
    while s.tellings < OFTEN:
        now[0] += 1.0
        d.grow()
        assert d.more(s)[1]
    now[0] += 1.0
    d.grow()
    assert d.more(s)[1] == [], "not more often in a round"


@pytest.mark.parametrize("config", [{"ahead": False}, {"proactive": False}, {"depth": 3}, {"tree_size": 0}])
def test_who_tells_nothing(config: dict[str, object]) -> None:
    assert make().tells and not make(**config).tells


def test_many_sessions_share_one_forward() -> None:
    d = make(4, width=8)
    fake: FakeRunner = d.runner  # type: ignore[assignment]
    for i in range(4):
        assert d.open([i, i + 1], SamplingParams(max_tokens=50), 52)
    assert d.grow() and fake.forwards == [8]
    assert d.grow() and fake.forwards == [8, 8]
    assert d.open([1], SamplingParams(max_tokens=50), 51) is None, "all regions are taken"


def test_sessions_that_somebody_waits_for_come_first() -> None:
    d = make(2, width=4)
    a, b = grown(d, [1, 2], forwards=2), grown(d, [3, 4], forwards=2)
    d.submit(a, 7)
    before = a.live
    d.grow()
    assert a.live == before and b.live > 1


def test_without_proactive_nothing_grows_in_flight() -> None:
    d = make(proactive=False)
    s = grown(d, [1, 2])
    d.submit(s, 7)
    assert not d.grow()
    d.verdict(s, [20])
    assert d.grow()


def test_nodes_that_can_never_be_accepted_are_not_drafted() -> None:
    d = make()
    s = d.open([1, 2, 3], SamplingParams(max_tokens=4, seed=1), 7, stop=frozenset(range(0, VOCAB, 2)))
    assert s is not None
    while d.grow():
        pass
    assert s.nodes and all(n.token % 2 for n in s.nodes), "a stop id closes a text, it is never inside"
    assert max(n.depth for n in s.nodes) == 3, "token 4 of 4 closes the text"


def test_a_text_longer_than_the_drafts_context_goes_on_without_drafts() -> None:
    d = Drafter(FakeRunner(256, context=40), DraftConfig(max_sessions=1))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=100, seed=1)
    s = d.open(list(range(20)), params, 120)
    assert s is not None
    rng = np.random.default_rng(0)
    while not s.exhausted:
        while not d.ready(s) and d.grow():
            pass
        tree = d.submit(s, 15)
        d.verdict(s, [target(s.tokens, params, 0.5, rng)])
        audit(d, s)
    assert d.ready(s) and not d.grow() and len(s.tokens) >= 40
    tree = d.submit(s, 15)
    assert len(tree) == 0
    d.verdict(s, [1, 2, 3])
    d.cancel(s)
    d.pool.check()


def test_a_fixed_size_of_zero_drafts_nothing() -> None:
    d = make(tree_size=0)
    s = d.open([1], SamplingParams(max_tokens=9), 10)
    assert s is not None and d.ready(s) and len(d.submit(s, 0)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# what pays, in virtual time


LAYERS = 5  # after each of which a forward may be stopped


class PacedRunner(FakeRunner):
    """A fake whose forwards take virtual time: `base` seconds and `row` for each row."""

    now = 0.0
    base, row = 0.004, 0.0

    def run(self, builder: BatchBuilder, stop: Callable[[], bool] | None = None) -> torch.Tensor:
        takes, begun = self.base + self.row * builder.rows, self.now
        for i in range(LAYERS if stop else 0):
            self.now = begun + takes * (i + 1) / LAYERS
            if stop and stop():
                raise Abandoned
        self.now = begun + takes
        return super().run(builder)


def paced(sessions: int = 1, **config: object) -> tuple[Drafter, PacedRunner]:
    runner = PacedRunner(sessions * MAX_ROWS_PER_TREE)
    c = DraftConfig(max_sessions=sessions, **config)  # type: ignore[arg-type]
    return Drafter(runner, c, clock=lambda: runner.now), runner  # type: ignore[arg-type]


def rounds(d: Drafter, world: PacedRunner, around: float, verify: float, row: float, count: int = 60, stop: bool = True) -> dict[str, float]:
    """Draft a text of a target that mostly agrees; averages over the second half of the rounds. `stop`: whether a verdict may end a forward."""
    params, rng = SamplingParams(0.0, 390, seed=3), np.random.default_rng(1)
    s = d.open([1, 2, 3], params, 393)
    assert s is not None
    total = {"forwards": 0.0, "nodes": 0.0, "seconds": 0.0, "tokens": 0.0, "kept waiting": 0.0}
    for i in range(count):
        if len(s.tokens) > 350:
            d.cancel(s)
            s = d.open([1, 2, 3], params, 393)
            assert s is not None
        begun, known, forwards = world.now, len(s.tokens), 0
        while not d.ready(s) and d.grow():
            forwards += 1
        tree = d.submit(s, d.size(s, 255))
        took = verify + row * (len(tree) + 1)
        arrival = world.now + around + took
        while world.now < arrival:
            if pause := d.pause():
                world.now = min(arrival, world.now + pause)
            elif not d.grow(lambda arrival=arrival: stop and world.now >= arrival):  # type: ignore[misc]
                world.now = max(world.now, arrival)
        text, at, children = list(s.tokens), 0, tree.children()
        while (token := target(text, params, 0.1, rng)) in children[at]:
            at = children[at][token]
            text.append(token)
        waited = world.now - arrival
        d.verdict(s, [*text, token][len(s.tokens) :], Served(took, len(tree) + 1))
        if i >= count // 2:
            for name, value in zip(total, (forwards, len(tree), world.now - begun, len(s.tokens) - known, waited), strict=True):
                total[name] += value / (count - count // 2)
    d.cancel(s)
    return total


def test_a_dear_draft_grows_less_than_a_cheap_one() -> None:
    found = {}
    for base in (0.0005, 0.02, 0.2):
        d, world = paced(proactive=False)
        world.base = base
        found[base] = rounds(d, world, 0.05, 0.02, 0.0)["forwards"]
    assert found[0.0005] > found[0.02] > found[0.2] > 0.99


def test_forwards_are_as_wide_as_rows_are_cheap() -> None:
    found = {}
    for row in (0.0, 0.005, 0.02):
        d, world = paced()
        world.base, world.row = 0.02, row
        s = grown(d, [1, 2, 3], SamplingParams(1.0, 100, seed=2), forwards=3)
        d.pace.draft = CostModel()
        for rows in (1, 8, 32) * 8:
            d.pace.draft.observe(rows, 0, 0.02 + row * rows)
        nodes = d._pick()[0][1]
        found[row] = len(nodes)
        p = sorted((math.exp(n.score - s.root.score) for n in [*nodes, *(n for _, _, n in s.heap)]), reverse=True)
        best = max(range(1, 33), key=lambda n: sum(p[:n]) / d.pace.draft.predict(n, 0))
        assert [n.score for n in nodes] == sorted((n.score for n in nodes), reverse=True) and abs(len(nodes) - best) <= 1
    assert found[0.0] == 32 > found[0.005] > found[0.02] >= 1


def test_who_has_nothing_worth_a_row_does_not_keep_it_from_others() -> None:
    """Candidates of a session that somebody waits for come first; where the next of them costs more than it brings, the others have their turn."""
    d, _ = paced(2)
    awaited, flying = grown(d, [1, 2, 3], forwards=2), grown(d, [3, 2, 1], forwards=2)
    d.submit(flying, 0)
    awaited.heap = [(score + 5.0, order, node) for score, order, node in awaited.heap]  # poor by exp(-5)
    for node in awaited.nodes:
        node.score -= 5.0
    d.pace.draft = CostModel()
    for rows in (1, 8, 32) * 8:
        d.pace.draft.observe(rows, 0, 0.02 + 0.002 * rows)
    good = sum(math.exp(-score - flying.root.score) > 0.1 for score, _, _ in flying.heap)
    picked = {id(s): len(nodes) for s, nodes in d._pick()}
    assert 0 < good <= picked[id(flying)]


def test_what_grows_in_flight_need_not_grow_before() -> None:
    """The more often a verdict keeps what has grown, the sooner a tree goes out."""
    d, world = paced()
    s = grown(d, [1, 2, 3], forwards=2)
    d.pace.verify.observe(8, 10, 0.03)
    d.pace.answered(0.02)
    d.pace.draft.observe(8, 10, world.base)
    need = d._gain(s)
    d._per_second = lambda s: 0.5 * need / d.pace.draft.predict(32, 10)  # type: ignore[method-assign]
    assert not d.ready(s)
    for _ in range(60):
        d.pace.rooted(True)
    assert d.ready(s) and 0.9 < d.pace.kept <= 1
    for _ in range(60):
        d.pace.rooted(False)
    assert not d.ready(s) and d.pace.kept < 0.1


def test_only_a_root_that_was_grown_from_counts_as_kept() -> None:
    d, _ = paced()
    s = grown(d, [1, 2, 3], forwards=1)
    d.submit(s, 7)
    leaf = next(n for n in s.nodes if n.slot < 0 and n.parent is s.root)
    assert d.verdict(s, [leaf.token]) and d.pace.kept == 0.0, "a hit, of which nothing was drafted"
    d.grow()
    d.grow()
    d.submit(s, 7)
    grown_from = next(n for n in s.nodes if n.slot >= 0 and n.parent is s.root)
    assert d.verdict(s, [grown_from.token]) and d.pace.kept > 0


def test_dear_rows_make_small_trees() -> None:
    found = {}
    for row in (0.0, 0.03):
        d, world = paced(proactive=False)
        found[row] = rounds(d, world, 0.01, 0.02, row)["nodes"]
    assert found[0.0] > 28 and found[0.03] < 8


def test_a_verdict_does_not_wait_for_long() -> None:
    """A forward that would end behind it is not begun, and one that it meets in its first half is given up."""
    waited = {}
    for around in (0.031, 0.036, 0.041, 0.046):  # so that verdicts come at any moment of a forward
        for stop, due in ((True, True), (True, False), (False, False)):
            d, world = paced(width=4, branch=4)
            world.base = 0.02
            if not due:
                d._due = lambda: float("inf")  # type: ignore[method-assign]
            found = rounds(d, world, around, 0.02, 0.0, 24, stop)["kept waiting"]
            waited[stop, due] = waited.get((stop, due), 0.0) + found
    assert waited[True, True] < waited[True, False] < 0.6 * waited[False, False], waited


def state(d: Drafter, s: Session) -> object:
    """All that a drafter knows of a session, and of the time that things take."""
    nodes = [(n.token, n.order, n.score, n.slot, n.seen, n.depth, list(n.children)) for n in (s.root, *s.nodes)]
    heap, pace = sorted((score, order) for score, order, _ in s.heap), d.pace.draft
    return nodes, heap, sorted(s.free), list(s.best), s.forwards, s.computed, d.pool.available, d._ended, d._took, pace._seen, pace.predict(8, 0)


def test_a_forward_that_is_given_up_leaves_no_trace() -> None:
    d, world = paced()
    s = grown(d, [1, 2, 3])
    d.submit(s, 7)
    before, passes, now = state(d, s), len(world.forwards), world.now
    assert not d.grow(lambda: True) and state(d, s) == before
    assert world.now == pytest.approx(now + world.base / LAYERS) and len(world.forwards) == passes
    twin, other = paced()
    t = grown(twin, [1, 2, 3])
    twin.submit(t, 7)
    assert d.grow() and twin.grow() and state(d, s)[:5] == state(twin, t)[:5], "the same nodes are grown as if nothing had been"
    audit(d, s)


def test_only_the_first_half_of_a_forward_nobody_waits_for_is_given_up() -> None:
    d, world = paced(2)
    world.base = 0.01
    a, b = grown(d, [1, 2]), grown(d, [3, 4])
    d.submit(a, 7)
    assert d.grow(lambda: True), "the other waits for its tree"
    d.submit(b, 7)
    assert not d.grow(lambda: True)
    begun = world.now
    assert not d.grow(lambda: world.now > begun + 0.3 * world.base)
    begun = world.now
    assert d.grow(lambda: world.now > begun + 0.7 * world.base)
    for s in (a, b):
        audit(d, s)


def test_who_sleeps_is_not_drafted_for() -> None:
    d, _ = paced(2)
    a, b = grown(d, [1, 2]), grown(d, [3, 4])
    d.sleep(a, True)
    nodes = len(a.nodes)
    d.grow()
    assert len(a.nodes) == nodes and d.ready(a)
    d.verdict(a, [9, 9, 9])
    audit(d, a)
    d.sleep(b, True)
    assert not d.grow()
    d.sleep(a, False)
    assert not d.ready(a) and d.grow()
    audit(d, a)


def test_trees_grow_beyond_the_passes_that_were_seen() -> None:
    """Where all passes so far took the same time a larger one is tried, and it decides."""
    sizes = {}
    for row in (0.0, 0.02):
        d, _ = paced(tree_size=31)
        s = d.open([1, 2, 3], SamplingParams(0.0, 390, seed=3), 393)
        assert s is not None
        for _ in range(6):
            d.grow()
        for i in range(48):
            d.pace.verify.observe(1 + i % 8, 10, 0.1)
        tried = d.size(s, 31)
        assert 8 <= tried < 31
        for _ in range(24):
            d.pace.verify.observe(tried + 1, 10, 0.1 + row * (tried - 7))
        sizes[row] = d.size(s, 31)
    assert sizes[0.02] < tried < sizes[0.0]
