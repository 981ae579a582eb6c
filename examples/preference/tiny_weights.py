"""A tiny random model, in place of SmolLM2-135M-Instruct, that knows every byte of a text."""

from __future__ import annotations

from pathlib import Path

import tiny


def write_tiny(folder: Path) -> None:
    """The model of tiny.py, with a tokenizer and a chat template, as `save_pretrained` leaves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tiny.model(len(words)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
