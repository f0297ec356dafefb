"""The home folder of the user, which may not exist, and the folder in which data is kept."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from sma.errors import DataError, quote

_CACHE = "sparse-modular-activation"
_lent = [""]  # the temporary home folder of `lend_home`


def cache_folder() -> Path:
    """The default folder of data.

    It is in `XDG_CACHE_HOME`, or in `.cache` of the home folder. Without a home folder, as for a user id that exists
    only in a container, it is in `.cache` of the working folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification requires that relative paths are ignored
        return Path(given) / _CACHE
    try:
        return Path.home() / ".cache" / _CACHE
    except RuntimeError:
        return Path(".cache").absolute() / _CACHE


def check_run_folder(path: Path) -> None:
    """Check the path of a run folder: TensorBoard requires valid Unicode, and Lightning reads `::` as a URL.

    Raises:
        DataError: the path is not valid Unicode, or contains `::`.
    """
    whole = str(path.absolute())
    if whole != whole.encode(errors="replace").decode():
        raise DataError(
            f"the path of the run folder {quote(whole)} is not valid Unicode, which TensorBoard requires; choose "
            "another name (in a locale without UTF-8 no name beyond ASCII is valid: set PYTHONUTF8=1)"
        )
    if "::" in whole:
        raise DataError(
            f"the path of the run folder {quote(whole)} contains '::', which Lightning reads as a URL; "
            "choose another name"
        )


def lend_home() -> None:
    """Set a temporary home folder for this process and its children if the user has none, because Ray requires one.

    It is deleted when the process ends, so no user files are written there: the data folder does not change, and
    `expand` still refuses `~`.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["XDG_CACHE_HOME"] = str(cache_folder().parent)
        os.environ["HOME"] = _lent[0] = tempfile.mkdtemp(prefix="sma-home-")
        atexit.register(shutil.rmtree, _lent[0], ignore_errors=True)


def expand(path: Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    Raises:
        DataError: the user does not exist, or has no home folder.
    """
    try:
        if path.parts[:1] == ("~",) and _lent[0]:
            raise RuntimeError("the home folder is lent")
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{quote(str(path))} begins with the home folder {quote(path.parts[0])}, which does not exist; "
            "give an absolute path"
        ) from error
