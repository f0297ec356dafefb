"""The zoo of sub-modules: one file has one spec, one module and its registration."""

from sma.modules.attention import Attention, AttentionSpec
from sma.modules.conv import Conv, ConvSpec
from sma.modules.ema import EMA, EMASpec
from sma.modules.gau import ChunkedGAU, ChunkedGAUSpec, GatedAttentionUnit, GAUSpec
from sma.modules.identity import Identity, IdentitySpec
from sma.modules.local_attention import LocalAttention, LocalAttentionSpec
from sma.modules.mlp import GatedMLP, GatedMLPSpec
from sma.modules.s4d import S4D, S4DSpec
from sma.moved import moved

__all__ = [
    "EMA",
    "S4D",
    "Attention",
    "AttentionSpec",
    "ChunkedGAU",
    "ChunkedGAUSpec",
    "Conv",
    "ConvSpec",
    "EMASpec",
    "GAUSpec",
    "GatedAttentionUnit",
    "GatedMLP",
    "GatedMLPSpec",
    "Identity",
    "IdentitySpec",
    "LocalAttention",
    "LocalAttentionSpec",
    "S4DSpec",
]

if __name__ == "modules":
    raise ImportError("this folder is a part of sma: write 'from sma.modules… import …' instead of 'modules'")

moved(__name__, {"whole": "full_attention", "windowed": "sliding_window"})
