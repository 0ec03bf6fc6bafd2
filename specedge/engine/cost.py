"""CostModel: the time of a forward pass by its rows and the context that they read, learned on line from the passes themselves.

    T(rows, context) = base + slope * max(0, rows - knee) + read * context

`base` is the time that the weights' bytes take: up to `knee` rows, work hides behind it. Beyond, every row costs `slope`; `read` is what a token of
K/V costs. Rows are rows, whether of prompts, trees or single tokens. One model belongs to one network on one device, and sees all its passes. Knows
nothing of who asked for the rows, of tensors or of clocks. Invariant: a prediction is positive and never falls in rows or context.

Rows times context, the keys that each row looks at, is no feature. Over all of bench/step.py (1 to 64 rows, contexts of 128 to 4096) a third feature
lowers the error from 10.8 to 4.9 % (EPYC, bfloat16), 14.4 to 4.4 % (int8) and 12.1 to 11.1 % (Xeon with tiles, where the rows of a tree share the
reading), but a server sees one mix of contexts at a time, and fits the slope that holds there: at 4096 tokens 4.2 ms a row, where the law of three
features has 2.9 + 1.3. Nodes that were admitted by this model, where the other law held, lost 0 to 4 % of tokens a second in 17 of 18 mixes of 1, 4
and 8 sessions and contexts, also of 128, 1024 and 4096 in one step, and 7 % in one.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 512  # passes after which an observation counts half
KEPT = 1.0  # observations of a size of pass that are never forgotten: a server that runs one size only still knows the slope
ENOUGH, SIZES, SPREAD = 24, 3, 4  # a fit is believed after so many passes of so many sizes, the largest so many times the smallest
EVERY = 8  # passes between fits, which take 0.2 ms
NOISE = 0.01  # relative error of a fit that nobody can tell from none
FLAT = 0.1  # share of `base` that the rows seen must add up to, or no knee is in sight
UNKNOWN = 0.05  # seconds of a pass when none was seen
ALL = 1 << 20  # more rows, or sequences, than there are
KNEES = np.unique([round(2 ** (i / 4)) for i in range(41)])  # [K] 1 .. 1024; the sizes of passes are the intervals between them
TOPS = np.append(KNEES, ALL)  # [K + 1] rows that the passes of a size have at most
SUBSETS = np.array([[i >> c & 1 for c in range(3)] for i in range(1, 8)], bool)  # [7, 3] which of base, slope and read are not zero


@dataclass(frozen=True, slots=True)
class Law:
    """A pass takes `base` seconds up to `knee` rows, and `slope` more for every further row."""

    base: float
    slope: float
    knee: int


class CostModel:
    """Before enough was seen, a row beyond `knee` is taken to cost `share` of an empty pass. The defaults are safe on a CPU, where rows cost most:
    1/5 to 1/11 was measured there (int4 to float32, 0.5B and the demo's target), beyond 4 to 8 free rows, so 1/8 from the first row on admits
    too little rather than too much, and what is admitted teaches the rest: in virtual time, with rows that are free up to 64, a server that starts so
    serves its first 64 tokens of one and of two sessions 18 and 22 % slower than one that has been told, and all others as fast. `share` also
    holds beyond the largest pass seen while all were flat."""

    def __init__(self, share: float = 1 / 8, knee: int = 1) -> None:
        self._share, self._prior_knee = share, knee
        self._base, self._slope, self._read, self._knee = UNKNOWN, share * UNKNOWN, 0.0, knee
        self._seen = 0
        self._fitted = False
        self.told = False  # whether the law was somebody else's at first
        self._error = self._bias = 0.0  # running means of relative errors: how far they scatter, and they themselves
        self._weight = np.zeros(len(KNEES) + 1)  # [sizes] observations, as far as they are remembered
        self._moments = np.zeros((len(KNEES) + 1, 4, 4))  # [sizes] sums of z z' over z = (1, rows, context, seconds) / seconds predicted

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """A pass over `rows` rows that read `context` tokens of K/V took `seconds`."""
        if rows < 1 or context < 0 or not 0 < seconds < math.inf:
            return
        weight = 1.0
        expected = seconds  # so that an outlier counts little as long as nothing is expected
        if self._fitted:
            expected = self.predict(rows, context)
            error, limit = seconds / expected - 1, 3 * self._error + 0.01
            weight = min(1.0, limit / max(abs(error), 1e-9))  # Huber's: a page fault counts like any error that is just too large
            self._error += 0.02 * (min(abs(error - self._bias), limit) - self._error)
            self._bias += 0.1 * (min(max(error, -limit), limit) - self._bias)
            if abs(self._bias) > 1.1 * self._error + 0.01:
                self._rescale(1 + self._bias / 2)
        keep = np.where(self._weight > KEPT, 0.5 ** (1 / HALF_LIFE), 1.0)
        self._weight *= keep
        self._moments *= keep[:, None, None]
        size, z = int(np.searchsorted(KNEES, rows)), np.array([1, rows, context, seconds]) / expected
        self._weight[size] += weight
        self._moments[size] += weight * np.outer(z, z)
        self._seen += 1
        if self._seen % EVERY == 0 or not self._fitted:
            self._fit()

    def tell(self, law: Law) -> None:
        """Expect passes to follow `law`, somebody else's fit, until there is one of these passes; they correct its level from the first on."""
        if not self._fitted:
            self.told, self._share, self._prior_knee = True, law.slope / law.base, law.knee
            self._base, self._slope, self._knee = law.base, law.slope, law.knee

    @property
    def law(self) -> Law | None:
        """What was fitted, at no context; None as long as nothing was."""
        return Law(self._base, self._slope, self._knee) if self._fitted else None

    def predict(self, rows: int, context: int) -> float:
        """Seconds of a pass."""
        return self._base + self._slope * max(0, rows - self._knee) + self._read * context

    def times(self, rows: NDArray[np.int64], context: int) -> NDArray[np.float64]:
        """Seconds of passes of so many `rows` each."""
        return self._base + self._slope * np.maximum(0, rows - self._knee) + self._read * context

    def slope(self, rows: int) -> float:
        """Seconds that one row more adds to a pass of `rows` rows."""
        return self._slope if rows >= self._knee else 0.0

    def room(self, rows: int, seconds: float) -> int:
        """How many more than `rows` rows take `seconds` more: those left under the knee, and so many beyond; at least ALL if rows are free."""
        slope = self.slope(max(rows, self._knee))
        return max(0, self._knee - rows) + (int(min(seconds / slope, ALL)) if slope > 0 else ALL)

    @property
    def knee(self) -> int:
        """Rows up to which a pass costs as much as an empty one."""
        return self._knee

    @property
    def largest(self) -> int:
        """Rows beyond which no pass was seen, to about a fifth; 0 at first."""
        sizes = np.flatnonzero(self._weight)
        return int(TOPS[sizes[-1]]) if len(sizes) else 0

    @property
    def confident(self) -> bool:
        """Whether predictions come from observations, or from somebody's who has made some, and not from the default."""
        return self._fitted or self.told

    # ------------------------------------------------------------------------------------------------------------------

    def _rescale(self, factor: float) -> None:
        """Take all times that were seen, and all that are expected, to be `factor` times as long: errors of one sign mean that the machine has become
        slower or faster. Its law has the same shape; to forget it would leave the slope to the few sizes that come now."""
        self._base, self._slope, self._read = self._base * factor, self._slope * factor, self._read * factor
        self._moments[:, :3, :] /= factor
        self._moments[:, :, :3] /= factor
        self._bias -= factor - 1

    def _fit(self) -> None:
        """Least squares of relative errors for every knee; the best knee, the smallest among equals."""
        sizes = np.flatnonzero(self._weight)
        low, high = int(KNEES[min(sizes[0], len(KNEES) - 1)]), int(KNEES[min(sizes[-1], len(KNEES) - 1)])
        if self._seen < ENOUGH or len(sizes) < SIZES or high < SPREAD * low:
            rows = np.append(KNEES, 2 * KNEES[-1])[sizes]
            seconds = self._weight[sizes] / self._moments[sizes, 0, 3]  # harmonic means
            unit = float(np.average(seconds / (1 + self._share * np.maximum(0, rows - self._prior_knee)), weights=self._weight[sizes]))
            self._base, self._slope = unit, self._share * unit
            return
        found, loss = _solve(self._moments[: sizes[-1] + 1])
        equal = np.flatnonzero(loss <= 1.001 * loss.min() + NOISE**2 * self._weight.sum())
        best = int(equal[len(equal) // 2])
        base, slope, read = map(float, found[best])
        self._base, self._slope, self._read, self._knee = max(base, 1e-9), slope, read, int(KNEES[best])
        if slope * (high - self._knee) < FLAT * self._base:
            self._knee, self._slope = high, self._share * self._base
        if not self._fitted:
            self._fitted, self._error = True, 0.1


def _solve(moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For every knee among the sizes: the coefficients `[K, 3]`, none negative, that fit best, and their loss `[K]`. Of the seven sets of
    coefficients that are not zero the best is taken. What rows and context explain equally well is put down to rows."""
    knees = KNEES[: max(1, len(moments) - 1)]
    below = np.cumsum(moments, 0)[: len(knees)]
    above = moments.sum(0) - below
    below[:, 1, :] = below[:, :, 1] = 0  # up to the knee rows do not count,
    shift = np.tile(np.eye(4), (len(knees), 1, 1))
    shift[:, 1, 0] = -knees  # from there on those beyond it do
    sums = below + shift @ above @ shift.transpose(0, 2, 1)  # [K, 4, 4]
    norm = np.sqrt(np.maximum(np.einsum("kcc->kc", sums)[:, :3], 0.0))
    norm[norm < 1e-150] = 1.0  # a column of zeros
    a = sums[:, :3, :3] / norm[:, :, None] / norm[:, None] + np.diag([1e-9, 1e-9, 1e-4])
    b = sums[:, :3, 3] / norm
    both = SUBSETS[:, :, None] & SUBSETS[:, None, :]
    found = np.linalg.solve(np.where(both, a[:, None], np.eye(3)), np.where(SUBSETS, b[:, None], 0.0)[..., None])[..., 0]  # [K, 7, 3]
    gain = np.where((found >= 0).all(2), np.einsum("ksc,kc->ks", found, b), -np.inf)
    total = float(sums[0, 3, 3])
    return found[np.arange(len(knees)), gain.argmax(1)] / norm, np.maximum(total - gain.max(1), 1e-9 * total)
