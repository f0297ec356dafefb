"""The folder of a sweep: its spec, and the drivers that ran its trials."""

from datetime import UTC, datetime
from typing import Any

from sma.errors import CheckpointError
from sma.recipes.io.claims import LOCK
from sma.recipes.training.provenance import commit, hardware
from sma.spec import dump_yaml
from sma.tune.cluster import Slots
from sma.tune.records import clock_key
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec
from sma.yaml_text import read_fields

SWEEP, DRIVERS, TRIALS = "sweep.yaml", "drivers.json", "trials"

_DRIVER_PREFIX = "driver-"


def start_sweep(sweep: SweepSpec, storage: Storage) -> None:
    """Write a sweep into an empty folder.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
    """
    where = storage.address("")
    if storage.read(SWEEP) is not None:
        raise CheckpointError(
            f"the storage {where!r} belongs to another sweep; "
            f"give another --storage, or resume it with --resume {where}"
        )
    if [name for name in storage.names() if name != LOCK]:
        raise CheckpointError(f"the storage {where!r} is not empty and holds no sweep; give another --storage")
    storage.check_writable()
    storage.write(SWEEP, dump_yaml(sweep))


def load_sweep(storage: Storage) -> SweepSpec:
    """Load the sweep of a folder.

    Raises:
        CheckpointError: there is no sweep, or its file is not text.
        SpecError: its file is not valid.
    """
    content, where = storage.read(SWEEP), storage.address(SWEEP)
    if content is None:
        raise CheckpointError(
            f"there is no sweep in {storage.address('')!r}: {SWEEP} is missing; give the folder of an earlier --storage"
        )
    return SweepSpec.model_validate(read_fields(content, where))


def check_same(storage: Storage, content: bytes | None) -> None:
    """Check that a folder still belongs to the sweep, because it may be removed or replaced while the sweep runs.

    Args:
        storage: the folder.
        content: content of its `SWEEP` file at the start.

    Raises:
        CheckpointError: the folder was removed, moved or replaced.
    """
    found = storage.read(SWEEP)
    if found is None:
        raise CheckpointError(
            f"the storage {storage.address('')!r} was removed or moved while the sweep ran: {SWEEP} is missing"
        )
    if found != content:
        raise CheckpointError(
            f"the storage {storage.address('')!r} holds another sweep now: {SWEEP} was replaced while the sweep ran"
        )


def add_driver(storage: Storage, slots: Slots, began: float = 0.0) -> int:
    """Add the slots, start, commit, hardware and date of a new driver to the list of drivers; returns its number."""
    drivers = load_drivers(storage)
    made = {
        "began": clock_key(began),
        "commit": commit(),
        "hardware": hardware(slots.accelerator, slots.cpus),
        "date": datetime.now(UTC).date().isoformat(),
    }
    # The number is also new among the folders of trials, in case the file was lost: each belongs to one driver.
    found = [name.removeprefix(_DRIVER_PREFIX) for name in storage.names(TRIALS) if name.startswith(_DRIVER_PREFIX)]
    number = max(
        [len(drivers), *(int(name) + 1 for name in found if name.isdecimal() and name.isascii() and len(name) < 10)]
    )
    storage.write_json(DRIVERS, [*drivers, {**slots._asdict(), **made}])
    return number


def driver_folder(number: int) -> str:
    """The folder in which a driver keeps the run folders of its trials."""
    return f"{TRIALS}/{_DRIVER_PREFIX}{number}"


def load_drivers(storage: Storage) -> list[dict[str, Any]]:
    """The drivers that worked on the sweep, in order: their slots, commit, hardware and date.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: list[dict[str, Any]] | None = storage.read_json(
        DRIVERS, "", _are_drivers, "is a list of drivers with their slots"
    )
    return found or []


def _are_drivers(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(driver, dict)
        and type(count := driver.get("concurrent")) is int  # not a Boolean
        and 1 <= count <= 10**6
        for driver in found
    )
