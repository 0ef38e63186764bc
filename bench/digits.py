"""A rater for digits with wrong labels, in under a minute on one core: hx.meta_gradient on an MLP.

Ten glyphs of 7x5 pixels, moved about on a 9x9 canvas, with noise. Of the examples 40 % are noise: half have a random
wrong label (high loss), half a bright corner and the label 0, a shortcut that an MLP finds at once (low loss). A rater
reads image and label; an MLP is trained on weighted examples for a few steps, again and again, and what those steps do
to its loss on a few hundred clean examples is differentiated in the rater. Then MLPs are trained for equally many steps
on all examples, on those that the rater keeps, on as many at random, on those of lowest loss, and on the clean ones.

    python bench/digits.py [--seeds 3] [--random-labels] [--control detached|shuffled|constant]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from heterodox.meta import InnerSGD, meta_gradient
from heterodox.meta.rater import auc_by_kind

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


def digits(count: int, generator: torch.Generator, noise: float = 0.1) -> Examples:
    """Images (count, 81) and labels."""
    font = torch.tensor([[[p == "#" for p in GLYPHS[10 * row + digit]] for row in range(7)] for digit in range(10)])
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.zeros(count, SIDE, SIDE)
    places = torch.randint(3, (count, 2), generator=generator)
    for image, label, (down, right) in zip(images, labels.tolist(), places.tolist(), strict=True):
        image[down : down + 7, right + 1 : right + 6] = font[label].float()
    return (images + noise * torch.randn(images.shape, generator=generator)).flatten(1), labels


def corrupt(examples: Examples, share: float, shortcut: bool, generator: torch.Generator) -> tuple[Examples, Tensor]:
    """Examples of which a share is noise, and kinds: 0 clean; 1 another digit's label; 2 a bright corner, labelled 0.

    The second is noise of high loss, the third of low loss: an MLP learns at once that the corner means 0.
    """
    images, labels = examples
    drawn = torch.rand(len(labels), generator=generator)
    kinds = (drawn < share).long() + (drawn < share / 2).long() * shortcut
    other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    marked = images.clone()
    marked[:, 0] = 3.0
    images = torch.where(kinds[:, None] == 2, marked, images)
    return (images, torch.where(kinds == 1, other, labels).masked_fill(kinds == 2, 0)), kinds


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
    optimizer = torch.optim.Adam(rater.parameters(), lr=1e-2, betas=(0.9, 0.99))
    inner, state, model = InnerSGD(lr=1.0), None, mlp(seed, 10)

    def weighting(batch: Examples) -> Tensor:
        weights = rater(batch)
        if control == "shuffled":
            return weights.roll(1)
        return {"detached": weights.detach(), "constant": torch.ones_like(weights)}.get(control or "", weights)

    for number in range(rounds):
        if number % 200 == 0:
            model, state = mlp(1000 * seed + number, 10), None
        found = meta_gradient(
            model,
            losses,
            [some(train, 512, generator) for _ in range(window)],
            weighting,
            [clean],
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
                mean.lerp_(parameter, 0.01)
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
    train, kinds = corrupt(digits(2000, generator), options.share, not options.random_labels, generator)
    images, labels = train
    clean, test = digits(300, generator), digits(2000, generator)
    unseen, unseen_kinds = corrupt(digits(2000, generator), options.share, not options.random_labels, generator)
    rater = meta_train(train, clean, seed, options.rounds, options.window, options.control)
    with torch.no_grad():
        scores, held_out = rater.scores(train), rater.scores(unseen).numpy()
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

    names = {1: "wrong label"} if options.random_labels else {1: "wrong label", 2: "shortcut"}
    aucs = auc_by_kind(held_out, unseen_kinds.numpy(), list(names.values()))
    return {f"AUC, {name}": value for name, value in aucs.items()} | {
        "all": accuracy(train, test, seed),
        "random": accuracy(kept(torch.rand(len(labels), generator=generator)), test, seed),
        "low loss": accuracy(kept(easy), test, seed),
        "rater": accuracy(kept(scores), test, seed),
        "clean": accuracy((images[kinds == 0], labels[kinds == 0]), test, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1200)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.4, help="of examples that are noise")
    parser.add_argument("--random-labels", action="store_true", help="all of the noise is wrong labels")
    parser.add_argument("--control", choices=["detached", "shuffled", "constant"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    rows = [run(seed, options) for seed in range(options.seeds)]
    for key in rows[0]:
        values = [row[key] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{key:17} {statistics.mean(values):.3f} ± {spread:.3f}   {' '.join(f'{v:.3f}' for v in values)}")
    print(f"{time.perf_counter() - began:.0f} s, of which {time.process_time() - cpu:.0f} s of CPU")


if __name__ == "__main__":
    main()
