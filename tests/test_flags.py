"""Every flag of Hugging Face's three LCM-LoRA scripts has its meaning, is ignored, or is refused.

And what flags do together.
"""

import functools
import http.server
import io
import re
import shlex
import threading
import time
from types import SimpleNamespace

import datasets
import psutil
import pytest
from accelerate.state import AcceleratorState
from conftest import LORA, ROOT, command_line, log, series, write_tar
from huggingface_hub import HfApi
from PIL import Image

# {flag: (a value given to it, that value as parsed, {script: its default there})}; None: one
# default for all. SD: train_lcm_distill_lora_sd_wds.py, XLW: ..._sdxl_wds.py, XL: ..._sdxl.py, of
# diffusers 0.42.
TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
)
EVERY, SHARDS, FOLDERS = ("SD", "XLW", "XL"), ("SD", "XLW"), ("XL",)
FLAGS = {
    "pretrained_teacher_model": ("m", "m", EVERY, None),
    "pretrained_vae_model_name_or_path": ("v", "v", EVERY, None),
    "teacher_revision": ("r", "r", EVERY, None),
    "output_dir": ("o", "o", EVERY, "lcm-xl-distilled"),
    "cache_dir": ("c", "c", EVERY, None),
    "seed": ("7", 7, EVERY, None),
    "logging_dir": ("l", "l", EVERY, "logs"),
    "report_to": ("wandb", "wandb", EVERY, "tensorboard"),
    "checkpointing_steps": ("7", 7, EVERY, 500),
    "checkpoints_total_limit": ("7", 7, EVERY, None),
    "resume_from_checkpoint": ("latest", "latest", EVERY, None),
    "dataset_name": ("d", "d", FOLDERS, None),
    "dataset_config_name": ("d", "d", FOLDERS, None),
    "train_data_dir": ("d", "d", FOLDERS, None),
    "train_shards_path_or_url": ("{0..9}.tar", "{0..9}.tar", SHARDS, None),
    "image_column": ("i", "i", FOLDERS, "image"),
    "caption_column": ("i", "i", FOLDERS, "text"),
    "resolution": ("256", 256, EVERY, {"SD": 512, "XLW": 1024, "XL": 1024}),
    "use_fix_crop_and_size": (None, True, ("XLW",), False),
    "center_crop": (None, True, EVERY, False),
    "random_flip": (None, True, EVERY, False),
    "dataloader_num_workers": ("7", 7, EVERY, 0),
    "train_batch_size": ("7", 7, EVERY, 16),
    "num_train_epochs": ("7", 7, EVERY, 100),
    "max_train_steps": ("7", 7, EVERY, None),
    "max_train_samples": ("7", 7, EVERY, None),
    "learning_rate": ("3e-5", 3e-5, EVERY, {"SD": 1e-4, "XLW": 1e-4, "XL": 1e-6}),
    "scale_lr": (None, True, EVERY, False),
    "lr_scheduler": ("cosine", "cosine", EVERY, "constant"),
    "lr_warmup_steps": ("7", 7, EVERY, 500),
    "gradient_accumulation_steps": ("7", 7, EVERY, 1),
    "use_8bit_adam": (None, True, EVERY, False),
    "adam_beta1": ("0.5", 0.5, EVERY, 0.9),
    "adam_beta2": ("0.5", 0.5, EVERY, 0.999),
    "adam_weight_decay": ("0.5", 0.5, EVERY, 1e-2),
    "adam_epsilon": ("0.5", 0.5, EVERY, 1e-8),
    "max_grad_norm": ("0.5", 0.5, EVERY, 1.0),
    "proportion_empty_prompts": ("0.5", 0.5, SHARDS, 0),
    "w_min": ("4", 4.0, EVERY, {"SD": 5.0, "XLW": 3.0, "XL": 3.0}),
    "w_max": ("8", 8.0, EVERY, 15.0),
    "num_ddim_timesteps": ("7", 7, EVERY, 50),
    "loss_type": ("l2", "l2", EVERY, "l2"),
    "huber_c": ("0.5", 0.5, EVERY, 0.001),
    "lora_rank": ("7", 7, EVERY, 64),
    "lora_alpha": ("7", 7.0, EVERY, 64),
    "lora_dropout": ("0.5", 0.5, EVERY, 0.0),
    "lora_target_modules": (
        "to_q,to_k",
        "to_q,to_k",
        EVERY,
        TARGETS,
    ),  # None there, which stands for these
    "vae_encode_batch_size": ("7", 7, EVERY, {"SD": 32, "XLW": 8, "XL": 8}),
    "mixed_precision": ("fp16", "fp16", EVERY, None),
    "allow_tf32": (None, True, EVERY, False),
    "gradient_checkpointing": (None, True, EVERY, False),
    "validation_steps": ("7", 7, EVERY, 200),
    "tracker_project_name": ("t", "t", EVERY, "text2image-fine-tune"),
    "push_to_hub": (None, True, EVERY, False),
    "hub_model_id": ("h", "h", EVERY, None),
}
WITH = {"hub_model_id": ["--push_to_hub"]}  # a flag that is refused alone
SOURCES = ("dataset_name", "train_data_dir", "train_shards_path_or_url")  # a run has one
ALIAS = {"revision": "teacher_revision"}
# {flag: (a value, words of the message)}; the first two are Hugging Face's
REFUSED = {
    "hub_token": ("hf_secret", ["HF_TOKEN", "hf auth login"]),
    "timestep_scaling_factor": ("7", ["10"]),
    "cache_latents": (None, ["scripts/encode_data.py", "--dataset_name"]),
    "cache_text_embeddings": (None, ["scripts/encode_data.py", "--dataset_name"]),
    "cache_only": (None, ["scripts/encode_data.py", "--dataset_name"]),
    "strict_data": (None, ["check_data.py"]),
    "save_precision": ("fp16", ["convert_lora.py"]),
    "paged_adam": (None, ["--optimizer paged_adamw8bit"]),
    "logging_steps": ("10", ["every step"]),
}
# {flag of Hugging Face that means nothing here: a value}
IGNORED = {
    "cast_teacher_unet": True,
    "enable_xformers_memory_efficient_attention": True,
    "encode_batch_size": 4,
    "local_rank": 0,
    "interpolation_type": "bilinear",
}
NEEDED = ["--pretrained_teacher_model", "m", "--train_data_dir", "d"]


def trainers(request):
    return {
        "SD": request.getfixturevalue("sd15"),
        "XLW": request.getfixturevalue("sdxl"),
        "XL": request.getfixturevalue("sdxl"),
    }


def value_of(args, flag):
    """A flag's value, of --use_8bit_adam too, which is short for an --optimizer."""
    return args.optimizer == "adamw8bit" if flag == "use_8bit_adam" else getattr(args, flag)


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_keeps_its_meaning(request, flag):
    value, parsed, scripts, _ = FLAGS[flag]
    for script in scripts:
        needed = NEEDED[:2] if flag in SOURCES else NEEDED
        words = [*needed, *WITH.get(flag, []), f"--{flag}"] + ([value] if value is not None else [])
        assert value_of(trainers(request)[script].parse_args(words), flag) == parsed


@pytest.mark.parametrize("flag", ALIAS)
def test_flag_under_another_name(sd15, flag):
    assert getattr(sd15.parse_args([*NEEDED, f"--{flag}", "x"]), ALIAS[flag]) == "x"


@pytest.mark.parametrize("flag", REFUSED)
def test_flag_is_refused_with_what_to_do(sd15, sdxl, flag):
    value, words = REFUSED[flag]
    for trainer in (sd15, sdxl):
        with pytest.raises(SystemExit, match=f"error: --{flag} ") as end:
            trainer.parse_args([*NEEDED, f"--{flag}"] + ([value] if value else []))
        message = str(end.value)
        assert all(word in message for word in words) and "\n" not in message
        assert "encode_data" not in message or f"--family {trainer.FAMILY}" in message
        assert all((ROOT / name).is_file() for name in re.findall(r"scripts/\w+\.py", message))
        assert "secret" not in message


def test_flags_are_ignored_with_a_warning(train, capsys):
    """One line for each, and the run goes on as without them."""
    plain = train(max_train_steps=1)
    assert "warning" not in capsys.readouterr().err
    out = train(max_train_steps=1, **IGNORED)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    named = [re.search(r"--(\w+)", line)[1] for line in lines]
    assert sorted(named) == sorted(IGNORED) and (out / LORA).is_file()
    assert series(out) == series(plain)


def test_the_page_lists_each_default_that_differs(request):
    """The table in docs/flags.md has the flags whose default differs, with both values."""
    page = (ROOT / "docs/flags.md").read_text()
    table = page.split("## Defaults that differ\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    differing = {}
    for flag, (_, _, scripts, theirs) in FLAGS.items():
        for script in scripts:
            there = theirs[script] if isinstance(theirs, dict) else theirs
            here = value_of(trainers(request)[script].parse_args(NEEDED), flag)
            if flag not in ("pretrained_teacher_model", "train_data_dir") and here != there:
                differing.setdefault(flag, []).append(there)
    assert {flag for flag, _, _ in rows} == differing.keys()
    for flag, _, there in rows:
        for value in differing[flag]:
            assert (
                f"{value:g}" if isinstance(value, float) else str(value).lower()
            ) in there.lower(), flag


# ----------------------------------------------------------------------------------------- the data

URL = "https://host/data/{00000..01099}.tar"


@pytest.mark.parametrize("words", [
    "pipe:curl -L -s {}", 'pipe:curl -s -L "{}"', "pipe:curl -sL '{}'", "pipe:curl {}", "{}",
])  # fmt: skip
def test_a_piped_download_is_read_as_its_url(sd15, sdxl, words):
    flags = [*NEEDED[:2], "--train_shards_path_or_url", words.replace("{}", URL)]
    for trainer in (sd15, sdxl):
        args = trainer.parse_args([*flags, "--max_train_steps", "1"])
        assert args.train_shards_path_or_url == URL and args.streaming


@pytest.mark.parametrize("command", [
    "rm -rf x", "cat 0.tar", "aws s3 cp s3://some/{0..9}.tar -", "curl", "curl -L -s",
    'curl -s -H "Authorization: Bearer hf_secret" https://host/a.tar',
    "curl -L -s https://host/a.tar; rm -rf x",
])  # fmt: skip
def test_a_command_is_refused(sd15, command):
    """With the flag; a token in it is not repeated."""
    words = [*NEEDED[:2], "--train_shards_path_or_url", f"pipe:{command}", "--max_train_steps", "1"]
    with pytest.raises(SystemExit, match="error: --train_shards_path_or_url .*URL") as end:
        sd15.parse_args(words)
    assert "hf_secret" not in str(end.value)


def test_a_url_of_the_hub_has_no_wildcard(sd15, monkeypatch):
    """`datasets` reads such a URL as a path on the hub, where ? stands for any character."""
    url = "https://huggingface.co/datasets/a/b/resolve/main/data/{00000..00001}.tar"
    words = f"pipe:curl -L -s {url}?download=true"
    words = [*NEEDED[:2], "--train_shards_path_or_url", words, "--max_train_steps", "1"]
    given = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, **options: given.append(options) or 1 / 0
    )
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        sd15.load_records(sd15.parse_args(words))
    assert given[0]["data_files"] == [url.replace("{00000..00001}", f"0000{i}") for i in (0, 1)]


def shards(folder, *sizes):
    """Tar shards 00000.tar, 00001.tar ... of these sizes; captions n0, n1 ... through them."""
    folder.mkdir()
    image, number = io.BytesIO(), 0
    Image.effect_noise((40, 40), 90).convert("RGB").save(image, "PNG")
    for shard, size in enumerate(sizes):
        numbers = range(number, number + size)
        files = [(f"{i:03}.png", image.getvalue()) for i in numbers]
        files += [(f"{i:03}.txt", f"n{i}".encode()) for i in numbers]
        write_tar(folder / f"{shard:05}.tar", sorted(files))
        number += size
    return folder


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(URL of two tar shards, names of the files asked for) of a server on this machine."""
    folder, asked = shards(tmp_path / "served", 6, 6), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar?download=true"
        yield url, asked
        server.shutdown()


@pytest.mark.parametrize("streaming", [None, False])
def test_a_url_is_streamed_unless_asked(sd15, served, tmp_path, streaming):
    """Else its tars are downloaded whole."""
    url, asked = served
    flags = {"pretrained_teacher_model": "x", "cache_dir": tmp_path / "cache", "max_train_steps": 9}
    flags |= {"train_shards_path_or_url": f"pipe:curl -L -s {url}", "resolution": 8}
    words = command_line(flags) + ["--no-streaming"] * (streaming is False)
    args = sd15.parse_args([*words, "--train_batch_size", "3"])
    records = sd15.load_records(args)
    assert isinstance(records, datasets.IterableDataset) == (streaming is None)
    assert bool([*(tmp_path / "cache").rglob("*.arrow")]) == (streaming is False)
    captions = []
    for batch in sd15.make_loader(records, None, args, 0, 0, 1):
        captions += batch["caption"]
    assert len(captions) == 27 and set(captions) == {f"n{i}" for i in range(12)} and asked


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("samples,epochs,steps", [(6, 3, 9), (30, 1, 15), (5, 1, 3)])
def test_samples_of_tars_are_the_length_of_an_epoch(
    sd15, train, tmp_path, monkeypatch, samples, epochs, steps, streaming
):
    """Steps are epochs x samples / batch; all records are trained on, however few that are."""
    seen, real = set(), sd15.sample_batch

    def spy(run, batch, args):
        seen.update(batch["caption"])
        return real(run, batch, args)

    monkeypatch.setattr(sd15, "sample_batch", spy)
    source = {"train_shards_path_or_url": shards(tmp_path / "tars", 5, 3), "streaming": streaming}
    counts = {"max_train_samples": samples, "num_train_epochs": epochs, "max_train_steps": None}
    out = train(**source, **counts, train_batch_size=2, dataloader_num_workers=0)
    assert len(log(out)) == steps
    assert len(seen) == min(8, 2 * steps) > min(samples, 7) or samples == 5 and len(seen) == 6


# ----------------------------------------------------------------------------------------- the time


def test_max_train_hours_count_from_the_start_of_the_process(train):
    """What this process has spent on other tests is part of them."""
    hours = (time.time() - psutil.Process().create_time()) / 3600
    with pytest.raises(SystemExit) as end:
        train(max_train_hours=0.99 * hours)
    assert end.value.code == 142
    assert len(log(train(max_train_hours=hours + 1))) == 4


# ---------------------------------------------------------------------- Hugging Face's two commands

# The flags of the commands for an LCM-LoRA in README.md and README_sdxl.md of diffusers'
# examples/consistency_distillation, without script, teacher, VAE and data.
COMMON = """
--mixed_precision=fp16 --lora_rank=64 --loss_type="huber" --adam_weight_decay=0.0
--max_train_steps=1000 --max_train_samples=4000000 --dataloader_num_workers=8
--validation_steps=200 --checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12
--gradient_checkpointing --enable_xformers_memory_efficient_attention
--gradient_accumulation_steps=1 --use_8bit_adam --resume_from_checkpoint=latest --report_to=wandb
--seed=453645634 --push_to_hub
"""
COMMANDS = {
    "sd15": f"--resolution=512 --learning_rate=1e-6 {COMMON}",
    "sdxl": f"--resolution=1024 --learning_rate=1e-4 --use_fix_crop_and_size {COMMON}",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", COMMANDS)
def test_their_command_runs(request, family, served, tmp_path, monkeypatch, capsys):
    """To the end, with teacher, VAE and data that are here, and nothing uploaded.

    Lowered, for the time it takes: --resolution, --max_train_steps, --train_batch_size.
    """
    trainer, calls = request.getfixturevalue(family), []
    teacher = request.getfixturevalue("teacher" if family == "sd15" else "xl_teacher")
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: calls.append(given))
    monkeypatch.chdir(tmp_path)
    out, url = tmp_path / "out", served[0]
    words = [f"--pretrained_teacher_model={teacher}", f"--output_dir={out}"]
    words += [f"--train_shards_path_or_url=pipe:curl -L -s {url}"]
    if family == "sdxl":
        words += [f"--pretrained_vae_model_name_or_path={teacher / 'vae'}"]
    words += shlex.split(COMMANDS[family])
    AcceleratorState._reset_state(True)
    trainer.main([*words, "--resolution=32", "--max_train_steps=3", "--train_batch_size=2"])
    assert len(log(out)) == 3 and (out / LORA).is_file() and calls[0]["repo_id"] == "me/out"
    assert capsys.readouterr().err.count("warning: ") == 1  # of xFormers
