"""The commands specedge-server and specedge-edge: arguments in, sentences out; everything else is done elsewhere.

Text goes to standard output and all the rest to standard error. A failure is one sentence and an exit status that is not 0: 1 for what went
wrong, 2 for wrong arguments, 130 for Ctrl-C.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from specedge import __version__, settings
from specedge.config import PRIORITIES, DraftConfig, EngineConfig, SamplingParams, SpecedgeError

if TYPE_CHECKING:
    from specedge.engine.request import Completion
    from specedge.net.edge import Edge

DEMO = Path(__file__).parent / "demo"
LONG_PROMPT = 1024  # tokens that a server reads for so long that its user is told
DRAIN = 30.0  # seconds that SIGTERM gives to the open sessions
SWITCH = argparse.BooleanOptionalAction  # so that a flag can also turn off what a file turned on


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _main(parser: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser]) -> NoReturn:
    """Run the chosen command, turning its failures into a sentence and a status."""
    warnings.showwarning = lambda message, *_: _say(f"{parser.prog}: {message}")
    try:
        args = settings.parse(parser, commands)
        run: Callable[[argparse.Namespace], int] = args.run
        status = run(args)
        sys.stdout.flush()
        sys.exit(status)
    except (SpecedgeError, ValueError) as e:
        _say(f"{parser.prog}: {e}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("")
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone; so may we, without a second complaint at exit
        sys.stderr.close()
        sys.exit(1)


def _own_key() -> Path:
    return settings.home() / "edge.secret"


def _server_arguments(p: argparse.ArgumentParser) -> None:
    text = "the server that verifies, as it prints itself; several: the next one when one fails"
    p.add_argument("--server", required=True, action="append", default=[], metavar="specedge://HOST:PORT/?key=...", help=text)
    key, secret = _own_key(), "the secret key (default: ~/.config/specedge/edge.secret if it is there)"
    p.add_argument("--key", type=Path, default=key if os.path.exists(key) else None, metavar="FILE", help=secret)


def _device_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=("cpu", "cuda"), help="where the model runs (default: cuda if there is one)")
    precisions = ("float32", "bfloat16", "float16", "int8", "int4")
    p.add_argument("--dtype", choices=precisions, help="precision; int8, int4: of weights, on a CPU (default: float32 on a CPU, bfloat16 on CUDA)")


def _settle_demo(args: argparse.Namespace, name: str) -> None:
    """`--demo` stands for a value of `name`: where a flag says one of the two, and a file or the environment the other, the flag holds."""
    by_flag, demo_by_flag = name in args.flags, "demo" in args.flags
    if args.demo and demo_by_flag and not by_flag:
        setattr(args, name, None)
    elif getattr(args, name) and by_flag and not demo_by_flag:  # --no-draft goes with the shipped draft's tokenizer
        args.demo = False


# ----------------------------------------------------------------------------------------------------------------------
# specedge-server


def server() -> NoReturn:
    """Entry point of specedge-server."""
    p = argparse.ArgumentParser("specedge-server", description="Verify the drafts of many edges with one large model.")
    p.add_argument("--version", action="version", version=f"specedge {__version__}")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    s = commands.add_parser("serve", help="serve a model to edges", description="Serve a model. Prints ready ADDRESS when it listens.")
    s.add_argument("model", nargs="?", help="directory of the model in Hugging Face format, or a hub id")
    s.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    s.add_argument("--demo", action=SWITCH, default=False, help="serve the small model that comes with specedge")
    s.add_argument("--listen", default="tcp://127.0.0.1:0", metavar="ENDPOINT", help="address; port 0 takes a free one (default: %(default)s)")
    s.add_argument("--max-rows", type=int, default=512, metavar="N", help="rows of one forward pass (default: %(default)s)")
    s.add_argument("--kv-tokens", type=int, metavar="N", help="tokens whose keys and values are kept (default: 16384; on a GPU what fits)")
    s.add_argument("--gpu-share", type=float, default=0.9, metavar="X", help="of a GPU's memory, for what fits (default: %(default)s)")
    s.add_argument("--admission", action=SWITCH, default=True, help="verify the nodes that are worth their time; --no-admission: all of them")
    s.add_argument("--pipeline", action=SWITCH, default=True, help="time steps by when drafts come; --no-pipeline: verify what is there at once")
    s.add_argument("--keys", type=Path, metavar="DIR", help="encrypt, and serve only keys that are authorised in this directory (see keygen)")
    s.add_argument("--insecure", action=SWITCH, default=False, help="allow addresses that other machines reach, without encryption")
    _device_arguments(s)
    settings.add_arguments(s, "server")
    s.set_defaults(run=_serve)
    k = commands.add_parser("keygen", help="make the key of a server", description="Make a directory with a secret key. Prints the public one.")
    k.add_argument("directory", type=Path, metavar="DIR", help="for the key, and later for the list of authorised keys")
    k.set_defaults(run=_server_keygen)
    a = commands.add_parser("authorize", help="let a key use a server", description="Add a key to a server's list, or replace its line there.")
    a.add_argument("directory", type=Path, metavar="DIR", help="the directory that keygen made")
    a.add_argument("key", metavar="PUBLIC_KEY", help="as `specedge-edge keygen` printed it")
    a.add_argument("--name", required=True, help="whose it is: letters, digits, any of . _ @ -")
    a.add_argument("--sessions", metavar="N", help="texts at a time (default: as many as the server has)")
    a.add_argument("--kv-tokens", metavar="N", help="prompt and output of all its texts together (default: no limit)")
    a.add_argument("--rows-per-s", metavar="N", help="roots and drafted nodes that are verified for it per second (default: no limit)")
    a.add_argument("--prompt-tokens-per-s", metavar="N", help="prompt tokens that are computed for it per second (default: no limit)")
    a.add_argument("--in-flight", metavar="N", help="rounds that await their verdicts at a time (default: one for each text)")
    a.add_argument("--connections", metavar="N", help="connections at a time (default: 256)")
    a.add_argument("--expires", metavar="DATE", help="when it ends, such as 2030-12-31 or 2030-12-31T18:00 (UTC; default: never)")
    a.set_defaults(run=_authorize)
    r = commands.add_parser("revoke", help="let a key use a server no more", description="Take a key from a server's list; what it has open ends.")
    r.add_argument("directory", type=Path, metavar="DIR", help="the directory that keygen made")
    r.add_argument("who", metavar="NAME|PUBLIC_KEY", help="as in the list")
    r.set_defaults(run=_revoke)
    _main(p, commands.choices.values())


def _serve(args: argparse.Namespace) -> int:
    from specedge.engine.engine import Engine
    from specedge.engine.hub import locate
    from specedge.engine.weights import fingerprint
    from specedge.net.server import Server, is_private

    _settle_demo(args, "model")
    if args.demo == bool(args.model):
        raise SpecedgeError("name one model: a directory, a hub id, or --demo")
    path = DEMO / "target" if args.demo else locate(args.model, args.revision)
    sizes = EngineConfig(kv_tokens=args.kv_tokens, max_rows=args.max_rows, admission=args.admission, gpu_share=args.gpu_share)
    engine = Engine.from_pretrained(path, device=args.device, dtype=args.dtype, sizes=sizes, progress=sys.stderr.isatty())
    model = fingerprint(path, engine.runner.dtype, engine.runner.model.weights.bits)
    serving = Server(engine, args.listen, model=model, keys=args.keys, insecure=args.insecure, pipeline=args.pipeline)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not args.keys and not is_private(serving.endpoint):
        _say("specedge-server: warning: other machines can reach this address, and nothing is encrypted or authenticated")
    try:
        serving.start()
        print(f"ready {serving.address}", flush=True)
        while not stop.wait(1.0):
            if not serving.alive:
                raise SpecedgeError("a thread of the server has died: see the error above, and start it again")
        stop.clear()
        _say("specedge-server: draining; a second signal ends it at once")
        serving.stop(DRAIN, hurry=stop)
    finally:
        serving.close()  # also where nobody reads any more what is said here: its threads would run for ever
    return 0


def _server_keygen(args: argparse.Namespace) -> int:
    from specedge.net.auth import SECRET, generate

    print(generate(args.directory / SECRET))
    _say(f"specedge-server: the secret key is in {args.directory / SECRET}; next: specedge-server authorize {args.directory} PUBLIC_KEY --name NAME")
    return 0


def _authorize(args: argparse.Namespace) -> int:
    from specedge.net.auth import FIELDS, authorize

    given = {name: getattr(args, name) for name in FIELDS}
    authorize(args.directory, args.key, **{name: value for name, value in given.items() if value is not None})
    _say(f"specedge-server: {args.name} is authorised, also at a server that runs")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from specedge.net.auth import revoke

    revoke(args.directory, args.who)
    _say(f"specedge-server: {args.who} is revoked, also at a server that runs")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# specedge-edge


def edge() -> NoReturn:
    """Entry point of specedge-edge."""
    p = argparse.ArgumentParser("specedge-edge", description="Draft on this machine, have a server verify, print the large model's own text.")
    p.add_argument("--version", action="version", version=f"specedge {__version__}")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    g = commands.add_parser("generate", help="complete a prompt", description="Complete a prompt: text to stdout, the rest to stderr.")
    _text_arguments(g)
    g.add_argument("--prompt", required=True, metavar="TEXT|-", help="the text to complete, raw; - reads standard input")
    g.add_argument("--chat", action=SWITCH, default=False, help="the prompt is a message, to be answered: use the model's chat template")
    g.add_argument("--json", action=SWITCH, default=False, help="print one JSON object instead of the text")
    g.add_argument("--echo", action=SWITCH, default=False, help="with --json: stream the text to standard error meanwhile")
    settings.add_arguments(g, "edge")
    g.set_defaults(run=_generate)
    c = commands.add_parser("chat", help="talk to a model", description="Talk to a model: a line is a message. Ctrl-C stops a reply, Ctrl-D ends.")
    _text_arguments(c)
    settings.add_arguments(c, "edge")
    c.set_defaults(run=_chat)
    d = commands.add_parser("doctor", help="say what stands between here and a server", description="Examine servers: one sentence a check.")
    _server_arguments(d)
    d.add_argument("--draft", metavar="MODEL", help="directory or hub id of the draft model that must match the server")
    d.add_argument("--draft-revision", metavar="REV", help="branch, tag or commit of the draft, if that is a hub id")
    d.add_argument("--demo", action=SWITCH, default=False, help="use the small draft that comes with specedge")
    d.add_argument("--json", action=SWITCH, default=False, help="print one JSON object instead of sentences")
    settings.add_arguments(d, "edge")
    d.set_defaults(run=_doctor)
    k = commands.add_parser("keygen", help="make the key of this edge", description="Make a secret key. Prints the public one.")
    k.add_argument("file", nargs="?", type=Path, default=_own_key(), metavar="FILE", help="where to write it (default: %(default)s)")
    k.set_defaults(run=_edge_keygen)
    _main(p, commands.choices.values())


def _text_arguments(g: argparse.ArgumentParser) -> None:
    """What the making of a text depends on."""
    _server_arguments(g)
    drafting = g.add_mutually_exclusive_group()
    drafting.add_argument("--draft", metavar="MODEL", help="directory or hub id of the draft model; it must share the server's tokenizer")
    drafting.add_argument("--no-draft", dest="draft", action="store_const", const="", help="draft nothing: the server decodes alone and streams")
    g.add_argument("--draft-revision", metavar="REV", help="branch, tag or commit of the draft, if that is a hub id")
    g.add_argument("--demo", action=SWITCH, default=False, help="use the small draft that comes with specedge")
    g.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory of tokenizer.json and chat template (default: the draft's)")
    g.add_argument("--system", metavar="TEXT", help="in a chat: a first message that says how to answer")
    g.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (default: %(default)s)")
    g.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: %(default)s)")
    g.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: off)")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that make up P (default: off)")
    g.add_argument("--min-p", type=float, default=0.0, metavar="P", help="leave out tokens below P times the likeliest one (default: off)")
    g.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="make tokens of prompt and output less likely (default: off)")
    g.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="subtracted from logits of tokens in the output (default: off)")
    g.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for every time they occur (default: off)")
    g.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no stop id or string can end the text before (default: %(default)s)")
    g.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a string that ends the text; may be given several times")
    g.add_argument("--ignore-eos", action=SWITCH, default=False, help="do not stop at the model's end of text")
    g.add_argument("--seed", type=int, metavar="S", help="repeats a sampled text (default: a random one, which is reported)")
    g.add_argument("--priority", choices=PRIORITIES, default="interactive", help="batch: idle rows of the server will do (default: %(default)s)")
    g.add_argument("--tree-size", type=int, default=31, metavar="N", help="nodes drafted per round at most (default: %(default)s)")
    g.add_argument("--depth", type=int, metavar="N", help="forwards a tree, all of its nodes sent (default: as measured times and odds say)")
    g.add_argument("--proactive", action=SWITCH, default=True, help="draft while a verdict is in flight")
    g.add_argument("--ahead", action=SWITCH, default=True, help="and tell the server, which then need not wait for a tree; off with --depth")
    g.add_argument("--autopilot", action=SWITCH, default=True, help="leave the text to the server while drafting does not pay; off with --depth")
    _device_arguments(g)


def _edge_keygen(args: argparse.Namespace) -> int:
    from specedge.net.auth import generate

    print(public := generate(args.file))
    _say(f"specedge-edge: the secret key is in {args.file}; its server's operator runs: specedge-server authorize DIR {public} --name NAME")
    return 0


@dataclasses.dataclass
class _Reply:
    """One text as it came; `done` is None if Ctrl-C stopped it."""

    params: SamplingParams
    prompt_tokens: int
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    done: "Completion | None" = None

    def __str__(self) -> str:
        if self.done is None:
            return f"stopped after {len(self.ids)} tokens"
        s = self.done.speculation
        per_round = f"{s.tokens_per_round(len(self.ids)):.2f} tokens per round"
        return f"{len(self.ids)} tokens, {s.rounds} rounds, {per_round}, seed {self.params.seed}"


def _open_edge(args: argparse.Namespace) -> "Edge":
    from specedge.net.edge import Edge

    _settle_demo(args, "draft")
    if args.draft if args.demo else args.draft is None:
        raise SpecedgeError("say how to draft: --draft MODEL, --no-draft or --demo")
    draft = DEMO / "draft" if args.draft is None else args.draft or None
    tokenizer = args.tokenizer or (DEMO / "draft" if args.demo else None)
    if draft is None and tokenizer is None:
        raise SpecedgeError("without a draft the tokenizer must be named: --tokenizer DIR")
    config = DraftConfig(
        tree_size=args.tree_size, depth=args.depth, proactive=args.proactive, ahead=args.ahead, autopilot=args.autopilot, max_sessions=1
    )  # fmt: skip
    progress = sys.stderr.isatty()
    return Edge(
        args.server, draft, tokenizer=tokenizer, key=args.key, config=config, device=args.device, dtype=args.dtype,
        draft_revision=args.draft_revision, progress=progress,
    )  # fmt: skip


def _sampling(args: argparse.Namespace) -> SamplingParams:
    names = [f.name for f in dataclasses.fields(SamplingParams) if hasattr(args, f.name)]
    return SamplingParams(**{name: getattr(args, name) for name in names}).with_seed()


def _stream(client: "Edge", tokens: list[int], params: SamplingParams, priority: str, out: TextIO | None) -> _Reply:
    """Complete `tokens`, writing the text to `out` as it comes. Ctrl-C stops the reply and keeps what came of it."""
    if len(tokens) > LONG_PROMPT and sys.stderr.isatty():
        _say(f"specedge-edge: waiting for the server to read {len(tokens):,} tokens")
    reply, stream = _Reply(params, len(tokens)), client.stream(tokens, params, priority=priority)
    try:
        for chunk in stream:
            reply.ids += chunk.token_ids
            reply.text, reply.done = reply.text + chunk.text, chunk.completion
            if out is not None:
                print(chunk.text, end="", file=out, flush=True)
    except KeyboardInterrupt:
        stream.close()
    if out is not None:
        print(file=out, flush=True)
    return reply


def _generate(args: argparse.Namespace) -> int:
    if "system" in args.flags and not args.chat:  # in a file of settings it is for chats to come
        raise SpecedgeError("--system is for chats: add --chat")
    params = _sampling(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    out = None if args.json and not args.echo else sys.stderr if args.json else sys.stdout
    with _open_edge(args) as client:
        assert client.tokenizer is not None
        tokens = client.tokenizer.chat([*_system(args), _message("user", prompt)]) if args.chat else client.tokenizer.encode(prompt)
        reply = _stream(client, tokens, params, args.priority, out)
    if reply.done is None or not args.json:
        _say(f"specedge-edge: {reply}")
    if args.json:
        used = reply.done.speculation if reply.done else None
        record = {
            "text": reply.text, "token_ids": reply.ids, "finish_reason": reply.done.finish_reason if reply.done else "cancelled", "seed": params.seed,
            "usage": {"prompt_tokens": reply.prompt_tokens, "completion_tokens": len(reply.ids)},
            "speculation": dataclasses.asdict(used) | {"tokens_per_round": round(used.tokens_per_round(len(reply.ids)), 3)} if used else None,
        }  # fmt: skip
        print(json.dumps(record))
    return 0 if reply.done else 130


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [_message("system", args.system)] if args.system else []


def _chat(args: argparse.Namespace) -> int:
    params, person = _sampling(args), sys.stdin.isatty()
    if person:
        import readline  # noqa: F401  # gives input() its line editing

        _say("specedge-edge: a line is a message; Ctrl-C stops a reply, Ctrl-D ends")
    with _open_edge(args) as client:
        assert client.tokenizer is not None
        messages = _system(args)
        while True:
            try:
                line = input("> " if person else "")
            except EOFError:
                return 0
            if not line.strip():
                continue
            messages.append(_message("user", line))
            reply = _stream(client, client.tokenizer.chat(messages), params, args.priority, sys.stdout)
            messages.append(_message("assistant", reply.text))
            _say(f"specedge-edge: {reply}")


def _doctor(args: argparse.Namespace) -> int:
    from specedge.engine.hub import locate
    from specedge.engine.weights import read_config
    from specedge.net.doctor import examine_all
    from specedge.text import Tokenizer

    _settle_demo(args, "draft")
    if args.demo and args.draft:
        raise SpecedgeError("name one draft: --draft MODEL or --demo")
    path = DEMO / "draft" if args.demo else locate(args.draft, args.draft_revision) if args.draft else None
    tokenizer, vocab = (Tokenizer.from_dir(path).digest(), read_config(path).vocab) if path else (b"", 0)
    found = examine_all(args.server, tokenizer, vocab, args.key)
    if args.json:
        print(json.dumps({server: [dataclasses.asdict(f) for f in findings] for server, findings in found.items()}))
    else:
        for findings in found.values():
            for f in findings:
                print(f"{'ok  ' if f.ok else 'FAIL'} {f.check}: {f.text}")
    return 0 if all(f.ok for findings in found.values() for f in findings) else 1
