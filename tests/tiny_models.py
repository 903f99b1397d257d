"""Random Hugging Face models small enough to train in a test."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def tiny(family: str, head: str = "ForCausalLM", seed: int = 0, **options: Any) -> Any:
    """A ``family`` model with a ``head``, in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    return getattr(transformers, f"{family}{head}")(config).eval()


def batch(rows: int = 2, length: int = 9, words: int = 61, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens, and labels as a causal language model takes them: the prompt and the padding do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, words, (rows, length), generator=generator)
    attention_mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :2] = -100
    for row in range(1, rows):  # padding on the right, another length for each
        attention_mask[row, length - row % 4 :] = 0
    ids[attention_mask == 0], labels[attention_mask == 0] = 0, -100
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
