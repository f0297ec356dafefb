"""Command line of the language model: output, files, and error messages."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import sma
from sma.recipes.io.run_folder import LAST
from sma.recipes.seqboat_lm import main
from sma.spec import dump_spec
from tests.forks import fork, run_fork
from tests.test_recipes.test_training.test_language import MODEL, TRAINING, experiment, text, train

pytestmark = pytest.mark.slow  # real trainings

__all__ = ["text"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the command line."""
    out = tmp_path_factory.mktemp("lm")
    spec = out / "experiment.yaml"
    task = {"kind": "language", "data": {"file": str(text)}, "segment": 16, "carry_state": True}
    spec.write_text(
        yaml.safe_dump({"task": task, "model": MODEL, "training": {**TRAINING, "updates": 60}}), encoding="utf-8"
    )
    assert main(["--spec", str(spec), "--out", str(out / "run"), "--no-progress", "--accelerator", "cpu"]) == 0
    return out / "run"


def test_run_folder_holds_summary_model_and_figure(finished: Path) -> None:
    assert {"summary.json", "activation.png", "model", "experiment.yaml", "metrics"} <= {
        path.name for path in finished.iterdir()
    }
    assert isinstance(sma.load(finished / "model"), sma.SequenceModel)
    assert (finished / "activation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_evaluation_gives_the_recorded_bits_per_character(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--evaluate", str(finished), "--no-progress", "--accelerator", "cpu"]) == 0
    result = json.loads((finished / "evaluation.json").read_text())
    recorded = json.loads((finished / "summary.json").read_text())
    assert (result["reproduced"], result["changed_data"]) == (True, [])
    assert result["bits_per_character"] == recorded["bits_per_character"]
    said = capsys.readouterr().out
    bits = f"{recorded['bits_per_character']:.6f}"
    assert f"bits per character {bits} of {recorded['bytes']['test']:,} held-out bytes, recorded {bits}\n" in said
    assert "reproduced        exactly" in said


def test_evaluation_of_another_model_reports_the_difference(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    model = sma.load(finished / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    sma.save(model, tmp_path / "run" / "model")
    assert main(["--evaluate", str(tmp_path / "run"), "--no-progress", "--accelerator", "cpu"]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["bits_per_character"] == pytest.approx(8)
    assert "reproduced        no, +" in capsys.readouterr().out


def test_figure_that_failed_on_a_full_disk_is_drawn_by_resuming(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "activation.png")

    path, out = tmp_path / "experiment.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(dump_spec(experiment(text, "training.updates=6"))), encoding="utf-8")
    common = ["--no-progress", "--accelerator", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("sma.recipes.reports.language.LanguageReport.draw", full)
        assert main(["--spec", str(path), "--out", str(out), *common]) == 2
    assert "make room, and resume with: python -m sma.recipes.seqboat_lm --resume " in capsys.readouterr().err
    assert main(["--resume", str(out), *common]) == 0
    assert (out / "activation.png").is_file()


def test_non_utf8_prompt_is_passed_on_as_bytes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def record(_: object, ids: torch.Tensor, **__: object) -> list[torch.Tensor]:
        seen.append(bytes(ids[0].tolist()))
        return []

    monkeypatch.setattr("sma.recipes.seqboat_lm.generate", record)
    assert main(["generate", "--run", str(finished), "--prompt", "caf\udce9"]) == 0
    assert seen == [b"caf\xe9"]
    assert capsys.readouterr().out.startswith("caf")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("notes{draft}.txt", id="braces"),
        pytest.param("a $x_$ b.txt", id="mathematics"),
        pytest.param("%s %(x)d _^#&<b>|[red]\t\x1b[31m.txt", id="markup"),
        pytest.param("🙂 שלום " + "x" * 220 + ".txt", id="long"),
    ],
)
def test_run_on_a_file_with_any_name_writes_summary_and_figure(
    text: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file, path, out = tmp_path / name, tmp_path / "experiment.yaml", tmp_path / f"run {name}"[:200]
    file.write_bytes(text.read_bytes())
    path.write_text(yaml.safe_dump(dump_spec(experiment(file, "training.updates=6"))), encoding="utf-8")
    assert main(["--spec", str(path), "--out", str(out), "--no-progress", "--accelerator", "cpu"]) == 0
    assert json.loads((out / "summary.json").read_text())["text"] == name
    assert (out / "activation.png").read_bytes().startswith(b"\x89PNG")
    assert [record for record in caplog.records if "not drawn" in record.getMessage()] == []
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\t" not in said


def test_failed_figure_gives_a_warning_and_keeps_the_summary(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("x_\n  ^\nParseSyntaxException")

    path, out = tmp_path / "experiment.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(dump_spec(experiment(text, "training.updates=6"))), encoding="utf-8")
    monkeypatch.setattr("sma.recipes.reports.language.LanguageReport.draw", fail)
    assert main(["--spec", str(path), "--out", str(out), "--no-progress", "--accelerator", "cpu"]) == 0
    assert [record.getMessage() for record in caplog.records if "warning:" in record.getMessage()] == [
        f"warning: the figure of the run in {out} was not drawn: ValueError: x_"
    ]
    assert (out / "summary.json").is_file()
    assert "figure               none: it could not be drawn, see the warning above" in capsys.readouterr().out


def test_generated_text_begins_with_the_prompt_and_repeats_with_the_seed(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert (
            main(["generate", "--run", str(finished), "--prompt", "the quick ", "--tokens", "40", "--seed", str(seed)])
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("the quick ")
    assert texts[0] == texts[1] != texts[2]


def test_several_samples_are_printed_one_after_another(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "--run", str(finished / "model"), "--prompt", "fox", "--tokens", "9", "--samples", "3"]) == 0
    )
    said = capsys.readouterr().out
    assert [f"--- {number} of 3\nfox" in said for number in (1, 2, 3)] == [True] * 3


def test_text_is_written_as_it_is_produced(finished: Path) -> None:
    command = [
        sys.executable,
        "recipes/seqboat_lm.py",
        "generate",
        "--run",
        finished,
        "--prompt",
        "the ",
        "--tokens",
        "100000000",
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.read(4) == b"the "
        assert len(process.stdout.read(50)) == 50
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 130
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--top-k", "0"], "--top-k='0': input should be greater than or equal to 1; see --help"),
        (["--top-p", "1.5"], "--top-p='1.5': input should be less than or equal to 1; see --help"),
        (["--temperature", "-1"], "--temperature='-1': input should be greater than or equal to 0; see --help"),
        (["--prompt", ""], "error: --prompt is empty; give at least one character"),
    ],
)
def test_invalid_settings_give_error_messages(
    finished: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--run", str(finished), *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_folder_without_a_model_gives_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--run", str(tmp_path)]) == 2
    assert f"error: there is no saved model in {str(tmp_path)!r}" in capsys.readouterr().err


def test_other_kinds_of_models_cannot_generate_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sma.save(sma.build(sma.load_spec({**MODEL, "kind": "sequence_encoder"}), seed=0), tmp_path)
    assert main(["generate", "--run", str(tmp_path)]) == 2
    assert "is of kind 'sequence_encoder'; only a 'language_model' can generate text" in capsys.readouterr().err


def test_a_killed_run_resumes_to_the_same_weights(text: Path, tmp_path: Path) -> None:
    spec = experiment(text, "training.updates=300", "training.evaluate_every=10")
    whole = train(spec, tmp_path / "whole")
    path = tmp_path / "experiment.yaml"
    path.write_text((tmp_path / "whole" / "experiment.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    command, out = ["sma.recipes.seqboat_lm", "--no-progress", "--accelerator", "cpu"], tmp_path / "parts"
    process = fork(*command, "--spec", path, "--out", out, stdout=tmp_path / "log")
    while process.poll() is None and not (out / LAST).is_file():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists()
    done = run_fork(*command, "--resume", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = torch.load(out / LAST, weights_only=True)["state_dict"]
    wanted = torch.load(tmp_path / "whole" / LAST, weights_only=True)["state_dict"]
    assert [name for name in wanted if not torch.equal(resumed[name], wanted[name])] == []
    assert whole.summary["updates"] == 300
