#!/usr/bin/env python
"""Steps per second of our trainer with caches and without and, where one is given, of another trainer: runs in turn.

    python scripts/compare_speed.py --family sd15 --lora_rank 8                     # what caches gain on the demo
    python scripts/compare_speed.py --reference train_lcm_distill_lora_sdxl.py      # beside a script with Hugging Face's flags
    python scripts/compare_speed.py --reference train_lcm_distill_lora_sdxl.py --teacher SDXL --dataset_name PICTURES \\
        --resolution 1024 --batch 1 4 12 --mixed_precision bf16 --gradient_checkpointing --least 2 2    # on a GPU

Each round runs the reference, ours, and ours with caches that were filled before: same teacher, pictures, batch, rank. The time of a
step is the median between the entries that a run writes for TensorBoard, after a warm-up, so all programs are run as they are. On a
GPU peak memory is the most that the driver reports while a run lasts. A gain is that over the first of them. Exit code 0 if the median
gains of the best batch are at least --least.
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
    add("--reference", type=Path, help="the other trainer")
    add("--family", choices=["sd15", "sdxl"], default="sdxl", help="our trainer")
    add("--teacher", help="of its layout (default: the demo's)")
    add("--dataset_name", default=ROOT / "demo/data")
    add("--resolution", type=int, default=64)
    add("--batch", type=int, nargs="+", default=[16])
    add("--lora_rank", type=int, default=64)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--gradient_checkpointing", action="store_true")
    add("--pairs", type=int, default=5)
    add("--steps", type=int, default=12, help="optimizer steps that are timed in a run")
    add("--least", type=float, nargs="+", help="gains to reach (default: 1.25 1.6 beside a reference, else 1.3)")
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
    """The rounds of one batch size, printed; the median gains over the first program."""
    ours = ROOT / f"train_lcm_lora_{args.family}.py"
    cached = [*CACHES, "--cache_dir", folder / "cache"]
    train(ours, batch, args, folder, *cached, "--cache_only")
    runs = {"reference": [args.reference]} if args.reference else {}
    runs |= {"ours": [ours, "--logging_steps", 1], "ours, cached": [ours, "--logging_steps", 1, *cached]}
    first, *others = runs
    heads = ["batch", *(f"{name}, s a step" for name in runs), *(f"gain: {name}" for name in others), "GPU GiB"]
    print(f"\n| {' | '.join(heads)} |\n" + "|---:" * len(heads) + "|", flush=True)
    gains = []
    for _ in range(args.pairs):
        found = {name: train(program, batch, args, folder, *flags) for name, (program, *flags) in runs.items()}
        gains.append([found[first][0] / found[name][0] for name in others])
        cells = [f"{seconds:.3f}" for seconds, _ in found.values()] + [f"{gain:.2f}" for gain in gains[-1]]
        memory = ", ".join(f"{peak:.1f}" for _, peak in found.values() if peak)
        print(f"| {' | '.join([str(batch), *cells, memory])} |", flush=True)
    medians = [statistics.median(gain) for gain in zip(*gains, strict=True)]
    said = ", ".join(f"{name} {gain:.2f} times the steps/s" for name, gain in zip(others, medians, strict=True))
    print(f"\nbatch {batch}, median of {args.pairs}, over {first}: {said}")
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
