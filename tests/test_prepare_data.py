"""scripts/prepare_data.py: each kind of source, filter and shard, and its messages on bad input."""

import importlib.util
import io
import json
import tarfile
import tracemalloc

import datasets
import pytest
from conftest import command_line, load_script, write_tar
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image, ImageFile
from pyarrow.parquet import read_table

RED, BLUE, GREEN = ((255, 0, 0), (0, 0, 255), (0, 255, 0))


@pytest.fixture(scope="module")
def program():
    """scripts/prepare_data.py as a module."""
    return load_script("scripts/prepare_data.py")


@pytest.fixture
def prepare(program, tmp_path, capsys):
    """prepare(source, flag=value, ...) -> output folder; prepare.said is what was printed."""

    def prepare(source, **flags):
        flags = {"output": tmp_path / "out"} | flags
        program.main([str(source), *command_line(flags)])
        prepare.said = capsys.readouterr().out
        return flags["output"]

    return prepare


@pytest.fixture
def refused(program, tmp_path):
    """refused(source, flag=value, ...) -> the one line it ends with; nothing was written."""

    def refused(source, **flags):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            program.main([str(source), *command_line({"output": tmp_path / "out"} | flags)])
        assert sorted(tmp_path.rglob("*")) == before
        line = end.value.code
        assert line.startswith("prepare_data.py: error: ") and "\n" not in line
        return line

    return refused


@pytest.fixture
def trained(sd15, tmp_path):
    """trained(folder, flag=value, ...) -> [(bytes, caption)] as the SD 1.5 trainer reads it."""

    def trained(folder, **flags):
        flags = {
            "dataset_name": folder,
            "pretrained_teacher_model": "none",
            "cache_dir": tmp_path / "cache",
        } | flags
        args = sd15.parse_args(command_line(flags))
        records = [sd15.to_record(row, 0, args) for row in sd15.load_records(args)]
        images = [record["image"] for record in records]
        images = [image["bytes"] or open(image["path"], "rb").read() for image in images]
        return [(image, record["captions"][0]) for image, record in zip(images, records)]

    return trained


def captions_of(folder):
    """The captions in parquet shards; lists too."""
    return [
        caption
        for file in sorted(folder.glob("*.parquet"))
        for caption in read_table(file)["text"].to_pylist()
    ]


def image(size=(12, 10), colour=RED, kind="PNG"):
    """The bytes of a image file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def write(path, content):
    """A file of bytes, of text, or of one JSON object a line; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def sizes(tmp_path):
    """A folder of images of four shapes and of two broken ones, all captioned."""
    folder = tmp_path / "sizes"
    for name, size in {
        "small": (8, 8),
        "square": (20, 20),
        "wide": (60, 20),
        "large": (90, 80),
    }.items():
        write(folder / f"{name}.png", image(size))
    cut = Image.effect_noise((32, 32), 50)
    cut.save(folder / "cut.jpg")
    write(folder / "cut.jpg", (folder / "cut.jpg").read_bytes()[:-300])
    write(folder / "text.png", b"no image at all")
    for path in list(folder.iterdir()):
        write(path.with_suffix(".txt"), path.stem)
    return folder


# ---- sources


def test_kohya_folder(prepare, trained, tmp_path):
    """a.png + a.txt or a.caption, in repeat folders: the trainer reads the same bytes, by path."""
    source, red, blue = tmp_path / "mine", image(), image(colour=BLUE, kind="JPEG")
    write(source / "10_cats" / "b.png", red)
    write(source / "10_cats" / "b.txt", "\ufeffa cat,\nin bed\n")
    write(source / "2_dogs" / "deep" / "a.v2.JPG", blue)
    write(source / "2_dogs" / "deep" / "a.v2.caption", "ein Hündchen")
    write(source / "none.png", red)
    write(source / "latin.png", red)
    write(source / "latin.txt", b"\xff\xfe\x00")
    write(source / "blank.png", red)
    write(source / "blank.txt", " \n")
    write(source / ".hidden" / "c.png", red)
    out = prepare(source)
    assert trained(out) == [(red, "a cat,\nin bed"), (blue, "ein Hündchen")]
    assert "10_cats: repeats in folder names are ignored" in prepare.said
    assert f"2 of 5 records written to {out}, parquet files: 1" in prepare.said
    assert "2 left out: no caption (--prompt gives one): blank.png, none.png\n" in prepare.said
    assert "1 left out: caption is not text: latin.png\n" in prepare.said
    (file,) = out.iterdir()
    rows = datasets.Dataset.from_parquet(str(file)).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert [row["image"]["path"] for row in rows] == ["10_cats/b.png", "2_dogs/deep/a.v2.JPG"]


def test_folder_without_captions(prepare, trained, tmp_path):
    """--prompt is the caption of all images that have none; it may be empty."""
    for name in ("b", "a"):
        write(tmp_path / "mine" / f"{name}.png", image((10, ord(name))))
    write(tmp_path / "mine" / "b.txt", "its own")
    images = [image((10, ord(name))) for name in "ab"]
    assert trained(prepare(tmp_path / "mine", prompt="a red bowl")) == list(
        zip(images, ["a red bowl", "its own"])
    )
    empty = prepare(tmp_path / "mine", prompt="", output=tmp_path / "empty")
    assert trained(empty) == list(zip(images, ["", "its own"]))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_table_of_paths(prepare, trained, tmp_path, ending):
    """Paths relative to the table, or absolute; a missing file or caption is left out by name."""
    red, blue = image(), image(colour=BLUE, kind="WEBP")
    write(tmp_path / "data" / "pics" / "a.png", red)
    far = write(tmp_path / "far.webp", blue)
    rows = [
        ("pics/a.png", "red, round"),
        (str(far), "blue"),
        ("pics/gone.png", "gone"),
        ("pics/a.png", None),
    ]
    table = tmp_path / "data" / f"list.{ending}"
    if ending == "jsonl":
        write(table, [{"path": path, "caption": caption} for path, caption in rows])
    elif ending == "parquet":
        datasets.Dataset.from_dict(dict(zip(("path", "caption"), zip(*rows)))).to_parquet(table)
    else:
        data = datasets.Dataset.from_dict(dict(zip(("path", "caption"), zip(*rows))))
        data.to_csv(table, sep="," if ending == "csv" else "\t")
    assert trained(prepare(table)) == [(red, "red, round"), (blue, "blue")]
    assert "1 left out: image file cannot be opened: pics/gone.png\n" in prepare.said
    assert "1 left out: no caption (--prompt gives one): pics/a.png\n" in prepare.said


@pytest.mark.parametrize("decoded", [True, False])
def test_table_of_bytes(prepare, trained, tmp_path, decoded):
    """A parquet column of images, or of bare bytes, under any name."""
    images = [image(), b"", image(colour=BLUE)]
    kind = datasets.Image() if decoded else datasets.Value("binary")
    features = datasets.Features({"photo": kind, "words": datasets.Value("string")})
    rows = [{"bytes": one, "path": None} for one in images] if decoded else images
    data = datasets.Dataset.from_dict(
        {"photo": rows, "words": ["red", "none", "blue"]}, features=features
    )
    data.to_parquet(tmp_path / "table.parquet")
    out = prepare(tmp_path / "table.parquet", image_column="photo", caption_column="words")
    assert trained(out) == [(images[0], "red"), (images[2], "blue")]
    assert "1 left out: no image, or an empty one: row 1\n" in prepare.said


def test_folder_with_metadata(prepare, trained, images):
    """The same images, captions and order as the trainer reads from the folder itself."""
    assert trained(prepare(images)) == trained(None, train_data_dir=images)


def test_what_datasets_opens(prepare, trained, images, tmp_path):
    """A folder written by save_to_disk, a parquet folder, this program's shards of both kinds."""
    data = datasets.load_dataset(
        "imagefolder", data_dir=str(images), split="train", cache_dir=str(tmp_path / "c")
    )
    expected = trained(None, train_data_dir=images)
    data.save_to_disk(tmp_path / "saved")
    assert trained(prepare(tmp_path / "saved")) == expected
    parquet = prepare(tmp_path / "out", output=tmp_path / "test-again", shard_mb=0.004)
    assert trained(parquet) == expected and len(list(parquet.iterdir())) > 2
    tar = prepare(parquet, to="tar", output=tmp_path / "tar", shard_mb=0.004)
    assert len(list(tar.iterdir())) > 2
    assert trained(prepare(tar, output=tmp_path / "back")) == expected
    assert trained(prepare(tar / "*.tar", output=tmp_path / "pattern")) == expected


def make_tar(path, samples):
    """A tar file of samples {ending: bytes}."""
    files = {
        f"{i:03}.{ending}": data
        for i, sample in enumerate(samples)
        for ending, data in sample.items()
    }
    return write_tar(path, files)


def test_tar_shards_of_others(prepare, trained, tmp_path):
    """Images of several kinds, other fields, json of other types, a file of statistics."""
    red, blue = image(kind="JPEG"), image(colour=BLUE)
    samples = [
        {"jpg": red, "txt": b"red", "json": b'{"score": 1, "caption": "other"}'},
        {"txt": b"nothing", "json": b'{"score": 1}'},
        {"png": blue, "txt": b"blue", "json": b'{"score": 1.5, "tags": [1, "a"]}', "cls": b"3"},
    ]
    (tmp_path / "shards" / "sub").mkdir(parents=True)
    make_tar(tmp_path / "shards" / "00000.tar", samples)
    make_tar(tmp_path / "shards" / "sub" / "00001.tar", samples[::-1])
    write(tmp_path / "shards" / "00000_stats.json", '{"count": 3}')
    out = prepare(tmp_path / "shards")
    assert trained(out) == [(red, "red"), (blue, "blue"), (blue, "blue"), (red, "red")]
    assert "2 left out: no image, or an empty one: row 1, row 4\n" in prepare.said


# ---- several captions


@pytest.mark.parametrize("to", ["parquet", "tar"])
def test_lines_are_captions(prepare, tmp_path, to):
    """--captions_per_line: a list for every image, of one line as well."""
    write(tmp_path / "mine" / "a.png", image())
    write(tmp_path / "mine" / "a.txt", "a cat\n\n a tabby, “asleep” \n")
    write(tmp_path / "mine" / "b.png", image())
    write(tmp_path / "mine" / "b.txt", "a dog")
    out = prepare(tmp_path / "mine", captions_per_line=True, to=to)
    captions = (
        captions_of(out) if to == "parquet" else [row["json"]["text"] for row in read_tars(out)]
    )
    assert captions == [["a cat", "a tabby, “asleep”"], ["a dog"]]


def test_columns_of_captions(prepare, tmp_path):
    """Several columns, a list column, or both; a missing list gets the prompt; tars keep lists."""
    write(tmp_path / "data" / "a.png", image())
    rows = [
        {"short": None, "long": None},
        {"short": "a", "long": ["b", "c"]},
        {"short": None, "long": ["d"]},
    ]
    table = write(tmp_path / "data" / "list.jsonl", [{"image": "a.png"} | row for row in rows])
    out = prepare(table, caption_column=["short", "long"], prompt="p")
    assert captions_of(out) == [["p"], ["a", "b", "c"], ["d"]]
    out = prepare(table, caption_column="long", output=tmp_path / "one")
    assert captions_of(out) == [["b", "c"], ["d"]]
    tar = prepare(out, to="tar", output=tmp_path / "tar")
    back = prepare(tar, output=tmp_path / "back")
    assert captions_of(back) == captions_of(out)


def test_caption_that_is_no_text(prepare, trained, tmp_path):
    """A number in the caption column is left out and named."""
    write(tmp_path / "a.png", image())
    table = write(tmp_path / "l.jsonl", [{"image": "a.png", "text": 7}])
    out = prepare(table, prompt="p", caption_column="image")
    assert trained(out) == [(image(), "a.png")]
    with pytest.raises(
        SystemExit, match=r"0 of 1 records accepted; 1 left out: caption is not text: a\.png$"
    ):
        prepare(table, output=tmp_path / "none")


# ---- filters


@pytest.mark.parametrize(
    "flags,kept,said",
    [
        ({}, "cut large small square text wide", None),
        ({"min_side": 20}, "cut large square wide", "1 left out: --min_side 20: small.png"),
        ({"max_side": 80}, "cut small square wide", "1 left out: --max_side 80: large.png"),
        (
            {"max_aspect_ratio": 1.5},
            "cut large small square",
            "1 left out: --max_aspect_ratio 1.5: wide.png",
        ),
        (
            {"drop_unreadable": True},
            "large small square wide",
            "2 left out: --drop_unreadable: cut.jpg, text.png",
        ),
        (
            {"min_side": 1},
            "cut large small square wide",
            "1 left out: size cannot be read: text.png",
        ),
        ({"min_side": 1}, "cut large small square wide", "0 left out: --min_side 1"),
        (
            {"min_side": 20, "max_side": 60, "drop_unreadable": True},
            "square wide",
            "1 left out: --max_side 60: large.png",
        ),
    ],
)
def test_filters(prepare, trained, sizes, flags, kept, said):
    out = prepare(sizes, **flags)
    assert [caption for _, caption in trained(out)] == kept.split()
    assert f"{len(kept.split())} of 6 records written" in prepare.said
    assert said is None or f"{said}\n" in prepare.said


@pytest.mark.parametrize(
    "conditions,kept",
    [
        (["score>=5"], "b c"),
        (["score>5"], "c"),
        (["score<=5"], "a b"),
        (["score < 5"], "a"),
        (["score>1", "score<6.5"], "a b"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_filter_by_score(prepare, trained, tmp_path, kind, conditions, kept):
    """A column of a table, or a field of key.json; a missing score is left out by any condition."""
    rows = [
        {"text": text, "score": score}
        for text, score in (("a", 2), ("b", 5), ("c", 7.5), ("d", None))
    ]
    if kind == "jsonl":
        write(tmp_path / "a.png", image())
        source = write(tmp_path / "list.jsonl", [row | {"image": "a.png"} for row in rows])
    else:
        samples = [{"jpg": image(), "json": json.dumps(row).encode()} for row in rows]
        source = make_tar(tmp_path / "shard.tar", samples)
    out = prepare(source, filter=conditions)
    assert [caption for _, caption in trained(out)] == kept.split()
    assert all(
        f" left out: --filter {one.replace(' ', '')}: " in prepare.said for one in conditions
    )


def test_nothing_is_decoded_without_need(program, prepare, sizes, monkeypatch):
    """No filter opens no image; a filter of sizes reads headers only; --drop_unreadable decodes."""

    def forbidden(*_):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", forbidden)
        prepare(sizes, min_side=1, output=sizes / "headers")
        assert "5 of 6" in prepare.said
        patch.setattr("PIL.Image.open", forbidden)
        prepare(sizes, output=sizes / "none", to="tar")
    loaded, load = set(), ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda one: loaded.add(id(one)) or load(one))
    kept = []  # images, so that no two have one id
    trainer = program.load_trainer()
    to_rgb = trainer.to_rgb
    monkeypatch.setattr(trainer, "to_rgb", lambda one: kept.append(one) or to_rgb(one))
    prepare(sizes, drop_unreadable=True, output=sizes / "all")
    assert len(kept) == 5 and {id(one) for one in kept} <= loaded


# ---- shards


def read_tars(folder):
    """Rows of a folder of tar shards as `datasets` reads them, images undecoded."""
    spec = importlib.util.find_spec(WebDataset.__module__)
    spec.loader.exec_module(untouched := importlib.util.module_from_spec(spec))
    with pytest.MonkeyPatch.context() as patch:  # the trainers have their own
        own = vars(untouched.WebDataset)["_get_pipeline_from_tar"]
        patch.setattr(WebDataset, "_get_pipeline_from_tar", own)
        data = datasets.load_dataset(
            "webdataset", data_dir=str(folder), split="train", streaming=True
        )
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        return list(data)


@pytest.mark.parametrize("first,ending", [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "jpg")])
def test_tar_shards(prepare, trained, tmp_path, first, ending):
    """key.<ending of the first image> + key.txt: `datasets` and the trainer read the same bytes."""
    images = [
        image(colour=colour, kind=kind)
        for colour, kind in ((RED, first), (BLUE, "JPEG"), (GREEN, "PNG"))
    ]
    for i, (data, kind) in enumerate(zip(images, (first, "jpeg", "png"))):
        write(tmp_path / "mine" / f"{i}.{kind.lower()}", data)
        write(tmp_path / "mine" / f"{i}.txt", f"number {i}")
    expected = [(data, f"number {i}") for i, data in enumerate(images)]
    out = prepare(tmp_path / "mine", to="tar")
    assert [(row[ending]["bytes"], row["txt"]) for row in read_tars(out)] == expected
    assert trained(None, train_shards_path_or_url=out) == expected
    with tarfile.open(out / "train-00000.tar") as tar:
        assert tar.getnames()[:2] == [f"train-00000-000000.{ending}", "train-00000-000000.txt"]


@pytest.mark.parametrize("to", ["parquet", "tar"])
def test_shards(prepare, trained, tmp_path, to):
    """--shard_mb cuts without changing content or order; a second run writes the same bytes."""
    source = tmp_path / "mine"
    for i in range(12):
        write(source / f"{i:02}.png", image((20, 10 + i)) + bytes(1000))
        write(source / f"{i:02}.txt", f"number {i}")
    flag = "dataset_name" if to == "parquet" else "train_shards_path_or_url"
    one, many, again = (
        prepare(source, to=to, shard_mb=mb, output=tmp_path / str(i))
        for i, mb in enumerate((500, 0.004, 0.004))
    )
    assert f"{to} files: {len(list(many.iterdir()))}\n" in prepare.said
    assert len(list(one.iterdir())) == 1 and 3 <= len(list(many.iterdir())) <= 5
    rows = trained(None, **{flag: one})
    assert trained(None, **{flag: many}) == rows
    assert [caption for _, caption in rows] == [f"number {i}" for i in range(12)]
    files = sorted(path.name for path in many.iterdir())
    assert [(again / name).read_bytes() for name in files] == [
        (many / name).read_bytes() for name in files
    ]
    assert sum(path.stat().st_size for path in many.iterdir()) > 12_000


@pytest.mark.parametrize("to", ["parquet", "tar"])
def test_memory_is_bounded(program, prepare, tmp_path, monkeypatch, to):
    """Four times as many images take no more memory."""
    monkeypatch.setattr(program, "ROWS", 10)
    peaks = []
    for count in (30, 120):
        source = tmp_path / str(count)
        for i in range(count):
            write(source / f"{i:03}.png", image() + bytes(200_000))
        tracemalloc.start()
        prepare(source, prompt="p", to=to, output=tmp_path / f"out{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 200_000 < peaks[1] < 1.2 * peaks[0]


# ---- errors


def test_zero_accepted(refused, sizes):
    """The filter that rejected most is named, with its first victims."""
    said = refused(sizes, min_side=50, max_aspect_ratio=1.05)
    first = "cut.jpg, small.png, square.png, wide.png"
    assert f"0 of 6 records accepted; 4 left out: --min_side 50: {first}" in said
    for path in sizes.glob("*.txt"):
        path.unlink()
    assert (
        "0 of 6 records accepted; 6 left out: no caption (--prompt gives one): cut.jpg, "
        in refused(sizes)
    )


@pytest.mark.parametrize(
    "flags,said",
    [
        (
            {"filter": "aesthetic>=5"},
            "--filter aesthetic: the source has no such column, only image, text",
        ),
        ({"filter": "aesthetic"}, "argument --filter: 'aesthetic' is no condition"),
        ({"filter": "aesthetic=5"}, "is no condition"),
        (
            {"image_column": "photo"},
            "--image_column photo: the source has no such column, only image, text",
        ),
        (
            {"caption_column": ["text", "long"]},
            "--caption_column long: the source has no such column",
        ),
        ({"min_side": 0}, "argument --min_side: 0 is not allowed: give 1 or more"),
        ({"max_aspect_ratio": "nan"}, "argument --max_aspect_ratio: nan is not allowed"),
        ({"shard_mb": 0}, "argument --shard_mb: 0 is not allowed"),
        ({"to": "zip"}, "argument --to: invalid choice: 'zip'"),
        ({"output": __file__}, "already exists; choose a new folder"),
        ({"output": f"{__file__}/out"}, "cannot be written (File exists)"),
    ],
)
def test_bad_flags(refused, sizes, flags, said):
    assert said in refused(sizes, **flags)


def test_output_in_use(refused, prepare, sizes, tmp_path):
    """A folder with anything in it is never touched; an empty one is filled."""
    (tmp_path / "out").mkdir()
    prepare(sizes)
    assert "already exists" in refused(sizes)


def test_bad_sources(refused, tmp_path):
    """One line for what is not there, not whole, or holds nothing that is wanted."""
    assert "cannot be read" in refused("no/such-dataset")
    assert "cannot be read" in refused(tmp_path / "gone.csv")
    assert "cannot be read" in refused(
        write(tmp_path / "a" / "list.jsonl", '{"image": "a.png", "te')
    )
    assert "cannot be read" in refused(write(tmp_path / "b" / "list.parquet", b"PAR1 not really"))
    assert "cannot be read" in refused(write(tmp_path / "c" / "shard.tar", b"no tar" * 200))
    (tmp_path / "d").mkdir()
    assert "cannot be read" in refused(tmp_path / "d")
    assert "contains no records" in refused(write(tmp_path / "e" / "list.csv", "image,text\n"))
    table = write(tmp_path / "f" / "list.csv", "photo,words\na.png,b\n")
    assert "--image_column: name the column of the images, one of photo, words" in refused(table)
    assert "name the column of the captions, one of photo, words, or give --prompt" in refused(
        table, image_column="photo"
    )


@pytest.mark.parametrize("to", ["parquet", "tar"])
def test_others_may_read_the_output(prepare, sizes, umask, to):
    """Folder and files have the permissions that the umask gives."""
    out = prepare(sizes, to=to)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


def test_interrupted(program, sizes, tmp_path, monkeypatch):
    """What ends half way leaves nothing, neither the output nor its unfinished folder."""
    whole = program.read_image

    def broken(data, path, base):
        if path == "square.png":
            raise KeyboardInterrupt
        return whole(data, path, base)

    monkeypatch.setattr(program, "read_image", broken)
    for to in ("parquet", "tar"):
        with pytest.raises(KeyboardInterrupt):
            program.main(
                [str(sizes), "--output", str(tmp_path / "out"), "--to", to, "--shard_mb", "0.001"]
            )
        assert [path.name for path in tmp_path.iterdir()] == ["sizes"]


def test_what_a_folder_holds_is_written_or_counted(prepare, trained, tmp_path):
    """Links are followed; another folder's metadata do not hide images; other formats are named."""
    source, red, blue = tmp_path / "mine", image(), image(colour=BLUE)
    write(tmp_path / "elsewhere" / "c.png", blue)
    write(tmp_path / "elsewhere" / "c.txt", "linked")
    write(source / "a" / "a.png", red)
    write(source / "a" / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "a row"}))
    write(source / "b" / "b.JPG", image(kind="JPEG"))
    write(source / "b" / "b.txt", "beside")
    write(source / "b" / "none.png", red)
    for name in ("d.heic", "e.jxl"):
        write(source / name, b"no format of Pillow")
    (source / "c").symlink_to(tmp_path / "elsewhere")
    out = prepare(source)
    captions = [caption for _, caption in trained(out)]
    assert captions == ["a row", "beside", "linked"]
    assert "1 left out: no caption (--prompt gives one): b/none.png\n" in prepare.said
    assert "2 other files" in prepare.said and "d.heic" in prepare.said and "e.jxl" in prepare.said


def test_captions_are_cut_at_line_breaks_only(prepare, tmp_path):
    """Not at U+2028, U+0085 or a form feed."""
    write(tmp_path / "mine" / "a.png", image())
    write(tmp_path / "mine" / "a.txt", "one\u2028still one\r\ntwo\x85two\ftwo\nthree\n")
    captions = captions_of(prepare(tmp_path / "mine", captions_per_line=True))
    assert captions == [["one\u2028still one", "two\x85two\ftwo", "three"]]


def test_tar_records_as_the_trainers_read_them(prepare, trained, tmp_path):
    """Capitals, names with dots, and other images beside."""
    red, blue = image(), image(colour=BLUE)
    files = [("a.0001.JPG", red), ("a.0001.txt", b"one"), ("a.0002.JPG", blue)]
    files += [("a.0002.mask.png", red), ("a.0002.txt", b"two")]
    write_tar(tmp_path / "x[1].tar", files)
    assert trained(prepare(tmp_path / "x[1].tar")) == [(red, "one"), (blue, "two")]
