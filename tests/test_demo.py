"""The embedded default: demo/data, the two demo teachers, and what the quickstart makes of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "demo" / "data"
FAMILIES = ["sd15", "sdxl"]
TRAIN_STYLES = {"noto", "fluent flat", "fluent 3D"}


def size(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_demo_is_small():
    """What is committed stays within its limits: 8 MB of images, 20 MB of weights a teacher."""
    assert 0 < size(DATA) <= 8e6
    for family in FAMILIES:
        assert 0 < size(ROOT / "demo" / f"teacher-{family}") <= 20e6


@pytest.mark.parametrize("file,styles", [("train", TRAIN_STYLES), ("twemoji", {"twemoji"})])
def test_datasets_opens_the_images(file, styles, tmp_path):
    """By default the three styles of the teacher; the held-out style only by its file's name."""
    import datasets

    chosen = {} if file == "train" else {"data_files": f"{file}.parquet"}
    data = datasets.load_dataset(str(DATA), split="train", cache_dir=str(tmp_path), **chosen)
    assert set(data["style"]) == styles
    assert len(data) == 843 * len(styles)
    for row in data.select(range(0, len(data), 500)):
        assert row["image"].size == (128, 128)
        assert row["text"].endswith(f", {row['style']} style")


def test_other_images_are_not_taken_from_the_cache(tmp_path):
    """`datasets` keeps what it read from a folder whose README.md names the files: no such here."""
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(DATA / "README.md", folder)
    for count in 3, 5:
        records = datasets.Dataset.from_dict({"text": ["a"] * count})
        records.to_parquet(folder / "train.parquet")
        read = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(read) == count


def test_prompts_of_the_comparison_are_not_picked():
    """The first eight captions of evaluate.py's shuffle that are each of another category."""
    import numpy as np
    from pyarrow.parquet import read_table

    rows = read_table(DATA / "train.parquet", columns=["text", "category"]).to_pylist()
    first = {}
    for place in np.random.default_rng([0, 0]).permutation(len(rows)):
        first.setdefault(rows[place]["category"], rows[place]["text"])
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    prompts = re.findall(r'"([^"]+ style)"', script[script.index("infer.py") :])
    assert prompts == [*first.values()][:8]


def test_licences_stand_beside_the_images():
    """Each source's licence or attribution is there."""
    for name in ("noto", "fluent", "fluent-3d", "twemoji", "emojibase"):
        assert (DATA / f"LICENSE-{name}.txt").stat().st_size > 200


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_opens_and_generates(family):
    """diffusers opens the folder; its 50-step image is no blank and no noise."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipe = kind.from_pretrained(ROOT / "demo" / f"teacher-{family}", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "red apple, noto style", guidance_scale=4.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    pixels = np.asarray(image, np.float32)
    assert image.size == (128, 128)
    assert pixels.std() > 20, "a blank"
    assert np.abs(np.diff(pixels, axis=1)).mean() < 40, "noise"


def test_crops_lie_where_their_sizes_say():
    """A ramp's values tell where a crop was cut; every second set says a smaller original."""
    import numpy as np
    import torch
    import train_teacher

    side = 128
    ramp = torch.arange(side, dtype=torch.uint8).expand(16, 3, side, side)
    images = torch.cat([ramp[:8], ramp[:8].transpose(2, 3)])
    torch.manual_seed(0)
    for number in range(2):
        cut, sizes = train_teacher.crops(images, number)
        assert (sizes[:, 4:] == side).all()
        assert (sizes[:, :2] == side).all() if number == 0 else (sizes[:, :2] < side).all()
        assert sizes[:, 2:4].float().std(0).min() > 1
        for place, (image, size) in enumerate(zip(cut, sizes, strict=True)):
            line = image[0].float().mean(0 if place < 8 else 1).numpy()[8:-8]
            slope, first = np.polyfit(np.arange(8, side - 8), line, 1)
            start = size[3 if place < 8 else 2].item()
            assert 1 / 1.31 < slope < 1.02
            assert abs(first - ((start + 0.5) * slope - 0.5)) < 1


def test_a_part_ends_by_time_and_goes_on(tmp_path):
    """With --unet_minutes the rate falls to 0 within the time, which a resumed run goes on from."""
    import time
    from types import SimpleNamespace

    import torch
    import train_teacher

    args = SimpleNamespace(
        work_dir=tmp_path,
        cuda_graph=False,
        seed=0,
        sheet_every=10**9,
        ema_decay=0.9,
        save_minutes=9,
    )

    def run():
        model = torch.nn.Linear(2, 1)
        return train_teacher.Run("part", 9, model, 1e-3, args, 10**9, 0.02, cooldown=0.5)

    part, rates = run(), []

    def draw():
        rates.append(part.opt.param_groups[0]["lr"])
        return lambda x: part.modules(x).square().mean(), (torch.randn(4, 2),)

    start = time.time()
    part.train(draw)
    assert 1.1 < time.time() - start < 10
    assert part.step > 10 and rates[-1] < 0.1 * max(rates)
    again = run()
    assert again.step == part.step
    again.train(draw)
    assert again.step == part.step, "its time was used up"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_quickstart_and_its_quality(tmp_path, family):
    """The quickstart's LoRA meets every criterion that scripts/evaluate.py judges."""
    from os import environ

    environment = environ | {"OUTPUT_DIR": str(tmp_path)}
    subprocess.run(
        ["bash", ROOT / "scripts" / "quickstart.sh", family],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    requirements = ROOT / "scripts" / "requirements-eval.txt"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    report = tmp_path / "report.md"
    command = [
        sys.executable,
        ROOT / "scripts" / "evaluate.py",
        "lora",
        "--lora",
        tmp_path,
        "--output",
        report,
    ]
    assert subprocess.run(command).returncode == 0, report.read_text()
