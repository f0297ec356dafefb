"""The report of a run in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.marks import marks
from benchmarks.gpu.results import FILE, Points, Record, Results


def report(folder: Path) -> str:
    """The tables of the run in a folder.

    Raises:
        SystemExit: there is no run.
    """
    records = Results(folder).read()
    heads = [each for each in records if each["kind"] == "run"]
    if not heads:
        raise SystemExit(
            f"there are no results in {str(folder)!r}: {FILE} is missing or has no run; "
            f"write python -m benchmarks.gpu --out {folder}"
        )
    points = Points(records)
    device = next((each for each in records if each["kind"] == "device"), {})
    return "\n".join(
        [
            *_heading(heads[-1], device),
            *_table(
                ("figure", "limit", "measured", ""),
                (
                    (mark.name, mark.limit, _number(mark.figure), mark.state)
                    for mark in marks(points, device.get("device") == "cuda")
                ),
            ),
            *(line for phase in _phases(records) for line in _phase(phase, points)),
            *_omitted(records),
        ]
    )


def _heading(head: Record, device: Record) -> Iterator[str]:
    yield f"### {device.get('card', 'no device was reached')}"
    yield ""
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "triton", "python") if device.get(name))
    yield f"`{head['command']}`, commit {head['commit'] or 'unknown'}, {head['date']}, {versions}."
    yield ""


def _phases(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(each["phase"] for each in records if each["kind"] == "point"))


def _phase(phase: str, points: Points) -> Iterator[str]:
    rows = points.of(phase)
    figures = list(dict.fromkeys(name for row in rows.values() for name, value in row.items() if _shown(name, value)))
    yield f"**{phase}**"
    yield ""
    yield from _table(
        ("point", *(name.replace("_", " ") for name in figures)),
        ((name, *(_number(row.get(figure)) for figure in figures)) for name, row in rows.items()),
    )
    for name, row in rows.items():
        yield from _top(name, row)
        yield from (f"- {name}: {warning}" for warning in row.get("warnings", []))


def _top(name: str, row: Record) -> Iterator[str]:
    if row.get("top"):
        yield f"The {len(row['top'])} longest of `{name}`, ms per step:"
        yield ""
        yield from _table(("kernel", "ms"), ((f"`{kernel}`", f"{time:g}") for kernel, time in row["top"]))


def _shown(name: str, value: Any) -> bool:
    hidden = ("kind", "phase", "name", "layer", "rate", "precision", "implementation", "took", "top", "warnings", "csv")
    return name not in hidden and value is not None


def _omitted(records: Iterable[Record]) -> Iterator[str]:
    lines = [
        f"- {each.get('phase', 'run')}{' ' + each['name'] if 'name' in each else ''}: {each['reason']}"
        for each in records
        if each["kind"] in ("missing", "failed", "stopped")
    ]
    if lines:
        yield from ("**Not measured**", "", *lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    yield ""


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
