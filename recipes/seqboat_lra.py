"""SeqBoat on the tasks of the Long Range Arena, and on synthetic recall.

python recipes/seqboat_lra.py --task listops --preset tiny
python recipes/seqboat_lra.py --resume RUN
python recipes/seqboat_lra.py --evaluate RUN
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.training.options import OneRunOptions
from sma.recipes.training.single_run import PRESET_HELP, train_or_evaluate


class Options(OneRunOptions):
    """Train SeqBoat on a task of the Long Range Arena, or on associative recall, and evaluate it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.seqboat_lra")

    task: Literal["listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits", "recall", "mqar"] = Field(
        default="listops", description="the task"
    )
    preset: Literal["tiny", "paper", "standard", "binary"] = Field(default="tiny", description=PRESET_HELP)

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: train_or_evaluate(parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
