"""Latents of several sizes: buckets of aspect ratios, what a step has, that nothing is lost."""

import importlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import datasets
import encode_data
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    ROOT,
    SMOOTH,
    command_line,
    difference,
    image_bytes,
    launch,
    lora_file,
    near,
    same,
    series,
)
from diffusers.training_utils import find_nearest_bucket
from PIL import Image

FEW = {"lora_target_modules": "to_q", "max_train_steps": 3, "center_crop": True}
SHAPES = [(32, 96), (96, 32), (64, 64), (48, 64), (40, 40), (65, 47), (30, 91), (90, 33)]
FAMILIES = {"sd15": "teacher", "sdxl": "xl_teacher"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of twelve captioned images, from 1:3 to 3:1."""
    folder, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for i in range(12):
        colours = random.integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(colours).resize(SHAPES[i % 8]).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"image {'abcdefghijkl'[i]}")
    return folder


@pytest.fixture(scope="module")
def encode(request, tmp_path_factory):
    """encode(family, flag=value, ...) -> folder of encoded data."""

    def encode(family, images, **flags):
        folder = tmp_path_factory.mktemp("encoded") / "out"
        teacher = request.getfixturevalue(FAMILIES[family])
        given = {"family": family, "pretrained_teacher_model": teacher, "resolution": 32}
        given |= {"train_data_dir": images, "output": folder, "center_crop": True} | flags
        AcceleratorState._reset_state(True)
        torch.set_num_threads(1)
        encode_data.main(command_line(given))
        trainer = importlib.import_module(f"train_lcm_lora_{family}")
        trainer.__file__ = trainer.__spec__.origin
        return folder

    return encode


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, encode, shapes):
    """(trainer, its teacher, the images in buckets)."""
    trainer = importlib.import_module(f"train_lcm_lora_{request.param}")
    flags = {"aspect_ratio_buckets": True, "random_flip": True}
    folder = encode(request.param, shapes, **flags)
    return trainer, request.getfixturevalue(FAMILIES[request.param]), folder


# ----------------------------------------------------------------------------------- which buckets


@pytest.mark.parametrize(("side", "most"), [(512, 0.15), (768, 0.092), (1024, 0.071)])
def test_no_image_loses_much(side, most):
    """From 1:3 to 3:1; by the crop of its bucket, the nearest, which is nearly the best one."""
    buckets, worst = encode_data.make_buckets(side, 8), 0

    def lost(width, height, bucket):
        scale = max(bucket[0] / height, bucket[1] / width)
        return 1 - bucket[0] * bucket[1] / (width * height * scale**2)

    for i in range(2001):
        ratio = 3 ** (i / 1000 - 1)
        size = round(1000 * ratio**0.5), round(1000 / ratio**0.5)
        width, height = encode_data.bucket_of(
            SimpleNamespace(diffusers=diffusers_of()), size, buckets
        )
        loss = lost(*size, (height, width))
        assert loss <= min(lost(*size, bucket) for bucket in buckets) + 0.02
        worst = max(worst, loss)
    assert most - 0.01 < worst <= most
    areas = [height * width for height, width in buckets]
    assert max(areas) <= side**2 and min(areas) > 0.75 * side**2
    assert {(w, h) for h, w in buckets} == {*buckets} and (side, side) in buckets
    assert all(h % 64 == w % 64 == 0 for h, w in buckets)


def diffusers_of():
    """diffusers as the trainers import it."""
    import diffusers

    return diffusers


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("side", [8, 16, 24, 32, 64, 100, 200, 256, 520, 600, 1000])
def test_buckets_of_any_resolution(side, factor):
    """Sizes that the VAE takes, none larger than the square, one for each of both directions."""
    buckets = encode_data.make_buckets(side, factor)
    assert buckets and {(w, h) for h, w in buckets} == {*buckets}
    assert all(h % factor == w % factor == 0 < h * w <= side**2 for h, w in buckets)
    assert all(3 * max(size) <= 10 * min(size) for size in buckets)


@pytest.mark.parametrize(
    "text", [";", ",", "32", "32,32;", "32,x", "0,32", "32,0", "32,30", "32x32", "32,32,32",
             "1e3,32", "32.0,32", "[(32,32)]", "\n", "nan,32", "32;32", "²,32"],
)  # fmt: skip
def test_odd_sizes(encode, shapes, text):
    """One line that names the flag and shows what is valid."""
    with pytest.raises(SystemExit, match="--aspect_ratio_buckets .* multiples of 4") as end:
        encode("sd15", shapes, aspect_ratio_buckets=text)
    assert "\n" not in str(end.value)


def test_sizes_in_any_order(sd15, teacher):
    """With spaces, and twice; the nearest counts, not the first."""
    args = SimpleNamespace(aspect_ratio_buckets=" 32,64; 64,32 ;32,64", resolution=32)
    buckets = encode_data.find_buckets(sd15, args, 4)
    assert buckets == [(32, 64), (64, 32)]
    assert encode_data.bucket_of(sd15, (100, 10), buckets) == (64, 32)
    assert buckets[find_nearest_bucket(100, 10, buckets)] == (64, 32)


def test_other_sizes_in_a_folder(encode, shapes):
    """What was encoded with sizes is not gone on with without them, nor the other way round."""
    flags, square = {"aspect_ratio_buckets": "32,32;48,24"}, {}
    for first, then in ((flags, square), (square, flags)):
        folder = encode("sd15", shapes, **first)
        encode("sd15", shapes, **first, output=folder)
        with pytest.raises(SystemExit, match="buckets: .* there, .* in this run"):
            encode("sd15", shapes, **then, output=folder)


def test_sizes_without_latents(encode, shapes):
    """Nothing is cropped then, so they would be lost without a word."""
    with pytest.raises(SystemExit, match="--aspect_ratio_buckets.*latents"):
        encode("sd15", shapes, aspect_ratio_buckets=True, encode="captions")


@pytest.mark.parametrize("words", [["--aspect_ratio_buckets"], ["--aspect_ratio_buckets", "32,32"],
                                   ["--aspect_ratio_buckets", ""]])  # fmt: skip
def test_a_trainer_of_raw_images(sd15, sdxl, words):
    """It crops squares, and names the program that does not."""
    for trainer in (sd15, sdxl):
        with pytest.raises(SystemExit, match="--aspect_ratio_buckets is not .*encode_data.py"):
            trainer.parse_args(["--pretrained_teacher_model", "x", "--train_data_dir", "x", *words])


# ------------------------------------------------------------------------------------ what is read


def test_each_image_is_in_its_bucket(both, shapes):
    """The size that is stored is that of the latents, and of SDXL's sizes; mirrored ones too."""
    trainer, _, folder = both
    data, args = datasets.load_from_disk(folder), SimpleNamespace(seed=0, center_crop=True)
    buckets = encode_data.make_buckets(32, 4)
    names = sorted(path.stem for path in shapes.glob("*.png"))
    for row, name in zip(data.with_format("torch"), names, strict=True):
        with Image.open(shapes / f"{name}.png") as image:
            width, height = image.size
        h, w = buckets[find_nearest_bucket(height, width, buckets)]
        assert row["size"].tolist() == [h // 4, w // 4]
        assert row["moments"].shape == row["mirrored"].shape == (h * w // 16, 8)
        if trainer.FAMILY == "sdxl":
            sizes = row["time_ids"].tolist()
            assert sizes[:2] == [height, width] and sizes[4:] == [h, w]
            assert min(sizes[2:4]) == 0  # cropped on one side at most
        args.random_flip, args.proportion_empty_prompts = False, 0.0
        record = trainer.to_record(
            row, 0, SimpleNamespace(image_column="image", caption_column="text")
        )
        sample = trainer.make_sample(record, 0, 0, {}, args)
        expected = row["moments"].T.reshape(8, h // 4, w // 4)
        assert torch.equal(sample["moments"], expected)


def test_latents_are_those_of_the_crop(both, shapes, sd15):
    """Against the VAE called on the image in hand; the mirrored one is not the other transposed."""
    trainer, teacher, folder = both
    args = trainer.parse_args(
        command_line({"pretrained_teacher_model": teacher, "train_data_dir": "x"})
    )
    pipe = trainer.load_teacher(args, torch.float32, {"unet"})
    rows = datasets.load_from_disk(folder).with_format("torch")
    for i, name in ((0, "00"), (5, "05")):
        h, w = (4 * rows[i]["size"]).tolist()
        with Image.open(shapes / f"{name}.png") as image:
            for column, flip in (("moments", False), ("mirrored", True)):
                part, _, _ = trainer.resize_and_crop(image.convert("RGB"), (w, h), (0.5, 0.5), flip)
                pixels = torch.tensor(np.asarray(part)).permute(2, 0, 1)[None] / 127.5 - 1
                with torch.no_grad():
                    found = pipe.vae.encode(pixels).latent_dist.parameters[0]
                stored = rows[i][column].T.reshape(8, h // 4, w // 4)
                assert torch.allclose(stored, found, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "sdxl"])
def test_one_bucket_is_none(encode, train_by, shapes, request, family):
    """To the bit: losses and LoRA; batches accumulated, mirrored, over the end of epochs."""
    flags = FEW | {"max_train_steps": 4, "gradient_accumulation_steps": 2, "random_flip": True}
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    train = train_by(trainer, request.getfixturevalue(FAMILIES[family]))
    with_, without = (
        train(dataset_name=encode(family, shapes, random_flip=True, **more), **flags)
        for more in ({"aspect_ratio_buckets": "32,32"}, {})
    )
    assert series(with_, "loss", "grad_norm") == series(without, "loss", "grad_norm")
    ours, theirs = lora_file(with_)[0], lora_file(without)[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_of_sizes(both, train_by, monkeypatch):
    """Each batch is of one size; readers, a resume and the halves of two ranks change nothing."""
    trainer, teacher, folder = both
    train, seen, draw = train_by(trainer, teacher), [], trainer.sample_batch

    def record(run, batch, args):
        z, c, *more = draw(run, batch, args)
        seen.append((batch["name"], z.shape, c.get("time_ids")))
        return z, c, *more

    monkeypatch.setattr(trainer, "sample_batch", record)
    flags = FEW | {"dataset_name": folder, "max_train_steps": 6, "random_flip": True}
    one = train(**flags, checkpointing_steps=3)
    assert len({shape for _, shape, _ in seen}) > 1
    for names, shape, sizes in seen:
        assert len(names) == shape[0] == 2
        if trainer.FAMILY == "sdxl":
            assert (sizes[:, 4:] == 4 * torch.tensor(shape[2:])).all()
    two = train(**flags, checkpointing_steps=3, resume_from_checkpoint=one / "checkpoint-3")
    assert same(one, two) and series(two) == series(one)[3:]
    if trainer.FAMILY == "sd15":
        assert series(train(**flags, dataloader_num_workers=2)) == series(one)


def test_streaming_is_refused(both, train_by):
    """Their batches cannot be made of a stream."""
    trainer, teacher, folder = both
    with pytest.raises(SystemExit, match="--streaming: .* several sizes; give --no-streaming"):
        train_by(trainer, teacher)(dataset_name=folder, streaming=True, **FEW)


@pytest.mark.slow
def test_two_processes_are_one(encode, shapes, teacher, train, tmp_path):
    """A step's batch is of one size over all ranks."""
    folder = encode("sd15", shapes, aspect_ratio_buckets="32,32;48,24;24,48")
    flags = SMOOTH | {"resolution": 32, "lora_rank": 4, "max_train_steps": 5, "center_crop": True}
    flags |= {"dataset_name": folder, "pretrained_teacher_model": teacher, "report_to": "none"}
    flags |= {"phases": 1}
    one = train(**flags)
    words = command_line(flags | {"output_dir": tmp_path / "out", "train_batch_size": 2})
    done = launch(ROOT / "train_lcm_lora_sd15.py", *words, count=2)
    assert done.returncode == 0, done.stderr
    assert near(one, tmp_path / "out") and difference(one, tmp_path / "out") < 1e-5


# ---------------------------------------------------------------------------------------- the order


def records(sizes, unusable=()):
    """Encoded data of these sizes, of which a sample needs only a few numbers."""
    rows = []
    for i, size in enumerate(sizes):
        size = [0, 0] if i in unusable else [*size]
        row = {"size": size, "moments": np.zeros((math.prod(size), 8), np.float32)}
        row |= {
            "captions": ["x"],
            "name": str(i),
            "unusable": f"{i} is bad" if i in unusable else None,
        }
        rows.append(row)
    text = datasets.Value("string")
    kinds = {"size": datasets.List(datasets.Value("int64"), 2)}
    kinds |= {"moments": datasets.Array2D((None, 8), "float32"), "captions": datasets.List(text)}
    kinds |= {"name": text, "unusable": text}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    return data.with_format("torch")


def samples(trainer, data, batch, **flags):
    """The trainer's dataset over such records, of a run without an encoder."""
    words = {"pretrained_teacher_model": "x", "dataset_name": "x"} | flags
    args = trainer.parse_args(command_line(words))
    return trainer.Samples(data, {}, args, batch)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("counts", [(12,), (7, 5), (1, 11), (4, 4, 4), (1, 1, 10), (2, 3, 4, 9)])
def test_every_record_as_often_as_without(sd15, counts, batch):
    """Over any number of steps: each is behind by what waits for a batch of its size, no more."""
    sizes = [(2, 2 + i) for i, count in enumerate(counts) for _ in range(count)]
    found, used = samples(sd15, records(sizes), batch), Counter()
    order = np.random.default_rng(1).permutation(200).tolist()
    asked = {step: [found.row(found.position(step, p)) for p in range(batch)] for step in order}
    for step in range(200):
        assert len({sizes[row] for row in asked[step]}) == 1
        used.update(asked[step])
    waiting = Counter(row for some in found.waiting.values() for row in map(found.row, some))
    assert all(len(some) < batch for some in found.waiting.values())
    read = found.read
    for row in range(len(sizes)):
        epochs = read // len(sizes), -(-read // len(sizes))
        assert used[row] + waiting[row] in epochs  # as without sizes after as many records
    assert sum(used.values()) == 200 * batch and found.read - sum(waiting.values()) == 200 * batch


def test_without_sizes_the_stream_is_in_its_order(sd15):
    """And with one size it is the same."""
    one = samples(sd15, records([(2, 2)] * 7), 3)
    positions = [one.position(step, place) for step in range(9) for place in range(3)]
    assert positions == list(range(27))


def test_a_bucket_of_less_than_a_batch(sd15):
    """It waits over epochs until it is full, and is then used with repeats."""
    sizes = [(2, 2)] * 10 + [(2, 4)]
    found, steps = samples(sd15, records(sizes), 4), []
    for step in range(40):
        steps.append([found.row(found.position(step, place)) for place in range(4)])
    assert steps.count([10] * 4) == found.read // 11 // 4 >= 3


@pytest.mark.parametrize("epochs", [1, 5])
def test_unusable_records_are_replaced_by_their_size(sd15, epochs):
    """So a batch can be stacked; what is flagged has no size, and takes the usual one."""
    sizes = [(2, 2)] * 5 + [(2, 3)] * 4 + [(2, 4)] * 2
    data = records(sizes, unusable={1, 2, 6})
    found, named = samples(sd15, data, 2), set()
    for step in range(11 * epochs // 2 - 2):
        batch = sd15.collate([found[step, place] for place in range(2)])
        assert not {"1", "2", "6"} & {*batch["name"]} and len(batch["moments"]) == 2
        named |= {*batch["unusable"]}
    assert named <= {"1 is bad", "2 is bad", "6 is bad"} and (epochs == 1 or len(named) == 3)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_one_usable_record_is_enough(sd15, seed, sized):
    """Wherever in two epochs it is: the search takes a whole epoch, not only as many records."""
    data = records([(2, 2)] * 8, unusable={*range(8)} - {3})
    if not sized:
        data = data.remove_columns("size")
    found = samples(sd15, data, 2, seed=seed)
    for step in range(16):
        assert [found[step, place]["name"] for place in range(2)] == ["3", "3"]


def test_not_one_usable_record(sd15):
    """The search ends."""
    found = samples(sd15, records([(2, 2)] * 5, unusable=range(5)), 2)
    with pytest.raises(sd15.UnusableRecord, match="not one record of the data can be used"):
        found[0, 0]


def test_ranks_take_parts_of_one_batch(sd15):
    """Two ranks of two are one of four, with accumulation too; from any step on."""
    sizes = [(2, 2)] * 6 + [(2, 3)] * 5
    data, flags = records(sizes), {"max_train_steps": 12, "train_batch_size": 4}
    words = {"pretrained_teacher_model": "x", "dataset_name": "x"}

    def names(rank, world, first=0, **more):
        args = sd15.parse_args(command_line(words | flags | more))
        return [b["name"] for b in sd15.make_loader(data, {}, args, first, rank, world)]

    whole = names(0, 1)
    halves = [names(rank, 2, train_batch_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert names(0, 1, first=5) == whole[5:]
    micro = names(0, 1, train_batch_size=2, gradient_accumulation_steps=2)
    assert [a + b for a, b in zip(micro[::2], micro[1::2], strict=True)] == whole


def test_a_column_of_captions_called_size(train, tmp_path):
    """It is no size of latents."""
    rows = {"image": [image_bytes(Image.new("RGB", (40, 40)))] * 4, "size": ["large", "small"] * 2}
    kinds = {"image": datasets.Image(), "size": datasets.Value("string")}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.save_to_disk(str(tmp_path / "data"))
    assert len(series(train(dataset_name=tmp_path / "data", caption_column="size", **FEW))) == 3


def test_broken_images_among_sizes(encode, train, tmp_path):
    """A run over them goes on, and says what it replaced."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, size in enumerate([(64, 32)] * 3 + [(32, 64)] * 3):
        content = b"no image" if i in (0, 4) else image_bytes(Image.new("RGB", size))["bytes"]
        (folder / f"{i}.png").write_bytes(content)
        (folder / f"{i}.txt").write_text("x")
    encoded = encode("sd15", folder, aspect_ratio_buckets="48,24;24,48")
    sizes = datasets.load_from_disk(encoded)["size"]
    assert [list(size) for size in sizes] == [[0, 0], [6, 12], [6, 12], [12, 6], [0, 0], [12, 6]]
    stamp = json.loads((encoded / "encoded.json").read_text())
    assert stamp["buckets"] == [[24, 48], [48, 24]]
    out = train(dataset_name=encoded, **FEW)
    assert len(series(out)) == 3 and np.isfinite(series(out)).all()
