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
import copy
import hashlib
import io
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

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
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

FAMILY = "sdxl"
FORMAT_VERSION = "1"  # of the LoRA file's header
LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "training_state.pt"
CACHE_ROWS = 1000  # in a file of text embeddings
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the base, by --mixed_precision
TARGET_MODULES = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
)
INTERPOLATION = [kind.name.lower() for kind in Image.Resampling]
# Flags of other LCM-LoRA scripts that nothing here needs, and why.
REFUSED = {
    "cast_teacher_unet": "the teacher shares the student's weights, in the precision of --mixed_precision",
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention is memory-efficient; leave the flag out",
    "encode_batch_size": "captions are encoded with the batch they belong to; leave the flag out",
    "local_rank": "`accelerate launch` tells each process its rank; leave the flag out",
    "train_shards_path_or_url": "tar shards cannot be read yet; give --dataset_name or --train_data_dir",
    "push_to_hub": "uploading is not built in yet; `hf upload` sends the output folder",
    "hub_model_id": "uploading is not built in yet; `hf upload` sends the output folder",
    "hub_token": "uploading is not built in yet; `hf auth login` keeps the token",
}
# What the keys of a checkpoint in one file begin with.
ONE_FILE_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# Where the results go and how they are shown, not what they are: kept out of the LoRA's header.
NOT_IN_HEADER = (
    "output_dir logging_dir cache_dir report_to tracker_project_name resume_from_checkpoint logging_steps".split()
)


def fail(message):
    """End with one line on stderr, from the first process only, and exit status 1."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


# ---------------------------------------------------------------------------------------------------- 1. Arguments


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` to `high`."""

    def check(text):
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {limits}")
        return value

    check.__name__ = kind.__name__  # argparse names it in its own message
    return check


def parse_args(argv=None):
    """The command line, checked as far as it can be without loading anything."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = fail
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12)

    add = parser.add_argument_group("Model").add_argument
    add("--pretrained_teacher_model", required=True, help="checkpoint to distil: folder, hub id or .safetensors file")
    add("--teacher_config", help="for a teacher in one file: folder or hub id of its configs and tokenizers")
    add("--teacher_revision", "--revision", help="revision of the teacher on the hub")
    add("--variant", help="file variant of the teacher, such as fp16")
    add("--pretrained_vae_model_name_or_path", help="another VAE than the teacher's")
    add("--lora_rank", type=count, default=64, help="rank of the LoRA layers")
    add("--lora_alpha", type=positive, help="strength: the update is scaled by alpha / rank (default: the rank)")
    add("--lora_dropout", type=share, default=0.0, help="dropout in front of the LoRA layers, 0..1")
    add("--lora_target_modules", default=TARGET_MODULES, help="name endings of the layers that get a LoRA")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a fifth more time")

    add = parser.add_argument_group("Data").add_argument
    add("--dataset_name", help="hub id, or local folder that `datasets` opens")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--train_data_dir", help="folder of pictures with metadata.jsonl or metadata.csv (file_name, text)")
    add("--image_column", default="image", help="column of the pictures")
    add("--caption_column", default="text", help="column of the captions")
    add("--max_train_samples", type=count, help="use only the first so many pictures")
    add("--resolution", type=count, help="side of the training pictures in pixels (default: what the teacher draws)")
    add("--interpolation_type", choices=INTERPOLATION, default="lanczos", help="how pictures are resized")
    add("--center_crop", action="store_true", help="crop the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--use_fix_crop_and_size", action="store_true", help="always condition on size --resolution and no crop")
    add("--proportion_empty_prompts", type=share, default=0.0, help="share of captions replaced by the empty one, 0..1")
    add("--cache_text_embeddings", action="store_true", help="encode each caption once and keep it on the disk")
    add("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read pictures (0 = this one)")
    add("--cache_dir", help="where downloads and text embeddings are kept")

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
    add("--lr_scheduler", default="constant", help="constant, constant_with_warmup, linear, cosine, polynomial, ...")
    add("--lr_warmup_steps", type=number(int, 0), default=0, help="steps of warm-up, for schedulers that have one")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit state")
    add("--adam_beta1", type=share, default=0.9)
    add("--adam_beta2", type=share, default=0.999)
    add("--adam_weight_decay", type=number(float, 0), default=0.0)
    add("--adam_epsilon", type=positive, default=1e-8)
    add("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")

    add = parser.add_argument_group("Runtime").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate` is configured for")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer GPUs")
    add("--seed", type=number(int, 0), default=0, help="everything random is a function of it")

    add = parser.add_argument_group("Output & tracking").add_argument
    add("--output_dir", default="lcm-lora", help="the LoRA, log.jsonl, args.json, checkpoints, pictures")
    add("--checkpointing_steps", type=count, default=500, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=count, help="keep only the newest so many checkpoints")
    add("--resume_from_checkpoint", metavar="FOLDER", help="a checkpoint folder, or `latest` in --output_dir")
    add("--validation_prompts", nargs="+", metavar="PROMPT", help="prompts drawn during training")
    add("--validation_steps", type=count, default=200, help="optimizer steps between those pictures")
    add("--logging_steps", type=count, default=10, help="optimizer steps between writes of the log")
    add("--logging_dir", default="logs", help="folder of the trackers, inside --output_dir")
    add("--report_to", choices=["tensorboard", "wandb", "all", "none"], default="tensorboard", help="trackers")
    add("--tracker_project_name", default="lcm-lora", help="project name shown by the trackers")

    for flag in REFUSED:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag, reason in REFUSED.items():
        if vars(args).pop(flag):
            fail(f"--{flag}: {reason}")
    args.lora_alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    one_file = args.pretrained_teacher_model.endswith(".safetensors")
    if Path(args.pretrained_teacher_model).is_file() and not one_file:
        fail(
            f"--pretrained_teacher_model {args.pretrained_teacher_model}: pickled weights are not read; "
            "give a .safetensors file, a diffusers folder or a hub id"
        )
    if args.teacher_config and not one_file:
        fail(f"--teacher_config {args.teacher_config}: only a teacher in one .safetensors file needs it; leave it out")
    if args.w_min > args.w_max:
        fail(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}: omega is drawn from w_min to w_max")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        fail("give either --dataset_name (hub id or dataset folder) or --train_data_dir (folder of pictures)")
    return args


# ------------------------------------------------------------------------- 2. Noise schedule and the DDIM ODE solver


class NoiseSchedule:
    """alpha(t), sigma(t) of a teacher and what follows from them; float32 throughout, t int64 [B] in 0..T-1.

    z_t = alpha(t) z + sigma(t) noise,  alpha^2 + sigma^2 = 1.
    """

    def __init__(self, config, device):
        """`config`: the teacher's scheduler config."""
        self.prediction_type = config.get("prediction_type", "epsilon")
        alpha_bar = DDPMScheduler.from_config(config).alphas_cumprod.double()
        if self.prediction_type not in ("epsilon", "v_prediction"):
            fail(
                f"the teacher's prediction_type is {self.prediction_type!r}: epsilon and v_prediction can be distilled"
            )
        if self.prediction_type == "epsilon" and alpha_bar[-1] <= 0:
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


def load_records(args):
    """The training records as a map-style `datasets.Dataset` with undecoded pictures."""
    source = args.dataset_name or args.train_data_dir
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    if args.train_data_dir and not Path(source).is_dir():
        fail(f"--train_data_dir {source}: no such folder")
    try:
        if Path(source, "dataset_info.json").exists():  # written by save_to_disk
            data = datasets.load_from_disk(source)
        elif args.dataset_name:
            data = datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
        else:
            data = datasets.load_dataset("imagefolder", data_dir=source, cache_dir=args.cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{flag} {source}: not a dataset that can be opened ({first_line(error)}); "
             "give a hub id, a dataset folder, or a folder of pictures with metadata.jsonl")  # fmt: skip
    if isinstance(data, dict):
        if "train" not in data:
            fail(f"{flag} {source}: it has no split named train, only {', '.join(data)}")
        data = data["train"]
    for name in ("image_column", "caption_column"):
        if getattr(args, name) not in data.column_names:
            fail(f"--{name} {getattr(args, name)}: the data have no such column, only {', '.join(data.column_names)}")
    if args.image_column == args.caption_column:
        fail(f"--caption_column {args.caption_column}: this is the --image_column too")
    data = data.select_columns([args.image_column, args.caption_column])
    if not isinstance(data.features[args.image_column], datasets.Image):
        fail(f"--image_column {args.image_column}: a column of {data.features[args.image_column]}, not of pictures")
    if args.max_train_samples is not None:
        data = data.select(range(min(args.max_train_samples, len(data))))
    if len(data) == 0:
        fail(f"{flag} {source}: it holds no pictures")
    return data.cast_column(args.image_column, datasets.Image(decode=False))


def caption_of(record, row, args):
    """The caption of a record; a missing one is the empty one."""
    caption = record[args.caption_column] or ""
    if not isinstance(caption, str):
        fail(f"--caption_column {args.caption_column}: row {row} holds {caption!r}, which is no text")
    return caption


def open_picture(record):
    """A `datasets` picture record as an upright RGB image; transparent parts become white."""
    picture = Image.open(io.BytesIO(record["bytes"]) if record["bytes"] else record["path"])
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        picture = picture.point(lambda tone: tone / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def resize_and_crop(picture, side, place, flip, interpolation):
    """The shorter side becomes `side`; mirrored if `flip`; a square is cut out at `place` = (x, y), each 0..1.

    Returns the square and its left and top edge in the resized, mirrored picture, in pixels.
    """
    scale = side / min(picture.size)
    size = [max(side, round(s * scale)) for s in picture.size]
    picture = picture.resize(size, Image.Resampling[interpolation.upper()])
    picture = ImageOps.mirror(picture) if flip else picture
    left, top = (round(p * (s - side)) for p, s in zip(place, size, strict=True))
    return picture.crop((left, top, left + side, top + side)), left, top


def prepare_picture(picture, place, flip, args):
    """A training picture as what the step needs of it.

    pixels [3,H,W] in -1..1; time_ids, SDXL's conditioning on size: height and width of the picture as it was, top and left
    of the crop in the resized (and mirrored) picture, height and width of the crop; all in pixels.
    """
    side, (width, height) = args.resolution, picture.size
    square, left, top = resize_and_crop(picture, side, place, flip, args.interpolation_type)
    if args.use_fix_crop_and_size:
        height, width, top, left = side, side, 0, 0
    pixels = VaeImageProcessor(do_resize=False).preprocess(square)[0]
    return {"pixels": pixels, "time_ids": [height, width, top, left, side, side]}


class Samples(torch.utils.data.Dataset):
    """Training samples by (optimizer step, place in the global batch), from one endless stream of seeded shuffles.

    Step s reads positions [s G, (s + 1) G) of the stream, G the global batch; epoch e of the stream is a permutation of
    all records. An unreadable picture is replaced by the next readable record and named in the sample.
    """

    def __init__(self, records, args, global_batch):
        self.records, self.args, self.global_batch = records, args, global_batch
        self.embeddings = None  # or what `cache_text_embeddings` gives
        self.epoch, self.order = None, None

    def __getitem__(self, step_and_place):
        step, place = step_and_place
        epoch, index = divmod(step * self.global_batch + place, len(self.records))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, rng(self.args.seed, epoch, 0, "order").permutation(len(self.records))
        unreadable = {}
        for i in range(len(self.records)):
            row = int(self.order[(index + i) % len(self.records)])
            record = self.records[row]
            try:
                picture = open_picture(record[self.args.image_column])
                break
            except Exception as error:  # whatever a broken file leads Pillow to; counted and named
                name = record[self.args.image_column]["path"] or f"row {row}"
                unreadable[row] = f"{name} ({first_line(error)})"
        else:
            first = "; ".join(list(unreadable.values())[:3])
            fail(f"none of the {len(self.records)} pictures can be read, the first of them: {first}")
        draw = [rng(self.args.seed, step, place, purpose).random(2) for purpose in ("crop", "flip", "caption")]
        crop = (0.5, 0.5) if self.args.center_crop else draw[0]
        flip = self.args.random_flip and draw[1][0] < 0.5
        caption = caption_of(record, row, self.args)
        if draw[2][0] < self.args.proportion_empty_prompts:
            caption, row = "", len(self.records)
        sample = prepare_picture(picture, crop, flip, self.args)
        sample |= self.embeddings[row] if self.embeddings else {}
        return sample | {"caption": caption, "place": place, "unreadable": unreadable}


def collate(samples):
    """A batch: each entry a list, but pixels [B,3,H,W] and unreadable {row: why} of the pictures that were replaced."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch["pixels"] = torch.stack(batch["pixels"])
    batch["unreadable"] = {row: why for one in batch["unreadable"] for row, why in one.items()}
    return batch


def make_loader(samples, args, first_step, rank, world):
    """One batch for each micro-step of this rank from `first_step` on; ranks and micro-steps take contiguous parts."""
    size, parts = args.train_batch_size, args.gradient_accumulation_steps
    batches = (
        [(step, (rank * parts + micro) * size + i) for i in range(size)]
        for step in range(first_step, args.max_train_steps)
        for micro in range(parts)
    )
    return torch.utils.data.DataLoader(
        samples, batch_sampler=batches, collate_fn=collate, num_workers=args.dataloader_num_workers
    )


# ------------------------------------------------------------------------------------------------------ 5. Models


def quiet_libraries():
    """No progress bars and advice of libraries: this program has one bar and says itself what it does."""
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of what diffusers passes to it
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def first_line(error):
    """The first line of an exception's message."""
    return f"{error}".strip().split("\n")[0] or type(error).__name__


def tensor_names(file):
    """The names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def teacher_parts(args):
    """The names of the parts that the teacher has, such as unet and text_encoder."""
    name = args.pretrained_teacher_model
    if not name.endswith(".safetensors"):
        index = DiffusionPipeline.load_config(name, revision=args.teacher_revision, cache_dir=args.cache_dir)
        return {part for part, value in index.items() if isinstance(value, list) and value[0]}
    return {
        part for prefix, part in ONE_FILE_PARTS.items() if any(key.startswith(prefix) for key in tensor_names(name))
    }


def open_teacher(pipeline_class, needed, args, dtype, **options):
    """The teacher, from a folder, the hub or one file, and perhaps with another VAE."""
    name, vae = args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path
    one_file = name.endswith(".safetensors")
    options |= {"revision": args.teacher_revision, "cache_dir": args.cache_dir, "dtype": dtype}
    flag = f"--pretrained_vae_model_name_or_path {vae}"
    advice = "give a diffusers folder with safetensors weights or a hub id"
    try:
        if vae:
            kinds = {"use_safetensors": True, "cache_dir": args.cache_dir, "dtype": dtype}
            options["vae"] = AutoencoderKL.from_pretrained(vae, **kinds)
        flag, advice = f"--pretrained_teacher_model {name}", f"{advice}, or a .safetensors file"
        parts = teacher_parts(args)
        if parts & {"unet", "text_encoder", "text_encoder_2"} != needed:
            fail(
                f"{flag}: it has {', '.join(sorted(parts)) or 'no part that is known'}, not just {', '.join(sorted(needed))}; "
                "train_lcm_lora_sd15.py distils the layout of Stable Diffusion 1.x and 2.x, train_lcm_lora_sdxl.py SDXL's"
            )
        if "vae" not in parts | options.keys():
            fail(f"{flag}: it holds no VAE; name one with --pretrained_vae_model_name_or_path")
        if not one_file:
            return pipeline_class.from_pretrained(name, variant=args.variant, use_safetensors=True, **options)
        flag += f" with --teacher_config {args.teacher_config or 'not given'}"
        advice = "give the folder or hub id of configs and tokenizers of just this kind of model as --teacher_config"
        pipe = pipeline_class.from_single_file(name, config=args.teacher_config, **options)
        check_one_file(name, pipe)
        return pipe
    except Exception as error:  # hub, network, configs, weights: each library has its own; none is swallowed
        fail(f"{flag}: cannot be loaded ({type(error).__name__}: {first_line(error)}); {advice}")


def check_one_file(name, pipe):
    """The weights in the file are those of the pipeline, none left over and none never filled."""
    in_file = sum(key.startswith("model.diffusion_model.") for key in tensor_names(name))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if in_file != len(pipe.unet.state_dict()) or any(p.is_meta for module in modules for p in module.parameters()):
        raise ValueError("the file does not hold just the tensors that these configs speak of")


def load_teacher(args, dtype):
    """The teacher as a pipeline in its final precision."""
    needed = {"unet", "text_encoder", "text_encoder_2"}
    pipe = open_teacher(StableDiffusionXLPipeline, needed, args, dtype)
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()  # SDXL's first VAE overflows in fp16; the fp16-fix one does not, and says so in its config
    return pipe


def share_weights(unet):
    """Another UNet object over the very same Parameter and buffer objects: what is added to one is not in the other."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def attach_lora(unet, args):
    """Add LoRA layers to the UNet, float32 whatever the base is; only they are trained."""
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules.replace(",", " ").split(),
    )
    torch.manual_seed(args.seed)
    try:
        unet.add_adapter(config)
    except ValueError as error:
        fail(f"--lora_target_modules: {first_line(error)}")
    cast_training_params(unet, dtype=torch.float32)
    return unet


def vae_factor(vae):
    """How many pixels a latent is wide."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def count_parameters(parameters):
    """Their number as text."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f}M parameters"


@torch.no_grad()
def encode_captions(pipe, captions):
    """What the prompt conditions the UNet on, made as the pipeline makes it when it draws.

    {"prompt": [B,L,D], "text_embeds": [B,P]}
    """
    device = pipe.text_encoder.device
    prompt, _, pooled, _ = pipe.encode_prompt(captions, None, device, 1, False)
    if pipe.config.force_zeros_for_empty_prompt:
        given = torch.tensor([bool(caption) for caption in captions], device=device)
        prompt, pooled = prompt * given[:, None, None], pooled * given[:, None]
    return {"prompt": prompt, "text_embeds": pooled}


def cache_text_embeddings(pipe, records, c_null, args, accelerator):
    """The records' captions encoded, then the empty one: a `datasets.Dataset` in files, {name: bytes} a row.

    The files bear the name of the captions and of what the encoders say of a few of them, so that later runs use them again.
    A file is renamed when whole, so a kill costs one at most; the processes make them in turn.
    """
    captions = [caption_of(record, row, args) for row, record in enumerate(records.select_columns(args.caption_column))]
    digest = hashlib.sha256(json.dumps(captions).encode())
    for value in [*c_null.values(), *encode_captions(pipe, captions[:4]).values()]:
        digest.update(to_bytes(value))
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "lcm_lora_text_embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    (key,) = broadcast_object_list([digest.hexdigest()[:20]])

    def encode(batch):
        return {k: [to_bytes(row) for row in value] for k, value in encode_captions(pipe, batch["caption"]).items()}

    rows = datasets.Dataset.from_dict({"caption": [*captions, ""]})
    parts = [range(first, min(first + CACHE_ROWS, len(rows))) for first in range(0, len(rows), CACHE_ROWS)]
    files = [str(folder / f"{key}-{part.start:08d}-{part.stop:08d}.arrow") for part in parts]
    for i in range(accelerator.process_index, len(parts), accelerator.num_processes):
        options = {"cache_file_name": files[i], "new_fingerprint": f"{key}-{i}", "remove_columns": "caption"}
        rows.select(parts[i]).map(encode, batched=True, batch_size=16, **options)
    accelerator.wait_for_everyone()
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def to_bytes(tensor):
    """A tensor's elements as bytes, in its own precision."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def conditions(pipe, batch, c_null):
    """All that the UNet gets beside z and t, {name: [B,...]}: the encoded captions, for SDXL the sizes too."""
    if "prompt" in batch:  # from the cache
        rows = {k: torch.frombuffer(bytearray(b"".join(batch[k])), dtype=null.dtype) for k, null in c_null.items()}
        c = {k: rows[k].view(-1, *null.shape[1:]).to(null.device) for k, null in c_null.items()}
    else:
        c = encode_captions(pipe, batch["caption"])
    sizes = {"time_ids": torch.tensor(batch["time_ids"], device=pipe.unet.device)} if "time_ids" in batch else {}
    return c | sizes


@torch.no_grad()
def encode_pictures(vae, pixels, noise, batch_size):
    """Pixels [B,3,H,W] in -1..1 -> z [B,4,h,w] float32, a sample of the posterior times the scaling factor."""
    posteriors = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in pixels.split(batch_size)]
    mean, std = (torch.cat([getattr(p, name).float() for p in posteriors]) for name in ("mean", "std"))
    return (mean + std * noise.to(mean.device)) * vae.config.scaling_factor


def predict(unet, z_t, t, c):
    """The UNet's output at (z_t, t) given the conditions c, [B,4,h,w] float32, computed in the base's precision."""
    dtype = next(unet.parameters()).dtype
    added = {name: value for name, value in c.items() if name != "prompt"}
    with torch.autocast(z_t.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return unet(z_t.to(dtype), t, c["prompt"], added_cond_kwargs=added).sample.float()


# -------------------------------------------------------------------------------------- 6. The distillation step


@torch.no_grad()
def draw_batch(pipe, batch, c_null, timesteps, step, args):
    """(x, c) ~ data, z = E(x), n ~ U, omega ~ U[w_min, w_max]; what `distillation_loss` takes, from z to omega."""
    places, device, vae = batch["place"], pipe.unet.device, pipe.vae
    torch.manual_seed(int(rng(args.seed, step, places[0], "dropout").integers(2**63)))  # LoRA dropout draws from torch
    side = args.resolution // vae_factor(vae)
    shape = (vae.config.latent_channels, side, side)
    posterior_noise = normal(args.seed, step, places, "posterior", shape)
    z = encode_pictures(vae, batch["pixels"], posterior_noise, args.vae_encode_batch_size)
    c = conditions(pipe, batch, c_null)
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
    layers = {}
    for path, module in unet.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            (name,) = module.lora_A
            layers[path] = (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
    return layers


def header(args, step):
    """The LoRA file's metadata: what it was made from and how. No time and no output path, so equal runs are equal."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_IN_HEADER}
    for name in ("dataset_name", "train_data_dir"):
        if settings[name] and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).resolve().name
    return {
        "format": "pt",
        "lcm_lora_version": FORMAT_VERSION,
        "base_model": args.pretrained_teacher_model,
        "family": FAMILY,
        "rank": f"{args.lora_rank}",
        "alpha": f"{args.lora_alpha:g}",
        "num_ddim_timesteps": f"{args.num_ddim_timesteps}",
        "w_min": f"{args.w_min:g}",
        "w_max": f"{args.w_max:g}",
        "step": f"{step}",
        "training_args": json.dumps(settings, sort_keys=True),
    }


def save_lora(pipe, teacher, student, folder, args, step):
    """Write the LoRA file and the PEFT folder, then read the file back as a user's pipeline would and compare."""
    layers = lora_layers(student)
    kohya, prefixed = {}, {}
    for path, (a, b, scaling) in layers.items():
        a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
        key = "lora_unet_" + path.replace(".", "_")
        kohya |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        kohya[f"{key}.alpha"] = torch.tensor(float(scaling * args.lora_rank))
        prefixed |= {f"base_model.model.{path}.lora_{n}.weight": w for n, w in (("A", a), ("B", b))}
    peft_folder = folder / "unet"
    peft_folder.mkdir(parents=True, exist_ok=True)
    save_file(kohya, folder / LORA_FILE, metadata=header(args, step))
    save_file(prefixed, peft_folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = student.peft_config["default"].to_dict() | {"base_model_name_or_path": args.pretrained_teacher_model}
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    (peft_folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    reader = share_weights(teacher)
    state, alphas = pipe.lora_state_dict(folder / LORA_FILE, unet_config=reader.config)
    pipe.load_lora_into_unet(state, network_alphas=alphas, unet=reader)
    loaded = lora_layers(reader)
    wrong = [
        path
        for path, (a, b, scaling) in layers.items()
        if path not in loaded
        or loaded[path][2] != scaling
        or not all(torch.equal(x.to(y), y) for x, y in zip((a, b), loaded[path][:2], strict=True))
    ]
    if wrong or len(loaded) != len(layers):
        fail(
            f"{folder / LORA_FILE}: diffusers loads {len(loaded)} of its {len(layers)} layers, "
            f"{len(wrong)} are missing or differ, the first {wrong[:1]}"
        )
    return f"{folder / LORA_FILE}: {len(layers)} of {len(layers)} layers read back equal"


def checkpoints(output_dir):
    """The checkpoint folders, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def save_checkpoint(pipe, teacher, student, optimizer, lr_scheduler, scaler, args, step):
    """Write checkpoint-<step> under another name, then rename it; afterwards delete the oldest beyond the limit."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    report = save_lora(pipe, teacher, student, part, args, step).replace(str(part), str(folder))
    state = {"step": step, "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()}
    torch.save(state | {"scaler": scaler.state_dict() if scaler else None}, part / STATE_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    if args.checkpoints_total_limit:
        for old in checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)
    return report


def find_checkpoint(args):
    """The folder that --resume_from_checkpoint means, or None where a run with `latest` has none yet."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        return (checkpoints(args.output_dir) or [None])[-1]
    folder = Path(args.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file():
        fail(
            f"--resume_from_checkpoint {folder}: no checkpoint there (no {STATE_FILE}); "
            "give a checkpoint-<step> folder, or `latest`"
        )
    return folder


def load_lora_weights(student, folder):
    """Put a checkpoint's LoRA weights into the student."""
    weights = load_file(folder / "unet" / "adapter_model.safetensors")
    layers = lora_layers(student)
    live = {f"base_model.model.{path}.lora_{n}.weight": w for path, ab in layers.items() for n, w in zip("AB", ab)}
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in live.items()}:
        fail(f"--resume_from_checkpoint {folder}: its LoRA layers are not those of this run; "
             "give the same teacher, --lora_rank and --lora_target_modules")  # fmt: skip
    with torch.no_grad():
        for name, weight in live.items():
            weight.copy_(weights[name])


@torch.no_grad()
def validate(pipe, accelerator, args, step):
    """Draw the validation prompts with the live student in 4 LCM steps, for a file and for all trackers."""
    images = []
    for i, prompt in enumerate(args.validation_prompts):
        z = pipe(
            prompt, num_inference_steps=4, guidance_scale=1.0, height=args.resolution, width=args.resolution,
            generator=torch.Generator().manual_seed(args.seed + i), output_type="latent",
        ).images  # fmt: skip
        pixels = pipe.vae.decode(z.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        images += VaeImageProcessor().postprocess(pixels)
    folder = Path(args.output_dir, "validation")
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    diffusers.utils.make_image_grid(images, 1, len(images)).save(path)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": np.stack([np.asarray(image) for image in images])}, step=step, **layout)
    return f"{path}: the validation prompts in 4 steps"


def peak_memory(device):
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Log:
    """The status line, its mirror log.jsonl and the trackers. Losses stay on the GPU until `flush`."""

    def __init__(self, accelerator, args, step, keep):
        """Start the outputs of a run at `step`; `keep` what log.jsonl says of the steps before it."""
        self.accelerator, self.step, self.pending, self.unreadable = accelerator, step, [], {}
        main = accelerator.is_main_process
        self.file = None
        if main:
            path = Path(args.output_dir, "log.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            libraries = (torch, accelerate, diffusers, transformers, peft, datasets)
            versions = {m.__name__: m.__version__ for m in libraries} | {"python": platform.python_version()}
            about = {"arguments": vars(args), "processes": accelerator.num_processes, "versions": versions}
            Path(args.output_dir, "args.json").write_text(json.dumps(about, indent=2) + "\n")
            old = path.read_text().splitlines(keepends=True) if keep and path.exists() else []
            self.file = path.open("w", buffering=1)
            whole = [line for line in old if line.endswith("\n")]  # a kill may have torn the last one
            self.file.writelines(line for line in whole if json.loads(line)["step"] <= step)
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        wandb = {"dir": accelerator.logging_dir}  # else it writes into the working directory
        accelerator.init_trackers(args.tracker_project_name, plain, {"wandb": wandb})
        self.bar = tqdm(total=args.max_train_steps, initial=step, disable=not main, unit="step", dynamic_ncols=True)
        self.restart_clock()

    def restart_clock(self):
        """Measure the speed from here on; what came before, such as a save, does not count."""
        self.clock, self.clock_step = time.perf_counter(), self.step

    def say(self, line):
        """A line above the bar, from the first process."""
        if self.accelerator.is_main_process:
            self.bar.write(line)

    def warn_of(self, unreadable):
        """Count and name the pictures, {row: why}, that were met for the first time and replaced."""
        new = {row: why for row, why in unreadable.items() if row not in self.unreadable}
        self.unreadable |= new
        if new:
            names = "; ".join(new.values())
            self.bar.write(f"warning: {len(self.unreadable)} unreadable pictures replaced so far: {names}", sys.stderr)

    def add(self, **values):
        """The values of one optimizer step, which this ends."""
        self.step += 1
        self.pending.append({"step": self.step} | values)
        self.bar.update()

    def flush(self, global_batch):
        """Write the pending steps; losses are means over the processes."""
        losses = self.accelerator.reduce(torch.stack([row["loss"] for row in self.pending]), "mean").tolist()
        rate = global_batch * (self.step - self.clock_step) / (time.perf_counter() - self.clock)
        memory = peak_memory(self.accelerator.device)
        for row, loss in zip(self.pending, losses, strict=True):
            row |= {"loss": loss, "grad_norm": float(row["grad_norm"]), "images_per_s": rate, "memory_gib": memory}
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            if self.file:
                self.file.write(json.dumps(row) + "\n")
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f} grad {row['grad_norm']:.3f} lr {row['lr']:.1e} {rate:.1f} img/s {memory:.1f} GiB"
        )
        self.pending = []

    def close(self):
        """The end of the run."""
        self.bar.close()
        if self.file:
            self.file.close()


# -------------------------------------------------------------------------------------------------------- 8. main


def make_accelerator(args):
    """The accelerator, its trackers named but not yet started."""
    try:
        accelerator = Accelerator(
            # Without a GPU the launcher's processes would else not know of each other, and each train alone.
            cpu=not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1,
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        )
    except ValueError as error:
        fail(f"--mixed_precision {args.mixed_precision}: {first_line(error)}")
    if accelerator.mixed_precision not in DTYPES:
        fail(f"mixed precision {accelerator.mixed_precision} is not supported: give --mixed_precision no, fp16 or bf16")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        fail(
            f"{accelerator.distributed_type.value} is not supported, nor needed: the base is frozen, the LoRA small; "
            "launch with --multi_gpu instead"
        )
    return accelerator


def make_optimizer(parameters, args):
    """AdamW over the LoRA weights, and its learning-rate schedule counted in optimizer steps."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    try:
        return optimizer, get_scheduler(args.lr_scheduler, optimizer, **steps)
    except ValueError as error:
        fail(f"--lr_scheduler {args.lr_scheduler}: {first_line(error)}")


def main(argv=None):
    """Set up, train, save."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    dtype = DTYPES[accelerator.mixed_precision]
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")

    quiet_libraries()

    # Models: the teacher, the student over the same weights, the LoRA
    resumed = find_checkpoint(args)
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    pipe = load_teacher(args, dtype)
    teacher, vae = pipe.unet, pipe.vae
    args.resolution = args.resolution or teacher.config.sample_size * vae_factor(vae)
    if args.resolution % vae_factor(vae):
        fail(f"--resolution {args.resolution}: it must be a multiple of the VAE's factor, {vae_factor(vae)}")
    schedule = NoiseSchedule(pipe.scheduler.config, device)
    if args.num_ddim_timesteps > len(schedule.alpha):
        fail(f"--num_ddim_timesteps {args.num_ddim_timesteps}: the teacher has {len(schedule.alpha)} timesteps")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(device)
    student = attach_lora(share_weights(teacher), args)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    trained = [p for p in student.parameters() if p.requires_grad]

    # Data: an endless seeded stream, cut into global batches of G pictures
    records = load_records(args)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * world
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(records) / global_batch)
    if args.scale_lr:
        args.learning_rate *= global_batch
    samples = Samples(records, args, global_batch)
    samples[0, 0]  # says at once if nothing can be read
    c_null = encode_captions(pipe, [""])
    if args.cache_text_embeddings:
        accelerator.print(f"caching the text embeddings of {len(records)} captions")
        samples.embeddings = cache_text_embeddings(pipe, records, c_null, args, accelerator)

    # Optimizer; the model is wrapped for many processes, the target is the bare module
    optimizer, lr_scheduler = make_optimizer(trained, args)
    target = student
    student, optimizer = accelerator.prepare(student, optimizer)
    step = 0
    if resumed:
        state = torch.load(resumed / STATE_FILE, map_location="cpu", weights_only=True)
        load_lora_weights(target, resumed)
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        step = state["step"]

    # Outputs: nothing is written before this line
    log = Log(accelerator, args, step, keep=bool(resumed))
    # From here on the pipeline is the student's: validation draws with the live weights
    pipe.unet = target
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=args.num_ddim_timesteps)
    pipe.set_progress_bar_config(disable=True)
    batch_size = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {world} processes"
    log.say(f"teacher: {args.pretrained_teacher_model}, {count_parameters(teacher.parameters())}, {dtype}")
    log.say(f"LoRA: {len(lora_layers(target))} layers of rank {args.lora_rank}, {count_parameters(trained)}")
    log.say(f"data: {len(records)} pictures, in a step {batch_size}")
    log.say(f"steps: {step} to {args.max_train_steps}" + (f", resumed from {resumed}" if resumed else ""))

    # The loop
    timesteps = ddim_timesteps(args.num_ddim_timesteps, len(schedule.alpha)).to(device)
    micro_losses = []
    for batch in make_loader(samples, args, step, rank, world):
        log.warn_of(batch["unreadable"])
        with accelerator.accumulate(student):
            drawn = draw_batch(pipe, batch, c_null, timesteps, step, args)
            loss = distillation_loss(teacher, student, target, *drawn, schedule, args)
            accelerator.backward(loss)
            micro_losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        log.add(loss=torch.stack(micro_losses).mean(), grad_norm=grad_norm, lr=lr_scheduler.get_last_lr()[0])
        micro_losses = []
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        step += 1
        last = step == args.max_train_steps
        save = step % args.checkpointing_steps == 0
        draw = args.validation_prompts and (step % args.validation_steps == 0 or last)
        if step % args.logging_steps == 0 or save or draw or last:
            log.flush(global_batch)
        if save and accelerator.is_main_process:
            log.say(save_checkpoint(pipe, teacher, target, optimizer, lr_scheduler, accelerator.scaler, args, step))
        if draw and accelerator.is_main_process:
            log.say(validate(pipe, accelerator, args, step))
        if save or draw:
            accelerator.wait_for_everyone()
            log.restart_clock()

    # The end
    log.close()
    if accelerator.is_main_process:
        print(save_lora(pipe, teacher, target, Path(args.output_dir), args, step))
    accelerator.end_training()


if __name__ == "__main__":
    main()
