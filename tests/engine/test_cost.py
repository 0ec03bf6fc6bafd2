"""CostModel: it finds the law behind noisy times, follows a machine that changes, and is careful where it knows nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge.engine.cost import ENOUGH, CostModel
from specedge.engine.cost import Law as Told

Law = tuple[float, float, int, float]  # base, slope, knee, read
CPU: Law = (0.032, 0.0032, 8, 2e-6)
GPU: Law = (0.020, 0.00011, 180, 2e-8)


def law(of: Law, rows: int, context: int) -> float:
    base, slope, knee, read = of
    return base + slope * max(0, rows - knee) + read * context


def feed(model: CostModel, of: Law, steps: int, rng: np.random.Generator, most: int = 512, noise: float = 0.1, outliers: float = 0.02) -> None:
    for _ in range(steps):
        rows, context = int(np.exp(rng.uniform(0, np.log(most)))), int(rng.integers(0, 8192))
        factor = 10.0 if rng.random() < outliers else max(0.5, 1 + noise * rng.standard_normal())
        model.observe(rows, context, law(of, rows, context) * factor)


def worst(model: CostModel, of: Law, most: int = 512) -> float:
    sizes = [r for r in (1, 2, 4, 8, 16, 33, 64, 128, 256, 512) if r <= most]
    return max(abs(model.predict(r, c) / law(of, r, c) - 1) for r in sizes for c in (0, 2000, 8000))


@pytest.mark.parametrize("of", [CPU, GPU, (0.0025, 0.00022, 5, 2e-7), (0.05, 0.001, 20, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_a_law_is_recovered_under_noise_and_outliers(of: Law, seed: int) -> None:
    model = CostModel()
    feed(model, of, 1500, np.random.default_rng(seed))
    assert model.confident
    assert worst(model, of) < 0.05
    assert 0.6 * of[2] <= model.knee <= 1.6 * of[2]
    assert model.slope(model.knee - 1) == 0
    assert model.slope(400) == pytest.approx(of[1], rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_is_followed(factor: float) -> None:
    rng, model = np.random.default_rng(5), CostModel()
    feed(model, CPU, 1000, rng)
    slower = (CPU[0] * factor, CPU[1] * factor, CPU[2], CPU[3] * factor)
    feed(model, slower, 300, rng)
    assert worst(model, slower) < 0.1


def test_the_size_in_use_is_followed_within_a_hundred_steps() -> None:
    """A server that only runs passes of 40 rows knows their time, whatever it learned of others before."""
    rng, model = np.random.default_rng(6), CostModel()
    feed(model, CPU, 1000, rng)
    for _ in range(100):
        model.observe(40, 1000, 2 * law(CPU, 40, 1000))
    assert model.predict(40, 1000) == pytest.approx(2 * law(CPU, 40, 1000), rel=0.05)


def test_a_slower_machine_keeps_its_law() -> None:
    """Only small passes come after the change: large ones are expected to be slower as well; noise among three sizes says nothing of a slope."""
    rng, model = np.random.default_rng(11), CostModel()
    feed(model, CPU, 1000, rng)
    for _ in range(400):
        rows = int(rng.integers(9, 12))
        model.observe(rows, 0, 2 * law(CPU, rows, 0) * max(0.5, 1 + 0.2 * rng.standard_normal()))
    for rows in (1, 10, 32, 64, 256):
        assert model.predict(rows, 0) == pytest.approx(2 * law(CPU, rows, 0), rel=0.25)


def test_outliers_alone_move_nothing() -> None:
    clean, dirty = CostModel(), CostModel()
    feed(clean, CPU, 400, np.random.default_rng(7), noise=0.0, outliers=0.0)
    feed(dirty, CPU, 400, np.random.default_rng(7), noise=0.0, outliers=0.05)
    assert worst(clean, CPU) < 0.01 and worst(dirty, CPU) < 0.02


TIMES = st.lists(st.tuples(st.integers(1, 600), st.integers(0, 10**6), st.floats(1e-6, 1e3)), max_size=80)


@settings(max_examples=100, deadline=None)
@given(TIMES)
def test_predictions_are_positive_and_never_fall(seen: list[tuple[int, int, float]]) -> None:
    model = CostModel()
    for rows, context, seconds in seen:
        model.observe(rows, context, seconds)
    grid = [[model.predict(r, c) for c in (0, 10, 10**4, 10**6)] for r in (1, 2, 5, 30, 200, 600, 5000)]
    assert np.isfinite(grid).all() and (np.array(grid) > 0).all()
    assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
    assert model.slope(5000) >= 0 and model.knee >= 1


def test_rows_cost_until_it_is_known_that_they_do_not() -> None:
    model = CostModel()
    assert not model.confident and model.knee == 1
    assert model.slope(1) == pytest.approx(model.predict(1, 0) / 8)
    for _ in range(2 * ENOUGH):  # one size says nothing of a slope
        model.observe(32, 0, 0.01)
    assert not model.confident
    assert model.predict(32, 0) == pytest.approx(0.01)
    assert model.predict(64, 0) == pytest.approx(0.01 * (1 + 63 / 8) / (1 + 31 / 8))


def test_beyond_a_flat_range_nothing_is_free() -> None:
    model = CostModel()
    feed(model, (0.02, 0.0, 1, 0.0), 200, np.random.default_rng(8), most=64)
    assert model.confident and model.predict(model.knee, 0) == pytest.approx(0.02, rel=0.05)
    assert 32 <= model.knee <= 64
    assert model.slope(64) == pytest.approx(0.02 / 8, rel=0.05)


def test_times_that_cannot_be_are_not_taken() -> None:
    model = CostModel()
    for rows, context, seconds in ((0, 0, 0.1), (1, -1, 0.1), (1, 0, 0.0), (1, 0, -1.0), (1, 0, float("nan")), (1, 0, float("inf"))):
        model.observe(rows, context, seconds)
    assert model.predict(1, 0) == CostModel().predict(1, 0)


def test_a_law_that_was_told_holds_until_there_is_a_fit() -> None:
    model, theirs = CostModel(), CostModel()
    assert not model.confident and model.law is None
    model.tell(Told(0.08, 0.002, 8))
    assert model.confident and model.law is None, "it is not one's own, and not to be told on"
    assert [model.predict(n, 0) for n in (1, 8, 18)] == pytest.approx([0.08, 0.08, 0.1])
    for _ in range(4):
        model.observe(8, 0, 0.16)  # the machine is twice as slow as was told: the level follows, the shape stays
    assert [model.predict(n, 0) for n in (1, 18)] == pytest.approx([0.16, 0.2])
    rng = np.random.default_rng(3)
    for m in (model, theirs):
        feed(m, CPU, 4 * ENOUGH, rng, most=64)
    assert theirs.law is not None and worst(model, CPU, 64) < 0.25, "once there is a fit it decides"
    before = theirs.law
    theirs.tell(Told(1.0, 1.0, 1))
    assert theirs.law == before


def test_between_the_sizes_seen_a_row_is_neither_free_nor_dear() -> None:
    """Trees of a few rows and whole prompts fit a knee anywhere between them. In the middle, what it lets pass shows where it is."""
    of: Law = (0.085, 0.0013, 64, 0.0)
    model = CostModel()
    for i in range(200):
        model.observe(129 if i % 20 == 0 else 1 + i % 12, 100, law(of, 129 if i % 20 == 0 else 1 + i % 12, 100))
    assert 20 <= model.knee <= 90 and model.largest >= 129
    while model.knee < 50:
        rows, knee = model.knee, model.knee
        for _ in range(16):
            model.observe(rows, 100, law(of, rows, 100))
        assert model.knee > knee


def test_the_largest_pass_seen_is_known() -> None:
    model = CostModel()
    assert model.largest == 0
    for rows in (3, 40, 7):
        model.observe(rows, 0, 0.01)
    assert 40 <= model.largest <= 48
    model.observe(5000, 0, 0.01)
    assert model.largest > 5000
