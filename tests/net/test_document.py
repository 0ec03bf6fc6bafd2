"""docs/protocol.md is enough to write a client from: here is one, of MessagePack and ZeroMQ alone, written from no file of specedge.

It speaks to a real server, sends a tree and decodes alone, and its text must be the one of the target. What it does not need is not here: keys,
resuming, quotas. If this file needs a change that the page does not explain, the page is wrong.
"""

import ast
import os
import struct
from pathlib import Path

import msgspec.msgpack as msgpack  # an encoder and a decoder of plain values: any other library would do
import zmq

from tests.net.test_server import PROMPT, Engine, Server, server  # noqa: F401  a fixture: the other side

HELLO, WELCOME, OPEN, OPENED, DRAFT, VERDICT, CLOSE = 1, 2, 3, 5, 6, 7, 9


class Client:
    """One connection and one session."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.send(HELLO, ["minimal client", b""])
        self.vocab = self.receive(WELCOME)[3]

    def send(self, number: int, fields: list[object]) -> None:
        body = msgpack.encode(fields)
        header = struct.pack("<4sBBBBII", b"SPEG", 1, 0, number, 0, len(body), 0)
        size = next(s for s in (512, 2048, 65536) if s >= 16 + len(body))
        self.socket.send((header + body).ljust(size, b"\0"))

    def receive(self, number: int) -> list:  # type: ignore[type-arg]
        assert self.socket.poll(30_000), "no answer"
        frame = self.socket.recv()
        magic, major, _minor, kind, _flags, length, _zero = struct.unpack_from("<4sBBBBII", frame)
        fields: list = msgpack.decode(frame[16 : 16 + length])  # type: ignore[type-arg]
        assert (magic, major) == (b"SPEG", 1) and kind == number, fields
        return fields

    def open(self, prompt: list[int], max_tokens: int, seed: int) -> None:
        self.session, self.text, self.round, self.end = os.urandom(16), list(prompt), 0, len(prompt) + max_tokens
        self.send(OPEN, [self.session, pack(prompt), len(prompt), len(prompt), [0.8, seed], [], max_tokens])
        assert self.receive(OPENED) == [self.session, len(prompt)]

    def draft(self, tokens: list[int], parents: list[int], run_until: int = 0) -> int:
        """A round; returns `finish`, after all verdicts if the server is to decode alone."""
        self.round += 1
        self.send(DRAFT, [self.session, self.round, len(self.text), pack(tokens), bytes(parents), run_until])
        while True:
            _, number, base, row, ids, _, finish, *_ = self.receive(VERDICT)
            assert number == self.round and base == len(self.text)
            path = []
            while row:
                path, row = [tokens[row - 1], *path], parents[row - 1]
            self.text += path + list(struct.unpack(f"<{len(ids) // 4}I", ids))
            if finish or len(self.text) >= run_until:
                return finish


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


def test_the_client_is_short_and_knows_no_file_of_ours() -> None:
    tree = ast.parse(Path(__file__).read_text())
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert body.end_lineno is not None and body.end_lineno - body.lineno < 80
    assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("specedge")]
