"""scripts/check_data.py: what it counts and draws is what the trainer would train on."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script, run
from PIL import Image


@pytest.fixture(scope="module")
def program():
    """The program as a module."""
    return load_script("scripts/check_data.py")


@pytest.fixture
def check(program, tmp_path, capsys):
    """check(flags ...) -> (exit code, the report)."""

    def check(*flags):
        code = program.main(
            [*map(str, flags), "--report_dir", str(tmp_path / "check"), "--cache_dir", str(tmp_path / "c")]
        )
        assert {path.name for path in (tmp_path / "check").iterdir()} == {"report.md", "contact_sheet.png"}
        report = (tmp_path / "check" / "report.md").read_text()
        assert report in capsys.readouterr().out
        return code, report

    return check


@pytest.fixture
def folder(tmp_path):
    """Five pictures: three sizes, one a copy, one broken; one caption is empty."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes, texts = [(40, 20), (30, 90), (50, 50), (50, 50), (9, 9)], ["a much longer caption", "b", "", "d", "e"]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (10 * size[0] % 256, 50, 0)).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no picture")
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_counts_are_those_of_the_pictures(check, folder):
    code, report = check("--train_data_dir", folder, "--resolution", 32)
    assert code == 1
    for line in (
        "5 records read: 4 can be used, 1 cannot",
        "width: 30, 45, 50; height: 20, 50, 90; longer / shorter side: 1, 1.5, 3",
        "2 pictures are smaller than 32 px",
        "cuts away 29% of a picture on average",  # of 1/2, 2/3, 0, 0
        "1 pictures are copies of another",
        "4 captions, 1 of them empty; 0 pictures have several",
        "21 characters: a much longer caption",
        "4.png (UnidentifiedImageError",
    ):
        assert line in report
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes())
    assert check("--train_data_dir", folder, "--resolution", 32)[0] == 0


def test_a_whole_training_command_can_be_pasted(check, folder, teacher):
    """Resolution and token count are the teacher's, and its weights are not read."""
    code, report = check("--train_data_dir", folder, "--pretrained_teacher_model", teacher, "--output_dir", folder / "out",
                         "--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1, "--samples", 3)  # fmt: skip
    assert code == 1 and not (folder / "out").exists()
    assert "smaller than 32 px" in report and "1 captions are longer than the text encoder's 16 tokens" in report


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_sheet_shows_what_the_trainer_draws(program, request, family, streaming, pictures, tmp_path):
    """The pictures of the first samples, crop, flip and all, of either trainer."""
    flags = [
        "--family",
        family,
        "--train_data_dir",
        str(pictures),
        "--resolution",
        "64",
        "--random_flip",
        "--samples",
        "6",
    ]
    flags += ["--train_batch_size", "4", "--cache_dir", str(tmp_path)] + ["--streaming"] * streaming
    own, trainer, args = program.parse_args(flags)
    sheet = program.draw_sheet(trainer.load_records(args), trainer, own, args)
    loader = iter(trainer.make_loader(trainer.load_records(args), None, args, 0, 0, 1))
    pixels = [pixels for _ in range(2) for pixels in next(loader)["pixels"]][:6]
    width, height = program.CELL + 8, program.CELL + 30
    for i, pixels in enumerate(pixels):
        cell = sheet.crop((i % 4 * width + 4, i // 4 * height + 4, i % 4 * width + 196, i // 4 * height + 196))
        shown = np.asarray(cell.resize((64, 64), Image.Resampling.BOX)).astype(float)
        assert abs(shown - (pixels.permute(1, 2, 0).numpy() + 1) * 127.5).mean() < 4


def test_streaming_reads_no_more_than_it_must(check, pictures):
    _, report = check("--train_data_dir", pictures, "--streaming", "--limit", 5, "--resolution", 32)
    assert "5 records read (the first, by --limit)" in report


def test_bad_input_is_one_line(tmp_path):
    done = run(sys.executable, "scripts/check_data.py", "--train_data_dir", tmp_path / "none", cwd=ROOT)
    assert done.returncode == 1 and "--train_data_dir" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
