"""From the logs of one cell of bench/serve.py to its figures: pure functions, without processes or clocks.

A cell runs its texts in waves: as many at once as there are sessions, the next wave when all have ended. Prompts have been read and cached before, as
in the paper, whose figures begin behind that; how long it took is the time to the first token. Throughput and idleness are those of the time of each
wave in which all sessions were at work: from the last one's first token to the first one's last.
"""

import hashlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TURN = 0.01  # seconds: a server that has something to do takes less between two steps
Window = tuple[float, float]
Record = dict[str, Any]  # ttft (seconds), started, times [(when, tokens)], ids, speculation


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
    """All figures of a cell, None where there is nothing to tell. `server`: steps and grows (on its own core); `edges`: their logs, none where the
    server drafts; `price`: dollars an hour of the server and of an edge."""
    spans = windows(waves)
    length = sum(b - a for a, b in spans) or float("nan")
    records = [r for wave in waves for r in wave]
    tokens = sum(n for r in records for t, n in r["times"] if any(a < t <= b for a, b in spans))
    steps = [s for s in server["steps"] if any(a < s[1] <= b for a, b in spans)]
    stepping = sum(e - b for b, e, _, _ in steps)
    inside = sum(overlap(b, e, spans) for b, e, _, _ in server["steps"])
    drafting = sum(overlap(b, e, spans) for b, e, _ in server["grows"])
    turns = [gap for a, b in zip(steps, steps[1:], strict=False) if (gap := b[0] - a[1]) < TURN]  # where nobody was waited for
    verdicts = [v for s in steps for v in s[3]]
    came = sum(n for *_, n in verdicts)
    gaps = [b[0] - a[0] for r in records for a, b in zip(r["times"], r["times"][1:], strict=False)]
    tpot = [(r["times"][-1][0] - r["times"][0][0]) / (len(r["ids"]) - 1) for r in records if len(r["ids"]) > 1]
    spoken = [r["speculation"] for r in records]
    rounds, total = sum(s["rounds"] for s in spoken), sum(len(r["ids"]) for r in records)
    judged = sum(s["hits"] + s["misses"] for s in spoken)
    rate = tokens / length
    begun = min(r["started"] for r in records)  # before, there are texts that do not count
    guesses = [guessed for e in edges for came, _, guessed, _ in e["verdicts"] if came > begun]
    late = [x for e in edges for x in e["late"]]
    dollars = (price[0] + price[1] * len(edges)) / 3600
    busy = [sum(overlap(b, e, spans) for b, e, _ in edge["grows"]) / length for edge in edges]
    forwards = sum(len(e["grows"]) for e in edges)
    extra = sum(sum(b - a for a, b, _ in e["grows"]) - e["paced"] for e in edges) / forwards if forwards else float("nan")  # what Python adds
    found = {
        "tokens_per_s": rate,
        "bound_tokens_per_s": came / stepping if stepping and not server["grows"] else rate,  # of a server that never waits
        "tpot_ms": statistics.median(tpot) * 1e3 if tpot else float("nan"),
        "ttft_ms": statistics.median(r["ttft"] for r in records) * 1e3,
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
        "tokens_per_round": total / rounds if rounds else 1.0,
        "tokens_per_row": came / sum(v[2] for v in verdicts) if verdicts else float("nan"),
        "rows_per_step": statistics.mean(s[2] for s in steps) if steps else 0.0,
        "sessions_per_step": statistics.mean(len(s[3]) for s in steps) if steps else 0.0,
        "step_ms": statistics.median(e - b for b, e, _, _ in steps) * 1e3 if steps else float("nan"),
        "turn_ms": statistics.median(turns) * 1e3 if turns else float("nan"),
        "hit_rate": sum(s["hits"] for s in spoken) / judged if judged else float("nan"),
        "single_guess_rate": sum(guesses) / len(guesses) if guesses else float("nan"),
        "server_idle": 1 - (inside + drafting) / length,
        "server_drafting": drafting / length,
        "edge_idle": 1 - statistics.mean(busy) if edges else float("nan"),
        "edge_late_p99_ms": percentile(late, 0.99) * 1e3,
        "forward_overhead_ms": extra * 1e3,
        "bytes_per_token": sum(s["bytes_up"] + s["bytes_down"] for s in spoken) / total,
        "dollars_per_million": dollars / rate * 1e6,
        "texts": len(records),
        "seconds": length,
    }
    return {k: None if v != v else v for k, v in found.items()}


@dataclass(frozen=True, slots=True)
class Round:
    """When what happened to a tree: sent by its edge, at the server, verified from `begun` to `ended`, back at the edge, taken there. One that the
    server had already when its step began, `asked` by nobody, was sent and arrived then."""

    edge: int
    sent: float
    drafted: float  # seconds before, since the last verdict on this text; nan: there was none
    after: bool  # whether that was a hit
    arrived: float
    begun: float
    ended: float
    came: float
    taken: float
    nodes: int
    tokens: int
    hit: bool
    asked: bool = True


def rounds(logs: dict[str, Any]) -> list[Round]:
    """The rounds of a cell whose edges drafted, in order of verification; the last of each text is missing, for its verdict ends it."""
    who = {tuple(prompt): i for wave in logs["prompts"] for i, prompt in enumerate(wave)}
    edge_of = {order: who[tuple(prompt)] for order, prompt in logs["server"]["prompts"].items() if tuple(prompt) in who}
    up = sorted((came, left) for came, left, upward, *_ in logs["wire"] if upward)
    down = sorted((came, left) for came, left, upward, *_ in logs["wire"] if not upward)
    starts = [r["started"] for wave in logs["records"] for r in wave]
    found, last = list[Round](), dict[int, float]()
    for begun, ended, _rows, verdicts in logs["server"]["steps"]:
        for order, _base, verified, tokens in verdicts:
            edge, before = logs["edges"][edge_of[order]], last.get(edge_of[order], 0.0)
            sent, nodes = max((s for s in edge["submits"] if s[0] < begun), default=(0.0, 0))
            taken = min((v for v in edge["verdicts"] if v[0] > ended), default=None)
            if taken is None:
                continue
            asked = sent > before
            if not asked and before not in edge.get("begun", ()) and verified == 1:  # the server goes on alone, without a tree
                continue
            if not asked:
                sent, nodes = begun, verified - 1
            last[edge_of[order]] = taken[0]
            arrived = min((left for came, left in up if came >= sent), default=begun)
            came = max((left for came, left in down if ended <= came and left <= taken[0]), default=taken[0])
            text = max((t for t in starts if t <= sent), default=0.0)
            since, after = max(((v[0], v[1]) for v in edge["verdicts"] if text < v[0] <= sent), default=(float("nan"), False))
            found.append(
                Round(
                    edge_of[order], sent, sent - since, after, min(arrived, begun), begun, ended, came, taken[0], nodes, tokens, taken[1], asked
                )
            )
    return found


def breakdown(found: list[Round]) -> dict[str, float]:
    """Median milliseconds of the parts of a round, drafting apart after a hit and after a miss; those before its step only of rounds that were asked
    for."""
    parts: dict[str, list[float]] = {"draft after a hit": [], "draft after a miss": []}
    for r in found:
        for name, a, b in (("up", r.sent, r.arrived), ("queue", r.arrived, r.begun), ("verify", r.begun, r.ended), ("down", r.ended, r.came),
                           ("unseen at the edge", r.came, r.taken)):  # fmt: skip
            if r.asked or name not in ("up", "queue"):
                parts.setdefault(name, []).append(b - a)
        if r.asked and r.drafted == r.drafted:
            parts[f"draft after a {'hit' if r.after else 'miss'}"].append(r.drafted)
    return {name: statistics.median(values) * 1e3 for name, values in parts.items() if values}
