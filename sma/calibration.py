"""Calibration: set the activation rates of a trained model."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from einops import pack, unpack
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sma.batches import Batch, batch_of, batches_of, check_takes
from sma.budget import BudgetController, over_all_ranks
from sma.budget_spec import BudgetSpec
from sma.checks import check_count, check_module, check_number, what_came
from sma.decision import Decision
from sma.devices import is_sharded
from sma.errors import InputError, quote
from sma.model import SequenceModel
from sma.score_histogram import BINS
from sma.stats import RateCount, count_rates
from sma.submodule import device_and_dtype
from sma.weights import evaluating

ONCE = "batches can be iterated over only once: give a list of them"


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
    """Set the activation rates of a trained model through the score biases of its routers, without training.

    Each pass measures the rates on the data in evaluation mode and sets the score biases that would reach the target.
    Several passes are needed, because earlier layers change the inputs of later ones. A target that is missed after all
    passes is a warning.

    In a distributed process group every rank calls it with any number of batches; all ranks get the same score
    biases.

    Args:
        model: a `SequenceModel`, wrapped by DistributedDataParallel or not, or your own module that returns an object
            with the attribute `decisions`; only the score biases of its routers are changed.
        data: batches that can be iterated over repeatedly, such as a list or a DataLoader: inputs, pairs of inputs and
            valid mask, or objects with the attributes (mappings with the keys) `inputs` and `valid`.
        rate: target above 0 and at most 1: one for all sub-modules, one per name, or a list with one of these for every
            routed layer.
        over: `each` sub-module of each layer, or the `total`, weighted by MACs on rows of the mean length.
        passes: maximum number of passes through the data.
        tolerance: largest distance from the target at which it stops early.

    Returns:
        the rates of the last pass, over all ranks.

    Raises:
        InputError: the data has no valid token, has another form or can be iterated over only once; the model returns
            no decisions; or a router cannot be steered to the rate.
    """
    check_module(model, "sma.calibrate")
    if batches_of(data, "calibrate") is data:
        raise InputError(
            "calibrate iterates over the data several times, and this can be iterated over only once: "
            "give a list of batches"
        )
    check_count(passes, "passes", 0, ": how often calibrate iterates over the data to move the score biases")
    check_number(tolerance, "tolerance")
    if not tolerance >= 0:
        raise InputError(f"tolerance={tolerance} must be at least 0: how far from the target the rates may be")
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward does not wait for ranks that have fewer batches
    spec = BudgetSpec(target=_numbers(rate), over=over, floor=0.0)
    controller = BudgetController.of(model, spec)
    if not controller.routers:
        raise InputError(f"{type(model).__name__} has no routed layer, so there are no rates to calibrate")
    batches = 0
    with evaluating(model):
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
                "more data or passes, or a rate that the scores allow (tokens with equal scores get the same decision)",
                stacklevel=3,  # past the decorator
            )
    return rates


def _measure(
    model: nn.Module, data: Iterable[Any], controller: BudgetController, before: int
) -> tuple[RateCount, Tensor, int, int]:
    """Return rates and counts over all ranks, the mean number of tokens of a row, and the number of batches of this
    rank.

    Args:
        model: the model in evaluation mode.
        data: batches of this rank.
        controller: counts the tokens by margin.
        before: number of batches of this rank in the previous pass; 0 in the first.
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
    # Summed once per pass, so that ranks may have different numbers of batches.
    packed, packed_shapes = pack([sizes, active, counts], "*")
    sizes, active, counts = unpack(over_all_ranks(packed), packed_shapes, "*")
    batches, rows, tokens, exhausted = sizes.tolist()
    if exhausted:
        raise InputError(f"calibrate iterates over the data several times, and its {ONCE}")
    if not batches:
        raise InputError("calibrate got no batch; give it data for which the rates should hold")
    if not tokens:
        raise InputError("calibrate got no valid token, so there are no rates; give it data with valid tokens")
    return RateCount(active, sizes[2], layers), counts, max(1, round(tokens / rows)), own


def _together(data: Iterable[Any], model: nn.Module, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield the batches of this rank, and whether each is new.

    With a sharded model all ranks must run equally often: a rank without further batches repeats its last one.
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
        f"{name} returned {what_came(output)}, which has no decisions; expected an output with the attribute "
        f"decisions, one for each of its {layers} routed layers, as in sma.ModelOutput: "
        f"let forward return that{cure}"
    )


def _numbers(rate: Any) -> Any:
    """Convert a target to plain numbers."""
    if isinstance(rate, Mapping):
        return {name: _numbers(value) for name, value in rate.items()}
    if isinstance(rate, Sequence) and not isinstance(rate, str):
        return tuple(map(_numbers, rate))
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise InputError(
            f"the rate {quote(rate)} is {what_came(rate)}; expected a number such as 0.3, one for every name, or a "
            "list of these for the routed layers"
        )
    try:
        return float(rate)
    except OverflowError:  # an integer above the largest float
        return math.inf


def _furthest(rates: RateCount, controller: BudgetController) -> tuple[float, str]:
    """The largest distance from a target, and a description of it."""
    found, gaps, spent = rates.rates.tolist(), [(0.0, "")], []
    for steered in controller.steered:
        name = controller.routers[steered.layer].names[steered.column]
        reached = found[steered.layer][rates.names.index(name)]
        spent.append(reached * steered.cost)
        told = (
            f"{name!r} of routed layer {steered.layer} runs at a rate of {reached:.4f}, "
            f"the target is {steered.target:g}"
        )
        gaps.append((abs(reached - steered.target), told))
    if controller.spec.over == "each" or not spent:
        return max(gaps)
    mean, target = sum(spent) / sum(steered.cost for steered in controller.steered), controller.steered[0].target
    return abs(mean - target), f"weighted by cost the rates sum to {mean:.4f}, the target is {target:g}"
