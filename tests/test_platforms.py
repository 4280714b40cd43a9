"""The programs without what only POSIX has: its modules, its signals, names for open files.

This is not Windows, but what the programs would miss there first is taken away. A prelude does it
in a process of its own; the libraries, which know their platforms, are loaded before.
"""

import re
import sys

import pytest
from conftest import LORA, QUICK, ROOT, command_line, log, run

PRELUDE = """
import builtins, os, runpy, signal, sys
from pathlib import Path

program, sys.argv = Path(sys.argv[1]), sys.argv[1:]
if "--help" not in sys.argv:
    import accelerate, bitsandbytes, datasets, diffusers, filelock, peft, psutil, transformers
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

real_import = builtins.__import__

def import_(name, globals=None, *more, **named):
    ours = Path((globals or {}).get("__file__") or "/").parent == program.parent
    if ours and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real_import(name, globals, *more, **named)

builtins.__import__ = import_
names = "ABRT BREAK FPE ILL INT SEGV TERM".split()
for name in [name for name in vars(signal) if name.startswith("SIG") and "_" not in name]:
    if name[3:] not in names:
        delattr(signal, name)
for name in "alarm pause setitimer getitimer sigwait pthread_sigmask siginterrupt".split():
    delattr(signal, name)
for name in "O_DIRECTORY fork killpg setsid getpgid getuid uname".split():
    delattr(os, name)

def is_open(path):
    folder, files = "/proc/self/fd", []
    for number in os.listdir(folder):
        if os.path.islink(f"{folder}/{number}"):
            files.append(os.readlink(f"{folder}/{number}"))
    path = os.path.realpath(path)
    return any(file == path or file.startswith(f"{path}/") for file in files)

def is_mapped(path):
    return f" {os.path.realpath(path)}\\n" in Path("/proc/self/maps").read_text()

def checked(rename):
    def to(source, target):
        if is_open(source) or is_open(target) or is_mapped(target):
            raise PermissionError(13, "It is used by a process", source)
        rename(source, target)
    return to

os.rename, os.replace = checked(os.rename), checked(os.replace)
"""
TRAINERS = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py")


def elsewhere(program, *words, name="__main__"):
    """A program under the prelude, to its end; under another name it is only imported."""
    code = f"{PRELUDE}\nrunpy.run_path(str(program), run_name={name!r})"
    return run(sys.executable, "-c", code, program, *words)


@pytest.mark.parametrize("program", [*TRAINERS, "infer.py"])
def test_help(program):
    done = elsewhere(ROOT / program, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("program", TRAINERS)
def test_training(request, program, images, tmp_path):
    """It is stopped by --max_train_hours, says how to resume, and is resumed to its end."""
    teacher = request.getfixturevalue("xl_teacher" if "sdxl" in program else "teacher")
    flags = QUICK | {
        "pretrained_teacher_model": teacher,
        "train_data_dir": images,
        "output_dir": tmp_path / "out",
        "max_train_steps": 2,
        "validation_prompts": ["rain"],
        "resume_from_checkpoint": "latest",
    }
    done = elsewhere(ROOT / program, *command_line(flags | {"max_train_hours": 1e-6}))
    assert done.returncode == 142, done.stderr
    assert re.search("stopped by --max_train_hours after step 1; resume with: .*", done.stdout)
    assert not (tmp_path / "out" / LORA).exists()
    done = elsewhere(ROOT / program, *command_line(flags))
    assert done.returncode == 0, done.stderr
    assert len(log(tmp_path / "out")) == 2 and (tmp_path / "out" / LORA).is_file()
    assert (tmp_path / "out" / "validation" / "step-000002.png").is_file()


def test_import_of_infer():
    """As another program does it; that of the trainers is part of their training."""
    done = elsewhere(ROOT / "infer.py", name="infer")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", [
    "import fcntl", "import resource", "from pwd import getpwuid",
    "import signal; signal.SIGALRM", "import signal; signal.signal(signal.SIGUSR1, print)",
    "import signal; signal.setitimer(signal.ITIMER_REAL, 1)", "import os; os.O_DIRECTORY",
    "open('a', 'w').write('a'); b = open('a'); os.replace('a', 'b')",
    "import mmap; open('a', 'w').write('a'); open('b', 'w'); a = open('a'); "
    "b = mmap.mmap(a.fileno(), 0, access=1); a.close(); os.rename('b', 'a')",
])  # fmt: skip
def test_the_prelude_takes_them_away(tmp_path, fault):
    """A program that uses them as if they were everywhere fails under it, and here does not."""
    (tmp_path / "program.py").write_text(f"import os; os.chdir({str(tmp_path)!r})\n{fault}\n")
    assert run(sys.executable, tmp_path / "program.py").returncode == 0
    done = elsewhere(tmp_path / "program.py", "--help")
    assert done.returncode == 1
    assert re.search("(ModuleNotFound|Attribute|Permission)Error", done.stderr), done.stderr


@pytest.mark.parametrize("program", ["train_lcm_lora_sd15.py", "infer.py"])
def test_the_libraries_say_nothing(program):
    """The first line of a run is the program's: bitsandbytes asks for kernels on some CPUs."""
    done = run(sys.executable, "-c", f"import {program.removesuffix('.py')}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
