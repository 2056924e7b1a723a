"""Whatever an option is set to: it is accepted, or refused in one line that names it."""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI

from pgl.cli import main

TINY = Path(__file__).resolve().parent.parent / "configs" / "hardware" / "tiny.yaml"
HUGE = "1000000000000"
NUMBERS = {int: ("-1", "0", HUGE), float: ("-1", "0", "1e30", ".nan", ".inf", "-.inf")}
SKIPPED = (
    # Nothing but folders and names.
    "trainer.logger",
    # Lightning's own, which take anything, act in another way, or start other processes.
    *("trainer.plugins", "trainer.callbacks", "trainer.profiler", "trainer.num_nodes"),
    *("trainer.devices", "trainer.fast_dev_run", "trainer.default_root_dir"),
)
LOUDER_WORDS = {
    # The message is about the setting that contradicts the one given.
    "trainer.max_time": ("duration",),
    "artifact.limit_bytes": ("folder for the run",),  # no room on the disk
}
"""What the line may say in place of the option's own name."""
PATTERNS = (
    (r"artifact\.quant\.\w+\.grid$", "artifact.quant.<group>.grid"),
    (r"averaging\.(swa|last)$", "averaging.<swa or last>"),
    (r"ttt\.(score_first|full)$", "ttt.<method>"),
    # Lightning's own messages name the option alone.
    (r"trainer$", ""),
)
"""What the line may say in place of the section of a class that several sections share."""


class Options:
    """The command line, with its parser built once."""

    def __init__(self, base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        built: dict[str, Any] = {}
        set_up = LightningCLI.setup_parser

        def set_up_once(cli: LightningCLI, *args: Any, **kwargs: Any) -> None:
            if not built:
                before = set(vars(cli))
                set_up(cli, *args, **kwargs)
                built.update({key: vars(cli)[key] for key in vars(cli).keys() - before})
            vars(cli).update(built)

        monkeypatch.setattr(LightningCLI, "setup_parser", set_up_once)
        # Everything up to the first step.
        monkeypatch.setattr(pl.Trainer, "_run_stage", lambda trainer: None)
        main(["fit", *base])
        self.types = {
            (subcommand, action.dest): action._typehint
            for subcommand, parser in built["_subcommand_parsers"].items()
            for action in parser._actions
            if hasattr(action, "_typehint") and not action.dest.startswith(SKIPPED)
        }

    def values(self, subcommand: str) -> list[tuple[str, str]]:
        return [
            (key, value)
            for (of, key), kind in self.types.items()
            if of == subcommand
            for value in bad_values(kind)
        ]


def bad_values(kind: Any) -> list[str]:
    """Values of a wrong type, and numbers at the end of the world."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        numbers = [v for a in arguments if a is not type(None) for v in NUMBERS.get(a, ())]
        return list(dict.fromkeys(numbers))
    if kind in NUMBERS:
        return ["x", "", *NUMBERS[kind]]
    if kind is bool or origin is Literal:
        return ["nope", ""]
    if origin is list:
        return ["x", "[-1]", "[nope]", "[]", f"[{HUGE}]"]
    return []


def surely_wrong(kind: Any, value: str) -> bool:
    return value in ("x", "nope", "", "[nope]") and kind is not str


@pytest.fixture(scope="module")
def options(tiny_corpus, tmp_path_factory) -> Iterator[Options]:
    base = [
        *("--config", str(TINY), "--budget.steps=1", "--model.gpt.num_layers=3"),
        "--model.gpt.vocab_size=320",
        *("--model.gpt.bigram_buckets=64", "--model.gpt.bigram_dim=8"),
        *("--model.gpt.value_embedding_layers=[1]", "--model.gpt.value_embedding_dim=16"),
        *("--model.gpt.cache_layer=0", "--model.gpt.backout=true"),
        *("--averaging.swa={every_steps: 1, start_scale: 2}", "--qat.start=first_step"),
        *("--ttt.method=score_first", "--trainer.enable_model_summary=false"),
        f"--trainer.logger.init_args.save_dir={tmp_path_factory.mktemp('bad_input')}",
        "--data.source=pgl.data.Shards",
        f"--data.source.init_args.directory={tiny_corpus.directory}",
        f"--data.source.init_args.tokenizer_path={tiny_corpus.tokenizer_path}",
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Options(base, monkeypatch)


def outcome(subcommand: str, options: Options, key: str, value: str, capsys) -> str | None:
    """Return the line with which a value is refused, or None."""
    capsys.readouterr()
    status = None
    try:
        main([subcommand, *options.base, f"--{key}={value}"])
    except SystemExit as stop:
        status = stop.code
    assert status in (None, 2), (key, value)
    return None if status is None else capsys.readouterr().err.splitlines()[-1]


def check(subcommand: str, options: Options, key: str, value: str, capsys) -> None:
    line = outcome(subcommand, options, key, value, capsys)
    if surely_wrong(options.types[subcommand, key], value):
        assert line is not None, f"--{key}={value} was accepted"
    if line is not None:
        assert line.startswith("pgl: error: ")
        assert "Traceback" not in line
        assert is_named(key, line), f"--{key}={value}: {line}"


def is_named(key: str, line: str) -> bool:
    """Whether a line has an option's name, and the section that is typed in front of it."""
    if any(word in line for word in LOUDER_WORDS.get(key, ())):
        return True
    section, _, name = key.rpartition(".")
    sections = [section, *(shared for rule, shared in PATTERNS if re.match(rule, section))]
    return name in line and any(section in line for section in sections)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_option_is_taken_or_named(data, options, capsys):
    key, value = data.draw(st.sampled_from(options.values("fit")))
    check("fit", options, key, value, capsys)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), subcommand=st.sampled_from(["validate", "export"]))
def test_a_wrong_type_is_named_by_every_subcommand(data, subcommand, options, capsys):
    wrong = [
        (key, value)
        for key, value in options.values(subcommand)
        if surely_wrong(options.types[subcommand, key], value)
    ]
    key, value = data.draw(st.sampled_from(wrong))
    check(subcommand, options, key, value, capsys)


@pytest.mark.slow
def test_all_values_of_all_options_are_taken_or_named(options, capsys):
    wrong = []
    for key, value in options.values("fit"):
        try:
            check("fit", options, key, value, capsys)
        except Exception as error:
            wrong.append(f"--{key}={value}: {type(error).__name__} {error}")
    assert wrong == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed_everything", "-1", "seed_everything must be from 0"),
        ("ckpt_path", "", "ckpt_path is empty"),
        ("model.gpt.model_dim", HUGE, "model.gpt.num_layers, model_dim, mlp_hidden must be lower"),
        ("model.gpt.bigram_buckets", HUGE, "model.gpt.bigram_buckets, bigram_dim must be lower"),
        ("model.gpt.qk_gain_init", "1e30", "model.gpt.qk_gain_init must be at most 65504"),
        ("model.optimizer.ns_steps", HUGE, "model.optimizer.ns_steps must be at least 1 and at"),
        ("model.optimizer.beta1", "2", "model.optimizer.beta1 must be at least 0 and below 1"),
        ("model.schedule.momentum_end", "1", "model.schedule.momentum_end must be at least 0 and"),
        ("model.optimizer.matrix_lr", ".nan", "model.optimizer.matrix_lr is nan"),
        ("model.optimizer.eps", ".inf", "model.optimizer.eps is inf"),
        ("model.optimizer.adam_weight_decay", "1e30", "adam_weight_decay must be from 0 to 1000"),
        ("data.spans_per_batch", HUGE, "data.spans_per_batch=1000000000000 must not exceed"),
        ("data.batch_tokens", HUGE, "data.batch_tokens must be from 1"),
        ("budget.warmup_steps", HUGE, "budget.warmup_steps must be from 0 to 1000"),
        ("budget.step_scale", "1e30", "budget.step_scale must be above 0 and at most 1000"),
        ("averaging.ema.decay", "-1", "averaging.ema.decay must be in [0, 1)"),
        ("averaging.swa.keep", "0", "averaging.<swa or last>.keep must be at least 1 or null"),
        ("artifact.calibration_sequences", HUGE, "calibration_sequences must be from 1 to 65536"),
        ("artifact.file_name", "../model.pgl", "artifact.file_name must be a name"),
        ("artifact.quant.attention.grid.search_quantiles", "[.nan]", "search_quantiles is nan"),
        ("artifact.quant.mlp.grid.bits", "4", "artifact.quant.<group>.grid.bits is 4: choose 5"),
        ("artifact.quant.bigram.method", "gptq", "artifact.quant.bigram.method is"),
        ("artifact.quant.gptq.damping", "-1", "artifact.quant.gptq.damping is -1"),
        ("artifact.quant.gptq.steps", "balanced", "artifact.quant.gptq.steps is"),
        ("artifact.codec", "zip", 'artifact.codec "zip" is unknown'),
        ("validation.seq_len", HUGE, "validation.seq_len must be positive and at most"),
        ("ttt.score_first.freeze_blocks", HUGE, "freeze_blocks is 1000000000000 but the model has"),
        ("ttt.score_first.lr", "0", "ttt.<method>.lr is 0.0; it must be above 0"),
        ("ttt.score_first.chunk_tokens", "9", "chunk_tokens is 9 but a training sequence has"),
        ("data.source.init_args.max_train_shards", "0", "data.source.init_args.max_train_shards"),
        ("generation.seed", "-1", "generation.seed must be from 0"),
        ("trainer.min_steps", "0", "trainer.min_steps is not for a run on a budget"),
        ("trainer.log_every_n_steps", "0", "trainer.log_every_n_steps must be from 1"),
        ("trainer.devices", "nope", "the trainer's settings: `devices`"),
        ("trainer.strategy", "nope", "the trainer's settings: You selected an invalid strategy"),
    ],
)
def test_what_would_strike_later_is_refused_at_once(key, value, said, options, capsys):
    assert said in (outcome("fit", options, key, value, capsys) or "accepted")


def test_a_null_that_lightning_takes_is_taken(options, capsys):
    assert outcome("fit", options, "trainer.log_every_n_steps", "null", capsys) is None


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--data.micro_batch_tokens=100"], "data.micro_batch_tokens=100"),
        (["--validation.stride_tokens=128"], "validation.stride_tokens=128"),
        (["--averaging.last={every_steps: 5}"], "averaging.last.keep"),
        (["--artifact.search=step", "--artifact.limit_bytes=null"], "artifact.search is step"),
        (["--ttt.method=full"], "ttt.allow_illegal"),
        (
            ["--ttt.allow_illegal=true", "--data.max_val_tokens=20", "--ttt.method=full"],
            "ttt.method full: 19 targets do not fill a training sequence of",
        ),
        (
            ["--data.max_val_tokens=20", "--validation.tail=pr324"],
            "validation.tail pr324 makes no window of 19 targets: set it to exact, or lower",
        ),
        (["--model.gpt.document_mask=true", "--model.gpt.attention_backend=flash"], "document_m"),
        (["--model.gpt.cache_layer=null"], "backout needs cache_layer"),
        (
            ["--model.schedule.warmdown_fraction=0.5"],
            "model.schedule.warmdown_steps and warmdown_fraction: set exactly one",
        ),
        (
            ["--artifact.quant.mlp.store=float16", "--artifact.quant.mlp.method=gptq"],
            'artifact.quant.<group>.method is "gptq"',
        ),
        (["--validation.weights=ema"], "validation.weights"),
        (["--budget.seconds=10", "--budget.reserve_seconds=11"], "budget.reserve_seconds=11"),
    ],
)
def test_settings_that_contradict_each_other_are_named(extra, said, options, capsys):
    *others, last = extra
    key, _, value = last.removeprefix("--").partition("=")
    changed = types.SimpleNamespace(base=[*options.base, *others])
    assert said in (outcome("fit", changed, key, value, capsys) or "accepted")
