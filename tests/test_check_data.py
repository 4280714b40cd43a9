"""scripts/check_data.py: exact figures of known data, and the samples that the step would get."""

import json
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import CAPTIONS, LORA, ROOT, command_line, image_bytes, load_script, run, write_tar
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def check(sd15, sdxl, monkeypatch):
    """The program as a module; what it calls the trainers is undone after a test."""
    for trainer in (sd15, sdxl):
        monkeypatch.setattr(trainer, "__file__", trainer.__file__)
    return load_script("scripts/check_data.py")


@pytest.fixture
def look(check, capsys, tmp_path):
    """look(flag=value, ...) -> (exit code, its report.md), written to tmp_path / "check"."""

    def look(**flags):
        torch.set_num_threads(1)
        flags = {"resolution": 32, "output_dir": tmp_path / "check"} | flags
        code = check.main(command_line(flags))
        text = (tmp_path / "check" / "report.md").read_text()
        assert capsys.readouterr().out.startswith(text.split("\n## Unusable")[0])
        return code, text

    return look


def noise(width, height, seed=0):
    """An image in which no two places are alike."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def write_folder(folder, records):
    """An image folder of {name: (image, caption)}; an image that is bytes is written as it is."""
    folder.mkdir()
    lines = [json.dumps({"file_name": name, "text": text}) for name, (_, text) in records.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for name, (image, _) in records.items():
        data = image if isinstance(image, bytes) else image_bytes(image)["bytes"]
        (folder / name).write_bytes(data)
    return folder


def cut_out(sheet, side, count):
    """The images on a contact sheet, uint8 [count,side,side,3], by its layout."""
    columns, rows = int(np.ceil(np.sqrt(count))), -(-count // int(np.ceil(np.sqrt(count))))
    sheet = np.asarray(Image.open(sheet))
    height, width = len(sheet) // rows, sheet.shape[1] // columns
    places = [(i // columns * height + 4, i % columns * width + 4) for i in range(count)]
    return np.stack([sheet[y : y + side, x : x + side] for y, x in places])


def expected(trainer, count, **flags):
    """(images uint8 [count,H,W,3], captions) of the trainer's own loader."""
    flags = {"pretrained_teacher_model": "x", "resolution": 32, "max_train_steps": 9} | flags
    args = trainer.parse_args(command_line(flags))
    batches = [*trainer.make_loader(trainer.load_records(args), None, args, 0, 0, 1)]
    pixels = torch.cat([batch["pixels"] for batch in batches])[:count]
    captions = [text for batch in batches for text in batch["caption"]][:count]
    return (pixels.permute(0, 2, 3, 1) * 127.5 + 127.5).round().numpy().astype(np.uint8), captions


def test_counts_sizes_and_captions(look, tmp_path):
    """All figures of five known images: two small ones, a duplicate, missing and empty captions."""
    folder = write_folder(
        tmp_path / "images",
        {
            "a.png": (noise(40, 40), "four"),
            "b.png": (noise(80, 40), None),
            "c.png": (noise(20, 200), "  "),
            "d.png": (noise(40, 40), "the longest"),
            "e.png": (noise(100, 31), "one"),
        },
    )
    code, text = look(train_data_dir=folder)
    assert code == 0 and "## Unusable" not in text
    assert f"# What train_lcm_lora_sd15.py would train on\n\n- Source: {folder}\n" in text
    assert "- Records read: 5\n- Usable: 5; unusable, replaced by others in training: 0\n" in text
    assert "- Resolution: 32 x 32 (--resolution)\n" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        ["min", "5%", "median", "95%", "max", "mean"],
        ["width", "20", "20", "40", "100", "100", "56"],
        ["height", "31", "31", "40", "200", "200", "70"],
        ["width / height", "0.10", "0.10", "1.00", "3.23", "3.23", "1.47"],
        ["cut off by the crop", "0%", "0%", "50%", "90%", "90%", "42%"],
    ]
    assert "- Enlarged, as their shorter side is less than 32: 2 of 5\n" in text
    assert f"equal in every pixel: 1\n    - {folder}/d.png is {folder}/a.png\n" in text
    assert (
        "- Captions: 5; images with several: 0\n- Images with an empty caption or none: 2\n" in text
    )
    longest = text.split("- The longest, in characters:\n")[1].splitlines()[:3]
    assert longest[0] == f'    - 11, {folder}/d.png: "the longest"' and len(longest) == 3
    assert "token" not in text


def test_unusable_records_are_named(look, capsys, make_images, tmp_path):
    """Exit code 1, each with its reason; with no usable one there is no sheet, not even an old."""
    folder = make_images(broken=(3, 7))
    code, text = look(train_data_dir=folder)
    assert (
        code == 1
        and "Records read: 12\n- Usable: 10; unusable, replaced by others in training: 2\n" in text
    )
    unusable = text.split("## Unusable records\n\n")[1].splitlines()
    assert [line.split(" (")[0] for line in unusable] == [
        f"- {folder}/03.png",
        f"- {folder}/07.png",
    ]
    assert all("(UnidentifiedImageError: " in line for line in unusable)
    assert (tmp_path / "check" / "contact_sheet.png").exists()
    code, text = look(train_data_dir=make_images(count=2, broken=(0, 1)))
    assert code == 1 and "- Usable: 0;" in text and "contact_sheet" not in text
    assert [path.name for path in (tmp_path / "check").iterdir()] == ["report.md"]


def test_many_unusable_records(check, capsys, make_images, tmp_path):
    """Ten are printed, all are in the report."""
    flags = {
        "train_data_dir": make_images(broken=range(11)),
        "resolution": 32,
        "output_dir": tmp_path,
    }
    assert check.main(command_line(flags)) == 1
    printed, written = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert (printed.count("(Unidentified"), written.count("(Unidentified")) == (10, 11)
    assert "- ...\n" in printed


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_tokens_and_resolution_of_a_teacher(look, make_teacher, family, tmp_path):
    """Of a teacher without weights: 32 px, 16 tokens: start, end and a letter each."""
    teacher = tmp_path / "teacher"
    shutil.copytree(make_teacher(family), teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    captions = ["a" * 14, "b" * 15, "c" * 30, "d"]
    folder = write_folder(
        tmp_path / "p", {f"{i}.png": (noise(40, 40, i), c) for i, c in enumerate(captions)}
    )
    code, text = look(
        train_data_dir=folder, family=family, pretrained_teacher_model=teacher, resolution=None
    )
    assert code == 0 and f"# What train_lcm_lora_{family}.py" in text
    assert "- Resolution: 32 x 32 (the teacher's native resolution)\n" in text
    assert "- Captions of more than 16 tokens, which are truncated: 2\n" in text
    longest = text.split("- The longest, in tokens, with start and end:\n")[1].splitlines()[:3]
    assert [line.strip(" -").split(",")[0] for line in longest] == ["32", "17", "16"]
    one_file = tmp_path / "model.safetensors"
    ours = {
        "sd15": ["cond_stage_model."],
        "sdxl": [f"conditioner.embedders.{n}" for n in ("0.transformer.", "1.model.")],
    }
    save_file({f"{key}x": torch.zeros(1) for key in ours[family]}, one_file)
    flags = {
        "pretrained_teacher_model": one_file,
        "teacher_config": teacher,
        "resolution": None,
        "family": family,
    }
    assert look(train_data_dir=folder, **flags)[1] == text


@pytest.mark.parametrize("family, side", [("sd15", 512), ("sdxl", 1024)])
def test_without_teacher_or_resolution(look, make_images, family, side, tmp_path):
    """The usual size of the family, and the report says why."""
    code, text = look(
        train_data_dir=make_images(count=2), resolution=None, samples=1, family=family
    )
    assert (
        code == 0
        and f"- Resolution: {side} x {side} (the usual one: neither --resolution nor a teacher"
        in text
    )
    assert cut_out(tmp_path / "check" / "contact_sheet.png", side, 1).shape == (1, side, side, 3)


@pytest.mark.parametrize(
    "settings", [{}, {"center_crop": True}, {"dataloader_num_workers": 2, "train_batch_size": 4}]
)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_sheet_is_what_the_step_gets(
    look, request, check, monkeypatch, images, family, settings, tmp_path
):
    """To the pixel, in order: crops, flips, dropped captions, accumulation; seven samples."""
    trainer, labels = request.getfixturevalue(family), []
    flags = {
        "train_data_dir": images,
        "random_flip": True,
        "proportion_empty_prompts": 0.3,
        "seed": 5,
    }
    flags |= {"train_batch_size": 3, "gradient_accumulation_steps": 2} | settings
    wrap = check.textwrap.wrap
    monkeypatch.setattr(
        check.textwrap, "wrap", lambda text, *a, **k: labels.append(text) or wrap(text, *a, **k)
    )
    code, _ = look(samples=7, family=family, **flags)
    wanted, captions = expected(trainer, 7, **flags)
    shown = cut_out(tmp_path / "check" / "contact_sheet.png", 32, 7)
    assert code == 0 and np.array_equal(shown, wanted) and labels == captions
    assert "" in captions and len(set(captions)) > 3
    other, _ = expected(trainer, 7, **flags | {"seed": 6})
    assert not np.array_equal(shown, other)


def test_tar_shards(look, sd15, tmp_path):
    """Two shards with an unusable record; streamed by workers, the same report and sheet."""
    for shard in range(2):
        files = {}
        for i in range(4):
            files[f"{shard}{i}.jpg"] = image_bytes(noise(40 + i, 40, 4 * shard + i), "JPEG")[
                "bytes"
            ]
            files[f"{shard}{i}.txt"] = CAPTIONS[i].encode()
        write_tar(tmp_path / f"{shard}.tar", files | {"02.txt": b"\xff"} if shard == 0 else files)
    flags = {"train_shards_path_or_url": f"{tmp_path}/{{0..1}}.tar"}
    code, text = look(samples=4, **flags)
    assert (
        code == 1
        and "Records read: 8\n- Usable: 7; unusable, replaced by others in training: 1\n" in text
    )
    assert "\n- 02 (UnicodeDecodeError: " in text
    wanted, _ = expected(sd15, 4, train_batch_size=4, **flags)
    assert np.array_equal(cut_out(tmp_path / "check" / "contact_sheet.png", 32, 4), wanted)
    for workers in (0, 2):
        streamed = {
            "streaming": True,
            "dataloader_num_workers": workers,
            "train_batch_size": 4,
        } | flags
        code, again = look(samples=4, **streamed)
        assert code == 1 and sorted(again.splitlines()) == sorted(text.splitlines())
        wanted, _ = expected(sd15, 4, **streamed)
        assert np.array_equal(cut_out(tmp_path / "check" / "contact_sheet.png", 32, 4), wanted)


def test_lists_of_captions_and_limits(look, tmp_path):
    """Parquet; only the first records, by --limit or --max_train_samples, streamed or not."""
    texts = [["one", "two words"], ["three"], [], ["", "five"], None, ["six"]]
    rows = {"picture": [image_bytes(noise(40, 40, i)) for i in range(6)], "captions": texts}
    kinds = {"picture": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    flags = {
        "dataset_name": tmp_path / "data",
        "image_column": "picture",
        "caption_column": "captions",
    }
    code, text = look(**flags)
    assert code == 0 and "Records read: 6\n- Usable: 6;" in text
    assert (
        "- Captions: 8; images with several: 2\n- Images with an empty caption or none: 3\n" in text
    )
    assert '    - 9, row 0: "two words"\n' in text
    for streaming in (False, True):
        _, text = look(limit=2, streaming=streaming, **flags)
        assert "Records read: 2, the first ones (--limit 2)\n- Usable: 2;" in text
        assert "- Captions: 3; images with several: 1\n" in text
    _, text = look(max_train_samples=4, **flags)
    assert "Records read: 4\n- Usable: 4;" in text


def test_a_stream_is_read_to_a_thousand(check, monkeypatch, look, images):
    """Unless --limit says another number."""
    assert check.STREAMED == 1000
    monkeypatch.setattr(check, "STREAMED", 5)
    flags = {"train_data_dir": images, "streaming": True}
    assert "Records read: 5, the first ones (--limit 5)\n" in look(**flags)[1]
    assert "Records read: 7, the first ones (--limit 7)\n" in look(**flags, limit=7)[1]
    assert "Records read: 12\n" in look(train_data_dir=images)[1]


def test_workers_change_nothing(look, make_images):
    """Not even the order of the unusable ones."""
    flags = {"train_data_dir": make_images(broken=(1, 2, 9))}
    assert look(**flags) == look(dataloader_num_workers=2, **flags)


def test_a_pasted_training_command(xl_teacher, images, tmp_path):
    """All of its flags are taken, and of its output folder nothing but the two files is touched."""
    (tmp_path / LORA).write_bytes(b"precious")
    flags = {
        "pretrained_teacher_model": xl_teacher,
        "train_data_dir": images,
        "center_crop": True,
        "train_batch_size": 12,
        "max_train_steps": 1000,
        "mixed_precision": "fp16",
        "gradient_checkpointing": True,
        "validation_prompts": ["a red apple", "two"],
        "output_dir": tmp_path,
        "resume_from_checkpoint": "latest",
        "use_fix_crop_and_size": True,
        "report_to": "wandb",
        "push_to_hub": True,
    }
    program = ROOT / "scripts" / "check_data.py"
    done = run(sys.executable, program, *command_line(flags), "--family=sdxl")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {LORA, "report.md", "contact_sheet.png"}
    assert (tmp_path / LORA).read_bytes() == b"precious"
    assert done.stdout.startswith("# What train_lcm_lora_sdxl.py would train on\n")
    assert "12/12" in done.stderr


def test_a_shard_that_is_cut_off(check, tmp_path):
    """A stream that ends within a record: one line, even if the limit is before it; no report."""
    image = image_bytes(noise(40, 40))["bytes"]
    names = [f"{i}.{ending}" for i in range(4) for ending in ("jpg", "png")]
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, image))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.rindex(image) + 1000])
    for limit in (None, 1):
        flags = {
            "train_shards_path_or_url": tmp_path / "0.tar",
            "streaming": True,
            "output_dir": tmp_path / "check",
        }
        with pytest.raises(
            SystemExit,
            match="^check_data.py: error: the (streamed )?data cannot be read .*ReadError: ",
        ):
            check.main(command_line(flags | {"limit": limit}))
    assert not [*(tmp_path / "check").iterdir()]


def test_messages(check, xl_teacher, teacher, images, tmp_path):
    """One line that names this program and the flag; nothing is written."""
    data, out = {"train_data_dir": images}, {"output_dir": tmp_path / "check"}
    (tmp_path / "file").write_text("")
    for flags, words in (
        ({}, "give one of --train_data_dir, "),
        (data | {"resolutoin": 32}, "unrecognized arguments: --resolutoin 32"),
        (data | {"samples": 0}, "argument --samples: 0 is not allowed"),
        (data | {"limit": 0}, "argument --limit: 0 is not allowed"),
        (data | {"family": "sd3"}, "argument --family: invalid choice: 'sd3'"),
        (
            data | {"caption_column": "words"},
            "12 rows without words or a file file_name (first {'file_name': '00.png', 'text': ",
        ),
        (
            {"train_data_dir": tmp_path / "nowhere"},
            f"--train_data_dir {tmp_path}/nowhere: cannot be opened",
        ),
        (data | {"pretrained_teacher_model": xl_teacher}, "it is no teacher of --family sd15"),
        (
            data | {"pretrained_teacher_model": teacher, "family": "sdxl"},
            "it is no teacher of --family sdxl",
        ),
        (
            data | {"pretrained_teacher_model": tmp_path},
            f"--pretrained_teacher_model {tmp_path}: its configs cannot be",
        ),
        (
            data | {"pretrained_teacher_model": teacher, "resolution": 33},
            "--resolution 33: it must be a multiple of",
        ),
        (
            data | {"output_dir": tmp_path / "file"},
            f"--output_dir {tmp_path}/file: cannot be written",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            check.main(command_line(out | flags))
        message = str(stop.value.code)
        assert (
            message.startswith("check_data.py: error: ")
            and words in message
            and "\n" not in message
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["latents", "generated", "trajectories"])
def test_data_that_are_encoded(check, tmp_path, kind):
    """Of generated data there are no others to check: their sheet is named."""
    (tmp_path / "encoded.json").write_text(json.dumps({"what": ["captions", kind]}))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        check.main(["--dataset_name", str(tmp_path)])
    sheet, line = str(tmp_path / "contact_sheet.png"), str(end.value)
    assert "\n" not in line and (sheet in line) == (kind != "latents")
