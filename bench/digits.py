"""A rater for digits with wrong labels, in under a minute on one core: hx.meta_gradient on an MLP.

Ten glyphs of 7x5 pixels, moved about on a 9x9 canvas, with noise; a share of the labels is wrong. A rater reads image
and label; an MLP is trained on weighted examples for a few steps, again and again, and what those steps do to its loss
on a few hundred clean examples is differentiated in the rater. Then MLPs are trained for equally many steps on all
examples, on those that the rater keeps, on as many at random, on those of lowest loss, and on the clean ones.

    python bench/digits.py [--seeds 3] [--control detached|shuffled|constant]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from heterodox.meta import InnerAdamW, meta_gradient
from heterodox.meta.auc import auc

ROWS = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ..##. ..##. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. .#... ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. #.... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
"""
GLYPHS = [glyph for row in ROWS.strip().splitlines() for glyph in row.split()]
SIDE = 9
Examples = tuple[Tensor, Tensor]


def digits(count: int, generator: torch.Generator, noise: float = 0.2) -> Examples:
    """Images (count, 81) and labels."""
    font = torch.tensor([[[p == "#" for p in GLYPHS[10 * row + digit]] for row in range(7)] for digit in range(10)])
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.zeros(count, SIDE, SIDE)
    places = torch.randint(3, (count, 2), generator=generator)
    for image, label, (down, right) in zip(images, labels.tolist(), places.tolist(), strict=True):
        image[down : down + 7, right + 1 : right + 6] = font[label].float()
    return (images + noise * torch.randn(images.shape, generator=generator)).flatten(1), labels


def mislabel(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which a share is another digit's, and which ones are."""
    wrong = torch.rand(len(labels), generator=generator) < share
    other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(wrong, other, labels), wrong


def mlp(seed: int, outputs: int, inputs: int = SIDE * SIDE, hidden: int = 64) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def losses(model: nn.Module, batch: Examples) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Rater(nn.Module):
    """A weight in (0, 1) from image and label."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(seed, 10)
        for parameter in self.net[2].parameters():
            nn.init.zeros_(parameter)

    def scores(self, batch: Examples) -> Tensor:
        return self.net(batch[0]).gather(1, batch[1][:, None])[:, 0]

    def forward(self, batch: Examples) -> Tensor:
        return torch.sigmoid(self.scores(batch))


def some(examples: Examples, count: int, generator: torch.Generator) -> Examples:
    chosen = torch.randint(len(examples[1]), (count,), generator=generator)
    return examples[0][chosen], examples[1][chosen]


def meta_train(train: Examples, clean: Examples, seed: int, rounds: int, window: int, control: str | None) -> Rater:
    """The averaged rater after so many meta-gradients, each through `window` steps of a model now and then new."""
    generator, rater, average = torch.Generator().manual_seed(seed), Rater(seed), Rater(seed)
    optimizer = torch.optim.Adam(rater.parameters(), lr=5e-3)
    inner, state, model = InnerAdamW(lr=3e-3, eps_root=1e-12), None, mlp(seed, 10)

    def weighting(batch: Examples) -> Tensor:
        weights = rater(batch)
        if control == "shuffled":
            return weights.roll(1)
        return {"detached": weights.detach(), "constant": torch.ones_like(weights)}.get(control or "", weights)

    for number in range(rounds):
        if number % 25 == 0:
            model, state = mlp(1000 * seed + number, 10), None
        found = meta_gradient(
            model,
            losses,
            [some(train, 128, generator) for _ in range(window)],
            weighting,
            [some(clean, 256, generator)],
            inner,
            parameters=list(rater.parameters()),
            start=state,
        )
        state = found.state
        for parameter, gradient in zip(rater.parameters(), found.grads, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), rater.parameters(), strict=True):
                mean.lerp_(parameter, 0.02)
    return average


def accuracy(train: Examples, test: Examples, seed: int, steps: int = 600) -> float:
    """Of an MLP after so many steps on `train`."""
    generator, model = torch.Generator().manual_seed(seed), mlp(seed, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, some(train, 64, generator)).mean().backward()
        optimizer.step()
    return float((model(test[0]).argmax(1) == test[1]).float().mean())


def run(seed: int, options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    images, truth = digits(2000, generator)
    labels, wrong = mislabel(truth, options.share, generator)
    train, clean, test = (images, labels), digits(300, generator), digits(2000, generator)
    unseen = digits(2000, generator)
    said, unseen_wrong = mislabel(unseen[1], options.share, generator)
    rater = meta_train(train, clean, seed, options.rounds, options.window, options.control)
    with torch.no_grad():
        scores, held_out = rater.scores(train), rater.scores((unseen[0], said)).numpy()
    keep = int((1 - options.share) * len(labels))
    judge = mlp(seed, 10)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    for _ in range(300):  # what a model trained on everything finds easy
        optimizer.zero_grad()
        losses(judge, some(train, 64, generator)).mean().backward()
        optimizer.step()
    easy = -losses(judge, train).detach()

    def kept(order: Tensor) -> Examples:
        best = order.topk(keep).indices
        return images[best], labels[best]

    bad = unseen_wrong.numpy()
    return {
        "AUC, unseen": auc(held_out[~bad], held_out[bad]) or np.nan,
        "all": accuracy(train, test, seed),
        "random": accuracy(kept(torch.rand(len(labels), generator=generator)), test, seed),
        "low loss": accuracy(kept(easy), test, seed),
        "rater": accuracy(kept(scores), test, seed),
        "clean": accuracy((images[~wrong], labels[~wrong]), test, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.4, help="of labels that are wrong")
    parser.add_argument("--control", choices=["detached", "shuffled", "constant"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    rows = [run(seed, options) for seed in range(options.seeds)]
    for key in rows[0]:
        values = [row[key] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{key:12} {statistics.mean(values):.3f} ± {spread:.3f}   {' '.join(f'{v:.3f}' for v in values)}")
    print(f"{time.perf_counter() - began:.0f} s, of which {time.process_time() - cpu:.0f} s of CPU")


if __name__ == "__main__":
    main()
