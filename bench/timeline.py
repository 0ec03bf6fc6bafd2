"""A timeline of two or more edges and their server from the logs of a real cell: as SVG, and as a trace for ui.perfetto.dev.

A lane per edge (its draft forwards; those while its tree is in flight are lighter), the wire as slanted lines, the server's queue and step.
Knows nothing but the logs. Times are milliseconds from the beginning of the drawn part.
"""

from typing import Any
from xml.sax.saxutils import escape

from bench.cells import Round, rounds, windows

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#db2777", "#a16207", "#475569")
LEFT, WIDTH, LANE, GAP, TOP = 118, 1180, 34, 64, 92
QUEUE = 9  # height of a waiting tree


def draw(logs: dict[str, Any], title: str, seconds: float = 1.2) -> str:
    """The SVG text of the middle `seconds` of the first wave."""
    begin, end = windows(logs["records"])[0]
    begin = max(begin, (begin + end - seconds) / 2)
    end = min(end, begin + seconds)
    count = len(logs["edges"])
    above = (count + 1) // 2  # edges over the server, the others below: so that lines of two edges do not cross lanes
    edge_y = {e: TOP + e * (LANE + 14) for e in range(above)}
    server_y = TOP + above * (LANE + 14) - 14 + GAP
    below = server_y + LANE + GAP
    edge_y |= {e: below + (e - above) * (LANE + 14) for e in range(above, count)}
    bottom = max([server_y + LANE, *(y + LANE for y in edge_y.values())])
    found = [r for r in rounds(logs) if r.taken > begin and r.sent < end]
    out: list[str] = []

    def x(t: float) -> float:
        return LEFT + WIDTH * (min(max(t, begin), end) - begin) / (end - begin)

    def box(a: float, b: float, y: float, height: float, fill: str, more: str = "") -> None:
        if b > begin and a < end:
            out.append(f'<rect x="{x(a):.1f}" y="{y:.1f}" width="{max(0.6, x(b) - x(a)):.1f}" height="{height:.1f}" fill="{fill}" {more}/>')

    def text(at: float, y: float, words: str, more: str = "") -> None:
        out.append(f'<text x="{at:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>')

    for ms in range(0, int((end - begin) * 1000) + 1, 100):
        at = x(begin + ms / 1000)
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 12}" y2="{bottom + 10}" stroke="#e2e8f0"/>')
        text(at, bottom + 26, f"{ms}", 'text-anchor="middle" fill="#64748b"')
    text(LEFT + WIDTH, bottom + 42, "milliseconds", 'text-anchor="end" fill="#64748b"')
    for e, y in edge_y.items():
        text(LEFT - 12, y + LANE / 2 + 5, f"edge {chr(65 + e)}", f'text-anchor="end" font-weight="600" fill="{COLOURS[e % 8]}"')
        box(begin, end, y, LANE, "#f8fafc")
    text(LEFT - 12, server_y + LANE / 2 + 5, "server", 'text-anchor="end" font-weight="600" fill="#0f172a"')
    box(begin, end, server_y, LANE, "#f1f5f9")
    for e, log in enumerate(logs["edges"]):
        flights = [(r.sent, r.taken) for r in found if r.edge == e]
        for a, b in flights:
            box(a, b, edge_y[e] + LANE - 3, 3, COLOURS[e % 8], 'opacity="0.55"')
        for a, b, waited in log["grows"]:
            box(a, b, edge_y[e] + 4, LANE - 10, COLOURS[e % 8], 'stroke="#ffffff" stroke-width="0.7"' + ("" if waited else ' opacity="0.35"'))
    for r in found:
        together = sorted(other.edge for other in found if other.begun == r.begun)  # trees of one step share its box
        height = (LANE - 6) / len(together)
        lane = server_y + 3 + together.index(r.edge) * height
        _round(r, r.edge < above, edge_y[r.edge], server_y, (lane, height), x, (begin, end), box, text, out)
    for a, b, _rows, verdicts in logs["server"]["steps"]:
        if not verdicts:
            box(a, b, server_y + 3, LANE - 6, "#94a3b8")
    text(LEFT, 30, title, 'font-size="19" font-weight="700" fill="#0f172a"')
    _legend(out)
    height = bottom + 56
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="13"'
    w = LEFT + WIDTH + 24
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {height}" width="{w}" height="{height}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *out, "</svg>", ""])


def _round(
    r: Round, over: bool, y: float, server_y: float, share: tuple[float, float], x: Any, span: tuple[float, float], box: Any, text: Any,
    out: list[str],
) -> None:  # fmt: skip
    """One tree: up the wire, through queue and its `share` (y, height) of the verification, and back."""
    colour = COLOURS[r.edge % 8]
    near, far = (y + LANE, server_y) if over else (y, server_y + LANE)
    waits = far - 4 - QUEUE if over else far + 4

    def line(a: float, b: float, ya: float, yb: float, dash: str) -> None:
        if a >= span[0] and b <= span[1]:
            out.append(f'<line x1="{x(a):.1f}" y1="{ya}" x2="{x(b):.1f}" y2="{yb}" stroke="{colour}" stroke-width="1.4" {dash}/>')

    if r.asked:
        line(r.sent, r.arrived, near, waits + (0 if over else QUEUE), "")
    line(r.ended, r.came, far, near, 'stroke-dasharray="3 3"')
    box(r.arrived, r.begun, waits, QUEUE, colour, 'opacity="0.45" rx="2"')
    box(r.begun, r.ended, share[0], share[1], colour, 'stroke="#ffffff"')
    if span[0] < r.begun and r.ended < span[1] and x(r.ended) - x(r.begun) > 20:
        size = min(13, share[1] - 1)
        more = f'text-anchor="middle" fill="#ffffff" font-weight="600" font-size="{size:.0f}"'
        text((x(r.begun) + x(r.ended)) / 2, share[0] + share[1] / 2 + 0.37 * size, f"+{r.tokens}", more)
    if span[0] <= r.taken <= span[1]:
        at, middle = x(r.taken), y + LANE / 2 - 1
        fill = colour if r.hit else "#ffffff"
        out.append(f'<circle cx="{at:.1f}" cy="{middle}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>')


def _legend(out: list[str]) -> None:
    at = float(LEFT)
    for words, shape in (
        ("draft forward", '<rect x="{x}" y="48" width="20" height="14" fill="#475569"/>'),
        ("draft forward with the tree in flight", '<rect x="{x}" y="48" width="20" height="14" fill="#475569" opacity="0.35"/>'),
        ("on the wire, up and down", '<path d="M{x} 62 l10 -14 M{x} 62 m14 0 l10 -14" stroke="#475569" stroke-width="1.6"/>'),
        ("queue", '<rect x="{x}" y="51" width="20" height="9" rx="2" fill="#475569" opacity="0.45"/>'),
        ("verification, + tokens", '<rect x="{x}" y="48" width="20" height="14" fill="#475569" stroke="#fff"/>'),
        ("hit", '<circle cx="{c}" cy="55" r="4.5" fill="#475569" stroke="#475569" stroke-width="2"/>'),
        ("miss", '<circle cx="{c}" cy="55" r="4.5" fill="#fff" stroke="#475569" stroke-width="2"/>'),
    ):
        out.append(shape.format(x=f"{at:.0f}", c=f"{at + 10:.0f}"))
        out.append(f'<text x="{at + 28:.0f}" y="60" fill="#334155">{words}</text>')
        at += 28 + 7.0 * len(words) + 20


def perfetto(logs: dict[str, Any]) -> dict[str, Any]:
    """Trace events of the whole cell: a process per edge, one of the wire, one of the server."""
    start = min(r["started"] for wave in logs["records"] for r in wave)
    events: list[dict[str, Any]] = []
    names: dict[tuple[str, str], tuple[int, int]] = {}

    def span(process: str, lane: str, name: str, a: float, b: float, **more: object) -> None:
        if (process, lane) not in names:
            pid = next((p for (known, _), (p, _) in names.items() if known == process), len({p for p, _ in names}) + 1)
            tid = len(names) + 1
            names[process, lane] = pid, tid
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
        pid, tid = names[process, lane]
        events.append({"ph": "X", "name": name, "ts": (a - start) * 1e6, "dur": (b - a) * 1e6, "pid": pid, "tid": tid, "args": more})

    for e, log in enumerate(logs["edges"]):
        for a, b, waited in log["grows"]:
            span(f"edge {chr(65 + e)}", "draft", "draft" if waited else "draft in flight", a, b)
    for r in rounds(logs):
        edge = f"edge {chr(65 + r.edge)}"
        span(edge, "in flight", "hit" if r.hit else "miss", r.sent, r.taken, nodes=r.nodes, tokens=r.tokens)
        span("wire", f"{edge} down", "verdict", r.ended, r.came)
        if r.asked:
            span("wire", f"{edge} up", "draft", r.sent, r.arrived)
            span("server", f"queue of {edge}", "queue", r.arrived, r.begun)
    for a, b, rows, verdicts in logs["server"]["steps"]:
        span("server", "step", "verify" if verdicts else "prompt", a, b, rows=rows, sessions=len(verdicts))
    return {"traceEvents": events, "displayTimeUnit": "ms"}
