"""Two ranks with sharded parts (`fully_shard`), one of which activates nothing: neither waits for the other.

Both training and evaluation are tested.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.cases import generator

RANKS, SECONDS = 2, 60
GAU = {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 3, "bidirectional": False}
MODULES = {
    "gau": GAU,
    "chunks": {**GAU, "kind": "chunked_gau"},
    "s4d": {"kind": "s4d", "state_size": 4, "bidirectional": False},
}
LAYER = {
    "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
    "modules": MODULES,
    "norm": {"kind": "layer_norm"},
}
SPEC: dict[str, Any] = {
    "kind": "language_model",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 9},
    "layers": [LAYER, {**LAYER, "bypass": "identity"}],
}
# Parts alone, and parts below a root; only below a root are gathered parameters freed after a forward pass.
SHARDED: dict[str, Callable[[Any], list[nn.Module]]] = {
    "sub-module": lambda model: [model.layers[0].routed.submodules["gau"]],
    "sub-modules below the model": lambda model: [*model.layers[0].routed.submodules.values(), model],
    "parts of sub-modules": lambda model: [
        *(part for layer in model.layers for part in layer.routed.submodules.modules() if isinstance(part, nn.Linear)),
        *(layer.routed.submodules["chunks"].unit for layer in model.layers),
        model,
    ],
    "layer": lambda model: [model.layers[0]],
    "layers below the model": lambda model: [*model.layers, model],
    "tied encoder": lambda model: [model.encoder],
    "tied encoder below the model": lambda model: [model.encoder, model],
    "every part": lambda model: [
        *(
            part
            for layer in model.layers
            for part in (*layer.routed.submodules.values(), layer.routed.router, layer.routed)
        ),
        *(
            part
            for layer in model.layers
            for part in (layer.backbone, layer.norm, layer.bypass, layer)
            if part is not None
        ),
        model.encoder,
        model.final_norm,
        model,
    ],
}


def _equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def _train(model: Any, whole: Any, ids: Tensor, valid: Tensor) -> int:
    """The gradient of every parameter is the mean over the ranks, even if this rank activated nothing."""
    output = model(ids, valid)
    output.logits.square().sum().backward()
    whole(ids, valid).logits.square().sum().backward()
    for (name, parameter), own in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert parameter.grad is not None, name
        if isinstance(parameter.grad, DTensor):
            dist.all_reduce(own.grad)
            _equal(parameter.grad.full_tensor(), own.grad / RANKS)
        else:
            _equal(parameter.grad, own.grad)
    return sum(int(decision.active.sum()) for decision in output.decisions)


@torch.no_grad()
def _evaluate(model: Any, whole: Any, ids: Tensor, valid: Tensor) -> int:
    """Compare whole rows, then a stream in chunks of several sizes."""
    output = model(ids, valid)
    _equal(output.logits, whole(ids, valid).logits)
    state, other = model.init_state(ids.shape[0]), whole.init_state(ids.shape[0])
    for chunk, mask in zip(ids.split([1, 1, 7, 3], 1), valid.split([1, 1, 7, 3], 1), strict=True):
        found, wanted = model(chunk, mask, state=state), whole(chunk, mask, state=other)
        _equal(found.logits, wanted.logits)
        state, other = found.state, wanted.state
    return sum(int(decision.active.sum()) for decision in output.decisions)


def _steer(model: Any, whole: Any, ids: Tensor, valid: Tensor) -> int:
    """Budgets read the temperatures of sharded routers; the second rank has one batch less."""
    from sma.budget import BudgetController, BudgetSpec
    from sma.calibration import calibrate

    for each in (model, whole):
        controller = BudgetController.of(each, BudgetSpec(target=0.4))
        controller.update(each(ids, valid).decisions, valid)
        calibrate(each, [(ids, valid)] * (2 - dist.get_rank()), 0.6, passes=2, tolerance=1.0)
    for layer, other in zip(model.layers, whole.layers, strict=True):
        _equal(layer.routed.router.score_bias, other.routed.router.score_bias)
        assert layer.routed.router.score_bias.any()
    return sum(int(decision.active.sum()) for decision in model(ids, valid).decisions)


WORK = {"training": _train, "evaluation": _evaluate, "budgets": _steer}


def _run(rank: int, folder: str, work: str, names: list[str]) -> None:
    from sma import build  # here, because the suite must install its shape checker before sma is imported

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS)
    )
    for name in names:
        model = build(SPEC, seed=0).train(work == "training")
        whole = copy.deepcopy(model)
        for part in SHARDED[name](model):
            fully_shard(part)
        ids = torch.randint(9, (3, 12), generator=generator(rank))
        # A row without a valid token activates nothing, at any router parameters.
        active = WORK[work](model, whole, ids, torch.full((3, 12), rank == 0))
        assert (active > 0) == (rank == 0), active
        dist.barrier()
    dist.destroy_process_group()


def main(folder: str, work: str, names: list[str]) -> None:
    """Run both ranks; each raises on a mismatch."""
    torch.multiprocessing.spawn(_run, (folder, work, names), nprocs=RANKS)
    print("equal")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("work", list(WORK))
def test_a_rank_without_active_tokens_calls_the_sharded_parts(tmp_path, work):
    folder = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.test_sma.test_sharded", str(tmp_path), work, *SHARDED]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=580)
    assert done.stdout.strip() == "equal", done.stderr


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
