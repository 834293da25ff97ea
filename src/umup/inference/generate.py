"""Next tokens from a decoder: ids in, ids out. Text is completion.py's business.

Not covered: batches of prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from umup.errors import InputError, RunError
from umup.models.decoder import Decoder, SelfAttention
from umup.ops.cache import KVCache


@dataclass(frozen=True)
class Sampling:
    """How to pick a token. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"--top-k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be 0 or more and below 2^63, not {self.seed}")


@torch.inference_mode()
def generate(
    model: Decoder, prompt: list[int], context: int, sampling: Sampling, use_cache: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """Yield (id, logits over the vocabulary) until the context of `context` positions is full.

    The caller stops when it has enough. Raises InputError for an empty prompt or one longer than the context.
    """
    if not prompt:
        raise InputError("the prompt is empty; write at least one token")
    if len(prompt) > context:
        raise InputError(f"the prompt has {len(prompt)} tokens, the model's context {context}; shorten it")
    generator = torch.Generator().manual_seed(sampling.seed)
    device = model.head.weight.device
    cache = _cache(model, context) if use_cache else None
    ids = list(prompt)
    new = ids
    model.eval()
    while len(ids) < context + 1:
        logits = model.next_token_logits(torch.tensor([new if use_cache else ids], device=device), cache)[0]
        token = pick(logits, sampling, generator)
        yield token, logits
        ids.append(token)
        new = [token]


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits (vocab). Raises RunError where they are no numbers."""
    if logits.isnan().any():
        raise RunError("the model's logits are NaN: its weights are no good, or its numbers left their format's range")
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.cpu().double()
    scores = (scores - scores.max()) / sampling.temperature  # no temperature above 0 makes this overflow to NaN
    if sampling.top_k:
        floor = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        scores = scores.index_fill(0, order[before >= sampling.top_p], -torch.inf)
    return int(torch.multinomial(scores.softmax(0), 1, generator=generator))


def _cache(model: Decoder, context: int) -> KVCache:
    attention = next(m for m in model.modules() if isinstance(m, SelfAttention))
    kv_heads = attention.k.weight.shape[0] // attention.head_dim
    return KVCache(len(model.layers), 1, kv_heads, context, attention.head_dim, model.dtype, model.head.weight.device)
