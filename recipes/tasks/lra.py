"""The release of the Long Range Arena: where its folders are, and what to say where they are not.

The release unpacks to `lra_release/lra_release/{listops-1000,tsv_data,pathfinder32,…}`. A folder of it is looked for in
the data folder itself, in `lra_release` and in `lra_release/lra_release`. Where only `lra_release.gz` is there, a tar
of 7.7 GB, what is needed of it is unpacked: all files of text (`*.tsv`) into `lra_release_text`, and the images of a
task into a folder of their own.

Reference:
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sma.errors import DataError
from sma.recipes.io.published import published_folder

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
_ARCHIVES = ("lra_release.gz", "lra_release.tar.gz")
_ARCHIVE_BYTES = 12 << 30
"""More than the 7.7 GB that the archive has; nobody published its hash."""

_TOPS = (".", "lra_release", "lra_release/lra_release")


def in_release(
    data: str | Path,
    name: str,
    what: str,
    *,
    unpacked: str,
    members: Callable[[str], bool],
    download: bool = False,
    progress: bool = True,
    option: str = "task.data.download",
    instead: str = "",
) -> Path:
    """Return a folder of the release; see `published_folder`.

    Args:
        data: the data folder.
        name: of the folder in the release, such as `listops-1000`.
        what: that, with what is in it, for the sentence where it is missing.
        unpacked: the folder in the data folder that an archive is unpacked to.
        members: which members of the archive are wanted.
        download: get the release where nothing is there.
        progress: show a bar while downloading.
        option: the setting by which the user asks for the download.
        instead: what else the user may do where nothing is there.

    Raises:
        DataError: it is not there.
    """
    data = Path(data)
    return published_folder(
        [data / place / top / name for place in (".", unpacked) for top in _TOPS],
        [data / archive for archive in _ARCHIVES],
        data / unpacked,
        url=URL,
        archive_most=_ARCHIVE_BYTES,
        missing=f"there is no {what} in {data}, "
        f"nor in its lra_release/ or lra_release/lra_release/, nor a {_ARCHIVES[0]} to unpack",
        members=members,
        download=download,
        progress=progress,
        option=option,
        instead=instead,
    )


def release_folder(
    data: str | Path,
    name: str,
    files: Sequence[str],
    *,
    download: bool = False,
    progress: bool = True,
    option: str = "task.data.download",
) -> Path:
    """Return the folder of the release that holds some files of text.

    Args:
        data: the data folder.
        name: of the folder in the release, such as `listops-1000`.
        files: what it must hold.
        download: get the release where nothing is there.
        progress: show a bar while downloading.
        option: the setting by which the user asks for the download.

    Raises:
        DataError: the folder is not there: what was looked for, and where it comes from; or it lacks one of the files.
    """
    found = in_release(
        data,
        name,
        f"{name}/ with {', '.join(files)}",
        unpacked="lra_release_text",
        members=lambda member: member.endswith(".tsv"),
        download=download,
        progress=progress,
        option=option,
    )
    missing = [file for file in files if not (found / file).is_file()]
    if missing:
        raise DataError(f"{found} lacks {', '.join(missing)}; it must hold {', '.join(files)} of {URL}")
    return found
