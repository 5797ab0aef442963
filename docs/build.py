"""Builds the site of docs/ into site/, strictly: `make docs`. A broken link, picture or reference fails."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = {"mkdocs": "mkdocs", "material": "mkdocs-material", "mkdocstrings_handlers.python": "mkdocstrings-python"}


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:
        return True


def main() -> None:
    missing = [package for module, package in NEEDED.items() if _missing(module)]
    if missing:
        raise SystemExit(
            f"the site needs {', '.join(missing)}: pip install -c constraints.txt '.[docs]' in this checkout, or "
            "`make docs`, which does it"
        )
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # the theme's advertisement of its successor
    from mkdocs.__main__ import cli

    cli(["build", "--strict", *sys.argv[1:]])


if __name__ == "__main__":
    main()
