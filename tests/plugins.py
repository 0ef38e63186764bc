"""Distributions of other people: a folder with modules and hand-made metadata, as an installer leaves them."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from heterodox.core import slot


def distribution(
    folder: Path,
    modules: Mapping[str, str],
    entries: Mapping[str, Mapping[str, str]],
    name: str = "acme_rules",
    version: str = "1.2",
) -> Path:
    """A folder with `modules` (text by name) and a distribution with `entries` (by group and name)."""
    folder.mkdir(parents=True, exist_ok=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text, encoding="utf-8")
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    groups = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in entries.items()]
    (about / "entry_points.txt").write_text("\n".join(groups))
    return folder


@contextmanager
def installed(*folders: Path) -> Iterator[None]:
    """With the distributions in `folders` to be found, by this process and those that it starts."""
    paths, modules, before = [str(folder) for folder in folders], set(sys.modules), os.environ.get("PYTHONPATH")
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
    slot.declared.cache_clear()
    try:
        yield
    finally:
        del sys.path[: len(paths)]
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        slot.declared.cache_clear()
        for module in set(sys.modules) - modules:
            if getattr(sys.modules[module], "__file__", None) and Path(sys.modules[module].__file__).parent in folders:
                del sys.modules[module]
