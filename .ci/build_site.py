"""Build the site from docs/ into build/site, and check that its pages load nothing from other hosts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
# Resources that a browser loads without a click. Links may lead anywhere.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["'](?:https?:)?//[^"']*"""
    r"""|<link\b(?![^>]*\brel=["']canonical)[^>]*?\bhref=["'](?:https?:)?//[^"']*"""
)
LOADED_BY_STYLE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//[^)"']*""")


def main() -> int:
    """Return the exit status: Sphinx's own, or 1 if a page loads something from elsewhere."""
    shutil.rmtree(SITE, ignore_errors=True)  # removed pages would remain
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-E", "-W", "--keep-going"]
    status = subprocess.run([*command, "-d", "build/doctrees", "docs", "build/site"], cwd=ROOT).returncode
    if status:
        return status
    remote = [
        f"{path.relative_to(SITE)}: {found}"
        for suffix, pattern in ((".html", LOADED), (".css", LOADED_BY_STYLE))
        for path in sorted(SITE.rglob(f"*{suffix}"))
        for found in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    if remote:
        print("these pages load something from elsewhere:", *remote, sep="\n")
        return 1
    print(f"the site is in {SITE.relative_to(ROOT)}: open {(SITE / 'index.html').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
