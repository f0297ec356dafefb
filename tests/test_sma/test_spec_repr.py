"""The repr of a spec is one line with the non-default fields, and evaluates to the same spec."""

from pathlib import Path

import pytest

from sma.layer import LayerSpec
from sma.modules import GatedMLPSpec, GAUSpec
from sma.spec import Spec, load_spec

SPECS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "specs").glob("*.yaml"))


def classes(root: type[Spec]) -> dict[str, type[Spec]]:
    """A spec class and all its subclasses, by name."""
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= classes(child)
    return found


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in SPECS])
def test_repr_of_a_model_is_one_short_line_that_evaluates_to_the_same_spec(path: Path) -> None:
    spec = load_spec(path)
    text = repr(spec)
    assert "\n" not in text
    assert len(text) < 700
    assert eval(text, dict(classes(Spec))) == spec


def test_repr_shows_non_default_fields_only() -> None:
    assert repr(GAUSpec(query_size=4, hidden_size=8, window=None)) == "GAUSpec(query_size=4, hidden_size=8)"
    assert repr(GAUSpec(query_size=4, hidden_size=8, window=5)) == "GAUSpec(query_size=4, hidden_size=8, window=5)"
    assert repr(LayerSpec()) == "LayerSpec()"


def test_repr_shows_equal_layers_once() -> None:
    layer = LayerSpec(modules={"mlp": GatedMLPSpec(hidden_size=4)})
    other = LayerSpec(modules={"mlp": GatedMLPSpec(hidden_size=5)})
    model = {"kind": "sequence_encoder", "width": 8, "encoder": {"kind": "real_number"}}
    shown = "LayerSpec(modules={'mlp': GatedMLPSpec(hidden_size=4)})"
    assert f"layers=[{shown}] * 40" in repr(load_spec({**model, "layers": [layer] * 40}))
    assert f"layers=({shown}, {shown.replace('4', '5')})" in repr(load_spec({**model, "layers": [layer, other]}))
    assert f"layers=({shown},)" in repr(load_spec({**model, "layers": [layer]}))
