"""benchmark.py and memory.py of scripts/measure/: their counts are those of independent counts."""

import csv
import re

import benchmark
import memory
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

GC, BITS, NF4 = "gradient_checkpointing", "use_8bit_adam", "nf4"


def memory_table():
    """The rows of what fits on which card, {model: cells}, and the lines themselves."""
    page = (ROOT / "docs/memory-and-speed.md").read_text()
    section = page.split("## What fits on which card\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows[2:]}, lines


@pytest.mark.slow
def test_the_report_has_a_row_for_each_cell(xl_teacher, tmp_path, capsys):
    """Measured in processes of their own; figures that follow from others do."""
    flags = ["--model", xl_teacher, "--resolution", 32, "--batch", 2, "--options", "encoded"]
    flags += ["--rounds", 2, "--steps", 1, "--output_dir", tmp_path]
    assert benchmark.main([str(flag) for flag in flags]) == 0
    head, *lines = (tmp_path / "benchmark.csv").read_text().splitlines()
    for words in (f"--model {xl_teacher}", f"torch {torch.__version__}", "TFLOP/s in no"):
        assert words in head
    rows = list(csv.DictReader(lines))
    assert [(row["batch"], row["precision"], row["options"]) for row in rows] == [
        ("2", "no", "plain"),
        ("2", "no", "encoded"),
    ]
    for row, encoded in zip(rows, (False, True)):
        seconds, work = float(row["seconds"]), float(row["tflop"])
        assert float(row["images_per_s"]) == pytest.approx(2 / seconds, rel=1e-2)
        counted = 2 * benchmark.count_flops(str(xl_teacher), 32, ["encoded"] * encoded) / 1e12
        assert work == pytest.approx(counted, rel=1e-3)
        assert float(row["tflops"]) == pytest.approx(work / seconds, rel=1e-2)
        assert float(row["share"]) > 0 and 0.1 < float(row["memory_gib"]) < 8
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert table[3].strip("| ").split(" | ")[:3] == ["2", "no", "encoded"]
    assert Image.open(tmp_path / "benchmark.png").width > 500
    assert "| 2 | no | encoded |" in capsys.readouterr().out


def test_ratios_and_cells_without_memory(monkeypatch, tmp_path):
    """An option buys the median over rounds in turn; a cell that fails or lacks memory is a row."""
    times = {
        (): [4.0, 6.0, 5.0],
        ("encoded",): [2.0, 2.0, 5.0],
        ("nf4",): "out of memory",
        ("torch_compile",): "no such library",
    }
    monkeypatch.setattr(benchmark, "count_flops", lambda *_: 10**12)
    monkeypatch.setattr(benchmark, "matrix_rate", lambda _: 10**12)

    class Cell:
        def __init__(self, args, cell):
            if isinstance(times[cell[2]], str):
                raise RuntimeError(times[cell[2]])
            self.seconds, self.memory = iter(times[cell[2]] * 9), 2.0 if cell[2] else 4.0

        def run(self, steps):
            return {"seconds": next(self.seconds), "memory": self.memory}

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "Cell", Cell)
    flags = ["--output_dir", str(tmp_path), *"--rounds 3 --batch 1 --options encoded nf4".split()]
    assert benchmark.main(flags) == 0 and benchmark.main([*flags, "torch_compile"]) == 1
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()[1:]))
    assert [(row["options"], row["seconds"], row["gains"]) for row in rows] == [
        ("plain", "5", ""),
        ("encoded", "2", "encoded: 2.00 [1.00, 3.00] times as fast, 0.50 of the memory"),
        ("nf4", "", "out of memory"),
        ("torch_compile", "", "no such library"),
    ]


def test_counted_arithmetic(sdxl, xl_teacher):
    """Two passes of the teacher, two and a backward pass of the student, each counted alone."""
    args = sdxl.parse_args(["--pretrained_teacher_model", str(xl_teacher), "--train_data_dir", "x"])
    teacher = UNet2DConditionModel.from_pretrained(xl_teacher, subfolder="unet")
    teacher.requires_grad_(False)
    student = sdxl.attach_lora(sdxl.share_weights(teacher), args)
    c = {"text_embeds": torch.randn(1, 32), "time_ids": torch.zeros(1, 6)}

    def count(work):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made = work()
        return counter.get_total_flops(), made

    def run(unet):
        inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 16, 64)
        return lambda: unet(*inputs, added_cond_kwargs=c).sample.sum()

    one, _ = count(run(teacher))
    lora, loss = count(run(student))
    back, _ = count(loss.backward)
    assert 0 < one < lora < back < 3 * lora
    assert benchmark.count_flops(str(xl_teacher), 32, ["encoded"]) == 2 * one + 2 * lora + back


@pytest.mark.parametrize(
    "options, precision",
    [((), "bf16"), (("encoded", BITS, NF4), "no"), (("encoded", GC, BITS, NF4), "bf16")],
)
def test_memory_is_that_of_real_tensors(xl_teacher, options, precision):
    """The same step, without and with memory, there with bitsandbytes' layers and optimizer."""
    cell = str(xl_teacher), 64, 4, precision, options, ["--lora_rank", "4"]
    computed = memory.step_memory(*cell, cuda_rules=False)
    real = memory.step_memory(*cell, real=True)
    assert computed["total"] == pytest.approx(real["total"], rel=0.02)
    assert computed["activations at the peak"] > computed["LoRA"] > 0
    assert computed["total"] == sum(size for part, size in computed.items() if part != "total")
    assert (computed["VAE and text encoders"] == 0) == ("encoded" in options)


@pytest.mark.slow
def test_memory_of_parts(xl_teacher):
    """Adam keeps 8 bytes a weight; checkpointing changes activations alone.

    CUDA's rule for autocast changes nothing: no part of a step is under it.
    """
    cell = str(xl_teacher), 32, 4, "bf16", ("encoded",)
    plain, less = memory.step_memory(*cell), memory.step_memory(*cell[:4], ("encoded", GC))
    by_cpu = memory.step_memory(*cell, cuda_rules=False)
    assert plain["optimizer state"] == pytest.approx(2 * plain["LoRA"], rel=0.01)
    assert less["total"] < plain["total"] and less["base"] == plain["base"]
    assert by_cpu == plain


def test_choice_for_a_card():
    """The fastest options with room for a batch of 4, else the largest; the allowance is free."""
    gb, batches = 10**9, memory.COMPUTED_BATCHES
    curves = {
        options: {b: gb * (4 + slope * b) for b in batches}
        for options, slope in zip(memory.LADDER, (2, 1.9, 0.5))
    }
    assert memory.choose(curves, 24) == (memory.LADDER[0], 8)
    assert memory.choose(curves, 24, 12) == (memory.LADDER[2], 32)  # a smaller card has 12
    assert memory.choose(curves, 8) == (memory.LADDER[2], 4)
    assert memory.choose(curves, 5)[1] == 0 and memory.cell(*memory.choose(curves, 5)) == "no"
    assert memory.cell(*memory.choose(curves, 8)) == "4 8bit nf4 (c)"
    few = {memory.LADDER[2]: {1: gb, 8: 2 * gb}}  # not computed for more than 8
    assert memory.choose(few, 80) == (memory.LADDER[2], 8)


def test_the_table_of_cards():
    """A cell for each card, none below that of a smaller one; one of them computed anew."""
    rows, _ = memory_table()
    names = {f"{name}, {side} px" for name, (_, side) in memory.TABLE.items()}
    assert {*rows} <= names  # the slow test wants all
    short = memory.SHORT
    ladder = [tuple(short[o] for o in options if o in short) for options in memory.LADDER]
    for *cells, without in rows.values():
        assert len(cells) == len(memory.CARDS)
        for cell in cells:
            words = cell.split()
            assert cell == "no" or words[-1] in ("(c)", "(m)")
            assert cell == "no" or int(words[0]) in memory.BATCHES and tuple(words[1:-1]) in ladder
        sizes = [int(cell.replace("no", "0").split()[0]) for cell in cells]
        assert sizes == sorted(sizes)
        assert without == "no" or re.fullmatch(r"\d+ GB: \d+ \(c\)", without)
    batch, *short, _ = rows["SD 1.5, 512 px"][0].split()
    options = memory.LADDER[ladder.index(tuple(short))]
    step = memory.step_memory("sd15", 512, int(batch), "fp16", options)
    size = memory.needed(step, memory.vae_memory("sd15", 512, "fp16"))
    assert 0.7 * 8e9 < size + memory.ALLOWANCE <= 8e9


@pytest.mark.slow
def test_the_table_of_cards_is_what_memory_prints():
    assert [*memory.table()] == memory_table()[1]


@pytest.mark.parametrize(
    "program, flags, named",
    [
        (
            benchmark,
            ["--model", "sd9"],
            "--model sd9: give sd15, sdxl, ssd1b, sd21 or a teacher folder",
        ),
        (
            benchmark,
            ["--options", "magic"],
            "--options magic: give some of encoded, trajectories",
        ),
        (benchmark, ["--options", "nf4+int8"], "--options int8: give some of encoded"),
        (benchmark, ["--rounds", "0"], "must be 1 or more"),
        (memory, ["--model", "nowhere"], "--model nowhere: give sd15"),
        (
            memory,
            ["--resolution", "98"],
            "--resolution 98: it must be a multiple of the VAE's factor, 8",
        ),
        (memory, ["--batch", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_get_a_message(program, flags, named):
    with pytest.raises(SystemExit) as stop:
        program.main(flags)
    assert named in str(stop.value) and "\n" not in str(stop.value)
