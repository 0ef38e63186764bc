"""MCL-DSUP's parts: phase B, the start along the stream, transport, masks and regression, each by hand."""

import math

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.credit import Backprop, MetaCritic
from heterodox.credit.meta_critic.forward import look, main_forward
from heterodox.model import GPT
from heterodox.objective import CrossEntropy
from tests.meta_critic import dot, regression_of, rule_of, slope
from tests.signals import WEIGHTS, grads_of, same, signal_of
from tests.tiny import tiny_batch, tiny_gpt

Tensors = dict[str, torch.Tensor]
PARTS = {"outer": {}, "transport": {"transport": "attention"}, "low_rank": {"structure": "low_rank", "rank": 3}}


def critics_of(rule: MetaCritic) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in rule.proposals.critics.state_dict().items()}


def proposed_by(critics: Tensors, model: GPT, **options) -> Tensors:
    """What these critics propose, without a meta-step."""
    rule = rule_of(model, seed=3, objective="frozen", **options)
    rule.proposals.critics.load_state_dict(critics)
    return signal_of(rule, model).grads


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_what_is_handed_over_is_what_the_updated_critics_propose(options):
    """Phase B comes behind the critics' step, and asks MLP_G again; `reuse_target` keeps its answer of before."""
    for reuse in (False, True):
        model = tiny_gpt()
        rule = rule_of(model, reuse_target=reuse, meta_lr=0.05, **options)
        before = critics_of(rule)
        found, after = signal_of(rule, model).grads, critics_of(rule)
        mixed = {name: before[name] if name.startswith("target.") else after[name] for name in after}
        expected = {new: proposed_by(critics, model, **options) for new, critics in ((False, after), (True, mixed))}
        for name in found:
            assert same(found[name], expected[reuse][name]), name
        name = "blocks.0.attn.o.weight"
        for other in (expected[not reuse], proposed_by(before, model, **options)):
            assert not torch.allclose(found[name], other[name], rtol=1e-3)


def silence_hidden_units(rule: MetaCritic) -> None:
    """Leave critics and MLP_G their linear paths alone."""
    with torch.no_grad():
        for name, parameter in rule.proposals.critics.named_parameters():
            if name.endswith(".output"):
                parameter.zero_()


@pytest.mark.parametrize("local_width", [None, 12])
def test_where_the_stream_passes_errors_on_as_they_are_the_start_is_backprop(local_width):
    """Blocks that add nothing: the error at what writes to the stream is that at h_N, through M_i and back."""
    model = tiny_gpt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.o." in name or "mlp.proj." in name:
                parameter.zero_()
    rule = rule_of(model, objective="frozen", local_width=local_width)
    silence_hidden_units(rule)
    found, exact = grads_of(rule, model), grads_of(Backprop(), model)
    on_stream = ("tok_emb.", "pos_emb.", ".attn.o.", ".mlp.proj.")
    writers = [name for name in exact if any(part in name for part in on_stream)]
    assert len(writers) == 10
    for name in writers:
        assert exact[name].norm() > 0
        assert same(found[name], exact[name]), name
    assert not torch.allclose(found["blocks.0.mlp.fc.weight"], exact["blocks.0.mlp.fc.weight"], atol=1e-6)


@pytest.mark.parametrize("way", ["none", "attention"])
def test_an_error_on_its_way_down_is_as_large_as_the_stream_is_short(way):
    """δ_i = r_i · std(h_N) / std(h_i), with a norm's epsilon, from linear paths alone.

    r_i is B·T ∂L/∂h_N, or that with what `transport` adds.
    """
    model = tiny_gpt()
    rule, objective = rule_of(model, objective="frozen", transport=way), CrossEntropy()
    silence_hidden_units(rule)
    proposals = rule.proposals
    seen = main_forward(model, tiny_batch(), WEIGHTS, objective, rule.operations)
    last = model.features(tiny_batch().inputs).detach().requires_grad_()
    loss = (objective.losses(model.readout(last), tiny_batch()) * WEIGHTS).mean()
    error = torch.autograd.grad(loss, last)[0] * tiny_batch().num_tokens

    def length(hidden):
        return (hidden.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    sight = look("error", seen, objective, Solo(), torch.float64)
    target = proposals.target(sight)
    contexts, told = (
        proposals.contexts(seen, proposals.stages, Solo()),
        proposals.tell(seen, proposals.stages, sight, target),
    )
    transport = proposals.critics.transport
    brought = transport(seen.tape, error, -1) if transport is not None else dict.fromkeys((-1, 0, 1), error)
    assert torch.allclose(brought[-1], error, atol=1e-4) == (way == "none")
    for stage in proposals.stages:
        errors = proposals.errors(seen, stage, contexts[stage.index], told[stage.index])
        expected = brought[stage.index] * length(last) / length(seen.outputs[stage.index])
        for slot in stage.on_stream:
            assert same(errors[slot], expected.detach()), slot
    lengths = [float(length(x).mean()) for x in seen.outputs.values()]
    assert max(lengths) > 1.1 * min(lengths)


def attention_weights(model: GPT, block: int) -> torch.Tensor:
    """softmax(QKᵀ/√d) under the causal mask, head by head, from the layers' own outputs."""
    attention, outputs = model.blocks[block].attn, {}
    handles = [
        getattr(attention, name).register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
        for name in "qk"
    ]
    model(tiny_batch().inputs)
    for handle in handles:
        handle.remove()
    q, k = (outputs[name].detach().unflatten(-1, (2, -1)).transpose(1, 2) for name in "qk")
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def test_transport_goes_back_along_the_attention_weights():
    """r_i = g + Σ_{j>i} Q_j A_jᵀ P_j g, written out with the matrices A_j."""
    model = tiny_gpt()
    rule = rule_of(model, transport="attention")
    transport = rule.proposals.critics.transport
    assert transport is not None
    seen = main_forward(model, tiny_batch(), WEIGHTS, CrossEntropy(), rule.operations)
    error = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = transport(seen.tape, error, -1)
    expected = {1: error}
    for block in (1, 0):
        weights = attention_weights(model, block)
        sent = (error @ transport.inward[str(block)].T).unflatten(-1, (2, -1)).transpose(1, 2)
        back = (weights.transpose(-1, -2) @ sent).transpose(1, 2).flatten(-2)
        expected[block - 1] = expected[block] + back @ transport.outward[str(block)].T
        forth = (weights @ sent).transpose(1, 2).flatten(-2)
        assert not torch.allclose(back, forth, atol=1e-3)
    assert found.keys() == expected.keys()
    for stage, brought in expected.items():
        assert same(found[stage].detach(), brought.detach()), stage


def units_of(structure: str, x: torch.Tensor) -> torch.Tensor:
    """The size of each unit among which a mask chooses, from a whole ΔW."""
    if structure == "elementwise":
        return x.abs().flatten()
    return x.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(0, 1).flatten(1).norm(dim=1)


@pytest.mark.parametrize("structure", ["elementwise", "block"])
def test_a_mask_keeps_the_largest_units_as_they_are(structure):
    model = tiny_gpt()
    options = {"structure": structure, "embeddings": "frozen", "objective": "frozen"}
    options |= {"block": 4} if structure == "block" else {}
    whole, some = (grads_of(rule_of(model, density=density, **options), model) for density in (1.0, 0.25))
    for name in (n for n in whole if n.startswith("blocks") and whole[n].ndim == 2):
        kept = some[name] != 0
        assert torch.equal(some[name][kept], whole[name][kept])
        sizes, left = units_of(structure, whole[name]), units_of(structure, whole[name] - some[name])
        num_kept = int((left == 0).sum())
        assert num_kept == len(sizes) // 4
        assert float(sizes[left == 0].min()) >= float(sizes[left > 0].max())


def test_a_low_rank_mask_keeps_the_terms_of_largest_norm():
    """Of four terms the two of largest ‖a‖‖b‖, which is the norm of a bᵀ."""
    model = tiny_gpt()
    rule = rule_of(model, structure="low_rank", rank=4, density=0.5)
    structure = rule.proposals.structure
    assert structure is not None
    raw = torch.randn(structure.num_outputs((8, 6)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = raw[:32].view(4, 8), raw[32:].view(4, 6)
    terms = sorted((torch.outer(a, b) for a, b in zip(left, right, strict=True)), key=torch.linalg.matrix_norm)
    assert same(structure.matrix(raw, (8, 6)), terms[-1] + terms[-2])
    assert not torch.allclose(terms[0] + terms[1], terms[-1] + terms[-2], atol=1e-3)


def test_the_tokens_that_speak_are_those_of_largest_error():
    model = tiny_gpt()
    seen = {}
    for density in (1.0, 0.5):
        rule = rule_of(model, density=density, objective="frozen")
        tape = main_forward(model, tiny_batch(), WEIGHTS, CrossEntropy(), rule.operations)
        sight = look("error", tape, CrossEntropy(), Solo(), torch.float64)
        proposals, stage = rule.proposals, rule.proposals.stages[1]
        context = proposals.contexts(tape, [stage], Solo())[stage.index]
        told = proposals.tell(tape, [stage], sight, proposals.target(sight))[stage.index]
        seen[density] = proposals.errors(tape, stage, context, told)
    for slot, whole in seen[1.0].items():
        kept = seen[0.5][slot].norm(dim=-1) > 0
        assert kept.sum(-1).tolist() == [3] * 4
        assert torch.equal(seen[0.5][slot][kept], whole[kept])
        sizes = whole.norm(dim=-1)
        least, most = sizes.masked_fill(~kept, math.inf).amin(-1), sizes.masked_fill(kept, 0.0).amax(-1)
        assert bool((least >= most).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"structure": "low_rank", "rank": 2}, {"structure": "elementwise", "density": 0.5}],
    ids=["outer", "low_rank", "elementwise"],
)
def test_the_critics_gradient_of_regression_is_that_of_its_loss(options):
    """Along a random direction of θ, of the mean of the stages' terms."""
    model = tiny_gpt()
    rule = rule_of(model, objective="regression", step=0.7, **options)
    terms, found = regression_of(rule, model)
    measured, direction = slope(rule, model, lambda: regression_of(rule, model)[0].mean(), eps=1e-6)
    assert dot(found, direction) == pytest.approx(measured, rel=1e-5)
    assert abs(measured) > 1e-7
    assert len(terms) == 3
    goal = grads_of(Backprop(), model)
    proposed = signal_of(rule_of(model, objective="frozen", **options), model).grads
    wanted = {name: sparse(goal[name], options.get("density", 1.0)) for name in goal}
    apart = [(proposed[n] - wanted[n]).square().sum() for n in proposed if n.startswith("blocks.1.")]
    assert same(terms[2], 0.35 * torch.stack(apart).sum())


def sparse(gradient: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries of a matrix."""
    if gradient.ndim < 2 or density == 1:
        return gradient
    least = gradient.abs().flatten().sort(descending=True).values[int(density * gradient.numel()) - 1]
    return gradient * (gradient.abs() >= least)
