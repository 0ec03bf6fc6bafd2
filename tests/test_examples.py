"""The examples run as they stand, are short, and are named in the README."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAYS = {
    "async_requests": "8 texts in ", "generate": "ended by length\ndef fibonacci(n):", "logprobs": "perplexity ", "sampling": "the third again: True",
    "server_and_edge": "the same ids as by the target alone: True", "speculative": "every text is the one that the target writes alone",
    "stream": "--- the first lines alone:\ndef fibonacci(n):",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_each_is_short_and_in_the_readme() -> None:
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [f.stem for f in files] == sorted(SAYS)
    readme = (ROOT / "README.md").read_text()
    for file in files:
        assert len(file.read_text().splitlines()) <= 40
        assert f"(examples/{file.name})" in readme
