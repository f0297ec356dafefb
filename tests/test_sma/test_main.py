"""The command line of users: output, messages about mistakes, and exit status."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sma
from sma.__main__ import main
from sma.catalogue import describe_kind, find_kinds, list_kinds
from sma.describe import describe
from sma.fused import of_device
from sma.model import ModelSpec
from sma.recipes.io.presets import shipped
from sma.spec import dump_spec, families, kinds, load_spec, read_spec_file

SHIPPED = Path(sma.__file__).parent / "recipes" / "specs"


def _run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(words)
    out, err = capsys.readouterr()
    return status, out, err


CAUSAL = """\
kind: sequence_encoder
width: 16
encoder: {kind: real_number}
layers: [{backbone: {kind: ema, bidirectional: false}, modules: {think: {kind: gated_mlp, hidden_size: 24}}}]
"""


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    path = tmp_path / "causal.yaml"
    path.write_text(CAUSAL)
    return path


@pytest.fixture
def listops() -> ModelSpec:
    return load_spec(SHIPPED / "seqboat_listops.yaml")


# describe and validate


def test_describe_prints_the_table(listops, capsys):
    table = describe(listops, name="seqboat_listops").as_text()
    assert _run(capsys, "describe", "seqboat_listops") == (0, f"{table}\n", "")
    table = describe(listops, name="seqboat_listops", length=512, rate=0.1).as_text()
    assert _run(capsys, "describe", "seqboat_listops", "--length", "512", "--rate", "0.1") == (0, f"{table}\n", "")


def test_describe_shows_which_implementation_runs_on_a_device_and_why(capsys):
    status, text, _ = _run(capsys, "describe", "seqboat_listops", "--device", "cpu")
    assert status == 0
    lines = text.partition("operators on cpu:\n")[2].splitlines()
    reason = "plain     kernels exist for NVIDIA GPUs, and the device is 'cpu'"
    own = [f"{name:<18}  {reason}" for name in ("ema", "placing", "windowed_attention")]
    assert [line for line in lines if line in own] == own
    assert "between_operators" in text
    found = json.loads(_run(capsys, "describe", "seqboat_listops", "--device", "cpu", "--json")[1])["implementations"]
    assert {"ema", "windowed_attention", "between_operators"} <= set(found)
    assert all(set(each) == {"name", "reason"} for each in found.values())
    assert of_device("cuda").name == "compiled"
    assert of_device("mps").name == "written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_describe_refuses_a_missing_device(capsys):
    status, _, error = _run(capsys, "describe", "seqboat_listops", "--device", "cuda")
    assert status != 0
    assert "the device 'cuda' cannot be used" in error


@pytest.mark.parametrize("name", shipped("specs"))
def test_every_preset_is_valid_and_described_as_built(name, capsys):
    status, out, err = _run(capsys, "validate", name)
    assert (status, err) == (0, "")
    assert out.startswith(f"ok: {name} is a model: a ")
    described = json.loads(_run(capsys, "describe", name, "--json", "--build")[1])
    assert described["built"]["parameters"] == described["total"]["parameters"]


def test_json_contains_the_same_numbers_exactly(listops, capsys):
    spec = listops
    data = json.loads(_run(capsys, "describe", "seqboat_listops", "--json", "--length", "777", "--rate", "0.1")[1])
    assert (data["name"], data["kind"], data["width"], data["length"], data["rate"]) == (
        "seqboat_listops",
        spec.kind,
        80,
        777,
        0.1,
    )
    macs, full = spec.macs(777, 0.1).total, spec.macs(777, 1.0).total
    assert data["total"] == {"parameters": 408_036, "macs": macs, "macs_all_active": full}
    (group,) = data["layers"]
    assert group["parameters"] == spec.layer_specs[0].num_parameters(80)
    attention = next(part for part in group["parts"] if part["part"] == "routed attention")
    assert attention["kind"] == "gau"
    assert attention["macs"] == spec.layer_specs[0].modules["attention"].macs(80, 78).total


def test_build_prints_a_summary_of_the_model(causal, capsys):
    assert _run(capsys, "describe", "seqboat_listops", "--build")[1].endswith(
        "\n\nBuilt with 408,036 parameters, as predicted; 1.6 MB in float32; not causal: a token may see later ones.\n"
    )
    assert _run(capsys, "describe", str(causal), "--build")[1].endswith("as predicted; 0.0 MB in float32; causal.\n")


def test_building_detects_a_wrong_prediction(listops, monkeypatch, capsys):
    monkeypatch.setattr(type(listops), "num_parameters", lambda self: 7)
    status, _, err = _run(capsys, "validate", "seqboat_listops")
    assert (status, err) == (
        2,
        "error: the model has 408,036 parameters, but its spec predicts 7: a num_parameters is wrong\n",
    )


def test_settings_are_applied_before_validation(capsys):
    words = (
        "--set",
        "layers.repeat=2",
        "--set",
        "layers.layer.modules.attention.window=null",
        "--set",
        "layers.layer.norm={kind: rms_norm}",
    )
    out = _run(capsys, "describe", "seqboat_listops", *words)[1]
    assert "layers 0-1" in out
    assert "rms_norm (pre)" in out
    assert "final norm" in out


def test_a_spec_is_read_from_yaml_from_json_and_from_a_saved_model(causal, tmp_path, capsys):
    spec = load_spec(causal)
    as_json = tmp_path / "causal.json"
    as_json.write_text(json.dumps(dump_spec(spec)))
    folder = sma.save(sma.build(spec), tmp_path / "saved")
    tables = {_run(capsys, "describe", str(source))[1].partition("\n")[2] for source in (causal, as_json, folder)}
    assert len(tables) == 1
    expected = (
        f"ok: causal is a model: a sequence_encoder of width 16 with 1 layer and {spec.num_parameters():,} parameters\n"
    )
    assert _run(capsys, "validate", str(causal))[1] == expected


def test_a_spec_too_large_to_build_is_validated_without_memory(capsys):
    status, out, _ = _run(capsys, "validate", "seqboat_listops", "--set", "width=200000")
    assert status == 0
    assert "240,850,029,636 parameters" in out


# Mistakes

MISTAKES = [
    pytest.param(
        ["descibe"], "unknown command 'descibe'; did you mean 'describe'? commands: train, evaluate, ", id="command"
    ),
    pytest.param(["describe"], "the following arguments are required: SPEC; see sma describe --help", id="no-spec"),
    pytest.param(
        ["describe", "seqboat_listop"],
        "there is no file and no shipped spec 'seqboat_listop'; did you mean 'seqboat_listops'? shipped specs: ",
        id="shipped-name",
    ),
    pytest.param(
        ["validate", "nothere/x.yaml"],
        "there is no file and no shipped spec 'nothere/x.yaml'; shipped specs: ",
        id="file",
    ),
    pytest.param(
        ["describe", "."],
        "the folder '.' holds no spec.yaml; give a spec file, a shipped spec, or the folder of ",
        id="folder",
    ),
    pytest.param(["describe", "list.yaml"], "list.yaml must hold a mapping of fields, not list", id="no-mapping"),
    pytest.param(["describe", "broken.yaml"], "broken.yaml is not valid YAML: ", id="no-yaml"),
    pytest.param(["describe", "binary.yaml"], "binary.yaml is not UTF-8 text; save it as UTF-8", id="no-text"),
    pytest.param(
        ["validate", "typo.yaml"],
        "SequenceEncoderSpec: unknown field 'widht'; did you mean 'width'? fields: width, ",
        id="field",
    ),
    pytest.param(
        ["validate", "kindless.yaml"],
        "a model needs a 'kind'; known kinds: language_model, pair_classifier, sequence_classifier, ",
        id="no-kind",
    ),
    pytest.param(
        ["validate", "seqboat_listops", "--set", "layers.layer.modules.attention.kind=gua"],
        "unknown sub-module kind 'gua' in layers.layer.modules.attention; did you mean 'gau'? known kinds: ",
        id="kind",
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--set", "layers.layer.modules.attention.windw=3"],
        "unknown field path 'layers.layer.modules.attention.windw': there is no 'windw' here; "
        "did you mean 'window'? fields: ",
        id="path",
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--set", "width"],
        "the setting 'width' has no '='; write path=value, ",
        id="no-equals",
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--set", "width=["],
        "the value of the setting width is not valid YAML: ",
        id="no-value",
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--set", "a=1", "b=2"],
        "sma describe takes no further argument 'b=2'; write --set before each PATH=VALUE",
        id="set-once",
    ),
    pytest.param(
        ["kinds", "norm", "rms_norm", "x"],
        "sma kinds takes no further argument 'x'; see sma kinds --help",
        id="further",
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--lenght", "3"],
        "--lenght: unknown option; did you mean --length?",
        id="option",
    ),
    pytest.param(["describe", "seqboat_listops", "--length", "0"], "length=0 must be at least 1 token", id="length"),
    pytest.param(
        ["describe", "seqboat_listops", "--length", "x"], "--length: invalid int value: 'x'; see ", id="number"
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--rate", "1.5"], "rate=1.5 must lie between 0 and 1: the share of ", id="rate"
    ),
    pytest.param(
        ["describe", "seqboat_listops", "--rate", "nan"], "rate=nan must lie between 0 and 1: the share of ", id="nan"
    ),
    pytest.param(
        ["validate", "seqboat_listops", "--set", "layers.layer.modules={a: {kind: attention, heads: 3}}"],
        "AttentionSpec: heads=3 must divide the width 80 of the tokens",
        id="parts-that-do-not-fit",
    ),
    pytest.param(
        ["kinds", "submodule"], "unknown family 'submodule'; did you mean 'sub-module'? families: ", id="family"
    ),
    pytest.param(
        ["kinds", "sub-module", "gua"],
        "unknown sub-module kind 'gua'; did you mean 'gau'? known kinds: ",
        id="family-kind",
    ),
    pytest.param(["kind", "gua"], "unknown kind 'gua'; did you mean 'gau'? known kinds: ", id="any-kind"),
    pytest.param(["schema", "modle"], "unknown family 'modle'; did you mean 'model'? families: ", id="schema"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_a_mistake_gives_an_error_message_and_status_2(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("[1, 2]")
    Path("broken.yaml").write_text("a: [")
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    Path("typo.yaml").write_text("kind: sequence_encoder\nwidht: 3\n")
    Path("kindless.yaml").write_text("width: 3\n")
    status, out, err = _run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {sentence}")


def test_every_wrong_field_has_a_separate_message(capsys):
    err = _run(capsys, "validate", "seqboat_listops", "--set", "width=0", "--set", "head.dropout=2")[2]
    first, second = err.splitlines()
    assert "width=0 must be at least 1" in first
    assert "dropout=2 must be less than 1" in second


def test_without_a_command_the_help_is_shown(capsys):
    status, out, err = _run(capsys)
    assert (status, out) == (2, "")
    assert "sma describe seqboat_listops" in err


@pytest.mark.parametrize(
    ("word", "shown"),
    [pytest.param("--version", "sma ", id="version"), pytest.param("--help", "usage: sma", id="help")],
)
def test_version_and_help_exit_with_status_0(word, shown, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([word])
    assert capsys.readouterr().out.startswith(shown)


def test_missing_memory_gives_an_error_message(listops, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("can't allocate memory: 1 EB\nsecond line")

    monkeypatch.setattr(type(listops), "build", fail)
    err = _run(capsys, "describe", "seqboat_listops", "--build")[2]
    assert err == "error: the model of 408,036 parameters cannot be built: can't allocate memory: 1 EB\n"


def test_interruption_exits_silently_with_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sma.commands.kinds.list_kinds", interrupt)
    assert _run(capsys, "kinds") == (130, "", "")


def test_warnings_are_printed_on_one_line(monkeypatch, capsys):
    def warn(*_, **__):
        warnings.warn("the plugin 'x' of y could not be imported", stacklevel=1)
        return ""

    monkeypatch.setattr("sma.commands.kinds.list_kinds", warn)
    assert _run(capsys, "kinds", "norm")[2] == "warning: the plugin 'x' of y could not be imported\n"


# kinds, kind, schema


def test_kinds_prints_the_list(capsys):
    status, out, err = _run(capsys, "kinds")
    assert (status, err) == (0, "")
    assert out.startswith(list_kinds() + "\n")
    assert out.endswith("Fields of a kind: sma kind gau. Parts of models: sma kind layer, sma kind repeat.\n")
    assert _run(capsys, "kinds", "norm") == (0, list_kinds("norm") + "\n", "")


@pytest.mark.parametrize(
    "words", [pytest.param(["kind", "gau"], id="kind"), pytest.param(["kinds", "sub-module", "gau"], id="kinds")]
)
def test_kind_prints_the_fields(words, capsys):
    assert _run(capsys, *words) == (0, describe_kind(*find_kinds("gau")) + "\n", "")


@pytest.mark.parametrize("family", families())
def test_schema_is_json_and_contains_every_kind(family, capsys):
    status, out, _ = _run(capsys, "schema", family)
    schema = json.loads(out)
    assert status == 0
    assert schema["$ref"] == f"#/$defs/{family}"
    assert {f"{name}:{kind}" for name in families() for kind in kinds(name)} <= set(schema["$defs"])


# Run as a program

PROGRAM = [sys.executable, "-m", "sma"]


def test_the_command_runs_from_any_folder(listops, tmp_path):
    table = describe(listops, name="seqboat_listops").as_text()
    result = subprocess.run([*PROGRAM, "describe", "seqboat_listops"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{table}\n", "")


def test_a_closed_pipe_gives_no_error_message():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*PROGRAM, "kinds"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
def test_a_full_disk_gives_an_error_message():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PROGRAM, "kinds"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "error: cannot write the output: No space left on device\n")


def test_presets_are_the_files_in_the_folder():
    assert shipped("specs") == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert all(read_spec_file(path)["kind"] for path in SHIPPED.glob("*.yaml"))
