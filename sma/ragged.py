"""Ragged tokens: the compressed form of a batch, and the operators compress and extract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sma.checks import check_booleans, check_count, check_instance, check_integers, check_tensor
from sma.devices import Answer, on_host
from sma.errors import InputError
from sma.kernels.placing import Found, Search, lay_out, placed
from sma.memory import check_memory
from sma.pytree import register_output
from sma.ragged_checks import check_extracted, check_rectangular
from sma.segments import expand_to
from sma.segments import segment_reduce as segment_reduce
from sma.summary import brief, summary


@register_output
@dataclass(frozen=True)
class Ragged:
    """Tokens of all rows one after another.

    There are two layouts. *Packed*: row after row without gaps; holes, if there are any, follow the tokens of the last
    row. *Rectangular*: `values` is a view of `(B, S, D)`; every row is a prefix of real tokens and a tail of holes. A
    hole has arbitrary finite values and must not affect real tokens. Other packages call `offsets` `cu_seqlens`, and
    `longest` `max_seqlen`.

    Attributes:
        values: `(T, D)`.
        index: `(T,)` index of each token in the flattened `(B * L)` input, to which `extract` returns it.
        positions: `(T,)` position in the row's whole stream, not in the chunk.
        rows: `(T,)` row of each token.
        offsets: `(B + 1,)`, where the tokens of row b are `offsets[b] … offsets[b + 1]`.
        lengths: `(B,)` number of real tokens of each row.
        stride: S where the layout is rectangular, else None.
        holes: False guarantees that every token is real.
        bound: maximum number of tokens of a row in a compiled graph, where it is not known exactly; else None.
        inverse: `(B * L,)` place of each position of the input among the tokens, at least T where it has none; None
            where it was not needed to find the tokens.
    """

    values: Float[Tensor, "T *D"]
    index: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    rows: Int[Tensor, "T"]
    offsets: Int[Tensor, "B1"]
    lengths: Int[Tensor, "B"]
    stride: int | None = field(default=None, metadata={"static": True})
    holes: bool = field(default=True, metadata={"static": True})
    bound: int | None = field(default=None, metadata={"static": True})
    inverse: Int[Tensor, "N"] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of the batch, B; a row may have no token."""
        return self.offsets.shape[0] - 1

    @property
    def slots(self) -> Int[Tensor, "T"]:
        """Rank of each token among the tokens of its row, from 0."""
        return torch.arange(self.rows.shape[0], device=self.rows.device) - self.offsets[self.rows]

    @property
    def mask(self) -> Bool[Tensor, "T"]:
        """True where the token is real, False at holes."""
        return self.slots < self.lengths[self.rows]

    @property
    def longest(self) -> int:
        """An upper bound of the tokens in a row: S if rectangular, else `bound`, else the exact maximum."""
        if self.stride is not None:
            return self.stride
        if self.bound is not None:
            return self.bound
        return int((self.offsets[1:] - self.offsets[:-1]).max()) if self.num_rows else 0

    def __repr__(self) -> str:
        if not isinstance(self.values, Tensor) or not isinstance(self.offsets, Tensor):
            return summary(self)
        layout = "packed" if self.stride is None else f"rectangular, stride={self.stride}"
        holes = ", holes=True" if self.holes else ""
        return (
            f"Ragged(values={brief(self.values)}, rows={self.num_rows}, {layout}{holes}, "
            f"device={str(self.values.device)!r})"
        )

    def with_values(self, values: Float[Tensor, "T *E"]) -> "Ragged":
        """The same tokens with other values."""
        # `dataclasses.replace` takes a noticeable share of the time of a step.
        return Ragged(
            values,
            self.index,
            self.positions,
            self.rows,
            self.offsets,
            self.lengths,
            self.stride,
            self.holes,
            self.bound,
            self.inverse,
        )

    def to_padded(self, longest: int | None = None) -> tuple[Float[Tensor, "B S *D"], Bool[Tensor, "B S"]]:
        """Return the tokens padded with zeros on the right, `(B, S, D)`, and the mask of the real tokens.

        S is the longest row, or for packed tokens `longest` where given; a smaller number would drop tokens, and is not
        checked. A rectangular layout without holes is not copied.
        """
        rows, longest = self.num_rows, self.longest if longest is None or self.stride is not None else longest
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        if self.stride is not None:
            padded = self.values.unflatten(0, (rows, longest))
            return (padded.where(expand_to(mask, padded), 0) if self.holes else padded), mask
        return lay_padded(self.values, self, longest), mask

    def from_padded(self, padded: Float[Tensor, "B S *E"]) -> Float[Tensor, "T *E"]:
        """Undo `to_padded` for values of its shape."""
        flat = padded.flatten(0, 1)
        if self.stride is not None:
            return flat
        index = self.padded_index(padded.shape[1])
        return flat.index_select(0, index.clamp(max=flat.shape[0] - 1) if self.holes else index)

    def padded_index(self, longest: int) -> Int[Tensor, "T"]:
        """Index of each token in the flattened rows of `longest` slots; for a hole, the index after the last one."""
        index = self.rows * longest + self.slots
        return index.where(self.mask, self.num_rows * longest) if self.holes else index


@dataclass(frozen=True)
class Places:
    """Where tokens lie in a flattened batch of N.

    Attributes:
        index: `(T,)` position of each token.
        inverse: `(N,)`, see `Ragged.inverse`.
    """

    index: Int[Tensor, "T"]
    inverse: Int[Tensor, "N"] | None


def lay_padded(values: Shaped[Tensor, "T *E"], tokens: Ragged, longest: int) -> Shaped[Tensor, "B S *E"]:
    """Lay values of packed tokens out in rows of `longest` slots, with zeros in empty slots."""
    size = tokens.num_rows * longest
    padded = values.new_zeros((size + tokens.holes, *values.shape[1:]))
    padded = padded.index_copy_(0, tokens.padded_index(longest), values)
    return padded[:size].unflatten(0, (tokens.num_rows, longest))


def check_ragged(tokens: object, what: str) -> None:
    """Check that an argument is ragged tokens.

    Raises:
        InputError: it is something else; the message explains how to make ragged tokens.
    """
    cure = "write sma.ragged.rectangular(x) for all tokens of a batch, or sma.ragged.compress(x, active)"
    check_instance(tokens, Ragged, f"{what} got", cure)


def rectangular(
    x_BLD: Float[Tensor, "B L *D"],
    lengths: Int[Tensor, "B"] | None = None,
    positions_BL: Int[Tensor, "B L"] | None = None,
) -> Ragged:
    """View a batch that is padded on the right as ragged tokens, without a copy.

    Args:
        x_BLD: the batch; the first `lengths[b]` tokens of row b are real.
        lengths: real tokens of each row; None where all are.
        positions_BL: position of each token in its row's stream; default `0 … L - 1`.
    """
    check_rectangular(x_BLD, lengths, positions_BL)
    rows, length = x_BLD.shape[:2]
    device = x_BLD.device
    index = torch.arange(rows * length, device=device)
    row = torch.arange(rows, device=device)[:, None].expand(rows, length).reshape(-1)
    if positions_BL is None:
        positions_BL = torch.arange(length, device=device).expand(rows, length)
    return Ragged(
        values=x_BLD.flatten(0, 1),
        index=index,
        positions=positions_BL.reshape(-1),
        rows=row,
        offsets=torch.arange(rows + 1, device=device) * length,
        lengths=torch.full((rows,), length, device=device) if lengths is None else lengths,
        stride=length,
        holes=lengths is not None,
    )


def compress(
    x_BLD: Float[Tensor, "B L *D"],
    active_BL: Bool[Tensor, "B L"],
    *,
    positions_BL: Int[Tensor, "B L"] | None = None,
    capacity: int | None = None,
) -> Ragged:
    """Gather the active tokens of a batch: the paper's operator *compress*.

    Args:
        x_BLD: the batch.
        active_BL: which tokens to take.
        positions_BL: position of each token in its row's stream; default `0 … L - 1`.
        capacity: None packs all active tokens; a number gives the rectangular layout with that many slots per row for
            the earliest active tokens, so that shapes do not depend on the data.

    Raises:
        InputError: the mask is not boolean or has another shape than the batch, or positions or capacity do not fit.
    """
    check_tensor(x_BLD, "the batch is", torch.float32)
    if x_BLD.ndim < 2:
        raise InputError(f"the batch has shape {tuple(x_BLD.shape)}; expected (B, L, …)")
    axes = dict(zip("BL", x_BLD.shape, strict=False))
    check_booleans(active_BL, "the mask is", axes)
    if positions_BL is not None:
        check_integers(positions_BL, "positions are", axes)
    flat = x_BLD.flatten(0, 1)
    if capacity is None:
        (frame,) = find(active_BL[..., None], positions_BL)()
        return frame.with_values(flat if frame.stride is not None else flat.index_select(0, frame.index))
    check_count(capacity, "capacity", 1, " token per row")
    if not torch.compiler.is_compiling():
        check_memory(8 * x_BLD.shape[0] * capacity, f"capacity={capacity}", device=x_BLD.device, error=InputError)
    frame = locate_static(active_BL, capacity, positions_BL)
    return frame.with_values(fill_holes(flat.index_select(0, frame.index), frame))


def locate(
    active_BLM: Bool[Tensor, "B L M"],
    positions_BL: Int[Tensor, "B L"] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Ragged]:
    """Find the active tokens of each of M masks, with one search for all of them.

    Args:
        active_BLM: the masks.
        positions_BL: position of each token in its row's stream; default `0 … L - 1`.
        sizes: number of active tokens of each mask, if the host has them; the device is then not synchronised.

    Returns:
        M ragged tokens without values; rectangular, so without a gather, where every token is active.
    """
    rows, length, modules = active_BLM.shape
    if torch.compiler.is_compiling():
        return [_locate_compiled(active_BL, positions_BL) for active_BL in active_BLM.unbind(-1)]
    counts_MB, inverse = active_BLM.sum(1).T, None
    if sizes is None:
        found = active_BLM.permute(2, 0, 1).reshape(-1).nonzero().squeeze(1)
        sizes = [found.shape[0]] if modules == 1 else counts_MB.sum(1).tolist()
    else:
        found, slots = placed(active_BLM.permute(2, 0, 1).reshape(-1), sum(sizes), 0)
        inverse = slots if modules == 1 else None
    frames = []
    for column, index in enumerate(found.split(sizes)):
        if index.shape[0] == rows * length:
            frames.append(_everything(active_BLM, positions_BL))
            continue
        index = index - column * rows * length if column else index
        frames.append(_packed(lay_out(index, counts_MB[column], length, positions_BL, inverse)))
    return frames


def _everything(active_BLM: Tensor, positions_BL: Tensor | None) -> Ragged:
    return rectangular(torch.empty(*active_BLM.shape[:2], 0, device=active_BLM.device), None, positions_BL)


def find(
    active_BLM: Bool[Tensor, "B L M"], positions_BL: Int[Tensor, "B L"] | None = None
) -> Callable[[], list[Ragged]]:
    """Begin to `locate` tokens; the result is a function that returns them.

    The host needs only the number of tokens. An accelerator copies it asynchronously, and the host waits for it when
    the function is first called, so other work can be queued before that call.

    Raises:
        InputError: the masks are on the meta device.
    """
    if torch.compiler.is_compiling() or on_host(active_BLM.device):
        frames = locate(active_BLM, positions_BL)
        return lambda: frames
    try:
        if active_BLM.shape[2] == 1 and active_BLM.numel():
            search = Search(active_BLM[..., 0], positions_BL)
            return cache(
                lambda: [_everything(active_BLM, positions_BL) if search.all_active else _packed(search.read())]
            )
        sizes = Answer(active_BLM.sum((0, 1)))
    except NotImplementedError as cause:
        raise InputError(
            "how many tokens are active is not known on the meta device; give a capacity, or load the model elsewhere"
        ) from cause
    return cache(lambda: locate(active_BLM, positions_BL, sizes.read()))


def _locate_compiled(active_BL: Tensor, positions_BL: Tensor | None) -> Ragged:
    """Find the active tokens of one mask without control flow by their number, which is unknown in a compiled graph."""
    index, length = active_BL.reshape(-1).nonzero().squeeze(1), active_BL.shape[1]
    return replace(_packed(lay_out(index, active_BL.sum(1), length, positions_BL)), bound=length)


def _packed(found: Found) -> Ragged:
    nothing = torch.empty(found.at.shape[0], 0, device=found.at.device)
    places = found.at, found.positions, found.rows, found.offsets, found.lengths
    return Ragged(nothing, *places, holes=False, inverse=found.inverse)


def locate_static(
    active_BL: Bool[Tensor, "B L"], capacity: int, positions_BL: Int[Tensor, "B L"] | None = None
) -> Ragged:
    """Find the earliest `capacity` active tokens of every row; a row with fewer is filled up with holes.

    Returns:
        rectangular tokens without values, whose shapes do not depend on the mask. The index of a hole is that of the
        first position of its row.
    """
    rows, length = active_BL.shape
    capacity = capacity if length else 0  # an empty row has no position that a hole could point to
    device = active_BL.device
    rank = active_BL.cumsum(1) - 1
    kept = active_BL & (rank < capacity)
    # Tokens that are not kept go to an extra slot, which is cut off.
    slot = torch.where(kept, rank, capacity)
    every = torch.arange(rows * length, device=device).reshape(rows, length)
    first = torch.arange(rows, device=device)[:, None] * length
    index = first.expand(rows, capacity + 1).scatter(1, slot, every)[:, :capacity].reshape(-1)
    if positions_BL is None:
        positions_BL = torch.arange(length, device=device).expand(rows, length)
    positions = positions_BL.reshape(-1).index_select(0, index).unflatten(0, (rows, capacity))
    inverse = torch.where(kept, rank + torch.arange(rows, device=device)[:, None] * capacity, rows * capacity)
    frame = rectangular(torch.empty(rows, capacity, 0, device=device), kept.sum(1), positions)
    return replace(frame, index=index, inverse=inverse.reshape(-1))


def locate_packed(active_BL: Bool[Tensor, "B L"], size: int, positions_BL: Int[Tensor, "B L"] | None = None) -> Ragged:
    """Pack the active tokens of a batch, at most `size` of them, into `size` slots; holes follow the last row.

    Returns:
        packed tokens without values, whose shapes do not depend on the mask. The index of a hole is that of the first
        position of the last row.
    """
    rows, length = active_BL.shape
    size = min(size, rows * length)
    index, inverse = placed(active_BL.reshape(-1), size, (rows - 1) * length)
    frame = _packed(lay_out(index, active_BL.sum(1), length, positions_BL, inverse))
    offsets = torch.cat([frame.offsets[:-1], torch.full_like(frame.offsets[-1:], size)])
    return replace(frame, offsets=offsets, holes=True, bound=min(length, size))


def fill_holes(values: Float[Tensor, "T *D"], tokens: Ragged) -> Float[Tensor, "T *D"]:
    """Set holes to zero: their gathered values belong to another token and may be infinite."""
    return values.where(expand_to(tokens.mask, values), 0) if tokens.holes else values


def extract(
    values: Float[Tensor, "T *D"], tokens: Ragged, like_BLD: Float[Tensor, "B L *E"]
) -> Float[Tensor, "B L *D"]:
    """Put values back to the positions of their tokens: the paper's operator *extract*; zeros at inactive tokens.

    Args:
        values: one per token, in the order of `tokens`.
        tokens: the result of `compress`.
        like_BLD: the batch that was compressed; gives B, L and the dtype of the result.
    """
    check_ragged(tokens, "extract")
    check_extracted(values, tokens, like_BLD, "like_BLD")
    if not tokens.holes and tokens.stride == like_BLD.shape[1]:
        return values.unflatten(0, like_BLD.shape[:2]).to(like_BLD.dtype)
    return extract_add(values, tokens, like_BLD.new_zeros((*like_BLD.shape[:2], *values.shape[1:])))


def extract_add(
    values: Float[Tensor, "T *D"], tokens: Ragged, into_BLD: Float[Tensor, "B L *D"]
) -> Float[Tensor, "B L *D"]:
    """Return `into_BLD` with the values added at the positions of their tokens; other positions are unchanged."""
    check_ragged(tokens, "extract_add")
    check_extracted(values, tokens, into_BLD, "into_BLD")
    flat = into_BLD.flatten(0, 1).clone(memory_format=torch.contiguous_format)
    return extract_add_(values, tokens, flat).unflatten(0, into_BLD.shape[:2])


def extract_add_(
    values: Float[Tensor, "T *D"], tokens: Ragged, into_TD: Float[Tensor, "U *D"]
) -> Float[Tensor, "U *D"]:
    """Add the values to a flattened batch, in place, at the positions of their tokens.

    With gradients, `into_TD` should not be a view: autograd copies the gradient of a change through a view.
    """
    values = values.to(into_TD.dtype)
    if not tokens.holes and tokens.stride is not None and tokens.index.shape[0] == into_TD.shape[0]:
        return into_TD.add_(values)
    return into_TD.index_add_(0, tokens.index, fill_holes(values, tokens))
