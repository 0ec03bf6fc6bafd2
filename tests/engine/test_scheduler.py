"""The scheduler, a pure function: budgets are kept, nobody starves, trees are answered whole where they can be."""

from hypothesis import given
from hypothesis import strategies as st

from specedge.engine.scheduler import CHUNK_BESIDE_TREES, Grant, Want, schedule

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
