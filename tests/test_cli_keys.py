"""The commands that make, authorise and revoke keys, and what serves and generates with them."""

import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest

from specedge.config import SamplingParams
from specedge.net.auth import LIST, SECRET
from specedge.net.server import Server
from tests.test_cli import PROMPT, House, Runner, end, failed, models, run, start  # noqa: F401  two of them are fixtures

A = "a" * 64


@pytest.fixture
def home(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The directory of a server's keys; the user's own directory is beside it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = run("server", "keygen", tmp_path / "keys")
    assert made.status == 0 and re.fullmatch("[0-9a-f]{64}\n", made.out)
    assert made.err.startswith(f"specedge-server: the secret key is in {tmp_path}/keys/{SECRET}; next: specedge-server authorize {tmp_path}/keys ")
    return tmp_path / "keys"


def test_authorize_and_revoke(run: Runner, home: Path) -> None:  # noqa: F811
    names = ("sessions", "kv-tokens", "rows-per-s", "prompt-tokens-per-s", "in-flight", "connections")
    limits = (*(word for n, name in enumerate(names, 2) for word in (f"--{name}", n)), "--expires", "2199-01-01")
    done = run("server", "authorize", home, A, "--name", "laptop", *limits)
    assert (done.status, done.out, done.err) == (0, "", "specedge-server: laptop is authorised, also at a server that runs\n")
    line = f"{A} name=laptop sessions=2 kv_tokens=3 rows_per_s=4 prompt_tokens_per_s=5 in_flight=6 connections=7 expires=2199-01-01T00:00:00+00:00\n"
    assert line in (home / LIST).read_text()
    done = run("server", "revoke", home, "laptop")
    assert (done.status, done.out, done.err) == (0, "", "specedge-server: laptop is revoked, also at a server that runs\n")
    assert A not in (home / LIST).read_text()


def test_failures(run: Runner, home: Path, tmp_path: Path) -> None:  # noqa: F811
    failed(run("server", "keygen", home), f"{home}/{SECRET} exists and is not written over")
    failed(run("server", "authorize", home, "laptop", "--name", "x"), "'laptop' is no public key: one has 64 hexadecimal digits")
    failed(run("server", "authorize", home, A, "--name", "a b"), "name 'a b' must be")
    failed(run("server", "authorize", home, A, "--name", "x", "--sessions", "0"), "'0' is no number from 1")
    failed(run("server", "authorize", home, A, "--name", "x", "--expires", "2020-01-01"), "2020-01-01 is past")
    failed(run("server", "authorize", tmp_path, A, "--name", "x"), f"{tmp_path} holds no {SECRET}: name the directory that `specedge-server keygen`")
    failed(run("server", "authorize", home, A), "the following arguments are required: --name", 2)
    failed(run("server", "revoke", home, "nobody"), "has no key or name 'nobody'")


def test_the_key_of_a_user(run: Runner, home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Made once where it is looked for; another one where one says so."""
    path = tmp_path / "config" / "specedge" / "edge.secret"
    assert "# key is not set\n" in run("edge", "generate", "--print-config").out
    made = run("edge", "keygen")
    public = made.out.strip()
    assert made.status == 0 and f"specedge-server authorize DIR {public} --name NAME" in made.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    shown = run("edge", "generate", "--print-config").out
    assert f'key = "{path}"  # default\n' in shown and path.read_text().split("secret:")[1].strip() not in shown
    failed(run("edge", "keygen"), f"{path} exists and is not written over")
    assert run("edge", "keygen", tmp_path / "other").out.strip() != public


def test_a_server_with_keys(models: House, run: Runner, home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two processes of one user: an authorised key gets the target's text, and after it was revoked a sentence."""
    public = run("edge", "keygen").out.strip()
    process = start("server", "serve", models.target, "--device", "cpu", "--keys", home)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().decode()
        assert re.fullmatch(r"ready specedge://127\.0\.0\.1:[0-9]+/\?key=[0-9a-f]{64}\n", ready)
        usual = ("--no-draft", "--tokenizer", models.target, "--prompt", PROMPT, "--max-tokens", 8, "--json")
        generate = ("generate", "--server", ready.split()[1], *usual)
        failed(run("edge", *generate), f"does not know this key: have its operator authorise {public}")
        assert run("server", "authorize", home, public, "--name", "me").status == 0
        (want,) = models.oracle.generate([PROMPT], SamplingParams(max_tokens=8))
        assert json.loads(run("edge", *generate).out)["token_ids"] == want.token_ids
        assert run("server", "revoke", home, "me").status == 0
        failed(run("edge", *generate), "does not know this key")
        os.unlink(tmp_path / "config" / "specedge" / "edge.secret")
        failed(run("edge", *generate), "serves known keys only: make one with `specedge-edge keygen`")
        process.send_signal(signal.SIGTERM)
        ended = end(process)
        assert (ended.status, ended.out) == (0, "") and "Traceback" not in ended.err
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("keyed", [False, True])
def test_insecure_is_said_aloud(models: House, run: Runner, home: Path, keyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where everybody may come in, and only there."""
    monkeypatch.setattr(Server, "alive", property(lambda self: False))  # so that it ends
    options = ("--keys", home) if keyed else ("--insecure",)
    ended = run("server", "serve", models.target, "--device", "cpu", "--listen", "tcp://0.0.0.0:0", *options)
    warning = "specedge-server: warning: other machines can reach this address, and nothing is encrypted or authenticated"
    assert ended.err.splitlines()[:-1] == ([] if keyed else [warning])
    assert ended.out.startswith("ready specedge://") and ("/?key=" in ended.out) == keyed
