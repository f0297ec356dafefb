"""`sma.build`, `load_spec`, the version, and their types for type checkers."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import sma
from sma import build, load_spec
from sma.errors import SpecError
from sma.spec import dump_yaml

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "kind": "sequence_encoder",
    "width": 4,
    "encoder": {"kind": "real_number"},
    "layers": [{"modules": {"a": {"kind": "conv"}}}],
}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml(load_spec(FIELDS)))
    return path


def test_a_misspelled_name_of_the_package_gets_a_suggestion():
    done = subprocess.run([sys.executable, "-c", "import sma; sma.buld"], capture_output=True, text=True)
    assert done.stderr.endswith("AttributeError: module 'sma' has no attribute 'buld'. Did you mean: 'build'?\n")


def test_a_model_is_built_from_a_path_a_mapping_or_a_spec(mine):
    models = [build(source, seed=3) for source in (mine, str(mine), FIELDS, load_spec(FIELDS))]
    weights = [[parameter.detach().numpy() for parameter in model.parameters()] for model in models]
    for model, parameters in zip(models, weights, strict=True):
        assert model.spec == load_spec(FIELDS)
        assert all(np.array_equal(one, other) for one, other in zip(parameters, weights[0], strict=True))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        pytest.param(
            "none.yaml",
            r"cannot read 'none\.yaml': No such file or directory; give the path of a YAML or JSON file",
            id="no file",
        ),
        pytest.param(".", r"'\.' is a folder; a plain file is required", id="folder"),
        pytest.param("a\0b", r"cannot read 'a\\x00b': embedded null byte", id="NUL"),
        pytest.param("x" * 100_000, "cannot read 'xxx.*xxx': File name too long; give the path of", id="long"),
        pytest.param(
            {**FIELDS, "layers": [{"modules": {"x" * 5000: {"kind": "conv"}}}]},
            "the module name 'xxx.*xxx' has 5,000 characters; at most 100 are allowed",
            id="long name",
        ),
        pytest.param({}, "a model needs a 'kind'; known kinds: ", id="empty"),
    ],
)
def test_sources_that_are_no_model_are_refused(source, complaint):
    with pytest.raises(SpecError, match=complaint) as caught:
        build(source)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("seed", [-1, 2**64, 10**400, True])
def test_a_seed_that_torch_does_not_accept_is_refused(seed):
    with pytest.raises(SpecError, match=r"seed=.* must be an integer of at least 0 and below 2\^64, or None"):
        build(FIELDS, seed=seed)


WRONG = """
import numpy, sma
from sma.modules.conv import ConvSpec
FIELDS = %r
for source in (3, None, [FIELDS], b"mine.yaml", sma.LayerSpec(), ConvSpec()):
    try:
        sma.build(source)
    except sma.SmaError as error:
        print(error)
for seed in (1.5, "1", None, numpy.int64(5)):
    try:
        print(type(sma.build(FIELDS, seed=seed)).__name__)
    except sma.SmaError as error:
        print(error)
"""


def test_arguments_of_other_types_are_refused():
    # In a separate process, without the suite's type checker.
    result = subprocess.run(
        [sys.executable, "-c", WRONG % FIELDS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"a spec is read from a path or a mapping, not from {what}" for what in ("3", "None")]
    assert lines[2].startswith("a spec is read from a path or a mapping, not from [{'encoder'")
    assert lines[3] == "a spec is read from a path or a mapping, not from b'mine.yaml'"
    assert lines[4:6] == [
        f"sma.build takes the spec of a model, and {name} has another family; call its build(width)"
        for name in ("LayerSpec", "ConvSpec")
    ]
    assert lines[6:8] == [
        f"seed={seed} must be an integer of at least 0 and below 2^64, or None" for seed in ("1.5", "'1'")
    ]
    assert lines[8:] == ["SequenceModel", "SequenceModel"]


def test_a_spec_that_contains_itself_is_refused():
    fields = dict(FIELDS)
    fields["layers"] = fields
    with pytest.raises(SpecError, match=r"contains itself|RepeatSpec in layers"):
        load_spec(fields, overrides={"width": 3})


def test_many_mistakes_are_counted_and_the_first_ones_listed():
    layers = [{"modules": {"a": {"kind": f"none{number}"}}} for number in range(500)]
    with pytest.raises(SpecError) as caught:
        load_spec({**FIELDS, "layers": layers})
    sentences = str(caught.value).splitlines()
    assert len(sentences) == 11
    assert sentences[0].startswith("unknown sub-module kind 'none0' in layers[0].modules.a")
    assert sentences[-1] == "and 490 more mistakes"


def test_the_version_is_that_of_the_package():
    assert sma.__version__ == version("sparse-modular-activation")


PROGRAM = """
import torch, sma
from sma import Ragged, RoutedLayer, Router, SparseModularActivation, SubModule, load_spec

def show(
    layer: RoutedLayer,
    routed: SparseModularActivation,
    part: SubModule,
    router: Router,
    tokens: Ragged,
    x: torch.Tensor,
) -> None:
    reveal_type(load_spec("mine.yaml"))
    reveal_type(load_spec({}, "sub-module"))
    reveal_type(load_spec({}, family="router"))
    reveal_type(sma.build("mine.yaml"))
    reveal_type(sma.build("mine.yaml")(x).logits)
    reveal_type(layer(x).decision)
    reveal_type(routed(x))
    reveal_type(part(tokens))
    reveal_type(router(x))
    reveal_type(sma.__version__)
"""
TYPES = [
    "ModelSpec",
    "SubModuleSpec",
    "RouterSpec",
    "SequenceModel",
    "Tensor | Tensor | Tensor | None",  # one for each overload
    "Decision | None",
    "RoutedOutput",
    "tuple[Tensor, State | None]",
    "tuple[Decision, State | None]",
    "str",
]


@pytest.mark.slow
def test_type_checkers_infer_the_returned_types(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(tmp_path / "program.py"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [
        re.sub(r"\w+\.(?=\w)", "", line.split('"')[1]) for line in result.stdout.splitlines() if "Revealed type" in line
    ]
    assert found == TYPES, result.stdout + result.stderr
