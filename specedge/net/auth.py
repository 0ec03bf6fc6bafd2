"""Keys: who a server is, and who may connect to it.

Holds key files, the list of authorised keys, and the thread that answers ZeroMQ's question whether a key may come in (ZAP, RFC 27), without which
CURVE would admit anybody. Keys are 32 bytes, for people 64 hexadecimal digits: they need no quoting in a shell, a file or an address. Knows nothing
of sessions, messages or models. Invariants: a secret is written once, for its owner alone, never read when others could read it too, and never shown;
a key that is not in the list is not admitted, whatever else fails.
"""

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from specedge.config import SpecedgeError

log = logging.getLogger(__name__)
SECRET, LIST = "server.secret", "authorized_keys"  # in the directory of a server
MARK = "secret:"  # so that a secret key is never taken for a public one
HEADER = """\
# Keys that may use this server, one a line: PUBLIC_KEY name=NAME [expires=DATE], and limits such as sessions=N (specedge-server authorize --help)
# A running server re-reads this file; a line that it cannot read admits nobody.
"""
LIMITS = ("sessions", "kv_tokens", "rows_per_s", "prompt_tokens_per_s", "in_flight", "connections")  # fields of a Grant and of a Quota
READERS_BUT_OWNER, WRITERS_BUT_OWNER = 0o077, 0o022  # permission bits
CURVE_EXTRA = 33  # bytes that encryption adds to a frame; they count for MAXMSGSIZE (measured)
TURN = 100  # milliseconds between two looks at the list


class AuthError(SpecedgeError):
    """A key, a key file or a list of keys that cannot be used."""


# ----------------------------------------------------------------------------------------------------------------------
# key files


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key pair as a file holds it; `secret` is 32 bytes, `public` 64 hexadecimal digits."""

    public: str
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair({self.public})"


def public_key(text: str) -> str:
    """A public key as typed by a person, in the one form that is compared; AuthError if it is none."""
    if text.startswith(MARK):
        raise AuthError("this is a secret key, which nobody else may see: give the public one")
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise AuthError(f"{text[:80]!r} is no public key: one has 64 hexadecimal digits, as keygen prints it")
    return text.lower()


def generate(path: Path) -> str:
    """Write a new secret key to `path`, which must not exist; returns its public key."""
    public, secret = (z85.decode(k) for k in zmq.curve_keypair())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as e:
        raise AuthError(f"{e.filename} exists and is not written over: use it, or name another place") from None
    except OSError as e:
        raise AuthError(f"cannot write {path}: {e.strerror}") from None
    with open(descriptor, "w") as f:
        f.write(f"# public key {public.hex()}\n{MARK}{secret.hex()}\n")
    return public.hex()


def load(path: Path) -> KeyPair:
    """The key pair in a file that `generate` wrote."""
    try:
        text = _read(path, READERS_BUT_OWNER).decode("ascii", "replace")
    except FileNotFoundError:
        raise AuthError(f"there is no key at {path}: make one with keygen") from None
    except OSError as e:
        raise AuthError(f"cannot read {path}: {e.strerror}; let this user read it, or name the file that keygen wrote") from None
    found = re.search(f"^{MARK}([0-9a-f]{{64}})$", text, re.MULTILINE)
    if not found:
        raise AuthError(f"{path} holds no secret key: make one with keygen")
    secret = bytes.fromhex(found[1])
    return KeyPair(z85.decode(zmq.curve_public(z85.encode(secret))).hex(), secret)


def _read(path: Path, forbidden: int) -> bytes:
    """The bytes of a file that belongs to this user and whose mode has none of the `forbidden` bits. OSError, AuthError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it the open of a pipe would wait for a writer
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise AuthError(f"{path} is no file: put one there, or name another")
        if info.st_uid != os.geteuid():
            raise AuthError(f"{path} belongs to another user, who may know or change it: make it your own")
        if info.st_mode & forbidden:
            verb, mode = ("read", "600") if forbidden == READERS_BUT_OWNER else ("change", "go-w")
            raise AuthError(f"others may {verb} {path}: run chmod {mode} on it, and make sure that nobody did")
        with open(descriptor, "rb", closefd=False) as f:
            return f.read()
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------
# the list of authorised keys


@dataclass(frozen=True, slots=True)
class Grant:
    """What one key may do. None: as much as the server allows anybody; never."""

    key: str  # public
    name: str
    sessions: int | None = None
    kv_tokens: int | None = None
    rows_per_s: int | None = None
    prompt_tokens_per_s: int | None = None
    in_flight: int | None = None
    connections: int | None = None
    expires: datetime | None = None

    def valid(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires

    def __str__(self) -> str:
        limits = "".join(f" {n}={v}" for n in LIMITS if (v := getattr(self, n)) is not None)
        return f"{self.key} name={self.name}{limits}" + (f" expires={self.expires.isoformat()}" if self.expires else "")


def _name(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9._@-]{1,48}", text):  # shorter than a key
        raise AuthError(f"name {text[:80]!r} must be 1 to 48 letters, digits, or any of . _ @ -")
    return text


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise AuthError(f"{text[:80]!r} is no number from 1 to 999999999")
    return int(text)


def _date(text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise AuthError(f"{text[:80]!r} is no date such as 2030-12-31 or 2030-12-31T18:00+01:00") from None


FIELDS: Mapping[str, Callable[[str], Any]] = {"name": _name, **dict.fromkeys(LIMITS, _count), "expires": _date}


def grant(words: list[str]) -> Grant:
    """The meaning of a line's words; AuthError if there is none."""
    key, fields = public_key(words[0]), dict[str, Any]()
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name not in FIELDS or name in fields:
            raise AuthError(f"{word[:80]!r} is not one each of {'=, '.join(FIELDS)}=")
        fields[name] = FIELDS[name](value)
    if "name" not in fields:
        raise AuthError("the key has no name=")
    return Grant(key, **fields)


def _words(line: str) -> list[str]:
    return line.partition("#")[0].split()


def _is(line: str, who: str) -> bool:
    """Whether a line is about a key or a name; it need not be a right one."""
    words = _words(line)
    return bool(words) and (words[0].lower() == who.lower() or f"name={who}" in words[1:])


def parse(text: str) -> tuple[dict[str, Grant], list[str]]:
    """The grants in a list by key, and a sentence for each line that is none; the first line of a key or name holds."""
    grants, names, wrong = dict[str, Grant](), set[str](), list[str]()
    for number, line in enumerate(text.split("\n"), 1):
        if words := _words(line):
            try:
                g = grant(words)
                if g.key in grants or g.name in names:
                    raise AuthError(f"the key or the name {g.name} stands further up already")
            except AuthError as e:
                wrong.append(f"line {number}: {e}")
            else:
                grants[g.key] = g
                names.add(g.name)
    return grants, wrong


def authorize(directory: Path, key: str, **fields: str) -> Grant:
    """Add a key to the list of the server in `directory`, or change what is said there about it."""
    new = grant([key, *(f"{name}={value}" for name, value in fields.items())])
    if not new.valid(datetime.now(UTC)):
        raise AuthError(f"{fields['expires']} is past: name a later date")
    with _edit(directory) as lines:
        if any(_is(line, new.name) and not _is(line, new.key) for line in lines):
            raise AuthError(f"another key has the name {new.name} in {directory / LIST}: choose another name, or revoke that one first")
        at = next((i for i, line in enumerate(lines) if _is(line, new.key)), None)
        if at is None:
            lines.insert(-1, str(new))  # before the empty one
        else:
            lines[at] = str(new)
    return new


def revoke(directory: Path, who: str) -> None:
    """Take the lines of a key, or of a name, from the list of the server in `directory`."""
    with _edit(directory) as lines:
        left = [line for line in lines if not _is(line, who)]
        if len(left) == len(lines):
            raise AuthError(f"{directory / LIST} has no key or name {who[:80]!r}")
        lines[:] = left


@contextlib.contextmanager
def _edit(directory: Path) -> Iterator[list[str]]:
    """The lines of a list, the last one being empty, to be changed in place; then the file is replaced as a whole. One at a time."""
    path = directory / LIST
    if not os.path.exists(directory / SECRET):
        raise AuthError(f"{directory} holds no {SECRET}: name the directory that `specedge-server keygen` made")
    try:
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = _read(path, WRITERS_BUT_OWNER).decode(errors="surrogateescape") if path.exists() else HEADER
            lines = (text if text.endswith("\n") or not text else text + "\n").split("\n")
            yield lines
            descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{LIST}.")
            try:
                with open(descriptor, "wb") as f:
                    f.write("\n".join(lines).encode(errors="surrogateescape"))
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        finally:
            os.close(lock)
    except OSError as e:
        raise AuthError(f"cannot change {path}: {e.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# the authenticator


class Authenticator:
    """Answers for all sockets of `context` whether a key may connect, in a thread of its own, after the list of the server in `directory`, which it
    reads at every handshake and ten times a second. A thread that has died admits nobody more; whoever made it watches `alive`.

    `users`: the keys that are valid now, each with its grant; another mapping whenever the list or the time has changed it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", directory: Path) -> None:
        self.keys = load(directory / SECRET)
        self.users: Mapping[str, Grant] = {}
        self._path = directory / LIST
        self._data, self._grants, self._said = b"", dict[str, Grant](), ""
        if wrong := self._refresh():
            raise AuthError(wrong[0])
        self._zap = context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specedge-authenticator")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                asked = self._zap.poll(TURN)
                for sentence in self._refresh():
                    log.error("%s", sentence)
                if asked:
                    self._answer()
        except Exception:
            log.exception("the authenticator failed; nobody is admitted any more")
        finally:
            self._zap.close(linger=0)

    def _refresh(self) -> list[str]:
        """Look at the list and the clock; returns what is wrong with the list, once. A list that cannot be read, for want of descriptors or because
        others may change it, stays as it was: an attacker must not end honest sessions so. One that is not there admits nobody."""
        wrong: list[str] = []
        try:
            data = _read(self._path, WRITERS_BUT_OWNER)
            self._said = ""
        except FileNotFoundError:
            data = b""
        except (OSError, AuthError) as e:
            data, said = self._data, f"cannot read the list of keys: {e}"
            wrong, self._said = [said] if said != self._said else [], said
        if data != self._data:
            self._data = data
            self._grants, lines = parse(data.decode(errors="replace"))
            wrong += [f"{self._path}, {line}" for line in lines]
        now = datetime.now(UTC)
        users = {key: g for key, g in self._grants.items() if g.valid(now)}
        if users != self.users:
            self.users = users
        return wrong

    def _answer(self) -> None:
        version, request, _domain, address, _route, _mechanism, *credentials = self._zap.recv_multipart()
        key = b"".join(credentials).hex()
        known = self.users.get(key)
        log.info("key %s from %s is %s", key, address.decode(errors="replace"), known.name if known else "not authorised")
        self._zap.send_multipart([version, request, *((b"200", b"OK", key.encode()) if known else (b"400", b"not authorised", b"")), b""])
