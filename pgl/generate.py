"""Continue a prompt, or let the model write sequences of its own.

Shape suffixes: B sequences, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Iterable
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
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"generation.seed must be from 0 to 2**63 - 1, got {self.seed}")


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


@torch.no_grad()
def generate_batch(
    gpt: GPT,
    uniform_BT: Tensor,
    temperature: float = 0.8,
    batch_sequences: int = 64,
    on_token: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return sequences that the model wrote by itself from the token that begins a document.

    Each token is the inverse of the model's cumulative distribution at a given uniform number, so a
    sequence depends on its own numbers alone: not on the other sequences, nor on the process or
    batch that it is written in, up to the rounding of the forward pass.

    There is no cache of keys and values: every token runs the whole prefix. That holds for every
    technique of the model, at ``B * T**2 / 2`` tokens of forward pass.

    Args:
        gpt: The model, in evaluation mode.
        uniform_BT: Numbers in [0, 1), one for each token to write, on any device.
        temperature: Softmax temperature, above 0.
        batch_sequences: Sequences written at a time.
        on_token: Called after each token of each batch.

    Returns:
        (B, T + 1) token ids on the model's device: the first token, then those written.
    """
    device = gpt.tok_emb.weight.device
    batches = []
    for part_BT in uniform_BT.to(device).split(batch_sequences):
        rows, length = part_BT.shape
        ids_BT = torch.full((rows, length + 1), gpt.config.bos_id, device=device)
        for t in range(length):
            h_B1E = gpt.features(ids_BT[:, : t + 1])[:, -1:]
            logits_BV = gpt.logits(h_B1E)[:, 0]
            cumulative_BV = (logits_BV / temperature).softmax(-1).double().cumsum(-1)
            threshold_B1 = part_BT[:, t : t + 1].double() * cumulative_BV[:, -1:]
            next_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
            ids_BT[:, t + 1] = next_B1[:, 0].clamp(max=cumulative_BV.shape[1] - 1)
            on_token()
        batches.append(ids_BT)
    return torch.cat(batches)


def print_continuations(texts: Iterable[str] | None) -> None:
    """Print each continued text on lines of its own."""
    for text in texts or ():
        print(text)
