"""A sub-module that makes a training fail, by a choice of faults."""

import os
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sma import Ragged, State, SubModule, SubModuleSpec, register
from sma.submodule import MACs, NoState

Fault = Literal["none", "crash", "memory", "nan", "exit"]


@register
class FaultySpec(SubModuleSpec):
    """Spec of `Faulty`."""

    kind: Literal["faulty"] = "faulty"
    fault: Fault = Field(default="none", description="what happens")
    after: int = Field(default=15, ge=0, description="calls in training before it happens")

    def build(self, width: int) -> "Faulty":
        return Faulty(self, width)

    def num_parameters(self, width: int) -> int:
        return width

    def macs(self, width: int, tokens: int) -> MACs:
        return MACs(elementwise=tokens * width)


class Faulty(SubModule):
    """$y = g x$ until the fault."""

    causal = True

    def __init__(self, spec: FaultySpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.gain = nn.Parameter(torch.ones(width))
        self.calls = 0

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        self._continue(state, NoState, tokens)
        self.calls += self.training
        if self.calls > self.spec.after:
            match self.spec.fault:
                case "crash":
                    raise RuntimeError("broken on purpose")
                case "memory":
                    raise torch.OutOfMemoryError("tried to allocate 80 GiB")
                case "nan":
                    return tokens.values * self.gain * torch.nan, state
                case "exit":
                    os._exit(1)
        return tokens.values * self.gain, state
