"""Everybody who imports, on the same heads: time, memory, errors; what they are made of is one page.

    dpofast bench                        about half an hour on two cores; `dpofast bench all` is the same
    dpofast bench --seconds 200          begins no point after that; run it again to go on
    dpofast bench --quick                SmolLM2's head and small sizes only
    dpofast bench --device cuda          on a GPU

A point is one provider at one size. It has a process of its own, in which it runs in turns with the bare products
(``torch.mm``) of the tokens that count: three, two where the head is frozen. Hidden states are those of real models, or
flat ones; beside the tokens that count are positions of prompts, and ``case`` says what a provider does with these.
Further, against the vocabulary (a real head, cut) and, for DPO's loss, the number of pairs. `dpofast bench sweep` has
tokens.

A point that would take longer than ``--limit-seconds`` a step, told by a smaller one, or more memory than
``--limit-memory`` above its inputs, is left out, and its record says so. The record is saved after each point.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dpofast
from dpofast._memory import peak_growth
from dpofast.bench import record
from dpofast.bench.measure import (
    DTYPES,
    Timer,
    Work,
    all_in_turns,
    at_most,
    error,
    exact,
    gpu_peak,
    in_a_process_of_its_own,
    machine,
    row_error,
)
from dpofast.bench.providers import (
    BY_NAME,
    CONTENDERS,
    EVERY,
    Contender,
    Products,
    Provider,
    of_pairs,
    training_step,
)
from dpofast.bench.record import Record, Results
from dpofast.bench.workloads import FLAT, HEADS, IGNORE, MODELS, load
from dpofast.plan import parse_bytes

SHARES = (0, 40, 80)  # per cent of the positions that are prompt
TOKENS = dict(zip(MODELS, (1000, 256)))  # that count: a product of the large head takes six times as long
PAIRED = ("plain PyTorch", "TRL, told", "Liger DPO", "dpofast", "dpofast, auto", "dpofast, 32MiB")
ON_AXES = (
    "plain PyTorch", "plain PyTorch, compiled", "F.linear_cross_entropy, chunked", "TRL, told", "Liger DPO",
    "cut-cross-entropy", "dpofast", "dpofast, auto", "dpofast, 256MiB",
)  # fmt: skip
AXES = {
    "vocabulary": (32768, 65536, 131072, 262144),
    "dpo": (1, 4, 16, 64),  # pairs of two sequences
}
AXIS_TOKENS, PAIR_TOKENS = 1024, 256
AT_ONCE = 1024  # tokens of the bare products: of more, slices would be multiplied
REHEARSAL = "rehearsal"  # random states, of a tiny head
HEADS = HEADS | {REHEARSAL: (16, 300)}
TOKENS = TOKENS | {REHEARSAL: 64}


class Limits(NamedTuple):
    """What a point may take."""

    seconds: float  # of a step
    n_bytes: int  # above its inputs


# What is measured


def grid(models: Sequence[str], dtype: str, device: str) -> Iterator[Record]:
    """Each provider at each share of prompts, and on flat states."""
    for model in models:
        facts = Record("all", workload=model, shape=(TOKENS[model], *HEADS[model]), dtype=dtype)
        for c in CONTENDERS:
            if c.device in ("", device):
                # Without a prompt nobody needs to be told, and who drops one takes the same time with it.
                yield from (of(c, facts._replace(prompt=x)) for x in SHARES if (x or not c.twin) and not (x and c.once))
                if c.by_states:
                    yield of(c, facts._replace(states="flat"))


def axes(models: Sequence[str], dtype: str, device: str, sizes: int | None) -> Iterator[Record]:
    """Against vocabulary and pairs. Sizes grow, and so a point says what the next will take."""
    for axis, values in AXES.items():
        model = models[-1] if axis == "vocabulary" else models[0]
        h, own = HEADS[model]
        for name in PAIRED if axis == "dpo" else ON_AXES:
            for x in values[:sizes]:
                dpo = axis == "dpo"
                shape = PAIR_TOKENS * x if dpo else AXIS_TOKENS, h, own if dpo else min(own, x)
                facts = Record(axis, workload=model, shape=shape, dtype=dtype, pairs=x if dpo else 0)
                if BY_NAME[name].device in ("", device):
                    yield of(BY_NAME[name], facts)


def of(c: Contender, facts: Record) -> Record:
    backend = dpofast.plan(8, 8, 8, facts.dtype).backend if c.name.startswith("dpofast") else ""
    return facts._replace(provider=c.name, backend=backend, head="frozen" if c.frozen else "trained", case=c.mask)


def key(r: Record) -> Record:
    """The facts of a point, which all its records share."""
    return r._replace(metric="", value=None, unit="", spread=None, low=None, high=None, failed="")


# Its tensors


def prepare(file: Path, model: str) -> None:
    """Write what a model's head is given. Its own process gives back what the model took."""
    n = max(TOKENS[model], AXIS_TOKENS)
    if model == REHEARSAL:
        g = torch.Generator().manual_seed(0)
        h, v = HEADS[model]
        hidden, weight = torch.randn(2 * n, h, generator=g), torch.randn(v, h, generator=g)
        labels = torch.randint(v, (2 * n,), generator=g)
        labels[::2] = IGNORE
    else:
        states = load(model, n)
        hidden, weight, labels = states.hidden, states.weight, states.labels
    counts = labels != IGNORE
    made = {"hidden": hidden[counts], "prompt": hidden[~counts], "weight": weight, "labels": labels[counts]}
    _write(made, file)


def _repeated(x: Tensor, count: int) -> Tensor:
    return x[torch.arange(count) % len(x)]


def inputs(folder: Path, facts: Record, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, H], weight [V, H], labels [M]: two halves, in each of which prompts come first."""
    n, h, v = facts.shape
    saved = torch.load(folder / f"{facts.workload}.pt", mmap=True)
    dtype, scale = DTYPES[facts.dtype], FLAT if facts.states == "flat" else 1.0
    weight = saved["weight"][:v].to(dtype)
    hidden, labels = (_repeated(saved[name], n) for name in ("hidden", "labels"))
    beyond = (labels >= v).nonzero().squeeze(1)
    if len(beyond):  # a head that is cut has other labels there: the likeliest that is left
        labels[beyond] = torch.cat([(x.to(dtype) @ weight.T).argmax(-1) for x in hidden[beyond].split(256)])
    prompts = _repeated(saved["prompt"], n * facts.prompt // (100 - facts.prompt) // 2 * 2)
    halves = [
        (torch.cat((a, b)), torch.cat((torch.full((len(a),), IGNORE), y)))
        for a, b, y in zip(prompts.view(2, -1, h), hidden.chunk(2), labels.chunk(2))
    ]
    hidden, labels = (torch.cat(x) for x in zip(*halves))
    return (hidden * scale).to(dtype).to(device), weight.to(device), labels.to(device)


def truth(folder: Path, facts: Record) -> None:
    """Write gradients of the negative sum of log-probs in fp64, for a head, its states and dtype."""
    hidden, weight, labels = inputs(folder, facts, torch.device("cpu"))
    _write(exact(hidden, weight, labels, -torch.ones(len(labels), dtype=torch.float64))[1:], truth_file(folder, facts))


def _write(made: object, file: Path) -> None:
    """A file is there when it is whole."""
    torch.save(made, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def truth_file(folder: Path, facts: Record) -> Path:
    n, _, v = facts.shape
    return folder / f"exact-{facts.workload}{facts.states}-{n}-{v}-{facts.dtype}.pt"


# Measuring: this runs in the point's own process


def measure(folder: Path, facts: Record, device: torch.device, rounds: int, limits: Limits) -> list[Record]:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # and no pool of processes beside this one
    contender, timer = BY_NAME[facts.provider], Timer(device)
    hidden, weight, labels = inputs(folder, facts, device)
    found: list[Record] = []
    if contender.loss is None:
        first, works = None, _bare(hidden, weight, labels, 3)
        works = (works[1], works[2]) if contender.twice else (works[0], works[2])
    else:
        loss = of_pairs(contender.name, facts.pairs) if facts.pairs else contender.loss
        step, leaves = training_step(loss, hidden, weight, labels, not contender.frozen)
        works = (step, lambda: loss(*leaves, labels))
        with at_most(limits.n_bytes) if device.type == "cpu" else contextlib.nullcontext():
            _wake(loss, hidden, weight, labels, facts.pairs)
            first, peak = _first_step(step, leaves, timer)
        if peak is not None:
            gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
            found = [facts.of("peak memory", peak, "B"), facts.of("gradients", gradients, "B")]
        if _has_error(facts):
            found += _errors(folder, facts, labels, leaves)
        for leaf in leaves:
            leaf.grad = None
    bare = _bare(hidden, weight, labels, contender.products)[0]
    if first is None:
        first = timer(works[0])
    rounds = rounds if first < 1 else min(rounds, 3) if first < 4 else 1
    turns = all_in_turns(works if facts.suite == "all" else works[:1], bare, rounds, timer, warm=int(first < 1))
    scale = max(1.0, facts.shape[0] / AT_ONCE)
    for what, of in zip(("time", "forward"), turns):
        spread = of.spread and of.spread / scale
        found += of._replace(ratio=of.ratio / scale, spread=spread).records(facts, what=what)
    return found


def _bare(hidden: Tensor, weight: Tensor, labels: Tensor, count: int) -> tuple[Work, Work, Work]:
    """The bare products of at most so many tokens as one multiplies at once; with logits twice; the logits alone."""
    made = Products(hidden[labels != IGNORE][:AT_ONCE], weight, reuse=hidden.is_cuda)
    return made.first(count), lambda: (made.each[0](), made.first(count)()), made.first(1)


def _wake(loss: Provider, hidden: Tensor, weight: Tensor, labels: Tensor, pairs: int) -> None:
    """Threads, libraries and compilers come to life in a small call, so that they are not counted."""
    some = slice(-(16 * pairs or 64), None)
    training_step(loss, hidden[some].clone(), weight, labels[some].clone())[0]()  # no views: compilers tell them apart


def _first_step(step: Work, leaves: tuple[Tensor, ...], timer: Timer) -> tuple[float, int | None]:
    """Seconds of a step, and bytes at its worst moment, above its inputs: gradients are in it."""
    took: list[float] = []
    if timer.cuda:
        peak = gpu_peak(lambda: took.append(timer(step)), leaves)
    else:
        peak = peak_growth(lambda: took.append(timer(step)))
    return took[0], peak


def _has_error(facts: Record) -> bool:
    contender = BY_NAME[facts.provider]
    return facts.suite == "all" and not facts.prompt and contender.summed and contender.loss is not None


def _errors(folder: Path, facts: Record, labels: Tensor, leaves: tuple[Tensor, ...]) -> list[Record]:
    """Against fp64: the mean over tokens of a row's relative error, and that of the whole gradient of the head."""
    d_hidden, d_weight = (x.to(labels.device) for x in torch.load(truth_file(folder, facts), mmap=True))
    found = [facts.of("error of d hidden", row_error(leaves[0].grad, d_hidden))]
    if leaves[1].grad is not None:
        found.append(facts.of("error of d weight", error(leaves[1].grad, d_weight)))
    return found


# The points, one after the other


def expected(facts: Record, done: Sequence[Record]) -> float:
    """Seconds of a step, from the largest that this provider took in the same suite with this model."""

    def size(r: Record) -> float:
        n, h, v = r.shape
        return n * h * v / (1 - r.prompt / 100 * (BY_NAME[r.provider].mask == EVERY))

    def alike(r: Record) -> bool:
        names = ("suite", "workload", "provider", "dtype", "states")
        return r.metric == "time" and all(getattr(r, name) == getattr(facts, name) for name in names)

    before = [r for r in done if alike(r) and r.value is not None]
    last = max(before, key=size, default=None)
    return last.value * size(facts) / size(last) if last else 0.0


def run(folder: Path, facts: Record, done: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    limits: Limits = args.limits
    takes = expected(facts, done)
    if takes > limits.seconds:
        return [facts._replace(metric="time", failed=f"left out: a step would take {takes:.0f} s")]
    whole = limits.seconds * 4 + 60  # the first step, a round, libraries, a compiler
    try:
        file = folder / f"{facts.workload}.pt"
        if not file.exists():
            in_a_process_of_its_own(prepare, file, facts.workload)
        if _has_error(facts) and not truth_file(folder, facts).exists():
            in_a_process_of_its_own(truth, folder, facts)
        device = torch.device(args.device)
        return in_a_process_of_its_own(measure, folder, facts, device, args.rounds, limits, limit_s=whole)
    except (RuntimeError, TimeoutError) as failure:
        return [facts._replace(metric="time", failed=str(failure))]


def wanted(args: argparse.Namespace) -> Iterator[Record]:
    """The points of a run."""
    models = (REHEARSAL,) if args.rehearse else MODELS[:1] if args.quick else MODELS
    for dtype in args.dtypes:
        points = *grid(models, dtype, args.device), *axes(models, dtype, args.device, 2 if args.quick else None)
        yield from (p for p in points if p.suite in args.suites and any(part in p.provider for part in args.only))


def dtypes(device: str) -> tuple[str, ...]:
    """bf16, where it is multiplied at speed."""
    return ("bf16",) if device != "cpu" or dpofast.plan(8, 8, 8).backend == "cpu:avx512_bf16" else ("fp32",)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dpofast bench all", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{MODELS[0]}'s head only, and small sizes")
    parser.add_argument("--rehearse", action="store_true", help="a tiny random head: only shows that it runs")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="providers whose name has a PART in it")
    parser.add_argument(
        "--suites", nargs="+", default=("all", *AXES), choices=("all", *AXES), help="default: all of them"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), help="default: bf16 where it is fast, or fp32")
    parser.add_argument("--rounds", type=int, default=5, help="runs of a point, median taken (default 5)")
    parser.add_argument("--seconds", type=float, default=7200, help="begin no point after this time (default 7200)")
    parser.add_argument("--limit-seconds", type=float, default=25, help="leave out longer steps (default 25)")
    parser.add_argument("--limit-memory", type=parse_bytes, default="2560MiB", help="and larger ones (default 2560MiB)")
    parser.add_argument("--scratch", type=Path, help="keep what models say there, for the next run (default: nowhere)")
    record.add_out(parser)
    args = parser.parse_args()
    args.dtypes = args.dtypes or dtypes(args.device)
    args.limits = Limits(args.limit_seconds, parse_bytes(args.limit_memory))
    return args


def resume(out: Path, new: Results) -> Results:
    """What is in the file already, if it is of this machine and these versions."""
    if not out.exists():
        return new
    old = record.read(out)
    differ = [name for name, fact in new.machine.items() if name != "date" and old.machine.get(name) != fact]
    if differ:
        raise ValueError(f"{out}: it is of another {' and '.join(differ)}; give another --out")
    return old


def main() -> None:
    args = arguments()
    end = time.monotonic() + args.seconds
    about = machine(torch.device(args.device)) | versions()
    results, out = record.begin(args.out, "all", about)
    results = resume(out, results)
    with contextlib.ExitStack() as stack:
        folder = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        done = {key(r) for r in results.records}
        left = [facts for facts in wanted(args) if key(facts) not in done]
        for i, facts in enumerate(left):
            if time.monotonic() > end:
                print(f"out of time, {len(left) - i} points are left; run it again to go on")
                return
            results.add([run(folder, facts, results.records, args)])
            results.save(out)
    sizes_and_page(args, end, out)


def sizes_and_page(args: argparse.Namespace, end: float, out: Path) -> None:
    """The rest of what is compared, and the page: in a checkout of all records there, or else of this one."""
    from dpofast.bench import page

    if args.device == "cpu" and not args.rehearse:  # the sweep's memory is the resident set
        where = ["--out", str(out.with_name(out.name.replace("all", "sweep", 1)))]
        left = ["--seconds", str(max(0.0, end - time.monotonic()))]
        subprocess.run([sys.executable, "-P", "-m", "dpofast.bench.sweep", *where, *left], check=True)
    html = out.with_name("index.html")
    html.write_text(page.page(page.committed() if record.RESULTS.is_dir() else [out]))
    print(f"the page is {html}")


def versions() -> dict[str, str]:
    """Of the libraries that are compared, those that are there."""
    found = {}
    for name in ("trl", "liger-kernel", "cut-cross-entropy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
