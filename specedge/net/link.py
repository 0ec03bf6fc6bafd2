"""Link: an edge's connection to one of its servers, and the way back to it, or to another one, when it breaks.

Dialling is slow where something is wrong, so a thread of its own does it, after a random wait that doubles from one failure to the next; the worker
only ever looks at what has come. Knows nothing of texts. Invariants: at any time either there is a connection, or one thread looks for the next,
and only that one changes the list of servers; all servers of a link serve one model.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from specedge.net import wire
from specedge.net.client import Connection, ServerError

BACKOFF, LONGEST = 0.1, 10.0  # seconds: the longest wait before the first attempt, and before any
DOUBTS = 3  # attempts in a row after which a server is believed to have another key: a network that breaks handshakes looks the same
SILENCE = 15.0  # seconds without an answer after which a connection is not believed any more
UNANSWERED = (wire.Cancel, wire.Close, wire.Lease, wire.Grown)


class Link:
    """The first of `servers` that answers. `wake` is called, from another thread, when a connection has come. Raises ServerError if none can be used.

    A server whose failure has a code refuses, and is not asked again; others may come back. When none is left the refusal is raised by `arrived`.
    """

    def __init__(self, servers: Sequence[str], tokenizer: bytes, key: str | Path | None, wake: Callable[[], None]) -> None:
        self._servers, self._tokenizer, self._key, self._wake = list(servers), tokenizer, key, wake
        self._found: queue.SimpleQueue[Connection | ServerError] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failures = 0  # since a server last was of use
        self._doubts = 0  # attempts in a row that looked like another key
        self._waiting: float | None = None  # since when an answer is
        self.why = ""  # there is no connection
        refusals: list[ServerError] = []
        for server in servers:
            try:
                self._connection: Connection | None = Connection(server, tokenizer, key)
                break
            except ServerError as e:
                refusals.append(e)
                self._servers.append(self._servers.pop(0))
        else:
            if len(refusals) == 1:
                raise refusals[0]
            raise ServerError(f"none of {len(servers)} servers can be used: {'; '.join(map(str, refusals))}")
        self.address, self.welcome = self._connection.address, self._connection.welcome

    @property
    def up(self) -> bool:
        return self._connection is not None

    @property
    def others(self) -> bool:
        """Whether there is another server to go to."""
        return len(self._servers) > 1

    @property
    def pending(self) -> bool:
        """Whether a message has come: cheap enough to be asked between two layers."""
        return self._connection is not None and self._connection.pending

    def sockets(self) -> list[object]:
        """What to poll for reading."""
        return list(self._connection.sockets) if self._connection else []

    def greet(self) -> None:
        """Say HELLO again."""
        if self._connection is not None:
            try:
                self._connection.greet()
            except ServerError as e:
                self.lose(e)

    def send(self, message: wire.Message) -> int:
        """Send a message if there is a connection; returns the bytes of its frame."""
        if self._connection is None:
            return 0
        if self._waiting is None and not isinstance(message, UNANSWERED):
            self._waiting = time.monotonic()
        try:
            return self._connection.send(message)
        except ServerError as e:
            self.lose(e)
            return 0

    def receive(self) -> list[tuple[wire.Message, int]]:
        """All messages that have come, each with the bytes of its frame."""
        if self._connection is None:
            return []
        try:
            messages = self._connection.receive()
        except ServerError as e:
            self.lose(e)
            return []
        if messages:
            self._waiting = None
            if not all(isinstance(m, wire.Welcome | wire.GoAway) for m, _ in messages):  # a server that is of use
                self._failures = 0
        elif self._waiting is not None and time.monotonic() - self._waiting > SILENCE:
            self.lose(ServerError(f"{self.address} has said nothing for {SILENCE:.0f} s"), elsewhere=True)
        return messages

    def lose(self, why: ServerError, elsewhere: bool = False) -> None:
        """Give the connection up and look for one: there, or first `elsewhere`."""
        if self._connection is None:
            return
        self._connection.close()
        self._connection, self._waiting = None, None
        self._strike(why, elsewhere)
        threading.Thread(target=self._dial, name="specedge-dial", daemon=True).start()

    def arrived(self) -> bool:
        """Whether a connection has come. Raises ServerError when there are no servers left."""
        try:
            found = self._found.get_nowait()
        except queue.Empty:
            return False
        if isinstance(found, ServerError):
            raise found
        self._connection = found
        self.address, self.welcome, self.why = found.address, found.welcome, ""
        return True

    def close(self) -> None:
        """Disconnect, giving frames on their way half a second."""
        self._closing.set()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._discard()

    def _strike(self, why: ServerError, elsewhere: bool) -> None:
        """Note a failure of the first server: forget it if it refuses, or put it last."""
        self.why = str(why)
        self._doubts = self._doubts + 1 if why.code == "server key" else 0
        if why.code and not 0 < self._doubts < DOUBTS:
            self._servers.pop(0)
            if not self._servers:
                self._found.put(why)
        elif elsewhere:
            self._servers.append(self._servers.pop(0))

    def _dial(self) -> None:
        """In a thread of its own: look for a connection until there is one."""
        while self._servers and not self._closing.wait(random.uniform(0, min(LONGEST, BACKOFF * 2**self._failures))):
            self._failures = min(self._failures + 1, 10)
            server = self._servers[0]
            try:
                self._found.put(self._checked(Connection(server, self._tokenizer, self._key)))
                break
            except Exception as e:  # whatever it is, this thread must go on: nobody else looks
                self._strike(e if isinstance(e, ServerError) else ServerError(f"cannot connect to {server}: {e}"), elsewhere=True)
        if self._closing.is_set():
            self._discard()
        self._wake()

    def _checked(self, connection: Connection) -> Connection:
        """The same connection, if its server can continue what another one began."""
        ours, theirs = self.welcome, connection.welcome
        if (theirs.model, theirs.tokenizer) == (ours.model, ours.tokenizer):
            return connection
        connection.close()
        raise ServerError(f"{connection.address} serves another model than {self.address} did: name servers of one model only", "model")

    def _discard(self) -> None:
        """Close a connection that nobody wants any more."""
        try:
            found = self._found.get_nowait()
        except queue.Empty:
            return
        if isinstance(found, Connection):
            found.close()
