"""docs/protocol.md is enough to write a client from: here is one, of MessagePack and ZeroMQ alone, written from no file of specedge.

It speaks to a real server, sends a tree and decodes alone, loses its connection and goes on, and its text must be the one of the target. What it does
not need is not here: keys, quotas. The digest of a tokenizer and the law of sampling are computed from the page's words, too. If this file needs a
change that the page does not explain, the page is wrong.
"""

import ast
import hashlib
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import msgspec.msgpack as msgpack  # an encoder and a decoder of plain values: any other library would do
import numpy as np
import pytest
import zmq

from tests.helpers import engine
from tests.net.test_server import PROMPT, Engine, Server, server, serving  # noqa: F401  a fixture: the other side

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
HELLO, WELCOME, OPEN, OPENED, DRAFT, VERDICT, CANCEL, CLOSE, RESUME, RESUMED, NEED_PREFILL, GONE = 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14


class Client:
    """One connection and one session."""

    def __init__(self, endpoint: str) -> None:
        self.lost = False  # a connection, so that things may come twice
        self.connect(endpoint)

    def connect(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.greet()

    def greet(self) -> None:
        self.send(HELLO, ["minimal client", b""])
        self.vocab = self.receive(WELCOME)[3]

    def send(self, number: int, fields: list[object]) -> None:
        body = msgpack.encode(fields)
        header = struct.pack("<4sBBBBII", b"SPEG", 2, 0, number, 0, len(body), 0)
        size = next(s for s in (512, 2048, 65536) if s >= 16 + len(body))
        self.socket.send((header + body).ljust(size, b"\0"))

    def receive(self, *numbers: int) -> list:  # type: ignore[type-arg]
        assert self.socket.poll(30_000), "no answer"
        frame = self.socket.recv()
        magic, major, _minor, kind, _flags, length, _zero = struct.unpack_from("<4sBBBBII", frame)
        fields: list = msgpack.decode(frame[16 : 16 + length])  # type: ignore[type-arg]
        assert (magic, major) == (b"SPEG", 2) and kind in numbers, fields
        self.kind = kind
        return fields

    def open(self, prompt: list[int], max_tokens: int, seed: int) -> None:
        self.session, self.text, self.round, self.end = os.urandom(16), list(prompt), 0, len(prompt) + max_tokens
        self.rest = [len(prompt), [0.8, seed], [], max_tokens]
        self.build()

    def build(self, answered: int = 0) -> None:
        self.send(OPEN, [self.session, pack(self.text), len(self.text), *self.rest, answered])
        assert self.receive(OPENED) == [self.session, len(self.text)]

    def draft(self, tokens: list[int], parents: list[int], run_until: int = 0) -> int:
        """A round; returns `finish`, after all verdicts if the server is to decode alone."""
        self.round, self.sent = self.round + 1, (tokens, parents, run_until)
        self.offer()
        return self.verdicts()

    def offer(self) -> None:
        tokens, parents, run_until = self.sent
        self.send(DRAFT, [self.session, self.round, len(self.text), pack(tokens), bytes(parents), run_until])

    def verdicts(self) -> int:
        """What awaits its verdict; one without tokens says only that the server lives."""
        run_until, before = self.sent[2], len(self.text)
        while True:
            _, number, base, ids, _, finish, *_ = self.receive(VERDICT)
            if (number, base) != (self.round, len(self.text)):
                assert self.lost
                continue
            self.text += list(struct.unpack(f"<{len(ids) // 4}I", ids))
            if finish or before < len(self.text) >= run_until:
                return finish

    def recover(self, endpoint: str, flying: bool) -> int:
        """The connection is lost: go on over a new one. Returns the type of what RESUME was answered by."""
        self.socket.close()
        self.lost = True
        self.connect(endpoint)
        self.send(RESUME, [self.session])
        _, *there = self.receive(RESUMED, NEED_PREFILL, GONE)
        answer = self.kind
        if answer != RESUMED or there[0] < len(self.text) or there[1] not in (self.round, self.round - 1):
            self.build(self.round - flying)
        if flying:
            self.offer()
        return answer


def pack(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def test_a_client_written_from_the_document(server: Server, oracle: Engine) -> None:  # noqa: F811
    from specedge.config import SamplingParams  # only to ask what is right

    want = oracle.generate([PROMPT], SamplingParams(0.8, 12, seed=5))[0].token_ids
    client = Client(server.endpoint)
    client.open(PROMPT, 12, seed=5)
    wrong = (want[0] + 1) % client.vocab
    assert client.draft([wrong, want[0], want[1], wrong], [0, 0, 2, 2]) == 0
    assert client.text[len(PROMPT) :] == want[:3], "two nodes were right, and a token follows them"
    assert client.draft([], []) == 0 and client.text[len(PROMPT) :] == want[:4]
    assert client.draft([], [], run_until=client.end) == 2
    assert client.text[len(PROMPT) :] == want
    client.send(CLOSE, [client.session])
    client.socket.close()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("moment", ["between rounds", "a round on its way", "a verdict on its way"])
def test_a_connection_that_is_lost(server: Server, model: Path, oracle: Engine, moment: str, elsewhere: bool) -> None:  # noqa: F811
    """RESUME on a new connection, and the session goes on; at another server, which has never heard of it, it is rebuilt. The ids are the same. A
    server whose verdict finds nobody lets the session lapse, if it does so before RESUME comes."""
    from specedge.config import SamplingParams

    want = oracle.generate([PROMPT], SamplingParams(0.8, 12, seed=5))[0].token_ids
    with serving(engine(model)) as other:
        client = Client(server.endpoint)
        client.open(PROMPT, 12, seed=5)
        wrong = (want[0] + 1) % client.vocab
        assert client.draft([wrong, want[0]], [0, 0]) == 0 and client.text[len(PROMPT) :] == want[:2]
        flying = moment != "between rounds"
        if flying:
            client.round, client.sent = 2, ([want[2], wrong, want[3]], [0, 0, 1], 0)
            client.offer()
            assert moment != "a verdict on its way" or client.socket.poll(30_000)
        answers = {GONE} if elsewhere else {RESUMED, NEED_PREFILL} if moment == "a round on its way" else {RESUMED}
        assert client.recover((other if elsewhere else server).endpoint, flying) in answers
        if flying:
            assert client.verdicts() == 0 and client.text[len(PROMPT) :] == want[:5]
        assert client.draft([want[len(client.text) - len(PROMPT)]], [0]) == 0
        assert client.draft([], [], run_until=client.end) == 2
        assert client.text[len(PROMPT) :] == want
        client.send(CLOSE, [client.session])
        client.greet()  # CLOSE has come when this is answered
        client.socket.close()
        client.connect(server.endpoint)  # a third connection, which may end what is left of the session there
        client.send(CANCEL, [client.session])
        client.greet()
        client.socket.close()


# ----------------------------------------------------------------------------------------------------------------------
# the digest of a tokenizer, and the law of sampling


def example(name: str) -> list[str]:
    """The lines of the page's one block of this kind."""
    (block,) = re.findall(rf"```{name}\n(.*?)\n```", PAGE, re.DOTALL)
    return str(block).splitlines()


def digest(table: dict[int, str]) -> str:
    return hashlib.sha256(b"".join(str(i).encode() + b"\t" + table[i].encode() + b"\n" for i in sorted(table))).hexdigest()


def test_the_digest_of_a_tokenizer() -> None:
    """The page's example, by its bytes, by its words and by our own code, which holds an added token there."""
    import tokenizers

    from specedge.text import Tokenizer

    *lines, want = example("digest")
    parts = [re.fullmatch(r"([0-9a-f ]+?)  +(\d+) +(\S+)", line) for line in lines]
    table = {int(m[2]): m[3] for m in parts if m}
    assert hashlib.sha256(b"".join(bytes.fromhex(m[1]) for m in parts if m)).hexdigest() == digest(table) == want and len(table) == len(lines) == 5
    ours = tokenizers.Tokenizer(tokenizers.models.WordLevel({token: i for i, token in table.items() if i != 4}, "a"))
    ours.add_special_tokens([table[4]])
    assert Tokenizer(ours).digest().hex() == want


def philox(seed: int, counter: int, p: int) -> tuple[int, int, int, int]:
    low, x, k = 2**32 - 1, (counter, p, 0, 0), (seed % 2**32, seed >> 32)
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = ((b >> 32) ^ x[1] ^ k[0], b & low, (a >> 32) ^ x[3] ^ k[1], a & low)
        k = (k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low
    return x


def noise(seed: int, p: int, v: int) -> tuple[int, float, np.float32]:
    """w, e and g."""
    w = philox(seed, v >> 2, p)[v & 3]
    e = min((w + 0.5) * 2**-32, 1 - 2**-24)
    return w, e, np.float32(-math.log(-math.log1p(-e)))


def test_the_noise() -> None:
    """The page's values by its words, and our own noise, up to the last bit."""
    from specedge.kernels.reference import gumbel

    (words,) = example("philox")
    assert tuple(int(w, 16) for w in words.split()) == philox(0, 0, 0)
    (line,) = example("noise")
    seed, p, v, w = (int(x, base) for x, base in zip(line.split(), (16, 10, 10, 16), strict=False))
    e, g = map(float, line.split()[4:])
    assert noise(seed, p, v) == (w, e, np.float32(g)) and float(np.float32(g)) == g
    assert gumbel(seed, p, v + 1)[v] == g
    assert [noise(2**64 - 1, 7, i)[2] for i in range(64)] == gumbel(2**64 - 1, 7, 64).tolist()


def law(z: Any, text: list[int], prompt_len: int, stop_ids: list[int], s: dict[str, Any]) -> int:
    """The token behind `text`, whose logits are `z`, by the six steps of the page."""
    f, p, output = np.float32, len(text), text[prompt_len:]
    for v, bias in s.get("bias", {}).items():
        z[v] += f(bias)
    if p < prompt_len + s.get("min_tokens", 0):
        z[stop_ids] = -np.inf
    for v in set(text):
        z[v] = z[v] / f(s.get("repetition", 1)) if z[v] > 0 else z[v] * f(s.get("repetition", 1))
        if n := output.count(v):
            z[v] = z[v] - f(s.get("frequency", 0)) * f(n) - f(s.get("presence", 0))
    if s["temperature"] < 1e-5:
        return int(z.argmax())
    z = z * f(1 / s["temperature"])
    left = sorted(range(len(z)), key=lambda v: (-z[v], v))
    if s.get("min_p"):
        left = [v for v in left if z[v] - z.max() >= np.log(f(s["min_p"]))]
    left = left[: s.get("top_k") or None]
    weights = [int(math.exp(float(z[v]) - float(z.max())) * 2**40 + 0.5) for v in left]
    bound = math.ceil(sum(weights) * s.get("top_p", 1.0))
    left = [v for i, v in enumerate(left) if i == 0 or sum(weights[:i]) < bound]
    return min(left, key=lambda v: (-(z[v] + noise(s["seed"], p, v)[2]), v))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "bias": {3: 2.0, 40: -1.5}, "repetition": 1.3}, {"temperature": 0.7}, {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.1, "top_k": 4}, {"temperature": 1.3, "top_p": 0.6}, {"temperature": 1.7, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.9, "min_tokens": 6}, {"temperature": 0.9, "min_tokens": 7}, {"temperature": 0.9, "repetition": 1.7},
        {"temperature": 0.9, "frequency": 1.1}, {"temperature": 0.9, "presence": -1.9, "frequency": 0.3, "repetition": 0.6},
        {"temperature": 1e-5, "top_k": 3}, {"temperature": 0.9, "bias": {0: 5.0, 8: 5.0}, "repetition": 2.0, "top_k": 2, "min_tokens": 100},
    ],
)  # fmt: skip
def test_the_law_of_sampling(sampling: dict[str, Any]) -> None:
    """Computed from the page's words, for rows of a tree: the last two tokens of the text hang below the root. Logits are coarse: there are ties."""
    import torch

    from specedge.config import SamplingParams
    from specedge.engine.sampler import Ask, Sampler

    vocab, prompt_len, stop, dice = 48, 5, [2, 5, 8], np.random.default_rng(1)
    names = {"repetition": "repetition_penalty", "frequency": "frequency_penalty", "presence": "presence_penalty", "bias": "logit_bias"}
    for seed in range(60):
        text = dice.integers(0, 12, prompt_len + 6).tolist()
        z = (dice.normal(0, 2, vocab) * 4).round().astype(np.float32) / 4
        z[stop] += np.float32(3)
        params = SamplingParams(max_tokens=100, seed=seed, **{names.get(name, name): value for name, value in sampling.items()})
        ask = Ask(params, text[:-2], prompt_len, frozenset(stop), [text[-2:]])
        (token,) = Sampler(vocab, vocab, torch.device("cpu"))(torch.from_numpy(z.copy())[None], [ask])
        assert token == law(z, text, prompt_len, stop, {**sampling, "seed": seed})


# ----------------------------------------------------------------------------------------------------------------------


def test_the_client_is_short_and_knows_no_file_of_ours() -> None:
    tree = ast.parse(Path(__file__).read_text())
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert body.end_lineno is not None and body.end_lineno - body.lineno < 80
    assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("specedge")]
