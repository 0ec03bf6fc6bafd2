"""Text to ids and back: the tokenizer of a model directory, its chat template, and an incremental detokeniser.

Knows nothing of models, engines or sockets and imports no torch. Invariant: the pieces that a Detokenizer gives out, joined, are the
decoding of all its ids.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from specedge.chat import ChatError, ChatTemplate, Message
from specedge.config import SpecedgeError, brief

MAX_FILE = 1 << 28  # bytes of a tokenizer.json; the largest known has 35 million
BROKEN = "\ufffd"  # what decoders write for a character whose bytes are not complete


class TokenizerError(SpecedgeError):
    """A tokenizer that is missing or cannot be read."""


class Tokenizer:
    """A fast tokenizer (tokenizer.json) with the few calls that serving needs."""

    def __init__(self, inner: tokenizers.Tokenizer, directory: Path | None = None) -> None:
        self._inner, self._directory = inner, directory
        self._template: ChatTemplate | None = None
        self._digest = b""
        self.size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids at or above this mean nothing

    @classmethod
    def from_dir(cls, path: Path, vocab: int | None = None) -> "Tokenizer":
        """Read `path/tokenizer.json`; TokenizerError if that cannot be, or if it is not for a model of `vocab` ids. Added tokens may lie above them,
        as they do where somebody has added a padding token and no row for it."""
        file = path / "tokenizer.json"
        try:
            if not file.is_file():
                raise TokenizerError(f"{file} is missing: a model directory needs its tokenizer, or name another one with --tokenizer")
            if (size := file.stat().st_size) > MAX_FILE:
                raise TokenizerError(f"{file} is not a tokenizer: it has {size / 1e9:.1f} GB")
            inner = tokenizers.Tokenizer.from_file(str(file))
        except TokenizerError:
            raise
        except Exception as e:  # the library raises bare Exception for every fault
            raise TokenizerError(f"{file} is not a tokenizer: {brief(e)}") from None
        tokenizer = cls(inner, path)
        if tokenizer.size == 0:
            raise TokenizerError(f"{file} is not a tokenizer: it holds no tokens")
        if vocab is not None and tokenizer.size > vocab:
            last = max(inner.get_vocab(with_added_tokens=False).values(), default=0)
            if last >= vocab:
                raise TokenizerError(f"{file} has ids up to {last}, but the model has only {vocab}: take the tokenizer that belongs to it")
        return tokenizer

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special`: with the special tokens that the tokenizer itself puts around a text."""
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeError):
            raise TokenizerError("the text holds characters that are not Unicode: send it as UTF-8") from None
        return ids

    def chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt for the assistant's next message in a conversation, [{"role": "user", "content": "..."}, ...], as the model directory's chat
        template writes it; `variables` are for the template. ChatError if there is none, or it refuses the messages."""
        if self._template is None:
            if self._directory is None:
                raise ChatError("this tokenizer has no model directory, and so no chat template")
            self._template = ChatTemplate.from_dir(self._directory)
        return self.encode(self._template.render(messages, **variables), special=False)  # the template writes them itself

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def digest(self) -> bytes:
        """sha256 of the id -> token table in order of id, added tokens included: equal means equal ids. Made once: 152,000 ids take 0.4 s."""
        if not self._digest:
            table = sorted((i, token) for token, i in self._inner.get_vocab(with_added_tokens=True).items())
            self._digest = hashlib.sha256("".join(f"{i}\t{token}\n" for i, token in table).encode("utf-8", "surrogatepass")).digest()
        return self._digest


class Detokenizer:
    """Turns a growing list of ids into text, piece by piece, holding back characters whose bytes have not all come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: far enough back that the text of new ids does not depend on what came before
        self._shown = 0  # ids before this have been given out

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` make complete."""
        self._ids.extend(ids)
        old = self._tokenizer.decode(self._ids[self._start : self._shown])
        new = self._tokenizer.decode(self._ids[self._start :])
        if new.endswith(BROKEN):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new[len(old) :]

    def finish(self) -> str:
        """What was held back, complete or not."""
        old = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(old) :]
