"""Reach of recall: models trained on short rows are tested on streams of 4,096 to 65,536 tokens.

python recipes/reach.py
python recipes/reach.py --variants seqboat,s4d --lengths 4096 --out runs/reach
python recipes/reach.py --resume runs/reach

SeqBoat, whose window counts active tokens, is compared with the same model on every token, a local attention with the
same window, and S4D, at equal parameters and updates. The streams are read in chunks, at constant memory.
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.reach import Reach, ReachOptions
from sma.recipes.studies.study import run_study


class Options(ReachOptions):
    """Train models on multi-query associative recall, and test them on streams far longer than their rows."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.reach")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(Reach(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
