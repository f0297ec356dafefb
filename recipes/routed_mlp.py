"""Transformer blocks with routed feed-forward layers, compared with their dense baseline and controls.

python recipes/routed_mlp.py --task listops
python recipes/routed_mlp.py --task digits --router "{kind: sma, temperature_scale: 0.3}" --variants routed,always
python recipes/routed_mlp.py --resume OUT
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.routed import Routed, RoutedOptions
from sma.recipes.studies.study import run_study


class Options(RoutedOptions):
    """Train a model with routed modules, its dense baseline and controls, and compare accuracy, MACs and time."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.routed_mlp")

    @property
    def name(self) -> str:
        return f"{self.task}_routed_mlp_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(Routed(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
