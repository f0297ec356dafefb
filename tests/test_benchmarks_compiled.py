"""Table of compiled kernels, from made-up rows; tests/test_sma/test_kernels compiles real ones."""

from typing import Any

from benchmarks.compiled import markdown


def _row(kernel: str, card: str, registers: int, shared_memory: int, spills: int = 0) -> dict[str, Any]:
    numbers = {"registers": registers, "shared_memory": shared_memory, "stack": 0, "spills": spills}
    return {"preset": "text_paper", "kernel": kernel, "card": card, "dtype": "tf32", **numbers}


def test_a_table_has_the_maximum_over_the_launches_of_a_kernel() -> None:
    rows = [
        _row("ends", "80", 96, 1024),
        _row("ends", "80", 90, 2048),
        _row("ends", "90", 100, 0, 3),
        _row("sums", "90", 227, 512),
    ]
    assert list(markdown(rows)) == [
        "| preset | kernel | sm_80 tf32 | sm_90 tf32 |",
        "|---|---|---|---|",
        "| text_paper | `ends` | 96, 2 KB | 100, 0 KB |",
        "| text_paper | `sums` |  | 227, 0 KB |",
        "",
        "Most bytes of stack: 0; most spills: 3.",
    ]
    assert list(markdown([]))[-1] == "Most bytes of stack: 0; most spills: 0."
