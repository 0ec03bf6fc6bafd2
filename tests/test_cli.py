"""The two commands, over a tiny random model whose tokens are bytes: what they print, where, and with which status they end.

One server is started for all tests. What an edge prints comes from processes of its own, as few as will do; failures, of which there are many,
are run in this process, which costs no start. Every one of them is a sentence on standard error, and nothing more.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from specedge import cli
from specedge.config import DraftConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.net.edge import Edge
from specedge.net.server import Server
from tests.helpers import BYTES, byte_tokenizer, random_model

PATIENCE = 120.0  # seconds until a test gives up on a process
PROMPT = "def fibonacci(n):"
SHAPE = {"vocab_size": BYTES, "eos_token_id": 256, "max_position_embeddings": 6000}
# SIGINT ignored by a parent, as a shell does for jobs in the background, stays ignored: a person at a keyboard does not run it so
PROGRAM = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from specedge.cli import {0}; {0}()"


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(name), *map(str, arguments)]


def start(name: str, *arguments: object) -> "subprocess.Popen[bytes]":
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(name, *arguments), bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


@dataclass
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str


def end(process: "subprocess.Popen[bytes]", stdin: bytes = b"", out: bytes = b"", err: bytes = b"") -> Ended:
    """Wait for a process; `out` and `err` are what was read of it already."""
    try:
        more = process.communicate(stdin, timeout=PATIENCE)
    finally:
        process.kill()
    return Ended(process.returncode, (out + more[0]).decode(), (err + more[1]).decode())


@dataclass
class House:
    """Models on disk: a target, a draft, one with another tokenizer, and an Engine over the target; the address of a server."""

    target: Path
    draft: Path
    other: Path
    oracle: Engine
    ready: str = ""

    @property
    def address(self) -> str:
        return self.ready.removeprefix("ready ").strip()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> House:
    at = tmp_path_factory.mktemp("models")
    strange = byte_tokenizer()
    strange.add_special_tokens(["<other>"])
    target = random_model(at / "target", 3, byte_tokenizer(), **SHAPE)
    draft = random_model(at / "draft", 3, byte_tokenizer(), **{**SHAPE, "num_hidden_layers": 1})
    other = random_model(at / "other", 3, strange, **{**SHAPE, "vocab_size": BYTES + 1})
    return House(target, draft, other, Engine.from_pretrained(target, device="cpu"))


@pytest.fixture(scope="module")
def house(models: House) -> Iterator[House]:
    """The models, and a server; at the end SIGTERM stops it, with status 0 and nothing more on standard output."""
    process = start("server", "serve", models.target, "--device", "cpu")
    try:
        assert process.stdout is not None
        models.ready = process.stdout.readline().decode()
        yield models
        process.send_signal(signal.SIGTERM)
        ended = end(process)
        assert (ended.status, ended.out) == (0, ""), ended.err
        assert "Traceback" not in ended.err
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def replies(house: House) -> dict[str, Ended]:
    """Of the edge's command in all its ways, two at a time. `draft` is sampled with a seed of its own, which `again` repeats without a draft."""
    generate = ("generate", "--server", house.address, "--device", "cpu", "--max-tokens", 24)
    with_draft, without = ("--draft", house.draft), ("--no-draft", "--tokenizer", house.target)

    def run(*arguments: object, stdin: bytes = b"") -> Ended:
        return end(start("edge", *generate, *arguments), stdin)

    with ThreadPoolExecutor(2) as pool:
        draft = pool.submit(run, *with_draft, "--prompt", PROMPT, "--temperature", 0.8, "--json")
        running = {
            "text": pool.submit(run, *with_draft, "--prompt", PROMPT),
            "stdin": pool.submit(run, *without, "--prompt", "-", "--json", stdin=PROMPT.encode()),
            "no nodes": pool.submit(run, *with_draft, "--prompt", PROMPT, "--tree-size", 0, "--json", "--echo"),
            "not proactive": pool.submit(run, *with_draft, "--prompt", PROMPT, "--no-proactive", "--json"),
        }
        seed = json.loads(draft.result().out)["seed"]
        running["again"] = pool.submit(run, *without, "--prompt", PROMPT, "--temperature", 0.8, "--seed", seed, "--json")
        return {"draft": draft.result()} | {name: f.result() for name, f in running.items()}


@pytest.fixture(scope="module")
def want(models: House) -> tuple[str, list[int]]:
    """The greedy text, and its ids."""
    (done,) = models.oracle.generate([PROMPT], SamplingParams(max_tokens=24))
    return done.text, done.token_ids


# ----------------------------------------------------------------------------------------------------------------------
# specedge-server


def test_ready(house: House) -> None:
    """One line, which names a port that can be connected to."""
    match = re.fullmatch(r"ready specedge://127\.0\.0\.1:(\d+)\n", house.ready)
    assert match
    socket.create_connection(("127.0.0.1", int(match[1])), PATIENCE).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server(models: House, number: signal.Signals) -> None:
    """Status 0, and nothing is open, so at once; nothing but the line that it is ready on standard output."""
    process = start("server", "serve", models.target, "--device", "cpu", "--listen", "tcp://127.0.0.1:0")
    try:
        assert process.stdout is not None and process.stdout.readline().startswith(b"ready specedge://127.0.0.1:")
        process.send_signal(number)
        begun = time.monotonic()
        ended = end(process)
        assert (ended.status, ended.out) == (0, "") and "Traceback" not in ended.err
        assert time.monotonic() - begun < cli.DRAIN
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("when", ["ready", "draining"])
def test_a_server_to_whom_nobody_listens_ends(models: House, when: str) -> None:
    """Its pipes are closed before it prints that it is ready, or before it says that it drains: it ends all the same."""
    process = start("server", "serve", models.target, "--device", "cpu", "--listen", "tcp://127.0.0.1:0")
    try:
        assert process.stdout is not None and process.stderr is not None
        if when == "draining":
            assert process.stdout.readline().startswith(b"ready ")
        process.stdout.close()
        process.stderr.close()
        if when == "draining":
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 1
    finally:
        process.kill()
        process.wait()


def test_a_signal_sends_texts_to_the_other_server(house: House) -> None:
    """SIGTERM to a process under two texts, one drafted: both go on at the server beside it with the same ids, and it ends well before its 30 s."""
    prompt, each = [1, 2, 3], [SamplingParams(0.8, 1000, seed=seed, ignore_eos=True) for seed in (1, 2)]
    want = [house.oracle.generate([prompt], params)[0].token_ids for params in each]
    first = start("server", "serve", house.target, "--device", "cpu")
    try:
        assert first.stdout is not None
        servers = [first.stdout.readline().decode().split()[1], house.address]
        config = DraftConfig(tree_size=7, max_sessions=1)
        with Edge(servers, house.draft, config=config, device="cpu") as drafting, Edge(servers) as plain:
            streams = [edge.stream(prompt, params) for edge, params in zip((drafting, plain), each, strict=True)]
            got = [next(stream).token_ids for stream in streams]
            first.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            for ids, stream in zip(got, streams, strict=True):
                ids += [i for chunk in stream for i in chunk.token_ids]
            assert got == want
            assert [edge._link.address for edge in (drafting, plain)] == [house.address] * 2, "nobody had ended before"
        ended = end(first)
        assert (ended.status, ended.out) == (0, "") and "Traceback" not in ended.err
        assert time.monotonic() - begun < cli.DRAIN
    finally:
        first.kill()
        first.wait()


# ----------------------------------------------------------------------------------------------------------------------
# specedge-edge


def test_text_goes_to_standard_output(replies: dict[str, Ended], want: tuple[str, list[int]]) -> None:
    """The text, a newline, and nothing else; what there is to say about it goes to standard error."""
    ended = replies["text"]
    assert (ended.status, ended.out) == (0, want[0] + "\n")
    assert re.fullmatch(r"specedge-edge: 24 tokens, \d+ rounds, [\d.]+ tokens per round, seed \d+\n", ended.err)


@pytest.mark.parametrize("name", ["stdin", "no nodes", "not proactive"])
def test_ids_are_those_of_the_target(replies: dict[str, Ended], want: tuple[str, list[int]], name: str) -> None:
    """With a draft or without, from an argument or from standard input."""
    record = json.loads(replies[name].out)
    assert (record["text"], record["token_ids"], record["finish_reason"]) == (*want, "length")


@pytest.mark.parametrize("name", ["draft", "stdin", "no nodes", "not proactive", "again"])
def test_json_is_one_object(replies: dict[str, Ended], name: str) -> None:
    """On one line, with exactly these fields; standard error is empty unless --echo fills it."""
    ended = replies[name]
    assert ended.status == 0 and ended.out.count("\n") == 1
    record = json.loads(ended.out)
    assert list(record) == ["text", "token_ids", "finish_reason", "seed", "usage", "speculation"]
    assert record["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": len(record["token_ids"])}
    used = record["speculation"]
    assert set(used) == {"rounds", "drafted", "accepted", "tokens_per_round", "hits", "misses", "bytes_up", "bytes_down"}
    assert used["tokens_per_round"] == round(len(record["token_ids"]) / used["rounds"], 3)
    assert used["bytes_up"] % 512 == used["bytes_down"] % 512 == 0 < used["bytes_up"]
    assert ended.err == (record["text"] + "\n" if name == "no nodes" else "")
    drafts = name in ("draft", "not proactive")
    assert (used["drafted"] > 0, used["hits"] + used["misses"] > 0) == (drafts, drafts)


def test_a_seed_is_reported_and_repeats_the_text(replies: dict[str, Ended], models: House) -> None:
    """Sampled at 0.8: drawn once, and with it the same text again, with a draft, without one, or by the target alone."""
    drawn, again = (json.loads(replies[name].out) for name in ("draft", "again"))
    assert drawn["seed"] == again["seed"] and 0 <= drawn["seed"] < 2**64
    (done,) = models.oracle.generate([PROMPT], SamplingParams(0.8, 24, seed=drawn["seed"]))
    assert (drawn["text"], drawn["token_ids"]) == (again["text"], again["token_ids"]) == (done.text, done.token_ids)


@pytest.fixture(scope="module")
def interrupted(house: House) -> tuple[Ended, Ended, str]:
    """Two edges that were stopped with Ctrl-C after they had shown something: as text, and as JSON with --echo; and the text without that."""
    most = 5000  # takes seconds
    arguments = ("generate", "--server", house.address, "--device", "cpu", "--no-draft", "--tokenizer", house.target, "--prompt", PROMPT)

    def stopped(*more: object) -> Ended:
        process = start("edge", *arguments, "--max-tokens", most, *more)
        stream = process.stderr if more else process.stdout
        assert stream is not None
        shown = stream.read(1)  # or nothing, if it ends before it shows anything
        process.send_signal(signal.SIGINT)
        return end(process, err=shown) if more else end(process, out=shown)

    with ThreadPoolExecutor(2) as pool:
        text, record = pool.submit(stopped), pool.submit(stopped, "--json", "--echo", "--temperature", 0.8)
        ended = text.result()
        (done,) = house.oracle.generate([PROMPT], SamplingParams(max_tokens=max(1, len(ended.out.encode()))))
        return ended, record.result(), done.text


def test_ctrl_c_keeps_what_came(interrupted: tuple[Ended, Ended, str]) -> None:
    """The beginning of the text, and a sentence with its length; status 130."""
    ended, _, whole = interrupted
    assert ended.status == 130
    assert ended.out.endswith("\n") and len(ended.out) > 1 and whole.startswith(ended.out[:-1])
    match = re.fullmatch(r"\n?specedge-edge: stopped after (\d+) tokens\n", ended.err)
    assert match and 0 < int(match[1]) < 5000, ended.err


def test_ctrl_c_in_json(interrupted: tuple[Ended, Ended, str]) -> None:
    ended = interrupted[1]
    assert ended.status == 130 and "Traceback" not in ended.err
    record = json.loads(ended.out)
    assert record["finish_reason"] == "cancelled"
    assert 0 < len(record["token_ids"]) == record["usage"]["completion_tokens"] < 5000
    assert record["text"] and ended.err.startswith(record["text"])


def test_ctrl_c_reports_the_seed(interrupted: tuple[Ended, Ended, str]) -> None:
    """Without it what came could never be had again."""
    record = json.loads(interrupted[1].out)
    assert isinstance(record["seed"], int)
    assert record["usage"]["prompt_tokens"] == len(PROMPT)


# ----------------------------------------------------------------------------------------------------------------------
# failures


@dataclass
class Runner:
    """Runs a command in this process."""

    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def __call__(self, name: str, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", [f"specedge-{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            getattr(cli, name)()
        assert isinstance(e.value.code, int)
        return Ended(e.value.code, *self.capfd.readouterr())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Runner]:
    """Warnings and signals are afterwards handled as they were before."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield Runner(monkeypatch, capfd)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def failed(ended: Ended, sentence: str, status: int = 1) -> None:
    """One sentence on standard error, its subject being the command; nothing on standard output."""
    assert (ended.status, ended.out) == (status, ""), ended
    lines = ended.err.splitlines()
    assert lines and re.search(sentence, lines[-1]) and lines[-1].startswith("specedge-"), ended.err
    assert len(lines) == 1 or status == 2 and lines[0].startswith("usage: "), ended.err


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port: int = s.getsockname()[1]
        return port


EDGE: list[tuple[list[str], str]] = [  # {target}, {draft}, {other}, {address}, {none}: filled in by the test
    (["--server", "specedge://127.0.0.1:{none}"], "no server at specedge://127.0.0.1:[0-9]+: Connection refused; check the address"),
    (["--server", "127.0.0.1:7000"], "'127.0.0.1:7000' is no server address: write it as specedge://HOST:PORT"),
    (["--temperature", "3"], "temperature is 3.0, but must be between 0 and 2"),
    (["--temperature", "nan"], "temperature is nan, but must be between 0 and 2"),
    (["--max-tokens", "-5"], "max_tokens is -5, but must be an integer of at least 1"),
    (["--max-tokens", "6000"], "the server refuses: 17 prompt tokens and max_tokens 6000 exceed this server's context of 6000: shorten one of them"),
    (["--seed", "-1"], "seed is -1, but must be an integer in 0"),
    (["--tree-size", "256"], "tree_size is 256, but must be an integer between 0 and 255"),
    (["--prompt", ""], "the prompt holds no tokens, at least one is needed"),
    (["--draft", "{target}/nothing"], "nothing is no directory and no hub id such as owner/name"),
    (["--draft", "{other}"], "refuses: the draft's tokenizer is not the target's: use a draft with the same vocabulary, or none"),
    (["--demo"], "say how to draft: --draft MODEL, --no-draft or --demo"),
]


@pytest.mark.parametrize(("arguments", "sentence"), EDGE, ids=[" ".join(a) for a, _ in EDGE])
def test_failures_of_the_edge(house: House, run: Runner, arguments: list[str], sentence: str) -> None:
    values = {"target": house.target, "draft": house.draft, "other": house.other, "none": unused()}
    server = [] if "--server" in arguments else ["--server", house.address]
    usual = [*server, "--draft", str(house.draft), "--device", "cpu", "--prompt", PROMPT]
    failed(run("edge", "generate", *usual, *(a.format(**values) for a in arguments)), sentence)


def test_a_long_prompt_is_announced_on_a_terminal(house: House, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ("--max-tokens", 2, "--no-draft", "--tokenizer", house.target, "--prompt", "x" * 1500)
    first = run("edge", "generate", "--server", house.address, *usual)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    second = run("edge", "generate", "--server", house.address, *usual)
    assert first.status == second.status == 0 and second.out == first.out
    assert second.err.startswith("specedge-edge: waiting for the server to read 1,500 tokens\n") and "waiting" not in first.err


def test_the_next_of_several_servers_is_taken(house: House, run: Runner, want: tuple[str, list[int]]) -> None:
    servers = ["--server", f"specedge://127.0.0.1:{unused()}", "--server", house.address]
    ended = run("edge", "generate", *servers, "--draft", house.draft, "--device", "cpu", "--prompt", PROMPT, "--json", "--max-tokens", 4)
    assert (ended.status, json.loads(ended.out)["token_ids"]) == (0, want[1][:4])


def test_the_doctor(house: House, run: Runner) -> None:
    """A line and a status for people, the same as one object for programs."""
    well = run("edge", "doctor", "--server", house.address, "--draft", house.draft)
    assert (well.status, well.err) == (0, "") and all(line.startswith("ok   ") for line in well.out.splitlines())
    assert [line.split(":")[0].removeprefix("ok   ") for line in well.out.splitlines()][:3] == ["connection", "model", "tokenizer"]
    ill = run("edge", "doctor", "--server", house.address, "--draft", house.other)
    assert (ill.status, ill.out.count("\n")) == (1, 1) and ill.out.startswith("FAIL tokenizer: ")
    both = run("edge", "doctor", "--server", house.address, "--server", f"specedge://127.0.0.1:{unused()}", "--json")
    one, two = json.loads(both.out).values()
    assert both.status == 1 and {f["ok"] for f in one} == {True} and [f["ok"] for f in two] == [False]
    assert [f["figures"]["trips"] for f in one if f["check"] == "round trip"] == [20]


def test_without_a_draft_the_tokenizer_is_named(house: House, run: Runner) -> None:
    usual = ("generate", "--server", house.address, "--prompt", PROMPT)
    failed(run("edge", *usual), "say how to draft")
    failed(run("edge", *usual, "--no-draft"), "without a draft the tokenizer must be named: --tokenizer DIR")
    failed(run("edge", *usual, "--no-draft", "--tokenizer", house.target / "nothing"), "tokenizer.json is missing")


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("edge", ["generate", "--prompt", "x"], "the following arguments are required: --server"),
        ("edge", ["generate", "--server", "specedge://127.0.0.1:1"], "the following arguments are required: --prompt"),
        ("edge", ["generate", "--server", "x", "--prompt", "x", "--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        ("edge", ["generate", "--draft", "x", "--no-draft"], "argument --no-draft: not allowed with argument --draft"),
        ("edge", [], "the following arguments are required: COMMAND"),
        ("server", ["serve", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        ("server", ["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_arguments(run: Runner, name: str, arguments: list[str], sentence: str) -> None:
    failed(run(name, *arguments), sentence, 2)


def broken(house: House, at: Path, how: str) -> Path:
    """A copy of the target with one thing wrong."""
    path = Path(shutil.copytree(house.target, at / "model"))
    config, weights = path / "config.json", path / "model.safetensors"
    right = json.loads(config.read_text())
    if how == "no directory":
        shutil.rmtree(path)
    elif how == "no config":
        config.unlink()
    elif how == "bad config":
        config.write_text(config.read_text()[:-20])
    elif how == "no object":
        config.write_text("[]")
    elif how == "a field is missing":
        config.write_text(json.dumps({k: v for k, v in right.items() if k != "hidden_size"}))
    elif how == "another architecture":
        config.write_text(json.dumps({**right, "architectures": ["MambaForCausalLM"]}))
    elif how == "another shape":
        config.write_text(json.dumps({**right, "intermediate_size": 96}))
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "truncated header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "no tokenizer":
        (path / "tokenizer.json").unlink()
    elif how == "bad tokenizer":
        (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no directory", "model is no directory and no hub id such as owner/name: name a model directory"),
        ("no config", "config.json is missing: a model is a directory with config.json"),
        ("bad config", "config.json cannot be read as JSON"),
        ("no object", "config.json holds no JSON object"),
        ("a field is missing", "config.json lacks the field hidden_size"),
        ("another architecture", "config.json: architecture 'MambaForCausalLM' is not supported, only .*LlamaForCausalLM"),
        ("another shape", r"tensor model.layers.0.mlp.gate_proj.weight has shape \[88, 48\], config.json asks for \[96, 48\]"),
        ("no weights", "holds neither model.safetensors nor model.safetensors.index.json"),
        ("truncated weights", "model.safetensors is not a readable safetensors file"),
        ("truncated header", "model.safetensors is not a readable safetensors file"),
        ("no tokenizer", "tokenizer.json is missing"),
        ("bad tokenizer", "tokenizer.json is not a tokenizer"),
    ],
)
def test_a_broken_model(models: House, run: Runner, tmp_path: Path, how: str, sentence: str) -> None:
    """For the server as its target and for the edge as its draft: nobody is connected to before the model is there."""
    path = broken(models, tmp_path, how)
    failed(run("server", "serve", path, "--device", "cpu"), sentence)
    failed(run("edge", "generate", "--server", "specedge://127.0.0.1:1", "--draft", path, "--device", "cpu", "--prompt", "x"), sentence)


def test_a_server_whose_thread_dies(models: House, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, status 1, and no thread of it is left that would keep the process from ending."""
    started: list[Server] = []
    start = Server.start
    monkeypatch.setattr(Server, "start", lambda self: started.append(self) or start(self))
    monkeypatch.setattr(Server, "alive", property(lambda self: False))
    try:
        ended = run("server", "serve", models.target, "--device", "cpu")
        assert ended.status == 1 and ended.err == "specedge-server: a thread of the server has died: see the error above, and start it again\n"
        assert not [t for t in threading.enumerate() if t.name in ("specedge-engine", "specedge-network") and not t.daemon]
    finally:
        for server in started:
            server.stop()


def test_failures_of_the_server(house: House, run: Runner) -> None:
    serve = ("serve", house.target, "--device", "cpu")
    for address in ("tcp://0.0.0.0:0", "tcp://*:0"):
        failed(run("server", *serve, "--listen", address), f"{re.escape(address)} can be reached from other machines.*--keys, .* or pass --insecure")
    taken = house.address.replace("specedge://", "tcp://")
    failed(run("server", *serve, "--listen", taken), f"cannot listen on {taken}: Address already in use")
    failed(run("server", "serve"), "name one model: a directory, a hub id, or --demo")
    failed(run("server", *serve, "--demo"), "name one model: a directory, a hub id, or --demo")
    failed(run("server", *serve, "--max-rows", "1"), "max_rows is 1, but must be an integer between 2 and 65536")
    failed(run("server", *serve, "--kv-tokens", "0"), "kv_tokens is 0, but must be")
    failed(run("server", *serve, "--dtype", "float16"), "float16 is not served on a CPU")


def test_a_failure_of_a_process(house: House) -> None:
    """As a person sees it who starts the command by its name."""
    script = Path(sys.executable).with_name("specedge-edge")
    arguments = ["generate", "--server", f"specedge://127.0.0.1:{unused()}", "--no-draft", "--tokenizer", house.target, "--prompt", "x"]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    failed(Ended(done.returncode, done.stdout, done.stderr), "no server at specedge://127.0.0.1:[0-9]+: Connection refused")
