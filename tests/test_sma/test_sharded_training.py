"""Training with FSDP2 on two ranks, one of which activates nothing, equals training in one process.

The sharded checkpoint can be resumed and converted to a model folder.
"""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from tests.cases import generator
from tests.test_sma.test_sharded import RANKS, SPEC

UPDATES = 20


def _model(dtype: torch.dtype = torch.float64) -> Any:
    from sma import build  # here, because the suite must install its shape checker before sma is imported

    return build(SPEC, seed=0).to(dtype)


def _plain() -> Any:
    """A routed layer of plain modules."""
    from sma import RowWise, SparseModularActivation, TokenWise

    torch.manual_seed(0)
    row = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    return SparseModularActivation("sma", {"row": RowWise(row), "mlp": TokenWise(mlp)}).double()


def _shard(model: Any) -> Any:
    parts = [*model.layers] if hasattr(model, "layers") else [*model.submodules.values(), model.router]
    for part in (*parts, model):
        fully_shard(part)
    return model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _batch(step: int, rank: int, plain: bool) -> tuple[Tensor, Tensor]:
    """A batch of one rank; the second rank has no valid token and therefore activates nothing."""
    random = generator(RANKS * step + rank)
    x = torch.randn(3, 12, 8, generator=random, dtype=torch.float64) if plain else None
    ids = torch.randint(9, (3, 12), generator=random)
    return ids if x is None else x, torch.full((3, 12), rank == 0)


def _loss(model: Any, inputs: Tensor, valid: Tensor) -> Tensor:
    """The sum of the loss over the valid tokens."""
    output = model(inputs, valid=valid)
    if not hasattr(output, "logits"):
        return (output.values - inputs).square()[valid].sum()
    losses = nn.functional.cross_entropy(output.logits[:, :-1].mT, inputs[:, 1:], reduction="none")
    return losses[valid[:, 1:]].sum()


def _train(model: Any, optimizer: torch.optim.Optimizer, steps: range, rank: int | None, plain: bool) -> None:
    """Train on the batches of a rank or, with None, of all ranks: FSDP takes the mean of their gradients."""
    for step in steps:
        optimizer.zero_grad()
        batches = [_batch(step, each, plain) for each in (range(RANKS) if rank is None else [rank])]
        loss = torch.stack([_loss(model, *batch) for batch in batches]).sum()
        (loss / (RANKS if rank is None else 1)).backward()
        optimizer.step()


def _require_equal(model: nn.Module, whole: nn.Module) -> None:
    for (name, parameter), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
        found = parameter.full_tensor()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def _run(rank: int, folder: str) -> None:
    import sma

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=100)
    )
    for make, plain in ((_plain, True), (_model, False)):
        whole, model = make(), _shard(make())
        start = [parameter.detach().clone() for parameter in whole.parameters()]
        _train(whole, _optimizer(whole), range(UPDATES), None, plain)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(whole.parameters(), start, strict=True))
        _train(model, _optimizer(model), range(UPDATES), rank, plain)
        _require_equal(model, whole)
    _resume(folder, rank, whole)
    sma.save(model, f"{folder}/saved")
    for name, tensor in sma.load(f"{folder}/saved").state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name].to(tensor.dtype), rtol=1e-9, atol=1e-9)
    dist.barrier()
    dist.destroy_process_group()


def _resume(folder: str, rank: int, whole: nn.Module) -> None:
    """Train for half of the updates, save a sharded checkpoint, and continue in a new model."""
    half, model = UPDATES // 2, _shard(_model())
    optimizer = _optimizer(model)
    _train(model, optimizer, range(half), rank, False)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    other = _shard(_model())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    resumed = _optimizer(other)
    weights, moments = get_state_dict(other, resumed)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=moments)
    _train(other, resumed, range(half, UPDATES), rank, False)
    _require_equal(other, whole)


def main(folder: str) -> None:
    """Run both ranks; each raises on a mismatch."""
    torch.multiprocessing.spawn(_run, (folder,), nprocs=RANKS)
    print("equal")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_training_equals_training_in_one_process(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.test_sma.test_sharded_training", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=580)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


if __name__ == "__main__":
    main(sys.argv[1])
