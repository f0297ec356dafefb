"""Free memory under every limit, and errors before allocation."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sma.errors import InputError, SpecError
from sma.memory import ALWAYS_FITS, _main_memory, check_memory, format_bytes, free_memory, zeros

GIB = 1 << 30


def _system(root: Path, files: dict[str, str]) -> Path:
    """A folder with the files in which the kernel reports memory."""
    for name, text in {"proc/meminfo": "MemAvailable: 9437184 kB\nSwapFree: 1048576 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, 10 * GIB, id="available and swap"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/job/memory.swap.max": "0\n",
                "sys/fs/cgroup/job/memory.stat": f"anon 7\nactive_file {GIB // 2}\ninactive_file {GIB // 4}\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "5\n",
            },
            GIB + GIB // 2 + GIB // 4,
            id="limit of an outer group",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/memory.swap.max": "max\n",
            },
            2 * GIB,
            id="swap of a group",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu:/\n4:hugetlb,memory:/of/the/host\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"active_file 9\ntotal_active_file {GIB}\n",
            },
            2 * GIB,
            id="version 1 in a container",
        ),
    ],
)
def test_the_lowest_limit_of_the_system_applies(tmp_path, files, free):
    assert min(_main_memory(_system(tmp_path, files))) == free


def test_limits_of_the_process_apply(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 50, before[1]))
    try:
        bounds = list(_main_memory(_system(tmp_path, {"proc/self/status": "VmSize: 1024 kB\n"})))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (1 << 50) - (1 << 20) in bounds


def test_this_machine_reports_free_memory():
    free = free_memory("cpu")
    assert free is not None
    assert ALWAYS_FITS < free < 1 << 60
    assert free_memory("meta") is None


def test_an_allocation_that_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: 5 * GIB)
    check_memory(5 * GIB, "the model")
    with pytest.raises(
        SpecError,
        match=r"^the model needs 5,368,709,121 bytes \(5\.0 GiB\), and 5,368,709,120 bytes \(5\.0 GiB\) are free; "
        r"make it smaller$",
    ):
        check_memory(5 * GIB + 1, "the model")
    with pytest.raises(InputError, match=r"are free; take fewer rows$"):
        check_memory(6 * GIB, "the state", error=InputError, hint="take fewer rows")


def test_nothing_is_refused_if_nothing_is_allocated(monkeypatch):
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: 0)
    check_memory(GIB, "the model", device="meta")
    with torch.device("meta"):
        check_memory(GIB, "the model")
    with FakeTensorMode():
        check_memory(GIB, "the model")
    with pytest.raises(SpecError, match="are free"):
        check_memory(GIB, "the model")


def test_small_allocations_are_never_refused(monkeypatch):
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: 0)
    check_memory(ALWAYS_FITS, "the model")


@pytest.mark.parametrize("bits", [63, 64, 1000, 50_000])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_beyond_those_of_a_tensor_are_refused_on_every_device(bits, device):
    with pytest.raises(
        SpecError, match=r"^the model needs about 10\^\d+ bytes, more than any machine can address; make it smaller$"
    ):
        check_memory(1 << bits, "the model", device=device)


def test_nothing_is_refused_if_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr("sma.memory.free_memory", lambda device=None: None)
    check_memory(1 << 50, "the model")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (4096, "4,096 bytes"), (3 * GIB // 2, "1,610,612,736 bytes (1.5 GiB)")]
)
def test_bytes_are_written_exactly(count, text):
    assert format_bytes(count) == text


def test_zeros_of_a_state_are_refused_before_allocation():
    assert zeros((2, 3), "the state", dtype=torch.int64).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(
        InputError, match=r"^the state needs 8,000,000,000,000,000 bytes \(7,450,580\.6 GiB\), and .* are free"
    ):
        zeros((10**6, 10**9), "the state", dtype=torch.float64)
    assert zeros((10**6, 10**9), "the state", dtype=torch.float64, device="meta").shape == (10**6, 10**9)
