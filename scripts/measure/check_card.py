#!/usr/bin/env python
"""Does training do on this GPU what it does on a CPU? The demo's teachers, a row for each question.

    python scripts/measure/check_card.py                        # all rows, both layouts
    python scripts/measure/check_card.py --family sdxl --rows fp16 overflow --steps 5

Rows are short runs of the trainers themselves on 64 of the demo's images. An option's figure is the
largest relative difference of a loss from the same run in float32 on the same device, beside what
it may be. Others count what went wrong, and may be 0. Where there is no GPU all but the rows that
are about one take place on the CPU, in bf16 where it would be fp16. Prints a table in Markdown; the
exit code is 1 if a figure is larger than it may be, or a run failed.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from random_training import ROOT, Training
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter, command_line

GPUS = torch.cuda.device_count()
HALF = "fp16" if GPUS else "bf16"  # accelerate has no fp16 on a CPU
ROUNDING = {"fp16": 0.02, "bf16": 0.1}[HALF]
SHORT = ["--mixed_precision", HALF]
SAVING = "--quantize_base nf4 --gradient_checkpointing --use_8bit_adam".split()
# {row: (flags, the largest relative difference of a loss from float32's)}
OPTIONS = {
    "again": ([], 1e-5),
    HALF: (SHORT, ROUNDING),
    "gradient_checkpointing": (["--gradient_checkpointing"], 1e-4),
    "adamw8bit": (["--use_8bit_adam"], 1e-3),
    "nf4": (["--quantize_base", "nf4"], 0.4),
    f"{HALF} nf4 checkpointing 8bit": (SHORT + SAVING, 0.4 + ROUNDING),
    "torch_compile": (["--torch_compile"], 1e-4),
}
ON_A_GPU = {
    "bf16": (["--mixed_precision", "bf16"], 0.1),
    "fp16 torch_compile": (["--mixed_precision", "fp16", "--torch_compile"], 0.02),
    "allow_tf32": (["--allow_tf32"], 0.01),
    "paged_adamw8bit": (["--optimizer", "paged_adamw8bit"], 1e-3),
}
# As a user calls infer.py on the LoRA
COMMANDS = {"infer.py": [], "infer.py --scheduler tcd": ["--scheduler", "tcd"]}
if GPUS:
    COMMANDS |= {"infer.py --compare": ["--compare"], "infer.py --compile": ["--compile"]}


def losses(folder):
    """The losses of a run, from its log."""
    return [row["loss"] for row in rows_of(folder)]


def rows_of(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def distance(ours, theirs):
    """The largest relative difference of losses, of as many as both have."""
    return max(abs(a / b - 1) for a, b in zip(ours, theirs))


def largest_difference(*folders):
    """The largest difference of a weight of two runs' LoRAs."""
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    return max((weight - theirs[key]).abs().max().item() for key, weight in ours.items())


class Card:
    """The rows of one layout; each is a method or an entry of the tables above.

    A row's figure comes with what it may be and a remark.
    """

    def __init__(self, family, steps, folder):
        """Runs are kept in the folder."""
        self.family, self.steps, self.folder = family, steps, folder
        self.trainer = importlib.import_module(f"train_lcm_lora_{family}")

    def words(self, output, *flags):
        """The command line of a run. A large epsilon keeps rounding from deciding Adam's signs."""
        words = ["--pretrained_teacher_model", ROOT / f"demo/teacher-{self.family}"]
        words += ["--dataset_name", ROOT / "demo/data", "--max_train_samples", 64, "--center_crop"]
        words += ["--resolution", 64, "--lora_rank", 32, "--train_batch_size", 4]
        words += ["--max_train_steps", self.steps, "--report_to", "none", "--seed", 0]
        words += ["--adam_epsilon", 1e-2, "--learning_rate", 3e-3, "--mixed_precision", "no"]
        return [str(word) for word in [*words, "--output_dir", output, *flags]]

    def train(self, name, *flags):
        """A run of the trainer in this process; its output folder."""
        folder, said = self.folder / name.replace(" ", "-"), io.StringIO()
        AcceleratorState._reset_state(True)
        torch._dynamo.reset()
        handlers = {number: signal.getsignal(number) for number in self.trainer.STOP_SIGNALS}
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                self.trainer.main(self.words(folder, *map(str, flags)))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if "read back equal" not in said.getvalue():
            raise RuntimeError("its LoRA was not read back")
        return folder

    def call(self, *command, **environment):
        """One of the project's programs, or a module's, to its end."""
        command = [sys.executable, *map(str, command)]
        env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])

    @cached_property
    def plain(self):
        """The run in float32 that others are compared with."""
        return self.train("float32", "--validation_prompts", "a red apple")

    def rows(self):
        """{name of a row: what computes (figure, what it may be, remark)}."""
        options = OPTIONS | (ON_A_GPU if GPUS else {})
        found = {name: lambda one=one: self.option(*one) for name, one in options.items()}
        found["encoded data"] = self.encoded
        for name, flags in {
            "resume": [],
            f"resume {HALF} 8bit": [*SHORT, "--use_8bit_adam"],
        }.items():
            found[name] = lambda name=name, flags=flags: self.resume(name, *flags)
        for kind in ("", "nf4"):
            found[f"base unchanged {kind}".strip()] = lambda kind=kind: self.base(kind)
        for count in (1, 2):
            if count <= (GPUS or 2):
                found[f"processes: {count}"] = lambda count=count: self.processes(count)
        for name, flags in COMMANDS.items():
            found[name] = lambda flags=flags: self.infer(*flags)
        if GPUS:
            found["beside a CPU"] = self.beside_a_cpu
            found["overflow"] = self.overflow
            found["paged after a resume"] = self.paged
        return found

    def option(self, flags, most):
        """A run with an option beside the plain one."""
        run = self.train(" ".join(flags) or "again", *flags)
        return distance(losses(run), losses(self.plain)), most, ""

    def encoded(self):
        """A run on encoded data beside the plain one: the VAE's kernels may depend on the batch."""
        data, words = self.folder / "data", self.words("x")
        keep = words[: words.index("--lora_rank")]
        words = ["--family", self.family, *keep, "--mixed_precision", "no", "--output", data]
        self.call("scripts/encode_data.py", *words)
        run = self.train("encoded", "--dataset_name", data)
        return distance(losses(run), losses(self.plain)), 2e-3, ""

    def resume(self, name, *flags):
        """A run that was stopped after its third step of six, beside one that was not."""
        whole = self.train(name, *flags, "--max_train_steps", 6, "--checkpointing_steps", 3)
        place = ["--resume_from_checkpoint", whole / "checkpoint-3"]
        half = self.train(f"{name} half", *flags, "--max_train_steps", 6, *place)
        difference = largest_difference(whole, half)
        return difference, 1e-4 if GPUS else 0, "largest difference of a weight"

    def base(self, kind):
        """Tensors of the teacher that two steps change."""
        teacher = str(ROOT / f"demo/teacher-{self.family}")
        training = Training(teacher, 64, 2, HALF, ["encoded", *filter(None, [kind])])

        def digests():
            for p in training.teacher.parameters():
                values = p.detach().contiguous().flatten().view(torch.uint8).cpu()
                yield hashlib.sha256(values.numpy().tobytes()).digest()

        before = [*digests()]
        for number in range(2):
            training.take_step(number)
        changed = sum(a != b for a, b in zip(before, digests(), strict=True))
        return changed, 0, f"of {len(before)} tensors"

    def processes(self, count):
        """A run of one or two processes, by NCCL on GPUs, with the same global batch."""
        run = self.folder / f"processes-{count}"
        words = self.words(run, "--train_batch_size", 4 // count)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        on_a_cpu = {} if GPUS else {"ACCELERATE_USE_CPU": "true"}
        self.call(*launch, ROOT / f"train_lcm_lora_{self.family}.py", *words, **on_a_cpu)
        return distance(losses(run), losses(self.plain)), 1e-4, "NCCL" if GPUS else "gloo"

    def infer(self, *flags):
        """Programs that fail: infer.py on the LoRA."""
        output = ["--output", self.folder / "image.png", "--overwrite"]
        prompts = ["--prompt", "a red apple", "a house"]
        self.call("infer.py", "--lora", self.plain, *prompts, *output, *flags)
        return 0, 0, ""

    def beside_a_cpu(self):
        """Losses on the GPU beside a CPU's, in five steps."""
        run = self.folder / "cpu"
        words = self.words(run, "--max_train_steps", 5)
        self.call(f"train_lcm_lora_{self.family}.py", *words, CUDA_VISIBLE_DEVICES="")
        short = self.train("as on a CPU", "--max_train_steps", 5)
        return distance(losses(short), losses(run)), 5e-3, "5 steps"

    def overflow(self):
        """Infinite gradients of fp16 that are not counted; the scale begins too high."""
        begin = torch.amp.GradScaler.__init__

        def high(scaler, *words, **settings):
            begin(scaler, *words, **settings | {"init_scale": 2.0**30})

        with mock.patch.object(torch.amp.GradScaler, "__init__", high):
            rows = rows_of(self.train("overflow", "--mixed_precision", "fp16"))
        infinite = sum(row["grad_norm"] is None for row in rows)
        if not infinite:
            raise RuntimeError("no gradient was infinite")
        return abs(infinite - rows[-1]["overflows"]), 0, f"{infinite} gradients were infinite"

    def paged(self):
        """States of large weights that are not in paged memory after a resume."""
        adam = ["--optimizer", "paged_adamw8bit", "--max_train_steps", 4]
        whole = self.train("paged", *adam, "--checkpointing_steps", 2)
        keep_paged, seen = self.trainer.keep_paged, []

        def spy(optimizer):
            keep_paged(optimizer)
            seen.append(optimizer)

        with mock.patch.object(self.trainer, "keep_paged", spy):
            place = ["--resume_from_checkpoint", whole / "checkpoint-2"]
            self.train("paged half", *adam, *place)
        states = [state for p, state in seen[0].state.items() if p.numel() >= 10**5]
        lost = sum(not getattr(state["state1"], "is_paged", False) for state in states)
        return lost, 0, f"of {len(states)}"


def report(family, name, row):
    """(Line of the table, whether it is in order) of a row."""
    try:
        figure, most, remark = row()
    except (Exception, SystemExit) as error:  # the other rows are worth knowing
        why = str(error).strip().splitlines() or [repr(error)]
        return f"| {family} | {name} | | | failed: {why[-1]:.200} |", False
    good = figure <= most
    remark = ", ".join(filter(None, ["" if good else "TOO LARGE", remark]))
    return f"| {family} | {name} | {figure:.2g} | {most:g} | {remark} |", good


def main(argv=None):
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--family FAMILY ...] [--rows ROW ...] [--steps N]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, families = parser.add_argument, ["sd15", "sdxl"]
    add("--family", nargs="+", choices=families, default=families, help="the layouts")
    add("--rows", nargs="+", metavar="ROW", help="only these (default: all)")
    add("--steps", type=int, default=20, metavar="N", help="of a run that is compared")
    args = parser.parse_args(command_line(argv))
    if args.steps < 1:
        parser.error("--steps must be 1 or more")
    known = Card("sd15", 1, Path()).rows()
    if unknown := {*(args.rows or [])} - {*known}:
        parser.error(f"--rows {min(unknown)}: give some of {', '.join(known)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| layout | row | figure | at most | |\n|---|---|---:|---:|---|", flush=True)
    all_good = True
    with tempfile.TemporaryDirectory() as folder:
        for family in args.family:
            card = Card(family, args.steps, Path(folder, family))
            for name, row in card.rows().items():
                if name in (args.rows or known):
                    line, good = report(family, name, row)
                    print(line, flush=True)
                    all_good &= good
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
