#!/usr/bin/env python
"""Kill the trainer at random moments and resume it: each run must end as an undisturbed one does.

    python scripts/proofs/chaos.py                           # 20 runs; exit code 0 if all are equal
    python scripts/proofs/chaos.py --processes 2 --runs 5    # of two processes each
    python scripts/proofs/chaos.py --runs 3 --streaming      # unknown flags go to the trainer

A kill is SIGKILL to the launcher and all that it started, after a random time in the loop. Equal
are the LoRA (keys, tensors to the bit, metadata) and of log.jsonl the losses, gradient norms and
learning rates. The report says what each kill fell in: a save, if its unfinished folder is there; a
validation, if its image is missing; the end, if all steps are done; else a step.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE, VALIDATE = 15, 2, 3  # of a run, between checkpoints, between validations
SETTINGS = (
    "--lora_rank 4 --learning_rate 1e-3 --lr_scheduler cosine --ema_decay 0.9 --lora_dropout 0.1 "
    "--random_flip --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_samples 50 "
    f"--max_train_steps {STEPS} --report_to none --validation_steps {VALIDATE} "
    f"--checkpointing_steps {SAVE} --checkpoints_total_limit 2"
).split()
LAUNCHER = (
    "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0 --num_processes"
).split()


def parse_args(argv=None):
    """The command line; the rest of it is for the trainer."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags] [FLAGS-OF-THE-TRAINER]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    families = ["sd15", "sdxl"]
    add("--family", choices=families, default="sd15", help="trainer and demo teacher")
    add("--runs", **count, default=20, help="runs to disturb")
    add("--kills", **count, default=4, help="of each run at most; it may be done before")
    add("--processes", **count, default=1, help="processes of a run")
    jobs = "runs at a time (default: 2, or 1 where a run has several processes)"
    add("--jobs", **count, help=jobs)
    add("--seed", **count, default=0, help="seed of the random moments")
    args, args.more = parser.parse_known_args(argv)
    args.jobs = args.jobs or (2 if args.processes == 1 else 1)
    return args


def start(out, args):
    """The trainer, resuming what there is in `out`; its text goes to a file beside."""
    command = [sys.executable, *([*LAUNCHER, args.processes] if args.processes > 1 else [])]
    command += [ROOT / f"train_lcm_lora_{args.family}.py", *SETTINGS]
    command += ["--pretrained_teacher_model", ROOT / f"demo/teacher-{args.family}"]
    command += ["--dataset_name", ROOT / "demo/data"]
    command += ["--validation_prompts", "red apple, noto style", *args.more]
    command += ["--resume_from_checkpoint", "latest", "--output_dir", out]
    with open(f"{out}.txt", "ab") as text:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*map(str, command)], stdout=text, stderr=text, env=one_thread)


def kill(pid):
    """End a process and all that it started, none of which gets to do anything more."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for signal in (psutil.Process.suspend, psutil.Process.kill):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                signal(process)
    psutil.wait_procs(family[1:])


def rows(out):
    """What log.jsonl has, up to a line that a kill cut."""
    file = Path(out, "log.jsonl")
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line[-1] == "\n"]


def last_step(out):
    """The last step in log.jsonl, 0 without one."""
    return max([row["step"] for row in rows(out)], default=0)


def written(path):
    """When a file was last written, 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0


def moment(out, began, first):
    """In what a run was killed that wrote args.json at `began` and resumed after step `first`."""
    step = last_step(out)
    if any(written(part) >= began for part in out.glob("*.part")):
        return step, "save"
    saved = step % SAVE or written(out / f"checkpoint-{step}") >= began
    image = out / f"validation/step-{step:06}.png"
    validating = step > first and step % VALIDATE == 0 and written(image) < began
    return step, "validation" if validating and saved else "step" if step < STEPS else "end"


def attempt(out, args, after=None):
    """One start of the trainer: (seconds of its loop, in what it was killed `after` so many)."""
    file = out / "args.json"  # written where the loop begins
    before, process = written(file), start(out, args)
    while written(file) == before and process.poll() is None:
        time.sleep(0.005)
    began, first, clock = written(file), last_step(out), time.monotonic()
    try:
        code = process.wait(after)
    except subprocess.TimeoutExpired:
        kill(process.pid)
        process.wait()
        return after, moment(out, began, first)
    if code:
        text = Path(f"{out}.txt").read_text()
        raise SystemExit(f"exit code {code}: {out}.txt\n{text[-2000:]}")
    return time.monotonic() - clock, None


def disturbed(out, args, seconds, seed):
    """A run killed at random moments until it is done: [(step, in what)].

    An undisturbed loop takes `seconds`.
    """
    moments, chance = [], random.Random(seed)
    while len(moments) < args.kills:
        _, killed = attempt(out, args, chance.uniform(0, seconds / 2))
        if not killed:
            return moments
        moments.append(killed)
    attempt(out, args)
    return moments


def lora(out):
    """(Tensors, metadata) of a run's LoRA."""
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata() | {"ss_output_name": ""}  # the folder's, in which runs may differ
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118


def differences(out, other):
    """In what two runs differ."""
    (ours, about), (theirs, of_theirs) = lora(out), lora(other)
    found = ["metadata"] * (about != of_theirs) + ["keys"] * (ours.keys() != theirs.keys())
    common = ours.keys() & theirs.keys()
    found += [key for key in common if not torch.equal(ours[key], theirs[key])][:3]
    columns = ("step", "loss", "grad_norm", "lr", "skipped")
    logs = [[[row[name] for name in columns] for row in rows(folder)] for folder in (out, other)]
    return found + ["log.jsonl"] * (logs[0] != logs[1])


def main(argv=None):
    """Run and report; the exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        whole, falls, equal = Path(folder, "undisturbed"), Counter(), 0
        seconds, _ = attempt(whole, args)
        loop = f"{last_step(whole)} steps, a loop of {seconds:.0f} s on {args.processes} processes"
        print(f"undisturbed: {loop}", flush=True)
        outs = [Path(folder, f"run-{i}") for i in range(args.runs)]
        jobs = [(out, args, seconds, args.seed + i) for i, out in enumerate(outs)]
        for out, moments in zip(outs, pool.map(lambda job: disturbed(*job), jobs)):
            found = differences(out, whole)
            falls.update(kind for _, kind in moments)
            equal += not found
            killed = ", ".join(f"{kind} after {step}" for step, kind in moments)
            verdict = f"differs in {', '.join(found)}" if found else "equal"
            print(f"{out.name}: {len(moments)} kills ({killed}): {verdict}", flush=True)
    kinds = "step", "save", "validation", "end"
    shares = ", ".join(f"{falls[kind]} in {kind}" for kind in kinds)
    runs = f"{equal} of {args.runs} runs are equal to the undisturbed one"
    print(f"{runs}, after {falls.total()} kills: {shares}")
    return 0 if equal == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
