"""Doctor: what stands between this machine and a server, one plain sentence and one remedy at a time.

Looks at one address in the order in which things go wrong: its form, the way there, the handshake (and in it keys and versions), the tokenizer, the
model, the time of a round trip, the load. What cannot be looked at because of an earlier failure is not mentioned. Prints nothing.
Invariant: it opens no session, so it costs the server some HELLOs and nothing else.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from specedge.net import wire
from specedge.net.auth import AuthError
from specedge.net.client import Connection, ServerError

TRIPS = 20  # HELLOs that are timed; the median of 20 is good to about a tenth of their spread
NEAR_FULL = 0.9
CHECKS = {"tokenizer": "tokenizer", "key": "key", "protocol": "version"}  # by the code of a refusal; all others concern the connection


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `ok` False: texts will fail, and `text` ends with a remedy."""

    check: str
    ok: bool
    text: str
    figures: dict[str, float | int | str] = field(default_factory=dict)


def examine(
    address: str, tokenizer: bytes = b"", draft_vocab: int = 0, key: str | Path | None = None, trips: int = TRIPS
) -> list[Finding]:  # fmt: skip
    """All findings about the server at `address`; `tokenizer` and `draft_vocab` are those of the draft, if there is one, `key` as in Edge."""
    begun = time.perf_counter()
    try:
        connection = Connection(address, tokenizer, key)
    except AuthError as e:
        return [Finding("key", False, str(e))]
    except ServerError as e:
        return [Finding(CHECKS.get(e.code, "connection"), False, str(e), {"code": e.code})]
    try:
        return [_reached(connection, time.perf_counter() - begun), *_match(connection.welcome, tokenizer, draft_vocab), *_time(connection, trips)]
    finally:
        connection.close()


def _reached(c: Connection, seconds: float) -> Finding:
    here, there = f"{wire.MAJOR}.{wire.MINOR}", c.welcome.build
    text = f"{c.address} answers as {there}, protocol {wire.MAJOR}, after {1000 * seconds:.0f} ms"
    return Finding("connection", True, text, {"build": there, "protocol": here, "ms": round(1000 * seconds, 3)})


def _match(w: wire.Welcome, tokenizer: bytes, draft_vocab: int) -> list[Finding]:
    model = w.model.hex()[:16] or "not named"
    figures: dict[str, float | int | str] = {"fingerprint": w.model.hex(), "vocab": w.vocab, "max_context": w.limits.max_context}
    found = [Finding("model", True, f"the target is {model}, with {w.vocab} ids and a context of {w.limits.max_context} tokens", figures)]
    if not tokenizer:
        found.append(Finding("tokenizer", True, "no draft was named, so there is nothing to compare: name one with --draft"))
    elif not w.tokenizer:
        found.append(Finding("tokenizer", True, "the server has no tokenizer to compare with; wrong drafts would only be slow"))
    else:  # another one is refused in the handshake
        found.append(Finding("tokenizer", True, "the draft's tokenizer is the target's"))
    if draft_vocab and draft_vocab < w.vocab:
        text = f"the draft knows {draft_vocab} of the target's {w.vocab} ids, and drafts nothing behind the others"
        found.append(Finding("vocabulary", True, text, {"draft_vocab": draft_vocab}))
    return found


def _time(c: Connection, trips: int) -> list[Finding]:
    """Round trips of HELLO, and the load that the last answer reports."""
    times: list[float] = []
    welcome = c.welcome
    try:
        for _ in range(trips):
            begun = time.perf_counter()
            welcome = c.ask()
            times.append(1000 * (time.perf_counter() - begun))
    except ServerError as e:
        return [Finding("round trip", False, str(e), {"answered": len(times)})]
    middle = statistics.median(times)
    jitter = statistics.median(abs(t - middle) for t in times)
    figures = {"median_ms": round(middle, 3), "jitter_ms": round(jitter, 3), "worst_ms": round(max(times), 3), "trips": trips}
    text = f"a round trip takes {middle:.1f} ms, give or take {jitter:.1f} ms, {max(times):.1f} ms at worst"
    c.socket.poll(100)  # GOAWAY comes behind WELCOME
    return [Finding("round trip", True, text, dict(figures)), _load(welcome, any(isinstance(m, wire.GoAway) for m, _ in c.receive()))]


def _load(w: wire.Welcome, leaving: bool) -> Finding:
    if leaving:
        return Finding("load", False, "the server is going down and takes no new texts: use another one, or try when it is back")
    busy, most, free, total = w.load.sessions, w.limits.max_sessions, w.load.kv_free, w.load.kv_tokens
    text = f"{busy} sessions of {most} for this account, room for {free} of {total} tokens"
    figures: dict[str, float | int | str] = {"sessions": busy, "max_sessions": most, "kv_free": free, "kv_tokens": total}
    if busy >= NEAR_FULL * most:
        text += "; new texts may have to wait: try later, or another server"
    return Finding("load", True, text, figures)
