"""What is kept of every trial: one JSON file each, written by the driver after every report, read by reports and by resumed sweeps."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from sma.errors import CheckpointError
from sma.tune.storage import Storage

FOLDER = "records"
CLOCK = "clock.json"

Status = Literal["running", "finished", "stopped", "failed"]


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
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: str | None = None
    busy: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    node: str = ""

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
        names = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not {"number", "values", "seed"} <= data.keys() <= names:
            raise CheckpointError(f"{where} is no record of a trial of this version; remove it, and the trial is run again")
        return cls(**data)


def load_records(storage: Storage) -> list[TrialRecord]:
    """All records of a sweep, by number.

    Raises:
        CheckpointError: one of them is damaged.
    """
    names = [f"{FOLDER}/{name}" for name in storage.names(FOLDER) if name.endswith(".json")]
    return sorted((TrialRecord.parse(storage.read_json(name), storage.address(name)) for name in names), key=lambda record: record.number)
