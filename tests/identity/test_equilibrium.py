"""Where equilibrium propagation must equal the exact gradient, and how it gets there. float64."""

import pytest
import torch

from heterodox.credit import BPTT, Backprop, Implicit
from heterodox.model.dynamics import Linearisation
from heterodox.objective import CrossEntropy
from tests.measured import exactly, is_of_order, within
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_equilibrium import WEIGHTS, converged, distance, gradients, relaxed_names, tiny_equilibrium

MODELS = {
    "one block": {},
    "two blocks": {"layers": 2, "weight_std": 0.1},
    "attention alone": {"mlp_ratio": 0, "layer_norm": False, "weight_std": 0.35},
    "weak branch, strong damping": {"scale": 0.5, "damping": 2.0, "weight_std": 0.25},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
TO_THE_LIMIT = {"steps": 150, "tolerance": 1e-14}
BETAS = (0.02, 0.01)


def exact(model) -> dict[str, torch.Tensor]:
    return gradients(Implicit(**TO_THE_LIMIT), model)


def errors_at(model, betas, **options) -> list[float]:
    names, truth = relaxed_names(model), exact(model)
    errors = [distance(gradients(converged(beta=beta, **options), model), truth, names) for beta in betas]
    assert errors[0] > 1e-9, "degenerate: no error to measure"
    return errors


@models
def test_implicit_and_bptt_agree_at_a_fixed_point(options):
    model = tiny_equilibrium(**options)
    names, truth = relaxed_names(model), gradients(BPTT(), model)
    assert within(distance(exact(model), truth, names), 1e-11)
    assert distance(gradients(Implicit(steps=3, tolerance=None, adjoint_limit=None), model), truth, names) > 1e-2
    assert within(distance(gradients(Implicit(solver="anderson", **TO_THE_LIMIT), model), truth, names), 1e-11)


@pytest.mark.parametrize("loss_gradient", ["frozen", "live"])
@models
def test_the_centred_estimate_is_exact_to_second_order(options, loss_gradient):
    """Falling twofold, β shrinks the error fourfold."""
    errors = errors_at(tiny_equilibrium(**options), BETAS, live=loss_gradient == "live")
    assert is_of_order(errors, BETAS, 2, 0.1)


@pytest.mark.parametrize("loss_gradient", ["frozen", "live"])
@models
def test_the_one_sided_estimate_is_exact_to_first_order(options, loss_gradient):
    errors = errors_at(tiny_equilibrium(**options), BETAS, centered=False, live=loss_gradient == "live")
    assert is_of_order(errors, BETAS, 1, 0.1)


@pytest.mark.parametrize("centered", [True, False])
def test_in_the_limit_it_is_the_exact_gradient(centered):
    model = tiny_equilibrium()
    truth, beta = exact(model), 1e-5 if centered else 1e-7
    close = gradients(converged(beta=beta, centered=centered), model)
    assert within(distance(close, truth, relaxed_names(model)), 1e-6)
    for name in model.readout_names:
        assert torch.allclose(close[name], truth[name], rtol=1e-12, atol=1e-15)


@models
def test_the_plain_rule_never_gets_there(options):
    """Its error stays where it is, whatever β."""
    betas = (1e-2, 1e-3, 1e-4)
    errors = errors_at(tiny_equilibrium(**options), betas, corrected=False)
    assert errors[-1] > 0.05
    assert is_of_order(errors, betas, 0, 2e-4)


@models
def test_the_wrong_sign_of_the_correction_is_worse_than_none(options, monkeypatch):
    model = tiny_equilibrium(**options)
    names, truth = relaxed_names(model), exact(model)
    none = distance(gradients(converged(beta=1e-3, corrected=False), model), truth, names)
    right = distance(gradients(converged(beta=1e-3), model), truth, names)
    jvp, vjp = Linearisation.jvp, Linearisation.vjp
    monkeypatch.setattr(Linearisation, "jvp", vjp)
    monkeypatch.setattr(Linearisation, "vjp", jvp)
    wrong = distance(gradients(converged(beta=1e-3), model), truth, names)
    assert within(right, 1e-4)
    assert 1e-4 < none < wrong


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@models
def test_euler_steps_of_the_nudged_phase_are_steps_of_bptt(options, steps):
    """After any number of steps, not just at the end: the nudged phase replays BPTT through the last steps."""
    model = tiny_equilibrium(**options)
    names = [name for name in relaxed_names(model) if steps > 1 or not options.get("layers")]
    unrolled = gradients(BPTT(through=steps), _cut(model, steps))
    nudged = gradients(converged(beta=1e-4, nudged_steps=steps, tolerance=None), model)
    if steps == 1 and options.get("layers") == 2:  # one step does not reach the first of two blocks
        names = [name for name in relaxed_names(model) if name.startswith("blocks.1")]
    assert within(distance(nudged, unrolled, names), 1e-6)
    more = gradients(converged(beta=1e-4, nudged_steps=steps + 1, tolerance=None), model)
    assert distance(more, unrolled, names) > 1e-5


def _cut(model, steps: int):
    """The same model with so many fixed steps after convergence (a tolerance would end BPTT before it began)."""
    model.tolerance, model.steps = None, 70 + steps
    return model


def test_the_plain_rule_gives_earlier_tokens_no_credit():
    """With the loss on the last token alone, later tokens learn from earlier ones only through keys and values."""
    model = tiny_equilibrium()
    batch = tiny_batch()

    class LastToken(CrossEntropy):
        def losses(self, logits, batch):
            return torch.nn.functional.cross_entropy(logits[:, -1], batch.targets[:, -1], reduction="none")

    def credit_at_positions(rule) -> torch.Tensor:
        """The norm of the position embedding's gradient, position by position: that of the adjoint."""
        return rule.signal(model, batch, WEIGHTS, LastToken()).grads["pos_emb.weight"].norm(dim=-1)

    plain = credit_at_positions(converged(beta=1e-4, corrected=False))
    full = credit_at_positions(converged(beta=1e-4))
    truth = credit_at_positions(Implicit(**TO_THE_LIMIT))
    assert (plain[:-1] == 0).all()
    assert plain[-1] > 1e-3
    assert (truth[:-1] > 1e-5).all()
    assert torch.allclose(full, truth, rtol=1e-6)


def test_a_conservative_force_needs_no_correction():
    """An MLP with tied weights and no norm is the gradient of an energy: both rules are exact, and the third term 0."""
    model = tiny_equilibrium(mlp_ratio=4, layer_norm=False, bias=False)
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.o.weight.zero_()  # attention falls silent
        block.mlp.proj.weight.copy_(block.mlp.fc.weight.T)
    names = ["blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight", "tok_emb.weight", "pos_emb.weight"]
    truth = exact(model)
    assert within(distance(gradients(converged(beta=1e-4, corrected=False), model), truth, names), 1e-6)
    assert within(distance(gradients(converged(beta=1e-4), model), truth, names), 1e-6)
    with torch.no_grad():
        block.mlp.proj.weight[0, 0] += 1.0  # not tied any more
    truth = exact(model)
    assert distance(gradients(converged(beta=1e-4, corrected=False), model), truth, names) > 1e-3
    assert within(distance(gradients(converged(beta=1e-4), model), truth, names), 1e-6)


class TestFeedForward:
    """The ordinary GPT, each layer's output a state."""

    def test_it_is_backprop(self):
        model = tiny_gpt(layers=3)
        truth = gradients(Backprop(), model)
        errors = [distance(gradients(converged(beta=beta, nudged_steps=None), model), truth) for beta in BETAS]
        assert is_of_order(errors, BETAS, 2, 0.07)
        close = gradients(converged(beta=1e-5, nudged_steps=None), model)
        for name, gradient in truth.items():
            if not name.endswith("k.bias"):
                assert torch.allclose(close[name], gradient, rtol=1e-4, atol=1e-7), name

    def test_the_plain_rule_trains_the_last_layer_alone(self):
        """Without the correction nothing travels down."""
        model = tiny_gpt(layers=3)
        plain = gradients(converged(beta=1e-5, corrected=False, nudged_steps=None), model)
        truth = gradients(Backprop(), model)
        for name, gradient in plain.items():
            if name.startswith(("blocks.0", "blocks.1", "tok", "pos")):
                assert gradient.norm() == 0, name
        last = ["blocks.2.mlp.fc.weight", "blocks.2.attn.q.weight", "blocks.2.ln1.weight"]
        assert within(distance(plain, truth, last), 1e-5)

    def test_one_step_less_does_not_reach_the_embeddings(self):
        model = tiny_gpt(layers=3)
        short = gradients(converged(beta=1e-5, nudged_steps=3, tolerance=None), model)
        assert short["tok_emb.weight"].norm() == 0
        assert short["blocks.0.mlp.fc.weight"].norm() > 0


@pytest.mark.parametrize("centered", [True, False])
def test_anderson_finds_the_same_adjoint(centered):
    model = tiny_equilibrium()
    options = {"beta": 1e-3, "centered": centered}
    truth = gradients(converged(**options), model)
    names = relaxed_names(model)
    anderson = converged(**options, solver="anderson", nudged_steps=40)
    assert within(distance(gradients(anderson, model), truth, names), 1e-9)
    slow = converged(**options, nudged_steps=9, tolerance=None)
    fast = converged(**options, solver="anderson", nudged_steps=9, tolerance=None)
    apart = [distance(gradients(rule, model), truth, names) for rule in (slow, fast)]
    assert apart[1] < apart[0]


def test_the_clip_shortens_the_correction():
    """A clip that is never reached changes nothing; one that is reached costs accuracy, in the end all."""
    model = tiny_equilibrium()
    names, truth = relaxed_names(model), exact(model)

    def error(**options) -> float:
        return distance(
            gradients(converged(beta=1e-3, nudged_steps=60, tolerance=None, **options), model), truth, names
        )

    assert exactly(error(clip=1e6), error())
    assert within(error(), 1e-4)
    assert error(clip=0.1) > 1e-2
    assert error(clip=1e-9) == pytest.approx(error(corrected=False), rel=1e-6)
