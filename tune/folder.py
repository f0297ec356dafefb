"""The folder of a sweep: whose it is, and who worked on it."""

from datetime import UTC, datetime
from typing import Any

from sma.errors import CheckpointError
from sma.recipes.run import commit, hardware
from sma.spec import dump_yaml
from sma.tune.cluster import Slots
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec
from sma.yaml_text import read_fields

SWEEP, DRIVERS = "sweep.yaml", "drivers.json"


def start_sweep(sweep: SweepSpec, storage: Storage) -> None:
    """Make a folder the folder of a sweep.

    Raises:
        CheckpointError: it holds a sweep or something else, or cannot be written.
    """
    where = storage.address("")
    if storage.read(SWEEP) is not None:
        raise CheckpointError(
            f"the storage {where!r} belongs to another sweep; give another --storage, or --resume {where} to go on with it"
        )
    if storage.names():
        raise CheckpointError(f"the storage {where!r} is not empty and holds no sweep; give another --storage")
    storage.check_writable()
    storage.write(SWEEP, dump_yaml(sweep))


def load_sweep(storage: Storage) -> SweepSpec:
    """The sweep of a folder.

    Raises:
        CheckpointError: there is none.
        SpecError: its file is not valid.
    """
    content = storage.read(SWEEP)
    if content is None:
        raise CheckpointError(f"there is no sweep in {storage.address('')!r}: {SWEEP} is missing; give the folder of an earlier --storage")
    return SweepSpec.model_validate(read_fields(content, storage.address(SWEEP)))


def add_driver(storage: Storage, slots: Slots) -> int:
    """Note what trains the trials from now on, for results that are made again later and elsewhere; returns how many there were before."""
    drivers = load_drivers(storage)
    made = {"commit": commit(), "hardware": hardware(slots.accelerator, slots.cpus), "date": datetime.now(UTC).date().isoformat()}
    storage.write_json(DRIVERS, [*drivers, {**slots._asdict(), **made}])
    return len(drivers)


def load_drivers(storage: Storage) -> list[dict[str, Any]]:
    """The processes that worked on the sweep one after another: their slots, commit, hardware and date."""
    return list(storage.read_json(DRIVERS) or [])
