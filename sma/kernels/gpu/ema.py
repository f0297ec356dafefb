"""Launches of the kernels of the EMA scan."""

import torch
from torch import Tensor

from sma.kernels.ema import chunk_of, states_shape
from sma.kernels.gpu.ema_results import results, sums
from sma.kernels.gpu.ema_states import carry, ends, prepare
from sma.kernels.launch import launch

# Channels of a program of one warp: a lane has one channel, and its registers have the states.
_CHANNELS = 32
_MOST_STATES = 16
# States of a program that only carries them over chunks: each state needs its own addresses.
_CARRIED = 4
# Tokens of a group, which is loaded at once.
_UNROLL = 8
# Parameters per program that prepares them.
_PREPARED = 128
# Number of warps that occupy a large GPU.
_WARPS = 4096


class _Scan:
    """The sizes of one call, and its launches; `flip` swaps the directions.

    Args:
        x: rows.
        prepared: log q, q, the rounding error of q, and w, as (S, N, D) each, see `prepare`.
        carried: h or None.
        lengths: tokens of rows or None.
        truncation: length of the kernels or None.
    """

    def __init__(
        self,
        x: Tensor,
        prepared: Tensor,
        carried: Tensor | None,
        lengths: Tensor | None,
        truncation: int | None,
    ) -> None:
        self.batch, self.length, self.channels = x.shape
        _, self.directions, self.states, _ = prepared.shape
        self.log_decay, self.decay, self.lack, self.weight = prepared.unbind()
        self.lengths = None if lengths is None else lengths.contiguous()  # kernels step through it
        self.chunk = chunk_of(self.batch, self.length, self.channels)
        self.chunks = -(-self.length // self.chunk)
        self.late = truncation if truncation is not None and truncation < self.length else 0
        self.streams = carried is not None
        self.block = min(_MOST_STATES, 1 << (self.states - 1).bit_length())
        self.blocks = -(-self.channels // _CHANNELS)
        self.slices = -(-self.states // self.block)
        parameters = (self.directions, self.channels, self.states)
        self.shape = states_shape(self.batch, self.length, parameters)
        self.sizes = (self.batch, self.length, self.channels, self.chunks)
        self.constants = {
            "S": self.directions,
            "N": self.states,
            "ROWS": lengths is not None,
            "CHUNK": self.chunk,
            "STATES": self.block,
            "CHANNELS": _CHANNELS,
        }
        # Constants of the kernels that scan.
        self.scanning = {"TOKEN": self.channels, "TRUNCATED": self.late > 0, "UNROLL": _UNROLL}

    @property
    def enters(self) -> bool:
        """Whether states pass between chunks."""
        return self.chunks > 1

    def enter(self, x: Tensor, flip: bool, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states that enter each chunk; with carried states also the states after the rows.

        Args:
            x: rows.
            flip: swap the directions.
            before: the states that enter each chunk; the results are then derivatives by log q.
        """
        enter, last = x.new_empty(0), self.log_decay.new_empty(0)
        if not (self.enters or self.streams):
            return self.log_decay.new_empty(0), last
        end, enter = (self.log_decay.new_empty(self.shape) for _ in range(2))
        if self.streams:
            last = self.log_decay.new_empty(self.batch, self.states, self.channels)
        programs = self.blocks * self.slices * self.directions * self.batch
        options = {**self.constants, "FLIP": flip, "FREEZE": self.streams, "num_warps": 1}
        launch(
            ends,
            (programs * self.chunks,),
            *(x, self.log_decay, self.decay, self.lack, self.lengths, before, end),
            *(*self.sizes, self.late),
            **options,
            **self.scanning,
            SLOPE=before is not None,
        )
        options["STATES"] = min(_CARRIED, self.block)
        launch(
            carry,
            (self.blocks * -(-self.states // options["STATES"]) * self.directions * self.batch,),
            *(self.log_decay, self.lengths, end, enter, last),
            *self.sizes,
            **options,
        )
        return enter, last.mT.contiguous() if self.streams else last

    def results(self, x: Tensor, skip: Tensor, carried: Tensor | None, enter: Tensor, flip: bool) -> Tensor:
        """The results y, from the states that enter each chunk."""
        make = torch.empty if self.lengths is None else torch.zeros
        y = make(x.shape, device=x.device, dtype=x.dtype)
        split = x.dtype != self.log_decay.dtype and self.directions * self.slices > 1
        part = torch.empty_like(y, dtype=self.log_decay.dtype) if split else y
        launch(
            results,
            (self.blocks * self.chunks * self.batch,),
            *(x, self.log_decay, self.decay, self.lack, self.weight),
            *(skip, carried, self.lengths, enter, part, y),
            *(*self.sizes, self.late),
            **self.constants,
            **self.scanning,
            FLIP=flip,
            FREEZE=self.streams,
            ENTER=self.enters,
            SPLIT=split,
            num_warps=1,
        )
        return y

    def sums(self, x: Tensor, gradient: Tensor, enter: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of log q, w and omega."""
        programs = self.blocks * self.slices * self.directions * self.chunks
        # All programs but the last ones have the same number of rows.
        groups = -(-self.batch // max(1, self.batch * programs // _WARPS))
        both = self.log_decay.new_empty(2, self.directions, groups * self.chunks, self.states, self.channels)
        skip = self.log_decay.new_empty(groups * self.chunks, self.channels)
        launch(
            sums,
            (programs * groups,),
            *(x, gradient, self.log_decay, self.decay, self.lack, self.weight),
            *(self.lengths, enter, slope, *both, skip),
            *(*self.sizes, self.late, groups),
            **self.constants,
            **self.scanning,
            ENTER=self.enters,
            num_warps=1,
        )
        decay, weight = both.sum(2).mT.contiguous()
        return decay, weight, skip.sum(0)


def _prepared(log_decay: Tensor, weight: Tensor) -> Tensor:
    """The parameters in the layout of the kernels."""
    directions, channels, states = log_decay.shape
    out = log_decay.new_empty(4, directions, states, channels)
    size = log_decay.numel()
    launch(
        prepare,
        (-(-size // _PREPARED),),
        *(log_decay.contiguous(), weight.contiguous(), out, channels, size),
        N=states,
        UNROLL=_UNROLL,
        BLOCK=_PREPARED,
    )
    return out


def forward(
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `sma.kernels.ema.ema`; the last result has the states that enter each chunk, and the prepared parameters."""
    x, carried = x.contiguous(), None if carried is None else carried.mT.contiguous()
    prepared = _prepared(log_decay, weight)
    scan = _Scan(x, prepared, carried, lengths, truncation)
    enter, end = scan.enter(x, flip=False)
    return scan.results(x, skip.contiguous(), carried, enter, flip=False), end, [enter, prepared]


def backward(
    grad: Tensor,
    end_grad: Tensor,
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, weight, skip and carried."""
    x, grad = x.contiguous(), grad.contiguous()
    enter, prepared = saved
    scan = _Scan(x, prepared, carried, lengths, truncation)
    # Run from the right, the operator is its own adjoint; its carried state is the gradient of the last state.
    back, carried_grad = scan.enter(grad, flip=True)
    x_grad = scan.results(grad, skip.contiguous(), end_grad.mT.contiguous() if scan.streams else None, back, flip=True)
    slope, end_slope = scan.enter(x, flip=False, before=enter) if enter.numel() else (enter, None)
    decay_grad, weight_grad, skip_grad = scan.sums(x, grad, enter, slope)
    if carried is not None and end_slope is not None:
        _, back_slope = scan.enter(grad, flip=True, before=back)
        decay_grad += (carried * back_slope + end_grad * end_slope).sum(0)
    return x_grad, decay_grad, weight_grad, skip_grad, carried_grad
