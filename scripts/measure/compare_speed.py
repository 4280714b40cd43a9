#!/usr/bin/env python
"""Steps per second of our trainer, on images, encoded data or trajectories, and of others.

    python scripts/measure/compare_speed.py --family sd15 --lora_rank 8    # on the demo's data
    python scripts/measure/compare_speed.py --trajectories --lora_rank 8   # on the teacher's paths
    python scripts/measure/compare_speed.py --reference train_lcm_distill_lora_sdxl.py
    python scripts/measure/compare_speed.py --reference train_lcm_distill_lora_sdxl.py \\
        --teacher SDXL --dataset_name IMAGES --resolution 1024 --batch 1 4 12 \\
        --mixed_precision fp16 --gradient_checkpointing --least 2 2    # on a GPU
    python scripts/measure/compare_speed.py --reference before/train_lcm_lora_sdxl.py \\
        train_lcm_distill_lora_sdxl.py --least 0 1 1    # not slower than the first?

A reference is a script with Hugging Face's flags. Each program is run as it is, on the same
teacher, images, batch and rank, and its steps are read from its progress bar.
scripts/encode_data.py encodes the images once; with --trajectories scripts/generate_data.py makes
the teacher's paths of their captions. A round lets the programs run in turn for some seconds each,
so that a machine whose speed changes from minute to minute changes it for all of them: between
their turns they are stopped (SIGSTOP), or on a GPU, whose memory is for one at a time, ended: as
each then starts anew in each round, and a card's speed does not wander, its rounds are few. The
gains of a round are over the first program: the first reference, else ours on images. Peak GPU
memory is the most that the driver reports while one runs. Exit code 0 if the median gains of the
best batch are at least --least.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
PATHS = ["--num_ddim_timesteps", "10"]  # trajectories of so many steps
TOTAL = 9999999  # steps that no run reaches; the progress bar is known by it


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--reference TRAINER] [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    add("--reference", type=Path, metavar="TRAINER", nargs="+", default=[], help="other trainers")
    add("--family", choices=["sd15", "sdxl"], default="sdxl", help="our trainer")
    add("--teacher", help="a model of its layout (default: the demo's)")
    add("--dataset_name", default=ROOT / "demo/data", help="images and captions")
    add("--resolution", type=int, metavar="PIXELS", default=128, help="side of the images")
    add("--batch", **count, nargs="+", default=[16], help="images in a batch")
    add("--lora_rank", **count, default=64, help="rank of the LoRA")
    precisions = ["no", "fp16", "bf16"]
    add("--mixed_precision", choices=precisions, default="no", help="precision of the base")
    add("--gradient_checkpointing", action="store_true", help="of all programs")
    add("--torch_compile", action="store_true", help="of ours")
    add("--trajectories", action="store_true", help="ours on the teacher's paths too: 3 passes, 2")
    add("--rounds", **count, help="turns of each program (default: 12, on a GPU 3)")
    turn = "length of a turn, which has three steps at least"
    add("--seconds", type=float, metavar="S", default=5, help=turn)
    least = "gains to reach, in the table's order (default: 1.25 1.6 over a reference, else 1.3; "
    least += "trajectories 2 2, else 1.5 2.2; further references 0)"
    add("--least", type=float, metavar="GAIN", nargs="+", help=least)
    args = parser.parse_args(argv)
    args.teacher = args.teacher or ROOT / f"demo/teacher-{args.family}"
    gains = [1.25, 1.6] if args.reference else [1.3]
    paths = [2.0, 2.0] if args.reference else [1.5, 2.2]
    gains = [0.0] * len(args.reference[1:]) + gains + paths * args.trajectories
    args.rounds = args.rounds or (12 if gpu_memory() is None else 3)
    args.least = args.least or gains
    if len(args.least) != len(gains):
        parser.error(f"--least: give a number for each gain, here {len(gains)}")
    for reference in args.reference:
        if not reference.is_file():
            parser.error(f"--reference {reference}: no such file; give a trainer")
    return args


def gpu_memory():
    """GiB of the first GPU's memory in use as the driver says; None without a GPU."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    first = re.match(r"(\d+)|\[", said)  # [N/A]: a GPU that does not tell
    return int(first[1] or 0) / 1024 if first else None


class Run:
    """A trainer that runs while it is watched and is stopped between.

    `seen` has (steps, when the progress bar first showed so many), `peak` the GiB of GPU memory.
    """

    def __init__(self, command):
        """Start it, in its own process group with whatever it starts."""
        self.command, self.seen, self.peak, self.said = command, [(0, 0.0)], 0.0, ""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Take the time whenever the progress bar shows more steps."""
        while part := os.read(self.process.stdout.fileno(), 2**16):
            self.said = self.said[-3000:] + part.decode(errors="replace")
            for done in re.findall(rf"(\d+)/{TOTAL} \[", self.said[-300:]):
                if int(done) > self.seen[-1][0]:
                    self.seen.append((int(done), time.perf_counter()))

    def watch(self, enough):
        """Let it run until that is enough."""
        os.killpg(self.process.pid, signal.SIGCONT)
        while not enough():
            time.sleep(0.1)
            self.peak = max(self.peak, gpu_memory() or 0.0)
            if self.process.poll() is not None:
                self.reader.join()
                ended = f"{' '.join(self.command)}\nended with {self.process.returncode}"
                raise SystemExit(f"{self.said}\n{ended}")
        os.killpg(self.process.pid, signal.SIGSTOP)

    def step_time(self, seconds):
        """Seconds a step in a turn of so many, and of three steps at least."""
        before, start = len(self.seen), time.perf_counter()
        self.watch(lambda: time.perf_counter() - start > seconds and len(self.seen) - before > 2)
        # from the end of the step that it was stopped in
        (first, began), *_, (last, ended) = self.seen[before:]
        return (ended - began) / (last - first)

    def end(self):
        """Kill it, unless it has ended by itself."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def data_flags(data, batch, args):
    """The trainers' flags of teacher and data, for a run with this batch."""
    words = ["--pretrained_teacher_model", args.teacher, "--dataset_name", data]
    words += ["--center_crop", "--resolution", args.resolution, "--seed", 0]
    words += ["--max_train_samples", max(64, 4 * batch)]
    return words + ["--mixed_precision", args.mixed_precision]


def make_data(args, program, *more):
    """Let a program of scripts/ make the data of all batches from the images or their captions."""
    words = data_flags(args.dataset_name, max(args.batch), args)
    command = [sys.executable, ROOT / "scripts" / program, "--family", args.family, *words, *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def references(args):
    """{name in the table: path}."""
    return {f"reference {i}".removesuffix(" 1"): path for i, path in enumerate(args.reference, 1)}


def programs(batch, args, folder):
    """{name: command} of the programs to compare."""
    words = ["--train_batch_size", batch, "--lora_rank", args.lora_rank]
    words += ["--max_train_steps", TOTAL, "--validation_steps", TOTAL]
    words += ["--checkpointing_steps", TOTAL, "--report_to", "tensorboard"]
    words += ["--gradient_checkpointing"] * args.gradient_checkpointing
    sources = args.dataset_name, folder / "encoded", folder / "paths"
    plain, encoded, paths = (data_flags(data, batch, args) for data in sources)
    found = {name: [path, *plain, *words] for name, path in references(args).items()}
    ours = [ROOT / f"train_lcm_lora_{args.family}.py", *words]
    ours += ["--torch_compile"] * args.torch_compile
    found |= {"ours": [*ours, *plain], "ours, encoded": [*ours, *encoded]}
    if args.trajectories:
        ours += [*paths, *PATHS]
        found |= {"3 passes": ours, "2 passes": [*ours, "--target", "trajectory"]}
    return {
        name: [sys.executable, *map(str, [*program, "--output_dir", folder / f"{batch} {name}"])]
        for name, program in found.items()
    }


def compare(batch, args, folder):
    """The rounds of one batch size, printed; the median gains over the first program."""
    commands = programs(batch, args, folder)
    first, *others = commands
    heads = ["batch", *(f"{name}, s a step" for name in commands)]
    heads += [*(f"gain: {name}" for name in others), "GPU GiB"]
    print(f"\n| {' | '.join(heads)} |\n" + "|---:" * len(heads) + "|", flush=True)
    one_at_a_time, gains = gpu_memory() is not None, []
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
            cells = [str(batch), *(f"{seconds:.3f}" for seconds in found.values())]
            cells += [*(f"{gain:.2f}" for gain in gains[-1]), ", ".join(memory)]
            print(f"| {' | '.join(cells)} |", flush=True)
    medians = [statistics.median(gain) for gain in zip(*gains, strict=True)]
    said = [f"{name} {gain:.2f} times the steps/s" for name, gain in zip(others, medians)]
    print(f"\nbatch {batch}, median of {args.rounds}, over {first}: {', '.join(said)}")
    return medians


def main(argv=None):
    """Measure and report; the exit code."""
    args = parse_args(argv)
    machine, threads = platform.processor() or platform.machine(), os.environ.get("OMP_NUM_THREADS")
    print(f"{machine}, {os.cpu_count()} cores, {threads or 'all'} threads, {args.teacher}")
    for name, path in references(args).items():
        print(f"{name}: {path}")
    with tempfile.TemporaryDirectory() as folder:
        make_data(args, "encode_data.py", "--output", Path(folder, "encoded"))
        if args.trajectories:
            more = ["--trajectories", "--no-contact_sheet", "--num_images", max(64, *args.batch)]
            make_data(args, "generate_data.py", *more, *PATHS, "--output", Path(folder, "paths"))
        medians = [compare(batch, args, Path(folder)) for batch in args.batch]
    best = [max(gains) for gains in zip(*medians, strict=True)]
    return 0 if all(gain >= least for gain, least in zip(best, args.least, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
