"""Measure the GPU path in one run of at most ten minutes, or print the report of a run.

    python -m benchmarks.gpu --out FOLDER --deadline 560
    python -m benchmarks.gpu --report FOLDER

Every point is appended to FOLDER/results.jsonl as soon as it is measured. Each phase runs in a process of its own and
ends at its share of the deadline at the latest: a kernel that hangs or breaks the device costs one phase. With
`--device cpu` all phases run at toy sizes, kernels in Triton's interpreter, to test this program.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from benchmarks.gpu.report import report
from benchmarks.gpu.runner import measure
from sma.streams import run_command


def main() -> int:
    """Run or report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FOLDER", help="run the measurements and write them into this folder")
    what.add_argument("--report", type=Path, metavar="FOLDER", help="print the tables of this folder")
    parser.add_argument("--deadline", type=float, default=560.0, help="time limit in seconds (default: 560)")
    parser.add_argument("--phase", action="append", help="run only this phase, with the whole time; may be repeated")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu runs small sizes")
    parser.add_argument("--commit", help="commit of the program, if its folder is not a checkout")
    options = parser.parse_args()
    if options.report is not None:
        print(report(options.report))
        return 0
    if options.deadline <= 0:
        raise SystemExit(f"--deadline {options.deadline:g} must be above 0 seconds; write --deadline 560")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    command = f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}"
    return measure(options.out, options.device, options.deadline, command, options.commit, options.phase or ())


if __name__ == "__main__":
    sys.exit(run_command(main))
