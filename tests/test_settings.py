"""Settings: which of flag, environment, file and default holds, what is refused, and that what is printed may be read again.

Over a small parser that has one option of each kind, and over those of the two commands.
"""

import argparse
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specedge import cli, settings
from specedge.config import SpecedgeError
from specedge.settings import SettingsError

Parse = Callable[..., argparse.Namespace]


def parsers() -> tuple[argparse.ArgumentParser, list[argparse.ArgumentParser]]:
    p = argparse.ArgumentParser("specedge-server")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    s = commands.add_parser("serve")
    s.add_argument("model", nargs="?")
    s.add_argument("--listen", required=True)
    s.add_argument("--max-rows", type=int, default=512, help="rows (default: %(default)s)")
    s.add_argument("--share", type=float, default=0.5)
    s.add_argument("--device", choices=("cpu", "cuda"))
    s.add_argument("--keys", type=Path)
    s.add_argument("--stop", action="append", default=[])
    s.add_argument("--insecure", action=argparse.BooleanOptionalAction, default=False)
    settings.add_arguments(s, "server")
    other = commands.add_parser("probe")
    other.add_argument("--depth", type=int, default=1)
    settings.add_arguments(other, "server")
    bare = commands.add_parser("keygen")
    bare.add_argument("--depth-charge", default="none")
    return p, list(commands.choices.values())


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parse:
    """Parse with a file and variables."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(*arguments: str, file: str = "", **variables: str) -> argparse.Namespace:
        at = tmp_path / "specedge" / "server.toml"
        at.parent.mkdir(exist_ok=True)
        at.write_text(file)
        with monkeypatch.context() as m:
            for name, value in variables.items():
                m.setenv(name, value)
            m.setattr(sys, "argv", ["specedge-server", *arguments])
            return settings.parse(*parsers())

    return run


CASES = [  # option, value in the file, the same in a variable, flags; what each of them means, and the default
    ("max-rows", "1", "2", ["--max-rows", "3"], 1, 2, 3, 512),
    ("share", "1", "0.25", ["--share", "1e-3"], 1.0, 0.25, 0.001, 0.5),
    ("device", "'cpu'", "cuda", ["--device", "cpu"], "cpu", "cuda", "cpu", None),
    ("keys", "'a'", "b", ["--keys", "c"], Path("a"), Path("b"), Path("c"), None),
    ("stop", "['a', 'b']", "c", ["--stop", "d", "--stop", "e"], ["a", "b"], ["c"], ["d", "e"], []),
    ("insecure", "true", "off", ["--insecure"], True, False, True, False),
    ("insecure", "true", "YES", ["--no-insecure"], True, True, False, False),
    ("model", "'a'", "b", ["c"], "a", "b", "c", None),
]


@pytest.mark.parametrize(("name", "in_file", "in_variable", "flags", "file", "variable", "flag", "default"), CASES)
def test_precedence(
    parse: Parse, name: str, in_file: str, in_variable: str, flags: list[str], file: object, variable: object, flag: object, default: object
) -> None:  # fmt: skip
    """Flag, variable, file, default, in this order; of nothing is anything added to what holds."""
    text, environment = f"{name} = {in_file}", {f"SPECEDGE_SERVER_{name.upper().replace('-', '_')}": in_variable}
    usual = ("serve", "--listen", "x")
    got = [parse(*usual, *flags, file=text, **environment), parse(*usual, file=text, **environment), parse(*usual, file=text), parse(*usual)]
    values = [getattr(g, name.replace("-", "_")) for g in got]
    assert values == [flag, variable, file, default] and [type(v) for v in values] == [type(v) for v in (flag, variable, file, default)]


def test_what_is_required_may_come_from_anywhere(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("serve", file="listen = 'x'").listen == parse("serve", SPECEDGE_SERVER_LISTEN="x").listen == "x"
    with pytest.raises(SystemExit):
        parse("serve", "--max-rows", "2")
    assert "the following arguments are required: --listen" in capsys.readouterr().err


def test_the_directory_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the README says; of the edge's key, too, and an empty variable is none."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, want in ((str(tmp_path / "own"), tmp_path / "own"), ("", tmp_path / "home" / ".config")):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert settings.home() == want / "specedge" and cli._own_key() == want / "specedge" / "edge.secret"
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "`$XDG_CONFIG_HOME/specedge`" in readme and "`~/.config/specedge/server.toml` or `edge.toml`" in readme


def test_the_file_is_chosen(parse: Parse, tmp_path: Path) -> None:
    """By a flag, else by a variable, else it is that of the user; several are not mixed."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"listen = '{name}'")
    own = "listen = 'own'\nmax-rows = 7"
    got = parse("serve", "--config", str(tmp_path / "one"), file=own, SPECEDGE_SERVER_CONFIG=str(tmp_path / "two"))
    assert (got.listen, got.max_rows) == ("one", 512)
    assert parse("serve", file=own, SPECEDGE_SERVER_CONFIG=str(tmp_path / "two")).listen == "two"
    assert parse("serve", file=own).listen == "own"


def test_commands_share_a_file(parse: Parse) -> None:
    """Each takes what it has. A command that has no settings looks at nothing, be it right or wrong."""
    file = "listen = 'x'\ndepth = 5\n"
    assert parse("serve", file=file).listen == "x" and parse("probe", file=file).depth == 5
    assert parse("probe", SPECEDGE_SERVER_MAX_ROWS="3", SPECEDGE_SERVER_DEPTH="4").depth == 4
    assert parse("keygen", file="broken", SPECEDGE_NONSENSE="1").depth_charge == "none"


def test_the_other_program_has_its_own(parse: Parse) -> None:
    assert parse("serve", "--listen", "x", SPECEDGE_EDGE_MAX_ROWS="many", SPECEDGE_EDGE_NONSENSE="1", OTHER="1").max_rows == 512


@pytest.mark.parametrize(
    ("file", "variables", "sentence"),
    [
        ("max-row = 5", {}, "specedge/server.toml: there is no setting max-row, the nearest is max-rows"),
        ("max_rows = 5", {}, "there is no setting max_rows, the nearest is max-rows"),
        ("[serve]\nmax-rows = 5", {}, "there is no setting serve, the nearest is"),
        ("config = 'x'", {}, "there is no setting config, the nearest is"),
        ("print-config = true", {}, "there is no setting print-config, the nearest is"),
        ("depth-charge = 'x'", {}, "there is no setting depth-charge, the nearest is depth"),
        ("max-rows = 5\nmax-rows = 6", {}, "server.toml is no TOML: "),
        ("listen = x", {}, "server.toml is no TOML: "),
        ("max-rows = 5.5", {}, r"server.toml: max-rows is 5.5, but must be an integer"),
        ("max-rows = true", {}, "max-rows is True, but must be an integer"),
        ("share = 'x'", {}, "share is 'x', but must be a number"),
        ("model = ['x']", {}, r"model is \['x'\], but must be a string"),
        ("stop = [['x']]", {}, r"stop is \['x'\], but must be a string"),
        ("insecure = 'perhaps'", {}, "insecure is 'perhaps', but must be true or false"),
        ("insecure = {}", {}, "insecure is {}, but must be true or false"),
        ("device = 'tpu'", {}, "device is 'tpu', but must be one of cpu, cuda"),
        ("", {"SPECEDGE_SERVER_MAXROWS": "5"}, "variable SPECEDGE_SERVER_MAXROWS sets nothing: the nearest that does is SPECEDGE_SERVER_MAX_ROWS"),
        ("", {"SPECEDGE_MAX_ROWS": "5"}, "variable SPECEDGE_MAX_ROWS sets nothing: the nearest that does is SPECEDGE_SERVER_MAX_ROWS"),
        ("", {"SPECEDGE_SERVER_MAX_ROWS": ""}, "SPECEDGE_SERVER_MAX_ROWS is '', but must be an integer"),
        ("", {"SPECEDGE_SERVER_INSECURE": "2"}, "SPECEDGE_SERVER_INSECURE is '2', but must be true or false"),
        ("", {"SPECEDGE_SERVER_CONFIG": "/nowhere/x.toml"}, "cannot read /nowhere/x.toml: No such file or directory"),
        ("", {"SPECEDGE_SERVER_CONFIG": "/"}, "cannot read /: Is a directory"),
    ],
)
def test_what_is_refused(parse: Parse, file: str, variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        parse("serve", "--listen", "x", file=file, **variables)


def test_bytes_that_are_no_text(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"listen = '\xff'")
    with pytest.raises(SettingsError, match="bad is no TOML"):
        parse("serve", "--config", str(tmp_path / "bad"))


def printed(parse: Parse, capsys: pytest.CaptureFixture[str], *arguments: str, **rest: str) -> str:
    with pytest.raises(SystemExit) as e:
        parse(*arguments, "--print-config", **rest)
    assert e.value.code == 0
    return capsys.readouterr().out


def test_print_config(parse: Parse, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every setting with its origin, also when something required is missing."""
    out = printed(parse, capsys, "serve", "--share", "0.125", file="stop = ['a']\nmax-rows = 5", SPECEDGE_SERVER_MAX_ROWS="6")
    assert out.splitlines() == [
        "# specedge-server serve", "# model is not set", "# listen is not set", "max-rows = 6  # SPECEDGE_SERVER_MAX_ROWS", "share = 0.125  # flag",
        "# device is not set", "# keys is not set", f'stop = ["a"]  # {tmp_path}/specedge/server.toml', "insecure = false  # default",
    ]  # fmt: skip


def test_what_is_printed_may_be_read(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["m\u00fc", "--listen", 'a "b" \\', "--stop", "\n\t# x", "--stop", "\U0001f600\x7f\x01", "--keys", "k k", "--insecure", "--share=1e-7"]
    first = printed(parse, capsys, "serve", *flags)
    again = printed(parse, capsys, "serve", file=first)
    assert tomllib.loads(first) == tomllib.loads(again) and len(tomllib.loads(first)) == 7
    want, got = (vars(parse("serve", *f, file=text)) for f, text in ((flags, ""), ([], first)))
    assert want.pop("flags") == {"model", "listen", "stop", "keys", "insecure", "share"} and got.pop("flags") == set()
    assert {k: v for k, v in want.items() if k != "settings"} == {k: v for k, v in got.items() if k != "settings"}


text = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | text | st.lists(text))
def test_values_are_toml(value: object) -> None:
    read = tomllib.loads(settings._line("name", value, "somewhere"))["name"]
    assert read == value or isinstance(value, float) and math.isnan(value) and math.isnan(read)


def test_help_shows_the_defaults(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", "--help")
    assert "rows (default: 512)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# the two commands


@pytest.mark.parametrize(
    ("program", "command", "least"), [("server", "serve", 5), ("edge", "generate", 5), ("edge", "chat", 5), ("edge", "doctor", 3)]
)
def test_every_option_can_be_set(
    program: str, command: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    """Whatever is a flag has a line, and the lines make a file that gives the same."""
    monkeypatch.setattr("warnings.showwarning", None)

    def show(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [f"specedge-{program}", command, *arguments])
        with pytest.raises(SystemExit):
            getattr(cli, program)()
        return capsys.readouterr()

    lines, _ = show("--print-config")
    names = {line.removeprefix("# ").split(" ")[0] for line in lines.splitlines()[1:]}
    usage, _ = show("--help")
    flags = set(re.findall("--([a-z][a-z-]*)", usage.partition("\n\n")[0]))
    assert names - {"model"} == {f for f in flags if not f.startswith("no-")} - {"config", "print-config"}
    (tmp_path / "config").write_text(lines)
    again, _ = show("--config", str(tmp_path / "config"), "--print-config")
    assert tomllib.loads(again) == tomllib.loads(lines) and len(tomllib.loads(lines)) >= least


@pytest.mark.parametrize(
    ("arguments", "file", "variables", "chosen"),
    [
        (["server", "serve", "--demo"], "model = 'm'", {}, "target"),
        (["server", "serve", "--demo"], "", {"SPECEDGE_SERVER_MODEL": "m"}, "target"),
        (["server", "serve", "m"], "demo = true", {}, "m"),
        (["server", "serve", "m"], "model = 'n'", {"SPECEDGE_SERVER_DEMO": "1"}, "m"),
        (["server", "serve", "--no-demo"], "model = 'm'\ndemo = true", {}, "m"),
        (["server", "serve"], "model = 'm'\ndemo = true", {}, "name one model: a directory, a hub id, or --demo"),
        (["server", "serve", "m", "--demo"], "", {}, "name one model: a directory, a hub id, or --demo"),
        (["edge", "chat", "--demo"], "draft = 'm'", {}, "draft draft"),
        (["edge", "chat", "--demo"], "draft = ''", {}, "draft draft"),
        (["edge", "chat", "--draft", "m"], "demo = true", {}, "m None"),
        (["edge", "chat", "--draft", "m"], "", {"SPECEDGE_EDGE_DEMO": "yes"}, "m None"),
        (["edge", "chat", "--no-draft"], "demo = true\ndraft = 'm'", {}, "None draft"),
        (["edge", "chat"], "demo = true\ndraft = 'm'", {}, "say how to draft: --draft MODEL, --no-draft or --demo"),
        (["edge", "chat", "--demo", "--draft", "m"], "", {}, "say how to draft: --draft MODEL, --no-draft or --demo"),
        (["edge", "doctor", "--demo"], "draft = 'm'", {}, "draft"),
        (["edge", "doctor", "--draft", "m"], "demo = true", {}, "m"),
        (["edge", "doctor", "--draft", "m", "--demo"], "", {}, "name one draft: --draft MODEL or --demo"),
    ],
)
def test_a_model_that_is_a_flag_goes_before_one_that_is_none(
    arguments: list[str], file: str, variables: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """`--demo` and a model's name say the same thing in two ways, so the one that is on the command line holds; two flags are still a mistake."""

    def tell(*found: Path | str | None) -> None:
        raise SpecedgeError(" ".join(f.name if isinstance(f, Path) else str(f) for f in found))

    program, command, *rest = arguments
    (tmp_path / "config").write_text(file)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("warnings.showwarning", None)
    monkeypatch.setattr("specedge.engine.hub.locate", lambda name, revision=None: Path(name))
    monkeypatch.setattr("specedge.engine.engine.Engine.from_pretrained", lambda path, **_: tell(path))
    monkeypatch.setattr("specedge.net.edge.Edge", lambda server, draft, tokenizer, **_: tell(draft, tokenizer))
    monkeypatch.setattr("specedge.text.Tokenizer.from_dir", tell)
    server = ["--server", "specedge://127.0.0.1:1"] if program == "edge" else []
    monkeypatch.setattr(sys, "argv", [f"specedge-{program}", command, *server, "--config", str(tmp_path / "config"), *rest])
    with pytest.raises(SystemExit):
        getattr(cli, program)()
    assert capsys.readouterr().err.splitlines()[-1] == f"specedge-{program}: {chosen}"


def test_a_wrong_setting_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from specedge.cli import server; server()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'specedge-server'; {code}", "serve"], capture_output=True, text=True, timeout=60,
        env={"SPECEDGE_SERVER_ROWS": "1", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "specedge-server: the variable SPECEDGE_SERVER_ROWS sets nothing: the nearest that does is SPECEDGE_SERVER_MAX_ROWS\n"
