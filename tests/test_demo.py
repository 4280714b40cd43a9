"""The embedded default: demo/data, the two demo teachers, and what the quickstart makes of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "demo" / "data"
FAMILIES = ["sd15", "sdxl"]


def size(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_demo_is_small():
    """What is committed stays within its limits: 8 MB of images, 20 MB of weights a teacher."""
    assert 0 < size(DATA) <= 8e6
    for family in FAMILIES:
        assert 0 < size(ROOT / "demo" / f"teacher-{family}") <= 20e6


@pytest.mark.parametrize(
    "config,styles", [(None, {"noto", "fluent flat"}), ("twemoji", {"twemoji"})]
)
def test_datasets_opens_the_images(config, styles, tmp_path):
    """By default the two styles of the teacher; the held-out style only by name."""
    import datasets

    data = datasets.load_dataset(str(DATA), config, split="train", cache_dir=str(tmp_path))
    assert set(data["style"]) == styles
    assert len(data) > 1500 * len(styles)
    for row in data.select(range(0, len(data), 500)):
        assert row["image"].size == (64, 64)
        assert row["text"].endswith(f", {row['style']} style")


def test_licences_stand_beside_the_images():
    """Each source's licence or attribution is there."""
    for name in ("noto", "fluent", "twemoji", "emojibase"):
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
    assert image.size == (64, 64)
    assert pixels.std() > 20, "a blank"
    assert np.abs(np.diff(pixels, axis=1)).mean() < 40, "noise"


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
