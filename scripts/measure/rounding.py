#!/usr/bin/env python
"""How far bf16 and fp16 round what the loss measures, beside its size; on a CPU or a GPU.

    python scripts/measure/rounding.py --model demo/teacher-sd15 --dataset_name demo/data --phases 1

The loss is a distance of two outputs, f_student - f_target, that are nearly the same: a step apart
on one path. Rounding is that of the large numbers they are made from, however small their
difference is. A row has the root mean square of the difference at a timestep, in float32, and that
of the change which half precision makes to it.

All of it is the trainer's own: images, latents, noise, guidance scales, the three passes of the
UNet and the loss, of which only the distance is left out. The LoRA is that of step 0: the student
is the teacher. What is random is the same in each row and precision, and so are latents and
embeddings, made in float32. Other flags are the trainer's: --train_batch_size is how many images.
"""

import argparse
import importlib
import sys
from unittest import mock

import torch
from random_training import ROOT, describe, fail

sys.path.insert(0, str(ROOT / "scripts"))
from help_formatter import HelpFormatter

PRECISIONS = "no", "bf16", "fp16"


def make_run(trainer, args, precision, device):
    """The trainer's Run of step 0 with its weights in a precision, as far as a loss needs one."""
    run = trainer.Run()
    run.pipe = pipe = trainer.load_teacher(args, trainer.DTYPES[precision])
    trainer.check_teacher(pipe, args)
    run.schedule = trainer.NoiseSchedule(pipe.scheduler.config, device)
    steps = trainer.ddim_timesteps(args.num_ddim_timesteps, len(run.schedule.alpha))
    run.timesteps, run.teacher = steps.to(device), pipe.unet
    run.student = run.target = trainer.make_student(pipe, args, device)
    return run


def differences(model, flags, timesteps=None):
    """{timestep: {precision: f_student - f_target, [B,4,h,w]}}; `flags` are the trainer's words.

    At `timesteps`, or at all of the solver's.
    """
    trainer = importlib.import_module(f"train_lcm_lora_{describe(model)[0]}")
    trainer.__file__ = __file__  # the name in its messages
    trainer.quiet_libraries()
    flags = ["--pretrained_teacher_model", model, "--max_train_steps", "1", *flags]
    args, made = trainer.parse_args(flags), {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision in PRECISIONS:
        run = make_run(trainer, args, precision, device)
        if precision == "no":
            batch = next(iter(trainer.make_loader(trainer.load_records(args), {}, args, 0, 0, 1)))
            z, c, noise, _, omega = trainer.sample_batch(run, batch, args)
            null = trainer.encode_captions(run.pipe, [args.negative_prompt], args.max_prompt_chunks)
            known = run.timesteps.tolist()
            if unknown := {*(timesteps or [])} - {*known}:
                fail(f"--timesteps {min(unknown)}: give some of {', '.join(map(str, known))}")
            timesteps = timesteps or known
        # in the precision of the UNet, as embeddings of encoded data are
        given, run.c_null = (trainer.conditions(run.pipe, some, device, 1) for some in (c, null))
        for t in timesteps:
            t_nk = torch.full((len(z),), t, device=device)
            with torch.no_grad(), mock.patch.object(trainer, "distance", lambda a, b, *_: a - b):
                e = trainer.distillation_loss(run, z, given, noise, t_nk, omega, args)
            made.setdefault(t, {})[precision] = e
    return made


def rms(x):
    """The root mean square of a tensor's elements."""
    return x.square().mean().sqrt().item()


def report(made):
    """The table of `differences` in Markdown; a share is of the signal."""
    yield "| t | signal | bf16 error | share | fp16 error | share |"
    yield "|---" + "|---:" * 5 + "|"
    for t, of in made.items():
        signal = rms(of["no"])
        errors = [rms(of[precision] - of["no"]) for precision in PRECISIONS[1:]]
        cells = " | ".join(f"{error:.4f} | {error / signal:.3f}" for error in errors)
        yield f"| {t} | {signal:.4f} | {cells} |"


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model TEACHER] [--timesteps T ...] DATA [flags of the trainer]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.error, default = fail, str(ROOT / "demo/teacher-sd15")
    parser.add_argument("--model", metavar="TEACHER", default=default, help="folder of a teacher")
    what = "timesteps of the solver (default: all)"
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help=what)
    args, flags = parser.parse_known_args(argv)
    print(*report(differences(args.model, flags, args.timesteps)), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
