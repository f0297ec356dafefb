"""Where a user's files are: the home folder, which not every user has, and the folder in which data is kept."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from sma.errors import DataError, quote

_CACHE = "sparse-modular-activation"
_lent = [""]  # the folder that `lend_home` made


def cache_folder() -> Path:
    """Where data is kept between runs unless the user names a folder.

    It is below `XDG_CACHE_HOME`, else below `.cache` of the home folder; without one, as of a user id that only a
    container knows, below `.cache` of the working folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # others are to be ignored, as its specification has it
        return Path(given) / _CACHE
    try:
        return Path.home() / ".cache" / _CACHE
    except RuntimeError:
        return Path(".cache").absolute() / _CACHE


def check_run_folder(path: Path) -> None:
    """Check that everything that writes a run can write into its folder: TensorBoard takes valid text only, and
    Lightning URLs.

    Raises:
        DataError: the path is not valid Unicode, or holds `::`.
    """
    whole = str(path.absolute())
    if whole != whole.encode(errors="replace").decode():
        raise DataError(
            f"the path of the run folder {quote(whole)} is not valid Unicode, which TensorBoard requires; choose "
            "another name (in a locale without UTF-8 every name beyond ASCII is none: PYTHONUTF8=1 helps)"
        )
    if "::" in whole:
        raise DataError(
            f"the path of the run folder {quote(whole)} has '::' in it, which is read as an address; "
            "choose another name"
        )


def lend_home() -> None:
    """Give this process and its children a home folder of their own where the user has none: Ray cannot be imported
    without one.

    It is deleted when the process ends, so nothing of the user's goes there: data keeps its place, and `expand` refuses
    `~` still.
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
        DataError: there is no such user, or none with a home folder.
    """
    try:
        if path.parts[:1] == ("~",) and _lent[0]:
            raise RuntimeError("the home folder is lent")
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{quote(str(path))} begins with the home folder {quote(path.parts[0])}, and there is none; "
            "give the whole path instead"
        ) from error
