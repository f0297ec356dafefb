"""The kernels of the EMA scan, compiled for a GPU that is not present."""

import pytest

from tests.test_sma.test_kernels.test_compiled import TASKS, compiled


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "tasks"), [("tf32", TASKS), ("bf16", ("image", "language"))], ids=["tf32", "bf16"])
def test_scans_keep_everything_in_registers(dtype: str, tasks: tuple[str, ...]) -> None:
    presets = [word for task in tasks for word in ("--preset", f"{task}_paper")]
    kernels = compiled("--operator", "ema", "--card", "90", "--dtype", dtype, *presets)
    assert {kernel["kernel"] for kernel in kernels} == {"prepare", "ends", "carry", "results", "sums"}
    # No spills, shared memory, barriers, atomics or shuffles; another Triton may need them for layout conversions.
    wasted = ("stack", "spills", "shared_memory", "barriers", "atomics", "shuffles", "conversions")
    assert [kernel for kernel in kernels if any(kernel[name] for name in wasted)] == []
