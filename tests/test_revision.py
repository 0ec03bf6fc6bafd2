"""The revision of a model reaches the hub from wherever the model is named: calls, flags, variables and files of settings."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specedge import cli
from specedge.config import DraftConfig
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.hub import HubError
from specedge.engine.speculative import SpeculativeEngine
from specedge.net.edge import Edge
from tests.helpers import drafter, engine, random_model

REVISION = "0123abc"
ADDRESS = "specedge://127.0.0.1:1"  # nobody is asked there: a draft is loaded first
Asked = list[tuple[str, str | None]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the hub was asked for, which it has not."""
    found: Asked = []

    def fetch(repo: str, revision: str | None, **_: Any) -> str:
        found.append((repo, revision))
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return found


@pytest.mark.parametrize(
    "load",
    [
        lambda _: Engine.from_pretrained("o/model", revision=REVISION),
        lambda _: Drafter.from_pretrained("o/model", revision=REVISION),
        lambda _: SpeculativeEngine("o/model", "o/draft", revision=REVISION, draft_revision="other"),
        lambda target: SpeculativeEngine(engine(target), "o/model", draft_revision=REVISION),
        lambda _: Edge(ADDRESS, "o/model", draft_revision=REVISION),
    ],
    ids=["Engine", "Drafter", "target", "draft", "Edge"],
)  # fmt: skip
def test_calls_pass_it_on(load: Callable[[Path], object], asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="o/model"):
        load(random_model(tmp_path))
    assert asked == [("o/model", REVISION)]


SERVE = (cli.server, "server", ["serve", "o/model"])
GENERATE = (cli.edge, "edge", ["generate", "--server", ADDRESS, "--draft", "o/model", "--prompt", "x"])
CHAT = (cli.edge, "edge", ["chat", "--server", ADDRESS, "--draft", "o/model"])
DOCTOR = (cli.edge, "edge", ["doctor", "--server", ADDRESS, "--draft", "o/model"])


@pytest.mark.parametrize("way", ["flag", "variable", "file", "nowhere"])
@pytest.mark.parametrize(("command", "name", "arguments"), [SERVE, GENERATE, CHAT, DOCTOR], ids=["serve", "generate", "chat", "doctor"])
def test_commands_pass_it_on(
    command: Callable[[], None], name: str, arguments: list[str], way: str, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    option = "revision" if name == "server" else "draft-revision"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if way == "variable":
        monkeypatch.setenv(f"SPECEDGE_{name}_{option}".upper().replace("-", "_"), REVISION)
    if way == "file":
        (tmp_path / "specedge").mkdir()
        (tmp_path / "specedge" / f"{name}.toml").write_text(f"{option} = '{REVISION}'")
    monkeypatch.setattr(sys, "argv", [f"specedge-{name}", *arguments, *([f"--{option}", REVISION] if way == "flag" else [])])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 1 and asked == [("o/model", None if way == "nowhere" else REVISION)]


def test_it_does_not_go_with_what_is_loaded(tmp_path: Path) -> None:
    path, config = random_model(tmp_path), DraftConfig()
    target, draft = engine(path), drafter(path)
    for given, call in (
        ("revision", lambda: SpeculativeEngine(target, draft, revision=REVISION)),
        ("draft_revision", lambda: SpeculativeEngine(target, draft, draft_revision=REVISION)),
        ("draft_revision", lambda: Edge(ADDRESS, draft, draft_revision=REVISION)),
        ("config", lambda: SpeculativeEngine(target, draft, config)),
        ("config", lambda: Edge(ADDRESS, draft, config=config)),
    ):
        with pytest.raises(ValueError, match=f"^{given} is given, but the"):
            call()
