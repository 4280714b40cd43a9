"""scripts/encode_data.py: a run on encoded data is one without; nothing is done twice or lost."""

import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import diffusers
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import (
    ROOT,
    SMOOTH,
    command_line,
    image_bytes,
    launch,
    load_script,
    series,
    write_tar,
)
from conftest import (
    run as run_program,
)
from huggingface_hub import HfApi
from PIL import Image, ImageOps
from single_file import as_single_file

PROGRAM = "scripts/encode_data.py"
TEACHERS = {"sd15": "teacher", "sdxl": "xl_teacher"}
SETTINGS = SMOOTH | {"train_batch_size": 2, "center_crop": True, "lora_target_modules": "to_q"}
PROMPTS = ["rain", "a snail"]
STATE = "state.json"
# The program with files of four records
DRIVER = """
import importlib.util, os, sys

spec = importlib.util.spec_from_file_location("encode_data", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.ROWS = 4
trainer = importlib.import_module("train_lcm_lora_sd15")
"""
# It is forked for each line of the input, so that it starts at once; it says the process's number,
# at its end how it ended.
FORKING = """
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        program.main(sys.argv[2:] + line.split())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TELLING = """
encode = trainer.encode_images

def tell(vae, pixels, batch_size):
    # in one write: the processes share the pipe
    os.write(1, f"rank {os.environ['RANK']}: {len(pixels)} encoded\\n".encode())
    return encode(vae, pixels, batch_size)

trainer.encode_images = tell
program.main(sys.argv[2:])
"""


@pytest.fixture(params=TEACHERS)
def layout(request):
    """The name of each trainer."""
    return request.param


@pytest.fixture
def trainer(request, layout):
    """It as a module."""
    return request.getfixturevalue(layout)


@pytest.fixture
def base(request, layout):
    """The folder of a teacher for it."""
    return request.getfixturevalue(TEACHERS[layout])


@pytest.fixture
def run(trainer, train_by, base):
    """run(flag=value, ...) -> output folder of a training."""
    train = train_by(trainer, base)
    return lambda **flags: train(**SETTINGS | flags)


@pytest.fixture(scope="session")
def program():
    """encode_data.py as a module."""
    return load_script(PROGRAM)


@pytest.fixture(scope="session")
def encode_by(request, program, images, tmp_path_factory):
    """encode_by(layout) -> encode(flag=value, ...) -> folder of encoded data."""

    def encode_by(layout):
        teacher = request.getfixturevalue(TEACHERS[layout])

        def encode(**flags):
            sources = {"dataset_name", "train_shards_path_or_url"}
            data = {} if flags.keys() & sources else {"train_data_dir": images}
            given = {"family": layout, "pretrained_teacher_model": teacher, "resolution": 32}
            given |= {"output": tmp_path_factory.mktemp("encoded") / "out", "center_crop": True}
            given |= data | flags
            AcceleratorState._reset_state(True)
            torch.set_num_threads(1)
            program.main(command_line(given))
            return given["output"]

        return encode

    return encode_by


@pytest.fixture
def encode(encode_by, layout):
    """encode(flag=value, ...) -> folder of data encoded for the trainer."""
    return encode_by(layout)


@pytest.fixture(scope="session")
def encoded_for(encode_by):
    """encoded_for(layout) -> the twelve images, mirrored too, and two validation prompts: do not
    change this folder."""
    return functools.cache(
        lambda layout: encode_by(layout)(random_flip=True, validation_prompts=PROMPTS)
    )


@pytest.fixture
def encoded(encoded_for, layout):
    """That folder for the trainer."""
    return encoded_for(layout)


@pytest.fixture
def copied(encoded, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(encoded, tmp_path / "copied")


class Work:
    """What was encoded, and the kinds of models whose weights were loaded."""

    def __init__(self):
        self.images, self.captions, self.loaded = 0, [], []


@pytest.fixture
def work(trainer, monkeypatch):
    """Fills while the trainer or the program runs."""
    seen, encode_images, encode_captions = Work(), trainer.encode_images, trainer.encode_captions

    def images(vae, pixels, batch_size):
        seen.images += len(pixels)
        return encode_images(vae, pixels, batch_size)

    def captions(pipe, captions, *more):
        seen.captions += captions
        return encode_captions(pipe, captions, *more)

    monkeypatch.setattr(trainer, "encode_images", images)
    monkeypatch.setattr(trainer, "encode_captions", captions)
    for kind in (diffusers.AutoencoderKL, transformers.PreTrainedModel):

        def load(cls, *args, real=kind.from_pretrained.__func__, **options):
            is_vae = cls is diffusers.AutoencoderKL
            seen.loaded.append("VAE" if is_vae else "text encoder")
            return real(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    return seen


def content(folder):
    """{name: bytes} of the files of encoded data."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def equal(a, b, tolerance=1e-5):
    """Whether each loss of two runs is the same but for a small relative difference."""
    return np.allclose(series(a), series(b), rtol=tolerance, atol=0)


def warnings_of(capsys):
    """The warnings since the last call."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning: ")]


@contextlib.contextmanager
def refused(*words):
    """A block that ends with exit status 1 and one line, which has all these words in it."""
    with pytest.raises(SystemExit) as ended:
        yield
    line = str(ended.value)
    assert re.match(r"\w+\.py: error: ", line) and "\n" not in line, line
    assert all(str(word) in line for word in words), line


# ---------------------------------------------------------------------- encoded is not encoded


def test_losses_are_those_without(run, encode, work):
    """Over 20 steps: with both encoded or either, and where captions are dropped."""
    flags = {"max_train_steps": 20, "proportion_empty_prompts": 0.3}
    plain = run(**flags)
    assert work.images == 40 and len(work.captions) == 41
    for kinds in ["latents"], ["captions"], ["latents", "captions"]:
        folder = encode(encode=kinds)
        work.__init__()
        assert equal(run(**flags, dataset_name=folder), plain), kinds
        assert work.images == (0 if "latents" in kinds else 40)
        assert len(work.captions) == (0 if "captions" in kinds else 41)
    assert len(series(plain)) == 20 and np.std(series(plain)) > 1e-2 * np.mean(series(plain))


def test_with_mirrored_images_and_another_vae(run, encode, make_teacher):
    vae = make_teacher(seed=5) / "vae"
    flags = {"random_flip": True, "pretrained_vae_model_name_or_path": vae}
    folder = encode(**flags)
    flags |= {"max_train_steps": 20}
    plain = run(**flags)
    assert equal(run(**flags, dataset_name=folder), plain)
    unlike = series(run(**flags | {"random_flip": False, "max_train_steps": 3}))
    assert not np.allclose(series(plain)[:3], unlike, rtol=1e-4)


def test_others_may_read_encoded_data(encode_by, umask):
    """Each file and the folder have the permissions that the umask gives."""
    folder = encode_by("sd15")()
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
    assert len(modes) > 4 and set(modes.values()) == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_in_bf16(run, encode):
    flags = {"mixed_precision": "bf16", "random_flip": True}
    folder = encode(**flags)
    flags |= {"max_train_steps": 20, "proportion_empty_prompts": 0.3}
    assert equal(run(**flags, dataset_name=folder), run(**flags), 1e-3)


@pytest.mark.parametrize("layout", ["sd15"])
def test_fp16_is_kept(trainer, encode, monkeypatch):
    """Training in fp16 needs a GPU, what is encoded for it is fp16 too."""
    make = trainer.make_accelerator

    def make_accelerator(args):
        args.mixed_precision = "no"
        accelerator = make(args)
        args.mixed_precision = "fp16"
        return accelerator

    whole = datasets.load_from_disk(encode())
    monkeypatch.setattr(trainer, "make_accelerator", make_accelerator)
    half = datasets.load_from_disk(encode())
    for name in "moments", "prompt":
        assert half.features[name].dtype == "float16" and whole.features[name].dtype == "float32"
        assert np.allclose(half[name][0], whole[name][0], rtol=1e-2, atol=1e-2)


def test_streamed(run, encode, parquet, monkeypatch):
    """As streamed data that are not encoded."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at each epoch's end
    data = parquet([record(i) for i in range(8)])
    flags = {"streaming": True, "max_train_steps": 20, "shuffle_buffer_size": 4}
    plain = run(**flags, dataset_name=data)
    assert equal(run(**flags, dataset_name=encode(dataset_name=data)), plain)


def test_a_run_loads_no_encoder(run, encoded, work):
    """With validation prompts that were encoded the VAE, with others text encoders too; the images
    are those without encoded data."""
    assert len(series(run(dataset_name=encoded))) == 4 and work.loaded == []
    images = []
    for prompts, kinds in (PROMPTS, {"VAE"}), (["a mouse"], {"VAE", "text encoder"}):
        flags = {"validation_prompts": prompts, "max_train_steps": 2}
        outs = [run(**flags)]
        work.__init__()
        outs.append(run(**flags, dataset_name=encoded))
        assert {*work.loaded} == kinds and work.images == 0
        assert work.captions == ([] if kinds == {"VAE"} else ["a mouse"])
        images = [Image.open(out / "validation" / "step-000002.png") for out in outs]
        plain, ours = (np.asarray(image, np.int16) for image in images)
        assert abs(plain - ours).max() <= 1 and plain.std() > 5


@pytest.mark.parametrize("layout", ["sd15"])
def test_the_vae_waits_on_the_host(run, encoded, monkeypatch):
    """With encoded latents only validation needs it: the memory of a GPU is the training's."""
    move, moved = diffusers.AutoencoderKL.to, []

    def to(vae, *where, **how):
        moved.extend("GPU" if isinstance(place, torch.device) else place for place in where)
        return move(vae, *where, **how)

    monkeypatch.setattr(diffusers.AutoencoderKL, "to", to)
    flags = {"validation_prompts": PROMPTS[:1], "max_train_steps": 1}
    for data, places in ({"dataset_name": encoded}, ["GPU", "cpu"]), ({}, ["GPU"]):
        moved.clear()
        run(**flags, **data)
        assert moved[: len(places)] == places and moved[len(places) :] == ["GPU", "GPU"]


def test_the_format(encoded, base, images, layout):
    """Columns, types and numbers of an image and its caption, computed here in another way."""
    data = datasets.load_from_disk(encoded)
    columns = {"moments": (8, 8, 8), "mirrored": (8, 8, 8), "captions": None, "name": None}
    columns |= {"prompt": (None, 16, 32), "unusable": None}
    if layout == "sdxl":
        columns |= {"prompt": (None, 16, 64), "text_embeds": (None, 32), "time_ids": None}
        assert data["time_ids"][:2] == [[40, 40, 0, 0, 32, 32], [44, 43, 0, 0, 32, 32]]
    assert {name: getattr(kind, "shape", None) for name, kind in data.features.items()} == columns
    assert {kind.dtype for kind in data.features.values() if hasattr(kind, "shape")} == {"float32"}
    assert len(data) == 12 and data["unusable"][:] == [None] * 12
    assert data[0]["captions"] == ["red apple"] and data[0]["name"] == str(images / "00.png")
    assert {file.name for file in encoded.iterdir()} == {
        ".lock", "data-00000-of-00001.arrow", "dataset_info.json", "encoded.json",
        "prompts.safetensors", STATE,
    }  # fmt: skip

    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    image = Image.open(images / "00.png").resize((32, 32), Image.Resampling.LANCZOS)
    for name, turned in ("moments", image), ("mirrored", ImageOps.mirror(image)):
        pixels = torch.tensor(np.asarray(turned)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            moments = vae.encode(pixels).latent_dist.parameters[0]
        assert np.allclose(data[0][name], moments, atol=1e-5)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokens = tokenizer("red apple", padding="max_length", max_length=16, return_tensors="pt")
    kinds = {"text_encoder": transformers.CLIPTextModel}
    if layout == "sdxl":
        kinds["text_encoder_2"] = transformers.CLIPTextModelWithProjection
    with torch.no_grad():
        outs = [
            kind.from_pretrained(base / part)(tokens.input_ids, output_hidden_states=True)
            for part, kind in kinds.items()
        ]
    prompt = outs[0].last_hidden_state
    if layout == "sdxl":
        prompt = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        assert np.allclose(data[0]["text_embeds"], outs[1].text_embeds, atol=1e-5)
    assert np.allclose(data[0]["prompt"], prompt, atol=1e-5)


@pytest.mark.parametrize("layout", ["sd15"])
def test_the_number_of_readers_changes_nothing(program, encode, monkeypatch):
    """What is handed to them can be pickled, which they need where processes are not forked."""
    monkeypatch.setattr(program, "ROWS", 4)
    alone, real = content(encode()), program.encode_rows
    monkeypatch.setattr(
        program, "encode_rows", lambda *given: pickle.dumps(given[-1]) and real(*given)
    )
    assert content(encode(dataloader_num_workers=2)) == alone and len(alone) == 3 + 4


# ------------------------------------------------------------------------------ teachers


@pytest.mark.parametrize("layout", ["sdxl"])
def test_a_teacher_in_one_file(run, encode, work, layout, make_teacher, tmp_path):
    """With its own VAE or another; other tokenizers beside it are refused."""
    teacher = make_teacher(layout)
    flags = {"pretrained_teacher_model": as_single_file(teacher), "teacher_config": teacher}
    for vae in (None, make_teacher(seed=5) / "vae"):
        flags["pretrained_vae_model_name_or_path"] = vae
        folder = encode(**flags)
        plain = run(**flags, max_train_steps=2)
        work.__init__()
        assert equal(run(**flags, max_train_steps=2, dataset_name=folder), plain)
        assert (work.images, work.captions) == (0, [])
    config = shutil.copytree(teacher, tmp_path / "config")
    (config / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    with refused("--dataset_name", "text encoders"):
        run(**flags | {"teacher_config": config}, dataset_name=folder)


def test_a_teacher_that_moved(run, encoded, base, tmp_path):
    """Is the same by its weights; folders in its parts, notebooks leave such, do not matter."""
    moved = shutil.copytree(base, tmp_path / "moved")
    for part in "vae", "text_encoder", "tokenizer":
        (moved / part / ".ipynb_checkpoints").mkdir()
    assert len(series(run(dataset_name=encoded, pretrained_teacher_model=moved))) == 4


# ------------------------------------------------------------------------ what a trainer refuses


REFUSED = {
    "resolution": {"resolution": 16},
    "mixed_precision": {"mixed_precision": "bf16"},
    "center_crop": {"center_crop": False},
    "use_fix_crop_and_size": {"use_fix_crop_and_size": True},
}


def unlike(base, other, part, folder):
    """A copy of a teacher with one part of another one."""
    shutil.copytree(base, folder)
    shutil.rmtree(folder / part)
    shutil.copytree(other / part, folder / part)
    return folder


@pytest.fixture
def refuse(run, encoded, tmp_path):
    """refuse(words, flag=value, ...): the run on encoded data ends with that, nothing is lost."""

    def refuse(*words, **flags):
        folder = flags.get("dataset_name", encoded)
        before = content(folder)
        with refused(*words):
            run(**{"dataset_name": encoded, "output_dir": tmp_path / "out"} | flags)
        assert not (tmp_path / "out").exists() and content(folder) == before

    return refuse


@pytest.mark.parametrize("key", REFUSED)
def test_other_flags_than_those_of_the_encoding(refuse, layout, key):
    if key == "use_fix_crop_and_size" and layout == "sd15":
        pytest.skip("a flag of the other trainer")
    refuse("--dataset_name", key, **REFUSED[key])


def test_other_models_than_those_of_the_encoding(
    refuse, run, encode, encoded, base, layout, make_teacher, tmp_path
):
    other = make_teacher(layout, seed=5)
    refuse("--dataset_name", "VAE", pretrained_vae_model_name_or_path=other / "vae")
    encoders = ["text_encoder", "text_encoder_2"][: 1 + (layout == "sdxl")]
    for part, what in [("vae", "VAE"), *((part, "text encoders") for part in encoders)]:
        teacher = unlike(base, other, part, tmp_path / part)
        refuse("--dataset_name", what, pretrained_teacher_model=teacher)
    tokens = shutil.copytree(base, tmp_path / "tokens")
    (tokens / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    refuse("--dataset_name", "text encoders", pretrained_teacher_model=tokens)
    if layout == "sdxl":
        zeros = make_teacher(layout, force_zeros=False)
        refuse("--dataset_name", "text encoders", pretrained_teacher_model=zeros)
    variant = shutil.copytree(base, tmp_path / "variant")
    for file in [*variant.glob("*/*.safetensors")]:
        shutil.copy(file, file.with_suffix(f".fp16{file.suffix}"))
    flags = {
        "pretrained_teacher_model": variant,
        "dataset_name": encode(pretrained_teacher_model=variant),
    }
    refuse("--dataset_name", "variant", **flags, variant="fp16")
    unet = unlike(base, other, "unet", tmp_path / "unet")
    assert len(series(run(dataset_name=encoded, pretrained_teacher_model=unet))) == 4


def test_data_encoded_for_the_other_trainer(refuse, encoded_for, layout):
    other = next(name for name in TEACHERS if name != layout)
    refuse("--dataset_name", "family", dataset_name=encoded_for(other))


def test_no_mirrored_images(refuse, encode):
    refuse("--random_flip", "mirrored", random_flip=True, dataset_name=encode())


def stamp_with(**changes):
    """A function that changes a stamp; None takes a key out."""

    def change(folder):
        old = json.loads((folder / "encoded.json").read_text())
        new = {key: value for key, value in (old | changes).items() if value is not None}
        (folder / "encoded.json").write_text(json.dumps(new))

    return change


BROKEN_FOLDERS = {
    "half-written": (lambda folder: (folder / STATE).unlink(), "not finished"),
    "another format": (stamp_with(format="0"), "format"),
    "no format": (stamp_with(format=None), "format"),
    "no kinds": (stamp_with(what=None), "encoded.json"),
    "no JSON": (lambda folder: (folder / "encoded.json").write_text("{"), "encoded.json"),
    "a list": (lambda folder: (folder / "encoded.json").write_text("[]"), "encoded.json"),
    "no prompts": (lambda folder: (folder / "prompts.safetensors").unlink(), "prompts.safetensors"),
    "torn prompts": (lambda folder: os.truncate(folder / "prompts.safetensors", 100), "prompts.s"),
    "no records": (lambda folder: next(folder.glob("*.arrow")).unlink(), "cannot be opened"),
    "torn records": (lambda folder: os.truncate(next(folder.glob("*.arrow")), 100), "opened"),
    "torn state": (lambda folder: os.truncate(folder / STATE, 10), "cannot be opened"),
}


@pytest.mark.parametrize("layout", ["sd15"])
@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder(refuse, copied, case):
    damage, word = BROKEN_FOLDERS[case]
    damage(copied)
    refuse("--dataset_name", word, dataset_name=copied, proportion_empty_prompts=0.5)


# ---------------------------------------------------------------------- what the program refuses


def test_flags_that_do_not_go_together(encode, encoded, images, layout, tmp_path):
    """With the reason, before anything is written."""
    out = {"output": tmp_path / "out"}
    for words, flags in (
        (["--center_crop"], {"center_crop": False}),
        (["--streaming"], {"streaming": True}),
        (["--streaming"], {"train_shards_path_or_url": "https://localhost/a.tar"}),
        (["--dataset_name", "encoded"], {"dataset_name": encoded}),
        (["--train_data_dir", "encoded"], {"train_data_dir": encoded}),
        (["--output", "data"], {"output": images / "encoded"}),
        (["--output", "data"], {"output": images}),
        (["--resolution", "multiple"], {"resolution": 30}),
        (["--caption_column", "words"], {"caption_column": "words"}),
        (["--image_column", "photo"], {"image_column": "photo"}),
        (["--train_data_dir"], {"train_data_dir": tmp_path / "none"}),
        (["--pretrained_teacher_model"], {"pretrained_teacher_model": tmp_path / "none"}),
        (["--cache_latents"], {"cache_latents": True}),
        (["--family", "other"], {"family": "other"}),
        (["--encode", "masks"], {"encode": ["masks"]}),
        (["--output"], {"output": None}),
        (["--no_such_flag"], {"no_such_flag": True}),
    ):
        before = {path: path.stat().st_mtime for path in [*images.iterdir(), *encoded.iterdir()]}
        with refused(*words):
            encode(**out | flags)
        assert not (tmp_path / "out").exists()
        assert before == {path: path.stat().st_mtime for path in before}
        assert {*before} == {*images.iterdir(), *encoded.iterdir()}
    encode(**out, encode=["captions"], center_crop=False)  # images are not encoded: any crop


@pytest.mark.parametrize("layout", ["sd15"])
def test_no_resolution(encode, encoded, base, tmp_path):
    """It is the teacher's own, 8 x 4; of one that has none it is asked for."""
    data = datasets.load_from_disk(encode(resolution=None))
    assert data.features["moments"].shape == (8, 8, 8)
    (tmp_path / "teacher").mkdir()
    teacher = shutil.copytree(base, tmp_path / "teacher" / "copy")
    (teacher / "unet" / "config.json").unlink()
    with refused("--pretrained_teacher_model", "--resolution"):
        encode(resolution=None, pretrained_teacher_model=teacher)


@pytest.mark.parametrize("layout", ["sd15"])
def test_an_output_made_from_something_else(
    encode, copied, teacher, make_images, make_teacher, tmp_path
):
    flags = {"output": copied, "random_flip": True, "validation_prompts": PROMPTS}
    before = content(copied)
    other = make_teacher(seed=5)
    encoder = unlike(teacher, other, "text_encoder", tmp_path / "encoder")
    for word, changes in {
        "resolution": {"resolution": 16},
        "mixed_precision": {"mixed_precision": "bf16"},
        "random_flip": {"random_flip": False},
        "captions": {"encode": ["latents"]},
        "VAE": {"pretrained_vae_model_name_or_path": other / "vae"},
        "text encoders": {"pretrained_teacher_model": encoder},
        "records": {"max_train_samples": 3},
        "data": {"train_data_dir": make_images()},
    }.items():
        with refused(f"--output {copied}", word):
            encode(**flags | changes)
        assert content(copied) == before
    encode(**flags)
    assert content(copied) == before


@pytest.mark.parametrize("layout", ["sd15"])
def test_an_output_that_cannot_be_used(encode, copied, tmp_path):
    flags = {"random_flip": True, "validation_prompts": PROMPTS}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    for output, words in {
        tmp_path / "file": ["not writable"],
        tmp_path / "file" / "below": ["not writable"],
        tmp_path / "used": ["thesis.txt"],
    }.items():
        with refused(f"--output {output}", *words):
            encode(**flags, output=output)
    assert content(tmp_path / "used") == {"thesis.txt": b"mine"}
    assert (tmp_path / "file").read_text() == "mine"
    before = content(copied)
    with filelock.FileLock(copied / ".lock"), refused(f"--output {copied}", "in use"):
        encode(**flags, output=copied)
    assert content(copied) == before
    for text in "{", "[]", "{}":
        (copied / "encoded.json").write_text(text)
        with refused(f"--output {copied}"):
            encode(**flags, output=copied)
        assert content(copied) == before | {"encoded.json": text.encode()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("layout", ["sd15"])
def test_a_full_disk(encode, copied):
    """One line, and with space again the same command ends the work."""
    flags = {"output": copied, "random_flip": True, "validation_prompts": PROMPTS}
    whole = content(copied)
    for name in STATE, "prompts.safetensors", "data-00000-of-00001.arrow", "encoded.json":
        for file in [*copied.iterdir()] if name == "encoded.json" else [copied / name]:
            file.unlink()
        (copied / STATE).unlink(missing_ok=True)
        (copied / f"{name}.part").symlink_to("/dev/full")
        with refused(copied, "No space left"):
            encode(**flags)
        (copied / f"{name}.part").unlink(missing_ok=True)
        encode(**flags)
        assert content(copied) == whole


@pytest.mark.parametrize("layout", ["sd15"])
def test_flags_of_a_training_command_may_stay(encode, encoded, monkeypatch, tmp_path):
    """Nothing but the output is made: no repository, no output folder of a training."""
    monkeypatch.setattr(HfApi, "create_repo", None)
    monkeypatch.chdir(tmp_path)
    flags = {"push_to_hub": True, "report_to": "all", "output_dir": "lora", "scale_lr": True}
    flags |= {"interpolation_type": "bilinear", "max_train_steps": 9, "train_batch_size": 3}
    folder = encode(**flags, random_flip=True, validation_prompts=PROMPTS)
    assert content(folder) == content(encoded) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["sd15"])
def test_a_broken_file_of_prompts(encode, copied):
    """It is made anew, as the trainer's message says."""
    whole = content(copied)
    os.truncate(copied / "prompts.safetensors", 100)
    encode(output=copied, random_flip=True, validation_prompts=PROMPTS)
    assert content(copied) == whole


@pytest.mark.parametrize("layout", ["sd15"])
def test_out_of_memory(trainer, encode, tmp_path, monkeypatch):
    def fill(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "encode_images", fill)
    with refused("out of memory", "--vae_encode_batch_size 1"):
        encode(output=tmp_path / "out")
    monkeypatch.undo()
    assert len(datasets.load_from_disk(encode(output=tmp_path / "out"))) == 12


def test_help_and_mistakes_are_quick():
    """They are answered before torch is loaded, and nothing but the program's flags is needed."""
    code = f"""
import runpy, sys
try:
    runpy.run_path({str(ROOT / PROGRAM)!r}, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    for words, status, said in (
        (["--help"], 0, "prompts.safetensors"),
        (["--family", "sd14", "--output", "out"], 1, "--family"),
        (["--family", "sd15"], 1, "--output"),
    ):
        done = run_program(sys.executable, "-c", code, *words)
        assert done.returncode == status and done.stdout.endswith("False\n"), done.stderr
        assert said in (done.stderr if status else done.stdout)
        assert not status or len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- unusable records


@pytest.fixture
def parquet(tmp_path):
    """parquet(records) -> a folder of one file with images as bytes, which have no name."""

    def make(records, text=None):
        text = text or datasets.Value("string")
        features = datasets.Features(image=datasets.Image(), text=text)
        columns = {name: [record[name] for record in records] for name in features}
        folder = tmp_path / "parquet"
        folder.mkdir()
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
        return folder

    return make


def record(i):
    """A record with an image of one colour."""
    image = Image.new("RGB", (40, 40 + i), (30 * i, 0, 99))
    return {"image": image_bytes(image), "text": f"image {i}"}


BROKEN = {"image": {"bytes": b"no image at all", "path": None}, "text": "broken"}
EMPTY = {"image": None, "text": "empty"}


@pytest.mark.parametrize(
    "kinds", [["latents"], ["captions"], ["latents", "captions"]], ids="-".join
)
def test_unusable_records_are_named_and_replaced(
    program, run, encode, parquet, capsys, monkeypatch, kinds
):
    """As without encoding: the same warnings, by the row in the data, and the same losses."""
    monkeypatch.setattr(program, "ROWS", 2)
    data = parquet([record(0), BROKEN, record(2), EMPTY, BROKEN, record(5), record(6)])
    flags = {"max_train_steps": 2, "train_batch_size": 4}
    plain = run(**flags, dataset_name=data)
    expected = warnings_of(capsys)
    folder = encode(dataset_name=data, encode=kinds)
    said, found = capsys.readouterr(), 3 if "latents" in kinds else 0
    assert f"7 records encoded, {found} of them unusable" in said.out
    assert said.err.count("warning: unusable: row ") == found
    ours = run(**flags, dataset_name=folder)
    assert warnings_of(capsys) == expected and len(expected) == 3 and equal(ours, plain)
    assert {line.split(": ", 2)[2].split(" (")[0] for line in expected} == {
        "row 1",
        "row 3",
        "row 4",
    }


def test_only_unusable_records(encode, parquet, tmp_path):
    """One message, and the folder is not taken for encoded data."""
    data, out = parquet([BROKEN, EMPTY]), tmp_path / "out"
    for _ in range(2):
        with refused("not one record", "row 0 ("):
            encode(dataset_name=data, output=out)
        assert not (out / STATE).exists()


def test_an_image_that_is_gone(run, encode, images, tmp_path, capsys):
    """Where captions are encoded the images are copied; one that is missing is unusable."""
    data = shutil.copytree(images, tmp_path / "data")
    datasets.load_dataset("imagefolder", data_dir=str(data), split="train")  # its list is kept
    (data / "03.png").write_bytes(b"")
    capsys.readouterr()
    flags = {"max_train_steps": 2, "train_batch_size": 12}
    plain = run(**flags, train_data_dir=data)
    expected = warnings_of(capsys)
    folder = encode(train_data_dir=data, encode=["captions"])
    capsys.readouterr()
    shutil.rmtree(data)
    assert equal(run(**flags, dataset_name=folder), plain)
    (said,) = warnings_of(capsys)
    assert said.split(" (")[0] == expected[0].split(" (")[0] and "03.png (" in said


def test_a_text_that_is_not_utf8(run, encode, parquet, capsys):
    """As without encoding its record is unusable, and nothing else."""
    data = parquet([record(0), record(1), record(2)])
    table = pq.read_table(data / "train.parquet")
    raw = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(table.set_column(1, table.schema.field(1), texts), data / "train.parquet")
    flags = {"max_train_steps": 2, "train_batch_size": 3}
    plain, expected = run(**flags, dataset_name=data), warnings_of(capsys)
    folder = encode(dataset_name=data)
    capsys.readouterr()
    assert equal(run(**flags, dataset_name=folder), plain)
    assert warnings_of(capsys) == expected and "row 1 (UnicodeDecodeError" in expected[0]


def test_lists_of_captions(run, encode, parquet):
    """One is taken at each visit; an empty list is the empty prompt."""
    texts = [["a", "b", "c"], [], ["d", None, "e"], None]
    records = [record(i) | {"text": text} for i, text in enumerate(texts)]
    data = parquet(records, datasets.List(datasets.Value("string")))
    flags = {"max_train_steps": 6, "proportion_empty_prompts": 0.2}
    folder = encode(dataset_name=data)
    assert equal(run(**flags, dataset_name=folder), run(**flags, dataset_name=data))
    rows = datasets.load_from_disk(folder)
    assert rows["captions"][:] == [["a", "b", "c"], [""], ["d", "e"], [""]]
    assert [len(prompt) for prompt in rows["prompt"]] == [3, 1, 2, 1]


def test_tar_shards(run, encode, work, tmp_path):
    """With captions in json; a wrong --caption_column is not kept for ever."""
    files = {}
    for i in range(4):
        about = json.dumps({"words": f"tar {i}", "other": 3}).encode()
        files |= {f"{i}.png": record(i)["image"]["bytes"], f"{i}.json": about}
    data = {"train_shards_path_or_url": write_tar(tmp_path / "a.tar", files)}
    out = {"output": tmp_path / "out"}
    with refused("not one record"):
        encode(**data, **out)
    with refused(f"--output {out['output']}", "columns"):
        encode(**data, **out, caption_column="words")
    flags = {"caption_column": "words", "max_train_steps": 4}
    work.__init__()
    folder = encode(**data, caption_column="words")
    assert work.images == 4 and {*work.captions} == {"", "tar 0", "tar 1", "tar 2", "tar 3"}
    assert equal(run(**flags, dataset_name=folder), run(**flags, **data))


OF_THOSE_NAMES = [
    ("prompt", ["latents"]),
    ("prompt", ["latents", "captions"]),
    ("name", ["latents"]),
    ("captions", ["captions"]),
    ("image", ["captions"]),
]


@pytest.mark.parametrize("layout", ["sd15"])
@pytest.mark.parametrize(("column", "kinds"), OF_THOSE_NAMES)
def test_columns_named_as_those_of_encoded_data(run, encode, parquet, column, kinds):
    """The training command keeps its --caption_column and --image_column."""
    data = parquet([record(i) for i in range(4)])
    table = pq.read_table(data / "train.parquet")
    names = ["picture", "image"] if column == "image" else ["image", column]
    features = datasets.Features({names[0]: datasets.Image(), names[1]: datasets.Value("string")})
    given = datasets.Dataset(table.rename_columns(names).replace_schema_metadata())
    given.cast(features).to_parquet(data / "train.parquet")
    flags = {"image_column": names[0], "caption_column": names[1]}
    folder = encode(**flags, dataset_name=data, encode=kinds)
    flags["max_train_steps"] = 2
    assert equal(run(**flags, dataset_name=folder), run(**flags, dataset_name=data))


# ------------------------------------------------------------------------- nothing encoded twice


def test_each_is_encoded_once(encode, work, program, tmp_path, monkeypatch):
    """After an error in the second file the first one stays; a whole folder needs nothing more but
    new validation prompts."""
    monkeypatch.setattr(program, "ROWS", 4)
    out, real = {"output": tmp_path / "out", "random_flip": True}, program.encode_batch

    def stop(trainer, pipe, samples, features, args):
        if samples[0]["name"].endswith("04.png"):
            raise OSError("the cable")
        return real(trainer, pipe, samples, features, args)

    monkeypatch.setattr(program, "encode_batch", stop)
    with refused("data-00001-of-00003.arrow", "the cable"):
        encode(**out)
    assert {*work.loaded} == {"VAE", "text encoder"} and work.images == 8
    monkeypatch.setattr(program, "encode_batch", real)
    encode(**out)
    assert work.images == 24 and len(work.captions) == len({*work.captions}) == 13
    whole = content(tmp_path / "out")
    assert whole == content(encode(random_flip=True))
    work.__init__()
    encode(**out)
    assert (work.images, work.captions) == (0, []) and content(tmp_path / "out") == whole
    for prompts in ["rain"], ["rain", "a snail"], ["a snail"]:
        encode(**out, validation_prompts=prompts)
    assert (work.images, work.captions) == (0, PROMPTS)
    assert {*json.loads(safe_metadata(tmp_path / "out"))} == {"", *PROMPTS}


def safe_metadata(folder):
    """The list of prompts in a file of embeddings."""
    with open(folder / "prompts.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))["__metadata__"]["prompts"]


@pytest.mark.parametrize("layout", ["sd15"])
def test_leftovers_of_a_kill_are_no_content(encode, copied):
    """Whatever was half written when a process was killed, even the stamp, the first file."""
    whole = content(copied)
    flags = {"output": copied, "random_flip": True, "validation_prompts": PROMPTS}
    for kept in 0, 1, 2, 3, 4:
        names = ["encoded.json", "prompts.safetensors", "data-00000-of-00001.arrow"]
        names += ["dataset_info.json", STATE]
        for i, name in enumerate(names):
            if i >= kept:
                (copied / name).unlink()
        (copied / f"{names[kept]}.part").write_bytes(b"torn")
        encode(**flags)
        assert content(copied) in (whole, whole | {"dataset_info.json.part": b"torn"})


@pytest.fixture
def two_processes(teacher, images, tmp_path):
    """two_processes(output): the program with files of four records, launched twice at once."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER + TELLING)

    def start(output):
        flags = {"family": "sd15", "pretrained_teacher_model": teacher, "train_data_dir": images}
        words = command_line(flags | {"output": output, "resolution": 32, "center_crop": True})
        return launch(driver, ROOT / PROGRAM, *words, count=2)

    return start


@pytest.mark.parametrize("layout", ["sd15"])
def test_two_processes(two_processes, program, encode, tmp_path, monkeypatch):
    """Each encodes a part, no image twice; the content is that of one process."""
    done = two_processes(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    told = Counter(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert told == {"rank 0: 4 encoded": 2, "rank 1: 4 encoded": 1}
    monkeypatch.setattr(program, "ROWS", 4)
    assert content(tmp_path / "two") == content(encode())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("layout", ["sd15"])
def test_an_error_of_the_second_process(two_processes, program, encode, monkeypatch):
    """Is said too, and what the first one did is kept."""
    monkeypatch.setattr(program, "ROWS", 4)
    folder = encode()
    whole, part = content(folder), folder / "data-00001-of-00003.arrow.part"
    for name in STATE, "data-00000-of-00003.arrow", "data-00001-of-00003.arrow":
        (folder / name).unlink()
    part.symlink_to("/dev/full")
    done = two_processes(folder)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "encode_data.py: error: " in line]
    assert len(lines) == 1 and str(part.with_suffix("")) in lines[0] and "No space" in lines[0]
    part.unlink()
    encode(output=folder)
    assert content(folder) == whole


class Encodings:
    """Runs of the program, by a forking driver."""

    def __init__(self, tmp_path, teacher, data):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER + FORKING)
        flags = {"family": "sd15", "center_crop": True, "resolution": 16, "random_flip": True}
        # so that most of the time some rows of a file are written and some not
        flags |= {"vae_encode_batch_size": 1}
        flags |= {"pretrained_teacher_model": teacher, "train_data_dir": data}
        command = [sys.executable, driver, ROOT / PROGRAM, *command_line(flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*map(str, command)]
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def start(self, folder):
        """Start one; its process id."""
        self.process.stdin.write(f"--output {folder}\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self):
        """The driver's next number, past what the program says."""
        lines = map(str.strip, self.process.stdout)
        return next(line for line in lines if line.lstrip("-").isdigit())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_ten_kills(teacher, make_images, train, tmp_path):
    """Ten runs are killed at random moments, the eleventh ends with an undisturbed run's content.

    A moment is some files after the start and up to 30 ms, every other time then when a file is
    half written. Nothing of a killed run is taken for a whole file.
    """
    data, calm, killed = make_images(160), tmp_path / "calm", tmp_path / "killed"
    runs, random, counts = Encodings(tmp_path, teacher, data), np.random.default_rng(0), []
    runs.start(calm)
    assert runs.line() == "0"
    expected, torn = content(calm), 0
    assert len(expected) == 40 + 4

    def number(pattern, least=0):
        """How many such files there are, at least after a while."""
        end = time.monotonic() + 60
        while (found := len([*killed.glob(pattern)])) < least and time.monotonic() < end:
            time.sleep(0.001)
        return found

    for i, files in enumerate([1, *random.permutation([0, 0, 0, 1, 1, 1, 1, 1, 2])]):
        for part in killed.glob("*.part"):
            part.unlink()
        whole = number("*.arrow")
        child = runs.start(killed)
        number("*.arrow", whole + files)
        if i % 2:
            number("*.arrow.part", 1)
        else:
            time.sleep(random.uniform(0, 0.03 if files else 0.4))
        os.kill(child, signal.SIGKILL)
        assert runs.line() == str(-signal.SIGKILL)
        torn += number("*.arrow.part")
        left = content(killed)
        counts.append(sum(name.endswith(".arrow") for name in left))
        assert all(name.endswith(".part") or expected[name] == left[name] for name in left)
        with refused("--dataset_name", "not finished"):
            train(dataset_name=killed, resolution=16, center_crop=True)
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < 40 and torn > 2
    runs.start(killed)
    assert runs.line() == "0"
    runs.process.communicate(timeout=60)
    assert content(killed) == expected and len(datasets.load_from_disk(killed)) == 160
