"""Comparison of SeqBoat with its baselines on one task, at equal updates or equal time, as one table.

python -m sma.recipes.compare --task digits
python -m sma.recipes.compare --task listops --variants transformer,seqboat --seeds 3 --out runs/compare
python -m sma.recipes.compare --task digits,listops,pathfinder --out runs/compare
python -m sma.recipes.compare --resume runs/compare
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.comparison import ComparisonOptions, run_comparison


class Options(ComparisonOptions):
    """Train SeqBoat and its baselines on one task and print their table."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.compare")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_comparison(parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
