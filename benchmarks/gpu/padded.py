"""A reimplementation of the authors' algorithm for a layer, as a baseline and a reference.

It has the parameters and results of `RoutedLayer`, and the algorithm of the published implementation: the kernel of the
moving average is a tensor of (D, N, L) numbers; active tokens are padded to the batch's longest row; queries in chunks
of W attend to the keys of three chunks (causal: of two).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from sma.bypass import LinearBypass
from sma.kernels.weighting import weigh
from sma.layer import RoutedLayer
from sma.modules.ema import EMA, EMASpec
from sma.modules.gau import GatedAttentionUnit
from sma.routers import SMARouter


class PaddedLayer(nn.Module):
    """A layer with an `ema`, the router `sma` and one `gau` with a window, run by the authors' algorithm.

    Args:
        layer: the layer with the parameters.
    """

    def __init__(self, layer: RoutedLayer) -> None:
        super().__init__()
        if layer.routed is None or layer.bypass is None or layer.norm is None:
            raise TypeError("the layer needs a norm, a linear bypass and a routed attention")
        self.layer = layer
        self.average = cast(EMA, layer.backbone)
        self.router = cast(SMARouter, layer.routed.router)
        self.unit = cast(GatedAttentionUnit, next(iter(layer.routed.submodules.values())))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, D)."""
        spec, layer = self.layer.spec, self.layer
        norm, bypass = cast(nn.Module, layer.norm), cast(LinearBypass, layer.bypass)
        first = spec.norm is not None and spec.norm.place == "pre"
        mixed = nn.functional.silu(self._average(norm(x) if first else x).to(x.dtype))
        mixed = nn.functional.dropout(mixed, spec.dropout, self.training)
        scores = nn.functional.linear(mixed.float(), self.router.weight, self.router.bias)
        p = torch.softmax(scores / self.router.log_temperature.exp(), -1)
        active = scores[..., 1] > scores[..., 0]
        count = active.sum(1)
        longest = int(count.max())
        order = active.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
        real = torch.arange(longest, device=x.device) < count[:, None]
        chosen = mixed.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        result = self._attend(chosen.where(real[..., None], 0), order, real)
        on_sum = spec.dropout_on == "sum"
        result = nn.functional.dropout(result, spec.dropout, self.training and not on_sum)
        weighted = result * (p.amax(-1).gather(1, order) * real)[..., None]
        routed = torch.zeros_like(x).scatter(1, order[..., None].expand_as(weighted), weighted.to(x.dtype))
        total = routed + nn.functional.linear(mixed, bypass.weight, bypass.bias)
        out = nn.functional.silu(x + nn.functional.dropout(total, spec.dropout, self.training and on_sum))
        return out if first else cast(Tensor, norm(out))

    def _average(self, x: Tensor) -> Tensor:
        spec: EMASpec = self.average.spec
        length, parts = x.shape[1], self.average.recurrences(torch.float32)
        taps = min(length, spec.truncation or length)
        powers = torch.exp(parts.log_decay[..., None] * torch.arange(taps, device=x.device))  # (S, D, N, L)
        kernels = torch.einsum("sdn,sdnl->sdl", parts.inward * parts.outward, powers)
        spectrum = torch.fft.rfft(x.transpose(1, 2).float(), n=2 * length)
        total = torch.fft.rfft(kernels[0], n=2 * length)
        if spec.directions == 2:
            total = total + torch.fft.rfft(kernels[1], n=2 * length).conj()
        y = torch.fft.irfft(spectrum * total, n=2 * length)[..., :length].transpose(1, 2)
        return y + x * self.average.omega

    def _attend(self, x: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        unit, spec = self.unit, self.unit.spec
        window, length = cast(int, spec.window), x.shape[1]
        chunks = max(1, -(-length // window))
        more = chunks * window - length
        x, positions = nn.functional.pad(x, (0, 0, 0, more)), nn.functional.pad(positions, (0, more))
        real = nn.functional.pad(real, (0, more))
        hidden = nn.functional.silu(unit.in_proj(x))
        z, gate, v = hidden.split([spec.query_size, spec.hidden_size, spec.hidden_size], -1)
        q, k = (z * unit.gain[i].to(z.dtype) + unit.offset[i].to(z.dtype) for i in range(2))
        if spec.position.turns:
            flat = spec.position.turn(torch.stack([q, k], 2).flatten(0, 1), positions.flatten())
            q, k = flat.unflatten(0, x.shape[:2]).unbind(2)
        causal = not spec.bidirectional
        scale = spec.query_size**-0.5 if spec.attention == "softmax" else 1 / (window if causal else 2 * window)
        v = nn.functional.dropout(v, spec.value_dropout, self.training)
        reach = (1,) if causal else (1, -1)

        def cut(part: Tensor) -> Tensor:
            return part.unflatten(1, (chunks, window))

        def around(part: Tensor) -> Tensor:
            """The chunk before, the own one and the next: (B, n, 3 W, …)."""
            own = cut(part)
            moved = {way: torch.zeros_like(own) for way in reach}
            moved[1][:, 1:] = own[:, :-1]
            if -1 in moved:
                moved[-1][:, :-1] = own[:, 1:]
            return torch.cat([moved[1], own, *(moved[way] for way in reach[1:])], 2)

        scores = torch.einsum("bnqz,bnkz->bnqk", cut(q * scale), around(k)).float()
        slots = torch.arange(-window, scores.shape[3] - window, device=x.device)
        distance = slots - torch.arange(window, device=x.device)[:, None]
        ok = around(real)[:, :, None] & (distance.abs() <= window) & (distance <= (0 if causal else math.inf))
        if unit.bias_table is not None:
            place = distance if spec.position.over_slots else around(positions)[:, :, None] - cut(positions)[..., None]
            center = spec.position.table_center(window)
            scores = scores + unit.bias_table[(place + center).clamp(0, unit.bias_table.shape[0] - 1)]
        ok = ok | (distance == 0)  # a row of -inf would give NaN
        weights = weigh(scores.masked_fill(~ok, -math.inf), spec.attention)
        weights = nn.functional.dropout(weights, spec.attention_dropout, self.training)
        out = torch.einsum("bnqk,bnkh->bnqh", weights.to(v.dtype), around(v)).flatten(1, 2)
        result: Tensor = unit.out_proj(out * gate)[:, :length]
        return result
