"""The LightningModule: its loss, weights on loan, checkpoints of other formats and layouts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F

from callbacks import WallClockBudget
from pgl.evaluate import score_batch
from pgl.generate import GenerationConfig, generate
from pgl.module import GolfModule
from pgl.objective import LossConfig
from pgl.optim import Progress, ScheduleConfig


def batch(sequences=2, seq_len=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 320, (sequences, seq_len + 1), generator=generator, dtype=torch.int32)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(tiny_gpt):
    module, tokens = GolfModule(tiny_gpt), batch()
    loss = module.training_step(tokens, 0)
    logits = module.gpt(tokens[:, :-1])
    expected = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten().long())
    torch.testing.assert_close(loss, expected)
    assert torch.equal(module.step_losses[0], loss.detach())
    assert not module.step_losses[0].requires_grad


def test_mile_changes_the_loss_while_its_gamma_is_positive(tiny_gpt):
    plain = GolfModule(tiny_gpt)
    mile = GolfModule(tiny_gpt, loss=LossConfig(mile_gamma=1.1))
    mile.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for module in (plain, mile):
            module.gpt.tok_emb.weight.mul_(100)  # confident, so that the weights differ
    mile.mile_gamma.fill_(1.1)
    expected = plain.training_step(batch(), 0)
    assert abs(float(mile.training_step(batch(), 0) - expected)) > 1e-3
    mile.mile_gamma.fill_(0.0)
    torch.testing.assert_close(mile.training_step(batch(), 0), expected)


def test_progress_reaches_every_group(tiny_gpt, monkeypatch):
    schedule = ScheduleConfig(
        warmdown_steps=None,
        warmdown_fraction=0.5,
        momentum_start=0.8,
        momentum_end=0.9,
        momentum_warmup_steps=None,
        momentum_warmup_fraction=0.5,
    )
    module = GolfModule(tiny_gpt, schedule=schedule)
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(module, "optimizers", lambda use_pl_optimizer: optimizer)
    initial = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert initial == {"embedding": 0.035, "matrix": 0.025, "scalar": 0.025}
    for elapsed, scale, momentum in ((2.0, 1.0, 0.84), (8.0, 0.4, 0.9)):
        module.apply_progress(Progress(int(elapsed), elapsed, 10.0, None))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(initial[group["name"]] * scale)
            if group["kind"] == "muon":
                assert group["momentum"] == pytest.approx(momentum)


def test_weights_on_loan_are_given_back_even_after_an_error(tiny_gpt):
    module, other = GolfModule(tiny_gpt), GolfModule(tiny_gpt)
    own = {name: p.detach().clone() for name, p in module.gpt.named_parameters()}
    weights = {name: p.detach() + 1 for name, p in other.gpt.named_parameters()}

    def borrow():
        with module.with_weights(weights):
            for name, parameter in module.gpt.named_parameters():
                assert torch.equal(parameter, weights[name])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        borrow()
    for name, parameter in module.gpt.named_parameters():
        assert torch.equal(parameter, own[name])
    with pytest.raises(KeyError), module.with_weights({}):
        pass
    for name, parameter in module.gpt.named_parameters():
        assert torch.equal(parameter, own[name])


def test_predict_continues_the_prompt(tiny_gpt, tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("predict")
    tiny_data.set_prompts(["the model"])
    module = GolfModule(tiny_gpt).eval()
    module.generation = GenerationConfig(max_new_tokens=5)
    module._trainer = SimpleNamespace(datamodule=tiny_data)
    (prompt,) = tiny_data.predict_dataloader()
    assert int(prompt[0]) == tiny_data.tokenizer.bos_id()
    text = module.predict_step(prompt, 0)
    ids = generate(module.gpt, prompt, module.generation, context_len=tiny_data.seq_len)
    assert text == tiny_data.tokenizer.decode(ids.tolist())
    assert text.startswith("the model")
    assert len(ids) == len(prompt) + 5


def test_a_checkpoint_of_a_newer_format_is_refused(tiny_gpt):
    module = GolfModule(tiny_gpt)
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    checkpoint["pgl_format"] += 1
    with pytest.raises(ValueError, match=r"format 2, this pgl .* reads up to format 1: upgrade"):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("in_hook", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_batch_progress_follows_the_accumulation_of_this_run(tiny_gpt, accumulate, in_hook):
    module = GolfModule(tiny_gpt)
    module._trainer = SimpleNamespace(
        accumulate_grad_batches=accumulate,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=None,
    )
    counts = dict.fromkeys(("ready", "started", "processed", "completed"), 20)
    counts["completed"] -= in_hook
    progress = {"total": dict(counts), "current": dict(counts)}
    checkpoint = {
        "global_step": 5,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
        "optimizer_states": [module.configure_optimizers().state_dict()],
    }
    module.on_load_checkpoint(checkpoint)
    done = 5 * accumulate
    expected = {
        "ready": done,
        "started": done,
        "processed": done,
        "completed": done - in_hook,
    }
    assert progress == {"total": expected, "current": expected}


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_flash_attention_4_needs_16_bits(golf_run, tiny_gpt, precision):
    module = GolfModule(replace(tiny_gpt, attention_backend="fa4"))
    run = golf_run(fit=False, module=module, precision=precision)
    for command in (run.trainer.fit, run.trainer.validate):
        with pytest.raises(ValueError, match=rf"fa4 computes in 16 bits.* {precision}: set it to"):
            command(run.module, datamodule=run.data)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_quack_needs_bfloat16(golf_run, tiny_gpt, precision):
    wide = replace(tiny_gpt, model_dim=64, mlp_hidden=128, kernels="quack")
    run = golf_run(fit=False, module=GolfModule(wide, compile=True))
    run.module.trainer = SimpleNamespace(precision=precision)
    with pytest.raises(ValueError, match=rf"quack computes in bfloat16.* {precision}: set it to"):
        run.module.setup("fit")


def test_quack_needs_a_compiled_model(golf_run, tiny_gpt):
    wide = replace(tiny_gpt, model_dim=64, mlp_hidden=128, kernels="quack")
    run = golf_run(fit=False, module=GolfModule(wide), precision="bf16-true")
    with pytest.raises(ValueError, match="quack runs in compiled models only"):
        run.trainer.fit(run.module, datamodule=run.data)


def test_quack_needs_micro_batches_of_whole_tiles(golf_run, tiny_gpt):
    wide = replace(tiny_gpt, model_dim=64, mlp_hidden=128, kernels="quack")
    run = golf_run(fit=False, module=GolfModule(wide, compile=True), precision="bf16-true")
    tokens = run.data.micro_batch_tokens
    assert tokens % 128
    with pytest.raises(ValueError, match=f"_tokens to be a multiple of 128, not {tokens}"):
        run.trainer.fit(run.module, datamodule=run.data)


def test_float64_weights_are_scored_but_not_trained(golf_run):
    run = golf_run(fit=False, precision="64-true")
    with pytest.raises(ValueError, match=r"trainer.precision 64-true .*: set it to 32-true"):
        run.trainer.fit(run.module, datamodule=run.data)
    [score] = run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert score["val/bpb"] > 0


@pytest.mark.slow
def test_a_compiled_run_trains_as_the_eager_one(golf_run, tiny_gpt):
    runs = {}
    for compile in (False, True):
        torch.manual_seed(0)
        runs[compile] = golf_run(
            folder=f"compile_{compile}",
            module=GolfModule(tiny_gpt, compile=compile),
            budget=WallClockBudget(seconds=None, steps=2, warmup_steps=1),
        )
    module = runs[True].module
    assert hasattr(module._training_loss, "_torchdynamo_orig_callable")
    assert module.score_batch is not runs[False].module.score_batch is score_batch
    assert set(module.state_dict()) == set(runs[False].module.state_dict())
    for name, weight in runs[False].module.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=1e-2, atol=1e-3)
