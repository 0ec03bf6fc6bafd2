"""The scheduler, a pure function: budgets are kept, nobody starves, trees are answered whole where they can be."""

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specedge.engine.cost import CostModel
from specedge.engine.scheduler import CHUNK_BESIDE_TREES, LEAST, Grant, Want, chunk, fair_share, schedule, turns
from tests.engine.test_admission import Known
from tests.engine.test_cost import CPU, GPU, Law

WANTS = st.lists(st.builds(Want, chain=st.integers(1, 900), token=st.booleans(), nodes=st.integers(0, 255)), max_size=12)


@given(WANTS, st.integers(2, 1024))
def test_grants_keep_every_bound(wants: list[Want], max_rows: int) -> None:
    grants = schedule(wants, max_rows)
    assert sum(g.rows for g in grants) <= max_rows
    assert len({g.index for g in grants}) == len(grants)
    for g in grants:
        want = wants[g.index]
        assert g.rows > 0 and g.nodes <= want.nodes
        assert g.chain == want.chain if g.token else g.chain < want.chain
        assert want.token or not g.token
        assert g.nodes == 0 or (g.token and g.rows <= 256)


@given(WANTS, st.integers(2, 1024))
def test_the_first_that_has_work_is_served(wants: list[Want], max_rows: int) -> None:
    work = [i for i, w in enumerate(wants) if w.token or w.chain > 1]
    served = {g.index for g in schedule(wants, max_rows)}
    assert bool(served) == bool(work)
    ready = [i for i in work if wants[i].token and wants[i].chain + wants[i].nodes <= min(max_rows, 256)]
    if ready and ready[0] == work[0]:  # before it nobody could take a whole step with a tree that had to be cut
        assert ready[0] in served


@given(WANTS, st.integers(2, 256))
def test_everybody_is_served_in_the_end(wants: list[Want], max_rows: int) -> None:
    waiting = [w for w in wants if w.token or w.chain > 1]
    for _ in range(len(waiting) * 1200):
        grants = {g.index: g for g in schedule(waiting, max_rows)}
        assert grants
        waiting = [
            Want(w.chain - grants[i].chain, w.token, w.nodes) if i in grants else w
            for i, w in enumerate(waiting)
            if not (i in grants and grants[i].token)
        ]
        waiting = [w for w in waiting if w.token or w.chain > 1]
        if not waiting:
            break
    assert not waiting, "somebody waits for ever"


def test_a_short_prompt_and_its_tree_share_a_step() -> None:
    assert schedule([Want(20, True, 31)], 512) == [Grant(0, 20, True, 31)]


def test_a_long_prompt_comes_before_its_tree() -> None:
    assert schedule([Want(250, True, 31)], 512) == [Grant(0, 249, False)]
    assert schedule([Want(1, True, 31)], 512) == [Grant(0, 1, True, 31)]


def test_a_tree_larger_than_a_step_is_cut() -> None:
    assert schedule([Want(1, True, 200)], 100) == [Grant(0, 1, True, 99)]


def test_a_joining_prompt_leaves_room_for_rounds() -> None:
    grants = schedule([Want(5000, False), Want(1, True, 31)], 512)
    assert grants == [Grant(1, 1, True, 31), Grant(0, CHUNK_BESIDE_TREES, False)]


def test_a_plain_decode_takes_the_rest_of_its_prompt_in_one_go() -> None:
    assert schedule([Want(300, True)], 512) == [Grant(0, 300, True)]
    assert schedule([Want(600, True)], 512) == [Grant(0, 512, False)]


def test_the_rounds_of_many_do_not_starve_a_prompt() -> None:
    grants = schedule([Want(300, True, 31)] + [Want(1, True, 31)] * 17, 512)
    assert Grant(0, CHUNK_BESIDE_TREES, False) in grants and len(grants) >= 14


@given(WANTS, st.integers(2, 300), st.integers(0, 255))
def test_no_tree_takes_what_a_prompt_is_owed(others: list[Want], max_rows: int, nodes: int) -> None:
    """Without admission trees come whole, and the largest fills a step."""
    grants = schedule([Want(1, True, nodes), *others, Want(5000, False)], max_rows)
    if any(g.token for g in grants):
        prompts = [g.rows for g in grants if not g.token]
        assert sum(prompts) >= min(CHUNK_BESIDE_TREES, max_rows // 2)


def test_a_prompt_fills_the_rows_under_the_knee() -> None:
    gpu = Known(GPU)
    assert GPU[2] - 32 * 5 <= chunk(32 * 5, 5, 1, gpu) < 90, "20 rows are free, and a fifth of the step's time beside"
    cpu = Known(CPU)
    time = cpu.predict(32, 0)
    assert cpu.predict(32 + chunk(32, 1, 1, cpu), 0) <= 2 * time + CPU[1] < 2.2 * time, "as much time as the one that is verified has"
    assert chunk(32, 1, 5, cpu) == chunk(32, 1, 1, cpu), "and no more for several prompts together"
    assert chunk(128, 4, 1, cpu) == int(cpu.predict(128, 0) / 4 / CPU[1])


@given(st.integers(1, 4096), st.integers(1, 256), st.integers(1, 50), st.sampled_from([CPU, GPU, (0.02, 0.0, 4, 0.0)]))
def test_a_prompt_gets_on_beside_any_number_of_rounds(rows: int, answers: int, prompts: int, of: Law) -> None:
    cost = Known(of)
    got = chunk(rows, answers, prompts, cost)
    assert got >= LEAST
    if got > max(LEAST, of[2] - rows) and of[1]:
        assert cost.predict(rows + got, 0) <= 2 * cost.predict(rows, 0) * 1.0001


def test_a_prompt_alone_takes_whole_steps() -> None:
    assert schedule([Want(5000, False)], 512, cost=Known(CPU)) == [Grant(0, 512, False)]
    grants = schedule([Want(5000, False), Want(1, True, 7)], 512, cost=Known(CPU))
    assert grants == [Grant(1, 1, True, 7), Grant(0, chunk(8, 1, 1, Known(CPU)), False)]


def test_prompts_alone_leave_room_for_rounds_that_are_expected() -> None:
    (grant,) = schedule([Want(5000, False)], 512, cost=Known(CPU), expected=True)
    assert 3 < Known(CPU).predict(grant.rows, 0) / CPU[0] <= 4
    assert schedule([Want(5000, False)], 512, cost=CostModel(), expected=True) == [Grant(0, 512, False)], "nothing is known yet"


def test_a_short_prompt_does_not_stall_the_rounds_of_others() -> None:
    """It would fit a step with its tree, but on a CPU that step would take six times as long."""
    cost = Known(CPU)
    joins, round_ = Want(150, True, 31), Want(1, True, 15)
    grants = schedule([joins, round_], 512, cost=cost)
    assert grants == [Grant(1, 1, True, 15), Grant(0, chunk(16, 1, 1, cost), False)]
    assert schedule([joins], 512, cost=cost) == [Grant(0, 150, True, 31)]
    assert schedule([joins], 512, cost=cost, expected=True)[0].chain < 50
    assert schedule([replace(joins, chain=20), round_], 512, cost=Known(GPU))[0] == Grant(0, 20, True, 31)


@given(WANTS)
def test_one_account_is_served_in_order_of_waiting(wants: list[Want]) -> None:
    assert turns(wants, {}) == list(range(len(wants)))


def test_accounts_take_turns() -> None:
    """However many wants the greedy one has, and however long they wait: the second turn is the other's."""
    wants = [Want(1, True, 255, "greedy")] * 9 + [Want(1, True, 31, "ada"), Want(1, True, 7, "bob")]
    assert turns(wants, {})[:3] == [0, 9, 10]
    assert turns(wants, {"greedy": -256})[:3] == [9, 10, 0], "who had more than its share comes last"
    assert turns(wants, {"greedy": -256, "bob": 9})[:2] == [10, 9], "who is owed something first"


def test_trees_that_are_cut_keep_their_turns() -> None:
    """By their whole trees a comes once and b twice; by what is left of them it would be a's turn again, with a tree that nobody has judged."""
    whole = [Want(1, True, 255, "a"), Want(1, True, 255, "a"), Want(1, True, 1, "b"), Want(1, True, 1, "b")]
    order = turns(whole, {})
    assert order == [0, 2, 3, 1]
    cut = [replace(w, nodes=0) if i in order[:3] else w for i, w in enumerate(whole)]
    assert [g.index for g in schedule(cut, 512, {}, None, 3, False, order)] == [0, 2, 3]
    assert turns(cut, {}) == [0, 2, 1, 3]


def rounds(trees: list[list[int]], max_rows: int, steps: int) -> Iterator[Counter[Hashable]]:
    """The rows that every account has had after each of many steps, in which its trees (those of account i: `trees[i]`) come again and again."""
    credit: dict[Hashable, float] = {}
    wants = [Want(1, True, n, a) for a, sizes in enumerate(trees) for n in sizes]
    had: Counter[Hashable] = Counter({a: 0 for a in range(len(trees))})
    for _ in range(steps):
        grants = schedule(wants, max_rows, credit)
        for g in grants:
            had[wants[g.index].account] += g.rows
        served = {g.index for g in grants}
        wants = [w for i, w in enumerate(wants) if i not in served] + [wants[i] for i in sorted(served)]
        yield had


@settings(max_examples=50, deadline=None)
@example(2, 0, 5, 2)  # half a row in every step, forgotten, was the difference of a whole one
@given(st.integers(2, 4), st.integers(0, 255), st.integers(4, 300), st.integers(1, 6))
def test_rows_are_shared_evenly_where_they_are_scarce(accounts: int, nodes: int, max_rows: int, greed: int) -> None:
    """Every account alone could fill all steps, and the first has `greed` times as many trees: none is ever ahead of another by more than one."""
    many = max_rows // (nodes + 1) + 1
    for had in rounds([[nodes] * many * (greed if a == 0 else 1) for a in range(accounts)], max_rows, 12):
        assert max(had.values()) - min(had.values()) <= min(nodes + 1, max_rows)


@settings(max_examples=50, deadline=None)
@example([[67], [10, 77]], 78)  # debts of rows that nobody could have kept the second waiting
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=2, max_size=4), st.integers(4, 300))
def test_no_account_waits_for_more_than_the_others(trees: list[list[int]], max_rows: int) -> None:
    """Whatever their trees: the account that is behind is served first, so each of them is served again within a few steps of every other."""
    steps = list(map(Counter, rounds(trees, max_rows, 40)))
    for before, after in zip(steps, steps[len(trees) * 3 :], strict=False):
        assert all(after[a] > before[a] for a in range(len(trees)))


def test_who_is_not_kept_waiting_owes_nothing() -> None:
    """Rows that nobody else wanted are not held against anybody."""
    credit: dict[Hashable, float] = {}
    schedule([Want(1, True, 100, "a"), Want(1, True, 3, "b")], 512, credit)
    assert credit == {}
    for _ in range(4):
        schedule([Want(1, True, 255, "a"), Want(1, True, 255, "a"), Want(1, True, 3, "b")], 300, credit)
        assert credit == {"a": 0}, "the other 44 rows were of use to nobody"


def test_who_comes_late_does_not_wait_for_what_nobody_could_have() -> None:
    """Of 150 rows every step gives 100: those who were there for long are not owed the other 50 by a newcomer."""
    credit: dict[Hashable, float] = {}
    old = [Want(1, True, 99, a) for a in "ab" for _ in range(9)]
    for _ in range(1000):
        schedule(old, 150, credit)
    had = Counter[Hashable]()
    for _ in range(6):
        wants = [*old, *(Want(1, True, 99, "c") for _ in range(9))]
        had.update(wants[g.index].account for g in schedule(wants, 150, credit))
    assert had == {"a": 2, "b": 2, "c": 2}


def test_a_long_prompt_is_owed_a_step_at_most() -> None:
    """Of 300 rows beside trees a prompt gets a chunk: when it is read, its account goes first, but not for as long as it waited."""
    credit: dict[Hashable, float] = {}
    for n in range(100):
        schedule([Want(9999 - n * 64, True, 0, "a"), *(Want(1, True, 99, "b") for _ in range(9))], 300, credit)
    assert credit["a"] <= 300 and credit["b"] >= -300


@given(st.integers(0, 999), st.lists(st.integers(0, 99), max_size=9))
def test_a_fair_share_leaves_nothing_that_anybody_wants(rows: int, wanted: list[int]) -> None:
    share = fair_share(rows, wanted)
    assert sum(min(w, share) for w in wanted) == pytest.approx(min(rows, sum(wanted)))


def test_a_lone_prompt_makes_no_step_that_keeps_a_greeting_waiting() -> None:
    """Of passes of 1 s, and 10 ms more for each row behind the eighth, 108 rows take 2 s; a pass that takes longer in any case takes a few rows."""
    for base, rows in ((1.0, 108), (0.02, 206), (3.0, LEAST)):
        assert schedule([Want(9999, True)], 512, cost=Known((base, 0.01, 8, 0.0))) == [Grant(0, rows, False)]
    assert schedule([Want(9999, True)], 512, cost=Known(GPU)) == [Grant(0, 512, False)]


def test_batch_fills_the_rows_that_others_leave() -> None:
    gpu = Known(GPU)
    grants = schedule([Want(1, True, 255, batch=True), Want(1, True, 31)], 512, cost=gpu)
    assert grants == [Grant(1, 1, True, 31), Grant(0, 1, True, GPU[2] - 32 - 1)], "its tree is cut to the rows under the knee"
    crowd = [Want(1, True, 31) for _ in range(6)]
    assert all(g.index for g in schedule([Want(1, True, 7, batch=True), *crowd], 512, cost=gpu)), "192 rows: none is left"
    assert schedule([Want(1, True, 100, batch=True)], 512, cost=gpu, expected=True) == [Grant(0, 1, True, 100)]
    assert schedule([Want(1, True, 31, batch=True)], 512, cost=Known(CPU), expected=True) == [Grant(0, 1, True, 7)], "others may come any moment"
    assert schedule([Want(1, True, 31, batch=True)], 512, cost=Known(CPU)) == [Grant(0, 1, True, 31)], "nobody else is there"
    assert schedule([Want(900, True, 0, batch=True)], 512, cost=Known(CPU)) == [Grant(0, 512, False)]


@given(WANTS, WANTS.map(lambda wants: [replace(w, batch=True) for w in wants]), st.booleans())
def test_batch_takes_nothing_from_others(wants: list[Want], batch: list[Want], expected: bool) -> None:
    cost, credit, apart = Known(GPU), dict[Hashable, float](), dict[Hashable, float]()
    both = schedule([*wants, *batch], 512, credit, cost, expected=expected)
    assert [g for g in both if g.index < len(wants)] == schedule(wants, 512, apart, cost, expected=expected)
    assert credit == apart
    lower = sum(g.rows for g in both if g.index >= len(wants))
    upper = sum(g.rows for g in both) - lower
    assert lower <= (max(0, cost.knee - upper) if upper or expected else 512)
    if any(w.rows for w in batch) and upper < (cost.knee if upper or expected else 512):
        assert lower, "idle rows are used"


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 60))
def test_a_bound_on_the_wait(sessions: int, most: int, nodes: int) -> None:
    """Whoever is ready is verified in one of the next ceil(n / most) steps, whatever comes after it."""
    wants = [(i, Want(1, True, nodes)) for i in range(sessions)]
    waited = dict.fromkeys(range(sessions), 0)
    for _ in range(30):
        served = {wants[g.index][0] for g in schedule([w for _, w in wants], 512, {}, Known(CPU), most)}
        wants = [x for x in wants if x[0] not in served] + [x for x in wants if x[0] in served]
        for i in waited:
            waited[i] = 0 if i in served else waited[i] + 1
            assert waited[i] < -(-sessions // most)
