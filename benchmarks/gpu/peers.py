"""Other programs on the same GPU: a transformer, FlexAttention, the authors' algorithm, a compiled layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.count import layer_spec
from benchmarks.gpu import profiled
from benchmarks.gpu.layers import ON_DEVICE
from benchmarks.gpu.measure import Bench, build_layer, products_in, step_of
from benchmarks.gpu.operators import attention_of
from benchmarks.gpu.padded import PaddedLayer
from benchmarks.gpu.results import Record
from sma.kernels import use


class TransformerLayer(nn.Module):
    """A pre-norm layer of a transformer: attention to all tokens, and a feed-forward block of four times the width.

    Args:
        width: channels of every token.
        heads: number of attention heads.
        causal: whether tokens attend to earlier ones only.
        flash: whether the attention must be flash attention.
    """

    def __init__(self, width: int, heads: int, causal: bool, flash: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.flash = heads, causal, flash
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, D)."""
        q, k, v = self.in_proj(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        backends = [SDPBackend.FLASH_ATTENTION] if self.flash else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out_proj(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return mixed


def run(bench: Bench) -> None:
    """Measure the peers in the order of their importance."""
    names = ("text",) if bench.toy else ("text", "image")
    for name in names:
        bench.attempt(f"transformer {name}", partial(_transformer, bench, name, False))
    for name in names:
        bench.attempt(f"authors {name}", partial(_authors, bench, name))
    bench.attempt("flex attention", partial(_flex, bench, False))
    bench.attempt("flex attention peer", partial(_flex, bench, True))
    bench.attempt("compiled static", partial(_compiled, bench))
    bench.attempt("compiled transformer text", partial(_transformer, bench, "text", True))
    # Last, because a profile slows down everything after it in the process.
    for name in names:
        bench.attempt(f"transformer {name}{ON_DEVICE}", partial(_on_device, bench, _transformer_step, name))
        bench.attempt(f"authors {name}{ON_DEVICE}", partial(_on_device, bench, _authors_step, name))


def _on_device(bench: Bench, make: Callable[[Bench, str], Callable[[], object]], name: str) -> Record:
    with use("plain" if bench.toy else "triton"), products_in("tf32"):
        return {"device_milliseconds": profiled.device_milliseconds(bench, make(bench, name))}


def _transformer(bench: Bench, name: str, compiled: bool) -> Record:
    if compiled:
        bench.require_gpu("torch.compile")
    step = _transformer_step(bench, name, compiled)
    return {"milliseconds": bench.milliseconds(step, 1.0), "peak_gigabytes": bench.peak_gigabytes(step)}


def _transformer_step(bench: Bench, name: str, compiled: bool = False) -> Callable[[], object]:
    shape = bench.shapes[name]
    width, spec = layer_spec(shape.model)
    causal = spec.backbone is not None and not spec.backbone.bidirectional  # type: ignore[attr-defined]
    layer: nn.Module = TransformerLayer(width, 4, causal, not bench.toy).to(bench.device)
    inputs = [bench.random(shape.batch, shape.length, width).requires_grad_() for _ in range(1 if bench.toy else 3)]
    return step_of(bench, torch.compile(layer) if compiled else layer, inputs, "bf16")


def _authors_step(bench: Bench, name: str) -> Callable[[], object]:
    layer, inputs, _ = build_layer(bench, bench.shapes[name], 0.3)
    return step_of(bench, PaddedLayer(layer).train(), inputs, "tf32")


def _authors(bench: Bench, name: str) -> Record:
    """Time and memory at one rate, and the difference of its results from ours, without dropout."""
    with use("plain" if bench.toy else "triton"), products_in("tf32"):
        layer, inputs, rate = build_layer(bench, bench.shapes[name], 0.3)
        peer = PaddedLayer(layer).train()
        step = step_of(bench, peer, inputs, "tf32")
        figures: Record = {
            "milliseconds": bench.milliseconds(step, 1.0),
            "peak_gigabytes": bench.peak_gigabytes(step),
            "real_rate": rate,
        }
        peer.eval()
        layer.eval()
        with torch.no_grad(), products_in("fp32"):
            difference = float((peer(inputs[0]) - layer(inputs[0]).hidden).abs().max())
    return {**figures, "difference": difference}


def _flex(bench: Bench, attend_flexibly: bool) -> Record:
    """Sliding-window attention of Text in bfloat16 without a bias: ours, and FlexAttention on the same tokens."""
    shape = bench.shapes["text"]
    given = attention_of(bench, shape._replace(batch=min(shape.batch, 14)), torch.bfloat16, biased=False)
    if attend_flexibly:
        bench.require_gpu("FlexAttention")
        q, k, v, *_ = given.leaves
        forward: Callable[[], Tensor] = _flexible(given.spec.window or 0, q, k, v)
    else:
        forward = given.forward
    weight = torch.randn_like(given.leaves[2])

    def step() -> None:
        torch.autograd.grad(forward(), given.leaves[:3], weight)

    with use("plain" if bench.toy else "triton"):
        return {
            "forward": bench.device_milliseconds(forward),
            "step": bench.device_milliseconds(step),
            "tokens": sum(given.lengths),
        }


def _flexible(window: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention within a window, on all tokens as one row; separate rows would only remove pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= window

    count = q.shape[0]
    mask = create_block_mask(near, None, None, count, count, device=q.device.type)
    attend = torch.compile(flex_attention)
    # The default tiles of FlexAttention for 256 channels of values do not fit into shared memory.
    options: Any = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
    options |= {"num_stages": 1, "num_warps": 4}

    def run() -> Tensor:
        return attend(q[None, None], k[None, None], v[None, None], block_mask=mask, scale=1.0, kernel_options=options)[
            0, 0
        ]

    return run


def _compiled(bench: Bench) -> Record:
    bench.require_gpu("torch.compile")
    with use("triton"), products_in("tf32"):
        layer, inputs, rate = build_layer(bench, bench.shapes["text"], 0.3)
        step = step_of(bench, torch.compile(layer), inputs, "tf32", capacity=0.375)
        return {"milliseconds": bench.milliseconds(step), "real_rate": rate}
