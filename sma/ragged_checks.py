"""Checks of the arguments of `sma.ragged`. Those that read numbers of tokens run on the CPU only, and not in compiled
graphs: on other devices they would make the host wait.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sma.checks import check_integers, check_tensor
from sma.devices import on_host
from sma.errors import InputError

if TYPE_CHECKING:
    from sma.ragged import Ragged


def check_extracted(values: Tensor, tokens: "Ragged", batch: Tensor, name: str) -> None:
    """Check the arguments of `extract`: one value per token, and a batch of the compressed shape.

    Raises:
        InputError: they do not fit together.
    """
    check_tensor(values, "the values are")
    check_tensor(batch, f"{name} is")
    if torch.compiler.is_compiling():  # sizes may be unknown
        return
    if values.shape[:1] != tokens.index.shape:
        raise InputError(f"extract got values of shape {tuple(values.shape)} for {tokens.index.shape[0]:,} tokens")
    if batch.ndim < 2 or batch.shape[0] != tokens.num_rows:
        raise InputError(f"{name} has shape {tuple(batch.shape)}; expected (B, L, …) with B={tokens.num_rows}")
    if values.is_floating_point() and not batch.is_floating_point():
        raise InputError(f"{name} has dtype {batch.dtype}, which would round the values; give the compressed batch")
    if on_host(tokens.index.device) and tokens.index.numel():
        rows = torch.div(tokens.index, max(batch.shape[1], 1), rounding_mode="floor")
        if not torch.equal(rows, tokens.rows.to(rows.dtype)):
            raise InputError(
                f"{name} has {batch.shape[1]} positions per row, and the tokens come from a batch with another number; "
                "give the batch that was compressed"
            )


def check_rectangular(x_BLD: Tensor, lengths: Tensor | None, positions_BL: Tensor | None) -> None:
    """Check the arguments of `rectangular`.

    Raises:
        InputError: they do not fit together.
    """
    check_tensor(x_BLD, "the batch is")
    if x_BLD.ndim < 2:
        raise InputError(f"the batch has shape {tuple(x_BLD.shape)}; expected (B, L, …)")
    if torch.compiler.is_compiling():
        return
    if lengths is not None:
        check_integers(lengths, "the lengths are", {"B": x_BLD.shape[0]}, ".sum(1)")
    if positions_BL is not None:
        check_integers(positions_BL, "the positions are", {"B": x_BLD.shape[0], "L": x_BLD.shape[1]})
