"""Autopilot in virtual time: a server, a draft and a network of given speeds, and how much of the better way's rate is left."""

from collections.abc import Callable

import numpy as np
import pytest

from specedge.engine.autopilot import FIRST, Autopilot

STEP = 0.03  # seconds of a step of the server for one token
Tokens = Callable[[int], float]  # accepted a round on average, by the token that the text has come to


def run(tokens: int, accepted: Tokens, draft: float, around: float, jitter: float = 0.0, autopilot: bool = True, texts: int = 4) -> tuple[float, int]:
    """Tokens per second over `texts` texts of `tokens`, and how often drafting was taken up or left. `draft`: seconds of drafting in a round."""
    pilot, rng, now, came, turns = Autopilot(), np.random.default_rng(3), 0.0, 0, 0
    for _ in range(texts):
        text, since, alone = 0, False, False
        while text < tokens:
            turns += alone != (autopilot and pilot.alone > 0)
            alone = autopilot and pilot.alone > 0
            trip = around + float(rng.exponential(jitter)) if jitter else around
            if alone:
                now += trip
                for i in range(min(pilot.alone, tokens - text)):
                    now += STEP
                    text += 1
                    pilot.streamed(1, STEP if i else None)
                since = True
            else:
                new = 1 + int(rng.poisson(accepted(came + text)))
                seconds = draft + trip + 1.5 * STEP
                now += seconds
                text += new
                pilot.drafted(new, seconds if since else None, 1.5 * STEP)
                since = True
        came += text
    return came / now, turns


def always(accepted: float) -> Tokens:
    return lambda _: accepted


PLAIN = 1 / STEP


@pytest.mark.parametrize("jitter", [0.0, 0.02])
@pytest.mark.parametrize(("accepted", "draft"), [(0.0, 0.01), (0.0, 0.2), (0.3, 0.05), (2.5, 0.5)], ids=["noise", "slow noise", "poor", "slow"])
def test_a_draft_that_does_not_pay_costs_next_to_nothing(accepted: float, draft: float, jitter: float) -> None:
    rate, turns = run(1000, always(accepted), draft, 0.015, jitter)
    assert rate > 0.97 * PLAIN
    assert turns <= 12
    assert run(1000, always(accepted), draft, 0.015, jitter, autopilot=False)[0] < 0.8 * PLAIN


@pytest.mark.parametrize("jitter", [0.0, 0.02])
@pytest.mark.parametrize("accepted", [2.4, 3.5])
def test_a_good_draft_is_left_alone(accepted: float, jitter: float) -> None:
    rate, _ = run(1000, always(accepted), 0.01, 0.015, jitter, texts=30)
    never, _ = run(1000, always(accepted), 0.01, 0.015, jitter, autopilot=False, texts=30)
    assert rate >= 0.98 * never and never > PLAIN


def test_a_draft_that_turns_bad_is_left() -> None:
    rate, _ = run(4000, lambda at: 3.0 if at < 2000 else 0.0, 0.01, 0.015, texts=1)
    good = run(2000, always(3.0), 0.01, 0.015, autopilot=False, texts=1)[0]
    assert rate > 0.96 * 4000 / (2000 / good + 2000 / PLAIN)


def test_a_draft_that_turns_good_is_found_out() -> None:
    """After as many bad tokens, at most about GROWTH times as many more."""
    rate, _ = run(8000, lambda at: 0.0 if at < 300 else 3.0, 0.01, 0.015, texts=1)
    good = run(8000, always(3.0), 0.01, 0.015, autopilot=False, texts=1)[0]
    assert rate > 0.85 * good


def test_near_the_border_it_does_not_flap() -> None:
    """Where both ways are as good, either may be taken; changing between them must not cost more than 3 %."""
    draft = 0.01
    for accepted in (1.1, 1.33, 1.6):
        rate, turns = run(3000, always(accepted), draft, 0.015, 0.01, texts=2)
        never, _ = run(3000, always(accepted), draft, 0.015, 0.01, autopilot=False, texts=2)
        assert rate > 0.97 * max(PLAIN, never)
        assert turns < 60


def test_an_outage_says_nothing() -> None:
    pilot = Autopilot()
    for _ in range(20):
        pilot.streamed(1, STEP)
        pilot.drafted(4, 0.06, 0.04)
    pilot.drafted(4, 30.0, 0.04)
    pilot.streamed(1, 30.0)
    pilot.drafted(4, 0.06, 0.04)
    assert pilot.alone == 0 and not pilot.on_trial


def test_the_first_failure_is_forgiven_soon() -> None:
    pilot = Autopilot()
    for _ in range(3):
        assert pilot.alone == 0
        pilot.drafted(1, 0.1, 0.02)
    assert pilot.alone == FIRST
    pilot.streamed(FIRST, 1.0)
    assert pilot.alone == 0 and pilot.on_trial


def test_what_is_there_to_learn_is_no_measure() -> None:
    """Trees of all sizes, on a server of which nobody knows what its rows cost, do not end drafting; drafts of which nothing is accepted do."""
    pilot = Autopilot()
    for _ in range(24):
        pilot.drafted(2, None, STEP)
    assert pilot.alone == 0
    for _ in range(7):
        pilot.drafted(4, 2 * STEP, STEP)
        assert pilot.alone == 0
    pilot = Autopilot()
    for _ in range(3):
        pilot.drafted(1, None, STEP)
    assert pilot.alone == FIRST
