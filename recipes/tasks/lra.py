"""The release of the Long Range Arena: the search for its folders, and their unpacking.

The release unpacks to `lra_release/lra_release/{listops-1000,tsv_data,pathfinder32,…}`. Its folders are searched for in
the data folder, in `lra_release` and in `lra_release/lra_release`. If only `lra_release.gz` exists, a tar archive of
7.7 GB, the required files are unpacked: all text files (`*.tsv`) into `lra_release_text`, and the images of a task into
their own folder.

Reference:
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sma.errors import DataError
from sma.recipes.io.published import published_folder

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
_ARCHIVES = ("lra_release.gz", "lra_release.tar.gz")
_ARCHIVE_BYTES = 12 << 30  # maximum size of the archive, which has 7.7 GB and no published hash
_TOPS = (".", "lra_release", "lra_release/lra_release")


def release_folder(
    data: str | Path,
    name: str,
    files: Sequence[str] = (),
    *,
    what: str = "",
    unpacked: str = "lra_release_text",
    members: Callable[[str], bool] = lambda member: member.endswith(".tsv"),
    download: bool = False,
    progress: bool = True,
    option: str = "task.data.download",
    instead: str = "",
) -> Path:
    """Return a folder of the release; see `published_folder`.

    Args:
        data: the data folder.
        name: name of the folder in the release, such as `listops-1000`.
        files: names of the required files in the folder.
        what: description of the folder and its content, for the error message; empty: its name and files.
        unpacked: name of the folder in the data folder into which an archive is unpacked.
        members: whether a member of the archive is unpacked; by default, whether it is a text file.
        download: download the release if nothing is found.
        progress: whether to show a progress bar of the download.
        option: the setting that enables the download.
        instead: end of the error message: an alternative for the user.

    Raises:
        DataError: the folder is not found, or lacks one of the files.
    """
    data, listed = Path(data), ", ".join(files)
    found = published_folder(
        [data / base / top / name for base in (".", unpacked) for top in _TOPS],
        [data / archive for archive in _ARCHIVES],
        data / unpacked,
        url=URL,
        archive_most=_ARCHIVE_BYTES,
        missing=f"there is no {what or f'{name}/ with {listed}'} in {data}, "
        f"nor in its lra_release/ or lra_release/lra_release/, nor a {_ARCHIVES[0]} to unpack",
        members=members,
        download=download,
        progress=progress,
        option=option,
        instead=instead,
    )
    missing = [file for file in files if not (found / file).is_file()]
    if missing:
        raise DataError(f"{found} lacks {', '.join(missing)}; it must hold {listed} of {URL}")
    return found
