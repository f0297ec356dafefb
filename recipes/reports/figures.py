"""Figures: drawn without a display and written atomically. A failure to draw does not end the run."""

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
    """Make a figure to draw into. Texts are not parsed as mathematics; missing glyphs are drawn as boxes.

    The figure has no window and is not in pyplot's list of open figures, so it need not be closed. Call `png` or
    `save_figure` inside the block, because matplotlib lays out texts when it writes the figure.

    Args:
        width: width, in inches.
        height: height, in inches.
    """
    import matplotlib as mpl  # here, because the import takes a second
    from matplotlib.figure import Figure

    # A name may contain `$`, and the user's settings of matplotlib may enable LaTeX.
    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        # Missing glyphs, unsupported scripts, and labels too long for the layout, none of which the user can repair.
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
    """Write a figure atomically as a PNG file, and return its path."""
    content = png(figure)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def label(text: object, limit: int = SHOWN) -> str:
    """Return a name for a figure: on one line, without unprintable characters, of at most `limit` characters."""
    return plain(text, limit)


def attempt(what: str, draw: Callable[[], object]) -> bool:
    """Draw a figure, or log a one-line warning with the reason if that fails, because no result depends on a figure.

    The error of a full disk is raised, because the files that are written next would fail too. A resumed run draws the
    figure.

    Args:
        what: name of the figure, for the warning.
        draw: a function that draws it.

    Returns:
        whether the figure was drawn.
    """
    try:
        draw()
    except Exception as error:  # a drawing library may raise any exception
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("warning: %s was not drawn: %s", plain(what), plain(f"{type(error).__name__}: {reason(error)}"))
        return False
    return True
