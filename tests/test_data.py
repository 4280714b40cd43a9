"""The trainers' data: sources, unusable records, several captions, streaming."""

import argparse
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
import drift
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
        loader = sd15.make_loader(sd15.load_records(args), None, args, first_step, rank, world)
        for batch in sd15.or_end(loader, lambda: None):
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
        loader = sd15.make_loader(sd15.load_records(args), None, args, 0, 0, 1)
        for _ in sd15.or_end(loader, lambda: None):
            pass
    assert "error: " in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_source_leaves_nothing_behind(train, tmp_path, streaming):
    folder = write_shards(tmp_path / "data", 6)
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:3000])
    with pytest.raises(SystemExit, match="unexpected end of data"):
        train(train_shards_path_or_url=folder, streaming=streaming, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---------------------------------------------------------------------------------- local folders


def write_files(folder, files):
    """A folder of {path in it: bytes or text}; an image's bytes are those of its number."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = tile(data) if isinstance(data, int) else data
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def rows(**captions):
    """metadata.jsonl of {stem of a .png: caption}."""
    lines = [
        json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in captions.items()
    ]
    return "\n".join(lines)


def listed(sd15, folder, **flags):
    """{caption: number of the tile} of what a run would train on, and unusable records."""
    defaults = {"pretrained_teacher_model": "x", "resolution": 8, "train_data_dir": folder}
    args = sd15.parse_args(command_line(defaults | {"max_train_steps": 1} | flags))
    found, unusable = {}, []
    for number, row in enumerate(sd15.load_records(args)):
        try:
            record = sd15.to_record(row, number, args)
            image = sd15.open_image(record["image"])
        except sd15.UnusableRecord as error:
            unusable.append(str(error))
            continue
        found[" | ".join(record["captions"])] = image.getpixel((0, 0))[0]
    return found, unusable


FOLDERS = {
    "a name with `train`": (
        {
            "steam train.png": 1,
            "b.png": 2,
            "metadata.jsonl": rows(**{"steam train": "t", "b": "b"}),
        },
        "b=2 t=1",
    ),
    "a folder train beside others": (
        {
            "train/a.png": 1,
            "train/a.txt": "a",
            "other/b.png": 2,
            "other/b.txt": "b",
            "test/c.png": 3,
            "test/c.txt": "c",
        },
        "b=2 c=3 a=1",
    ),
    "glob signs": (
        {"x[1]/a*.png": 1, "x[1]/a*.txt": "a", "{b,c}/?.png": 2, "{b,c}/?.txt": "b"},
        "a=1 b=2",
    ),
    "other letters": (
        {"-v/ä ö.png": 1, "-v/ä ö.txt": "a", "日本/本.png": 2, "日本/本.caption": "b"},
        "a=1 b=2",
    ),
    "kohya": (
        {
            "10_cats/a.png": 1,
            "10_cats/a.txt": "a",
            "2_dogs/b.v2.png": 2,
            "2_dogs/b.v2.caption": "b",
        },
        "a=1 b=2",
    ),
    "endings in any case": ({"a.PNG": 1, "a.TXT": "a", "b.JFIF": 2, "b.Caption": "b"}, "a=1 b=2"),
    "metadata of a folder in it": (
        {
            "metadata.jsonl": rows(a="a"),
            "a.png": 1,
            "s/metadata.jsonl": rows(a="b"),
            "s/a.png": 2,
            "t/metadata.csv": "file_name,text\n./a.png,c\n",
            "t/a.png": 3,
        },
        "a=1 b=2 c=3",
    ),
    "metadata naming a folder in it": (
        {"metadata.jsonl": rows(**{"s/a": "a", "t/../t/b": "b"}), "s/a.png": 1, "t/b.png": 2},
        "a=1 b=2",
    ),
    "metadata before a caption file": (
        {"metadata.jsonl": rows(a="a"), "a.png": 1, "a.txt": "no", "b.png": 2, "b.txt": "b"},
        "a=1 b=2",
    ),
    "metadata with a byte-order mark": (
        {
            "metadata.jsonl": "\ufeff" + rows(a="a") + "\r\n\r\n",
            "a.png": 1,
            "s/metadata.csv": "\ufefffile_name,text\r\nb.png,b\r\n",
            "s/b.png": 2,
        },
        "a=1 b=2",
    ),
    "an image of any ending that metadata name": (
        {"metadata.csv": "file_name,text\n0001,a\n", "0001": 1},
        "a=1",
    ),
    "several captions": (
        {"metadata.jsonl": json.dumps({"file_name": "a.png", "text": ["a", "b"]}), "a.png": 1},
        "a | b=1",
    ),
    "lines of one caption": ({"a.png": 1, "a.txt": "a,\nb\u2028c\n"}, "a,\nb\u2028c=1"),
    "an empty caption": ({"a.png": 1, "a.txt": "", "b.png": 2, "b.txt": "b"}, "=1 b=2"),
    "hidden files": (
        {
            "a.png": 1,
            "a.txt": "a",
            "._a.png": b"fork",
            "._a.txt": "no",
            ".ipynb_checkpoints/a-checkpoint.png": 9,
            ".ipynb_checkpoints/a-checkpoint.txt": "no",
            "__MACOSX/._a.png": b"fork",
            "__MACOSX/._a.txt": "no",
        },
        "a=1",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_what_it_holds(sd15, tmp_path, case, streaming, capsys):
    """Captions from metadata or beside the images, whatever the names."""
    files, expected = FOLDERS[case]
    folder = write_files(tmp_path / "pics[1]", files)
    write_files(tmp_path / "pics1", {"n.png": 99, "n.txt": "neighbour"})
    found, unusable = listed(sd15, folder, streaming=streaming)
    words = [f"{caption}={number}" for caption, number in found.items()]
    assert (" ".join(words), unusable) == (expected, [])
    assert "left out" not in capsys.readouterr().out


def test_two_images_of_one_name_share_their_caption(sd15, tmp_path):
    files = {"a.jpg": tile(1, "JPEG"), "a.png": 2, "a.txt": "a"}
    args = [
        "--pretrained_teacher_model",
        "x",
        "--train_data_dir",
        str(write_files(tmp_path, files)),
    ]
    assert len(sd15.load_records(sd15.parse_args(args))) == 2


def test_two_rows_of_one_image_are_two_records(sd15, tmp_path):
    lines = rows(a="a") + "\n" + rows(a="b")
    found, _ = listed(sd15, write_files(tmp_path, {"a.png": 1, "metadata.jsonl": lines}))
    assert found == {"a": 1, "b": 1}


def test_links_are_followed_and_loops_end(sd15, tmp_path):
    """A linked image, a linked folder, a folder that links to those above it and to another."""
    write_files(tmp_path / "far", {"c.png": 3, "c.txt": "c", "d/d.png": 4, "d/d.txt": "d"})
    folder = write_files(
        tmp_path / "data", {"a.png": 1, "a.txt": "a", "x/e.png": 5, "x/e.txt": "e"}
    )
    for i in range(1, 9):  # by names alone 2 to the 40th power of folders
        (folder / f"loop{i}").symlink_to(folder)
    (folder / "x" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "d" / "back").symlink_to(folder / "x")
    (tmp_path / "b.png").write_bytes(tile(2))
    (folder / "b.png").symlink_to(tmp_path / "b.png")
    (folder / "b.txt").write_text("b")
    start = time.perf_counter()
    found, unusable = listed(sd15, folder)
    assert found == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5} and not unusable
    assert time.perf_counter() - start < 20


def test_what_is_left_out_is_counted_and_named(sd15, tmp_path, capsys):
    """Images without a caption, rows without an image, formats that Pillow does not know."""
    table = rows(a="a", gone="b") + '\n{"text": "no name"}\n' + '{"file_name": "d.png", "words": 1}'
    files = {"metadata.jsonl": table, "a.png": 1, "c.png": 3, "d.png": 4, "e.png": 5, "e.txt": "e"}
    files |= {"f.heic": b"", "g.jxl": b"", "old.tar": b"", "notes.txt": "to do"}
    found, unusable = listed(sd15, write_files(tmp_path, files))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert (found, unusable) == ({"a": 1, "e": 5}, [])
    for words in ("2 images without a caption", "c.png", "3 rows without text", "gone.png"):
        assert words in line
    assert "4 other files" in line and "f.heic" in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_left_out(sd15, tmp_path, capsys):
    """Beside images that are trained on."""
    write_files(tmp_path, {"a.png": 1, "a.txt": "a", "b.png": 2, "b.txt": "b"})
    for end in (".png", ".txt"):
        (tmp_path / f"b{end}").rename(tmp_path / f"caf\udce9{end}")
    assert listed(sd15, tmp_path) == ({"a": 1}, [])
    assert "2 other files" in capsys.readouterr().out


def test_the_order_is_that_of_the_names(sd15, tmp_path, monkeypatch):
    """Not that in which the file system lists them."""
    files = {f"{name}{end}": data for name in "badc" for end, data in ((".png", 1), (".txt", name))}
    folder, scandir = write_files(tmp_path, files), sd15.os.scandir
    for last in "ad":
        key = {"key": lambda entry: entry.name, "reverse": last == "a"}
        monkeypatch.setattr(sd15.os, "scandir", lambda path, key=key: sorted(scandir(path), **key))
        assert [*listed(sd15, folder)[0]] == [*"abcd"]


def test_captions_in_other_encodings_are_unusable_records(sd15, tmp_path):
    """A byte-order mark of UTF-8 is none of the caption's letters; UTF-16 and Latin-1 are named."""
    files = {f"{name}.png": i for i, name in enumerate("abcd", 1)}
    files |= {"a.txt": b"\xef\xbb\xbfa", "b.txt": "b".encode("utf-16"), "c.txt": b"caf\xe9"}
    found, unusable = listed(sd15, write_files(tmp_path, files | {"d.txt": "d\r\n"}))
    assert found == {"a": 1, "d": 4}
    assert [("b.png" in why, "c.png" in why) for why in unusable] == [(True, False), (False, True)]


NO_FOLDER = {
    "no captions": ({"a.png": 1}, "--train_data_dir .*1 images without a caption"),
    "no images": ({"a.heic": b""}, "--train_data_dir .*1 other files .*a.heic"),
    "nothing": ({}, "--train_data_dir"),
    "parquet": ({"a.parquet": b""}, "--train_data_dir .*a.parquet.* parquet.* --dataset_name"),
    "tars": ({"a.tar": b""}, "--train_data_dir .*a.tar.* tars to --train_shards_path_or_url"),
    "broken metadata": (
        {"a.png": 1, "s/metadata.jsonl": '{"file_name'},
        r"s/metadata.jsonl: cannot",
    ),
    "a list as metadata": ({"a.png": 1, "metadata.jsonl": "[1, 2]"}, r"metadata.jsonl: cannot"),
    "metadata in UTF-16": (
        {"a.png": 1, "metadata.csv": "a,b".encode("utf-16")},
        "metadata.csv: cannot",
    ),
    "semicolons": ({"a.png": 1, "metadata.csv": "file_name;text\na.png;a"}, "file_name;text"),
}


@pytest.mark.parametrize("case", NO_FOLDER)
def test_folders_that_are_no_data(sd15, tmp_path, case):
    files, message = NO_FOLDER[case]
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=message) as ended:
        listed(sd15, write_files(tmp_path / "data", files))
    assert "\n" not in ended.value.code


def test_a_source_is_what_its_flag_says(sd15, tmp_path):
    """A tar beside what was unpacked from it; a folder of images is no --dataset_name."""
    folder = write_files(tmp_path / "data", {f"{i}.png": i for i in range(6)})
    write_files(folder, {f"{i}.txt": f"n{i}" for i in range(6)})
    write_tar(folder / "all.tar", [("0.png", tile(0)), ("1.png", tile(1))])
    assert listed(sd15, folder)[0] == {f"n{i}": i for i in range(6)}
    with pytest.raises(SystemExit, match="--dataset_name .*images belong to --train_data_dir"):
        listed(sd15, None, dataset_name=folder)
    named = write_parquet(tmp_path / "pics[1]", [tile(1)], ["one"])
    write_parquet(tmp_path / "pics1", [tile(2)], ["neighbour"])
    with pytest.raises(SystemExit, match=r"--dataset_name .*pics\[1\].*rename"):
        listed(sd15, None, dataset_name=named)


def test_the_images_of_another_column(sd15, tmp_path):
    """--image_column and --caption_column of metadata."""
    row = {"input_file_name": "a.png", "file_name": "b.png", "words": "w", "text": "t"}
    files = {"a.png": 1, "b.png": 2, "metadata.jsonl": json.dumps(row)}
    folder = write_files(tmp_path, files)
    flags = {"image_column": "input", "caption_column": "words"}
    assert listed(sd15, folder)[0] == {"t": 2} and listed(sd15, folder, **flags)[0] == {"w": 1}
    assert listed(sd15, folder, max_train_samples=1)[0] == {"t": 2}


def test_a_run_inside_its_data(train, tmp_path, capsys):
    """--output_dir in --train_data_dir: a resumed run has the data of the first."""
    files = {f"{i}.png": 60 * i for i in range(4)} | {f"{i}.txt": f"n{i}" for i in range(4)}
    folder = write_files(tmp_path / "data", files)
    flags = {"train_data_dir": folder, "output_dir": folder / "run", "checkpointing_steps": 1}
    flags |= {"validation_prompts": ["a"], "validation_steps": 1}
    train(**flags, max_train_steps=1)
    out = train(**flags, max_train_steps=2, resume_from_checkpoint="latest")
    said = capsys.readouterr().out
    assert len(series(out)) == 2 and (out / "validation" / "step-000001.png").exists()
    assert "data: 4 images" in said and "left out" not in said


def test_a_first_run_from_images_and_caption_files(train, tmp_path, capsys):
    """Forty images, each with a .txt, as they are: no program before the trainer."""
    files = {f"{i:02}.png": 6 * i for i in range(40)} | {f"{i:02}.txt": f"n{i}" for i in range(40)}
    out = train(train_data_dir=write_files(tmp_path / "mine", files), max_train_steps=2)
    assert len(series(out)) == 2 and "data: 40 images" in capsys.readouterr().out


def test_tables_of_urls_name_the_way(sd15, tmp_path):
    """A column of texts where images should be."""
    table = datasets.Dataset.from_dict({"image": ["https://a/b.png"], "text": ["a"]})
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match="--image_column image.*string.*prepare_data.py"):
        listed(sd15, None, dataset_name=tmp_path)


TARS = {
    "capitals": ("a.JPG=1 a.TXT=a b.Png=2 b.txt=b", "a=1 b=2"),
    "dots": ("i.0001.png=1 i.0001.txt=a i.0002.png=2 i.0002.txt=b", "a=1 b=2"),
    "masks beside": ("1.jpg=1 1.mask.png=9 1.txt=a 2.jpg=2 2.mask.png=9 2.txt=b", "a=1 b=2"),
    "masks before and behind": (
        "1.a.png=9 1.png=1 1.txt=a 1.z.png=9 1.z2.png=9 2.png=2 2.txt=b",
        "a=1 b=2",
    ),
    "a copy": ("1.1.png=1 1.1.txt=a 1.png=2 1.txt=b", "a=1 b=2"),
    "other formats": ("a.bmp=1 a.txt=a b.tiff=2 b.caption=b", "a=1 b=2"),
    "folders with dots": ("v1.0/a.png=1 v1.0/a.txt=a v1.1/a.png=2 v1.1/a.txt=b", "a=1 b=2"),
    "a README": ("README.md=x a.png=1 a.txt=a", "a=1"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", TARS)
def test_records_of_tars(sd15, tmp_path, case, streaming):
    """A record is what differs in the last ending only."""
    (tmp_path / "x[1]").mkdir()
    files = [word.split("=") for word in TARS[case][0].split()]
    files = [(name, tile(int(text)) if text.isdigit() else text.encode()) for name, text in files]
    write_tar(tmp_path / "x[1]" / "a{1}.tar", files)
    for source in (tmp_path / "x[1]", tmp_path / "x[1]" / "a{1}.tar"):
        flags = {"train_shards_path_or_url": source, "streaming": streaming}
        found, unusable = listed(sd15, None, **flags)
        words = [f"{caption}={number}" for caption, number in found.items()]
        assert (" ".join(words), unusable) == (TARS[case][1], [])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first", ["png", "txt"])
def test_tars_with_captions_behind_all_images(read, tmp_path, first, streaming):
    """They do not train with empty captions: one line names the tar."""
    files = [
        (f"{i:02}.{end}", tile(i) if end == "png" else b"a")
        for end in ("png", "txt")
        for i in range(30)
    ]
    files.sort(key=lambda file: not file[0].endswith(first))
    write_tar(tmp_path / "a.tar", files)
    message = "no caption stands beside it in .*a.tar" if first == "png" else "a.tar|no image"
    with pytest.raises(SystemExit, match=f"not one record .*{message}"):
        read(train_shards_path_or_url=tmp_path, streaming=streaming)


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


def deep(dtype, top, mode=None):
    """A grey image whose left half is 0.25 of `top`, the right one 0.75, as a TIFF file."""
    tones = np.full((8, 8), 0.75 * top, dtype)
    tones[:, :4] = 0.25 * top
    image = Image.fromarray(tones)
    return encoded(image if mode is None else image.convert(mode), "TIFF")


def with_alpha(mode):
    """Red, opaque left and transparent right, in a mode with alpha."""
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((*BLUE, 0), (4, 0, 8, 8))
    return image.convert(mode)


def tags(image, kind, data):
    """A file whose EXIF data are these bytes."""
    return encoded(image, kind, exif=b"Exif\0\0" + data)


def two_halves(mode):
    """Red left, blue right, in a mode."""
    image = Image.new("RGB", (8, 8), BLUE)
    image.paste(RED, (0, 0, 4, 8))
    return image.convert(mode)


def as_viewed():
    """{what: (file, colours left and right as a viewer shows them)}."""
    greys, half = ((64,) * 3, (191,) * 3), two_halves("RGB")
    turned = half.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    broken = exif.tobytes()[6:] + b"\xff" * 9
    see_through = Image.new("1", (8, 8), 0)
    see_through.paste(1, (4, 0, 8, 8))
    lab = Image.new("LAB", (8, 8), (64, 128, 128))
    lab.paste((191, 128, 128), (4, 0, 8, 8))
    above = np.full((8, 8), 0.75, np.float32)
    above[:, :4], above[0, 0], above[1, 0] = 0.25, 1.3, np.nan
    return {
        "float of 0 to 1": (deep(np.float32, 1), *greys),
        "float of 0 to 255": (deep(np.float32, 255), *greys),
        "float of 0 to 65535": (deep(np.float32, 65535), *greys),
        "float a little above 1": (encoded(Image.fromarray(above), "TIFF"), *greys),
        "32 bits of 8": (deep(np.int32, 255), *greys),
        "32 bits of 16": (deep(np.int32, 65535), *greys),
        "32 bits": (deep(np.int32, 2.0**31 - 1), (32,) * 3, (96,) * 3),
        "16 bits": (deep(np.uint16, 65535), *greys),
        "16 bits, dark": (deep(np.uint16, 1024), (1,) * 3, (3,) * 3),
        "16 bits, big-endian": (deep(">u2", 65535), *greys),
        "16 bits in PNG": (encoded(Image.open(io.BytesIO(deep(np.uint16, 65535)))), *greys),
        "8 bits": (deep(np.uint8, 255), *greys),
        "float in PFM": (encoded(Image.open(io.BytesIO(deep(np.float32, 1))), "PPM"), *greys),
        "1 bit": (encoded(see_through, "TIFF"), (0,) * 3, WHITE),
        "1 bit with a transparent tone": (encoded(see_through, transparency=0), WHITE, WHITE),
        "palette": (encoded(half.quantize(4)), RED, BLUE),
        "palette with alpha": (encoded(with_alpha("RGBA").quantize(4)), RED, WHITE),
        "PA": (encoded(with_alpha("PA"), "TIFF"), RED, WHITE),
        "LA": (encoded(with_alpha("LA")), (76,) * 3, WHITE),
        "RGBA": (encoded(with_alpha("RGBA"), "WEBP", lossless=True), RED, WHITE),
        "CMYK": (encoded(two_halves("CMYK"), "TIFF"), RED, BLUE),
        "YCbCr": (encoded(two_halves("YCbCr"), "TIFF"), RED, BLUE),
        "LAB": (encoded(lab, "TIFF"), (60,) * 3, (183,) * 3),
        "turned": (encoded(turned, "JPEG", exif=exif, quality=98, subsampling=0), RED, BLUE),
        "turned TIFF": (encoded(turned, "TIFF", exif=exif), RED, BLUE),
        "turned, other tags broken": (tags(turned, "PNG", broken), RED, BLUE),
        "broken EXIF": (tags(half, "PNG", b"no EXIF data at all"), RED, BLUE),
        "cut EXIF": (tags(half, "WEBP", b"II*\0\xff\xff"), RED, BLUE),
        "animated": (
            encoded(half, "GIF", save_all=True, append_images=[two_halves("L")]),
            RED,
            BLUE,
        ),
    }


@pytest.mark.parametrize("program", ["sd15", "infer"])
@pytest.mark.parametrize("case", as_viewed())
def test_images_are_what_a_viewer_shows(request, tmp_path, program, case):
    """Every mode that Pillow opens, the same way in trainers and infer.py."""
    data, left, right = as_viewed()[case]
    (tmp_path / "a").write_bytes(data)
    if program == "infer":
        flags = argparse.Namespace(image=tmp_path / "a", mask=None, control_image=None)
        image = load_script("infer.py").read_images(flags)["image"]
    else:
        image = request.getfixturevalue(program).open_image({"bytes": data, "path": None})
    assert image.mode == "RGB" and image.size == (8, 8)
    for x, colour in ((2, left), (6, right)):
        assert np.abs(np.subtract(image.getpixel((x, 4)), colour)).max() <= 4, (x, colour)


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "RGBX", "I;16", "I;16L", "I;16B", "F", "I"])
def test_images_of_modes_in_memory(sd15, mode):
    """Those that few files or none have."""
    grey = Image.new("L", (8, 8), 100)
    through = {"RGBa": "RGBA", "HSV": "RGB", "RGBX": "RGB"}
    tones = grey.convert(through.get(mode, "I" if mode.startswith("I;") else "L")).convert(mode)
    expected = round(100 / 257) if mode.startswith("I;") else 100
    pixel = sd15.to_rgb(tones).getpixel((4, 4))
    assert max(abs(value - expected) for value in pixel) <= 1


@pytest.mark.parametrize("name", ["to_rgb", "check_tokenizer"])
def test_infer_opens_images_and_tokenizers_as_the_trainers_do(name):
    """The same definition, byte for byte."""
    files = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py", "infer.py")
    assert len({drift.definitions((ROOT / file).read_text())[name] for file in files}) == 1


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
