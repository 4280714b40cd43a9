#!/usr/bin/env python
"""Read training data exactly as a trainer would, and report what it would train on.

    python scripts/check_data.py --train_data_dir my_pictures --resolution 512 --center_crop --output_dir check
    python scripts/check_data.py --family sdxl --dataset_name my_data --pretrained_teacher_model MODEL --random_flip ...

Beside its own flags it takes those of the training command, all of them or just the data's. With the teacher it counts
tokens and knows the default of --resolution; of it only configs and tokenizers are read, of a teacher in one file those
of --teacher_config. Writes report.md (counts, sizes, captions, duplicates, unusable records by name) and contact_sheet.png,
the first samples of a run in one process as the step gets them: cropped, mirrored, with the caption drawn for them.
Exit code 0 if every record can be used, 1 if there are odd ones or the data cannot be read.
"""

import argparse
import hashlib
import heapq
import importlib
import itertools
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))

SIDES = {"sd15": 512, "sdxl": 1024}  # where neither --resolution nor a teacher says it
TOKENIZERS = {"sd15": ["tokenizer"], "sdxl": ["tokenizer", "tokenizer_2"]}
STREAMED = 1000  # records read of a stream, where --limit is not given
NAMED = 10  # records named where there may be many


def load_trainer(family):
    """The trainer as a module; its error messages bear the name of this program."""
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    trainer.__file__ = __file__
    return trainer


def parse_args(argv=None):
    """The trainer and its arguments, those of this program among them."""
    sd15, raw = load_trainer("sd15"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error, add, count = sd15.fail, parser.add_argument, sd15.number(int, 1)
    add("--family", choices=SIDES, default="sd15", help="whose trainer: train_lcm_lora_<family>.py")
    add("--samples", type=count, default=16, help="pictures on the contact sheet")
    add("--limit", type=count, help=f"read only the first so many records (default: all; with --streaming {STREAMED})")
    add("--output_dir", type=Path, default="data-check", help="gets report.md and contact_sheet.png")
    own, rest = parser.parse_known_args(argv)
    trainer = load_trainer(own.family)
    # What a training needs and a check does not; where a flag comes again, the later value counts.
    args = trainer.parse_args(["--pretrained_teacher_model", "", "--max_train_steps", "1", *rest])
    vars(args).update(vars(own))
    args.limit = args.limit or (STREAMED if args.streaming else None)
    return trainer, args


def read_teacher(trainer, args):
    """Set the resolution as the trainer would; (tokenizers of the teacher, if there is one, where the resolution is from)."""
    name, vae, factor, tokenizers = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path, 1, []
    side, origin = SIDES[args.family], "the usual one: neither --resolution nor a teacher with configs is given"
    advice = f"give a diffusers folder or hub id, and its --family, one of {', '.join(SIDES)}"
    options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    with trainer.or_fail(f"--pretrained_teacher_model {name}: its configs cannot be read", advice):
        if name and ("text_encoder_2" in trainer.teacher_parts(args)) != (args.family == "sdxl"):
            raise ValueError(f"it is no teacher of --family {args.family}")
        if source := args.teacher_config if name.endswith(".safetensors") else name:
            unet = trainer.diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", **options)
            place = {"cache_dir": args.cache_dir} if vae else {"subfolder": "vae"} | options
            vae = trainer.AutoencoderKL.load_config(vae or source, **place)
            factor = 2 ** (len(vae["block_out_channels"]) - 1)
            side, origin, kind = (
                unet["sample_size"] * factor,
                "what the teacher draws",
                trainer.transformers.CLIPTokenizer,
            )
            tokenizers = [kind.from_pretrained(source, subfolder=part, **options) for part in TOKENIZERS[args.family]]
    origin, args.resolution = "--resolution" if args.resolution else origin, args.resolution or side
    if args.resolution % factor:
        trainer.fail(f"--resolution {args.resolution}: it must be a multiple of the VAE's factor, {factor}")
    return tokenizers, origin


def allowed(tokenizers):
    """The most tokens that a text encoder takes."""
    return min((tokenizer.model_max_length for tokenizer in tokenizers), default=math.inf)


class Reader(torch.utils.data.IterableDataset):
    """What the trainer makes of each record, in order: why it is odd, or its name, size, captions and hash."""

    def __init__(self, records, tokenizers, args):
        self.records, self.tokenizers, self.args = records, tokenizers, args

    def length(self, text):
        """Tokens of a caption, or characters where there is no tokenizer."""
        return max((len(tokenizer(text).input_ids) for tokenizer in self.tokenizers), default=len(text))

    def __iter__(self):
        trainer, info = load_trainer(self.args.family), torch.utils.data.get_worker_info()
        mine = slice(info.id, None, info.num_workers) if info else slice(None)
        numbered = enumerate(self.records)  # of a stream the library gives each worker its shards
        if not self.args.streaming:
            numbered = ((row, self.records[row]) for row in range(len(self.records))[mine])
        for row, record in numbered:
            try:
                picture, captions = trainer.open_record(record, row, self.args)
            except trainer.UnusableRecord as error:
                yield str(error)
                continue
            digest = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
            texts = [(self.length(text), text) for text in captions]
            yield trainer.name_of(record, row, self.args), picture.size, texts, digest


def read_all(records, tokenizers, args):
    """Figures of the records: (counts, sizes, longest captions, copies, unusable records)."""
    counts, sizes, longest, first, copies, odd = Counter(), [], [], {}, [], []
    workers, total = args.dataloader_num_workers, args.limit
    if args.streaming:
        workers = min(workers, records.num_shards)
    else:
        total = min(len(records), args.limit or len(records))
    rows = torch.utils.data.DataLoader(Reader(records, tokenizers, args), batch_size=None, num_workers=workers)
    for row in tqdm(itertools.islice(rows, args.limit), "reading", total, unit="record", dynamic_ncols=True):
        if isinstance(row, str):
            odd.append(row)
            continue
        name, size, texts, digest = row
        sizes.append(size)
        counts["captions"] += len(texts)
        counts["several"] += len(texts) > 1
        counts["empty"] += not all(text for _, text in texts)
        counts["cut"] += sum(length > allowed(tokenizers) for length, _ in texts)
        longest = heapq.nlargest(3, longest + [(length, name, text) for length, text in texts])
        if digest in first:
            copies.append(f"{name} is {first[digest]}")
        first.setdefault(digest, name)
    return counts, sizes, longest, copies, odd


def contact_sheet(trainer, records, args):
    """The first samples of a run, as the step gets them, each over its caption."""
    args.max_train_steps = args.samples  # never too few
    batches = trainer.make_loader(records, None, args, 0, 0, 1)
    batches = itertools.islice(batches, math.ceil(args.samples / args.train_batch_size))
    batches = [batch for batch in batches if "pixels" in batch]
    pictures = [picture for batch in batches for picture in trainer.VaeImageProcessor().postprocess(batch["pixels"])]
    captions = [text for batch in batches for text in batch["caption"]]
    side, columns = args.resolution, math.ceil(math.sqrt(args.samples))
    width, font = max(side, 120) + 8, ImageFont.load_default(size=12)
    sheet = Image.new("RGB", (columns * width, math.ceil(args.samples / columns) * (side + 56)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures[: args.samples], captions)):
        x, y = i % columns * width + 4, i // columns * (side + 56) + 4
        sheet.paste(picture, (x, y))
        label = textwrap.wrap(text, width // 7, max_lines=3, placeholder=" ...") or ["(empty caption)"]
        pen.text((x, y + side + 2), "\n".join(label), "black", font)
    return sheet


def size_table(sizes):
    """The lines of a table: how sizes, aspect ratios and what the crop cuts away are distributed."""
    width, height = np.array(sizes).T
    rows = {"width": (width, "{:.0f}"), "height": (height, "{:.0f}"), "width / height": (width / height, "{:.2f}")}
    rows["cut away by the crop"] = (1 - np.minimum(width, height) / np.maximum(width, height), "{:.0%}")
    yield "| | least | 5% | median | 95% | most | mean |"
    yield "|---|---|---|---|---|---|---|"
    for name, (values, form) in rows.items():
        figures = [*np.percentile(values, [0, 5, 50, 95, 100], method="inverted_cdf"), values.mean()]
        yield "".join(f"| {cell} " for cell in [name, *map(form.format, figures)]) + "|"


def report(figures, tokenizers, origin, args):
    """The lines of report.md but for the unusable records."""
    counts, sizes, longest, copies, odd = figures
    total, side = len(sizes) + len(odd), args.resolution
    first = f", the first ones (--limit {args.limit})" if total == args.limit else ""
    yield f"# What train_lcm_lora_{args.family}.py would train on\n"
    yield f"- Source: {args.train_data_dir or args.dataset_name or args.train_shards_path_or_url}"
    yield f"- Records read: {total}{first}; can be used: {len(sizes)}; odd, replaced by others in training: {len(odd)}"
    yield f"- Resolution: {side} x {side} ({origin})"
    if not sizes:
        return
    yield "\n## Pictures\n"
    yield from size_table(sizes)
    yield f"\n- Enlarged, as their shorter side is less than {side}: {sum(min(size) < side for size in sizes)} of {len(sizes)}"
    yield f"- Copies of a picture before them, equal in every pixel: {len(copies)}"
    yield from (f"    - {copy}" for copy in copies[:NAMED])
    yield "\n## Captions\n"
    yield f"- Captions: {counts['captions']}; pictures with several: {counts['several']}"
    yield f"- Pictures with an empty caption or none: {counts['empty']}"
    if tokenizers:
        yield f"- Captions of more than {allowed(tokenizers)} tokens, of which the rest is cut off: {counts['cut']}"
    yield f"- The longest, in {'tokens, with start and end' if tokenizers else 'characters'}:"
    yield from (f'    - {length}, {name}: "{textwrap.shorten(text, 200)}"' for length, name, text in longest)
    yield f"\n![The first {args.samples} samples of a run in one process](contact_sheet.png)"


def main(argv=None):
    """Read, draw, write; the exit code."""
    trainer, args = parse_args(argv)
    trainer.datasets.disable_progress_bars()
    tokenizers, origin = read_teacher(trainer, args)
    records = trainer.load_records(args)
    with trainer.or_fail(f"--output_dir {args.output_dir}: cannot be written", "name another folder"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    with trainer.or_fail("the data cannot be read to their end", "mend or remove the file"):
        figures = _, sizes, _, _, odd = read_all(records, tokenizers, args)
        picture = contact_sheet(trainer, records, args) if sizes else None
    if not sizes and not odd:
        trainer.fail("the data hold no records; look at their path or pattern")
    sheet = args.output_dir / "contact_sheet.png"
    sheet.unlink(missing_ok=True)
    if picture:
        picture.save(sheet)
    lines = list(report(figures, tokenizers, origin, args))
    named = ["\n## Unusable records\n", *(f"- {why}" for why in odd)] if odd else []
    (args.output_dir / "report.md").write_text("\n".join(lines + named) + "\n")
    print(*lines, *named[: NAMED + 1], *["- ..."] * (len(odd) > NAMED), f"\nWritten to {args.output_dir}", sep="\n")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
