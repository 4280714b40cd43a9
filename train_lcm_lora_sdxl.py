#!/usr/bin/env python
"""Distil SDXL, SSD-1B or a fine-tune into an LCM-LoRA: images in 1-8 steps, not 25-50.

    accelerate launch train_lcm_lora_sdxl.py --pretrained_teacher_model MODEL \\
      --train_data_dir IMAGES --output_dir OUT
    python infer.py --lora OUT --prompt "a red apple" --output apple.png

Algorithm 1 of the LCM-LoRA report (arXiv 2311.05556), in this file's names:

    given a teacher eps, its encoder E, the noise schedule alpha, sigma, and LoRA weights theta
    repeat
        (x, c) ~ data;  z = E(x);  noise ~ N(0, I);  t_nk ~ timesteps;  omega ~ U[w_min, w_max]
        z_nk    = alpha(t_nk) z + sigma(t_nk) noise          a noisy latent, k timesteps above t_n
        z_hat_n = z_nk + (1 + omega) Psi(z_nk, t_nk, t_n, c)             one DDIM step back, guided
                       - omega Psi(z_nk, t_nk, t_n, null)
        loss    = d( f_theta(z_nk, t_nk, c), stop_gradient(f_theta(z_hat_n, t_n, c)) )
        theta   = theta - learning_rate * gradient of loss

All of it stands in section 2, from NoiseSchedule to train. c is the prompt's two encodings, the
pooled one, and the image's size and crop; null replaces the first three.

Deliberate differences from the paper:
1. t_nk is one of the N = 40 timesteps 24, 49, ... 999 that LCMScheduler visits; k = 1000 / N.
2. No moving average of the LoRA for the target: theta^- is theta without gradient.
3. omega is not an input of the network: the LoRA learns the mean over the range, so a narrow range
   is sharper.
4. d is the pseudo-Huber distance sqrt(e^2 + c^2) - c of each latent element; the algorithm leaves d
   open, --loss_type l2 is the squared one.
5. omega is uniform in 3..15, the range of Hugging Face's example scripts. The report trained with a
   fixed omega of 7.5 (--w_min 7.5 --w_max 7.5), the LCM paper with a range.
6. null is --negative_prompt, and the guided output can be rescaled, where the teacher is used so.
7. f maps to the lower edge of its phase, one of M, not to t = 0; M falls from 8 to 1 in the course
   of the run, so it ends as the algorithm. --phases 1 is the algorithm throughout. From Phased
   Consistency Models (arXiv 2405.18407) and Hyper-SD (2404.13686); TCD (2402.19159) maps to random
   earlier timesteps.
8. On data with trajectories (scripts/generate_data.py) z_nk and z_hat_n are points of the teacher's
   own path from pure noise, computed ahead, in the place of a noised image and its step by Psi.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import difflib
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

FAMILY = "sdxl"
FORMAT_VERSION = "1"  # of the LoRA file's header and of encoded data
LORA_FILE = "pytorch_lora_weights.safetensors"


def this_rank():
    """This process's number among those of the run."""
    return os.environ.get("RANK", "0")


def fail(message, rank="0"):
    """End with one line on stderr, from one process, and exit status 1."""
    message = " ".join(message.splitlines())  # a prompt may have several
    raise SystemExit(f"{Path(__file__).name}: error: {message}" if this_rank() == rank else 1)


def reason(error):
    """The kind of an exception and the first line of its message, without addresses in memory."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__ or error  # which says what happened
    line = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
    return re.sub(r" <[^<]* at 0x\w+>", "", line)


@contextlib.contextmanager
def or_fail(what, advice):
    """A block that ends the run with one line on any error, whatever its kind."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            advice = "make that place writable, free some space, or name another (--cache_dir)"
        fail(f"{what} ({reason(error)}); {advice}")


# ------------------------------------------------------------------------------------ 1. Arguments

TARGET_MODULES = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
)
LR_SCHEDULERS = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial"
# Flags of Hugging Face's LCM-LoRA scripts that mean nothing here: the run goes on without them
IGNORED = (
    "cast_teacher_unet enable_xformers_memory_efficient_attention encode_batch_size "
    "interpolation_type local_rank"
).split()
ENCODE = (
    f"run `python scripts/encode_data.py --family {FAMILY} FLAGS --output FOLDER` with the other "
    "FLAGS of this command, then train with --dataset_name FOLDER"
)
# Flags that are refused, and what to do instead
ENCODED_ONLY = ["cache_latents", "cache_text_embeddings", "cache_only", "aspect_ratio_buckets"]
REFUSED = dict.fromkeys(ENCODED_ONLY, ENCODE) | {
    "hub_token": "a command line is seen by others; set HF_TOKEN or run `hf auth login`",
    "logging_steps": "every step is logged; leave it out",
    "paged_adam": "give --optimizer paged_adamw8bit",
    "save_precision": "`python scripts/convert_lora.py --save_precision` makes a smaller file",
    "strict_data": "`python scripts/check_data.py` names unusable records beforehand",
    "timestep_scaling_factor": "samplers know no other than 10; leave it out",
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        has_one = str(action.default) not in ("None", "False", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_one else action.help


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` to `high`."""

    def check(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            allowed = f"a finite number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {allowed}")
        return value

    check.__name__ = kind.__name__  # argparse names it in its own message
    return check


def parse_args(argv=None):
    """The command line, checked as far as it can be without loading anything."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch %(prog)s --pretrained_teacher_model MODEL\n"
        "         (--train_data_dir | --dataset_name | --train_shards_path_or_url) DATA [flags]",
        description=__doc__.split("\n\nAlgorithm 1")[0],
        formatter_class=lambda prog: Help(prog, max_help_position=36, width=100),
        allow_abbrev=False,
    )

    def error(message):
        """One line: what is wrong, what was perhaps meant, and no token."""
        for word in re.findall(r" (--\w+)", message.partition("unrecognized arguments:")[2]):
            close = difflib.get_close_matches(word, parser._option_string_actions, 1)
            message += "".join(f"; did you mean {other}?" for other in close)
        fail(re.sub(r"hf_\w+", "***", message))

    parser.error = error
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12)
    omega, beta, whole = number(float, -1), number(float, 0, 0.999999), number(int, 0)
    alpha = number(float, 1e-6, 1e6)

    def phases(text):
        return [count(part) for part in text.split(",")]

    def one(flag, kind, default, unit, text):
        group.add_argument(flag, type=kind, default=default, metavar=unit, help=text)

    def name(flag, unit, text, *more):
        group.add_argument(flag, *more, metavar=unit, help=text)

    def choice(flag, choices, default, text):
        group.add_argument(flag, choices=choices.split(), default=default, help=text)

    def switch(flag, text, **settings):
        group.add_argument(flag, help=text, **{"action": "store_true"} | settings)

    # fmt: off
    group = parser.add_argument_group("Model")
    name("--pretrained_teacher_model", "MODEL", "folder, hub id or .safetensors file")
    name("--teacher_config", "FOLDER", "configs of a teacher in one file; or a hub id")
    name("--teacher_revision", "NAME", "revision of a teacher on the hub", "--revision")
    name("--variant", "NAME", "file variant of the teacher, such as fp16")
    name("--pretrained_vae_model_name_or_path", "VAE", "another VAE than the teacher's")
    choice("--prediction_type", "epsilon v_prediction", None, "(default: as the teacher says)")
    switch("--rescale_betas_zero_snr", "its noise reaches zero SNR (default: as it says)",
           action=argparse.BooleanOptionalAction)
    name("--lora_path", "LORA", "LoRA to start from: file or output folder")
    one("--lora_rank", count, 64, "R", "rank of the LoRA layers")
    one("--lora_alpha", alpha, None, "A", "scale A / R of the update (default: R)")
    one("--lora_dropout", share, 0.0, "0..1", "dropout before the LoRA")
    one("--lora_target_modules", str, TARGET_MODULES, "NAMES", "endings of names of layers")
    switch("--gradient_checkpointing", "less memory, about a fifth more time")
    choice("--quantize_base", "nf4", None, "the base's linear layers in 4 bits")

    group = parser.add_argument_group("Data")
    name("--train_data_dir", "FOLDER", "images and captions: see docs/data.md")
    name("--dataset_name", "NAME", "hub id, parquet folder or encoded data")
    name("--dataset_config_name", "NAME", "configuration of that dataset")
    name("--train_shards_path_or_url", "TARS", "tar shards: folder, glob, {00..9}, URL")
    one("--image_column", str, "image", "NAME", "column of the images")
    one("--caption_column", str, "text", "NAME", "column of captions or of lists of them")
    switch("--streaming", "read the data as they are needed (default: for URLs)",
           action=argparse.BooleanOptionalAction)
    one("--shuffle_buffer_size", count, 1000, "RECORDS", "among which streamed data are shuffled")
    one("--max_train_samples", count, None, "RECORDS", "only the first; of tars: an epoch")
    one("--resolution", count, None, "PIXELS", "side (default: the teacher's native resolution)")
    switch("--center_crop", "crop the middle instead of a random place")
    switch("--random_flip", "mirror half of the images")
    switch("--use_fix_crop_and_size", "condition on size --resolution and no crop")
    one("--proportion_empty_prompts", share, 0.0, "0..1", "share of captions that are emptied")
    one("--max_prompt_chunks", number(int, 1, 100), 1, "PIECES", "of 75 tokens read of a caption")
    text = "that read images (default: 4 on CUDA, else none)"
    one("--dataloader_num_workers", whole, None, "PROCESSES", text)
    name("--cache_dir", "FOLDER", "where downloads are kept")

    group = parser.add_argument_group("Distillation")
    one("--w_min", omega, 3.0, "OMEGA", "least guidance scale minus 1")
    one("--w_max", omega, 15.0, "OMEGA", "largest guidance scale minus 1")
    one("--negative_prompt", str, "", "PROMPT", "that the teacher is guided away from")
    one("--guidance_rescale", share, 0.0, "0..1", "of the guided output, against over-exposure")
    one("--num_ddim_timesteps", count, None, "N", "of the solver (default: 40, or what fits M)")
    plan = "or M,M,...: phases, in equal parts of the run (default: those of 8,4,2,1 that fit N)"
    one("--phases", phases, None, "M", plan)
    choice("--target", "network trajectory", "network", "f of the network, or data's trajectories")
    choice("--loss_type", "huber l2", "huber", "distance d of the loss")
    choice("--loss_units", "x0 output", "x0", "d between clean latents, or outputs of the network")
    one("--huber_c", positive, 0.001, "C", "of the pseudo-Huber distance, in units of the loss")
    text = "that the VAE encodes at once (default: 8, above 512 x 512 px 1)"
    one("--vae_encode_batch_size", count, None, "IMAGES", text)

    group = parser.add_argument_group("Optimisation")
    one("--train_batch_size", count, 16, "IMAGES", "for each process")
    one("--gradient_accumulation_steps", count, 1, "BATCHES", "in one optimizer step")
    one("--max_train_steps", count, None, "STEPS", "(default: what --num_train_epochs gives)")
    one("--num_train_epochs", count, 100, "EPOCHS", "passes over the data")
    one("--learning_rate", positive, 1e-4, "RATE", "of the optimizer")
    switch("--scale_lr", "times processes x accumulation x batch")
    choice("--lr_scheduler", LR_SCHEDULERS, "constant", "learning-rate schedule")
    one("--lr_warmup_steps", whole, 0, "STEPS", "of warm-up, for schedules that have one")
    choice("--optimizer", "adamw adamw8bit paged_adamw8bit", "adamw", "paged: on CUDA only")
    switch("--use_8bit_adam", "short for --optimizer adamw8bit", dest="optimizer",
           action="store_const", const="adamw8bit", default=argparse.SUPPRESS)
    one("--adam_beta1", beta, 0.9, "B", "of AdamW")
    one("--adam_beta2", beta, 0.999, "B", "of AdamW")
    one("--adam_weight_decay", number(float, 0), 0.0, "W", "of AdamW")
    one("--adam_epsilon", positive, 1e-8, "E", "of AdamW")
    one("--max_grad_norm", positive, 1.0, "NORM", "gradients are clipped to it")
    one("--ema_decay", beta, None, "DECAY", "the final LoRA is the moving average")

    group = parser.add_argument_group("Runtime")
    text = "fp16 rounds less than bf16 (default: as `accelerate` is configured)"
    choice("--mixed_precision", "no fp16 bf16", None, text)
    switch("--allow_tf32", "TF32 matrix products on Ampere and newer GPUs")
    switch("--torch_compile", "compile the transformer blocks; the first steps are slow")
    one("--max_train_hours", positive, None, "HOURS", "of this process, then save and stop")
    one("--seed", number(int, 0, 2**63), 0, "SEED", "everything random is a function of it")

    group = parser.add_argument_group("Output & tracking")
    one("--output_dir", str, "lcm-lora", "FOLDER", "LoRA, logs, checkpoints, validation images")
    one("--checkpointing_steps", count, 500, "STEPS", "between checkpoints")
    one("--checkpoints_total_limit", count, None, "COUNT", "keep only the newest")
    name("--resume_from_checkpoint", "FOLDER", "or `latest` in --output_dir")
    group.add_argument("--allow_changed", nargs="+", default=[], metavar="FLAG",
                       help="flags that may differ from the checkpoint's")
    group.add_argument("--validation_prompts", nargs="+", metavar="PROMPT", help="to generate")
    one("--validation_steps", count, 200, "STEPS", "between validations")
    one("--logging_dir", str, "logs", "FOLDER", "of trackers, inside --output_dir")
    choice("--report_to", "tensorboard wandb all none", "tensorboard", "trackers")
    one("--tracker_project_name", str, "lcm-lora", "NAME", "shown by the trackers")
    switch("--push_to_hub", "upload LoRA, card and validation images at the end")
    name("--hub_model_id", "ID", "repository (default: name of --output_dir)")
    # fmt: on

    for flag in (*IGNORED, *REFUSED):
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    recipe = read_recipe(parser.parse_known_args(argv)[0].pretrained_teacher_model)
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    for flag, why in REFUSED.items():
        if vars(args).pop(flag) is not None:
            fail(f"--{flag} is not supported: {why}")
    for flag, value in vars(args).items():
        if flag == "negative_prompt":  # any text
            continue
        if value == "":
            fail(f"--{flag} is empty; give a value or leave it out")
        if isinstance(value, str) and value.startswith("~"):  # where no shell has replaced it
            setattr(args, flag, os.path.expanduser(value))
    args.lora_alpha = args.lora_alpha or args.lora_rank
    check_args(args)
    return args


def read_recipe(teacher):
    """The defaults that recipe.json in a teacher's folder gives; make_teacher.py writes it."""
    file = Path(os.path.expanduser(teacher or ""), "recipe.json")
    if not os.path.isfile(file):
        return {}
    limits = dict.fromkeys(("width", "height"), (1, 10**6)) | {"max_prompt_chunks": (1, 100)}
    limits |= {"format": (1, 1), "guidance_scale": (0.0, 1e3), "guidance_rescale": (0.0, 1.0)}
    try:
        recipe = {"format": None, "negative_prompt": "", **json.loads(file.read_text("utf-8"))}
        for key in limits.keys() & recipe.keys():
            (low, high), value = limits[key], recipe[key]
            if type(value) not in (int, type(low)) or not low <= value <= high:
                raise ValueError(f"{key} is {value!r:.80}, not a number from {low} to {high}")
        (recipe["negative_prompt"] + "").encode()
        if this_rank() == "0" and "torch" in sys.modules:  # not where only the flags are checked
            print(f"defaults are those of {file}")
    except Exception as error:  # a list of ten thousand lists too
        fail(f"{file}: it cannot be used ({error!r:.200}); mend or delete it")
    defaults = dict.fromkeys(("w_min", "w_max"), recipe.get("guidance_scale", 0) - 1)
    defaults = defaults if "guidance_scale" in recipe else {}
    if recipe.get("width") == recipe.get("height"):
        defaults["resolution"] = recipe.get("width")
    names = {"negative_prompt", "guidance_rescale", "max_prompt_chunks"} & recipe.keys()
    return defaults | {name: recipe[name] for name in names}


def check_args(args):
    """Refuse what does not go together; --streaming and N are then known."""
    name, tars = args.pretrained_teacher_model, args.train_shards_path_or_url
    if name is None or Path(name).is_file() and not is_one_file(name):
        fail(f"--pretrained_teacher_model {name}: give a folder, hub id or .safetensors file")
    if args.teacher_config and not is_one_file(name):
        fail("--teacher_config is for a teacher in one .safetensors file; leave it out")
    if args.hub_model_id and not args.push_to_hub:
        fail("--hub_model_id: nothing is uploaded without --push_to_hub; give both or neither")
    if unknown := {*args.allow_changed} - {*vars(args), "processes"}:
        fail(f"--allow_changed {' '.join(unknown)}: no such flag; give names as learning_rate")
    plan, usual = args.phases or [8, 4, 2, 1], (50, 40, 25, 20, 10, 8, 5, 4, 2, 1)
    fits = [n for n in usual if all(n % m == 0 for m in plan)]
    args.num_ddim_timesteps = steps = args.num_ddim_timesteps or max(fits, default=0)
    args.phases = args.phases or [m for m in plan if steps % m == 0]
    if not steps or any(steps % m for m in args.phases):
        some = f"give one of {', '.join(map(str, fits))}" if fits else "give 1, 2, 4, 5 or 8 phases"
        given = f"--num_ddim_timesteps {steps or '(not given)'}, --phases {args.phases}"
        fail(f"{given}: each phase has as many timesteps; {some}")
    for text in [args.negative_prompt, *(args.validation_prompts or [])]:
        if re.search("[\ud800-\udfff]", text):
            fail(f"the prompt {text!r} is not UTF-8")
    if args.w_min > args.w_max:
        fail(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}: omega is between them")
    if [args.train_data_dir, args.dataset_name, tars].count(None) != 2:
        fail("give one of --train_data_dir, --dataset_name and --train_shards_path_or_url")
    if (tars or "").startswith("pipe:"):  # as in Hugging Face's commands; none is ever run here
        curl = re.fullmatch(r"pipe:curl( -\w+)* ['\"]?(\w+://[^'\"\s;|&]+)['\"]?", tars)
        if not curl:
            fail("--train_shards_path_or_url pipe:... is a command: give the URL or path itself")
        # `datasets` takes the ? of a URL of the hub for a wildcard
        args.train_shards_path_or_url = tars = curl[2].removesuffix("?download=true")
    if args.streaming is None:
        args.streaming = "://" in (tars or "")
    if args.streaming and not (args.max_train_steps or tars and args.max_train_samples):
        fail("--streaming needs --max_train_steps: the length of an epoch is unknown")


def is_one_file(name):
    """Whether a teacher is a checkpoint in one file."""
    return name.endswith(".safetensors")


if __name__ == "__main__":
    parse_args()  # answers --help and mistakes at once: the libraries take seconds to load
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of a library; `main` undoes it

# They warn of torchvision and of kernels for some CPUs, which nothing here needs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import accelerate
import datasets
import diffusers
import filelock
import numpy as np
import peft
import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from braceexpand import braceexpand
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from huggingface_hub import HfApi, ModelCardData
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------- 2. Algorithm 1


class NoiseSchedule:
    """alpha(t), sigma(t) of a teacher and what follows; float32 throughout, t int64 [B] in 0..T-1.

    z_t = alpha(t) z + sigma(t) noise,  alpha^2 + sigma^2 = 1.
    """

    def __init__(self, config, device):
        """`config`: the teacher's scheduler config."""
        self.prediction_type = kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            fail(f"the teacher's prediction_type is {kind!r}: give one of epsilon or v_prediction")
        flow = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
        if flow or "beta_schedule" not in config:
            name = config.get("_class_name")
            fail(f"the teacher's scheduler is {name}: only schedules of betas can be distilled")
        kinds = "beta_schedule may be linear, scaled_linear or squaredcos_cap_v2"
        with or_fail("the teacher's scheduler config cannot be used", kinds):
            alpha_bar = LCMScheduler.from_config(config).alphas_cumprod.double()
        if kind == "epsilon" and alpha_bar[-1] <= 0:
            both = "prediction_type = 'epsilon' and rescale_betas_zero_snr = true"
            why = "at the last timestep nothing is left of the image; it needs v_prediction"
            fail(f"the teacher's scheduler has {both}: {why}")
        self.alpha = alpha_bar.sqrt().float().to(device)  # [T]
        self.sigma = (1 - alpha_bar).sqrt().float().to(device)  # [T]

    def at(self, t):
        """alpha(t), sigma(t), each [B,1,1,1]."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]

    def add_noise(self, z, noise, t):
        """z_t = alpha(t) z + sigma(t) noise; z, noise and result [B,4,h,w]."""
        alpha, sigma = self.at(t)
        return alpha * z + sigma * noise

    def x0_and_eps(self, output, z_t, t):
        """The network's output at (z_t, t) as (x0, eps), each [B,4,h,w].

        epsilon: eps = output,                          x0 = (z_t - sigma eps) / alpha
        v:       x0 = alpha z_t - sigma output,         eps = alpha output + sigma z_t
        """
        alpha, sigma = self.at(t)
        if self.prediction_type == "epsilon":
            return (z_t - sigma * output) / alpha, output
        return alpha * z_t - sigma * output, alpha * output + sigma * z_t

    def output_per_f(self, t, s=None):
        """|d output / d f| of f(z_t, t) to timestep s at a given z_t, [B,1,1,1]; None: f is x0.

        alpha_t / (alpha_s sigma_t - sigma_s alpha_t) (epsilon), 1 / the same (v)
        """
        (alpha, sigma), (alpha_s, sigma_s) = self.at(t), (1, 0) if s is None else self.at(s)
        per_output = alpha_s * sigma - sigma_s * alpha
        return (alpha if self.prediction_type == "epsilon" else 1) / per_output

    def ddim_step(self, output, z_t, t, t_to):
        """z_t + Psi(z_t, t, t_to): one step of the DDIM ODE solver, [B,4,h,w].

        z_to = alpha(t_to) x0 + sigma(t_to) eps
        """
        x0, eps = self.x0_and_eps(output, z_t, t)
        return self.add_noise(x0, eps, t_to)


def ddim_timesteps(steps, total):
    """The solver's timesteps k-1, 2k-1, ..., k = total // steps: ascending int64 [steps]."""
    return torch.arange(1, steps + 1) * (total // steps) - 1


def boundary_scalings(t, s=10.0, sigma_data=0.5):
    """c_skip(t), c_out(t), each float32 [B,1,1,1]; 1 and 0 at t = 0, where f is the identity.

    c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2),  c_out = s t / sqrt((s t)^2 + sigma_data^2)
    """
    x = s * t.float()[:, None, None, None]
    return sigma_data**2 / (x**2 + sigma_data**2), x / (x**2 + sigma_data**2).sqrt()


def phases_at(step, args):
    """M of an optimizer step: those of --phases have equal parts of the run."""
    last = len(args.phases) - 1  # also of a step after the end
    return args.phases[min(step * (last + 1) // (args.max_train_steps or 1), last)]


def rescale_guidance(guided, out_c, share):
    """The guided output with a `share` (0..1) of its contrast set to that of out_c; [B,4,h,w].

    share std(out_c) / std(guided) guided + (1 - share) guided, std over each sample
    (arXiv 2305.08891, equations 15 and 16, as diffusers' pipelines apply it)
    """
    std, std_c = (out.std(dim=(1, 2, 3), keepdim=True) for out in (guided, out_c))
    return share * (guided * (std_c / std)) + (1 - share) * guided


def consistency_function(output, z_t, t, schedule, s=None):
    """f_theta(z_t, t) = c_skip(t) z_t + c_out(t) x0(output, z_t, t); [B,4,h,w].

    To the edge s of a phase, int64 [B] (PCM): alpha(s) x0 + sigma(s) eps; z_t itself at t = s.
    """
    if s is not None:
        return torch.where(
            (t == s)[:, None, None, None], z_t, schedule.ddim_step(output, z_t, t, s)
        )
    c_skip, c_out = boundary_scalings(t)
    x0, _ = schedule.x0_and_eps(output, z_t, t)
    return c_skip * z_t + c_out * x0


def distance(a, b, loss_type, huber_c):
    """d(a, b), a scalar: the mean of e^2 (l2) or sqrt(e^2 + c^2) - c (huber), e = a - b."""
    e2 = (a - b).square()
    return e2.mean() if loss_type == "l2" else ((e2 + huber_c**2).sqrt() - huber_c).mean()


# What a random number is for. All are pure functions of (seed, optimizer step, place in the global
# batch, purpose): no two ranks share one, one process has those of many, and there is no
# random state to save.
PURPOSES = "order noise timestep guidance posterior caption crop flip dropout".split()


def rng(seed, step, place, purpose):
    """The random generator of one purpose, for one sample of one optimizer step."""
    return np.random.default_rng([seed, step, place, PURPOSES.index(purpose)])


def normal(seed, step, places, purpose, shape):
    """Standard normal float32 [B, *shape], one generator for each sample."""
    samples = [
        rng(seed, step, place, purpose).standard_normal(shape, np.float32) for place in places
    ]
    return torch.from_numpy(np.stack(samples))


def rounded(z_t, unet):
    """z_t in the base's precision, as the UNet gets it, and float32 again; [B,4,h,w].

    x0 = (z_t - sigma eps) / alpha needs the very z_t of eps: at t = 999 1 / alpha is 15.
    """
    return z_t.to(next(unet.parameters()).dtype).float()


def predict(unet, z_t, t, c):
    """The UNet's output at (z_t, t) under c, [B,4,h,w] float32, in the base's precision."""
    torch.manual_seed(torch.initial_seed())  # target and student drop the same with --lora_dropout
    dtype = next(unet.parameters()).dtype
    added = {name: value for name, value in c.items() if name != "prompt"}
    return unet(z_t.to(dtype), t, c["prompt"], added_cond_kwargs=added).sample.float()


@torch.no_grad()
def sample_batch(run, batch, args):
    """A batch as Algorithm 1 has it: z, c, noise, t_nk, omega.

    z, noise [B,4,h,w] and omega [B,1,1,1] float32; t_nk int64 [B]; c {name: [B,...]}: the prompt's
    embeddings and, for SDXL, the pooled ones and the sizes. Of data with trajectories z is the
    teacher's path [B,N+1,4,h,w], at t = 0 and the solver's timesteps, and noise is None.
    """
    step, places, device = batch["step"][0], batch["place"], run.timesteps.device
    # LoRA dropout uses torch's generator, which `predict` takes back to here
    torch.manual_seed(int(rng(args.seed, step, places[0], "dropout").integers(2**63)))
    # z = E(x): a sample of the VAE's posterior, whose moments encoded data already have
    c = conditions(run.pipe, batch, device, args.max_prompt_chunks)
    vae, noise = run.pipe.vae, None
    if "path" in batch:
        z = to_device(batch["path"], device).float().unflatten(1, (args.num_ddim_timesteps + 1, -1))
    else:
        if "moments" in batch:
            moments = to_device(batch["moments"], device)
        else:
            moments = encode_images(vae, batch["pixels"], args.vae_encode_batch_size)
        shape = (vae.config.latent_channels, *moments.shape[2:])
        posterior_noise = to_device(normal(args.seed, step, places, "posterior", shape), device)
        z = sample_posterior(moments, posterior_noise, vae.config.scaling_factor)
        # noise ~ N(0, I)
        noise = to_device(normal(args.seed, step, places, "noise", shape), device)
    # t_nk ~ the solver's timesteps
    chosen = [rng(args.seed, step, place, "timestep") for place in places]
    t_nk = torch.tensor([int(one.integers(len(run.timesteps))) for one in chosen])
    t_nk = run.timesteps[to_device(t_nk, device)]
    # omega ~ U[w_min, w_max]
    chosen = [rng(args.seed, step, place, "guidance") for place in places]
    omega = [one.uniform(args.w_min, args.w_max) for one in chosen]
    omega = to_device(torch.tensor(omega, dtype=torch.float32), device)[:, None, None, None]
    return z, c, noise, t_nk, omega


def guided_output(run, z_t, t, c, omega, args):
    """The teacher's output with guidance scale 1 + omega [B,1,1,1]; [B,4,h,w].

    (1 + omega) out(c) - omega out(null), then `rescale_guidance`. Without guidance, with w_min and
    w_max of 0, no pass is spent on null: the LoRA learns the prompt alone, and keeps guidance.
    """
    if args.w_min == args.w_max == 0:
        return predict(run.teacher, z_t, t, c)
    # with and without the prompt in one batch of 2B
    c_null = c | {name: null.expand_as(c[name]) for name, null in run.c_null.items()}
    both = {name: torch.cat([c[name], c_null[name]]) for name in c}
    out = predict(run.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), both)
    out_c, out_null = out.chunk(2)
    guided = out_c + omega * (out_c - out_null)
    return (
        rescale_guidance(guided, out_c, args.guidance_rescale) if args.guidance_rescale else guided
    )


def distillation_loss(run, z, c, noise, t_nk, omega, args):
    """Algorithm 1 for one batch: the scalar loss d(f_theta(z_nk, t_nk), f_theta^-(z_hat_n, t_n)).

    z, noise [B,4,h,w] (or of trajectories, as `sample_batch` says); c conditions, [B,...] each;
    t_nk int64 [B]; omega [B,1,1,1]; all float32. `run.student` and `run.target` are one network, of
    which the target is the bare module: it takes no part in the exchange of gradients.
    """
    schedule, phases = run.schedule, phases_at(run.step, args)
    # t_n, k timesteps below t_{n+k}; the lowest step ends at t = 0, where f is the identity
    skip_k = len(schedule.alpha) // args.num_ddim_timesteps
    t_n = (t_nk - skip_k).clamp(min=0)
    # s, the lower edge of t_n's phase, which f maps to; with one phase 0
    length = skip_k * (args.num_ddim_timesteps // phases)
    edge = ((t_n + 1) // length * length - 1).clamp(min=0)
    s = None if phases == 1 else edge
    with torch.no_grad():
        if noise is None:
            # a path of the teacher: z_{t_{n+k}}, z_hat_n and the point at s are on it
            z_nk, z_hat_n, z_s = (z[range(len(z)), (t + 1) // skip_k] for t in (t_nk, t_n, edge))
            z_nk = rounded(z_nk, run.target)
        else:
            # z_{t_{n+k}} ~ N(alpha z, sigma^2 I)
            z_nk = rounded(schedule.add_noise(z, noise, t_nk), run.target)
            # z_hat_n = z_nk + (1 + omega) Psi(c) - omega Psi(null): Psi is affine in the output, so
            # guide that, then step
            guided = guided_output(run, z_nk, t_nk, c, omega, args)
            z_hat_n = schedule.ddim_step(guided, z_nk, t_nk, t_n)
        z_hat_n = rounded(z_hat_n, run.target)
        # f_theta^-(z_hat_n, t_n, c), no gradient; or the path's own point at s
        if args.target == "trajectory":
            f_target = z_s
        else:
            f_target = predict(run.target, z_hat_n, t_n, c)
            f_target = consistency_function(f_target, z_hat_n, t_n, schedule, s)
    # f_theta(z_nk, t_nk, c), last: its activations are the only ones ever held
    f_student = predict(run.student, z_nk, t_nk, c)
    f_student = consistency_function(f_student, z_nk, t_nk, schedule, s)
    # d(f_theta, f_theta^-); in units of x0 t = 999 weighs twenty times as much as t = 259, in those
    # of the output the same
    unit = schedule.output_per_f(t_nk, s) if args.loss_units == "output" else 1.0
    return distance(unit * f_student, unit * f_target, args.loss_type, args.huber_c)


def optimizer_step(run, losses, args):
    """theta = theta - learning_rate * gradient, with AdamW, unless loss or gradient is not finite.

    The gradient, clipped here, is that of all ranks by now and the loss is averaged over them, so
    they agree. Returns the row of the log; `finite`: the step was taken, `overflow`: but skipped by
    fp16's scaler, which finds the same infinite gradient.
    """
    accelerator = run.accelerator
    grad_norm = accelerator.clip_grad_norm_(run.trained, args.max_grad_norm)
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
    row = {"loss": loss, "grad_norm": grad_norm, "lr": run.optimizer.param_groups[0]["lr"]}
    finite = math.isfinite(loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None)
    if finite:
        run.optimizer.step()
    elif accelerator.scaler:
        accelerator.scaler.update()  # or it would not unscale the next gradient
    run.optimizer.zero_grad()
    overflow = finite and not math.isfinite(grad_norm)
    if finite and not overflow:
        run.lr_scheduler.step()
        if run.ema:
            run.ema.step(run.trained)
    return row, finite, overflow


class Run:
    """What a training works with, filled in by `set_up`.

    accelerator; pipe, the teacher's pipeline; teacher, its UNet; student, a UNet with its weights
    and a LoRA, wrapped for many processes; target, the bare student; trained, theta; schedule;
    timesteps of the solver, int64 [N]; c_null, conditions of the negative prompt {name: [1,...]};
    prompts, those of the validation prompts; optimizer, lr_scheduler, ema (or None); global_batch;
    resumed, the checkpoint it goes on from (or None); step, optimizer steps taken; hub (or None);
    record, what a resumed run must have in common, and changes, what it had not (`make_record`).
    """

    step, changes = 0, ()

    def state(self):
        """What a checkpoint keeps beside the LoRA, by name."""
        names = ("optimizer", "lr_scheduler", "ema")
        return {name: vars(self)[name] for name in names} | {"scaler": self.accelerator.scaler}


def train(run, batches, log, stop, args):
    """Algorithm 1 on micro-batches, from step `run.step` on; what it was stopped by, or None."""
    accelerator, losses, names = run.accelerator, [], []
    for batch in batches:
        log.warn_of(batch["unusable"])
        with accelerator.accumulate(run.student):
            # (x, c) ~ data;  z = E(x);  noise ~ N(0, I);  t_nk ~ timesteps;  omega ~ U
            z, c, noise, t_nk, omega = sample_batch(run, batch, args)
            # loss = d( f_theta(z_nk, t_nk, c), f_theta^-(z_hat_n, t_n, c) ), and its gradient
            loss = distillation_loss(run, z, c, noise, t_nk, omega, args)
            accelerator.backward(loss)
            losses.append(loss.detach())
            names += batch["name"]
            if not accelerator.sync_gradients:
                continue
            # theta = theta - learning_rate * gradient of loss
            row, finite, overflow = optimizer_step(run, losses, args)
        run.step = batch["step"][0] + 1
        log.add(row, finite, overflow, names)
        losses, names = [], []
        # Is a checkpoint due, or an image? The last image comes after the loop
        last = run.step == args.max_train_steps
        stopped_by = None if last else stop.asked()
        save = last or stopped_by or run.step % args.checkpointing_steps == 0
        show = args.validation_prompts and run.step % args.validation_steps == 0
        if save and accelerator.is_main_process:
            log.bar.write(save_checkpoint(run, args))
        if show and not (last or stopped_by) and accelerator.is_main_process:
            log.bar.write(validate(run, args))
        # No rank runs ahead of the one that writes
        if save or show:
            accelerator.wait_for_everyone()
            log.restart_clock()
        if stopped_by:
            return stopped_by


# --------------------------------------------------------------------------------------- 3. Models

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the base
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NETWORKS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}
# What the keys of a checkpoint in one file begin with
ONE_FILE_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}


def teacher_parts(args):
    """The teacher's parts, such as unet; of one file each as often as it has tensors."""
    name = args.pretrained_teacher_model
    if is_one_file(name):
        with safe_open(name, "pt") as file:
            keys, starts = file.keys(), ONE_FILE_PARTS.items()
        return [part for key in keys for start, part in starts if key.startswith(start)]
    options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    index = DiffusionPipeline.load_config(name, **options)
    return [part for part, value in index.items() if isinstance(value, list) and value[0]]


def open_part(part, name, dtype, skip, **options):
    """A network with all of its weights and no others; of the parts `skip` only its shapes."""
    kind = NETWORKS[part]
    if part in skip:
        with torch.device("meta"):
            return kind.from_config(kind.load_config(name, **options))
    options |= {"use_safetensors": True, "output_loading_info": True}
    net, info = kind.from_pretrained(name, dtype=dtype, ignore_mismatched_sizes=True, **options)
    for how in ("missing", "unexpected", "mismatched"):
        if keys := sorted(info[f"{how}_keys"]):
            raise ValueError(f"{part}: {len(keys)} {how} tensors, the first {keys[0]}")
    return net


def open_teacher(pipeline_class, needed, args, dtype, skip, **options):
    """The teacher, from a folder, the hub or one file; without the weights of the parts `skip`."""
    name, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    one_file, common = is_one_file(name), {"cache_dir": args.cache_dir}
    advice = "give a diffusers folder with safetensors weights or a hub id"
    if vae:
        with or_fail(f"--pretrained_vae_model_name_or_path {vae}: cannot be loaded", advice):
            options["vae"] = open_part("vae", vae, dtype, skip, **common)
    common["revision"] = args.teacher_revision
    flag, configs = f"--pretrained_teacher_model {name}", args.teacher_config if one_file else name
    advice += ", or a .safetensors file"
    if one_file:
        flag += f" with --teacher_config {configs or '(not given)'}"
        advice = "give a folder or hub id with configs and tokenizers of this kind of model there"
    with or_fail(f"{flag}: cannot be loaded", advice):
        parts = teacher_parts(args)
        has = {"unet", *TEXT_ENCODERS} & {*parts}
        if has != needed:
            other = "train_lcm_lora_sd15.py" if FAMILY == "sdxl" else "train_lcm_lora_sdxl.py"
            both = [", ".join(sorted(names)) or "no known part" for names in (has, needed)]
            fail(f"{flag}: it has {both[0]}, needed is {both[1]}; another layout takes {other}")
        if "vae" not in [*parts, *options]:
            fail(f"{flag}: it holds no VAE; name one with --pretrained_vae_model_name_or_path")
        if configs:
            # only its betas are needed, not its class, which may take further libraries
            config = LCMScheduler.load_config(configs, subfolder="scheduler", **common)
            config = settle_prediction(args, name, config, True)
            NoiseSchedule(config, "cpu")  # ends the run where it cannot be used
            options["scheduler"] = None
        if one_file:
            more = common | {"dtype": dtype, "config": configs}
            pipe = pipeline_class.from_single_file(name, **options, **more)
        else:
            options |= dict.fromkeys(needed & skip)
            more = common | {"variant": args.variant, "use_safetensors": True}
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(pipeline_class.download(name, **options, **more))
            for part in {*needed, "vae"} - options.keys():
                place = {"subfolder": part}
                if any((folder / part).glob(f"*.{args.variant}*.safetensors")):
                    place["variant"] = args.variant  # some parts may have no such variant
                options[part] = open_part(part, folder, dtype, skip, **place)
            pipe = pipeline_class.from_pretrained(folder, **options, **more)
        if not configs:
            config = settle_prediction(args, name, pipe.scheduler.config, False)
        pipe.register_modules(scheduler=LCMScheduler.from_config(config))
        if one_file:
            check_one_file(pipe, parts.count("unet"), skip)
    for part in needed & skip:
        setattr(pipe, part, None)
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if pipe.vae.config.get(key):
            fail(f"{flag}: its VAE has {key}, but latents are only scaled here; give another VAE")
    for part in sorted(needed - skip - {"unet"}):
        tokenizer = part.replace("text_encoder", "tokenizer")
        encoder = getattr(pipe, part).config
        check_tokenizer(getattr(pipe, tokenizer), encoder, f"{flag}: {tokenizer}")
    return pipe


def check_one_file(pipe, unet_tensors, skip):
    """The tensors of its file are those of the pipeline."""
    nets = [net for part, net in networks(pipe) if part not in skip]
    missing = [key for net in nets for key, p in net.named_parameters() if p.is_meta]
    if missing or unet_tensors != (needed := len(pipe.unet.state_dict())):
        what = f"{len(missing)} missing, first {missing[0]}" if missing else f"{needed} needed"
        raise ValueError(f"its tensors do not match these: {unet_tensors} of a UNet, {what}")


def read_markers(name):
    """What a checkpoint in one file says that it predicts, and what UIs guess: scheduler settings.

    It says so by the tensors v_pred and ztsnr and by ModelSpec's header. SD 2.x does not: ComfyUI
    guesses v-prediction where the values of one bias spread by more than 0.09.
    """
    kinds = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    with safe_open(name, "pt") as file:
        keys, about = {*file.keys()}, file.metadata() or {}
        said = kinds.get(about.get("modelspec.prediction_type"))
        said = "v_prediction" if "v_pred" in keys else said  # ComfyUI reads this one alone
        if edm := sorted(key for key in keys if key.startswith("edm_")):
            raise ValueError(f"it holds {edm[0]}: models of EDM's noise levels cannot be used")
        marked = {"prediction_type": said} if said else {}
        marked |= {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
        unet = "model.diffusion_model."
        width = f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        bias = f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        if not {width, bias} <= keys or file.get_slice(width).get_shape()[1] != 1024:
            return marked, {}
        spread = file.get_tensor(bias).float().std(unbiased=False)
        return marked, {"prediction_type": "v_prediction" if spread > 0.09 else "epsilon"}


def settle_prediction(args, name, config, explicit):
    """A scheduler config with what the model predicts: by flag, file, config, guess, in that order.

    `explicit`: the config is the user's, not a library's default.
    """
    one_file = name.lower().endswith(".safetensors")
    marked, guessed = read_markers(name) if one_file else ({}, {})
    flags = {key: vars(args)[key] for key in ("prediction_type", "rescale_betas_zero_snr")}
    flags = {key: value for key, value in flags.items() if value is not None}
    for key, value in marked.items():
        other = flags.get(key, config.get(key, value) if explicit else value)
        if other != value:
            where = f"--{key}" if key in flags else "the config"
            way = f"--{key}" if value is True else f"--{key} {value}"
            raise ValueError(f"{key} is {value} by its marker, {other} by {where}: give {way}")
    said = ({} if explicit else guessed) | marked | flags
    # Of values in this list another scheduler class takes its own default
    unsaid = [key for key in config.get("_use_default_values", ()) if key not in said]
    return dict(config) | said | {"_use_default_values": unsaid}


def check_tokenizer(tokenizer, config, where):
    """End the run where a tokenizer does not fit the text encoder of this config."""
    # Without its files the library makes one up, to which all captions are the same
    words = [token for token in tokenizer.get_vocab() if re.fullmatch("[a-z]+</w>", token)]
    word, ids, eos = max(words, key=len, default=""), tokenizer("a").input_ids, config.eos_token_id
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    size, length = len(tokenizer), tokenizer.model_max_length
    rows, most = config.vocab_size, config.max_position_embeddings
    if not (
        tokenizer.tokenize(word.removesuffix("</w>")) == [word]
        and 0 <= rows - size < 128  # some pad the rows
        and length <= most
        and [ids[0], ids[-1]] == ends
        and eos in (2, ends[1])  # 2: in old configs
    ):
        has = f"{size} tokens of {rows}, length {length:g} of {most}, ends {ids[-1]} of {eos}"
        advice = "give its own tokenizer.json (or vocab.json, merges.txt), tokenizer_config.json"
        fail(f"{where} does not fit the text encoder ({has}); {advice}")


def networks(pipe):
    """The networks of a pipeline with their names, such as unet."""
    return [(k, part) for k, part in pipe.components.items() if isinstance(part, torch.nn.Module)]


def load_teacher(args, dtype, skip=frozenset()):
    """The teacher as a pipeline in its final precision, without the weights of `skip`."""
    pipe = open_teacher(StableDiffusionXLPipeline, {"unet", *TEXT_ENCODERS}, args, dtype, skip)
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()  # SDXL's own VAE overflows in fp16; the fp16-fix one says that it does not
    return pipe


def check_teacher(pipe, args):
    """Refuse what cannot be distilled; sets the default of --resolution."""
    channels, factor = pipe.unet.config.in_channels, pipe.vae_scale_factor
    args.resolution = args.resolution or pipe.unet.config.sample_size * factor
    if args.resolution % factor:
        fail(f"--resolution {args.resolution}: give a multiple of the VAE's factor, {factor}")
    if channels != pipe.vae.config.latent_channels:
        fail(f"the teacher's UNet takes {channels} channels; give a text-to-image teacher")
    if pipe.unet.config.time_cond_proj_dim:
        fail("the teacher is an LCM already; give the model it was distilled from")
    total, alpha_bar = pipe.scheduler.config.num_train_timesteps, pipe.scheduler.alphas_cumprod
    if len(alpha_bar) != total or not (alpha_bar.diff() < 0).all():
        fail(f"the teacher's betas are not {total} numbers between 0 and 1")
    if args.num_ddim_timesteps > total:
        fail(f"--num_ddim_timesteps {args.num_ddim_timesteps}: the teacher has {total} timesteps")


def quantize_linears(unet):
    """Put the linear layers of the UNet's transformers into 4 bits (NF4), as they move."""
    import bitsandbytes

    nn, dtype = bitsandbytes.nn, unet.dtype
    for path, old in list(unet.named_modules()):
        if not isinstance(old, torch.nn.Linear) or ".attentions." not in path:
            continue
        size = old.in_features, old.out_features, old.bias is not None
        new = nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", device="meta")
        new.weight = nn.Params4bit(old.weight.data, False, quant_type="nf4", module=new)
        new.bias = old.bias
        # in training mode: else it would repack the shared weights on some CPUs
        unet.set_submodule(path, new)


def output_in_float32(unet):
    """Compute the UNet's last layers in float32: what they round, x0 has sigma / alpha times."""
    for layer in filter(None, (unet.conv_norm_out, unet.conv_out)):
        layer.float().register_forward_pre_hook(
            lambda layer, given: given[0].to(layer.weight.dtype)
        )


def share_weights(unet):
    """Another UNet object over the very same parameters: a LoRA in one is not in the other."""
    shared = [*unet.parameters(), *unet.buffers()]
    shared += [vars(module).get("quant_state") for module in unet.modules()]  # of quantized ones
    return copy.deepcopy(unet, {id(thing): thing for thing in shared})


class HalfLinear(peft.tuners.lora.Linear):
    """A linear layer of a half-precision base with its float32 LoRA, computed in half precision.

    base(x) + scaling B A dropout(x); x [..., C]. PEFT's own layer would cast x, not A and B, and
    add up in three operations more.
    """

    def forward(self, x):
        (name,) = self.lora_A
        a, b = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
        rows = x.flatten(0, -2)  # the product of two matrices is no view, so can be added to
        h = torch.nn.functional.linear(self.lora_dropout[name](rows), a)
        y = self.base_layer(rows).addmm_(h, b.T, alpha=self.scaling[name])
        return y.unflatten(0, x.shape[:-1])


class HalfConv2d(peft.tuners.lora.Conv2d):
    """The same of a convolution; x [B,C,h,w]."""

    def forward(self, x):
        (name,) = self.lora_A
        a, b = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
        how, conv2d = self.lora_A[name], torch.nn.functional.conv2d
        h = conv2d(self.lora_dropout[name](x), a, None, how.stride, how.padding, how.dilation)
        return self.base_layer(x).add_(conv2d(h, b), alpha=self.scaling[name])


def attach_lora(unet, args):
    """Add LoRA layers to the UNet, float32 whatever the base is; only they are trained."""
    targets, rank = args.lora_target_modules.replace(",", " ").split(), args.lora_rank
    strength = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    torch.manual_seed(args.seed)
    advice = "give endings of the names of linear and conv layers"
    with or_fail("--lora_target_modules: no such layers", advice):
        config = peft.LoraConfig(r=rank, target_modules=targets, **strength)
        if unet.dtype != torch.float32:
            halves = {torch.nn.Linear: HalfLinear, torch.nn.Conv2d: HalfConv2d}
            config._register_custom_module(halves)
        unet.add_adapter(config)
    cast_training_params(unet, dtype=torch.float32)
    return unet


def make_student(pipe, args, device):
    """Freeze the teacher, put it on the device; the student: its UNet with a LoRA."""
    for name, part in networks(pipe):
        # convolutions are faster with the channels last
        part.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        if name == "unet" and args.quantize_base:
            quantize_linears(part)
        if not next(part.parameters()).is_meta:  # a VAE without weights
            part.to(device)
    output_in_float32(pipe.unet)
    student = attach_lora(share_weights(pipe.unet), args).to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.torch_compile:
        torch._dynamo.config.recompile_limit = 32  # widths of the blocks x teacher, target, student
        for unet in (pipe.unet, student):
            unet.compile_repeated_blocks()  # one code for all blocks of a width: not minutes
    return student


def split_prompt(text, tokenizer, chunks):
    """The first `chunks` pieces of a prompt, each what CLIP reads at once; the last may be empty.

    Cut where words start, as UIs cut; a word longer than a piece is cut inside.
    """
    room, pieces = tokenizer.model_max_length - 2, []
    how = {"add_special_tokens": False, "return_offsets_mapping": True}
    while len(pieces) < chunks and len(found := tokenizer(text, **how).offset_mapping) > room:
        starts = [start for start, _ in found[: room + 1]]
        cuts = sorted({*starts} - {starts[0]}, reverse=True)
        words = [cut for cut in cuts if text[cut - 1].isspace()]
        # The tokens of half a word are not the first ones of the whole, and may be more.
        cut = next(c for c in words + cuts if len(tokenizer(text[:c], **how).input_ids) <= room)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text, *[""] * chunks][:chunks]


@torch.no_grad()
def encode_captions(pipe, captions, chunks=1):
    """The prompts' embeddings, as the pipeline's: {"prompt": [B,L,D], "text_embeds": [B,P]}.

    With more than one chunk each piece of a prompt is a prompt; they are joined along L, and the
    pooled one is the first's.
    """
    pieces, device = captions, pipe.text_encoder.device
    if chunks > 1:
        pieces = [
            piece for text in captions for piece in split_prompt(text, pipe.tokenizer, chunks)
        ]
    prompt, _, pooled, _ = pipe.encode_prompt(pieces, None, device, 1, False)
    prompt, pooled = prompt.reshape(len(captions), -1, prompt.shape[-1]), pooled[::chunks]
    if pipe.config.force_zeros_for_empty_prompt:
        given = torch.tensor([bool(caption) for caption in captions], device=device)
        prompt, pooled = prompt * given[:, None, None], pooled * given[:, None]
    return {"prompt": prompt, "text_embeds": pooled}


def to_device(tensor, device):
    """A tensor of the host on the device; a GPU takes it while the host goes on."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


@torch.no_grad()
def encode_images(vae, pixels, batch_size):
    """Pixels [B,3,H,W] in -1..1 -> mean and log variance of the latents' posteriors, [B,8,h,w].

    By default one at a time above 512 x 512 pixels: of 1024 x 1024 each takes over a GiB.
    """
    batch_size = batch_size or (8 if math.prod(pixels.shape[2:]) <= 512**2 else 1)
    parts = [to_device(part, vae.device).to(vae.dtype) for part in pixels.split(batch_size)]
    return torch.cat([vae.encode(part).latent_dist.parameters for part in parts])


def sample_posterior(moments, noise, scaling_factor):
    """z [B,4,h,w] float32: mean + standard deviation x noise, times the VAE's scaling factor."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling_factor


def conditions(pipe, batch, device, chunks):
    """All that the UNet gets beside z and t, {name: [B,...]}: embeddings, for SDXL sizes too."""
    c = {} if "prompt" in batch else encode_captions(pipe, batch["caption"], chunks)
    for name in {"prompt", "text_embeds"} & batch.keys():
        c[name] = to_device(batch[name], device).to(pipe.unet.dtype)  # encoded data are float32
    return c | ({"time_ids": to_device(batch["time_ids"], device)} if "time_ids" in batch else {})


# ----------------------------------------------------------------------------------------- 4. Data

# Endings of the files of images, by what Pillow opens
IMAGES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
CAPTIONS = "txt text caption json".split()  # of a record in a tar shard; the first it has is taken
# Given, because `datasets` would take them from five records
TAR_FIELDS = datasets.Features(
    dict.fromkeys(["image", *CAPTIONS], datasets.Value("binary"))
    | dict.fromkeys(["__key__", "__url__"], datasets.Value("string"))
)
UNDECODED = datasets.Image(decode=False)
CAPTION_FILE = "caption file"  # the column of a folder's caption files
METADATA, CAPTION_FILES = ("metadata.jsonl", "metadata.csv"), (".txt", ".caption")
ELSEWHERE = (
    "images belong to --train_data_dir, tars to --train_shards_path_or_url, hub ids, parquet, "
    "saved and encoded data to --dataset_name"
)
# Columns of encoded data, which scripts/encode_data.py makes; it documents their format
LATENTS = ("path", "moments")
ENCODED = (*LATENTS, "mirrored", "size", "prompt", "text_embeds", "time_ids")
STAMP, PROMPTS = "encoded.json", "prompts.safetensors"
AGAIN = "run scripts/encode_data.py or generate_data.py again with the flags of before"


def load_records(args):
    """The rows of the data, images undecoded: a `datasets.Dataset`, or an iterable one if streamed.

    `to_record` brings a row into the one shape that all else knows.
    """
    sources = {
        "train_data_dir": open_folder,
        "dataset_name": open_dataset,
        "train_shards_path_or_url": open_tars,
    }
    flag = next(flag for flag in sources if vars(args)[flag])
    name, limit = vars(args)[flag], args.max_train_samples
    options = {"cache_dir": args.cache_dir, "split": "train", "streaming": args.streaming}
    with or_fail(f"--{flag} {name}: cannot be opened", ELSEWHERE):
        data = sources[flag](name, args, options)
        if not args.streaming and not len(data):
            raise ValueError("no records")
    if flag == "train_shards_path_or_url":
        return data  # all of them: --max_train_samples is the length of an epoch
    if isinstance(data, datasets.Dataset):
        data = data.select(range(len(data))[:limit])
        return data.to_iterable_dataset() if args.streaming else data
    return data.take(limit) if limit else data


def open_folder(name, args, _):
    """The captioned images of --train_data_dir; says what it leaves out."""
    image, caption = args.image_column, args.caption_column
    rows, left = list_folder(name, image, caption, args.output_dir)
    told = [f"{len(some)} {what} (first {some[0]!r:.200})" for what, some in left.items()]
    told = ", ".join(told) or "nothing"
    if not rows:
        where = f"--image_column {image}, --caption_column {caption}"
        raise ValueError(f"no captioned image; left out: {told}; {where}")
    if left and this_rank() == "0":
        print(f"data: left out: {told}")
    kinds = dict.fromkeys(rows[0], datasets.Value("string")) | {image: UNDECODED}
    return datasets.Dataset.from_list(rows, datasets.Features(kinds))


def open_dataset(name, args, options):
    """--dataset_name: of the hub, a parquet folder, of save_to_disk or encode_data.py."""
    encoded = encoded_folder(args)
    if Path(name, "dataset_info.json").exists():
        data = datasets.load_from_disk(name)
    elif os.path.isdir(name) and glob.escape(name) != name:
        raise ValueError("`datasets` would read its name as a pattern: rename it")
    else:
        data = datasets.load_dataset(name, args.dataset_config_name, **options)
        if os.path.isdir(name) and data.info.builder_name not in ("parquet", "arrow"):
            raise ValueError(f"it is no parquet folder but holds {data.info.builder_name}")
    if data.features is None:
        fail(f"--dataset_name {name}: streamed, its columns are not known; give --no-streaming")
    if encoded:
        data = data.with_format("torch")
    else:
        check_columns(data, args)
        data = data.select_columns([args.image_column, args.caption_column])
    for column, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            data = data.cast_column(column, UNDECODED)
    return data


def open_tars(name, args, options):
    """The tars of --train_shards_path_or_url."""
    files = [name] if os.path.exists(name) else braceexpand(name)
    if os.path.isdir(name):
        files = [path for path in walk(name, set()) if path.endswith(".tar")]
        if not files:
            raise FileNotFoundError("no .tar file in it")
    files = [glob.escape(file) if os.path.exists(file) else file for file in files]
    options |= {"data_files": files, "features": TAR_FIELDS}
    return datasets.load_dataset("webdataset", **options).cast_column("image", UNDECODED)


def walk(folder, seen):
    """The files of a folder and of those in it, sorted; through links, but each folder once."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            yield from walk(entry.path, seen) if entry.is_dir() else [entry.path]


def read_table(path):
    """The rows of metadata.jsonl or metadata.csv."""
    how = 'give lines such as {"file_name": "a.png", "text": "a red apple"}'
    with or_fail(f"{path}: cannot be read", how), open(path, encoding="utf-8-sig") as file:
        if path.endswith(".csv"):
            return [*csv.DictReader(file)]
        return [dict(json.loads(line)) for line in file if line.strip()]


def list_folder(folder, image_column, caption_column, skip):
    """The captioned images of a folder as rows, sorted; no image or caption file is opened.

    Also what is left out: {what: [name, ...]}. `skip`: a folder that holds no data.
    """
    key = "file_name" if image_column == "image" else f"{image_column}_file_name"
    root, found, left = os.path.realpath(folder), [], defaultdict(list)
    files = {path: os.path.splitext(path) for path in walk(root, {os.path.realpath(skip)} - {root})}
    texts = {stem: path for path, (stem, end) in files.items() if end.lower() in CAPTION_FILES}
    tables = [path for path in files if os.path.basename(path) in METADATA]
    for table in tables:
        for row in read_table(table):
            path = os.path.normpath(os.path.join(os.path.dirname(table), str(row.get(key))))
            if path in files and caption_column in row:
                found.append((path, row))
            else:
                left[f"rows without {caption_column} or a file {key}"].append(row)
    images = {path for path, (_, end) in files.items() if end.lower() in IMAGES}
    images -= {path for path in images if re.search("[\udc80-\udcff]", path)}  # not UTF-8
    found += [(path, {}) for path in images - {path for path, _ in found}]
    rows, used = [], {*tables}
    for path, row in sorted(found, key=lambda pair: pair[0]):
        text = texts.get(files[path][0])
        if row or text:
            line = json.dumps(row) if row else None
            rows.append({image_column: path, "json": line, CAPTION_FILE: text})
        else:
            left["images without a caption"].append(path)
        used |= {path, text}
    left["other files"] = sorted({*files} - used)
    return rows, {what: some for what, some in left.items() if some}


def tar_records(tar, files):
    """The records of a tar shard: files near each other that differ in their last ending only.

    0001.mask.png beside 0001 is none of its own, unless it has a caption of its own.
    """
    near, parent = {}, ""
    for name, file in itertools.chain(files, [(None, None)]):
        key, _, ending = (name or "").rpartition(".")
        kind = "image" if f".{ending.lower()}" in IMAGES else ending.lower()
        if kind in ("image", *CAPTIONS):
            near.setdefault(key, {"__key__": key, "__url__": tar})[kind] = file.read()
        while near and (name is None or len(near) > 8):
            key = next(iter(near))
            whole = "image" in near[key] and near[key].keys() & {*CAPTIONS}
            if whole or not any(key.startswith(f"{other}.") for other in (parent, *near)):
                parent = key  # of what may follow
                yield near[key]
            del near[key]


WebDataset._get_pipeline_from_tar = staticmethod(tar_records)  # its own goes by the first dot


def check_columns(data, args):
    """End the run where a column of the data is not there, or holds something else."""
    texts = [datasets.Value(kind) for kind in ("string", "large_string", "null")]
    for flag in "image_column", "caption_column":
        column = vars(args)[flag]
        if column not in data.features:
            has = ", ".join(data.column_names)
            fail(f"--{flag} {column}: the data have no such column, only {has}")
        kind, wanted = data.features[column], "texts"
        fits = getattr(kind, "feature", kind) in texts
        if flag == "image_column":
            wanted = "images: scripts/prepare_data.py reads paths and URLs"
            fits = isinstance(kind, datasets.Image)
        if not fits:
            fail(f"--{flag} {column}: a column of {kind}, not of {wanted}")


def encoded_folder(args):
    """The folder of encoded data that --dataset_name names, or None."""
    folder = args.dataset_name and Path(args.dataset_name)
    if not folder or not (folder / STAMP).exists():
        return None
    if not (folder / "state.json").exists():
        how = f"{AGAIN}: it goes on where it was"
        fail(f"--dataset_name {folder}: it was not finished; {how}")
    return folder


def file_digest(path, whole=True):
    """The SHA-256 of a file; of a large one, if not `whole`, of a thousand samples of 4 KiB."""
    digest, size = hashlib.sha256(), path.stat().st_size
    step, block = (2**24, 2**24) if whole or size < 2**26 else (size // 1000, 4096)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()


def identity(parts, *names):
    """What tells the weights of some models' parts from others': a hash; of a hub id the id."""
    lines = []
    for path in map(Path, filter(None, names)):
        found = [path] if path.is_file() else [file for part in parts for file in path.glob(part)]
        known = [file for file in found if file.suffix in (".safetensors", ".json", ".txt")]
        lines += [f"{file.name} {file_digest(file, False)}" for file in known]  # it may move
        lines += [] if path.exists() else [str(path)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def make_stamp(args, what):
    """All that encoded `what`, "latents" or "captions", depends on but the data themselves."""
    teacher, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    names = ["mixed_precision", "variant", "teacher_revision"]
    stamp = {"format": FORMAT_VERSION, "family": FAMILY}
    if {"latents", "generated", "trajectories"} & {*what}:
        names.append("resolution")
        own = [vae] if vae else [teacher, args.teacher_config]
        stamp["VAE"] = identity(["*" if vae else "vae/*"], *own)
    if "latents" in what:
        names += ["center_crop", "use_fix_crop_and_size"]
    if "trajectories" in what:  # which a run of other guidance or steps cannot take
        names += ["w_min", "w_max", "negative_prompt", "guidance_rescale", "num_ddim_timesteps"]
        names += ["prediction_type", "rescale_betas_zero_snr"]
        stamp["UNet"] = identity(["unet/*"], teacher)
    if "captions" in what:
        names.append("max_prompt_chunks")
        parts = ["text_encoder*/*", "tokenizer*/*", "model_index.json"]
        stamp["text encoders"] = identity(parts, teacher, args.teacher_config)
    return stamp | {name: vars(args)[name] for name in names if name in args}


def check_stamp(folder, columns, args):
    """End the run where encoded data were made from something else than this run's flags say."""
    with or_fail(f"--dataset_name {folder}: {STAMP} is broken", "encode the data again"):
        stamp = {"max_prompt_chunks": 1} | json.loads((folder / STAMP).read_text())
        wanted = make_stamp(args, stamp["what"])
    for key, value in wanted.items():
        if stamp.get(key) != value:
            what = f"it was encoded with {key} {stamp.get(key)}, this run has {value}"
            fail(f"--dataset_name {folder}: {what}; give the flags it was made with or encode anew")
    if args.random_flip and {*LATENTS} & {*columns} and "mirrored" not in columns:
        fail(f"--random_flip: {folder} has no mirrored images; encode with --random_flip too")
    if args.proportion_empty_prompts and "path" in columns:
        fail(f"--proportion_empty_prompts: the paths in {folder} are those of their captions")
    if args.streaming and "size" in columns:
        fail(f"--streaming: {folder} has images of several sizes; give --no-streaming")


def load_prompts(folder, columns):
    """The embeddings of prompts that encoded data have beside them: {prompt: {name: tensor}}."""
    if "prompt" not in columns:
        return {}
    with or_fail(f"--dataset_name {folder}: {PROMPTS} is missing or broken", AGAIN):
        with safe_open(folder / PROMPTS, "pt") as file:
            texts = json.loads(file.metadata()["prompts"])
        tensors = load_file(folder / PROMPTS)
        return {text: {k: v[i] for k, v in tensors.items()} for i, text in enumerate(texts)}


class UnusableRecord(Exception):
    """A record that cannot be trained on: its name and why."""


def none_usable(unusable):
    """The error where not one record can be used."""
    first = f", the first: {unusable[0]}" if unusable else ""
    return UnusableRecord(f"not one record of the data can be used{first}")


@contextlib.contextmanager
def or_unusable(name):
    """A block in which any error makes a record unusable: Pillow raises countless kinds."""
    try:
        yield
    except Exception as error:
        raise UnusableRecord(f"{name} ({reason(error)})") from error


def to_record(row, number, args):
    """A row of the data as {"image": undecoded, "captions": [str, ...], "name"}, or UnusableRecord.

    Encoded data have `moments` and more of ENCODED instead. A missing caption is the empty one.
    """
    columns, encoded = (args.image_column, args.caption_column), "unusable" in row
    image_column, caption_column = ("image", "captions") if encoded else columns
    image = row.get(image_column) or row.get("image")
    name = (image or {}).get("path") or row.get("__key__") or f"row {number}"
    if encoded and row["unusable"]:
        raise UnusableRecord(row["unusable"])
    names = (caption_column, *CAPTIONS, CAPTION_FILE)
    column = next((key for key in names if row.get(key) is not None), None)
    with or_unusable(name):
        value = row.get(column)
        if "__key__" in row and not column:
            raise ValueError(f"no caption stands beside it in {row['__url__']}")
        if column == CAPTION_FILE:
            value = Path(value).read_bytes()
        elif column == "json":
            value = json.loads(value)
            if args.caption_column not in value:
                raise ValueError(f"--caption_column {args.caption_column}: has {', '.join(value)}")
            value = value[args.caption_column]
        value = value if isinstance(value, list) else [value]
        texts = [text.decode("utf-8-sig") if isinstance(text, bytes) else text for text in value]
        texts = [text for text in texts if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a caption is not text")
        "".join(texts).encode()  # not half a surrogate pair, which no tokenizer takes
    captions = [text.strip() for text in texts] or [""]
    record = {"image": image, "captions": captions, "name": row["name"] if encoded else name}
    return record | {key: row[key] for key in ENCODED if encoded and key in row}


def open_image(image):
    """A `datasets` image as an upright RGB one; transparent parts become white."""
    if not image:
        raise ValueError("no image")
    data, path = image["bytes"], image["path"]
    if data is None:
        with open(path, "rb") if os.path.exists(path) else xopen(path, "rb") as file:
            data = file.read()
    return to_rgb(Image.open(io.BytesIO(data)))


def to_rgb(image):
    """A PIL image as a viewer shows it: upright, in 8 bits, on white where it is transparent."""
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data leave it as it is
        image.getexif()  # and keep it from being written again
        image.info.pop("exif", None)
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits, or fractions, which Pillow would clip
        tones = np.nan_to_num(np.asarray(image, np.float64), posinf=1)
        most = tones.mean() if image.mode == "F" else tones.max()  # fractions may exceed 1 a little
        whites = (65535,) if ";" in image.mode else (1, 255, 65535)
        white = next((white for white in whites if most <= white), 2**32 - 1)
        image = Image.fromarray((tones.clip(0, white) * 255 / white).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image, sides, place, flip):
    """A part of `sides` (width, height) of the image, resized so that it just covers them.

    At `place` = (x, y), each 0..1; mirrored if `flip`. Returns it and its left and top edge in the
    resized, mirrored image, in pixels. Only the part is resized: a strip of 40,000 x 10 pixels
    would else become 2,000,000 x 512.
    """
    scale = max(side / s for side, s in zip(sides, image.size, strict=True))
    size = [max(side, round(s * scale)) for side, s in zip(sides, image.size, strict=True)]
    edges = zip(place, size, sides, strict=True)
    left, top = (round(p * (s - side)) for p, s, side in edges)
    x, y = size[0] - sides[0] - left if flip else left, top  # of the part before it is mirrored
    x_scale, y_scale = (old / new for old, new in zip(image.size, size, strict=True))
    box = (x * x_scale, y * y_scale, (x + sides[0]) * x_scale, (y + sides[1]) * y_scale)
    part = image.resize(sides, Image.Resampling.LANCZOS, box)
    return ImageOps.mirror(part) if flip else part, left, top


def prepare_image(image, sides, place, flip, args):
    """A training image as what the step needs of it.

    pixels [3,H,W] in -1..1; time_ids, SDXL's conditioning on size: height and width of the image as
    it was, top and left of the crop in the resized (and mirrored) image, height and width of the
    crop; all in pixels.
    """
    (width, height), (w, h) = image.size, sides
    part, left, top = resize_and_crop(image, sides, place, flip)
    if args.use_fix_crop_and_size:
        height, width, top, left = h, w, 0, 0
    pixels = VaeImageProcessor(do_resize=False).preprocess(part)[0]
    return {"pixels": pixels, "time_ids": torch.tensor([height, width, top, left, h, w])}


def make_sample(record, step, place, empty, args):
    """A record as a training sample, or UnusableRecord; a function of it and (step, place).

    These are the keys of a batch: pixels [3,H,W], moments [8,h,w] or path [4 (N+1),h,w]; caption,
    and where it is encoded prompt [L,D], for SDXL text_embeds [P]; for SDXL time_ids [6]; step,
    place, name.
    `empty`: the embeddings of the empty prompt, where captions are encoded.
    """
    purposes = ("crop", "flip", "caption")
    crop, flip, caption = (rng(args.seed, step, place, purpose).random(2) for purpose in purposes)
    crop, flip = (0.5, 0.5) if args.center_crop else crop, args.random_flip and flip[0] < 0.5
    if kind := next((name for name in LATENTS if name in record), None):
        sample = {kind: record["mirrored" if flip else kind]}
        if "size" in record:  # columns have one shape: latents of several sizes are [h w, channels]
            sample[kind] = sample[kind].T.unflatten(1, record["size"].tolist())
        sample |= {"time_ids": record["time_ids"]} if "time_ids" in record else {}
    else:
        with or_unusable(record["name"]):
            image = open_image(record["image"])
        sample = prepare_image(image, (args.resolution, args.resolution), crop, flip, args)
    i = int(caption[1] * len(record["captions"]))
    dropped = caption[0] < args.proportion_empty_prompts
    sample["caption"] = "" if dropped else record["captions"][i]
    names = {"prompt", "text_embeds"} & record.keys()
    sample |= {name: empty[name] if dropped else record[name][i] for name in names}
    return sample | {"step": step, "place": place, "name": record["name"]}


@functools.lru_cache(8)
def order_of(seed, epoch, records):
    """The numbers of the records in the order of an epoch."""
    return rng(seed, epoch, 0, "order").permutation(records)


class Samples(torch.utils.data.Dataset):
    """Training samples by (optimizer step, place in the global batch), from seeded shuffles.

    Records are read from one endless stream, of which epoch e is a permutation of all; step s has
    positions [s G, (s + 1) G) of it, G the global batch. Where latents are of several sizes, step s
    has the batch that is the s-th to be full when each record waits for others of its size. An
    unusable record is replaced by the next usable one, of its size, and named in the sample.
    """

    def __init__(self, records, empty, args, global_batch):
        self.records, self.empty, self.args, self.global_batch = records, empty, args, global_batch
        self.sizes, self.full, self.waiting, self.read = None, [], defaultdict(list), 0
        if {"size", "unusable"} <= {*getattr(records, "column_names", ())}:
            rows = records.select_columns("size").with_format("numpy")[:]["size"].tolist()
            counts = Counter(tuple(size) for size in rows if size[0])
            usual = max(counts, key=counts.get, default=None)  # an unusable record has none
            self.sizes = [tuple(size) if size[0] else usual for size in rows]

    def row(self, position):
        """The number of the record at a position of the stream."""
        epoch, index = divmod(position, len(self.records))
        return int(order_of(self.args.seed, epoch, len(self.records))[index])

    def position(self, step, place):
        """Where in the stream this place's record is."""
        if not self.sizes:
            return step * self.global_batch + place
        while len(self.full) <= step:
            size = self.sizes[self.row(self.read)]
            self.waiting[size].append(self.read)
            self.read += 1
            if len(self.waiting[size]) == self.global_batch:
                self.full.append(self.waiting.pop(size))
        return self.full[step][place]

    def __getitem__(self, step_and_place):
        (step, place), unusable = step_and_place, []
        position = self.position(step, place)
        for i in range(2 * len(self.records)):  # a whole epoch, wherever in one it starts
            row = self.row(position + i)
            if self.sizes and self.sizes[row] != self.sizes[self.row(position)]:
                continue
            try:
                with or_unusable(f"row {row}"):  # such as a text that is not UTF-8
                    fields = self.records[row]
                record = to_record(fields, row, self.args)
                sample = make_sample(record, step, place, self.empty, self.args)
                return sample | {"unusable": unusable}
            except UnusableRecord as error:
                unusable.append(str(error))
        raise none_usable(unusable)


class Stream(torch.utils.data.IterableDataset):
    """The training samples of one rank from streamed records without end, shuffled in a buffer.

    Worker w of W makes the rank's batches w, w + W, ... Those in front of `first_batch` were used
    before the run was stopped: they are read over, undecoded. An unusable record is replaced by the
    next usable one and named in the sample.
    """

    def __init__(self, records, empty, args, first_batch, rank, world):
        self.records, self.empty, self.args = records, empty, args
        self.first_batch, self.rank, self.world = first_batch, rank, world

    def shuffled(self, epoch):
        """The rank's records of an epoch. Not by `set_epoch`: workers may be in two epochs."""
        order, size = rng(self.args.seed, epoch, 0, "order"), self.args.shuffle_buffer_size
        records = self.records.shuffle(generator=order, buffer_size=size)
        return split_dataset_by_node(records, self.rank, self.world)

    def read(self, epoch):
        """The same; an error of reading is UnusableRecord, which a worker hands on."""
        with or_unusable("the streamed data cannot be read on; is a shard cut off?"):
            yield from self.shuffled(epoch)

    def __iter__(self):
        info, args = torch.utils.data.get_worker_info(), self.args
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        size, parts = args.train_batch_size, args.gradient_accumulation_steps
        skip, position, waiting, unusable = self.first_batch // workers * size, 0, [], []
        for epoch in itertools.count():
            first = position
            for row in self.read(epoch):
                position += 1
                if position <= skip:
                    continue
                batch, i = divmod(position - 1, size)
                step, micro = divmod(batch * workers + worker, parts)
                waiting.append((step, (self.rank * parts + micro) * size + i))
                try:
                    record = to_record(row, position, args)
                    while waiting:
                        sample = make_sample(record, *waiting[0], self.empty, args)
                        yield sample | {"unusable": unusable}
                        waiting.pop(0)
                        unusable = []
                except UnusableRecord as error:
                    unusable.append(str(error))
            if len(waiting) >= position - first:  # not one usable record in all of the epoch
                raise none_usable(unusable)


def collate(samples):
    """A batch: tensors stacked, all else in lists."""
    unusable = [why for sample in samples for why in sample.pop("unusable")]
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch = {k: torch.stack(v) if torch.is_tensor(v[0]) else v for k, v in batch.items()}
    return batch | {"unusable": unusable}


def start_reader(_):
    """In a process that reads: a signal to the whole job is the trainer's affair."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def or_end(batches, save):
    """The batches; the run is saved and ends with one line where there are no more to be had."""
    batches = iter(batches)  # starts the readers
    if hasattr(signal, "SIGCHLD"):  # one that dies ends the run between steps, not in one
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UnusableRecord as error:  # of a worker: the last line, under its traceback
        line = str(error).strip().split("\n")[-1]
        save()
        fail(line.split("UnusableRecord: ")[-1], this_rank())
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        save()
        how = "give it more shared memory (docker: --shm-size 8g) or --dataloader_num_workers 0"
        fail(f"a process that reads images was killed ({reason(error)}); {how}", this_rank())


def make_loader(records, empty, args, first_step, rank, world):
    """One batch for each micro-step of this rank from `first_step` on.

    Ranks and micro-steps take contiguous parts of the global batch.
    """
    size, parts = args.train_batch_size, args.gradient_accumulation_steps
    workers, steps = args.dataloader_num_workers or 0, range(first_step, args.max_train_steps)
    options = {"collate_fn": collate, "worker_init_fn": start_reader}
    options["pin_memory"] = torch.cuda.is_available()  # for `to_device`, beside the training
    if not args.streaming:
        places = np.arange(parts * size).reshape(parts, size) + rank * parts * size
        batches = ([(step, place) for place in some] for step in steps for some in places.tolist())
        options |= {"batch_sampler": batches, "num_workers": workers}
        samples = Samples(records, empty, args, size * parts * world)
        return torch.utils.data.DataLoader(samples, **options)
    stream = Stream(records, empty, args, first_step * parts, rank, world)
    workers = min(workers, stream.shuffled(0).num_shards, args.max_train_samples or workers)
    loader = torch.utils.data.DataLoader(stream, size, num_workers=workers, **options)
    start = first_step * parts % max(1, workers)  # the workers before this one have had their turn
    return itertools.islice(loader, start, start + len(steps) * parts)


# -------------------------------------------------------------------------------- 5. The LoRA file

PEFT_FILE = "adapter_model.safetensors"
# kohya's name of the base, by which A1111 files LoRAs, and ModelSpec's
BASES = {
    (768, "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    (1024, "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    (1024, "v"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    (2048, "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (2048, "v"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
# Where results go and how they are shown, not what they are, is no part of the header
NOT_IN_HEADER = (
    "output_dir logging_dir cache_dir report_to tracker_project_name resume_from_checkpoint "
    "push_to_hub hub_model_id max_train_hours allow_changed"
).split()
PATHS_IN_HEADER = "train_data_dir dataset_name train_shards_path_or_url lora_path".split()


def name_in_file(path, unet):
    """A layer's name in the LoRA file: the original code's, as kohya's tools read no other.

    That code numbers blocks through. diffusers does not read it for UNets of other kinds than SDXL.
    """
    depth, ups = unet.layers_per_block, unet.up_block_types
    if depth not in (1, 2) or len(ups) > 3 or "UpBlock2D" in ups[:-1]:
        return path
    names = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "resnets.conv1": "in_layers.2", "resnets.conv2": "out_layers.3",
        "resnets.time_emb_proj": "emb_layers.1", "resnets.conv_shortcut": "skip_connection",
        "downsamplers.conv": "op",
    }  # fmt: skip
    found = re.fullmatch(r"(\w+)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path)
    if not found:
        return names.get(path, path)
    side, block, kind, layer, rest = found.groups()
    place = {"attentions": 1, "upsamplers": 2}.get(kind, 0)
    rest = names.get(f"{kind}.{rest}", rest)
    if side == "mid":
        return f"middle_block.{place or 2 * int(layer)}.{rest}"
    count = int(block) * (depth + 1) + (depth if "samplers" in kind else int(layer))
    start = f"input_blocks.{count + 1}" if side == "down" else f"output_blocks.{count}"
    return f"{start}.{place}.{rest}"


def lora_layers(unet):
    """{module path: (A, B, scaling)} of every LoRA layer in the UNet."""
    layers = {}
    for path, module in unet.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            (name,) = module.lora_A
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            layers[path] = a, b, module.scaling[name]
    return layers


def base_name(name):
    """A hub id as it is, the last part of a local path."""
    is_local = Path(name).exists() or Path(name).is_absolute()
    return Path(name).resolve().name if is_local else name


def header(pipe, args, step):
    """The LoRA file's metadata; no time and no path, so equal runs write equal files."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_IN_HEADER}
    settings |= {k: base_name(settings[k]) for k in PATHS_IN_HEADER if settings[k]}
    unet, base = pipe.unet.config, args.pretrained_teacher_model
    width, name = unet.cross_attention_dim, base_name(base)
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon").removesuffix("_prediction")
    version, architecture = BASES.get((width, prediction), (None, f"{FAMILY}-{width}"))
    if version and unet.reverse_transformer_layers_per_block:  # which A1111 files under SDXL
        architecture = "segmind-stable-diffusion-1b"
    about = {"format": "pt", "lcm_lora_version": FORMAT_VERSION, "base_model": base, "step": step}
    about |= {"family": FAMILY, "rank": args.lora_rank, "alpha": args.lora_alpha}
    about |= {k: settings[k] for k in ("num_ddim_timesteps", "w_min", "w_max")}
    phases = phases_at(step - 1, args)
    about |= {"phases": phases, "sampler": "lcm" if phases == 1 else "tcd"}
    about["training_args"] = json.dumps(settings, sort_keys=True)
    # What ComfyUI, A1111/Forge and kohya's tools show: the fields of ModelSpec and of kohya
    spec = {"sai_model_spec": "1.0.0", "prediction_type": prediction}
    spec |= {"implementation": "sgm" if FAMILY == "sdxl" else "diffusers"}  # for the names
    spec |= {"title": f"LCM-LoRA of {name}", "architecture": f"{architecture}/lora"}
    spec |= {"resolution": f"{args.resolution}x{args.resolution}"}
    _, sampler, _, guidance = sampling(args, phases)
    spec |= {"usage_hint": f"sampler {sampler}, schedule sgm_uniform, 4 steps (1 to 8), {guidance}"}
    kohya = {"network_module": "networks.lora", "network_dim": args.lora_rank, "steps": step}
    kohya |= {"network_alpha": args.lora_alpha, "sd_model_name": name}
    kohya["output_name"] = Path(args.output_dir).resolve().name  # by which A1111 lists it
    kohya |= {k: settings[k] for k in ("learning_rate", "mixed_precision")}
    if version:
        kohya |= {"base_model_version": version, "v2": version.startswith("sd_v2")}
    about |= {f"modelspec.{k}": v for k, v in spec.items()}
    about |= {f"ss_{k}": v for k, v in kohya.items()}
    return {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in about.items()}


def sampling(args, phases):
    """What the LoRA is sampled with: (scheduler in diffusers, sampler in UIs, guidance, in words).

    Phases lead to points of the teacher's path, not to its end: no sampler of them adds noise.
    """
    keeps = args.w_min == args.w_max == 0  # guided by the base as before
    guidance = (7.5, "CFG scale and negative prompt of the base") if keeps else (1.0, "CFG scale 1")
    if phases == 1:
        return "LCMScheduler", "lcm", *guidance
    return "TCDScheduler", "euler", *guidance


def save(tensors, about):
    """A .safetensors file with the header's keys sorted: the library shuffles them at each call."""
    content = memoryview(to_bytes(tensors))
    start = 8 + int.from_bytes(content[:8], "little")
    head = {"__metadata__": about} | json.loads(bytes(content[8:start]))
    text = json.dumps(head, sort_keys=True, ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)  # the numbers stay aligned
    return b"".join([len(text).to_bytes(8, "little"), text, content[start:]])


def read_lora(pipe, file):
    """`lora_layers` of a UNet like the teacher onto which diffusers puts a LoRA file."""
    with safe_open(file, "pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "null"))
    tensors, prefix = load_file(file), "base_model.model."
    if file.name == PEFT_FILE:
        config = json.loads(file.with_name("adapter_config.json").read_text())
        settings = {f"unet.{key}": value for key, value in config.items()}
        tensors = {f"unet.{key.removeprefix(prefix)}": value for key, value in tensors.items()}
    weights = sum(not key.endswith(".alpha") for key in tensors)
    if len({float(value) for key, value in tensors.items() if key.endswith(".alpha")}) > 1:
        raise ValueError("its layers differ in alpha, which diffusers does not read")
    state, alphas = pipe.lora_state_dict(tensors, unet_config=pipe.unet.config)
    with torch.device("meta"):
        reader = type(pipe.unet).from_config(pipe.unet.config)
    # A base of zeros takes no memory, and is as precise as the file whatever the teacher is
    for module in reader.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros(()).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    pipe.load_lora_into_unet(state, alphas, reader, metadata=settings, low_cpu_mem_usage=True)
    layers = lora_layers(reader)
    if not layers or 2 * len(layers) != weights:
        raise ValueError(f"{len(layers)} of its {weights / 2:g} layers are layers of this teacher")
    if not all(a.isfinite().all() and b.isfinite().all() for a, b, _ in layers.values()):
        raise ValueError("NaN or infinite numbers are in it")
    return layers


def save_lora(run, folder, args):
    """Write the LoRA file and the PEFT folder, and read the file back as a user's pipeline would.

    Each file is written beside, checked, flushed and renamed: a good one is never lost.
    """
    layers, kohya, prefixed = lora_layers(run.target), {}, {}
    for path, (a, b, _) in layers.items():
        a, b = (weight.detach().cpu().contiguous() for weight in (a, b))
        name, peft_key = name_in_file(path, run.target.config), f"base_model.model.{path}"
        key = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        kohya[f"{key}.alpha"] = torch.tensor(float(args.lora_alpha))
        prefixed |= {f"{peft_key}.lora_A.weight": a, f"{peft_key}.lora_B.weight": b}
    config = run.target.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": args.pretrained_teacher_model, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    about, file = header(run.pipe, args, run.step), Path(folder, LORA_FILE)
    if run.changes:
        about["changed_at_resume"] = json.dumps(run.changes)
    files = {file: save(kohya, about), Path(folder, "unet", PEFT_FILE): save(prefixed, about)}
    files[Path(folder, "unet", "adapter_config.json")] = text.encode()
    parts = {path: Path(f"{path}.part") for path in files}
    Path(folder, "unet").mkdir(parents=True, exist_ok=True)
    try:
        for path, content in files.items():
            parts[path].write_bytes(content)
        loaded, wrong = read_lora(run.pipe, parts[file]), []
        for path, (a, b, scaling) in layers.items():
            x, y, loaded_scaling = loaded.get(path, (a, b, math.nan))
            same = torch.equal(a.cpu(), x) and torch.equal(b.cpu(), y)
            if not same or not math.isclose(scaling, loaded_scaling, rel_tol=1e-6):  # a float32
                wrong.append(path)
        if wrong:
            what = f"{len(wrong)} of {len(layers)} layers are missing or differ, first {wrong[0]}"
            fail(f"{file}: as diffusers loads it, {what}")
        for path, part in parts.items():
            flush_to_disk(part)
            part.replace(path)
    finally:  # of a save that failed
        for part in parts.values():
            part.unlink(missing_ok=True)
    return f"{file}: {len(layers)} of {len(layers)} layers read back equal"


@torch.no_grad()
def load_lora(pipe, student, source, flag):
    """Put a LoRA's weights into the student; under another alpha B is scaled: an equal update."""
    names = (f"unet/{PEFT_FILE}", PEFT_FILE, LORA_FILE)
    file = next((Path(source, name) for name in names if Path(source, name).exists()), Path(source))
    advice = f"for a LoRA of another tool: python scripts/convert_lora.py {file} OUTPUT"
    with or_fail(f"{flag} {file}: no LoRA that can be read", advice):
        given, live = read_lora(pipe, file), lora_layers(student)
    ranks, wanted = ({path: len(a) for path, (a, _, _) in some.items()} for some in (given, live))
    if ranks != wanted:
        known = TARGET_MODULES.split()
        endings = {next((e for e in known if f".{path}".endswith(f".{e}")), path) for path in ranks}
        rank = " or ".join(map(str, sorted({*ranks.values()})))
        fits = f"--lora_rank {rank} --lora_target_modules '{' '.join(sorted(endings))}'"
        fail(f"{flag} {file}: its {len(given)} layers or their rank are not the run's; give {fits}")
    for path, (a, b, scaling) in live.items():
        a.copy_(given[path][0])
        b.copy_(given[path][1] * (given[path][2] / scaling))


# ------------------------------------------------------------------------ 6. Checkpoints, stop, log

STATE_FILE, RECORD_FILE = "training_state.pt", "flags.json"
MANIFEST = "manifest.json"  # sizes and hashes of a checkpoint
BAD_STEPS = 10  # in a row without a finite loss and gradient, which end the run
# Flags that a resumed run may change: its result is the same but for rounding
NO_CHANGE = (
    "gradient_checkpointing vae_encode_batch_size allow_tf32 torch_compile checkpointing_steps "
    "checkpoints_total_limit validation_prompts validation_steps num_train_epochs scale_lr "
    "lora_path"
).split()
# Nor these where as many images are in a step; streamed data are read in other portions by them
PORTIONS = "train_batch_size gradient_accumulation_steps processes dataloader_num_workers".split()
# As many of these as the system has
STOP_SIGNALS = [one for one in signal.Signals if one.name[3:] in "INT TERM USR1 HUP BREAK".split()]
HANG_UP = vars(signal).get("SIGHUP", signal.SIGTERM)
OUT_OF_TIME = 14  # what --max_train_hours stops with, the number of SIGALRM


def find_launcher():
    """The number of the launcher that started this process; None for a shell, which may log out."""
    known, parent = ("launch", "torchrun", "torch.distributed.run"), os.getppid()
    with contextlib.suppress(psutil.Error):  # not seen by the first process of a container
        words = psutil.Process(parent).cmdline()
        return parent if any(word.endswith(known) for word in words) else None


LAUNCHER = find_launcher()


def checkpoints(output_dir):
    """The checkpoint folders, oldest first."""
    found = Path(output_dir).glob("checkpoint-*")
    found = [p for p in found if re.fullmatch("[0-9]+", p.name[11:])]
    return sorted(found, key=lambda p: int(p.name[11:]))


def flush_to_disk(path):
    """What was written to a file or folder survives a power cut from here on."""
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):  # then folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot do it for folders
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def save_checkpoint(run, args):
    """Write checkpoint-<step> under another name, flush, rename; delete the oldest to spare."""
    folder = Path(args.output_dir, f"checkpoint-{run.step}")
    part, old = Path(f"{folder}.part"), Path(f"{folder}.old")
    good = (checkpoints(args.output_dir) or ["none"])[-1]
    advice = f"free or name another disk; the last good checkpoint: {good}"
    with or_fail(f"{folder}: it cannot be saved", advice):
        try:
            for left in part.parent.glob("checkpoint-*.part"):  # by a kill
                shutil.rmtree(left)
            report = save_lora(run, part, args).replace(str(part), str(folder))
            state = {name: kept and kept.state_dict() for name, kept in run.state().items()}
            torch.save(state | {"step": run.step}, part / STATE_FILE)
            record = {"step": run.step, "global_batch": run.global_batch}
            record |= {"flags": run.record, "changes": run.changes}
            (part / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
            about = {}
            for path in filter(Path.is_file, part.rglob("*")):
                name = path.relative_to(part).as_posix()
                about[name] = path.stat().st_size, file_digest(path)
            (part / MANIFEST).write_text(json.dumps(about, indent=2) + "\n")
            for path in part / STATE_FILE, part / RECORD_FILE, part / MANIFEST, part / "unet", part:
                flush_to_disk(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        flush_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    if args.checkpoints_total_limit:
        # a later one may be damaged
        others = [other for other in checkpoints(args.output_dir) if other != folder]
        for spare in others[: 1 - args.checkpoints_total_limit or None]:
            shutil.rmtree(spare)
    return report


def damage(folder):
    """What is wrong with a checkpoint, by its manifest; "" if nothing is."""
    try:
        for name, (size, digest) in json.loads((folder / MANIFEST).read_text()).items():
            if (folder / name).stat().st_size != size or file_digest(folder / name) != digest:
                return f"{name} is not what was saved"
    except Exception as error:  # a manifest may be any JSON
        return f"it is not whole ({reason(error)})"
    return ""


def find_checkpoint(args):
    """The folder that --resume_from_checkpoint means, or None where `latest` has none yet."""
    name, found = args.resume_from_checkpoint, checkpoints(args.output_dir)
    lora, holds = Path(args.output_dir, LORA_FILE), f"--output_dir {args.output_dir}: it holds"
    if name is None and (found or lora.exists()):
        how = "resume with --resume_from_checkpoint latest, or choose another folder"
        fail(f"{holds} {[lora, *found][-1].name}; {how}")
    if name == "latest" and lora.exists() and not found:
        how = "choose another folder, or start from it by --lora_path"
        fail(f"{holds} a finished LoRA, but no checkpoint to go on from; {how}")
    tried = found if name == "latest" else [Path(name)] if name else []
    for folder in reversed(tried):
        if not (why := damage(folder)):
            return folder
        print(f"warning: {folder}: {why}", file=sys.stderr)
    if tried:
        advice = "give a checkpoint-<step> folder, `latest`, or a new --output_dir"
        fail(f"--resume_from_checkpoint {name}: no whole checkpoint there; {advice}")


def make_record(run, args):
    """What a run's result depends on, by flag: `check_record` compares it at a resume."""
    teacher, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    record = {k: v for k, v in vars(args).items() if k not in NOT_IN_HEADER}
    parts = ["*/*", "model_index.json"]
    record["pretrained_teacher_model"] = f"{base_name(teacher)} {identity(parts, teacher)}"
    if vae:
        record["pretrained_vae_model_name_or_path"] = f"{base_name(vae)} {identity(['*'], vae)}"
    for flag in PATHS_IN_HEADER:
        if record[flag] and Path(record[flag]).exists():
            record[flag] = str(Path(record[flag]).resolve())
    record["processes"] = run.accelerator.num_processes
    return record


def check_record(run, args):
    """Compare a run's flags with its checkpoint's: what changes the result has to be allowed."""
    advice = "it was saved by an earlier version; start a new run from it with --lora_path"
    with or_fail(f"--resume_from_checkpoint {run.resumed}: its flags are not known", advice):
        then = json.loads((run.resumed / RECORD_FILE).read_text())
    run.changes, free = then["changes"], [*NO_CHANGE]
    if args.lr_scheduler.startswith("constant") and not args.phases[1:]:
        free.append("max_train_steps")
    if then["global_batch"] == run.global_batch and not args.streaming:
        free += PORTIONS
    pairs = {flag: (then["flags"].get(flag), now) for flag, now in run.record.items()}
    changed = {flag: (old, new) for flag, (old, new) in pairs.items() if old != new}
    shown = {flag: f"--{flag} {new} (it was {old})" for flag, (old, new) in changed.items()}
    if refused := [flag for flag in changed if flag not in [*free, *args.allow_changed]]:
        flags = ", ".join(shown[flag] for flag in refused)
        how = f"give what it was, or --allow_changed {' '.join(refused)}, or another --output_dir"
        fail(f"--resume_from_checkpoint {run.resumed} is of another run: {flags}; {how}")
    for line in shown.values():
        run.accelerator.print(f"changed at this resume: {line}")
    if kept := {flag: values for flag, values in changed.items() if flag not in free}:
        run.changes = [*run.changes, {"step": then["step"]} | kept]


def load_state(run):
    """Take what `Run.state` keeps from the checkpoint; the optimizer's settings are the flags'."""
    settings = {k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"}
    schedule, rates = run.lr_scheduler, run.lr_scheduler.base_lrs
    advice = "resume with the flags of before"
    with or_fail(f"--resume_from_checkpoint {run.resumed}: not of this run", advice):
        state = torch.load(run.resumed / STATE_FILE, map_location="cpu", weights_only=True)
        run.step = state["step"]
        for name, kept in run.state().items():
            if kept and state.get(name):
                kept.load_state_dict(state[name])
    keep_paged(run.optimizer.optimizer)  # within accelerate's wrapper
    # Allowed changes count: the learning rate is what these flags give at the checkpoint's step
    schedule.base_lrs = rates
    settings["lr"] = rates[0] * schedule.lr_lambdas[0](schedule.last_epoch)
    run.optimizer.param_groups[0].update(settings)
    if run.ema:
        run.ema.to(run.accelerator.device)


def keep_paged(optimizer):
    """Put a loaded state into paged memory: bitsandbytes loads it as plain tensors of the GPU."""
    for p, state in optimizer.state.items() if getattr(optimizer, "is_paged", False) else ():
        for name in {"state1", "state2"} & state.keys():
            kept = optimizer.get_state_buffer(p, dtype=state[name].dtype)
            if getattr(kept, "is_paged", False):  # a small one is not
                state[name] = kept.copy_(state[name])


def is_done(run, args):
    """Whether a resumed run has nothing left to do: the LoRA of its last step is there."""
    file, folder = Path(args.output_dir, LORA_FILE), Path(args.output_dir, "unet", PEFT_FILE)
    whole = file.exists() and folder.exists()
    if not run.resumed or run.step < args.max_train_steps or not whole:
        return False
    with or_fail(f"{file}: it cannot be read", "delete it, and resume"), safe_open(file, "pt") as f:
        return (f.metadata() or {}).get("step") == str(run.step)


class Stop:
    """What asks the run to stop: a signal, --max_train_hours, a launcher that is gone."""

    def __init__(self, hours, world):
        self.number, self.since = 0, 0.0
        # no GPU waits for it
        self.group = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self.end = psutil.Process().create_time() + 3600 * hours if hours else math.inf
        for number in STOP_SIGNALS:
            # under nohup a hang-up is ignored, and stays so
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number, _):
        """Keep the first signal in mind; a second one ends the process at once."""
        now = time.monotonic()
        if self.since and now - self.since > 1:  # sooner it is the first, from the launcher too
            os._exit(128 + number)
        if not self.since and this_rank() == "0":
            os.write(2, b"\nstopping after this step, then saving; a second signal ends at once\n")
        self.number, self.since = self.number or number, self.since or now

    def asked(self):
        """The number of the signal that all ranks stop for after this step, or None."""
        gone = HANG_UP if LAUNCHER and os.getppid() != LAUNCHER else 0
        late = OUT_OF_TIME if time.time() > self.end else 0
        self.number = self.number or gone or late
        number = torch.tensor(int(self.number))
        if self.group:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number) or None


def launch_command():
    """How this process was started, with the launcher's options where they can be seen."""
    if not LAUNCHER:
        return ["python", *sys.argv]
    try:
        words = psutil.Process(LAUNCHER).cmdline()
        first = next(i for i, word in enumerate(words) if word.endswith("launch"))
        return ["accelerate", "launch", *words[first + 1 :]]
    except (psutil.Error, StopIteration):
        return ["accelerate", "launch", *sys.argv]


def write_whole(path, text):
    """Write a file beside its place and put it there: a full disk leaves the one of before."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def parse_row(line):
    """A line of log.jsonl; {} where it is broken, such as by a full disk."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def start_trackers(accelerator, args):
    """Start the trackers in --logging_dir: W&B would else write into the working directory."""
    advice = "run `wandb login`, set WANDB_MODE=offline, or give another --report_to or project"
    with or_fail(f"--report_to {args.report_to}: it does not start", advice):
        wandb = {"dir": accelerator.logging_dir}
        accelerator.init_trackers(args.tracker_project_name, init_kwargs={"wandb": wandb})


class Log:
    """The status line, its mirror log.jsonl and the trackers; a lock keeps a second run out."""

    def __init__(self, run, args):
        """Start the outputs of a run; of one resumed, log.jsonl keeps the steps before it."""
        self.run, self.seen, self.memory, self.file = run, set(), 0.0, None
        # Steps that were not finite, in a row and in all, and those that fp16's scaler skipped
        self.bad, self.skipped, self.overflows = 0, 0, 0
        if run.accelerator.is_main_process:
            self.open_files(run, args)
        if not run.accelerator.trackers:
            start_trackers(run.accelerator, args)
        plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()}
        for tracker in run.accelerator.trackers:
            tracker.store_init_configuration(plain)
        if run.accelerator.device.type == "cuda":  # the peak of loading is not the training's
            torch.cuda.reset_peak_memory_stats(run.accelerator.device)
        steps = {"total": args.max_train_steps, "initial": run.step, "unit": "step"}
        self.bar = tqdm(**steps, disable=self.file is None, dynamic_ncols=True)
        self.restart_clock()

    def open_files(self, run, args):
        """Lock the output folder; log.jsonl keeps the steps up to this one; write args.json."""
        folder = Path(args.output_dir)
        with or_fail(f"--output_dir {folder} is in use or not writable", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / ".lock")
            self.lock.acquire(timeout=0)  # until this process ends, however it ends
            path = folder / "log.jsonl"
            old = path.read_bytes().split(b"\n") if run.resumed and path.exists() else []
            rows = [row for row in map(parse_row, old) if row.get("step", math.inf) <= run.step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
            self.file = path.open("a", buffering=1)
            libraries = (torch, accelerate, diffusers, transformers, peft, datasets)
            versions = {library.__name__: library.__version__ for library in libraries}
            about = {"arguments": vars(args), "processes": run.accelerator.num_processes}
            about["versions"] = versions | {"python": platform.python_version()}
            write_whole(folder / "args.json", json.dumps(about, indent=2) + "\n")
        last = rows[-1] if rows else {}
        self.skipped, self.overflows = last.get("skipped", 0), last.get("overflows", 0)

    def restart_clock(self):
        """Measure the speed from here on: a save before it does not count."""
        self.clock, self.clock_step, self.waited = time.perf_counter(), self.run.step, 0.0

    def timed(self, batches):
        """The batches; the time in which the training waits for them is added up."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def warn_of(self, unusable):
        """Count the records that are replaced, each once; name ten, the 100th, the 1000th ..."""
        for why in [why for why in dict.fromkeys(unusable) if why not in self.seen]:
            self.seen.add(why)
            count = len(self.seen)
            if count <= 10 or str(count).strip("0") == "1":
                line = f"warning: {count} unusable records replaced so far: {why}"
                self.bar.write(line, sys.stderr)

    def add(self, row, finite, overflow, names):
        """Write a step to all logs; the tenth in a row that was not finite ends the run."""
        accelerator = self.run.accelerator
        self.bad = 0 if finite else self.bad + 1
        self.skipped, self.overflows = self.skipped + (not finite), self.overflows + overflow
        memory = psutil.Process().memory_info().rss  # of the process, or the most of its GPU
        if accelerator.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(accelerator.device)
        self.memory, steps = max(self.memory, memory / 2**30), self.run.step - self.clock_step
        seconds = time.perf_counter() - self.clock
        rate, wait = self.run.global_batch * steps / seconds, self.waited / seconds
        row |= {"skipped": self.skipped, "overflows": self.overflows}
        row |= {"images_per_s": rate, "data_wait": wait, "memory_gib": self.memory}
        accelerator.log(row, step=self.run.step)
        valid = {k: v if math.isfinite(v) else None for k, v in row.items()}  # NaN is not JSON
        if self.file:
            with or_fail(f"{self.file.name}: it cannot be written", "free some space and resume"):
                self.file.write(json.dumps({"step": self.run.step} | valid) + "\n")
        shown = f"loss {row['loss']:.4f} grad {row['grad_norm']:.3f} lr {row['lr']:.1e}"
        shown += f" {rate:.1f} img/s data wait {wait:.0%} {self.memory:.1f} GiB"
        self.bar.set_postfix_str(shown, False)
        self.bar.update()
        if not finite:
            what = f"step {self.run.step} is skipped: loss {row['loss']:g}, gradient norm "
            what += f"{row['grad_norm']:g}, with {', '.join(names)}"
            self.bar.write(f"warning: {what}", sys.stderr)
        if self.bad == BAD_STEPS:
            advice = "lower --learning_rate, give --mixed_precision bf16, or look at these images"
            fail(f"{self.bad} steps in a row were not finite, the last: {what}; {advice}")


# --------------------------------------------------------------------------- 7. Validation and card


@torch.no_grad()
def validate(run, args):
    """Generate the validation prompts with the live student in 4 steps, for trackers too."""
    # the teacher's pipeline with the student, without what encodes and decodes
    sampler, vae, images = copy.copy(run.pipe), run.pipe.vae, []
    for name, _ in networks(run.pipe):
        setattr(sampler, name, None)
    sampler.unet = run.target
    dtype = run.pipe.unet.dtype
    grid = {"original_inference_steps": args.num_ddim_timesteps, "clip_sample": False}
    kind, _, scale, _ = sampling(args, phases_at(run.step - 1, args))
    sampler.scheduler = getattr(diffusers, kind).from_config(run.pipe.scheduler.config, **grid)
    sampler.set_progress_bar_config(disable=True)
    home = vae.device
    embeddings = {"prompt": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    null = {f"negative_{embeddings[key]}": value for key, value in run.c_null.items()}
    settings = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent"}
    settings |= {"height": args.resolution, "width": args.resolution}
    # a step's latents are float32, as the UNet's output, but it takes its base's precision
    settings["callback_on_step_end"] = lambda *of: {"latents": of[-1]["latents"].to(dtype)}
    for i, c in enumerate(run.prompts):
        noise = torch.Generator().manual_seed(args.seed + i)
        given = {name: c[key] for key, name in embeddings.items() if key in c}
        z = sampler(**given, **null, **settings, generator=noise).images
        vae.to(z.device)  # encoded data leave it on the host
        pixels = vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample
        vae.to(home)
        images += VaeImageProcessor().postprocess(pixels)
    path = Path(args.output_dir, "validation", f"step-{run.step:06d}.png")
    path.parent.mkdir(exist_ok=True)
    about, base = PngImagePlugin.PngInfo(), base_name(args.pretrained_teacher_model)
    settings = f"Steps: 4, Sampler: {kind[:3]}, CFG scale: {scale:g}, Seed: {args.seed}"
    settings += f", Model: {base}"
    lines = [*args.validation_prompts, f"{settings}, LCM-LoRA: step {run.step}"]
    about.add_itxt("parameters", "\n".join(lines))  # as A1111 writes it
    diffusers.utils.make_image_grid(images, 1, len(images)).save(path, pnginfo=about)
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        values = {"validation": np.stack([np.asarray(image) for image in images])}
        tracker.log_images(values, step=run.step, **layout)
    return f"{path}: the validation prompts in 4 steps"


def infer_command(args, lora, prompt="a red apple"):
    """What to type to generate an image."""
    words = ["--lora", str(lora), "--prompt", prompt, "--output", "lcm.png"]
    _, _, scale, _ = sampling(args, 1)
    words += [] if scale == 1 else ["--guidance_scale", str(scale)]
    return f"python infer.py {shlex.join(words)}"


def write_card(run, args):
    """README.md: front matter for the hub, settings, the last validation, how to load the LoRA."""
    teacher, folder = args.pretrained_teacher_model, Path(args.output_dir).resolve()
    base, file, kind = base_name(teacher), LORA_FILE, type(run.pipe).__name__
    # What others read has no paths of this machine
    given, place = (base, args.hub_model_id) if args.push_to_hub else (teacher, args.output_dir)
    opener = "from_single_file" if is_one_file(teacher) else "from_pretrained"
    prompts = args.validation_prompts or ["a red apple"]
    image, shown = f"validation/step-{run.step:06d}.png", ""
    if (folder / image).is_file():
        lines = [f"\n![The prompts below in 4 steps]({image})\n", *prompts]
        shown = "\n- ".join(lines) + "\n"
    layout = "stable-diffusion-xl" if FAMILY == "sdxl" else "stable-diffusion"
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    about |= {"tags": ["lcm", "lora", "lcm-lora", layout]}
    about |= {} if Path(teacher).exists() else {"base_model": teacher}
    scheduler, sampler, scale, guidance = sampling(args, args.phases[-1])
    usual = {"phases": [1], "negative_prompt": "", "guidance_rescale": 0, "max_prompt_chunks": 1}
    more = [f", {k} {vars(args)[k]!r}" for k, value in usual.items() if vars(args)[k] != value]
    grid = f"original_inference_steps={args.num_ddim_timesteps}"
    unmarked = "; ModelSamplingDiscrete: v_prediction, if the checkpoint does not say so"
    unmarked = unmarked if args.prediction_type == "v_prediction" else ""
    # Flags override configs, and a checkpoint in one file may not tell
    grid += f', prediction_type="{args.prediction_type}"'
    grid += f", rescale_betas_zero_snr={args.rescale_betas_zero_snr}"
    text = f"""---
{ModelCardData(**about)}
---

# LCM-LoRA of {base}

Generates images in 1 to 8 steps, with the {guidance}. Made from {base} by {Path(__file__).name}:
{run.step} steps at {args.resolution} px, batch {args.train_batch_size} x
{args.gradient_accumulation_steps}, learning rate {args.learning_rate:g}, rank {args.lora_rank},
alpha {args.lora_alpha:g}, omega {args.w_min:g} to {args.w_max:g}, {args.num_ddim_timesteps} DDIM
steps, {args.loss_type} loss, mixed precision {args.mixed_precision}, seed {args.seed}
{"".join(more)[2:]}
{shown}
```python
from diffusers import {kind}, {scheduler}

pipe = {kind}.{opener}("{given}")
pipe.scheduler = {scheduler}.from_config(
    pipe.scheduler.config, {grid}
)
pipe.load_lora_weights("{place}", weight_name="{file}")
# or, by PEFT: pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, "{place}", subfolder="unet")
settings = {{"num_inference_steps": 4, "guidance_scale": {scale}}}
pipe({prompts[0]!r}, **settings).images[0].save("lcm.png")
```

- ComfyUI: {file} into models/loras, LoraLoaderModelOnly; KSampler: 4 steps, {sampler},
  sgm_uniform, {guidance}{unmarked}
- A1111, Forge: the file into models/Lora, `<lora:{folder.name}:1>` in the prompt; sampler
  {sampler}, schedule type SGM Uniform, 4 steps, {guidance}
- `{infer_command(args, place, prompts[0])}`
"""
    write_whole(folder / "README.md", text)


def open_hub(args, rank):
    """The hub's API, on rank 0 of a run with --push_to_hub, and a repository there."""
    if not args.push_to_hub or rank:
        return None
    hub, name = HfApi(), args.hub_model_id or Path(args.output_dir).resolve().name
    advice = "check HF_TOKEN or `hf auth login`, --hub_model_id, the network"
    with or_fail("--push_to_hub: no repository", advice):
        args.hub_model_id = hub.create_repo(name, exist_ok=True).repo_id
    return hub


# ----------------------------------------------------------------------------------------- 8. main


def quiet_libraries():
    """No bars and advice of libraries: this program has one bar and says itself what it does."""
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of what diffusers passes to it
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def make_accelerator(args):
    """The accelerator, its trackers named but not yet started."""
    what = f"accelerate does not start, with --mixed_precision {args.mixed_precision}"
    logs = str(Path(args.output_dir, args.logging_dir))
    with or_fail(what, "give no, bf16 or fp16, and start with `accelerate launch`"):
        accelerator = Accelerator(
            # Without a GPU the launcher's processes would else not know of each other
            cpu=not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1,
            mixed_precision=args.mixed_precision,
            # Not the number, which the environment could replace
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps
            ),
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logs),
            # Where one process validates or reads its data, the others wait for it
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),
                # The gradients lie in what is exchanged, not twice in memory
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    if accelerator.mixed_precision not in DTYPES:
        what = f"mixed precision {accelerator.mixed_precision} is not supported"
        fail(f"{what}: give --mixed_precision no, fp16 or bf16")
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        why = "the base is frozen and shared, there is nothing worth sharding"
        fail(f"{kind}: {why}; launch with --multi_gpu instead")
    if (backend := accelerator.state.dynamo_plugin.backend.value) != "NO":
        fail(f"accelerate's dynamo backend {backend}: set it to no, and give --torch_compile")
    args.mixed_precision = accelerator.mixed_precision  # perhaps the launcher's
    if args.dataloader_num_workers is None:  # a GPU must not wait, a CPU is busy as it is
        args.dataloader_num_workers = 4 if accelerator.device.type == "cuda" else 0
    return accelerator


def describe_device(accelerator, args):
    """Say what is computed on, and in which precision; warn of what is plainly slow."""
    name, many = accelerator.device.type, accelerator.num_processes
    if name == "cuda":
        card = torch.cuda.get_device_properties(accelerator.device)
        name = f"{card.name} of {card.total_memory / 2**30:.0f} GiB"
    accelerator.print(f"device: {many} x {name}, mixed precision {args.mixed_precision}")
    if name == "cpu" and args.mixed_precision == "fp16":
        accelerator.print("warning: fp16 is slow on a CPU; give --mixed_precision no")
    if name == "cpu" and many > 1:
        accelerator.print(f"warning: no GPU is found: {many} processes share the CPUs")


def make_optimizer(parameters, args):
    """AdamW over the LoRA weights, and its learning-rate schedule counted in optimizer steps."""
    settings = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    else:
        import bitsandbytes

        paged = args.optimizer == "paged_adamw8bit"
        if paged and parameters[0].device.type != "cuda":
            fail("--optimizer paged_adamw8bit needs a CUDA GPU: give adamw8bit or adamw")
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, is_paged=paged, **settings)
    name, steps, warmup = args.lr_scheduler, args.max_train_steps, args.lr_warmup_steps
    if name != "constant" and warmup >= steps:
        fail(f"--lr_warmup_steps {warmup}: the run has {steps} steps; give fewer")
    with or_fail(f"--lr_scheduler {name} cannot be used", "give another, or another rate"):
        return optimizer, get_scheduler(name, optimizer, None, warmup, steps)


def set_up(args):
    """Data, models, optimizer, in that order: (run, records, embeddings of the empty prompt)."""
    run = Run()
    run.accelerator = accelerator = make_accelerator(args)
    if args.report_to in ("wandb", "all"):  # it may want a key, so before anything is loaded
        start_trackers(accelerator, args)
    describe_device(accelerator, args)
    run.hub = open_hub(args, accelerator.process_index)
    (run.resumed,) = broadcast_object_list([find_checkpoint(args) if this_rank() == "0" else None])

    # The data, and what of the teacher they need: no encoder of what is encoded
    records, folder = load_records(args), encoded_folder(args)
    columns = records.column_names if folder else []
    known = load_prompts(folder, columns)
    texts, skip = [args.negative_prompt, *(args.validation_prompts or [])], set()
    if {*LATENTS} & {*columns} and not args.validation_prompts:
        skip.add("vae")
    if "prompt" in columns and known.keys() >= {*texts}:
        skip |= {*TEXT_ENCODERS}
    size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    run.global_batch = size
    if args.max_train_steps is None:
        of_tars = args.train_shards_path_or_url and args.max_train_samples
        length = of_tars or len(records)
        args.max_train_steps = math.ceil(args.num_train_epochs * length / size)
    args.learning_rate *= size if args.scale_lr else 1

    # The teacher, and the student over the same weights
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    run.pipe = pipe = load_teacher(args, DTYPES[args.mixed_precision], skip)
    run.schedule = NoiseSchedule(pipe.scheduler.config, accelerator.device)
    check_teacher(pipe, args)
    args.prediction_type = run.schedule.prediction_type
    args.rescale_betas_zero_snr = bool(pipe.scheduler.config.rescale_betas_zero_snr)
    if folder:
        check_stamp(folder, columns, args)
    if args.target == "trajectory" and "path" not in columns:
        fail("--target trajectory: make data by scripts/generate_data.py --trajectories")
    timesteps = ddim_timesteps(args.num_ddim_timesteps, len(run.schedule.alpha))
    run.timesteps = timesteps.to(accelerator.device)
    run.record = make_record(run, args)
    if run.resumed:
        check_record(run, args)
    run.teacher, run.target = pipe.unet, make_student(pipe, args, accelerator.device)
    if source := run.resumed or args.lora_path:
        flag = "--resume_from_checkpoint" if run.resumed else "--lora_path"
        load_lora(pipe, run.target, source, flag)
    samples = [{"caption": text} | known.get(text, {}) for text in texts]
    batches = [torch.utils.data.default_collate([sample]) for sample in samples]
    device, chunks = accelerator.device, args.max_prompt_chunks
    for text in texts:
        if "".join(split_prompt(text, pipe.tokenizer, chunks)) != text:
            accelerator.print(f"warning: it is cut (--max_prompt_chunks): {text!r:.60}")
    run.c_null, *run.prompts = [conditions(pipe, batch, device, chunks) for batch in batches]
    for name in {*TEXT_ENCODERS} & pipe.components.keys() if "prompt" in columns else ():
        setattr(pipe, name, None)  # it has done its work
    if {*LATENTS} & {*columns} and "vae" not in skip:
        pipe.vae.to("cpu")  # only validation needs it

    # The optimizer; the model is wrapped for many processes, the target is the bare module
    run.trained = [p for p in run.target.parameters() if p.requires_grad]
    optimizer, run.lr_scheduler = make_optimizer(run.trained, args)
    run.student, run.optimizer = accelerator.prepare(run.target, optimizer)
    # The autocast that `prepare` adds would compute each normalisation in float32 and cast the rest
    accelerator.unwrap_model(run.student, keep_fp32_wrapper=False)
    ema = {"decay": args.ema_decay, "foreach": accelerator.device.type == "cuda"}
    run.ema = None if args.ema_decay is None else EMAModel(run.trained, **ema)
    if run.resumed:
        load_state(run)
    base, lora = pipe.unet.num_parameters() / 1e6, sum(p.numel() for p in run.trained) / 1e6
    kind = f"{pipe.unet.dtype}, {args.prediction_type}"
    kind += ", zero terminal SNR" if args.rescale_betas_zero_snr else ""
    kind += "" if args.phases == [1] else f", phases {args.phases}"
    length = "streamed" if args.streaming else len(records)
    batch = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated"
    resumed = f", resumed from {run.resumed}" if run.resumed else ""
    shown = f"validation images every {args.validation_steps}"
    shown = shown if run.prompts else "no validation images without --validation_prompts"
    accelerator.print(f"""\
teacher: {base:.2f}M parameters, {kind}; {args.num_ddim_timesteps} DDIM timesteps
LoRA: {len(lora_layers(run.target))} layers of rank {args.lora_rank}, {lora:.2f}M parameters
data: {length} images, in a step {batch} x {accelerator.num_processes} processes
steps: {run.step} to {args.max_train_steps}{resumed}
a checkpoint every {args.checkpointing_steps} steps and at the end, {shown}""")
    return run, records, known.get("", {})


def distil(args):
    """Set up, train, save."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # convolutions
    quiet_libraries()
    launched_by = launch_command()
    run, records, empty = set_up(args)
    accelerator, world = run.accelerator, run.accelerator.num_processes
    (done,) = broadcast_object_list([is_done(run, args) if this_rank() == "0" else None])
    if done:
        accelerator.print(f"nothing left to train: {args.output_dir} holds the LoRA of this step")
        accelerator.end_training()
        return
    stop = Stop(args.max_train_hours, world)
    loader = make_loader(records, empty, args, run.step, accelerator.process_index, world)

    def save():
        """What was trained, where the data end before the run does."""
        if accelerator.is_main_process and run.step:
            save_checkpoint(run, args)

    batches = or_end(loader, save)
    first = list(itertools.islice(batches, 1))  # nothing is written where nothing can be read
    log = Log(run, args)
    try:
        number = train(run, log.timed(itertools.chain(first, batches)), log, stop, args)
    finally:  # a message stands on a line of its own
        log.bar.close()
    if number:
        name = "--max_train_hours" if number == OUT_OF_TIME else signal.Signals(number).name
        if args.resume_from_checkpoint != "latest":
            launched_by += ["--resume_from_checkpoint", "latest"]
        command = shlex.join(launched_by)
        accelerator.print(f"stopped by {name} after step {run.step}; resume with: {command}")
        accelerator.end_training()
        raise SystemExit(128 + number)

    # The end: the last validation images, the LoRA, its card
    if run.ema:
        run.ema.copy_to(run.trained)
    if accelerator.is_main_process:
        if args.validation_prompts:
            print(validate(run, args))
        what = f"--output_dir {args.output_dir}: the LoRA cannot be saved"
        with or_fail(what, "free some space and resume"):
            print(save_lora(run, args.output_dir, args))
            write_card(run, args)
        seconds = round(time.time() - psutil.Process().create_time())
        print(f"finished in {datetime.timedelta(seconds=seconds)}; generate an image with:")
        print(infer_command(args, args.output_dir, *(args.validation_prompts or [])[:1]))
    # Else a gloo thread with a tensor and a rank that exits may wait for each other for ever
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if run.hub:  # without checkpoints, logs and args.json
        files, folder = [LORA_FILE, "unet/*", "validation/*", "README.md"], args.output_dir
        advice = f"`hf upload` sends {folder}, it is whole"
        with or_fail("--push_to_hub: the upload failed", advice):
            place = {"repo_id": args.hub_model_id, "folder_path": folder}
            run.hub.upload_folder(**place, allow_patterns=files)


def less_memory(args):
    """What saves memory and is not done yet."""
    encoded = encoded_folder(args)
    ways = {
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--use_8bit_adam": args.optimizer != "adamw",
        "--quantize_base nf4": args.quantize_base,
        "--vae_encode_batch_size 1": encoded or args.vae_encode_batch_size == 1,
        "encoded data (scripts/encode_data.py)": encoded,
    }
    return " or ".join(["lower --train_batch_size", *(way for way in ways if not ways[way])])


def main(argv=None):
    """The run, and how it ends where it cannot go on."""
    args = parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for flag in IGNORED:
        if vars(args).pop(flag) is not None and this_rank() == "0":
            print(f"warning: --{flag} is ignored: it means nothing here", file=sys.stderr)
    try:
        distil(args)
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):  # as on a CPU
            raise
        fail(f"out of memory ({reason(error)}): {less_memory(args)}", this_rank())
    except KeyboardInterrupt:  # before the first step; later ones are kept for the end of the step
        raise SystemExit(128 + signal.SIGINT) from None
    finally:  # readers of a loader that an error leaves behind
        for reader in multiprocessing.active_children():
            reader.kill()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot encode
    main()
