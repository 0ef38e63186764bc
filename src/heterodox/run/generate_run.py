"""Text from a trained run."""

from collections.abc import Callable

import torch

from heterodox.core.errors import RecipeError
from heterodox.core.files import PathLike, as_path, reading
from heterodox.core.rng import Streams
from heterodox.data.tokenizer.base import continuation
from heterodox.model import generate
from heterodox.run.load import load_run
from heterodox.run.sparse_file import read_sparse


def generate_run(
    path: PathLike,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    device: str = "cpu",
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that the run's model puts behind `prompt`; `on_text` hears the prompt and each piece as it comes.

    `path` is a run folder, or a file that `export --format sparse` wrote, which has no `checkpoint` to choose.
    Raises `RecipeError` for an empty prompt, `CorpusError` for one with characters that the tokenizer lacks.
    """
    if not temperature >= 0:
        raise RecipeError(f"temperature is {temperature}, expected 0 or more")
    path = as_path(path)
    if top_p is not None and not 0 < top_p <= 1:
        raise RecipeError(f"top-p is {top_p}, expected above 0 and at most 1")
    with reading(path):
        single = path.is_file()
    if checkpoint is not None and single:
        raise RecipeError(f"{path} is a file, which holds no checkpoints: leave out --checkpoint, or name a run folder")
    run = read_sparse(path, device) if single else load_run(path, checkpoint, device)
    start = [int(token) for token in run.tokenizer.encode(prompt)]
    if not start:
        raise RecipeError("the prompt is empty; give --prompt at least one character")
    say = on_text or (lambda text: None)
    say(prompt)
    written: list[int] = []
    said = ""

    def listen(chosen: torch.Tensor) -> None:
        nonlocal said
        written.append(int(chosen[0]))
        text = continuation(run.tokenizer, start, written)
        if not text.endswith("\ufffd"):  # wait for the rest of a character
            say(text[len(said) :])
            said = text

    generate(
        run.model,
        torch.tensor([start], device=run.model.head.weight.device),
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=run.tokenizer.vocab_size,
        generator=Streams(seed).generator("eval", "generate"),
        on_token=listen,
    )
    text = continuation(run.tokenizer, start, written)
    say(text[len(said) :])
    return text
