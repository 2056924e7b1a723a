"""How the weights start: plain functions over a constructed GPT; ``torch.manual_seed`` rules."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from pgl.model.config import GPTConfig
from pgl.model.linear import CastedLinear

if TYPE_CHECKING:
    from pgl.model.gpt import GPT

PHASE_STEEPNESS = 3.0


@torch.no_grad()
def initialize(gpt: "GPT") -> None:
    """Set all weights that do not start at a constant; the constants are set where they are made.

    Source: PR #236 and later. There, output projections are zero and every other matrix is
    orthogonal with gain 1; the "output scaling by 1/sqrt(2L)" they announce multiplies those
    zeros, so it only ever acts on the side projections (``side_proj_gain: depth``).
    ``output_proj_init: scaled`` is the form they announce.
    """
    config = gpt.config
    nn.init.normal_(gpt.tok_emb.weight, std=config.embed_init_std)
    if gpt.bigram is not None:
        nn.init.zeros_(gpt.bigram.embed.weight)
        _init_side_projection(gpt.bigram.proj, config)
    if gpt.ve_shared is not None:
        nn.init.normal_(gpt.ve_shared.embed.weight, std=0.01)
        _init_side_projection(gpt.ve_shared.proj, config)
    if gpt.lm_head is not None:
        nn.init.zeros_(gpt.lm_head.weight)
    for layer, block in enumerate(gpt.blocks):
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
            _init_input_projection(linear, config)
        for linear in (block.attn.proj, block.mlp.proj):
            _init_output_projection(linear, config)
        if block.resid_mix is not None and config.resid_mix_init == "phase":
            _init_phase(block.resid_mix, layer, config.num_layers)


def depth_gain(num_layers: int) -> float:
    """``1/sqrt(2 layers)``: what keeps a sum of two branches per layer at unit variance."""
    return 1.0 / math.sqrt(2 * num_layers)


def phase(layer: int, num_layers: int) -> float:
    """Share of the residual stream against x0 at the start: ``sigmoid(3 (layer/(L-1) - 1/2))``.

    "Phase transition" of PR #324: early layers read mostly the embedding, late ones the stream.
    """
    return 1.0 / (1.0 + math.exp(-PHASE_STEEPNESS * (layer / (num_layers - 1) - 0.5)))


def _init_input_projection(linear: CastedLinear, config: GPTConfig) -> None:
    if config.init == "orthogonal":
        nn.init.orthogonal_(linear.weight)


def _init_output_projection(linear: CastedLinear, config: GPTConfig) -> None:
    if config.output_proj_init == "zero":
        nn.init.zeros_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, gain=depth_gain(config.num_layers))


def _init_side_projection(linear: CastedLinear, config: GPTConfig) -> None:
    if config.init == "orthogonal":
        gain = 1.0 if config.side_proj_gain == "unit" else depth_gain(config.num_layers)
        nn.init.orthogonal_(linear.weight, gain=gain)


def _init_phase(resid_mix_2E: nn.Parameter, layer: int, num_layers: int) -> None:
    share = phase(layer, num_layers)
    resid_mix_2E[0].fill_(share)
    resid_mix_2E[1].fill_(1.0 - share)
