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

The output is a folder that `datasets.load_from_disk` opens:

    data-00000-of-00004.arrow   1,000 records each, in the order of the data, with the columns
        moments     float [2C, h, w]: mean and log variance of the latents' posterior, unscaled
        mirrored    the same of the mirrored image, with --random_flip
        prompt      float [captions, L, D]: embeddings of the captions
        text_embeds float [captions, P]: their pooled embeddings, SDXL only
        time_ids    int [6]: height, width, top, left, side, side, SDXL only
        captions    list of text
        name        what the record is called in messages
        unusable    why the record cannot be used, else null; a trainer replaces such records
        image       the undecoded image, where latents are not encoded
    prompts.safetensors         prompt (and text_embeds) of the empty and the validation prompts
    encoded.json                the stamp: what all this was made from; a trainer compares it
    dataset_info.json, state.json    written last: without them the folder is not complete
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the trainers

ROWS = 1000  # in a file


def parse_args(argv=None):
    """The trainer, and its arguments with those of this program among them."""
    description, raw = __doc__, argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s --family {sd15,sdxl} --output FOLDER [--encode ...] [flags of the trainer]"
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=raw, allow_abbrev=False
    )
    add = parser.add_argument
    add("--family", choices=["sd15", "sdxl"], required=True, help="train_lcm_lora_<family>.py")
    add(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new folder, or one to go on"
    )
    add(
        "--encode", nargs="+", choices=["latents", "captions"], default=["latents", "captions"],
        help="what is encoded (default: both)",
    )  # fmt: skip
    parser.error = lambda message: sys.exit(f"{Path(__file__).name}: error: {message}")
    own, rest = parser.parse_known_args(argv)
    trainer = importlib.import_module(f"train_lcm_lora_{own.family}")
    trainer.__file__ = __file__  # its messages name this program
    args = trainer.parse_args(["--max_train_steps", "1", *rest])
    vars(args).update(vars(own))
    args.encode = sorted(set(args.encode))
    if args.streaming:
        trainer.fail("--streaming: its records have no number; give --no-streaming or leave it out")
    if "latents" in args.encode and not args.center_crop:
        trainer.fail("give --center_crop: of an encoded image only one crop is kept")
    return trainer, args


def load_encoders(trainer, args, accelerator):
    """The teacher's pipeline with what encodes on the device; sets the default of --resolution."""
    skip = set() if trainer.is_one_file(args.pretrained_teacher_model) else {"unet"}
    skip |= set() if "latents" in args.encode else {"vae"}
    skip |= set() if "captions" in args.encode else {*trainer.TEXT_ENCODERS}
    pipe = trainer.load_teacher(args, trainer.DTYPES[args.mixed_precision], skip)
    if pipe.unet is None:
        options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
        kind = trainer.diffusers.UNet2DConditionModel
        unet = kind.load_config(args.pretrained_teacher_model, subfolder="unet", **options)
    else:
        unet, pipe.unet = pipe.unet.config, None
    factor = pipe.vae_scale_factor
    args.resolution = args.resolution or unet["sample_size"] * factor
    if args.resolution % factor:
        trainer.fail(
            f"--resolution {args.resolution}: give a multiple of the VAE's factor, {factor}"
        )
    for _, part in trainer.networks(pipe):
        part.requires_grad_(False).eval().to(memory_format=trainer.torch.channels_last)
        if not next(part.parameters()).is_meta:
            part.to(accelerator.device)
    return pipe


def open_output(trainer, args, records, accelerator):
    """Lock the folder; refuse one that was made from something else. True if it is complete."""
    folder, rank = args.output, accelerator.process_index
    stamp = trainer.make_stamp(args, args.encode) | {"what": args.encode, "records": len(records)}
    stamp |= {"random_flip": args.random_flip, "data": records._fingerprint}
    with trainer.or_fail(f"--output {folder}: cannot be written", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            args.lock = trainer.filelock.FileLock(folder / ".lock")
            args.lock.acquire(timeout=0)  # until this process ends
    path = folder / trainer.STAMP
    if path.exists():
        old = json.loads(path.read_text())
        for key in stamp:
            if old.get(key) != stamp[key]:
                what = f"it was encoded with {key} {old.get(key)}, not {stamp[key]}"
                trainer.fail(f"--output {folder}: {what}; name another folder")
    elif others := sorted(p.name for p in folder.iterdir() if p.name != ".lock"):
        trainer.fail(f"--output {folder}: it holds {others[0]}; name a new or an empty folder")
    accelerator.wait_for_everyone()
    if rank == 0 and not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(stamp, indent=2) + "\n")
        part.replace(path)
    return (folder / "state.json").exists()


def features_of(trainer, pipe, args):
    """The columns of the output and their types."""
    datasets = trainer.datasets
    text, columns = datasets.Value("string"), {}

    def array(shape, dtype):
        # neither numpy nor Arrow has bf16, which float32 holds exactly
        kind = "float16" if dtype == trainer.torch.float16 else "float32"
        return getattr(datasets, f"Array{len(shape)}D")(shape, kind)

    if "latents" in args.encode:
        side = args.resolution // pipe.vae_scale_factor
        shape = (2 * pipe.vae.config.latent_channels, side, side)
        columns["moments"] = array(shape, pipe.vae.dtype)
        if args.random_flip:
            columns["mirrored"] = columns["moments"]
        if args.family == "sdxl":
            columns["time_ids"] = datasets.List(datasets.Value("int64"), 6)
    else:
        columns["image"] = datasets.Image()
    if "captions" in args.encode:
        for name, rows in trainer.encode_captions(pipe, [""]).items():
            columns[name] = array((None, *rows.shape[1:]), rows.dtype)
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
            middle = [trainer.prepare_image(image, (0.5, 0.5), turn, self.args) for turn in turns]
            pixels = trainer.torch.stack([turn["pixels"] for turn in middle])
            return record | middle[0] | {"pixels": pixels}
        except trainer.UnusableRecord as error:
            return {"unusable": str(error), "name": f"row {row}", "captions": []}


def encode_batch(trainer, pipe, samples, features, args):
    """Prepared records as rows of the output; an unusable one has zeros."""
    usable = [sample for sample in samples if "unusable" not in sample]
    if usable and "latents" in args.encode:
        pixels = trainer.torch.cat([sample.pop("pixels") for sample in usable])
        moments = trainer.encode_images(pipe.vae, pixels, args.vae_encode_batch_size)
        for sample, turns in zip(usable, moments.unflatten(0, (len(usable), -1)), strict=True):
            sample |= zip(("moments", "mirrored"), turns, strict=False)
    if usable and "captions" in args.encode:
        texts = [*dict.fromkeys(text for sample in usable for text in sample["captions"])]
        embeddings = trainer.encode_captions(pipe, texts)
        for sample in usable:
            rows = [texts.index(text) for text in sample["captions"]]
            sample |= {name: value[rows] for name, value in embeddings.items()}
    for sample in samples:
        row = {}
        for name, kind in features.items():
            value = sample.get(name)
            if value is None and hasattr(kind, "shape"):
                value = trainer.np.zeros([size or 0 for size in kind.shape], kind.dtype)
            elif value is None and name == "time_ids":
                value = [0] * 6
            elif trainer.torch.is_tensor(value):
                is_bf16 = value.dtype == trainer.torch.bfloat16
                value = (value.float() if is_bf16 else value).cpu().numpy()
            row[name] = value
        yield row


def encode_file(trainer, pipe, records, rows, features, path, bar, args):
    """Encode some rows into a file, which gets its name when it is whole."""
    size = {"batch_size": args.vae_encode_batch_size, "num_workers": args.dataloader_num_workers}
    images = Images(records, args)
    batches = trainer.torch.utils.data.DataLoader(images, sampler=rows, collate_fn=list, **size)
    part = Path(f"{path}.part")
    with trainer.datasets.arrow_writer.ArrowWriter(
        path=str(part), features=features, writer_batch_size=100
    ) as writer:
        for samples in batches:
            for row in encode_batch(trainer, pipe, samples, features, args):
                writer.write(row)
            bar.update(len(samples))
        writer.finalize()
    part.replace(path)


def write_prompts(trainer, pipe, args):
    """The embeddings of the empty prompt, by which captions are dropped, and for validation."""
    prompts = list(dict.fromkeys(["", *(args.validation_prompts or [])]))
    rows = [trainer.encode_captions(pipe, [prompt]) for prompt in prompts]
    tensors = {name: trainer.torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}
    part = args.output / f"{trainer.PROMPTS}.part"
    part.write_bytes(trainer.save(tensors, {"prompts": json.dumps(prompts)}))
    part.replace(args.output / trainer.PROMPTS)


def finish(trainer, files, features, args):
    """Write what makes a `datasets` folder of the files, and say what is in it."""
    datasets = trainer.datasets
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    unusable = [why for why in data["unusable"] if why]
    datasets.DatasetInfo(features=features).write_to_directory(str(args.output))
    state = {"_data_files": [{"filename": file.name} for file in files], "_split": "train"}
    state |= {"_fingerprint": json.loads((args.output / trainer.STAMP).read_text())["data"]}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    part = args.output / "state.json.part"
    part.write_text(json.dumps(state | {"_output_all_columns": False}, indent=2) + "\n")
    part.replace(args.output / "state.json")
    print(f"{args.output}: {len(data)} records encoded, {len(unusable)} of them unusable")
    for why in unusable[:10]:
        print(f"warning: unusable: {why}", file=sys.stderr)


def main(argv=None):
    """Encode what is not yet encoded."""
    trainer, args = parse_args(argv)
    args.report_to = "none"
    accelerator = trainer.make_accelerator(args)
    trainer.quiet_libraries()
    rank, world = accelerator.process_index, accelerator.num_processes
    records = trainer.load_records(args)
    if trainer.encoded_folder(args):
        trainer.fail(f"--dataset_name {args.dataset_name}: these data are encoded already")
    pipe = load_encoders(trainer, args, accelerator)
    complete = open_output(trainer, args, records, accelerator)
    if "captions" in args.encode and rank == 0:
        write_prompts(trainer, pipe, args)
    starts = range(0, len(records), ROWS)
    names = [f"data-{i:05}-of-{len(starts):05}.arrow" for i in range(len(starts))]
    files = [args.output / name for name in names]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    accelerator.wait_for_everyone()  # until all have looked
    accelerator.print(f"{args.output}: {len(files) - len(missing)} of {len(files)} files are there")
    features = features_of(trainer, pipe, args)
    rows = {i: range(starts[i], min(starts[i] + ROWS, len(records))) for i in missing[rank::world]}
    total = sum(map(len, rows.values()))
    with trainer.tqdm(total=total, unit="record", disable=rank > 0, dynamic_ncols=True) as bar:
        for i in rows:
            advice = "free some space and run the same command again"
            with trainer.or_fail(f"{files[i]}: it cannot be made", advice):
                encode_file(trainer, pipe, records, rows[i], features, files[i], bar, args)
    accelerator.wait_for_everyone()
    if rank == 0 and not complete:
        finish(trainer, files, features, args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
