"""Compile the kernels of this project for GPUs that need not be installed, and print their resources.

Every distinct launch of a forward and backward pass is compiled with the shapes of the presets in `recipes/presets`:
the output has registers, bytes of stack and shared memory, and counts of instructions, from Triton's own `ptxas` and
`cuobjdump`.

    python -m benchmarks.compiled --card 90 --preset text --json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_cases import CASES, Case
from sma.kernels.launch import Launch, recording
from sma.streams import run_command


class Card(NamedTuple):
    """A compute capability, and its maximum shared memory per block, in bytes."""

    capability: int
    shared_memory: int


CARDS = {"80": Card(80, 166_912), "89": Card(89, 101_376), "90": Card(90, 232_448), "100": Card(100, 232_448)}
# Products on tensor cores by generation, other products, spills, barriers, atomics, warp shuffles.
INSTRUCTIONS = {
    "tensor": r"HGMMA|HMMA|DMMA|UTC\w*MMA",
    "ffma": "FFMA",
    "spills": "LDL|STL",
    "barriers": r"BAR",
    "atomics": r"RED\w*|ATOM\w*",
    "shuffles": "SHFL",
}


def compile_launch(launch: Launch, card: Card) -> dict[str, Any]:
    """Compile the kernel of a recorded launch for a GPU; returns its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", card.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b(?:{word})\b", code)) for name, word in INSTRUCTIONS.items()}
    return {
        "kernel": launch.kernel.__name__,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared_memory": built.metadata.shared,
        # Layout conversions of tensors: free, or an exchange between lanes, depending on the version of the compiler.
        "conversions": built.asm["ttgir"].count("ttg.convert_layout"),
        **counts,
    }


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types of a launch as Triton specialises them: aligned pointers, and integers that are 1 or multiples of 16."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    constants = dict(launch.constants)
    parameters = launch.kernel.params
    for parameter, value in zip(parameters, launch.arguments, strict=False):
        name, index = parameter.name, parameter.num
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_POINTERS[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {parameter.name: signature[parameter.name] for parameter in parameters}
    return ordered, {(launch.kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes


_POINTERS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def _cuobjdump(option: str, path: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([program, option, path], capture_output=True, encoding="utf-8", check=True)
    return done.stdout


def launches_of(case: Case, card: Card) -> list[Launch]:
    """Distinct launches of a case."""
    with recording(card.shared_memory, card.capability // 10) as launches:
        case.run()
    programs = {}
    for launch in launches:
        signature, constants, attributes = specialise(launch)
        programs[repr((launch.kernel.__name__, signature, constants, attributes, launch[4:]))] = launch
    return list(programs.values())


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return a line per preset and kernel: its maximum registers and KB of shared memory, by GPU and dtype."""
    columns = list(dict.fromkeys((row["card"], row["dtype"]) for row in rows))
    yield f"| preset | kernel | {' | '.join(f'sm_{card} {dtype}' for card, dtype in columns)} |"
    yield f"|{'---|' * (2 + len(columns))}"
    for preset, kernel in dict.fromkeys((row["preset"], row["kernel"]) for row in rows):
        same = [row for row in rows if (row["preset"], row["kernel"]) == (preset, kernel)]
        cells = []
        for column in columns:
            found = [row for row in same if (row["card"], row["dtype"]) == column]
            most = [max((row[name] for row in found), default=0) for name in ("registers", "shared_memory")]
            cells.append(f"{most[0]}, {most[1] / 1024:.0f} KB" if found else "")
        yield f"| {preset} | `{kernel}` | {' | '.join(cells)} |"
    worst = {name: max((row[name] for row in rows), default=0) for name in ("stack", "spills")}
    yield ""
    yield f"Most bytes of stack: {worst['stack']}; most spills: {worst['spills']}."


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print Markdown with a line per preset and kernel")
    parser.add_argument("--card", action="append", choices=CARDS, help="compute capability; may be repeated")
    parser.add_argument("--preset", action="append", help="only presets with this prefix; may be repeated")
    parser.add_argument("--operator", choices=CASES, help="only this operator")
    parser.add_argument("--dtype", action="append", choices=["tf32", "ieee", "bf16", "fp16"], help="may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of kernels compiled in parallel")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it")
    tasks = [
        (case, name, launch)
        for operator, cases in CASES.items()
        if options.operator in (None, operator)
        for case in cases(options.dtype or ["tf32", "bf16"])
        if options.preset is None or case.preset.startswith(tuple(options.preset))
        for name in options.card or CARDS
        for launch in launches_of(case, CARDS[name])
    ]

    def row(task: tuple[Case, str, Launch]) -> dict[str, Any]:
        case, card, launch = task
        return {"card": card, "preset": case.preset, "dtype": case.dtype, **compile_launch(launch, CARDS[card])}

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(row, tasks))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    if options.markdown:
        print("\n".join(markdown(rows)))
        return
    columns = list(rows[0]) if rows else []
    print(" ".join(f"{column:>13}" for column in columns))
    for each in rows:
        print(" ".join(f"{each[column]!s:>13}" for column in columns))


if __name__ == "__main__":
    sys.exit(run_command(main))
