"""A Llama of one layer for tests that only need some model: quick to load, to compile, and told from others by its size."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers

from lem_kit import models


def save(folder: Path, hidden_size: int = 32) -> None:
    """Random weights, with tiny-llama's tokenizer beside them."""
    shutil.copytree(models.resolve("tiny-llama"), folder)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
