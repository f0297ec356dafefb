"""Estimates of memory: a model or state that cannot fit raises an error before allocation."""

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sma
from sma.errors import InputError, SpecError
from sma.generation import generate
from sma.layer import LayerSpec
from sma.modules.ema import EMASpec
from sma.modules.gau import GAUSpec
from sma.spec import load_spec
from tests.test_modules.test_every_kind import SPECS
from tests.test_sma.test_testing import MODELS

GAU: dict[str, Any] = {"kind": "gau", "query_size": 4, "hidden_size": 6, "window": 5, "bidirectional": False}
SLOTS = {"kind": "relative_bias", "distance": "slot_distance"}


def _spec(width: int = 8, vocabulary: int = 7, layers: Any = None, **gau: Any) -> dict[str, Any]:
    encoder = {"kind": "token_embedding", "vocabulary": vocabulary}
    return {
        "kind": "language_model",
        "width": width,
        "encoder": encoder,
        "layers": layers or [{"modules": {"a": GAU | gau}}],
    }


def _allocated(function: Callable[[], object]) -> int:
    """Growth of the peak memory of the process, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: sma.build(_spec(width=10**6)), id="width"),
        pytest.param(lambda: sma.build(_spec(width=10**18), seed=0), id="a width near the largest integer"),
        pytest.param(lambda: sma.build(_spec(vocabulary=10**12)), id="vocabulary"),
        pytest.param(lambda: sma.build(_spec(window=10**12, position=SLOTS)), id="table over slots"),
        pytest.param(
            lambda: sma.build(_spec(layers={"repeat": 10000, "layer": {"modules": {"a": GAU}}}, width=10**5)),
            id="layers",
        ),
        pytest.param(lambda: load_spec(_spec(hidden_size=10**12)).build(), id="a spec's own method"),
        pytest.param(lambda: LayerSpec().build(10**6), id="layer"),
        pytest.param(lambda: GAUSpec(query_size=4, hidden_size=6).build(width=10**12), id="sub-module"),
        pytest.param(lambda: load_spec({"kind": "sma"}, "router").build(10**12, ["a", "b"]), id="router"),
        pytest.param(lambda: load_spec({"kind": "layer_norm"}, "norm").build(10**12), id="norm"),
    ],
)
def test_a_model_that_cannot_fit_is_refused_before_allocation(build: Callable[[], object]) -> None:
    def refused() -> None:
        with pytest.raises(
            SpecError,
            match=r"^\w+Spec needs .* bytes.*(are free|any machine can address); reduce its sizes, such as the width",
        ):
            build()

    assert _allocated(refused) < 1 << 28


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_predicts_its_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    monkeypatch.setattr("sma.memory.ALWAYS_FITS", 0)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: spec.num_parameters(8) * 4)
    spec.build(8)
    if spec.num_parameters(8):
        monkeypatch.setattr("sma.memory.free_memory", lambda device=None: spec.num_parameters(8) * 4 - 1)
        with pytest.raises(SpecError, match=r"Spec needs .* are free"):
            spec.build(8)


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_memory_of_a_model_is_the_allocated_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(parameter.nbytes for parameter in MODELS[name].build().parameters())
    monkeypatch.setattr("sma.memory.ALWAYS_FITS", 0)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: needed)
    MODELS[name].build()
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: needed - 1)
    with pytest.raises(SpecError, match=rf"needs {needed:,} bytes, and {needed - 1:,} bytes are free"):
        MODELS[name].build()
    with torch.device("meta"):
        MODELS[name].build()


def test_bytes_follow_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(_spec())
    monkeypatch.setattr("sma.memory.ALWAYS_FITS", 0)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: 4 * spec.num_parameters())
    spec.build()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(SpecError, match="are free"):
            spec.build()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_on_meta_can_have_any_width() -> None:
    with torch.device("meta"):
        assert sma.build(_spec(width=10**6)).encoder.weight.shape == (7, 10**6)


WIDE = _spec(window=10**9, position={"kind": "rotary"})


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        pytest.param(lambda: sma.build(WIDE).init_state(1), "the state for batch_size=1 needs 48,", id="window"),
        pytest.param(
            lambda: sma.build(_spec()).init_state(10**10), "the state for batch_size=10000000000 needs", id="streams"
        ),
        pytest.param(
            lambda: sma.build(_spec()).init_state(10**30), "needs about 10.30 bytes", id="streams of no integer"
        ),
        pytest.param(
            lambda: sma.build(_spec()).routed_layers[0].init_state(10**12), "the state of a layer needs", id="layer"
        ),
        pytest.param(
            lambda: sma.build(WIDE).routed_layers[0].init_state(5), "a cache needs 240,", id="window of a layer"
        ),
        pytest.param(
            lambda: GAUSpec.model_validate(WIDE["layers"][0]["modules"]["a"]).build(8).init_state(5),
            "a cache needs 24",
            id="gau",
        ),
        pytest.param(
            lambda: EMASpec(bidirectional=False).build(8).init_state(10**12), "the state of EMA needs", id="ema"
        ),
        pytest.param(
            lambda: load_spec({"kind": "random", "rate": 0.5}, "router").build(8, ["a"]).init_state(10**13),
            "of a router needs",
            id="router",
        ),
    ],
)
def test_a_state_that_cannot_fit_is_refused_before_allocation(make: Callable[[], object], complaint: str) -> None:
    def refused() -> None:
        with pytest.raises(InputError, match=rf"{complaint}.*; take fewer streams or a shorter window$"):
            make()

    assert _allocated(refused) < 1 << 28


def test_a_state_on_meta_can_have_any_size() -> None:
    assert sma.build(WIDE).init_state(1, device="meta").num_bytes > 10**9


def test_a_number_of_streams_cannot_be_negative() -> None:
    with pytest.raises(InputError, match=r"^batch_size=-1 must be at least 0$"):
        sma.build(_spec()).init_state(-1)


def test_the_states_of_all_layers_are_checked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sma.build(_spec(layers={"repeat": 5, "layer": {"modules": {"a": GAU}}}))
    whole = model.init_state(3).num_bytes
    monkeypatch.setattr("sma.memory.ALWAYS_FITS", 0)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: whole)
    model.init_state(3)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: whole - 1)
    with pytest.raises(InputError, match=rf"batch_size=3 needs {whole:,} bytes, and {whole - 1:,} bytes are free"):
        model.init_state(3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"samples": 10**10},
            r"the generation of 1 x 10000000000 samples needs .* are free; reduce the number of samples",
        ),
        ({"samples": 10**30}, r"needs about 10\^\d+ bytes, more than any machine can address"),
        ({"seed": 10**30}, r"seed=10+ must have at most 64 bits"),
        ({"seed": 10**5000}, r"seed=<int> must have at most 64 bits|seed=1000.* must have at most 64 bits"),
    ],
)
def test_generation_that_cannot_fit_is_refused_at_once(options: dict[str, int], complaint: str) -> None:
    model = sma.build(_spec(), seed=0).eval()
    with pytest.raises(InputError, match=complaint):
        generate(model, torch.zeros(1, 3, dtype=torch.int64), tokens=5, **options)  # type: ignore[arg-type]


def test_a_state_that_grew_with_its_prompt_is_checked_before_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sma.build(_spec(window=None), seed=0).eval()
    tokens = generate(model, torch.zeros(1, 999, dtype=torch.int64), tokens=5, samples=3)  # type: ignore[arg-type]
    monkeypatch.setattr("sma.memory.ALWAYS_FITS", 0)
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: 10_000)
    with pytest.raises(
        InputError,
        match=r"the state for samples=3 needs 1\d\d,\d\d\d bytes, and 10,000 bytes are free; reduce the number",
    ):
        next(tokens)


def test_generation_accepts_any_number_of_tokens() -> None:
    model = sma.build(_spec(), seed=0).eval()
    assert next(generate(model, torch.zeros(1, 3, dtype=torch.int64), tokens=10**30, top_k=10**30)).shape == (1,)  # type: ignore[arg-type]
