#!/usr/bin/env python
"""Steps per second of our trainer with caches and without and, where one is given, of another trainer, side by side.

    python scripts/measure/compare_speed.py --family sd15 --lora_rank 8                     # what caches gain on the demo
    python scripts/measure/compare_speed.py --reference train_lcm_distill_lora_sdxl.py      # beside a script with Hugging Face's flags
    python scripts/measure/compare_speed.py --reference train_lcm_distill_lora_sdxl.py --teacher SDXL --dataset_name PICTURES \\
        --resolution 1024 --batch 1 4 12 --mixed_precision bf16 --gradient_checkpointing --least 2 2    # on a GPU

Each program is run as it is, on the same teacher, pictures, batch and rank, and its steps are read from its progress bar. A round lets
the reference, ours, and ours with caches (filled before) run in turn for some seconds each, so that a machine whose speed changes from
minute to minute changes it for all of them: between their turns they are stopped (SIGSTOP), or on a GPU, whose memory is for one at a
time, ended. The gains of a round are over the first program. Peak GPU memory is the most that the driver reports while one runs. Exit
code 0 if the median gains of the best batch are at least --least.
"""

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 9999999  # steps that no run reaches; the progress bar is known by it
CACHES = ["--cache_latents", "--cache_text_embeddings"]


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--reference", type=Path, help="the other trainer")
    add("--family", choices=["sd15", "sdxl"], default="sdxl", help="our trainer")
    add("--teacher", help="of its layout (default: the demo's)")
    add("--dataset_name", default=ROOT / "demo/data")
    add("--resolution", type=int, default=64)
    add("--batch", type=int, nargs="+", default=[16])
    add("--lora_rank", type=int, default=64)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--gradient_checkpointing", action="store_true")
    add("--torch_compile", action="store_true", help="of ours")
    add("--rounds", type=int, default=12)
    add("--seconds", type=float, default=5, help="length of a turn, which has three steps at least")
    add(
        "--least",
        type=float,
        nargs="+",
        help="gains to reach (default: 1.25 1.6 beside a reference, else 1.3)",
    )
    args = parser.parse_args(argv)
    args.teacher = args.teacher or ROOT / f"demo/teacher-{args.family}"
    args.least = args.least or ([1.25, 1.6] if args.reference else [1.3])
    if len(args.least) != 1 + bool(args.reference):
        parser.error("--least: give a number for each gain, two beside a --reference, else one")
    if args.reference and not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; give a trainer")
    return args


def gpu_memory():
    """GiB of GPU memory in use as the driver says, 0 without a GPU."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return (
        int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
        / 1024
    )


class Run:
    """A trainer that runs while it is watched and is stopped between; `times` has when each step ended, `peak` the GiB."""

    def __init__(self, command):
        self.command, self.times, self.peak, self.said = command, [], 0.0, ""
        # its own process group, with whatever it starts
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Take the time whenever the progress bar shows one step more."""
        while part := os.read(self.process.stdout.fileno(), 2**16):
            self.said = self.said[-3000:] + part.decode(errors="replace")
            for done in re.findall(rf"(\d+)/{TOTAL} \[", self.said[-300:]):
                if int(done) > len(self.times):
                    self.times += [time.perf_counter()] * (int(done) - len(self.times))

    def watch(self, enough):
        """Let it run until that is enough."""
        os.killpg(self.process.pid, signal.SIGCONT)
        while not enough():
            time.sleep(0.1)
            self.peak = max(self.peak, gpu_memory())
            if self.process.poll() is not None:
                self.reader.join()
                raise SystemExit(
                    f"{self.said}\n{' '.join(self.command)}\nended with {self.process.returncode}"
                )
        os.killpg(self.process.pid, signal.SIGSTOP)

    def step_time(self, seconds):
        """Seconds a step in a turn of so many, and of three steps at least."""
        before, start = len(self.times), time.perf_counter()
        self.watch(lambda: time.perf_counter() - start > seconds and len(self.times) - before > 2)
        times = self.times[before:]  # from the end of the step that it was stopped in
        return (times[-1] - times[0]) / (len(times) - 1)

    def end(self):
        """Kill it, unless it has ended by itself."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def compare(batch, args, folder):
    """The rounds of one batch size, printed; the median gains over the first program."""
    words = [
        "--pretrained_teacher_model",
        args.teacher,
        "--dataset_name",
        args.dataset_name,
        "--center_crop",
    ]
    words += [
        "--resolution",
        args.resolution,
        "--train_batch_size",
        batch,
        "--lora_rank",
        args.lora_rank,
    ]
    words += ["--mixed_precision", args.mixed_precision, "--seed", 0, "--report_to", "tensorboard"]
    words += [
        "--max_train_samples",
        max(64, 4 * batch),
        "--max_train_steps",
        TOTAL,
        "--validation_steps",
        TOTAL,
    ]
    words += ["--checkpointing_steps", TOTAL] + [
        "--gradient_checkpointing"
    ] * args.gradient_checkpointing
    ours = [
        ROOT / f"train_lcm_lora_{args.family}.py",
        *words,
        *["--torch_compile"] * args.torch_compile,
    ]
    cached = [*ours, *CACHES, "--cache_dir", folder / "cache"]
    fill = [sys.executable, *map(str, [*cached, "--cache_only"])]
    fill = subprocess.run(fill, capture_output=True, text=True)
    if fill.returncode:
        raise SystemExit(fill.stderr[-3000:])
    programs = {"reference": [args.reference, *words]} if args.reference else {}
    programs |= {
        "ours": [*ours, "--logging_steps", 1],
        "ours, cached": [*cached, "--logging_steps", 1],
    }
    commands = {
        name: [sys.executable, *map(str, [*program, "--output_dir", folder / f"{batch} {name}"])]
        for name, program in programs.items()
    }
    first, *others = commands
    heads = [
        "batch",
        *(f"{name}, s a step" for name in commands),
        *(f"gain: {name}" for name in others),
        "GPU GiB",
    ]
    print(f"\n| {' | '.join(heads)} |\n" + "|---:" * len(heads) + "|", flush=True)
    one_at_a_time, gains = gpu_memory() > 0, []
    with contextlib.ExitStack() as stack:
        runs = {}
        for number in range(args.rounds):
            found, memory = {}, []
            for name, command in commands.items():
                if number == 0 or one_at_a_time:
                    runs[name] = Run(command)
                    stack.callback(runs[name].end)
                    runs[name].step_time(0)  # to warm up
                found[name] = runs[name].step_time(args.seconds)
                memory += [f"{runs[name].peak:.1f}"] * one_at_a_time
                if one_at_a_time:
                    stack.close()
            gains.append([found[first] / found[name] for name in others])
            cells = [f"{seconds:.3f}" for seconds in found.values()] + [
                f"{gain:.2f}" for gain in gains[-1]
            ]
            print(f"| {' | '.join([str(batch), *cells, ', '.join(memory)])} |", flush=True)
    medians = [statistics.median(gain) for gain in zip(*gains, strict=True)]
    said = ", ".join(
        f"{name} {gain:.2f} times the steps/s" for name, gain in zip(others, medians, strict=True)
    )
    print(f"\nbatch {batch}, median of {args.rounds}, over {first}: {said}")
    return medians


def main(argv=None):
    """Measure and report; the exit code."""
    args = parse_args(argv)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads, {args.teacher}"
    )
    with tempfile.TemporaryDirectory() as folder:
        medians = [compare(batch, args, Path(folder)) for batch in args.batch]
    best = [max(gains) for gains in zip(*medians, strict=True)]
    return 0 if all(gain >= least for gain, least in zip(best, args.least, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
