"""What the files of runs and comparisons hold, as far as a reader relies on it.

A shape allows what it does not name. `core.files.read_json` checks a file against one.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

_STRICT = ConfigDict(strict=True, extra="allow")

Count = Annotated[int, Field(ge=0, lt=2**64)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Measure = Number | None
Numbers = dict[str, Measure]


def _inside(path: str) -> str:
    """A path below the folder that names it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError("expected a path inside the folder")
    return path


class Corpus(TypedDict, total=False):
    """Of a summary and of results."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    name: str | None
    documents: Measure
    bytes: Measure
    vocab_size: Count | None
    sha256: str | None
    tokens: dict[str, Measure] | Measure


class Evaluation(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # pyrefly: ignore
    step: Count
    tokens: Measure
    meta_tokens: Measure
    flops: Measure
    seconds: Measure
    val_loss: Measure


class Summary(TypedDict, total=False):
    """`summary.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    recipe: str | None
    credit: str | dict[str, Any] | None
    seed: Count
    status: str
    message: str | None
    warnings: list[str] | None
    val_step: int | None
    val_loss: Measure
    val_bits_per_byte: Measure
    test_loss: Measure
    steps: Measure
    tokens: Measure
    meta_tokens: Measure
    flops: Measure
    sparse_flops: Measure
    seconds: Measure
    search_seconds: Measure
    wall_seconds: Measure
    activation_bytes: Measure
    peak_memory_bytes: Measure
    parameters: Measure
    active_parameters: Measure
    unigram_loss: Measure
    floor_loss: Measure
    corpus_sha256: str | None
    corpus: Corpus | None
    device: str | None
    commit: str | None


class ListedRun(Summary, total=False):
    """A run in `results.json`."""

    run: Annotated[str, AfterValidator(_inside)] | None
    evals: list[Evaluation] | None
    alignment: dict[str, Numbers] | None


class ListedRecipe(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # pyrefly: ignore
    name: Required[str]
    description: str | None
    resolved: dict[str, Any] | None


class Results(TypedDict, total=False):
    """`results.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    format: Any
    baseline: str | None
    recipes: list[ListedRecipe]
    seeds: list[Count]
    corpus: Corpus | None
    versions: dict[str, str] | None
    device: str | None
    created: str | None
    command: str | None
    runs: list[ListedRun]
    interrupted: int | None
    elapsed_seconds: Number


class FoundRule(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # pyrefly: ignore
    recipe: Required[str]
    file: Annotated[str, AfterValidator(_inside)] | None


class Sweep(TypedDict, total=False):
    """`sweep.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    format: Any
    rules: list[FoundRule]


class Parameter(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # pyrefly: ignore
    origin: Required[str]
    size: Count | None


class Manifest(TypedDict, total=False):
    """`manifest.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    credit: str | dict[str, Any] | None
    parameters: dict[str, Parameter]
    remarks: list[str]


class Sample(TypedDict, total=False):
    """An entry of `samples.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    prompt: str | None
    text: str | None
    temperature: Measure


class Scores(TypedDict, total=False):
    """`scores.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    edges: list[Number]
    counts: dict[str, list[Number]]
    auc: Numbers


class Layer(TypedDict, total=False):
    """A layer of a mask's row."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    active: Required[Number]
    size: Required[Annotated[int, Field(ge=1)]]
    dead_inputs: Required[Number]
    dead_outputs: Required[Number]


class MetricsRow(TypedDict, total=False):
    """A line of `metrics.jsonl`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    kind: Required[Annotated[str, Field(min_length=1)]]
    step: Required[Count]
    tokens: Measure
    meta_tokens: Measure
    flops: Measure
    seconds: Measure
    loss: Measure
    lr: Measure
    grad_norm: Measure
    val_loss: Measure
    val_bits_per_byte: Measure
    ce: Measure
    candidate: Count


class ProbeRow(MetricsRow, total=False):
    alignment: Required[dict[str, Numbers]]


class MaskRow(MetricsRow, total=False):
    layers: dict[str, Layer]
    active: Required[Number]
    size: Required[Annotated[int, Field(ge=1)]]
    explored: Measure
    overlap: Measure


class Head(TypedDict):
    """The first line of a checkpoint's `state.json`."""

    sha256: str


class Progress(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # pyrefly: ignore
    step: Required[Count]


class Values(TypedDict, total=False):
    """What a checkpoint says of the run."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    progress: Required[Progress]
    activation_bytes: Required[Number]
    wall_seconds: Required[Number]
    val_loss: Required[Measure]
    evaluated_step: Required[int]
    warnings: Required[list[str]]
    corpus_sha256: Required[str]
    inputs: dict[str, str]


class Document(TypedDict):
    """The rest of `state.json`."""

    __pydantic_config__ = _STRICT  # pyrefly: ignore
    values: dict[str, Any]
    trees: dict[str, dict[str, Any]]
    sha256: dict[str, str]


SUMMARY = TypeAdapter(Summary)
RESULTS = TypeAdapter(Results)
SWEEP = TypeAdapter(Sweep)
MANIFEST = TypeAdapter(Manifest)
SAMPLES = TypeAdapter(list[Sample])
SCORES = TypeAdapter(Scores)
ROW = TypeAdapter(MetricsRow)
ROWS = {"probe": TypeAdapter(ProbeRow), "mask": TypeAdapter(MaskRow)}
"""Of kinds of rows that must hold more."""
HEAD = TypeAdapter(Head)
DOCUMENT = TypeAdapter(Document)
VALUES = TypeAdapter(Values)
