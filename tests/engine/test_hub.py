"""Model names: local directories first, then hub ids, with nothing but data fetched."""

from pathlib import Path
from typing import Any

import pytest

from specedge.engine.hub import HubError, locate


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path


def test_a_hub_id_is_fetched_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert locate("owner/name", "abc123") == tmp_path
    assert asked["repo"] == "owner/name" and asked["revision"] == "abc123"
    assert sorted(asked["allow_patterns"]) == ["*.jinja", "*.json", "*.safetensors"]


@pytest.mark.parametrize("name", ["nowhere", "/no/such/place", "../x/y", "a/b/c", "owner/", "~/model"])
def test_what_is_neither_is_a_sentence(name: str) -> None:
    with pytest.raises(HubError, match="no directory and no hub id"):
        locate(name)


def test_a_failing_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo: str, **_: Any) -> str:
        raise OSError("the hub\nis down")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(HubError, match="owner/name is no directory here and cannot be fetched from the hub: the hub is down"):
        locate("owner/name")
