"""Which commit of its source the package runs from."""

import functools
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[1]


@functools.cache
def commit(source: Path = SOURCE) -> str | None:
    """Twelve digits of the commit that `source` is checked out at, a `+` behind them if a file in it differs.

    None where `source` is in no repository of its own, as in an installed package, or git is not there. Asked once: a
    checkout may move on while a run lasts.
    """
    git = shutil.which("git")
    if git is None or _ask(git, source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _ask(git, source, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + "+" * bool(_ask(git, source, "status", "--porcelain", "."))


def _ask(git: str, folder: Path, *arguments: str) -> str | None:
    answer = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return None if answer.returncode else answer.stdout.strip()
