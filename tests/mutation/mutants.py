"""Single mistakes in the numeric cores, and the test files that should notice each of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One changed piece of one file."""

    path: str
    """File, relative to the repository."""
    old: str
    """Text that occurs once in it."""
    new: str
    """What replaces it."""
    tests: tuple[str, ...]
    """Test files of which one should fail."""


def mutants() -> list[Mutant]:
    """Return all mutants, by file."""
    return [
        Mutant(path, old, new, tests)
        for path, (tests, changes) in _CHANGES.items()
        for old, new in changes
    ]


_CHANGES: dict[str, tuple[tuple[str, ...], list[tuple[str, str]]]] = {
    "pgl/quant/rows.py": (
        ("tests/quant/test_rows.py",),
        [
            ("return 2 ** (self.bits - 1) - 1", "return 2 ** (self.bits - 1)"),
            ("-self.max_code - int(", "-self.max_code + int("),
            ("self.clip_code if self.step_factor == 1", "self.clip_code if self.step_factor <= 1"),
            ("dtype=torch.float32) * (num_columns - 1)", "dtype=torch.float32) * num_columns"),
            ("lower.lerp(upper, (rank - below)", "upper.lerp(lower, (rank - below)"),
            (".clamp(min=floor)", ".clamp(max=floor)"),
            ("scale_R = scale_R.half().float()", "scale_R = scale_R.bfloat16().float()"),
            ("clip_R if grid.clip_weights else None", "None if grid.clip_weights else clip_R"),
            ("torch.maximum(scale_R, least_R)", "torch.minimum(scale_R, least_R)"),
            ("w_RC.clamp(-clip_R1, clip_R1)", "w_RC.clamp(max=clip_R1)"),
            (".round_().clamp_(", ".floor_().clamp_("),
            ("better = error < best_error", "better = error > best_error"),
            ("torch.where(better, error, best_error)", "error"),
            ("stored_R.isfinite().all()", "stored_R.isfinite().any()"),
        ],
    ),
    "pgl/quant/gptq.py": (
        ("tests/quant/test_gptq.py", "tests/parity/test_quant.py"),
        [
            (".mean(-1).clamp(min=SMALLEST_MEAN_DIAGONAL)", ".mean(-1)"),
            ("hessian_KCC + fraction * mean_K", "hessian_KCC - fraction * mean_K"),
            ("descending=True, stable=True", "descending=False, stable=True"),
            ("cholesky_ex(hessian_KCC.flip(-2, -1))", "cholesky_ex(hessian_KCC)"),
            ("found_loss_K < loss_K[index]", "found_loss_K > loss_K[index]"),
            ("/ factor_KBB[:, i, i, None, None]", "* factor_KBB[:, i, i, None, None]"),
            ("factor_KBB[:, i : i + 1, i + 1 :], alpha=-1", "factor_KBB[:, i : i + 1, i + 1 :]"),
            ("factor_KCC[:, start:stop, stop:], alpha=-1", "factor_KCC[:, start:stop, stop:]"),
            ("factor.order_KC.argsort(dim=-1))", "factor.order_KC)"),
            ("return error_KRC.square().mean((-2, -1))", "return error_KRC.abs().amax((-2, -1))"),
        ],
    ),
    "pgl/quant/fake_quant.py": (
        (
            "tests/parity/test_fake_quant.py",
            "tests/callbacks/test_quantization_aware_training.py",
        ),
        [
            ("(row_max_O1 / clip).clamp_min(1.0 / clip)", "row_max_O1 / clip"),
            (".clamp(-clip - 1, clip)", ".clamp(-clip + 1, clip - 1)"),
            ("+ (cast_OI - cast_OI.detach())", ""),
            ("weight_OI if scale_floor else cast_OI.float()", "weight_OI"),
            ("clamp_min(SMALLEST_ROW_MAX) / clip", "clamp_min(SMALLEST_ROW_MAX) / (clip + 1)"),
        ],
    ),
    "pgl/evaluate/bits_per_byte.py": (
        ("tests/evaluate/test_bits_per_byte.py", "tests/parity/test_bpb.py"),
        [
            ("loss / math.log(2.0) * self.num_tokens", "loss * self.num_tokens"),
            ("* self.num_tokens / self.num_bytes,", "* self.num_bytes / self.num_tokens,"),
            ("nats.detach().double()", "nats.detach().float()"),
            ("nats = torch.where(mask, nats, 0.0)", "nats = nats * mask"),
            ("torch.where(mask, bytes_of_targets, 0)", "bytes_of_targets"),
            ("num_tokens = mask.sum()", "num_tokens = mask.numel()"),
            (
                "self.num_tokens == 0 or self.num_bytes == 0",
                "self.num_tokens == 0 and self.num_bytes == 0",
            ),
            ("moved if moved.dtype == tensor.dtype else", "moved if moved is not None else"),
            ("self._copied = (sums_on_host_2, event)", "self._copied = before"),
        ],
    ),
    "pgl/evaluate/byte_table.py": (
        ("tests/evaluate/test_byte_table.py", "tests/evaluate/test_audit.py"),
        [
            ("& ~is_boundary_V[previous_ids]", ""),
            ("base_bytes_V[target_ids] + space", "base_bytes_V[target_ids]"),
            ("is_boundary_V[previous_ids]", "is_boundary_V[target_ids]"),
            ("is_boundary_V = np.ones(", "is_boundary_V = np.zeros("),
            ("base_bytes_V[token] = 1", "base_bytes_V[token] = 6"),
            ("len(piece.removeprefix(SPACE_MARK).encode())", "len(piece.removeprefix(SPACE_MARK))"),
            ("if SPACE_MARK in piece[1:] and", "if SPACE_MARK in piece[2:] and"),
        ],
    ),
    "pgl/evaluate/windows.py": (
        ("tests/evaluate/test_windows.py",),
        [
            ("if num_targets <= seq_len:", "if num_targets < seq_len - 1:"),
            ("if reached < num_targets:", "if reached < num_targets - 1:"),
            (
                "[[num_targets - seq_len, num_targets, reached]]",
                "[[reached, num_targets, reached]]",
            ),
            ("starts_W <= num_targets - stride", "starts_W < num_targets - stride"),
            ("num_targets - seq_len + 1, stride", "num_targets - seq_len, stride"),
            ("np.maximum(ends_W - stride, starts_W)", "ends_W - stride"),
            ("first_scored_W[:1] = 0", "first_scored_W[:0] = 0"),
            ("count * (rank + 1) // world_size", "count // world_size * (rank + 1)"),
            ("if not 1 <= stride <= seq_len:", "if not 1 <= stride:"),
        ],
    ),
    "pgl/optim/schedules.py": (
        ("tests/optim/test_schedules.py",),
        [
            ("max(round(steps * step_scale), 1) if steps", "round(steps * step_scale) if steps"),
            ("decay ** (1.0 / step_scale)", "decay**step_scale"),
            (
                "window = min(window, config.warmdown_max",
                "window = max(window, config.warmdown_max",
            ),
            ("or remaining > window:", "or remaining < window:"),
            ("math.pi * (1.0 - left)", "math.pi * left"),
            ("progress.elapsed_seconds / max(progress.step, 1)", "progress.elapsed_seconds"),
            ("return config.warmdown_fraction * whole", "return config.warmdown_fraction"),
            (
                "(1.0 - part) * config.momentum_start + part * config.momentum_end",
                "part * config.momentum_start + (1.0 - part) * config.momentum_end",
            ),
            ("/ (1.0 - threshold) if scale", "if scale"),
            ('step if count_from == "zero" else step + 1', "step + 1"),
            ("return scale < start_scale and", "return scale <= start_scale and"),
            ("every_fraction + 1e-9", "every_fraction"),
            ("min(self.step / self.max_steps, 1.0)", "self.step / self.max_steps"),
        ],
    ),
    "pgl/optim/newton_schulz.py": (
        ("tests/optim/test_newton_schulz.py",),
        [
            ("KELLER = (3.4445, -4.7750,", "KELLER = (3.4445, -4.7050,"),
            ("for a, b, c in polynomial:", "for a, b, c in polynomial[1:]:"),
            ("beta=b, alpha=c", "beta=c, alpha=b"),
            ("X_KRC.mT if tall else X_KRC", "X_KRC"),
            ("(norm_K11 + eps)", "norm_K11"),
            ("norm_K11 = norm_K11 * POLAR_EXPRESS_SAFETY", "pass"),
            ("dim=(-2, -1), keepdim=True", "dim=(-1,), keepdim=True"),
        ],
    ),
    "pgl/optim/muon.py": (
        ("tests/optim/test_muon.py", "tests/optim/test_muon_adamw.py"),
        [
            ("max(1.0, rows / cols) ** 0.5", "max(1.0, cols / rows) ** 0.5"),
            ("M_KRC.mul_(momentum).add_(G_KRC)", "M_KRC.lerp_(G_KRC, 1 - momentum)"),
            ("G_KRC.float() + momentum * M_KRC.float()", "G_KRC.float() + M_KRC.float()"),
            ("G_KRC = G_KRC * grad_scale", "G_KRC = G_KRC / grad_scale"),
            ('if decay and order == "before":', 'if decay and order == "after":'),
            ('if decay and order == "after":', 'if order == "never":'),
            ("alpha=-step_size", "alpha=step_size"),
            ("part.mT if wide[index] is not stacks[index] else part", "part"),
            ("(0, 0, 0, 0, 0, missing)", "(0, 0, 0, 0, missing, 0)"),
        ],
    ),
    "pgl/optim/clip.py": (
        ("tests/optim/test_clip.py",),
        [
            (".clamp(max=1.0)", ""),
            ("members, 2, dtype", "members, 1, dtype"),
            ("torch.linalg.vector_norm(torch.stack(norms))", "torch.stack(norms).sum()"),
        ],
    ),
    "pgl/averaging.py": (
        ("tests/test_averaging.py",),
        [
            ("1.0 - self._decay_now\n", "self._decay_now\n"),
            ("self.decay if decay is None else", "self.decay if decay is not None else"),
            ("{name: tensor / self.count for", "{name: tensor / (self.count + 1) for"),
            ("self.count % self.length", "(self.count + 1) % self.length"),
            ("_foreach_div_(list(mean.values()), len(self._snapshots))", "_foreach_abs(())"),
            ("dtype or tensor.dtype, copy=True", "dtype or tensor.dtype"),
            ("{name: tensor.clone() for name", "{name: tensor for name"),
        ],
    ),
    "pgl/model/loss.py": (
        ("tests/model/test_loss.py",),
        [
            ("entropy_N = -(p_NV", "entropy_N = (p_NV"),
            ("(-entropy_N).exp()", "entropy_N.exp()"),
            (".clamp_min(clamp_min)", ""),
            (".sum() / weights_N.sum()", ".mean()"),
            ("logits_NV.float().flatten(0, -2), targets_N", "logits_NV.flatten(0, -2), targets_N"),
        ],
    ),
    "pgl/model/rotary.py": (
        ("tests/model/test_rotary.py",),
        [
            ("rotated_dims / (rotated_dims - 2)", "rotated_dims / rotated_dims"),
            ("if length <= train_len:", "if length < train_len // 2:"),
            ("1.0 / base ** (exponents_R / rotated_dims)", "1.0 / base ** (exponents_R / 64)"),
            ("a * cos_T1R + b * sin_T1R", "a * cos_T1R - b * sin_T1R"),
            ("tensor_split((half, 2 * half)", "tensor_split((half, half)"),
        ],
    ),
    "pgl/artifact/rans.py": (
        ("tests/artifact/test_entropy.py",),
        [
            ("return cumulative_KS - self.frequency_KS", "return cumulative_KS"),
            ("np.maximum(np.floor(exact_S), count_S > 0)", "np.floor(exact_S)"),
            ("np.argsort(frequency_S - exact_S,", "np.argsort(exact_S - frequency_S,"),
            ("taken = min(-missing,", "taken = max(-missing,"),
            ("state >= frequency_L <<", "state > frequency_L <<"),
            ("np.concatenate(pieces[::-1])", "np.concatenate(pieces)"),
            ("np.uint64(TOTAL - 1)", "np.uint64(TOTAL)"),
            ("np.flatnonzero(state < STATE_START)", "np.flatnonzero(state <= STATE_START)"),
            ("if position != words.size or not", "if not"),
        ],
    ),
    "pgl/artifact/entropy.py": (
        ("tests/artifact/test_entropy.py",),
        [
            ("if low + last_symbol > 127 or", "if"),
            ("if num_codes != num_bytes:", "if num_codes < num_bytes:"),
            ("if bits < best_bits:", "if bits > best_bits:"),
            ("itertools.product((0, 2, 4), repeat=2)", "[(0, 0)]"),
            ("| planes[1].astype(np.uint16) << 8", "| planes[1].astype(np.uint16) << 7"),
            ("(symbols_N.astype(np.int16) + low)", "(symbols_N.astype(np.int16) - low)"),
            ("!= TOTAL).any():", "!= TOTAL).all():"),
        ],
    ),
}
