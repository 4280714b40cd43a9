#!/usr/bin/env python
"""How much faster a training step is with cached latents and text embeddings: pairs of runs on a demo teacher, in turn.

    python scripts/cache_speed.py                   # exit code 0 if the median pair gains 1.3 times or more
    python scripts/cache_speed.py --family sdxl --pairs 3 --steps 20

Each pair is the trainer without caches and with both, in processes of their own; the caches are filled before the first pair, and
the time of a step is the median of those that log.jsonl has after a warm-up.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=["sd15", "sdxl"], default="sd15", help="trainer and demo teacher")
    add("--pairs", type=int, default=5)
    add("--steps", type=int, default=20, help="optimizer steps that are timed in a run")
    add("--batch_size", type=int, default=16)
    add("--lora_rank", type=int, default=8, help="8 is to the demo's width what 64 is to that of SD 1.5 and SDXL")
    add("--at_least", type=float, default=1.3, help="gain of the median pair that exit code 0 stands for")
    return parser.parse_args(argv)


def run(args, folder, *flags):
    """Train; steps per second, 0 where nothing was trained."""
    out = Path(folder, "out")
    command = [sys.executable, ROOT / f"train_lcm_lora_{args.family}.py", "--report_to", "none", "--logging_steps", "1"]
    command += [
        "--pretrained_teacher_model",
        ROOT / f"demo/teacher-{args.family}",
        "--dataset_name",
        ROOT / "demo/data",
    ]
    command += ["--train_batch_size", args.batch_size, "--max_train_steps", WARM_UP + args.steps, "--output_dir", out]
    command += ["--lora_rank", args.lora_rank, "--center_crop", "--cache_dir", Path(folder, "cache"), *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    if "--cache_only" in flags:
        return 0
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return statistics.median(row["images_per_s"] for row in rows[WARM_UP:]) / args.batch_size


def main(argv=None):
    """Measure and report; the exit code."""
    args = parse_args(argv)
    caches = ["--cache_latents", "--cache_text_embeddings"]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, demo/teacher-{args.family}, rank {args.lora_rank}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        run(args, folder, *caches, "--cache_only")
        gains = []
        for i in range(args.pairs):
            plain, cached = run(args, folder), run(args, folder, *caches)
            gains.append(cached / plain)
            print(f"pair {i + 1}: {plain:.3f} and {cached:.3f} steps/s, {gains[-1]:.2f} times", flush=True)
    median = statistics.median(gains)
    print(f"median of {len(gains)} pairs: cached is {median:.2f} times as fast")
    return 0 if median >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
