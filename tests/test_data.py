"""The trainers' data: sources, unusable records, several captions, streaming."""

import io
import itertools
import json
import resource
import shutil
import struct
import sys
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, load_script, run, series, write_tar
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **settings):
    """The bytes of a image's file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def tile(i, kind="PNG"):
    """The file of an 8 x 8 image, of another colour for each i."""
    return encoded(Image.new("RGB", (8, 8), (i, 255 - i, 128)), kind)


def reds(batches):
    """The numbers of the tiles in batches, from their pixels."""
    return [round((pixels[0, 0, 0].item() + 1) * 127.5) for pixels in column(batches, "pixels")]


def write_shards(folder, *sizes, unusable=()):
    """Tar shards of these sizes; captions n0, n1 ... through all of them.

    The records with the numbers `unusable` have no image.
    """
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        rows = [(i, b"no image" if i in unusable else tile(i)) for i in islice(numbers, size)]
        files = [
            file
            for i, data in rows
            for file in ((f"{i:03}.png", data), (f"{i:03}.txt", f"n{i}".encode()))
        ]
        write_tar(folder / f"{shard}.tar", files)
    return folder


def write_folder(folder, files, rows):
    """An image folder of {name: bytes}, with the rows of its metadata.jsonl."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_parquet(folder, images, captions, names=None):
    """A folder with a parquet file: images' bytes, their names if given, captions or lists."""
    folder.mkdir(exist_ok=True)
    text = datasets.Value("string")
    text = datasets.List(text) if isinstance(captions[0], list) else text
    features = datasets.Features(image=datasets.Image(), text=text)
    rows = {
        "image": [
            {"bytes": data, "path": name}
            for data, name in zip(images, names or [None] * len(captions))
        ],
        "text": captions,
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps five seconds after each epoch of streamed parquet, for its threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def read(sd15):
    """read(flag=value, ..., first_step=0, rank=0, world=1) -> the batches of one process."""

    def read(first_step=0, rank=0, world=1, **flags):
        quick = {
            "pretrained_teacher_model": "x",
            "resolution": 8,
            "train_batch_size": 2,
            "max_train_steps": 4,
        }
        args = sd15.parse_args(command_line(quick | flags))
        batches = []
        for batch in sd15.make_loader(sd15.load_records(args), None, args, first_step, rank, world):
            sd15.check_batch(batch)
            batches.append(batch)
        return batches

    return read


def column(batches, name="caption"):
    """One list of what stands under a name in the batches."""
    return [value for batch in batches for value in batch[name]]


def same(ours, theirs):
    """Whether two lists of batches are equal: places, captions, pixels to the bit."""
    return len(ours) == len(theirs) and all(
        (a["place"], a["caption"]) == (b["place"], b["caption"])
        and torch.equal(a["pixels"], b["pixels"])
        for a, b in zip(ours, theirs, strict=True)
    )


# ------------------------------------------------------------------------------------------ sources


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory):
    """Flags that name the same twelve images in every form."""
    folder, prepare = tmp_path_factory.mktemp("sources"), load_script("scripts/prepare_data.py")
    for kind in ("tar", "parquet"):
        prepare.main(
            [str(images), "--output", str(folder / kind), "--to", kind, "--shard_mb", "0.01"]
        )
    shutil.copytree(images, folder / "csv")
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    (folder / "csv" / "metadata.csv").write_text("\n".join(lines))
    (folder / "csv" / "metadata.jsonl").unlink()
    datasets.load_dataset("imagefolder", data_dir=str(images), split="train").save_to_disk(
        folder / "saved"
    )
    (folder / "kohya").mkdir()
    shutil.copytree(images, folder / "kohya" / "10_things")
    (folder / "kohya" / "10_things" / "metadata.jsonl").unlink()
    for row in rows:
        name = Path(row["file_name"]).with_suffix(".txt")
        (folder / "kohya" / "10_things" / name).write_text(row["text"])
    shards = len(list((folder / "tar").iterdir()))
    assert shards > 2 and len(list((folder / "parquet").iterdir())) > 2
    return {
        "folder": {"train_data_dir": images},
        "metadata.csv": {"train_data_dir": folder / "csv"},
        "caption files": {"train_data_dir": folder / "kohya"},
        "parquet": {"dataset_name": folder / "parquet"},
        "saved": {"dataset_name": folder / "saved"},
        "folder of tars": {"train_shards_path_or_url": folder / "tar"},
        "glob": {"train_shards_path_or_url": folder / "tar" / "train-*.tar"},
        "braces": {
            "train_shards_path_or_url": f"{folder}/tar/train-{{00000..{shards - 1:05}}}.tar"
        },
    }


@pytest.mark.parametrize("trainer", ["sd15", "xl"])
def test_the_same_losses_from_every_source(request, sources, trainer):
    """To the bit, from an image folder, parquet and tar shards."""
    train = request.getfixturevalue("train" if trainer == "sd15" else "train_xl")
    ours, *others = [
        series(train(**sources[kind], max_train_steps=3)) for kind in ("folder", "parquet", "glob")
    ]
    assert len(ours) == 3 and others == [ours, ours]


def test_the_same_batches_from_every_source(read, sources):
    """A loss is a function of batch and step alone, so these stand for the other sources."""
    batches = {
        kind: read(**flags, resolution=32, max_train_steps=7) for kind, flags in sources.items()
    }
    assert len(set(column(batches["folder"]))) == 12
    assert [kind for kind, ours in batches.items() if not same(ours, batches["folder"])] == []


def test_every_source_streams(read, sources):
    """All twelve images in an epoch, the pixels those of map-style data but for the crop."""
    flags = {"resolution": 32, "max_train_steps": 6, "center_crop": True}
    pixels = {}
    for kind, source in sources.items():
        for streaming in (False, True):
            batches = read(**source, **flags, streaming=streaming)
            assert len(set(column(batches))) == 12, kind
            for caption, image in zip(column(batches), column(batches, "pixels"), strict=True):
                assert torch.equal(pixels.setdefault(caption, image), image), (kind, caption)


def test_tars_of_the_wild(read, tmp_path):
    """Captions under each ending, alone or in lists; images of all kinds, not like the first."""
    captions = [("txt", b"a")] * 6 + [("text", b"b"), ("caption", b"c"), ("json", b'{"text": "d"}')]
    captions += [
        ("json", b'{"text": ["e"]}'),
        ("txt", b"\xef\xbb\xbff"),
        ("txt", b" g\n"),
        ("cls", b"5"),
    ]
    kinds = (
        [("png", "PNG")] * 6
        + [("jpg", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
        + [("png", "PNG")] * 4
    )
    files = []
    for i, ((ending, kind), (text, data)) in enumerate(zip(kinds, captions, strict=True)):
        files += [(f"some/{i:02}.{ending}", tile(i, kind)), (f"some/{i:02}.{text}", data)]
    write_tar(tmp_path / "a.tar", files)
    for streaming in (False, True):
        flags = {"train_batch_size": 13, "max_train_steps": 1, "streaming": streaming}
        batches = read(train_shards_path_or_url=tmp_path, **flags)
        assert {*column(batches)} == {*"abcdefg"}
        (why,) = {*batches[0]["unusable"]}  # a label is no caption
        assert why.startswith("some/12 ") and "no caption" in why and "a.tar" in why


BROKEN = {
    "braces that name too much": ("{0..2}.tar", r"2\.tar"),
    "a command": ("pipe:cat 0.tar", "--train_shards_path_or_url pipe:"),
    "an empty folder": ("empty", "--train_shards_path_or_url"),
    "a tar that is cut off": ("cut.tar", "ReadError: unexpected end of data"),
    "no tar": ("junk.tar", "ReadError"),
    "a tar without images": ("captions.tar", "not one record of the data can be used.*no image"),
    "a tar without files": ("nothing.tar", "no data|not one record"),
}


@pytest.mark.parametrize("workers", [None, 0, 2], ids=["map", "stream", "stream by workers"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_sources_end_with_one_line(sd15, tmp_path, case, workers):
    folder = write_shards(tmp_path / "data", 6, 6)
    (folder / "empty").mkdir()
    (folder / "cut.tar").write_bytes((folder / "0.tar").read_bytes()[: 5 * 1024 + 512 + 20])
    (folder / "junk.tar").write_bytes(b"junk" * 1000)
    write_tar(folder / "captions.tar", [(f"{i}.txt", b"words") for i in range(3)])
    write_tar(folder / "nothing.tar", [])
    name, message = BROKEN[case]
    name = name if ":" in name else folder / name
    flags = {
        "pretrained_teacher_model": "x",
        "train_shards_path_or_url": name,
        "resolution": 8,
        "max_train_steps": 4,
    }
    flags |= {"streaming": workers is not None, "dataloader_num_workers": workers}
    with pytest.raises(SystemExit, match=message) as ended:
        args = sd15.parse_args(command_line(flags))
        for batch in sd15.make_loader(sd15.load_records(args), None, args, 0, 0, 1):
            sd15.check_batch(batch)
    assert "error: " in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_source_leaves_nothing_behind(train, tmp_path, streaming):
    folder = write_shards(tmp_path / "data", 6)
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:3000])
    with pytest.raises(SystemExit, match="unexpected end of data"):
        train(train_shards_path_or_url=folder, streaming=streaming, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---------------------------------------------------------------------------------- map-style order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("count", [12, 7])
def test_every_record_once_in_an_epoch(read, tmp_path, count, world, accumulation, workers):
    """Each `count` in a row of the stream are all records; an epoch may end inside a batch."""
    source = write_shards(tmp_path / "data", count)
    flags = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    steps = -(-3 * count // (2 * accumulation * world))
    found = {}
    for rank in range(world):
        batches = read(
            train_shards_path_or_url=source, max_train_steps=steps, rank=rank, world=world, **flags
        )
        assert len(batches) == steps * accumulation
        for i, batch in enumerate(batches):
            assert batch["unusable"] == []
            for place, caption in zip(batch["place"], batch["caption"], strict=True):
                assert (
                    found.setdefault((i // accumulation, place), caption) is caption
                )  # nobody else has this place
    assert len(found) == steps * 2 * accumulation * world
    stream = [found[key] for key in sorted(found)]
    epochs = [stream[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(epoch) == sorted(f"n{i}" for i in range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


# --------------------------------------------------------------------------------- unusable records


def header_of_40_000_squared():
    """A PNG file that says it is 40,000 pixels wide and high."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + tile(0)[33:]
    )


def gallery():
    """{name: (file, colours that a person sees left and right)} of unusual, usable images."""
    halves = Image.new("RGB", (8, 8), BLUE)
    halves.paste(RED, (0, 0, 4, 8))
    others = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, WHITE)]
    animated = {"save_all": True, "append_images": others}
    see_through = Image.new("P", (8, 8), 1)
    see_through.putpalette([*RED, *BLUE])
    see_through.paste(0, (0, 0, 4, 8))
    cmyk = Image.new("CMYK", (8, 8), (255, 255, 0, 0))
    cmyk.paste((0, 255, 255, 0), (0, 0, 4, 8))
    deep = np.full((8, 8), 200 * 257, np.uint16)
    deep[:, :4] = 100 * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright, the image as stored is turned by a quarter to the left
    strip = Image.new("RGB", (40_000, 8), BLUE)
    return {
        "cmyk.jpg": (encoded(cmyk, "JPEG", quality=95, subsampling=0), RED, BLUE),
        "palette.png": (encoded(see_through, transparency=1), RED, WHITE),
        "16_bit.png": (encoded(Image.fromarray(deep)), (100,) * 3, (200,) * 3),
        "animated.gif": (encoded(halves, "GIF", **animated), RED, BLUE),
        "animated.webp": (encoded(halves, "WEBP", lossless=True, **animated), RED, BLUE),
        "animated.png": (encoded(halves, "PNG", **animated), RED, BLUE),
        "turned.png": (encoded(halves.transpose(Image.Transpose.ROTATE_90), exif=exif), RED, BLUE),
        "tiny.png": (encoded(Image.new("RGB", (1, 1), GREEN)), GREEN, GREEN),
        "wide.png": (encoded(strip), BLUE, BLUE),
    }


UNUSABLE = {
    "undecodable.png": b"no image at all",
    "truncated.jpg": encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:900],
    "empty.png": b"",
    "huge.png": header_of_40_000_squared(),
}


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    """An image folder: one good image, the gallery's, the unusable ones and one that is missing."""
    images = {name: data for name, (data, *_) in gallery().items()}
    files = {"good.png": tile(7)} | images | UNUSABLE
    rows = [{"file_name": name, "text": f"{name}"} for name in [*files, "missing.png"]]
    return write_folder(tmp_path_factory.mktemp("unusable") / "data", files, rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_unusual_images_are_what_a_person_expects(read, broken_folder, streaming):
    """Converted, the first of an animation, upright, on white; unusable ones are named."""
    batches = read(
        train_data_dir=broken_folder, streaming=streaming, train_batch_size=14, max_train_steps=1
    )
    seen = dict(zip(column(batches), column(batches, "pixels"), strict=True))
    assert seen.keys() == {"good.png", *gallery()}
    for name, (_, left, right) in gallery().items():
        image = ((seen[name] + 1) * 127.5).round()
        for side, colour in ((0, left), (7, right)):
            assert (image[:, :, side] - torch.tensor(colour)[:, None]).abs().max() <= 3, name
    unusable = sorted(set(column(batches, "unusable")))
    assert len(unusable) == 4 and all(
        name in why for name, why in zip(sorted(UNUSABLE), unusable, strict=True)
    )


def test_unusable_records_in_parquet_and_tars(read, tmp_path, monkeypatch):
    """The same where images are bytes; files of their names where one works are ignored."""
    images = {"good.png": tile(7)} | UNUSABLE
    (tmp_path / "tar").mkdir()
    captions = [(f"{Path(name).stem}.txt", b"a") for name in images]
    write_tar(tmp_path / "tar" / "0.tar", sorted([*images.items(), *captions]))
    write_parquet(tmp_path / "parquet", images.values(), [*images], names=images)
    for name in images:
        (tmp_path / name).write_bytes(tile(9))
    monkeypatch.chdir(tmp_path)
    kinds = {"tar": "train_shards_path_or_url", "parquet": "dataset_name"}
    for (kind, flag), streaming in itertools.product(kinds.items(), (False, True)):
        batches = read(
            **{flag: tmp_path / kind}, streaming=streaming, train_batch_size=5, max_train_steps=3
        )
        assert [reds(batches)] == [[7] * 15], (kind, streaming)
        unusable = sorted(set(column(batches, "unusable")))
        assert len(unusable) == 4 and all(
            name.split(".")[0] in why for name, why in zip(sorted(UNUSABLE), unusable, strict=True)
        )


def test_a_wide_strip_needs_no_gigabytes(read, tmp_path):
    """40,000 x 8 at 512 pixels would be 2,560,000 x 512, in 4 GB."""
    folder = write_folder(
        tmp_path, {"a.png": gallery()["wide.png"][0]}, [{"file_name": "a.png", "text": "a"}]
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    (batch,) = read(train_data_dir=folder, resolution=512, train_batch_size=1, max_train_steps=1)
    assert batch["pixels"].shape == (1, 3, 512, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB on Linux
    assert time.perf_counter() - start < 10


def test_captions_of_all_kinds(read, tmp_path):
    """Empty: the empty one; missing, numbers, broken JSON, what is not UTF-8: unusable."""
    texts = {
        "good": ("txt", b"good"),
        "missing": ("cls", b"1"),
        "empty": ("txt", b" \n"),
        "null": ("json", b'{"text": null}'),
        "number": ("json", b'{"text": 5}'),
        "numbers": ("json", b'{"text": [5]}'),
        "latin": ("txt", b"caf\xe9"),
        "broken": ("json", b'{"text'),
        "other": ("json", b'{"words": "a"}'),
        "half": ("json", b'{"text": "cut in \\ud83d"}'),  # half of a surrogate pair
    }
    files = [(f"{i}_{name}", i, text) for i, (name, text) in enumerate(texts.items())]
    files = [
        file
        for name, i, (ending, data) in files
        for file in ((f"{name}.png", tile(i)), (f"{name}.{ending}", data))
    ]
    write_tar(tmp_path / "0.tar", files)
    for streaming in (False, True):
        batches = read(
            train_shards_path_or_url=tmp_path,
            streaming=streaming,
            train_batch_size=10,
            max_train_steps=2,
        )
        used = {}
        for caption, number in zip(column(batches), reds(batches), strict=True):
            used.setdefault([*texts][number], set()).add(caption)
        assert used == {"good": {"good"}, "empty": {""}, "null": {""}}
        why = {line.split(" ")[0].split("_")[1]: line for line in column(batches, "unusable")}
        assert sorted(why) == ["broken", "half", "latin", "missing", "number", "numbers", "other"]
        assert "no caption" in why["missing"]
        assert "--caption_column text" in why["other"] and "words" in why["other"]


def test_texts_of_a_table_that_are_not_utf8(read, tmp_path):
    """In parquet: the row is unusable; streamed, where a table is read at once, the run ends."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_parquet(tmp_path, [tile(i) for i in range(3)], ["a", "b", "c"])
    table = pq.read_table(tmp_path / "train.parquet")
    raw = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(table.set_column(1, table.schema.field(1), texts), tmp_path / "train.parquet")
    batches = read(dataset_name=tmp_path, train_batch_size=3)
    assert set(column(batches)) == {"a", "c"}
    assert [why.split(":")[0] for why in set(column(batches, "unusable"))] == [
        "row 1 (UnicodeDecodeError"
    ]
    with pytest.raises(SystemExit, match="cannot be read on.*UnicodeDecodeError"):
        read(dataset_name=tmp_path, streaming=True)


def test_a_streamed_table_of_unknown_columns(read, tmp_path, monkeypatch):
    """Such as a hub dataset of csv files."""
    (tmp_path / "a.csv").write_text("image,text\n0.png,a\n")
    data = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    with pytest.raises(SystemExit, match="error: --dataset_name .*--no-streaming"):
        read(dataset_name="a/b", streaming=True)


def test_captions_of_numbers_in_metadata(read, tmp_path):
    """A csv file with a number among the words holds texts."""
    write_folder(tmp_path, {f"{i}.png": tile(i) for i in range(3)}, [])
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,5\n2.png,\n")
    assert set(column(read(train_data_dir=tmp_path, train_batch_size=3))) == {"a", "5", ""}


@pytest.mark.parametrize("flags", [{}, {"dataloader_num_workers": 2}, {"streaming": True}], ids=str)
def test_each_unusable_record_is_replaced_and_named_once(train, tmp_path, capsys, flags):
    """Over several epochs: as many warnings as records up to ten, then one for the hundredth."""
    source = write_shards(tmp_path / "data", 6, 6, unusable=(1, 2, 9))
    out = train(train_shards_path_or_url=source, max_train_steps=12, **flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unusable records" in line]
    assert len(series(out)) == 12 and len(lines) == 3
    assert [int(line.split("warning: ")[1].split()[0]) for line in lines] == [1, 2, 3]
    assert all(sum(name in line for line in lines) == 1 for name in (" 001 ", " 002 ", " 009 "))


def test_the_first_ten_and_then_the_hundredth_are_named(sd15, capsys):
    class Bar:
        write = staticmethod(lambda text, file: print(text, file=file))

    log = sd15.Log.__new__(sd15.Log)
    log.seen, log.bar = set(), Bar
    for i in range(1200):
        log.warn_of([f"row {i}", f"row {i // 2}"])
    named = [line.rsplit(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert named == [f"row {i}" for i in (*range(10), 99, 999)]


@pytest.mark.parametrize(
    "flags",
    [{"streaming": s, "dataloader_num_workers": w} for s in (0, 1) for w in (0, 2)],
    ids=str,
)
def test_only_bad_records_end_with_one_message(train, tmp_path, flags):
    """Also where there are more readers than shards; nothing is written."""
    source = write_shards(tmp_path / "data", 3, unusable=range(3))
    flags = flags | {"streaming": bool(flags["streaming"])}
    with pytest.raises(
        SystemExit, match="error: not one record of the data can be used, the first: 00. "
    ) as ended:
        train(train_shards_path_or_url=source, output_dir=tmp_path / "out", **flags)
    assert "\n" not in ended.value.code and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- several captions


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """{kind: flags} of 24 images with three captions each, such as "7 a", "7 b" and "7 c"."""
    folder = tmp_path_factory.mktemp("captioned")
    captions = [[f"{i} {letter}" for letter in "abc"] for i in range(24)]
    files = {f"{i:02}.png": tile(i) for i in range(24)}
    rows = [{"file_name": name, "text": texts} for name, texts in zip(files, captions, strict=True)]
    members = [
        (f"{i:02}.json", json.dumps({"text": texts}).encode()) for i, texts in enumerate(captions)
    ]
    (folder / "tar").mkdir()
    write_tar(folder / "tar" / "0.tar", sorted([*files.items(), *members]))
    return {
        "jsonl": {"train_data_dir": write_folder(folder / "jsonl", files, rows)},
        "parquet": {"dataset_name": write_parquet(folder / "parquet", [*files.values()], captions)},
        "tar": {"train_shards_path_or_url": folder / "tar"},
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_several_captions_is_sampled(read, captioned, streaming):
    """All about as often, the empty one in its proportion, the same ones from each source."""
    flags = {
        "train_batch_size": 48,
        "max_train_steps": 30,
        "proportion_empty_prompts": 0.25,
        "streaming": streaming,
    }
    batches = {kind: read(**source, **flags) for kind, source in captioned.items()}
    sampled = [
        (number, *caption.split())
        for number, caption in zip(reds(batches["tar"]), column(batches["tar"]), strict=True)
    ]
    words = [row for row in sampled if len(row) == 3]
    assert (
        len(sampled) == 1440 and abs(1 - len(words) / 1440 - 0.25) < 4 * (0.25 * 0.75 / 1440) ** 0.5
    )
    assert all(int(own) == number for number, own, _ in words) and len(set(words)) == 72
    counts = Counter(letter for *_, letter in words)
    assert (
        sum((counts[letter] - len(words) / 3) ** 2 / (len(words) / 3) for letter in "abc") < 14
    )  # p = 0.001
    assert same(batches["jsonl"], batches["tar"]) and same(batches["parquet"], batches["tar"])


def test_captions_do_not_depend_on_ranks_and_workers(read, captioned):
    """Two processes with two workers each sample what one without samples."""
    flags = captioned["tar"] | {
        "proportion_empty_prompts": 0.2,
        "max_train_steps": 12,
    }
    one = read(**flags, train_batch_size=4)
    many = [read(**flags, dataloader_num_workers=2, rank=rank, world=2) for rank in (0, 1)]
    assert [a["caption"] + b["caption"] for a, b in zip(*many, strict=True)] == [
        batch["caption"] for batch in one
    ]
    assert [a["place"] + b["place"] for a, b in zip(*many, strict=True)] == [[0, 1, 2, 3]] * 12


def test_a_single_caption_is_a_list_of_one(train, tmp_path):
    images, words = [tile(60 * i) for i in range(4)], list("abcd")
    flags = {"proportion_empty_prompts": 0.3, "max_train_steps": 3}
    one = train(dataset_name=write_parquet(tmp_path / "one", images, words), **flags)
    lists = train(
        dataset_name=write_parquet(tmp_path / "list", images, [[word] for word in words]), **flags
    )
    assert series(one) == series(lists)


# ---------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("workers", [0, 2, 7])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (4, 4, 4)], ids=["4 shards", "3 shards"])
def test_streamed_records_once_in_an_epoch(read, tmp_path, sizes, world, workers):
    """Each process and worker takes its part, whether processes divide the shards or not."""
    source = write_shards(tmp_path / "data", *sizes)
    flags = {
        "streaming": True,
        "dataloader_num_workers": workers,
        "train_batch_size": 1,
        "shuffle_buffer_size": 4,
    }
    shards = (
        len(sizes) // world if len(sizes) % world == 0 else len(sizes)
    )  # of a process, else each reads all of them
    readers = max(1, min(workers, shards))
    epochs = [[], [], []]
    for rank in range(world):
        steps = 6 * sum(sizes)
        sampled = column(
            read(
                train_shards_path_or_url=source,
                max_train_steps=steps,
                rank=rank,
                world=world,
                **flags,
            )
        )
        for reader in range(readers):
            part = len(range(reader, shards, readers)) * sizes[0]
            part = part if len(sizes) % world == 0 else len(range(rank, part, world))
            own = sampled[reader::readers]
            for i, epoch in enumerate(epochs):
                epoch += own[i * part : (i + 1) * part]
    assert all(sorted(epoch) == sorted(f"n{i}" for i in range(sum(sizes))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_streams_are_seeded(read, captioned, kind):
    """A run is repeated by its seed; another seed is another order."""
    flags = captioned[kind] | {"streaming": True, "max_train_steps": 8}
    first = read(**flags)
    assert same(first, read(**flags)) and same(first, read(**flags, seed=0))
    assert not same(first, read(**flags, seed=1))


@pytest.mark.parametrize("unusable", [(), (3, 4, 5, 13, 14, 22)], ids=["good", "unusable"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_go_on_where_they_stopped(read, tmp_path, workers, accumulation, unusable):
    """From any step, inside an epoch, beside unusable records: as the run that did not stop."""
    source = write_shards(tmp_path / "data", 5, 7, 11, unusable=unusable)
    flags = {
        "train_shards_path_or_url": source,
        "streaming": True,
        "dataloader_num_workers": workers,
    }
    flags |= {
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": 16,
        "shuffle_buffer_size": 6,
    }
    for rank, world in ((0, 1), (1, 2)):
        whole = read(**flags, rank=rank, world=world)
        assert len(whole) == 16 * accumulation
        for step in (1, 2, 7, 15, 16) if workers else range(17):
            assert same(
                read(**flags, first_step=step, rank=rank, world=world), whole[step * accumulation :]
            ), step


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_streams_give_the_same_losses(train, tmp_path, workers):
    """Stopped at a checkpoint in the middle of an epoch and resumed: to the bit."""
    flags = {
        "train_shards_path_or_url": write_shards(tmp_path / "data", 5, 6, unusable=(7,)),
        "streaming": True,
    }
    flags |= {
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
    }
    whole = train(**flags, checkpointing_steps=3)
    resumed = train(**flags, resume_from_checkpoint=whole / "checkpoint-3")
    assert series(whole)[3:] == series(resumed) and len(series(resumed)) == 1


def test_nothing_is_decoded_before_it_is_needed(sd15, read, tmp_path, monkeypatch):
    """Not while the buffer is filled, and not while what was used before a stop is read over."""
    opened, open_image = [], sd15.open_image
    monkeypatch.setattr(
        sd15, "open_image", lambda record: opened.append(record["path"]) or open_image(record)
    )
    source = write_shards(tmp_path / "data", 20, 20)
    args = sd15.parse_args(
        command_line(
            {"pretrained_teacher_model": "x", "train_shards_path_or_url": source, "streaming": True}
            | {"train_batch_size": 3, "max_train_steps": 30, "resolution": 8}
        )
    )
    for first_step in (0, 21):
        opened.clear()
        batches = iter(sd15.make_loader(sd15.load_records(args), None, args, first_step, 0, 1))
        next(batches)
        assert len(opened) == 3
        next(batches)
        assert len(opened) == 6


def write_parquets(folder, *sizes):
    """A folder of parquet files of these sizes; captions n0, n1 ... through all of them."""
    numbers = itertools.count()
    for i, size in enumerate(sizes):
        rows = [*islice(numbers, size)]
        part = write_parquet(folder, [tile(row) for row in rows], [f"n{row}" for row in rows])
        (part / "train.parquet").rename(part / f"train-{i}.parquet")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_of_a_stream(read, tmp_path, workers):
    """--max_train_samples of it, and of all shards where two readers share them."""
    flags = {
        "dataset_name": write_parquets(tmp_path / "data", 6, 6),
        "streaming": True,
        "dataloader_num_workers": workers,
        "max_train_samples": 4,
        "max_train_steps": 8,
    }
    sampled = set(column(read(**flags)))
    assert sampled == ({"n0", "n1", "n6", "n7"} if workers else {"n0", "n1", "n2", "n3"})


def test_more_readers_than_records_of_a_stream(read, tmp_path):
    flags = {
        "dataset_name": write_parquets(tmp_path / "data", *[2] * 4),
        "streaming": True,
        "dataloader_num_workers": 4,
        "max_train_samples": 2,
        "max_train_steps": 4,
    }
    assert set(column(read(**flags))) == {"n0", "n2"}


def test_a_stream_resumed_past_its_end(read, tmp_path):
    """--max_train_steps less than were done: nothing is left to read."""
    source = write_shards(tmp_path / "data", 6)
    assert (
        read(train_shards_path_or_url=source, streaming=True, max_train_steps=2, first_step=4) == []
    )


def test_streams_need_a_number_of_steps(sd15):
    with pytest.raises(SystemExit, match="error: --streaming .*--max_train_steps"):
        sd15.parse_args(["--pretrained_teacher_model", "x", "--train_data_dir", "y", "--streaming"])


def test_a_long_run_of_unusable_records_is_replaced_one_by_one(sd15, read, tmp_path, monkeypatch):
    """No more than a batch is held in memory, however many places wait for the next good record."""
    made, make_sample = [], sd15.make_sample
    monkeypatch.setattr(
        sd15, "make_sample", lambda *given: made.append(given[2]) or make_sample(*given)
    )
    source = write_shards(tmp_path / "data", 101, unusable=range(100))
    args = {"train_shards_path_or_url": source, "streaming": True, "max_train_steps": 60}
    batches = read(**args)
    assert set(column(batches)) == {"n100"} and column(batches, "place") == [0, 1] * 60
    assert len(made) < 120 + 2 * 101


def test_stream_memory(tmp_path):
    """The program on small shards; what it measures is for its full size."""
    sizes = ["--records", 60, 600, "--batches", 2, 10, "--repeats", 1, "--work_dir", tmp_path]
    done = run(sys.executable, ROOT / "scripts/measure/stream_memory.py", *sizes)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert "s of 60 records" in done.stdout and "MiB after 10" in done.stdout
    assert list(tmp_path.iterdir()) == []
