"""The folder of a sweep: whose it is."""

from sma.errors import CheckpointError
from sma.spec import dump_yaml, read_yaml
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec

SWEEP, SLOTS = "sweep.yaml", "slots.json"


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
    return SweepSpec.model_validate(read_yaml(content.decode(), storage.address(SWEEP)))
