"""`dpofast score`: what a model thinks of the answers in some files, each record a line of JSON, and a table."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpofast.data import Encoded, Encoder, read
from dpofast.train.feed import Batch, collate, padding_of
from dpofast.train.ranking import first_is_best, ndcg
from dpofast.train.report import mean_and_error, share_and_error


def score(model: nn.Module, reference: nn.Module | None, records: Iterable[Encoded], options: Any) -> Iterator[dict]:
    """What is known of each record, in their order.

    Args:
        model, reference: in eval mode; the reference gives rewards.
        records: of any number of answers each, the best first.
        options: ``micro_batch``, ``beta``, ``share_prompt``, ``precision`` and ``pad``.

    Yields:
        ``where``; ``logps`` and ``lengths`` of the answers; with a reference ``rewards``, beta times the log-ratios.
        Of several answers also ``logps/correct``, ``average/correct`` and ``rewards/correct``: whether the first is
        above all others, by its log-prob, by that over its length, by its reward; where they have scores
        ``logps/ndcg`` and so on, as `dpofast.train.ranking.ndcg`; of a pair its ``margin`` in rewards.
    """
    for _, group in itertools.groupby(records, key=lambda record: len(record.answers)):
        while part := list(itertools.islice(group, options.micro_batch)):
            batch = collate(part, options.pad)
            logps = _logps(model, batch, options)
            ref = None if reference is None else _logps(reference, batch, options)
            for i, record in enumerate(part):
                mine = logps[i :: len(part)]
                theirs = None if ref is None else ref[i :: len(part)]
                yield _line(record, mine, theirs, options.beta)


@torch.no_grad()
def _logps(model: nn.Module, batch: Batch, options: Any) -> list[float]:
    """The log-probs of the answers ``[N]``, in blocks of all first, all second, ..."""
    from dpofast.integrations.models import model_logprob
    from dpofast.sequences import sequence_logps

    batch = batch.to(next(model.parameters()).device)
    answers = len(batch.labels) // batch.records
    shared = {"share_prompt": True, "answers": answers} if options.share_prompt and answers > 1 else {}
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        logps = model_logprob(model, batch.inputs, batch.labels, **shared).logps
    return sequence_logps(logps, batch.labels[:, 1:]).tolist()


def _line(record: Encoded, logps: Sequence[float], ref_logps: Sequence[float] | None, beta: float) -> dict[str, Any]:
    lengths = [sum(answer.counted) for answer in record.answers]
    line: dict[str, Any] = {"where": record.where, "logps": list(logps), "lengths": lengths}
    if record.label is not None:
        line["label"] = record.label
    if ref_logps is not None:
        line["rewards"] = [beta * (a - b) for a, b in zip(logps, ref_logps)]
    if len(lengths) > 1:
        orders = {"logps": logps, "average": [a / n for a, n in zip(logps, lengths)], "rewards": line.get("rewards")}
        for name, values in orders.items():
            if values is not None:
                line[f"{name}/correct"] = first_is_best(values)
                gain = math.nan if record.scores is None else ndcg(values, record.scores)
                if not math.isnan(gain):
                    line[f"{name}/ndcg"] = gain
    if len(lengths) == 2 and ref_logps is not None:
        line["margin"] = line["rewards"][0] - line["rewards"][1]
    return line


def table(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float, float]]:
    """``(name, records, mean, standard error)`` of each number that some of the lines have."""
    columns: dict[str, list[float]] = {}
    for line in lines:
        for name in ("logps", "rewards"):
            for who, value in zip(_names(line), line.get(name, ())):
                columns.setdefault(f"{name}/{who}", []).append(value)
        for name, value in line.items():
            if name == "margin" or name.endswith(("/correct", "/ndcg")):
                columns.setdefault(name, []).append(float(value))
    measures = {name: share_and_error if name.endswith("/correct") else mean_and_error for name in columns}
    return [(name, len(values), *measures[name](values)) for name, values in columns.items()]


def _names(line: Mapping[str, Any]) -> list[str]:
    """What the answers of a record are called."""
    count = len(line["logps"])
    if count == 1:
        return [{None: "answer", True: "good", False: "bad"}[line.get("label")]]
    return ["chosen", "rejected"] if count == 2 else ["first", *["others"] * (count - 1)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dpofast score", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder with a model or with a LoRA's adapter")
    parser.add_argument("data", nargs="+", help="files of pairs, lists or single answers")
    parser.add_argument("--reference", help="a folder with the model that rewards are counted from")
    parser.add_argument("--beta", type=float, default=0.1, help="of the rewards (default 0.1)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt and an answer (default 1024)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="skip: leave bad records out")
    parser.add_argument("--micro-batch", type=int, default=4, help="records at a time (default 4)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--share-prompt", action="store_true", help="run the prompt of a record's answers once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="the file of lines; without it they go to the standard output")
    args = parser.parse_args(argv)
    if args.micro_batch < 1 or args.max_length < 1 or not args.beta > 0:
        parser.error("--micro-batch, --max-length and --beta: expected numbers of at least 1, at least 1, and above 0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import
    try:
        _score_files(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"dpofast score: {error}", file=sys.stderr)
        return 1
    return 0


def _score_files(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from dpofast.train import model

    disable_progress_bar()
    tokenizer = model.load_tokenizer(args.model)
    args.pad = padding_of(tokenizer)
    policy, reference = (
        None if folder is None else model.load_trained(folder, name).to(args.device)
        for name, folder in (("model", args.model), ("reference", args.reference))
    )
    encode, lines = Encoder(tokenizer, max_length=args.max_length), []
    records = read(args.data, on_error=args.on_error, check=encode if args.on_error == "skip" else None)
    draft = args.out and args.out.with_name(args.out.name + ".unfinished")
    with contextlib.ExitStack() as files:
        out = sys.stdout if draft is None else files.enter_context(draft.open("w", encoding="utf-8"))
        for line in score(policy, reference, map(encode, records), args):
            lines.append(line)
            print(json.dumps(line), file=out)
    if draft is not None:
        draft.replace(args.out)
    for bad in records.skipped:
        print(f"dpofast score: left out {bad.file}:{bad.line}: {bad.reason}", file=sys.stderr)
    shown = Table(title=f"{len(lines)} records" + (f", {len(records.skipped)} left out" if records.skipped else ""))
    for name in ("", "records", "mean", "standard error"):
        shown.add_column(name, justify="right" if name else "left")
    for name, count, mean, error in table(lines):
        shown.add_row(name, f"{count}", f"{mean:.4f}", f"{error:.4f}")
    Console(stderr=args.out is None).print(shown)  # beside lines on the standard output
