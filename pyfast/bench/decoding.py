"""What is timed of a whole model: a token decoded with the cache, or a prompt read.

On a CPU both run as they are called. On a GPU each is a CUDA graph over a cache of fixed size, as servers run it: from
Python, launching the kernels of a small model takes longer than running them. A model that cannot be captured runs
as it is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyfast._cuda_clock import Captured

Call = Callable[[], object]

PROMPT_TOKENS = 64  # the cache a decoded token looks back upon, at the start
PREFILL_TOKENS = 512
_CACHE_TOKENS = 512  # of a cache of fixed size


class Decoder:
    """Decoding of one sequence with the cache: each ``step`` is one token, greedily chosen, on the host's
    clock."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        self.model = model
        with torch.inference_mode():
            out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
            self.token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> torch.Tensor:
        """Decode one token; its id [1, 1]."""
        with torch.inference_mode():
            out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        return self.token


class CapturedDecoder:
    """The same on a GPU, a token's step being a CUDA graph over a cache of ``_CACHE_TOKENS`` places. Where the cache is
    full it begins again after the prompt. ``compiled``: the step's kernels are those of ``torch.compile``."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, *, compiled: bool = False) -> None:
        self._forward: Any = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model
        self._prompt_tokens = self._length = prompt.shape[1]
        self._cache = _static_cache(model, _CACHE_TOKENS)
        # All models of a family share the code that is compiled, and count as its recompilations.
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=64):
            out = model(input_ids=prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self.token = out.logits[:, -1].argmax(-1, keepdim=True)
            self._advance = Captured([self._next])
        self._length += 1

    def _next(self) -> torch.Tensor:
        out = self._forward(input_ids=self.token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        return self.token

    def step(self) -> torch.Tensor:
        """Decode one token; its id [1, 1]."""
        with torch.inference_mode():
            if self._length == _CACHE_TOKENS:
                _set_length(self._cache, self._prompt_tokens)
                self._length = self._prompt_tokens
            self._length += 1
            token: torch.Tensor = self._advance()
        return token


def prefiller(model: nn.Module, prompt: torch.Tensor) -> Call:
    """A call that reads ``prompt`` [1, T] into a fresh cache and gives the logits of its last token."""

    def prefill() -> object:
        with torch.inference_mode():
            return model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits

    return prefill


def captured_prefiller(model: nn.Module, prompt: torch.Tensor) -> Call:
    """The same on a GPU as a CUDA graph."""
    cache = _static_cache(model, prompt.shape[1])

    def prefill() -> object:
        return model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def again() -> object:
        _set_length(cache, 0)
        return prefill()

    with torch.inference_mode():
        prefill()  # the cache gets its memory
        replay = Captured([again])

    def replayed() -> object:
        with torch.inference_mode():
            return replay()

    return replayed


def random_prompt(model: nn.Module, tokens: int, seed: int, device: str) -> torch.Tensor:
    """Word ids [1, tokens], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    return torch.randint(int(config.vocab_size), (1, tokens), generator=generator).to(device)


def call(model: nn.Module, op: str, *, device: str, seed: int, compiled: bool = False) -> Call:
    """What is timed of a model: one more token decoded (``"decode"``), or a prompt read (``"prefill"``). ``compiled``:
    decoded on a GPU by what torch.compile makes of it, whose errors are raised."""
    prompt = random_prompt(model, PROMPT_TOKENS if op == "decode" else PREFILL_TOKENS, seed, device)
    if compiled:
        return CapturedDecoder(model, prompt, compiled=True).step
    if device.startswith("cuda"):
        try:
            return CapturedDecoder(model, prompt).step if op == "decode" else captured_prefiller(model, prompt)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"{op} cannot be captured in a CUDA graph and runs from Python: {reason}", stacklevel=2)
    return Decoder(model, prompt).step if op == "decode" else prefiller(model, prompt)


def tokens_of(op: str) -> int:
    """Tokens in one call of an operation."""
    return 1 if op == "decode" else PREFILL_TOKENS


def _static_cache(model: nn.Module, tokens: int) -> Any:
    from transformers import StaticCache

    config: Any = model.config
    return StaticCache(config=config, max_cache_len=tokens)


def _set_length(cache: Any, tokens: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)
