"""Diagonal state-space model S4D: a bank of damped oscillators per channel."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.init import reset_linear_
from sma.modules.cache import Cache
from sma.modules.complex_recurrence import ComplexRecurrence, minus_one
from sma.modules.long_convolution import convolution_macs, long_convolution
from sma.modules.scan import advance, causal_scan, kernel_macs, scan_macs
from sma.modules.state_space import Advanced, StateSpace
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs, State, SubModuleSpec


@register
class S4DSpec(SubModuleSpec):
    """Spec of `S4D`; `activation: none, mixing: none` is the linear core, the counterpart of `ema` as a backbone."""

    kind: Literal["s4d"] = "s4d"
    state_size: int = Field(
        default=64, ge=2, le=1024, description="real states per channel, N, even: N/2 complex ones and their conjugates"
    )
    bidirectional: bool = Field(
        default=True, description="read the same oscillators from the right too; false is causal"
    )
    initial: Literal["lin", "inv"] = Field(default="lin", description="frequencies at the start: S4D-Lin or S4D-Inv")
    dt_min: float = Field(default=1e-3, gt=0.0, description="shortest initial step of a channel, per token")
    dt_max: float = Field(
        default=1e-1, gt=0.0, description="longest initial step of a channel; steps are drawn log-uniformly"
    )
    activation: Literal["gelu", "none"] = Field(default="gelu", description="applied to the result of the oscillators")
    mixing: Literal["glu", "linear", "none"] = Field(
        default="glu", description="map from channels to channels after the activation"
    )

    @model_validator(mode="after")
    def _even_and_ordered(self) -> Self:
        if self.state_size % 2:
            raise ValueError(f"state_size={self.state_size} must be even: complex states come in conjugate pairs")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} must be at most dt_max={self.dt_max}")
        return self

    def build(self, width: int) -> "S4D":
        return S4D(self, width)

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def pairs(self) -> int:
        """Complex states per channel, P = N / 2."""
        return self.state_size // 2

    @property
    def mixed_width(self) -> int:
        """Outputs of the mixing map per channel: 2 for a gated linear unit, 0 without a map."""
        return {"glu": 2, "linear": 1, "none": 0}[self.mixing]

    def num_parameters(self, width: int) -> int:
        core = width * (2 * self.pairs + 2 * self.directions * self.pairs + 2)
        return core + self.mixed_width * width * (width + 1)

    def macs(self, width: int, tokens: int) -> MACs:
        if tokens == 0:
            return MACs()
        mixing = self.mixed_width * tokens * width * width
        if self.bidirectional:
            kernels = kernel_macs(width, self.state_size, tokens)
            return MACs(matmul=kernels + mixing, fft=convolution_macs(width, tokens, tokens))
        return MACs(matmul=scan_macs(width, tokens, self.state_size) + mixing)


class S4D(StateSpace):
    r"""A diagonal state-space model per channel, then an activation and a map over the channels.

    $s' = A s + x$, $y = 2\,\mathrm{Re} \sum_p C_p s_p + D x$ with $A_p = -e^{\alpha_p} + i \omega_p$, held constant for
    a step $\Delta$ (zero-order hold): $q = e^{\Delta A}$, $s_t = q s_{t-1} + x_t$, $y_t = 2\,\mathrm{Re} \sum_p C_p
    \frac{q_p - 1}{A_p} s_{t,p} + D x_t$. B is part of C. A bidirectional one adds a second readout C of the same
    oscillators run from the right; both include the token itself. The result is $\mathrm{mix}(\mathrm{gelu}(y))$, where
    the gated linear unit is $(W_1 y + b_1) \odot \sigma(W_2 y + b_2)$.

    Routed, it runs over the slots: a step $\Delta$ passes per *active* token.

    Args:
        spec: states per channel, direction, initial values, activation and mixing.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. With P = N / 2: `log_dt` is `(D,)`, `log_a_re` ($\alpha$) and `a_im`
        ($\omega$) `(D, P)`, `c` `(D or 2D, P, 2)`, real and imaginary part, the forward set first; `skip` (D above)
        `(D,)`; `mix` holds W_1 above W_2. The oscillators are discretised in float64 and run in float32 or wider;
        results have the dtype of the tokens.

    Initial values are the authors': $\Delta$ log-uniform, $A_p = -\frac12 + i \pi p$ (`lin`) or $-\frac12 + i
    \frac{N}{\pi}(\frac{N}{2p + 1} - 1)$ (`inv`), C and D standard normal; those of `mix` are truncated normal, standard
    deviation 0.02. The authors train $\Delta$ and A at a smaller learning rate and without weight decay.

    Reference:
        Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893.
    """

    spec: S4DSpec

    def __init__(self, spec: S4DSpec, width: int) -> None:
        super().__init__(spec, width, S4DState, (width, 2, spec.pairs))
        self.log_dt = nn.Parameter(torch.empty(width))
        self.log_a_re = nn.Parameter(torch.empty(width, spec.pairs))
        self.a_im = nn.Parameter(torch.empty(width, spec.pairs))
        self.c = nn.Parameter(torch.empty(spec.directions * width, spec.pairs, 2))
        self.skip = nn.Parameter(torch.empty(width))
        self.mix = nn.Linear(width, spec.mixed_width * width) if spec.mixed_width else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their initial values, which are drawn or follow from the spec."""
        nn.init.uniform_(self.log_dt, math.log(self.spec.dt_min), math.log(self.spec.dt_max))
        nn.init.constant_(self.log_a_re, math.log(0.5))
        number = torch.arange(self.spec.pairs, dtype=torch.float64)
        if self.spec.initial == "lin":
            frequency = math.pi * number
        else:
            frequency = self.spec.state_size / math.pi * (self.spec.state_size / (2 * number + 1) - 1)
        self.a_im.copy_(frequency.expand_as(self.a_im))
        nn.init.normal_(self.c, std=math.sqrt(0.5))  # of each part: the complex number has a variance of 1
        nn.init.normal_(self.skip)
        if self.mix is not None:
            reset_linear_(self.mix)

    def recurrences(self, dtype: torch.dtype) -> list[ComplexRecurrence]:
        """The discretised recurrence of each direction, forward first; the directions differ only in their readout."""
        # In float64: these are few numbers, and q is raised to the length of the row.
        dt = torch.exp(self.log_dt.double())[:, None]
        # A decay of at least 1e-12 per token, so that A is never 0 and the quotient below is finite.
        log_decay = (-dt * torch.exp(self.log_a_re.double())).clamp(max=-1e-12)
        angle = dt * self.a_im.double()
        held = dt * torch.complex(*minus_one(log_decay, angle)) / torch.complex(log_decay, angle)
        readout = [torch.view_as_complex(part) * held for part in self.c.double().split(self.width)]
        outward = [torch.cat([2 * part.real, -2 * part.imag], dim=-1).to(dtype) for part in readout]
        return [ComplexRecurrence(log_decay, angle, part) for part in outward]

    def _run(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        ahead, *reverse = self.recurrences(x_BSD.dtype)
        skip = self.skip.to(x_BSD.dtype)
        if reverse:
            return long_convolution(x_BSD, *ahead.kernels(reverse[0], x_BSD.shape[1]), skip)
        return causal_scan(x_BSD, ahead) + skip * x_BSD

    def _advance(self, x_BSD: Tensor, tokens: Ragged, before: "S4DState") -> Advanced:
        (ahead,) = self.recurrences(x_BSD.dtype)
        scanned = advance(x_BSD, tokens.lengths, ahead, before.hidden.to(x_BSD.dtype).flatten(2))
        return Advanced(scanned.out + self.skip.to(x_BSD.dtype) * x_BSD, scanned.final, None)

    def _state(self, hidden: Tensor, recent: Cache | None) -> "S4DState":
        return S4DState(hidden)

    def _core(self) -> Iterable[nn.Parameter]:
        return (parameter for name, parameter in self.named_parameters() if not name.startswith("mix."))

    def _mixed(self, y_TD: Tensor) -> Tensor:
        if self.spec.activation == "gelu":
            y_TD = nn.functional.gelu(y_TD)
        if self.mix is None:
            return y_TD
        mixed: Tensor = self.mix(y_TD)
        return nn.functional.glu(mixed, dim=-1) if self.spec.mixing == "glu" else mixed


@register_output
@dataclass(frozen=True)
class S4DState(State):
    """State of the oscillators of every row.

    Attributes:
        hidden: real parts of s, then imaginary parts, in float32 or wider.
    """

    hidden: Float[Tensor, "B D 2 P"]
