"""Upper bound for routers on ListOps: a fixed choice of tokens that follows the trees of the expressions.

    OMP_NUM_THREADS=1 python -m benchmarks.listops_levels
    OMP_NUM_THREADS=1 python -m benchmarks.listops_levels --choice brackets
    OMP_NUM_THREADS=1 python -m benchmarks.listops_levels --imitate

The model is that of the preset `listops_binary`. A digit has height 0, and a subtree is one higher than its highest
argument. Choices:

- levels: layer i, from 1, runs on both brackets of the subtrees of height i and on their arguments (digits, and the
  closing brackets of subtrees); the last layer also does so for higher subtrees.
- brackets: every layer runs on all closing brackets.

The choice is replayed (`model(inputs, decisions=…)`) with confidence 1. With `--imitate` the routers (`sma`) are also
trained to make it, by cross-entropy, and the model is tested with their own decisions: this tells whether the routers
have the information. `accuracy` is that on the test split, `rate` the activation rate of every layer, `agreement` the
share of tokens on which a router makes the choice.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

import sma
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.folders import cache_folder
from sma.recipes.tasks.batch import Batch
from sma.recipes.tasks.listops.expressions import VOCABULARY
from sma.recipes.training.objective import Objective, load_objective
from sma.streams import run_command

CLOSE = VOCABULARY.index("]")
OPEN = frozenset(index for index, token in enumerate(VOCABULARY) if token.startswith("["))
ROUTERS = {False: "{kind: always}", True: "{kind: sma, temperature_scale: 0.3}"}


def heights(ids: Int64[Tensor, "B L"]) -> tuple[Int64[Tensor, "B L"], Int64[Tensor, "B L"]]:
    """For every token, the height of the subtree that it opens or closes, and of the one whose argument it is; or 0.

    An opening bracket is not an argument; the closing one stands for the subtree.
    """
    own, parent = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, tokens in enumerate(ids.tolist()):
        stack: list[tuple[int, list[int]]] = []
        for place, token in enumerate(tokens):
            if token in OPEN:
                stack.append((place, []))
                continue
            if token == CLOSE:
                begin, arguments = stack.pop()
                height = 1 + int(own[row, arguments].max()) if arguments else 1
                own[row, [begin, place]] = height
                parent[row, arguments] = height
            if stack and token:
                stack[-1][1].append(place)
    return own, parent


def levels(ids: Int64[Tensor, "B L"], layers: int) -> list[Bool[Tensor, "B L 1"]]:
    """The choice `levels`, for every layer."""
    own, parent = (height.clamp(max=layers) for height in heights(ids))
    return [((own == level) | (parent == level))[..., None] for level in range(1, layers + 1)]


def brackets(ids: Int64[Tensor, "B L"], layers: int) -> list[Bool[Tensor, "B L 1"]]:
    """The choice `brackets`, for every layer."""
    return [(ids == CLOSE)[..., None]] * layers


CHOICES: dict[str, Callable[[Tensor, int], list[Tensor]]] = {"levels": levels, "brackets": brackets}


def train(
    model: sma.SequenceModel, batches: Iterator[Batch], spec: ExperimentSpec, choice: str, *, imitate: bool
) -> None:
    """Train a model with a replayed choice, by the optimiser of the preset."""
    training, choose = spec.training, CHOICES[choice]
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, training.betas, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / training.warmup, 1.0 - done / training.updates)
    )
    for update, batch in zip(range(1, training.updates + 1), batches, strict=False):
        wanted = choose(batch.inputs, len(model.routed_layers))
        output = model(batch.inputs, batch.valid, decisions=wanted)
        loss = nn.functional.cross_entropy(cast(Tensor, output.logits), batch.targets)
        if imitate:
            for decision, active in zip(output.decisions, wanted, strict=True):
                margin = decision.logits[..., 1] - decision.logits[..., 0]
                loss = loss + nn.functional.binary_cross_entropy_with_logits(
                    margin[batch.valid], active[batch.valid].to(margin.dtype)
                )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or float("inf"))
        optimizer.step()
        schedule.step()
        if update % training.evaluate_every == 0:
            print(f"update {update:,} of {training.updates:,}: loss {float(loss):.3f}", file=sys.stderr, flush=True)


@torch.no_grad()
def test(model: sma.SequenceModel, batches: Iterator[Batch], choice: str, *, imitate: bool) -> dict[str, Any]:
    """Test a model with the choice, or with the decisions of its own routers."""
    layers = len(model.routed_layers)
    right = samples = tokens = 0
    active, agreed = torch.zeros(layers), torch.zeros(layers)
    for batch in batches:
        wanted = CHOICES[choice](batch.inputs, layers)
        output = model(batch.inputs, batch.valid, decisions=None if imitate else wanted)
        right += int((cast(Tensor, output.logits).argmax(-1) == batch.targets).sum())
        samples, tokens = samples + len(batch.targets), tokens + int(batch.valid.sum())
        made = [decision.active[batch.valid] for decision in output.decisions]
        active += torch.stack([one.sum() for one in made])
        agreed += torch.stack([(one == mask[batch.valid]).sum() for one, mask in zip(made, wanted, strict=True)])
    return {
        "accuracy": right / samples,
        "rate": (active / tokens).tolist(),
        "agreement": (agreed / tokens).tolist(),
        "samples": samples,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train and test one model."""
    settings = [f"layers.layer.router={ROUTERS[options.imitate]}", "training.losses.policy=0", "training.budget=null"]
    settings += ["training.router_learning_rate=null", *options.set]
    spec = load_experiment("listops_binary", settings).replace(seed=options.seed)
    torch.set_num_threads(spec.threads or 1)
    objective: Objective[Any, Any] = load_objective(
        spec.task, spec.task.prepare(options.data or cache_folder(), progress=False)
    )
    model = sma.build(spec.model, seed=spec.seed)
    train(
        model, iter(objective.training_batches(spec.training, spec.seed)), spec, options.choice, imitate=options.imitate
    )
    return {
        "choice": options.choice,
        "imitate": options.imitate,
        "updates": spec.training.updates,
        "seed": spec.seed,
        **test(model.eval(), iter(objective.evaluation_batches("test")), options.choice, imitate=options.imitate),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choice", choices=list(CHOICES), default="levels")
    parser.add_argument("--imitate", action="store_true", help="train the routers to make the choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change the preset")
    parser.add_argument("--data", type=Path, help="folder in which data is kept between runs")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
