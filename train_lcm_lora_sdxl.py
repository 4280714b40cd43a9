#!/usr/bin/env python
"""Distil a checkpoint of the SDXL layout (SDXL, SSD-1B, a fine-tune) into an LCM-LoRA: pictures in 1-8 steps, not 25-50.

    accelerate launch train_lcm_lora_sdxl.py --pretrained_teacher_model MODEL --train_data_dir PICTURES --output_dir OUT
    python infer.py --lora OUT --prompt "a red apple" --output apple.png

Algorithm 1 of the LCM-LoRA report (arXiv 2311.05556), in this file's names:

    given a teacher eps, its encoder E, the noise schedule alpha, sigma, and LoRA weights theta
    repeat
        (x, c) ~ data;  z = E(x);  n ~ U;  omega ~ U[w_min, w_max]
        z_nk    = alpha(t_nk) z + sigma(t_nk) noise                            a noisy latent, k timesteps above t_n
        z_hat_n = z_nk + (1 + omega) Psi(z_nk, t_nk, t_n, c) - omega Psi(z_nk, t_nk, t_n, null)      one DDIM step back
        loss    = d( f_theta(z_nk, t_nk, c), stop_gradient(f_theta(z_hat_n, t_n, c)) )
        theta   = theta - learning_rate * gradient of loss

Deliberate differences from the paper:
1. t_nk is drawn from the N = 50 timesteps 19, 39, ... 999 that LCMScheduler visits, and k = 1000 / N = 20.
2. No moving average of the LoRA for the target: theta^- is theta without gradient.
3. omega is not an input of the network: the LoRA learns the mean over the range, so a narrow range is sharper.
4. d is the pseudo-Huber distance sqrt(e^2 + c^2) - c of each latent element; --loss_type l2 is the paper's.

c is the prompt's two encodings, the pooled one, and the picture's size and crop; null replaces the first three.
"""

import argparse
import contextlib
import copy
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from PIL import Image

FAMILY = "sdxl"
USAGE_HINT = "LCM sampler, 4 steps (1 to 8), CFG scale 1"
FORMAT_VERSION = "1"  # of the LoRA file's header and of the caches
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
STATE_FILE = "training_state.pt"
MANIFEST = "manifest.json"  # of a checkpoint: sizes and hashes of its files
BAD_STEPS = 10  # in a row without a finite loss and gradient, which end the run
# What started this process, where that is a launcher: a shell may log out, and the run goes on.
LAUNCHER = os.getppid() if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys() else None
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGHUP
CACHE_ROWS = 1000  # in a file of a cache
TARGET_MODULES = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
)
LR_SCHEDULERS = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial".split()
EMBEDS = {"prompt": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}  # what pipelines call the conditions
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ENCODER_FILES = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "model_index.json")
# Fields of a record in a tar shard, by the endings of its files; the first that a record has is taken.
TAR_IMAGES, TAR_CAPTIONS = "jpg jpeg png webp".split(), "txt text caption json".split()
INTERPOLATION = [kind.name.lower() for kind in Image.Resampling]
# Flags of other LCM-LoRA scripts that nothing here needs, and why.
REFUSED = {
    "cast_teacher_unet": "the teacher shares the student's weights, in the precision of --mixed_precision",
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention is memory-efficient; leave the flag out",
    "encode_batch_size": "captions are encoded with the batch they belong to; leave the flag out",
    "local_rank": "`accelerate launch` tells each process its rank; leave the flag out",
}
# What the keys of a checkpoint in one file begin with.
ONE_FILE_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# kohya's name of the base, by which A1111 files LoRAs, and ModelSpec's, by cross_attention_dim and prediction type.
BASES = {
    (768, "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    (1024, "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    (1024, "v"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    (2048, "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (2048, "v"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
# Where the results go and how they are shown, not what they are: kept out of the LoRA's header.
NOT_IN_HEADER = (
    "output_dir logging_dir cache_dir report_to tracker_project_name resume_from_checkpoint logging_steps "
    "push_to_hub hub_model_id cache_only max_train_hours"
).split()
# Of these it has the last part of a path.
PATHS_IN_HEADER = "train_data_dir dataset_name train_shards_path_or_url lora_path".split()


def this_rank():
    """This process's number among those of the run, as the launcher gives it."""
    return os.environ.get("RANK", "0")


def launch_command():
    """How `accelerate launch` was called, without the script: with its options where the system shows them."""
    try:
        words = Path(f"/proc/{LAUNCHER}/cmdline").read_text().split("\0")
        first = 1 + next(i for i, word in enumerate(words) if word.endswith("launch"))
        return ["accelerate", "launch", *words[first : words.index(sys.argv[0])]]
    except (OSError, StopIteration, ValueError):  # another system, another launcher, or none
        return ["accelerate", "launch"]


def fail(message, rank="0"):
    """End with one line on stderr, from one process, the first unless another is named, and exit status 1."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}" if this_rank() == rank else 1)


def reason(error):
    """The kind of an exception and the first line of its message, without addresses in memory, which tell runs apart."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # says nothing of the error that led to it
        error = error.__cause__ or error
    return re.sub(r" <[^<]* at 0x\w+>", "", f"{type(error).__name__}: {str(error).strip()}".split("\n")[0])


@contextlib.contextmanager
def or_fail(what, advice):
    """A block that ends the run with one line on any error: each library has its own, none is swallowed."""
    try:
        yield
    except Exception as error:
        fail(f"{what} ({reason(error)}); {advice}")


# ---------------------------------------------------------------------------------------------------- 1. Arguments


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` to `high`."""

    def check(text):
        if not low <= kind(text) <= high or kind(text) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give a finite number from {low} to {high}")
        return kind(text)

    check.__name__ = kind.__name__  # argparse names it in its own message
    return check


def parse_args(argv=None):
    """The command line, checked as far as it can be without loading anything."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: fail(re.sub(r"hf_\w+", "***", message))  # perhaps a token after a flag misspelt
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12)

    add = parser.add_argument_group("Model").add_argument
    add("--pretrained_teacher_model", required=True, help="checkpoint to distil: folder, hub id or .safetensors file")
    add("--teacher_config", help="for a teacher in one file: folder or hub id of its configs and tokenizers")
    add("--teacher_revision", "--revision", help="revision of the teacher on the hub")
    add("--variant", help="file variant of the teacher, such as fp16")
    add("--pretrained_vae_model_name_or_path", help="another VAE than the teacher's")
    add("--lora_path", metavar="FILE_OR_FOLDER", help="LoRA to start from, in the naming of any tool")
    add("--lora_rank", type=count, default=64, help="rank of the LoRA layers")
    add("--lora_alpha", type=positive, help="strength: the update is scaled by alpha / rank (default: the rank)")
    add("--lora_dropout", type=share, default=0.0, help="dropout in front of the LoRA layers, 0..1")
    add("--lora_target_modules", default=TARGET_MODULES, help="name endings of the layers that get a LoRA")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a fifth more time")
    add("--quantize_base", choices=["nf4", "int8"], help="the base's linear layers in 4 or 8 bits, the LoRA in float32")

    add = parser.add_argument_group("Data").add_argument
    add("--train_data_dir", help="folder of pictures with metadata.jsonl or metadata.csv (file_name, text)")
    add("--dataset_name", help="hub id, or local folder that `datasets` opens, such as one of parquet files")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--train_shards_path_or_url", metavar="TARS", help="WebDataset shards: folder, glob, {00..99} in path or URL")
    add("--image_column", default="image", help="column of the pictures")
    add("--caption_column", default="text", help="column of the captions; of a list of captions one is drawn")
    add("--streaming", action="store_true", help="read the data as they are needed, never all of them")
    add("--shuffle_buffer_size", type=count, default=1000, help="records among which streamed data are shuffled")
    add("--max_train_samples", type=count, help="use only the first so many pictures")
    add("--strict_data", action="store_true", help="stop at the first record that cannot be used")
    add("--resolution", type=count, help="side of the training pictures in pixels (default: what the teacher draws)")
    add("--interpolation_type", choices=INTERPOLATION, default="lanczos", help="how pictures are resized")
    add("--center_crop", action="store_true", help="crop the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--use_fix_crop_and_size", action="store_true", help="always condition on size --resolution and no crop")
    add("--proportion_empty_prompts", type=share, default=0.0, help="share of captions replaced by the empty one, 0..1")
    add("--cache_latents", action="store_true", help="encode each picture once and keep it on the disk")
    add("--cache_text_embeddings", action="store_true", help="encode each caption once and keep it on the disk")
    add("--cache_only", action="store_true", help="fill these caches and end")
    add("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read pictures (0 = this one)")
    add("--cache_dir", help="where downloads and caches are kept; many machines share one folder")

    add = parser.add_argument_group("Distillation").add_argument
    add("--w_min", type=number(float, -1), default=3.0, help="least omega (guidance scale minus 1) drawn in training")
    add("--w_max", type=number(float, -1), default=15.0, help="largest omega")
    add("--num_ddim_timesteps", type=count, default=50, help="N, steps of the DDIM solver")
    add("--loss_type", choices=["huber", "l2"], default="huber", help="distance d between student and target")
    add("--loss_units", choices=["x0", "output"], default="x0", help="d in units of x0, or of the network's output")
    add("--huber_c", type=positive, default=0.001, help="c of the Huber distance, in units of the latents")
    add("--timestep_scaling_factor", type=positive, default=10.0, help="s of the boundary scalings")
    add("--vae_encode_batch_size", type=count, default=8, help="pictures that the VAE encodes at once")

    add = parser.add_argument_group("Optimisation").add_argument
    add("--train_batch_size", type=count, default=16, help="pictures in a batch, for each process")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches in one optimizer step")
    add("--max_train_steps", type=count, help="optimizer steps (default: what num_train_epochs gives)")
    add("--num_train_epochs", type=count, default=100, help="passes over the data, where max_train_steps is not given")
    add("--learning_rate", type=positive, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the learning rate by processes x accumulation x batch")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="how the learning rate changes")
    add("--lr_warmup_steps", type=number(int, 0), default=0, help="steps of warm-up, for schedulers that have one")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit state")
    add("--paged_adam", action="store_true", help="with it: state moves to the host where the GPU runs short of memory")
    add("--adam_beta1", type=number(float, 0, 0.999999), default=0.9)
    add("--adam_beta2", type=number(float, 0, 0.999999), default=0.999)
    add("--adam_weight_decay", type=number(float, 0), default=0.0)
    add("--adam_epsilon", type=positive, default=1e-8)
    add("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    add("--ema_decay", type=number(float, 0, 0.999999), help="write the moving average of the LoRA, of this decay")

    add = parser.add_argument_group("Runtime").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate` is configured for")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer GPUs")
    add("--torch_compile", action="store_true", help="compile the transformer blocks; the first steps take longer")
    add("--max_train_hours", type=positive, help="then save and stop, as on SIGTERM")
    add("--seed", type=number(int, 0, 2**63), default=0, help="everything random is a function of it")

    add = parser.add_argument_group("Output & tracking").add_argument
    add("--output_dir", default="lcm-lora", help="the LoRA, log.jsonl, args.json, checkpoints, pictures")
    add("--save_precision", choices=["fp32", "fp16", "bf16"], default="fp32", help=f"of {LORA_FILE}; unet/ is fp32")
    add("--checkpointing_steps", type=count, default=500, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=count, help="keep only the newest so many checkpoints")
    add("--resume_from_checkpoint", metavar="FOLDER", help="a checkpoint folder, or `latest` in --output_dir")
    add("--validation_prompts", nargs="+", metavar="PROMPT", help="prompts drawn during training")
    add("--validation_steps", type=count, default=200, help="optimizer steps between those pictures")
    add("--logging_steps", type=count, default=10, help="optimizer steps between writes of the log")
    add("--logging_dir", default="logs", help="folder of the trackers, inside --output_dir")
    add("--report_to", choices=["tensorboard", "wandb", "all", "none"], default="tensorboard", help="trackers")
    add("--tracker_project_name", default="lcm-lora", help="project name shown by the trackers")
    add("--push_to_hub", action="store_true", help="upload LoRA, card and validation pictures at the end")
    add("--hub_model_id", help="repository for them (default: your name and that of --output_dir)")
    add("--hub_token", type=str.strip, help="token with write permission (default: that of `hf auth login`)")

    for flag in REFUSED:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag, why in REFUSED.items():
        if vars(args).pop(flag):
            fail(f"--{flag}: {why}")
    args.lora_alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    name, one_file = args.pretrained_teacher_model, args.pretrained_teacher_model.endswith(".safetensors")
    if Path(name).is_file() and not one_file:
        fail(f"--pretrained_teacher_model {name}: pickled weights are not read; give .safetensors, folder or hub id")
    if args.teacher_config and not one_file:
        fail(f"--teacher_config {args.teacher_config}: only a teacher in one .safetensors file needs it; leave it out")
    for flag in ("hub_token", "hub_model_id"):
        if getattr(args, flag) is not None and not args.push_to_hub:
            fail(f"--{flag}: nothing is uploaded without --push_to_hub; give both or neither")
    if args.w_min > args.w_max:
        fail(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}: omega is drawn from w_min to w_max")
    if [args.train_data_dir, args.dataset_name, args.train_shards_path_or_url].count(None) != 2:
        fail("give one of --train_data_dir (pictures), --dataset_name (hub id, folder), --train_shards_path_or_url")
    if args.cache_latents and not args.center_crop:
        fail("--cache_latents: a picture encoded once has one crop; give --center_crop too")
    if args.cache_only and not (args.cache_latents or args.cache_text_embeddings):
        fail("--cache_only: nothing to cache; give --cache_latents, --cache_text_embeddings or both")
    if args.streaming and (args.cache_latents or args.cache_text_embeddings):
        fail("--streaming: its records have no number to find them by in a cache; leave out one of the two")
    if args.paged_adam and not args.use_8bit_adam:
        fail("--paged_adam: only 8-bit state can be paged; give --use_8bit_adam too")
    if args.streaming and args.max_train_steps is None:
        fail("--streaming: nobody knows how long an epoch is; give --max_train_steps")
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and mistakes at once: the libraries take seconds to load

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs

import accelerate
import datasets
import diffusers
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from braceexpand import braceexpand
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from huggingface_hub import HfApi, ModelCardData
from PIL import ImageOps
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from tqdm.auto import tqdm

# Of the base, by --mixed_precision, and of the LoRA file, by --save_precision.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The columns of the caches; the bytes are tensors as safetensors keeps them.
BYTES, TEXT = datasets.Value("binary"), datasets.Value("string")
CACHED = {"latents": datasets.Features(latents=BYTES, odd=TEXT), "embeddings": datasets.Features(embeddings=BYTES)}


# ------------------------------------------------------------------------- 2. Noise schedule and the DDIM ODE solver


class NoiseSchedule:
    """alpha(t), sigma(t) of a teacher and what follows from them; float32 throughout, t int64 [B] in 0..T-1.

    z_t = alpha(t) z + sigma(t) noise,  alpha^2 + sigma^2 = 1.
    """

    def __init__(self, config, device):
        """`config`: the teacher's scheduler config."""
        self.prediction_type = kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            fail(f"the teacher's prediction_type is {kind!r}: only epsilon and v_prediction can be distilled")
        if "beta_schedule" not in config:
            fail(f"the teacher's scheduler is {config.get('_class_name')}: only schedules of betas can be distilled")
        alpha_bar = DDPMScheduler.from_config(config).alphas_cumprod.double()
        if kind == "epsilon" and alpha_bar[-1] <= 0:
            fail(
                "the teacher's scheduler has prediction_type = 'epsilon' with rescale_betas_zero_snr = true: at the "
                "last timestep nothing is left of the picture to predict it from; such a teacher needs v_prediction"
            )
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

    def output_per_x0(self, t):
        """|d output / d x0| at a given z_t, [B,1,1,1]: alpha / sigma for epsilon, 1 / sigma for v."""
        alpha, sigma = self.at(t)
        return (alpha if self.prediction_type == "epsilon" else 1) / sigma

    def ddim_step(self, output, z_t, t, t_to):
        """z_t + Psi(z_t, t, t_to): one step of the DDIM ODE solver, z_to = alpha(t_to) x0 + sigma(t_to) eps."""
        x0, eps = self.x0_and_eps(output, z_t, t)
        return self.add_noise(x0, eps, t_to)


def ddim_timesteps(steps, total):
    """The solver's timesteps, ascending int64 [steps]: k-1, 2k-1, ..., k = total // steps; 19, 39, ... 999 for 50."""
    return torch.arange(1, steps + 1) * (total // steps) - 1


# ------------------------------------------------------------------------------------- 3. The consistency function


def boundary_scalings(t, timestep_scaling, sigma_data=0.5):
    """c_skip(t), c_out(t), each float32 [B,1,1,1]; c_skip(0) = 1 and c_out(0) = 0 make f the identity at t = 0.

    c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2),  c_out = s t / sqrt((s t)^2 + sigma_data^2)   (LCM paper, eq. 9)
    """
    x = timestep_scaling * t.float()[:, None, None, None]
    return sigma_data**2 / (x**2 + sigma_data**2), x / (x**2 + sigma_data**2).sqrt()


def consistency_function(output, z_t, t, schedule, timestep_scaling):
    """f_theta(z_t, t) = c_skip(t) z_t + c_out(t) x0(output, z_t, t); [B,4,h,w]."""
    c_skip, c_out = boundary_scalings(t, timestep_scaling)
    x0, _ = schedule.x0_and_eps(output, z_t, t)
    return c_skip * z_t + c_out * x0


def distance(a, b, loss_type, huber_c):
    """d(a, b), a scalar: the mean over all elements of e^2 (l2) or sqrt(e^2 + c^2) - c (huber), e = a - b."""
    e2 = (a - b).square()
    return e2.mean() if loss_type == "l2" else ((e2 + huber_c**2).sqrt() - huber_c).mean()


# -------------------------------------------------------------------------------------------------------- 4. Data

# What a random number is for. All are pure functions of (seed, optimizer step, place in the global batch, purpose):
# no two ranks share one, one process draws what many would, and there is no random state to save.
PURPOSES = "order noise timestep guidance posterior caption crop flip dropout".split()


def rng(seed, step, place, purpose):
    """The random generator of one purpose, for one sample of one optimizer step."""
    return np.random.default_rng([seed, step, place, PURPOSES.index(purpose)])


def normal(seed, step, places, purpose, shape):
    """Standard normal float32 [B, *shape], one stream for each sample."""
    draws = [rng(seed, step, place, purpose).standard_normal(shape, np.float32) for place in places]
    return torch.from_numpy(np.stack(draws))


def check_columns(data, args):
    """End the run where a column of the data is not there, or holds something else."""
    for flag, what in ("image_column", "pictures"), ("caption_column", "texts"):
        column = getattr(args, flag)
        if column not in data.column_names:
            fail(f"--{flag} {column}: the data have no such column, only {', '.join(data.column_names)}")
        kind = data.features[column]
        text = getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string", "null")
        if not (isinstance(kind, datasets.Image) if what == "pictures" else text):
            fail(f"--{flag} {column}: a column of {kind}, not of {what}")


def load_records(args):
    """The training records with undecoded pictures: a map-style `datasets.Dataset`, or an iterable one if streamed."""
    sources = {"train_data_dir": args.train_data_dir, "dataset_name": args.dataset_name}
    sources["train_shards_path_or_url"] = args.train_shards_path_or_url
    ((flag, name),) = [(flag, name) for flag, name in sources.items() if name is not None]
    options = {"cache_dir": args.cache_dir, "split": "train", "streaming": args.streaming}
    tars = name if flag == "train_shards_path_or_url" else ""
    if Path(name).is_dir() and any(Path(name).glob("**/*.tar")):
        tars = f"{name}/**/*.tar"
    with or_fail(f"--{flag} {name}: cannot be opened", "give pictures with metadata.jsonl, a dataset, or tars"):
        if tars:
            # `datasets` would take the fields from five records, end at the first text that is not UTF-8, and for a
            # picture take a file of its name in the working directory.
            fields = datasets.Features(dict.fromkeys([*TAR_IMAGES, *TAR_CAPTIONS], BYTES) | {"__key__": TEXT})
            WebDataset.DECODERS = {}
            data = datasets.load_dataset("webdataset", data_files=list(braceexpand(tars)), features=fields, **options)
        elif Path(name, "dataset_info.json").exists():  # written by save_to_disk
            data = datasets.load_from_disk(name)
            data = data.to_iterable_dataset() if args.streaming else data
        elif flag == "dataset_name":
            data = datasets.load_dataset(name, args.dataset_config_name, **options)
        else:
            data = datasets.load_dataset("imagefolder", data_dir=name, **options)
    if data.features is None:
        fail(f"--{flag} {name}: streamed, its columns are not known; leave out --streaming")
    if not tars:
        check_columns(data, args)
    pictures = TAR_IMAGES if tars else [args.image_column]
    data = data.select_columns([*pictures, *([*TAR_CAPTIONS, "__key__"] if tars else [args.caption_column])])
    for column in pictures:
        data = data.cast_column(column, datasets.Image(decode=False))
    if args.streaming:
        return data.take(args.max_train_samples) if args.max_train_samples else data
    data = data.select(range(len(data))[: args.max_train_samples])
    if len(data) == 0:
        fail(f"--{flag} {name}: it holds no pictures")
    return data


class UnusableRecord(Exception):
    """A record that cannot be trained on: its name and why."""


@contextlib.contextmanager
def or_unusable(name):
    """A block in which any error makes a record odd: nobody can list what a broken file leads Pillow to."""
    try:
        yield
    except Exception as error:
        raise UnusableRecord(f"{name} ({reason(error)})") from error


def captions_of(record, name, args):
    """The captions of a record, one or more; a missing one is the empty caption. UnusableRecord if one is no text."""
    column = next((name for name in (args.caption_column, *TAR_CAPTIONS) if record.get(name) is not None), None)
    with or_unusable(name):
        value = json.loads(record["json"])[args.caption_column] if column == "json" else record.get(column)
        texts = value if isinstance(value, list) else [value]
        texts = [text.decode("utf-8-sig") if isinstance(text, bytes) else text for text in texts if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a caption is no text")
        "".join(texts).encode()  # not half a surrogate pair, which no tokenizer takes
        return [text.strip() for text in texts] or [""]


def open_image(record):
    """A `datasets` picture record as an upright RGB image; transparent parts become white."""
    if not record:
        raise ValueError("no picture")
    picture = datasets.Image().decode_example(record)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        picture = picture.point(lambda tone: tone / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def image_of(record, args):
    """The undecoded picture of a record, or None."""
    return next((record[name] for name in (args.image_column, *TAR_IMAGES) if record.get(name)), None)


def name_of(record, row, args):
    """What a record is called in messages: its picture's file, its key in a tar shard, or its row."""
    return (image_of(record, args) or {}).get("path") or record.get("__key__") or f"row {row}"


def open_record(record, row, args):
    """(Upright RGB picture, its captions), or UnusableRecord."""
    name = name_of(record, row, args)
    with or_unusable(name):
        picture = open_image(image_of(record, args))
    return picture, captions_of(record, name, args)


def resize_and_crop(picture, side, place, flip, interpolation):
    """The shorter side becomes `side`; mirrored if `flip`; a square is cut out at `place` = (x, y), each 0..1.

    Returns the square and its left and top edge in the resized, mirrored picture, in pixels. No more than the square is
    resized: a strip of 40,000 x 10 pixels would else become one of 2,000,000 x 512.
    """
    scale = side / min(picture.size)
    size = [max(side, round(s * scale)) for s in picture.size]
    left, top = (round(p * (s - side)) for p, s in zip(place, size, strict=True))
    x, y = size[0] - side - left if flip else left, top  # of the square before it is mirrored
    x_scale, y_scale = (old / new for old, new in zip(picture.size, size, strict=True))
    box = (x * x_scale, y * y_scale, (x + side) * x_scale, (y + side) * y_scale)
    square = picture.resize((side, side), Image.Resampling[interpolation.upper()], box)
    return ImageOps.mirror(square) if flip else square, left, top


def prepare_image(picture, place, flip, args):
    """A training picture as what the step needs of it.

    pixels [3,H,W] in -1..1; time_ids, SDXL's conditioning on size: height and width of the picture as it was, top and left
    of the crop in the resized (and mirrored) picture, height and width of the crop; all in pixels.
    """
    side, (width, height) = args.resolution, picture.size
    square, left, top = resize_and_crop(picture, side, place, flip, args.interpolation_type)
    if args.use_fix_crop_and_size:
        height, width, top, left = side, side, 0, 0
    pixels = VaeImageProcessor(do_resize=False).preprocess(square)[0]
    return {"pixels": pixels, "time_ids": torch.tensor([height, width, top, left, side, side])}


def make_sample(record, row, step, place, embeddings, args):
    """A record as a training sample, or UnusableRecord. All that is random about it is a function of (step, place)."""
    crop, flip, caption = (rng(args.seed, step, place, purpose).random(2) for purpose in ("crop", "flip", "caption"))
    crop = (0.5, 0.5) if args.center_crop else crop
    flip, name = args.random_flip and flip[0] < 0.5, name_of(record, row, args)
    if "latents" in record:  # from the cache, as `encode_records` makes them
        if record["unusable"]:
            raise UnusableRecord(record["unusable"])
        sample, captions = load(record["latents"]), captions_of(record, name, args)
        mirrored = sample.pop("mirrored", None)
        sample["moments"] = mirrored if flip else sample["moments"]
    else:
        picture, captions = open_record(record, row, args)
        sample = prepare_image(picture, crop, flip, args)
    text = "" if caption[0] < args.proportion_empty_prompts else captions[int(caption[1] * len(captions))]
    sample |= embeddings[text] if embeddings else {}
    return sample | {"caption": text, "place": place, "name": name}


class Samples(torch.utils.data.Dataset):
    """Training samples by (optimizer step, place in the global batch), from one endless stream of seeded shuffles.

    Step s reads positions [s G, (s + 1) G) of the stream, G the global batch; epoch e of the stream is a permutation of
    all records. An unusable record is replaced by the next good one and named in the sample.
    """

    def __init__(self, records, embeddings, args, global_batch):
        self.records, self.embeddings, self.args, self.global_batch = records, embeddings, args, global_batch
        self.epoch, self.order = None, None

    def __getitem__(self, step_and_place):
        step, place = step_and_place
        epoch, index = divmod(step * self.global_batch + place, len(self.records))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, rng(self.args.seed, epoch, 0, "order").permutation(len(self.records))
        odd = []
        for i in range(len(self.records)):
            row = int(self.order[(index + i) % len(self.records)])
            try:
                with or_unusable(f"row {row}"):  # such as a text that is not UTF-8
                    record = self.records[row]
                return make_sample(record, row, step, place, self.embeddings, self.args) | {"unusable": odd}
            except UnusableRecord as error:
                odd.append(str(error))
        return {"unusable": odd}


class Stream(torch.utils.data.IterableDataset):
    """The training samples of one rank from streamed records without end; each epoch is shuffled anew, in a buffer.

    Worker w of W makes the rank's batches w, w + W, ... Those in front of `first_batch` were used before the run was
    stopped: they are read over, undecoded. An unusable record is replaced by the next good one and named in the sample.
    """

    def __init__(self, records, args, first_batch, rank, world):
        self.records, self.args, self.first_batch = records, args, first_batch
        self.rank, self.world = rank, world

    def shuffled(self, epoch):
        """The rank's records of an epoch. Not by `set_epoch`: the workers share that number, and may be in two epochs."""
        order, size = rng(self.args.seed, epoch, 0, "order"), self.args.shuffle_buffer_size
        return split_dataset_by_node(self.records.shuffle(generator=order, buffer_size=size), self.rank, self.world)

    def read(self, epoch):
        """The same, with an error of reading as UnusableRecord, which is handed on from a worker."""
        with or_unusable("the streamed data cannot be read on; is a shard cut off?"):
            yield from self.shuffled(epoch)

    def __iter__(self):
        info, args = torch.utils.data.get_worker_info(), self.args
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        size, parts = args.train_batch_size, args.gradient_accumulation_steps
        skip, position, waiting, odd = self.first_batch // workers * size, 0, [], []
        for epoch in itertools.count():
            first = position
            for record in self.read(epoch):
                position += 1
                if position <= skip:
                    continue
                batch, i = divmod(position - 1, size)
                step, micro = divmod(batch * workers + worker, parts)
                waiting.append((step, (self.rank * parts + micro) * size + i))
                try:
                    while waiting:
                        yield make_sample(record, position, *waiting[0], None, args) | {"unusable": odd}
                        waiting.pop(0)
                        odd = []
                except UnusableRecord as error:
                    odd.append(str(error))
            if len(waiting) >= position - first:  # not one good record in all of the epoch
                yield from ({"unusable": odd} for _ in range(size))


def collate(samples):
    """A batch: tensors stacked, else lists; `odd` names the records that were replaced. Without a good one just that."""
    odd = [why for sample in samples for why in sample.pop("unusable")]
    if not all(samples):
        return {"unusable": odd}
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {k: torch.stack(v) if torch.is_tensor(v[0]) else v for k, v in batch.items()} | {"unusable": odd}


def check_batch(batch, args):
    """End the run where no record can be used or, with --strict_data, one cannot."""
    if "place" not in batch:
        first = f", the first: {batch['unusable'][0]}" if batch["unusable"] else ""
        fail(f"not one record of the data can be used{first}", this_rank())
    if args.strict_data and batch["unusable"]:
        fail(f"--strict_data: {batch['unusable'][0]}; mend or remove it", this_rank())


def ignore_signals(_):
    """For a reader: a signal to the whole job is the trainer's affair, which needs its readers to the end of the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def or_end(batches):
    """Streamed batches; the run ends with one line where the data cannot be read on."""
    try:
        yield from batches
    except UnusableRecord as error:  # of a worker: the last line, under its traceback
        fail(str(error).strip().split("\n")[-1].split("UnusableRecord: ")[-1], this_rank())


def make_loader(records, embeddings, args, first_step, rank, world):
    """One batch for each micro-step of this rank from `first_step` on; ranks and micro-steps take contiguous parts."""
    size, parts, workers = args.train_batch_size, args.gradient_accumulation_steps, args.dataloader_num_workers
    batches = (
        [(step, (rank * parts + micro) * size + i) for i in range(size)]
        for step in range(first_step, args.max_train_steps)
        for micro in range(parts)
    )
    options = {"collate_fn": collate, "num_workers": workers, "worker_init_fn": ignore_signals}
    if not args.streaming:
        samples = Samples(records, embeddings, args, size * parts * world)
        return torch.utils.data.DataLoader(samples, batch_sampler=batches, **options)
    stream = Stream(records, args, first_step * parts, rank, world)
    options["num_workers"] = min(workers, stream.shuffled(0).num_shards, args.max_train_samples or workers)
    loader = torch.utils.data.DataLoader(stream, batch_size=size, **options)
    start = first_step * parts % max(1, options["num_workers"])  # the workers before this one have had their turn
    return or_end(itertools.islice(loader, start, start + max(0, args.max_train_steps - first_step) * parts))


# ------------------------------------------------------------------------------------------------------ 5. Models


def teacher_parts(args):
    """The parts that the teacher has, such as unet and text_encoder; for one file each as often as it has tensors."""
    name = args.pretrained_teacher_model
    if name.endswith(".safetensors"):
        with safe_open(name, "pt") as file:
            keys = file.keys()
        return [part for key in keys for start, part in ONE_FILE_PARTS.items() if key.startswith(start)]
    index = DiffusionPipeline.load_config(name, revision=args.teacher_revision, cache_dir=args.cache_dir)
    return [part for part, value in index.items() if isinstance(value, list) and value[0]]


def open_vae(name, cached, dtype, **options):
    """A VAE; where its latents are cached without weights: only its config is needed."""
    if not cached:
        return AutoencoderKL.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
    with torch.device("meta"):
        return AutoencoderKL.from_config(AutoencoderKL.load_config(name, **options))


def open_teacher(pipeline_class, needed, args, dtype, cached, **options):
    """The teacher, from a folder, the hub or one file, and perhaps with another VAE; without weights of `cached` parts."""
    name, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    common, flag = {"cache_dir": args.cache_dir, "dtype": dtype}, f"--pretrained_teacher_model {name}"
    advice = "give a diffusers folder with safetensors weights or a hub id"
    if vae:
        with or_fail(f"--pretrained_vae_model_name_or_path {vae}: cannot be loaded", advice):
            options["vae"] = open_vae(vae, "vae" in cached, **common)
    common["revision"] = args.teacher_revision
    options |= common
    with or_fail(f"{flag}: cannot be loaded", f"{advice}, or a .safetensors file"):
        parts = teacher_parts(args)
        if needed != {"unet", "text_encoder", "text_encoder_2"} & set(parts):
            has, wanted = (", ".join(sorted(set(names))) or "nothing known" for names in (parts, needed))
            other = "train_lcm_lora_sd15.py" if FAMILY == "sdxl" else "train_lcm_lora_sdxl.py"
            fail(f"{flag}: it has {has}, not just {wanted}; it may be a teacher for {other}")
        if "vae" not in [*parts, *options]:
            fail(f"{flag}: it holds no VAE; name one with --pretrained_vae_model_name_or_path")
        if not name.endswith(".safetensors"):
            options |= dict.fromkeys(part for part in cached if part in needed)
            if "vae" in {*cached} - {*options}:
                options["vae"] = open_vae(name, True, subfolder="vae", **common)
            return pipeline_class.from_pretrained(name, variant=args.variant, use_safetensors=True, **options)
    advice = "give the folder or hub id of configs and tokenizers of just this kind of model as --teacher_config"
    with or_fail(f"{flag} with --teacher_config {args.teacher_config or 'not given'}: cannot be loaded", advice):
        pipe = pipeline_class.from_single_file(name, config=args.teacher_config, **options)
        # The weights in the file are those of the pipeline, none left over and none never filled.
        modules = [m for part, m in pipe.components.items() if part not in cached and isinstance(m, torch.nn.Module)]
        empty = any(p.is_meta for module in modules for p in module.parameters())
        if empty or parts.count("unet") != len(pipe.unet.state_dict()):
            raise ValueError("the file does not hold just the tensors that these configs speak of")
        for part in needed & {*cached}:
            setattr(pipe, part, None)
        return pipe


def load_teacher(args, dtype, cached=()):
    """The teacher as a pipeline in its final precision, without its `cached` parts."""
    pipe = open_teacher(StableDiffusionXLPipeline, {"unet", "text_encoder", "text_encoder_2"}, args, dtype, cached)
    if dtype == torch.float16 and pipe.vae and pipe.vae.config.force_upcast:
        pipe.vae.float()  # SDXL's first VAE overflows in fp16; the fp16-fix one does not, and says so in its config
    return pipe


def quantize_linears(unet, kind):
    """Put the frozen linear layers of the UNet's transformers into 4 bits (NF4) or 8; they are quantized as they move."""
    import bitsandbytes

    nn, dtype = bitsandbytes.nn, unet.dtype
    for path, old in list(unet.named_modules()):
        if not isinstance(old, torch.nn.Linear) or ".attentions." not in path:
            continue
        size = old.in_features, old.out_features, old.bias is not None
        if kind == "nf4":
            new = nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = nn.Params4bit(old.weight.data, False, quant_type="nf4", module=new)
        else:
            new = nn.Linear8bitLt(*size, has_fp16_weights=False, device="meta")
            new.weight = nn.Int8Params(old.weight.data, False, has_fp16_weights=False)
        new.bias = old.bias
        unet.set_submodule(path, new)  # in training mode: else it would repack the shared weights on some CPUs


def share_weights(unet):
    """Another UNet object over the very same Parameter and buffer objects: what is added to one is not in the other."""
    shared = [*unet.parameters(), *unet.buffers()]
    for module in unet.modules():  # the scales of quantized ones
        shared += [vars(module)[name] for name in ("quant_state", "state") if vars(module).get(name)]
    return copy.deepcopy(unet, {id(thing): thing for thing in shared})


def attach_lora(unet, args):
    """Add LoRA layers to the UNet, float32 whatever the base is; only they are trained."""
    targets = args.lora_target_modules.replace(",", " ").split()
    strength = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    torch.manual_seed(args.seed)
    with or_fail("--lora_target_modules: no such layers", "give endings of the names of linear and conv layers"):
        unet.add_adapter(peft.LoraConfig(target_modules=targets, **strength))
    cast_training_params(unet, dtype=torch.float32)
    return unet


def make_student(pipe, args, device, waiting=()):
    """Freeze the teacher's models and put them on the device, save `waiting` ones; the student: its UNet with a LoRA."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            # convolutions are faster with the channels last
            part.requires_grad_(False).eval().to(memory_format=torch.channels_last)
            if name == "unet" and args.quantize_base:
                quantize_linears(part, args.quantize_base)
            part.float() if name in waiting else part.to(device)
    for module in pipe.unet.modules():
        if hasattr(module, "init_8bit_state"):  # of --quantize_base int8
            module.init_8bit_state()  # takes the scales from the weight, so only once
    student = attach_lora(share_weights(pipe.unet), args).to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.torch_compile:
        torch._dynamo.config.recompile_limit = 32  # widths of the blocks x teacher, target, student; else it gives up
        for unet in (pipe.unet, student):
            unet.compile_repeated_blocks()  # one code for all blocks of a width: seconds, not minutes
    return student


@torch.no_grad()
def encode_captions(pipe, captions):
    """What the prompt conditions the UNet on, as the pipeline makes it: {"prompt": [B,L,D], "text_embeds": [B,P]}."""
    device = pipe.text_encoder.device
    prompt, _, pooled, _ = pipe.encode_prompt(captions, None, device, 1, False)
    if pipe.config.force_zeros_for_empty_prompt:
        given = torch.tensor([bool(caption) for caption in captions], device=device)
        prompt, pooled = prompt * given[:, None, None], pooled * given[:, None]
    return {"prompt": prompt, "text_embeds": pooled}


@torch.no_grad()
def encode_images(vae, pixels, batch_size):
    """Pixels [B,3,H,W] in -1..1 -> mean and log variance of the posteriors of their latents, [B,8,h,w]."""
    parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in pixels.split(batch_size)]
    return torch.cat([posterior.parameters for posterior in parts])


def sample_posterior(moments, noise, scaling_factor):
    """z [B,4,h,w] float32: mean + standard deviation x noise, times the VAE's scaling factor."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling_factor


def conditions(pipe, batch, device):
    """All that the UNet gets beside z and t, {name: [B,...]}: the encoded captions, for SDXL the sizes too."""
    given = {name: batch[name].to(device) for name in ("prompt", "text_embeds", "time_ids") if name in batch}
    return given if "prompt" in batch else encode_captions(pipe, batch["caption"]) | given


def predict(unet, z_t, t, c):
    """The UNet's output at (z_t, t) given the conditions c, [B,4,h,w] float32, computed in the base's precision."""
    dtype = next(unet.parameters()).dtype
    added = {name: value for name, value in c.items() if name != "prompt"}
    with torch.autocast(z_t.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return unet(z_t.to(dtype), t, c["prompt"], added_cond_kwargs=added).sample.float()


# The files of a cache lie in --cache_dir and bear the hash of all that their content depends on: later runs use them again
# and load no model of that kind.


def identity(name, parts, args):
    """What tells the weights of a model's parts from others': a hash of their files, of a hub id its commit."""
    path = Path(name)
    if not path.exists():
        kind = AutoencoderKL if name == args.pretrained_vae_model_name_or_path else DiffusionPipeline
        options = {"revision": args.teacher_revision} if kind is DiffusionPipeline else {}
        options |= {"cache_dir": args.cache_dir, "return_commit_hash": True}
        return f"{name} {args.variant} {kind.load_config(name, **options)[-1]}"
    found = [path] if path.is_file() else [file for part in parts for file in [path / part, *(path / part).rglob("*")]]
    about = [str(args.variant), *sorted(f"{file.name} {file_digest(file)}" for file in found if file.is_file())]
    if path.is_file() and args.teacher_config:
        about.append(identity(args.teacher_config, parts, args))
    return " ".join(about)


def file_digest(path):
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def open_cache(kind, parts, encode, about, args, accelerator):
    """The rows of `parts` encoded and memory-mapped, a file for each part; `encode` makes those that are not there.

    A file gets its name when it is whole, so a kill costs one at most; the processes make them in turn.
    """
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "lcm_lora")
    keys = [json.dumps([FORMAT_VERSION, args.mixed_precision, about, part._fingerprint]) for part in parts]
    files = [folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow" for key in keys]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    files, missing = broadcast_object_list([files, missing])  # rank 0 speaks for all
    rows = sum(map(len, parts))
    accelerator.print(f"cache of {rows} {kind}: {len(files) - len(missing)} of {len(files)} files are in {folder}")
    if missing:
        with or_fail(f"--cache_dir {folder}: it cannot be made", "name another"):
            folder.mkdir(parents=True, exist_ok=True)
        wanted = {"vae"} if kind == "latents" else {*TEXT_ENCODERS}
        pipe = load_teacher(args, DTYPES[args.mixed_precision], {"unet", "vae", *TEXT_ENCODERS} - wanted)
        for name in wanted & pipe.components.keys():
            getattr(pipe, name).requires_grad_(False).eval().to(accelerator.device)
        options = {"features": CACHED[kind], "writer_batch_size": 100}
        options |= {"batched": True, "batch_size": args.vae_encode_batch_size, "remove_columns": parts[0].column_names}
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        for i in tqdm(mine, kind, unit="file", disable=not accelerator.is_main_process, dynamic_ncols=True):
            given = {"fn_kwargs": {"first_row": sum(map(len, parts[:i])), "pipe": pipe, "args": args}}
            given |= {"cache_file_name": str(files[i]), "new_fingerprint": files[i].stem}
            try:
                parts[i].map(encode, True, **given, **options)
            except OSError as error:
                fail(f"--cache_dir {folder}: {reason(error)}; free some space or name another", this_rank())
        accelerator.wait_for_everyone()
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def as_rows(tensors):
    """{name: tensor [B,...]} as B texts of bytes."""
    rows = [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]
    return [save({name: value.cpu().contiguous() for name, value in row.items()}) for row in rows]


def encode_texts(batch, rows, first_row, pipe, args):
    """A batch of captions as rows of a cache."""
    return {"embeddings": as_rows(encode_captions(pipe, batch["caption"]))}


def encode_records(batch, rows, first_row, pipe, args):
    """A batch of records as rows of a cache: what `make_sample` makes of the middle of the picture, or why it cannot."""
    samples, odd = [], []
    for values, row in zip(zip(*batch.values(), strict=True), rows, strict=True):
        try:
            record = dict(zip(batch, values, strict=True))
            with or_unusable(name_of(record, first_row + row, args)):
                picture = open_image(image_of(record, args))
            turns = [prepare_image(picture, (0.5, 0.5), flip, args) for flip in (False, True)[: 1 + args.random_flip]]
            samples.append(turns[0] | {"pixels": torch.stack([turn["pixels"] for turn in turns])})
            odd.append(None)
        except UnusableRecord as error:
            odd.append(str(error))
    latents = iter(())
    if samples:
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        moments = encode_images(pipe.vae, tensors.pop("pixels").flatten(0, 1), args.vae_encode_batch_size)
        moments = moments.unflatten(0, (len(samples), -1)).unbind(1)
        latents = iter(as_rows(tensors | dict(zip(("moments", "mirrored"), moments, strict=False))))
    return {"latents": [None if why else next(latents) for why in odd], "unusable": odd}


def drop_images(records):
    """The records without their pictures, which are not even read."""
    return records.remove_columns([name for name, kind in records.features.items() if isinstance(kind, datasets.Image)])


class Embeddings:
    """What the UNet is conditioned on, by caption: {"prompt": [L,D], ...} from a cache."""

    def __init__(self, captions, rows):
        self.row, self.rows = {caption: i for i, caption in enumerate(captions)}, rows

    def __getitem__(self, caption):
        return load(self.rows[self.row[caption]]["embeddings"])


def cache_embeddings(records, args, accelerator):
    """The embeddings of all captions of the records, of the empty one and of the validation prompts."""
    about, found = identity(args.pretrained_teacher_model, ENCODER_FILES, args), set()
    texts = drop_images(records)
    for row in range(len(texts)):
        with contextlib.suppress(UnusableRecord), or_unusable(f"row {row}"):  # it is named when the training meets it
            record = texts[row]
            found |= {*captions_of(record, name_of(record, row, args), args)}
    captions, prompts = sorted(found), ["", *(args.validation_prompts or [])]
    lists = [captions[i : i + CACHE_ROWS] for i in range(0, len(captions), CACHE_ROWS)] + [prompts]
    parts = [datasets.Dataset.from_dict({"caption": some}) for some in lists]
    return Embeddings([*captions, *prompts], open_cache("embeddings", parts, encode_texts, about, args, accelerator))


def cache_latents(records, args, accelerator):
    """The records with the moments of their latents in place of their pictures."""
    vae, rows = args.pretrained_vae_model_name_or_path, range(len(records))
    about = [identity(vae or args.pretrained_teacher_model, ["." if vae else "vae"], args), args.resolution]
    about += [args.interpolation_type, args.random_flip, vars(args).get("use_fix_crop_and_size")]
    pictures = records.remove_columns(sorted({args.caption_column, *TAR_CAPTIONS} & {*records.features}))
    parts = [pictures.select(rows[i : i + CACHE_ROWS]) for i in rows[::CACHE_ROWS]]
    latents = open_cache("latents", parts, encode_records, about, args, accelerator)
    if len(odd := latents.data.column("unusable").drop_null()):
        accelerator.print(f"warning: {len(odd)} unusable records in the cache, the first: {odd[0]}", file=sys.stderr)
    return datasets.concatenate_datasets([drop_images(records), latents], axis=1)


# -------------------------------------------------------------------------------------- 6. The distillation step


@torch.no_grad()
def sample_batch(pipe, batch, c_null, timesteps, step, args):
    """(x, c) ~ data, z = E(x), n ~ U, omega ~ U[w_min, w_max]; what `distillation_loss` takes, from z to omega."""
    places, device, vae = batch["place"], timesteps.device, pipe.vae
    torch.manual_seed(int(rng(args.seed, step, places[0], "dropout").integers(2**63)))  # LoRA dropout draws from torch
    side = args.resolution // pipe.vae_scale_factor
    shape = (vae.config.latent_channels, side, side)
    cached = batch.get("moments")
    moments = encode_images(vae, batch["pixels"], args.vae_encode_batch_size) if cached is None else cached
    posterior_noise = normal(args.seed, step, places, "posterior", shape).to(device)
    z = sample_posterior(moments.to(device), posterior_noise, vae.config.scaling_factor)
    c = conditions(pipe, batch, device)
    c_null = c | {name: value.expand(len(places), *value.shape[1:]) for name, value in c_null.items()}
    noise = normal(args.seed, step, places, "noise", shape).to(device)
    t_nk = timesteps[[int(rng(args.seed, step, place, "timestep").integers(len(timesteps))) for place in places]]
    omega = [rng(args.seed, step, place, "guidance").uniform(args.w_min, args.w_max) for place in places]
    return z, c, c_null, noise, t_nk, torch.tensor(omega, dtype=torch.float32, device=device)[:, None, None, None]


def distillation_loss(teacher, student, target, z, c, c_null, noise, t_nk, omega, schedule, args):
    """Algorithm 1 for one batch: the scalar loss d(f_theta(z_nk, t_nk), f_theta^-(z_hat_n, t_n)).

    z, noise [B,4,h,w]; c, c_null: conditions, [B,...] each; t_nk int64 [B]; omega [B,1,1,1]; all float32.
    `student` and `target` are one network; `target` is the bare module, which takes no part in gradient exchange.
    """
    skip_k = len(schedule.alpha) // args.num_ddim_timesteps
    s = args.timestep_scaling_factor
    # t_n, k timesteps below t_{n+k}; the lowest step ends at t = 0, where f is the identity
    t_n = (t_nk - skip_k).clamp(min=0)
    # z_{t_{n+k}} ~ N(alpha z, sigma^2 I)
    z_nk = schedule.add_noise(z, noise, t_nk)
    with torch.no_grad():
        # the teacher with and without the prompt, in one batch of 2B
        both = {name: torch.cat([c[name], c_null[name]]) for name in c}
        out_c, out_null = predict(teacher, torch.cat([z_nk, z_nk]), torch.cat([t_nk, t_nk]), both).chunk(2)
        # z_hat_n = z_nk + (1 + omega) Psi(c) - omega Psi(null): Psi is affine in the output, so guide that, then step
        z_hat_n = schedule.ddim_step(out_c + omega * (out_c - out_null), z_nk, t_nk, t_n)
        # f_theta^-(z_hat_n, t_n, c), no gradient
        f_target = consistency_function(predict(target, z_hat_n, t_n, c), z_hat_n, t_n, schedule, s)
    # f_theta(z_nk, t_nk, c), last: its activations are the only ones ever held
    f_student = consistency_function(predict(student, z_nk, t_nk, c), z_nk, t_nk, schedule, s)
    # d(f_theta, f_theta^-); in units of x0 t = 999 weighs twenty times as much as t = 259, in those of the output the same
    unit = schedule.output_per_x0(t_nk) if args.loss_units == "output" else 1.0
    return distance(unit * f_student, unit * f_target, args.loss_type, args.huber_c)


# ---------------------------------------------------------------------------- 7. Saving, checkpoints, validation


def lora_layers(unet):
    """{module path: (A, B, scaling)} of every LoRA layer in the UNet, whatever its adapter is called."""
    found = [(path, m, *m.lora_A) for path, m in unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return {path: (m.lora_A[name].weight, m.lora_B[name].weight, m.scaling[name]) for path, m, name in found}


def base_name(name):
    """A hub id as it is, the last part of a local path."""
    return Path(name).resolve().name if Path(name).exists() or Path(name).is_absolute() else name


def header(pipe, args, step):
    """The LoRA file's metadata: what it was made from and how. No time and no output path, so equal runs are equal."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_IN_HEADER}
    settings |= {k: base_name(settings[k]) for k in PATHS_IN_HEADER if settings[k]}
    base, rank, alpha = args.pretrained_teacher_model, args.lora_rank, args.lora_alpha
    about = {"format": "pt", "lcm_lora_version": FORMAT_VERSION, "base_model": base, "family": FAMILY, "step": step}
    about |= {"rank": rank, "alpha": alpha, "num_ddim_timesteps": args.num_ddim_timesteps}
    about |= {"w_min": args.w_min, "w_max": args.w_max, "training_args": json.dumps(settings, sort_keys=True)}
    # What ComfyUI, A1111/Forge and kohya's tools show: ModelSpec's fields and those of kohya's scripts
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon").removesuffix("_prediction")
    about |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers"}
    about |= {"modelspec.title": f"LCM-LoRA of {base_name(base)}", "modelspec.prediction_type": prediction}
    about |= {"modelspec.resolution": f"{args.resolution}x{args.resolution}", "modelspec.usage_hint": USAGE_HINT}
    about |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha, "ss_steps": step}
    about |= {"ss_sd_model_name": base_name(base), "ss_learning_rate": args.learning_rate}
    about["ss_mixed_precision"] = args.mixed_precision
    unet = pipe.unet.config
    if known := BASES.get((unet.cross_attention_dim, prediction)):  # other sizes, such as the demo's, are no known base
        about |= {"ss_base_model_version": known[0], "ss_v2": known[0].startswith("sd_v2")}
        # A1111 files SSD-1B under SDXL; its architecture is another.
        about |= {} if unet.reverse_transformer_layers_per_block else {"modelspec.architecture": f"{known[1]}/lora"}
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in about.items()}


def read_lora(pipe, teacher, path, what, advice):
    """The LoRA in a file, in the naming of any tool, as diffusers puts it on a UNet like the teacher: `lora_layers`."""
    with or_fail(f"{what} {path}: no LoRA that can be read", advice):
        with safe_open(path, "pt") as file:
            tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if not tensors or not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("a tensor of it is NaN or infinite" if tensors else "it is empty")
        weights = sum(not key.endswith(".alpha") for key in tensors)
        # PEFT keeps rank and alpha in a file beside it, diffusers in the header, kohya in tensors
        config = json.loads(about.get("lora_adapter_metadata", "null"))
        if path.name == PEFT_FILE:
            config = {f"unet.{k}": v for k, v in peft.LoraConfig.from_pretrained(path.parent).to_dict().items()}
        # One naming for all: diffusers goes by that of the first key and drops what is named otherwise
        if not any(key.startswith("lora_") for key in tensors):
            bare = {key.removeprefix("unet.").removeprefix("base_model.model."): key for key in tensors}
            tensors = convert_unet_state_dict_to_peft({f"unet.{name}": tensors[key] for name, key in bare.items()})
        # Without base weights: no memory is taken, and the layers stay as precise as the file whatever the teacher is
        blank = {id(p): torch.nn.Parameter(torch.zeros(()).expand(p.shape), False) for p in teacher.parameters()}
        reader = copy.deepcopy(teacher, blank)
        state, alphas = pipe.lora_state_dict(tensors, unet_config=reader.config)
        pipe.load_lora_into_unet(state, alphas, reader, metadata=config, low_cpu_mem_usage=True)
        layers = lora_layers(reader)
        if 2 * len(layers) != weights:
            raise ValueError(f"{len(layers)} of its {weights / 2:g} layers are layers of this teacher")
        # diffusers gives some layers the alpha of others where alphas differ
        read = sorted(len(a) * scaling for a, _, scaling in layers.values())
        if alphas and not np.allclose(sorted(alphas.values()), read):
            raise ValueError("its layers differ in alpha, which diffusers does not read")
        return layers


@torch.no_grad()
def load_lora(pipe, teacher, student, source, flag):
    """Put the weights of a LoRA into the student; B is scaled so that under another alpha the update is the same."""
    names = ("unet/" + PEFT_FILE, PEFT_FILE, LORA_FILE)  # the most precise first
    path = next((Path(source, name) for name in names if Path(source, name).exists()), Path(source))
    advice = f"give a .safetensors file of this kind of teacher, or a folder with {LORA_FILE} or {PEFT_FILE}"
    loaded, live = read_lora(pipe, teacher, path, flag, advice), lora_layers(student)
    given, wanted = ({name: len(a) for name, (a, _, _) in layers.items()} for layers in (loaded, live))
    if given != wanted:
        endings = {next(e for e in [*TARGET_MODULES.split(), name] if f".{name}".endswith(f".{e}")) for name in given}
        rank = " or ".join(map(str, sorted(set(given.values()))))
        fits = f"--lora_rank {rank} --lora_target_modules '{' '.join(sorted(endings))}'"
        fail(f"{flag} {path}: its {len(given)} layers and their rank are not those of this run; give {fits}")
    for name, (a, b, scaling) in live.items():
        a.copy_(loaded[name][0])
        b.copy_(loaded[name][1] * (loaded[name][2] / scaling))


def save_lora(pipe, teacher, student, folder, args, step):
    """Write the LoRA file and the PEFT folder, then read the file back as a user's pipeline would and compare."""
    layers, dtype = lora_layers(student), DTYPES[args.save_precision]
    file, peft_folder = folder / LORA_FILE, folder / "unet"
    kohya, prefixed = {}, {}
    for path, (a, b, _) in layers.items():
        a, b = (weight.detach().cpu().contiguous() for weight in (a, b))
        key = "lora_unet_" + path.replace(".", "_")
        kohya |= {f"{key}.lora_down.weight": a.to(dtype), f"{key}.lora_up.weight": b.to(dtype)}
        kohya[f"{key}.alpha"] = torch.tensor(float(args.lora_alpha))
        prefixed |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    peft_folder.mkdir(parents=True, exist_ok=True)
    about = header(pipe, args, step)
    save_file(kohya, file, metadata=about)
    save_file(prefixed, peft_folder / PEFT_FILE, metadata=about)
    config = student.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": args.pretrained_teacher_model, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (peft_folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    loaded, wrong = read_lora(pipe, teacher, file, "the saved", "where training diverged, lower --learning_rate"), []
    for path, (a, b, scaling) in layers.items():
        x, y, loaded_scaling = loaded.get(path, (a, b, math.nan))
        same = all(torch.equal(w.cpu().to(dtype), v.to(dtype)) for w, v in ((a, x), (b, y)))
        if not same or not math.isclose(scaling, loaded_scaling, rel_tol=1e-6):  # alpha is float32 in the file
            wrong.append(path)
    if wrong:
        fail(f"{file}: as diffusers loads {len(layers)} layers, {len(wrong)} are missing or differ, first {wrong[0]}")
    return f"{file}: {len(layers)} of {len(layers)} layers read back equal"


def checkpoints(output_dir):
    """The checkpoint folders, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def save_checkpoint(pipe, teacher, student, states, args, step):
    """Write checkpoint-<step> under another name, flush, rename; afterwards delete the oldest beyond the limit."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    good = (checkpoints(args.output_dir) or ["none"])[-1]
    with or_fail(f"{folder}: it cannot be saved", f"free or name another disk; the last good checkpoint: {good}"):
        try:
            for left in part.parent.glob("checkpoint-*.part"):  # by a kill
                shutil.rmtree(left)
            report = save_lora(pipe, teacher, student, part, args, step).replace(str(part), str(folder))
            state = {name: kept and kept.state_dict() for name, kept in states.items()}
            torch.save(state | {"step": step}, part / STATE_FILE)
            files = [path for path in part.rglob("*") if path.is_file()]
            about = {str(path.relative_to(part)): [path.stat().st_size, file_digest(path)] for path in files}
            (part / MANIFEST).write_text(json.dumps(about, indent=2) + "\n")
            for path in [*files, part / MANIFEST, part / "unet", part]:
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
        others = [other for other in checkpoints(args.output_dir) if other != folder]  # a later one may be damaged
        for spare in others[: 1 - args.checkpoints_total_limit or None]:
            shutil.rmtree(spare)
    return report


def flush_to_disk(path):
    """What was written to a file or folder survives a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # an error of it ends the run
    os.close(descriptor)


def damage(folder):
    """What is wrong with a checkpoint folder, or None if each file of its manifest is there with its size and hash."""
    try:
        for name, (size, digest) in json.loads((folder / MANIFEST).read_text()).items():
            if (folder / name).stat().st_size != size or file_digest(folder / name) != digest:
                return f"{name} is not what was saved"
    except (OSError, ValueError) as error:
        return f"it is not whole ({reason(error)})"


def find_checkpoint(args):
    """The folder that --resume_from_checkpoint means, or None where a run with `latest` has none yet."""
    name, found = args.resume_from_checkpoint, checkpoints(args.output_dir)
    if name is None and found:
        how = "go on with --resume_from_checkpoint latest, or name another"
        fail(f"--output_dir {args.output_dir}: it holds {found[-1].name}; {how}")
    if name is None or (name == "latest" and not found):
        return None
    for folder in reversed(found if name == "latest" else [Path(name)]):
        if not (why := damage(folder)):
            return folder
        print(f"warning: {folder}: {why}", file=sys.stderr)
    advice = "give a checkpoint-<step> folder, `latest`, or a new --output_dir"
    fail(f"--resume_from_checkpoint {name}: no whole checkpoint there; {advice}")


class Stop:
    """What asks the run to stop: a signal, the alarm of --max_train_hours, a launcher that is gone. The ranks agree on it."""

    def __init__(self, hours, world):
        self.signal, self.since = 0, 0.0
        self.group = torch.distributed.new_group(backend="gloo") if world > 1 else None  # no GPU waits for it
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # else it is under nohup
                signal.signal(number, self.note)
        signal.setitimer(signal.ITIMER_REAL, 3600 * (hours or 0))

    def note(self, number, _):
        """Keep the first signal in mind; a second one ends the process at once."""
        now = time.monotonic()
        # sooner it is the first one, passed on by the launcher; nobody sent an alarm
        if self.signal and now - self.since > 1 and number != signal.SIGALRM:
            os._exit(128 + number)
        self.signal, self.since = self.signal or number, self.since or now

    def asked(self):
        """The number of the signal that all ranks stop for after this step, or 0."""
        if LAUNCHER and os.getppid() != LAUNCHER and not self.signal:
            self.note(signal.SIGHUP, None)
        number = torch.tensor(int(self.signal))
        if self.group:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number)


@torch.no_grad()
def validate(pipe, prompts, accelerator, args, step):
    """Draw the encoded validation prompts with the live student in 4 LCM steps, for a file and for all trackers."""
    images, what = [], {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    vae, pipe.vae = pipe.vae, None  # where latents are cached it is on the CPU, and the pipeline would go by that
    for i, c in enumerate(prompts):
        noise = torch.Generator().manual_seed(args.seed + i)
        given = {name: c[key] for key, name in EMBEDS.items() if key in c}
        z = pipe(**given, num_inference_steps=4, guidance_scale=1.0, generator=noise, **what).images
        pixels = vae.decode(z.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        images += VaeImageProcessor().postprocess(pixels)
    pipe.vae = vae
    path = Path(args.output_dir, "validation", f"step-{step:06d}.png")
    path.parent.mkdir(exist_ok=True)
    diffusers.utils.make_image_grid(images, 1, len(images)).save(path)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": np.stack([np.asarray(image) for image in images])}, step=step, **layout)
    return f"{path}: the validation prompts in 4 steps"


def write_card(pipe, args, step):
    """README.md: front matter for the hub, settings, the last validation, how to load the LoRA; of paths only names."""
    name, folder, kind = args.pretrained_teacher_model, Path(args.output_dir).resolve(), type(pipe).__name__
    base, ddim_steps = base_name(name), args.num_ddim_timesteps
    place = args.hub_model_id if args.push_to_hub else folder.name
    opener = "from_single_file" if name.endswith(".safetensors") else "from_pretrained"
    tags = ["lcm", "lora", "lcm-lora", "stable-diffusion-xl" if FAMILY == "sdxl" else "stable-diffusion"]
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    about |= {} if Path(name).exists() else {"base_model": name}
    prompts, picture = args.validation_prompts or ["a red apple"], f"validation/step-{step:06d}.png"
    drawn = f"\n![The prompts below in 4 steps]({picture})\n\n" + "".join(f"- {prompt}\n" for prompt in prompts)
    (folder / "README.md").write_text(f"""---
{ModelCardData(**about)}
---

# LCM-LoRA of {base}

Draws in 1 to 8 steps without guidance. Made of {base} by {Path(__file__).name}: {step} steps at {args.resolution} px,
batch {args.train_batch_size} x {args.gradient_accumulation_steps}, learning rate {args.learning_rate:g},
rank {args.lora_rank}, alpha {args.lora_alpha:g}, omega {args.w_min:g} to {args.w_max:g}, {ddim_steps} DDIM steps,
{args.loss_type} loss, mixed precision {args.mixed_precision}, seed {args.seed}.
{drawn if args.validation_prompts and (folder / picture).is_file() else ""}
```python
from diffusers import {kind}, LCMScheduler

pipe = {kind}.{opener}("{base}")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps={ddim_steps})
pipe.load_lora_weights("{place}", weight_name="{LORA_FILE}")
# or, by PEFT: pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, "{place}", subfolder="unet")
pipe({prompts[0]!r}, num_inference_steps=4, guidance_scale=1.0).images[0].save("lcm.png")
```

- ComfyUI: `{LORA_FILE}` into `models/loras`, LoraLoaderModelOnly; KSampler with 4 steps, cfg 1, lcm, sgm_uniform
- A1111, Forge: the same file into `models/Lora`, `<lora:{Path(LORA_FILE).stem}:1>` in the prompt; LCM, 4 steps, CFG 1
- `python infer.py --lora {shlex.quote(folder.name)} --prompt {shlex.quote(prompts[0])} --output lcm.png`
""")


def open_hub(args, rank):
    """The hub's API, on rank 0 of a run with --push_to_hub, and a repository there; only it has the token afterwards."""
    token = args.hub_token
    del args.hub_token  # so log, trackers, args.json, header and card have no such setting
    sys.argv = [word.replace(token, "***") if token else word for word in sys.argv]  # which wandb notes down
    if not args.push_to_hub or args.cache_only or rank:
        return None
    hub, name = HfApi(token=token or None), args.hub_model_id or Path(args.output_dir).resolve().name
    with or_fail("--push_to_hub: no repository", "check --hub_token or `hf auth login`, --hub_model_id, the network"):
        args.hub_model_id = hub.create_repo(name, exist_ok=True).repo_id
    return hub


class Log:
    """The status line, its mirror log.jsonl, which also keeps a second run out, and the trackers."""

    def __init__(self, accelerator, args, step, keep):
        """Start the outputs of a run at `step`; `keep` what log.jsonl says of the steps before it."""
        self.accelerator, self.rows, self.odd = accelerator, [], set()
        # Steps that were not finite, in a row and in all, and those that fp16's scaler skipped
        self.bad, self.skipped, self.overflows = 0, 0, 0
        main, self.file = accelerator.is_main_process, None
        if main:
            path = Path(args.output_dir, "log.jsonl")
            with or_fail(f"--output_dir {args.output_dir}: another run writes there, or none can", "name another"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = path.open("a+", buffering=1)
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
            self.file.seek(0)
            lines = self.file if keep else ()
            old = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.file.truncate(len("".join(old).encode()))
            last = json.loads(old[-1]) if old else {}
            self.skipped, self.overflows = last.get("skipped", 0), last.get("overflows", 0)
            libraries = (torch, accelerate, diffusers, transformers, peft, datasets)
            versions = {m.__name__: m.__version__ for m in libraries} | {"python": platform.python_version()}
            about = {"arguments": vars(args), "processes": accelerator.num_processes, "versions": versions}
            Path(args.output_dir, "args.json").write_text(json.dumps(about, indent=2) + "\n")
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        wandb = {"dir": accelerator.logging_dir}  # else it writes into the working directory
        accelerator.init_trackers(args.tracker_project_name, plain, {"wandb": wandb})
        self.bar = tqdm(total=args.max_train_steps, initial=step, disable=not main, unit="step", dynamic_ncols=True)
        self.restart_clock(step)

    def restart_clock(self, step):
        """Measure the speed from here on; what came before, such as a save, does not count."""
        self.clock, self.clock_step = time.perf_counter(), step

    def warn_of(self, odd):
        """Count the records that are replaced, each once, and name the first ten, the 100th, the 1000th ..."""
        for why in odd:
            if why not in self.odd:
                self.odd.add(why)
                if len(self.odd) <= 10 or str(len(self.odd)).strip("0") == "1":
                    self.bar.write(f"warning: {len(self.odd)} unusable records replaced so far: {why}", sys.stderr)

    def add(self, row, finite, overflow, names):
        """Keep a step for `flush`; the tenth in a row that was not finite ends the run."""
        self.bad = 0 if finite else self.bad + 1
        self.skipped, self.overflows = self.skipped + (not finite), self.overflows + overflow
        self.rows.append(row | {"skipped": self.skipped, "overflows": self.overflows})
        self.bar.update()
        if finite:
            return
        what = f"loss {row['loss']:g}, gradient norm {row['grad_norm']:g}, with {', '.join(names)}"
        self.bar.write(f"warning: step {row['step']} is skipped: {what}", sys.stderr)
        if self.bad == BAD_STEPS:
            advice = "lower --learning_rate, give --mixed_precision bf16, or look at these pictures"
            fail(f"{self.bad} steps in a row were not finite, the last, {row['step']}: {what}; {advice}")

    def flush(self, global_batch):
        """Write the pending steps."""
        rate = global_batch * (self.rows[-1]["step"] - self.clock_step) / (time.perf_counter() - self.clock)
        unit = 1 if platform.system() == "Darwin" else 2**10
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30  # of the process, or of its GPU
        if self.accelerator.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
        for row in self.rows:
            row |= {"images_per_s": rate, "memory_gib": memory}
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            if self.file:
                with or_fail(f"{self.file.name}: it cannot be written", "free some space and resume"):
                    self.file.write(json.dumps(row) + "\n")
        shown = f"loss {row['loss']:.4f} grad {row['grad_norm']:.3f} lr {row['lr']:.1e}"
        self.bar.set_postfix_str(f"{shown} {rate:.1f} img/s {memory:.1f} GiB")
        self.rows = []


# -------------------------------------------------------------------------------------------------------- 8. main


def make_accelerator(args):
    """The accelerator, its trackers named but not yet started."""
    what = f"accelerate does not start, with --mixed_precision {args.mixed_precision}"
    with or_fail(what, "give no, bf16 or fp16, and start with `accelerate launch`"):
        accelerator = Accelerator(
            # Without a GPU the launcher's processes would else not know of each other, and each train alone.
            cpu=not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1,
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        )
    if accelerator.mixed_precision not in DTYPES:
        fail(f"mixed precision {accelerator.mixed_precision} is not supported: give --mixed_precision no, fp16 or bf16")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        why = "it shards weights and optimizer state, but the base is frozen and shared and the LoRA's state is small"
        fail(f"{accelerator.distributed_type.value}: {why}; launch with --multi_gpu instead")
    return accelerator


def make_optimizer(parameters, args):
    """AdamW over the LoRA weights, and its learning-rate schedule counted in optimizer steps."""
    settings = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    settings["betas"] = args.adam_beta1, args.adam_beta2
    if args.use_8bit_adam:
        import bitsandbytes

        if args.paged_adam and parameters[0].device.type != "cuda":
            fail("--paged_adam: there is no GPU whose memory could run short; leave it out")
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, is_paged=args.paged_adam, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    falls = args.lr_scheduler == "polynomial"  # to 1e-7, after the warm-up
    if falls and (args.lr_warmup_steps >= args.max_train_steps or args.learning_rate <= 1e-7):
        fail("--lr_scheduler polynomial falls to 1e-7 after --lr_warmup_steps: give fewer, or a higher --learning_rate")
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps)


def main(argv=None):
    """The run, and how it ends where it cannot go on."""
    args = parse_args(argv)
    try:
        train(args)
    except torch.OutOfMemoryError as error:
        flags = "--gradient_checkpointing, --cache_latents, --cache_text_embeddings, --use_8bit_adam"
        fail(f"out of memory ({reason(error)}); less takes a smaller --train_batch_size, or {flags}", this_rank())
    except KeyboardInterrupt:  # before the first step; later ones are kept for the end of the step
        raise SystemExit(128 + signal.SIGINT) from None
    finally:  # readers of a loader that an error leaves behind
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for reader in multiprocessing.active_children():
            reader.kill()


def optimizer_step(accelerator, optimizer, trained, losses, args):
    """Clip the gradient and step, unless loss or gradient is not finite: (mean loss, gradient norm, whether they are finite).

    The gradient is that of all ranks by now and the loss is averaged over them, so they agree.
    """
    grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
    finite = math.isfinite(loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None)
    if finite:
        optimizer.step()
    elif accelerator.scaler:
        accelerator.scaler.update()  # or it would not unscale the next gradient
    optimizer.zero_grad()
    return loss, grad_norm, finite


def train(args):
    """Set up, train, save."""
    launch, accelerator = launch_command(), make_accelerator(args)
    args.mixed_precision = accelerator.mixed_precision  # perhaps the launcher's
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    dtype = DTYPES[accelerator.mixed_precision]
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    # No bars and advice of libraries: this program has one bar and says itself what it does
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of what diffusers passes to it
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    hub = open_hub(args, rank)

    # Models: the teacher, the student over the same weights, the LoRA
    (resumed,) = broadcast_object_list([find_checkpoint(args) if rank == 0 else None])
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    cached = ["vae"] * args.cache_latents + [*TEXT_ENCODERS] * args.cache_text_embeddings
    pipe = load_teacher(args, dtype, [part for part in cached if part != "vae" or not args.validation_prompts])
    teacher = pipe.unet
    args.resolution = args.resolution or teacher.config.sample_size * pipe.vae_scale_factor
    if args.resolution % pipe.vae_scale_factor:
        fail(f"--resolution {args.resolution}: it must be a multiple of the VAE's factor, {pipe.vae_scale_factor}")
    if (channels := teacher.config.in_channels) != pipe.vae.config.latent_channels:
        fail(f"the teacher's UNet takes {channels} channels, as for inpainting; give a text-to-image teacher")
    schedule = NoiseSchedule(pipe.scheduler.config, device)
    if args.num_ddim_timesteps > len(schedule.alpha):
        fail(f"--num_ddim_timesteps {args.num_ddim_timesteps}: the teacher has {len(schedule.alpha)} timesteps")
    base_size = teacher.num_parameters()
    student = make_student(pipe, args, device, cached)  # cached, a VAE only draws validation pictures, on the CPU
    if source := resumed or args.lora_path:
        load_lora(pipe, teacher, student, source, "--resume_from_checkpoint" if resumed else "--lora_path")
    trained = [p for p in student.parameters() if p.requires_grad]

    # Data: an endless seeded stream, cut into global batches of G pictures
    records = load_records(args)
    embeddings = cache_embeddings(records, args, accelerator) if args.cache_text_embeddings else None
    records = cache_latents(records, args, accelerator) if args.cache_latents else records
    if args.cache_only:
        return accelerator.end_training()
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * world
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(records) / global_batch)
    if args.scale_lr:
        args.learning_rate *= global_batch
    texts = ["", *(args.validation_prompts or [])]
    samples = [{"caption": text} | (embeddings[text] if embeddings else {}) for text in texts]
    c_null, *prompts = [conditions(pipe, torch.utils.data.default_collate([sample]), device) for sample in samples]

    # Optimizer; the model is wrapped for many processes, the target is the bare module
    optimizer, lr_scheduler = make_optimizer(trained, args)
    target = student
    student, optimizer = accelerator.prepare(student, optimizer)
    ema = EMAModel(trained, decay=args.ema_decay) if args.ema_decay is not None else None
    states = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "scaler": accelerator.scaler, "ema": ema}
    step = 0
    if resumed:
        with or_fail(f"--resume_from_checkpoint {resumed}: not of this run", "resume with the flags of before"):
            state = torch.load(resumed / STATE_FILE, map_location="cpu", weights_only=True)
            step = state["step"]
            for name, kept in states.items():
                if kept and state.get(name):
                    kept.load_state_dict(state[name])
        if ema:
            ema.to(device)

    sizes = [f"{count / 1e6:.2f}M parameters" for count in (base_size, sum(p.numel() for p in trained))]
    accelerator.print(f"teacher: {args.pretrained_teacher_model}, {sizes[0]}, {dtype}")
    accelerator.print(f"LoRA: {len(lora_layers(target))} layers of rank {args.lora_rank}, {sizes[1]}")
    batch_size = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {world} processes"
    size = "streamed" if args.streaming else len(records)
    accelerator.print(f"data: {size} pictures, in a step {batch_size}")
    accelerator.print(f"steps: {step} to {args.max_train_steps}" + (f", resumed from {resumed}" if resumed else ""))

    stop = Stop(args.max_train_hours, world)
    batches = iter(make_loader(records, embeddings, args, step, rank, world))
    first = list(itertools.islice(batches, 1))  # says at once if nothing can be read
    for batch in first:
        check_batch(batch, args)

    # Outputs: nothing is written before this line
    log = Log(accelerator, args, step, keep=bool(resumed))
    # From here on the pipeline is the student's: validation draws with the live weights
    pipe.unet = target
    grid = {"original_inference_steps": args.num_ddim_timesteps, "clip_sample": False}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **grid)
    pipe.set_progress_bar_config(disable=True)

    # The loop
    timesteps, losses, names, asked = ddim_timesteps(args.num_ddim_timesteps, len(schedule.alpha)).to(device), [], [], 0
    for batch in itertools.chain(first, batches):
        check_batch(batch, args)
        log.warn_of(batch["unusable"])
        names += batch["name"]
        with accelerator.accumulate(student):
            drawn = sample_batch(pipe, batch, c_null, timesteps, step, args)
            loss = distillation_loss(teacher, student, target, *drawn, schedule, args)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            loss, grad_norm, finite = optimizer_step(accelerator, optimizer, trained, losses, args)
        step, last = step + 1, step + 1 == args.max_train_steps
        overflow = finite and accelerator.optimizer_step_was_skipped  # of fp16, which its scaler mends
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        log.add(row, finite, overflow, names)
        losses, names = [], []
        if finite and not overflow:
            lr_scheduler.step()
            if ema:
                ema.step(trained)
        asked = 0 if last else stop.asked()
        save = step % args.checkpointing_steps == 0 or asked
        draw = args.validation_prompts and (last or step % args.validation_steps == 0 and not asked)
        if step % args.logging_steps == 0 or save or draw or last:
            log.flush(global_batch)
        if save and accelerator.is_main_process:
            log.bar.write(save_checkpoint(pipe, teacher, target, states, args, step))
        if last and ema:
            ema.copy_to(trained)
        if draw and accelerator.is_main_process:
            log.bar.write(validate(pipe, prompts, accelerator, args, step))
        if save or draw:
            accelerator.wait_for_everyone()
            log.restart_clock(step)
        if asked:
            break

    # The end
    log.bar.close()
    if asked:
        more = [] if args.resume_from_checkpoint == "latest" else ["--resume_from_checkpoint", "latest"]
        command = shlex.join([*launch, *sys.argv, *more])
        accelerator.print(f"stopped by {signal.Signals(asked).name} after step {step}; this goes on: {command}")
        accelerator.end_training()
        raise SystemExit(128 + asked)
    if ema:
        ema.copy_to(trained)
    if accelerator.is_main_process:
        with or_fail(f"--output_dir {args.output_dir}: the LoRA cannot be saved", "free some space and resume"):
            print(save_lora(pipe, teacher, target, Path(args.output_dir), args, step))
            write_card(pipe, args, step)
    # Without this a gloo thread that still holds a tensor and a rank that exits at once could wait for each other for ever
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if hub:  # without checkpoints, logs and args.json
        files = [LORA_FILE, "unet/*", "validation/*", "README.md"]
        with or_fail("--push_to_hub: the upload failed", f"`hf upload` sends {args.output_dir}, which is whole"):
            hub.upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir, allow_patterns=files)


if __name__ == "__main__":
    main()
