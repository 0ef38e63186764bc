"""The kinds of feedback matrices: their structure, their scales, and what is refused."""

import math

import pytest
import torch

from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.credit import DirectFeedback, FeedbackAlignment, KolenPollack
from heterodox.credit.feedback import draw_feedback, linear_layers
from tests.tiny import tiny_gpt, tiny_recipe

KINDS = ["gaussian", "orthogonal", "orthogonal_he", "sparse"]
SHAPES = [(48, 48), (96, 32), (32, 96)]


def drawn(kind: str, shape: tuple[int, int], seed: int = 0, **options) -> torch.Tensor:
    return draw_feedback(kind, *shape, torch.Generator().manual_seed(seed), **options)


def root_mean_square(matrix: torch.Tensor) -> float:
    return float(matrix.double().square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "gain"), [("orthogonal", 1.0), ("orthogonal_he", math.sqrt(2))])
def test_orthogonal_matrices_have_one_singular_value(kind, gain, shape):
    matrix = drawn(kind, shape)
    small = matrix.T @ matrix if shape[0] >= shape[1] else matrix @ matrix.T
    assert torch.allclose(small, gain**2 * torch.eye(min(shape), dtype=torch.float64), atol=1e-12)
    assert (matrix - matrix.flip(0)).norm() > 1
    scaled = drawn(kind, shape, std=0.02)
    assert root_mean_square(scaled) == pytest.approx(0.02 * gain, rel=1e-12)
    assert torch.allclose(scaled / scaled.norm(), matrix / matrix.norm(), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 32, None])
def test_rows_of_sparse_matrices_have_k_entries_at_places_of_their_own(shape, k):
    matrix = drawn("sparse", shape, sparse_k=k)
    wanted = shape[1] // 16 if k is None else k
    assert set((matrix != 0).sum(1).tolist()) == {wanted}
    if wanted < shape[1]:
        assert len({tuple(row.nonzero().flatten().tolist()) for row in matrix}) > shape[0] / 4


@pytest.mark.parametrize("k", [0, 9, 20])
def test_more_entries_than_a_row_has_are_refused(k):
    assert set((drawn("sparse", (4, 8), sparse_k=8) != 0).sum(1).tolist()) == {8}
    with pytest.raises(ValueError, match=f"sparse_k is {k}, but must be between 1 and 8"):
        drawn("sparse", (4, 8), sparse_k=k)


def test_a_narrow_sparse_matrix_keeps_one_entry():
    assert set((drawn("sparse", (6, 8)) != 0).sum(1).tolist()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_at_one_scale_all_kinds_have_one_norm_but_for_the_gain(kind):
    gain = math.sqrt(2) if kind == "orthogonal_he" else 1.0
    assert root_mean_square(drawn(kind, (400, 256), std=0.3)) == pytest.approx(0.3 * gain, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "scale"), [("gaussian", 0.02), ("sparse", 0.02), ("orthogonal", 0.05), ("orthogonal_he", 0.05 * 2**0.5)]
)
def test_natural_scales(kind, scale):
    assert root_mean_square(drawn(kind, (400, 256))) == pytest.approx(scale, rel=0.02)


def test_gaussian_feedback_is_the_stream_s_own_numbers():
    model, streams = tiny_gpt(torch.float32), Streams(3)
    built = FeedbackAlignment.Config().build(model, streams).feedback
    for name, layer in linear_layers(model).items():
        numbers = torch.randn(layer.weight.shape, generator=streams.generator("rule", name))
        assert torch.equal(built[name], numbers * 0.02), name


@pytest.mark.parametrize("rule", [FeedbackAlignment, KolenPollack, DirectFeedback])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_draws_every_kind(rule, kind):
    model = tiny_gpt(torch.float32)
    matrices = rule.Config(feedback=kind).build(model, Streams(0)).feedback
    again = rule.Config(feedback=kind).build(model, Streams(0)).feedback
    other = rule.Config(feedback=kind).build(model, Streams(1)).feedback
    assert len(matrices) > 3
    for name, matrix in matrices.items():
        assert torch.equal(matrix, again[name])
        assert not torch.equal(matrix, other[name])
        if kind == "sparse":
            assert set((matrix != 0).sum(1).tolist()) == {max(1, matrix.shape[1] // 16)}
    names = list(matrices)
    assert not torch.equal(matrices[names[0]].flatten()[:20], matrices[names[1]].flatten()[:20])


@pytest.mark.parametrize("name", ["feedback_alignment", "kolen_pollack", "direct_feedback"])
def test_sparse_feedback_denser_than_its_matrix_is_refused(name):
    fits = tiny_recipe(credit={"name": name, "feedback": "sparse", "sparse_k": 16})
    assert fits.credit.sparse_k == fits.model.width
    with pytest.raises(RecipeError, match=r"sparse_k is 17, but model\.width is 16: .* denser than its matrix"):
        tiny_recipe(credit={"name": name, "feedback": "sparse", "sparse_k": 17})


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"name": "feedback_alignment", "sparse_k": 4}, "for sparse feedback only, and feedback is 'gaussian'"),
        ({"name": "kolen_pollack", "feedback": "orthogonal", "sparse_k": 4}, "for sparse feedback only"),
        ({"name": "direct_feedback", "feedback": "sparse", "sparse_k": 0}, "greater than or equal to 1"),
        ({"name": "feedback_alignment", "feedback_std": 0.1, "grape": {}}, "no effect where grape.norm is match"),
        ({"name": "feedback_alignment", "feedback": "sparse", "grape": {}}, "feedback is 'sparse', but grape fills"),
        ({"name": "feedback_alignment", "feedback": "sparse", "sparse_k": 3, "grape": {}}, "sparse_k is 3, but grape"),
        ({"name": "feedback_alignment", "feedback": "orthogonal_he", "grape": {}}, "which matches the norm"),
        ({"name": "feedback_alignment", "grape": {"probes": 0}}, "credit.grape.probes"),
        ({"name": "feedback_alignment", "grape": {"rate": 2.0}}, "credit.grape.rate"),
        ({"name": "sign_symmetry", "feedback_std": 0.1}, "for magnitude fixed or random"),
        ({"name": "sign_symmetry", "feedback": "sparse"}, "unknown key 'credit.feedback'"),
    ],
)
def test_options_that_do_not_apply_are_refused(section, reason):
    with pytest.raises(RecipeError, match=reason):
        tiny_recipe(credit=section)


@pytest.mark.parametrize("feedback", ["gaussian", "orthogonal", "orthogonal_he"])
def test_grape_takes_dense_feedback_and_keeps_its_gain_where_it_keeps_the_norm(feedback):
    norm = "keep" if feedback == "orthogonal_he" else "match"
    assert tiny_recipe(credit={"name": "feedback_alignment", "feedback": feedback, "grape": {"norm": norm}})
