"""Calibration: how often children like this one are accepted once their parent is.

A draft's own probabilities are not that: they are too high or too low by an amount that depends on the pair, the text, the temperature and the rank
of the child among its siblings. So for every rank a line is fitted on line, logit(accepted) = slope * logit(p) + shift, by one small gradient step of
the log loss for each child whose fate is known. Knows nothing of trees, models or clocks. Invariants: acceptance lies between 0 and 1 and
never falls when p rises; before anything was seen it is p.
"""

import math

import numpy as np
from numpy.typing import NDArray

STEP = 0.1  # remembers about 40 children a rank; of 0.02 to 0.2 the best over T = 0, 0.7 and 1.0 with the shipped pair
TILT = 1 / 3  # of the step, for the slope
SLOPES = (0.1, 3.0)
WIDEST = 9.2  # logit of 0.9999: beyond it a draft's confidence says nothing more


class Calibration:
    """The acceptance of children of ranks 0 .. `ranks`-1 of one text. One a text, because texts differ more than a text's first 40 tokens cost: log
    loss 0.1596 and 0.2278 at T = 0 and 0.7, and 0.1600 and 0.2283 if all texts share one (raw: 0.1800 and 0.2328)."""

    def __init__(self, ranks: int) -> None:
        self._slope, self._shift = np.ones(ranks), np.zeros(ranks)
        self.usual = [0.6 / 4**r for r in range(ranks)]  # share of children of each rank that were accepted lately

    def acceptance(self, rank: int, log_p: float) -> float:
        """Probability that the child of `rank` whose log-probability is `log_p` is accepted, if its parent is."""
        return 1 / (1 + math.exp(-(self._slope[rank] * _logit(log_p) + self._shift[rank])))

    def log_acceptances(self, log_p: NDArray[np.float32]) -> NDArray[np.float64]:
        """The same for `log_p [n, k]` whose column is the rank, as logarithms, which add up along a path."""
        p = np.exp(np.clip(np.nan_to_num(log_p.astype(np.float64), nan=-np.inf), -2 * WIDEST, -1e-12))  # nan: of weights that overflow
        logit = np.clip(np.log(p / (1 - p)), -WIDEST, WIDEST)
        k = log_p.shape[1]
        found: NDArray[np.float64] = -np.logaddexp(0, -(self._slope[:k] * logit + self._shift[:k]))
        return found

    def observe(self, rank: int, log_p: float, accepted: bool) -> None:
        """Learn the fate of a child whose parent was accepted."""
        x = _logit(log_p)
        self.usual[rank] += STEP / 2 * (accepted - self.usual[rank])
        error = STEP * (accepted - self.acceptance(rank, log_p))
        self._shift[rank] += error
        self._slope[rank] = min(max(self._slope[rank] + error * TILT * x / (1 + x * x), SLOPES[0]), SLOPES[1])


def _logit(log_p: float) -> float:
    p = math.exp(min(log_p, -1e-12))
    return min(max(math.log(p / (1 - p)) if p else -WIDEST, -WIDEST), WIDEST)
