"""Chat templates: a conversation as the text that a model was trained on.

The template is the model directory's own (chat_template.jinja, or tokenizer_config.json), a Jinja program that runs in a sandbox: it can read what it
is given and nothing else. Follows the conventions of Hugging Face, and transformers is the law in its tests. Not bounded in time: a directory
whose template never ends hangs the program that loaded it, as Ctrl-C can tell. Knows nothing of tokens. Imports jinja2 only when a template is read.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from specedge.config import SpecedgeError, brief

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else the template reads
MAX_FILE = 1 << 24  # bytes; the largest tokenizer_config.json known has 0.3 million


class ChatError(SpecedgeError):
    """A conversation that cannot be written down for this model."""


class ChatTemplate:
    """The template of one model. `tokens`: what it may call bos_token, eos_token and so on."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks the assistant's part for training; here it is its content."""

            tags = {"generation"}

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        self._tokens, self._where = dict(tokens), where
        try:
            self._template = environment.from_string(source)
        except Exception as e:  # not jinja's own alone: what is nested too deep is a RecursionError, or a SyntaxError of Python's
            raise ChatError(f"{where} is no chat template: {brief(e)}") from None

    @classmethod
    def from_dir(cls, path: Path) -> "ChatTemplate":
        """The template of a model directory. ChatError if there is none, as with base models, or it cannot be read."""
        config, file = path / "tokenizer_config.json", path / "chat_template.jinja"
        try:
            fields = json.loads(_read(config)) if config.is_file() else {}
            source = _read(file) if file.is_file() else fields.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {t["name"]: t["template"] for t in source}.get("default")
            tokens = {name: _content(fields[name]) for name in fields if name.endswith("_token") and fields[name] is not None}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
            raise ChatError(f"the chat template of {path} cannot be read: {brief(e)}") from None
        if not isinstance(source, str):
            raise ChatError(f"{path} has no chat template: complete raw text with it, or name the tokenizer of a model that was trained to chat")
        return cls(source, tokens, str(file if file.is_file() else config))

    def render(self, messages: Sequence[Message], *, reply: bool = True, **variables: Any) -> str:
        """The text of a conversation; `reply`: up to where the assistant's next message begins. `variables`: what else the template reads, such as
        tools or enable_thinking. ChatError with the template's own words if it refuses the messages."""
        given = {**self._tokens, **variables, "messages": list(messages), "add_generation_prompt": reply}
        try:
            return self._template.render(**{"tools": None, "documents": None, **given})
        except ChatError:
            raise
        except Exception as e:  # a template is a program, and may fail in any way
            raise ChatError(f"{self._where} cannot write these messages down: {brief(e)}") from None


def _read(file: Path) -> str:
    if (size := file.stat().st_size) > MAX_FILE:
        raise ValueError(f"{file.name} has {size / 1e6:.0f} MB")
    return file.read_text(encoding="utf-8")


def _content(token: Any) -> str:
    """A special token, which may be written as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: Jinja's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise ChatError(f"the model's chat template refuses these messages: {brief(message)}")
