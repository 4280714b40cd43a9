#!/usr/bin/env python
"""What would a trainer train on? Read all of a source as the trainer does, and report it before a GPU is paid for.

    python scripts/check_data.py --train_data_dir my_pictures --resolution 512 --center_crop
    python scripts/check_data.py --family sdxl [all the flags of a training command]

Takes the data flags of train_lcm_lora_sd15.py (or sdxl) and passes over the others. With --pretrained_teacher_model the
resolution and the length that captions are cut at are the teacher's. Writes report.md and contact_sheet.png, the first samples of
the training as the step gets them, into --report_dir. Exit code 1 if a record cannot be used, else 0.
"""

import argparse
import hashlib
import importlib
import itertools
import os
import statistics
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 10  # odd records, and captions, that are named
CELL = 192  # side of a picture on the sheet, in pixels


def parse_args(argv=None):
    """(This program's own settings, the trainer as a module, the trainer's settings)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--family", choices=["sd15", "sdxl"], default="sd15", help="the trainer whose flags these are")
    add("--samples", type=int, default=16, help="samples on the sheet")
    add("--limit", type=int, help="records that are read (default: all, or 1000 of streamed data)")
    add("--report_dir", type=Path, default=Path("data-check"), help="gets report.md and contact_sheet.png")
    own, rest = parser.parse_known_args(argv)
    sys.path.insert(0, str(ROOT))
    trainer = importlib.import_module(f"train_lcm_lora_{own.family}")
    given = {word.split("=")[0] for word in rest}
    rest += [] if "--pretrained_teacher_model" in given else ["--pretrained_teacher_model", ""]
    rest += [] if "--max_train_steps" in given else ["--max_train_steps", "1"]
    args = trainer.parse_args(rest)
    args.max_train_steps = max(args.max_train_steps, own.samples)
    own.limit = own.limit or (1000 if args.streaming else None)
    return own, trainer, args


def read_teacher(args):
    """The teacher's tokenizer, or None without one; sets the resolution where no flag does. No weights are read."""
    name, tokenizer = args.pretrained_teacher_model, None
    if name and not name.endswith(".safetensors"):
        options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
        side, vae = (kind.load_config(name, subfolder=part, **options) for kind, part in
                     ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))  # fmt: skip
        args.resolution = args.resolution or side["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    if not args.resolution:
        print("no --resolution and no teacher's configs: 512 is taken")
        args.resolution = 512
    return tokenizer


class Reader(torch.utils.data.Dataset):
    """{what is told of a record} by its row."""

    def __init__(self, records, trainer, args):
        self.records, self.open_record, self.odd, self.args = records, trainer.open_record, trainer.OddRecord, args

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        return self.look(self.records[row], row)

    def look(self, record, row):
        """Size, captions and a hash of the pixels; or why the record cannot be used."""
        try:
            picture, captions = self.open_record(record, row, self.args)
        except self.odd as error:
            return {"odd": str(error)}
        return {"size": picture.size, "captions": captions, "hash": hashlib.sha256(picture.tobytes()).hexdigest()}


def read_all(records, trainer, own, args):
    """What is told of each record, of as many as are read."""
    if args.streaming:
        reader = Reader(None, trainer, args)
        rows = (reader.look(record, row) for row, record in enumerate(records))
    else:
        reader = Reader(records.select(range(len(records))[: own.limit]), trainer, args)
        loader = {"batch_size": None, "collate_fn": lambda row: row, "num_workers": args.dataloader_num_workers}
        rows = torch.utils.data.DataLoader(reader, **loader)
    total = own.limit if args.streaming else len(reader)
    return list(tqdm(itertools.islice(rows, own.limit), total=total, unit=" records", disable=None))


def spread(values):
    """The least, the median and the most."""
    return f"{min(values):g}, {statistics.median(values):g}, {max(values):g}"


def describe(rows, tokenizer, own, args):
    """The report."""
    good, odd = [row for row in rows if "odd" not in row], [row["odd"] for row in rows if "odd" in row]
    least = " (the first, by --limit)" if len(rows) == own.limit else ""
    lines = [f"# Data check\n\n- {len(rows)} records read{least}: {len(good)} can be used, {len(odd)} cannot"]
    if good:
        widths, heights = zip(*(row["size"] for row in good))
        sides, ratios = [min(row["size"]) for row in good], [max(row["size"]) / min(row["size"]) for row in good]
        lost = statistics.mean(1 - 1 / ratio for ratio in ratios)
        small = sum(side < args.resolution for side in sides)
        twins = len(good) - len({row["hash"] for row in good})
        texts = [text for row in good for text in row["captions"]]
        empty, several = sum(not text for text in texts), sum(len(row["captions"]) > 1 for row in good)
        lines += [
            f"- width: {spread(widths)}; height: {spread(heights)}; longer / shorter side: {spread(ratios)} (least, median, most)",
            f"- {small} pictures are smaller than {args.resolution} px and are enlarged; "
            f"the square crop cuts away {lost:.0%} of a picture on average",
            f"- {twins} pictures are copies of another, pixel by pixel",
            f"- {len(texts)} captions, {empty} of them empty; {several} pictures have several",
        ]
        if tokenizer:
            length = tokenizer.model_max_length
            cut = sum(len(ids) > length for ids in tokenizer(texts)["input_ids"])
            lines.append(f"- {cut} captions are longer than the text encoder's {length} tokens and are cut")
        common = [f"{count} times: {text}" for text, count in Counter(texts).most_common(3) if count > 1]
        longest = sorted(set(texts), key=len, reverse=True)[:3]
        lines += ["", "Longest captions:", "", *(f"- {len(text)} characters: {text}" for text in longest)]
        lines += ["", "Most frequent captions:", "", *(f"- {text}" for text in common)] if common else []
    if odd:
        lines += ["", "Records that cannot be used:", "", *(f"- {why}" for why in odd[:SHOWN])]
        lines += [f"- and {len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
    return "\n".join(lines) + "\n"


def draw_sheet(records, trainer, own, args):
    """The first samples as the step gets them, each with the caption drawn for it."""
    cells, columns = [], min(4, own.samples)
    for batch in trainer.make_loader(records, None, args, 0, 0, 1):
        trainer.check_batch(batch, args)
        for pixels, caption in zip(batch["pixels"], batch["caption"], strict=True):
            tones = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            cell = Image.new("RGB", (CELL + 8, CELL + 30), "white")
            cell.paste(ImageOps.contain(Image.fromarray(tones), (CELL, CELL)), (4, 4))
            ImageDraw.Draw(cell).text((4, CELL + 10), caption[: CELL // 6], "black")
            cells.append(cell)
        if len(cells) >= own.samples:
            break
    cells = cells[: own.samples]
    cells += [Image.new("RGB", cells[0].size, "white")] * (-len(cells) % columns)
    return make_image_grid(cells, len(cells) // columns, columns)


def main(argv=None):
    """Read, report, draw; the exit code."""
    own, trainer, args = parse_args(argv)
    trainer.datasets.disable_progress_bars()
    with trainer.or_fail(
        f"--pretrained_teacher_model {args.pretrained_teacher_model}", "give a diffusers folder or hub id"
    ):
        tokenizer = read_teacher(args)
    records = trainer.load_records(args)
    rows = read_all(records, trainer, own, args)
    text = describe(rows, tokenizer, own, args)
    print(text)
    own.report_dir.mkdir(parents=True, exist_ok=True)
    (own.report_dir / "report.md").write_text(text)
    args.strict_data = False
    draw_sheet(records, trainer, own, args).save(own.report_dir / "contact_sheet.png")
    print(f"{own.report_dir}: report.md and contact_sheet.png, the first {own.samples} samples of the training")
    return int(any("odd" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
