"""Callbacks of a training: random states, the health of the routers, and atomic checkpoints."""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from sma.errors import CheckpointError, parsing, reason
from sma.files import check_file, write_atomically
from sma.formats import check_format
from sma.recipes.training.distributed import all_gather_object, is_distributed
from sma.routers import RouterSpec
from sma.stats import router_health

log = logging.getLogger("sma.recipes")

_PARTS = {
    "global_step": int,
    "state_dict": dict,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Required entries of a checkpoint, with their types."""

_HINT = (
    "replace it with an intact checkpoint, such as a copy of the other one of best.ckpt and last.ckpt, "
    "or delete the folder of both to start the run again"
)


class RandomStates(Callback):
    """Saves the random states in every checkpoint and restores them on resuming; Lightning itself does neither."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The random states of the CPU and of every CUDA device, on every rank."""
        own = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        return {"ranks": all_gather_object(own)} if is_distributed() else own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the training starts, because building and evaluating would advance them."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of the checkpoint."""
        states = self._loaded.get("ranks", [self._loaded])
        # If the run resumes with more processes, the additional ones keep the states of their seeds.
        rank = torch.distributed.get_rank() if is_distributed() else 0
        found = states[rank] if rank < len(states) else {}
        if found:
            torch.set_rng_state(found["cpu"].cpu())
            if found["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all([state.cpu() for state in found["cuda"]])


class FinalEvaluation(Callback):
    """Evaluates and checkpoints after the last update, even if `evaluate_every` does not divide their number."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the training after the last update, after which Lightning evaluates."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= trainer.max_steps


class RouterHealth(Callback):
    """Warns once per router if no token or every token activates its sub-module: the router then stops learning.

    Args:
        routers: specs of the routers of the routed layers, in order. Routers with a fixed rate are not watched.
    """

    def __init__(self, routers: Sequence[RouterSpec]) -> None:
        self.routers = routers
        self.warned: dict[str, str] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the rates of the validation split, once they have reached the target of the budget."""
        if not getattr(pl_module, "settled", True):
            return
        for name, value in trainer.callback_metrics.items():
            if not name.startswith("val_rate/"):
                continue
            _, layer, module = name.split("/")
            if self.routers[int(layer.removeprefix("layer"))].fixed_rate:
                continue
            rate = float(value)
            condition = router_health(rate)
            if condition != self.warned.get(name, "ok"):
                log.warning(self._message(condition, layer, module, rate, trainer.global_step))
            self.warned[name] = condition

    def _message(self, condition: str, layer: str, module: str, rate: float, step: int) -> str:
        where = f"the router of {module!r} in layer {layer.removeprefix('layer')}"
        effects = {"dead": "it gets no gradient", "saturated": "nothing is skipped"}
        if condition not in effects:
            return f"{where} is alive again at update {step}: rate {rate:.4f}"
        return (
            f"warning: {where} is {condition} at update {step}: rate {rate:.4f}, so {effects[condition]}; "
            "set training.budget.target"
        )


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint, in a run folder that may be moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with the present path of the folder; Lightning drops the best score if the path differs."""
        # There is exactly one file of this kind, whatever paths the checkpoint holds.
        own = str(Path(str(self.dirpath), f"{self.filename}.ckpt"))
        paths = {
            name: own if state_dict[name] else ""
            for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = dict.fromkeys(
            [own][: len(state_dict["best_k_models"])], next(iter(state_dict["best_k_models"].values()), None)
        )
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})


class BestCheckpoint(LastCheckpoint):
    """Keeps the best checkpoint of those whose activation rates have reached the target of the budget.

    An earlier model may score better because its rates are higher.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the score, once the rates have settled."""
        if getattr(pl_module, "settled", True):
            super().on_validation_end(trainer, pl_module)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run without executing code in it, and check that the required entries are there.

    Raises:
        CheckpointError: the file is missing or damaged, or is not a checkpoint of a run.
    """
    loaded: Any = _load_checkpoint(path)
    for part, kind in _PARTS.items():
        if not isinstance(loaded, dict) or not isinstance(loaded.get(part), kind) or isinstance(loaded[part], bool):
            raise CheckpointError(f"the checkpoint {str(path)!r} is not one of a run: it has no {part}; {_HINT}")
    checkpoint: dict[str, Any] = loaded
    check_format(checkpoint, f"the checkpoint {str(path)!r}")
    return checkpoint


def _load_checkpoint(path: Path, map_location: Any = "cpu") -> Any:
    size = check_file(path, CheckpointError)
    with parsing(f"the checkpoint {str(path)!r}", CheckpointError, _HINT):
        with zipfile.ZipFile(path) as parts:
            # torch.save does not compress. A compressed file could unpack to any size.
            if sum(part.file_size for part in parts.infolist()) > size:
                raise CheckpointError(
                    f"the checkpoint {str(path)!r} is compressed; checkpoints of a run are not; {_HINT}"
                )
        return torch.load(path, map_location=map_location, weights_only=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces the old checkpoint in one step, and reads checkpoints without executing code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            raise CheckpointError(
                f"cannot write {str(path)!r}: {reason(error)}; the run folder must be writable and have space"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint."""
        loaded: dict[str, Any] = _load_checkpoint(Path(path), map_location or "cpu")
        return loaded
