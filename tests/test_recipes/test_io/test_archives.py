"""Archives are unpacked completely or not at all, and nothing is written outside the folder."""

import io
import multiprocessing
import os
import shutil
import stat
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sma.errors import DataError
from sma.recipes.io import archives
from sma.recipes.io.archives import unpack_archive

FILES = {"set/train/a.txt": b"first", "set/train/b.txt": b"", "set/test/c.txt": bytes(range(256)) * 3000}


def make_tar(path, files=FILES, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as tar:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o4777
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def make_zip(path, files=FILES, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.mkdir("set")
        for name, content in files.items():
            file.writestr(name, content)
    return path


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def special(kind, target="", name="set/odd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


MAKERS = [
    pytest.param(lambda path, files=FILES: make_tar(path, files, "w"), id="tar"),
    pytest.param(lambda path, files=FILES: make_tar(path, files, "w:gz"), id="tar.gz"),
    pytest.param(lambda path, files=FILES: make_tar(path, files, "w:xz"), id="tar.xz"),
    pytest.param(make_zip, id="zip"),
    pytest.param(lambda path, files=FILES: make_zip(path, files, zipfile.ZIP_STORED), id="stored zip"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_unpacked_files_equal_the_packed_ones(make, tmp_path):
    folder = unpack_archive(make(tmp_path / "archive"), tmp_path / "out" / "here")
    assert content_of(folder) == FILES
    assert not any(path.stat().st_mode & (stat.S_ISUID | stat.S_IWOTH) for path in folder.rglob("*"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["here"]


@pytest.mark.parametrize("make", MAKERS)
def test_only_wanted_members_are_unpacked(make, tmp_path):
    folder = unpack_archive(
        make(tmp_path / "archive"), tmp_path / "out", members=lambda name: name.startswith("set/train/")
    )
    assert content_of(folder).keys() == {"set/train/a.txt", "set/train/b.txt"}


def test_existing_folder_counts_as_complete_and_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    assert content_of(unpack_archive(tmp_path / "no archive", tmp_path / "out")) == {}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/evil", "set\\..\\..\\evil", "C:\\evil", "c:/evil"])
def test_members_outside_the_folder_are_refused(make, name, tmp_path):
    archive = make(tmp_path / "archive", {**FILES, name: b"evil"})
    with pytest.raises(
        DataError, match=r"archive: member '.*evil' would be written outside of the folder; nothing was unpacked"
    ):
        unpack_archive(archive, tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "deep"}
    assert list((tmp_path / "deep").iterdir()) == []


def zip_with_link(path):
    with zipfile.ZipFile(make_zip(path), "a") as file:
        link = zipfile.ZipInfo("set/odd")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "../../evil")
    return path


def with_member(kind, target=""):
    return lambda path: make_tar(path, extra=[special(kind, target)])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(with_member(tarfile.SYMTYPE, "../../evil"), "a link", id="symbolic link outside"),
        pytest.param(with_member(tarfile.SYMTYPE, "train"), "a link", id="symbolic link inside"),
        pytest.param(with_member(tarfile.LNKTYPE, "set/train/a.txt"), "a link", id="hard link"),
        pytest.param(with_member(tarfile.CHRTYPE), "a device", id="character device"),
        pytest.param(with_member(tarfile.BLKTYPE), "a device", id="block device"),
        pytest.param(with_member(tarfile.FIFOTYPE), "a device", id="pipe"),
        pytest.param(zip_with_link, "a link", id="link in a zip"),
    ],
)
def test_links_and_devices_are_refused_if_they_are_required(make, what, tmp_path):
    archive = make(tmp_path / "archive")
    with pytest.raises(DataError, match=rf"member 'set/odd' is {what}.*; only archives of plain files"):
        unpack_archive(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert content_of(unpack_archive(archive, tmp_path / "out", members=lambda name: name.endswith(".txt"))) == FILES


def test_error_in_a_python_without_the_tar_filter_advises_an_update(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match=r"Python 3.* has no filter for data archives; update Python to 3\.11\.4 or"):
        unpack_archive(make_tar(tmp_path / "archive"), tmp_path / "out")


@pytest.mark.parametrize("again", ["set/train/a.txt", "./set/train/a.txt"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_error_names_a_duplicate_member(again, tmp_path):
    with tarfile.open(make_tar(tmp_path / "tar", mode="w"), "a") as tar:
        tar.addfile(tarfile.TarInfo(again))
    with zipfile.ZipFile(make_zip(tmp_path / "zip"), "a") as file:
        file.writestr(again, b"")
    for archive in ("tar", "zip"):
        with pytest.raises(
            DataError, match=rf"{archive}: member '{again}' occurs twice, so its content is ambiguous; get the"
        ):
            unpack_archive(tmp_path / archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tar", "zip"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_archive_gives_an_error_and_leaves_no_folder(make, share, tmp_path):
    archive = make(tmp_path / "archive")
    content = archive.read_bytes()
    # A plain tar ends in up to 10,240 zeros, of which only two blocks are required.
    content = content.rstrip(b"\0") if content.endswith(bytes(1024)) else content
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        DataError,
        match=r"archive cannot be read: .*; it is truncated, damaged, or not a tar or zip: delete it and get it again",
    ):
        unpack_archive(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_tar_cut_between_two_members_counts_as_truncated(tmp_path):
    archive = make_tar(tmp_path / "archive", {"a": b"x" * 512, "b": b"y" * 512}, "w")
    archive.write_bytes(archive.read_bytes()[: 3 * 512])  # the folder and the complete first file
    with pytest.raises(DataError, match=r"archive cannot be read: its end is missing; it is truncated"):
        unpack_archive(archive, tmp_path / "out")


def test_zip_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SPARE", 1 << 20)
    with pytest.raises(DataError, match=r"archive unpacks to more than [0-9,]+ bytes"):
        unpack_archive(make_zip(tmp_path / "archive", {"a": bytes(1 << 25)}), tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_archive_with_more_bytes_than_the_data_set_is_refused(make, tmp_path):
    archive = make(tmp_path / "archive")
    size = sum(map(len, FILES.values()))
    with pytest.raises(
        DataError,
        match=rf"archive has more than {size - 1:,} bytes of the required files, which no data set",
    ):
        unpack_archive(archive, tmp_path / "out", most=size - 1)
    assert content_of(unpack_archive(archive, tmp_path / "out", most=size)) == FILES


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("limit", ["_MEMBERS", "_FILES"])
def test_more_members_than_any_data_set_has_are_refused(make, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, limit, 2)
    with pytest.raises(DataError, match=r"archive has more than 2 (members|of the required files), which no data set"):
        unpack_archive(make(tmp_path / "archive"), tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_archive_larger_than_the_free_space_is_refused_before_writing(make, tmp_path, monkeypatch):
    archive = make(tmp_path / "archive")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        DataError, match=r"cannot unpack .*archive: at least 768,005 bytes are needed, 1,000 bytes are free; make room"
    ):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" * 600 + "b", "set/CON", "set/aux.txt", "com²", "line\nbreak"], ids=lambda name: name[:9]
)
def test_names_invalid_on_some_systems_are_refused(make, name, tmp_path):
    with pytest.raises(
        DataError, match=r"archive: the name of member '.*' is invalid on some systems, which no data set has"
    ) as caught:
        unpack_archive(make(tmp_path / "archive", {name: b"x"}), tmp_path / "out")
    assert len(str(caught.value)) < 500
    assert (
        content_of(
            unpack_archive(
                make(tmp_path / "archive", {name: b"x", **FILES}), tmp_path / "out", members=FILES.__contains__
            )
        )
        == FILES
    )


@pytest.mark.parametrize("make", MAKERS)
def test_error_names_a_member_whose_folder_is_a_file(make, tmp_path):
    with pytest.raises(
        DataError, match=r"archive: member 'a/b' is in a folder that is a file in the archive; it is truncated, damaged"
    ):
        unpack_archive(make(tmp_path / "archive", {"a": b"", "a/b": b""}), tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        pytest.param(os.mkfifo, r"archive' is a named pipe; a plain file is required", id="pipe"),
        pytest.param(lambda path: None, r"cannot read '.*archive': No such file or directory", id="nothing"),
        pytest.param(
            lambda path: path.write_bytes(b"<html>sorry</html>" * 100),
            r"archive cannot be read: .*; it is truncated, damaged, or not a tar or zip",
            id="page",
        ),
    ],
)
def test_error_names_a_file_that_is_not_an_archive(place, complaint, tmp_path):
    place(tmp_path / "archive")
    with pytest.raises(DataError, match=complaint):
        unpack_archive(tmp_path / "archive", tmp_path / "out")


@pytest.mark.parametrize(
    ("at", "content"),
    [
        pytest.param(6, b"\xff\xff", id="version"),
        pytest.param(8, b"\x01\0", id="encrypted"),
        pytest.param(10, b"\x0c\0", id="invalid bzip2"),
        pytest.param(10, b"\x0e\0", id="invalid lzma"),
        pytest.param(10, b"\x63\0", id="method"),
    ],
)
def test_unsupported_zip_variant_gives_an_error_message(at, content, tmp_path):
    archive = make_zip(tmp_path / "archive", {"a.txt": b"some text" * 100})
    data = bytearray(archive.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    data[central + at : central + at + len(content)] = content
    if at in (8, 10):  # the same in the header of the member itself
        data[data.find(b"PK\x03\x04", 1) - 2 + at : data.find(b"PK\x03\x04", 1) - 2 + at + len(content)] = content
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"archive cannot be read: .*; it is truncated, damaged, or not a tar or zip"):
        unpack_archive(archive, tmp_path / "out")


def test_archive_without_the_wanted_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="has none of the required files; is it the right archive"):
        unpack_archive(make_zip(tmp_path / "archive"), tmp_path / "out", members=lambda name: name.endswith(".wav"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", MAKERS)
def test_full_disk_leaves_nothing(make, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    archive = make(tmp_path / "archive")
    monkeypatch.setattr(tarfile, "copyfileobj", full)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        DataError, match=r"cannot unpack .*: No space left on device; make room there or choose another"
    ):
        unpack_archive(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def unpack_and_die(archive, folder):
    tarfile.copyfileobj = lambda *arguments: os._exit(9)
    unpack_archive(archive, folder)


def test_next_call_removes_the_remains_of_a_killed_process(tmp_path):
    archive = make_tar(tmp_path / "archive")
    process = multiprocessing.get_context("fork").Process(target=unpack_and_die, args=(archive, tmp_path / "out"))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
    assert content_of(unpack_archive(archive, tmp_path / "out")) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


def test_concurrent_calls_all_get_the_complete_folder(tmp_path):
    archive, barrier = make_tar(tmp_path / "archive"), threading.Barrier(4, timeout=30)

    def wanted(name):
        if name == "set/train/a.txt":
            barrier.wait()  # all calls start before any finishes
        return True

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: unpack_archive(archive, tmp_path / "out", members=wanted), range(4)))
    assert folders == [tmp_path / "out"] * 4
    assert content_of(tmp_path / "out") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]
