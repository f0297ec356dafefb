"""Raw speech: the real format from folder and archive, splits, standardisation against a loop, and broken files."""

import hashlib
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io import generated as files
from sma.recipes.io import published
from sma.recipes.io.wav import read_wav
from sma.recipes.tasks.speech import clips as speech
from sma.recipes.tasks.speech import commands as speech_commands
from sma.recipes.tasks.speech.clips import SpeechSettings, load_speech
from sma.recipes.tasks.speech.commands import CLASSES, LISTS, NAME, SHA256, URL, load_clips
from sma.recipes.tasks.speech.task import SpeechTask
from tests.test_recipes.tiny_speech import clip_of, write_corpus, write_wav

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def any_archive(monkeypatch):
    """Accept made-up archives: check no hash."""
    monkeypatch.setattr(speech_commands, "SHA256", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A data folder with the small copy of the data set."""
    folder = tmp_path_factory.mktemp("speech")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(corpus):
    return load_speech(SpeechSettings(), corpus, progress=False)


def test_clips_are_sorted_by_word_and_name_and_short_ones_are_left_out(corpus):
    clips = load_clips(corpus, progress=False)
    assert clips.names == [f"{word}/{number:02d}_nohash_0.wav" for word in CLASSES for number in range(10)]
    assert clips.samples.shape == (100, 16_000)
    for place in (0, 13, 99):
        word, number = CLASSES[place // 10], next(k for k in range(10) if (7 * k) % 10 == place % 10)
        assert np.array_equal(clips.samples[place], clip_of(word, number))


def test_copy_is_memory_mapped(corpus):
    assert isinstance(load_clips(corpus, progress=False).samples.base, np.memmap)


def test_second_run_reads_the_copy(corpus, loaded, monkeypatch):
    monkeypatch.setattr(speech_commands, "read_wav", None)
    assert load_speech(SpeechSettings(), corpus, progress=False).hashes == loaded.hashes


def test_data_does_not_depend_on_the_order_of_files(tmp_path, loaded, monkeypatch):
    write_corpus(tmp_path, backwards=True)
    glob = speech_commands.Path.glob
    monkeypatch.setattr(speech_commands.Path, "glob", lambda self, pattern: sorted(glob(self, pattern), reverse=True))
    assert load_speech(SpeechSettings(), tmp_path, progress=False).hashes == loaded.hashes


def write_archive(folder, corpus, prefix=""):
    with tarfile.open(folder / f"{NAME}.tar.gz", "w:gz", compresslevel=1) as archive:
        for path in sorted((corpus / NAME).rglob("*")):
            if path.is_file():
                archive.add(path, prefix + path.relative_to(corpus / NAME).as_posix())
        archive.add(corpus / NAME / LISTS[0], f"{prefix}yes/._00_nohash_0.wav")  # metadata that macOS adds


@pytest.mark.parametrize("prefix", ["", "./"], ids=["plain", "dot"])
def test_archive_gives_the_data_of_the_folder_and_only_the_ten_words_are_unpacked(tmp_path, corpus, loaded, prefix):
    write_archive(tmp_path, corpus, prefix)
    assert load_speech(SpeechSettings(), tmp_path, progress=False).hashes == loaded.hashes
    assert load_speech(SpeechSettings(split="hash"), tmp_path, progress=False).hashes != loaded.hashes
    assert not (tmp_path / NAME / "cat").exists()


def test_archive_provided_by_the_user_must_have_the_published_hash(tmp_path, corpus, loaded, monkeypatch):
    write_archive(tmp_path, corpus)
    found = hashlib.sha256((tmp_path / f"{NAME}.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(speech_commands, "SHA256", SHA256)
    with pytest.raises(DataError, match=rf"gz is not the file at http.*; move it away.* is {found}, expected {SHA256}"):
        load_speech(SpeechSettings(), tmp_path, progress=False)
    monkeypatch.setattr(speech_commands, "SHA256", found)
    assert load_speech(SpeechSettings(), tmp_path, progress=False).hashes == loaded.hashes


def test_hidden_files_are_ignored_and_names_may_have_blanks(tmp_path, loaded):
    root = write_corpus(tmp_path)
    (root / "yes" / "._00_nohash_0.wav").write_bytes(b"\0\5\x16\7")
    (root / "no" / ".DS_Store").write_bytes(b"\0")
    # The name with blanks has the same position in the sorted order.
    (root / "go" / "09_nohash_0.wav").rename(root / "go" / "09 nohash 0.wav")
    (root / LISTS[1]).write_text("go/09 nohash 0.wav\n" + (root / LISTS[1]).read_text())
    assert load_speech(SpeechSettings(), tmp_path, progress=False).hashes == loaded.hashes
    clips = load_clips(tmp_path, progress=False)
    assert clips.names[-1] == "go/09 nohash 0.wav"
    assert clips.names[-1] in clips.lists[LISTS[1]]


def test_non_utf_8_name_is_accepted(tmp_path, loaded):
    root = write_corpus(tmp_path)
    (root / "go" / "09_nohash_0.wav").rename(os.fsdecode(os.fsencode(root / "go") + b"/09\xff.wav"))
    assert load_speech(SpeechSettings(), tmp_path, progress=False).hashes == loaded.hashes


def test_recording_replaced_by_one_of_equal_size_is_read(tmp_path):
    root = write_corpus(tmp_path)
    before = load_speech(SpeechSettings(), tmp_path, progress=False)
    write_wav(root / "up" / "04_nohash_0.wav", clip_of("up", 77))
    after = load_speech(SpeechSettings(), tmp_path, progress=False)
    assert len(set(before.hashes.items()) & set(after.hashes.items())) == 2  # only one split changed


def test_error_names_a_dangling_link(tmp_path):
    root = write_corpus(tmp_path)
    (root / "up" / "77_nohash_0.wav").symlink_to(tmp_path / "gone.wav")
    with pytest.raises(DataError, match=r"cannot read '.*up/77_nohash_0\.wav': No such file"):
        load_speech(SpeechSettings(), tmp_path, progress=False)


def test_copy_of_a_read_only_folder_is_kept_in_the_default_one(tmp_path, loaded, monkeypatch, caplog):
    write_corpus(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path / "data")  # root may write everywhere
    assert load_speech(SpeechSettings(), tmp_path / "data", progress=False).hashes == loaded.hashes
    assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]
    assert re.search(
        r"data cannot be written, so files derived from it are kept in .*cache/sparse-modular-activation/speech",
        caplog.text,
    )


@pytest.mark.parametrize("split", ["stratified", "hash"])
def test_every_clip_is_in_exactly_one_split(corpus, split):
    made = load_speech(SpeechSettings(split=split), corpus, progress=False)
    assert sorted(torch.cat([part.numbers for part in made[:3]]).tolist()) == list(range(100))
    for part in made[:3]:
        assert part.numbers.tolist() == sorted(part.numbers.tolist())
        assert [part[index][1] for index in range(len(part))] == [number // 10 for number in part.numbers.tolist()]


def test_stratified_split_gives_every_word_its_share(loaded):
    assert [len(part) for part in loaded[:3]] == [70, 15, 15]
    assert [part.targets.bincount(minlength=10).tolist() for part in (loaded.train,)] == [[7] * 10]
    for part in (loaded.validation, loaded.test):
        assert set(part.targets.bincount(minlength=10).tolist()) <= {1, 2}


def test_stratified_split_of_the_real_number_of_clips_has_the_sizes_of_the_paper():
    targets = torch.arange(34_975) % 10
    assert [len(part) for part in speech._stratified(targets, 0)] == [24_482, 5_246, 5_247]


def test_another_seed_gives_other_splits(corpus, loaded):
    other = load_speech(SpeechSettings(seed=1), corpus, progress=False)
    assert set(other.hashes.values()) & set(loaded.hashes.values()) == set()


def test_hash_split_follows_the_lists(corpus):
    made = load_speech(SpeechSettings(split="hash"), corpus, progress=False)
    assert [sorted({number % 10 for number in part.numbers.tolist()}) for part in made[:3]] == [
        [0, 1, 2, 4, 6, 7, 9],
        [3],
        [5, 8],
    ]


def test_hash_split_without_the_lists_is_refused(tmp_path):
    write_corpus(tmp_path, lists=False)
    with pytest.raises(
        DataError,
        match=r"split='hash' requires validation_list\.txt and testing_list\.txt.*they give 100, 0, 0 training",
    ):
        load_speech(SpeechSettings(split="hash"), tmp_path, progress=False)


@pytest.mark.parametrize("downsample", [1, 40])
def test_samples_are_standardised_per_position_over_the_training_clips(corpus, downsample):
    made = load_speech(SpeechSettings(downsample=downsample), corpus, progress=False)
    clips = load_clips(corpus, progress=False).samples.astype(np.float64) / 32_768
    short = (
        np.stack([[block.mean() for block in clip.reshape(-1, downsample)] for clip in clips])
        if downsample > 1
        else clips
    )
    train = short[made.train.numbers.numpy()]
    for part in made[:3]:
        assert part.lengths.tolist() == [16_000 // downsample] * len(part)
        for index in (0, len(part) - 1):
            samples, _ = part[index]
            clip = short[int(part.numbers[index])]
            expected = [
                (clip[t] - train[:, t].mean()) / (train[:, t].std(ddof=1) + 1e-5) for t in range(0, len(clip), 7)
            ]
            assert samples.dtype == torch.float32
            assert samples[::7].tolist() == pytest.approx(expected, abs=1e-5)


def test_position_where_all_training_clips_are_silent_gives_finite_samples(tmp_path):
    root = write_corpus(tmp_path)
    for path in root.rglob("0*_nohash_0.wav"):
        write_wav(path, np.concatenate([np.zeros(160), read_wav(path)[160:]]))
    made = load_speech(SpeechSettings(downsample=160), tmp_path, progress=False)
    assert float(made.train[0][0][0]) == 0.0
    assert bool(torch.isfinite(made.test[0][0]).all())


def test_hashes_cover_the_recorded_samples_and_classes(loaded, corpus):
    clips = load_clips(corpus, progress=False).samples
    for name, part in zip(SPLITS, loaded[:3], strict=True):
        content = b"".join(clips[number].tobytes() for number in part.numbers.tolist()) + bytes(
            n // 10 for n in part.numbers.tolist()
        )
        assert loaded.hashes[name] == hashlib.sha256(content).hexdigest()


def test_shown_samples_are_the_recorded_ones_in_thousandths(loaded):
    part = loaded.test
    recorded = load_speech_clip(part, 3)
    assert part.targets.dtype == torch.int64
    assert [int(text) for text in loaded.show(part[3][0])] == pytest.approx((recorded / 32.768).tolist(), abs=0.51)


def load_speech_clip(part, index):
    """Recorded samples of a clip of a split."""
    return part.clips[int(part.numbers[index])].astype(np.float64)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param(
            {"rate": 8_000},
            r"has 1 channel\(s\) of 16 bits at 8,000 Hz; expected 1 channel, 16 bits, 16,000 Hz",
            id="rate",
        ),
        pytest.param({"channels": 2}, r"has 2 channel\(s\) of 16 bits at 16,000 Hz; expected", id="channels"),
    ],
)
def test_error_names_a_recording_of_another_format(tmp_path, settings, complaint):
    root = write_corpus(tmp_path)
    write_wav(root / "left" / "04_nohash_0.wav", np.arange(16_000), **settings)
    with pytest.raises(DataError, match=r"left/04_nohash_0\.wav " + complaint):
        load_speech(SpeechSettings(), tmp_path, progress=False)
    assert [path.name for path in tmp_path.glob(f"{NAME}-*/*")] == []  # no partial copy


@pytest.mark.parametrize("size", [0, 3, 20, 43, 44, 1_001, 32_043], ids=lambda size: f"{size}-bytes")
def test_error_names_a_truncated_recording(tmp_path, size):
    path = write_wav(tmp_path / "cut.wav", np.arange(16_000))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut\.wav is .*truncated"):
        read_wav(path)


def test_errors_name_a_file_that_is_not_wav_and_a_missing_file(tmp_path):
    (tmp_path / "text.wav").write_bytes(b"these are no samples of a sound, but it is long enough to be some")
    with pytest.raises(DataError, match=r"text\.wav is not a WAV file of plain samples, or it is truncated"):
        read_wav(tmp_path / "text.wav")
    with pytest.raises(DataError, match=r"cannot read '.*none\.wav': No such file"):
        read_wav(tmp_path / "none.wav")


def test_error_names_a_missing_word(tmp_path):
    root = write_corpus(tmp_path)
    shutil.rmtree(root / "stop")
    with pytest.raises(
        DataError, match=r"there is no recording .*stop/\*\.wav; the folder must hold all of the words yes, no, up"
    ):
        load_speech(SpeechSettings(), tmp_path, progress=False)


def test_error_names_a_word_with_only_short_clips(tmp_path):
    root = write_corpus(tmp_path)
    for path in (root / "go").glob("0*.wav"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"no clip of the word 'go' in .*go has exactly 16,000 samples; every word needs some"
    ):
        load_speech(SpeechSettings(), tmp_path, progress=False)


def test_too_few_clips_to_split_are_refused(tmp_path):
    root = write_corpus(tmp_path)
    for path in (root / "up").glob("0[1-9]*.wav"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"cannot be split 70/15/15 with every class in each; the classes have \[10, 10, 1, 10"
    ):
        load_speech(SpeechSettings(), tmp_path, progress=False)


def test_archive_is_downloaded_only_on_request_and_if_missing(tmp_path, monkeypatch):
    calls = []

    def fetch(url, path, *, sha256, md5, most, progress):
        calls.append((url, path, sha256))
        raise DataError("no network")

    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(speech_commands, "SHA256", SHA256)
    with pytest.raises(DataError, match="no network"):
        load_speech(SpeechSettings(download=True), tmp_path, progress=False)
    assert calls == [(URL, tmp_path / f"{NAME}.tar.gz", SHA256)]
    write_corpus(tmp_path)
    load_speech(SpeechSettings(download=True), tmp_path, progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"downsample": 7}, "downsample=7 must divide the 16,000 samples of a clip"),
        ({"source": "synthetic", "split": "hash"}, "source='synthetic' has no lists and no download"),
        ({"source": "synthetic", "download": True}, "source='synthetic' has no lists and no download"),
        ({"clips": 200}, "clips=200 requires source='synthetic'"),
        ({"source": "libri"}, "source='libri'"),
    ],
)
def test_invalid_settings_are_refused(settings, complaint):
    with pytest.raises(SpecError, match=complaint):
        SpeechSettings(**settings)


def test_task_gives_batches_of_real_numbers_with_classes_and_sample_rate(corpus):
    data = SpeechTask(data={"downsample": 10}).prepare(corpus, progress=False)
    batch = data.collate([data.test[number] for number in range(3)])
    assert (batch.inputs.shape, batch.inputs.dtype, bool(batch.valid.all())) == ((3, 1600), torch.float32, True)
    assert (data.class_names, data.sample_rate, data.image_shape) == (CLASSES, 1600, None)
    assert set(data.hashes) == set(SPLITS)


def test_paper_preset_has_the_values_of_the_paper():
    spec = load_experiment("speech_paper")
    assert spec.model.num_parameters() == 298_841
    assert len(spec.model.layer_specs) == 8
    layer = spec.model.layer_specs[0]
    assert (layer.backbone.truncation, layer.modules["attention"].window, layer.modules["attention"].attention) == (
        4000,
        128,
        "relu2",
    )
    assert (spec.model.final_norm_spec.kind, layer.norm.place) == ("batch_norm", "pre")
    training = spec.training
    assert (training.learning_rate, training.weight_decay, training.batch_size) == (0.01, 0.01, 20)
    assert (training.updates, training.warmup, training.clip_norm) == (250_000, 10_000, 1.0)
    assert spec.task == SpeechTask()
    assert LISTS == ("validation_list.txt", "testing_list.txt")
