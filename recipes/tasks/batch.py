"""Batches: samples of different lengths, padded on the right, and the mask of valid tokens."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from sma.errors import DataError
from sma.summary import summary

LENGTHS = 8
"""Number of lengths of padded batches."""

UNSCORED = -1
"""Target of a position that is not scored."""


class Batch(NamedTuple):
    """A batch for a classifier.

    Shape:
        inputs `(B, L)`, token ids (int64) or real numbers, 0 at padding; valid `(B, L)`, true at real tokens; targets
        `(B,)`, or `(B, L)` with `UNSCORED` at positions that are not scored. If a sample is a pair of documents, inputs
        and valid are `(2B, L)`: rows 2i and 2i + 1 are the documents of sample i.
    """

    inputs: Shaped[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    targets: Int64[Tensor, " B"] | Int64[Tensor, "B L"]

    def __repr__(self) -> str:
        return summary(self)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on `device`."""
        return Batch(*(part.to(device, non_blocking=non_blocking) for part in self))


def collate(items: Sequence[tuple[Tensor, int]]) -> Batch:
    """Pad `(sequence, target)` samples with zeros on the right to the length of the longest.

    Args:
        items: at least one sample; the sequences are 1-D, of one dtype and any length.

    Raises:
        DataError: there is no sample, or a sequence is not 1-D.
    """
    if not items:
        raise DataError("a batch of no samples; give collate at least one")
    for number, (sequence, _) in enumerate(items):
        if sequence.ndim != 1:
            raise DataError(
                f"sample {number} of the batch has shape {tuple(sequence.shape)}; collate takes 1-D sequences"
            )
    lengths = torch.tensor([len(sequence) for sequence, _ in items])
    inputs = pad_sequence([sequence for sequence, _ in items], batch_first=True)
    valid = torch.arange(inputs.shape[1]) < lengths[:, None]
    return Batch(inputs, valid, torch.tensor([target for _, target in items], dtype=torch.int64))


def collate_pairs(items: Sequence[tuple[tuple[Tensor, Tensor], int]]) -> Batch:
    """Pad `((first, second), target)` samples to the length of the longest document; see `collate`.

    Rows 2i and 2i + 1 are the documents of sample i.

    Raises:
        DataError: there is no sample, or a document is not 1-D.
    """
    documents = collate([(document, target) for pair, target in items for document in pair])
    return documents._replace(targets=documents.targets[::2])


class Padded:
    """Makes batches of few different lengths: eighths of the longest row.

    Args:
        collate: function that makes a batch of samples.
        longest: length of the longest row.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch], longest: int) -> None:
        self.collate, self.longest, self.step = collate, longest, max(1, -(-longest // LENGTHS))

    def __call__(self, items: Sequence[Any]) -> Batch:
        """Make a batch and pad it on the right."""
        inputs, valid, targets = self.collate(items)
        length = inputs.shape[1]
        more = max(0, min(self.longest, -(-length // self.step) * self.step) - length)
        inputs = pad(inputs, (0, 0) * (inputs.ndim - 2) + (0, more))
        return Batch(
            inputs, pad(valid, (0, more)), pad(targets, (0, more), value=UNSCORED) if targets.ndim == 2 else targets
        )


def select_scored(logits: Tensor, targets: Tensor) -> tuple[Float[Tensor, "N C"], Int64[Tensor, "N"]]:
    """The logits and the targets of all rows, or of all positions that are scored."""
    scored = targets != UNSCORED
    return logits[scored], targets[scored]


def scored_losses(logits: Tensor, targets: Tensor) -> tuple[Float[Tensor, "..."], Bool[Tensor, "..."]]:
    """Cross-entropy of all rows, or of all positions, and whether they are scored; 0 where not.

    No shape depends on which are scored, so the host need not wait for an accelerator.
    """
    scored = targets != UNSCORED
    # The gradient of a score that does not count is 0, and 0 times a score that is not finite is NaN.
    counting = logits.where(scored[..., None], 0)
    losses = cross_entropy(counting.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=UNSCORED)
    return losses.reshape(targets.shape), scored
