"""Short runs of every kind of training, and the SHA-256 of their final parameters.

    python tests/data/baseline/prove.py FOLDER [NAME ...]

The program runs the commands below in FOLDER, which takes some minutes, except those whose folder exists. It prints the
hashes as JSON, and exits with 1 if one differs from `hashes.json`. The hashes are valid for one kind of processor, one
version of torch and one thread. To test that a change does not alter results, run this before and after it on the same
machine.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHORT = ["training.updates=40", "training.warmup=5", "training.evaluate_every=20"]
BUDGET = ["training.budget={target: 0.3, hold: 5, anneal: 10}"]
LISTOPS = [
    "task.data={min_length: 9, max_length: 60, max_depth: 5, max_arity: 5, train: 4000, validation: 200, test: 400}"
]
RECALL = [
    (
        "task.data={length: 48, queries_from: 36, pairs: 3, keys: 16, values: 8, distractors: 16, train: "
        "4000, validation: 100, test: 200}"
    ),
    "training.budget={target: 0.25, start: 1.0, hold: 5, anneal: 10}",
]


def _settings(*groups: list[str]) -> list[str]:
    return [word for group in groups for setting in group for word in ("--set", setting)]


RUNS: dict[str, list[str]] = {
    "listops": ["sma.recipes.seqboat_lra", "--task", "listops", "--out", "listops", *_settings(SHORT, LISTOPS)],
    "listops_budget": [
        "sma.recipes.seqboat_lra",
        "--task",
        "listops",
        "--out",
        "listops_budget",
        *_settings(SHORT, LISTOPS, BUDGET),
    ],
    "digits": ["sma.recipes.seqboat_lra", "--task", "digits", "--out", "digits", *_settings(SHORT)],
    "language": ["sma.recipes.seqboat_lm", "--preset", "tiny", "--out", "language", *_settings(SHORT)],
    "recall": ["sma.recipes.recall", "--out", "recall", *_settings(SHORT, RECALL)],
    "workers": ["sma.tune", "train", "--task", "digits", "--workers", "2", "--out", "workers", *_settings(SHORT)],
    "compare": ["sma.recipes.compare", "--task", "digits", "--length", "256", "--out", "compare", *_settings(SHORT)],
}
SWEEP = [
    "sma.tune",
    "--task",
    "digits",
    "--samples",
    "4",
    "--concurrent",
    "1",
    "--no-stop",
    "--storage",
    "sweep",
    *_settings(SHORT),
]
SWEEP += _settings(["training.budget.anneal=10"])


def parameters(file: Path) -> str:
    """The hash of the tensors of a saved model, in the order of its state, without their names."""
    import sma

    total = hashlib.sha256()
    for tensor in sma.load(file.parent).state_dict().values():
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def run(words: list[str], folder: Path) -> None:
    """Run one command of the project in a folder, on one thread."""
    command = [sys.executable, "-m", *words, "--no-progress", "--accelerator", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    subprocess.run(command, cwd=folder, check=True, env=environment, stdout=sys.stderr)


def trials(folder: Path) -> str:
    """The hash of the settings of a sweep's trials, in their order."""
    records = sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in (folder / "records").glob("*.json")),
        key=lambda one: one["number"],
    )
    return hashlib.sha256(json.dumps([one["values"] for one in records], sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Run the named trainings and the sweep, and compare their hashes."""
    folder, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:] or [*RUNS, "sweep"]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for name in chosen:
        if not (folder / name).exists():
            run(SWEEP if name == "sweep" else RUNS[name], folder)
        if name == "sweep":
            found[name] = trials(folder / "sweep")
            continue
        for file in sorted((folder / name).rglob("model.safetensors")):
            found[file.relative_to(folder).parent.as_posix()] = parameters(file)
    print(json.dumps(found, indent=1))
    recorded = (
        json.loads((HERE / "hashes.json").read_text(encoding="utf-8"))["sha256"]
        if (HERE / "hashes.json").exists()
        else {}
    )
    different = [name for name, value in found.items() if recorded.get(name, value) != value]
    print("different from before: " + ", ".join(different) if different else "all as recorded", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
