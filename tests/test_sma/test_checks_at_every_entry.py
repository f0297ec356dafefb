"""NumPy arrays, lists and other dtypes at every public entry point: accepted if safe, otherwise refused with a hint.

The hint says how to convert them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sma
from sma.budget import BudgetController, BudgetSpec
from sma.calibration import calibrate
from sma.errors import InputError, StateError
from sma.generation import generate
from sma.losses import budget_loss, load_balance_loss, policy_gradient_loss, z_loss
from sma.ragged import compress, extract, extract_add, rectangular, segment_reduce
from sma.routers import AlwaysRouterSpec, SMARouterSpec
from sma.stats import activation_rates, attention_span, count_rates, module_names
from tests.streams import exactly
from tests.test_modules.zoo import SPECS

pytestmark = pytest.mark.usefixtures("as_users_run")

GAU = {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 4, "bidirectional": False}
LAYERS = [{"modules": {"attention": GAU, "identity": {"kind": "identity"}}}]
X, IDS, VALID = torch.randn(2, 5, 8), torch.randint(9, (2, 5)), torch.ones(2, 5, dtype=torch.bool)


def _model(kind: str = "language_model", encoder: dict[str, Any] | None = None) -> sma.SequenceModel:
    encoder = encoder or {"kind": "token_embedding", "vocabulary": 9}
    return sma.build({"kind": kind, "width": 8, "encoder": encoder, "layers": LAYERS}, seed=0)


MODEL = _model()
LAYER = MODEL.layers[0]
ROUTED = LAYER.routed
DECISIONS = MODEL(IDS).decisions
TOKENS = compress(X, VALID)
CONTROLLER = BudgetController.of(MODEL, BudgetSpec(target=0.5))

# A call with one argument, and a valid value of that argument.
TENSORS: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "model inputs": (MODEL, IDS),
    "model valid": (lambda valid: MODEL(IDS, valid), VALID),
    "pair inputs": (
        sma.build(
            {
                "kind": "pair_classifier",
                "width": 8,
                "encoder": {"kind": "real_number"},
                "layers": LAYERS,
                "head": {"kind": "mean_pool_linear", "classes": 2},
            }
        ),
        X[..., 0],
    ),
    "numbers": (_model("sequence_encoder", {"kind": "real_number"}), X[..., 0]),
    "features": (_model("sequence_encoder", {"kind": "linear", "features": 8}), X),
    "layer tokens": (LAYER, X),
    "layer valid": (lambda valid: LAYER(X, valid), VALID),
    "routed tokens": (ROUTED, X),
    "routed valid": (lambda valid: ROUTED(X, valid=valid), VALID),
    "routed control": (lambda control: ROUTED(X, control_BLD=control), X),
    "routed positions": (lambda positions: ROUTED(X, positions=positions), IDS),
    "router control": (ROUTED.router, X),
    "router valid": (lambda valid: ROUTED.router(X, valid), VALID),
    "fixed router control": (AlwaysRouterSpec().build(8, ["a"]), X),
    "fixed router valid": (lambda valid: AlwaysRouterSpec().build(8, ["a"])(X, valid), VALID),
    "compress batch": (lambda x: compress(x, VALID), X),
    "compress mask": (lambda mask: compress(X, mask), VALID),
    "compress positions": (lambda positions: compress(X, VALID, positions_BL=positions), IDS),
    "extract values": (lambda values: extract(values, TOKENS, X), TOKENS.values),
    "extract like": (lambda like: extract(TOKENS.values, TOKENS, like), X),
    "extract_add into": (lambda into: extract_add(TOKENS.values, TOKENS, into), X),
    "segment values": (lambda values: segment_reduce(values, TOKENS.offsets, "sum"), TOKENS.values),
    "segment offsets": (lambda offsets: segment_reduce(TOKENS.values, offsets, "sum"), TOKENS.offsets),
    "rate valid": (DECISIONS[0].rate, VALID),
    "budget_loss valid": (lambda valid: budget_loss(DECISIONS, 0.5, valid), VALID),
    "load_balance_loss valid": (lambda valid: load_balance_loss(DECISIONS, valid), VALID),
    "z_loss valid": (lambda valid: z_loss(DECISIONS, valid), VALID),
    "policy losses": (lambda losses: policy_gradient_loss(DECISIONS, losses), X[:, 0, 0]),
    "policy valid": (lambda valid: policy_gradient_loss(DECISIONS, X[:, 0, 0], valid), VALID),
    "count valid": (lambda valid: count_rates(DECISIONS, valid), VALID),
    "span positions": (lambda positions: attention_span(DECISIONS[0], 3, positions=positions), IDS),
    "update valid": (lambda valid: CONTROLLER.update(DECISIONS, valid), VALID),
    "prompt": (lambda prompt: list(generate(MODEL, prompt, tokens=1)), IDS),
    "prompt valid": (lambda valid: list(generate(MODEL, IDS, tokens=1, valid=valid)), VALID),
    "calibrate inputs": (lambda inputs: calibrate(MODEL, [inputs], 0.5), IDS),
    "calibrate valid": (lambda valid: calibrate(MODEL, [(IDS, valid)], 0.5), VALID),
    "state select": (lambda rows: MODEL.init_state(2).select(rows), torch.tensor([1, 0])),
    "state reorder": (lambda rows: MODEL.init_state(2).reorder(rows), torch.tensor([1, 0])),
    "state reset": (lambda rows: MODEL.init_state(2).reset(rows), torch.tensor([True, False])),
}
every_entry = pytest.mark.parametrize("entry", list(TENSORS))


@every_entry
def test_an_array_is_refused_with_a_hint_how_to_convert_it(entry):
    call, right = TENSORS[entry]
    given = right.numpy()
    shape = ", ".join(map(str, given.shape)) + ("," if given.ndim == 1 else "")
    told = (
        f"a numpy.ndarray of shape \\({shape}\\) and dtype {given.dtype}; expected a torch.Tensor: "
        "write torch.as_tensor\\(x"
    )
    with pytest.raises(InputError, match=told):
        call(given)


@every_entry
def test_lists_texts_sparse_and_nested_tensors_are_refused(entry):
    call, right = TENSORS[entry]
    if entry != "calibrate inputs":  # for this entry a list is a batch of inputs and mask
        with pytest.raises(InputError, match=r"a list; expected a torch\.Tensor: write torch\.as_tensor\(x"):
            call(right.tolist())
    with pytest.raises(InputError, match="str"):
        call("hello")
    with pytest.raises(InputError, match=r"a sparse_coo tensor; expected a dense one: convert it with \.to_dense\(\)$"):
        call(right.to_sparse())
    if right.ndim > 1:
        with pytest.raises(InputError, match="a nested tensor; expected a dense one"):
            call(torch.nested.nested_tensor(list(right)))


MASKS = [entry for entry in TENSORS if entry.endswith(("valid", "mask")) and not entry.startswith("calibrate")]


@pytest.mark.parametrize("entry", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_refused_with_a_hint_how_to_convert_it(entry, dtype):
    with pytest.raises(
        InputError,
        match=r"of shape .* and dtype torch\.\w+; expected a boolean tensor of shape .*: convert with \.bool\(\)$",
    ):
        TENSORS[entry][0](VALID.to(dtype))


@pytest.mark.parametrize("entry", MASKS)
@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (5,), (2, 5, 1)])
def test_a_mask_of_another_shape_is_refused_with_the_required_one(entry, shape):
    with pytest.raises(InputError, match=r"of shape \(.*\) and dtype torch\.bool; expected .* \(B = 2, L = 5\)$"):
        TENSORS[entry][0](torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("entry", ["layer tokens", "routed tokens"])
def test_tokens_without_a_row_axis_are_refused_with_the_required_shape(entry):
    with pytest.raises(InputError, match=r"^the tokens are of shape \(5, 8\) .*; expected .* \(B, L, D(?: = 8)?\)$"):
        TENSORS[entry][0](X[0])


@pytest.mark.parametrize(
    ("entry", "part", "required"),
    [
        ("model inputs", MODEL, "ModelState"),
        ("layer tokens", LAYER, "LayerState"),
        ("routed tokens", ROUTED, "RoutedState"),
        ("router control", ROUTED.router, "NoState"),
    ],
)
def test_a_state_of_another_class_or_number_of_streams_is_refused(entry, part, required):
    name, right = type(part).__name__, TENSORS[entry][1]
    with pytest.raises(
        StateError, match=exactly(f"{name} got a state of class State; expected {required}: use init_state")
    ):
        part(right, state=sma.State())
    sentence = (
        f"{name} got a state of 3 streams for a batch of 2 rows; "
        "make one with init_state(2), or take rows with state.select"
    )
    with pytest.raises(StateError, match=exactly(sentence)):
        part(right, state=part.init_state(3))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_dtype_are_looked_up(dtype):
    ids = IDS.to(getattr(torch, dtype))
    assert torch.equal(MODEL(ids).logits, MODEL(IDS).logits)
    drawn = [next(generate(MODEL, prompt, tokens=1, temperature=0)) for prompt in (ids, IDS)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        (torch.tensor([[9]]), 9),
        (torch.tensor([[-1]]), -1),
        (torch.tensor([[-1]], dtype=torch.int8), -1),
        (torch.tensor([[200]], dtype=torch.uint8), 200),
        (torch.tensor([[65535]], dtype=torch.uint16), 65535),
        (torch.tensor([[2**32 - 1]], dtype=torch.uint32), 2**32 - 1),
        (torch.from_numpy(np.array([[2**63 + 5]], dtype=np.uint64)), 2**63 + 5),
    ],
)
def test_ids_out_of_range_are_quoted_unchanged(ids, wrong):
    with pytest.raises(
        InputError,
        match=exactly(f"token id {wrong} is out of range; the vocabulary has ids 0 … 8, also required at padding"),
    ):
        MODEL(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_of_another_dtype_are_refused_with_a_hint_how_to_convert_them(dtype):
    required = f"dtype {dtype}; expected an integer tensor of shape (B, L): convert with .long()"
    with pytest.raises(InputError, match=exactly(f"token ids are of shape (2, 5) and {required}")):
        MODEL(IDS.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integers_in_place_of_floats_are_refused_with_a_hint_how_to_convert_them(dtype):
    for entry in ("numbers", "features", "layer tokens", "routed tokens"):
        call, right = TENSORS[entry]
        with pytest.raises(
            InputError,
            match=rf"dtype {dtype}; expected a floating-point tensor of shape \(B, L.*\): convert with \.float\(\)$",
        ):
            call(right.to(dtype))


@pytest.mark.parametrize(
    "function",
    [
        lambda d: budget_loss(d, 0.5),
        load_balance_loss,
        z_loss,
        count_rates,
        activation_rates,
        module_names,
        CONTROLLER.update,
        lambda d: policy_gradient_loss(d, X[:, 0, 0]),
    ],
)
def test_functions_of_decisions_refuse_other_arguments(function):
    with pytest.raises(
        InputError, match=r"got a sma\.ModelOutput; .* one for each routed layer: give output\.decisions$"
    ):
        function(MODEL(IDS))
    with pytest.raises(InputError, match=r"got one Decision; .*: write \[decision\]$"):
        function(DECISIONS[0])
    with pytest.raises(
        InputError,
        match=r"got a numpy\.ndarray of shape \(2, 5\) and dtype int64 as decision 0; expected a Decision",
    ):
        function([IDS.numpy()])


@pytest.mark.parametrize("name", SPECS)
def test_a_sub_module_refuses_a_batch_in_place_of_ragged_tokens(name):
    part = SPECS[name].build(8)
    with pytest.raises(
        InputError,
        match=rf"^{type(part).__name__} got a torch\.Tensor of shape \(2, 5, 8\) .*; expected a Ragged: write",
    ):
        part(X)


@pytest.mark.parametrize(
    "part",
    [
        MODEL,
        LAYER,
        ROUTED,
        ROUTED.router,
        *ROUTED.submodules.values(),
        SMARouterSpec().build(8, ["a"]),
        sma.load_spec({"kind": "ema", "bidirectional": False}, "sub-module").build(8),
        sma.load_spec({"kind": "s4d", "bidirectional": False}, "sub-module").build(8),
        sma.load_spec({"kind": "random", "rate": 0.5}, "router").build(8, ["a"]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_state_of_an_impossible_number_of_streams_device_or_dtype_is_refused(part):
    for wrong, problem in (
        (2.0, "batch_size=2.0 is a float"),
        ("2", "batch_size='2' is a str"),
        (True, "batch_size=True is a bool"),
        (-1, "batch_size=-1 must be at least 0"),
        (torch.tensor(2), r"batch_size=tensor\(2\) is a torch\.Tensor"),
    ):
        with pytest.raises(InputError, match=rf"^{problem}"):
            part.init_state(wrong)
    assert part.init_state(np.int64(3)).batch_size == 3
    with pytest.raises(InputError, match=r"^the device 'gpu' cannot be used: .*; there are 'cpu', .*'meta'"):
        part.init_state(2, device="gpu")
    for dtype in (torch.int64, "float32", np.float32):
        with pytest.raises(InputError, match=r"is not a floating-point dtype; give one such as torch\.float32$"):
            part.init_state(2, dtype=dtype)


@pytest.mark.parametrize("capacity", [np.int64(3), np.float32(0.5), torch.tensor(3), [3]], ids=repr)
def test_a_capacity_that_is_not_a_plain_number_is_refused(capacity):
    cure = r"; it is a (numpy\.int64|numpy\.float32|torch\.Tensor|list).*: write int\(x\) or float\(x\)$"
    for call in (
        lambda: MODEL(IDS, capacity=capacity),
        lambda: LAYER(X, capacity={"attention": capacity, "identity": 1}),
    ):
        with pytest.raises(InputError, match=cure):
            call()


def test_compress_refuses_a_capacity_that_is_not_an_integer():
    for wrong, problem in (
        (0.5, "capacity=0.5 is a float"),
        ("3", "capacity='3' is a str"),
        (True, "capacity=True is a bool"),
    ):
        with pytest.raises(InputError, match=f"^{problem}; expected an integer of at least 1 token per row$"):
            compress(X, VALID, capacity=wrong)
    assert compress(X, VALID, capacity=np.int64(2)).stride == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tokens": 1.5}, "tokens=1.5 is a float; expected an integer of at least 0"),
        ({"samples": "2"}, "samples='2' is a str; expected an integer of at least 1"),
        ({"temperature": "hot"}, "temperature is a str, 'hot'; expected a plain number: write float(x)"),
        (
            {"top_k": 2.0},
            "top_k=2.0 is a float; expected an integer of at least 1; leave it out to draw from all tokens",
        ),
        ({"top_p": None, "top_k": None, "tokens": None}, "tokens=None is None; expected an integer of at least 0"),
    ],
)
def test_settings_of_generate_that_are_not_numbers_are_refused(settings, problem):
    with pytest.raises(InputError, match=exactly(problem)):
        generate(MODEL, IDS, **{"tokens": 1, **settings})


def test_generate_refuses_models_that_are_not_language_models():
    with pytest.raises(
        InputError,
        match=r"^SequenceModel does not score the next token; generate needs a model of kind language_model$",
    ):
        next(generate(_model("sequence_encoder"), IDS, tokens=1))
    with pytest.raises(
        InputError, match=r"^Linear does not score the next token; generate needs a model of kind language_model$"
    ):
        generate(torch.nn.Linear(2, 2), IDS, tokens=1)


def test_a_sub_module_accepts_rectangular_tokens():
    part = ROUTED.submodules["attention"]
    assert part(rectangular(X))[0].shape == (10, 8)
