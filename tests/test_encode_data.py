"""The caches: each picture and caption is encoded once, whatever is killed, and training is that without them."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import datasets
import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from conftest import ROOT, SMOOTH, command_line, launch, near, image_bytes, series, write_tar
from huggingface_hub import HfApi
from PIL import Image
from single_file import as_single_file

SCRIPTS = {"sd15": "train_lcm_lora_sd15.py", "sdxl": "train_lcm_lora_sdxl.py"}
TEACHERS = {"sd15": "teacher", "sdxl": "xl_teacher"}
SETTINGS = SMOOTH | {"train_batch_size": 2, "center_crop": True, "lora_target_modules": "to_q"}
BOTH = {"cache_latents": True, "cache_text_embeddings": True}
# A trainer whose caches have many files.
DRIVER = """
import importlib.util, os, sys

spec = importlib.util.spec_from_file_location("trainer", sys.argv[1])
trainer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainer)
trainer.CACHE_ROWS = 4
"""
# It is forked for each line of the input, so that a fill starts at once; said are its number, at its end how it ended.
FORKING = """
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        trainer.main(sys.argv[2:] + line.split())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TELLING = """
encode = trainer.encode_images

def tell(vae, pixels, batch_size):
    print(f"rank {os.environ['RANK']}: {len(pixels)} encoded")
    return encode(vae, pixels, batch_size)

trainer.encode_images = tell
trainer.main(sys.argv[2:])
"""


@pytest.fixture(params=SCRIPTS)
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
def run(trainer, train_by, base, tmp_path):
    """run(flag=value, ...) with a cache folder of its own."""
    train = train_by(trainer, base)
    return lambda **flags: train(**SETTINGS | {"cache_dir": tmp_path / "cache"} | flags)


class Work:
    """What was encoded, and the kinds of models whose weights were loaded."""

    def __init__(self):
        self.pictures, self.captions, self.loaded = 0, [], []


@pytest.fixture
def work(trainer, monkeypatch):
    """Fills while the trainer runs."""
    seen, encode_images, encode_captions = Work(), trainer.encode_images, trainer.encode_captions

    def pictures(vae, pixels, batch_size):
        seen.pictures += len(pixels)
        return encode_images(vae, pixels, batch_size)

    def captions(pipe, captions):
        seen.captions += captions
        return encode_captions(pipe, captions)

    monkeypatch.setattr(trainer, "encode_images", pictures)
    monkeypatch.setattr(trainer, "encode_captions", captions)
    for kind in (diffusers.AutoencoderKL, transformers.PreTrainedModel):

        def load(cls, *args, real=kind.from_pretrained.__func__, **options):
            seen.loaded.append("VAE" if cls is diffusers.AutoencoderKL else "text encoder")
            return real(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    return seen


def content(folder):
    """{name: rows} of the files of a cache."""
    files = (folder / "lcm_lora").glob("*.arrow")
    return {file.name: datasets.Dataset.from_file(str(file)).to_list() for file in files}


def equal(a, b):
    """Whether each loss of two runs is the same but for a relative difference of 1e-5."""
    return np.allclose(series(a), series(b), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------- cached is uncached


@pytest.mark.parametrize("flip", [False, True], ids=["as they are", "flipped, own VAE"])
def test_losses_are_those_without_a_cache(run, work, make_teacher, flip):
    """Over 20 steps; with flips and another VAE than the teacher's too."""
    flags = {"max_train_steps": 20, "proportion_empty_prompts": 0.3}
    if flip:
        flags |= {"random_flip": True, "pretrained_vae_model_name_or_path": make_teacher(seed=5) / "vae"}
    plain = run(**flags)
    assert work.pictures == 40 and len(work.captions) == 41
    for cache in [BOTH] if flip else [{"cache_latents": True}, {"cache_text_embeddings": True}, BOTH]:
        assert equal(run(**flags, **cache), plain), cache
    assert len(series(plain)) == 20 and np.std(series(plain)) > 1e-2 * np.mean(series(plain))


def test_each_is_encoded_once(run, work, make_images, make_teacher, tmp_path):
    """By a fill that writes no more than the caches; runs afterwards encode nothing and load no model of that kind."""
    own = make_teacher(seed=5) / "vae"
    flags = BOTH | {"train_data_dir": make_images(14), "random_flip": True, "max_train_steps": 2}
    work.loaded.clear()
    assert not run(**flags, cache_only=True).exists()
    assert work.pictures == 2 * 14 and sorted(work.captions) == sorted({"", *work.captions})
    assert len(work.captions) == 1 + 12 and {*work.loaded} == {"VAE", "text encoder"}
    run(**flags, cache_only=True, pretrained_vae_model_name_or_path=own)
    assert work.pictures == 4 * 14 and len(work.captions) == 1 + 12
    work.__init__()
    for vae in (None, own):
        assert len(series(run(**flags, pretrained_vae_model_name_or_path=vae))) == 2
    assert (work.pictures, work.captions, work.loaded) == (0, [], [])
    rows = content(tmp_path / "cache")
    assert Counter(name.split("-")[0] for name in rows) == {"latents": 2, "embeddings": 2}
    assert sum(map(len, rows.values())) == 2 * 14 + 12 + 1


def test_validation_prompts(run, work, tmp_path):
    """Their pictures are those without a cache; only they are encoded anew, and afterwards only the VAE is loaded."""
    flags = {"validation_prompts": ["rain", "a snail"], "max_train_steps": 2}
    plain = run(**flags)
    run(**BOTH, cache_only=True)
    work.__init__()
    first = run(**BOTH, **flags)
    assert work.pictures == 0 and work.captions == ["", "rain", "a snail"]
    work.__init__()
    second = run(**BOTH, **flags)
    assert work.pictures == 0 and work.captions == [] and work.loaded == ["VAE"]
    drawn = [np.asarray(Image.open(out / "validation" / "step-000002.png"), np.int16) for out in (plain, first, second)]
    assert abs(drawn[0] - drawn[1]).max() <= 1 and np.array_equal(drawn[1], drawn[2]) and drawn[0].std() > 5


def test_two_processes_share_a_fill(sdxl, train_by, xl_teacher, images, tmp_path):
    """Each encodes a part, no picture twice; the losses are those of one process without a cache."""
    driver, out = tmp_path / "driver.py", tmp_path / "two"
    driver.write_text(DRIVER + TELLING)
    flags = SETTINGS | {"resolution": 32, "lora_rank": 4, "max_train_steps": 3, "report_to": "none"}
    where = {"pretrained_teacher_model": xl_teacher, "train_data_dir": images, "cache_dir": tmp_path / "cache"}
    words = command_line(flags | where | BOTH | {"output_dir": out, "train_batch_size": 1})
    done = launch(driver, ROOT / SCRIPTS["sdxl"], *words, flags=("--multi_gpu", "--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    told = Counter(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert told == {"rank 0: 4 encoded": 2, "rank 1: 4 encoded": 1}
    assert near(out, train_by(sdxl, xl_teacher)(**SETTINGS, max_train_steps=3))


# ------------------------------------------------------------------------------------------------- the names of files


def test_what_the_files_depend_on(run, work, layout, base, images, make_teacher, tmp_path):
    """Each change of it is another file, and no change of anything else."""
    flags = BOTH | {"cache_only": True, "resolution": 16, "max_train_samples": 3}
    other, third = make_teacher(layout, seed=5), make_teacher(layout, seed=6)
    known = set()

    def new(**changes):
        """The files that a run makes, by kind."""
        run(**flags | changes)
        made = content(tmp_path / "cache").keys() - known
        known.update(made)
        return Counter(name.split("-")[0] for name in made)

    def teacher_with(part, change=None):
        """A copy of the teacher with one part of the other one, or with a change of a file's text."""
        folder = tmp_path / f"with {part.replace('/', ' ')}"
        shutil.copytree(base, folder)
        if change:
            (folder / part).write_text(change((folder / part).read_text()))
        else:
            shutil.rmtree(folder / part)
            shutil.copytree(other / part, folder / part)
        return {"pretrained_teacher_model": folder}

    pixels, texts, all_texts = (
        {"latents": 1},
        {"embeddings": 1},
        {"embeddings": 2},
    )  # the prompts have a file of their own
    assert new() == pixels | all_texts
    assert new() == {}
    same = {
        "learning_rate": 0.5,
        "seed": 3,
        "output_dir": tmp_path / "elsewhere",
        "lora_rank": 2,
        "train_batch_size": 3,
    }
    same |= {"vae_encode_batch_size": 1, "proportion_empty_prompts": 0.5, "dataloader_num_workers": 1, "w_min": 4}
    assert new(**same, **teacher_with("unet")) == {}
    for change in ({"resolution": 20}, {"interpolation_type": "nearest"}, {"random_flip": True}, teacher_with("vae")):
        assert new(**change) == pixels, change
    assert new(pretrained_vae_model_name_or_path=third / "vae") == pixels
    assert new(mixed_precision="bf16") == pixels | all_texts
    of_text = ["text_encoder"] if layout == "sd15" else ["text_encoder", "text_encoder_2"]
    for part in of_text:
        assert new(**teacher_with(part)) == all_texts, part
    tokens = teacher_with("tokenizer/merges.txt", lambda text: f"{text}a b</w>\n")
    assert new(**tokens) == all_texts
    if layout == "sdxl":
        assert new(use_fix_crop_and_size=True) == pixels
        zeros = '"force_zeros_for_empty_prompt": '
        unforced = teacher_with("model_index.json", lambda text: text.replace(f"{zeros}true", f"{zeros}false"))
        assert new(**unforced) == all_texts

    work.__init__()
    for prompt in ("rain", "a snail"):
        assert new(validation_prompts=[prompt]) == texts
    assert work.captions == ["", "rain", "", "a snail"] and work.pictures == 0
    assert new(max_train_samples=4) == pixels | texts
    data = tmp_path / "data"
    shutil.copytree(images, data)
    assert new(train_data_dir=data, max_train_samples=5) == pixels | texts
    shutil.copy(data / "03.png", data / "01.png")
    os.utime(data / "01.png", (1, 1))
    assert new(train_data_dir=data, max_train_samples=5) == pixels
    (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("green pear", "a pear"))
    os.utime(data / "metadata.jsonl", (1, 1))
    assert new(train_data_dir=data, max_train_samples=5) == pixels | texts


@pytest.mark.parametrize("layout", ["sdxl"])
def test_a_teacher_in_one_file(run, work, layout, make_teacher, tmp_path):
    """Cached is uncached, with its own VAE or another; the files depend on the tokenizers given beside it."""
    folder = make_teacher(layout)
    flags = {"pretrained_teacher_model": as_single_file(folder), "teacher_config": folder, "max_train_steps": 2}
    for vae in (None, make_teacher(seed=5) / "vae"):
        plain = run(**flags, pretrained_vae_model_name_or_path=vae)
        for _ in range(2):
            work.__init__()
            assert equal(run(**flags, **BOTH, pretrained_vae_model_name_or_path=vae), plain)
        assert (work.pictures, work.captions, work.loaded) == (0, [], [])
    known, config = content(tmp_path / "cache").keys(), tmp_path / "config"
    shutil.copytree(folder, config)
    (config / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    run(**flags | {"teacher_config": config}, **BOTH, cache_only=True)
    made = content(tmp_path / "cache").keys() - known
    assert Counter(name.split("-")[0] for name in made) == {"embeddings": 2}


# --------------------------------------------------------------------------------------------------------- unusable records


@pytest.fixture
def parquet(tmp_path):
    """parquet(records) -> a folder of one file with pictures as bytes, which have no name."""

    def make(records):
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        columns = {name: [record[name] for record in records] for name in features}
        folder = tmp_path / "parquet"
        folder.mkdir()
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
        return folder

    return make


def picture(i):
    """A record with a picture of one colour."""
    return {"image": image_bytes(Image.new("RGB", (40, 40 + i), (30 * i, 0, 99))), "text": f"picture {i}"}


BROKEN = {"image": {"bytes": b"no picture at all", "path": None}, "text": "broken"}
EMPTY = {"image": None, "text": "empty"}


def test_odd_records_are_named_and_replaced(trainer, run, parquet, capsys, monkeypatch):
    """As without a cache: the same warnings, by the row in the data, and the same losses; and how many, before the first step."""
    monkeypatch.setattr(trainer, "CACHE_ROWS", 2)
    data = parquet([picture(0), BROKEN, picture(2), EMPTY, BROKEN, picture(5), picture(6)])
    outs, told = [], []
    for flags in ({}, BOTH, BOTH):
        outs.append(run(train_data_dir=None, dataset_name=data, max_train_steps=2, train_batch_size=4, **flags))
        told.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")])
    assert told[0] == told[1][1:] == told[2][1:] and len(told[0]) == 3
    assert told[1][0] == told[2][0] and told[1][0].startswith("warning: 3 unusable records in the cache, the first: row 1 (")
    assert {line.split(": ", 2)[2].split(" (")[0] for line in told[0]} == {"row 1", "row 3", "row 4"}
    assert told[0][2].startswith("warning: 3 unusable records replaced")
    assert equal(outs[0], outs[1]) and series(outs[1]) == series(outs[2])


def test_only_odd_records(run, parquet, tmp_path):
    """One message, nothing written; from a cache that is there too."""
    data = parquet([BROKEN, EMPTY])
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"error: not one record of the data can be used, the first: row [01] \("):
            run(train_data_dir=None, dataset_name=data, output_dir=tmp_path / "out", **BOTH)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_not_utf8(run, parquet, capsys):
    """As without a cache its row is odd, and nothing else."""
    data = parquet([picture(0), picture(1), picture(2)])
    table = pq.read_table(data / "train.parquet")
    raw = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(table.set_column(1, table.schema.field(1), texts), data / "train.parquet")
    flags = {"train_data_dir": None, "dataset_name": data, "max_train_steps": 2, "train_batch_size": 3}
    assert equal(run(**flags), run(**flags, **BOTH))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 2 and told[0] == told[1] and "row 1 (UnicodeDecodeError" in told[0]


def test_strict_data(run, parquet, tmp_path):
    data = parquet([picture(0), BROKEN])
    with pytest.raises(SystemExit, match=r"error: --strict_data: row 1 \(UnidentifiedImageError"):
        run(train_data_dir=None, dataset_name=data, output_dir=tmp_path / "out", strict_data=True, **BOTH)
    assert not (tmp_path / "out").exists()


def test_the_caption_column_of_tar_shards(run, work, tmp_path):
    """Where a first run named a column that is not there, the next one does not find its records odd for ever."""
    files = {}
    for i in range(3):
        files |= {f"{i}.png": picture(i)["image"]["bytes"], f"{i}.json": json.dumps({"words": "a"}).encode()}
    write_tar(tmp_path / "a.tar", files)
    flags = BOTH | {"train_data_dir": None, "train_shards_path_or_url": tmp_path / "a.tar", "max_train_steps": 2}
    with pytest.raises(SystemExit, match="not one record"):
        run(**flags)
    assert len(series(run(**flags, caption_column="words"))) == 2 and work.pictures == 3


# -------------------------------------------------------------------------------------------------------------- refused


REFUSED = {
    "a random crop": ({"cache_latents": True, "center_crop": None}, "--cache_latents: .* one crop; give --center_crop"),
    "nothing to cache": ({"cache_only": True}, "--cache_only: .*--cache_latents, --cache_text_embeddings"),
    "streamed latents": ({"cache_latents": True, "streaming": True}, "--streaming: .*cache"),
    "streamed captions": ({"cache_text_embeddings": True, "streaming": True}, "--streaming: .*cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run, tmp_path, case):
    """With the reason, before anything is written."""
    flags, message = REFUSED[case]
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(output_dir=tmp_path / "out", **flags)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True], ids=["a file", "a full disk"])
def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch, full):
    def fill(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if full:
        monkeypatch.setattr(datasets.Dataset, "map", fill)
    else:
        (tmp_path / "lcm_lora").write_text("")
    with pytest.raises(SystemExit, match=f"error: --cache_dir {tmp_path}.*(space|FileExistsError)"):
        run(cache_dir=tmp_path, output_dir=tmp_path / "out", **BOTH)
    assert not (tmp_path / "out").exists()


def test_a_fill_makes_no_repository(run, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    run(**BOTH, cache_only=True, push_to_hub=True)


# ---------------------------------------------------------------------------------------------------------------- kills


class Fills:
    """Fills of both caches in a folder, by a forking driver."""

    def __init__(self, tmp_path, teacher, data):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER + FORKING)
        flags = BOTH | {"cache_only": True, "center_crop": True, "resolution": 16, "random_flip": True}
        flags["vae_encode_batch_size"] = 1  # so that most of the time some rows of a file are written and some not
        flags |= {"pretrained_teacher_model": teacher, "train_data_dir": data, "output_dir": tmp_path / "out"}
        flags["lora_target_modules"] = "to_q"
        command = [sys.executable, driver, ROOT / SCRIPTS["sd15"], *command_line(flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes)

    def start(self, folder):
        """Start one; its process id."""
        self.process.stdin.write(f"--cache_dir {folder}\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self):
        """The driver's next number, past what the trainer says."""
        return next(line.strip() for line in self.process.stdout if line.strip().lstrip("-").isdigit())


def test_ten_kills(teacher, make_images, sd15, train_by, tmp_path, monkeypatch):
    """Ten fills are killed at random moments, the eleventh ends: the files and rows are those of an undisturbed fill.

    A moment is some files after the start and up to 30 ms, every other time then when a file is half written. Nothing of
    a killed fill is taken for a whole file.
    """
    data, calm, killed = make_images(72), tmp_path / "calm", tmp_path / "killed"
    fills, random, counts = Fills(tmp_path, teacher, data), np.random.default_rng(0), []

    def number(pattern, least=0):
        """How many such files there are, at least after a while."""
        end = time.monotonic() + 60
        while (found := len([*killed.glob(f"lcm_lora/{pattern}")])) < least and time.monotonic() < end:
            time.sleep(0.001)
        return found

    fills.start(calm)
    assert fills.line() == "0"
    for i, files in enumerate([1, *random.permutation([0, 0, 0, 1, 1, 1, 1, 1, 2])]):
        whole, torn = number("*.arrow"), number("tmp*")
        child = fills.start(killed)
        number("*.arrow", whole + files)
        if i % 2:
            number("tmp*", torn + 1)
        else:
            time.sleep(random.uniform(0, 0.03 if files else 1))
        os.kill(child, signal.SIGKILL)
        assert fills.line() == str(-signal.SIGKILL)
        counts.append(len(content(killed)))
    expected = content(calm)
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < len(expected) == 18 + 3 + 1
    assert number("tmp*") > 0  # torn files, which are no part of the cache
    fills.start(killed)
    assert fills.line() == "0" and not (tmp_path / "out").exists()
    fills.process.communicate(timeout=60)
    assert content(killed) == expected and sum(map(len, expected.values())) == 72 + 12 + 1

    monkeypatch.setattr(sd15, "CACHE_ROWS", 4)
    for name in ("encode_images", "encode_captions"):
        monkeypatch.delattr(sd15, name)  # nothing is left to encode
    flags = BOTH | {
        "cache_dir": killed,
        "train_data_dir": data,
        "resolution": 16,
        "center_crop": True,
        "random_flip": True,
    }
    assert len(series(train_by(sd15, teacher)(**flags, max_train_steps=2))) == 2
