"""Routing the feed-forward blocks of a trained model: validation loss against multiply-accumulates (MACs).

    OMP_NUM_THREADS=1 python -m benchmarks.retrofit --json

It needs the extra `interop`. For every seed a small `LlamaForCausalLM` of transformers is trained on the help pages of
Python, byte by byte. All variants start from its weights and see the same batches, so they are paired by seed:

- dense: the model, before and after further updates.
- routed: its MLPs routed by `sma.retrofit` with the router `sma` and the gate `straight_through`, at several rates,
  which a total budget holds. The routers alone are trained first, then everything.
- random: the MLPs routed at random at the same rates, before and after as many updates of all parameters as routed
  has in both phases.

`bits_per_byte` is the loss on the validation split, in windows of as many bytes as the model is trained on, without
dropout. `rate` is the target, `measured_rate` the rate on the validation split. `macs_per_byte` counts the matrix
products of a forward pass, with the measured rates; `macs` is its ratio to the dense model.

Every point is written to the folder `--out` at once. A later run skips the points in that folder.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sma.budget import BudgetController
from sma.decision import Decision
from sma.recipes.tasks.language.corpus import Corpus, load_text
from sma.retrofit import Retrofitted, collect_decisions, retrofit
from sma.streams import run_command

RATES = (0.25, 0.5, 0.75)
PATTERN = "model.layers.*.mlp"
VOCABULARY = 256


@dataclass(frozen=True)
class Plan:
    """Sizes of the model and numbers of updates.

    Attributes:
        width, hidden, layers, heads: sizes of the model.
        context: bytes of a row.
        rows: rows of a batch.
        dense: updates of the dense model from its initial weights.
        routers: updates of the routers alone.
        everything: updates of all weights after those.
    """

    width: int = 128
    hidden: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 256
    rows: int = 4
    dense: int = 1400
    routers: int = 150
    everything: int = 250

    @property
    def further(self) -> int:
        """Updates after those of the dense model."""
        return self.routers + self.everything


LEARNING_RATES = {"initial": 3e-3, "further": 1e-3, "routers": 3e-2}


def llama(plan: Plan) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error.msg}: install the extra interop, pip install -e '.[interop]'") from None
    config = transformers.LlamaConfig(
        hidden_size=plan.width,
        intermediate_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def macs_per_byte(plan: Plan, rates: Sequence[float] | None) -> float:
    """MACs of a forward pass for one byte of a full row; rates of the MLPs by layer, None: without routers."""
    attention = 4 * plan.width**2 + 2 * plan.width * (plan.context + 1) / 2  # causal: half of the pairs
    mlp, router = 3 * plan.width * plan.hidden, 0 if rates is None else 2 * plan.width
    running = plan.layers if rates is None else sum(rates)
    return plan.layers * (attention + router) + running * mlp + plan.width * VOCABULARY


def batches(text: Tensor, plan: Plan, seed: int, count: int) -> Iterator[Tensor]:
    """Rows of `context + 1` bytes from random positions."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(plan.context + 1)
    for _ in range(count):
        starts = torch.randint(len(text) - plan.context, (plan.rows, 1), generator=generator)
        yield text[starts + span].long()


def loss_of(model: nn.Module, rows: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


def train(
    model: nn.Module, data: Iterable[Tensor], rates: dict[str, float], count: int, controller: BudgetController | None
) -> None:
    """Train by AdamW with a learning rate that rises for a tenth of the updates and then falls to 0.

    Args:
        model: the model.
        data: one batch for each update.
        rates: highest learning rates of the `weights` and of the `routers`.
        count: number of updates.
        controller: the controller of the budget.
    """
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in named if (".router." in name) == routers], "lr": rates[key]}
        for key, routers in (("weights", False), ("routers", True))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    rise = max(1, count // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min((update + 1) / rise, (count - update) / (count - rise + 1))
    )
    parameters = [each for _, each in named]
    model.train()
    for rows in data:
        if controller is None:
            loss = loss_of(model, rows)
        else:
            with collect_decisions(model) as decisions:
                loss = loss_of(model, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if controller is not None:
            controller.update(decisions)


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, plan: Plan, routed: bool) -> dict[str, Any]:
    """Bits per byte, rates and MACs on a text."""
    model.eval()
    rows = text[: (len(text) - 1) // plan.context * plan.context + 1].long().unfold(0, plan.context + 1, plan.context)
    total, active = 0.0, torch.zeros(plan.layers, dtype=torch.float64)
    for part in rows.split(32):
        decisions: list[Decision] = []
        if routed:
            with collect_decisions(model) as decisions:
                total += float(loss_of(model, part, "sum").double())
            active += torch.stack([decision.active.double().sum() for decision in decisions])
        else:
            total += float(loss_of(model, part, "sum").double())
    count = rows.shape[0] * plan.context
    rates = (active / count).tolist() if routed else None
    macs = macs_per_byte(plan, rates)
    return {
        "bits_per_byte": round(total / count / torch.tensor(2.0).log().item(), 5),
        "measured_rate": 1.0 if rates is None else round(statistics.mean(rates), 4),
        "rates": rates and [round(rate, 4) for rate in rates],
        "macs_per_byte": round(macs),
        "macs": round(macs / macs_per_byte(plan, None), 4),
    }


class Points:
    """The points of a run, in a file of a folder.

    Args:
        folder: the folder; None keeps nothing.
        plan: sizes of the run; a folder with points of another plan is an error.
    """

    def __init__(self, folder: Path | None, plan: Plan) -> None:
        self.file = None if folder is None else folder / "points.jsonl"
        self.found: list[dict[str, Any]] = []
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            settings = self.file.parent / "plan.json"
            wanted = json.dumps({**asdict(plan), "learning_rates": LEARNING_RATES})
            if settings.exists() and settings.read_text(encoding="utf-8") != wanted:
                raise SystemExit(f"{self.file.parent} holds points of other settings; give another --out")
            settings.write_text(wanted, encoding="utf-8")
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
            self.found = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        return any(all(point[name] == value for name, value in key.items()) for point in self.found)

    def add(self, point: dict[str, Any]) -> None:
        self.found.append(point)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
        print(
            f"seed {point['seed']} {point['variant']:7} {point['rate']:4.2f} {point['trained']:10} "
            f"{point['bits_per_byte']:.4f} bits per byte, {point['macs']:.3f} of the MACs, "
            f"{time.process_time():.0f} s of processor time",
            file=sys.stderr,
            flush=True,
        )


def dense_weights(plan: Plan, corpus: Corpus, seed: int, folder: Path | None) -> dict[str, Tensor]:
    """The weights of the trained dense model, kept in the folder."""
    file = None if folder is None else folder / f"dense-{seed}.pt"
    if file is not None and file.exists():
        kept: dict[str, Tensor] = torch.load(file, weights_only=True)
        return kept
    torch.manual_seed(seed)
    model, count = llama(plan), plan.dense
    rates = {"weights": LEARNING_RATES["initial"], "routers": 0.0}
    train(model, batches(corpus.train, plan, 2 * seed, count), rates, count, None)
    weights = model.state_dict()
    if file is not None:
        torch.save(weights, file)
    return weights


def routers_for(variant: str, rate: float, seed: int) -> dict[str, Any]:
    if variant == "random":
        return {"kind": "random", "rate": rate, "seed": seed}
    return {"kind": "sma", "gate": "straight_through"}


def measure(variant: str, rate: float, seed: int, plan: Plan, corpus: Corpus, weights: Any, points: Points) -> None:
    """Measure the points of one variant at one rate."""
    torch.manual_seed(seed)
    model = llama(plan)
    model.load_state_dict(weights)
    data = list(batches(corpus.train, plan, 2 * seed + 1, plan.further))
    learning = {"weights": LEARNING_RATES["further"], "routers": LEARNING_RATES["routers"]}

    def add(trained: str) -> None:
        found = evaluate(model, corpus.validation, plan, variant != "dense")
        points.add({"seed": seed, "variant": variant, "rate": rate, "trained": trained, **found})

    if variant == "routed":
        handle: Retrofitted = retrofit(model, {PATTERN: routers_for(variant, rate, seed)}, train="routers")
        # From all tokens to the target in the first half of the updates of the routers.
        controller = handle.budget({"target": rate, "over": "total", "anneal": max(1, plan.routers // 2)})
        train(model, data[: plan.routers], learning, plan.routers, controller)
        add("routers")
        model.requires_grad_(True)
        train(model, data[plan.routers :], learning, plan.everything, controller)
    else:
        if variant == "random":
            retrofit(model, {PATTERN: routers_for(variant, rate, seed)})
        add("nothing")
        train(model, data, learning, plan.further, None)
    add("everything")


def table(points: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, with the difference to the dense model that had as many updates, paired by seed."""
    lines = ["| variant | rate | trained | MACs | bits per byte | beside dense |", "|---|---|---|---|---|---|"]
    dense = {p["seed"]: p["bits_per_byte"] for p in points if (p["variant"], p["trained"]) == ("dense", "everything")}
    for key in dict.fromkeys((p["variant"], p["rate"], p["trained"]) for p in points):
        same = [p for p in points if (p["variant"], p["rate"], p["trained"]) == key and p["seed"] in dense]
        if not same:
            continue
        gaps = [p["bits_per_byte"] - dense[p["seed"]] for p in same]
        mean, macs = (statistics.mean(p[name] for p in same) for name in ("bits_per_byte", "macs"))
        spread = f"{min(gaps):+.3f} to {max(gaps):+.3f}"
        lines.append(
            f"| {key[0]} | {key[1]:g} | {key[2]} | {macs:.3f} | {mean:.3f} | {statistics.mean(gaps):+.3f} ({spread}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all points and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="folder of points and weights; finished points are not repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    plan = Plan()
    for name in asdict(plan):
        parser.add_argument(f"--{name}", type=int, default=getattr(plan, name), help=f"default {getattr(plan, name)}")
    options = parser.parse_args()
    plan = Plan(**{name: getattr(options, name) for name in asdict(plan)})
    points, corpus = Points(options.out, plan), load_text()
    for seed in options.seeds:
        todo = [
            (variant, rate)
            for variant, rates in (("dense", (1.0,)), ("routed", RATES), ("random", RATES))
            for rate in rates
            if not points.has(seed=seed, variant=variant, rate=rate, trained="everything")
        ]
        if todo:
            weights = dense_weights(plan, corpus, seed, options.out)
        for variant, rate in todo:
            # Points that an interrupted run has measured for this variant are measured again.
            points.found = [p for p in points.found if (p["seed"], p["variant"], p["rate"]) != (seed, variant, rate)]
            measure(variant, rate, seed, plan, corpus, weights, points)
    print(json.dumps(points.found, indent=1) if options.json else table(points.found))


if __name__ == "__main__":
    sys.exit(run_command(main))
