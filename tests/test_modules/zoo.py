"""The sub-modules on which the tests of the whole zoo run."""

import torch

from sma.modules.attention import AttentionSpec
from sma.modules.conv import ConvSpec
from sma.modules.ema import EMASpec
from sma.modules.gau import ChunkedGAUSpec, GAUSpec
from sma.modules.identity import IdentitySpec
from sma.modules.local_attention import LocalAttentionSpec
from sma.modules.mlp import GatedMLPSpec
from sma.modules.s4d import S4DSpec
from sma.positions import RelativeBiasSpec, RotarySpec
from sma.submodule import SubModule, SubModuleSpec
from tests.test_modules.layouts import draw

WIDTH = 4
SLOTS = RelativeBiasSpec(distance="slot_distance")
NEAR = RelativeBiasSpec(max_positions=9)
SPECS: dict[str, SubModuleSpec] = {
    "attention-bidirectional": AttentionSpec(heads=2),
    "attention-causal": AttentionSpec(heads=2, bidirectional=False, position=RotarySpec()),
    "attention-of-small-heads": AttentionSpec(heads=3, head_size=2, bidirectional=False, position=RotarySpec()),
    "chunked-gau": ChunkedGAUSpec(query_size=4, hidden_size=3, window=5, position=NEAR),
    "chunked-gau-causal": ChunkedGAUSpec(
        query_size=4, hidden_size=3, window=4, bidirectional=False, position=RotarySpec()
    ),
    "conv-bidirectional": ConvSpec(kernel_size=5, bidirectional=True),
    "conv-causal": ConvSpec(kernel_size=4, activation="none"),
    "ema-bidirectional": EMASpec(state_size=3),
    "ema-causal": EMASpec(state_size=3, bidirectional=False),
    "ema-causal-truncated": EMASpec(state_size=2, bidirectional=False, truncation=7),
    "gated_mlp": GatedMLPSpec(hidden_size=5),
    "gau-bidirectional": GAUSpec(query_size=4, hidden_size=3, window=3, position=NEAR),
    "gau-bidirectional-all": GAUSpec(query_size=4, hidden_size=3, attention="laplace", position=RotarySpec()),
    "gau-causal": GAUSpec(query_size=4, hidden_size=3, window=3, bidirectional=False, position=SLOTS),
    "gau-causal-all": GAUSpec(query_size=4, hidden_size=3, bidirectional=False, attention="relu2", position=NEAR),
    "identity": IdentitySpec(),
    "local-bidirectional": LocalAttentionSpec(heads=2, window=3),
    "local-causal": LocalAttentionSpec(heads=2, window=5, bidirectional=False, position=RotarySpec()),
    "local-of-large-heads": LocalAttentionSpec(heads=2, head_size=6, window=3),
    "s4d-bidirectional": S4DSpec(state_size=4),
    "s4d-causal": S4DSpec(state_size=6, bidirectional=False),
    "s4d-causal-core": S4DSpec(state_size=4, bidirectional=False, activation="none", mixing="none"),
}


def make(spec: SubModuleSpec, dtype: torch.dtype = torch.float64) -> SubModule:
    torch.manual_seed(0)
    module = draw(spec.build(WIDTH).to(dtype))
    assert isinstance(module, SubModule)
    return module
