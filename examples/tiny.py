"""A model, a tokenizer and pairs so small that each example runs in seconds, with nothing to download.

The tests train on these words and pairs too.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def model(words: int = len(WORDS)) -> LlamaForCausalLM:
    torch.set_num_threads(1)  # products this small are slower on several
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, **options)


def pairs(count: int) -> list[dict[str, str]]:
    """Chosen answers are of the vocabulary's first half and rejected ones of the second."""
    choice = random.Random(0)

    def text(words: list[str]) -> str:
        return " ".join(choice.choices(words, k=choice.randint(2, 6)))

    half = len(WORDS) // 2
    return [
        {"prompt": text(WORDS[3:]) + " ", "chosen": text(WORDS[3:half]), "rejected": text(WORDS[half:])}
        for _ in range(count)
    ]


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """All chosen sequences, then all rejected ones; labels are -100 at prompt and padding."""
    ids = tokenizer()
    input_ids, labels = [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt = ids(row["prompt"])["input_ids"]
            answer = [*ids(row[side])["input_ids"], ids.eos_token_id]
            input_ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(input_ids, batch_first=True, padding_value=ids.pad_token_id),
        "attention_mask": pad([torch.ones_like(x) for x in input_ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
