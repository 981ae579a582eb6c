"""The prompt once per pair: the time of a step against the share of the prompt, and against what counting tokens says.

    dpofast bench prompt                5 shares of sequences of 256 tokens, some minutes

SmolLM2-135M-Instruct's own weights, fp32, text from the documentation of ruff's rules, the policy's forward and
backward with the loss; the reference is scored before. Three ways in turns in one process: plain PyTorch, which takes
log-softmax of the model's logits; dpofast; and dpofast with the prompt shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpofast.bench import record, step
from dpofast.bench.measure import in_a_process_of_its_own, machine, seconds
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE
from dpofast.integrations.models import model_dpo_loss, model_logprob

SHARES = (0, 25, 50, 75, 90)  # per cent of a sequence
WAYS = ("plain PyTorch", "dpofast", "dpofast, prompt shared")


def losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    with torch.no_grad():
        reference = model_logprob(model, inputs, labels).logps - 0.1
    targets = labels[:, 1:]

    def plain() -> Tensor:
        logps = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        chosen, rejected = (picked - reference).masked_fill(targets == IGNORE, 0).sum(-1).chunk(2)
        return -F.logsigmoid(step.BETA * (chosen - rejected)).mean()

    def ours(share: bool) -> Tensor:
        return model_dpo_loss(model, inputs, labels, ref_logps=reference, share_prompt=share, beta=step.BETA).loss

    return dict(zip(WAYS, (plain, lambda: ours(False), lambda: ours(True)), strict=True))


def lengths_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of each sequence, and of what each pair begins with."""
    ids, there = inputs["input_ids"], inputs["attention_mask"].bool()
    (chosen, rejected), (a, b) = ids.chunk(2), there.chunk(2)
    return there.sum(-1), ((chosen == rejected) & a & b).long().cumprod(-1).sum(-1)


def tokens_left(inputs: dict[str, Tensor]) -> float:
    """The share of tokens that rows [prefix, rest of chosen, rest of rejected] have."""
    lengths, prefix = lengths_of(inputs)
    return ((lengths.sum() - prefix.sum()) / lengths.sum()).item()


def work_left(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """The share of multiply-adds that rows [prefix, rest of chosen, rest of rejected] have.

    They are of the body's weights for each token, of attention over what it sees, and of the head for the tokens that
    count, which are the same.
    """
    config, weights = model.config, sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # to see one token
    lengths, prefix = (x.double() for x in lengths_of(inputs))
    head = model.lm_head.weight.numel() * (labels[:, 1:] != IGNORE).sum()

    def body(tokens: Tensor) -> Tensor:
        """Sequences of so many tokens, or what the first tokens of some have in it."""
        return (weights * tokens + attention * tokens * (tokens + 1) / 2).sum()

    return ((body(lengths) - body(prefix) + head) / (body(lengths) + head)).item()


def measure(folder: Path, length: int, share: int, rounds: int) -> Iterator[list[Record]]:
    model, tokenizer, _ = step.read(folder)
    prompt = length * share // 100
    (folder / step.PAIRS_FILE).write_text(json.dumps(step.cut_pairs(tokenizer, prompt, length - prompt)))
    _, _, inputs, labels = step.read_batch(folder)
    ways, took = losses(model, inputs, labels), {way: [] for way in WAYS}
    for i in range(rounds + 1):  # the first is a warm-up; who comes first changes, for it finds the memory of the last
        for way in (*WAYS[i % len(WAYS) :], *WAYS[: i % len(WAYS)]):
            took[way].append(seconds(lambda way=way: ways[way]().backward()))
            model.zero_grad()
    facts = Record("prompt", workload="SmolLM2", dtype="fp32", case=f"{share} % prompt")
    yield [
        facts.of("tokens / unshared", tokens_left(inputs), provider=WAYS[2]),
        facts.of("work / unshared", work_left(model, inputs, labels), provider=WAYS[2]),
        *(facts.of("time / plain PyTorch", _ratio(took[way], took[WAYS[0]]), provider=way) for way in WAYS[1:]),
        facts.of("time / unshared", _ratio(took[WAYS[2]], took[WAYS[1]]), provider=WAYS[2]),
    ]


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(base[1:], times[1:], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way and share, median taken (default 5)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "prompt", machine())
    with tempfile.TemporaryDirectory() as name:
        in_a_process_of_its_own(step.write_smollm2, Path(name), args.length, (args.length // 2, args.length // 2))
        for share in SHARES:
            results.add(measure(Path(name), args.length, share, args.rounds))
            results.save(out)


if __name__ == "__main__":
    main()
