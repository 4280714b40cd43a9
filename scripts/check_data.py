#!/usr/bin/env python
"""Read training data exactly as a trainer would, and report what it would train on.

    python scripts/check_data.py --train_data_dir my_images --resolution 512 --center_crop
    python scripts/check_data.py --family sdxl --dataset_name my_data --random_flip \\
        --pretrained_teacher_model MODEL

Beside its own flags it takes those of the training command, all of them or just the data's. With
the teacher it counts tokens and knows the default of --resolution; of it only configs and
tokenizers are read, of a teacher in one file those of --teacher_config.

Writes report.md (counts, sizes, captions, duplicates, unusable records by name) and
contact_sheet.png, the first samples of a run in one process as the step gets them: cropped,
mirrored, with the caption chosen for them. Exit code 0 if every record can be used, 1 if some are
unusable or the data cannot be read.
"""

import argparse
import hashlib
import heapq
import importlib
import itertools
import json
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from help_formatter import HelpFormatter, command_line, given_path
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the trainers' folder

SIDES = {"sd15": 512, "sdxl": 1024}  # where neither --resolution nor a teacher says it
TOKENIZERS = {"sd15": ["tokenizer"], "sdxl": ["tokenizer", "tokenizer_2"]}
STREAMED = 1000  # records read of a stream, where --limit is not given
NAMED = 10  # records named where there may be many


def load_trainer(family):
    """The trainer as a module; its error messages then name this program."""
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    trainer.__file__ = __file__
    return trainer


def parse_args(argv=None):
    """The trainer and its arguments, those of this program among them."""
    sd15 = load_trainer("sd15")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--family FAMILY] [--output_dir FOLDER] FLAGS-OF-THE-TRAINER",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.error, add, count = sd15.fail, parser.add_argument, sd15.number(int, 1)
    add("--family", choices=SIDES, default="sd15", help="whose trainer: train_lcm_lora_<family>.py")
    add("--samples", type=count, metavar="N", default=16, help="images on the contact sheet")
    streamed = f"default: all; with --streaming {STREAMED}"
    add("--limit", type=count, metavar="N", help=f"read only the first N records ({streamed})")
    out = "folder that gets report.md and contact_sheet.png"
    add("--output_dir", type=given_path, metavar="FOLDER", default="data-check", help=out)
    own, rest = parser.parse_known_args(command_line(argv))
    trainer = load_trainer(own.family)
    # What training needs and a check does not; where a flag comes again, the later value counts.
    needed = ["--pretrained_teacher_model", "none", "--max_train_steps", "1"]
    args = trainer.parse_args([*needed, *rest])
    if args.pretrained_teacher_model == "none":
        args.pretrained_teacher_model = ""
    vars(args).update(vars(own))
    args.limit = args.limit or (STREAMED if args.streaming else None)
    return trainer, args


def read_teacher(trainer, args):
    """Set the resolution as the trainer would: (tokenizers of a teacher, origin of the resolution).

    Without a teacher there are no tokenizers.
    """
    name, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    factor, tokenizers, side = 1, [], SIDES[args.family]
    origin = "the usual one: neither --resolution nor a teacher with configs is given"
    advice = f"give a diffusers folder or hub id, and its --family, one of {', '.join(SIDES)}"
    options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    with trainer.or_fail(f"--pretrained_teacher_model {name}: its configs cannot be read", advice):
        if name and ("text_encoder_2" in trainer.teacher_parts(args)) != (args.family == "sdxl"):
            raise ValueError(f"it is no teacher of --family {args.family}")
        if source := args.teacher_config if name.endswith(".safetensors") else name:
            unet = trainer.diffusers.UNet2DConditionModel
            unet = unet.load_config(source, subfolder="unet", **options)
            place = {"cache_dir": args.cache_dir} if vae else {"subfolder": "vae"} | options
            vae = trainer.AutoencoderKL.load_config(vae or source, **place)
            factor = 2 ** (len(vae["block_out_channels"]) - 1)
            side, origin = unet["sample_size"] * factor, "the teacher's native resolution"
            tokenizers = [
                trainer.transformers.CLIPTokenizer.from_pretrained(
                    source, subfolder=part, **options
                )
                for part in TOKENIZERS[args.family]
            ]
            for part, tokenizer in zip(TOKENIZERS[args.family], tokenizers, strict=True):
                options["subfolder"] = part.replace("tokenizer", "text_encoder")
                encoder = trainer.transformers.CLIPTextConfig.from_pretrained(source, **options)
                where = f"--pretrained_teacher_model {name}: {part}"
                trainer.check_tokenizer(tokenizer, encoder, where)
    origin, args.resolution = "--resolution" if args.resolution else origin, args.resolution or side
    if args.resolution % factor:
        advice = f"it must be a multiple of the VAE's factor, {factor}"
        trainer.fail(f"--resolution {args.resolution}: {advice}")
    return tokenizers, origin


class Reader(torch.utils.data.IterableDataset):
    """What the trainer makes of each record, in order: (name, size, captions, hash of the image).

    A caption is (its length, its text, whether its end is cut off). Of an unusable record it is the
    reason, a text.
    """

    def __init__(self, records, tokenizers, args):
        """Over the trainer's records."""
        self.records, self.tokenizers, self.args = records, tokenizers, args

    def length(self, text):
        """Tokens of a caption, or characters where there is no tokenizer."""
        lengths = (len(tokenizer(text).input_ids) for tokenizer in self.tokenizers)
        return max(lengths, default=len(text))

    def is_cut(self, text):
        """Whether the text encoders read a part of a caption only."""
        split, chunks = load_trainer(self.args.family).split_prompt, self.args.max_prompt_chunks
        read = [sum(map(len, split(text, tokenizer, chunks))) for tokenizer in self.tokenizers]
        return min(read, default=len(text)) < len(text.rstrip())

    def __iter__(self):
        """This worker's share of the records."""
        trainer = load_trainer(self.args.family)
        info = torch.utils.data.get_worker_info()
        mine = slice(info.id, None, info.num_workers) if info else slice(None)
        numbered = enumerate(self.records)  # of a stream the library gives each worker its shards
        if not self.args.streaming:
            numbered = ((number, self.records[number]) for number in range(len(self.records))[mine])
        for number, row in numbered:
            try:
                record = trainer.to_record(row, number, self.args)
                with trainer.or_unusable(record["name"]):
                    image = trainer.open_image(record["image"])
            except trainer.UnusableRecord as error:
                yield str(error)
                continue
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
            texts = [(self.length(text), text, self.is_cut(text)) for text in record["captions"]]
            yield record["name"], image.size, texts, digest


def read_all(records, tokenizers, args):
    """Figures of the records: (counts, sizes, longest captions, copies, unusable records)."""
    counts, sizes, longest, first, copies, unusable = Counter(), [], [], {}, [], []
    workers, total = args.dataloader_num_workers or 0, args.limit
    if args.streaming:
        workers = min(workers, records.num_shards)
    else:
        total = min(len(records), args.limit or len(records))
    reader = Reader(records, tokenizers, args)
    rows = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=workers)
    rows = itertools.islice(rows, args.limit)
    for row in tqdm(rows, "reading", total, unit="record", dynamic_ncols=True):
        if isinstance(row, str):
            unusable.append(row)
            continue
        name, size, texts, digest = row
        sizes.append(size)
        counts["captions"] += len(texts)
        counts["several"] += len(texts) > 1
        counts["empty"] += not all(text for _, text, _ in texts)
        counts["cut"] += sum(cut for *_, cut in texts)
        longest = heapq.nlargest(3, longest + [(length, name, text) for length, text, _ in texts])
        if digest in first:
            copies.append(f"{name} is {first[digest]}")
        first.setdefault(digest, name)
    return counts, sizes, longest, copies, unusable


def contact_sheet(trainer, records, args):
    """The first samples of a run, as the step gets them, each over its caption."""
    args.max_train_steps = args.samples  # never too few
    batches = trainer.or_end(trainer.make_loader(records, None, args, 0, 0, 1), lambda: None)
    batches = itertools.islice(batches, math.ceil(args.samples / args.train_batch_size))
    batches = [batch for batch in batches if "pixels" in batch]
    to_images = trainer.VaeImageProcessor().postprocess
    images = [image for batch in batches for image in to_images(batch["pixels"])]
    captions = [text for batch in batches for text in batch["caption"]]
    return lay_out(images[: args.samples], captions, math.ceil(math.sqrt(args.samples)))


def lay_out(images, captions, columns):
    """A sheet of images in rows, each over its caption."""
    side = max(max(image.size) for image in images)
    width, height, font = max(side, 120) + 8, side + 56, ImageFont.load_default(size=12)
    size = (columns * width, math.ceil(len(images) / columns) * height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, captions)):
        x, y = i % columns * width + 4, i // columns * height + 4
        sheet.paste(image, (x, y))
        label = textwrap.wrap(text, width // 7, max_lines=3, placeholder=" ...")
        pen.text((x, y + side + 2), "\n".join(label or ["(empty caption)"]), "black", font)
    return sheet


def size_table(sizes):
    """The lines of a table: the distribution of sizes, aspect ratios and what the crop cuts off."""
    width, height = np.array(sizes).T
    rows = {
        "width": (width, "{:.0f}"),
        "height": (height, "{:.0f}"),
        "width / height": (width / height, "{:.2f}"),
        "cut off by the crop": (
            1 - np.minimum(width, height) / np.maximum(width, height),
            "{:.0%}",
        ),
    }
    yield "| | min | 5% | median | 95% | max | mean |"
    yield "|---|---|---|---|---|---|---|"
    for name, (values, form) in rows.items():
        figures = np.percentile(values, [0, 5, 50, 95, 100], method="inverted_cdf")
        figures = map(form.format, [*figures, values.mean()])
        yield "".join(f"| {cell} " for cell in [name, *figures]) + "|"


def report(figures, tokenizers, origin, args):
    """The lines of report.md but for the unusable records."""
    counts, sizes, longest, copies, unusable = figures
    total, side = len(sizes) + len(unusable), args.resolution
    first = f", the first ones (--limit {args.limit})" if total == args.limit else ""
    yield f"# What train_lcm_lora_{args.family}.py would train on\n"
    yield f"- Source: {args.train_data_dir or args.dataset_name or args.train_shards_path_or_url}"
    yield f"- Records read: {total}{first}"
    yield f"- Usable: {len(sizes)}; unusable, replaced by others in training: {len(unusable)}"
    yield f"- Resolution: {side} x {side} ({origin})"
    if not sizes:
        return
    yield "\n## Images\n"
    yield from size_table(sizes)
    small = sum(min(size) < side for size in sizes)
    yield f"\n- Enlarged, as their shorter side is less than {side}: {small} of {len(sizes)}"
    yield f"- Duplicates of images before them, equal in every pixel: {len(copies)}"
    yield from (f"    - {copy}" for copy in copies[:NAMED])
    yield "\n## Captions\n"
    yield f"- Captions: {counts['captions']}; images with several: {counts['several']}"
    yield f"- Images with an empty caption or none: {counts['empty']}"
    if tokenizers:
        most = min(tokenizer.model_max_length for tokenizer in tokenizers)
        times = f"{args.max_prompt_chunks} times " if args.max_prompt_chunks > 1 else ""
        yield f"- Captions of more than {times}{most} tokens, which are truncated: {counts['cut']}"
    yield f"- The longest, in {'tokens, with start and end' if tokenizers else 'characters'}:"
    for length, name, text in longest:
        yield f'    - {length}, {name}: "{textwrap.shorten(text, 200)}"'
    yield f"\n![The first {args.samples} samples of a run in one process](contact_sheet.png)"


def main(argv=None):
    """Read, count, write; the exit code."""
    trainer, args = parse_args(argv)
    trainer.datasets.disable_progress_bars()
    if folder := trainer.encoded_folder(args):
        what = json.loads((folder / trainer.STAMP).read_text())["what"]
        if {"generated", "trajectories"} & {*what}:
            sheet = folder / "contact_sheet.png"
            trainer.fail(f"{folder} holds data that the teacher generated: look at {sheet}")
        trainer.fail(f"{folder} holds encoded data: check the data that they were made from")
    tokenizers, origin = read_teacher(trainer, args)
    records, out = trainer.load_records(args), args.output_dir
    with trainer.or_fail(f"--output_dir {out}: cannot be written", "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
    with trainer.or_fail("the data cannot be read to their end", "repair or remove the file"):
        figures = _, sizes, _, _, unusable = read_all(records, tokenizers, args)
        sheet = contact_sheet(trainer, records, args) if sizes else None
    if not sizes and not unusable:
        trainer.fail("the data hold no records; check their path or pattern")
    lines = list(report(figures, tokenizers, origin, args))
    named = ["\n## Unusable records\n", *(f"- {why}" for why in unusable)] if unusable else []
    with trainer.or_fail(f"--output_dir {out}: cannot be written", "choose another folder"):
        (out / "contact_sheet.png").unlink(missing_ok=True)
        if sheet:
            sheet.save(out / "contact_sheet.png")
        (out / "report.md").write_text("\n".join(lines + named) + "\n", encoding="utf-8")
    more = ["- ..."] * (len(unusable) > NAMED)
    print(*lines, *named[: NAMED + 1], *more, f"\nWritten to {out}", sep="\n")
    return 1 if unusable else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot encode
    sys.exit(main())
