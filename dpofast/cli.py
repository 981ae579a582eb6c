"""The `dpofast` command: `env`, `plan`, `train`, `score`, `demo`, `bench`. Each imports what it needs itself."""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        own = {"demo": _demo, "bench": _bench, "train": _train, "score": _score}  # their options too, `--help` included
        if argv[:1] and argv[0] in own:
            return own[argv[0]](argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:
            raise  # not a missing package: something is broken, and the traceback says what
        print(f"dpofast: the package {package!r} is missing: pip install {package}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpofast", description="The language-model head of preference training.")
    commands = parser.add_subparsers(required=True, metavar="command")

    env = commands.add_parser("env", help="versions, CPU and GPU, backends, build: what a bug report needs")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    plan = commands.add_parser("plan", help="the schedule, tiles, memory and predicted time of a head")
    plan.add_argument("-N", "--tokens", type=int, required=True, help="completion tokens in a batch")
    plan.add_argument("-H", "--hidden", type=int, required=True, help="hidden size")
    plan.add_argument("-V", "--vocab", type=int, required=True, help="vocabulary size")
    plan.add_argument("--dtype", default="bf16", help="bf16 (default), fp16, fp32 or fp64")
    plan.add_argument("--frozen-head", action="store_true", help="the head's weight needs no gradient")
    plan.add_argument("--score", action="store_true", help="nothing needs a gradient: a reference model")
    plan.add_argument("--memory-budget", help='workspace: bytes, or "512MiB"')
    plan.add_argument("--backend", default="auto", help="auto (default), or a name that `dpofast env` lists")
    plan.add_argument("--device", help="predict for a GPU that need not be here, such as h100")
    plan.add_argument("--longest-pair", type=int, help="tokens of a preference loss's longest pair: how that would run")
    plan.add_argument(
        "--grad-filter", type=_cut, help='gradients from the entries that matter: "auto", or a cut such as 6e-5'
    )
    plan.add_argument("--kept", type=float, default=0.01, help="share of entries that such a filter keeps (0.01)")
    plan.add_argument("--peers", action="store_true", help="what other libraries' algorithms would take, too")
    plan.add_argument("--positions", type=int, help="tokens with prompts and padding, which some of them work on")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=_plan, parser=plan)

    commands.add_parser("train", help="tune a model on preferences; `dpofast train --help` has the options")
    commands.add_parser("score", help="a model's log-probs, rewards and accuracy on preferences")
    commands.add_parser("demo", help="train and score real preference pairs; `dpofast demo --help` has more")
    commands.add_parser("bench", help="measure: `dpofast bench --help` has the names of the benchmarks")
    return parser


def _cut(text: str) -> float | str:
    """What `grad_filter` takes; argparse names what is neither."""
    return text if text == "auto" else float(text)


def _env(args: argparse.Namespace) -> int:
    from dpofast.env_info import env_info, format_env_info

    info = env_info()
    print(json.dumps(info, indent=2) if args.json else format_env_info(info))
    return 0


def _plan(args: argparse.Namespace) -> int:
    import dpofast

    try:
        plan = dpofast.plan(
            args.tokens,
            args.hidden,
            args.vocab,
            dtype=args.dtype,
            train_head=not (args.frozen_head or args.score),
            train_hidden=not args.score,
            memory_budget=args.memory_budget,
            backend=args.backend,
            device=args.device,
            longest_pair=args.longest_pair,
            grad_filter=args.grad_filter,
            kept=args.kept,
            with_peers=args.peers,
            positions=args.positions,
        )
    except ValueError as error:
        args.parser.error(str(error))
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan)
    return 0


def _demo(argv: list[str]) -> int:
    from dpofast.demo import main as demo_main

    return demo_main(argv) or 0


def _train(argv: list[str]) -> int:
    from dpofast.train import main as train_main

    return train_main(argv)


def _score(argv: list[str]) -> int:
    from dpofast.train.score import main as score_main

    return score_main(argv)


def _bench(argv: list[str]) -> int:
    from dpofast import bench

    parser = argparse.ArgumentParser(prog="dpofast bench", description="The benchmarks; each has a --help of its own.")
    parser.add_argument("name", nargs="?", default="all", choices=bench.NAMES, help="default: all, everybody compared")
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["all", *argv]
    name = parser.parse_args(argv[:1]).name
    sys.argv = [f"dpofast bench {name}", *argv[1:]]
    importlib.import_module(f"dpofast.bench.{name}").main()
    return 0
