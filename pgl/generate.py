"""Continue a prompt.

Shape suffixes: T tokens so far, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.model import GPT


@dataclass(frozen=True)
class GenerationConfig:
    """How ``pgl predict`` continues a text."""

    prompt: str = "The "
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Softmax temperature; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among the likeliest so many tokens only."""
    seed: int = 1337
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(
                f"generation.max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"generation.temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generation.top_k must be at least 1 or null, got {self.top_k}")


@torch.no_grad()
def generate(gpt: GPT, prompt_T: Tensor, config: GenerationConfig, context_len: int) -> Tensor:
    """Return the prompt and its continuation, (T + max_new_tokens,) ids.

    Args:
        gpt: The model, in evaluation mode.
        prompt_T: Token ids.
        config: How to sample.
        context_len: Tokens that the model sees at most.
    """
    generator = torch.Generator(prompt_T.device).manual_seed(config.seed)
    ids_T = prompt_T
    for _ in range(config.max_new_tokens):
        h_1TD = gpt.features(ids_T[None, -context_len:])
        logits_V = gpt.logits(h_1TD[:, -1:])[0, -1].float()
        ids_T = torch.cat([ids_T, sample(logits_V, config, generator)])
    return ids_T


def sample(logits_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """Return one token id, shape (1,)."""
    if config.temperature == 0:
        return logits_V.argmax(keepdim=True)
    logits_V = logits_V / config.temperature
    if config.top_k is not None:
        least = logits_V.topk(min(config.top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    return torch.multinomial(logits_V.softmax(-1), 1, generator=generator)


def print_continuations(texts: Iterable[str] | None) -> None:
    """Print each continued text on lines of its own."""
    for text in texts or ():
        print(text)
