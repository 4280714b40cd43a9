#!/usr/bin/env python
"""Encode training data once, for any number of runs: latents of images, embeddings of captions.

    python scripts/encode_data.py --family sd15 --pretrained_teacher_model MODEL \\
      --train_data_dir my_images --resolution 512 --center_crop --output my_encoded
    accelerate launch train_lcm_lora_sd15.py --pretrained_teacher_model MODEL \\
      --dataset_name my_encoded --resolution 512 --center_crop ...

Beside its own flags it takes those of the training command: the teacher, the data and
--mixed_precision count, the others may stay. A run on encoded data loads neither VAE nor text
encoders, save for validation. A killed run goes on with the same command;
`accelerate launch scripts/encode_data.py ...` shares the files out among its processes.
With --aspect_ratio_buckets images are not cropped to squares but to the nearest of some sizes.

The output is a folder that `datasets.load_from_disk` opens:

    data-00000-of-00004.arrow   1,000 records each, in the order of the data, with the columns
                                (float: float16 with --mixed_precision fp16, else float32)
        moments     float [2C, h, w]: mean and log variance of the latents' posterior, unscaled
        mirrored    the same of the mirrored image, with --random_flip
        size        int [2]: h, w, with --aspect_ratio_buckets; latents are then [h w, channels]
        prompt      float [captions, L, D]: embeddings of the captions
        text_embeds float [captions, P]: their pooled embeddings, SDXL only
        time_ids    int [6]: height, width, top, left, height and width of the crop, SDXL only
        captions    list of text
        name        what the record is called in messages
        unusable    why the record cannot be used, else null; a trainer replaces such records
        image       the undecoded image, where latents are not encoded
    prompts.safetensors         prompt (and text_embeds) of the empty, the negative and the
                                validation prompts
    encoded.json                the stamp: what all this was made from; a trainer compares it
    dataset_info.json, state.json    written last: without them the folder is not complete
"""

import argparse
import contextlib
import importlib
import json
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the trainers, help_formatter.py
from help_formatter import command_line, given_path

ROWS = 1000  # in a file
AGAIN = "mend that and run the same command again: whole files are kept"
LESS_MEMORY = (
    "give --vae_encode_batch_size 1 or --mixed_precision fp16, for SDXL with a VAE that is stable "
    "in it (--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix)"
)


def make_parser(program, about, usage):
    """A parser of the flags that this program and generate_data.py have in common."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s --family {{sd15,sdxl}} --output FOLDER {usage} [flags of the trainer]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--family", choices=["sd15", "sdxl"], required=True, help="train_lcm_lora_<family>.py")
    add(
        "--output",
        type=given_path,
        required=True,
        metavar="FOLDER",
        help="new, or one to go on with",
    )
    sizes = "of images: `h,w;h,w;...` in pixels, or no value: 1:3 to 3:1 at --resolution"
    add("--aspect_ratio_buckets", nargs="?", const="", metavar="SIZES", help=sizes)
    parser.error = lambda message: sys.exit(f"{Path(program).name}: error: {message}")
    return parser


def read_trainer(program, own, rest):
    """The trainer, and its arguments with this program's `own` among them."""
    trainer = importlib.import_module(f"train_lcm_lora_{own.family}")
    trainer.__file__ = program  # which its messages name
    args = trainer.parse_args(["--max_train_steps", "1", *rest])
    vars(args).update(vars(own))
    return trainer, args


def parse_args(argv=None):
    """The trainer, and its arguments with those of this program among them."""
    parser = make_parser(__file__, __doc__, "[--encode ...]")
    kinds = ["latents", "captions"]
    help_text = "what is (default: both)"
    parser.add_argument("--encode", nargs="+", choices=kinds, default=kinds, help=help_text)
    # answers --help before the libraries are loaded
    own, rest = parser.parse_known_args(command_line(argv))
    own.encode = sorted({*own.encode})
    trainer, args = read_trainer(__file__, own, rest)
    check_args(trainer, args)
    return trainer, args


def check_args(trainer, args):
    """Refuse what does not go together."""
    if args.streaming:
        trainer.fail("--streaming: its records have no number; give --no-streaming or leave it out")
    if args.aspect_ratio_buckets is not None and "latents" not in args.encode:
        trainer.fail("--aspect_ratio_buckets: without latents no image is cropped; leave it out")
    if "latents" in args.encode and not args.center_crop:
        trainer.fail("give --center_crop: of an encoded image only one crop is kept")
    for flag in "train_data_dir", "dataset_name":
        source = vars(args)[flag]
        if source and Path(source, trainer.STAMP).exists():
            trainer.fail(f"--{flag} {source}: encoded data already; give what they were made from")
    check_output(trainer, args)


def check_output(trainer, args):
    """Refuse an output folder among the data."""
    folder = args.output.resolve()
    for source in filter(None, (args.train_data_dir, args.dataset_name)):
        if Path(source).resolve() in (folder, *folder.parents):
            trainer.fail(f"--output {args.output}: it is among the data; name a folder elsewhere")


@contextlib.contextmanager
def or_end(trainer, what, advice):
    """A block that ends the run with one line on any error, of whichever process."""
    try:
        yield
    except trainer.torch.OutOfMemoryError:
        raise
    except Exception as error:
        trainer.fail(f"{what} ({trainer.reason(error)}); {advice}", trainer.this_rank())


def make_buckets(resolution, factor):
    """Sizes (height, width) of resolution^2 pixels or a little less, from 1:3 to 3:1.

    In multiples of 64 px, as Stable Diffusion was trained; of less below 512 px.
    """
    step = max(factor, min(64, resolution // 8 // factor * factor))
    sides = range(step, 2 * resolution + 1, step)
    sizes = {(side, int(resolution**2 / side / step) * step) for side in sides}
    sizes |= {(width, height) for height, width in sizes}
    return sorted(size for size in sizes if min(size) and 3 * max(size) <= 10 * min(size))


def find_buckets(trainer, args, factor):
    """The sizes (height, width) that --aspect_ratio_buckets stands for; None without it."""
    text, side = args.aspect_ratio_buckets, args.resolution
    if text is None:
        return None
    advice = f"give sizes in pixels, multiples of {factor}, such as {side},{side};{2 * side},{side}"
    with or_end(trainer, f"--aspect_ratio_buckets {text!r}", advice):
        trainer.warnings.filterwarnings("ignore", "Bucket dimension")  # the line below says it
        parse = trainer.diffusers.training_utils.parse_buckets_string
        sizes = parse(text) if text else make_buckets(side, factor)
        if wrong := [size for size in sizes if size[0] % factor or size[1] % factor]:
            raise ValueError("{} x {}".format(*wrong[0]))
    return sorted({*sizes})


def bucket_of(trainer, size, buckets):
    """The bucket (width, height) of an image of `size` (width, height)."""
    nearest = trainer.diffusers.training_utils.find_nearest_bucket
    height, width = buckets[nearest(size[1], size[0], buckets)]
    return width, height


def load_encoders(trainer, args, accelerator):
    """The teacher's pipeline with what encodes on the device; sets the default of --resolution."""
    name = args.pretrained_teacher_model
    skip = set() if trainer.is_one_file(name) else {"unet"}
    skip |= set() if "latents" in args.encode else {"vae"}
    skip |= set() if "captions" in args.encode else {*trainer.TEXT_ENCODERS}
    pipe = trainer.load_teacher(args, trainer.DTYPES[args.mixed_precision], skip)
    factor = pipe.vae_scale_factor
    if args.resolution is None:
        what = f"--pretrained_teacher_model {name}: the size of its images is not known"
        with or_end(trainer, what, "give --resolution"):
            where = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
            kind = trainer.diffusers.UNet2DConditionModel
            unet = pipe.unet and pipe.unet.config
            unet = unet or kind.load_config(name, subfolder="unet", **where)
            args.resolution = unet["sample_size"] * factor
    if args.resolution % factor:
        what = f"--resolution {args.resolution}"
        trainer.fail(f"{what}: give a multiple of the VAE's factor, {factor}")
    args.buckets = find_buckets(trainer, args, factor)
    pipe.unet = None
    place_networks(trainer, pipe, args, accelerator.device)
    return pipe


def place_networks(trainer, pipe, args, device):
    """Put those that have weights on the device, as the trainers do."""
    for name, part in trainer.networks(pipe):
        part.requires_grad_(False).eval().to(memory_format=trainer.torch.channels_last)
        if name == "unet" and args.quantize_base:
            trainer.quantize_linears(part)
        if not next(part.parameters()).is_meta:
            part.to(device)


def write(trainer, path, content):
    """Write a file, which gets its name when it is whole."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        trainer.flush_to_disk(part)
        part.replace(path)
    finally:  # of a full disk
        part.unlink(missing_ok=True)


def write_json(trainer, path, content):
    """The same of what becomes JSON."""
    write(trainer, path, f"{json.dumps(content, indent=2)}\n".encode())


def make_stamp(trainer, args, records):
    """What all is made from."""
    stamp = trainer.make_stamp(args, args.encode) | {"what": args.encode, "records": len(records)}
    stamp |= {"columns": [args.image_column, args.caption_column], "random_flip": args.random_flip}
    return stamp | {"fingerprint of the data": records._fingerprint}


def open_output(trainer, args, stamp, accelerator, lock):
    """Lock the folder and stamp it; refuse one that was made from something else."""
    folder, path = args.output, args.output / trainer.STAMP
    stamp["buckets"] = args.buckets and [list(size) for size in args.buckets]
    with or_end(trainer, f"--output {folder}: in use or not writable", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            lock.acquire(timeout=0)
        there = sorted({file.name for file in folder.iterdir()} - {".lock", f"{path.name}.part"})
    if path.exists():
        with or_end(trainer, f"--output {folder}: {path.name} is broken", "name another folder"):
            old = dict(json.loads(path.read_text()))
        for key, new in stamp.items():
            if old.get(key) != new:
                what = f"{key}: {old.get(key)} there, {new} in this run"
                trainer.fail(f"--output {folder}: {what}; give the flags of before or a new folder")
    elif there:
        trainer.fail(f"--output {folder}: it holds {there[0]}; name a new or an empty folder")
    accelerator.wait_for_everyone()  # until all have looked
    if accelerator.is_main_process and not path.exists():
        with or_end(trainer, f"--output {folder}: it cannot be written", AGAIN):
            write_json(trainer, path, stamp)


def embed(trainer, pipe, text, args):
    """A prompt's embeddings, encoded alone: what else were in its batch would change the bits."""
    embeddings = trainer.encode_captions(pipe, [text], args.max_prompt_chunks)
    return {name: value[0].cpu() for name, value in embeddings.items()}


def write_prompts(trainer, pipe, args):
    """The embeddings of the empty prompt, by which captions are dropped, and for validation."""
    path, known = args.output / trainer.PROMPTS, {}
    with contextlib.suppress(SystemExit):  # if it is missing or broken it is made anew
        known = trainer.load_prompts(args.output, ["prompt"])
    texts = ["", args.negative_prompt, *(args.validation_prompts or [])]
    new = [text for text in texts if text not in known]
    for text in dict.fromkeys(new):
        known[text] = embed(trainer, pipe, text, args)
    if new:
        tensors = trainer.torch.utils.data.default_collate([*known.values()])
        with or_end(trainer, f"{path}: it cannot be made", AGAIN):
            write(trainer, path, trainer.save(tensors, {"prompts": json.dumps([*known])}))


def features_of(trainer, args, latents, captions):
    """The columns of the output and their types.

    `latents`: their columns, {name: (shape [channels, h, w], dtype)}; `captions`: whether these are
    encoded.
    """
    datasets = trainer.datasets
    text, columns = datasets.Value("string"), {}

    def array(shape, dtype):
        # neither numpy nor Arrow has bf16, which float32 holds exactly
        kind = "float16" if dtype == trainer.torch.float16 else "float32"
        return getattr(datasets, f"Array{len(shape)}D")(shape, kind)

    for name, (shape, dtype) in latents.items():
        columns[name] = array((None, shape[0]) if args.buckets else shape, dtype)
    if latents:
        if args.buckets:
            columns["size"] = datasets.List(datasets.Value("int64"), 2)
        if args.family == "sdxl":
            columns["time_ids"] = datasets.List(datasets.Value("int64"), 6)
    else:
        columns["image"] = datasets.Image()
    if captions:
        for name, value in trainer.load_prompts(args.output, ["prompt"])[""].items():
            columns[name] = array((None, *value.shape), value.dtype)
    columns |= {"captions": datasets.List(text), "name": text, "unusable": text}
    return datasets.Features(columns)


class Images:
    """The records of some rows, prepared for encoding: for the workers of a DataLoader."""

    def __init__(self, records, args):
        self.records, self.args = records, args

    def __getitem__(self, row):
        trainer = importlib.import_module(f"train_lcm_lora_{self.args.family}")
        turns = (False, True)[: 1 + self.args.random_flip]
        try:
            with trainer.or_unusable(f"row {row}"):
                fields = self.records[row]
            record = trainer.to_record(fields, row, self.args)
            if "latents" not in self.args.encode:
                if record["image"] and record["image"]["bytes"] is None:
                    with trainer.or_unusable(record["name"]):
                        record["image"]["bytes"] = Path(record["image"]["path"]).read_bytes()
                return record
            with trainer.or_unusable(record["name"]):
                image = trainer.open_image(record.pop("image"))
            buckets, sides = self.args.buckets, (self.args.resolution, self.args.resolution)
            sides = bucket_of(trainer, image.size, buckets) if buckets else sides
            middle = [
                trainer.prepare_image(image, sides, (0.5, 0.5), turn, self.args) for turn in turns
            ]
            pixels = trainer.torch.stack([turn["pixels"] for turn in middle])
            return record | middle[0] | {"pixels": pixels}
        except trainer.UnusableRecord as error:
            return {"unusable": str(error), "name": f"row {row}", "captions": []}


def pack(sample):
    """Put latents [channels,h,w] of any size into the shape of their column, [h w, channels]."""
    names = {"path", "moments", "mirrored"} & sample.keys()
    sample["size"] = [*sample[next(iter(names))].shape[1:]]
    sample |= {name: sample[name].flatten(1).T for name in names}


def encode_batch(trainer, pipe, samples, features, args):
    """Prepared records as rows of the output."""
    usable = [sample for sample in samples if "unusable" not in sample]
    if usable and "latents" in args.encode:
        shapes = [sample["pixels"].shape for sample in usable]
        for shape in dict.fromkeys(shapes):
            some = [sample for sample, its in zip(usable, shapes, strict=True) if its == shape]
            pixels = trainer.torch.cat([sample.pop("pixels") for sample in some])
            moments = trainer.encode_images(pipe.vae, pixels, args.vae_encode_batch_size)
            for sample, turns in zip(some, moments.unflatten(0, (len(some), -1)), strict=True):
                sample |= zip(("moments", "mirrored"), turns, strict=False)
                if args.buckets:
                    pack(sample)
    if usable and "captions" in args.encode:
        texts = [*dict.fromkeys(text for sample in usable for text in sample["captions"])]
        embeddings = trainer.encode_captions(pipe, texts, args.max_prompt_chunks)
        for sample in usable:
            rows = [texts.index(text) for text in sample["captions"]]
            sample |= {name: value[rows] for name, value in embeddings.items()}
    return [to_row(trainer, sample, features) for sample in samples]


def to_row(trainer, sample, features):
    """A record as a row of the output; an unusable one has zeros."""
    row = {}
    for name, kind in features.items():
        value = sample.get(name)
        if value is None and hasattr(kind, "shape"):
            value = trainer.np.zeros([size or 0 for size in kind.shape], kind.dtype)
        elif value is None and name in ("time_ids", "size"):
            value = [0] * kind.length
        elif trainer.torch.is_tensor(value):
            is_bf16 = value.dtype == trainer.torch.bfloat16
            value = (value.float() if is_bf16 else value).cpu().numpy()
        row[name] = value
    return row


def encode_rows(trainer, pipe, records, rows, features, args):
    """Some rows of the data, read and encoded."""
    size = args.vae_encode_batch_size or 8  # that are read at once; the VAE may take fewer
    options = {"batch_size": size, "collate_fn": list, "sampler": rows}
    options |= {"num_workers": args.dataloader_num_workers}
    options |= {"worker_init_fn": trainer.start_reader}
    batches = trainer.torch.utils.data.DataLoader(Images(records, args), **options)
    for samples in batches:
        yield from encode_batch(trainer, pipe, samples, features, args)


def write_file(trainer, rows, features, path, bar):
    """Write rows into a file, which gets its name when it is whole."""
    part = Path(f"{path}.part")
    with trainer.datasets.arrow_writer.ArrowWriter(
        path=str(part), features=features, writer_batch_size=100
    ) as writer:
        for row in rows:
            writer.write(row)
            bar.update()
        writer.finalize()
    trainer.flush_to_disk(part)
    part.replace(path)


def finish(trainer, files, features, args, done):
    """Write what makes a `datasets` folder of the files, and say what is in it."""
    datasets, stamp = trainer.datasets, (args.output / trainer.STAMP).read_text()
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    unusable = [why for why in data["unusable"] if why]
    if len(unusable) == len(data):
        trainer.fail(f"not one record of the data can be used, the first: {unusable[0]}")
    datasets.DatasetInfo(features=features).write_to_directory(str(args.output))
    state = {"_data_files": [{"filename": file.name} for file in files], "_split": "train"}
    state |= {"_fingerprint": datasets.fingerprint.Hasher.hash(stamp), "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_json(trainer, args.output / "state.json", state)
    print(f"{args.output}: {len(data)} records {done}, {len(unusable)} of them unusable")
    for why in unusable[:10]:
        print(f"warning: unusable: {why}", file=sys.stderr)


def encode(trainer, args, lock):
    """Encode what is not yet encoded."""
    args.report_to = "none"
    accelerator = trainer.make_accelerator(args)
    trainer.quiet_libraries()
    records = trainer.load_records(args)
    pipe = load_encoders(trainer, args, accelerator)
    stamp = make_stamp(trainer, args, records)
    open_output(trainer, args, stamp, accelerator, lock)
    captions, latents = "captions" in args.encode, {}
    if captions and accelerator.process_index == 0:
        write_prompts(trainer, pipe, args)
    accelerator.wait_for_everyone()
    if "latents" in args.encode:
        side, channels = args.resolution // pipe.vae_scale_factor, pipe.vae.config.latent_channels
        latents["moments"] = (2 * channels, side, side), pipe.vae.dtype
        latents |= {"mirrored": latents["moments"]} if args.random_flip else {}
    features = features_of(trainer, args, latents, captions)

    def make(rows):
        return encode_rows(trainer, pipe, records, rows, features, args)

    make_files(trainer, args, accelerator, len(records), ROWS, features, make, "encoded")
    accelerator.end_training()


def make_files(trainer, args, accelerator, records, size, features, make, done):
    """Make the missing files, of `size` records each, and what makes a `datasets` folder of them.

    `make` gives the rows of the output with some numbers. The files are shared out among the
    processes. Returns how many records were missing.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    starts = range(0, records, size)
    names = [f"data-{i:05}-of-{len(starts):05}.arrow" for i in range(len(starts))]
    files = [args.output / name for name in names]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    accelerator.wait_for_everyone()  # until all have looked
    accelerator.print(f"{args.output}: {len(files) - len(missing)} of {len(files)} files are there")
    rows = {i: range(starts[i], min(starts[i] + size, records)) for i in missing}
    own = missing[rank::world]
    total = sum(len(rows[i]) for i in own)
    hidden = rank > 0 or not own
    with trainer.tqdm(total=total, unit="record", disable=hidden, dynamic_ncols=True) as bar:
        for i in own:
            with or_end(trainer, f"{files[i]}: it cannot be made", AGAIN):
                write_file(trainer, make(rows[i]), features, files[i], bar)
    accelerator.wait_for_everyone()
    if rank == 0 and not (args.output / "state.json").exists():
        with or_end(trainer, f"--output {args.output}: it cannot be finished", AGAIN):
            finish(trainer, files, features, args, done)
    return sum(map(len, rows.values()))


@contextlib.contextmanager
def locked(trainer, args, less_memory):
    """A block with the lock of the output folder, and how it ends where it cannot go on."""
    lock = trainer.filelock.FileLock(args.output / ".lock")  # one process at a time has it
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield lock
    except trainer.torch.OutOfMemoryError as error:
        what = f"out of memory ({trainer.reason(error)})"
        trainer.fail(f"{what}; {less_memory}", trainer.this_rank())
    except KeyboardInterrupt:
        if trainer.this_rank() == "0":
            print("stopped: the same command goes on, whole files are kept", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        lock.release()


def main(argv=None):
    """The encoding, and how it ends where it cannot go on."""
    trainer, args = parse_args(argv)
    with locked(trainer, args, LESS_MEMORY) as lock:
        encode(trainer, args, lock)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot encode
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of a library; `locked` undoes it
    main()
