"""Random draws depend on their keys only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.routers import RandomState, keyed_uniform
from sma.routers.draws import draw_for_tokens
from sma.spec import load_spec
from tests import oracles
from tests.streams import same_bits


def test_draws_are_uniform():
    draws = keyed_uniform(3, torch.arange(20000))
    assert draws.dtype == torch.float64
    assert 0 <= draws.min() < draws.max() < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-squared with 19 degrees of freedom: 1 in 1000


@given(seed=st.integers(0, 2**31 - 1), position=st.integers(0, 2**40), row=st.integers(0, 99), column=st.integers(0, 9))
def test_a_draw_is_splitmix64_of_its_keys(seed, position, row, column):
    draw = keyed_uniform(seed, torch.tensor(row), torch.tensor(position), torch.tensor(column))
    assert draw.item() == oracles.uniform(seed, row, position, column)


@given(
    rows=st.integers(0, 3),
    length=st.integers(0, 4),
    columns=st.integers(0, 3),
    update=st.none() | st.integers(0, 2**40),
)
def test_tokens_draw_by_update_row_position_and_column(rows, length, columns, update):
    keys = [] if update is None else [update]
    draws = draw_for_tokens(torch.zeros(rows, length, columns), None, None, 5, *map(torch.tensor, keys))
    assert draws.shape == (rows, length, columns)
    for b in range(rows):
        for t in range(length):
            assert draws[b, t].tolist() == [oracles.uniform(5, *keys, b, t, m) for m in range(columns)]


def test_streams_draw_by_the_numbers_of_their_rows():
    like, positions, rows = torch.zeros(3, 4, 2), torch.tensor([4, 0, 9, 2]).expand(3, 4), torch.tensor([7, 0, 7])
    draws = draw_for_tokens(like, positions, RandomState(rows), 5)
    assert draws[1, 2].tolist() == [oracles.uniform(5, 0, 9, m) for m in range(2)]
    assert torch.equal(draws[0], draws[2])
    assert not (draws[0] == draws[1]).any()


@pytest.mark.parametrize("rows", [torch.tensor([True, False]), torch.tensor([1])])
def test_a_stream_that_is_reset_keeps_its_row_number(rows):
    state = RandomState(torch.tensor([3, 8]))
    assert same_bits(state.reset(rows), state)


@pytest.mark.parametrize("kind", [{"kind": "random", "rate": 0.5}, {"kind": "bernoulli"}, {"kind": "gumbel"}])
def test_layers_draw_independently_and_a_single_router_draws_as_layer_0(kind):
    layer = {"router": kind, "modules": {"mlp": {"kind": "identity"}}, "bypass": "identity", "activation": "none"}
    spec = {
        "kind": "sequence_encoder",
        "width": 4,
        "encoder": {"kind": "token_embedding", "vocabulary": 5},
        "layers": [{}, layer, layer],
    }
    model = load_spec(spec).build()
    routers = [part.routed.router for part in model.routed_layers if part.routed is not None]
    assert [router.layer_index for router in routers] == [1, 2]
    control = torch.zeros(2, 400, 4)  # every score is 0, so only the draws decide
    first, second, alone = (
        router(control)[0].active for router in (*routers, load_spec(kind, "router").build(4, ["mlp"]))
    )
    assert 0.4 < first.double().mean() < 0.6
    for one, other in ((first, second), (first, alone), (second, alone)):
        assert 0.4 < (one == other).double().mean() < 0.6
    routers[0].layer_index = 0
    assert torch.equal(routers[0](control)[0].active, alone)
