import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from heterodox.data.grammar import ALPHABET, UNIFORM_SHARE, Grammar


def brute_force_entropies(grammar: Grammar) -> list[float]:
    """h_0 … h_k by summing over all strings, with the stationary distribution from an eigenvector."""
    V, k = grammar.symbols, grammar.order
    states = list(itertools.product(range(V), repeat=k))
    move = np.zeros((len(states), len(states)))
    for (i, state), x in itertools.product(enumerate(states), range(V)):
        move[i, states.index((*state[1:], x))] += grammar.table[i, x]
    values, vectors = np.linalg.eig(move.T)
    leading = np.real(vectors[:, np.argmax(np.real(values))])
    stationary = dict(zip(states, leading / leading.sum(), strict=True))
    strings = {(*state, x): stationary[state] * grammar.table[i, x] for i, state in enumerate(states) for x in range(V)}
    joint = [0.0]
    for length in range(1, k + 2):
        marginal: dict[tuple[int, ...], float] = {}
        for letters, p in strings.items():
            marginal[letters[:length]] = marginal.get(letters[:length], 0.0) + p
        joint.append(-sum(p * math.log(p) for p in marginal.values()))
    return np.diff(joint).tolist()


@pytest.mark.parametrize(("symbols", "order"), [(2, 1), (3, 1), (3, 2), (2, 3)])
def test_entropies_agree_with_sums_over_all_strings(symbols, order):
    grammar = Grammar(symbols, order, concentration=0.5, seed=3)
    np.testing.assert_allclose(grammar.entropies(), brute_force_entropies(grammar), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 6), st.integers(1, 3), st.floats(0.01, 5), st.integers(0, 99))
def test_more_context_never_hurts_and_the_distribution_is_stationary(symbols, order, concentration, seed):
    grammar = Grammar(symbols, order, concentration, seed)
    h = grammar.entropies()
    assert len(h) == order + 1
    assert h[0] <= math.log(symbols) + 1e-12
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(h))
    assert grammar.table.min() >= UNIFORM_SHARE / symbols
    np.testing.assert_allclose(grammar.table.sum(axis=1), 1, atol=1e-12)
    assert grammar.stationary.sum() == pytest.approx(1, abs=1e-12)


def test_entropy_rate_agrees_with_a_plug_in_estimate_from_a_sample():
    grammar = Grammar(symbols=6, order=2, length=300_000)
    x = grammar.sample()
    triples = np.bincount(x[:-2] * 36 + x[1:-1] * 6 + x[2:], minlength=216).reshape(36, 6)
    frequency = triples / triples.sum()
    conditional = triples / triples.sum(axis=1, keepdims=True)
    estimate = -(frequency * np.log(np.where(conditional > 0, conditional, 1))).sum()
    assert estimate == pytest.approx(grammar.entropies()[-1], abs=5e-3)
    np.testing.assert_allclose(frequency.sum(axis=1), grammar.stationary, atol=5e-3)


def test_a_nearly_uniform_chain_has_the_entropy_of_a_die():
    grammar = Grammar(symbols=5, order=2, concentration=1e9)
    np.testing.assert_allclose(grammar.entropies(), math.log(5), atol=1e-6)


def test_the_floor_is_the_mean_over_the_positions_of_a_window():
    grammar = Grammar(symbols=4, order=2)
    _, h1, h2 = grammar.entropies()
    assert grammar.floor(1) == pytest.approx(h1)
    assert grammar.floor(5) == pytest.approx((h1 + 4 * h2) / 5)
    assert grammar.floor(10_000) == pytest.approx(h2, abs=1e-3)


def test_text_is_a_function_of_the_seed_and_the_language_is_not_one_of_the_length():
    (document,) = Grammar(length=500, seed=1).documents()
    assert document == next(Grammar(length=500, seed=1).documents())
    assert document.text != next(Grammar(length=500, seed=2).documents()).text
    longer = next(Grammar(length=900, seed=1).documents()).text
    assert longer[:500] == document.text
    assert set(longer) <= set(ALPHABET[:16])


def test_the_default_is_drawn_in_about_a_second():
    start = time.perf_counter()
    (document,) = Grammar().documents()
    assert len(document.text) == 400_000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "options",
    [{"symbols": 1}, {"symbols": 63}, {"order": 0}, {"order": 4}, {"concentration": 0.0}, {"length": 5}],
)
def test_impossible_languages_are_refused(options):
    with pytest.raises(ValidationError):
        Grammar.Config(**options)


def test_too_many_states_are_counted():
    with pytest.raises(ValidationError, match="62 symbols at order 3 make 238328 states, more than 100000"):
        Grammar.Config(symbols=62, order=3)
