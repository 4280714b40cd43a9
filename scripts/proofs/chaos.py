#!/usr/bin/env python
"""Kill the trainer at random moments, resume it until it is done, and compare: each run must end as an undisturbed one.

    python scripts/proofs/chaos.py                           # 20 runs on one process; exit code 0 if all are equal
    python scripts/proofs/chaos.py --processes 2 --runs 5    # on two
    python scripts/proofs/chaos.py --runs 3 --streaming      # what it does not know goes to the trainer

A kill is SIGKILL to the launcher and all that it started, after a random time in the loop. Equal are the LoRA (keys, tensors
to the bit, metadata) and of log.jsonl the losses, gradient norms and learning rates. It is said what each kill fell in: a save,
where its unfinished folder is there; a validation, where its picture is missing; the end, where all steps are done; else a step.
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

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE, DRAW = 15, 2, 3  # of a run, between checkpoints, between validations
SETTINGS = (
    "--lora_rank 4 --learning_rate 1e-3 --lr_scheduler cosine --ema_decay 0.9 --lora_dropout 0.1 --random_flip "
    f"--train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps {STEPS} --max_train_samples 50 --logging_steps 1 "
    f"--checkpointing_steps {SAVE} --checkpoints_total_limit 2 --validation_steps {DRAW} --report_to none"
).split()


def parse_args(argv=None):
    """The command line; the rest of it is for the trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--family", choices=["sd15", "sdxl"], default="sd15", help="trainer and demo teacher")
    add("--runs", type=int, default=20)
    add("--kills", type=int, default=4, help="of each run at most; it may be done before")
    add("--processes", type=int, default=1, help="that one run trains on")
    add(
        "--jobs",
        type=int,
        help="runs at a time (default: 2, one where a run has several processes)",
    )
    add("--seed", type=int, default=0, help="of the random moments")
    args, args.more = parser.parse_known_args(argv)
    args.jobs = args.jobs or (2 if args.processes == 1 else 1)
    return args


def start(out, args):
    """The trainer, resuming what there is in `out`; its text goes to a file beside."""
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
    ]
    launcher += [
        "--dynamo_backend",
        "no",
        "--num_processes",
        args.processes,
        "--main_process_port",
        0,
    ]
    command = [
        sys.executable,
        *(launcher if args.processes > 1 else []),
        ROOT / f"train_lcm_lora_{args.family}.py",
    ]
    command += [
        "--pretrained_teacher_model",
        ROOT / f"demo/teacher-{args.family}",
        "--dataset_name",
        ROOT / "demo/data",
    ]
    command += [*SETTINGS, "--validation_prompts", "red apple, noto style", *args.more]
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
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line[-1] == "\n"]
        if file.exists()
        else []
    )


def last_step(out):
    """The last step in log.jsonl, 0 without one."""
    return max([row["step"] for row in rows(out)], default=0)


def written(path):
    """When a file was last written, 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0


def moment(out, began, first):
    """What a run was doing when it was killed, that wrote args.json at `began` and went on after step `first`."""
    step = last_step(out)
    if any(written(part) >= began for part in out.glob("*.part")):
        return step, "save"
    saved = step % SAVE or written(out / f"checkpoint-{step}") >= began
    drawing = (
        step > first
        and step % DRAW == 0
        and written(out / f"validation/step-{step:06}.png") < began
    )
    return step, "validation" if drawing and saved else "step" if step < STEPS else "end"


def attempt(out, args, after=None):
    """One start of the trainer: how long its loop ran and, if it was killed `after` so many seconds of it, in what."""
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
        raise SystemExit(f"exit code {code}: {out}.txt\n{Path(f'{out}.txt').read_text()[-2000:]}")
    return time.monotonic() - clock, None


def disturbed(out, args, seconds, seed):
    """A run that is killed at random moments until it is done: [(step, in what)]. Its undisturbed loop takes `seconds`."""
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
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def differences(out, other):
    """In what two runs differ."""
    (ours, about), (theirs, of_theirs) = lora(out), lora(other)
    found = ["metadata"] * (about != of_theirs) + ["keys"] * (ours.keys() != theirs.keys())
    found += [
        key for key in ours.keys() & theirs.keys() if not torch.equal(ours[key], theirs[key])
    ][:3]
    columns = ("step", "loss", "grad_norm", "lr", "skipped")
    logs = [[[row[name] for name in columns] for row in rows(folder)] for folder in (out, other)]
    return found + ["log.jsonl"] * (logs[0] != logs[1])


def main(argv=None):
    """Run and report; the exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        whole, falls, equal = Path(folder, "undisturbed"), Counter(), 0
        seconds, _ = attempt(whole, args)
        print(
            f"undisturbed: {last_step(whole)} steps, a loop of {seconds:.0f} s on {args.processes} processes",
            flush=True,
        )
        outs = [Path(folder, f"run-{i}") for i in range(args.runs)]
        seeds = [args.seed + i for i in range(args.runs)]
        for out, moments in zip(
            outs,
            pool.map(lambda pair: disturbed(pair[0], args, seconds, pair[1]), zip(outs, seeds)),
        ):
            found = differences(out, whole)
            falls.update(kind for _, kind in moments)
            equal += not found
            killed = ", ".join(f"{kind} after {step}" for step, kind in moments)
            verdict = f"differs in {', '.join(found)}" if found else "equal"
            print(f"{out.name}: {len(moments)} kills ({killed}): {verdict}", flush=True)
    shares = ", ".join(f"{falls[kind]} in {kind}" for kind in ("step", "save", "validation", "end"))
    print(
        f"{equal} of {args.runs} runs are equal to the undisturbed one, after {falls.total()} kills: {shares}"
    )
    return 0 if equal == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
