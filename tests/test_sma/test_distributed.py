"""Two ranks, one of which activates nothing, stay in step without `find_unused_parameters`."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

RANKS, STEPS = 2, 20
GAU = {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 4}
SPEC: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": 8,
    "encoder": {"kind": "linear", "features": 3},
    "layers": [
        {
            "backbone": {"kind": "ema", "state_size": 2},
            "modules": {"gau": GAU, "mlp": {"kind": "gated_mlp", "hidden_size": 8}, "conv": {"kind": "conv"}},
            "norm": {"kind": "layer_norm"},
        },
        {
            "modules": {
                "attention": {"kind": "attention", "heads": 2},
                "ema": {"kind": "ema"},
                "skip": {"kind": "identity"},
            },
            "norm": {"kind": "batch_norm"},
        },
    ],
    "head": {"kind": "mean_pool_linear", "classes": 3},
}


def _train(rank: int, store: str, queue: Any, options: dict[str, Any]) -> None:
    """Take the steps of one rank; report its parameters, its number of active tokens, and which parameters changed."""
    from sma import build  # here, because the suite must install its shape checker before sma is imported

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    model = build(SPEC, seed=0)
    model.recompute_activations(options["recompute"])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    parallel = nn.parallel.DistributedDataParallel(model)
    # Adam, because every parameter must change, and with SGD rounding would lose the smallest gradients.
    optimiser = torch.optim.Adam(parallel.parameters(), lr=0.01)
    source, active, every = torch.Generator().manual_seed(rank), 0, True
    for _ in range(STEPS):
        inputs, labels = torch.randn(4, 12, 3, generator=source), torch.randint(3, (4,), generator=source)
        # A row without a valid token activates nothing, at any router parameters.
        valid = torch.full((4, 12), rank == 0)
        output = parallel(inputs, valid, capacity=options["capacity"])
        active += sum(int(decision.active.sum()) for decision in output.decisions)
        optimiser.zero_grad()
        nn.functional.cross_entropy(output.logits, labels).backward()
        every &= all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
    after = [parameter.detach() for parameter in model.parameters()]
    moved = [
        name
        for (name, _), old, new in zip(model.named_parameters(), before, after, strict=True)
        if not torch.equal(old, new)
    ]
    queue.put((rank, active, every, moved, [parameter.numpy() for parameter in after]))
    dist.barrier()
    dist.destroy_process_group()


def main(store: str, recompute: bool, capacity: int | None) -> None:
    """Run both ranks and print `equal` or the mismatch."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    options = {"recompute": recompute, "capacity": capacity}
    ranks = [context.Process(target=_train, args=(rank, store, queue, options), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    (_, some, *first), (_, none, *second) = sorted(
        (queue.get(timeout=800) for _ in ranks), key=lambda result: result[0]
    )
    for process in ranks:
        process.join(60)
    same = all((one == other).all() for one, other in zip(first[2], second[2], strict=True))
    # The mean of no token is 0 and has no gradient, but data-parallel training averages the gradients of both ranks.
    print(
        "equal"
        if same and some > 0 and none == 0 and first[0] and second[0]
        else (same, some, none, first[0], second[0]),
        len(first[1]),
    )


def _count_parameters() -> int:
    from sma import build

    return len(list(build(SPEC, seed=0).parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "capacity"), [pytest.param(False, None, id="ragged"), pytest.param(True, 5, id="static, recomputed")]
)
def test_a_rank_that_activates_nothing_stays_in_step_with_one_that_does(tmp_path, recompute, capacity):
    folder = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "tests.test_sma.test_distributed",
        str(tmp_path / "store"),
        str(int(recompute)),
        str(capacity or 0),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.stdout.split()[:1] == ["equal"], done.stdout + done.stderr
    assert int(done.stdout.split()[1]) == _count_parameters()  # every parameter changed


if __name__ == "__main__":
    main(sys.argv[1], bool(int(sys.argv[2])), int(sys.argv[3]) or None)
