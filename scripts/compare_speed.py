#!/usr/bin/env python
"""Steps per second beside another trainer with the flags of Hugging Face's train_lcm_distill_lora_sdxl.py: runs in turn.

    python scripts/compare_speed.py --reference train_lcm_distill_lora_sdxl.py      # on a CPU: the demo's teacher and pictures
    python scripts/compare_speed.py --reference train_lcm_distill_lora_sdxl.py --teacher SDXL --dataset_name PICTURES \\
        --resolution 1024 --batch 1 4 12 --mixed_precision bf16 --gradient_checkpointing --least 2 2    # on a GPU

Each round runs the reference, ours, and ours with caches that were filled before: same teacher, pictures, batch, rank. The time of a
step is the median between the entries that a run writes for TensorBoard, after a warm-up, so both programs are run as they are. On a
GPU peak memory is the most that the driver reports while a run lasts. Exit code 0 if the medians of the gains are at least --least.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps
CACHES = ["--cache_latents", "--cache_text_embeddings"]


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reference", required=True, type=Path, help="the other trainer")
    add("--teacher", default=ROOT / "demo/teacher-sdxl", help="of the SDXL layout")
    add("--dataset_name", default=ROOT / "demo/data")
    add("--resolution", type=int, default=64)
    add("--batch", type=int, nargs="+", default=[16])
    add("--lora_rank", type=int, default=64)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--gradient_checkpointing", action="store_true")
    add("--pairs", type=int, default=5)
    add("--steps", type=int, default=12, help="optimizer steps that are timed in a run")
    add("--least", type=float, nargs=2, default=[1.25, 1.6], help="gain without and with caches that must be reached")
    args = parser.parse_args(argv)
    if not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; give a trainer")
    return args


def gpu_memory():
    """GiB of GPU memory in use as the driver says, 0 without a GPU."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def step_times(folder):
    """Seconds from each entry of a run's loss to the next."""
    times = []
    for events in folder.rglob("events.out.tfevents*"):  # another holds the settings
        run = EventAccumulator(str(events)).Reload()
        for tag in {"loss", "train_loss"} & {*run.Tags()["scalars"]}:
            times += [event.wall_time for event in run.Scalars(tag)]
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def train(program, batch, args, folder, *flags):
    """A run of a trainer: (seconds a step, peak GiB of GPU memory)."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["--pretrained_teacher_model", args.teacher, "--dataset_name", args.dataset_name, "--center_crop"]
    words += ["--resolution", args.resolution, "--train_batch_size", batch, "--lora_rank", args.lora_rank]
    words += ["--mixed_precision", args.mixed_precision, "--seed", 0, "--report_to", "tensorboard", "--output_dir", out]
    words += ["--max_train_samples", max(64, 4 * batch), "--max_train_steps", WARM_UP + args.steps + 1, *flags]
    words += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    with (folder / "output.txt").open("w") as output:
        run = subprocess.Popen([sys.executable, *map(str, [program, *words])], stdout=output, stderr=output)
        peak = 0.0
        while run.poll() is None:
            peak = max(peak, gpu_memory())
            time.sleep(0.2)
    if run.returncode:
        raise SystemExit(f"{(folder / 'output.txt').read_text()[-2000:]}\n{program} ended with {run.returncode}")
    return 0.0 if "--cache_only" in flags else statistics.median(step_times(out)[WARM_UP:]), peak


def compare(batch, args, folder):
    """The rounds of one batch size, printed; the median gains without and with caches."""
    ours = ROOT / "train_lcm_lora_sdxl.py"
    cached = [*CACHES, "--cache_dir", folder / "cache"]
    train(ours, batch, args, folder, *cached, "--cache_only")
    print(
        "\n| batch | reference, s a step | ours | ours, cached | gain | gain, cached | GPU GiB |\n" + "|---:" * 7 + "|"
    )
    gains = []
    for _ in range(args.pairs):
        (theirs, a), (plain, b), (fast, c) = (
            train(args.reference, batch, args, folder),
            train(ours, batch, args, folder, "--logging_steps", 1),
            train(ours, batch, args, folder, "--logging_steps", 1, *cached),
        )
        gains.append((theirs / plain, theirs / fast))
        memory = f"{a:.1f}, {b:.1f}, {c:.1f}" if a else ""
        print(
            f"| {batch} | {theirs:.3f} | {plain:.3f} | {fast:.3f} | {gains[-1][0]:.2f} | {gains[-1][1]:.2f} | {memory} |",
            flush=True,
        )
    medians = [statistics.median(gain) for gain in zip(*gains, strict=True)]
    print(
        f"\nbatch {batch}, median of {args.pairs}: {medians[0]:.2f} times the steps/s, {medians[1]:.2f} times with caches"
    )
    return medians


def main(argv=None):
    """Measure and report; the exit code."""
    args = parse_args(argv)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads, {args.teacher}")
    with tempfile.TemporaryDirectory() as folder:
        medians = [compare(batch, args, Path(folder)) for batch in args.batch]
    best = [max(gains) for gains in zip(*medians, strict=True)]
    return 0 if all(gain >= least for gain, least in zip(best, args.least, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
