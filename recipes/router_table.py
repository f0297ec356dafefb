"""Every router with every sub-module at equal updates, the most important pairs with three seeds, as one table.

python recipes/router_table.py --out runs/routers
python recipes/router_table.py --variants sma,always --modules gau,conv
python recipes/router_table.py --resume runs/routers
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import sys

from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.studies.router_grid import RouterTable, TableOptions
from sma.recipes.studies.study import run_study


class Options(TableOptions):
    """Train every router with every sub-module, and write the table of accuracy, rates, MACs and speed."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.router_table")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run_study(RouterTable(), parse(Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
