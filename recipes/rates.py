"""Accuracy of a task against the activation rate of attention.

python recipes/rates.py --task pathfinder
python recipes/rates.py --task mqar --rates 0.1,0.2 --out runs/rates
python recipes/rates.py --resume runs/rates

One model is trained under a budget for each rate, in addition to the dense baseline and one without routed
sub-modules. The trained models are then calibrated to other rates without further training.
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.rates import Rates, RatesOptions
from sma.recipes.studies.study import run_study


class Options(RatesOptions):
    """Train a model at each of several activation rates, and draw its accuracy against the rate."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.rates")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(Rates(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
