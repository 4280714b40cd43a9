#!/usr/bin/env python
"""Turn the pictures that you have into what the trainers read: columns `image` and `text`, in parquet or tar shards.

    python scripts/prepare_data.py my_pictures --output my_data         # a.png + a.txt (or a.caption), in any subfolder
    python scripts/prepare_data.py my_pictures --output my_data --prompt "a photo of a sks dog"      # without captions
    python scripts/prepare_data.py list.csv --output my_data --image_column path --caption_column short long
    python scripts/prepare_data.py "shards/*.tar" --output my_data --min_side 512 --filter "aesthetic>=5"
    accelerate launch train_lcm_lora_sd15.py --dataset_name my_data ...

The source is a folder of pictures (with caption files, with metadata.jsonl as the trainers read it, or with neither and
--prompt), a table (csv, tsv, jsonl, parquet) of picture bytes or of paths relative to the table, WebDataset tar shards,
or what else `datasets` opens by name. Pictures are copied byte for byte in the order of the source; what is left out is
counted by reason, and the first ones are named.

With several captions for a picture `text` is a list, and a tar shard holds key.json, {"text": [...]}, for key.txt. All
pictures in tar shards bear the ending of the first, as `datasets` wants equal fields; readers look at the content.
The trainers read both as they are, and of a list of captions draw one each time.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import operator
import os
import re
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import fsspec
from datasets.arrow_writer import ParquetWriter
from PIL import Image
from tqdm.auto import tqdm

IN_TAR = "jpg jpeg png webp".split()  # endings that every reader of tar shards takes for a picture's
# What is read from tar shards. Given, because `datasets` would take the fields and their types from five records.
TAR_FIELDS = datasets.Features(
    {ending: datasets.Image() for ending in IN_TAR} | {"txt": datasets.Value("string"), "json": datasets.Json()}
)
BUILDERS = {
    ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".json": ("json", {}), ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}), ".tar": ("webdataset", {"features": TAR_FIELDS}),
}  # fmt: skip
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # what `datasets` looks for in a folder of pictures
PICTURES = set(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif".split())
CAPTIONS = (".txt", ".caption")
IMAGE_COLUMNS = ["image", "file_name", "path", "image_path", *IN_TAR]
CAPTION_COLUMNS = "text txt caption".split()
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
SIZE_FILTERS = {"min_side": ">=", "max_side": "<=", "max_aspect_ratio": "<="}
UNREADABLE = "--drop_unreadable"
WRITTEN = "written"
NAMED = 5  # records that are named for each reason
ROWS = 100  # in a row group of parquet, and so in memory


class LeftOut(Exception):
    """Why a record is left out."""


def fail(message):
    """End with one line on stderr and exit status 1."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def number(kind, low):
    """An argparse type: an int or a finite float, `low` or more."""

    def check(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {low} or more")
        return value

    check.__name__ = kind.__name__  # argparse names it in its own message
    return check


def condition(text):
    """An argparse type: "aesthetic>=5" as (column, sign, number)."""
    found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+)\s*", text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is no condition: give one such as "aesthetic>=5"')
    return found[1], found[2], float(found[3])


def parse_args(argv=None):
    """The command line; its `size_filters` and `score_filters` are {reason for a report: (value, sign, limit)}."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("source", help="folder, table, tar shards (a pattern in quotes) or hub id")
    add("--config", help="configuration, where a dataset has several")
    add("--split", default="train", help="split that is read")
    add("--output", type=Path, required=True, help="new folder for the shards")
    add("--to", choices=["parquet", "tar"], default="parquet", help="kind of the shards")
    add("--shard_mb", type=number(float, 0.001), default=500.0, help="megabytes of pictures in a shard")
    add("--image_column", help=f"column of the pictures (default: {', '.join(IMAGE_COLUMNS)}, whatever is there)")
    add("--caption_column", nargs="+", help=f"columns of captions (default: the first of {', '.join(CAPTION_COLUMNS)})")
    add("--captions_per_line", action="store_true", help="each line of a caption is a caption of its own")
    add("--prompt", help="caption of the pictures that have none; may be empty")
    add("--min_side", type=number(int, 1), help="leave out pictures whose shorter side is less, in pixels")
    add("--max_side", type=number(int, 1), help="leave out pictures whose longer side is more, in pixels")
    add("--max_aspect_ratio", type=number(float, 1), help="leave out pictures whose longer / shorter side is more")
    add("--filter", type=condition, nargs="+", default=[], help='keep only rows with "COLUMN>=NUMBER" (or > < <=)')
    add(UNREADABLE, action="store_true", help="decode each picture and leave out what cannot be")
    args = parser.parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        fail(f"--output {args.output}: it is there already; name a new folder")
    limits = [(flag, sign, getattr(args, flag)) for flag, sign in SIZE_FILTERS.items()]
    args.size_filters = {f"--{flag} {limit:g}": (flag, sign, limit) for flag, sign, limit in limits if limit}
    args.score_filters = {f"--filter {name}{sign}{limit:g}": (name, sign, limit) for name, sign, limit in args.filter}
    return args


def walk(folder):
    """The files in a folder and its subfolders, sorted; hidden ones are passed over."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def read_folder(folder):
    """Rows of the pictures in a folder, each with the caption file beside it."""
    told = False
    for path in walk(folder):
        if path.suffix.lower() not in PICTURES:
            continue
        if not told and re.match(r"\d+_", path.parent.name):
            print(
                f"{path.parent.name}: the repeats in folder names are ignored, each picture is written once", flush=True
            )
            told = True
        captions = [path.with_suffix(ending) for ending in CAPTIONS if path.with_suffix(ending).is_file()]
        yield {"image": str(path), "text": captions[0].read_bytes() if captions else None}


@contextlib.contextmanager
def reading(source):
    """End with one line where the source cannot be read."""
    try:
        yield
    except (OSError, ValueError, TypeError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        fail(f"{source}: it cannot be read ({reason}); "
             "give a folder of pictures, a csv, tsv, jsonl, parquet or tar file, or a hub id")  # fmt: skip


def read_dataset(data, args):
    """Rows of a streamed dataset. The fields of a tar shard's key.json are columns too; a missing list is empty."""
    lists = [name for name, feature in (data.features or {}).items() if isinstance(feature, datasets.List)]
    with reading(args.source):
        for row in data:
            fields = row["json"] if isinstance(row.get("json"), dict) else {}
            yield fields | row | {name: row[name] or [] for name in lists}


def open_source(args):
    """(Rows of the source with undecoded pictures, folder that their paths are relative to)."""
    source = Path(args.source)
    source = source.resolve() if source.is_dir() else source.absolute()
    found = {path.name if path.name in METADATA else path.suffix.lower() for path in walk(source)}
    if found & PICTURES and not found & METADATA:
        return read_folder(source), source
    files = f"{source}/**/*.tar" if ".tar" in found else args.source
    builder, options = BUILDERS.get(Path(files).suffix.lower(), (None, {}))
    options = options | {"split": args.split, "streaming": True}
    with reading(args.source):
        if (source / "dataset_info.json").exists():  # written by save_to_disk
            data = datasets.load_from_disk(args.source).to_iterable_dataset()
        elif found & METADATA:
            data = datasets.load_dataset("imagefolder", data_dir=args.source, **options)
        elif builder:
            data = datasets.load_dataset(builder, data_files=files, **options)
        else:
            data = datasets.load_dataset(args.source, args.config, **options)
        for name, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
    return read_dataset(data, args), source if source.is_dir() else source.parent


def choose_columns(row, args):
    """(Picture columns, caption columns, whether pictures have lists of captions), from the first row of the source."""
    images = [args.image_column] if args.image_column else [name for name in IMAGE_COLUMNS if name in row]
    captions = args.caption_column or [name for name in CAPTION_COLUMNS if name in row][:1]
    scores = [name for name, _, _ in args.filter]
    for flag, names in ("--image_column", images), ("--caption_column", captions), ("--filter", scores):
        for name in names:
            if name not in row:
                fail(f"{flag} {name}: the source has no such column, only {', '.join(row)}")
    if not images:
        fail(f"--image_column: name the column of the pictures, one of {', '.join(row)}")
    if not captions and args.prompt is None:
        fail(f"--caption_column: name the column of the captions, one of {', '.join(row)}, or give --prompt")
    several = args.captions_per_line or len(captions) > 1 or any(isinstance(row[name], list) for name in captions)
    return images, captions, several


def read_captions(values, several, args):
    """The captions in a record's caption columns, each a text or, where there are `several`, a list of texts."""
    texts = []
    for value in values:
        for text in value if several and isinstance(value, list) else [value]:
            try:
                text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
                texts += (text or "").splitlines() if args.captions_per_line else [(text or "").strip()]
            except (UnicodeDecodeError, AttributeError):
                raise LeftOut("caption is no text") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts and args.prompt is None:
        raise LeftOut("no caption (--prompt gives one)")
    return texts or [args.prompt]


def read_picture(data, path, base):
    """The bytes of a picture that is given by its bytes or its path."""
    if not data and path:
        try:
            with fsspec.open(path) if "://" in path else open(base / path, "rb") as file:
                data = file.read()
        except OSError:
            raise LeftOut("picture file cannot be opened") from None
    if not data or not isinstance(data, bytes):
        raise LeftOut("no picture, or an empty one")
    return data


def check_limits(values, filters):
    """Leave out a record one of whose values is missing, no number or on the wrong side of its limit."""
    for reason, (name, sign, limit) in filters.items():
        value = values.get(name)
        if not isinstance(value, (int, float)) or not COMPARE[sign](value, limit):
            raise LeftOut(reason)


def check_picture(data, args):
    """Leave out a picture that a filter rejects; no more of it is decoded than the filters need."""
    try:
        picture = Image.open(io.BytesIO(data))
        if args.drop_unreadable:
            picture.load()
        short, long = sorted(picture.size)
        sizes = {"min_side": short, "max_side": long, "max_aspect_ratio": long / short}
    except Exception:  # whatever a broken file leads Pillow to
        raise LeftOut(UNREADABLE if args.drop_unreadable else "size cannot be read") from None
    check_limits(sizes, args.size_filters)


def read_records(rows, base, args, counts, names):
    """Records to write; the others are counted by reason, and the first of them named."""
    for i, row in enumerate(tqdm(rows, unit=" records", disable=None)):
        if i == 0:
            images, captions, several = choose_columns(row, args)
        picture = next((row[name] for name in images if row.get(name)), None)  # in tar shards a field for each ending
        if not isinstance(picture, dict):
            picture = {"path": picture} if isinstance(picture, str) else {"bytes": picture}
        path = picture.get("path")
        path = path and path.removeprefix(f"{base}/")
        try:
            check_limits(row, args.score_filters)
            texts = read_captions([row.get(column) for column in captions], several, args)
            data = read_picture(picture.get("bytes"), path, base)
            if args.size_filters or args.drop_unreadable:
                check_picture(data, args)
        except LeftOut as error:
            reason = str(error)
            names[reason] += [path or f"row {i}"] if counts[reason] < NAMED else []
        else:
            reason = WRITTEN
            yield {"image": {"bytes": data, "path": path}, "text": texts if several else texts[0]}
        counts[reason] += 1


def write_parquet(records, path, several):
    """Write records to a parquet file that `datasets` opens."""
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(text) if several else text})
    writer = ParquetWriter(path=str(path), features=features, writer_batch_size=ROWS)
    for record in records:
        writer.write(record)
    writer.finalize()


def write_tar(records, path, several, image):
    """Write records to a WebDataset tar file."""
    with tarfile.open(path, "w") as tar:
        for i, record in enumerate(records):
            text = json.dumps({"text": record["text"]}, ensure_ascii=False) if several else record["text"]
            files = {image: record["image"]["bytes"], "json" if several else "txt": text.encode()}
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{path.stem}-{i:06}.{ending}")  # without a time: equal data, equal files
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_shards(records, folder, args):
    """Write records to shards in a folder; the number of shards."""
    first = next(records, None)
    if first is None:
        return 0
    several, ending = isinstance(first["text"], list), Path(first["image"]["path"] or "").suffix[1:].lower()
    ending = ending if ending in IN_TAR else "jpg"
    total = 0

    def shard_of(record):
        nonlocal total
        total += len(record["image"]["bytes"])
        return (total - 1) // (args.shard_mb * 1e6)

    for shard, (_, group) in enumerate(itertools.groupby(itertools.chain([first], records), shard_of)):
        path = folder / f"train-{shard:05}.{args.to}"
        write_tar(group, path, several, ending) if args.to == "tar" else write_parquet(group, path, several)
    return shard + 1


def main(argv=None):
    """Read, filter, write beside the output folder, rename, report."""
    args = parse_args(argv)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors come as one line of ours
    rows, base = open_source(args)
    filters = [*args.score_filters, *args.size_filters, *[UNREADABLE] * args.drop_unreadable]
    counts, names = Counter(dict.fromkeys([WRITTEN, *filters], 0)), defaultdict(list)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(prefix=f"{args.output.name}.", suffix=".part", dir=args.output.parent)
    except OSError as error:
        fail(f"--output {args.output}: it cannot be written ({error.strerror}); name another folder")
    with unfinished as place:
        folder = Path(place, "data")
        folder.mkdir()
        shards = write_shards(read_records(rows, base, args, counts, names), folder, args)
        total, written = counts.total(), counts.pop(WRITTEN)
        if not total:
            fail(f"{args.source}: it holds no records")
        lines = [
            f"{count} left out: {reason}{': ' * bool(count)}{', '.join(names[reason])}{', ...' * (count > NAMED)}"
            for reason, count in counts.most_common()
        ]
        if not written:
            fail(f"0 of {total} records accepted; {lines[0]}")
        folder.rename(args.output)
    print(f"{written} of {total} records written to {args.output}, {args.to} files: {shards}", *lines, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
