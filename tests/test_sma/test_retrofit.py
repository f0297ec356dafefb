"""Routed parts in models that are not ours: what is skipped, what stays, and the way back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sma.errors import InputError
from sma.retrofit import RoutedPart, Target, collect_decisions, intermediate_and_output, retrofit
from tests.cases import generator

WIDTH = 8
OPEN = {"kind": "sma", "gate": "straight_through", "initial_bias": 60.0}
HALF = {"kind": "sma", "gate": "straight_through"}


class Block(nn.Module):
    """Pre-norm attention and feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal, key_padding_mask=None if mask is None else ~mask)[0]
        return x + self.mlp(x)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(x))


class Output(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(16, WIDTH), nn.Dropout(0.5)
        if norm:
            self.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden = self.dropout(self.dense(hidden)) + residual
        return self.LayerNorm(hidden) if hasattr(self, "LayerNorm") else hidden


class TwoModules(nn.Module):
    """A feed-forward block in two modules, as in BERT, and without its norm as in older ViT."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.intermediate, self.output = Intermediate(), Output(norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.intermediate(x), x)


class Model(nn.Module):
    """Somebody's model; takes its mask as transformers does."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 11)
        self.recompute = False

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = (
                checkpoint(layer, x, attention_mask, use_reentrant=False)
                if self.recompute
                else layer(x, attention_mask)
            )
        return self.head(x)


def made(*blocks: type[nn.Module], dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(*(block() for block in blocks or (Block, Block))).to(dtype)


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(11, (rows, length), generator=generator(1))


def losses_and_gradients(model: nn.Module, *inputs: Any) -> list[Tensor]:
    model.zero_grad()
    result = model(*inputs)
    result.square().sum().backward()
    return [result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("blocks", "target"),
    [
        pytest.param((Block, Block), "layers.*.mlp", id="one-module"),
        pytest.param((TwoModules, TwoModules), intermediate_and_output, id="two-modules"),
        pytest.param((lambda: TwoModules(norm=False),), intermediate_and_output, id="without-norm"),
    ],
)
def test_with_everything_active_the_model_is_the_original_bit_by_bit(blocks, target, dtype):
    model, original = made(*blocks, dtype=dtype).eval(), made(*blocks, dtype=dtype).eval()
    retrofit(model, {target: OPEN})
    found, wanted = model(ids()), original(ids())
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in original.named_parameters():
        matching = [other for path, other in model.named_parameters() if torch.equal(other, parameter)]
        assert any(torch.equal(other.grad, parameter.grad) for other in matching if other.grad is not None), name


@pytest.mark.parametrize("training", [True, False])
def test_new_parts_take_the_mode_of_what_they_replace_and_old_parts_keep_theirs(training):
    model = made(TwoModules).train(training)
    model.layers[0].output.dropout.train(not training)
    retrofit(model, {intermediate_and_output: OPEN})
    for path, part in model.named_modules():
        assert part.training == (training != isinstance(part, nn.Dropout)), path


def test_a_skipped_token_passes_by_the_part():
    model, original = made(Block), made(Block)
    retrofit(model, {"layers.*.mlp": HALF})
    with collect_decisions(model) as decisions:
        found = model(ids())
    (decision,) = decisions
    active = decision.active[..., 0]
    assert active.any()
    assert not active.all()
    wanted = original(ids())
    block = original.layers[0]
    x = original.embedding(ids())
    normal = block.norm(x)
    skipped = original.head(x + block.attention(normal, normal, normal)[0])
    torch.testing.assert_close(found, wanted.where(active[..., None], skipped))


def test_parts_that_draw_draw_differently():
    model = made()
    retrofit(model, {"layers.*.mlp": {"kind": "random", "rate": 0.5}})
    with collect_decisions(model) as decisions:
        model(ids(4, 50))
    first, second = (decision.active for decision in decisions)
    assert 0.3 < (first == second).double().mean() < 0.7


def test_post_norm_blocks_normalise_what_is_skipped():
    model, original = made(TwoModules).eval(), made(TwoModules).eval()
    retrofit(model, {intermediate_and_output: {"kind": "never"}})
    x = original.embedding(ids())
    torch.testing.assert_close(model(ids()), original.head(original.layers[0].output.LayerNorm(x)))


def test_undo_puts_everything_back():
    model, original = made(), made()
    before = [(name, id(part)) for name, part in model.named_modules()]
    model.head.bias.requires_grad_(False)
    handle = retrofit(model, {"layers.*.mlp": HALF}, train="routers")
    assert handle.undo() is model
    assert [(name, id(part)) for name, part in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == [p is not model.head.bias for p in model.parameters()]
    for found, wanted in zip(losses_and_gradients(model, ids()), losses_and_gradients(original, ids()), strict=False):
        assert torch.equal(found, wanted)
    retrofit(model, {"layers.*.mlp": HALF})  # again


def test_only_the_routers_are_trained():
    model = made()
    retrofit(model, {"layers.*.mlp": {**HALF, "initial_bias": 1.0}}, train="routers")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".router." in name for name in trained)
    model(ids()).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_preview_counts_what_is_routed():
    handle = retrofit(made(), {"layers.*.mlp": HALF})
    lines = handle.preview().splitlines()
    assert len(lines) == 3
    # Norm 16, matrices 8 x 16 twice with biases 16 and 8; the router 2 x 8 + 2 + 1.
    assert lines[1].split() == ["layers.0.mlp", "296", "19", "256"]


def test_collected_padding_is_never_active():
    model = made()
    retrofit(model, {"layers.*.mlp": OPEN})
    valid = torch.rand(3, 9, generator=generator(2)) < 0.6
    with collect_decisions(model, valid) as decisions:
        model(ids(), valid | (torch.arange(9) == 0))
    assert len(decisions) == 2
    for decision in decisions:
        assert torch.equal(decision.active[..., 0], valid)


def test_contexts_nest_and_two_passes_are_collected_twice():
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    with collect_decisions(model) as outer:
        model(ids())
        with collect_decisions(model) as inner:
            model(ids())
        model(ids())
    model(ids())
    assert (len(outer), len(inner)) == (6, 2)
    assert all(a is b for a, b in zip(outer[2:4], inner, strict=True))


def test_a_pass_that_is_repeated_in_backward_is_collected_once():
    model = made().train()
    retrofit(model, {"layers.*.mlp": HALF})
    other = copy.deepcopy(model)
    model.recompute = True
    for each in (model, other):
        with collect_decisions(each) as decisions:
            each(ids()).square().sum().backward()
        assert len(decisions) == 2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_is_stored_on_modules():
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    before = [dict(part.__dict__) for part in model.modules()]
    with collect_decisions(model):
        model(ids())
    assert [dict(part.__dict__) for part in model.modules()] == before


def test_a_budget_and_calibrate_reach_their_rate():
    model = made().eval()
    handle = retrofit(model, {"layers.*.mlp": HALF})
    controller = handle.budget(0.3)
    data = [torch.randint(11, (8, 32), generator=generator(seed)) for seed in range(3)]
    for _ in range(60):
        for batch in data:
            with collect_decisions(model) as decisions:
                model(batch)
            controller.update(decisions)
    rates = torch.cat([decision.rate() for decision in decisions])
    assert (rates - 0.3).abs().max() < 0.1
    counted = handle.calibrate(data, 0.6)
    assert (counted.rates - 0.6).abs().max() < 0.1
    valid = torch.rand(8, 32, generator=generator(5)) < 0.5
    valid[:, 0] = True
    handle.calibrate([(batch, valid) for batch in data], 0.6)


def _shared() -> nn.Module:
    model = made()
    model.layers[1].mlp = model.layers[0].mlp
    return model


def _retrofitted() -> nn.Module:
    model = made()
    retrofit(model, {"layers.0.mlp": HALF})
    return model


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        pytest.param(made, {"layers.*.mlpp": HALF}, r"did you mean 'layers\.\*\.mlp'", id="typo"),
        pytest.param(made, {"*.mlp": HALF}, "no module of Model matches", id="too-short"),
        pytest.param(made, {}, "required is a mapping of patterns", id="empty"),
        pytest.param(made, "layers.*.mlp", "required is a mapping of patterns", id="text"),
        pytest.param(made, {"layers.*.mlp": HALF, "layers.0.*": HALF}, "two targets match|lies inside", id="twice"),
        pytest.param(made, {"layers.*": HALF, "layers.*.mlp": HALF}, "lies inside of|cannot be routed", id="nested"),
        pytest.param(made, {"layers.*.attention": HALF}, "'layers.0.attention' cannot be routed: .*mixes", id="mixing"),
        pytest.param(made, {intermediate_and_output: HALF}, "finds no part in Model", id="none"),
        pytest.param(_shared, {"layers.0.mlp": HALF}, "a part that is shared cannot be routed", id="shared"),
        pytest.param(_retrofitted, {"layers.1.mlp": HALF}, "is retrofitted already", id="again"),
        pytest.param(lambda: 3, {"layers.*.mlp": HALF}, "required is a Module", id="no-model"),
    ],
)
def test_what_cannot_be_routed_is_refused_and_changes_nothing(model, targets, said):
    given = model()
    before = list(given.named_modules()) if isinstance(given, nn.Module) else None
    with pytest.raises(InputError, match=said):
        retrofit(given, targets)
    assert before is None or list(given.named_modules()) == before


@pytest.mark.usefixtures("as_users_run")
def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match="required is 'all' or 'routers'"):
        retrofit(made(), {"layers.*.mlp": HALF}, train="router")
    with pytest.raises(InputError, match="has no routed part"), collect_decisions(made()):
        pass
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    with (
        collect_decisions(model, torch.ones(3, 8, dtype=torch.bool)),
        pytest.raises(InputError, match=r"layers\.0\.mlp has tokens"),
    ):
        model(ids())


def test_an_adapter_of_your_own_finds_parts_by_itself():
    def feed_forwards(model: nn.Module) -> list[Target]:
        return [Target("layers.0.mlp", model.layers[0].mlp, lambda routed: {"layers.0.mlp": routed})]

    handle = retrofit(made(), {feed_forwards: HALF})
    assert list(handle.parts) == ["layers.0.mlp"]
    assert isinstance(handle.model.layers[0].mlp, RoutedPart)
