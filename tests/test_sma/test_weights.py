"""Wrapped or modified models are saved with their effective weights, or refused without changing the old file."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sma
from sma.errors import CheckpointError
from sma.model import SequenceModel
from sma.weights import build_without_memory, unwrapped
from tests.test_sma.test_checkpoint import INPUTS, SPEC, _model, _same
from tests.test_sma.test_testing import MODELS


class Doubled(nn.Module):
    """A third-party parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _attention(model: SequenceModel) -> Any:
    return model.routed_layers[0].routed.submodules["attention"]  # type: ignore[union-attr]


def _then(change: Callable[[Any], Any]) -> Callable[[SequenceModel], nn.Module]:
    """Turn a function that changes a model in place into one that returns the model."""

    def changed(model: SequenceModel) -> nn.Module:
        change(model)
        return model

    return changed


def _compile_layer(model: SequenceModel) -> None:
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # type: ignore[assignment]


def _checkpoint_layer(model: SequenceModel) -> None:
    model.layers[1] = checkpoint_wrapper(model.layers[1])


def _averaged(model: SequenceModel) -> nn.Module:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averaged.update_parameters(model)
    averaged.update_parameters(_model())
    return averaged


def _prune_twice(model: Any) -> None:
    prune.l1_unstructured(model.head.linear, "weight", 0.5)
    prune.random_unstructured(model.head.linear, "weight", 0.5)


def _stale_norm(model: Any) -> None:
    """The legacy weight norm keeps a computed weight on the module that is older than its parameters."""
    nn.utils.weight_norm(model.head.linear)
    with torch.no_grad():
        model.head.linear.weight_g.mul_(3)


class Wrapper(nn.Module):
    """A third-party wrapper with the model in `module`, as in wrappers of torch, and an additional layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.more = module, nn.Linear(2, 2)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


WRAPPED: dict[str, Callable[[SequenceModel], nn.Module]] = {
    "nothing": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "compiled in place": _then(lambda model: model.compile(backend="eager")),
    "data parallel": nn.DataParallel,
    "averaged": _averaged,
    "averaged and compiled": lambda model: AveragedModel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "wrapped by a user": Wrapper,
    "compiled, wrapped by a user, averaged": lambda model: AveragedModel(
        Wrapper(torch.compile(model, backend="eager"))
    ),  # type: ignore[arg-type]
    "weight norm": _then(lambda model: parametrizations.weight_norm(_attention(model).in_proj)),
    "spectral norm": _then(lambda model: parametrizations.spectral_norm(_attention(model).in_proj)),
    "orthogonal": _then(lambda model: parametrizations.orthogonal(model.layers[0].bypass)),
    "own parametrisation": _then(
        lambda model: parametrize.register_parametrization(model.encoder, "weight", Doubled())
    ),
    "parametrised and compiled": lambda model: torch.compile(
        _then(lambda inner: parametrizations.weight_norm(inner.head.linear))(model), backend="eager"
    ),
    "old weight norm": _then(_stale_norm),
    "old spectral norm": _then(lambda model: nn.utils.spectral_norm(model.head.linear)),
    "pruned twice": _then(_prune_twice),
    "strided": _then(lambda model: setattr(model.head.linear, "weight", nn.Parameter(torch.randn(4, 3).T))),
    "expanded": _then(lambda model: setattr(model.head.linear, "weight", nn.Parameter(torch.randn(4).expand(3, 4)))),
}
IN_PART: dict[str, Callable[[SequenceModel], nn.Module]] = {
    "compiled layer": _then(_compile_layer),
    "compiled layer of a compiled model": lambda model: torch.compile(_then(_compile_layer)(model)),  # type: ignore[return-value]
    "checkpointed layer": _then(_checkpoint_layer),
}


@pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in WRAPPED.items()])
@pytest.mark.parametrize("training", [False, True])
def test_a_wrapped_model_is_saved_with_its_effective_weights(tmp_path, wrap, training):
    wrapped = wrap(_model()).train(training)
    before = copy.deepcopy(wrapped.state_dict())
    sma.save(wrapped, tmp_path)
    after = wrapped.state_dict()
    assert wrapped.training is training
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = sma.load(tmp_path)
    assert type(loaded) is SequenceModel
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(INPUTS).logits, unwrapped(wrapped.eval())[1].forward(INPUTS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in IN_PART.items()])
def test_a_wrapped_part_is_saved_as_the_part(tmp_path, wrap):
    sma.save(wrap(_model()), tmp_path)
    assert _same(sma.load(tmp_path), _model())


def test_a_layer_used_twice_is_saved_as_two_with_a_warning(tmp_path):
    model = _model()
    model.layers[1] = model.layers[0]
    with pytest.warns(
        UserWarning,
        match=r"'layers\.0\..*'layers\.1\..*are one tensor in this model and separate tensors in its spec.*groups",
    ):
        sma.save(model, tmp_path)
    loaded = sma.load(tmp_path)
    assert _same(loaded, model)
    assert loaded.layers[0].bypass.weight is not loaded.layers[1].bypass.weight


def test_weights_that_a_part_shares_are_shared_after_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sma.spec, "_registry", {family: dict(members) for family, members in sma.spec._registry.items()}
    )
    _register_tied()
    model = sma.build({**SPEC, "layers": [{"modules": {"tied": {"kind": "tied"}}}]}, seed=1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sma.save(model, tmp_path)
    loaded = sma.load(tmp_path)
    assert torch.equal(loaded(INPUTS).logits, model(INPUTS).logits)
    part = loaded.layers[0].routed.submodules["tied"]
    assert part.first.weight is part.second.weight


def _register_tied() -> None:
    from typing import Literal

    from sma import SubModule, SubModuleSpec, register

    class Tied(SubModule):
        causal = True

        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
            self.second.weight = self.first.weight
            self.scale = float(self.first.weight.detach().numpy().max())  # reads values

        def forward(self, tokens: Any, state: Any = None) -> Any:
            return self.second(self.first(tokens.values)), state

    @register
    class TiedSpec(SubModuleSpec):
        kind: Literal["tied"] = "tied"

        def build(self, width: int) -> Tied:
            return Tied(width)


def _replace_norm(model: SequenceModel) -> None:
    model.layers[0].norm = nn.BatchNorm1d(4)


def _replace_window(model: SequenceModel) -> None:
    attention = model.routed_layers[1].spec.modules["attention"]
    model.routed_layers[1].routed.submodules["attention"] = attention.replace(window=77).build(4)  # type: ignore[union-attr]


def _weight(value: torch.Tensor) -> Callable[[Any], None]:
    return lambda model: setattr(model.head.linear, "weight", nn.Parameter(value, requires_grad=False))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            lambda model: nn.Linear(2, 2),
            r"cannot save a Linear, which has no spec of a model; give one that sma\.build",
            id="linear",
        ),
        pytest.param(
            lambda model: model.layers[0], r"cannot save a RoutedLayer, which has no spec of a model", id="layer"
        ),
        pytest.param(nn.Sequential, r"cannot save a Sequential, which has no spec", id="in a sequence"),
        pytest.param(
            _then(lambda model: setattr(model, "layers", model.layers[:1])),
            r"cannot save this SequenceModel, because it does not fit its spec: "
            r"missing \['layers\.1\..*unknown nothing; merge, convert",
            id="layer removed",
        ),
        pytest.param(
            _then(_replace_norm),
            r"its part 'layers\.0\.norm' is a torch\.nn\..*BatchNorm1d, "
            r"and its spec builds a sma\.norms\.BatchNorm; undo that",
            id="norm replaced",
        ),
        pytest.param(
            _then(_replace_window),
            r"its part 'layers\.1\.routed\.submodules\.attention' was built with window=77, "
            r"and the spec of the model has window=None",
            id="part of another spec",
        ),
        pytest.param(
            _then(lambda model: setattr(model.head, "linear", nn.Sequential(model.head.linear, nn.Linear(3, 3)))),
            r"its part 'head\.linear' is a torch\.nn\..*Sequential, and its spec builds a torch\.nn\..*Linear",
            id="adapter",
        ),
        pytest.param(
            _then(lambda model: model.head.linear.register_parameter("lora_A", nn.Parameter(torch.zeros(2)))),
            r"missing nothing, unknown \['head\.linear\.lora_A'\]; merge, convert or undo",
            id="parameter added",
        ),
        pytest.param(
            _then(lambda model: setattr(model.head, "linear", nn.Linear(4, 7))),
            r"'head\.linear\.weight' is float32 of shape \(7, 4\); expected float32 of shape \(3, 4\)",
            id="more classes",
        ),
        pytest.param(
            lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
            r"its part '.*' is a torch\.ao\.nn\.quantized\..*Linear, and its spec builds a "
            r"torch\.nn\.modules\.linear\.Linear",
            id="quantised",
        ),
        pytest.param(
            lambda model: model.to("meta"), r"cannot save '.*': it is on the meta device and has no values", id="meta"
        ),
        pytest.param(
            _then(_weight(torch.ones(3, 4).int())),
            r"'head\.linear\.weight' is int32 of .*; expected float32 of",
            id="integers",
        ),
        pytest.param(
            _then(_weight(torch.ones(3, 4).to(torch.float8_e5m2))),
            r"is float8_e5m2 of .*; expected float32 of",
            id="8 bits",
        ),
        pytest.param(
            _then(_weight(torch.ones(3, 4) * 1j)),
            r"is complex64 of .*; expected float32 of shape",
            id="complex numbers",
        ),
        pytest.param(
            _then(_weight(torch.eye(3, 4).to_sparse())),
            r"it is a torch\.sparse_coo tensor .*, not a dense tensor",
            id="sparse",
        ),
        pytest.param(
            _then(lambda model: setattr(model.head.linear, "weight", nn.UninitializedParameter())),
            r"cannot save this SequenceModel: its weights cannot be read: Attempted to use an uninitialized parameter",
            id="lazy",
        ),
        pytest.param(
            _then(
                lambda model: setattr(
                    model.head, "__class__", type("Extra", (type(model.head),), {"get_extra_state": lambda self: {}})
                )
            ),
            r"cannot save this SequenceModel, because it does not fit its spec: "
            r"missing nothing, unknown \['head\._extra_state'\]",
            id="extra state",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_model_that_does_not_fit_its_spec_is_never_saved(tmp_path: Path, change: Any, complaint: str) -> None:
    sma.save(_model(7), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=complaint):
        sma.save(change(_model()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_non_finite_weights_can_be_saved(tmp_path):
    model = _model()
    with torch.no_grad():
        model.head.linear.weight.fill_(float("nan"))
        model.head.linear.bias.fill_(float("-inf"))
    sma.save(model, tmp_path)
    assert sma.load(tmp_path).head.linear.weight.isnan().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_built_without_memory_has_the_same_tensors(name):
    built, reference = MODELS[name].build(), build_without_memory(MODELS[name])
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in reference.state_dict().items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in built.state_dict().items()
    ]
    assert all(tensor.is_meta for tensor in reference.state_dict().values())
