"""Launches and bytes of operators: by default one launch that reads its inputs and writes its outputs once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Work:
    """Launches, bytes and floating-point operations of products."""

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.launches + other.launches,
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
        )

    @staticmethod
    def sum(parts: Iterable["Work"]) -> "Work":
        """Sum of the work of several operators."""
        return sum(parts, Work())


Rule = Callable[[tuple[Any, ...], dict[str, Any], Any], Work]
"""Maps the arguments, the keyword arguments and the results of an operator to its work."""

RULES: dict[str, Rule] = {}


def register_work(operator: str, rule: Rule) -> None:
    """Set the rule of an operator, such as `sma::windowed_attention`; names of torch's operators omit `aten::`."""
    RULES[operator] = rule


def nbytes(values: Any) -> int:
    """Bytes of the distinct elements of all tensors in a tree: broadcast and overlapping ones count once, and so does a
    tensor that is given twice.
    """
    total, seen = 0, set()
    for tensor in tree_leaves(values):
        if not isinstance(tensor, Tensor) or not tensor.numel():
            continue
        same = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if same not in seen:
            seen.add(same)
            sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
            extent = 1 + sum((size - 1) * abs(step) for size, step in sizes)
            distinct = 1
            for size, step in sizes:
                distinct *= size if step else 1
            total += min(distinct, extent) * tensor.element_size()
    return total


def one_pass(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    written = nbytes(out)
    return Work(int(written > 0), nbytes((args, kwargs)), written)


def _made(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    written = nbytes(out)
    return Work(int(written > 0), 0, written)


def _nothing(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    return Work()


def _copy(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    written = nbytes(args[0])
    return Work(int(written > 0), nbytes(args[1]), written)


def _gather(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    written = nbytes(out)
    return Work(int(written > 0), written + nbytes(args[1:]), written)


def _add_rows(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    index, rows = nbytes(args[2]), nbytes(args[3])
    return Work(int(rows > 0), index + 2 * rows, rows)


def _put_rows(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    index, rows = nbytes(args[2]), nbytes(args[3])
    return Work(int(rows > 0), index + rows, rows)


def _out_of_place(rule: Rule) -> Rule:
    """The rule of an operator that clones what its in-place form changes."""

    def work(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
        whole = nbytes(args[0])
        return Work(1, whole, whole) + rule(args, kwargs, out)

    return work


def _padded(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    part = nbytes(args[0])
    return Work(2, part, nbytes(out) + part)


def _matmul(left: int) -> Rule:
    """The rule of a product whose first factor is the argument `left`."""

    def work(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
        return one_pass(args, kwargs, out) + Work(flops=2 * out.numel() * args[left].shape[-1])

    return work


def _nonzero(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    return Work(2, 2 * nbytes(args), nbytes(out))  # a pass that counts, and one that writes


def fused_pass(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    """Estimated work of a compiled function of `sma.fused`.

    Results with a row for each row of the largest tensor take one kernel per size; results of one number per row take
    no extra kernel. Results that are sums over rows take two more kernels, for partial sums and their sum, and a second
    pass over the arguments.
    """
    results = [each for each in tree_leaves(out) if isinstance(each, Tensor) and each.numel()]
    tensors = results + [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if not results:
        return Work()
    rows = max(tensors, key=Tensor.numel).shape[:1]
    mapped = [each for each in results if each.shape[:1] == rows]
    kernels = max(len({each.numel() for each in mapped if each.shape[-1:] != (1,)}), min(1, len(mapped)))
    sums = len(mapped) < len(results)
    passes = (kernels > 0) + sums
    return Work(kernels + 2 * sums, passes * nbytes((args, kwargs)), nbytes(out))


def _moments(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    once = fused_pass(args, kwargs, out)  # the mean, then the squares of the distances from it
    return once + once


def _fft_to_real(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    # cuFFT overwrites its input, so torch clones it, and normalises in a pass of its own.
    spectrum, real, scaled = nbytes(args[0]), nbytes(out), int(args[2] != 0)
    return Work(2 + scaled, 2 * spectrum + scaled * real, spectrum + (1 + scaled) * real)


for _names, _rule in {
    "empty new_empty empty_like empty_strided new_empty_strided": _nothing,
    "zeros new_zeros zeros_like zero_ ones new_ones ones_like full new_full full_like fill_ arange": _made,
    "rand_like randn_like bernoulli_ uniform_ normal_ random_ scalar_tensor": _made,
    "copy_": _copy,
    "index_select gather embedding index": _gather,
    "index_add_": _add_rows,
    "index_add": _out_of_place(_add_rows),
    "index_copy_": _put_rows,
    "index_copy": _out_of_place(_put_rows),
    "constant_pad_nd slice_backward select_backward": _padded,
    "nonzero": _nonzero,
    "mm bmm": _matmul(0),
    "addmm baddbmm": _matmul(1),
    "_fft_c2r": _fft_to_real,
    "sma::batch_moments": _moments,
}.items():
    for _name in _names.split():
        register_work(_name, _rule)
