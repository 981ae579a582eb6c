"""Documents are reranked for a query, itself a document, by how alike people found the two.

The data are Lee's: 50 news items, of which people judged every two (Lee, Pincombe and Welsh, 2005). The model reads
each item once, and a small head on its hidden states scores two items: 50 items are read, not 2,450 pairs. The head is
trained from scores alone, with `dpofast.list_score_loss`: by softmax-DPO, of the most alike item against all others,
and by LiPO-lambda, of all items with their judgements.

Items about one story are held out together, five times over, so that each is a held-out query once. Training lists are
of training items alone, so no judgement that a held-out query has part in is ever trained on.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from results import Figure, Report
from torch import Tensor, nn
from workbench import Workbench, need

import dpofast
from dpofast.train.ranking import ndcg

PACKAGES = ("gensim",)
SAME_STORY = 0.6  # people's similarity, of at most 1, from which two items are held out together
FOLDS, INNER = 5, 4  # of all items; of those of a training, to decide on its steps
LOSSES = {"softmax_dpo": "softmax-DPO", "lipo_lambda": "LiPO-lambda"}
STEPS, EVERY, RATE, DECAY = 60, 10, 0.02, 0.1  # at most, between looks at the inner items, AdamW's


class Items(NamedTuple):
    """News items and how alike people found every two: ``[N, N]``, the mean of answers from 1 to 5, divided by 5."""

    texts: list[str]
    background: list[str]
    similarity: Tensor

    @property
    def grades(self) -> Tensor:
        """From 0, not alike at all, to 4."""
        return (5 * self.similarity - 1).clamp(min=0)


def lee() -> Items:
    """Lee's items, and older ones that say which words are common."""
    spec = importlib.util.find_spec("gensim")
    need(spec, "gensim, whose tests have the data", "pip install gensim")
    folder = Path(spec.submodule_search_locations[0]) / "test" / "test_data"
    texts, background = (
        (folder / name).read_text(encoding="latin-1").strip("\n").split("\n")
        for name in ("lee.cor", "lee_background.cor")
    )
    rows = [[float(x) for x in line.split()] for line in (folder / "similarities0-1.txt").read_text().splitlines()]
    upper = torch.tensor(rows).triu(1)
    return Items(texts, background, upper + upper.T + torch.eye(len(rows)))


def stories(similarity: Tensor) -> list[int]:
    """The story of each item, by its first item: items are of one story if a chain of alike items leads from one to the
    other."""
    found = list(range(len(similarity)))
    for i, j in (similarity >= SAME_STORY).nonzero().tolist():
        old, new = max(found[i], found[j]), min(found[i], found[j])
        found = [new if story == old else story for story in found]
    return found


def folds(story: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """The places in ``story`` in so many parts of about one size, no story in two of them."""
    sizes = Counter(story)
    order = random.Random(seed).sample(sorted(sizes), len(sizes))
    parts: list[list[int]] = [[] for _ in range(count)]
    for name in sorted(order, key=sizes.get, reverse=True):
        min(parts, key=len).extend(i for i, other in enumerate(story) if other == name)
    return [part for part in parts if part]


class Head(nn.Module):
    """Scores of every two items ``[N, N]``: the cosine of their centred hidden states, each dimension with its weight.

    All weights begin at 1, where a score is the cosine; the centre is the mean of training items. H + 1 parameters.
    """

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.centre = centre
        self.log_weight = nn.Parameter(torch.zeros_like(centre))
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, states: Tensor) -> Tensor:
        z = F.normalize(F.normalize(states - self.centre, dim=-1) * self.log_weight.exp(), dim=-1)
        return self.log_scale.exp() * (z @ z.T)


def lists(scores: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, N - 1]``: for each item as a query, scores and grades of all others, the most alike first."""
    others = ~torch.eye(len(scores), dtype=torch.bool)
    scores, grades = (x[others].view(len(x), -1) for x in (scores, grades))
    order = grades.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), grades.gather(1, order)


def fit(states: Tensor, grades: Tensor, loss_type: str, steps: int, look=None) -> Head:
    """A head trained on lists of these items for these items; ``look`` sees it before the first step and after some."""
    head = Head(states.mean(0))
    groups = [{"params": [head.log_weight], "weight_decay": DECAY}, {"params": [head.log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    for step in range(steps + 1):
        if look is not None and step % EVERY == 0:
            look(step, head)
        if step < steps:
            outputs, targets = lists(head(states), grades)
            scored = {} if loss_type == "softmax_dpo" else {"scores": targets.flatten()}
            loss = dpofast.list_score_loss(outputs.flatten(), outputs.shape[1], loss_type=loss_type, **scored)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def steps_of(states: Tensor, grades: Tensor, story: Sequence[int], loss_type: str, seed: int) -> int:
    """The number of steps that is best for stories among the training items, left out of training in turns for this."""
    found: Counter[int] = Counter()
    for out in folds(story, INNER, seed):
        rest = [i for i in range(len(story)) if i not in out]

        def look(step: int, head: Head, out: Sequence[int] = out) -> None:
            found[step] += sum(queries_ndcg(head(states).detach(), grades, out))

        fit(states[rest], grades[rest][:, rest], loss_type, STEPS, look)
    return max(found, key=found.get)


def queries_ndcg(scores: Tensor, grades: Tensor, queries: Sequence[int]) -> list[float]:
    """nDCG of the order of all other items for each query."""
    rows, targets = lists(scores, grades)
    return [ndcg(rows[query].tolist(), targets[query].tolist()) for query in queries]


def first_is_best(scores: Tensor, grades: Tensor) -> list[float]:
    """For each item as a query, whether an item of the best grade is above all that are not of it."""
    rows, targets = lists(scores, grades)
    best = targets == targets[:, :1]
    own, rival = (rows.masked_fill(~where, -torch.inf).amax(1) for where in (best, ~best))
    return (own > rival).double().tolist()


def tf_idf(texts: Sequence[str], background: Sequence[str]) -> Tensor:
    """The cosine ``[N, N]`` of vectors of words, each ``(1 + log count) log((1 + D) / (1 + documents))``."""
    documents = Counter(word for text in background for word in set(_words(text)))
    counts = [Counter(_words(text)) for text in texts]
    place = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    vectors = torch.zeros(len(texts), len(place), dtype=torch.float64)
    for row, count in zip(vectors, counts):
        for word, n in count.items():
            row[place[word]] = (1 + math.log(n)) * math.log((1 + len(background)) / (1 + documents[word]))
    vectors = F.normalize(vectors, dim=1)
    return vectors @ vectors.T


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


@torch.no_grad()
def hidden_states(bench: Workbench, texts: Sequence[str]) -> Tensor:
    """The mean of the last hidden states ``[N, H]`` of each text, without its first token, which the others lean on."""
    from dpofast.train.model import load_trained

    model = load_trained(bench.model, "model").base_model
    found = []
    for text in texts:
        ids = torch.tensor([bench.tokenizer(text)["input_ids"]])
        with torch.autocast("cpu", torch.bfloat16, enabled=bench.precision == "bf16"):
            found.append(model(ids).last_hidden_state[0, 1:].float().mean(0))
    return torch.stack(found)


def held_out_scores(states: Tensor, items: Items, seed: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Scores ``[N, N]`` by each kind of head, the row of a query by a head that was trained without it; and steps."""
    story, n = stories(items.similarity), len(states)
    scores = {name: torch.zeros(n, n) for name in ("untrained", *LOSSES)}
    steps: dict[str, list[int]] = {name: [] for name in LOSSES}
    for out in folds(story, FOLDS, seed):
        rest = [i for i in range(n) if i not in out]
        known, grades = states[rest], items.grades[rest][:, rest]
        scores["untrained"][out] = Head(known.mean(0))(states).detach()[out]
        for name in LOSSES:
            steps[name].append(steps_of(known, grades, [story[i] for i in rest], name, seed))
            scores[name][out] = fit(known, grades, name, steps[name][-1])(states).detach()[out]
    return scores, steps


def main(argv: Sequence[str] | None = None) -> Report:
    bench = Workbench("search", __doc__.partition("\n")[0], argv)
    items = lee()
    with bench.phase("hidden states"):
        states = hidden_states(bench, items.texts)
    with bench.phase("training heads"):
        scores, steps = held_out_scores(states, items, bench.args.seed)
    unit = F.normalize(states, dim=-1)
    scores |= {"cosine": unit @ unit.T, "words": tf_idf(items.texts, items.background)}
    queries = range(len(states))
    found = {name: queries_ndcg(x, items.grades, queries) for name, x in scores.items()}
    chance = sum(queries_ndcg(torch.zeros_like(items.grades), items.grades, queries)) / len(queries)
    groups = [f"{story}" for story in stories(items.similarity)]

    def figure(what: str, before: str | None, after: str) -> Figure:
        return Figure(what, found.get(before), found[after], groups, chance, unit="nDCG")

    report = Report(bench, "News items, reranked by people's judgements", "story", PACKAGES)
    report.figures += [figure("TF-IDF", None, "words"), figure("hidden states, centred", "cosine", "untrained")]
    report.figures += [figure(f"head by {name}", "untrained", loss) for loss, name in LOSSES.items()]
    report.figures += [figure(f"TF-IDF, then {name}", "words", loss) for loss, name in LOSSES.items()]
    best = {name: first_is_best(x, items.grades) for name, x in scores.items()}
    _, grades = lists(items.grades, items.grades)
    luck = (grades == grades[:, :1]).double().mean().item()
    report.figures.append(Figure("most alike item first, TF-IDF", None, best["words"], groups, luck))
    report.figures += [
        Figure(f"most alike item first, {name}", best["untrained"], best[loss], groups, luck)
        for loss, name in LOSSES.items()
    ]
    report.notes += notes(items, groups, steps)
    report.write()
    return report


def notes(items: Items, groups: Sequence[str], steps: dict[str, list[int]]) -> list[str]:
    taken = "; ".join(f"{LOSSES[name]} {', '.join(map(str, counts))}" for name, counts in steps.items())
    return [
        f"Each of the {len(groups)} items is a query once, for all others as candidates, with a head trained without "
        "it and without every item of its story. A story is what a chain of items leads through that people found at "
        f"least {SAME_STORY:.0%} alike. A head's steps are decided by stories among the training items: {taken}. nDCG "
        "is over the whole list, with gains 2^g - 1 and g from 0 to 4; level scores share their discounts. Its "
        "baseline is a random order. The head's shape, learning rate and weight decay were tried on these same "
        "queries, so the gains may be a little flattering.",
        "The row *centred* compares the cosine of two items' mean hidden states, as the untrained model has them, with "
        "the same after the mean of the training items is taken off. No judgement has part in it, and the heads begin "
        "there. A row *TF-IDF, then* has TF-IDF in place of before. Queries share their candidates, so errors are too "
        "small rather than too large.",
    ]


if __name__ == "__main__":
    main()
