"""The conformance kit accepts correct sub-modules and detects each deliberate bug."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.model import ModelSpec
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.spec import kinds, load_spec
from sma.submodule import NoState, State, SubModule, SubModuleSpec
from sma.testing import ConformanceError, check_model, check_submodule
from sma.testing.model_laws import MODEL_LAWS
from sma.testing.submodule_laws import SUBMODULE_LAWS
from tests.test_modules.test_every_kind import SPECS


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_the_zoo_conforms(name: str, as_users_run: None) -> None:
    check_submodule(SPECS[name], effort=4)


def test_every_kind_of_the_zoo_is_tested() -> None:
    ours = {kind for kind, spec in kinds("sub-module").items() if spec.__module__.startswith("sma.modules.")}
    assert {spec.kind for spec in SPECS.values()} == ours


def model(
    kind: str = "sequence_classifier", *, causal: bool, encoder: dict[str, Any] | None = None, **layer: Any
) -> ModelSpec:
    modules = {
        "attention": {"kind": "gau", "query_size": 4, "hidden_size": 6, "window": 5, "bidirectional": not causal},
        "conv": {"kind": "conv", "kernel_size": 3, "bidirectional": not causal},
        "mlp": {"kind": "gated_mlp", "hidden_size": 9},
    }
    backbone = {"kind": "ema", "bidirectional": not causal, "state_size": 4}
    block = {"backbone": backbone, "modules": modules, "norm": {"kind": "layer_norm"}, **layer}
    spec: dict[str, Any] = {
        "kind": kind,
        "width": 6,
        "encoder": encoder or {"kind": "real_number"},
        "layers": {"repeat": 2, "layer": block},
    }
    if kind == "sequence_classifier":
        spec["head"] = {"kind": "mean_pool_mlp", "hidden": 5, "classes": 3}
    loaded: ModelSpec = load_spec(spec)
    return loaded


TOKENS = {"kind": "token_embedding", "vocabulary": 7}
MODELS = {
    "classifier": model(causal=False),
    "classifier-causal": model(causal=True),
    "encoder-random-router": model(
        "sequence_encoder", causal=True, router={"kind": "random", "rate": 0.4}, encoder=TOKENS
    ),
    "encoder-features": model("sequence_encoder", causal=False, encoder={"kind": "linear", "features": 3}),
    "batch-norm": model(causal=True, norm={"kind": "batch_norm"}),
    "post-norm-dense": model(
        causal=True, norm={"kind": "scale_norm", "place": "post"}, router={"kind": "always"}, bypass="identity"
    ),
    "language-model": model("language_model", causal=True, encoder=TOKENS | {"scaled": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_conform(name: str, as_users_run: None) -> None:
    check_model(MODELS[name], effort=3)


class Mean(SubModule):
    """The running mean of the tokens of a row: a correct sub-module and the base of the broken ones."""

    causal = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> "MeanState":
        return MeanState(
            torch.zeros(batch_size, self.weight.shape[0], dtype=torch.float64),
            torch.zeros(batch_size, dtype=torch.int64),
        )

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        before = self._continue(state, MeanState, tokens)
        x, mask = tokens.to_padded()
        seen, total = mask.cumsum(1), x.double().cumsum(1)
        if before is not None:
            seen, total = seen + before.seen[:, None], total + before.total[:, None]
        mean = tokens.from_padded(total / seen.clamp(min=1)[..., None])
        values = mean.to(tokens.values.dtype) * self.weight
        if before is None:
            return values, None
        return values, MeanState(before.total + x.double().sum(1), before.seen + mask.sum(1))


@register_output
@dataclass(frozen=True)
class MeanState(State):
    total: Tensor
    seen: Tensor


class Leak(Mean):
    """Depends on the whole row."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        x, mask = tokens.to_padded()
        return values + 1e-3 * (x.sum(1) / mask.sum(1).clamp(min=1)[:, None]).to(values.dtype)[tokens.rows], after


class Stale(Mean):
    """Returns the given state unchanged."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return super().forward(tokens, state)[0], state


class Forgetful(Mean):
    """Accepts a state and returns none."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return super().forward(tokens, state)[0], None


class Overwriting(Mean):
    """Adds to the old state in place."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        if isinstance(state, MeanState) and isinstance(after, MeanState):
            state.total.copy_(after.total.detach())
        return values, after


class Padded(Mean):
    """Treats holes as tokens."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        if tokens.stride is None or not values.numel():
            return values, after
        return values + tokens.values.unflatten(0, (tokens.num_rows, -1)).mean(1)[
            tokens.rows
        ] * 1e-3 * tokens.holes, after


class Slotted(SubModule):
    """Rotates by the index in the chunk instead of the position in the stream."""

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return tokens.values * tokens.slots.to(tokens.values.dtype).cos()[:, None], state


class Unused(Mean):
    """Does not use a parameter if there is no token."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        if tokens.values.shape[0] == 0:
            return tokens.values, state
        return super().forward(tokens, state)


class Mixing(Mean):
    """Adds the sum over all rows to every token."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        return values + 1e-3 * tokens.values.sum(), after


class Greedy(Mean):
    """Multiplies by the mask, so that NaN of later tokens reaches earlier ones."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        return values + 0 * tokens.from_padded(
            tokens.to_padded()[0].sum(1, keepdim=True).expand_as(tokens.to_padded()[0])
        ), after


class Widening(Mean):
    """Returns float64 for every dtype."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        return values.double(), after


class Detached(Mean):
    """Cuts the graph at the state."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return super().forward(tokens, None if state is None else state.detach())


class Advancing(Mean):
    """Counts a chunk for rows that have no token in it."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        return values, after if not isinstance(after, MeanState) else MeanState(
            after.total, after.seen + (tokens.lengths == 0)
        )


class Counting(Mean):
    """Counts its calls in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        self.calls += 1
        return super().forward(tokens, state)


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class WrongGradient(Mean):
    """Has a backward that is not the derivative of its forward."""

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        values, after = super().forward(tokens, state)
        return _Wrong.apply(values), after


class Pretending(Mean):
    """Declares causal=False, but creates a state."""

    causal = False


def test_a_submodule_without_a_spec_conforms(as_users_run: None) -> None:
    check_submodule(Mean)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Leak, "never_looks_ahead"),
        (Leak, "chunks_equal_the_whole"),
        (Stale, "chunks_equal_the_whole"),
        (Forgetful, "chunks_equal_the_whole"),
        (Overwriting, "states_are_values"),
        (Padded, "layouts_agree"),
        (Slotted, "chunks_equal_the_whole"),
        (Unused, "takes_no_tokens"),
        (Mixing, "rows_are_independent"),
        (Greedy, "never_looks_ahead"),
        (Widening, "returns_one_result_per_token"),
        (Detached, "gradients_cross_chunks"),
        (Advancing, "rows_without_tokens_keep_their_state"),
        (Counting, "changes_nothing_and_repeats"),
        (WrongGradient, "gradients_are_right"),
        (Pretending, "refuses_a_state_unless_causal"),
    ],
)
def test_the_kit_detects_the_bug(
    broken: Callable[[int], SubModule], law: str, monkeypatch: pytest.MonkeyPatch, as_users_run: None
) -> None:
    (one,) = (each for each in SUBMODULE_LAWS if each.__name__ == law)
    monkeypatch.setattr("sma.testing.check.SUBMODULE_LAWS", [one])
    with pytest.raises(ConformanceError, match=rf"breaks 1 of 1 laws:\n  {law}: ") as caught:
        check_submodule(broken if not issubclass(broken, Slotted) else lambda width: broken(), effort=6)  # type: ignore[arg-type]
    assert caught.value.broken == (law,)


def test_the_kit_lists_all_broken_laws(as_users_run: None) -> None:
    with pytest.raises(ConformanceError, match=rf"breaks \d+ of {len(SUBMODULE_LAWS)} laws:\n") as caught:
        check_submodule(Leak, effort=3)
    assert {"never_looks_ahead", "chunks_equal_the_whole"} <= set(caught.value.broken)


class WrongSpec(SubModuleSpec):
    kind: str = "wrong"

    def build(self, width: int) -> SubModule:
        return Mean(width)

    def num_parameters(self, width: int) -> int:
        return width + 1


def test_the_kit_reports_a_wrong_prediction(as_users_run: None) -> None:
    with pytest.raises(
        ConformanceError, match="spec_predicts_and_survives: num_parameters predicts 5, and the sub-module has 4"
    ):
        check_submodule(WrongSpec())


def test_the_kit_detects_a_leak_in_a_model(monkeypatch: pytest.MonkeyPatch, as_users_run: None) -> None:
    from sma.modules.conv import Conv

    whole = Conv.forward
    monkeypatch.setattr(
        Conv, "forward", lambda self, tokens, state=None: (whole(self, tokens, state)[0] + tokens.values.sum(), state)
    )
    with pytest.raises(
        ConformanceError, match=rf"the model 'sequence_classifier' breaks \d of {len(MODEL_LAWS)} laws"
    ) as caught:
        check_model(MODELS["classifier-causal"], effort=6)
    assert {"never_looks_ahead", "chunks_equal_the_whole", "rows_are_independent"} <= set(caught.value.broken)


def test_an_empty_state_has_the_number_of_selected_rows() -> None:
    assert NoState(torch.zeros(3, 0, dtype=torch.bool)).select(torch.tensor([2, 0])).batch_size == 2
