"""Settings of a command: a flag goes before the environment, that before a file, that before the default.

The options of an argparse parser are their only definition: `--max-rows` of specedge-server is also SPECEDGE_SERVER_MAX_ROWS, and `max-rows` in
~/.config/specedge/server.toml. Knows nothing of what an option means; no option holds a secret, only paths to some, so all may be shown. Invariant: a
name that no option has is an error, wherever it stands.
"""

import argparse
import difflib
import json
import os
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specedge.config import SpecedgeError

PROGRAMS = ("server", "edge")
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
KINDS = {int: "an integer", float: "a number"}


class SettingsError(SpecedgeError):
    """A setting that does not exist or has a wrong value, or a file of settings that cannot be read."""


def home() -> Path:
    """The directory of this user's settings and keys."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "specedge"


def add_arguments(command: argparse.ArgumentParser, program: str) -> None:
    """Let the options of a command be set in the other ways too."""
    command.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: ~/.config/specedge/{program}.toml if it is there)")
    command.add_argument("--print-config", action="store_true", help="print all settings and where each comes from, as such a file, and exit")
    command.set_defaults(settings=command)


def parse(parser: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser]) -> argparse.Namespace:
    """Parse the command line of a program with these commands, and fill in what it leaves open; `flags` are the options that were on it.
    SettingsError; argparse's own errors exit."""
    program = parser.prog.removeprefix("specedge-")
    known: dict[str, argparse.Action] = {}  # of all commands: they share one file, and each takes what it has
    defaults: dict[argparse.Action, Any] = {}
    required: list[argparse.Action] = []
    for command in commands:
        if command.get_default("settings"):
            for action in _options(command).values():
                known[_name(action)] = action
                defaults[action] = action.default
                required += [action] if action.required else []
                action.help = (action.help or "").replace("%(default)s", str(action.default).replace("%", "%%"))
                action.default, action.required = None, False  # so that None means: not on the command line
    args = parser.parse_args()
    chosen: argparse.ArgumentParser | None = getattr(args, "settings", None)
    if chosen is None:
        return args
    environment = _environment(program, known)
    named = args.config or (Path(environment["config"]) if "config" in environment else None)
    path = named or home() / f"{program}.toml"
    table = _file(path, known, may_be_missing=named is None)
    origin: dict[str, str] = {}
    for name, action in _options(chosen).items():
        if getattr(args, action.dest) is not None:
            origin[name] = "flag"
            continue
        if name in environment:
            origin[name] = _variable(program, name)
            value = _value(action, environment[name], origin[name], defaults[action])
        elif name in table:
            origin[name] = str(path)
            value = _value(action, table[name], f"{path}: {name}", defaults[action])
        else:
            origin[name], value = "default", defaults[action]
        setattr(args, action.dest, value)
    args.flags = {name for name, where in origin.items() if where == "flag"}
    if args.print_config:
        print(f"# {chosen.prog}")
        for name, action in _options(chosen).items():
            print(_line(name, getattr(args, action.dest), origin[name]))
        sys.exit(0)
    absent = ["/".join(a.option_strings) for a in _options(chosen).values() if a in required and getattr(args, a.dest) in (None, [])]
    if absent:
        chosen.error(f"the following arguments are required: {', '.join(absent)}")
    return args


def _options(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options and arguments of a command that have a value, or are on or off, by name."""
    valued = (a for a in command._actions if a.nargs != 0 or isinstance(a, argparse.BooleanOptionalAction))
    return {_name(a): a for a in valued if a.dest != "config"}


def _name(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--") if action.option_strings else action.dest


def _variable(program: str, name: str) -> str:
    return f"SPECEDGE_{program}_{name}".upper().replace("-", "_")


def _environment(program: str, known: Iterable[str]) -> dict[str, str]:
    """Values of the variables of this program, by the option's name."""
    names = {_variable(program, name): name for name in (*known, "config")}
    others = tuple(f"SPECEDGE_{p.upper()}_" for p in PROGRAMS if p != program)
    found = {v: value for v, value in os.environ.items() if v.startswith("SPECEDGE_") and not v.startswith(others)}
    for variable in found:
        if variable not in names:
            raise SettingsError(f"the variable {variable} sets nothing: the nearest that does is {_nearest(variable, names)}")
    return {names[v]: value for v, value in found.items()}


def _file(path: Path, known: Iterable[str], may_be_missing: bool) -> dict[str, Any]:
    """What a file says, by the option's name."""
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except OSError as e:
        if may_be_missing and isinstance(e, FileNotFoundError | NotADirectoryError):
            return {}
        raise SettingsError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:  # of TOML or of UTF-8
        raise SettingsError(f"{path} is no TOML: {e}") from None
    for name in table:
        if name not in known:
            raise SettingsError(f"{path}: there is no setting {name}, the nearest is {_nearest(name, known)}")
    return table


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), 1, 0)[0]


def _value(action: argparse.Action, raw: object, where: str, default: object) -> Any:
    """A value as the option itself would have it."""
    if isinstance(action, argparse.BooleanOptionalAction):
        value = raw if isinstance(raw, bool) else SWITCH.get(str(raw).lower())
        if value is None:
            raise SettingsError(f"{where} is {raw!r}, but must be true or false")
        return value
    if isinstance(default, list):
        return [_one(action, r, where) for r in (raw if isinstance(raw, list) else [raw])]
    return _one(action, raw, where)


def _one(action: argparse.Action, raw: object, where: str) -> Any:
    kind: Any = action.type or str
    try:
        if not isinstance(raw, str | int | float) or isinstance(raw, bool):
            raise ValueError
        value = kind(str(raw))
    except ValueError:
        raise SettingsError(f"{where} is {raw!r}, but must be {KINDS.get(kind, 'a string')}") from None
    if action.choices is not None and value not in action.choices:
        raise SettingsError(f"{where} is {raw!r}, but must be one of {', '.join(map(str, action.choices))}")
    return value


def _line(name: str, value: object, origin: str) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {_toml(value)}  # {origin}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's basic strings, but for this character
