"""What proves the project on a GPU: check_card.py's rows, data with trajectories, gpu.sh's page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import check_card
import pytest
import random_teacher
import random_training
import torch
from conftest import ROOT
from datasets import load_dataset
from diffusers import StableDiffusionXLPipeline


def table(text):
    """{row: (layout, figure, at most, remark)}."""
    lines = [line for line in text.splitlines() if line.startswith("| s")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row: (layout, *rest) for layout, row, *rest in cells}


def test_rows_are_runs_of_the_trainer(capsys):
    flags = ["--family", "sd15", "--steps", "2", "--rows"]
    assert check_card.main([*flags, "adamw8bit", "resume", "base unchanged", "infer.py"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows.keys() == {"adamw8bit", "resume", "base unchanged", "infer.py"}
    assert 0 < float(rows["adamw8bit"][1]) < float(rows["adamw8bit"][2]) == 1e-3
    assert rows["resume"][:3] == ("sd15", "0", "0")
    assert re.fullmatch(r"of \d{3} tensors", rows["base unchanged"][3])


def test_what_is_wrong_shows(capsys, monkeypatch):
    """A figure that is too large, a weight that is another, a run that fails: exit code 1."""
    wrong = {
        "again": (["--huber_c", "0.1"], 1e-5),  # another loss
        "adamw8bit": (["--optimizer", "nonsense"], 1e-3),
    }
    monkeypatch.setattr(check_card, "OPTIONS", wrong)
    take_step = check_card.Training.take_step

    def spoil(training, number):
        take_step(training, number)
        next(training.teacher.parameters()).data.add_(1)

    monkeypatch.setattr(check_card.Training, "take_step", spoil)
    rows = ["--rows", "again", "adamw8bit", "base unchanged"]
    assert check_card.main(["--family", "sd15", "--steps", "1", *rows]) == 1
    rows = table(capsys.readouterr().out)
    assert float(rows["again"][1]) > 1e-5 and "TOO LARGE" in rows["again"][3]
    assert rows["adamw8bit"][3].startswith("failed: ") and "nonsense" in rows["adamw8bit"][3]
    assert rows["base unchanged"][1] == "1" and "TOO LARGE" in rows["base unchanged"][3]


def test_unknown_rows_are_named(capsys):
    with pytest.raises(SystemExit):
        check_card.main(["--rows", "nonsense"])
    assert "--rows nonsense: give some of again, bf16, " in capsys.readouterr().err


@pytest.mark.parametrize("option, passes", [("encoded", 5), ("trajectories", 3)])
def test_trajectories_leave_out_the_teacher(xl_teacher, option, passes, monkeypatch):
    """Two passes fewer in a step, of the UNet's five with the way back."""
    training = random_training.Training(str(xl_teacher), 32, 2, "no", [option])
    widths = []
    predict = training.trainer.predict

    def count(unet, z, *given):
        widths.append(len(z) // 2)
        return predict(unet, z, *given)

    monkeypatch.setattr(training.trainer, "predict", count)
    assert training.take_step()["loss"] > 0
    assert sum(widths) + 1 == passes  # and the way back


def test_arithmetic_of_trajectories(xl_teacher):
    work = {kind: benchmark.count_flops(str(xl_teacher), 32, [kind]) for kind in benchmark.DATA}
    assert work["encoded"] > work["trajectories"] > work["trajectory_target"] > 0


def test_one_kind_of_data():
    with pytest.raises(SystemExit, match="encoded.trajectories: give one kind of data"):
        demo = str(ROOT / "demo/teacher-sdxl")
        random_training.Training(demo, 32, 1, "no", ["encoded", "trajectories"])


def test_random_teacher_has_files(xl_teacher, tmp_path):
    """A whole pipeline in fp16, and images that are larger than they are trained with."""
    flags = ["--resolution", "32", "--num_images", "3"]
    random_teacher.main([str(xl_teacher), str(tmp_path / "new"), *flags])
    pipe = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "new/teacher", dtype=torch.float16, use_safetensors=True
    )
    assert pipe.unet.dtype == torch.float16 and pipe.text_encoder_2 is not None
    data = load_dataset("parquet", data_files=str(tmp_path / "new/images/*.parquet"), split="train")
    assert [row["image"].size for row in data] == [(40, 40)] * 3
    assert len({row["image"].tobytes() for row in data}) == 3


PROGRAM = """#!{python}
import pathlib, sys
program, *flags = sys.argv[1:]
if program == "-c":
    exec({snippet})
    sys.exit()
name = pathlib.Path(program).name
with open({log!r}, "a") as file:
    print(name, *flags, file=file)
print("| table of", name, "|")
sys.exit(name == pathlib.Path({failing!r}).read_text())
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(failing program, card, REFERENCE) -> (completed process, calls, page), programs faked.

    Without a card `python -c` is the script's own, with one it prints the card's name.
    """
    log, failing = tmp_path / "calls", tmp_path / "failing"
    python = tmp_path / "bin/python"
    python.parent.mkdir()

    def run(fails="", card="", **more):
        failing.write_text(fails)
        snippet = f"print({card!r})" if card else "flags[0]"
        places = {"python": sys.executable, "log": str(log), "failing": str(failing)}
        python.write_text(PROGRAM.format(**places, snippet=repr(snippet) if card else snippet))
        python.chmod(0o755)
        log.write_text("")
        env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", **more}
        command = ["bash", "scripts/measure/gpu.sh", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done, log.read_text().splitlines(), tmp_path / "out/gpu-cpu.md"

    return run


def test_page_of_a_run(gpu):
    """Each section once; what failed is said, comes again, and decides the exit code."""
    done, calls, page = gpu("full_size.py", card="cpu")
    names = [call.split()[0] for call in calls]
    expected = ["check_card.py", "benchmark.py", "benchmark.py", "full_size.py", "compare_speed.py"]
    assert done.returncode == 1 and names == expected, done.stderr
    assert "This command ended with exit code 1." in page.read_text()
    done, calls, page = gpu(card="cpu")
    assert done.returncode == 0 and [call.split()[0] for call in calls] == ["full_size.py"]
    assert "exit code" not in page.read_text()
    done, calls, page = gpu()
    assert done.returncode == 0 and not calls
    text = page.read_text()
    assert text.count("\n## ") == 5 and "exit code" not in text
    assert f"torch {torch.__version__}" in text and "cores, no GPU" in text
    assert str(ROOT) not in text
    for name in {*expected}:
        assert f"| table of {name} |" in text
        assert re.search(rf"`python scripts/measure/{name} .*`, commit \S+\n", text)


def test_page_of_a_card(gpu):
    """Full sizes, and the other trainer beside ours where it is named."""
    name = "An Unheard-of GPU 1"
    page = ROOT / "docs/gpu-an-unheard-of-gpu-1.md"
    try:
        done, calls, _ = gpu(card=name, REFERENCE="other.py")
        assert done.returncode == 0, done.stderr
        assert page.read_text().startswith(f"# {name}\n")
    finally:
        page.unlink(missing_ok=True)
    text = "\n".join(calls)
    for words in ("--model sdxl --resolution 1024 --batch 1 4", "--model sd15 --resolution 512"):
        assert f"--precision fp16 --rounds 2 --steps 3 {words}" in text
    assert "random_teacher.py sdxl" in text and "--quantize_base nf4" in text
    (last,) = [call for call in calls if call.startswith("compare_speed.py")]
    assert last.endswith("--trajectories --least 0 0 0 0 --reference other.py")


@pytest.mark.slow
def test_gpu_sh_on_a_cpu(tmp_path):
    """With tiny shapes all of it ends well."""
    command = ["bash", "scripts/measure/gpu.sh", str(tmp_path)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = Path(tmp_path, "gpu-cpu.md").read_text()
    assert text.count("\n## ") == 5 and "TOO LARGE" not in text and "failed" not in text
