import torch

from pgl.quant import prune_by_magnitude


def test_the_smallest_share_goes():
    w = torch.randn(50, 40)
    pruned = prune_by_magnitude(w, 0.25)
    assert (pruned == 0).sum() == 500
    kept = pruned != 0
    assert torch.equal(pruned[kept], w[kept])
    assert w[~kept].abs().max() < w[kept].abs().min()


def test_ties_at_the_threshold_stay():
    assert torch.equal(prune_by_magnitude(torch.ones(10), 0.5), torch.ones(10))


def test_the_input_is_left_alone_and_the_dtype_kept():
    w = torch.randn(8, 8).bfloat16()
    before = w.clone()
    assert prune_by_magnitude(w, 0.5).dtype == torch.bfloat16
    assert torch.equal(w, before)
