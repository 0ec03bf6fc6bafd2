"""From the logs of one cell of bench/serve.py to its figures: pure functions, without processes or clocks.

A cell runs its texts in waves: as many at once as there are sessions, the next wave when all have ended. Figures of throughput and idleness come from the
time of each wave in which all sessions were at work: from the last one's first token to the first one's last. So reading prompts is not part of them,
as in the paper; it shows in the time to the first token.
"""

import hashlib
import statistics
from collections.abc import Iterable
from typing import Any

Window = tuple[float, float]
Record = dict[str, Any]  # started, times [(when, tokens)], ids, speculation


def windows(waves: list[list[Record]]) -> list[Window]:
    """The time of each wave in which all sessions were at work; waves without such a time are left out."""
    found = [(max(r["times"][0][0] for r in wave), min(r["times"][-1][0] for r in wave)) for wave in waves]
    return [(a, b) for a, b in found if b > a]


def overlap(begin: float, end: float, spans: Iterable[Window]) -> float:
    """Seconds of [begin, end] that lie in `spans`."""
    return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in spans)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not pass; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def digest(ids: list[int]) -> str:
    """What identical texts have in common."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def figures(waves: list[list[Record]], server: dict[str, Any], edges: list[dict[str, Any]], price: tuple[float, float]) -> dict[str, Any]:
    """All figures of a cell. `server`: steps and grows (on its own core); `edges`: their logs, none where the server drafts; `price`: dollars an hour of
    the server and of an edge."""
    spans = windows(waves)
    length = sum(b - a for a, b in spans) or float("nan")
    records = [r for wave in waves for r in wave]
    tokens = sum(n for r in records for t, n in r["times"] if any(a < t <= b for a, b in spans))
    steps = [s for s in server["steps"] if any(a < s[1] <= b for a, b in spans)]
    stepping = sum(e - b for b, e, _, _ in steps)
    inside = sum(overlap(b, e, spans) for b, e, _, _ in server["steps"])
    drafting = sum(overlap(b, e, spans) for b, e, _ in server["grows"])
    verdicts = [v for s in steps for v in s[3]]
    came = sum(n for *_, n in verdicts)
    gaps = [b[0] - a[0] for r in records for a, b in zip(r["times"], r["times"][1:], strict=False)]
    tpot = [(r["times"][-1][0] - r["times"][0][0]) / (len(r["ids"]) - 1) for r in records if len(r["ids"]) > 1]
    spoken = [r["speculation"] for r in records]
    rounds, total = sum(s["rounds"] for s in spoken), sum(len(r["ids"]) for r in records)
    judged = sum(s["hits"] + s["misses"] for s in spoken)
    rate = tokens / length
    guesses = [guessed for e in edges for _, _, guessed, _ in e["verdicts"]]
    late = [x for e in edges for x in e["late"]]
    dollars = (price[0] + price[1] * len(edges)) / 3600
    return {
        "tokens_per_s": rate,
        "bound_tokens_per_s": came / stepping if stepping and not server["grows"] else rate,  # of a server that never waits
        "tpot_ms": statistics.median(tpot) * 1e3 if tpot else float("nan"),
        "ttft_ms": statistics.median(r["times"][0][0] - r["started"] for r in records) * 1e3,
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
        "tokens_per_round": total / rounds if rounds else 1.0,
        "tokens_per_row": came / sum(v[2] for v in verdicts) if verdicts else float("nan"),
        "rows_per_step": statistics.mean(s[2] for s in steps) if steps else 0.0,
        "sessions_per_step": statistics.mean(len(s[3]) for s in steps) if steps else 0.0,
        "step_ms": statistics.median(e - b for b, e, _, _ in steps) * 1e3 if steps else float("nan"),
        "hit_rate": sum(s["hits"] for s in spoken) / judged if judged else float("nan"),
        "single_guess_rate": sum(guesses) / len(guesses) if guesses else float("nan"),
        "server_idle": 1 - (inside + drafting) / length,
        "server_drafting": drafting / length,
        "edge_idle": 1 - statistics.mean(sum(overlap(b, e, spans) for b, e, _ in edge["grows"]) / length for edge in edges) if edges else float("nan"),
        "edge_late_p99_ms": percentile(late, 0.99) * 1e3,
        "bytes_per_token": sum(s["bytes_up"] + s["bytes_down"] for s in spoken) / total,
        "dollars_per_million": dollars / rate * 1e6,
        "texts": len(records),
        "seconds": length,
    }  # fmt: skip
