r"""Marks that a language model of bytes must beat: what needs no gradient, on the same held-out bytes.

All are in bits per byte, $-\frac{1}{T} \log_2 P(\text{test})$, which is a model's loss in nats divided by ln 2. Of the
text that comes with Python (3.11, 466 KB, the last 10 % held out): 2.00 by xz without the training text, 1.93 by
counting, 1.41 by xz with the training text.

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

MOST_BEFORE = 100_000_000
"""Bytes of training text that `marks` looks at, the last ones: enwik8 is looked at whole."""

_PRESET = 9  # xz -9
_BLOCK = 1 << 20
_MOST_ORDER = 7  # a context and the byte after it are one unsigned integer of 8 bytes
_BYTE = np.uint64(8)  # bits


def marks(train: Text, test: Text) -> dict[str, float]:
    """Return the marks of a held-out text, in bits per byte.

    Args:
        train: everything that stands before the held-out bytes: `corpus.before_test`.
        test: the held-out bytes: `corpus.test`.

    Returns:
        `xz`: the held-out bytes by `xz -9`, which sees nothing else (`xz_alone`);
        `witten_bell_5`: a byte model of order 5, counted on the training text (`witten_bell`);
        `xz_with_training_text`: what the held-out bytes add to the training text under `xz -9` (`xz_after`).
        Of a training text longer than 100,000,000 bytes only the last 100,000,000 are looked at, and the last two keys
        then say so: they end in `_last_100MB`. A second for 466 KB; some minutes and 1.5 GB of memory for 100 MB.

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
    """
    before, held_out = _bytes_of(train, "training"), _bytes_of(test, "held-out")
    limit = "" if len(before) <= MOST_BEFORE else f"_last_{MOST_BEFORE // 1_000_000}MB"
    before = before[-MOST_BEFORE:]
    return {
        "xz": xz_alone(held_out),
        f"witten_bell_5{limit}": witten_bell(before, held_out, order=5),
        f"xz_with_training_text{limit}": xz_after(before, held_out),
    }


def xz_alone(test: Text) -> float:
    """Return the bits per byte of `xz -9 < test`: 8 times the bytes of the .xz file over the bytes of the text.

    It learns while it reads, from nothing, and pays about 70 bytes for its container.

    Raises:
        DataError: the text is empty, or a tensor is not uint8 of one dimension.
    """
    held_out = _bytes_of(test, "held-out")
    return 8.0 * _xz_size(held_out) / len(held_out)


def xz_after(train: Text, test: Text) -> float:
    """Return the bits per byte that `test` adds to `train` under `xz -9`: 8 (|xz(train + test)| - |xz(train)|) /
    |test|.

    It goes on learning from the held-out bytes that it has seen, and it can copy: where the held-out text repeats whole
    passages of the training text, it beats any model that holds no copy of it. It remembers the last 64 MiB.

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
    """
    before, held_out = _bytes_of(train, "training"), _bytes_of(test, "held-out")
    return 8.0 * (_xz_size(before, held_out) - _xz_size(before)) / len(held_out)


def witten_bell(train: Text, test: Text, order: int = 5) -> float:
    """Return the bits per byte of `test` under `witten_bell_probabilities`, which knows `train` and stays as it is.

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
    $p(c \mid h) = p(c \mid h')$. The first bytes of `test` have shorter contexts, down to none: nothing of `train`
    stands before them.

    Memory and time: contexts are counted in groups of equal last byte, by sorting. 8 to 50 bytes per training byte of
    the largest group.

    Args:
        train: text to count.
        test: text to predict.
        order: most bytes of a context, 0 to 7.

    Shape:
        out `(T,)`, float64, in (0, 1).

    Raises:
        DataError: one of the texts is empty, or a tensor is not uint8 of one dimension.
        SpecError: `order` is not 0 to 7.

    Reference:
        Witten and Bell 1991; Chen and Goodman 1999, section 2.5 (see the top of this file).
    """
    if not 0 <= order <= _MOST_ORDER:
        raise SpecError(
            f"order={order} must be 0 to {_MOST_ORDER}: the number of bytes that the next one is predicted from"
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
    """Where the byte before is `last`."""
    return np.flatnonzero(text[:-1] == last) + 1


def _refine(
    probabilities: NDArray[np.float64],
    before: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    counted: NDArray[np.int64],
    asked: NDArray[np.int64],
    order: int,
) -> None:
    """Go from the empty context to the longest, for the places `asked`, of which the last context byte is that of the
    places `counted`.
    """
    for length in range(1, order + 1):
        counted, asked = counted[counted >= length], asked[asked >= length]
        if not len(counted) or not len(asked):
            return
        seen, numbers = np.unique(_windows(before, counted, length), return_counts=True)
        # Sorted by context first, so every context is one run of `seen`.
        contexts = seen >> _BYTE
        firsts = np.flatnonzero(np.diff(contexts, prepend=~contexts[:1]))
        contexts, totals, types = contexts[firsts], np.add.reduceat(numbers, firsts), np.diff(firsts, append=len(seen))

        windows = _windows(held_out, asked, length)
        context, known = _find(contexts, windows >> _BYTE)
        # What is unknown here is unknown to all longer contexts too.
        asked, windows, context = asked[known], windows[known], context[known]
        window, known = _find(seen, windows)
        number = np.where(known, numbers[window], 0)
        probabilities[asked] = (number + types[context] * probabilities[asked]) / (totals[context] + types[context])


def _windows(text: NDArray[np.uint8], places: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """The byte at every place and the `length` bytes before it, as one number: the byte itself is lowest, the oldest
    highest.
    """
    windows = np.zeros(len(places), dtype=np.uint64)
    for back in range(length, -1, -1):
        windows = windows << _BYTE | text[places - back]
    return windows


def _find(known: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where in the sorted `known` every wanted number stands, and whether it does."""
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return places, known[places] == wanted


def _xz_size(*parts: NDArray[np.uint8]) -> int:
    """Bytes of the .xz file of the parts one after another, as `xz -9` writes it; the file itself is not kept."""
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
