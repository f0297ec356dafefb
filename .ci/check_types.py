"""Type check sma and the benchmarks, and check that mypy saw every file exactly once."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit status: that of mypy, or 1 if it checked a different number of files than exist."""
    expected = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in ("modules", "recipes", "tune", "benchmarks"))
    # Symbolic links are excluded: their targets were counted above.
    links = {path for path in (ROOT / "sma").iterdir() if path.is_symlink()}
    expected += sum(not links & set(path.parents) for path in (ROOT / "sma").rglob("*.py"))

    packages = ["sma"] + (["benchmarks"] if list((ROOT / "benchmarks").rglob("*.py")) else [])
    command = [sys.executable, "-m", "mypy", *(word for name in packages for word in ("-p", name))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(result.stdout + result.stderr, end="")
    if result.returncode:
        return result.returncode
    seen = re.search(r"in (\d+) source files?", result.stdout)
    if seen is None or int(seen.group(1)) != expected:
        print(
            f"there are {expected} Python files, and mypy saw another number: "
            "are the links sma/modules, sma/recipes, sma/tune in place?"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
