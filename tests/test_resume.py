"""A run that cannot be lost: resume, damage, signals, wrong numbers, secrets, many processes.

Trainers that get signals are children forked from this process, which has all libraries loaded;
launchers are real ones.
"""

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import chaos
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    GPUS,
    LORA,
    QUICK,
    ROOT,
    SMOOTH,
    command_line,
    devices,
    difference,
    log,
    near,
    same,
    series,
)
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

RUN = {
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "lr_scheduler": "cosine",
    "lora_target_modules": "to_q to_out.0",  # few, so that saves are quick
}
COLUMNS = ("step", "loss", "grad_norm", "lr", "skipped")
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
STATE, MANIFEST, WEIGHTS = "training_state.pt", "manifest.json", "unet/adapter_model.safetensors"


def on_steps(trainer, steps, act):
    """Give the losses of these steps (calls, from 1) to `act` and take what it makes of them."""
    real, calls = trainer.distillation_loss, itertools.count(1)

    def wrapped(*args):
        loss = real(*args)
        return act(loss) if next(calls) in steps else loss

    return wrapped


def send(number, *pause):
    """What sends this process a signal, once or with these pauses between, and leaves the loss."""

    def act(loss):
        os.kill(os.getpid(), number)
        for seconds in pause:
            time.sleep(seconds)
            os.kill(os.getpid(), number)
        return loss

    return act


def nan(loss):
    """The loss as NaN."""
    return loss * torch.nan


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Program(multiprocessing.get_context("fork").Process):
    """A trainer as a process in a session of its own, its text in a file.

    `before` may change its module.
    """

    def __init__(self, trainer, words, text, before, environment):
        super().__init__()
        self.trainer, self.words, self.file = trainer, words, text
        self.before, self.environment = before, environment

    def run(self):
        os.setsid()
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        sys.argv = [self.trainer.__file__, *self.words]
        os.environ |= self.environment
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)
        self.before(self.trainer)
        self.trainer.main()

    def end(self):
        """(exit code, text), once it has ended."""
        self.join(120)
        assert self.exitcode is not None, self.file.read_text()
        return self.exitcode, self.file.read_text()


@pytest.fixture
def start(sd15, teacher, images):
    """start(out, before=change, processes=1, flag=value, ...) -> [Program].

    before(trainer) or, of many processes, before(trainer, rank).
    """
    if GPUS:
        pytest.skip("for a CPU alone: CUDA does not work in a fork of a process that has used it")
    started = []

    def start(out, before=lambda *_: None, processes=1, environment=None, words=(), **flags):
        data = {"pretrained_teacher_model": teacher, "train_data_dir": images, "output_dir": out}
        words = [*command_line(data | QUICK | RUN | flags), *words]
        port, programs = str(free_port()), []
        for rank in range(processes):
            variables, text = dict(environment or {}), Path(f"{out}{rank or ''}.txt")
            if processes > 1:
                places = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                }
                variables |= {k: str(v) for k, v in places.items()}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            change = before if processes == 1 else lambda trainer, rank=rank: before(trainer, rank)
            started.append(Program(sd15, words, text, change, variables))
            programs.append(started[-1])
            programs[-1].start()
        return programs

    yield start
    for program in started:
        if program.is_alive():
            program.kill()
            program.join()


def patched(steps, act):
    """A change of a trainer: `act` on the losses of these steps."""

    def before(trainer):
        trainer.distillation_loss = on_steps(trainer, steps, act)

    return before


def refused(train, **flags):
    """The one line with which a run ends; nothing of the run is alive afterwards."""
    with pytest.raises(SystemExit) as end:
        train(**flags)
    message, code = str(end.value), end.value.code
    del end
    gc.collect()
    assert isinstance(code, str) and "error: " in message and "\n" not in message, message
    return message


def contents(folder):
    """{file: its bytes}."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(train):
    """An undisturbed run of RUN."""
    return train(**RUN)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of `whole` to be damaged, without the final LoRA."""
    out = shutil.copytree(whole, tmp_path / "copy")
    (out / LORA).unlink()
    return out


@pytest.fixture
def finish(train, whole):
    """finish(out): resume it to its end, which is that of `whole`."""

    def finish(out):
        train(**RUN, output_dir=out, resume_from_checkpoint="latest")
        assert same(out, whole) and series(out, *COLUMNS) == series(whole, *COLUMNS)
        assert not [*out.glob("*.part"), *out.glob("*.old")]

    return finish


# ------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("trainer", ["train", "train_xl"])
@pytest.mark.parametrize("flags", [
    {"streaming": True, "shuffle_buffer_size": 5, "gradient_accumulation_steps": 2},
    {"streaming": True, "shuffle_buffer_size": 5, "dataloader_num_workers": 1, "random_flip": True},
    {"max_train_samples": 10, "gradient_accumulation_steps": 2, "ema_decay": 0.9,
     "lr_warmup_steps": 4},
], ids=["streamed", "streamed by a reader", "average and warm-up"])  # fmt: skip
def test_resumed_is_uninterrupted(request, trainer, flags):
    """Inside an epoch and over its end, to the bit: log, LoRA, and state for the next resume."""
    train = request.getfixturevalue(trainer)
    flags = RUN | {"checkpointing_steps": 3} | flags
    one = train(**flags)
    two = train(**flags, resume_from_checkpoint=one / "checkpoint-3")
    assert same(one, two) and series(two, *COLUMNS) == series(one, *COLUMNS)[3:]
    states = [torch.load(out / "checkpoint-6" / STATE, weights_only=True) for out in (one, two)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[0]["step"] == 6 and bool(states[0]["ema"]) == ("ema_decay" in flags)


def test_the_log_counts_on(sd15, train, monkeypatch):
    """Skipped steps before the checkpoint are in the log of the resumed run."""
    real = sd15.distillation_loss
    monkeypatch.setattr(sd15, "distillation_loss", on_steps(sd15, {2}, nan))
    one = train(**RUN)
    monkeypatch.setattr(sd15, "distillation_loss", real)
    shutil.rmtree(one / "checkpoint-6")
    train(**RUN, output_dir=one, resume_from_checkpoint="latest")
    assert [skipped for (skipped,) in series(one, "skipped")] == [0, 1, 1, 1, 1, 1]


# -------------------------------------------------------------------------------- checkpoint faults


def spoil(folder, fault):
    """Damage a checkpoint."""
    data = (folder / WEIGHTS).read_bytes()
    if fault == "truncated":
        (folder / WEIGHTS).write_bytes(data[:-100])
    elif fault == "one bit":
        (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "no state":
        (folder / STATE).unlink()
    elif fault == "no manifest":
        (folder / MANIFEST).unlink()
    elif fault == "half a manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])
    elif fault == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


FAULTS = {
    "truncated": f"{WEIGHTS} is not what was saved", "one bit": f"{WEIGHTS} is not what was saved",
    "no state": f"FileNotFoundError.*{STATE}", "no manifest": f"FileNotFoundError.*{MANIFEST}",
    "half a manifest": "JSONDecodeError", "empty": f"FileNotFoundError.*{MANIFEST}",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_named(copy, finish, capsys, fault):
    """The one before is used; what a kill left of another save goes with the next."""
    spoil(copy / "checkpoint-6", fault)
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-5.part")
    finish(copy)
    texts = capsys.readouterr()
    assert re.search(rf"warning: {copy}/checkpoint-6: .*{FAULTS[fault]}", texts.err)
    assert f"steps: 4 to 6, resumed from {copy}/checkpoint-4" in texts.out


def test_a_damaged_checkpoint_named_by_the_user(train, copy):
    """Is refused, though others are whole; nothing is changed."""
    spoil(copy / "checkpoint-4", "one bit")
    before, damaged = contents(copy), copy / "checkpoint-4"
    message = refused(train, **RUN, output_dir=copy, resume_from_checkpoint=damaged)
    assert (
        f"--resume_from_checkpoint {damaged}: no whole checkpoint" in message
        and contents(copy) == before
    )


def test_all_are_damaged(train, copy, capsys):
    for step, fault in ((2, "empty"), (4, "truncated"), (6, "no manifest")):
        spoil(copy / f"checkpoint-{step}", fault)
    before = contents(copy)
    assert "--resume_from_checkpoint latest: no whole checkpoint" in refused(
        train, **RUN, output_dir=copy, resume_from_checkpoint="latest"
    )
    assert capsys.readouterr().err.count("warning: ") == 3 and contents(copy) == before


def test_a_run_that_is_there_is_not_trained_over(train, copy):
    """The same command without --resume_from_checkpoint is refused, with the flag that goes on."""
    before = contents(copy)
    assert "checkpoint-6; resume with --resume_from_checkpoint latest" in refused(
        train, **RUN, output_dir=copy
    )
    assert contents(copy) == before


def test_an_unwritable_folder(train, tmp_path):
    """A file in its place; for who is not root, no permission."""
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    for folder in ["file"] + ["locked"] * (os.getuid() != 0):
        message = refused(train, output_dir=tmp_path / folder / "out")
        assert re.search(
            rf"--output_dir {tmp_path}/{folder}/out .*(NotADirectory|Permission)Error", message
        )


@pytest.mark.parametrize("full", ["weights", "state"])
def test_a_full_disk_while_a_checkpoint_is_saved(sd15, start, whole, copy, finish, full):
    """Of files that may not grow beyond a limit. One line; the last good one is whole and named."""
    for step in (4, 6):
        shutil.rmtree(copy / f"checkpoint-{step}")
    sizes = {"weights": (copy / "checkpoint-2" / LORA).stat().st_size, "state": 0}
    limit = (
        sizes["weights"] // 2
        if full == "weights"
        else (copy / "checkpoint-2" / STATE).stat().st_size // 2
    )
    assert full == "weights" or limit > sizes["weights"]

    def before(trainer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, text = start(copy, before, resume_from_checkpoint="latest")[0].end()
    line = (
        f"error: {copy}/checkpoint-4: it cannot be saved .*last good checkpoint: {copy}/checkp.*2\n"
    )
    assert code == 1 and re.search(line, text) and "Traceback" not in text, text
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not sd15.damage(copy / "checkpoint-2")
    finish(copy)


def test_a_full_disk_at_the_end(start, copy, finish):
    """The LoRA itself: one line; the last checkpoint goes on."""
    limit = (copy / "checkpoint-2" / LORA).stat().st_size // 2

    def before(trainer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, text = start(copy, before, resume_from_checkpoint="latest")[0].end()
    assert code == 1 and re.search(f"error: --output_dir {copy}: the LoRA cannot be saved", text), (
        text
    )
    assert "Traceback" not in text
    finish(copy)


@pytest.mark.parametrize("steps", [
    {("rename", 2): "before"}, {("rename", 2): "after"}, {("rmtree", 1): "half"},
    {("flush_to_disk", 10): "before"},
], ids=str)  # fmt: skip
def test_one_checkpoint_is_always_whole(sd15, start, train, tmp_path, steps):
    """With --checkpoints_total_limit 1 and a kill around each rename and deletion."""
    ((name, number), moment), out = *steps.items(), tmp_path / "out"
    flags = RUN | {"checkpointing_steps": 1, "checkpoints_total_limit": 1}

    def before(trainer):
        module = {"rename": Path, "rmtree": shutil, "flush_to_disk": trainer}[name]
        real, calls = getattr(module, name), itertools.count(1)

        def killed(path, *args, **kwargs):
            if not Path(path).exists() or next(calls) != number:
                return real(path, *args, **kwargs)
            if moment == "after":
                real(path, *args, **kwargs)
            elif moment == "half":
                (Path(path) / STATE).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, killed)

    assert start(out, before, **flags)[0].end()[0] == -signal.SIGKILL
    assert [path for path in sd15.checkpoints(out) if not sd15.damage(path)]
    train(**flags, output_dir=out, resume_from_checkpoint="latest")
    assert same(out, train(**flags)) and [path.name for path in out.glob("checkpoint-*")] == [
        "checkpoint-6"
    ]


@pytest.mark.parametrize("after", ["checkpoint-4.old", "checkpoint-4"])
def test_a_checkpoint_is_replaced(start, copy, finish, after):
    """From an earlier one: killed after either of the two renames, then again with what is left."""

    def before(trainer):
        real = Path.rename

        def rename(path, target):
            real(path, target)
            if target.name == after:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = rename

    assert (
        start(copy, before, resume_from_checkpoint=copy / "checkpoint-2")[0].end()[0]
        == -signal.SIGKILL
    )
    left = {"checkpoint-4.old", "checkpoint-4.part" if after.endswith("old") else "checkpoint-4"}
    assert {path.name for path in copy.glob("checkpoint-4*")} == left
    assert start(copy, resume_from_checkpoint=copy / "checkpoint-2")[0].end()[0] == 0
    finish(copy)


def test_the_limit_keeps_the_checkpoint_just_saved(sd15, start, copy, finish):
    """Though a damaged later one bears a higher number."""
    spoil(copy / "checkpoint-6", "truncated")
    shutil.rmtree(copy / "checkpoint-4")
    before = patched({1}, send(signal.SIGTERM))
    code, _ = start(copy, before, resume_from_checkpoint="latest", checkpoints_total_limit=1)[
        0
    ].end()
    assert code == 128 + signal.SIGTERM
    assert [path.name for path in sd15.checkpoints(copy)] == ["checkpoint-3"] and not sd15.damage(
        copy / "checkpoint-3"
    )
    finish(copy)


def test_two_runs_in_one_folder(sd15, start, train, whole, tmp_path):
    """The second is refused and changes nothing; after a SIGKILL of the first it is free."""
    out = tmp_path / "out"

    def wait(loss):
        signal.pause()

    (first,) = start(out, patched({2}, wait))
    while not (out / "log.jsonl").exists() or not log(out):
        time.sleep(0.05)
        assert first.is_alive(), first.file.read_text()
    before = contents(out)
    message = refused(train, **RUN, output_dir=out)
    assert f"--output_dir {out} is in use" in message and contents(out) == before
    first.kill()
    first.join()
    train(**RUN, output_dir=out)
    assert same(out, whole)


def test_a_log_of_another_program(train, whole, tmp_path):
    """A new run does not read the log that it replaces."""
    (tmp_path / "log.jsonl").write_text("no json\n")
    train(**RUN, output_dir=tmp_path)
    assert same(tmp_path, whole) and series(tmp_path, *COLUMNS) == series(whole, *COLUMNS)


# ------------------------------------------------------------------------------------------ signals


def stopped(sd15, program, out, step, number, name=None):
    """Check the end of a program that a signal stopped; the command that it says goes on."""
    code, text = program.end()
    assert code == 128 + number, text
    assert sd15.checkpoints(out)[-1].name == f"checkpoint-{step}" and not sd15.damage(
        out / f"checkpoint-{step}"
    )
    assert not (out / LORA).exists()
    said = rf"stopped by {name or number.name} after step {step}; resume with: (.*)"
    said = re.search(said, text)
    assert "Traceback" not in text and said, text
    return said[1]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_and_stops(sd15, start, train, whole, tmp_path, monkeypatch, number):
    """What was said then goes on, word for word, and ends as the undisturbed run."""
    out = tmp_path / "out"
    command = stopped(sd15, *start(out, patched({3}, send(number))), out, 3, number)
    words = shlex.split(command)
    assert words[:2] == ["python", sd15.__file__]
    AcceleratorState._reset_state(True)
    sd15.main(words[2:])
    assert same(out, whole) and series(out, *COLUMNS) == series(whole, *COLUMNS)


def test_the_command_goes_on_from_the_newest(sd15, start, copy):
    """Where the run was resumed from a folder by name, too."""
    before = patched({1}, send(signal.SIGTERM))
    (program,) = start(
        copy, before, resume_from_checkpoint=copy / "checkpoint-2", output_dir=copy.parent / "new"
    )
    command = stopped(sd15, program, copy.parent / "new", 3, signal.SIGTERM)
    words = shlex.split(command)
    assert sd15.parse_args(words[2:]).resume_from_checkpoint == "latest"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_group(sd15, start, train, tmp_path, number):
    """With the readers in it: they go on reading to the end of the step, and none is left."""
    out, flags = tmp_path / "out", RUN | {"dataloader_num_workers": 2}

    def to_all(loss):  # from outside: a reader ends at once where its own trainer tells it to
        command = ["kill", f"-{number}", "--", f"-{os.getpid()}"]
        subprocess.run(command, start_new_session=True, check=True)
        time.sleep(0.5)
        return loss

    (program,) = start(out, patched({3}, to_all), **flags)
    stopped(sd15, program, out, 3, number)
    with pytest.raises(ProcessLookupError):
        os.killpg(program.pid, 0)
    train(**flags, output_dir=out, resume_from_checkpoint="latest")
    assert same(out, train(**flags))


def test_an_error_ends_the_readers_too(start, tmp_path):
    """A traceback, exit code 1, and no reader left though they ignore signals."""

    def fault(loss):
        raise RuntimeError("planted")

    (program,) = start(tmp_path / "out", patched({2}, fault), dataloader_num_workers=2)
    code, text = program.end()
    assert code == 1 and "RuntimeError: planted" in text and "killed by signal" not in text, text
    with pytest.raises(ProcessLookupError):
        os.killpg(program.pid, 0)


def test_a_signal_twice(sd15, start, tmp_path):
    """Within a second it is one signal, as from a launcher; later it ends the process at once."""
    out = tmp_path / "out"
    stopped(sd15, *start(out, patched({3}, send(signal.SIGTERM, 0.1))), out, 3, signal.SIGTERM)
    before = patched({2}, send(signal.SIGTERM, 1.2))
    code, text = start(out, before, resume_from_checkpoint="latest")[0].end()
    assert code == 128 + signal.SIGTERM and "stopped by" not in text
    assert sd15.checkpoints(out)[-1].name == "checkpoint-4" and not [*out.glob("*.part")]


def test_max_train_hours(sd15, start, finish, tmp_path):
    """A time that is over at the first step; the LoRA's header does not speak of it."""
    out = tmp_path / "out"
    (program,) = start(out, max_train_hours=1e-8)
    stopped(sd15, program, out, 1, 142 - 128, "--max_train_hours")
    finish(out)


def test_the_end_of_the_time_is_no_second_signal(sd15, monkeypatch):
    """--max_train_hours that are over after a signal do not end the process before it has saved."""
    ended, stop = [], sd15.Stop.__new__(sd15.Stop)
    monkeypatch.setattr(os, "_exit", ended.append)
    stop.number, stop.since = signal.SIGTERM, time.monotonic() - 5
    stop.group, stop.end = None, 0.0
    assert stop.asked() == signal.SIGTERM and not ended
    stop.note(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/usr/bin/python3 /usr/bin/accelerate launch train.py", True),
        ("python -m accelerate.commands.launch train.py", True),
        ("python /usr/bin/torchrun train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("/bin/bash", False),
        ("nohup python train_lcm_lora_sd15.py", False),
        ("python -m pytest", False),
    ],
)
def test_a_launcher_is_told_from_a_shell(sd15, monkeypatch, command, is_one):
    """By its command: a shell may have a launcher's variables, set by the user."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    parent = SimpleNamespace(cmdline=command.split)
    monkeypatch.setattr(sd15.psutil, "Process", lambda number: parent)
    assert sd15.find_launcher() == (os.getppid() if is_one else None)


def test_a_parent_that_is_not_seen(sd15, monkeypatch):
    """Such as that of a container's first process."""
    monkeypatch.setattr(os, "getppid", lambda: 2**22 - 1)
    assert sd15.find_launcher() is None


@pytest.mark.parametrize("launched", [True, False])
def test_the_launcher_is_gone(sd15, start, finish, tmp_path, launched):
    """Then a trainer stops as by SIGHUP; one that a shell started outlives the shell."""
    out = tmp_path / "out"

    def before(trainer):
        trainer.LAUNCHER = os.getpid() if launched else None
        if os.fork():
            os._exit(0)

    (program,) = start(out, before)
    program.end()
    text, deadline = program.file, time.monotonic() + 60
    words = "stopped by SIGHUP after step 1;" if launched else "layers read back equal"
    while words not in text.read_text() or psutil.pid_exists(program.pid):
        assert time.monotonic() < deadline, text.read_text()
        time.sleep(0.05)
    while any(str(out) in word for p in psutil.process_iter() for word in open_files(p)):
        time.sleep(0.05)
    assert (out / LORA).exists() != launched
    finish(out)


def open_files(process):
    """The files that a process has open, where that can be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        return [file.path for file in process.open_files()]
    return []


def test_under_nohup_a_hang_up_is_nothing(sd15, start, whole, tmp_path):
    """Else it stops the run; the tests themselves may be under nohup."""

    def under(handler):
        def before(trainer):
            signal.signal(signal.SIGHUP, handler)
            patched({2}, send(signal.SIGHUP))(trainer)

        return before

    assert start(tmp_path / "out", under(signal.SIG_IGN))[0].end()[0] == 0
    assert same(tmp_path / "out", whole)
    (program,) = start(tmp_path / "other", under(signal.SIG_DFL))
    stopped(sd15, program, tmp_path / "other", 2, signal.SIGHUP)


@pytest.fixture(scope="module")
def launched(teacher, images, tmp_path_factory):
    """launched(out, processes, flag=value, ...) -> (launcher, trainers, text), in training."""
    launchers = []

    def launched(out, processes, **flags):
        kind, environment = devices(processes)
        machine = [
            "--num_machines",
            1,
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            0,
        ]
        data = {"pretrained_teacher_model": teacher, "train_data_dir": images, "output_dir": out}
        words = [
            *machine,
            *kind,
            ROOT / "train_lcm_lora_sd15.py",
            *command_line(data | QUICK | flags),
        ]
        command, text = (
            [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)],
            out.with_suffix(".txt"),
        )
        with text.open("ab") as file:
            env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            options = {"stdout": file, "stderr": file, "env": env}
            launchers.append(subprocess.Popen(command, start_new_session=True, **options))
        launcher = psutil.Process(launchers[-1].pid)
        while not (out / "log.jsonl").exists() or not log(out):
            time.sleep(0.05)
            assert launchers[-1].poll() is None, text.read_text()
        return launchers[-1], launcher.children(recursive=True), text

    yield launched
    for launcher in launchers:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [
                *psutil.Process(launcher.pid).children(recursive=True),
                psutil.Process(launcher.pid),
            ]:
                process.kill()
        launcher.wait()


LONG = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}
slow = pytest.mark.slow


@pytest.mark.parametrize("processes,to,number", [
    pytest.param(1, "launcher", signal.SIGKILL),
    pytest.param(2, "launcher", signal.SIGTERM),
    pytest.param(1, "launcher", signal.SIGTERM, marks=slow),
    pytest.param(1, "launcher", signal.SIGINT, marks=slow),
    pytest.param(1, "group", signal.SIGTERM, marks=slow),
    pytest.param(1, "group", signal.SIGUSR1, marks=slow),
    pytest.param(2, "launcher", signal.SIGKILL, marks=slow),
    pytest.param(2, "launcher", signal.SIGUSR1, marks=slow),
    pytest.param(2, "group", signal.SIGINT, marks=slow),
])  # fmt: skip
def test_a_signal_to_accelerate_launch(sd15, train, launched, tmp_path, processes, to, number):
    """The trainers save a whole checkpoint of the log's last step and end; it goes on there."""
    out = tmp_path / "out"
    launcher, trainers, text = launched(out, processes, **LONG)
    (os.kill if to == "launcher" else os.killpg)(launcher.pid, number)
    gone, alive = psutil.wait_procs(trainers, 60)
    launcher.wait(60)
    assert not alive and len(gone) >= processes, text.read_text()
    (folder,), step = sd15.checkpoints(out), log(out)[-1]["step"]
    passed_on = processes == 2 and number in (signal.SIGTERM, signal.SIGINT) or to == "group"
    name = number.name if passed_on else "SIGHUP"
    assert (
        f"stopped by {name} after step {step}; resume with: accelerate launch --num_machines 1 "
        in text.read_text()
    )
    assert folder.name == f"checkpoint-{step}" and not sd15.damage(folder) and launcher.returncode
    if processes == 1:
        flags = LONG | {"max_train_steps": step + 2}
        train(**flags, output_dir=out, resume_from_checkpoint="latest")
        assert same(out, train(**flags)) and len(log(out)) == step + 2


def test_two_processes_stop_as_one(sd15, start, tmp_path):
    """A signal to one of them: both end at that step with its code, and go on to the same end."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert [program.end()[0] for program in start(one, processes=2)] == [0, 0]

    def before(trainer, rank):
        if rank == 1:
            patched({3}, send(signal.SIGUSR1))(trainer)

    main, other = start(two, before, processes=2)
    stopped(sd15, main, two, 3, signal.SIGUSR1)
    assert other.end()[0] == 128 + signal.SIGUSR1
    ends = [program.end() for program in start(two, processes=2, resume_from_checkpoint="latest")]
    assert [code for code, _ in ends] == [0, 0], ends
    assert same(one, two) and series(one, *COLUMNS) == series(two, *COLUMNS)


# ------------------------------------------------------------------------------------------ numbers


def nan_gradient(loss):
    """A loss that is finite, with a gradient that is not."""
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize("spoil", [nan, nan_gradient])
def test_a_step_that_is_not_finite_is_skipped(sd15, train, monkeypatch, capsys, spoil):
    """Weights, moments, average and rate are as before; it is counted and its records named."""
    monkeypatch.setattr(sd15, "distillation_loss", on_steps(sd15, {3}, spoil))
    out = train(**RUN | {"checkpointing_steps": 1}, ema_decay=0.5)
    states = [
        torch.load(out / f"checkpoint-{step}" / STATE, weights_only=True) for step in (2, 3, 4)
    ]
    for state in states:
        state.pop("step")
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert (
        difference(out / "checkpoint-2", out / "checkpoint-3")
        == 0
        < difference(out / "checkpoint-3", out)
    )
    rows = log(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1] and {
        row["overflows"] for row in rows
    } == {0}
    assert rows[2]["lr"] == rows[3]["lr"] > rows[4]["lr"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert re.search(
        r"warning: step 3 is skipped: loss \S+, gradient norm nan, with .*\d\d.png, .*\d\d.png",
        line,
    )


def test_ten_in_a_row_end_the_run(sd15, train, monkeypatch, tmp_path):
    """With the step, the records and advice; nothing is written as the LoRA."""
    monkeypatch.setattr(sd15, "distillation_loss", on_steps(sd15, range(2, 12), nan))
    message = refused(train, **RUN | {"max_train_steps": 20}, output_dir=tmp_path / "out")
    assert re.search(
        r"10 steps in a row were not finite, .*step 11 .*.*\d\d.png.*--learning_rate", message
    )
    assert not (tmp_path / "out" / LORA).exists()


def test_nine_in_a_row_do_not(sd15, train, monkeypatch):
    """Nor ten with a good one between."""
    bad = {*range(2, 11), 12}
    monkeypatch.setattr(sd15, "distillation_loss", on_steps(sd15, bad, nan))
    out = train(**RUN | {"max_train_steps": 14})
    assert log(out)[-1]["skipped"] == 10 and all(
        w.isfinite().all() for w in load_file(out / LORA).values()
    )


def test_nan_in_the_weights_of_a_checkpoint(sd15, train, copy):
    """Whole by its manifest, but not to be trained on."""
    path, manifest = copy / "checkpoint-6" / WEIGHTS, copy / "checkpoint-6" / MANIFEST
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)
    about = json.loads(manifest.read_text()) | {
        WEIGHTS: [path.stat().st_size, sd15.file_digest(path)]
    }
    manifest.write_text(json.dumps(about))
    message = refused(train, **RUN, output_dir=copy, resume_from_checkpoint="latest")
    assert re.search(f"--resume_from_checkpoint {path}: .*NaN or infinite", message)


def test_ranks_agree_on_what_is_not_finite(start, tmp_path):
    """NaN on one of two: both skip the step and have the same weights at the end."""
    out = tmp_path / "out"

    def before(trainer, rank):
        real = trainer.optimizer_step

        def step(run, *rest):
            row, finite, overflow = real(run, *rest)
            torch.save([finite, *(w.detach() for w in run.trained)], tmp_path / f"weights-{rank}")
            return row, finite, overflow

        trainer.optimizer_step = step
        if rank == 1:
            patched({3}, nan)(trainer)

    ends = [program.end() for program in start(out, before, processes=2)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert [row["skipped"] for row in log(out)] == [0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(
        *(torch.load(tmp_path / f"weights-{rank}") for rank in (0, 1)), rtol=0, atol=0
    )


def test_out_of_memory_names_flags(sd15, train, monkeypatch):
    def fault(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(sd15, "distillation_loss", on_steps(sd15, {2}, fault))
    message = refused(train, **RUN)
    flags = re.search(r"out of memory \(OutOfMemoryError: CUDA .* 2 GiB.\): (.*)", message)[1]
    batch, *named = re.findall(r"(--\w+(?: (?:nf4|1))?)", flags)
    needed = ["--pretrained_teacher_model", "x", "--train_data_dir", "y", batch, "1"]
    args = sd15.parse_args([*needed, *" ".join(named).split()])
    assert args.gradient_checkpointing and args.optimizer == "adamw8bit"
    assert args.quantize_base == "nf4" and args.vae_encode_batch_size == 1
    (program,) = re.findall(r"\S+\.py\b", flags)
    assert (ROOT / program.strip("()")).is_file()


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_of_fp16_goes_on_after_a_loss_that_is_not_finite(sd15, fused):
    """Its next gradient is unscaled and taken; an overflow moves no schedule, and is counted.

    A fused optimizer is always called, and skips within.
    """
    weight = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    adam = torch.optim.AdamW([weight], 0.5, betas=(0.0, 0.0), weight_decay=0.0, fused=fused)

    def clip(parameters, norm):
        scaler.unscale_(adam)
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def step():
        scaler.step(adam), scaler.update()

    optimizer = SimpleNamespace(step=step, zero_grad=adam.zero_grad, param_groups=adam.param_groups)
    accelerator = SimpleNamespace(
        scaler=scaler, clip_grad_norm_=clip, reduce=lambda value, _: value
    )
    rates = []
    schedule = SimpleNamespace(step=lambda: rates.append(weight.tolist()))
    run = SimpleNamespace(accelerator=accelerator, optimizer=optimizer, lr_scheduler=schedule)
    run.trained, run.ema, found = [weight], None, []
    for factor in (torch.nan, 1.0, torch.inf, 1.0):
        loss = weight.sum() * (1 if factor == torch.inf else factor)
        scaler.scale(loss).backward()
        weight.grad *= factor
        args = SimpleNamespace(max_grad_norm=9.0)
        found.append(sd15.optimizer_step(run, [loss.detach()], args)[1:])
    assert found == [(False, False), (True, False), (True, True), (True, False)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[0.5, 0.5], [0, 0]]))
    assert scaler.get_scale() == 2


# ----------------------------------------------------------------------------------- moving average


def test_the_average_is_written(train):
    """Of the weights after each step: the first, then min(decay, (1 + t) / (10 + t)) of the old."""
    flags = RUN | {"checkpointing_steps": 1, "learning_rate": 1e-2}
    out, plain = train(**flags, ema_decay=0.25), train(**flags)
    live = [load_file(out / f"checkpoint-{step}" / WEIGHTS) for step in range(1, 7)]
    average = dict(live[0])
    for t, weights in enumerate(live[1:], 1):
        decay = min(0.25, (1 + t) / (10 + t))
        average = {key: decay * average[key] + (1 - decay) * weights[key] for key in average}
    written = load_file(out / WEIGHTS)
    torch.testing.assert_close(written, average, rtol=1e-5, atol=1e-7)
    assert max(abs(written[key] - live[-1][key]).max() for key in written) > 1e-4
    torch.testing.assert_close(load_file(plain / WEIGHTS), live[-1], rtol=0, atol=0)
    shutil.rmtree(out / "unet")
    train(
        **flags, ema_decay=0.25, output_dir=out, resume_from_checkpoint="latest"
    )  # where no step is left
    torch.testing.assert_close(load_file(out / WEIGHTS), written, rtol=0, atol=0)


# ------------------------------------------------------------------------------ secrets and pickles

SECRETS = {
    "HF_TOKEN": "hf_PlantedInTheEnvironmentForTest",
    "WANDB_API_KEY": "0123456789planted" + 23 * "0",
}


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_no_secret_is_written(start, tmp_path, ending):
    """Not in the output folder, caches, trackers' files or text, however the run ends."""
    out, cache = tmp_path / "out", tmp_path / "cache"

    def before(trainer):
        os.chdir(tmp_path)
        HfApi.create_repo = lambda self, name, **_: SimpleNamespace(repo_id=f"someone/{name}")
        HfApi.upload_folder = lambda self, **_: None
        act = {
            "finished": lambda loss: loss,
            "stopped": send(signal.SIGTERM),
            "failed": lambda loss: 1 / 0,
        }[ending]
        patched({3}, act)(trainer)

    trackers = "all" if ending == "stopped" else "tensorboard"
    flags = {"push_to_hub": True, "report_to": trackers, "cache_dir": cache}
    code, text = start(out, before, environment=SECRETS, **flags)[0].end()
    assert code == {"finished": 0, "stopped": 128 + signal.SIGTERM, "failed": 1}[ending], text
    files = contents(tmp_path)
    assert len(files) > 8
    assert (ending == "stopped") == ("resume with: " in text and "--push_to_hub" in text)
    for secret in SECRETS.values():
        assert [str(path) for path, data in files.items() if secret.encode() in data] == []


class Planted:
    """A pickle that does something when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(sd15, train, copy, tmp_path):
    """A training state that would run code, in a checkpoint whose manifest fits."""
    folder, mark = copy / "checkpoint-6", tmp_path / "it ran"
    torch.save({"step": 6, "optimizer": Planted(mark)}, folder / STATE)
    torch.load(folder / STATE, weights_only=False)
    assert mark.exists()
    mark.unlink()
    about = json.loads((folder / MANIFEST).read_text())
    about[STATE] = [(folder / STATE).stat().st_size, sd15.file_digest(folder / STATE)]
    (folder / MANIFEST).write_text(json.dumps(about))
    for source in ("latest", folder):
        message = refused(train, **RUN, output_dir=copy, resume_from_checkpoint=source)
        assert (
            re.search(f"--resume_from_checkpoint {folder}: .*UnpicklingError", message)
            and not mark.exists()
        )


# ----------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=slow)])
def test_two_processes_are_one_of_twice_the_batch(
    sd15, train, start, monkeypatch, tmp_path, accumulation
):
    """Over 50 steps; and each rank's noise is its half of the one's."""
    flags = (
        RUN
        | SMOOTH
        | {
            "max_train_steps": 50,
            "checkpointing_steps": 100,
            "gradient_accumulation_steps": accumulation,
        }
    )

    def spy(trainer, name):
        real, seen = trainer.sample_batch, []

        def sample_batch(*args):
            batch = real(*args)
            seen.append(batch[2])  # noise
            torch.save(seen[: 2 * accumulation], tmp_path / name)
            return batch

        return sample_batch

    with monkeypatch.context() as patch:
        patch.setattr(sd15, "sample_batch", spy(sd15, "one"))
        one = train(**flags)
    two = tmp_path / "out"

    def before(trainer, rank):
        trainer.sample_batch = spy(trainer, f"rank-{rank}")

    ends = [
        program.end()
        for program in start(two, before, processes=2, **flags | {"train_batch_size": 2})
    ]
    assert [code for code, _ in ends] == [0, 0], ends
    assert near(one, two) and len(log(two)) == 50 and difference(one, two) < 1e-5
    noise = {name: torch.load(tmp_path / name) for name in ("one", "rank-0", "rank-1")}
    for step in range(2):
        part = slice(step * accumulation, (step + 1) * accumulation)
        assert torch.equal(
            torch.cat(noise["one"][part]), torch.cat(noise["rank-0"][part] + noise["rank-1"][part])
        )
    rows = torch.cat(noise["rank-0"] + noise["rank-1"]).flatten(1)
    assert len(rows.unique(dim=0)) == 2 * 2 * 2 * accumulation


@pytest.mark.slow
def test_two_machines(train, teacher, images, tmp_path):
    """Two launchers on the loopback address train, save, and resume to the whole run's end."""
    flags = RUN | SMOOTH | {"train_batch_size": 2}

    def machines(out, **more):
        port, ended = free_port(), []
        for rank in range(2):
            words = [
                "--multi_gpu",
                "--num_machines",
                2,
                "--num_processes",
                2,
                "--machine_rank",
                rank,
                "--dynamo_backend",
                "no",
            ]
            words += [
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                port,
                "--rdzv_backend",
                "static",
            ]
            words += ["--mixed_precision", "no", ROOT / "train_lcm_lora_sd15.py"]
            data = {
                "pretrained_teacher_model": teacher,
                "train_data_dir": images,
                "output_dir": out,
            }
            words += command_line(QUICK | flags | data | more)
            command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            options["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | devices(2)[1]
            ended.append(subprocess.Popen(command, **options))
        texts = [process.communicate(timeout=300)[0] for process in ended]
        assert [process.returncode for process in ended] == [0, 0], texts

    out, whole = tmp_path / "out", tmp_path / "whole"
    machines(whole)
    assert json.loads((whole / "args.json").read_text())["processes"] == 2
    assert near(whole, train(**flags | {"train_batch_size": 4}))
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-6")
    (out / LORA).unlink()
    machines(out, resume_from_checkpoint="latest")
    assert same(out, whole) and series(out, *COLUMNS) == series(whole, *COLUMNS)


# -------------------------------------------------------------------------------------------- chaos


def test_chaos_on_a_small_model(start, monkeypatch, capfd):
    """scripts/proofs/chaos.py with forked trainers: killed three times, equal to the whole run."""

    def forked(out, args):
        words = [
            *chaos.SETTINGS,
            "--validation_prompts",
            "rain",
            "--resume_from_checkpoint",
            "latest",
        ]
        (program,) = start(out, words=words)
        return Forked(program)

    monkeypatch.setattr(chaos, "start", forked)
    pool = contextlib.nullcontext(
        SimpleNamespace(map=map)
    )  # threads would not be good to fork from
    monkeypatch.setattr(chaos, "ThreadPoolExecutor", lambda _: pool)
    assert chaos.main(["--runs", "1", "--kills", "3", "--jobs", "1"]) == 0, capfd.readouterr().out
    text = capfd.readouterr().out
    assert "1 of 1 runs are equal to the undisturbed one, after" in text


class Forked:
    """What scripts/proofs/chaos.py asks of a process it started."""

    def __init__(self, program):
        self.program, self.pid = program, program.pid

    def poll(self):
        return self.program.exitcode

    def wait(self, timeout=None):
        self.program.join(timeout)
        if self.program.exitcode is None:
            raise subprocess.TimeoutExpired("trainer", timeout)
        return self.program.exitcode


def test_chaos_sees_a_difference(train, whole):
    """In the LoRA and in the log, and none between equal runs."""
    assert chaos.differences(whole, train(**RUN)) == []
    found = chaos.differences(whole, train(**RUN | {"seed": 1}))
    assert (
        "metadata" in found
        and "log.jsonl" in found
        and any(key.startswith("lora_unet_") for key in found)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["--processes", "2", "--runs", "1"], ["--streaming", "--runs", "1"]], ids=" ".join
)
def test_chaos(words, capsys):
    """On the demo teacher, with real processes; all of it is `python scripts/proofs/chaos.py`."""
    assert chaos.main(["--runs", "2", "--kills", "4", *words]) == 0, capsys.readouterr().out
