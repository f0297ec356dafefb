"""Start-up times: `sma --help` and the help of its sub-commands, compared with `import torch`.

python -m benchmarks.start --json
"""

import argparse
import json
import os
import subprocess
import sys

from sma.__main__ import EXPERIMENTS
from sma.streams import run_command

TORCH = [sys.executable, "-c", "import torch"]


def seconds(command: list[str], repeats: int) -> float:
    """Minimum processor time of a command, in seconds; wall time would depend on other processes."""
    best = float("inf")
    for _ in range(repeats):
        before = os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
    return best


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Start-up time of commands beyond `import torch`, in seconds.")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs; the fastest counts (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch = seconds(TORCH, options.repeats)
    commands = {"import sma": [sys.executable, "-c", "import sma"], "sma --help": ["", "--help"]}
    commands |= {f"sma {name} --help": ["", name, "--help"] for name in EXPERIMENTS}
    over = {"import torch": round(torch, 2)}
    for name, command in commands.items():
        words = command if command[0] else [sys.executable, "-m", "sma", *command[1:]]
        over[name] = round(seconds(words, options.repeats) - torch, 2)
    if options.json:
        print(json.dumps(over))
        return 0
    for name, value in over.items():
        print(f"{name:<22} {value:5.2f} s{'' if name == 'import torch' else ' more'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
