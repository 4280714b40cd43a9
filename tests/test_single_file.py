"""A teacher in one .safetensors file of the original key layout.

Opened and trained from like its folder, offline.
"""

import functools
import json
import pickle
import subprocess

import pytest
import torch
from conftest import lora_file, series
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from single_file import as_single_file

LAYOUTS = {"sd15": "sd15", "sdxl": "sdxl", "ssd1b": "sdxl"}  # and the trainer of each


@pytest.fixture(scope="module")
def teachers(make_teacher):
    """teachers(layout) -> (folder, the same teacher in one file)."""

    @functools.cache
    def make(layout):
        folder = make_teacher(layout)
        return folder, as_single_file(folder)

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_opens_as_its_folder(teachers, layout):
    """diffusers finds every tensor of every part under the names of tests/single_file.py."""
    folder, file = teachers(layout)
    ours = DiffusionPipeline.from_pretrained(folder)
    theirs = type(ours).from_single_file(file, config=str(folder))
    parts = {name for name, part in ours.components.items() if isinstance(part, torch.nn.Module)}
    assert parts == {"unet", "vae", "text_encoder"} | (
        {"text_encoder_2"} if layout != "sd15" else set()
    )
    for part in parts:
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys()
        assert [name for name in a if b[name].is_meta or not torch.equal(a[name], b[name])] == [], (
            part
        )
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_from_the_file_is_training_from_the_folder(teachers, train_by, request, layout):
    """The same losses and LoRA to the bit; the header names the file and its configs."""
    (folder, file), trainer = teachers(layout), request.getfixturevalue(LAYOUTS[layout])
    a = train_by(trainer, folder)(max_train_steps=2)
    b = train_by(trainer, file)(max_train_steps=2, teacher_config=folder)
    assert series(a) == series(b) and len(series(a)) == 2
    (ours, _), (theirs, about) = lora_file(a), lora_file(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert about["base_model"] == str(file) and json.loads(about["training_args"])[
        "teacher_config"
    ] == str(folder)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.path)],)


@pytest.fixture(scope="module")
def files(teachers, make_teacher, tmp_path_factory):
    """Files and folders that the tests below name, by layout of the teacher and what is wrong."""
    folder = tmp_path_factory.mktemp("files")
    (sd15, sd15_file), (sdxl, sdxl_file), (ssd1b, _) = map(teachers, LAYOUTS)

    def without(name, start):
        """A copy of the small SD 1.5 without the tensors of which the names start like this."""
        tensors = load_file(sd15_file)
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / name)
        return folder / name

    for name in ("trap.ckpt", "trap.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap(folder / "sprung")))
    return {
        "nowhere": folder / "nowhere.safetensors",
        "ckpt": folder / "trap.ckpt",
        "pickle": folder / "trap.safetensors",
        "sprung": folder / "sprung",
        "no text": without("no-text.safetensors", "cond_stage_model."),
        "no vae": without("no-vae.safetensors", "first_stage_model."),
        "torn": without(
            "torn.safetensors", "cond_stage_model.transformer.text_model.encoder.layers.1."
        ),
        "sd15": sd15,
        "sd15 file": sd15_file,
        "sdxl": sdxl,
        "sdxl file": sdxl_file,
        "ssd1b": ssd1b,
        "xl of one width": make_teacher(
            "sdxl"
        ),  # its first text encoder is like the small SD 1.5's, as at full size
    }


BAD = {  # what is wrong: the trainer, the teacher, --teacher_config, what the message says
    "no such file": ("sd15", "nowhere", "sd15", "nowhere.safetensors.*No such file"),
    "pickled weights": ("sd15", "ckpt", "sd15", "trap.ckpt: give a .*.safetensors"),
    "pickled weights, no configs": ("sd15", "ckpt", None, "trap.ckpt: give a .*.safetensors"),
    "not safetensors": ("sd15", "pickle", "sd15", "trap.safetensors.*deserializing header"),
    "no text encoder": (
        "sd15",
        "no text",
        "sd15",
        "no-text.safetensors.*it has unet, needed is text_encoder",
    ),
    "no VAE": (
        "sd15",
        "no vae",
        "sd15",
        "no-vae.safetensors.*no VAE; .*--pretrained_vae_model_name_or_path",
    ),
    "half a text encoder": ("sd15", "torn", "sd15", "torn.safetensors.*16 missing, first encoder"),
    "SDXL for SD 1.5": (
        "sd15",
        "sdxl file",
        "sdxl",
        "it has text_encoder, text_encoder_2, .*train_lcm_lora_sdxl.py",
    ),
    "SD 1.5 for SDXL": (
        "sdxl",
        "sd15 file",
        "sd15",
        "it has text_encoder, unet, .*train_lcm_lora_sd15.py",
    ),
    "no configs": ("sd15", "sd15 file", None, "--teacher_config .*configs and tokenizers"),
    "no configs, SDXL": ("sdxl", "sdxl file", None, "--teacher_config .*configs and tokenizers"),
    "configs of SDXL": (
        "sd15",
        "sd15 file",
        "xl of one width",
        "--teacher_config .*KeyError.*label_emb",
    ),
    "configs of SSD-1B": ("sdxl", "sdxl file", "ssd1b", "--teacher_config .*do not match"),
    "configs for a folder": ("sd15", "sd15", "sd15", "teacher_config .*leave it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_teacher(files, train_by, request, tmp_path, case):
    """One line, nothing written, nothing unpickled."""
    trainer, teacher, config, message = BAD[case]
    flags = {"output_dir": tmp_path / "new" / "out", "teacher_config": files.get(config)}
    with pytest.raises(
        SystemExit, match=f"^train_lcm_lora_{trainer}.py: error: --.*{message}"
    ) as end:
        train_by(request.getfixturevalue(trainer), files[teacher])(**flags)
    assert "\n" not in str(end.value)
    assert not any(tmp_path.iterdir()) and not files["sprung"].exists()


def test_a_file_without_vae_takes_another(files, train_by, sd15):
    """Many fine-tunes come without one: with the folder's own VAE they train as the folder does."""
    flags = {
        "teacher_config": files["sd15"],
        "pretrained_vae_model_name_or_path": files["sd15"] / "vae",
    }
    a = train_by(sd15, files["no vae"])(max_train_steps=1, **flags)
    b = train_by(sd15, files["sd15"])(max_train_steps=1)
    assert series(a) == series(b)
