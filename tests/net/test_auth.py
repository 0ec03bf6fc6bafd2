"""Key files and the list of authorised keys: what is written, what is read, what is refused, and what people may do to the list by hand."""

import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specedge.net import auth
from specedge.net.auth import LIMITS, AuthError, Grant, authorize, generate, grant, load, parse, public_key, revoke

A, B = "a" * 64, "0123456789abcdef" * 4
PAST, FUTURE = datetime(2020, 1, 1, tzinfo=UTC), datetime(2199, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory of a server that knows nobody."""
    generate(tmp_path / "server" / auth.SECRET)
    return tmp_path / "server"


def known(home: Path) -> dict[str, Grant]:
    grants, wrong = parse((home / auth.LIST).read_text())
    assert wrong == []
    return grants


# ----------------------------------------------------------------------------------------------------------------------
# key files


def test_a_key_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask; the directory is made too. What is read again is the pair, and its secret is never shown."""
    path = tmp_path / "new" / "edge.secret"
    before = os.umask(0)
    try:
        public = generate(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    pair = load(path)
    assert pair.public == public == public_key(public.upper()) and len(pair.secret) == 32
    assert pair.secret.hex() in path.read_text() and pair.secret.hex() not in f"{pair} {pair!r}"
    assert public in path.read_text()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "key"
    generate(path)
    before = path.read_bytes()
    with pytest.raises(AuthError, match=f"{path} exists and is not written over"):
        generate(path)
    assert path.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuthError, match="exists and is not written over"):
        generate(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666, 0o777])
def test_a_key_that_others_could_read_is_refused(tmp_path: Path, mode: int) -> None:
    generate(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(AuthError, match=f"others may read {tmp_path}/key: run chmod 600"):
        load(tmp_path / "key")


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path / "key")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(AuthError, match="belongs to another user"):
        load(tmp_path / "key")


def test_what_is_no_key_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch(0o600)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, sentence in (("empty", "holds no secret key"), ("pipe", "is no file"), ("nothing", "there is no key at .*: make one with keygen")):
        with pytest.raises(AuthError, match=sentence):
            load(tmp_path / name)
    with pytest.raises(AuthError, match="is no file"):
        load(tmp_path)
    with pytest.raises(AuthError, match=f"{tmp_path}/empty exists and is not written over"):
        generate(tmp_path / "empty" / "key")


def test_a_secret_is_not_taken_for_a_public_key(tmp_path: Path) -> None:
    """And the sentence does not repeat it."""
    generate(tmp_path / "key")
    secret = load(tmp_path / "key").secret.hex()
    with pytest.raises(AuthError, match="this is a secret key") as e:
        public_key(auth.MARK + secret)
    assert secret not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# the list

names = st.from_regex(r"\A[A-Za-z0-9._@-]{1,48}\Z")
keys = st.binary(min_size=32, max_size=32).map(bytes.hex)
counts = st.none() | st.integers(1, 999_999_999)
dates = st.none() | st.datetimes(timezones=st.just(UTC))
grants = st.builds(Grant, keys, names, *[counts] * len(LIMITS), dates)


@given(grants)
def test_a_line_means_what_it_says(g: Grant) -> None:
    assert grant(str(g).split()) == g


words = st.sampled_from([A, B, "name=x", "name=y", "sessions=0", "expires=", "=", "#", "\n", " ", "\x00", "\u2028"])


@given(st.text() | st.lists(words).map(" ".join))
def test_any_text_is_read(text: str) -> None:
    """A line is empty, a grant or a complaint; whoever is in the result has a line of its own."""
    found, wrong = parse(text)
    lines = [line for line in text.split("\n") if line.partition("#")[0].split()]
    assert len(found) + len(wrong) == len(lines)
    for key, g in found.items():
        assert g.key == key and any(key in line.lower() and f"name={g.name}" in line for line in lines)
    assert all(re.match(r"line [0-9]+: .", sentence) for sentence in wrong)


@given(st.lists(grants, max_size=6, unique_by=(lambda g: g.key, lambda g: g.name)), st.text("# ab\t=", max_size=20))
def test_lines_do_not_hurt_each_other(all_of_them: list[Grant], noise: str) -> None:
    """Comments, blank lines and a broken line between them."""
    text = "".join(f"# {noise}\n  {g}   # {noise}\r\n\n" for g in all_of_them) + "broken\n"
    found, wrong = parse(text)
    assert list(found.values()) == all_of_them and len(wrong) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("abc name=x", "'abc' is no public key: one has 64 hexadecimal digits"),
        (f"{A}0 name=x", "is no public key"),
        (A, "the key has no name="),
        (f"{A} name=", "name '' must be 1 to 48 letters"),
        (f"{A} name={A}", "must be 1 to 48 letters"),
        (f"{A} name=a/b", "name 'a/b' must be"),
        (f"{A} name=x sessions=0", "'0' is no number from 1"),
        (f"{A} name=x sessions=-1", "'-1' is no number from 1"),
        (f"{A} name=x kv_tokens=1e3", "'1e3' is no number"),
        (f"{A} name=x kv_tokens=\u0664", "is no number"),
        (f"{A} name=x expires=soon", "'soon' is no date such as 2030-12-31"),
        (f"{A} name=x expires=2030-02-30", "'2030-02-30' is no date"),
        (f"{A} name=x expires=0001-01-01T00:00+14:00", "is no date"),
        (f"{A} name=x admin=1", "'admin=1' is not one each of name=, sessions=, kv_tokens=, rows_per_s=, "),
        (f"{A} name=x name=y", "'name=y' is not one each of"),
        (f"{A} name=x sessions", "'' is no number"),
        (f"{auth.MARK}{A} name=x", "this is a secret key, which nobody else may see"),
    ],
)
def test_a_wrong_line_admits_nobody(line: str, sentence: str) -> None:
    found, wrong = parse(f"{B} name=good\n{line}\n")
    assert list(found) == [B] and len(wrong) == 1
    assert wrong[0].startswith("line 2: ") and sentence in wrong[0] and auth.MARK + A not in wrong[0]


def test_the_first_line_of_a_key_or_a_name_holds() -> None:
    found, wrong = parse(f"{A} name=x expires=2020-01-01\n{A.upper()} name=y\n{B} name=x\n")
    assert found == {A: Grant(A, "x", expires=PAST)}
    assert [w[:7] for w in wrong] == ["line 2:", "line 3:"] and all("stands further up already" in w for w in wrong)


def test_a_date_is_the_moment_it_begins() -> None:
    """In UTC, unless it says otherwise."""
    assert grant([A, "name=x", "expires=2030-12-31"]).expires == datetime(2030, 12, 31, tzinfo=UTC)
    g = grant([A, "name=x", "expires=2030-12-31T18:00+01:00"])
    assert g.expires == datetime(2030, 12, 31, 17, tzinfo=UTC)
    assert not g.valid(g.expires) and g.valid(datetime(2030, 12, 31, 16, 59, tzinfo=UTC)) and Grant(A, "x").valid(FUTURE)


def test_authorize_and_revoke(home: Path) -> None:
    """By key or by name; a key that is there already gets what is said now; other lines stay, comments and broken ones too."""
    authorize(home, A, name="laptop", sessions="4", kv_tokens="4096", expires="2199-01-01")
    assert known(home) == {A: Grant(A, "laptop", 4, 4096, expires=FUTURE)}
    path = home / auth.LIST
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(f"# mine\n\n{path.read_text()}# the end: \u00fc\nbroken")
    before = path.read_text()
    authorize(home, B.upper(), name="phone")
    assert path.read_text() == f"{before}\n{B} name=phone\n"
    authorize(home, A, name="laptop2")
    assert parse(path.read_text())[0] == {A: Grant(A, "laptop2"), B: Grant(B, "phone")}
    revoke(home, "laptop2")
    revoke(home, B.upper())
    assert parse(path.read_text())[0] == {} and path.read_text().split("\n")[-3:] == ["# the end: \u00fc", "broken", ""]
    assert path.read_text().startswith("# mine\n\n# Keys that may use this server")
    assert sorted(p.name for p in home.iterdir()) == [auth.LIST, auth.SECRET]


@given(lines=st.lists(st.sampled_from(["", "# note", f"{A} name=a", f"{A} name=a sessions=2  # x", "broken", "\xff\udcff"])), g=grants)
def test_revoke_undoes_authorize(tmp_path_factory: pytest.TempPathFactory, lines: list[str], g: Grant) -> None:
    """Of a new key: byte by byte, bytes that are no UTF-8 included."""
    home = tmp_path_factory.mktemp("keys")
    (home / auth.SECRET).touch()
    before = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    (home / auth.LIST).write_bytes(before)
    (home / auth.LIST).chmod(0o600)
    if g.name != "a":
        authorize(home, g.key, name=g.name)
        revoke(home, g.name)
    assert (home / auth.LIST).read_bytes() == before


def test_what_authorize_and_revoke_refuse(home: Path, tmp_path: Path) -> None:
    """Each with a sentence, and the list stays as it was."""
    authorize(home, A, name="laptop")
    before = (home / auth.LIST).read_bytes()
    for call, sentence in (
        (lambda: authorize(home, B, name="laptop"), "another key has the name laptop"),
        (lambda: authorize(home, B, name="old", expires="2020-01-01"), "2020-01-01 is past"),
        (lambda: authorize(home, B, name="a b"), "name 'a b' must be"),
        (lambda: authorize(home, B, name="x\nname=y"), "must be"),
        (lambda: authorize(home, "laptop", name="x"), "'laptop' is no public key"),
        (lambda: revoke(home, "phone"), "has no key or name 'phone'"),
        (lambda: revoke(home, ""), "has no key or name ''"),
        (lambda: revoke(home, B), f"has no key or name '{B}'"),
        (lambda: authorize(tmp_path, B, name="x"), f"{tmp_path} holds no server.secret: name the directory"),
        (lambda: revoke(tmp_path / "nowhere", "x"), "holds no server.secret"),
    ):
        with pytest.raises(AuthError, match=re.escape(sentence)):
            call()
    assert (home / auth.LIST).read_bytes() == before
    (home / auth.LIST).chmod(0o620)
    for call in (lambda: authorize(home, B, name="x"), lambda: revoke(home, "laptop")):
        with pytest.raises(AuthError, match="others may change .*: run chmod go-w"):
            call()


def test_a_list_is_replaced_as_a_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it cannot be, it stays, and nothing is left beside it."""
    authorize(home, A, name="laptop")
    before = (home / auth.LIST).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AuthError, match="cannot change .*authorized_keys: No space left on device"):
        authorize(home, B, name="phone")
    assert (home / auth.LIST).read_bytes() == before and len(list(home.iterdir())) == 2
