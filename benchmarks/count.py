"""Count the kernel launches and bytes of one layer, forward + backward, on a CUDA device. No device is needed.

    python -m benchmarks.count --json

The layers are those of the presets, at full size. They run on torch's `meta` device, which computes shapes and no
values, so a whole batch takes no memory and the code follows the path of an accelerator. A dispatch mode records every
operator. It also counts synchronisations with the host, such as reading the number of active tokens, and returns a
value for each.

An operator counts as one launch that reads its inputs and writes its outputs once, except for the rules in
`benchmarks.work`. An operator of `sma.kernels` counts the launches of its implementation: its kernels, each of which
reads or writes its tensors once, or torch's operators. Compiled functions of `sma.fused` are estimated, see
`fused_pass`. This program measures no time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernel_cases import products
from benchmarks.work import RULES, Work, fused_pass, nbytes, one_pass
from sma.kernels import use
from sma.kernels.launch import recording
from sma.kernels.operator import RUNS, Name
from sma.layer import LayerSpec, RoutedLayer
from sma.spec import load_spec
from sma.streams import run_command

ROOT = Path(__file__).resolve().parents[1]
RATES = (0.1, 0.3, 1.0)
SHARED_MEMORY = 232_448  # bytes per block on an H100


class Shape(NamedTuple):
    """A preset, and the size of its training batch."""

    model: str
    batch: int
    length: int


SHAPES = {
    "text": Shape("seqboat_text", 50, 4000),
    "image": Shape("seqboat_image", 50, 1024),
    "enwik8": Shape("seqboat_language", 8, 8192),
}


class Call(NamedTuple):
    """One operator of a program.

    Attributes:
        phase: `forward` or `backward`.
        operator: its name.
        place: file of the project that called it; `autograd` for the derivative of an operator.
        work: what it costs.
    """

    phase: str
    operator: str
    place: str
    work: Work


class Counter(TorchDispatchMode):
    """Records every operator that runs inside it, and returns values for synchronisations of tensors without values.

    Args:
        active: number of active tokens of the batch: the rows of a result of `nonzero`, and the sum of copied numbers.
        longest: the largest number of active tokens of a row: the value returned at all other synchronisations.

    Attributes:
        calls: the operators, in order.
        synchronisations: the file that caused each synchronisation with the host.
    """

    def __init__(self, active: int = 0, longest: int = 0) -> None:
        super().__init__()
        self.active, self.longest, self.phase = active, longest, "forward"
        self.calls: list[Call] = []
        self.synchronisations: list[str] = []

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Record the operators of a block under the name of a phase."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call and run it."""
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        out = self._answer(name, args, kwargs)
        if out is not None:
            self.synchronisations.append(_place())
            if name != "nonzero":
                return out
        else:
            out = function(*args, **kwargs)
        if name in RUNS:
            self.calls.append(Call(self.phase, name, _place(), self._inside(RUNS[name], args)))
        elif not _is_view(function, args, out):
            work = RULES.get(name, fused_pass if name.startswith("sma::") else one_pass)(args, kwargs, out)
            if work != Work():
                self.calls.append(Call(self.phase, name, _place(), work))
        return out

    def _answer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Result of an operator that waits for the device; None for any other operator."""
        asked = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if asked is None or not asked.is_meta:
            return None
        if name == "nonzero":
            return asked.new_empty(self.active, asked.ndim, dtype=torch.int64)
        number = True if asked.dtype is torch.bool else self.longest
        each = True if asked.dtype is torch.bool else self.active // max(1, asked.numel())
        if name == "_local_scalar_dense":
            return number
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and torch.device(target).type == "cpu":
            return torch.full(asked.shape, each, dtype=kwargs.get("dtype") or asked.dtype)
        return None

    def _inside(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Work:
        """Work of an operator of `sma.kernels`."""
        with recording(SHARED_MEMORY) as launches, Counter(self.active, self.longest) as inner:
            run(*args)
        self.synchronisations += inner.synchronisations
        return inner.work() + Work.sum(Work(1, nbytes(each.arguments), 0, products(each)) for each in launches)

    def work(self, phase: str | None = None) -> Work:
        """Work of all operators, or of those of one phase."""
        return Work.sum(call.work for call in self.calls if phase in (None, call.phase))


def _is_view(function: Any, args: tuple[Any, ...], out: Any) -> bool:
    if function._schema.is_mutable:
        return False
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    return bool(made) and all(leaf.untyped_storage()._cdata in given for leaf in made)


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent.name != "benchmarks" and ".venv" not in path.parts:
            return path.resolve().relative_to(ROOT).as_posix()
        frame = frame.f_back
    return "autograd"


class _OneKernelDropout(TorchFunctionMode):
    """Dropout by one kernel, as torch does on CUDA; on other devices it takes three."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.dropout:
            values, share, training = _dropout_arguments(*args, **kwargs)
            return torch.native_dropout(values, share, True)[0] if training and share else values
        return function(*args, **kwargs)


def _dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool]:
    return input, p, training


def layer_spec(model: str) -> tuple[int, LayerSpec]:
    """Width and first layer of a preset's model."""
    spec: Any = load_spec(ROOT / "recipes" / "specs" / f"{model}.yaml", "model")
    return spec.width, cast(LayerSpec, spec.layer_specs[0])


def count(
    layer: RoutedLayer, batch: int, length: int, rate: float, capacity: float | None = None, kernels: Name = "triton"
) -> Counter:
    """Count forward + backward of a layer on the meta device at an activation rate."""
    x = torch.empty(batch, length, layer.width, device="meta", requires_grad=True)
    layer.zero_grad()
    counter = Counter(round(rate * batch * length), round(rate * length))
    with use(kernels), _OneKernelDropout(), counter:
        hidden = layer(x, capacity=capacity).hidden
        gradient = torch.empty_like(hidden)
        with counter.during("backward"):
            hidden.backward(gradient)
    return counter


def measure(name: str, rate: float, capacity: bool = False, implementation: Name = "triton") -> dict[str, Any]:
    """Count the layer of one preset at one rate, ragged or with a capacity of the rate."""
    shape = SHAPES[name]
    width, spec = layer_spec(shape.model)
    with torch.device("meta"):
        layer = spec.build(width).train()
    counter = count(layer, shape.batch, shape.length, rate, rate if capacity else None, implementation)
    places: dict[str, Work] = {}
    for call in counter.calls:
        places[call.place] = places.get(call.place, Work()) + call.work
    total = counter.work()
    return {
        "layer": name,
        "batch": shape.batch,
        "length": shape.length,
        "rate": rate,
        "capacity": capacity,
        "implementation": implementation,
        "launches": total.launches,
        "forward_launches": counter.work("forward").launches,
        "gigabytes": round((total.read + total.written) / 1e9, 2),
        "gigaflops": round(total.flops / 1e9, 1),
        "synchronisations": len(counter.synchronisations),
        "synchronised_at": counter.synchronisations,
        "places": {place: asdict(work) for place, work in sorted(places.items(), key=lambda item: -_bytes(item[1]))},
    }


def _bytes(work: Work) -> int:
    return work.read + work.written


def main() -> None:
    """Count every point and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, with the work of every file")
    parser.add_argument("--layer", action="append", choices=list(SHAPES), help="only this layer; may be repeated")
    parser.add_argument("--capacity", action="store_true", help="use a static capacity equal to the rate")
    parser.add_argument(
        "--implementation",
        default="triton",
        choices=["plain", "triton"],
        help="of the operators",
    )
    options = parser.parse_args()
    points = [
        measure(name, rate, options.capacity, options.implementation)
        for name in options.layer or SHAPES
        for rate in RATES
    ]
    if options.json:
        print(json.dumps(points, indent=1))
        return
    print(f"{'layer':8} {'tokens':>10} {'rate':>5} {'launches':>9} {'GB':>7} {'GFLOP':>7} {'syncs':>9}")
    for point in points:
        print(
            f"{point['layer']:8} {point['batch']:>3} x {point['length']:>5} {point['rate']:>5} {point['launches']:>8} "
            f"{point['gigabytes']:>8.2f} {point['gigaflops']:>7.1f} {point['synchronisations']:>9}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
