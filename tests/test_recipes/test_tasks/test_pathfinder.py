"""Pathfinder data: generated whatever the number of processes, read from Long Range Arena's folders, and what is said
about broken ones.
"""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import random_split

from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io import generated as files
from sma.recipes.io import published
from sma.recipes.tasks.pathfinder import images as pathfinder
from sma.recipes.tasks.pathfinder.images import PathfinderSettings, PathXSettings, prepare_pathfinder
from sma.recipes.tasks.pathfinder.release import LEVEL, list_release
from sma.recipes.tasks.pathfinder.stimulus import StimulusSettings, draw_stimulus
from sma.recipes.training.run import run_experiment

SMALL = {"size": 20, "contour_length": 4, "distractors": 1, "distractor_length": 2, "seed_frame": 6}
SIZES = {"train": 150, "validation": 20, "test": 30}
SETTINGS = PathfinderSettings(**SMALL, **SIZES, seed=3)
RELEASE = PathfinderSettings(source="release")
SPLITS = ("train", "validation", "test")


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A folder, and the data generated into it by one process."""
    folder = tmp_path_factory.mktemp("generated")
    return folder, prepare_pathfinder(SETTINGS, folder, workers=1, progress=False)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_release(folder, batches=(10, 9), images=16):
    """Long Range Arena's layout with random images, by batch; one of them is an empty file. Returns pixels and label by
    (batch, number).
    """
    rng = np.random.default_rng(0)
    root = folder / "pathfinder32" / LEVEL
    (root / "metadata").mkdir(parents=True)
    made = {}
    for batch in batches:
        (root / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for number in range(images):
            pixels, label = rng.integers(0, 256, (32, 32), dtype=np.uint8), int(rng.integers(2))
            empty = (batch, number) == (batches[0], 3)
            (root / "imgs" / str(batch) / f"sample_{number}.png").write_bytes(b"" if empty else png(pixels))
            lines.append(f"imgs/{batch} sample_{number}.png {number} {label} 1.0 14 4 2 0.5 1 1")
            if not empty:
                made[batch, number] = pixels, label
        (root / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    return root, made


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A made-up release, its images, and what is read from it."""
    folder = tmp_path_factory.mktemp("release")
    _, made = make_release(folder)
    return folder, made, prepare_pathfinder(RELEASE, folder, workers=1, progress=False)


def test_splits_are_consecutive_samples_of_one_seed(generated):
    _, data = generated
    first = 0
    for split, size in zip(data[:3], SIZES.values(), strict=True):
        assert len(split) == size
        assert split.lengths.tolist() == [400] * size
        for number in range(size):
            stimulus = draw_stimulus(SETTINGS, 3, first + number)
            pixels, label = split[number]
            assert label == stimulus.label
            expected = (torch.from_numpy(stimulus.image.astype(np.float32)).flatten() / 255 - 0.5) / 0.5
            assert pixels.dtype == torch.float32
            assert torch.allclose(pixels, expected, atol=1e-6)
        first += size


def test_files_do_not_depend_on_the_number_of_processes(generated, tmp_path):
    prepare_pathfinder(SETTINGS, tmp_path, workers=2, progress=False)
    assert files_in(tmp_path) == files_in(generated[0])


def test_second_call_reads_what_the_first_generated(generated, monkeypatch):
    folder, data = generated
    monkeypatch.setattr(pathfinder, "in_order", None)
    again = prepare_pathfinder(SETTINGS, folder, progress=False)
    assert again.hashes == data.hashes
    assert torch.equal(again.test[-1][0], data.test[29][0])
    with pytest.raises(IndexError, match="out of range"):
        again.test[30]


def test_hashes_are_those_of_the_files_and_the_settings_stand_beside_them(generated):
    folder, data = generated
    (place,) = folder.iterdir()
    assert set(data.hashes) == {f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")}
    assert data.hashes == {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in data.hashes}
    assert json.loads((place / "manifest.json").read_text())["settings"] == SETTINGS.model_dump(
        mode="json", exclude={"download"}
    )


def test_images_are_looked_into_on_the_disk(generated):
    assert all(isinstance(split.pixels, np.memmap) for split in generated[1][:3])


def test_other_seed_gives_other_images_beside_them(generated, tmp_path):
    other = prepare_pathfinder(SETTINGS.model_copy(update={"seed": 4}), tmp_path, workers=1, progress=False)
    assert all(other.hashes[name] != hash for name, hash in generated[1].hashes.items() if "images" in name)


def test_path_x_differs_from_pathfinder_in_its_stimulus_alone():
    stimulus = set(StimulusSettings.model_fields)
    changed = {
        name
        for name in PathfinderSettings.model_fields
        if getattr(PathXSettings(), name) != getattr(PathfinderSettings(), name)
    }
    assert changed < stimulus
    assert {"size": 128, "margins": (2, 3), "continuity": 1.8}.items() <= PathXSettings().model_dump().items()


def test_release_is_split_as_torch_does_with_seed_42(release):
    _, made, data = release
    ordered = [made[key] for key in sorted(made)]  # batch 9 before batch 10, numbers in their order, no empty file
    assert len(ordered) == 31
    parts = random_split(range(31), [25, 3, 3], generator=torch.Generator().manual_seed(42))
    for split, part in zip(data[:3], parts, strict=True):
        assert len(split) == len(part)
        for place, number in enumerate(part):
            pixels, label = ordered[number]
            assert np.array_equal(split.pixels[place], pixels.reshape(-1))
            assert int(split.targets[place]) == label
    assert np.array_equal(
        np.sort(np.concatenate([split.targets for split in data[:3]])), sorted(label for _, label in ordered)
    )


def test_release_is_decoded_once(release, monkeypatch):
    folder, _, data = release
    monkeypatch.setattr(pathfinder, "in_order", None)
    assert prepare_pathfinder(RELEASE, folder, progress=False).hashes == data.hashes


def test_changed_release_is_decoded_again(tmp_path):
    root, _ = make_release(tmp_path)
    before = prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    (root / "imgs" / "9" / "sample_1.png").write_bytes(b"")
    after = prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    assert [sum(map(len, data[:3])) for data in (before, after)] == [31, 30]


def test_image_that_replaces_one_of_its_size_is_decoded(tmp_path):
    root, _ = make_release(tmp_path)
    before = prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    path = root / "imgs" / "9" / "sample_1.png"
    size, other = path.stat().st_size, np.full((32, 32), 7, dtype=np.uint8)
    path.write_bytes(png(other))
    with path.open("ab") as file:
        file.write(bytes(size - path.stat().st_size))  # what comes after the end of a PNG is not read
    after = prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    images = [np.concatenate([split.pixels for split in data[:3]]) for data in (before, after)]
    assert [bool((pixels == 7).all(1).any()) for pixels in images] == [False, True]


def write_archive(path):
    """The release as it is published, with another level and another size in it."""
    root, made = make_release(path.parent / "made")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, f"lra_release/lra_release/pathfinder32/{LEVEL}")
        tar.add(root / "metadata", "lra_release/lra_release/pathfinder32/curv_baseline/metadata")
        tar.add(root, f"lra_release/lra_release/pathfinder128/{LEVEL}")
        tar.add(root / "metadata" / "9.npy", f"lra_release/lra_release/pathfinder32/{LEVEL}/metadata/._9.npy")
    return made


def test_of_the_archive_the_wanted_level_alone_is_unpacked(tmp_path, release):
    write_archive(tmp_path / "lra_release.gz")
    data = prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    assert data.hashes == release[2].hashes
    unpacked = tmp_path / "lra_release_pathfinder32" / "lra_release" / "lra_release"
    assert {path.relative_to(unpacked).as_posix() for path in unpacked.glob("*/*/*")} == {
        f"pathfinder32/{LEVEL}/{part}" for part in ("imgs", "metadata")
    }
    assert list(unpacked.rglob("._*")) == []


def test_release_is_downloaded_where_asked(tmp_path, monkeypatch, release):
    def fetch(url, path, **keywords):
        assert url == "https://storage.googleapis.com/long-range-arena/lra_release.gz"
        write_archive(path)

    monkeypatch.setattr(published, "fetch", fetch)
    asked = RELEASE.model_copy(update={"download": True})
    assert prepare_pathfinder(asked, tmp_path, workers=1, progress=False).hashes == release[2].hashes


def test_images_of_a_folder_that_cannot_be_written_are_kept_in_the_default_one(tmp_path, monkeypatch, release):
    make_release(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path / "data")  # root may write everything
    assert prepare_pathfinder(RELEASE, tmp_path / "data", workers=1, progress=False).hashes == release[2].hashes
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pathfinder32"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [(PathfinderSettings(), "pathfinder-865f01cbfc0d"), (PathXSettings(download=True), "pathfinder-c1b1ea50a644")],
    ids=["32", "128"],
)
def test_place_of_generated_images_stays_what_it_was(tmp_path, monkeypatch, settings, name):
    # Hours of drawing lie there.
    monkeypatch.setattr(pathfinder, "cached_grey", lambda place, *arguments, **keywords: place.name)
    assert prepare_pathfinder(settings, tmp_path) == name


def test_release_is_found_in_the_folder_of_its_archive_too(release, tmp_path):
    made = release[1]
    make_release(tmp_path / "lra_release" / "lra_release")
    assert sum(map(len, prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)[:3])) == len(made)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
            r"metadata/9.npy is not text, but the lists of the release are",
            id="pickle",
        ),
        pytest.param(
            b"imgs/9 sample_0.png 0\n",
            r"9.npy, line 1: 'imgs/9 sample_0.png 0' is not 'folder file number label",
            id="short",
        ),
        pytest.param(
            b"imgs/9 sample_0.png 0 1\n\nimgs/9 sample_1.png 1 2\n", r"9.npy, line 3: .* a label of 0 or 1", id="label"
        ),
        pytest.param(
            b"../imgs sample_0.png 0 1\n",
            r"line 1: '../imgs/sample_0.png' leads out of .*; the list is damaged",
            id="outside",
        ),
        pytest.param(
            b"/etc passwd 0 1\n", r"line 1: '/etc/passwd' leads out of .*; the list is damaged", id="absolute"
        ),
        pytest.param(
            b"imgs/9 none.png 0 1\n",
            r"line 1 names 'imgs/9/none.png', which cannot be read: No such file",
            id="missing",
        ),
    ],
)
def test_broken_list_is_an_error_that_names_file_and_line(tmp_path, content, complaint):
    root, _ = make_release(tmp_path)
    (root / "metadata" / "9.npy").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        list_release(root)


def test_list_without_a_number_and_a_release_without_images_are_refused(tmp_path):
    root, _ = make_release(tmp_path, batches=(1,), images=2)
    with pytest.raises(DataError, match="has 2 images that are not empty; three splits need at least 3"):
        list_release(root)
    (root / "metadata" / "all.npy").write_text("")
    with pytest.raises(DataError, match=r"all.npy is not named after the number of a batch"):
        list_release(root)


GREY = np.zeros((32, 32), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            png(GREY)[:40],
            r"sample_2.png cannot be read: .*; it is truncated or damaged: get it again, or make it an empty file",
            id="truncated",
        ),
        pytest.param(
            b"not an image",
            r"sample_2.png cannot be read: it is not a PNG image; it is truncated or damaged: get it again",
            id="no-image",
        ),
        pytest.param(
            png(np.zeros((32, 31), dtype=np.uint8)),
            r"sample_2.png is an image of 31 x 32 pixels, mode L; 32 x 32 grey",
            id="size",
        ),
        pytest.param(
            png(np.zeros((32, 32, 3), dtype=np.uint8)),
            r"sample_2.png is an image of 32 x 32 pixels, mode RGB",
            id="colour",
        ),
    ],
)
def test_broken_image_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, content, complaint):
    root, _ = make_release(tmp_path)
    (root / "imgs" / "9" / "sample_2.png").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        prepare_pathfinder(RELEASE, tmp_path, workers=1, progress=False)
    assert [path for path in tmp_path.rglob("*.npy") if path.parent.name != "metadata"] == []


def test_size_that_was_never_released_is_refused():
    with pytest.raises(SpecError, match=r"size=20 is not in the release, which has 32, 64, 128 and 256"):
        PathfinderSettings(source="release", **SMALL)


def experiment(**data):
    settings = [
        f"training.{key}={value}"
        for key, value in {"updates": 2, "batch_size": 4, "warmup": 1, "evaluate_every": 2}.items()
    ]
    return load_experiment(
        "pathfinder_tiny",
        ["training.budget=null", *settings, *(f"task.data.{key}={value}" for key, value in data.items())],
    )


@pytest.mark.parametrize("source", ["generated", "release"])
def test_training_and_evaluation_run_from_end_to_end(source, tmp_path):
    if source == "release":
        make_release(tmp_path)
        spec = experiment(source="release", size=32)
    else:
        spec = experiment(train=20, validation=6, test=8)
    data = spec.task.prepare(tmp_path, progress=False)
    assert data.image_shape == (spec.task.data.size,) * 2
    assert data.class_names == ("two contours", "one contour")
    summary = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False).summary
    assert summary["chance"] == 0.5
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["data"] == data.hashes


def test_shown_pixels_are_the_grey_values(generated):
    data = generated[1]
    for number in range(5):
        assert data.show(data.test[number][0]) == [str(value) for value in data.test.pixels[number]]
