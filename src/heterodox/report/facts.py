"""What the template is given besides tables and charts: facts of the study, reference losses, samples."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from heterodox.report import units
from heterodox.report.data import Study, setting
from heterodox.report.statistics import Number, is_finite


def title(study: Study) -> str:
    corpora = [name for header in study.headers if (name := (header.get("corpus") or {}).get("name"))]
    where = f" on {', '.join(dict.fromkeys(corpora))}" if corpora else ""
    recipes = study.recipes
    return f"{recipes[0]}{where}" if len(recipes) == 1 else f"{len(recipes)} recipes{where}"


def facts(study: Study) -> list[tuple[str, list[str]]]:
    """Labels with their values, one value per merged study unless they agree; absent facts are left out."""
    seeds = sorted({run.seed for run in study.runs})
    found = [
        ("Corpus", _values(study, _corpus)),
        ("Tokens", _values(study, _tokens)),
        ("Setting", [said] if (said := setting(study)) else []),
        ("Seeds", [", ".join(map(str, seeds))]),
        ("Device", _values(study, lambda header: str(header.get("device") or ""))),
        (
            "Versions",
            _values(study, lambda h: ", ".join(f"{k} {v}" for k, v in (h.get("versions") or {}).items())),
        ),
        ("Commit", [", ".join(commits)] if (commits := _commits(study)) else []),
        ("Collected", _values(study, lambda header: _date(header.get("created")))),
        ("Command", _values(study, lambda header: header.get("command") or "")),
    ]
    return [(label, values) for label, values in found if values]


def corpora(study: Study) -> list[str]:
    """A warning when the runs did not all see the same corpus."""
    shas = dict.fromkeys(run.summary.get("corpus_sha256") for run in study.runs)
    shas.pop(None, None)
    if len(shas) < 2:
        return []
    names = ", ".join(str(sha)[:8] for sha in shas)
    return [f"The runs are on {len(shas)} different corpora ({names}): their losses cannot be compared."]


def remarks(study: Study) -> list[str]:
    """What manifests declare besides origins, by recipe."""
    said = (f"{run.recipe}: {remark}." for run in study.runs for remark in run.manifest.get("remarks") or [])
    return list(dict.fromkeys(said))


def reference(study: Study, key: str) -> Number | None:
    """A loss that all summaries agree on under `key`, in nats per token, or None."""
    values = [run.summary[key] for run in study.runs if is_finite(run.summary.get(key))]
    return values[0] if values and max(values) - min(values) < 1e-3 else None


def references(study: Study) -> list[dict[str, Any]]:
    """The two entropies that losses are read against, where known."""
    names = {"unigram_loss": "unigram entropy", "floor_loss": "entropy floor"}
    found = [
        {"name": name, "short": name.replace("entropy", "").strip(), "loss": reference(study, key), "key": key}
        for key, name in names.items()
    ]
    return [entry for entry in found if entry["loss"] is not None]


def with_references(rows: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows by loss, with the reference losses (rows that have a `name`) in their places."""

    def loss(row: dict[str, Any]) -> Number:
        return row["loss"] if "name" in row else row["val_loss"]["mean"] if row["val_loss"] else float("inf")

    return sorted([*rows, *references], key=loss)


def failures(study: Study) -> list[dict[str, Any]]:
    """The runs that did not finish; seeds of one recipe that ended alike share an entry."""
    found: dict[tuple, list[int]] = {}
    for run in (run for run in study.runs if not run.finished):
        end = run.recipe, *(run.summary.get(key) for key in ("status", "steps", "message"))
        found.setdefault(end, []).append(run.seed)
    keys = ("recipe", "status", "steps", "message", "seeds")
    return [dict(zip(keys, (*end, seeds), strict=True)) for end, seeds in found.items()]


def samples(study: Study) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Recipe, seed and samples of each recipe's first run that has any; the prompt is cut off the text."""
    found = []
    for recipe in study.recipes:
        run = next((run for run in study.of(recipe) if run.samples), None)
        if run is not None:
            entries = [entry for entry in run.samples if isinstance(entry, dict)]
            found.append((recipe, run.seed, [_sample(entry) for entry in entries]))
    return found


def _sample(entry: dict[str, Any]) -> dict[str, Any]:
    prompt = str(entry.get("prompt") or "")
    text = str(entry.get("text") or "").removeprefix(prompt)
    return {"prompt": prompt, "text": text, "temperature": entry.get("temperature")}


def _commits(study: Study) -> list[str]:
    """Return where the code of the runs that have ended comes from; `not recorded` for those that do not say."""
    found = list(dict.fromkeys(run.summary.get("commit") for run in study.runs if run.finished))
    return [commit or "not recorded" for commit in found]


def _values(study: Study, read: Callable[[dict[str, Any]], str]) -> list[str]:
    return [value for value in dict.fromkeys(read(header) for header in study.headers) if value]


def _corpus(header: dict[str, Any]) -> str:
    corpus = header.get("corpus") or {}
    parts = [str(corpus.get("name") or "")]
    if is_finite(corpus.get("documents")):
        parts.append(f"{corpus['documents']:,} document{'s' * (corpus['documents'] != 1)}")
    if is_finite(corpus.get("bytes")):
        parts.append(units.memory(corpus["bytes"]))
    if corpus.get("vocab_size"):
        parts.append(f"vocabulary {corpus['vocab_size']}")
    if corpus.get("sha256"):
        parts.append(f"sha256 {str(corpus['sha256'])[:12]}…")
    return ", ".join(part for part in parts if part)


def _tokens(header: dict[str, Any]) -> str:
    splits = (header.get("corpus") or {}).get("tokens") or {}
    return ", ".join(f"{name} {units.count(size)}" for name, size in _items(splits))


def _items(splits: Any) -> Iterable[tuple[str, Any]]:
    return splits.items() if isinstance(splits, dict) else [("in all", splits)]


def _date(created: str | None) -> str:
    try:
        return datetime.fromisoformat(created or "").strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return created or ""
