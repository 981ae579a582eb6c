"""Training with filtered gradients against exact ones: are they further apart than two orders of the batches?

    dpofast bench filter_training       four trainings of 200 steps, some minutes

The demo's data, model and trained layers, fp32, with the cut that ``grad_filter="auto"`` has in bfloat16. Exact and
filtered take the same batches; two more exact runs take them in other orders, and say what a difference is worth.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dpofast.bench import record
from dpofast.bench.measure import machine
from dpofast.bench.record import Record
from dpofast.demo import data, model, train
from dpofast.demo.run import encoded_split, quiet_libraries
from dpofast.functional import linear_dpo_loss
from dpofast.grad_filter import AUTO
from dpofast.primitive import linear_logprob

CUT = AUTO[torch.bfloat16]
RUNS = (("exact", None, 0), ("filtered", CUT, 0), ("exact, order 1", None, 1), ("exact, order 2", None, 2))
SMOOTHED = 20  # steps of which a mean is a point of a curve


def head_loss(
    cut: float | None, hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, beta: float
) -> train.HeadLoss:
    """The demo's loss with the gradients of ``cut``."""
    out = linear_dpo_loss(hidden, weight, labels, ref_logps=ref, beta=beta, loss_type="sigmoid", grad_filter=cut)
    return train.HeadLoss(out.loss, (out.chosen_rewards - out.rejected_rewards).detach())


def curve(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[i : i + SMOOTHED]) for i in range(0, len(losses), SMOOTHED)]


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(curve(a), curve(b), strict=True))


def dropped(upper: model.Upper, weight: Tensor, inputs: train.Inputs) -> float:
    """The mean dropped mass of the answers' tokens: more than 0 where the filter is at work."""
    labels = inputs.batch.labels
    with torch.no_grad():
        hidden = inputs.batch.unfold(upper(inputs.states, inputs.batch))
    hidden = hidden.requires_grad_()  # a call without gradients filters none
    out = linear_logprob(hidden, weight, labels, grad_filter=CUT, outputs=("dropped_mass",))
    return out.dropped_mass[labels != model.IGNORE].mean().item()


def measure(
    start: model.Upper,
    weight: Tensor,
    seen: Sequence[train.Example],
    unseen: Sequence[train.Example],
    settings: train.Settings,
) -> Iterator[list[Record]]:
    """The trainings one after another, from the same start; the first is what the others are compared with."""
    first = train.stack(next(train.training_batches(seen, settings.batch_size, 0)))
    base = Record("filter_training", workload="SmolLM2", provider="dpofast", dtype="fp32")
    yield [
        base._replace(case="filtered").of("dropped mass of a token, first step, mean", dropped(start, weight, first))
    ]
    exact: list[float] = []
    for name, cut, seed in RUNS:
        upper = copy.deepcopy(start)
        trainer = train.Trainer(upper, weight, settings, partial(head_loss, cut))
        batches = itertools.islice(train.training_batches(seen, settings.batch_size, seed), settings.steps)
        losses = [trainer.step(train.stack(batch)).loss.item() for batch in batches]
        score = train.evaluate(upper, weight, unseen, settings.beta)
        values = {
            "loss of the last steps": curve(losses)[-1],
            "held-out loss": score.loss,
            "held-out margin": score.margin,
        }
        if exact:
            values["mean distance of the loss's curve from exact"] = apart(losses, exact)
        exact = exact or losses
        yield [base._replace(case=name).of(metric, value) for metric, value in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step (default 4)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "filter_training", machine())
    quiet_libraries()
    ruff, path = data.ruff_binary(), model.gguf_file()
    with model.gguf_read_once():
        tokenizer, language_model = model.load_tokenizer(path), model.load_model(path)
    pairs = data.verified_pairs(ruff, data.documented_pairs(ruff)[0])
    training, held_out, _ = encoded_split(pairs, tokenizer, 0)
    settings = train.Settings(steps=args.steps, batch_size=args.batch_size)
    examples, start, weight = train.prepare(
        language_model, [*training, *held_out], settings.top, torch.float32, lambda _: None
    )
    known = {id(pair) for pair in held_out}
    seen = [example for example in examples if id(example.pair) not in known]
    unseen = [example for example in examples if id(example.pair) in known]
    results.add(measure(start, weight, seen, unseen, settings))
    results.save(out)


if __name__ == "__main__":
    main()
