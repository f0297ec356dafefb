"""Published data sets: their folder if it exists, else their unpacked archive, else its download."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sma.errors import DataError, quote, reason
from sma.recipes.io.archives import unpack_archive
from sma.recipes.io.download import fetch


def is_visible(name: str) -> bool:
    """Whether a file, given by its name or its path with `/`, is not hidden, as `._NAME` and `.DS_Store` are."""
    return not name.rpartition("/")[2].startswith(".")


def published_folder(
    candidates: Sequence[Path],
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
    """Return the folder of a data set, after unpacking or downloading its archive if it does not exist.

    The hash of the archive is checked, even if the user has put it there.

    Args:
        candidates: possible paths of the folder, in the order of the search; some of them are in `unpacked`.
        archives: possible paths of its archive; a download is written to the first.
        unpacked: the folder into which the archive is unpacked.
        url: URL of the archive.
        missing: start of the error message if nothing is found: the files and the folders of the search.
        members: whether a member of the archive is unpacked; hidden files never are.
        sha256: SHA-256 of the archive; None if it is not known.
        md5: MD5 of the archive; None if it is not known.
        archive_most: maximum size of the archive, in bytes.
        files_most: maximum total size of the unpacked files, in bytes.
        download: download the archive if nothing is found.
        progress: whether to show a progress bar of the download.
        option: the setting that enables the download.
        instead: end of the error message: an alternative for the user.

    Raises:
        DataError: nothing is found; or the archive has another hash, is damaged, or lacks the folder.
    """
    try:
        if found := _first(candidates):
            return found
        archive = next((path for path in archives if path.exists()), archives[0])
        exists = archive.exists()
    except OSError as error:  # such as a name that is too long, or a folder without permission
        raise DataError(
            f"cannot look for data in {quote(str(candidates[0].parent), 300)}: {reason(error)}; choose another folder"
        ) from error
    if not download and not exists:
        raise DataError(f"{missing}; put {url} there, or set {option}=true{instead}")
    fetch(url, archive, sha256=sha256, md5=md5, most=archive_most, progress=progress)
    unpack_archive(archive, unpacked, members=lambda name: is_visible(name) and members(name), most=files_most)
    if found := _first(candidates):
        return found
    raise DataError(
        f"{unpacked}, unpacked from {archive}, has no {candidates[0].name} where it should be; "
        f"delete both and download {url} again"
    )


def _first(candidates: Sequence[Path]) -> Path | None:
    return next((path for path in candidates if path.is_dir()), None)
