"""The release of the Long Range Arena: where its folders are, and what to say where they are not.

The release unpacks to `lra_release/lra_release/{listops-1000,tsv_data,pathfinder32,…}`. A folder of it is looked for in the data folder
itself, in `lra_release` and in `lra_release/lra_release`; and the files of text (`*.tsv`) are unpacked from `lra_release.gz`, which is a
tar of 7.7 GB, into `lra_release_text` where only that is there.

Reference:
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

from collections.abc import Sequence
from pathlib import Path

from sma.errors import DataError
from sma.recipes.data.archives import unpack
from sma.recipes.data.download import fetch

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
_ARCHIVES = ("lra_release.gz", "lra_release.tar.gz")
_NAME = "lra_release"
_UNPACKED = "lra_release_text"


def release_folder(
    data: str | Path, name: str, files: Sequence[str], *, download: bool = False, progress: bool = True, option: str = "task.data.download"
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
    data = Path(data)
    found = _search(data, name)
    if found is None:
        archive = next((data / archive for archive in _ARCHIVES if (data / archive).exists()), None)
        if archive is None and download:
            archive = fetch(URL, data / _ARCHIVES[0], progress=progress)
        if archive is not None:
            unpack(archive, data / _UNPACKED, members=lambda member: member.endswith(".tsv"))
            found = _search(data, name)
    if found is None:
        raise DataError(
            f"there is no {name}/ with {', '.join(files)} in {data}, nor in its lra_release/ or lra_release/lra_release/, nor a "
            f"{_ARCHIVES[0]} to unpack; put {URL} there, or set {option}=true"
        )
    missing = [file for file in files if not (found / file).is_file()]
    if missing:
        raise DataError(f"{found} lacks {', '.join(missing)}; it must hold {', '.join(files)} of {URL}")
    return found


def _search(data: Path, name: str) -> Path | None:
    tops = [data, data / _NAME, data / _NAME / _NAME]
    unpacked = [data / _UNPACKED / top.relative_to(data) for top in tops]
    return next((root / name for root in (*tops, *unpacked) if (root / name).is_dir()), None)
