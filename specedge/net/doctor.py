"""Doctor: what stands between this machine and a server, one plain sentence and one remedy at a time.

Looks at one address in the order in which things go wrong: its form, the way there, the handshake (and in it keys and versions), the tokenizer, the
model, the time of a round trip, the load; then whether several addresses are of use to one edge. What cannot be looked at because of an
earlier failure is not mentioned. Prints nothing.
Invariant: it opens no session, so it costs the server some HELLOs and nothing else.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specedge.net import wire
from specedge.net.auth import AuthError
from specedge.net.client import Connection, ServerError, endpoint

TRIPS = 20  # HELLOs that are timed; the median of 20 is good to about a tenth of their spread
NEAR_FULL = 0.9
CHECKS = {"tokenizer": "tokenizer", "key": "key", "server key": "key", "protocol": "version"}  # by a refusal's code; all others: connection


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `ok` False: texts will fail, and `text` ends with a remedy."""

    check: str
    ok: bool
    text: str
    figures: dict[str, float | int | str] = field(default_factory=dict)


def examine_all(addresses: Sequence[str], tokenizer: bytes = b"", draft_vocab: int = 0, key: str | Path | None = None) -> dict[str, list[Finding]]:
    """`examine` each; a server that cannot continue the texts of the first one that answers has another finding, since an edge refuses it."""
    found = {address: examine(address, tokenizer, draft_vocab, key) for address in addresses}
    served = {a: f.figures for a, findings in found.items() for f in findings if f.check == "model"}
    for address, figures in served.items():
        first = next(iter(served))
        if any(figures[name] != served[first][name] for name in ("fingerprint", "tokenizer")):
            text = f"this is another model than at {first.partition('/?')[0]}, and edges refuse the second they meet: name servers of one model only"
            found[address].append(Finding("same model", False, text))
    return found


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
    keyed = bool(endpoint(address)[2])
    try:
        reached = _reached(connection, time.perf_counter() - begun)
        return [reached, *_match(connection.welcome, tokenizer, draft_vocab), *_time(connection, trips, keyed)]
    finally:
        connection.close()


def _reached(c: Connection, seconds: float) -> Finding:
    here, there = f"{wire.MAJOR}.{wire.MINOR}", c.welcome.build
    text = f"{c.address} answers as {there}, protocol {wire.MAJOR}, after {1000 * seconds:.0f} ms"
    return Finding("connection", True, text, {"build": there, "protocol": here, "ms": round(1000 * seconds, 3)})


def _match(w: wire.Welcome, tokenizer: bytes, draft_vocab: int) -> list[Finding]:
    model = w.model.hex()[:16] or "not named"
    figures: dict[str, float | int | str] = {
        "fingerprint": w.model.hex(), "tokenizer": w.tokenizer.hex(), "vocab": w.vocab, "max_context": w.limits.max_context,
    }  # fmt: skip
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


def _time(c: Connection, trips: int, keyed: bool) -> list[Finding]:
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
    return [Finding("round trip", True, text, dict(figures)), _load(welcome, any(isinstance(m, wire.GoAway) for m, _ in c.receive()), keyed)]


def _load(w: wire.Welcome, leaving: bool, keyed: bool) -> Finding:
    """Warns of what is scarce. Sessions are counted over the whole server, but limited by account: the two can be compared only without keys, where
    everybody is one account."""
    if leaving:
        return Finding("load", False, "the server is going down and takes no new texts: use another one, or try when it is back")
    busy, most, free, total = w.load.sessions, w.limits.max_sessions, w.load.kv_free, w.load.kv_tokens
    held = f"the server has {busy} sessions open, this key may have {most} of its own" if keyed else f"{busy} of {most} sessions are open"
    text = f"{held}, and there is room for {free} of {total} tokens"
    figures: dict[str, float | int | str] = {"sessions": busy, "max_sessions": most, "kv_free": free, "kv_tokens": total}
    if (not keyed and busy >= NEAR_FULL * most) or free <= (1 - NEAR_FULL) * total:
        text += "; new texts may have to wait: try later, or another server"
    return Finding("load", True, text, figures)
