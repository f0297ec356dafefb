"""The same tokens in every layout of `Ragged`, and the comparison of a sub-module with a slow loop over its rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sma.ragged import Ragged, compress, locate_packed, rectangular

Layout = Literal["packed", "static", "rectangular", "total"]
LAYOUTS: tuple[Layout, ...] = ("packed", "static", "rectangular", "total")

# Maps a row of values (n, D) and its positions (n,) to results (n, E).
RowLoop = Callable[[Tensor, Tensor], Tensor]


def first(lengths: Sequence[int], length: int) -> Tensor:
    """The mask (B, L) of the first `lengths[b]` positions of every row."""
    return torch.arange(length) < torch.tensor(lengths, dtype=torch.long)[:, None]


def lay(
    x_BLD: Tensor, active_BL: Tensor, layout: Layout, positions_BL: Tensor | None = None, garbage: float = 1e3
) -> Ragged:
    """Lay out the active tokens of a batch and fill every hole with random numbers of the scale `garbage`.

    `static` allocates two more slots per row than the longest row needs, `total` three more than all rows together.
    `rectangular` requires the active tokens at the beginning of every row, and passes no lengths if all are active.
    """
    if layout == "packed":
        # If every token is active, compress returns rectangular tokens.
        return replace(compress(x_BLD, active_BL, positions_BL=positions_BL), stride=None)
    counts = active_BL.sum(1)
    if layout == "total":
        size = 3 + int(counts.sum())
        tokens = locate_packed(active_BL, size, positions_BL)
        tokens = tokens.with_values(x_BLD.flatten(0, 1).index_select(0, tokens.index))
    elif layout == "static":
        tokens = compress(x_BLD, active_BL, positions_BL=positions_BL, capacity=2 + max(counts.tolist(), default=0))
    else:
        assert torch.equal(active_BL, first(counts.tolist(), active_BL.shape[1]))
        tokens = rectangular(x_BLD, None if active_BL.all() else counts, positions_BL)
    noise = garbage * torch.randn(tokens.values.shape, dtype=x_BLD.dtype, generator=torch.Generator().manual_seed(0))
    return tokens.with_values(tokens.values.where(tokens.mask[:, None], noise))


def spread(values: Tensor, tokens: Ragged, like_BLD: Tensor) -> Tensor:
    """Results at the positions of their tokens, (B, L, E); zeros elsewhere. Results of holes are dropped."""
    out = values.new_zeros(like_BLD.shape[0] * like_BLD.shape[1], values.shape[1])
    real = tokens.mask
    return out.index_add(0, tokens.index[real], values[real]).unflatten(0, like_BLD.shape[:2])


def along(module: nn.Module, x_BLD: Tensor, positions_BL: Tensor | None = None) -> Tensor:
    """Run a sub-module on all tokens of a batch."""
    out: Tensor = module(rectangular(x_BLD, None, positions_BL))[0].unflatten(0, x_BLD.shape[:2])
    return out


def run(
    module: nn.Module, x_BLD: Tensor, active_BL: Tensor, layout: Layout, positions_BL: Tensor | None = None
) -> Tensor:
    """Run a sub-module on the active tokens of a batch in one layout."""
    tokens = lay(x_BLD, active_BL, layout, positions_BL)
    return spread(module(tokens)[0], tokens, x_BLD)


def run_rows(loop: RowLoop, x_BLD: Tensor, active_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
    """Run a loop on the active tokens of each row in turn."""
    if positions_BL is None:
        positions_BL = torch.arange(x_BLD.shape[1]).expand(x_BLD.shape[:2])
    out = torch.zeros_like(x_BLD)
    for row in range(x_BLD.shape[0]):
        places = active_BL[row].nonzero().squeeze(1)
        if places.numel():
            results = loop(x_BLD[row, places], positions_BL[row, places])
            out = out.index_put((torch.full_like(places, row), places), results)
    return out


def draw(module: nn.Module, std: float = 1.0) -> nn.Module:
    """Draw every parameter: initial values would not reveal a wrong bias, gain or decay."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # A positive mean, because relu2 might otherwise give every pair of a row the weight 0.
            parameter.copy_(std * (torch.randn_like(parameter) + (name == "bias_table")))
    return module


def saved_bytes(program: Callable[[], object]) -> int:
    """Number of bytes that a program keeps for backward."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        program()
    return sum(saved.values())


def assert_truncated_normal(tensor: Tensor, std: float) -> None:
    """Assert a normal distribution truncated at two standard deviations; the truncated one deviates by 0.88 std."""
    assert tensor.abs().max().item() <= 2 * std
    assert tensor.abs().max().item() > 1.8 * std
    assert abs(tensor.mean().item()) < 0.1 * std
    assert abs(tensor.std().item() - 0.8796 * std) < 0.05 * std


def grad(tensor: Tensor) -> Tensor:
    """The gradient of a tensor; fails if it is None."""
    assert tensor.grad is not None
    return tensor.grad


def assert_same_program(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: dict[str, Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Compare the outputs and all gradients of two programs of x and parameters under one random incoming gradient."""
    results = []
    for program in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        out = program(leaf)
        incoming = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        inputs = [leaf, *parameters.values()]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if out.requires_grad:
            found = torch.autograd.grad(out, inputs, incoming, allow_unused=True)
        gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(inputs, found, strict=True)
        ]
        results.append(dict(zip(["output", "x", *parameters], [out.detach(), *gradients], strict=True)))
    for name, wanted in results[1].items():
        scale = 1 + float(wanted.abs().max()) if wanted.numel() else 1.0
        assert_near(name, results[0][name], wanted, tolerance * scale)


def assert_near(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Compare two tensors; the error message contains `name`."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=partial("{}: {}".format, name))


def assert_matches_loop(
    module: nn.Module,
    loop: RowLoop,
    x_BLD: Tensor,
    active_BL: Tensor,
    layout: Layout,
    positions_BL: Tensor | None = None,
) -> None:
    """Compare a sub-module in one layout with a loop over its rows, in outputs and all gradients."""
    assert_same_program(
        lambda x: run(module, x, active_BL, layout, positions_BL),
        lambda x: run_rows(loop, x, active_BL, positions_BL),
        x_BLD,
        dict(module.named_parameters()),
    )


def assert_near_under_autocast(
    module: nn.Module, program: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype
) -> None:
    """Assert that autocast changes the output and the gradients of a float32 program no more than four times as much as
    rounding its input and parameters to the dtype does, which measures how sensitive the program is.
    """

    def results(x: Tensor, enabled: bool = False) -> list[Tensor]:
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = program(leaf)
        gradients = torch.autograd.grad(out.float().sum(), [leaf, *module.parameters()])
        return [tensor.detach().float() for tensor in (out, *gradients)]

    wanted, found = results(x), results(x, enabled=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
    rounded = results(x.to(dtype).float())
    names = ["output", "x", *dict(module.named_parameters())]
    for name, exact, low, near in zip(names, wanted, found, rounded, strict=True):
        assert low.isfinite().all(), name
        assert (low - exact).norm() <= 4 * ((near - exact).norm() + torch.finfo(dtype).eps * exact.norm()), name
