"""The record of a GPU run: JSON lines, written as they come, so that whatever ends the run leaves what was measured before.

A line has a `section` and one of: `begin` (a cell is about to run), `key` with its results or an `error`, `skipped` (cells for which no time was
left), `note`. Knows nothing of what is measured. Invariant: a cell that was begun is never begun again, so a cell that kills its process costs
itself alone.
"""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Log:
    """The file `path`; several processes may append to it in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, section: str, **data: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"section": section, **data}) + "\n")

    def read(self, section: str | None = None) -> list[Record]:
        """All records, or those of one section; a line that a dying process left unfinished is passed over."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if section in (None, record["section"]):
                found.append(record)
        return found

    def begun(self, section: str) -> set[str]:
        """The cells that were begun, whatever became of them."""
        return {r["begin"] for r in self.read(section) if "begin" in r}

    def results(self, section: str) -> dict[str, Record]:
        """The results by cell, without those that ended in an error."""
        return {r["key"]: r for r in self.read(section) if "key" in r and "error" not in r}

    def lost(self, section: str) -> set[str]:
        """Cells that were begun and left neither a result nor an error: their process died."""
        return self.begun(section) - {r["key"] for r in self.read(section) if "key" in r}
