"""The step's benchmark: what dpofast makes of the time and the peak memory of a whole training step.

    make bench-step                     some minutes
    dpofast bench step --quick          a tiny random model: only shows that it runs (in a checkout)
    dpofast bench step --share-prompt --tokens 192 64    with the prompt of a pair once, for pairs of that many tokens

SmolLM2-135M-Instruct's own weights, pairs from the documentation of ruff's rules, and each trainer's defaults. A step
is the reference's forward, the policy's forward and backward, clipping and AdamW. Time: both ways in turns in one
process, which may be shared, so that only their ratio means something. Memory: each way in a process of its own, the
growth of its resident set within the second step, above weights and AdamW's moments.

After the warm-up the learning rate is 0, which saves no work: both ways then meet the same weights, and their losses
and gradients must agree, or the script fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpofast._memory import peak_growth
from dpofast.bench import record, report
from dpofast.bench.measure import in_a_process_of_its_own, machine, seconds
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE

PAIRS = 4
WAYS = ("before", "after")  # without dpofast, with it
BETA = 0.1
PAIRS_FILE, RATES_FILE = "pairs.json", "rates.json"
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Relative, of loss and gradient norm. With 16 bits TRL and Liger round each logit, which is some tens, and a loss is
of hundreds of them; dpofast does not."""
ROUNDED = 0.2
"""The same, of plain PyTorch's loss in bf16 from that of logits in fp32. A logit between 16 and 32 is rounded by 0.036
in the mean square (2^-3 / sqrt 12), the margin of a pair is of 4 sums of some 64 of them, times beta: 0.06, of which
this is three. A loss changes by no more of itself than its margins change."""

ForwardBackward = Callable[[str], Tensor]
"""A step of one of WAYS; returns the loss."""


class Row(NamedTuple):
    """A training step, and whose loss it has without dpofast."""

    workload: str
    provider: str
    build: Callable[[Path, Row], tuple[nn.Module, ForwardBackward]]
    dtype: str = "bf16"
    lora: bool = False
    shares: bool = False  # dpofast runs the prompt of a pair once
    truth: str = "before"  # the way whose loss and gradient dpofast must have

    @property
    def facts(self) -> Record:
        case = ", ".join(name for name, on in (("LoRA", self.lora), ("prompt shared", self.shares)) if on)
        return Record("step", workload=self.workload, case=case, dtype=self.dtype)

    def __str__(self) -> str:
        return report.step_name(self.facts)


# What is trained on what: written to a folder once, read by each process


def write_smollm2(folder: Path, length: int, tokens: tuple[int, int] | None) -> None:
    """The checkpoint, and the longest pairs of which no sequence has more than ``length`` tokens.

    With ``tokens`` instead pairs of about so many, of the prompt and of each answer, cut from the same text.
    """
    from transformers import AutoModelForCausalLM

    from dpofast.demo.model import gguf_file, load_model, load_tokenizer

    tokenizer = load_tokenizer(gguf_file())
    pairs = longest_pairs(tokenizer, length) if tokens is None else cut_pairs(tokenizer, *tokens)
    loaded = load_model(gguf_file())
    del loaded.config.quantization_config  # its weights are floats by now, and trainers refuse what says it is not
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    _write(folder, model, tokenizer, pairs, {"full": 1e-5, "LoRA": 1e-3})


def _documented(tokenizer: Any) -> list[tuple[Any, Any, Any]]:
    """Token ids of the pairs in the documentation of ruff's rules, by the rules' names: prompt, chosen, rejected."""
    from dpofast.data import Encoder, read
    from dpofast.demo import data

    pairs, _ = data.documented_pairs(data.ruff_binary())
    rows = data.rows_of(sorted(pairs, key=lambda pair: pair.rule), tokenizer)
    return [(x.prompt, *(answer.ids for answer in x.answers)) for x in map(Encoder(tokenizer), read(rows))]


def _as_text(tokenizer: Any, *ids: Any) -> dict[str, str]:
    return {side: tokenizer.decode(x) for side, x in zip(("prompt", "chosen", "rejected"), ids, strict=True)}


def longest_pairs(tokenizer: Any, length: int) -> list[dict[str, str]]:
    sized = [(len(x[0]) + max(map(len, x[1:])), i, x) for i, x in enumerate(_documented(tokenizer))]
    fitting = sorted(item for item in sized if item[0] <= length)[-PAIRS:]
    if len(fitting) < PAIRS:
        raise ValueError(f"--length {length}: only {len(fitting)} pairs are that short, {PAIRS} are needed")
    # without the last token, which trainers add
    return [_as_text(tokenizer, prompt, chosen[:-1], rejected[:-1]) for _, _, (prompt, chosen, rejected) in fitting]


def cut_pairs(tokenizer: Any, prompt: int, answer: int) -> list[dict[str, str]]:
    """Pairs of about so many tokens, each piece the continuation of the one before it."""
    text = [token for asked, chosen, _ in _documented(tokenizer) for token in (*asked, *chosen[:-1])]
    ends = (prompt, prompt + answer - 1, prompt + 2 * answer - 2)
    starts = range(0, PAIRS * ends[-1], ends[-1])
    return [_as_text(tokenizer, *(text[s + a : s + b] for a, b in zip((0, *ends), ends))) for s in starts]


def expect_checkout(parser: argparse.ArgumentParser) -> None:
    """Leave with a word where there is no tiny model to write."""
    if not Path("examples", "tiny.py").is_file():
        parser.error("the tiny model is examples/tiny.py: run this in a checkout of dpofast")


def write_tiny(folder: Path) -> None:
    """examples/tiny.py's, which an installed package has not; see `expect_checkout`."""
    sys.path.append(str(Path("examples").resolve()))
    import tiny

    _write(folder, tiny.model(), tiny.tokenizer(), tiny.pairs(PAIRS), {"full": 1e-2, "LoRA": 1e-2})


def _write(folder: Path, model: Any, tokenizer: Any, pairs: list[dict[str, str]], rates: dict[str, float]) -> None:
    """``rates`` are the warm-up's: the loss must leave ln 2, where any two losses would agree."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / PAIRS_FILE).write_text(json.dumps(pairs))
    (folder / RATES_FILE).write_text(json.dumps(rates))


def read(folder: Path) -> tuple[Any, Any, list[dict[str, str]]]:
    """``(model, tokenizer, pairs)``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder), json.loads((folder / PAIRS_FILE).read_text())


def read_batch(folder: Path) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """``(policy, reference, inputs, labels)`` for the loops without a trainer; rows are ``[chosen; rejected]``."""
    policy, tokenizer, pairs = read(folder)
    reference = read(folder)[0].requires_grad_(False)
    ids, labels = [], []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt = tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]
            answer = [*tokenizer(pair[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORE] * len(prompt) + answer))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    inputs = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
    return policy, reference, inputs, pad(labels, padding_value=IGNORE)


# The rows: each builds a model and both ways through it


def trl(folder: Path, row: Row) -> tuple[nn.Module, ForwardBackward]:
    """TRL's DPOTrainer with its defaults, gradient checkpointing among them; the reference is a model beside it, or
    under LoRA the model itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from dpofast.integrations.trl import patched

    model, tokenizer, pairs = read(folder)
    trainer = DPOTrainer(
        model=model,
        ref_model=None if row.lora else read(folder)[0],
        args=DPOConfig(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=PAIRS,
            beta=BETA,
            bf16=row.dtype == "bf16",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if row.lora else None,
    )
    # What Trainer.train does before its first step: TRL's default, and autocast around the forward.
    trainer.model.gradient_checkpointing_enable()
    wrapped = trainer.accelerator.prepare(trainer.model).train()
    batch = next(iter(trainer.get_train_dataloader()))

    def forward_backward(way: str) -> Tensor:
        with patched(share_prompt=row.shares) if way == "after" else contextlib.nullcontext():
            loss = trainer.compute_loss(wrapped, batch)
            trainer.accelerator.backward(loss)
        return loss.detach()

    return trainer.model, forward_backward


def plain(folder: Path, row: Row) -> tuple[nn.Module, ForwardBackward]:
    """A loop that takes log-softmax of the model's logits, against `model_dpo_loss`; Lightning and Transformers'
    Trainer, whose ``compute_loss`` one writes, run the same."""
    from dpofast.integrations.models import model_dpo_loss

    policy, reference, inputs, labels = read_batch(folder)
    targets = labels[:, 1:]

    def exact_logits(model: nn.Module) -> Tensor:
        """Not rounded: products of numbers in bf16, summed up in fp32."""
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden.bfloat16().float(), model.lm_head.weight.bfloat16().float())

    def score(model: nn.Module, exact: bool) -> Tensor:
        logits = exact_logits(model) if exact else model(**inputs, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1)
        picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked.masked_fill(targets == IGNORE, 0).sum(-1)

    def before(exact: bool = False) -> Tensor:
        with torch.no_grad():
            ref = score(reference, exact)
        chosen, rejected = (score(policy, exact) - ref).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def after() -> Tensor:
        return model_dpo_loss(
            policy, inputs, labels, ref_model=reference, share_prompt=row.shares, loss_type="sigmoid", beta=BETA
        ).loss

    return policy, _loop({"before": before, "after": after, "exact": partial(before, exact=True)}, row)


def liger(folder: Path, row: Row) -> tuple[nn.Module, ForwardBackward]:
    """Liger's fused DPO loss, against the class of the same name in dpofast, on the same hidden states."""
    from liger_kernel import chunked_loss

    from dpofast.integrations import liger as ours

    policy, reference, inputs, labels = read_batch(folder)

    def loss(function: nn.Module) -> Tensor:
        with torch.no_grad():
            ref_hidden = reference.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        hidden = policy.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        head, ref_head = policy.lm_head.weight, reference.lm_head.weight
        return function(head, hidden, labels[:, 1:], ref_input=ref_hidden, ref_weight=ref_head)[0]

    modules = {"before": chunked_loss, "after": ours}
    # Liger's compiles itself, in the warm-up
    losses = {way: partial(loss, module.LigerFusedLinearDPOLoss(beta=BETA)) for way, module in modules.items()}
    return policy, _loop(losses, row)


def _loop(losses: dict[str, Callable[[], Tensor]], row: Row) -> ForwardBackward:
    """bf16 is autocast with weights in fp32, as a trainer does it."""

    def forward_backward(way: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=row.dtype == "bf16"):
            loss = losses[way]()
        loss.backward()
        return loss.detach()

    return forward_backward


ROWS = (
    Row("TRL DPOTrainer", "TRL", trl),
    Row("TRL DPOTrainer", "TRL", trl, dtype="fp32"),
    Row("TRL DPOTrainer", "TRL", trl, lora=True),
    Row("plain PyTorch, log-softmax of logits", "plain PyTorch", plain, truth="exact"),
    Row("plain PyTorch, log-softmax of logits", "plain PyTorch", plain, dtype="fp32"),
    Row("Liger LigerFusedLinearDPOLoss", "Liger", liger),
)


# Measuring


class Outcome(NamedTuple):
    """What a step found."""

    loss: float
    grad_norm: float


class Stepper:
    """Steps of one row in either way, warmed up by one step in each of ``warm_up``."""

    def __init__(self, row: Row, folder: Path, warm_up: tuple[str, ...]) -> None:
        torch.manual_seed(0)  # LoRA starts at random
        model, self.forward_backward = row.build(folder, row)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rates = json.loads((folder / RATES_FILE).read_text())
        self.optimizer = torch.optim.AdamW(self.trained, lr=rates["LoRA" if row.lora else "full"])
        for way in warm_up:
            self(way)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def __call__(self, way: str) -> Outcome:
        loss = self.forward_backward(way)
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(loss.item(), norm.item())


def times(row: Row, folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """Seconds of each step, in turns, and what the last ones found."""
    step = Stepper(row, folder, WAYS)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Outcome] = {}
    for _ in range(rounds):
        for way in WAYS:
            took[way].append(seconds(lambda way=way: found.update({way: step(way)})))
    if row.truth not in found:
        found[row.truth] = step(row.truth)
    return took, found


def peak(row: Row, folder: Path, way: str) -> int | None:
    """Bytes by which a step raises this process's memory; None where that cannot be told."""
    step = Stepper(row, folder, (way,))
    return peak_growth(lambda: step(way))


def check(row: Row, found: dict[str, Outcome]) -> None:
    """Raise unless both ways found the same loss and gradient, and a loss that could have differed."""
    before, after = found[row.truth], found["after"]
    tolerance = TOLERANCE[row.dtype]
    if not math.isclose(found["before"].loss, before.loss, rel_tol=ROUNDED):
        raise RuntimeError(f"{row}: the loss is {found['before'].loss}, and {before.loss} of logits in fp32")
    if abs(before.loss - math.log(2)) < 0.01:
        raise RuntimeError(f"{row}: the loss is {before.loss}, that of a policy which equals its reference")
    for name, mine, theirs in zip(Outcome._fields, after, before):
        if not math.isclose(mine, theirs, rel_tol=tolerance):
            raise RuntimeError(f"{row}: {name} is {mine} with dpofast and {theirs} without it")


def measure(row: Row, folder: Path, rounds: int) -> Iterator[list[Record]]:
    took, found = in_a_process_of_its_own(times, row, folder, rounds)
    check(row, found)
    for way, provider in zip(WAYS, (row.provider, "dpofast")):
        facts = row.facts._replace(provider=provider)
        for run, spent in enumerate(took[way], 1):
            yield [facts.of("time", spent, "s", run=run)]
        peak_bytes = in_a_process_of_its_own(peak, row, folder, way)
        numbers = [facts.of("loss", found[way].loss), facts.of("gradient norm", found[way].grad_norm)]
        yield [*([] if peak_bytes is None else [facts.of("peak memory", peak_bytes, "B")]), *numbers]
    ratios = [b / a for a, b in zip(*took.values(), strict=True)]
    yield [facts.of("time / before", statistics.median(ratios))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model in place of SmolLM2")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="PART", help="only rows whose name contains a PART")
    parser.add_argument("--length", type=int, default=128, help="most tokens of a sequence (default 128)")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("PROMPT", "ANSWER"), help="pairs of so many tokens")
    parser.add_argument("--share-prompt", action="store_true", help="dpofast runs the prompt of a pair once")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way (default 3)")
    record.add_out(parser)
    args = parser.parse_args()
    rows = [row for row in ROWS if any(part in str(row) for part in args.rows)]
    if args.share_prompt:
        rows = [row._replace(shares=True) for row in rows if row.build is not liger]  # which is a loss, not a model
    if not rows:
        parser.error(f"--rows {' '.join(args.rows)}: expected parts of {', '.join(map(str, ROWS))}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    if args.quick:
        expect_checkout(parser)

    # Read when Transformers and its like are imported, in other processes.
    os.environ |= dict(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    about = machine() | {name: version(name) for name in ("transformers", "trl", "peft", "liger-kernel")}
    results, out = record.begin(args.out, "step", about)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.quick:
            in_a_process_of_its_own(write_tiny, folder)
        else:
            in_a_process_of_its_own(write_smollm2, folder, args.length, args.tokens)
        for row in rows:
            results.add(measure(row, folder, args.rounds))
            results.save(out)  # each row takes minutes
    print(report.step_table(results), end="", flush=True)


if __name__ == "__main__":
    main()
