#!/usr/bin/env python
"""Turn your images into what the trainers read: columns image and text, in parquet or tar files.

    python scripts/prepare_data.py my_images --output my_data  # a.png + a.txt or a.caption
    python scripts/prepare_data.py my_images --output my_data --prompt "a photo"  # no captions
    python scripts/prepare_data.py list.csv --output my_data --image_column path \\
        --caption_column short long
    python scripts/prepare_data.py "shards/*.tar" --output my_data --min_side 512 \\
        --filter "aesthetic>=5"
    accelerate launch train_lcm_lora_sd15.py --dataset_name my_data ...

The source is a folder of images with its subfolders (with caption files, with metadata.jsonl as
the trainers read it, or with neither and --prompt), a table (csv, tsv, jsonl, parquet) of image
bytes or of paths relative to the table, WebDataset tar shards, or anything else that `datasets`
opens by name. Images are copied byte for byte in the order of the source; records left out are
counted by reason, and the first ones are named.

With several captions for an image `text` is a list, and a tar shard holds key.json,
{"text": [...]}, instead of key.txt. All images in tar shards get the file ending of the first, as
`datasets` wants equal fields; readers look at the content. The trainers read both as they are, and
choose one of a list of captions each time.
"""

import argparse
import contextlib
import glob
import importlib
import io
import itertools
import json
import math
import operator
import re
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import fsspec
from datasets.arrow_writer import ParquetWriter
from help_formatter import HelpFormatter, command_line, given_path
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the trainers' folder

IN_TAR = "jpg jpeg png webp".split()  # file endings of images that every reader of tar shards knows
BUILDERS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tar": ("webdataset", {}),
}
IMAGE_COLUMNS = ["image", "file_name", "path", "image_path"]
CAPTION_COLUMNS = "text txt caption".split()
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
SIZE_FILTERS = {"min_side": ">=", "max_side": "<=", "max_aspect_ratio": "<="}
UNREADABLE = "--drop_unreadable"
WRITTEN = "written"
# What a source that is missing or broken leads to, in this program and its libraries.
ERRORS = (OSError, ValueError, TypeError, ImportError, tarfile.TarError)
ERRORS += (datasets.exceptions.DatasetsError,)
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
        """The number that a text is, if it is allowed."""
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
        advice = 'give one such as "aesthetic>=5"'
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: {advice}")
    return found[1], found[2], float(found[3])


def parse_args(argv=None):
    """The command line, with `size_filters` and `score_filters`: {reason: (value, sign, limit)}."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s SOURCE --output FOLDER [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    where = "folder, table, tar shards (a pattern in quotes) or hub id"
    add("source", metavar="SOURCE", help=where)
    add(
        "--output",
        type=given_path,
        metavar="FOLDER",
        required=True,
        help="new folder for the shards",
    )
    add("--to", choices=["parquet", "tar"], default="parquet", help="kind of the shards")
    size = number(float, 0.001)
    add("--shard_mb", type=size, metavar="MB", default=500.0, help="images in a shard, in MB")

    add = parser.add_argument_group("Columns of the source").add_argument
    add("--config", metavar="NAME", help="configuration, for a dataset with several")
    add("--split", metavar="NAME", default="train", help="split to read")
    found = f"default: those of {', '.join(IMAGE_COLUMNS)} that exist"
    add("--image_column", metavar="NAME", help=f"column of the images ({found})")
    found = f"default: the first of {', '.join(CAPTION_COLUMNS)} that exists"
    add("--caption_column", nargs="+", metavar="NAME", help=f"columns of captions ({found})")
    add("--captions_per_line", action="store_true", help="each line of a caption is one caption")
    add("--prompt", metavar="TEXT", help="caption of the images that have none; may be empty")

    add = parser.add_argument_group("Filters: records to leave out").add_argument
    side, ratio = number(int, 1), number(float, 1)
    add("--min_side", type=side, metavar="PIXELS", help="images whose shorter side is less")
    add("--max_side", type=side, metavar="PIXELS", help="images whose longer side is more")
    add("--max_aspect_ratio", type=ratio, metavar="R", help="images whose longer / shorter is more")
    keep = 'rows that do not satisfy "COLUMN>=NUMBER" (or > < <=)'
    add("--filter", type=condition, nargs="+", metavar="CONDITION", default=[], help=keep)
    add(UNREADABLE, action="store_true", help="images that cannot be decoded; decodes each")
    args = parser.parse_args(command_line(argv))
    if not args.source:
        fail("SOURCE is empty: give a folder, table, tar shards or hub id")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        fail(f"--output {args.output}: already exists; choose a new folder")
    limits = [(flag, sign, getattr(args, flag)) for flag, sign in SIZE_FILTERS.items()]
    args.size_filters = {
        f"--{flag} {limit:g}": (flag, sign, limit) for flag, sign, limit in limits if limit
    }
    args.score_filters = {
        f"--filter {name}{sign}{limit:g}": (name, sign, limit) for name, sign, limit in args.filter
    }
    return args


def load_trainer():
    """A trainer as a module: what it says of folders, tars and images holds here too."""
    trainer = importlib.import_module("train_lcm_lora_sd15")
    trainer.__file__ = __file__  # its error messages name this program
    return trainer


def read_folder(folder, args):
    """Rows of the images in a folder, as a trainer lists them, and what it left out."""
    trainer, column = load_trainer(), args.image_column or "image"
    key = "file_name" if column == "image" else f"{column}_file_name"  # each row of metadata has it
    rows, left = trainer.list_folder(folder, column, key, args.output)
    fields = [json.loads(row["json"] or "{}") for row in rows]
    names = dict.fromkeys(name for row in fields for name in row)
    text = (args.caption_column or [name for name in CAPTION_COLUMNS if name in names] or ["text"])[
        0
    ]
    image = column if key in names else "image"
    bare = left.pop("images without a caption", [])
    found = [
        (row[column], row[trainer.CAPTION_FILE], own) for row, own in zip(rows, fields, strict=True)
    ]
    found = sorted(found + [(path, None, {}) for path in bare], key=lambda row: row[0])
    for path, *_ in found:
        if re.match(r"\d+_", Path(path).parent.name):
            ignored = "repeats in folder names are ignored, each image is written once"
            print(f"{Path(path).parent.name}: {ignored}", flush=True)
            break
    lines = [
        f"{len(some)} {what}: {', '.join(map(repr, some[:NAMED]))}"
        for what, some in left.items()
        if some
    ]

    def read():
        """The rows, each caption file read when its turn comes."""
        for path, file, own in found:
            given = {text: Path(file).read_bytes()} if file else {}
            yield dict.fromkeys([image, *names, text]) | given | own | {image: path}

    return read() if found else None, lines


@contextlib.contextmanager
def reading(source):
    """End with one line where the source cannot be read."""
    try:
        yield
    except ERRORS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        advice = "give a folder of images, a csv, tsv, jsonl, parquet or tar file, or a hub id"
        fail(f"{source}: cannot be read ({reason}); {advice}")


def read_dataset(data, args):
    """Rows of a streamed dataset; no list is None."""
    columns = (data.features or {}).items()
    lists = [name for name, feature in columns if isinstance(feature, datasets.List)]
    with reading(args.source):
        for row in data:
            yield row | {name: row[name] or [] for name in lists}


def read_tars(data, args):
    """Rows of tar shards: what stands in a record's json, and its caption, whatever its ending."""
    with reading(args.source):
        for row in data:
            try:
                fields = json.loads(row["json"] or "{}")
            except ValueError:  # the record then has no caption
                fields = {}
            fields = fields if isinstance(fields, dict) else {}
            given = fields | {name: value for name, value in row.items() if value is not None}
            texts = [given[name] for name in ("txt", "text", "caption") if name in given]
            yield row | given | ({"text": texts[0]} if texts else {})


def open_source(args):
    """(Rows of the source with undecoded images, folder their paths are relative to, left out)."""
    trainer, source = load_trainer(), Path(args.source)
    source = source.resolve() if source.is_dir() else source.absolute()
    saved = (source / "dataset_info.json").exists()  # written by save_to_disk
    files = glob.escape(args.source) if source.is_file() else args.source
    with reading(args.source):
        if source.is_dir() and not saved:
            rows, left = read_folder(source, args)
            if rows:
                return rows, source, left
            if any(path.lower().endswith(".tar") for path in trainer.walk(source, set())):
                files = f"{glob.escape(str(source))}/**/*.tar"
    builder, options = BUILDERS.get(Path(files).suffix.lower(), (None, {}))
    options = options | {"split": args.split, "streaming": True}
    tars = builder == "webdataset"
    with reading(args.source):
        if saved:
            data = datasets.load_from_disk(args.source).to_iterable_dataset()
        elif tars:
            options["features"] = trainer.TAR_FIELDS
            data = datasets.load_dataset(builder, data_files=files, **options)
        elif builder:
            data = datasets.load_dataset(builder, data_files=files, **options)
        else:
            data = datasets.load_dataset(args.source, args.config, **options)
        for name, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
    rows = read_tars(data, args) if tars else read_dataset(data, args)
    return rows, source if source.is_dir() else source.parent, []


def choose_columns(row, args):
    """(Image columns, caption columns, whether images have lists of captions), by the first row."""
    images = [name for name in IMAGE_COLUMNS if name in row]
    images = [args.image_column] if args.image_column else images
    captions = args.caption_column or [name for name in CAPTION_COLUMNS if name in row][:1]
    columns = {"image_column": images, "caption_column": captions}
    columns["filter"] = [name for name, _, _ in args.filter]
    for flag, names in columns.items():
        for name in names:
            if name not in row:
                fail(f"--{flag} {name}: the source has no such column, only {', '.join(row)}")
    one_of = f"one of {', '.join(row)}"
    if not images:
        fail(f"--image_column: name the column of the images, {one_of}")
    if not captions and args.prompt is None:
        fail(f"--caption_column: name the column of the captions, {one_of}, or give --prompt")
    lists = any(isinstance(row[name], list) for name in captions)
    return images, captions, args.captions_per_line or len(captions) > 1 or lists


def read_captions(values, several, args):
    """The captions in a record's caption columns, each a text or, if `several`, a list of texts."""
    texts = []
    for value in values:
        for text in value if several and isinstance(value, list) else [value]:
            try:
                text = text.decode("utf-8-sig") if isinstance(text, bytes) else text or ""
                # not by splitlines, which also cuts at U+2028 and the like
                texts += re.split(r"\r?\n", text) if args.captions_per_line else [text.strip()]
            except (UnicodeDecodeError, AttributeError):
                raise LeftOut("caption is not text") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts and args.prompt is None:
        raise LeftOut("no caption (--prompt gives one)")
    return texts or [args.prompt]


def read_image(data, path, base):
    """The bytes of an image that is given by its bytes or its path."""
    if not data and path:
        try:
            with fsspec.open(path) if "://" in path else open(base / path, "rb") as file:
                data = file.read()
        except OSError:
            raise LeftOut("image file cannot be opened") from None
    if not data or not isinstance(data, bytes):
        raise LeftOut("no image, or an empty one")
    return data


def check_limits(values, filters):
    """Leave out a record if one of its values is missing, not a number or beyond its limit."""
    for reason, (name, sign, limit) in filters.items():
        value = values.get(name)
        if not isinstance(value, (int, float)) or not COMPARE[sign](value, limit):
            raise LeftOut(reason)


def check_image(data, args):
    """Leave out an image that a filter rejects; no more of it is decoded than the filters need."""
    try:
        image = Image.open(io.BytesIO(data))
        if args.drop_unreadable:
            load_trainer().to_rgb(image)
        short, long = sorted(image.size)
        sizes = {"min_side": short, "max_side": long, "max_aspect_ratio": long / short}
    except Exception:  # whatever a broken file leads Pillow to
        raise LeftOut(UNREADABLE if args.drop_unreadable else "size cannot be read") from None
    check_limits(sizes, args.size_filters)


def relative(path, base):
    """The path of an image relative to the source's folder, if it lies in it."""
    if not path or "://" in path or not Path(path).is_relative_to(base):
        return path
    return Path(path).relative_to(base).as_posix()


def read_records(rows, base, args, counts, names):
    """Records to write; the others are counted by reason, and the first of them named."""
    for i, row in enumerate(tqdm(rows, unit=" records", disable=None)):
        if i == 0:
            images, captions, several = choose_columns(row, args)
        # In tar shards there is a column for each file ending.
        image = next((row[name] for name in images if row.get(name)), None)
        if not isinstance(image, dict):
            image = {"path": image} if isinstance(image, str) else {"bytes": image}
        path = relative(image.get("path"), base)
        try:
            check_limits(row, args.score_filters)
            texts = read_captions([row.get(column) for column in captions], several, args)
            data = read_image(image.get("bytes"), path, base)
            if args.size_filters or args.drop_unreadable:
                check_image(data, args)
        except LeftOut as error:
            reason = str(error)
            names[reason] += [path or f"row {i}"] if counts[reason] < NAMED else []
        else:
            reason = WRITTEN
            text = texts if several else texts[0]
            yield {"image": {"bytes": data, "path": path}, "text": text}
        counts[reason] += 1


def write_parquet(records, path, several):
    """Write records to a parquet file that `datasets` opens."""
    text = datasets.Value("string")
    text = datasets.List(text) if several else text
    features = datasets.Features({"image": datasets.Image(), "text": text})
    writer = ParquetWriter(path=str(path), features=features, writer_batch_size=ROWS)
    for record in records:
        writer.write(record)
    writer.finalize()


def write_tar(records, path, several, ending):
    """Write records to a WebDataset tar file, all images with one file ending."""
    with tarfile.open(path, "w") as tar:
        for i, record in enumerate(records):
            kind, text = "txt", record["text"]
            if several:
                kind, text = "json", json.dumps({"text": text}, ensure_ascii=False)
            files = {ending: record["image"]["bytes"], kind: text.encode()}
            for end, data in files.items():  # without a time: equal data, equal files
                member = tarfile.TarInfo(f"{path.stem}-{i:06}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_shards(records, folder, args):
    """Write records to shards in a folder; the number of shards."""
    first = next(records, None)
    if first is None:
        return 0
    several = isinstance(first["text"], list)
    ending = Path(first["image"]["path"] or "").suffix[1:].lower()
    ending = ending if ending in IN_TAR else "jpg"
    total = 0

    def shard_of(record):
        """The number of the shard that a record goes to, by the bytes before it."""
        nonlocal total
        total += len(record["image"]["bytes"])
        return (total - 1) // (args.shard_mb * 1e6)

    groups = itertools.groupby(itertools.chain([first], records), shard_of)
    for shard, (_, group) in enumerate(groups):
        path = folder / f"train-{shard:05}.{args.to}"
        if args.to == "tar":
            write_tar(group, path, several, ending)
        else:
            write_parquet(group, path, several)
    return shard + 1


@contextlib.contextmanager
def writable(output):
    """A block that ends the program with one line where the output cannot be written."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        fail(f"--output {output}: {reason}; free some space or choose another folder")


def main(argv=None):
    """Read, filter, write beside the output folder, rename, report."""
    args = parse_args(argv)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors come as one line of ours
    rows, base, left = open_source(args)
    filters = [*args.score_filters, *args.size_filters, *[UNREADABLE] * args.drop_unreadable]
    counts, names = Counter(dict.fromkeys([WRITTEN, *filters], 0)), defaultdict(list)
    prefix, beside = f"{args.output.name}.", args.output.parent
    with writable(args.output):
        beside.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=beside)
    with unfinished as place, writable(args.output):
        folder = Path(place, "data")
        folder.mkdir()
        shards = write_shards(read_records(rows, base, args, counts, names), folder, args)
        total, written = counts.total(), counts.pop(WRITTEN)
        if not total:
            fail(f"{args.source}: contains no records")
        lines = []
        for reason, count in counts.most_common():
            named = ", ".join(names[reason]) + ", ..." * (count > NAMED)
            lines.append(f"{count} left out: {reason}{': ' * bool(count)}{named}")
        if not written:
            fail(f"0 of {total} records accepted; {lines[0]}")
        if args.output.exists():  # an empty folder, which Windows would not replace
            args.output.rmdir()
        folder.rename(args.output)
    done = f"{written} of {total} records written to {args.output}, {args.to} files: {shards}"
    print(done, *lines, *left, sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot encode
    sys.exit(main())
