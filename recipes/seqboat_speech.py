"""SeqBoat on raw speech: ten words of Speech Commands, sample by sample.

python recipes/seqboat_speech.py --preset tiny
python recipes/seqboat_speech.py --resume RUN
python recipes/seqboat_speech.py --evaluate RUN
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.training.options import OneRunOptions
from sma.recipes.training.single_run import train_or_evaluate


class Options(OneRunOptions):
    """Train SeqBoat on raw speech and evaluate it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.seqboat_speech")

    preset: Literal["tiny", "paper"] = Field(
        default="tiny",
        description="tiny: synthetic words, minutes on one core; paper: Speech Commands in the paper's setting",
    )

    @property
    def name(self) -> str:
        return f"speech_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: train_or_evaluate(parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
