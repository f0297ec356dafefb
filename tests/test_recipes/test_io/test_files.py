"""Generated files on disk: complete or generated again after any kill, and checked at every use."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sma.errors import DataError
from sma.recipes.io import generated as files
from sma.recipes.io.generated import cached_files, copy_folder, digest_of

NAMES = ["first.txt", "second.txt", "third.txt"]


def recipe(seed=1, **settings):
    return {"generator": "toy", "version": 1, "settings": {"seed": seed, **settings}}


def prepare(folder, made_by=None, during=lambda: None):
    """Three files whose content is the seed of the recipe; `during` runs while they are open."""
    made_by = made_by or recipe()

    def write(outputs):
        for name, output in outputs.items():
            output.write(f"{name} of seed ".encode())
            during()
            output.write(str(made_by["settings"]["seed"]).encode() * 10_000)

    return cached_files(folder, made_by, NAMES, write)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def must_not_run():
    raise AssertionError("generated again")


def raising_at_call(number, error, function):
    calls = itertools.count(1)

    def wrapper(*arguments, **keywords):
        if next(calls) == number:
            raise error
        return function(*arguments, **keywords)

    return wrapper


PLACES = [
    pytest.param(files.HashedFile, "__init__", 2, id="opening"),
    pytest.param(files.HashedFile, "write", 3, id="writing"),
    pytest.param(os, "fsync", 2, id="syncing"),
    pytest.param(os, "replace", 1, id="first-move"),
]
MOVES = len(NAMES) + 1


def test_manifest_holds_the_recipe_and_the_hash_of_every_file(tmp_path):
    hashes = prepare(tmp_path / "new" / "folder")
    content = content_of(tmp_path / "new" / "folder")
    assert json.loads(content.pop("manifest.json")) == {**recipe(), "files": hashes}
    assert hashes == {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}
    assert list(hashes) == NAMES


def test_second_call_generates_nothing(tmp_path):
    assert prepare(tmp_path) == prepare(tmp_path, during=must_not_run)


@pytest.mark.parametrize(("owner", "name", "call"), PLACES)
def test_interrupted_generation_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising_at_call(call, KeyboardInterrupt(), getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "data")
    assert content_of(tmp_path / "data") == {}
    assert prepare(tmp_path / "data") == prepare(tmp_path / "elsewhere")


def killed_at_move(folder, moves):
    """Generate in a process that exits after `moves` moves without any cleanup, as after SIGKILL."""

    def run():
        real, done = os.replace, itertools.count(1)

        def replace(source, target):
            real(source, target)
            if next(done) == moves:
                os._exit(9)

        def write_first(name, content):
            real_write(name, content)
            os._exit(9)

        real_write = files.HashedFile.write
        os.replace = replace
        if not moves:
            files.HashedFile.write = write_first
        prepare(folder)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 9


@pytest.mark.parametrize("moves", range(MOVES + 1))
def test_data_of_a_process_killed_at_any_moment_is_generated_again(tmp_path, moves):
    killed_at_move(tmp_path / "data", moves)
    assert prepare(tmp_path / "data") == prepare(tmp_path / "elsewhere")
    assert content_of(tmp_path / "data") == content_of(tmp_path / "elsewhere")


def test_data_is_generated_after_a_kill_during_the_repair_of_a_deleted_file(tmp_path):
    hashes = prepare(tmp_path)
    (tmp_path / "second.txt").unlink()
    killed_at_move(tmp_path, 1)
    assert prepare(tmp_path) == hashes


def test_failed_moves_are_repeated_by_the_next_call(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising_at_call(3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.replace))
        with pytest.raises(
            DataError,
            match=r"cannot keep data in .*: No space left on device; make room there or choose another folder",
        ):
            prepare(tmp_path / "data")
    assert prepare(tmp_path / "data") == prepare(tmp_path / "elsewhere")


@pytest.mark.parametrize(("owner", "name", "call"), PLACES)
def test_full_disk_raises_a_data_error_and_leaves_nothing(tmp_path, monkeypatch, owner, name, call):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(owner, name, raising_at_call(call, full, getattr(owner, name)))
    with pytest.raises(
        DataError, match=r"cannot keep data in .*: No space left on device; make room there or choose another folder"
    ):
        prepare(tmp_path)
    assert content_of(tmp_path) == {}


def test_file_size_limit_of_the_system_raises_a_data_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError, match=r"cannot keep data in .*: File too large"):
            prepare(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content_of(tmp_path) == {}


def test_file_at_the_path_of_the_folder_raises_a_data_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match=r"cannot keep data in .*taken': File exists"):
        prepare(tmp_path / "taken")


def test_errors_of_the_writer_pass_unchanged_and_leave_nothing(tmp_path):
    with pytest.raises(AssertionError, match="generated again"):
        prepare(tmp_path, during=must_not_run)
    assert content_of(tmp_path) == {}


def test_changed_file_is_refused_and_generated_again_once_deleted(tmp_path):
    hashes = prepare(tmp_path)
    with (tmp_path / "second.txt").open("ab") as file:
        file.write(b"!")
    with pytest.raises(
        DataError, match=r"second.txt was changed since it was generated; delete it to generate it again"
    ):
        prepare(tmp_path, during=must_not_run)
    (tmp_path / "second.txt").unlink()
    assert prepare(tmp_path) == hashes


@pytest.mark.parametrize(
    ("other", "change"),
    [
        pytest.param(recipe(seed=9), "seed is 1 there, 9 is required", id="setting"),
        pytest.param(recipe(depth=3), "depth is None there, 3 is required", id="new-setting"),
        pytest.param(
            {**recipe(), "version": 2, "generator": "top"},
            "generator is 'toy' there, 'top' is required, version is 1 there, 2",
            id="two",
        ),
    ],
)
def test_folder_made_by_another_recipe_is_refused(tmp_path, other, change):
    prepare(tmp_path)
    before = content_of(tmp_path)
    with pytest.raises(
        DataError,
        match=rf"holds data generated with other settings \({change}.*\); choose another folder, or delete it to",
    ):
        prepare(tmp_path, other, during=must_not_run)
    assert content_of(tmp_path) == before


def test_files_that_were_not_generated_are_never_overwritten(tmp_path):
    (tmp_path / "third.txt").write_bytes(b"mine")
    with pytest.raises(
        DataError, match=r"holds third.txt but no manifest.json: it was not generated here; read it as it is"
    ):
        prepare(tmp_path, during=must_not_run)
    assert content_of(tmp_path) == {"third.txt": b"mine"}


def test_unrelated_files_in_the_folder_are_kept(tmp_path):
    (tmp_path / "notes.md").write_bytes(b"mine")
    prepare(tmp_path)
    assert content_of(tmp_path)["notes.md"] == b"mine"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            b"{",
            r"manifest.json cannot be read: Expecting property name.*; delete .* to generate it again",
            id="not-json",
        ),
        pytest.param(
            b"\xff", r"manifest.json cannot be read: .*decode.*; delete .* to generate it again", id="not-utf-8"
        ),
        pytest.param(
            b"[]",
            r"manifest.json does not list the files of a data set; delete .* to generate it again",
            id="not-an-object",
        ),
        pytest.param(
            b"{}", r"manifest.json does not list the files of a data set; delete .* to generate it again", id="no-files"
        ),
    ],
)
def test_broken_manifest_raises_a_data_error(tmp_path, content, complaint):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        prepare(tmp_path, during=must_not_run)


def test_hash_of_an_unreadable_file_raises_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read '.*none.txt': No such file or directory"):
        digest_of(tmp_path / "none.txt")


def prepare_at_once(folder, recipes):
    """Prepare every recipe in its own thread; all threads write before any finishes."""
    barrier = threading.Barrier(len(recipes), timeout=30)
    with ThreadPoolExecutor(len(recipes)) as pool:
        return [pool.submit(prepare, folder, made_by, barrier.wait) for made_by in recipes]


def test_concurrent_generations_of_the_same_data_agree(tmp_path):
    results = [future.result() for future in prepare_at_once(tmp_path / "data", [recipe()] * 3)]
    assert results == [prepare(tmp_path / "alone")] * 3
    assert content_of(tmp_path / "data") == content_of(tmp_path / "alone")


def test_concurrent_generations_of_different_data_leave_one_complete(tmp_path):
    recipes = [recipe(seed=1), recipe(seed=2)]
    errors = [future.exception() for future in prepare_at_once(tmp_path, recipes)]
    (winner,) = [made_by for made_by, error in zip(recipes, errors, strict=True) if error is None]
    (refusal,) = [error for error in errors if error is not None]
    assert "holds data generated with other settings (seed is" in str(refusal)
    assert set(content_of(tmp_path)) == {*NAMES, "manifest.json"}
    prepare(tmp_path, winner, during=must_not_run)


def test_copies_of_data_are_kept_beside_it(tmp_path):
    assert copy_folder(tmp_path, "copy") == tmp_path / "copy"
    assert copy_folder(tmp_path / "new", "copy") == tmp_path / "new" / "copy"


def test_copies_of_data_in_a_read_only_folder_are_kept_in_the_default_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Root may write everywhere.
    monkeypatch.setattr(files.os, "access", lambda path, mode: not (path == tmp_path / "data" and mode == os.W_OK))
    (tmp_path / "data").mkdir()
    elsewhere = tmp_path / "cache" / "sparse-modular-activation" / "copy"
    assert copy_folder(tmp_path / "data", "copy") == elsewhere
    assert caplog.messages == [
        f"{tmp_path / 'data'} cannot be written, so files derived from it are kept in {elsewhere}"
    ]
    elsewhere.mkdir(parents=True)
    caplog.clear()
    assert copy_folder(tmp_path / "data", "copy") == elsewhere
    assert caplog.messages == []
    (tmp_path / "data" / "copy").mkdir()
    assert copy_folder(tmp_path / "data", "copy") == tmp_path / "data" / "copy"


@pytest.mark.parametrize("name", ["x" * 5000, "zero\0byte"], ids=["long", "zero byte"])
def test_invalid_folder_name_raises_a_data_error(tmp_path, name):
    with pytest.raises(
        DataError, match=r"cannot keep data in '.*': (File name too long|embedded null byte); make room there"
    ) as caught:
        prepare(tmp_path / name)
    assert len(str(caught.value)) < 600
