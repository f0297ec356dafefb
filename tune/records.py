"""What is kept of every trial: one JSON file each, written by the driver after every report, read by reports and by
resumed sweeps.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sma.errors import CheckpointError, quote
from sma.tune.storage import Storage
from sma.tune.sweep import RATE, SweepSpec

FOLDER = "records"
CLOCK = "clock.json"

Status = Literal["running", "finished", "stopped", "failed"]

_LARGEST = 10**15

Number = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] | Annotated[float, Field(ge=-1e300, le=1e300)]


@dataclass
class TrialRecord:
    """A trial.

    Attributes:
        number: 0 is the experiment as it is.
        values: by field path; what it changes in the experiment.
        seed: of the training.
        status: running, also where the driver died; finished; stopped by halving; failed.
        reason: why it failed.
        metrics: finished: of its best checkpoint; otherwise of its last evaluation.
        history: every evaluation, with its `update`.
        checkpoint: its newest run folder, seen from the sweep's.
        busy: seconds in a slot of every process that worked on it, by when that began.
        restarts: processes that died.
        node: where it ran last.
    """

    number: int
    values: dict[str, Any]
    seed: int
    status: Status = "running"
    reason: str = ""
    metrics: dict[str, Number] = field(default_factory=dict)
    history: list[dict[str, Number]] = field(default_factory=list)
    checkpoint: str | None = None
    busy: dict[str, Number] = field(default_factory=dict)
    restarts: int = 0
    node: str = ""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @property
    def name(self) -> str:
        """The number with four digits: the name of its files."""
        return f"{self.number:04d}"

    @property
    def seconds(self) -> float:
        """In a slot, restarts included."""
        return sum(self.busy.values(), 0.0)

    @property
    def update(self) -> int:
        """The last one that was evaluated."""
        return int(self.history[-1]["update"]) if self.history else 0

    def save(self, storage: Storage) -> None:
        """Write the file."""
        storage.write_json(f"{FOLDER}/{self.name}.json", dataclasses.asdict(self))

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Make a record of what a file holds.

        Raises:
            CheckpointError: it holds something else.
        """
        try:
            # Strict as to types, which Python objects cannot be.
            record: Self = TypeAdapter(cls).validate_json(json.dumps(data))
            return record
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = quote(".".join(map(str, first["loc"]))) if first["loc"] else "the whole"
            raise CheckpointError(
                f"{where} is no record of a trial of this version: {at}: {first['msg'].lower()}; "
                "remove it, and the trial is run again"
            ) from error


def load_records(storage: Storage, sweep: SweepSpec | None = None) -> list[TrialRecord]:
    """All records of a sweep, by number.

    Args:
        storage: the folder of the sweep.
        sweep: is asked what a trial must have that the results are made of.

    Raises:
        CheckpointError: one of them is damaged.
    """
    found = []
    for name in storage.names(FOLDER):
        if not name.endswith(".json"):
            continue
        where = storage.address(f"{FOLDER}/{name}")
        record = TrialRecord.parse(storage.read_json(f"{FOLDER}/{name}", AGAIN), where)
        _check(record, name, where, sweep)
        found.append(record)
    return sorted(found, key=lambda record: record.number)


AGAIN = "remove it, and the trial it belongs to is run again"


def _check(record: TrialRecord, name: str, where: str, sweep: SweepSpec | None) -> None:
    """Refuse a record that contradicts itself, its name or its sweep."""
    wrong = None
    if record.number < 0 or name != f"{record.name}.json":
        wrong = f"number={quote(record.number)}, and its name says another one"
    elif not all("update" in entry for entry in record.history):
        wrong = "an evaluation in history has no update"
    elif sweep is not None:
        needed = {sweep.quality.name, RATE.name}
        strange = sorted(record.values.keys() - sweep.space.keys())
        if record.number >= sweep.samples:
            wrong = f"number={record.number}, and the sweep has {sweep.samples} trials"
        elif strange:
            wrong = f"values has {quote(strange[0])}, which the sweep does not search"
        elif record.status == "finished" and not needed <= record.metrics.keys():
            wrong = f"the trial is finished, and metrics has no {' and '.join(sorted(needed - record.metrics.keys()))}"
    if wrong is not None:
        raise CheckpointError(f"{where} is no record of a trial of this sweep: {wrong}; {AGAIN}")


def load_clock(storage: Storage) -> dict[str, float]:
    """The seconds that every driver took, by when it began.

    Raises:
        CheckpointError: the file is damaged.
    """
    found = storage.read_json(CLOCK, "remove it, and the seconds of earlier drivers are not counted")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(
        isinstance(value, int | float) and 0 <= value < 1e12 for value in found.values()
    ):
        raise CheckpointError(
            f"{storage.address(CLOCK)!r} is damaged: {quote(found)}; required are the seconds of every driver: "
            "remove it, and those of earlier drivers are not counted"
        )
    return found


def save_clock(storage: Storage, clock: dict[str, float]) -> None:
    """Write the file of `load_clock`."""
    storage.write_json(CLOCK, clock)
