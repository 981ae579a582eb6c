"""One tiny model of any family: what the tests of whole models and trainers run. Its words are those of `tiny.py`, in
examples/, and so are their tokenizer, the pairs and the batches.
"""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

V, H = len(tiny.WORDS), 16
SIZES = dict(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
GPT2 = dict(n_embd=H, n_layer=2, n_head=2, n_positions=64)
MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
# family: its configuration, and what its head must turn out to be: (scale, softcap, has a bias, is tied)
FAMILIES = {
    "llama": ({}, (1.0, None, False, False)),
    "gemma2": (dict(final_logit_softcapping=3.0, attn_implementation="eager"), (1.0, 3.0, False, True)),
    "gemma3_text": (dict(final_logit_softcapping=7.0), (1.0, 7.0, False, True)),
    "cohere": (dict(logit_scale=0.3), (0.3, None, False, True)),  # no power of two
    "cohere2": (dict(logit_scale=0.0625), (0.0625, None, False, True)),
    "granite": (dict(logits_scaling=8.0), (0.125, None, False, False)),  # divides
    "hyperclovax": (dict(logits_scaling=0.5), (0.5, None, False, False)),  # multiplies
    "gpt2": (GPT2, (1.0, None, False, True)),
    "phi": ({}, (1.0, None, True, False)),
    "falcon_h1": (dict(lm_head_multiplier=0.3, **MAMBA), (0.3, None, False, False)),
    "opt": (dict(word_embed_proj_dim=8, ffn_dim=24, max_position_embeddings=64), (1.0, None, False, True)),
    "nanochat": ({}, (1.0, 15.0, False, False)),  # a softcap that is in no field of this name
    "mixtral": (dict(num_local_experts=4, router_aux_loss_coef=0.5), (1.0, None, False, False)),
}


def build(family: str = "llama", seed: int = 0, **options: Any) -> torch.nn.Module:
    """A model in eval mode; ``options`` are of its configuration."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, ({},))[0], **options})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()  # whole, even where ZeRO-3 is on
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model
