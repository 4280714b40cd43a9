"""What a run says and checks before its first step, and how it ends.

A resumed run is the run that it goes on with; the environment does not change what flags say; what
cannot work is said in one line before anything is written.
"""

import argparse
import errno
import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import GPUS, LORA, QUICK, ROOT, command_line, load_script, log, lora_file, run, same
from PIL import Image
from test_resume import contents, refused

SHORT = {"max_train_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def short(train):
    """A finished run of two steps, to be copied."""
    return train(**SHORT)


@pytest.fixture
def copy(short, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(short, tmp_path / "out")


# ------------------------------------------------------------------- the run that is gone on with


@pytest.fixture(scope="module")
def others(make_teacher, make_images):
    """What another run may have been started with, by flag."""
    return {
        "pretrained_teacher_model": make_teacher(seed=1),
        "train_data_dir": make_images(7),
        "learning_rate": 5e-3,
        "loss_type": "l2",
        "seed": 6,
        "train_batch_size": 3,
        "w_max": 9.0,
        "num_ddim_timesteps": 25,
        "adam_beta1": 0.5,
        "mixed_precision": "bf16",
        "random_flip": True,
        "lora_alpha": 2.0,
        "max_grad_norm": 2.0,
        "proportion_empty_prompts": 0.5,
        "lr_scheduler": "cosine",
        "ema_decay": 0.9,
    }


NAMED = [
    "pretrained_teacher_model", "train_data_dir", "learning_rate", "loss_type", "seed",
    "train_batch_size", "w_max", "num_ddim_timesteps", "adam_beta1", "mixed_precision",
    "random_flip", "lora_alpha", "max_grad_norm", "proportion_empty_prompts", "lr_scheduler",
    "ema_decay",
]  # fmt: skip


@pytest.mark.parametrize("flag", NAMED)
def test_another_run_is_not_gone_on_with(train, copy, others, flag):
    """It is refused by the flag's name, and every file stays as it was."""
    before = contents(copy)
    flags = SHORT | {"max_train_steps": 4, flag: others[flag]}
    message = refused(train, output_dir=copy, resume_from_checkpoint="latest", **flags)
    assert f"--{flag} " in message and "--allow_changed" in message and contents(copy) == before


def test_a_teacher_that_was_changed_in_its_place(train, make_teacher, tmp_path):
    """Its name is the same, its weights are not."""
    place = shutil.copytree(make_teacher(seed=2), tmp_path / "model")
    out = train(pretrained_teacher_model=place, **SHORT)
    shutil.copytree(make_teacher(seed=3), place, dirs_exist_ok=True)
    flags = SHORT | {"max_train_steps": 3, "pretrained_teacher_model": place}
    message = refused(train, output_dir=out, resume_from_checkpoint="latest", **flags)
    assert "pretrained_teacher_model" in message


def test_what_does_not_change_the_result_is_named_only(train, copy, capsys):
    """More steps, another number of images at once, checkpoints more often."""
    free = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    flags = SHORT | {"max_train_steps": 4} | free
    train(output_dir=copy, resume_from_checkpoint="latest", **flags)
    said = capsys.readouterr().out
    for flag in (*free, "max_train_steps"):
        assert f"changed at this resume: --{flag} " in said
    assert [row["step"] for row in log(copy)] == [1, 2, 3, 4]
    assert "changed_at_resume" not in lora_file(copy)[1]


def test_streamed_data_are_read_in_the_same_portions(train, tmp_path):
    """Their order depends on them."""
    out, flags = tmp_path / "out", SHORT | {"streaming": True}
    train(output_dir=out, **flags)
    flags |= {"max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    message = refused(train, output_dir=out, resume_from_checkpoint="latest", **flags)
    assert "train_batch_size 1 (it was 2)" in message


def test_an_allowed_change_is_made_and_kept_in_the_file(train, copy):
    """The optimizer takes the new rate; the LoRA's header says when which flag was changed."""
    flags = SHORT | {"max_train_steps": 4, "learning_rate": 5e-3, "adam_weight_decay": 0.5}
    allowed = ["learning_rate", "adam_weight_decay"]
    train(output_dir=copy, resume_from_checkpoint="latest", allow_changed=allowed, **flags)
    assert [row["lr"] for row in log(copy)] == [1e-2, 1e-2, 5e-3, 5e-3]
    about = lora_file(copy)[1]
    change = {"step": 2, "learning_rate": [1e-2, 5e-3], "adam_weight_decay": [0.0, 0.5]}
    assert json.loads(about["changed_at_resume"]) == [change]
    assert json.loads(about["training_args"])["learning_rate"] == 5e-3
    flags |= {"max_train_steps": 5}  # and is known to the next one
    train(output_dir=copy, resume_from_checkpoint="latest", **flags)
    assert json.loads(lora_file(copy)[1]["changed_at_resume"]) == [change]
    state = torch.load(copy / "checkpoint-5/training_state.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_a_checkpoint_without_a_record_of_its_flags(train, copy):
    """One of an earlier version: its weights can be trained on, its run not."""
    folder = copy / "checkpoint-2"
    (folder / "flags.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["flags.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": folder}
    assert "--lora_path" in refused(train, output_dir=copy, **flags)


def test_an_allowed_flag_has_to_be_one(refusal):
    assert "--allow_changed sped" in refusal({"allow_changed": ["sped"]})


def test_nothing_left_to_train_leaves_everything(train, copy, capsys):
    """Also where the checkpoint is beyond the last step."""
    before = contents(copy)
    for steps in (2, 1):
        flags = SHORT | {"max_train_steps": steps}
        train(output_dir=copy, resume_from_checkpoint="latest", **flags)
        assert "nothing left to train" in capsys.readouterr().out and contents(copy) == before


def test_a_run_killed_before_its_last_file_is_ended(train, short, copy):
    """The checkpoint of the last step is there, the LoRA is an older one."""
    shutil.copy(train(seed=5, max_train_steps=1) / LORA, copy / LORA)
    train(output_dir=copy, resume_from_checkpoint="latest", **SHORT)
    assert same(copy, short)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_finished_lora_is_not_trained_over(train, copy, resume):
    """Even where somebody deleted its checkpoints."""
    shutil.rmtree(copy / "checkpoint-2")
    before = contents(copy)
    message = refused(train, output_dir=copy, resume_from_checkpoint=resume, **SHORT)
    assert str(copy) in message and contents(copy) == before


def test_the_last_step_has_a_checkpoint_and_a_row(sd15, short):
    assert not sd15.damage(short / "checkpoint-2")
    assert [row["step"] for row in log(short)] == [1, 2]


@pytest.mark.parametrize(
    "line", [b"{", b"null", b"[1]", b"\xff\xfe", b'{"loss": 1}', b'"step"', b"{" * 2000]
)
def test_a_broken_line_in_the_log(train, copy, line):
    """A full disk or an editor left it: the other rows stay."""
    file = copy / "log.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, line, second]) + b"\n" + line)
    train(output_dir=copy, resume_from_checkpoint="latest", **SHORT | {"max_train_steps": 3})
    assert [row["step"] for row in log(copy)] == [1, 2, 3]


# ------------------------------------------------------------------------------------ environment


def test_the_environment_does_not_change_the_accumulation(train, short, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert same(train(**SHORT), short)


def test_the_environments_precision_is_what_is_written_down(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = train(**SHORT)
    about = lora_file(out)[1]
    assert about["ss_mixed_precision"] == "bf16" and "mixed precision bf16" in (
        " ".join((out / "README.md").read_text().split())
    )
    assert json.loads((out / "args.json").read_text())["arguments"]["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--torch_compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--mixed_precision"),
        ("ACCELERATE_MIXED_PRECISION", "half", "--mixed_precision"),
    ],
)
def test_what_accelerate_cannot_be_told_here(train, monkeypatch, variable, value, word):
    monkeypatch.setenv(variable, value)
    assert word in refused(train, **SHORT)


def test_trackers_are_tried_before_anything_is_loaded(sd15, train, monkeypatch, tmp_path):
    """A bad project name; W&B itself does not start."""
    monkeypatch.setattr(sd15, "load_teacher", None)
    monkeypatch.setattr(sd15, "load_records", None)
    flags = {"report_to": "wandb", "tracker_project_name": "a/b", "output_dir": tmp_path / "out"}
    message = refused(train, **flags)
    assert "--report_to wandb" in message and not list(tmp_path.rglob("*.safetensors"))


def test_wandb_without_a_key(teacher, images, tmp_path):
    """In a process of its own: W&B keeps what it found."""
    flags = {"pretrained_teacher_model": teacher, "train_data_dir": images, "report_to": "wandb"}
    command = [sys.executable, ROOT / "train_lcm_lora_sd15.py", *command_line(QUICK | flags)]
    settings = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": tmp_path}
    settings |= {"NETRC": tmp_path / "netrc"}
    done = run(*command, cwd=tmp_path, **{name: str(value) for name, value in settings.items()})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "--report_to wandb" in last and "wandb login" in last
    assert "loading" not in done.stdout


def test_wandb_disabled(train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = train(report_to="wandb", validation_prompts=["rain"], **SHORT)
    assert (out / LORA).exists()


def test_a_reader_that_is_killed(sd15, train, monkeypatch, tmp_path, capfd):
    """Such as by docker's small /dev/shm: the run is saved, and the line says what to do."""
    make = sd15.make_sample

    def kill(record, step, *more):
        if step == 6:  # readers are two batches ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return make(record, step, *more)

    monkeypatch.setattr(sd15, "make_sample", kill)
    out = tmp_path / "out"
    message = refused(train, output_dir=out, dataloader_num_workers=1, max_train_steps=8)
    assert "--dataloader_num_workers 0" in message and "--shm-size" in message
    (saved,) = sd15.checkpoints(out)
    assert not sd15.damage(saved) and saved.name == f"checkpoint-{log(out)[-1]['step']}"


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="files are named by /proc")
def test_a_file_system_without_locks(train, short, monkeypatch, tmp_path):
    """Lustre without flock, some FUSE drives: the run goes on, and a second one is kept out."""
    import fcntl

    real = fcntl.flock

    def flock(number, *more):
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSYS, "Function not implemented")
        return real(number, *more)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert same(train(**SHORT, output_dir=tmp_path / "out"), short)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders(sd15, monkeypatch, tmp_path, number):
    """CIFS and WSL drives: it is left out; a real error is one."""

    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            sd15.flush_to_disk(tmp_path)
    else:
        sd15.flush_to_disk(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        sd15.flush_to_disk(tmp_path / "file")


def test_a_place_that_cannot_be_written_gets_its_own_advice(sd15):
    place = sd15.or_fail("--dataset_name x: cannot be opened", "give images")
    with pytest.raises(SystemExit, match="make that place writable"), place:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")


def test_a_tilde_is_the_home_folder(sd15, monkeypatch):
    """Of each flag that holds a path, where no shell has replaced it, such as after `=`."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["pretrained_teacher_model", "train_data_dir", "output_dir", "lora_path", "cache_dir"]
    args = sd15.parse_args(command_line({path: f"~/{path}" for path in paths}))
    assert [vars(args)[path] for path in paths] == [f"/home/me/{path}" for path in paths]


def test_a_tilde_in_the_commands_of_other_programs(monkeypatch):
    """Not in a word that only begins with it, such as a prompt."""
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/a", "--output=~/b", "~", "~cat~", "a~/b", "--prompt", "~ or so"]
    expected = ["/home/me/a", "--output=/home/me/b", "/home/me", *words[3:]]
    assert load_script("help_formatter").command_line(words) == expected


def test_a_small_file_is_whole_or_as_before(sd15, monkeypatch, tmp_path):
    """Such as args.json on a full disk."""
    file = tmp_path / "args.json"
    sd15.write_whole(file, "before")

    def half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(file), "write_text", half)
    with pytest.raises(OSError, match="No space"):
        sd15.write_whole(file, "after")
    assert file.read_text() == "before" and [*tmp_path.iterdir()] == [file]


# ------------------------------------------------------------------------------ start, step and end


@pytest.fixture
def refusal(sd15):
    """refusal(flags) -> the one line with which a command line is refused."""
    needed = {"pretrained_teacher_model": "a/b", "train_data_dir": "c"}

    def refusal(flags):
        with pytest.raises(SystemExit) as end:
            sd15.parse_args(command_line(needed | flags))
        return end.value.code

    return refusal


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("validation_prompt", "--validation_prompts"),
        ("max_train_step", "--max_train_steps"),
        ("lora-rank", "--lora_rank"),
        ("checkpoint_steps", "--checkpointing_steps"),
    ],
)
def test_a_flag_that_is_nearly_one(refusal, typed, meant):
    assert f"did you mean {meant}?" in refusal({typed: 1})


def test_a_flag_that_is_like_none(refusal):
    assert "did you mean" not in refusal({"qqqqqqqq": 1})


def test_the_start_says_what_will_be_done(train, capsys):
    train(**SHORT, validation_prompts=["rain"], validation_steps=7, checkpointing_steps=30)
    said = capsys.readouterr().out
    for words in (
        "device: 1 x " if GPUS else "device: 1 x cpu, mixed precision no",
        "epsilon; 50 DDIM timesteps",
        "checkpoint every 30 steps",
        "images every 7",
        "finished in 0:",
        "python infer.py --lora ",
        "--prompt rain",
    ):
        assert words in said, words


@pytest.mark.parametrize(
    ("precision", "processes", "word"),
    [("fp16", 1, "warning: fp16"), ("no", 2, "warning: no GPU"), ("bf16", 1, "device: 1 x cpu")],
)
def test_what_is_plainly_slow_is_warned_of(sd15, capsys, precision, processes, word):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, print=print)
    sd15.describe_device(accelerator, SimpleNamespace(mixed_precision=precision))
    said = capsys.readouterr().out
    assert word in said and ("warning" in said) == word.startswith("warning")


def test_target_and_student_drop_the_same(sd15, teacher):
    """LoRA dropout takes the same mask in both passes of a step, another in the next step."""
    args = sd15.parse_args(
        command_line(
            {"pretrained_teacher_model": teacher, "train_data_dir": "c", "lora_dropout": 0.5}
        )
    )
    pipe = sd15.load_teacher(args, torch.float32)
    student = sd15.make_student(pipe, args, torch.device("cpu")).train()
    for _, b, _ in sd15.lora_layers(student).values():
        torch.nn.init.normal_(b)
    z = torch.randn(2, 4, 8, 8)
    t, c = torch.tensor([19, 999]), {"prompt": torch.randn(2, 16, 32)}
    torch.manual_seed(1)
    first, second = (sd15.predict(student, z, t, c) for _ in range(2))
    torch.manual_seed(2)
    assert torch.equal(first, second)
    assert not torch.allclose(first, sd15.predict(student, z, t, c))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_follows_its_flag_in_convolutions_too(sd15, train, monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    monkeypatch.setattr(sd15, "set_up", lambda args: (_ for _ in ()).throw(SystemExit("here")))
    with pytest.raises(SystemExit, match="here"):
        train(allow_tf32=allowed)
    assert torch.backends.cudnn.allow_tf32 == allowed
    torch.set_float32_matmul_precision("highest")


def test_a_signal_is_answered_at_once(sd15, capfd):
    stop = sd15.Stop.__new__(sd15.Stop)
    stop.number, stop.since = 0, 0.0
    stop.note(signal.SIGINT, None)
    stop.note(signal.SIGINT, None)  # the launcher's, a moment later
    assert capfd.readouterr().err.count("saving") == 1


def test_validation_images_say_how_they_were_made(train):
    out = train(**SHORT, validation_prompts=["rain", "the moon"])
    text = Image.open(out / "validation/step-000002.png").text["parameters"]
    assert text.startswith("rain\nthe moon\nSteps: 4, Sampler: LCM, CFG scale: 1, Seed: 5")
    assert "step 2" in text


def test_not_a_number_is_null_in_the_log(sd15, tmp_path):
    """Strict readers of JSON know no NaN."""
    file = (tmp_path / "log.jsonl").open("w+")
    quiet = SimpleNamespace(set_postfix_str=lambda *_: None, update=lambda: None)
    accelerator = SimpleNamespace(device=torch.device("cpu"), log=lambda *_, **__: None)
    run = SimpleNamespace(accelerator=accelerator, step=1, global_batch=2)
    log = sd15.Log.__new__(sd15.Log)
    vars(log).update(run=run, bad=0, skipped=0, overflows=0, memory=0.0, file=file, bar=quiet)
    vars(log).update(clock=0.0, clock_step=0, waited=0.0)
    log.add({"loss": 1.0, "grad_norm": math.inf, "lr": 1.0}, True, True, ["a"])
    file.seek(0)
    assert json.loads(file.read())["grad_norm"] is None


# ---------------------------------------------------------------------------------- what is broken


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 3000, '{"a": 1}', '{"a": [1]}', ""])
def test_a_manifest_may_be_any_text(sd15, copy, text):
    (copy / "checkpoint-2/manifest.json").write_text(text)
    assert sd15.damage(copy / "checkpoint-2")


def test_folders_that_only_look_like_checkpoints(sd15, copy):
    for name in (
        "checkpoint-²",
        "checkpoint-٣",
        "checkpoint-",
        "checkpoint-2.part",
        "checkpoint--1",
    ):
        (copy / name).mkdir()
    assert [folder.name for folder in sd15.checkpoints(copy)] == ["checkpoint-2"]


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir", "lora_path", "logging_dir"])
def test_an_empty_value_is_a_variable_that_is_not_set(refusal, flag):
    assert f"--{flag} is empty" in refusal({flag: ""})


def test_an_empty_path_of_another_program():
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        load_script("help_formatter").given_path("")


@pytest.mark.parametrize("alpha", ["1e300", "inf", "nan", "0", "-4"])
def test_an_alpha_out_of_range(refusal, alpha):
    assert "--lora_alpha" in refusal({"lora_alpha": alpha})


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 TiB"), RuntimeError("alloc: can't allocate memory")]
)
def test_out_of_memory_on_a_cpu_names_flags(sd15, train, monkeypatch, error):
    def set_up(args):
        raise error

    monkeypatch.setattr(sd15, "set_up", set_up)
    assert "--train_batch_size" in refused(train)


def test_another_error_is_not_hidden(sd15, train, monkeypatch):
    def set_up(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sd15, "set_up", set_up)
    with pytest.raises(RuntimeError, match="a bug"):
        train()
