"""Figures: drawn without a display, written whole, and never at the cost of the run that they show."""

import errno
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sma.errors import reason
from sma.files import write_atomically
from sma.recipes.io.names import SHOWN, plain

log = logging.getLogger("sma.recipes")

_DPI = 110


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Give a figure of so many inches to draw into; no text in it is mathematics, and signs that the font lacks are
    boxes.

    The figure belongs to no window and to no list of open figures, so it needs no closing. Use `png` or `save_figure`
    inside the block: matplotlib lays texts out when the figure is written.
    """
    import matplotlib as mpl  # a second that commands need not wait for
    from matplotlib.figure import Figure

    # A name may hold `$`; a settings file of the user's may ask for LaTeX.
    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        # Missing glyphs, scripts that it does not shape, labels too long for its layout: the user can mend none of
        # them.
        for message in (
            "Glyph .* missing from",
            "Matplotlib currently does not support .* natively",
            "constrained_layout not applied",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    return buffer.getvalue()


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG, whole or not at all, and return its path."""
    content = png(figure)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def label(text: object, limit: int = SHOWN) -> str:
    """Return a name as a figure shows it: on one line, without signs that have no shape, and not longer than its
    place.
    """
    return plain(text, limit)


def attempt(what: str, draw: Callable[[], object]) -> bool:
    """Draw, or warn in one line that names what was not drawn and why: nothing that is measured depends on a figure.

    A full disk is no fault of the figure, and what is written next would find no room either: that error passes, and
    resuming draws.

    Args:
        what: the figure, as the warning names it.
        draw: makes it.

    Returns:
        whether it was drawn.
    """
    try:
        draw()
    except Exception as error:  # whatever a drawing library raises
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("warning: %s was not drawn: %s", plain(what), plain(f"{type(error).__name__}: {reason(error)}"))
        return False
    return True
