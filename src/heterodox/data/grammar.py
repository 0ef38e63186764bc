"""A synthetic language whose entropy is known exactly, so that a loss can be read as distance from the floor."""

import string
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from heterodox.core import slot as config
from heterodox.core.errors import RecipeError
from heterodox.data.corpora import Corpus, Document

ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits
MAX_STATES = 100_000
UNIFORM_SHARE = 0.02
TOLERANCE = 1e-14
MAX_ITERATIONS = 20_000


class Grammar(Corpus):
    """A synthetic language whose entropy is known exactly, so that a loss can be read as distance from the floor.

    A stationary Markov chain of order k over V symbols: P(x_t | x_{t−k} … x_{t−1}) is one row of a table drawn
    from a symmetric Dirichlet distribution, with ε/V mixed in so that the chain is ergodic. With π its stationary
    distribution over k-grams,

        h_j = H(X_j | X_0 … X_{j−1}) = H(X_0 … X_j) − H(X_0 … X_{j−1})    for j < k, from the marginals of π
        h_k = − Σ_s π(s) Σ_x P(x | s) log P(x | s)                         the entropy rate

    and a predictor that sees m symbols cannot do better than h_min(m, k) on average. None of it is sampled.

    Reference: Cover and Thomas, *Elements of Information Theory*, chapter 4.

    One document of `length` symbols, each an ASCII letter or digit. The table depends only on `seed`.
    """

    class Config(config.Config):
        name: Literal["grammar"] = "grammar"
        symbols: int = Field(default=16, ge=2, le=len(ALPHABET))
        order: int = Field(default=2, ge=1, le=3)
        concentration: float = Field(default=0.3, ge=0.01)
        seed: int = Field(default=0, ge=0)
        length: int = Field(default=400_000, ge=100)

        @model_validator(mode="after")
        def _small_enough(self) -> "Grammar.Config":
            if self.symbols**self.order > MAX_STATES:
                raise ValueError(
                    f"{self.symbols} symbols at order {self.order} make {self.symbols**self.order} states, "
                    f"more than {MAX_STATES}; lower `symbols` or `order`"
                )
            return self

        def build(self) -> "Grammar":
            return Grammar(self.symbols, self.order, self.concentration, self.seed, self.length)

    def __init__(
        self,
        symbols: int = 16,
        order: int = 2,
        concentration: float = 0.3,
        seed: int = 0,
        length: int = 400_000,
    ) -> None:
        self.symbols, self.order, self.length = symbols, order, length
        table_seed, self._path_seed = np.random.SeedSequence(seed).spawn(2)
        drawn = np.random.default_rng(table_seed).dirichlet(np.full(symbols, concentration), symbols**order)
        self.table: Float[np.ndarray, "states symbols"] = (1 - UNIFORM_SHARE) * drawn + UNIFORM_SHARE / symbols

    @cached_property
    def stationary(self) -> Float[np.ndarray, " states"]:
        """Probability of each k-gram, the earliest symbol being the most significant digit of its index."""
        V = self.symbols
        table = self.table.reshape(V, -1, V)
        π = np.full(V**self.order, V**-self.order)
        change = np.inf
        for _ in range(MAX_ITERATIONS):
            new = np.einsum("as,asx->sx", π.reshape(V, -1), table).reshape(-1)
            new /= new.sum()
            change, π = np.abs(new - π).sum(), new
            if change < TOLERANCE:
                return π
        raise RecipeError(
            f"the grammar's distribution did not settle (change {change:.1e}, wanted {TOLERANCE}); "
            "raise data.corpus.concentration or take another seed"
        )

    def entropies(self) -> list[float]:
        """h_0 … h_k in nats per symbol; non-increasing, the last one being the entropy rate."""
        V, k = self.symbols, self.order
        joint = [0.0] + [entropy(self.stationary.reshape(V**m, -1).sum(axis=1)) for m in range(1, k + 1)]
        rate = float(-(self.stationary[:, None] * self.table * np.log(self.table)).sum())
        return [*np.diff(joint).tolist(), rate]

    def floor(self, context: int) -> float:
        """The least mean loss, in nats per symbol, over the `context` predictions of a window."""
        return window_floor(self.entropies(), context)

    def sample(self) -> Int[np.ndarray, " length"]:
        """The language's symbols, 0 … V−1; the first k come from the stationary distribution."""
        V, k = self.symbols, self.order
        rng = np.random.default_rng(self._path_seed)
        cumulative = array("d", self.table.cumsum(axis=1).reshape(-1).tobytes())
        state = int(np.searchsorted(self.stationary.cumsum()[:-1], rng.random(), side="right"))
        symbols = [state // V**i % V for i in reversed(range(k))]
        for u in rng.random(self.length - k).tolist():
            first = state * V
            symbol = bisect_right(cumulative, u, first, first + V - 1) - first
            symbols.append(symbol)
            state = (first + symbol) % V**k
        return np.array(symbols)

    @property
    def title(self) -> str:
        return "grammar"

    def documents(self) -> Iterator[Document]:
        letters = np.frombuffer(ALPHABET.encode(), np.uint8)
        yield Document("grammar", letters[self.sample()].tobytes().decode("ascii"))


def entropy(p: Float[np.ndarray, " outcomes"]) -> float:
    """Shannon entropy in nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def window_floor(entropies: list[float], context: int) -> float:
    """Mean of h_min(t+1, k) over the positions t = 0 … context − 1 of a window, in nats."""
    order = len(entropies) - 1
    return sum(entropies[min(t + 1, order)] for t in range(context)) / context
