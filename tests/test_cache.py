"""--cache_text_embeddings: each caption is encoded once, and training is that without a cache."""

import pytest
from conftest import SMOOTH, near, series
from datasets import Dataset

TRAINERS = ["sd15", "sdxl"]
SETTINGS = SMOOTH | {"max_train_steps": 6, "proportion_empty_prompts": 0.3, "train_batch_size": 3}


@pytest.fixture(params=TRAINERS)
def trainer(request):
    """Each trainer as a module."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def run(trainer, train_by, make_teacher, tmp_path):
    """run(flag=value, ...) with a cache folder of its own."""
    train = train_by(trainer, make_teacher("sd15" if "sd15" in trainer.__name__ else "sdxl"))
    return lambda **flags: train(**{"cache_dir": tmp_path / "cache"} | SETTINGS | flags)


@pytest.fixture
def encoded(trainer, monkeypatch):
    """The captions that were encoded, in order."""
    seen, encode = [], trainer.encode_captions

    def spy(pipe, captions):
        seen.extend(captions)
        return encode(pipe, captions)

    monkeypatch.setattr(trainer, "encode_captions", spy)
    return seen


def files(folder):
    """The cache files and when they were last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/lcm_lora_text_embeddings/*.arrow")}


def test_cached_is_uncached(run, encoded, tmp_path):
    """Equal losses; every caption once and the empty one; the next run encodes only what names the files."""
    plain = run()
    encoded.clear()
    cached = run(cache_text_embeddings=True)
    assert near(plain, cached)
    named = encoded[:5]
    assert named[0] == "" and len(encoded) == 5 + 12 + 1 and encoded[-1] == ""
    assert len(set(encoded[5:-1])) == 12
    before = files(tmp_path)
    assert len(before) == 1
    encoded.clear()
    again = run(cache_text_embeddings=True)
    assert encoded == named and files(tmp_path) == before and series(again) == series(cached)


def test_precision_and_captions_name_the_files(run, trainer, tmp_path):
    """bf16 embeddings are kept as bf16, beside the others; other captions are another cache."""
    run(cache_text_embeddings=True, max_train_steps=1)
    plain = run(mixed_precision="bf16")
    assert near(plain, run(cache_text_embeddings=True, mixed_precision="bf16"), 1e-2)
    assert len(files(tmp_path)) == 2
    run(cache_text_embeddings=True, max_train_steps=1, max_train_samples=5)
    assert len(files(tmp_path)) == 3
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache" / "lcm_lora_text_embeddings").iterdir())
    assert sizes[1] < 0.6 * sizes[2]  # 13 rows in bf16 against 13 in float32; the first has six


def test_a_killed_fill_goes_on(run, encoded, make_pictures, tmp_path, trainer, monkeypatch):
    """Whole files stay, the one that was being written is written again; the content is that of an undisturbed fill."""
    monkeypatch.setattr(trainer, "CACHE_ROWS", 5)
    whole = run(cache_text_embeddings=True, max_train_steps=2)
    rows = {name: Dataset.from_file(str(path)).to_list() for name, path in paths(tmp_path).items()}
    assert sorted(map(len, rows.values())) == [3, 5, 5]
    for path in paths(tmp_path).values():
        path.unlink()
    count, encode = [], trainer.encode_captions

    def die(pipe, captions):
        count.append(captions)
        if len(count) == 4:  # "", the four of the name, the first file, and now the second
            raise KeyboardInterrupt
        return encode(pipe, captions)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "encode_captions", die)
        with pytest.raises(KeyboardInterrupt):
            run(cache_text_embeddings=True, max_train_steps=2)
    assert len(paths(tmp_path)) == 1
    encoded.clear()
    assert series(run(cache_text_embeddings=True, max_train_steps=2)) == series(whole)
    assert len(encoded) == 5 + 8
    assert {name: Dataset.from_file(str(path)).to_list() for name, path in paths(tmp_path).items()} == rows


def paths(folder):
    """The cache files by name."""
    return {path.name: path for path in folder.glob("cache/lcm_lora_text_embeddings/*.arrow")}
