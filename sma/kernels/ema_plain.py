"""The EMA scan in plain PyTorch: products inside chunks where it is causal, a Fourier transform where it is not."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.kernels.chunks import along, chunk_of, decayed, diagonal_sums, exponents, inside, powers, toeplitz
from sma.kernels.fourier import circular_kernel, convolve, convolve_backward, fast_length, put_transposed


def forward(
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `sma.kernels.ema.ema`; the last result is what `backward` needs."""
    wide, length = _read(x, lengths).to(log_decay.dtype), x.shape[1]
    if log_decay.shape[0] == 1:
        scan = _Scan.of(length, log_decay[0], weight[0], truncation)
        y, end, saved = scan.forward(wide, skip, carried, lengths)
    else:
        kernel = Kernel.of(min(length, truncation or length), log_decay.flatten(0, 1), weight.flatten(0, 1))
        ahead, reverse = kernel.taps.chunk(2)
        y, spectra = convolve(wide, circular_kernel(ahead, reverse, skip, length))
        saved = [kernel.coarse, kernel.fine, *spectra]  # powers are cheaper to keep than to raise again
        end = wide.new_empty(0)
    return _read(y, lengths).to(x.dtype), end, saved


def backward(
    grad: Tensor,
    end_grad: Tensor,
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, weight, skip and carried, the last one empty where there is none."""
    wide, length = _read(grad, lengths).to(log_decay.dtype), grad.shape[1]
    if log_decay.shape[0] == 1:
        scan = _Scan.of(length, log_decay[0], weight[0], truncation)
        x_grad, *gradients, carried_grad = scan.backward(wide, end_grad, skip, carried, lengths, saved)
        decay_grad, weight_grad, skip_grad = (each for each in gradients)
        return _read(x_grad, lengths).to(x.dtype), decay_grad[None], weight_grad[None], skip_grad, carried_grad
    taps = min(length, truncation or length)
    coarse, fine, *spectra = saved
    x_grad, kernel_grad, skip_grad = convolve_backward(wide, spectra, fast_length(length + taps - 1), taps)
    kernel = Kernel(coarse, fine, weight.flatten(0, 1), taps)
    decay_grad, weight_grad = (
        each.reshape(log_decay.shape).contiguous() for each in kernel.backward(kernel_grad.flatten(0, 1))
    )
    return x_grad.to(x.dtype), decay_grad, weight_grad, skip_grad, wide.new_empty(0)


def _read(x_BLD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """A sequence whose values after the end of a row are 0."""
    if lengths_B is None:
        return x_BLD
    return x_BLD.where((torch.arange(x_BLD.shape[1], device=x_BLD.device) < lengths_B[:, None])[..., None], 0)


class Kernel(NamedTuple):
    r"""The impulse response $k_l = \sum_n w q^l$ for l = 0 … taps - 1.

    $q^{iC + j} = q^{iC} q^j$ with $C \approx \sqrt{taps}$ makes it one batched product, without a (D, N, taps) tensor.
    """

    coarse: Float[Tensor, "D N O"]
    fine: Float[Tensor, "D N C"]
    weight: Float[Tensor, "D N"]
    size: int

    @staticmethod
    def of(count: int, log_decay: Float[Tensor, "D N"], weight: Float[Tensor, "D N"]) -> "Kernel":
        """The kernel of `count` taps."""
        outer, inner = Kernel.shape(count)
        return Kernel(powers(log_decay, outer, inner), powers(log_decay, inner), weight, count)

    @staticmethod
    def shape(count: int) -> tuple[int, int]:
        """Numbers of coarse and of fine powers of a kernel of `count` taps, O and C."""
        inner = max(1, math.isqrt(count))
        return -(-count // inner), inner

    @property
    def taps(self) -> Float[Tensor, "D K"]:
        """The impulse response."""
        weighted = self.coarse * self.weight[..., None]
        return (weighted.transpose(1, 2) @ self.fine).flatten(1)[:, : self.size]

    def backward(self, grad: Float[Tensor, "D K"]) -> tuple[Float[Tensor, "D N"], Float[Tensor, "D N"]]:
        """Gradients of log q and w."""
        outer, inner = self.coarse.shape[2], self.fine.shape[2]
        grad = torch.nn.functional.pad(grad, (0, outer * inner - self.size)).unflatten(1, (outer, inner))
        coarse_grad = (grad @ self.fine.transpose(1, 2)).transpose(1, 2) * self.coarse
        fine_grad = ((self.coarse * self.weight[..., None]) @ grad) * self.fine
        from_coarse = coarse_grad @ exponents(self.coarse, outer, inner) * self.weight
        return from_coarse + fine_grad @ exponents(self.fine, inner), coarse_grad.sum(-1)


class _Term(NamedTuple):
    """Inputs of a scan, and their factors: 1, or -q^K for those that leave a truncated kernel."""

    inputs: Float[Tensor, "D M C"]
    factor: Float[Tensor, "D N"] | None

    def scaled(self, values: Tensor) -> Tensor:
        """Values times the factors; axes between the channels and the states are broadcast."""
        return values if self.factor is None else values * along(self.factor, values)


class _Scan(NamedTuple):
    """A causal scan in chunks of C tokens: products inside chunks, states passed between them.

    A later input never changes an earlier output, not even by rounding or by a NaN, as it would in a Fourier transform.
    With r the state whose inputs have the factor 1, a chunk yields y = X T(k) + E P and r_{j+1} = q^C r_j + X a. Here P
    holds 1, q, … q^(C-1), the impulse response is k = w P, the weights a are P from its end, and E_j = w q r_j +
    q^(jC) h with the carried h. M = B J is the number of chunks of all rows.
    """

    log_decay: Float[Tensor, "D N"]
    weight: Float[Tensor, "D N"]
    powers: Float[Tensor, "D N C"]
    late: int | None

    @staticmethod
    def of(length: int, log_decay: Tensor, weight: Tensor, truncation: int | None) -> "_Scan":
        late = truncation if truncation is not None and truncation < length else None
        return _Scan(log_decay, weight, powers(log_decay, chunk_of(length)), late)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, C."""
        return self.powers.shape[2]

    def forward(
        self, x_BLD: Tensor, skip_D: Tensor, carried_BDN: Tensor | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Results, r at the ends of rows, and what `backward` needs: the inputs, and r before chunks and at the end."""
        length = x_BLD.shape[1]
        x_DBJC = self._cut(x_BLD)
        terms, shape = self._terms(x_DBJC), x_DBJC.shape[1:3]
        out, *others = (inside(term.inputs, self._kernel(term)) for term in terms)
        for other in others:
            out += other
        states, end = x_BLD.new_empty(0), x_BLD.new_empty(0)
        if shape[1] > 1 or carried_BDN is not None:
            added, *others = (term.scaled(term.inputs @ self._arriving) for term in terms)
            for other in others:
                added += other
            states = self._accumulate(torch.nn.functional.pad(added.unflatten(1, shape), (0, 0, 1, 0)))
            if carried_BDN is not None:
                end = torch.zeros_like(carried_BDN) if length == 0 else self._end(states, x_DBJC, length, lengths_B)
            out += self._entering(states, carried_BDN).flatten(1, 2) @ self.powers
        return _joined(out.unflatten(1, shape), length).addcmul_(x_BLD, skip_D), end, [x_DBJC, states]

    def backward(
        self,
        grad_BLD: Tensor,
        end_grad_BDN: Tensor,
        skip_D: Tensor,
        carried_BDN: Tensor | None,
        lengths_B: Tensor | None,
        saved: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Gradients of x, log q, w, the skip weights and the carried states."""
        x_DBJC, states = saved
        length, shape = grad_BLD.shape[1], x_DBJC.shape[1:3]
        terms, grad_DMC = self._terms(x_DBJC), self._cut(grad_BLD).flatten(1, 2)
        sums = _Sums(*map(torch.zeros_like, (self.log_decay, self.weight, self.powers)))
        skip_grad = (grad_DMC * terms[0].inputs).sum((1, 2))
        added_grad, carried_grad = None, grad_BLD.new_empty(0)
        input_grads = [self._inside_backward(term, grad_DMC, sums) for term in terms]
        if states.ndim > 1:
            before_grad, carried_grad = self._entering_backward(states, carried_BDN, grad_DMC, sums)
            if carried_BDN is not None and length:
                end_grad = end_grad_BDN.transpose(0, 1)
                self._end_backward(end_grad, states, x_DBJC, length, lengths_B, before_grad, input_grads[0], sums)
            # The gradient of a state includes those of all later states. The inputs of chunk j affect r_{j+1}.
            added_grad = self._accumulate(before_grad.flip(2)).flip(2)[:, :, 1:]
            over_chunk = self.chunk * torch.exp(self.log_decay * self.chunk)
            sums.decay.addcmul_((states[:, :, :-1] * added_grad).sum((1, 2)), over_chunk)
            for term, input_grad in zip(terms, input_grads, strict=True):
                self._arriving_backward(term, added_grad.flatten(1, 2), input_grad, sums)
        x_grad, *late_grads = (each.unflatten(1, shape).flatten(2) for each in input_grads)
        for late_grad in late_grads:
            x_grad[..., : -(self.late or 0)] += late_grad[..., self.late :]
        sums.decay.add_((sums.powers * self.powers) @ exponents(self.powers, self.chunk))
        x_grad_BLD = _joined(x_grad.unflatten(2, (shape[1], self.chunk)), length).addcmul_(grad_BLD, skip_D)
        return x_grad_BLD, sums.decay, sums.weight, skip_grad, carried_grad

    @property
    def _arriving(self) -> Float[Tensor, "D C N"]:
        return self.powers.flip(-1).transpose(1, 2)

    @property
    def _late_factor(self) -> Float[Tensor, "D N"]:
        return -torch.exp(self.log_decay * (self.late or 0))

    def _cut(self, x_BLD: Tensor) -> Float[Tensor, "D B J C"]:
        rows, length, channels = x_BLD.shape
        chunks = -(-length // self.chunk)
        into = x_BLD.new_empty(channels, rows, chunks * self.chunk)
        into[..., length:] = 0
        into[..., :length] = x_BLD.permute(2, 0, 1)
        return into.unflatten(2, (chunks, self.chunk))

    def _terms(self, x_DBJC: Tensor) -> list[_Term]:
        terms = [_Term(x_DBJC.flatten(1, 2), None)]
        if self.late is not None:
            line = x_DBJC.flatten(2)
            late = torch.nn.functional.pad(line, (self.late, 0))[..., : line.shape[2]]
            terms.append(_Term(late.unflatten(2, x_DBJC.shape[2:]).flatten(1, 2), self._late_factor))
        return terms

    def _kernel(self, term: _Term) -> Float[Tensor, "D C"]:
        return (term.scaled(self.weight)[:, None] @ self.powers).squeeze(1)

    def _inside_backward(self, term: _Term, grad_DMC: Tensor, sums: "_Sums") -> Float[Tensor, "D M C"]:
        kernel_grad = diagonal_sums(term.inputs.transpose(1, 2) @ grad_DMC)
        sums.powers.addcmul_(term.scaled(self.weight)[..., None], kernel_grad[:, None])
        weight_grad = (self.powers @ kernel_grad[..., None]).squeeze(-1)
        sums.weight.add_(term.scaled(weight_grad))
        self._factor_backward(term, self.weight * weight_grad, sums)
        return grad_DMC @ toeplitz(self._kernel(term)).transpose(1, 2)

    def _arriving_backward(self, term: _Term, grad_DMN: Tensor, input_grad: Tensor, sums: "_Sums") -> None:
        if term.factor is not None:
            self._factor_backward(term, ((term.inputs @ self._arriving) * grad_DMN).sum(1), sums)
        scaled = term.scaled(grad_DMN)
        input_grad += scaled @ self._arriving.transpose(1, 2)
        sums.powers.add_((scaled.transpose(1, 2) @ term.inputs).flip(-1))

    def _factor_backward(self, term: _Term, grad_DN: Tensor, sums: "_Sums") -> None:
        if term.factor is not None and self.late is not None:
            sums.decay.addcmul_(grad_DN, term.factor, value=self.late)

    def _over_chunks(self, chunks: int) -> Float[Tensor, "D 1 J N"]:
        """The decay from the beginning of a row to that of each chunk."""
        return powers(self.log_decay, chunks, self.chunk).transpose(1, 2)[:, None]

    def _entering(self, states: Tensor, carried_BDN: Tensor | None) -> Float[Tensor, "D B J N"]:
        """Contribution of every state to the first output of each chunk."""
        before = states[:, :, :-1] * (self.weight * torch.exp(self.log_decay))[:, None, None]
        if carried_BDN is None:
            return before
        return before.addcmul_(carried_BDN.transpose(0, 1)[:, :, None], self._over_chunks(before.shape[2]))

    def _entering_backward(
        self, states: Tensor, carried_BDN: Tensor | None, grad_DMC: Tensor, sums: "_Sums"
    ) -> tuple[Float[Tensor, "D B J1 N"], Tensor]:
        entering, decay = self._entering(states, carried_BDN), torch.exp(self.log_decay)
        sums.powers.add_(entering.flatten(1, 2).transpose(1, 2) @ grad_DMC)
        grad = (grad_DMC @ self.powers.transpose(1, 2)).unflatten(1, entering.shape[1:3])
        pairs = (states[:, :, :-1] * grad).sum((1, 2)) * decay
        sums.weight.add_(pairs)
        sums.decay.addcmul_(self.weight, pairs)
        before_grad = torch.nn.functional.pad(grad * (self.weight * decay)[:, None, None], (0, 0, 0, 1))
        if carried_BDN is None:
            return before_grad, grad.new_empty(0)
        chunks = entering.shape[2]
        grad = grad * self._over_chunks(chunks)
        tokens = exponents(grad, chunks, self.chunk)[:, None]
        sums.decay.add_(((grad * tokens).sum(2) * carried_BDN.transpose(0, 1)).sum(1))
        return before_grad, grad.sum(2).transpose(0, 1).contiguous()

    def _ends(self, x_DBJC: Tensor, length: int, lengths_B: Tensor | None) -> "_Ends":
        lengths = torch.full(x_DBJC.shape[1:2], length, device=x_DBJC.device) if lengths_B is None else lengths_B
        whole = lengths // self.chunk
        at = lengths[:, None] - self.chunk + torch.arange(self.chunk, device=x_DBJC.device)
        return _Ends(whole, (lengths % self.chunk)[:, None], at.clamp(min=0), at >= (whole * self.chunk)[:, None])

    def _end(self, states: Tensor, x_DBJC: Tensor, length: int, lengths_B: Tensor | None) -> Float[Tensor, "B D N"]:
        ends = self._ends(x_DBJC, length, lengths_B)
        before, since = ends.before(states), ends.since(x_DBJC)
        return (
            (decayed(before, self.log_decay[:, None] * ends.rest) + since @ self._arriving).transpose(0, 1).contiguous()
        )

    def _end_backward(
        self,
        grad_DBN: Tensor,
        states: Tensor,
        x_DBJC: Tensor,
        length: int,
        lengths_B: Tensor | None,
        before_grad: Tensor,
        input_grad: Tensor,
        sums: "_Sums",
    ) -> None:
        ends = self._ends(x_DBJC, length, lengths_B)
        before, since = ends.before(states), ends.since(x_DBJC)
        decayed = grad_DBN * torch.exp(self.log_decay[:, None] * ends.rest)
        sums.decay.add_((decayed * before * ends.rest).sum(1))
        sums.powers.add_((grad_DBN.transpose(1, 2) @ since).flip(-1))
        before_grad.scatter_add_(2, ends.of_states(states), decayed[:, :, None])
        since_grad = (grad_DBN @ self._arriving.transpose(1, 2)).where(ends.real, 0)
        input_grad.view(x_DBJC.shape).flatten(2).scatter_add_(2, ends.at.expand_as(since), since_grad)

    def _accumulate(self, states_DBJN: Tensor) -> Tensor:
        """S_j = q^C S_{j-1} + given_j, in place, by doubling: step k sums the last 2^k given ones."""
        over_chunk, reach = along(self.log_decay, states_DBJN) * self.chunk, 1
        while reach < states_DBJN.shape[2]:
            states_DBJN[:, :, reach:] += decayed(states_DBJN[:, :, :-reach], over_chunk * reach)
            reach *= 2
        return states_DBJN


class _Sums(NamedTuple):
    """Gradients, in which every part of a scan adds its own."""

    decay: Float[Tensor, "D N"]
    weight: Float[Tensor, "D N"]
    powers: Float[Tensor, "D N C"]


class _Ends(NamedTuple):
    """Where rows end: after how many whole chunks, how many tokens later, and the last C tokens, right-aligned."""

    whole: Int[Tensor, "B"]
    rest: Int[Tensor, "B 1"]
    at: Int[Tensor, "B C"]
    real: Tensor

    def of_states(self, states: Float[Tensor, "D B J1 N"]) -> Tensor:
        """Index of the states before the tokens that follow the last whole chunk."""
        return self.whole[:, None, None].expand(states.shape[0], -1, 1, states.shape[3])

    def before(self, states: Float[Tensor, "D B J1 N"]) -> Float[Tensor, "D B N"]:
        """Those states."""
        return states.gather(2, self.of_states(states)).squeeze(2)

    def since(self, x_DBJC: Tensor) -> Float[Tensor, "D B C"]:
        """The tokens since the last whole chunk, right-aligned in a chunk of their own."""
        line = x_DBJC.flatten(2)
        return line.gather(2, self.at.expand(line.shape[0], -1, -1)).where(self.real, 0)


def _joined(rows_DBJC: Float[Tensor, "D B J C"], length: int) -> Float[Tensor, "B L D"]:
    rows_DBL = rows_DBJC.flatten(2)[..., :length]
    into = rows_DBL.new_empty(rows_DBL.shape[1], length, rows_DBL.shape[0])
    put_transposed(into, rows_DBL.transpose(0, 1))
    return into
