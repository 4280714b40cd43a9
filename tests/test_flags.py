"""Every flag of Hugging Face's three LCM-LoRA scripts: it parses with the meaning it has there, or is refused with a reason."""

import re

import pytest
from conftest import ROOT

# {flag: (a value given to it, that value as parsed, {script: its default there})}; None: the scripts share one default.
# SD: train_lcm_distill_lora_sd_wds.py, XLW: ..._sdxl_wds.py, XL: ..._sdxl.py, of diffusers 0.42.
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
    "interpolation_type": ("bicubic", "bicubic", EVERY, "bilinear"),
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
    "timestep_scaling_factor": ("7", 7.0, EVERY, 10.0),
    "mixed_precision": ("fp16", "fp16", EVERY, None),
    "allow_tf32": (None, True, EVERY, False),
    "gradient_checkpointing": (None, True, EVERY, False),
    "validation_steps": ("7", 7, EVERY, 200),
    "tracker_project_name": ("t", "t", EVERY, "text2image-fine-tune"),
    "push_to_hub": (None, True, EVERY, False),
    "hub_model_id": ("h", "h", EVERY, None),
    "hub_token": ("h", "h", EVERY, None),
}
WITH = dict.fromkeys(
    ["hub_token", "hub_model_id"], ["--push_to_hub"]
)  # flags that are refused alone
SOURCES = ("dataset_name", "train_data_dir", "train_shards_path_or_url")  # a run has one
ALIAS = {"revision": "teacher_revision"}
# {flag: (a value, a word of the message)}
REFUSED = {
    "encode_batch_size": ("8", "batch"),
    "cast_teacher_unet": (None, "--mixed_precision"),
    "enable_xformers_memory_efficient_attention": (None, "attention"),
    "local_rank": ("0", "accelerate launch"),
}
NEEDED = ["--pretrained_teacher_model", "m", "--train_data_dir", "d"]


def trainers(request):
    return {
        "SD": request.getfixturevalue("sd15"),
        "XLW": request.getfixturevalue("sdxl"),
        "XL": request.getfixturevalue("sdxl"),
    }


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_keeps_its_meaning(request, flag):
    value, parsed, scripts, _ = FLAGS[flag]
    for script in scripts:
        needed = NEEDED[:2] if flag in SOURCES else NEEDED
        words = [*needed, *WITH.get(flag, []), f"--{flag}"] + ([value] if value is not None else [])
        assert getattr(trainers(request)[script].parse_args(words), flag) == parsed


@pytest.mark.parametrize("flag", ALIAS)
def test_flag_under_another_name(sd15, flag):
    assert getattr(sd15.parse_args([*NEEDED, f"--{flag}", "x"]), ALIAS[flag]) == "x"


@pytest.mark.parametrize("flag", REFUSED)
def test_flag_is_refused_with_a_reason(sd15, sdxl, flag):
    value, word = REFUSED[flag]
    for trainer in (sd15, sdxl):
        with pytest.raises(SystemExit, match=rf"error: --{flag}: .*{word}"):
            trainer.parse_args([*NEEDED, f"--{flag}"] + ([value] if value else []))


def test_readme_lists_each_default_that_differs(request):
    """The rows of README's table are the flags whose default differs from any of the three scripts', with both values."""
    readme = (ROOT / "README.md").read_text().split("## The trainer's settings")[1]
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \| ([^|]*) \|", readme, re.MULTILINE)
    differing = {}
    for flag, (_, _, scripts, theirs) in FLAGS.items():
        for script in scripts:
            there = theirs[script] if isinstance(theirs, dict) else theirs
            here = getattr(trainers(request)[script].parse_args(NEEDED), flag)
            if flag not in ("pretrained_teacher_model", "train_data_dir") and here != there:
                differing.setdefault(flag, []).append(there)
    assert {flag for flag, _, _ in rows} == differing.keys()
    for flag, _, there in rows:
        for value in differing[flag]:
            assert (
                f"{value:g}" if isinstance(value, float) else str(value).lower()
            ) in there.lower(), flag
