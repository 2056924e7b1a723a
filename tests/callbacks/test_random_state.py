"""All random number generators, through a file that holds plain values only."""

import random

import numpy as np
import torch

from callbacks import RandomState


def draw():
    return random.random(), random.gauss(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_where_they_were(tmp_path):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    random.gauss()  # leaves a second value behind
    np.random.randn()
    path = tmp_path / "state.pt"
    torch.save(RandomState().state_dict(), path)
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    RandomState().load_state_dict(torch.load(path, weights_only=True))
    assert [draw() for _ in range(3)] == expected
