"""Token shift against its formula, one token after another."""

import torch
from sma import compress
from torch import Tensor

from sma_shift.token_shift import TokenShift, TokenShiftSpec


def by_hand(module: TokenShift, rows: list[Tensor]) -> Tensor:
    """The results of the active tokens of every row, in a loop."""
    results = []
    for row in rows:
        before = torch.zeros_like(module.mix)
        for token in row:
            hidden = module.up.weight @ (module.mix * token + (1 - module.mix) * before)
            results.append(module.down.weight @ hidden.clamp(min=0) ** 2)
            before = token
    return torch.stack(results)


def test_every_token_is_mixed_with_the_active_token_before_it() -> None:
    torch.manual_seed(0)
    module = TokenShiftSpec(hidden_size=5).build(4).double()
    with torch.no_grad():
        module.mix.uniform_()
    x, active = torch.randn(3, 9, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 9) < 0.5
    active[1] = False
    weight = torch.randn(int(active.sum()), 4, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    found, _ = module(compress(x, active))
    wanted = by_hand(module, [row[chosen] for row, chosen in zip(x, active, strict=True)])
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((values * weight).sum(), inputs) for values in (found, wanted)]
    torch.testing.assert_close(*gradients)
