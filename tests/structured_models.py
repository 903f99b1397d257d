"""Random models with six layers, of the families that surgery and influence are tested on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

WIDE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
MIXED = ["full_attention", "sliding_attention"] * 3


def llama(**options: Any) -> Any:
    torch.manual_seed(11)
    config = transformers.LlamaConfig(**{**WIDE, "num_key_value_heads": 2, "pad_token_id": 0, **options})
    return transformers.LlamaForCausalLM(config).eval()


def qwen2() -> Any:
    torch.manual_seed(11)
    config = transformers.Qwen2Config(
        **WIDE, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, layer_types=MIXED
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(11)
    return transformers.BertModel(transformers.BertConfig(**WIDE, max_position_embeddings=64)).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
