"""Models on two ranks: sharded weights are gathered and one rank writes; if it fails, all ranks raise."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import sma
from sma.errors import CheckpointError
from tests.test_sma.test_checkpoint import SPEC

RANKS = 2


def made() -> sma.SequenceModel:
    return sma.build({**SPEC, "width": 6}, seed=3).eval()


def _run(rank: int, folder: str) -> None:
    """Save a sharded model from all ranks, and a data-parallel model from one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=100)
    )
    mesh, model = init_device_mesh("cpu", (RANKS,)), made()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sma.save(model, f"{folder}/sharded")
    _check(f"{folder}/sharded")
    Path(f"{folder}/taken").touch()
    with pytest.raises(CheckpointError, match=r"cannot save the model in '.*taken': .*; the folder must be writable"):
        sma.save(model, f"{folder}/taken")
    del model.head
    with pytest.raises(CheckpointError, match="does not fit its spec: missing"):
        sma.save(model, f"{folder}/sharded")
    parallel = torch.nn.parallel.DistributedDataParallel(made())
    if rank == 0:
        sma.save(parallel, f"{folder}/parallel")
        _check(f"{folder}/parallel")
    dist.barrier()
    dist.destroy_process_group()


def _check(folder: str) -> None:
    found, wanted = sma.load(folder).state_dict(), made().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_sharded_and_parallel_models_are_saved_completely(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    program = f"import sys; sys.path.insert(0, {str(root)!r}); from {__name__} import main; main(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["parallel", "sharded"]


def main(folder: str) -> None:
    """Run both ranks, in a process without the suite's shape checker."""
    torch.multiprocessing.spawn(_run, (folder,), nprocs=RANKS)
