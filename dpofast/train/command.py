"""The command line of `dpofast train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dpofast.train import config as options
from dpofast.train.config import Config


def arguments(argv: Sequence[str] | None) -> tuple[Config, bool]:
    """The options of a command line, and whether they are only to be looked at."""
    parser = argparse.ArgumentParser(
        prog="dpofast train",
        description="Tune a language model on preferences. Options are read from a TOML file and then from here.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="a TOML file of the options below, with _ for -")
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, memory and expected time, and train nothing"
    )
    options.add_options(parser)
    given = vars(parser.parse_args(argv))
    path, dry_run = given.pop("config"), given.pop("dry_run")
    try:
        values = {} if path is None else options.read_toml(path)
        return options.from_dict({**values, **given}, f"{path}" if path else "the command line"), dry_run
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error, 128 and the signal's number for a signal."""
    config, dry_run = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import
    from dpofast.train.dry_run import dry_run as look
    from dpofast.train.run import train

    try:
        if dry_run:
            print(look(config))
            return 0
        outcome = train(config)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"dpofast train: {error}", file=sys.stderr)
        return 1
    return 128 + outcome.signal if outcome.signal else 0
