"""docs/losses.md has every loss as the tables have it; `python tests/whole/test_losses_page.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpofast import losses
from dpofast.lists import LIST_LOSSES
from dpofast.losses import LOSSES, REQUIRED, UNPAIRED_LOSSES, Loss

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
TABLES = {"LOSSES": LOSSES, "LIST_LOSSES": LIST_LOSSES, "UNPAIRED_LOSSES": UNPAIRED_LOSSES}
IN_TRL = 15  # losses of pairs, the first ones
HEAD = "| `loss_type` | loss | paper | needs | options |\n|---|---|---|---|---|\n"


def needs(loss: Loss) -> str:
    """What a caller has to have beside the policy's log-probs; lengths are those of the answers, and no trouble."""
    reference = loss.reference or {"logratios"} & set(loss.inputs)
    found = ["reference"] if reference else []
    if "worse" in loss.inputs:
        found.append("scores" if "scores" in loss.needs else "scores or an order")
    elif "scores" in loss.needs:
        found.append("scores")
    found += [{"kl": "KL of mismatched answers", "reward_shift": "mean of all rewards"}[x]
              for x in loss.needs if x in ("kl", "reward_shift")]  # fmt: skip
    return ", ".join(found) or "-"


def options(loss: Loss) -> str:
    """Beside beta, which all have; ``weight`` has no default, and one without is required."""
    found = [
        name if name == "weight" else f"{name}, required" if default is REQUIRED else f"{name} {default}"
        for name, default in loss.options.items()
        if name != "beta"
    ]
    return ", ".join(found) or "-"


def row(loss: Loss) -> str:
    cells = (f"`{loss.name}`", f"`{loss.equation}`", loss.paper, needs(loss), options(loss))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def section(name: str) -> str:
    return f"<!-- losses: {name} -->\n{HEAD}{''.join(map(row, TABLES[name].values()))}<!-- end -->"


def written(text: str) -> str:
    return re.sub(r"<!-- losses: (\w+) -->\n.*?<!-- end -->", lambda found: section(found[1]), text, flags=re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_every_loss_as_the_table_has_it(name):
    assert section(name) in PAGE.read_text(), f"run `python {Path(__file__).name}`, which writes the page anew"


def test_the_page_says_which_losses_trl_has():
    trl_losses = pytest.importorskip("test_losses_trl").TRL_LOSSES
    assert set(list(LOSSES)[:IN_TRL]) == set(trl_losses)
    assert f"the first {IN_TRL}" in PAGE.read_text()


def test_the_page_names_every_option():
    text = PAGE.read_text()
    assert not [name for name in losses.OPTIONS if not re.search(rf"\b{name}\b", text)]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
