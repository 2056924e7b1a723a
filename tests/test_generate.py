"""Sampling: temperature, top-k, seed and context each act."""

import pytest
import torch

from pgl.generate import (
    GenerationConfig,
    generate,
    generate_batch,
    print_continuations,
    sample,
)
from pgl.model import GPT

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def draws(config, count=200):
    generator = torch.Generator().manual_seed(0)
    return [int(sample(LOGITS, config, generator)) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(GenerationConfig(temperature=0.0))) == {1}


def test_temperature_flattens_the_choice():
    cold = draws(GenerationConfig(temperature=0.3)).count(1)
    hot = draws(GenerationConfig(temperature=10.0)).count(1)
    assert hot < 90 < 180 < cold


def test_top_k_leaves_only_the_likeliest():
    assert set(draws(GenerationConfig(temperature=10.0, top_k=2))) == {1, 3}
    assert set(draws(GenerationConfig(temperature=10.0, top_k=99))) == {0, 1, 2, 3}


def test_the_seed_decides(tiny_gpt):
    gpt, prompt = GPT(tiny_gpt).eval(), torch.tensor([1, 5, 9])
    texts = [
        generate(gpt, prompt, GenerationConfig(seed=seed, max_new_tokens=12), 32).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][:3] == [1, 5, 9]
    assert len(texts[0]) == 15


def test_greedy_generation_is_the_slow_way_and_context_is_limited(tiny_gpt):
    gpt = GPT(tiny_gpt).eval()
    torch.nn.init.normal_(gpt.tok_emb.weight)
    config = GenerationConfig(temperature=0.0, max_new_tokens=8)
    ids = torch.tensor([1, 5, 9, 4, 7])
    expected = ids.tolist()
    lengths = []
    features = gpt.features
    gpt.features = lambda ids_BT: (lengths.append(ids_BT.shape[1]), features(ids_BT))[1]
    actual = generate(gpt, ids, config, context_len=6).tolist()
    for _ in range(8):
        expected.append(int(gpt(torch.tensor([expected[-6:]]))[0, -1].argmax()))
    assert actual == expected
    assert max(lengths[:8]) == 6


def varied(tiny_gpt):
    torch.manual_seed(0)
    gpt = GPT(tiny_gpt).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def test_a_batch_is_its_sequences_one_by_one(tiny_gpt):
    gpt = varied(tiny_gpt)
    uniform = torch.rand(5, 12)
    together = generate_batch(gpt, uniform)
    assert together.shape == (5, 13)
    assert (together[:, 0] == tiny_gpt.bos_id).all()
    assert torch.equal(generate_batch(gpt, uniform, batch_sequences=2), together)
    assert torch.equal(generate_batch(gpt, uniform[3:4]), together[3:4])
    assert len({tuple(row.tolist()) for row in together}) == 5


def test_a_batch_inverts_the_cumulative_distribution(tiny_gpt):
    gpt = varied(tiny_gpt)
    uniform, temperature = torch.rand(2, 6), 0.8
    ids = generate_batch(gpt, uniform, temperature)
    for row, numbers in zip(ids, uniform, strict=True):
        for t, number in enumerate(numbers.tolist()):
            p = (gpt(row[None, : t + 1])[0, -1] / temperature).softmax(-1).tolist()
            token = int(row[t + 1])
            assert sum(p[:token]) - 1e-5 <= number <= sum(p[: token + 1]) + 1e-5


def test_a_batch_follows_the_distribution_and_the_temperature(tiny_gpt):
    gpt = varied(tiny_gpt)
    with torch.no_grad():
        p = gpt(torch.tensor([[tiny_gpt.bos_id]]))[0, -1].softmax(-1)
    uniform = (torch.arange(2000)[:, None] + 0.5) / 2000
    counts = generate_batch(gpt, uniform, 1.0, 2000)[:, 1].bincount(minlength=len(p))
    assert (counts / 2000 - p).abs().max() < 1e-3
    cold = generate_batch(gpt, uniform, 0.05, 2000)[:, 1]
    assert (cold == p.argmax()).float().mean() > counts.max() / 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", 0)],
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"generation.{name}"):
        GenerationConfig(**{name: value})


def test_texts_are_printed_on_lines_of_their_own(capsys):
    print_continuations(["one", "two"])
    print_continuations(None)
    assert capsys.readouterr().out == "one\ntwo\n"
