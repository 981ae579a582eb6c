"""Training with filtered gradients against exact ones: as far apart as two orders of the batches, or less?

    dpofast bench filter_training        four trainings of 200 steps, some minutes

The demo's data, model and trained layers, fp32, with the cut that ``grad_filter="auto"`` has in bfloat16. Exact and
filtered take the same batches; two more exact runs take them in other orders, and say what a difference is worth.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Sequence
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

CUT = AUTO[torch.bfloat16]
SMOOTHED = 20  # steps of which a mean is a point of a curve


def head_loss(cut: float | None, hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, beta: float):
    out = linear_dpo_loss(hidden, weight, labels, ref_logps=ref, beta=beta, loss_type="sigmoid", grad_filter=cut)
    return train.HeadLoss(out.loss, (out.chosen_rewards - out.rejected_rewards).detach())


def curve(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[i : i + SMOOTHED]) for i in range(0, len(losses), SMOOTHED)]


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(curve(a), curve(b), strict=True))


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
    seen, unseen = examples_of(examples, training), examples_of(examples, held_out)

    losses, scores = {}, {}
    for name, cut, seed in (("exact", None, 0), ("filtered", CUT, 0), ("order 1", None, 1), ("order 2", None, 2)):
        upper = copy.deepcopy(start)
        trainer = train.Trainer(upper, weight, settings, partial(head_loss, cut))
        batches = itertools.islice(train.training_batches(seen, settings.batch_size, seed), settings.steps)
        losses[name] = [trainer.step(train.stack(batch)).loss.item() for batch in batches]
        scores[name] = train.evaluate(upper, weight, unseen, settings.beta)
        facts = Record("filter_training", workload="SmolLM2", provider="dpofast", dtype="fp32", case=name)
        values = [facts.of("loss of the last steps", curve(losses[name])[-1])]
        values += [facts.of("held-out loss", scores[name].loss), facts.of("held-out margin", scores[name].margin)]
        if name != "exact":
            values.append(
                facts.of("mean distance of the loss's curve from exact", apart(losses[name], losses["exact"]))
            )
        results.add([values])
    results.save(out)


def examples_of(examples: Sequence[train.Example], pairs: Sequence[data.EncodedPair]) -> list[train.Example]:
    known = {id(pair) for pair in pairs}
    return [example for example in examples if id(example.pair) in known]


if __name__ == "__main__":
    main()
