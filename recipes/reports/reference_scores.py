r"""Reference scores for a language model of bytes: compressors and counts on the same held-out bytes.

All are in bits per byte, $-\frac{1}{T} \log_2 P(\text{test})$, the loss in nats divided by ln 2. The scores of the text
that comes with Python (3.11, 466 KB, the last 10 % held out): 2.00 by xz without the training text, 1.93 by counts,
1.41 by xz with the training text.

References:
    Witten and Bell, "The Zero-Frequency Problem: Estimating the Probabilities of Novel Events in Adaptive Text
    Compression", IEEE Transactions on Information Theory 37(4), 1991: their method C.
    Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", Computer Speech and Language
    13(4), 1999:
    the interpolated recursive form.
"""

import lzma

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sma.errors import DataError, SpecError

Text = bytes | bytearray | memoryview | NDArray[np.uint8] | Tensor
"""Bytes; a tensor of them is uint8, `(T,)`, on the CPU."""

MAX_BEFORE = 100_000_000
"""Maximum number of bytes of training text, the last ones, that `reference_scores` uses: all of enwik8."""

_PRESET = 9  # xz -9
_BLOCK = 1 << 20
_MAX_ORDER = 7  # a context and the byte after it are one unsigned integer of 8 bytes
_BYTE = np.uint64(8)  # bits


def reference_scores(train: Text, test: Text) -> dict[str, float]:
    """Return the reference scores of a held-out text, in bits per byte.

    It takes a second for 466 KB, and some minutes and 1.5 GB of memory for 100 MB.

    Args:
        train: all bytes before the held-out ones: `corpus.before_test`.
        test: the held-out bytes: `corpus.test`.

    Returns:
        `xz`: `xz -9` of the held-out bytes alone (`xz_alone`);
        `witten_bell_5`: a byte model of order 5, counted on the training text (`witten_bell`);
        `xz_with_training_text`: the increase by the held-out bytes after the training text under `xz -9` (`xz_after`).
        Only the last 100,000,000 bytes of a longer training text are used; the last two keys then end in `_last_100MB`.

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
    """
    before, held_out = _bytes_of(train, "training"), _bytes_of(test, "held-out")
    limit = "" if len(before) <= MAX_BEFORE else f"_last_{MAX_BEFORE // 1_000_000}MB"
    before = before[-MAX_BEFORE:]
    return {
        "xz": xz_alone(held_out),
        f"witten_bell_5{limit}": witten_bell(before, held_out, order=5),
        f"xz_with_training_text{limit}": xz_after(before, held_out),
    }


def xz_alone(test: Text) -> float:
    """Return the bits per byte of `xz -9 < test`: 8 times the bytes of the .xz file over the bytes of the text.

    The compressor adapts to the text from an empty dictionary. The container takes about 70 bytes.

    Raises:
        DataError: the text is empty, or a tensor is not uint8 of one dimension.
    """
    held_out = _bytes_of(test, "held-out")
    return 8.0 * _xz_size(held_out) / len(held_out)


def xz_after(train: Text, test: Text) -> float:
    """Return the bits per byte that `test` adds to `train` under `xz -9`: 8 (|xz(train + test)| - |xz(train)|) /
    |test|.

    The compressor adapts to the held-out bytes too, and it copies: if the held-out text repeats passages of the
    training text, its score is better than that of a model without a copy of them. Its dictionary holds the last
    64 MiB.

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
    """
    before, held_out = _bytes_of(train, "training"), _bytes_of(test, "held-out")
    return 8.0 * (_xz_size(before, held_out) - _xz_size(before)) / len(held_out)


def witten_bell(train: Text, test: Text, order: int = 5) -> float:
    """Return the bits per byte of `test` under `witten_bell_probabilities`, without adaptation to `test`.

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
        SpecError: `order` is not 0 to 7.
    """
    return float(-np.log2(witten_bell_probabilities(train, test, order)).mean())


def witten_bell_probabilities(train: Text, test: Text, order: int = 5) -> NDArray[np.float64]:
    r"""Return the probability of every byte of `test` given the `order` bytes before it, by counts of `train` alone.

    Interpolated Witten-Bell smoothing. With h a context, h' the same without its oldest byte, n(h, c) how often c
    follows h in `train`, N(h) the sum of n(h, c) over all c, and t(h) the number of different bytes that follow h,

    $$p(c \mid h) = \frac{n(h, c) + t(h)\, p(c \mid h')}{N(h) + t(h)}$$

    where the empty context backs off to 1/256. A context that `train` does not contain changes nothing:
    $p(c \mid h) = p(c \mid h')$. The first bytes of `test` have shorter contexts, down to none, because contexts do not
    reach back into `train`.

    Contexts are counted by sorting, in groups with the same last byte. The memory is 8 to 50 bytes per training byte of
    the largest group.

    Args:
        train: text to count.
        test: text to predict.
        order: maximum number of bytes of a context, 0 to 7.

    Shape:
        out `(T,)`, float64, in (0, 1).

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
        SpecError: `order` is not 0 to 7.

    Reference:
        Witten and Bell 1991; Chen and Goodman 1999, section 2.5 (see the top of this file).
    """
    if not 0 <= order <= _MAX_ORDER:
        raise SpecError(
            f"order={order} must be 0 to {_MAX_ORDER}, the number of bytes from which the next one is predicted"
        )
    before, held_out = _bytes_of(train, "training"), _bytes_of(test, "held-out")
    counts = np.bincount(before, minlength=256)
    types = np.count_nonzero(counts)
    probabilities = ((counts + types / 256) / (len(before) + types))[held_out]
    if order:
        for last in np.unique(held_out[:-1]):
            _refine(probabilities, before, held_out, _after(before, last), _after(held_out, last), order)
    return probabilities


def _after(text: NDArray[np.uint8], last: np.uint8) -> NDArray[np.int64]:
    """The positions whose preceding byte is `last`."""
    return np.flatnonzero(text[:-1] == last) + 1


def _refine(
    probabilities: NDArray[np.float64],
    before: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    counted: NDArray[np.int64],
    predicted: NDArray[np.int64],
    order: int,
) -> None:
    """Update probabilities in place with contexts of growing length.

    Args:
        probabilities: probabilities of the held-out bytes.
        before: the training text.
        held_out: the held-out text.
        counted: positions in the training text whose preceding byte is the last byte of the contexts.
        predicted: positions in the held-out text whose preceding byte is the same.
        order: maximum length of a context, in bytes.
    """
    for length in range(1, order + 1):
        counted, predicted = counted[counted >= length], predicted[predicted >= length]
        if not len(counted) or not len(predicted):
            return
        seen, numbers = np.unique(_windows(before, counted, length), return_counts=True)
        # `seen` is sorted by context first, so every context is one contiguous run.
        contexts = seen >> _BYTE
        firsts = np.flatnonzero(np.diff(contexts, prepend=~contexts[:1]))
        contexts, totals, types = contexts[firsts], np.add.reduceat(numbers, firsts), np.diff(firsts, append=len(seen))

        windows = _windows(held_out, predicted, length)
        context, known = _indices_of(contexts, windows >> _BYTE)
        # If a context is unknown, so are all longer ones.
        predicted, windows, context = predicted[known], windows[known], context[known]
        window, known = _indices_of(seen, windows)
        number = np.where(known, numbers[window], 0)
        backed_off = types[context] * probabilities[predicted]
        probabilities[predicted] = (number + backed_off) / (totals[context] + types[context])


def _windows(text: NDArray[np.uint8], positions: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """The byte at every position and the `length` bytes before it as one integer, the byte itself lowest."""
    windows = np.zeros(len(positions), dtype=np.uint64)
    for back in range(length, -1, -1):
        windows = windows << _BYTE | text[positions - back]
    return windows


def _indices_of(known: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The index of every wanted integer in the sorted `known`, and whether `known` contains it."""
    indices = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return indices, known[indices] == wanted


def _xz_size(*parts: NDArray[np.uint8]) -> int:
    """Size of the .xz file of the concatenated parts by `xz -9`, in bytes."""
    compressor = lzma.LZMACompressor(preset=_PRESET)
    size = 0
    for part in parts:
        for start in range(0, len(part), _BLOCK):
            size += len(compressor.compress(part[start : start + _BLOCK].tobytes()))
    return size + len(compressor.flush())


def _bytes_of(text: Text, which: str) -> NDArray[np.uint8]:
    """View a text as an array."""
    if not len(text):
        raise DataError(f"the {which} text is empty; at least one byte is required")
    if isinstance(text, Tensor):
        text = text.numpy()
    array = text if isinstance(text, np.ndarray) else np.frombuffer(text, dtype=np.uint8)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise DataError(
            f"the {which} text is {array.dtype} of shape {array.shape}; give uint8 of one dimension, one byte per token"
        )
    return array
