"""What a rater can see, and which raters are refused."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from heterodox.core.rng import Streams
from heterodox.meta.options import RaterOptions
from heterodox.meta.rater import Rater, build_rater


def rater(**options) -> Rater:
    """Without blocks, and with a head that says something."""
    sizes = {"layers": 0, "width": 8} | options
    found = build_rater(RaterOptions(**sizes), 11, 12)
    found.initialise(Streams(0))
    with torch.no_grad():
        found.pos_emb.weight.zero_()
        found.head.weight.copy_(torch.linspace(-1, 1, 8)[None])
    return found


def test_neighbours_are_a_convolution():
    found, tokens = rater(conv=3).double(), torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    weight = found.conv.proj.weight.view(8, 8, 3)  # of `unfold`, whose last axis is the place
    wanted = F.gelu(F.conv1d(found.tok_emb(tokens).transpose(1, 2), weight, padding=1)).transpose(1, 2)
    assert torch.allclose(found.conv(found.tok_emb(tokens)), wanted, atol=1e-12)
    assert float(wanted.detach().std()) > 0.1


@torch.no_grad()
def test_it_tells_text_from_the_same_tokens_in_another_order():
    tokens = torch.arange(12)[None] % 11
    again = tokens[:, torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    assert abs(float(rater(conv=3)(tokens) - rater(conv=3)(again))) > 1e-3
    blind = rater(conv=1, layers=1)
    blind.blocks = torch.nn.ModuleList()
    assert abs(float(blind(tokens) - blind(again))) < 1e-6


@torch.no_grad()
def test_it_reads_its_view_and_no_more():
    short, whole = rater(view=5, layers=1), rater(layers=1)
    tokens = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    behind, within = tokens.clone(), tokens.clone()
    behind[:, 5:] = (behind[:, 5:] + 1) % 11
    within[:, 4] = (within[:, 4] + 1) % 11
    assert torch.equal(short(behind), short(tokens))
    assert not torch.equal(short(within), short(tokens))
    assert not torch.equal(whole(behind), whole(tokens))
    assert short.pos_emb.num_embeddings == 5
    assert short.forward_flops(4, 12) == short.forward_flops(4, 5)
    assert short.forward_flops(4, 12).total < whole.forward_flops(4, 12).total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv": 4}, "rater.conv 4 is even"),
        ({"conv": 1, "layers": 0}, "sees no token beside another"),
        ({"layers": 0, "heads": 8, "width": 20}, r"rater\.heads 8 is of blocks, and rater\.layers is 0"),
        ({"layers": 0, "mlp_ratio": 2}, r"rater\.mlp_ratio 2 is of blocks, and rater\.layers is 0"),
        ({"width": 6}, "4 heads do not divide a rater's width of 6"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValidationError, match=message):
        RaterOptions(**options)
