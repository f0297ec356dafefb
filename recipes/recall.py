"""Associative recall in noise: what attention is for, on the few tokens that need it.

python recipes/recall.py
python recipes/recall.py --variants seqboat,never --out runs/recall
python recipes/recall.py --resume runs/recall

Five models that differ in their router alone: `seqboat` (sampled decisions under a budget, learned from their
effect), `sma` (the paper's router alone), `always`, `never`, and `random` at the rates that seqboat reached. Then a
rate sweep at test time: the trained seqboat at other rates, without training.
"""

if __name__ == "__main__":  # its Python may not have the package, or what recipes need
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.recall import Recall, RecallOptions
from sma.recipes.studies.study import run_study


class Options(RecallOptions):
    """Train five models on associative recall that differ in their router alone, and show which tokens SeqBoat
    chose.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.recall")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(Recall(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
