"""Calibration: turn the activation rates of a trained model up or down."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sma.batches import Batch, batch_of, batches_of, check_takes
from sma.budget import BudgetController, over_all_ranks
from sma.budget_spec import BudgetSpec
from sma.checks import check_count, check_number, what_came
from sma.decision import Decision
from sma.devices import is_sharded
from sma.errors import InputError, quote
from sma.model import SequenceModel
from sma.score_histogram import BINS
from sma.stats import RateCount, count_rates
from sma.submodule import device_and_dtype

ONCE = "batches can be gone through only once: give a list of them"


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    rate: float | Mapping[str, float] | Sequence[float | Mapping[str, float]],
    *,
    over: Literal["each", "total"] = "each",
    passes: int = 8,
    tolerance: float = 0.005,
) -> RateCount:
    """Turn the activation rates of a trained model up or down, by moving the score biases of its routers.

    Nothing is trained. The rates are measured on the data in evaluation mode, and pass by pass the score biases are set
    to
    what reaches the target; several passes, because later layers see what earlier ones then do. A target that is missed
    after all passes is a warning.

    In a distributed process group every rank calls it with data of its own, of any number of batches; all come to the
    same score biases.

    Args:
        model: a `SequenceModel`, wrapped by DistributedDataParallel or not, or a module of your own that returns an
            object with the attribute `decisions`; its routers' score biases are changed, nothing else.
        data: batches that can be gone through again, such as a list or a DataLoader: inputs, pairs of inputs and valid
            mask, or objects with the attributes (mappings with the keys) `inputs` and `valid`.
        rate: above 0 and at most 1: one for all sub-modules, one per name, or a list with such a thing for every routed
            layer.
        over: `each` sub-module of each layer, or the `total`, weighted by MACs on rows of the mean length.
        passes: through the data, at most.
        tolerance: largest distance from the target at which it stops early.

    Returns:
        the rates that were reached, measured in the last pass, over all ranks.

    Raises:
        InputError: the data has no valid token, is of another form or can be gone through only once; the model returns
            no decisions; or a router cannot be steered to the rate.
    """
    if batches_of(data, "calibrate") is data:
        raise InputError(
            "calibrate goes through the data several times, and this can be gone through only once: "
            "give a list of batches"
        )
    check_count(passes, "passes", 0, ": how often calibrate goes through the data to move the score biases")
    check_number(tolerance, "tolerance")
    if not tolerance >= 0:
        raise InputError(f"tolerance={tolerance} must be at least 0: how far from the target the rates may be")
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward does not wait for ranks that have fewer batches
    spec = BudgetSpec(target=_numbers(rate), over=over, floor=0.0)
    controller, training = BudgetController.of(model, spec), [part for part in model.modules() if part.training]
    if not controller.routers:
        raise InputError(f"{type(model).__name__} has no routed layer, so there are no rates to calibrate")
    model.eval()
    batches = 0
    try:
        for number in range(passes + 1):
            rates, counts, length, batches = _measure(model, data, controller, batches)
            if over == "total" and number == 0:
                controller = BudgetController.of(model, spec, length)
            gap, reached = _furthest(rates, controller)
            if gap <= tolerance:
                break
            if number < passes:
                controller.move(counts, speed=1.0)
        else:
            warnings.warn(
                f"calibrate did not come within {tolerance:g} of the target in {passes} passes: {reached}; give it "
                "more data or passes, or a rate that the scores allow (equal ones are decided alike)",
                stacklevel=3,  # past the decorator
            )
    finally:
        for part in training:
            part.training = True
    return rates


def _measure(
    model: nn.Module, data: Iterable[Any], controller: BudgetController, before: int
) -> tuple[RateCount, Tensor, int, int]:
    """The rates and the counts of the data of all ranks, the mean number of tokens of a row, and the batches of this
    rank.

    Args:
        model: in evaluation mode.
        data: of this rank.
        controller: counts.
        before: batches of this rank in the pass before; 0 in the first.
    """
    device, layers = device_and_dtype(model, None, None)[0], tuple(router.names for router in controller.routers)
    shapes = (
        (4,),
        (len(layers), len({name for layer in layers for name in layer})),
        (len(controller.steered) + len(controller.skipping), BINS),
    )
    sizes, active, counts = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
    for item, fresh in _together(data, model, device):
        inputs, valid = batch_of(item)
        decisions = _decisions(model, inputs, valid, len(controller.routers))
        found = controller.count(decisions, valid).to(device)
        if not fresh:
            continue
        counts += found
        active += count_rates(decisions, valid).active.to(device)
        tokens = inputs.shape[0] * inputs.shape[1] if valid is None else int(valid.sum())
        sizes += sizes.new_tensor([1, inputs.shape[0], tokens, 0])
    own = int(sizes[0])
    sizes[3] = int(before > 0 and own == 0)
    # Once in a pass and in one piece, so that the ranks meet however many batches each of them has.
    total = over_all_ranks(torch.cat([sizes, active.flatten(), counts.flatten()]))
    sizes, active, counts = (
        part.view(shape)
        for part, shape in zip(total.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    )
    batches, rows, tokens, exhausted = sizes.tolist()
    if exhausted:
        raise InputError(f"calibrate goes through the data several times, and its {ONCE}")
    if not batches:
        raise InputError("calibrate got no batch; give it some of the data that the model is to run on")
    if not tokens:
        raise InputError("calibrate got no valid token, so there are no rates; give it data with some")
    return RateCount(active, sizes[2], layers), counts, max(1, round(tokens / rows)), own


def _together(data: Iterable[Any], model: nn.Module, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """The batches of this rank, and whether each is a new one.

    Where the model is sharded, every rank has to run as often as the others: one that has no more batches repeats its
    last.
    """
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    sharded |= any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules())
    if not (sharded and distributed.is_available() and distributed.is_initialized()):
        yield from ((item, True) for item in data)
        return
    source, last = iter(data), None
    while True:
        item = next(source, None)
        having, beginning = over_all_ranks(
            torch.tensor([item is not None, item is None and last is None], dtype=torch.int64, device=device)
        )
        if not having:
            return
        if beginning:
            raise InputError(
                "calibrate got no batch on some of the ranks, and the model is sharded over all: "
                "give every rank at least one"
            )
        last = last if item is None else item
        yield last, item is not None


def _decisions(model: nn.Module, inputs: Tensor, valid: Tensor | None, layers: int) -> Sequence[Decision]:
    """The decisions of one batch.

    Raises:
        InputError: the model takes no mask, or returns none or too few.
    """
    name = type(model).__name__
    if valid is not None:
        check_takes(model, Batch(inputs, valid), "give it one, or calibrate with inputs alone")
    output = model(inputs) if valid is None else model(inputs, valid)
    decisions = getattr(output, "decisions", None)
    if isinstance(decisions, Sequence) and not isinstance(decisions, str):
        return decisions
    inner = [path for path, part in model.named_modules() if path and isinstance(part, SequenceModel)]
    cure = f", or calibrate the part model.{inner[0]} alone, with what that takes" if inner else ""
    raise InputError(
        f"{name} returned {what_came(output)}, which tells no decisions; required is an output with the attribute "
        f"decisions, one for each of its {layers} routed layers, as sma.ModelOutput has it: "
        f"let forward return that{cure}"
    )


def _numbers(rate: Any) -> Any:
    """A target as plain numbers."""
    if isinstance(rate, Mapping):
        return {name: _numbers(value) for name, value in rate.items()}
    if isinstance(rate, Sequence) and not isinstance(rate, str):
        return tuple(map(_numbers, rate))
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise InputError(
            f"the rate {quote(rate)} is {what_came(rate)}; required is a number such as 0.3, one for every name, or a "
            "list of these for the routed layers"
        )
    try:
        return float(rate)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _furthest(rates: RateCount, controller: BudgetController) -> tuple[float, str]:
    """The largest distance from a target, and what was reached there."""
    found, gaps, spent = rates.rates.tolist(), [(0.0, "")], []
    for steered in controller.steered:
        name = controller.routers[steered.layer].names[steered.column]
        reached = found[steered.layer][rates.names.index(name)]
        spent.append(reached * steered.cost)
        told = (
            f"{name!r} of routed layer {steered.layer} runs at a rate of {reached:.4f}, "
            f"and {steered.target:g} was asked"
        )
        gaps.append((abs(reached - steered.target), told))
    if controller.spec.over == "each" or not spent:
        return max(gaps)
    mean, target = sum(spent) / sum(steered.cost for steered in controller.steered), controller.steered[0].target
    return abs(mean - target), f"weighted by cost the rates come to {mean:.4f}, and {target:g} was asked"
