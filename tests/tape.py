"""A recorder for tests without a device: it repeats operators on the same memory, as a CUDA graph does.

As in a graph, tensors keep their memory, and numbers that the host read during the recording are constants.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.no_host import ASKS

ResultT = TypeVar("ResultT")


class _Tape(TorchDispatchMode):
    """Runs operators, and stores them with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        fresh = all(each.alias_info is None for each in function._schema.returns)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)] if fresh else []
        self.calls.append((function, args, kwargs or {}, results))
        return made

    def replay(self) -> None:
        """Run the operators again, and write every result into the memory of the recorded one."""
        # The tape already has the casts of autocast.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for function, args, kwargs, results in self.calls:
                again = function(*args, **kwargs)
                for result, new in zip(results, tree_leaves(again), strict=False):
                    result.detach().copy_(new)


class TapeRecorder:
    """A recorder with the interface of the CUDA recorder of `sma.recipes.training.graph`.

    A capture runs nothing, but a tape must run to record, so the first replay does nothing.

    Attributes:
        replays: total number of replays.
        recordings: number of recordings.
    """

    def __init__(self) -> None:
        self.replays, self.recordings, self.asked = 0, 0, set[str]()

    def run(self, program: Callable[[], ResultT]) -> ResultT:
        """Run a program eagerly, before it is recorded."""
        return program()

    def record(self, program: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        """Record a program."""
        tape = _Tape()
        with tape:
            result = program()
        self.recordings += 1
        self.asked |= {name for call in tape.calls if (name := call[0]._schema.name.removeprefix("aten::")) in ASKS}
        ran = True

        def replay() -> None:
            nonlocal ran
            self.replays += 1
            if not ran:
                tape.replay()
            ran = False

        return replay, result

    def forget(self) -> None:
        """Do nothing, because a tape keeps its memory."""
