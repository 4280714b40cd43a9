#!/usr/bin/env python
"""Let the teacher make the training data: prompts go in, no image is needed.

    python scripts/generate_data.py --family sd15 --pretrained_teacher_model MODEL \\
      --prompts_file prompts.txt --num_images 2000 --output my_generated
    accelerate launch train_lcm_lora_sd15.py --pretrained_teacher_model MODEL \\
      --dataset_name my_generated ...

Each image's latents are sampled by the teacher as the training uses it: the guided output of the
trainer, with its omega, negative prompt and rescale. Beside its own flags it takes those of the
training command. Prompts are the lines of a UTF-8 file (blank ones and comments by # are skipped),
the lines of a .jsonl file ({"prompt": ...}), or the captions of a data set; each counts once. Image
i of N has prompt i modulo the number of prompts; its noise and omega are functions of --seed and i.

The output is encoded data, a folder as scripts/encode_data.py describes it, with these latents:

    moments     float [2C, h, w]: the mean is the teacher's latents, the variance 0
    path        float16 [(N + 1) C, h, w] instead, with --trajectories: the teacher's path, at t = 0
                and at the N = --num_ddim_timesteps timesteps of the training, ascending, the last
                of them pure noise. A training on it needs no teacher
    size        int [2]: h, w, where images are not squares of --resolution; latents are then
                [h w, channels]. Batches take turns among the sizes of --aspect_ratio_buckets, in
                seeded order; without it a size that recipe.json of the teacher names is taken

A killed run goes on with the same command, bit for bit; `accelerate launch
scripts/generate_data.py ...` shares the files out among its processes.
"""

import argparse
import functools
import hashlib
import importlib
import io
import json
import shlex
import signal
import sys
import time
from pathlib import Path

import encode_data
from help_formatter import command_line, given_path

ROWS = 8  # batches in a file: a kill costs as many
STEP = 2**32  # of random numbers: no training has as many, and shares none
CACHED = 4096  # prompts whose embeddings are kept in memory
SHOWN, COLUMNS, CELL = 32, 8, 256  # images of the contact sheet, in a row; pixels
DATA = ("train_data_dir", "dataset_name", "train_shards_path_or_url")
LESS_MEMORY = (
    "lower --batch_size, or give --mixed_precision fp16, --quantize_base nf4 or --no-contact_sheet"
)
BETAS = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr"
).split()


def parse_args(argv=None):
    """The trainer, and its arguments with those of this program among them."""
    usage = "(--prompts_file FILE | DATA) [--num_images N] [--trajectories]"
    parser = encode_data.make_parser(__file__, __doc__, usage)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_file", type=given_path, metavar="FILE", help="a prompt a line")
    for flag in DATA:
        source.add_argument(f"--{flag}", metavar="DATA", help="its captions, no image is opened")
    add("--num_images", type=int, metavar="N", help="(default: one for each prompt)")
    add("--batch_size", type=int, default=8, metavar="IMAGES", help="sampled at once (default: 8)")
    add("--trajectories", action="store_true", help="keep the teacher's path, not only its end")
    kinds = ["dpm++", "ddim"]
    text = "of the teacher (default: dpm++, with --trajectories ddim, the training's own)"
    add("--solver", choices=kinds, help=text)
    text = "of the solver (default: 20 of dpm++, else --num_ddim_timesteps)"
    add("--solver_steps", type=int, metavar="STEPS", help=text)
    text = "make contact_sheet.png, of the first images (default: yes)"
    add("--contact_sheet", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "AutoencoderTiny that decodes it instead of the teacher's VAE"
    add("--tiny_vae", metavar="FOLDER", help=text)
    # answers --help before the libraries are loaded
    own, rest = parser.parse_known_args(command_line(argv))
    given = {flag: vars(own).pop(flag) for flag in DATA}
    flag = next((flag for flag in DATA if given[flag] is not None), "dataset_name")
    trainer, args = encode_data.read_trainer(
        __file__, own, [*rest, f"--{flag}={own.prompts_file or given[flag]}"]
    )
    if args.prompts_file:
        args.dataset_name = None
    args.training_flags = rest
    check_args(trainer, args)
    return trainer, args


def check_args(trainer, args):
    """Refuse what does not go together; the solver is then known."""
    encode_data.check_output(trainer, args)
    plain = not args.trajectories
    args.solver = args.solver or ("dpm++" if plain else "ddim")
    if args.solver_steps is None:
        args.solver_steps = 20 if plain and args.solver == "dpm++" else args.num_ddim_timesteps
    for flag, most in ("num_images", 10**7), ("batch_size", 10**4), ("solver_steps", 1000):
        if not 1 <= (1 if vars(args)[flag] is None else vars(args)[flag]) <= most:
            trainer.fail(f"--{flag} {vars(args)[flag]}: give a number from 1 to {most}")
    if args.random_flip:
        trainer.fail("--random_flip: generated images are not mirrored; leave it out")
    if args.proportion_empty_prompts and not plain:
        trainer.fail("--proportion_empty_prompts: a path is that of its prompt; leave it out")
    if args.target == "trajectory" and plain:  # else it is found out after all is made
        trainer.fail("--target trajectory is for data with --trajectories; give both or neither")
    if args.tiny_vae and not args.contact_sheet:
        trainer.fail("--tiny_vae is for the contact sheet; leave it or --no-contact_sheet out")


def read_prompts(trainer, args):
    """The distinct prompts; says what is left out."""
    if args.prompts_file:
        infer = importlib.import_module("infer")
        rows = infer.read_lines(args.prompts_file)
        if more := sorted({key for row in rows for key in row} - {"prompt"}):
            trainer.fail(
                f"--prompts_file {args.prompts_file}: only `prompt` is read, not {more[0]}"
            )
        texts, unusable = [row["prompt"].strip() for row in rows], []
        where = f"--prompts_file {args.prompts_file}"
    else:
        texts, unusable = read_captions(trainer, args)
        where = next(f"--{flag} {vars(args)[flag]}" for flag in DATA if vars(args)[flag])
    prompts = [text for text in dict.fromkeys(texts) if text]
    if not prompts:
        first = f", the first record: {unusable[0]}" if unusable else ""
        trainer.fail(f"{where}: it contains no prompt{first}")
    if trainer.this_rank() == "0":
        empty = texts.count("")
        left = f"{len(texts) - len(prompts) - empty} duplicates, {empty} empty ones"
        print(f"{len(prompts)} prompts; left out: {left}, {len(unusable)} unusable records")
        for why in unusable[:10]:
            print(f"warning: unusable: {why}", file=sys.stderr)
    return prompts


def read_captions(trainer, args):
    """All captions of the data, and why records have none; no image is read."""
    records, captions, unusable = trainer.load_records(args), [], []
    drop = {"image", args.image_column} - {args.caption_column}
    drop |= {*trainer.ENCODED} if trainer.encoded_folder(args) else set()
    records = records.remove_columns(sorted(drop & {*records.column_names}))
    is_list = isinstance(records, trainer.datasets.Dataset)  # else a stream
    with encode_data.or_end(trainer, "the data cannot be read to their end", "repair them"):
        for number, row in enumerate(range(len(records)) if is_list else records):
            try:
                with trainer.or_unusable(f"row {number}"):  # such as a text that is not UTF-8
                    fields = records[row] if is_list else row
                captions += trainer.to_record(fields, number, args)["captions"]
            except trainer.UnusableRecord as error:
                unusable.append(str(error))
    return captions, unusable


def find_sizes(trainer, args, resolution):
    """The sizes (height, width) of the images; `resolution` is what flag or recipe say."""
    if args.aspect_ratio_buckets is not None:
        return encode_data.find_buckets(trainer, args, args.factor)
    file = Path(args.pretrained_teacher_model, "recipe.json")
    recipe = json.loads(file.read_text("utf-8")) if file.is_file() and not resolution else {}
    height, width = (recipe.get(side, args.resolution) for side in ("height", "width"))
    if height % args.factor or width % args.factor:
        what = f"{file}: height {height} and width {width}"
        trainer.fail(f"{what}: give multiples of the VAE's factor, {args.factor}")
    return [(height, width)]


def solver_times(trainer, args, total):
    """The solver's timesteps, descending; with --trajectories those of the training among them."""
    steps, kept = args.solver_steps, args.num_ddim_timesteps
    if steps > total:
        trainer.fail(f"--solver_steps {steps}: the teacher has {total} timesteps")
    if not args.trajectories:  # "trailing": from t = total - 1, which is pure noise
        return [round(total * i / steps) - 1 for i in range(steps, 0, -1)]

    def contains(steps):
        """Whether a grid of so many steps has all points of the training's."""
        return total // steps > 1 and total // steps * (steps // kept) == total // kept

    if steps % kept or not contains(steps):
        fits = [many for many in range(kept, total, kept) if contains(many)][:6]
        advice = f"give one of {', '.join(map(str, fits))}" if fits else "give fewer of both"
        what = f"--solver_steps {steps} with --trajectories and --num_ddim_timesteps {kept}"
        trainer.fail(f"{what}: the path has to meet the training's timesteps; {advice}")
    return trainer.ddim_timesteps(steps, total).flip(0).tolist()


def load(trainer, args, accelerator):
    """The teacher, ready to be sampled: a Run with `times`, `solver` and `embed` too."""
    needs_vae = args.contact_sheet and not args.tiny_vae and accelerator.is_main_process
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    run, device = trainer.Run(), accelerator.device
    dtype, skip = trainer.DTYPES[args.mixed_precision], set() if needs_vae else {"vae"}
    run.pipe = pipe = trainer.load_teacher(args, dtype, skip)
    run.schedule = trainer.NoiseSchedule(pipe.scheduler.config, device)
    args.factor, resolution = pipe.vae_scale_factor, args.resolution
    trainer.check_teacher(pipe, args)
    args.prediction_type = run.schedule.prediction_type
    args.rescale_betas_zero_snr = bool(pipe.scheduler.config.rescale_betas_zero_snr)
    args.sizes = find_sizes(trainer, args, resolution)
    square = args.sizes == [(args.resolution, args.resolution)]
    args.buckets = None if square else args.sizes
    run.times = solver_times(trainer, args, len(run.schedule.alpha))
    betas = {name: pipe.scheduler.config[name] for name in BETAS}
    run.solver = trainer.diffusers.DPMSolverMultistepScheduler(**betas, final_sigmas_type="zero")
    run.vae = open_tiny_vae(trainer, args, pipe) if args.tiny_vae else pipe.vae
    encode_data.place_networks(trainer, pipe, args, device)
    run.teacher = pipe.unet
    null = {"caption": [args.negative_prompt]}
    run.c_null = trainer.conditions(pipe, null, device, args.max_prompt_chunks)
    embed = functools.partial(encode_data.embed, trainer, pipe, args=args)
    run.embed = functools.lru_cache(CACHED)(embed)
    return run


def open_tiny_vae(trainer, args, pipe):
    """The VAE of --tiny_vae, before hours are spent."""
    infer, kind = importlib.import_module("infer"), trainer.diffusers.AutoencoderTiny
    what = f"--tiny_vae {args.tiny_vae}"
    vae = infer.load_part(kind, what, args.tiny_vae, pipe.unet.dtype).eval()
    if (has := vae.config.latent_channels) != (needed := pipe.unet.config.in_channels):
        trainer.fail(f"{what}: for latents of {has} channels; the teacher's have {needed}")
    return vae


def warn_of_cut(trainer, run, prompts, args):
    """Say how many prompts are longer than what is read of them."""
    tokenizer, chunks = run.pipe.tokenizer, args.max_prompt_chunks
    cut = [
        text for text in prompts if "".join(trainer.split_prompt(text, tokenizer, chunks)) != text
    ]
    if cut:
        room = chunks * (tokenizer.model_max_length - 2)
        what = f"warning: {len(cut)} prompts are longer than {room} tokens and cut"
        print(f"{what} (--max_prompt_chunks), the first: {cut[0]:.60}", file=sys.stderr)


def make_stamp(trainer, args, prompts):
    """What the folder is made from; the trainer compares what a training on it depends on."""
    what = ["captions", "trajectories" if args.trajectories else "generated"]
    # with how the teacher is guided, in any case
    stamp = {"what": what} | trainer.make_stamp(args, [*what, "trajectories"])
    if not args.trajectories:
        del stamp["num_ddim_timesteps"]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    stamp |= {"records": args.num_images, "prompts": digest}
    names = "seed solver solver_steps batch_size quantize_base".split()
    return stamp | {name: vars(args)[name] for name in names}


def sample_path(trainer, run, z, c, omega, args):
    """The teacher's latents on its way from pure noise z [B,C,h,w]: a list, noise first.

    At run.times and at the end: the clean latents x0, of trajectories those at t = 0.
    """
    times, path = run.times + [0] * args.trajectories, [z]
    if args.solver == "dpm++":
        run.solver.set_timesteps(timesteps=times)  # forgets the batch before

    def whole(t):
        return trainer.torch.full((len(z),), t, device=z.device)

    for i, t in enumerate(run.times):
        output = trainer.guided_output(run, z, whole(t), c, omega, args)
        if args.solver == "dpm++":
            z = run.solver.step(output, t, z).prev_sample
        elif i + 1 < len(times):
            z = run.schedule.ddim_step(output, z, whole(t), whole(times[i + 1]))
        else:
            z, _ = run.schedule.x0_and_eps(output, z, whole(t))
        path.append(z)
    return path


def latents_of(trainer, run, path, args):
    """A path as a column of the output: its name and its values [B,n,h,w]."""
    torch = trainer.torch
    if args.trajectories:
        kept = path[:: args.solver_steps // args.num_ddim_timesteps]
        return "path", torch.cat(kept[::-1], dim=1).half()
    mean = path[-1] / run.pipe.vae.config.scaling_factor
    moments = torch.cat([mean, torch.full_like(mean, -30)], dim=1)  # a deviation of 3e-7
    return "moments", moments.half() if args.mixed_precision == "fp16" else moments


def generate_batch(trainer, run, prompts, batch, features, args):
    """Records of the output of one size: batch `batch` of all."""
    device, numbers = run.teacher.device, range(args.num_images)[batch * args.batch_size :]
    numbers = numbers[: args.batch_size]
    turn, place = divmod(batch, len(args.sizes))
    height, width = args.sizes[trainer.order_of(args.seed, turn, len(args.sizes))[place]]
    texts = [prompts[i % len(prompts)] for i in numbers]
    samples = [dict(run.embed(text)) for text in texts]
    if args.family == "sdxl":
        time_ids = trainer.torch.tensor([height, width, 0, 0, height, width])
        samples = [sample | {"time_ids": time_ids} for sample in samples]
    c = trainer.torch.utils.data.default_collate(samples)
    c = trainer.conditions(run.pipe, c, device, args.max_prompt_chunks)
    shape = (run.teacher.config.in_channels, height // args.factor, width // args.factor)
    noise = trainer.normal(args.seed, STEP, numbers, "noise", shape).to(device)
    omega = [trainer.rng(args.seed, STEP, i, "guidance") for i in numbers]
    omega = [one.uniform(args.w_min, args.w_max) for one in omega]
    omega = trainer.torch.tensor(omega, dtype=trainer.torch.float32, device=device)
    with trainer.torch.no_grad():
        path = sample_path(trainer, run, noise, c, omega[:, None, None, None], args)
        column, latents = latents_of(trainer, run, path, args)
    for i, text, sample, its in zip(numbers, texts, samples, latents.cpu(), strict=True):
        for name in {"prompt", "text_embeds"} & sample.keys():
            sample[name] = sample[name][None]  # a record may have several captions
        sample |= {"name": f"image {i}", "captions": [text], column: its}
        if args.buckets:
            encode_data.pack(sample)
        if not its.isfinite().all():
            what = f"image {i}: its latents are not finite; seed {args.seed}, prompt {text!r}"
            sample = {"name": f"image {i}", "captions": [text], "unusable": what}
        yield encode_data.to_row(trainer, sample, features)


def make_contact_sheet(trainer, run, args):
    """The first images, decoded, each over its prompt: a PNG file's bytes."""
    check_data = importlib.import_module("check_data")
    data = trainer.datasets.load_from_disk(str(args.output)).with_format("torch")
    numbers = [i for i, why in enumerate(data["unusable"]) if not why][:SHOWN]
    to_images = trainer.VaeImageProcessor().postprocess
    vae, channels, images, texts = run.vae, run.teacher.config.in_channels, [], []
    vae.to(run.teacher.device)
    for row in data.select(numbers):
        z = row["path" if args.trajectories else "moments"]
        z = z.T.unflatten(1, row["size"].tolist()) if "size" in row else z
        scale = 1 if args.trajectories else run.pipe.vae.config.scaling_factor
        z = z[None, :channels].to(vae.device).float() * scale / vae.config.scaling_factor
        with trainer.torch.no_grad():
            pixels = vae.decode(z.to(vae.dtype)).sample
        (image,) = to_images(pixels.float())
        image.thumbnail((CELL, CELL))
        images.append(image)
        texts += row["captions"]
    file = io.BytesIO()
    check_data.lay_out(images, texts, COLUMNS).save(file, "PNG")
    return file.getvalue()


def training_command(args):
    """The command of a training on the output: the trainer's flags of this one."""
    words = [f"train_lcm_lora_{args.family}.py", *args.training_flags]
    return shlex.join(["accelerate", "launch", *words, "--dataset_name", str(args.output)])


def generate(trainer, args, lock):
    """Generate what is not yet there."""
    args.report_to = "none"
    accelerator = trainer.make_accelerator(args)
    trainer.quiet_libraries()
    prompts = read_prompts(trainer, args)
    args.num_images = args.num_images or len(prompts)
    run = load(trainer, args, accelerator)
    encode_data.open_output(trainer, args, make_stamp(trainer, args, prompts), accelerator, lock)
    if accelerator.is_main_process:
        encode_data.write_prompts(trainer, run.pipe, args)
        warn_of_cut(trainer, run, [args.negative_prompt, *prompts], args)
    accelerator.wait_for_everyone()
    channels, side = run.teacher.config.in_channels, args.resolution // args.factor
    dtype = trainer.torch.float16 if args.mixed_precision == "fp16" else trainer.torch.float32
    latents = {"moments": ((2 * channels, side, side), dtype)}
    if args.trajectories:
        shape = ((args.num_ddim_timesteps + 1) * channels, side, side)
        latents = {"path": (shape, trainer.torch.float16)}
    features = encode_data.features_of(trainer, args, latents, True)

    def make(numbers):
        """The rows with these numbers: whole batches, so that a file is always made alike."""
        for batch in range(numbers[0] // args.batch_size, numbers[-1] // args.batch_size + 1):
            yield from generate_batch(trainer, run, prompts, batch, features, args)

    start, count, size = time.monotonic(), args.num_images, ROWS * args.batch_size
    made = encode_data.make_files(
        trainer, args, accelerator, count, size, features, make, "generated"
    )
    seconds = time.monotonic() - start
    if accelerator.is_main_process:
        sheet = args.output / "contact_sheet.png"
        if args.contact_sheet and not sheet.exists():
            advice = "the data are whole; --no-contact_sheet leaves it out"
            with encode_data.or_end(trainer, f"{sheet}: it cannot be made", advice):
                encode_data.write(trainer, sheet, make_contact_sheet(trainer, run, args))
            print(f"{sheet}: the first images")
        passes = len(run.times) * (1 if args.w_min == args.w_max == 0 else 2)
        bytes_used = sum(file.stat().st_size for file in args.output.glob("*.arrow"))
        a_record = f"{bytes_used / args.num_images / 1e3:,.0f} kB a record"
        print(f"{bytes_used / 1e6:,.1f} MB, {a_record}; {passes} UNet passes an image")
        each = f"{seconds / made:.3g} s each, " if made else ""
        print(f"this run: {made} images in {seconds:,.0f} s, {each}{made * passes:,} UNet passes")
        print(f"train on it with: {training_command(args)}")
    accelerator.end_training()


def main(argv=None):
    """The generation, and how it ends where it cannot go on."""
    trainer, args = parse_args(argv)
    with encode_data.locked(trainer, args, LESS_MEMORY) as lock:
        generate(trainer, args, lock)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot encode
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of a library; `locked` undoes it
    main()
