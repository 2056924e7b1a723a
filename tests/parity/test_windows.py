"""Sliding windows of the reference forms."""

import numpy as np
import pytest

from pgl.evaluate import sliding_windows


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("form", ["236", "324", "388"])
def test_windows_are_those_of_the_reference(golden, form, case):
    reference = golden("sliding_windows")
    num_targets, seq_len, stride = reference["cases"][case].tolist()

    windows_W3 = sliding_windows(num_targets, seq_len, stride, tail=f"pr{form}")

    np.testing.assert_array_equal(
        windows_W3, reference[f"windows_{form}_case{case}"].reshape(-1, 3)
    )
    scored = np.zeros(num_targets, dtype=np.int64)
    for _, end, first in windows_W3:
        scored[first:end] += 1
    np.testing.assert_array_equal(scored, reference[f"scored_count_{form}_case{case}"])


def test_counts_on_the_full_validation_set(golden):
    reference = golden("sliding_windows")
    num_targets = int(reference["full_n_tokens"])

    for form in ("pr236", "pr388"):
        windows_W3 = sliding_windows(num_targets, 2048, 64, tail=form)
        assert len(windows_W3) == reference["full_236_388_703_windows_s2048_st64"]
        scored = (windows_W3[:, 1] - windows_W3[:, 2]).sum()
        assert scored == reference["full_236_388_703_scored_s2048_st64"]
    windows_W3 = sliding_windows(num_targets, 4096, 64, tail="pr324")
    assert len(windows_W3) == reference["full_324_windows_s4096_st64"]
    scored = (windows_W3[:, 1] - windows_W3[:, 2]).sum()
    assert scored == reference["full_324_scored_s4096_st64"]
