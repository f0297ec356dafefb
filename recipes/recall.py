"""Associative recall in noise: a task in which only a few tokens need attention.

python recipes/recall.py
python recipes/recall.py --variants seqboat,never --out runs/recall
python recipes/recall.py --resume runs/recall

Five models that differ only in their routers: `seqboat` (sampled decisions under a budget, learned from their
effect), `sma` (the paper's router alone), `always`, `never`, and `random` at the rates that seqboat reached. Then a
rate sweep at test time: the trained seqboat at other rates, without training.
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.recall import Recall, RecallOptions
from sma.recipes.studies.study import run_study


class Options(RecallOptions):
    """Train five models that differ only in their routers on associative recall, and show the tokens that SeqBoat
    selected.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.recall")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(Recall(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
