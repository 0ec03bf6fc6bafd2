"""Checks: what a message carries, unpacked and held against the vocabulary before an engine or a mirror sees it.

Knows nothing of sessions. Invariant: whatever is wrong is a `Refused`, one sentence with a code of the protocol.
"""

from specedge.net import wire
from specedge.tree import TokenTree, TreeError


class Refused(Exception):
    """A message that breaks a rule: the code and the sentence to answer it with."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def ids(data: bytes, vocab: int) -> list[int]:
    """Token ids of a prompt."""
    try:
        found = wire.unpack_ids(data)
    except wire.WireError as e:
        raise Refused("frame", str(e)) from None
    if len(found) and int(found.max()) >= vocab:
        raise Refused("token", f"token {int(found.max())} is outside the vocabulary of {vocab}")
    return found.tolist()  # type: ignore[no-any-return]


def tree(m: wire.Draft, vocab: int) -> TokenTree:
    """The tree of a round."""
    try:
        found = wire.unpack_tree(m)
        found.check(vocab)
    except (TreeError, wire.WireError) as e:
        raise Refused("tree", str(e)) from None
    return found


def nodes(m: wire.Grown, vocab: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and steps of what has grown."""
    try:
        tokens, parents, steps = wire.unpack_nodes(m)
    except wire.WireError as e:
        raise Refused("tree", str(e)) from None
    if tokens and max(tokens) >= vocab:
        raise Refused("tree", f"a node carries token {max(tokens)}, which is outside the vocabulary of {vocab}")
    return tokens, parents, steps
