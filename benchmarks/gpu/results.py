"""The file of a run: one JSON object per line, appended after each measurement."""

import json
import os
import traceback
from pathlib import Path
from typing import Any

from sma.errors import reason

FILE = "results.jsonl"

Record = dict[str, Any]


class Results:
    """Appends records to the file of a folder, from any number of processes.

    Args:
        folder: folder of the file; the first record creates it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def add(self, kind: str, **fields: Any) -> None:
        """Append a record in one write, so that a killed process leaves complete lines."""
        line = json.dumps({"kind": kind, **fields}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def fail(self, error: BaseException, **fields: Any) -> None:
        """Append an exception and its location."""
        why = f"{type(error).__name__}: {reason(error)}"
        self.add("failed", **fields, reason=why, trace="".join(traceback.format_exception(error))[-3000:])

    def read(self) -> list[Record]:
        """All records, without an incomplete last line."""
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records


class Points:
    """Figures of the points of a run.

    Args:
        records: what `Results.read` returned; of several points with one name the last counts.
    """

    def __init__(self, records: list[Record]) -> None:
        self._points = {(each["phase"], each["name"]): each for each in records if each["kind"] == "point"}

    def get(self, phase: str, name: str, figure: str) -> Any:
        """A figure of a point; None if it was not measured."""
        return self._points.get((phase, name), {}).get(figure)

    def of(self, phase: str) -> dict[str, Record]:
        """The points of a phase by name."""
        return {name: each for (where, name), each in self._points.items() if where == phase}
