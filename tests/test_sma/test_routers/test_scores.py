"""Routers with scores: the formula of the kind decides every token, and score biases shift the scores for on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import InputError
from sma.routers import RouterSpec, SteerableRouter
from sma.routers.steerable import steerable
from tests import oracles
from tests.cases import gradients, normal, pad
from tests.streams import exactly, near
from tests.test_sma.test_routers.each import (
    FIELDS,
    NAMES,
    ON_ROW,
    clear_score_bias,
    draws,
    is_learned,
    is_steerable,
    router,
    routers,
    same,
    scored,
)


class TestFormula:
    @routers(is_learned)
    @given(
        lengths=st.lists(st.integers(0, 6), max_size=3),
        width=st.integers(1, 6),
        modules=st.integers(1, 3),
        ties=st.booleans(),
        seed=st.integers(0, 99),
        training=st.booleans(),
    )
    def test_decisions_agree_with_the_formula(self, spec, lengths, width, modules, ties, seed, training):
        if spec.kind == "top_k" and spec.k > modules + spec.skips:
            modules = 3
        part = router(spec, width, NAMES[:modules], seed=seed).train(training)
        rows = [normal(length, width, seed=seed + place) for place, length in enumerate(lengths)]
        if ties:  # small integers, whose sums and products are exact
            rows = [row.round() for row in rows]
            with torch.no_grad():
                biases = [part.bias, *([part.score_bias] if isinstance(part, SteerableRouter) else [])]
                for tensor in (part.weight, *biases):
                    tensor.copy_(tensor.round())
        part.set_step(seed % 12)
        batch, valid = (
            pad(rows, "middle") if rows else (torch.zeros(0, 4, width).double(), torch.zeros(0, 4, dtype=torch.bool))
        )
        decision = part(batch, valid, valid.cumsum(1) - 1)[0]
        for b, row in enumerate(rows):
            wanted = oracles.choices(part, row, b)
            for t, place in enumerate(valid[b].nonzero()[:, 0].tolist()):
                for m, choice in enumerate(wanted[t]):
                    assert bool(decision.active[b, place, m]) == choice.active
                    torch.testing.assert_close(decision.confidence[b, place, m], choice.confidence)
                    torch.testing.assert_close(decision.p_on[b, place, m], choice.p_on)
        off, on = decision.logits.unbind(-1)
        if draws(spec):  # the logits exclude the noise
            decision = part.eval()(batch, valid, valid.cumsum(1) - 1)[0]
        tied = (on - off).abs() < 1e-9
        assert torch.equal(decision.active & ~tied, (on > off) & ~tied & valid[..., None])
        if spec.kind not in ("top_k", "expert_choice"):  # these kinds break ties
            assert not (decision.active & (on == off)).any()

    @routers(lambda spec: is_learned(spec) and spec.kind != "bernoulli")  # its confidence has zero gradients; see below
    @pytest.mark.parametrize("training", [pytest.param(True, id="training"), pytest.param(False, id="evaluation")])
    def test_gradients_agree_with_the_formula(self, spec, training):
        part, control = scored(spec).train(training), normal(2, 4, 5).requires_grad_()
        part.set_step(4)
        inputs = [control, *part.parameters()]
        rows = [
            [torch.stack([choice.confidence for choice in token]) for token in oracles.choices(part, control[b], b)]
            for b in range(2)
        ]
        by_hand = torch.stack([torch.stack(row) for row in rows])
        torch.testing.assert_close(gradients(part(control)[0].confidence, inputs), gradients(by_hand, inputs))

    # The confidence of routers that sample is constant 1; the test above checks its gradient.
    @routers(lambda spec: is_learned(spec) and not draws(spec))
    def test_gradient_check_in_float64(self, spec):
        part, control = scored(spec), normal(2, 3, 5).requires_grad_()
        parameters = list(part.parameters())

        def confidence(x, *values):
            return torch.func.functional_call(
                part, dict(zip(dict(part.named_parameters()), values, strict=True)), (x,)
            )[0].confidence

        assert torch.autograd.gradcheck(confidence, [control, *parameters])

    @routers(is_learned)
    def test_the_probability_has_a_gradient_and_the_mask_has_none(self, spec):
        part, control = router(spec), normal(1, 4, 5).requires_grad_()
        decision = part(control)[0]
        assert not decision.active.requires_grad
        for name in ("confidence", "p_on"):
            learns = (spec.kind, name) != ("bernoulli", "confidence")  # constant 1 with zero gradients
            found = gradients(getattr(part(control)[0], name), [control, part.weight, part.bias])
            assert all(gradient.isfinite().all() and bool(gradient.any()) == learns for gradient in found)

    @routers(is_learned)
    @given(order=st.permutations(range(3)))
    def test_permuting_the_sub_modules_permutes_the_decisions(self, spec, order):
        part, control = scored(spec).eval(), normal(2, 6, 5)
        other = scored(spec, names=[NAMES[m] for m in order]).eval()
        with torch.no_grad():
            for mine, yours in ((other.weight, part.weight), (other.bias, part.bias)):
                mine.copy_(yours)  # includes the scores of skips
                for place, m in enumerate(order):
                    mine[_rows(spec, place)] = yours[_rows(spec, m)]
        if isinstance(part, SteerableRouter):
            other.score_bias.copy_(part.score_bias[list(order)])
        found, wanted = other(control)[0], part(control)[0]
        assert found.names == tuple(NAMES[m] for m in order)
        for name in FIELDS:
            near(getattr(found, name), getattr(wanted, name)[:, :, list(order)])


def _rows(spec: RouterSpec, place: int) -> list[int]:
    """The rows of the weights that belong to a sub-module."""
    if spec.kind in ("sma", "gumbel", "bernoulli", "explore"):
        return [2 * place, 2 * place + 1]
    return [ON_ROW.get(spec.kind, lambda m: m)(place)]


class TestScoreBias:
    @routers(is_steerable)
    def test_score_bias_shifts_exactly_the_scores_for_on(self, spec):
        part, other, control, shift = (
            scored(spec),
            scored(spec),
            normal(2, 6, 5),
            torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64),
        )
        part.score_bias.copy_(shift)
        clear_score_bias(other)
        with torch.no_grad():
            for m in range(3):
                other.bias[ON_ROW[spec.kind](m)] += shift[m]
        for name in FIELDS:
            near(getattr(part(control)[0], name), getattr(other(control)[0], name), 1e-12)

    @routers(lambda spec: is_steerable(spec) and not (spec.kind == "top_k" and spec.k > 3))
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_large_score_bias_switches_a_sub_module_on_everywhere_or_off(self, spec, place):
        # The trials of `explore` reverse decisions at any score.
        part, control = router(spec).train(spec.kind != "explore"), 10 * normal(2, 50, 5)
        for offset, rate in ((1e4, 1.0), (-1e4, 0.0)):
            part.score_bias[place] = offset
            assert part(control)[0].rate()[place] == rate

    @routers(is_steerable)
    def test_score_bias_is_a_buffer_that_is_saved_and_never_trained(self, spec):
        part = router(spec)
        assert torch.equal(part.state_dict()["score_bias"], part.score_bias)
        assert not part.score_bias.requires_grad
        assert not spec.build(5, NAMES).score_bias.any()
        fresh = spec.build(5, NAMES).double()
        fresh.load_state_dict(part.state_dict())
        same(fresh(normal(1, 9, 5))[0], part(normal(1, 9, 5))[0])

    @routers(is_steerable)
    def test_one_unit_of_score_bias_is_one_unit_of_log_odds(self, spec):
        part, control = router(spec).train(spec.kind != "explore"), normal(1, 5, 5)
        before = part(control)[0].p_on.logit()
        with torch.no_grad():
            part.score_bias[1] += 0.25 * part.temperature
        near(part(control)[0].p_on.logit()[..., 1], before[..., 1] + 0.25)

    @routers(is_steerable)
    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [
            pytest.param(lambda part: part.bfloat16(), torch.float32, id="bfloat16"),
            pytest.param(lambda part: part.to(torch.float16), torch.float32, id="to float16"),
            pytest.param(lambda part: torch.nn.Sequential(part).half()[0], torch.float32, id="inside of a model"),
            pytest.param(lambda part: part.double(), torch.float64, id="double"),
            pytest.param(lambda part: part.double().bfloat16(), torch.float32, id="double and back"),
        ],
    )
    def test_score_bias_is_never_below_float32(self, spec, convert, dtype):
        part = spec.build(5, NAMES)
        part.score_bias.fill_(30.0).add_(2.0**-10)  # bfloat16 would round this to 30
        converted = convert(part)
        assert converted.score_bias.dtype == dtype
        assert (converted.score_bias == 30 + 2.0**-10).all()
        assert dict(converted.named_buffers())["score_bias"] is converted.score_bias
        assert torch.as_tensor(converted.temperature).dtype in (torch.float32, dtype)

    @routers(is_steerable)
    def test_an_old_checkpoint_in_half_precision_gives_a_wide_score_bias(self, spec):
        part = spec.build(5, NAMES).bfloat16()
        part.load_state_dict({name: tensor.bfloat16() for name, tensor in part.state_dict().items()}, assign=True)
        assert part.weight.dtype == torch.bfloat16
        assert part.score_bias.dtype == torch.float32

    @routers(lambda spec: not is_steerable(spec))
    def test_a_router_without_a_score_bias_cannot_be_steered(self, spec):
        part = router(spec)
        assert not hasattr(part, "score_bias")
        assert "score_bias" not in part.state_dict()
        sentence = (
            f"the router kind {spec.kind!r} cannot be steered to a rate; use one that can, such as 'sma', or derive "
            "your own from sma.routers.SteerableRouter"
        )
        with pytest.raises(InputError, match=exactly(sentence)):
            steerable(part)

    @routers(lambda spec: is_steerable(spec) and spec.kind not in ("exclusive", "top_k"))
    def test_independent_sub_modules_can_reach_any_rates_together(self, spec):
        router(spec).check_targets({"attention": 1.0, "mlp": 1.0, "conv": 0.0})
