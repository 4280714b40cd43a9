"""Defects of the scripts of today, by number, that no other file has a test for.

And the table of scripts/proofs/defects.py.
"""

import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import defects
import encode_data
import numpy as np
import pytest
import torch
from accelerate import DistributedType
from conftest import ROOT, command_line, image_bytes, shell_blocks, write_tar
from diffusers import StableDiffusionPipeline
from PIL import Image

BROKEN = {"image": {"bytes": b"no image", "path": "broken.png"}, "text": "a"}


def flags(trainer, *words):
    """Parsed flags of a run at 20 px."""
    needed = "--pretrained_teacher_model x --resolution 20 --max_train_steps 12".split()
    needed += ["--train_batch_size", "2"]
    data = (
        []
        if {"--train_data_dir", "--train_shards_path_or_url"} & {*words}
        else ["--train_data_dir", "x"]
    )
    return trainer.parse_args([*needed, *data, *map(str, words)])


def rows(count):
    """Undecoded records of small images, the captions their numbers."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(count)]
    return [{"image": image_bytes(image), "text": str(i)} for i, image in enumerate(images)]


# ---------------------------------------------------------------------------------------- the table


def test_each_row_has_a_test_named_after_it():
    assert {number for number, *_ in defects.DEFECTS} == {
        *range(1, 24)
    } and defects.NOT_HERE.keys() <= {*range(1, 24)}
    for number in range(1, 24):
        names = [test for n, _, _, test, _ in defects.DEFECTS if n == number]
        assert any(re.search(rf"::test_defects?_[\d_]*{number:02}_", name) for name in names), (
            number
        )


@pytest.mark.parametrize("defect", defects.DEFECTS, ids=lambda defect: f"{defect[0]}: {defect[1]}")
def test_the_table_fits_the_programs(defect):
    """Each text that is replaced occurs once, something changes, and the test exists."""
    _, _, program, test, changes = defect
    text = (ROOT / program).read_text()
    assert defects.patched(text, changes) != text
    file, name = test.split("[")[0].split("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text()


def test_a_patch_that_no_longer_fits_is_named():
    for text in ("x = 2", "x = 1\nx = 1"):
        with pytest.raises(SystemExit, match=r"'x = 1' occurs [02] times"):
            defects.patched(text, {"x = 1": "x = 3"})


# --------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three tar shards of three images; each ends with a record that has a caption and no image."""
    folder, good = tmp_path_factory.mktemp("shards"), rows(9)
    for i in range(3):
        files = {f"{row['text']}.png": row["image"]["bytes"] for row in good[3 * i : 3 * i + 3]}
        files |= {f"{row['text']}.txt": row["text"].encode() for row in good[3 * i : 3 * i + 3]}
        write_tar(folder / f"{i}.tar", dict(sorted(files.items())) | {"end.txt": b"end"})
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_defect_06_all_shards_are_read_to_their_end(sd15, shards, tmp_path, streaming):
    """Two epochs; the records without an image are replaced and named."""
    words = ["--train_shards_path_or_url", shards, "--cache_dir", tmp_path] + [
        "--streaming"
    ] * streaming
    args = flags(sd15, *words)
    batches = [*sd15.make_loader(sd15.load_records(args), {}, args, 0, 0, 1)]
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert len(batches) == 12 and {*captions} == {*"012345678"}
    unusable = [why for batch in batches for why in batch["unusable"]]
    assert unusable and all("(ValueError: no image)" in why for why in unusable)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(20, 44), (44, 20)], ids=["portrait", "landscape"])
def test_defect_14_sizes_are_those_of_the_crop(sdxl, size, flip):
    """Of an image whose colours are its coordinates.

    The corner of the crop says where it was cut.
    """
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.dstack([x, y, 0 * x]).astype(np.uint8))
    sample = sdxl.prepare_image(image, (20, 20), (0.25, 0.25), flip, flags(sdxl))
    x, y, _ = ((sample["pixels"][:, 0, 0] + 1) * 127.5).round().tolist()
    left = width - 1 - x if flip else x
    assert left + y == 6
    assert sample["time_ids"].tolist() == [height, width, y, left, 20, 20]


@pytest.mark.parametrize("streaming", [False, True])
def test_defect_15_no_good_record_is_an_error(sd15, streaming):
    """Not a loop without end; the message has the first record (16)."""
    args = flags(sd15)
    args.streaming = streaming
    records = datasets.Dataset.from_list([BROKEN] * 3)
    records = records.to_iterable_dataset() if streaming else records
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it searches for ever"))
    signal.alarm(10)
    try:
        with pytest.raises(SystemExit, match="not one record .*the first: broken.png"):
            next(sd15.or_end(sd15.make_loader(records, {}, args, 0, 0, 1), lambda: None))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_defect_15_flags_are_read(sd15, images, tmp_path):
    """Those that nothing reads elsewhere: each changes what it says."""

    def samples(*words):
        args = flags(sd15, *words)
        record = sd15.to_record(rows(1)[0], 0, args)
        return [sd15.make_sample(record, 0, place, {}, args) for place in range(16)]

    def kinds(samples):
        return len({sample["pixels"].numpy().tobytes() for sample in samples})

    assert kinds(samples()) > 5 and {sample["caption"] for sample in samples()} == {"0"}
    assert kinds(samples("--center_crop")) == 1
    assert kinds(samples("--center_crop", "--random_flip")) == 2
    assert {sample["caption"] for sample in samples("--proportion_empty_prompts", "0.5")} == {
        "0",
        "",
    }
    tar = write_tar(tmp_path / "a.tar", {"a.png": (images / "00.png").read_bytes(), "a.txt": b"a"})
    words = ["--train_shards_path_or_url", tar, "--cache_dir", tmp_path / "cache"]
    sd15.load_records(sd15.parse_args(["--pretrained_teacher_model", "a/b", *map(str, words)]))
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_defect_16_the_first_bad_record_is_named(train, make_images):
    """Of a folder where none can be used."""
    with pytest.raises(SystemExit, match=r"the first: .*0[012]\.png"):
        train(train_data_dir=make_images(3, broken=range(3)))


def test_defect_19_streamed_order_is_seeded(sd15):
    """Shards and records come in one order each time.

    A resumed run reads on where the other stopped.
    """
    args = flags(sd15, "--streaming")
    records = datasets.Dataset.from_list(rows(24)).to_iterable_dataset(num_shards=6)

    def captions(first):
        return [batch["caption"] for batch in sd15.make_loader(records, {}, args, first, 0, 1)]

    whole = captions(0)
    assert len(whole) == 12 and sorted(sum(whole, []), key=int) == [str(i) for i in range(24)]
    assert captions(0) == whole and captions(7) == whole[7:]


# ---------------------------------------------------------------------------------- ranks and steps


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_defect_12_sharded_launches_are_refused(sd15, monkeypatch, kind):
    """There every rank has to save, or all hang."""
    accelerator = SimpleNamespace(mixed_precision="no", distributed_type=DistributedType[kind])
    monkeypatch.setattr(sd15, "Accelerator", lambda **_: accelerator)
    with pytest.raises(SystemExit, match=f"{kind}.*--multi_gpu"):
        sd15.make_accelerator(flags(sd15))


def test_defect_12_no_rank_has_random_state_to_lose(sd15):
    """After a batch torch's state, from which dropout takes its own, is that of step and place.

    Whatever it was before.
    """
    args, config = flags(sd15), SimpleNamespace(latent_channels=4, scaling_factor=1.0)
    unet, vae = SimpleNamespace(dtype=torch.float32), SimpleNamespace(config=config)
    run = SimpleNamespace(timesteps=sd15.ddim_timesteps(50, 1000))
    run.pipe = SimpleNamespace(unet=unet, vae=vae)

    def sample(before, step, *places):
        torch.manual_seed(before)
        batch = {"step": [step] * len(places), "place": places, "prompt": torch.zeros(2, 16, 32)}
        values = sd15.sample_batch(run, batch | {"moments": torch.zeros(2, 8, 5, 5)}, args)
        tensors = [value.tolist() for value in values if torch.is_tensor(value)]
        return [*tensors, torch.rand(4).tolist()]

    assert sample(1, 5, 2, 3) == sample(2, 5, 2, 3)
    others = sample(1, 5, 0, 1), sample(1, 6, 2, 3)  # another rank, another step
    one = sample(1, 5, 2, 3)
    assert all(a != b for other in others for a, b in zip(one, other, strict=True))


def test_defect_17_encoders_rest_where_all_is_encoded(
    sd15, train, teacher, images, tmp_path, monkeypatch
):
    """On encoded data nothing is encoded, and what could do it has no weights."""
    data = {"train_data_dir": images, "resolution": 32, "center_crop": True}
    words = {"family": "sd15", "pretrained_teacher_model": teacher, "output": tmp_path / "data"}
    encode_data.main(command_line(words | data))
    seen, step = [], sd15.distillation_loss

    def spy(name):
        real = getattr(sd15, name)
        monkeypatch.setattr(sd15, name, lambda *given: seen.append(name) or real(*given))

    def look(run, *rest):
        assert run.pipe.text_encoder is None and next(run.pipe.vae.parameters()).is_meta
        seen.append("step")
        return step(run, *rest)

    for name in ("encode_images", "encode_captions"):
        spy(name)
    monkeypatch.setattr(sd15, "distillation_loss", look)
    train(dataset_name=tmp_path / "data", center_crop=True)
    assert seen == ["step"] * 4


def test_defect_17_micro_steps_wait_for_nothing(sd15, train, monkeypatch):
    """Numbers are taken off the device as often with four micro-steps as with one."""
    calls = []

    def spy(name):
        real = getattr(torch.Tensor, name)
        caller = lambda: sys._getframe(2).f_code.co_filename  # noqa: E731
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor: calls.append(caller()) or real(tensor)
        )

    for name in ("item", "tolist", "__float__"):
        spy(name)
    train(max_train_steps=2)
    once = calls.count(sd15.__spec__.origin)
    calls.clear()
    train(max_train_steps=2, gradient_accumulation_steps=4)
    assert calls.count(sd15.__spec__.origin) == once > 0


def test_defect_18_every_tracker_gets_the_images(sd15, teacher, tmp_path, monkeypatch):
    """One for each prompt, generated with the pipeline that is there."""
    pipe, trackers, logged = StableDiffusionPipeline.from_pretrained(teacher), [], []
    for name in ("tensorboard", "wandb"):
        log_images = lambda values, **_: logged.append(values["validation"])  # noqa: E731
        trackers.append(SimpleNamespace(name=name, log_images=log_images))
    run = SimpleNamespace(pipe=pipe, target=pipe.unet, step=7)
    run.c_null, *run.prompts = [sd15.encode_captions(pipe, [t]) for t in ("", "red apple", "rain")]
    run.accelerator = SimpleNamespace(trackers=trackers)
    no = lambda *_, **__: pytest.fail("built anew")  # noqa: E731
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", no)
    words = {"pretrained_teacher_model": teacher, "output_dir": tmp_path, "resolution": 24}
    words["max_train_steps"] = 8
    words["validation_prompts"] = ["red apple", "rain"]
    sd15.validate(run, flags(sd15, *command_line(words)))
    assert len(logged) == 2 and np.array_equal(*logged) and logged[0].shape == (2, 24, 24, 3)
    assert not np.array_equal(*logged[0])


# ------------------------------------------------------------------------------------------- README


def test_defect_21_commands_have_no_undefined_variables():
    """Each shell block of README.md and docs/ ends well where unset variables are errors.

    The programs do nothing there.
    """
    blocks = shell_blocks()
    assert {"README.md", "docs/data.md", "docs/infer.md"} <= {page for page, _ in blocks}
    stubs = "".join(
        f"{program}() {{ :; }}\n" for program in ("python", "accelerate", "pip", "bash")
    )
    for page, block in blocks:
        done = subprocess.run(
            ["/bin/bash", "-euc", stubs + block], env={"PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page}: {done.stderr}{block}"
