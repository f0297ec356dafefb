"""The EMA scan token by token, and the comparison of its implementations with that loop."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sma.kernels import use
from sma.kernels.ema import Averaged, ema
from sma.kernels.operator import Name


class Inputs(NamedTuple):
    """Arguments of `ema`; tensors that need a gradient come first."""

    x: Tensor
    log_decay: Tensor
    weight: Tensor
    skip: Tensor
    carried: Tensor | None
    lengths: Tensor | None = None
    truncation: int | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Tensors that require a gradient, by name."""
        return {name: value for name, value in self._asdict().items() if torch.is_tensor(value) and name != "lengths"}

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in another dtype, as new leaves."""
        return self._replace(**{name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()})


def draw(
    rows: int,
    length: int,
    channels: int = 3,
    states: int = 2,
    *,
    directions: int = 1,
    truncation: int | None = None,
    lengths: Sequence[int] | None = None,
    streams: bool = False,
    fastest: float = 3.0,
    seed: int = 0,
) -> Inputs:
    """Random arguments in float64, with decays from almost 1 (log q = -0.001) to e^-fastest."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    exponents = torch.empty(directions, channels, states, dtype=torch.float64).uniform_(-3, 0, generator=generator)
    inputs = Inputs(
        normal(rows, length, channels),
        -(10**exponents) * fastest,
        normal(directions, channels, states),
        normal(channels),
        normal(rows, channels, states) if streams else None,
        None if lengths is None else torch.tensor(lengths),
        truncation,
    )
    return inputs.to(torch.float64)


def run(inputs: Inputs, implementation: Name) -> Averaged:
    """Run the operator in one implementation."""
    x, log_decay, weight, skip, carried, lengths, truncation = inputs
    with use(implementation):
        return ema(x, log_decay, weight, skip, truncation=truncation, carried_BDN=carried, lengths_B=lengths)


def loop(inputs: Inputs) -> Averaged:
    """Row by row, token by token."""
    lines, ends = [], []
    for row, x_LD in enumerate(inputs.x):
        length = x_LD.shape[0] if inputs.lengths is None else int(inputs.lengths[row])
        line = [inputs.skip * x for x in x_LD[:length]]
        r = torch.zeros_like(inputs.log_decay[0])
        for way, (log_decay, weight) in enumerate(zip(inputs.log_decay, inputs.weight, strict=True)):
            decay, r = log_decay.exp(), torch.zeros_like(log_decay)
            held = None if inputs.carried is None else inputs.carried[row]
            for t in range(length) if way == 0 else reversed(range(length)):
                r = decay * r + x_LD[t, :, None]
                gone = t - (inputs.truncation or length) * (1 if way == 0 else -1)
                if 0 <= gone < length:
                    r = r - decay ** (inputs.truncation or length) * x_LD[gone, :, None]
                line[t] = line[t] + (weight * r).sum(1)
                if held is not None:
                    line[t], held = line[t] + held.sum(1), decay * held
        rest = [torch.zeros_like(inputs.skip)] * (x_LD.shape[0] - length)
        lines.append(torch.stack([*line, *rest]) if x_LD.shape[0] else x_LD)
        ends.append(r)
    if not lines:
        return Averaged(inputs.x * 1, inputs.x.new_empty(0) if inputs.carried is None else inputs.carried * 0)
    end = inputs.x.new_empty(0) if inputs.carried is None else torch.stack(ends)
    return Averaged(torch.stack(lines), end)


def gradients(results: Averaged, inputs: Inputs) -> dict[str, Tensor]:
    """Results, and the gradients of a random weighting of them."""
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in results]
    total = sum((part.double() * weights).sum() for part, weights in zip(results, incoming, strict=True))
    found = torch.autograd.grad(total, list(inputs.leaves.values()), materialize_grads=True)
    parts = dict(zip(inputs.leaves, found, strict=True))
    return {**{name: part.detach() for name, part in results._asdict().items()}, **parts}


def assert_is_the_loop(inputs: Inputs, implementation: Name, tolerance: float = 1e-11) -> None:
    """Compare an implementation with the loop in float64: results and all gradients, relative to the largest number."""
    wanted = gradients(loop(exact := inputs.to(torch.float64)), exact)
    found = gradients(run(inputs, implementation), inputs)
    for name, want in wanted.items():
        scale = 1.0 + (float(want.abs().max()) if want.numel() else 0.0)
        error = float((found[name].double() - want).abs().max()) if want.numel() else 0.0
        assert found[name].shape == want.shape, name
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"
