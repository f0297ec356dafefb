"""Published data sets: the folder where it is there, else its archive, else a download of that, else a sentence that
says all this.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sma.errors import DataError, quote, reason
from sma.recipes.io.archives import unpack_archive
from sma.recipes.io.download import fetch


def is_visible(name: str) -> bool:
    """Whether a file is one of a data set, by its name or its path with `/`: systems leave `._NAME` and `.DS_Store`
    among them.
    """
    return not name.rpartition("/")[2].startswith(".")


def published_folder(
    places: Sequence[Path],
    archives: Sequence[Path],
    unpacked: Path,
    *,
    url: str,
    missing: str,
    members: Callable[[str], bool],
    sha256: str | None = None,
    md5: str | None = None,
    archive_most: int | None = None,
    files_most: int | None = None,
    download: bool = False,
    progress: bool = True,
    option: str = "task.data.download",
    instead: str = "",
) -> Path:
    """Return the folder of a data set, unpacked from its archive or downloaded first where it must be.

    An archive must have its hash, whoever put it there.

    Args:
        places: where the folder may be, in the order in which they are looked at; some of them in `unpacked`.
        archives: where its archive may be; a download goes to the first.
        unpacked: the folder that the archive is unpacked to.
        url: where the archive is published.
        missing: the beginning of the sentence where there is nothing: what was looked for, and where.
        members: which members of the archive are wanted; hidden files never are.
        sha256: of the archive; None: nobody published it.
        md5: the same.
        archive_most: bytes that the archive can have.
        files_most: bytes that the wanted files can have together.
        download: get the archive where nothing is there.
        progress: show a bar while downloading.
        option: the setting by which the user asks for the download.
        instead: the end of that sentence: what else the user may do.

    Raises:
        DataError: there is nothing; or the archive is another one, damaged, or holds no such folder.
    """
    try:
        if found := _first(places):
            return found
        archive = next((path for path in archives if path.exists()), archives[0])
        there = archive.exists()
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        raise DataError(
            f"cannot look for data in {quote(str(places[0].parent), 300)}: {reason(error)}; choose another folder"
        ) from error
    if not download and not there:
        raise DataError(f"{missing}; put {url} there, or set {option}=true{instead}")
    fetch(url, archive, sha256=sha256, md5=md5, most=archive_most, progress=progress)
    unpack_archive(archive, unpacked, members=lambda name: is_visible(name) and members(name), most=files_most)
    if found := _first(places):
        return found
    raise DataError(
        f"{unpacked}, unpacked from {archive}, has no {places[0].name} where it should be; "
        f"delete both and get {url} again"
    )


def _first(places: Sequence[Path]) -> Path | None:
    return next((place for place in places if place.is_dir()), None)
