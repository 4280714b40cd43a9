"""Which settings are worth it? Train LCM-LoRAs that differ in one, and measure them together.

    python scripts/demo/ablation.py default --seed 0 1 2
    python scripts/demo/ablation.py phases-1 rank-8 --family sdxl
    python scripts/demo/ablation.py

A row is the demo's quickstart but for the flags in QUESTIONS. Rows are trained one after the other
on data that are encoded once. Then they, or all in --output where none is named, are measured by
evaluate.py's ruler against the teacher's converged images, at the same prompts and noise, and each
is compared with `default` of the same seeds. Figures of several seeds are their mean; brackets are
95% intervals over prompts. --output gets, for each family, README.md with the tables, figures.csv
and plot.png. The same command goes on where it was stopped; other rows may be trained beside it
into the same folder.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
import datasets
import evaluate
import matplotlib
from help_formatter import HelpFormatter, command_line, given_path
from metrics import estimate, show, table
from studio import ROOT, provenance, quiet_libraries

matplotlib.use("Agg")
from matplotlib import pyplot

# The quickstart's training, on encoded data (tests compare it with quickstart.sh)
RECIPE = """--mixed_precision no --lora_rank 32 --learning_rate 1e-3 --lr_scheduler cosine
    --w_min 3 --w_max 3 --loss_units output --train_batch_size 16 --max_train_steps 600""".split()
GUIDANCE, STEPS = "4", (1, 2, 4, 8)  # 1 + omega
REFERENCE = "40"  # steps, beyond which little changes
FIGURES = ("kid", "features", "latents", "detail", "recognised")
# {question: {setting: flags that differ from the recipe; none: the recipe's own setting}}
QUESTIONS = {
    "phases": {
        "1-n10": "--phases 1 --num_ddim_timesteps 10",
        "1": "--phases 1 --num_ddim_timesteps 40",
        "2": "--phases 2 --num_ddim_timesteps 40",
        "4": "--phases 4 --num_ddim_timesteps 40",
        "8": "--phases 8 --num_ddim_timesteps 40",
        "8-4-2": "--phases 8,4,2 --num_ddim_timesteps 40",
        "8-4-2-1": "",
    },
    "n": {n: f"--num_ddim_timesteps {n}" if n != "40" else "" for n in "10 20 40 80".split()},
    "omega": {"3": "", "2 to 4": "--w_min 2 --w_max 4", "3 to 15": "--w_min 3 --w_max 15"},
    "loss": {
        "output": "",
        "x0": "--loss_units x0",
        "c = 0.01": "--huber_c 0.01",
        "c = 0.1": "--huber_c 0.1",
        "l2": "--loss_type l2",
    },
    "rank": {
        rank: f"--lora_rank {rank}" if rank != "32" else "" for rank in "4 8 16 32 64".split()
    },
    "rate": {
        "1e-4": "--learning_rate 1e-4",
        "3e-4": "--learning_rate 3e-4",
        "1e-3": "",
        "3e-3": "--learning_rate 3e-3",
    },
    "ema": {"none": "", "0.99": "--ema_decay 0.99"},
    "empty": {"0": "", "0.1": "--proportion_empty_prompts 0.1"},
    "steps": {
        steps: f"--max_train_steps {steps}" if steps != "600" else ""
        for steps in "75 150 300 600 1200".split()
    },
    "images": {
        "100": "--max_train_samples 100",
        "300": "--max_train_samples 300",
        "1000": "--max_train_samples 1000",
        "2529": "",
    },
    "data": {"images": "", "generated": "--dataset_name {generated}"},
}
DEFAULT = "default"


def row_of(question, setting):
    """The name of a row, as on the command line and of its folder."""
    return f"{question}-{setting}".replace(" ", "") if QUESTIONS[question][setting] else DEFAULT


FLAGS = {DEFAULT: ""} | {
    row_of(question, setting): flags
    for question, settings in QUESTIONS.items()
    for setting, flags in settings.items()
}


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [ROW ...] [--family FAMILY] [--seed N ...] [--output FOLDER] [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, count = parser.add_argument, {"type": evaluate.infer.number(int, 1, 10**6)}
    add("rows", nargs="*", metavar="ROW", help=f"to train: {', '.join(FLAGS)}")
    add("--family", choices=["sd15", "sdxl"], default="sd15", help="of the demo teacher")
    add("--seed", type=int, nargs="+", default=[0], metavar="N", help="of training")
    add("--num_prompts", **count, default=500, metavar="N", help="to measure with")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--only_train", action="store_true", help="and measure nothing yet")
    only("--only_measure", action="store_true", help="what was trained of the rows")
    folder = {"type": given_path, "metavar": "FOLDER"}
    add("--output", **folder, default=Path("outputs/ablation"), help="gets LoRAs and reports")
    args = parser.parse_args(command_line(argv))
    if unknown := {*args.rows} - {*FLAGS}:
        evaluate.infer.fail(f"{min(unknown)!r:.80} is no row: give {', '.join(FLAGS)}")
    args.folder = args.output / args.family
    return args


def run(program, *words):
    """Run one of the project's programs; its own message is enough where it fails."""
    command = [sys.executable, str(ROOT / program), *map(str, words)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def data_of(args, kind):
    """The folder of encoded images, or of images generated from their captions; made if needed."""
    folder = args.folder / kind
    flags = ["--family", args.family, "--pretrained_teacher_model", teacher_of(args)]
    flags += ["--mixed_precision", "no", "--output", folder]
    if not (folder / "state.json").exists():
        if kind == "encoded":
            data = ["--dataset_name", ROOT / "demo/data", "--center_crop"]
            run("scripts/encode_data.py", *flags, *data)
        else:
            prompts = args.folder / "captions.txt"
            images = datasets.Dataset.from_parquet(str(ROOT / "demo/data/train.parquet"))
            prompts.write_text("\n".join(images.shuffle(seed=0)["text"]) + "\n")
            flags += ["--prompts_file", prompts, "--num_images", 1280, "--w_min", 3, "--w_max", 3]
            run("scripts/generate_data.py", *flags, "--batch_size", 32)
    return folder


def teacher_of(args):
    """The demo teacher of the family."""
    return ROOT / f"demo/teacher-{args.family}"


def train(args, row, seed):
    """Train a row, or go on with it."""
    flags = FLAGS[row].split()
    kind = "generated" if "{generated}" in flags else "encoded"
    flags = [flag.format(generated=data_of(args, kind)) for flag in flags]
    data = ["--dataset_name", data_of(args, kind)] if kind == "encoded" else []
    same = ["--pretrained_teacher_model", teacher_of(args), *data, *RECIPE]
    same += ["--center_crop", "--report_to", "none", "--resume_from_checkpoint", "latest"]
    own = ["--seed", seed, "--output_dir", args.folder / f"{row}-seed{seed}"]
    run(f"train_lcm_lora_{args.family}.py", *same, *flags, *own)


def trained(args):
    """{row: {seed: folder}} of complete LoRAs, of the rows that are named or of all."""
    found = {}
    for row in FLAGS:
        if args.rows and row not in [DEFAULT, *args.rows]:
            continue
        for folder in sorted(args.folder.glob(f"{row}-seed*")):
            seed = re.fullmatch(rf"{re.escape(row)}-seed(\d+)", folder.name)
            if seed and (folder / evaluate.infer.WEIGHTS_NAME).is_file():
                found.setdefault(row, {})[int(seed[1])] = folder
    return found


def measure(args, found):
    """({(row, seed, steps): figures}, the same of DPM-Solver++ by its steps): evaluate.py's."""
    folders = [folder for seeds in found.values() for folder in seeds.values()]
    words = ["--base", teacher_of(args), "--data", ROOT / "demo/data", "--lora", *folders]
    words += ["--guidance_scale", GUIDANCE, "--steps", *STEPS, "--num_prompts", args.num_prompts]
    words += ["--reference_steps", REFERENCE, "--check_prompts", "0", "--batch_size", "64"]
    words += ["--output", args.folder]
    ruler_args = evaluate.parse_args([*map(str, words)])
    *_, columns, _, measured = evaluate.measured_columns(ruler_args)
    places = {folder: (row, seed) for row, seeds in found.items() for seed, folder in seeds.items()}
    ours, solver = {}, {}
    for role, figures in measured.items():
        if role == "floor" or role[0] == evaluate.SOLVER:
            solver[role if role == "floor" else role[1]] = figures
        elif isinstance(role, tuple):
            ours[*places[columns[role].lora.path.parent], role[2]] = figures
    return ours, solver


def mean(ours, figure, row, steps, seeds):
    """Mean over seeds of a figure over the resamples, [1 + R]."""
    return torch.stack([ours[row, seed, steps][figure] for seed in seeds]).mean(0)


def summarise(found, ours, solver):
    """Rows of figures.csv: what, seeds, steps, figure, value, low, high."""
    lines = []

    def add(what, seeds, steps, figure, values):
        lines.append([what, seeds, steps, figure, *estimate(values).values()])

    for steps, figures in solver.items():
        for figure in FIGURES:
            add(evaluate.SOLVER, 0, steps, figure, figures[figure])
    for row, seeds in found.items():
        paired = sorted({*seeds} & {*found.get(DEFAULT, {})})
        for steps in STEPS:
            for figure in FIGURES:
                own = mean(ours, figure, row, steps, seeds)
                add(row, len(seeds), steps, figure, own)
                if steps in solver:
                    other = solver[steps][figure]
                    add(row, len(seeds), steps, f"{figure}, less {evaluate.SOLVER}'s", own - other)
                if row != DEFAULT and paired:
                    own = mean(ours, figure, row, steps, paired)
                    other = mean(ours, figure, DEFAULT, steps, paired)
                    add(row, len(paired), steps, f"{figure}, less default's", own - other)
            kids = [ours[row, seed, steps]["kid"][0].item() for seed in seeds]
            spread = [sum(kids) / len(kids), min(kids), max(kids)]
            lines.append([row, len(seeds), steps, "kid, of the seeds", *spread])
    return lines


def report(args, argv, found, lines):
    """README.md with a table of the figures and two of differences; figures.csv; plot.png."""
    cells = {
        (what, steps, figure): dict(zip(("value", "low", "high"), values))
        for what, _, steps, figure, *values in lines
    }

    def shown(what, figure, steps):
        _, factor, digits = evaluate.FIGURES[figure.partition(",")[0]]
        cell = cells.get((what, steps, figure))
        return show(cell, factor, digits) if cell else ""

    def at_all(what, figure):
        return [shown(what, figure, steps) for steps in STEPS]

    names = [evaluate.FIGURES[figure][0] for figure in FIGURES[1:]]
    steps = [f"{steps} step{'s' * (steps > 1)}" for steps in STEPS]
    rows = [
        [
            what,
            f"`{FLAGS[what]}`" if FLAGS.get(what) else "",
            len(found.get(what, "")) or "",
            *at_all(what, "kid"),
            *(shown(what, figure, 4) for figure in FIGURES[1:]),
        ]
        for what in [evaluate.SOLVER, *found]
    ]
    others = [row for row in found if row != DEFAULT]
    from_default = [[row, *at_all(row, "kid, less default's")] for row in others]
    from_solver = [[row, *at_all(row, f"kid, less {evaluate.SOLVER}'s")] for row in found]
    seeds = [[row, *at_all(row, "kid, of the seeds")] for row in found if len(found[row]) > 1]
    text = f"""# Ablation on `demo/teacher-{args.family}`

{provenance(argv, "scripts/demo/ablation.py")}
KID x 1000 to the teacher's images (DPM-Solver++ in {REFERENCE} steps, guidance {GUIDANCE}),
{args.num_prompts} prompts, mean of the seeds; other figures in 4 steps. Brackets are 95% intervals
over prompts. {evaluate.SOLVER} takes two UNet passes a step, the LoRAs one.

{table(["", "flags", "seeds", *steps, *names], rows)}
KID x 1000 less the default's, at the same prompts, noise and seeds of training:

{table(["", *steps], from_default)}
KID x 1000 less {evaluate.SOLVER}'s in as many steps:

{table(["", *steps], from_solver)}
KID x 1000: mean of the seeds [least, most]:

{table(["", *steps], seeds)}"""
    evaluate.write_whole(args.folder / "README.md", text)
    with open(args.folder / "figures.csv", "w", newline="") as file:
        csv.writer(file).writerows([["row", "seeds", "steps", "figure", "value", "low", "high"]])
        csv.writer(file).writerows(lines)
    plot(args, cells, found)
    print(text)


def plot(args, cells, found):
    """plot.png: KID x 1000 in 2, 4 and 8 steps by setting, a panel for each question."""
    shown = {
        question: there
        for question, settings in QUESTIONS.items()
        if len(there := [s for s in settings if row_of(question, s) in found]) > 1
    }
    columns = 3
    figure, panels = pyplot.subplots(
        -(-len(shown) // columns), columns, figsize=(11, 2.8 * -(-len(shown) // columns)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    for panel, (question, settings) in zip(panels.flat, shown.items()):
        for steps in STEPS[1:]:
            kids = [cells[row_of(question, s), steps, "kid"] for s in settings]
            places, values = range(len(settings)), [1000 * kid["value"] for kid in kids]
            errors = [[1000 * (kid["value"] - kid["low"]) for kid in kids],
                      [1000 * (kid["high"] - kid["value"]) for kid in kids]]  # fmt: skip
            panel.errorbar(places, values, errors, marker="o", capsize=3, label=f"{steps} steps")
        labels = [s if QUESTIONS[question][s] else f"{s}*" for s in settings]
        panel.set_xticks(range(len(settings)), labels, fontsize=8)
        panel.set_yscale("log")
        panel.set_title(question)
        panel.grid(axis="y", alpha=0.4)
    if shown:
        panels[0, 0].legend()
        panels[0, 0].set_ylabel("KID x 1000 (*: the default)")
    figure.savefig(args.folder / "plot.png", dpi=80)
    pyplot.close(figure)


@torch.no_grad()
def main(argv=None):
    """Train the rows that are named, then measure all."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    args = parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for row in () if args.only_measure else args.rows:
        for seed in args.seed:
            train(args, row, seed)
    if args.only_train:
        return 0
    found = trained(args)
    if not found:
        evaluate.infer.fail(f"{args.folder}: no LoRA there yet: name a row to train")
    lines = summarise(found, *measure(args, found))
    report(args, argv, found, lines)
    return 0


if __name__ == "__main__":
    sys.excepthook = evaluate.infer.last_words
    sys.exit(main())
