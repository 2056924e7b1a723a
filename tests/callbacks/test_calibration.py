"""What the calibration of GPTQ draws its samples from."""

from callbacks import calibration


def test_samples_do_not_depend_on_the_type_of_the_weights(golf_run, monkeypatch):
    monkeypatch.setattr(calibration, "generate_batch", lambda gpt, uniform_BT, *_: uniform_BT)
    run = golf_run(fit=False, precision="bf16-true")
    run.trainer._data_connector.attach_data(run.module, datamodule=run.data)
    with run.trainer.precision_plugin.val_step_context():
        uniform_BT = calibration._sampled(run.trainer, run.module, 64)
    assert len(uniform_BT.unique()) == uniform_BT.numel() == 64 * 32
