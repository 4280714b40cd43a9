"""rounding.py: it measures the trainer's own loss; what half precision adds to it is kept small."""

import re

import pytest
import rounding
import torch
from conftest import QUICK, ROOT, command_line, log

ONE_STEP = QUICK | {"max_train_steps": 1, "lora_rank": 4, "num_ddim_timesteps": 1}


def rows(text):
    """The numbers in each row of the table."""
    found = [re.findall(r"[\d.]+", line) for line in text.splitlines()[2:]]
    return [[float(cell) for cell in row] for row in found]


@pytest.mark.parametrize("run, folder", [("train", "teacher"), ("train_xl", "xl_teacher")])
def test_the_signal_is_what_the_loss_measures(request, images, capsys, run, folder):
    """With one timestep a trainer's first loss is that of this program's row."""
    train, model = (request.getfixturevalue(name) for name in (run, folder))
    loss = log(train(**ONE_STEP, loss_type="l2"))[0]["loss"]
    capsys.readouterr()
    flags = command_line(ONE_STEP | {"train_data_dir": images, "center_crop": False})
    made = rounding.differences(str(model), flags)
    assert [*made] == [999] and rounding.rms(made[999]["no"]) ** 2 == pytest.approx(loss, rel=1e-4)
    rounding.main(["--model", str(model), *flags])
    ((t, signal, *errors),) = rows(capsys.readouterr().out)
    assert t == 999 and signal == pytest.approx(loss**0.5, abs=1e-4)
    bf16, share, fp16, _ = errors
    assert 0 < fp16 < bf16 / 4 and share == pytest.approx(bf16 / signal, abs=0.01)


def test_timesteps_are_the_solvers(teacher, images, capsys):
    """Another than these has no step to measure."""
    flags = ["--model", teacher, *command_line(QUICK | {"train_data_dir": images})]
    with pytest.raises(SystemExit, match="--timesteps 998: give some of 19, 39, .* 999$"):
        rounding.main([*map(str, flags), "--timesteps", "999", "998"])


def test_half_precision_rounds_less_than_the_signal():
    """On a trained teacher, where 1 / alpha is 15: before, 1.04 of the signal, and 0.13 in fp16."""
    flags = {"dataset_name": ROOT / "demo/data", "train_batch_size": 4}
    flags |= {"num_ddim_timesteps": 40, "phases": 1}
    made = rounding.differences(str(ROOT / "demo/teacher-sd15"), command_line(flags), [999])
    exact, bf16, fp16 = (made[999][name] for name in rounding.PRECISIONS)
    shares = [rounding.rms(half - exact) / rounding.rms(exact) for half in (bf16, fp16)]
    assert 0 < shares[0] < 0.6 and 0 < shares[1] < 0.08


@pytest.mark.parametrize("run", ["train", "train_xl"])
@pytest.mark.parametrize("quantize_base", [None, "nf4"])
def test_the_last_layers_are_float32(request, monkeypatch, run, quantize_base):
    """Also with a LoRA on the last one; it is read back, and validation generates with it."""
    seen, conv2d = set(), torch.nn.functional.conv2d

    def look(x, weight, *more):
        if len(weight) == 4 and x.shape[1] == 32:  # of the output and of its LoRA
            seen.add((x.dtype, weight.dtype))
        return conv2d(x, weight, *more)

    monkeypatch.setattr(torch.nn.functional, "conv2d", look)
    flags = {"lora_target_modules": "conv_out conv_in to_q", "validation_prompts": ["rain"]}
    train = request.getfixturevalue(run)
    flags |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    out = train(quantize_base=quantize_base, **flags)
    assert seen == {(torch.float32, torch.float32)}
    assert log(out)[0]["loss"] > 0 and (out / "validation" / "step-000004.png").exists()
