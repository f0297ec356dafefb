"""Records of trials: one JSON file per trial, which the driver writes after every report, and resumed sweeps read."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sma.errors import CheckpointError, quote
from sma.tune.storage import Storage
from sma.tune.sweep import RATE, SweepSpec, present_names

FOLDER = "records"
CLOCK = "clock.json"

_HINT = "remove it to run its trial again"

Status = Literal["running", "finished", "stopped", "failed"]

_LARGEST = 10**15

Number = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] | Annotated[float, Field(ge=-1e300, le=1e300)]


@dataclass
class TrialRecord:
    """The record of a trial.

    Attributes:
        number: number of the trial; 0 is the unchanged experiment.
        values: values that the trial changes in the experiment, by field path.
        seed: seed of the training.
        status: running, finished, stopped by halving, or failed. A trial whose driver died is still `running`.
        reason: reason of the failure of a failed trial.
        metrics: measures of the best checkpoint of a finished trial; of the last evaluation of others.
        history: measures of every evaluation, with its `update`.
        checkpoint: newest run folder, relative to the folder of the sweep.
        busy: seconds that every process of the trial spent in a slot, by the start of the process.
        restarts: number of processes that died.
        node: machine on which the trial ran last.
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
        """The number with four digits, the name of its files."""
        return f"{self.number:04d}"

    @property
    def seconds(self) -> float:
        """Seconds in a slot, restarts included."""
        return sum(self.busy.values(), 0.0)

    @property
    def update(self) -> int:
        """Number of updates before the last evaluation."""
        return int(self.history[-1]["update"]) if self.history else 0

    def save(self, storage: Storage) -> None:
        """Write the file."""
        storage.write_json(f"{FOLDER}/{self.name}.json", dataclasses.asdict(self))

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Make a record from the content of a file.

        Raises:
            CheckpointError: the content is not a record.
        """
        try:
            # From JSON, in which strict types have the formats of the file, such as lists for tuples.
            record: Self = TypeAdapter(cls).validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = f"{quote('.'.join(map(str, first['loc'])))}: " if first["loc"] else ""
            raise CheckpointError(
                f"{where} is not a record of a trial of this version: {at}{first['msg'].lower()}; {_HINT}"
            ) from error
        record.metrics, record.history = present_names(record.metrics), [present_names(each) for each in record.history]
        return record


def load_records(storage: Storage, sweep: SweepSpec | None = None) -> list[TrialRecord]:
    """All records of a sweep, by number.

    Args:
        storage: the folder of the sweep.
        sweep: the sweep, against which the records are checked; None checks the records alone.

    Raises:
        CheckpointError: a record is damaged.
    """
    found = []
    for name in storage.names(FOLDER):
        if not name.endswith(".json"):
            continue
        where = storage.address(f"{FOLDER}/{name}")
        record = TrialRecord.parse(storage.read_json(f"{FOLDER}/{name}", _HINT), where)
        _check_record(record, name, where, sweep)
        found.append(record)
    return sorted(found, key=lambda record: record.number)


def _check_record(record: TrialRecord, name: str, where: str, sweep: SweepSpec | None) -> None:
    """Check that a record agrees with itself, its file name and its sweep."""
    wrong = None
    if record.number < 0 or name != f"{record.name}.json":
        wrong = f"number={quote(record.number)} differs from the name of the file"
    elif not all("update" in entry for entry in record.history):
        wrong = "an evaluation in its history has no update"
    elif sweep is not None:
        needed = {sweep.quality.name, RATE.name}
        unknown = sorted(record.values.keys() - sweep.space.keys())
        if record.number >= sweep.samples:
            wrong = f"number={record.number}, and the sweep has {sweep.samples} trials"
        elif unknown:
            wrong = f"values has {quote(unknown[0])}, which the sweep does not search"
        elif record.status == "finished" and not needed <= record.metrics.keys():
            wrong = f"the trial is finished, and metrics has no {' and '.join(sorted(needed - record.metrics.keys()))}"
    if wrong is not None:
        raise CheckpointError(f"{where} is not a record of a trial of this sweep: {wrong}; {_HINT}")


def clock_key(began: float) -> str:
    """The name of a driver in the clock: when it began, in seconds since 1970."""
    return f"{began:.3f}"


def load_clock(storage: Storage) -> dict[str, float]:
    """The seconds that every driver ran, by its start.

    Raises:
        CheckpointError: the file is damaged.
    """
    hint = "remove it to resume without the seconds of earlier drivers"
    found: dict[str, float] | None = storage.read_json(CLOCK, hint, _is_clock, "are the seconds of every driver")
    return found or {}


def _is_clock(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(value, int | float) and 0 <= value < 1e12 for value in found.values()
    )


def save_clock(storage: Storage, clock: dict[str, float]) -> None:
    """Write the file of `load_clock`."""
    storage.write_json(CLOCK, clock)
