#!/usr/bin/env python
"""Train a demo teacher: a small Stable Diffusion 1.5 from scratch, or from it one of SDXL's layout.

    pip install --no-deps open_clip_torch==3.3.0        # for CLIP's BPE file only
    python scripts/demo/train_teacher.py --work_dir /tmp/teacher
    python scripts/demo/train_teacher.py --layout sdxl --init_from demo/teacher-sd15 \
        --work_dir /tmp/xl --vae_steps 0 --text_steps 1500 --unet_steps 2000 --unet_lr 5e-4

Its parts, each kept in --work_dir, so that the same command goes on after a stop or a kill:
1. the tokenizer: those entries of CLIP's own vocabulary that the captions need,
2. the autoencoder: 128 px images -> 16 x 16 x 4 latents (factor 8),
3. the text encoders and the UNet, together, by epsilon prediction (DDPM) with 10% empty captions;
   after --freeze_text steps the UNet alone, on text embeddings that were computed once.
--init_from a teacher of the other layout takes tokenizer, autoencoder and UNet from it; the new
text encoders first learn to say what the old one says, so that the UNet understands them from the
start. --cooldown 0.1 keeps the learning rate until the last tenth of the steps: train with a large
--unet_steps for as long as there is time, then give one that ends the run. The output is a
diffusers folder, fp16 safetensors; with --unet_steps at or below the saved step nothing is
trained, and it shows the run so far. --decoder_steps makes images sharper at any later time.
On two CPU cores the UNet was seen to train on 36 (AMD EPYC) to 75 (Intel Xeon) images/s: 10,000
steps take 70 to 150 minutes. On a GPU add --cuda_graph, larger batches, and --vae_minutes and
--unet_minutes: a part then ends in time, cooldown and all, however fast the GPU is.
"""

import argparse
import copy
import functools
import gzip
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
LATENT_STD = 1 / 0.18215  # so that the scaling factor is Stable Diffusion's
MAX_TOKENS = 32  # the longest caption has 13
SHEET_PROMPTS = 32
CROP_SHARE = 0.3  # of SDXL's batches


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--layout", choices=["sd15", "sdxl"], default="sd15")
    p.add_argument(
        "--data_dir",
        type=Path,
        default=ROOT / "demo" / "data",
        help="folder made by build_dataset.py",
    )
    p.add_argument(
        "--work_dir", type=Path, required=True, help="states, logs and sample sheets of the run"
    )
    p.add_argument(
        "--output_dir", type=Path, help="the finished teacher (default: demo/teacher-<layout>)"
    )
    p.add_argument(
        "--init_from", type=Path, help="go on from this teacher, of this layout or the other"
    )
    p.add_argument("--vae_steps", type=int, default=3600, help="optimizer steps of the autoencoder")
    p.add_argument(
        "--vae_minutes", type=float, default=math.inf, help="or as many steps as this time allows"
    )
    p.add_argument(
        "--decoder_steps",
        type=int,
        default=0,
        help="further steps of the autoencoder's decoder alone, at any time: the UNet still fits",
    )
    p.add_argument("--vae_batch", type=int, default=8)
    p.add_argument("--vae_lr", type=float, default=1e-3)
    p.add_argument(
        "--kl_weight",
        type=float,
        default=1e-2,
        help="a decoder that forgives errors in the latents",
    )
    p.add_argument(
        "--se_weight",
        type=float,
        default=0.25,
        help="half-size latents decode to half-size images",
    )
    p.add_argument(
        "--text_steps",
        type=int,
        default=2000,
        help="steps in which new text encoders imitate the old one",
    )
    p.add_argument(
        "--unet_steps", type=int, default=10000, help="optimizer steps of text encoder and UNet"
    )
    p.add_argument(
        "--unet_minutes", type=float, default=math.inf, help="or as many steps as this time allows"
    )
    p.add_argument("--unet_batch", type=int, default=32)
    p.add_argument("--unet_lr", type=float, default=8e-4)
    p.add_argument(
        "--cooldown",
        type=float,
        default=1.0,
        help="the last share of the UNet's run, over which the learning rate falls to 0",
    )
    p.add_argument(
        "--freeze_text",
        type=int,
        default=10**9,
        help="after so many steps the text encoders stay as they are, and a step is faster",
    )
    p.add_argument(
        "--crop_sets",
        type=int,
        default=1,
        help="SDXL: crops of each image, every second set of them from smaller originals",
    )
    p.add_argument("--ema_decay", type=float, default=0.999)
    p.add_argument(
        "--snr_gamma", type=float, default=5.0, help="min-SNR loss weights (arXiv 2303.09556)"
    )
    p.add_argument("--save_minutes", type=float, default=4, help="time between states")
    p.add_argument(
        "--bf16",
        action="store_true",
        help="on a CPU too: faster where the CPU has bfloat16 instructions, slower elsewhere",
    )
    p.add_argument(
        "--cuda_graph",
        action="store_true",
        help="on a GPU: record a step's many small kernels once, then start them all with one call",
    )
    p.add_argument("--sheet_every", type=int, default=2000, help="steps between sample sheets")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    args.output_dir = args.output_dir or ROOT / "demo" / f"teacher-{args.layout}"
    return args


# -------------------------------------------------------------------------------- the pieces


def build_tokenizer(captions, folder):
    """CLIP's byte-pair encoding, less every merge that can never apply to these captions' words.

    ASCII words of these captions split exactly as in CLIP; anything else falls apart into smaller
    pieces, at worst bytes (a typographic apostrophe, say, stays three byte tokens).
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        sys.exit("CLIP's BPE file is missing: pip install --no-deps open_clip_torch==3.3.0")
    bpe = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(bpe.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    text = " ".join(
        w + "</w>"
        for w in sorted(
            {w for c in captions for w in re.findall(r"\d|[^\W\d]+|[^\s\w]+", c.lower())}
        )
    )
    merges = [m for m in merges if m.replace(" ", "") in text]
    # GPT-2's table from bytes to printable characters: the printable ones stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(
        folder, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )


def build_vae(side):
    """Factor 8, 1.10M parameters; `side` is that of the images, 128 px in demo/data.

    Few norm groups: many would rob a small network of its sense of colour. Few channels in the
    outermost levels, where they cost most.
    """
    channels = (24, 48, 64, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=side,
        scaling_factor=1 / LATENT_STD,
    )


def build_text_encoders(tokenizer, layout):
    """CLIPTextModel, two layers of width 128; for SDXL two encoders that give 128 together.

    SDXL reads the layer before the last: the second of three.
    """

    def config(width, layers):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    if layout == "sd15":
        return {"text_encoder": CLIPTextModel(config(128, 2))}
    return {
        "text_encoder": CLIPTextModel(config(48, 3)),
        "text_encoder_2": CLIPTextModelWithProjection(config(80, 3)),
    }


def build_unet(layout):
    """Three levels, 7.4M parameters (SDXL: 7.6M); attention at 8 x 8 and 4 x 4."""
    conditioning = {}
    if layout == "sdxl":
        conditioning = {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
        }
        conditioning |= {
            "projection_class_embeddings_input_dim": 80 + 6 * 32
        }  # the pooled output and six sizes
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.5
        norm_num_groups=16,
        cross_attention_dim=128,
        **conditioning,
    )


def ddim_scheduler():
    """Stable Diffusion's noise schedule and the other settings of its scheduler file."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def read_images(data_dir, split):
    """All images of a split as uint8 [N,3,H,W], and their captions."""
    data = pyarrow.parquet.read_table(data_dir / f"{split}.parquet", columns=["image", "text"])
    files = [io.BytesIO(image["bytes"]) for image in data["image"].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), data["text"].to_pylist()


def to_unit(pixels, device):
    """uint8 0..255 -> float32 -1..1"""
    return pixels.to(device, torch.float32) / 127.5 - 1


# -------------------------------------------------------------------------------- one run


class Run:
    """What all training parts share: schedule, EMA copy, a state to go on from, a status line.

    A part ends after `steps`, or after `minutes` of training if that comes first.
    """

    def __init__(self, name, purpose, modules, lr, args, steps, minutes=math.inf, cooldown=1.0):
        self.name, self.purpose, self.modules, self.args = name, purpose, modules, args
        self.lr, self.steps, self.minutes, self.cooldown = lr, steps, minutes, cooldown
        self.path = args.work_dir / f"{name}_state.pt"
        self.ema = copy.deepcopy(modules).requires_grad_(False)
        self.averages, self.parameters = list(self.ema.parameters()), list(modules.parameters())
        self.opt = torch.optim.AdamW(
            self.parameters, lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
        )
        self.step, seconds, self.recorded = 0, 0.0, None
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key in ("modules", "ema", "opt"):
                getattr(self, key).load_state_dict(state[key])
            self.step, seconds = state["step"], state["seconds"]
            print(f"{name}: goes on after step {self.step}", flush=True)
        self.clock = self.saved = time.time()
        self.start, self.mean = self.clock - seconds, None

    def share(self):
        """How much of the run is done, by steps or by time; 1 or more: all of it."""
        minutes = (time.time() - self.start) / 60
        return max(self.step / max(1, self.steps), minutes / self.minutes)

    def train(self, make_batch, report=None):
        """From here to the end. make_batch() gives a loss function and the batch it is called with.

        All that is random is made there, so that the function itself can be recorded.
        """
        begun = self.step
        while self.share() < 1:
            seed_step(self.args, self.step, self.purpose)
            self.update(*make_batch())
            if report and self.step % self.args.sheet_every == 0:
                report()
                self.clock = time.time()
        if self.step > begun:
            self.save()
            if report and self.step % self.args.sheet_every:
                report()
        return self.ema

    def update(self, loss_of, batch):
        """One optimizer step: up over the warm-up, 1, then half a cosine down over the cooldown."""
        loss = self.gradients(loss_of, batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        done = min(1, max(0, self.share() - 1 + self.cooldown) / self.cooldown)
        factor = min((self.step + 1) / min(200, self.steps // 10 + 1), 1)
        factor = min(factor, 0.5 + 0.5 * math.cos(math.pi * done))
        self.opt.param_groups[0]["lr"] = self.lr * factor
        self.opt.step()
        self.step += 1
        decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        if self.step % 50 == 0:
            value, seconds = loss.item(), (time.time() - self.clock) / 50
            self.mean = value if self.mean is None else 0.9 * self.mean + 0.1 * value
            left = seconds * (self.steps - self.step)
            left = min(left, self.start + 60 * self.minutes - time.time()) / 60
            print(
                f"{self.name} {self.step}/{self.steps} loss {self.mean:.4f} "
                f"lr {self.lr * factor:.1e} {len(batch[0]) / seconds:.0f} images/s, "
                f"{left:.1f} min left",
                flush=True,
            )
            self.clock = time.time()
        if time.time() - self.saved > 60 * self.args.save_minutes:
            self.save()

    def gradients(self, loss_of, batch):
        """Forward and backward pass; the loss."""
        if self.args.cuda_graph:
            if loss_of is not self.recorded:
                self.record(loss_of, batch)
            for ours, new in zip(self.inputs, batch, strict=True):
                ours.copy_(new)
            self.graph.replay()  # writes the gradients to the same places again, adds nothing
            return self.loss
        self.opt.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        return loss.detach()

    def record(self, loss_of, batch):
        """Record both passes as a CUDA graph, whose inputs, loss and gradients have fixed places.

        PyTorch wants some passes on another stream first; in them cuDNN also tries its kernels.
        """
        self.graph = self.loss = None
        self.inputs = [x.clone() for x in batch]
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        torch.backends.cudnn.benchmark = True
        with torch.cuda.stream(side):
            for _ in range(3):
                self.opt.zero_grad()
                loss_of(*self.inputs).backward()
        main.wait_stream(side)
        self.opt.zero_grad()  # so that the gradients are made within the graph
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = loss_of(*self.inputs)
            loss.backward()
        torch.backends.cudnn.benchmark = False
        self.loss, self.recorded = loss.detach(), loss_of

    def save(self):
        """Write the state beside the old one and put it in its place: a kill leaves one of both."""
        state = {k: getattr(self, k).state_dict() for k in ("modules", "ema", "opt")}
        state |= {"step": self.step, "seconds": time.time() - self.start}
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)
        self.saved = time.time()


def seed_step(args, step, purpose):
    """Randomness depends on seed and step alone: a stopped run goes on as if it never stopped."""
    seed = int(
        np.random.SeedSequence([args.seed, step, purpose]).generate_state(1, np.uint64)[0] >> 1
    )
    torch.manual_seed(seed)


def psnr(a, b):
    """Mean over images of the peak signal-to-noise ratio, dB; inputs -1..1."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / mse)).mean().item()


@torch.no_grad()
def reconstruction_psnr(vae, pixels, device):
    """PSNR of decode(encode(x)) over all images."""
    values = []
    for part in pixels.split(64):
        x = to_unit(part, device)
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x) * len(part))
    return sum(values) / len(pixels)


def image_distance(y, x):
    """L1 and L2 on pixels, L1 on differences of neighbours (edges); y and x [B,3,H,W] -1..1."""
    edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
    return (y - x).abs().mean() + 0.5 * edges + (y - x).square().mean()


def mixed_precision(args, device):
    """The autocast of a training step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


class GroupNorm(torch.nn.GroupNorm):
    """Group norm under autocast: float32 on a CPU; on a GPU bfloat16 stays (sums are float32)."""

    def forward(self, x):
        """Normalised x [B,C,h,w]."""
        if x.device.type == "cpu":
            return super().forward(x.float())
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def suit_to_bf16(model, device):
    """Give group norm the precision that is fast here; on a CPU leave attention to plain products.

    On a CPU bfloat16 halves the time of convolutions and matrix products, but PyTorch's group norm
    and fused attention are several times slower in it. On a GPU autocast would have group norm
    read and write twice the memory.
    """
    if device.type == "cpu":
        model.set_attn_processor(AttnProcessor())
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.__class__ = GroupNorm


def train_vae(vae, pixels, args, device):
    """Autoencoder with latents that a diffusion model learns fast.

    The KL term adds noise to the latents, so the decoder forgives the UNet's errors. Scale
    equivariance (arXiv 2502.14831), D(half-size E(x)) = half-size x, takes the latents' fine
    noise-like detail away, the hardest part to learn. Both come in over the middle third of the
    run: from the start, noise would drown the colours before they are found.
    """
    vae.to(device, memory_format=torch.channels_last)
    if args.bf16:
        suit_to_bf16(vae, device)
    run = Run("vae", 1, vae, args.vae_lr, args, args.vae_steps, args.vae_minutes)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters", flush=True)
    size = pixels.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)

    def loss_of(halved, x, noise, ramp):
        """The image's distance and KL and, if `halved`, the distance of the half-size image."""
        with mixed_precision(args, device):
            posterior = vae.encode(x).latent_dist
            posterior = DiagonalGaussianDistribution(posterior.parameters.float())
            z = posterior.mean + posterior.std * noise
            whole = vae.decode(z).sample
            half = vae.decode(F.avg_pool2d(z, 2)).sample if halved else None
        kl = posterior.kl().mean() / z[0].numel()
        loss = image_distance(whole.float(), x) + args.kl_weight * ramp.clamp(min=0.01) * kl
        if halved:
            half_loss = image_distance(half.float(), F.avg_pool2d(x, 2))
            loss = loss + args.se_weight * ramp * half_loss
        return loss

    whole_loss, both_losses = (functools.partial(loss_of, halved) for halved in (False, True))

    def make_batch():
        """Images, noise for their latents, and how far both terms have come in."""
        ramp = min(1, max(0, 3 * run.share() - 1))
        x = sample_images(pixels, args.vae_batch, device)
        noise = torch.randn(len(x), 4, size, size, device=device)
        return both_losses if ramp else whole_loss, (x, noise, torch.full((), ramp, device=device))

    return run.train(make_batch, lambda: report_vae(run, run.ema, pixels, args, device)).eval()


def train_decoder(vae, pixels, args, device):
    """The autoencoder's second half alone goes on: sharper images of the same latents."""
    if args.bf16:
        suit_to_bf16(vae, device)
    half = torch.nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    run = Run("decoder", 6, half.requires_grad_(True), args.vae_lr, args, args.decoder_steps)
    averaged = copy.deepcopy(vae)
    averaged.decoder, averaged.post_quant_conv = run.ema["decoder"], run.ema["post_quant_conv"]
    size = pixels.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)

    def loss_of(x, noise):
        """The image's distance."""
        with mixed_precision(args, device):
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
                posterior = DiagonalGaussianDistribution(posterior.parameters.float())
                z = posterior.mean + posterior.std * noise
            y = half["decoder"](half["post_quant_conv"](z))
        return image_distance(y.float(), x)

    def make_batch():
        """Images and noise for their latents."""
        x = sample_images(pixels, args.vae_batch, device)
        return loss_of, (x, torch.randn(len(x), 4, size, size, device=device))

    run.train(make_batch, lambda: report_vae(run, averaged, pixels, args, device))
    return averaged.eval()


def sample_images(pixels, count, device):
    """Random images -1..1, each mirrored or not and shifted by up to a sixteenth of its side."""
    side, shift = pixels.shape[-1], pixels.shape[-1] // 16
    random = functools.partial(torch.randint, device=pixels.device)
    x = F.pad(pixels[random(len(pixels), (count,))], (shift,) * 4, value=255)  # white comes in
    start = random(2 * shift + 1, (2, count, 1))
    rows, columns = start + torch.arange(side, device=pixels.device)
    columns = torch.where(random(2, (count, 1)) == 0, columns.flip(-1), columns)
    image = torch.arange(count, device=pixels.device)[:, None, None]
    x = x[image, :, rows[:, :, None], columns[:, None]]  # [B,side,side,3]
    return to_unit(x, device).permute(0, 3, 1, 2)  # so it is channels_last


@torch.no_grad()
def report_vae(run, vae, pixels, args, device):
    """A sheet of images above their reconstructions, and figures on both halves."""
    rows = to_unit(pixels[:: len(pixels) // SHEET_PROMPTS][:SHEET_PROMPTS], device)
    z = vae.encode(rows).latent_dist
    rebuilt = vae.decode(z.mode()).sample
    pipe_sheet(torch.cat([rows, rebuilt]), args.work_dir / f"{run.name}_{run.step:06d}.png")
    print(
        f"{run.name}: PSNR {psnr(rebuilt, rows):.2f} dB on {len(rows)} images; latents: std of "
        f"means {z.mean.std():.3f}, mean posterior std {z.std.mean():.3f}",
        flush=True,
    )


def pipe_sheet(images, path):
    """Images -1..1 as one PNG, 16 in a row."""
    sheet = VaeImageProcessor().postprocess(images, output_type="pil")
    make_image_grid(sheet, len(sheet) // 16, 16).save(path)


@torch.no_grad()
def normalise_latents(vae, pixels, device, std):
    """Give each latent channel mean 0 and standard deviation std, folded into 1 x 1 convolutions.

    Encoder: mean' = (mean - m) * g, logvar' = logvar + 2 log g. Decoder: it gets z / g + m back.
    Nothing else changes.
    """
    means = torch.cat([vae.encode(to_unit(p, device)).latent_dist.mean for p in pixels.split(64)])
    m, g = means.mean(dim=(0, 2, 3)), std / means.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= g[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - m) * g
    quant.bias[4:] += 2 * g.log()
    post.bias += (post.weight[:, :, 0, 0] * m).sum(dim=1)
    post.weight /= g[None, :, None, None]
    return vae


def conditions(net, ids, empty, sizes):
    """What the UNet gets beside z_t and t: (prompt [B,L,D], further conditions).

    Stable Diffusion: the last hidden state. SDXL: both encoders' penultimate layers side by side,
    the pooled output of the second, zeros for the empty caption, and the sizes (height, width,
    crop's top and left, its height and width).
    """
    if "text_encoder_2" not in net:
        return net["text_encoder"](ids).last_hidden_state, None
    first, second = (
        net[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")
    )
    given = (ids != empty).any(dim=1).float()
    prompt = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return prompt * given[:, None, None], {
        "text_embeds": second.text_embeds * given[:, None],
        "time_ids": sizes,
    }


def borrow(unet, other):
    """Take another layout's UNet: names agree, its 1 x 1 convolutions may be linear maps here."""
    ours = unet.state_dict()
    unet.load_state_dict(
        {k: v.reshape(ours[k].shape) for k, v in other.state_dict().items()}, strict=False
    )
    return unet


def train_text(encoders, other, tokenizer, captions, args, device):
    """Two text encoders learn to say together what another teacher's one says (MSE, all tokens)."""
    ids = token_ids(tokenizer, captions, device)
    empty = ids[-1]
    with torch.no_grad():
        said = other.to(device)(ids[:-1]).last_hidden_state
    encoders = torch.nn.ModuleDict(encoders).to(device)
    run = Run("text", 4, encoders, 2e-3, args, args.text_steps)

    def loss_of(ids, said):
        """The distance to what the other encoder says."""
        return F.mse_loss(conditions(encoders, ids, empty, None)[0], said)

    def make_batch():
        """Some captions, and what the other encoder says of them."""
        i = torch.randint(len(captions), (128,), device=device)
        return loss_of, (ids[i], said[i])

    return dict(run.train(make_batch).items())


def token_ids(tokenizer, captions, device):
    """The captions and, last, the empty one, as int64 [N+1,32]."""
    padded = {
        "padding": "max_length",
        "truncation": True,
        "max_length": MAX_TOKENS,
        "return_tensors": "pt",
    }
    return tokenizer([*captions, ""], **padded).input_ids.to(device)


def crops(pixels, number):
    """Each image enlarged by up to three tenths and cut at a random place, and its sizes for SDXL.

    Odd sets come from originals that were smaller, and so are blurred: half to nearly all of the
    side, the same one for a set.
    """
    count, side = len(pixels), pixels.shape[-1]
    original = side if number % 2 == 0 else torch.randint(side // 2, side, ()).item()
    x = pixels.float()
    if original < side:
        x = F.interpolate(x, size=(original,) * 2, mode="bicubic", antialias=True)
    zoom = 1 + 0.3 * torch.rand(count, device=x.device)
    room = ((zoom - 1) * side).floor()[:, None]
    places = (torch.rand(count, 2, device=x.device) * (room + 1)).floor()
    # Where the crop's pixels lie in the image, whose corners are at -1 and 1.
    window = torch.zeros(count, 2, 3, device=x.device)
    window[:, 0, 0] = window[:, 1, 1] = 1 / zoom
    window[:, :, 2] = (2 * places.flip(1) + side) / (side * zoom[:, None]) - 1
    grid = F.affine_grid(window, (count, 3, side, side), align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    sizes = torch.full((count, 6), side, device=x.device)
    sizes[:, :2], sizes[:, 2:4] = original, places.long()
    return x.round().clamp(0, 255).byte(), sizes


@torch.no_grad()
def freeze_text(run, ids):
    """From now on the text encoders have their averaged weights; returns what they say of ids."""
    for name in run.modules:
        if name != "unet":
            run.modules[name].load_state_dict(run.ema[name].state_dict())
            run.modules[name].requires_grad_(False)
    parts = [conditions(run.modules, part, ids[-1], None) for part in ids.split(256)]
    added = [added for _, added in parts if added]
    pooled = [torch.cat([a["text_embeds"] for a in added])] if added else []
    print(f"text encoders: frozen at step {run.step}", flush=True)
    return torch.cat([prompt for prompt, _ in parts]), *pooled


def train_unet(vae, tokenizer, net, pixels, captions, args, device):
    """Text encoders and UNet on the cached latents; eps-prediction, min-SNR weights."""
    seed_step(args, 0, 3)
    count, side = len(captions), pixels.shape[-1]
    sizes = torch.tensor([side, side, 0, 0, side, side], device=device).repeat(count, 1)
    if args.layout == "sdxl":  # crops behind the images, to give sizes a meaning
        cut = [crops(pixels, number) for number in range(args.crop_sets)]
        pixels = torch.cat([pixels, *(images for images, _ in cut)])
        sizes = torch.cat([sizes, *(their for _, their in cut)])
    with torch.no_grad():
        posts = [vae.encode(to_unit(p, device)).latent_dist for p in pixels.split(64)]
    mean, std = (
        torch.cat([getattr(p, k) for p in posts]) * vae.config.scaling_factor
        for k in ("mean", "std")
    )
    print(
        f"latents: std of means {mean.std():.3f}, mean posterior std {std.mean():.3f}", flush=True
    )
    ids = token_ids(tokenizer, captions, device)
    empty = ids[-1]
    alpha_bar = ddim_scheduler().alphas_cumprod.to(device)
    net = torch.nn.ModuleDict(net).requires_grad_(True).to(device)
    net["unet"].to(memory_format=torch.channels_last)
    if args.bf16:
        suit_to_bf16(net["unet"], device)
    for part in net:
        millions = sum(p.numel() for p in net[part].parameters()) / 1e6
        print(f"{part}: {millions:.2f}M parameters", flush=True)
    minutes, cooldown = args.unet_minutes, args.cooldown
    run = Run("unet", 2, net, args.unet_lr, args, args.unet_steps, minutes, cooldown)
    frozen = None

    def loss_of(still, z_t, t, eps, sizes, *text):
        """min-SNR weighted squared error; text: token ids or, if `still`, what was said of them."""
        with mixed_precision(args, device):
            if still:
                prompt, added = text[0], {"time_ids": sizes}
                added = {"text_embeds": text[1], **added} if len(text) > 1 else None
            else:
                prompt, added = conditions(net, text[0], empty, sizes)
            found = net["unet"](z_t, t, prompt, added_cond_kwargs=added).sample
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = snr.clamp(max=args.snr_gamma) / snr
        return (weight * (found.float() - eps).square().mean(dim=(1, 2, 3))).mean()

    losses = [functools.partial(loss_of, still) for still in (False, True)]
    random = functools.partial(torch.rand, args.unet_batch, device=device)

    def make_batch():
        """Noised latents z_t, timesteps, the noise, sizes and captions."""
        nonlocal frozen
        if frozen is None and run.step >= args.freeze_text:
            frozen = freeze_text(run, ids)
        i = torch.randint(count, (args.unet_batch,), device=device)
        place = i
        if args.layout == "sdxl":
            number = torch.randint(args.crop_sets, (len(i),), device=device) + 1
            place = i + count * torch.where(random() < CROP_SHARE, number, 0)
        noise = torch.randn(2, len(i), *mean.shape[1:], device=device)
        z = mean[place] + std[place] * noise[0]
        i = torch.where(random() < 0.1, count, i)
        # One timestep from each of B equal parts of 0..999: less noise in the loss.
        t = (((torch.arange(len(i), device=device) + random()) / len(i)) * 1000).long()
        a = alpha_bar[t][:, None, None, None]
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise[1]
        z_t = z_t.contiguous(memory_format=torch.channels_last)
        text = [ids[i]] if frozen is None else [said[i] for said in frozen]
        return losses[frozen is not None], (z_t, t, noise[1], sizes[place], *text)

    def report():
        """A sheet of samples."""
        pipe = build_pipeline(vae, run.ema, tokenizer)
        prompts = captions[:: len(captions) // SHEET_PROMPTS][:SHEET_PROMPTS]
        images = pipe(
            prompts,
            num_inference_steps=50,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        ).images
        sheet = args.work_dir / f"unet_{run.step:06d}.png"
        make_image_grid(images, len(images) // 16, 16).save(sheet)

    return run.train(make_batch, report).eval()


def build_pipeline(vae, net, tokenizer):
    """The parts as a pipeline."""
    parts = {"vae": vae, "tokenizer": tokenizer, "scheduler": ddim_scheduler(), **net}
    if "text_encoder_2" in net:
        pipe = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apply_umask(folder):
    """Give weights in a folder the usual permissions: they are written for their owner only."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def main():
    """Read, train what is not yet trained, write."""
    args = parse_args()
    if args.cuda_graph and not torch.cuda.is_available():
        sys.exit("--cuda_graph: PyTorch finds no CUDA GPU here")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.bf16 |= device.type == "cuda"
    pixels, captions = read_images(args.data_dir, "train")
    unseen, unseen_captions = read_images(args.data_dir, "twemoji")
    pixels, unseen = pixels.to(device), unseen.to(device)
    torch.manual_seed(args.seed)  # the first weights
    start = None
    if args.init_from:
        start = DiffusionPipeline.from_pretrained(
            args.init_from, use_safetensors=True, dtype=torch.float32
        )
        tokenizer, vae = start.tokenizer, start.vae.to(device)
        normalise_latents(vae, pixels, device, 1.0)
    else:
        tokenizer = build_tokenizer(captions + unseen_captions, args.work_dir / "tokenizer")
        vae = build_vae(pixels.shape[-1])
    net = build_text_encoders(tokenizer, args.layout) | {"unet": build_unet(args.layout)}
    if start and ("text_encoder_2" in start.components) == (args.layout == "sdxl"):
        net = {name: getattr(start, name) for name in net}
    elif start:
        unet = borrow(net.pop("unet"), start.unet)
        net = train_text(net, start.text_encoder, tokenizer, captions, args, device) | {
            "unet": unet
        }
    vae = train_vae(vae, pixels, args, device) if args.vae_steps else vae.eval()
    if args.decoder_steps:
        vae = train_decoder(vae, pixels, args, device)
    normalise_latents(vae, pixels, device, LATENT_STD)
    print(
        f"{len(captions)} images, {len(tokenizer)} tokens; vae: PSNR "
        f"{reconstruction_psnr(vae, pixels, device):.2f} dB on the training images, "
        f"{reconstruction_psnr(vae, unseen, device):.2f} dB on the unseen style",
        flush=True,
    )
    net = train_unet(vae.requires_grad_(False), tokenizer, net, pixels, captions, args, device)
    pipe = build_pipeline(vae.half(), net.half(), tokenizer)
    pipe.save_pretrained(args.output_dir)
    apply_umask(args.output_dir)
    for config in args.output_dir.glob("*/config.json"):  # not where a part was loaded from
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    for file in args.output_dir.glob("tokenizer*/tokenizer.json"):  # more than half of it is blanks
        file.write_text(
            json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":"))
        )
    # transformers opens a model in the precision of its config, diffusers in float32: so both.
    for config in args.output_dir.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    size = sum(f.stat().st_size for f in args.output_dir.rglob("*") if f.is_file())
    print(f"{args.output_dir}: {size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
