"""What the figures of bench/serve.py say: the table of all cells and the list of claims with target, result and verdict, as Markdown.

Pure functions of the result lines. A figure is the median over repetitions that are not void, with half their range behind it.
"""

import statistics
from typing import Any

Line = dict[str, Any]
Claim = tuple[str, str, str, str]  # claim, target, reached, verdict
CO = "co-located"
HEADS = ("cell", "tokens/s", "bound", "TPOT ms", "TTFT ms", "gap p50 / p99 ms", "tokens/round", "tokens/row", "rows/step", "hits", "server idle",
         "edge idle", "B/token", "$/M tokens")  # fmt: skip


def group(lines: list[Line]) -> dict[str, list[Line]]:
    """Repetitions by cell, in the order of the run."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["cell"], []).append(line)
    return found


def middle(lines: list[Line], key: str) -> float:
    """Median over those that are not void; nan of none."""
    values = [line[key] for line in lines if not line["void"] and line[key] is not None]
    return statistics.median(values) if values else float("nan")


def spread(lines: list[Line], key: str) -> float:
    values = [line[key] for line in lines if not line["void"] and line[key] is not None]
    return (max(values) - min(values)) / 2 if values else float("nan")


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if value == value else "-"


def percent(value: float) -> str:
    return f"{value:.0%}" if value == value else "-"


def row(name: str, lines: list[Line]) -> str:
    """A line of the table of cells."""

    def m(key: str, digits: int = 1) -> str:
        return number(middle(lines, key), digits)

    void = [line["void"] for line in lines if line["void"]]
    cells = [
        name + (f" ({len(void)} of {len(lines)} void: {void[0]})" if void else ""),
        f"{m('tokens_per_s')} ± {number(spread(lines, 'tokens_per_s'))}", m("bound_tokens_per_s"),
        f"{m('tpot_ms')} ± {number(spread(lines, 'tpot_ms'))}", m("ttft_ms", 0), f"{m('gap_p50_ms', 0)} / {m('gap_p99_ms', 0)}",
        m("tokens_per_round", 2), m("tokens_per_row", 3), m("rows_per_step"),
        *(percent(middle(lines, key)) for key in ("hit_rate", "server_idle", "edge_idle")), m("bytes_per_token", 0), m("dollars_per_million"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def report(lines: list[Line], wrong: list[str], modes: list[str], rtt: float) -> str:
    """Both tables. `modes`: the names, each edge mode with all of the one before it; `wrong`: texts that differed."""
    cells = group(lines)
    text = ["", "| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|", *(row(name, of) for name, of in cells.items()), ""]
    text += ["| claim | target | reached | verdict |", "|---|---|---|---|"]
    text += ["| " + " | ".join(claim) + " |" for claim in claims(cells, wrong, modes, rtt)]
    return "\n".join(text + [f"ids differ: {w}" for w in wrong])


def claims(cells: dict[str, list[Line]], wrong: list[str], modes: list[str], rtt: float) -> list[Claim]:
    """What must be shown, as far as the cells for it were run."""
    on = modes[-1]
    found: list[Claim] = []

    def get(name: str, key: str) -> float:
        return middle(cells.get(name, []), key)

    def edge(mode: str, sessions: int, t: float = 0.7, rtt: float = rtt, extra: str = "") -> str:
        return f"{mode} x{sessions} T {t:g}, rtt {rtt:g}{extra}"

    def verdict(ok: bool, known: float) -> str:
        return "not measured" if known != known else "reached" if ok else "missed"

    def lost(mode: str, before: str) -> str:
        parts = []
        for n in (1, 2):
            a, b = get(edge(before, n), "tokens_per_s"), get(edge(mode, n), "tokens_per_s")
            c, d = get(edge(before, n), "tpot_ms"), get(edge(mode, n), "tpot_ms")
            parts.append(f"x{n}: tokens/s {percent(a / b - 1)}, TPOT {percent(c / d - 1)}")
        return "; ".join(parts)

    one, two = f"{CO} x1 T 0.7", edge(on, 2)
    rate, bound, base = get(two, "tokens_per_s"), get(two, "bound_tokens_per_s"), get(one, "tokens_per_s")
    share = rate / bound
    found.append(("server tokens/s over the bound of the run, 2 edges, T 0.7", ">= 0.92", number(share, 3), verdict(share >= 0.92, share)))
    allowed = bound / base
    found.append(("server tokens/s, 2 edges against 1 co-located session, T 0.7", ">= 2.22 where the bound allows it",
                  f"{number(rate / base, 2)} (bound {number(allowed, 2)})",
                  "missed: the bound is lower" if allowed < 2.22 else verdict(rate / base >= 2.22, rate / base)))  # fmt: skip
    ratio = get(two, "tpot_ms") / get(one, "tpot_ms")
    found.append(("TPOT, 2 edges / 1 co-located session, T 0.7", "<= 0.888", number(ratio, 3), verdict(ratio <= 0.888, ratio)))
    for n in (1, 2, 4, 8):
        same = get(edge(on, n), "tpot_ms") / get(f"{CO} x{n} T 0.7", "tpot_ms")
        if same == same:
            found.append((f"TPOT, {n} edges / {n} co-located sessions, T 0.7", "<= 0.888", number(same, 3), verdict(same <= 0.888, same)))
    for before, mode in zip(modes[2:], modes[3:], strict=False):
        found.append((f"without {mode.removeprefix('+ ')}, T 0.7", "stated", lost(mode, before), "stated"))
    for t in (0.0, 0.7):
        cell = edge(on, 2, t, extra=", 31 nodes")
        hits, single = get(cell, "hit_rate"), get(cell, "single_guess_rate")
        found.append((f"hit rate of 31 nodes, T {t:g}, and over a single guess", ">= 2x", f"{percent(hits)}, a single guess {percent(single)}",
                      verdict(hits >= 2 * single, hits)))  # fmt: skip
    for t in (0.7, 1.0):
        cell = edge(on, 2, t, extra=", 31 nodes")
        ours, theirs = get(cell, "tokens_per_round"), get(cell + ", independent noise", "tokens_per_round")
        found.append((f"tokens per round, shared / independent noise, T {t:g}", "> 1", f"{number(ours, 2)} / {number(theirs, 2)} = "
                      f"{number(ours / theirs, 2)}", verdict(ours > theirs, ours / theirs)))  # fmt: skip
    far = get(edge(on, 2, rtt=50.0), "tpot_ms") / get(one, "tpot_ms")
    found.append(("TPOT at RTT 50 ms, 2 edges / 1 co-located session, T 0.7", "< 1", number(far, 3), verdict(far < 1, far)))
    found.append(("ids identical over all modes", "always", f"{len(wrong)} texts differ" if wrong else "identical", "missed" if wrong else "reached"))
    return found
