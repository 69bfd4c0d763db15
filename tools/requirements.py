"""Print requirements of pyproject.toml for pip, by name.

A name is ``build-system``, ``dependencies`` or the name of an extra. pip itself installs these only
with the project, and would build the extensions each time.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(names: list[str]) -> None:
    """Print the requirements of all `names`, one on a line."""
    text = Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").read_text()
    settings = tomllib.loads(text)
    project = settings["project"]
    requirements = {
        "build-system": settings["build-system"]["requires"],
        "dependencies": project["dependencies"],
        **project["optional-dependencies"],
    }
    for name in names:
        print(*requirements[name], sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
