"""Slow reference programs, token by token, for the fast implementations."""

import torch
from torch import Tensor, nn

from sma.modules.conv import Conv
from sma.modules.ema import EMA
from sma.modules.gau import GatedAttentionUnit
from sma.modules.multihead import MultiHead
from sma.positions import RelativeBiasSpec


def recurrence_loop(x: Tensor, decay: Tensor, inward: Tensor, outward: Tensor, truncation: int | None = None) -> Tensor:
    """s_t = q s_{t-1} + b x_t, y_t = sum over n of g s_t, for x (L, D).

    With `truncation=K`, s_t starts from zero and covers the last K inputs only.
    """
    if truncation is not None:
        # All t at once: x_{t - K + 1} enters every s first, x_t last.
        late = torch.cat([x.new_zeros(truncation - 1, x.shape[1]), x])
        states = x.new_zeros(*x.shape, decay.shape[1])
        for step in range(truncation):
            states = decay * states + inward * late[step : step + x.shape[0], :, None]
        return (outward * states).sum(2)
    out, state = [], torch.zeros_like(decay)
    for x_t in x:
        state = decay * state + inward * x_t[:, None]
        out.append((outward * state).sum(1))
    return torch.stack(out)


def ema_loop(module: EMA, x: Tensor) -> Tensor:
    """The damped moving average of one row by the formulas of DESIGN.md 6.2."""
    spec, width = module.spec, x.shape[1]
    out = module.omega * x
    for direction in range(2 if spec.bidirectional else 1):
        rows = slice(direction * width, (direction + 1) * width)
        p = torch.sigmoid(module.delta[rows, :, 0])
        q = 1 - p * torch.sigmoid(module.alpha[rows, :, 0])
        b, g = p * module.beta[rows, :, 0], module.gamma[rows] / spec.state_size**0.5
        line = x if direction == 0 else x.flip(0)
        averaged = recurrence_loop(line, q, b, g, spec.truncation)
        out = out + (averaged if direction == 0 else averaged.flip(0))
    return out


def rotary_loop(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate every pair of channels of x (n, Z) as one complex number; angles are float64."""
    size = x.shape[1]
    out = torch.empty_like(x)
    rows = []
    for row, position in zip(x, positions.tolist(), strict=True):
        pairs = torch.view_as_complex(row.double().reshape(size // 2, 2))
        angles = torch.tensor([position * base ** (-2 * pair / size) for pair in range(size // 2)], dtype=torch.float64)
        rows.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten())
    return torch.stack(rows).to(out.dtype) if rows else out


def weigh_loop(scores: Tensor, weighting: str) -> Tensor:
    """The weights of one query from the scores of the keys in its reach."""
    if weighting == "softmax":
        return (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    if weighting == "relu2":
        return torch.where(scores > 0, scores * scores, 0)
    return (1 + torch.erf((scores - 0.707107) / (0.282095 * 2**0.5))) / 2


def reach(slot: int, count: int, window: int | None, causal: bool) -> list[int]:
    """The slots that the query in `slot` attends to, in a row of `count` tokens."""
    return [
        other
        for other in range(count)
        if (window is None or abs(other - slot) <= window) and not (causal and other > slot)
    ]


def attend_loop(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, causal: bool, weighting: str, bias: Tensor | None = None
) -> Tensor:
    """Attention of one row; `bias` (n, n) is added to the scores."""
    out = []
    for slot in range(q.shape[0]):
        seen = reach(slot, q.shape[0], window, causal)
        scores = k[seen] @ q[slot]
        if bias is not None:
            scores = scores + bias[slot, seen]
        out.append(weigh_loop(scores, weighting) @ v[seen])
    return torch.stack(out)


def bias_loop(table: Tensor, positions: Tensor, distance: str, window: int | None, most: int) -> Tensor:
    """The bias of every pair of one row, from the two layouts of the table in DESIGN.md 6.3."""
    line = positions.tolist()
    rows = []
    for slot, position in enumerate(line):
        if distance == "true_distance":
            entries = [max(-(most - 1), min(most - 1, other - position)) + most - 1 for other in line]
        else:
            assert window is not None
            # Pairs further apart than the table are out of reach, so their bias has no effect.
            entries = [min(max(other - slot + 4 * window - 1, 0), 6 * window - 2) for other in range(len(line))]
        rows.append(table[entries])
    return torch.stack(rows)


def gau_loop(module: GatedAttentionUnit, x: Tensor, positions: Tensor) -> Tensor:
    """The gated attention unit on one row, by the formulas of DESIGN.md 6.3."""
    spec, count = module.spec, x.shape[0]
    hidden = nn.functional.silu(x @ module.in_proj.weight.T + module.in_proj.bias)
    z, gate, v = (
        hidden[:, : spec.query_size],
        hidden[:, spec.query_size : -spec.hidden_size],
        hidden[:, -spec.hidden_size :],
    )
    q, k = (z * module.gain[part] + module.offset[part] for part in (0, 1))
    if spec.position.kind == "rotary":
        q, k = rotary_loop(q, positions), rotary_loop(k, positions)
    if spec.attention == "softmax":
        sizes = [spec.query_size**0.5] * count
    elif spec.window is not None:
        sizes = [float(2 * spec.window if spec.bidirectional else spec.window)] * count
    else:
        sizes = [float(count if spec.bidirectional else slot + 1) for slot in range(count)]
    bias = None
    if isinstance(spec.position, RelativeBiasSpec):
        assert module.bias_table is not None
        bias = bias_loop(module.bias_table, positions, spec.position.distance, spec.window, spec.position.max_positions)
    q = q / torch.tensor(sizes, dtype=q.dtype)[:, None]
    attended = attend_loop(
        q, k, v, window=spec.window, causal=not spec.bidirectional, weighting=spec.attention, bias=bias
    )
    return (attended * gate) @ module.out_proj.weight.T + module.out_proj.bias


def attention_loop(module: MultiHead, x: Tensor, positions: Tensor) -> Tensor:
    """Multi-head softmax attention on one row, head by head and query by query."""
    spec, width = module.spec, module.out_proj.in_features
    size = width // spec.heads
    hidden = x @ module.in_proj.weight.T + module.in_proj.bias
    heads = []
    for head in range(spec.heads):
        q, k, v = (hidden[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        if spec.position.kind == "rotary":
            q, k = rotary_loop(q, positions), rotary_loop(k, positions)
        heads.append(
            attend_loop(
                q / size**0.5, k, v, window=module.cache_size, causal=not spec.bidirectional, weighting="softmax"
            )
        )
    return torch.cat(heads, 1) @ module.out_proj.weight.T + module.out_proj.bias


def conv_loop(module: Conv, x: Tensor) -> Tensor:
    """The depthwise convolution of one row; its last tap, or its middle tap if bidirectional, is the token itself."""
    taps = module.spec.kernel_size
    own = taps // 2 if module.spec.bidirectional else taps - 1
    out = []
    for t in range(x.shape[0]):
        total: Tensor = module.bias
        for tap in range(taps):
            if 0 <= t + tap - own < x.shape[0]:
                total = total + module.weight[:, tap] * x[t + tap - own]
        out.append(nn.functional.silu(total) if module.spec.activation == "silu" else total)
    return torch.stack(out)
