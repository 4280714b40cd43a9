#!/usr/bin/env python
"""Train the demo teacher: a small Stable Diffusion 1.5 from scratch on demo/data.

    pip install --no-deps open_clip_torch==3.3.0        # for CLIP's BPE file only
    python scripts/demo/train_teacher.py --work_dir /tmp/teacher --output_dir demo/teacher-sd15

Three parts, each kept in --work_dir, so that the same command goes on after a stop:
1. the tokenizer: those entries of CLIP's own vocabulary that the captions need,
2. the autoencoder: 64 x 64 x 3 pixels -> 16 x 16 x 4 latents,
3. the text encoder and the UNet, together, by epsilon prediction (DDPM) with 10% empty captions.
Two CPU cores take about two hours with the defaults, a GPU minutes. The output is a diffusers folder, fp16 safetensors.
"""

import argparse
import copy
import gzip
import importlib.util
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
LATENT_STD = 1 / 0.18215  # so that the scaling factor is Stable Diffusion's
MAX_TOKENS = 32  # the longest caption has 26
SHEET_PROMPTS = 32


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_dir", type=Path, default=ROOT / "demo" / "data", help="folder made by build_dataset.py")
    p.add_argument("--work_dir", type=Path, required=True, help="states, logs and sample sheets of the run")
    p.add_argument("--output_dir", type=Path, default=ROOT / "demo" / "teacher-sd15", help="the finished teacher")
    p.add_argument("--init_from", type=Path, help="go on from this teacher: its VAE as it is, its UNet trained further")
    p.add_argument("--vae_steps", type=int, default=3600, help="optimizer steps of the autoencoder")
    p.add_argument("--vae_batch", type=int, default=8)
    p.add_argument("--vae_lr", type=float, default=1e-3)
    p.add_argument("--unet_steps", type=int, default=10000, help="optimizer steps of text encoder and UNet")
    p.add_argument("--unet_batch", type=int, default=32)
    p.add_argument("--unet_lr", type=float, default=8e-4)
    p.add_argument("--ema_decay", type=float, default=0.999)
    p.add_argument("--snr_gamma", type=float, default=5.0, help="min-SNR loss weights (arXiv 2303.09556)")
    p.add_argument("--save_every", type=int, default=500, help="steps between states")
    p.add_argument("--sheet_every", type=int, default=2000, help="steps between sample sheets")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ the pieces


def build_tokenizer(captions, folder):
    """CLIP's byte-pair encoding, less every merge that can never apply to the words of these captions.

    ASCII words of these captions split exactly as in CLIP; anything else falls apart into smaller pieces, at worst bytes
    (a typographic apostrophe, say, stays three byte tokens).
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        sys.exit("CLIP's BPE file is missing: pip install --no-deps open_clip_torch==3.3.0")
    bpe = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(bpe.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    text = " ".join(
        w + "</w>" for w in sorted({w for c in captions for w in re.findall(r"\d|[^\W\d]+|[^\s\w]+", c.lower())})
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
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def build_vae():
    """Factor 4, 0.95M parameters. Few norm groups: many would rob a small network of its sense of colour."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1 / LATENT_STD,
    )


def build_text_encoder(tokenizer):
    """CLIPTextModel, two layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet():
    """Three levels, 7.4M parameters; attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, in spite of its name, as in Stable Diffusion 1.5
        norm_num_groups=16,
    )


def ddim_scheduler():
    """Stable Diffusion's noise schedule; the few extra settings are those of its own scheduler file."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def read_pictures(data_dir, split):
    """All pictures of a split as uint8 [N,3,64,64], and their captions."""
    data = load_dataset("parquet", data_files=str(data_dir / f"{split}.parquet"), split="train")
    pixels = np.stack([np.asarray(p.convert("RGB")) for p in data["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), list(data["text"])


def to_unit(pixels, device):
    """uint8 0..255 -> float32 -1..1"""
    return pixels.to(device, torch.float32) / 127.5 - 1


# ------------------------------------------------------------------------------------------------ one training run


class Run:
    """What both training parts share: a cosine schedule, an EMA copy, a state to go on from, a status line."""

    def __init__(self, name, modules, lr, steps, args):
        self.name, self.modules, self.steps, self.args = name, modules, steps, args
        self.path = args.work_dir / f"{name}_state.pt"
        self.ema = copy.deepcopy(modules).requires_grad_(False)
        self.opt = torch.optim.AdamW(modules.parameters(), lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
        warmup = min(200, steps // 10 + 1)
        self.lr = torch.optim.lr_scheduler.LambdaLR(
            self.opt, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, s / steps)))
        )
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key in ("modules", "ema", "opt", "lr"):
                getattr(self, key).load_state_dict(state[key])
            self.step = state["step"]
            print(f"{name}: goes on after step {self.step}", flush=True)
        self.clock, self.mean = time.time(), None

    def update(self, loss, images):
        """One optimizer step."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        self.lr.step()
        self.step += 1
        decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.modules.parameters()), 1 - decay)
        if self.step % 50 == 0:
            value, seconds = loss.item(), (time.time() - self.clock) / 50
            self.mean = value if self.mean is None else 0.9 * self.mean + 0.1 * value
            print(
                f"{self.name} {self.step}/{self.steps} loss {self.mean:.4f} lr {self.lr.get_last_lr()[0]:.1e} "
                f"{images / seconds:.0f} images/s, {seconds * (self.steps - self.step) / 60:.0f} min left",
                flush=True,
            )
            self.clock = time.time()
        if self.step % self.args.save_every == 0 or self.step == self.steps:
            state = {k: getattr(self, k).state_dict() for k in ("modules", "ema", "opt", "lr")} | {"step": self.step}
            torch.save(state, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").rename(self.path)


def seed_step(args, step, purpose):
    """Randomness of a step depends on the seed and the step alone, so a stopped run goes on as if it never stopped."""
    seed = int(np.random.SeedSequence([args.seed, step, purpose]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(seed)


def psnr(a, b):
    """Mean over pictures of the peak signal-to-noise ratio, dB; inputs -1..1."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / mse)).mean().item()


@torch.no_grad()
def reconstruction_psnr(vae, pixels, device):
    """PSNR of decode(encode(x)) over all pictures."""
    values = []
    for part in pixels.split(64):
        x = to_unit(part, device)
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x) * len(part))
    return sum(values) / len(pixels)


def train_vae(pixels, args, device):
    """Autoencoder: L1 on pixels and on differences of neighbours (edges), and a small KL term."""
    vae = build_vae().to(device, memory_format=torch.channels_last)
    run = Run("vae", vae, args.vae_lr, args.vae_steps, args)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters", flush=True)
    while run.step < run.steps:
        seed_step(args, run.step, 1)
        x = to_unit(pixels[torch.randint(len(pixels), (args.vae_batch,))], device)
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        dy, dx = torch.randint(0, 9, (2,)).tolist()  # shifted by up to four pixels, white comes in
        x = F.pad(x, (4, 4, 4, 4), value=1.0)[..., dy : dy + 64, dx : dx + 64].contiguous(
            memory_format=torch.channels_last
        )
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        run.update((y - x).abs().mean() + 0.5 * edges + (y - x).square().mean() + 1e-4 * kl, args.vae_batch)
        if run.step % args.sheet_every == 0 or run.step == run.steps:
            rows = to_unit(pixels[:: len(pixels) // SHEET_PROMPTS][:SHEET_PROMPTS], device)
            with torch.no_grad():
                rebuilt = run.ema.decode(run.ema.encode(rows).latent_dist.mode()).sample
            pipe_sheet(torch.cat([rows, rebuilt]), args.work_dir / f"vae_{run.step:06d}.png")
            print(f"vae: PSNR {psnr(rebuilt, rows):.2f} dB on {len(rows)} pictures", flush=True)
    return run.ema.eval()


def pipe_sheet(images, path):
    """Pictures -1..1 as one PNG, 16 in a row."""
    pictures = VaeImageProcessor().postprocess(images, output_type="pil")
    make_image_grid(pictures, len(pictures) // 16, 16).save(path)


@torch.no_grad()
def normalise_latents(vae, pixels, device):
    """Give each latent channel mean 0 and standard deviation LATENT_STD, by folding it into the two 1 x 1 convolutions.

    Encoder: mean' = (mean - m) * g, logvar' = logvar + 2 log g. Decoder: it gets z / g + m back. Nothing else changes.
    """
    means = torch.cat([vae.encode(to_unit(p, device)).latent_dist.mean for p in pixels.split(64)])
    m, g = means.mean(dim=(0, 2, 3)), LATENT_STD / means.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= g[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - m) * g
    quant.bias[4:] += 2 * g.log()
    post.bias += (post.weight[:, :, 0, 0] * m).sum(dim=1)
    post.weight /= g[None, :, None, None]
    return vae


def train_unet(vae, tokenizer, net, pixels, captions, args, device):
    """Text encoder and UNet on the cached latents; eps-prediction, min-SNR weights, 10% empty captions."""
    with torch.no_grad():
        posts = [vae.encode(to_unit(p, device)).latent_dist for p in pixels.split(64)]
    mean, std = (torch.cat([getattr(p, k) for p in posts]) * vae.config.scaling_factor for k in ("mean", "std"))
    print(f"latents: std of means {mean.std():.3f}, mean posterior std {std.mean():.3f}", flush=True)
    ids = tokenizer(
        captions + [""], padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids.to(device)
    scheduler = ddim_scheduler()
    alpha_bar = scheduler.alphas_cumprod.to(device)
    net = torch.nn.ModuleDict(net).requires_grad_(True).to(device)
    net["unet"].to(memory_format=torch.channels_last)
    for part in net:
        print(f"{part}: {sum(p.numel() for p in net[part].parameters()) / 1e6:.2f}M parameters", flush=True)
    run = Run("unet", net, args.unet_lr, args.unet_steps, args)
    while run.step < run.steps:
        seed_step(args, run.step, 2)
        i = torch.randint(len(captions), (args.unet_batch,)).to(device)
        z = (mean[i] + std[i] * torch.randn(mean[i].shape).to(device)).contiguous(memory_format=torch.channels_last)
        i = torch.where(torch.rand(len(i)).to(device) < 0.1, len(captions), i)
        # One timestep from each of B equal parts of 0..999: less noise in the loss than B free draws.
        t = (((torch.arange(len(i)) + torch.rand(len(i))) / len(i)) * 1000).long().to(device)
        noise = torch.randn(z.shape).to(device)
        a = alpha_bar[t][:, None, None, None]
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            eps = net["unet"](z_t, t, net["text_encoder"](ids[i]).last_hidden_state).sample
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = snr.clamp(max=args.snr_gamma) / snr
        run.update((weight * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean(), args.unet_batch)
        if run.step % args.sheet_every == 0 or run.step == run.steps:
            pipe = build_pipeline(vae, run.ema, tokenizer)
            prompts = captions[:: len(captions) // SHEET_PROMPTS][:SHEET_PROMPTS]
            images = pipe(
                prompts, num_inference_steps=50, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)
            ).images
            make_image_grid(images, len(images) // 16, 16).save(args.work_dir / f"unet_{run.step:06d}.png")
            run.clock = time.time()
    return run.ema.eval()


def build_pipeline(vae, net, tokenizer):
    """The parts as a Stable Diffusion pipeline."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=net["text_encoder"],
        tokenizer=tokenizer,
        unet=net["unet"],
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, captions = read_pictures(args.data_dir, "train")
    unseen, unseen_captions = read_pictures(args.data_dir, "twemoji")
    torch.manual_seed(args.seed)  # the VAE's first weights
    if args.init_from:
        start = StableDiffusionPipeline.from_pretrained(
            args.init_from, use_safetensors=True, safety_checker=None, dtype=torch.float32
        )
        tokenizer, vae = start.tokenizer, start.vae.to(device)
        net = {"text_encoder": start.text_encoder, "unet": start.unet}
    else:
        tokenizer = build_tokenizer(captions + unseen_captions, args.work_dir / "tokenizer")
        vae = normalise_latents(train_vae(pixels, args, device), pixels, device)
        torch.manual_seed(args.seed)
        net = {"text_encoder": build_text_encoder(tokenizer), "unet": build_unet()}
    print(
        f"{len(captions)} pictures, {len(tokenizer)} tokens; vae: PSNR "
        f"{reconstruction_psnr(vae, pixels, device):.2f} dB on the training pictures, "
        f"{reconstruction_psnr(vae, unseen, device):.2f} dB on the unseen style",
        flush=True,
    )
    net = train_unet(vae.requires_grad_(False), tokenizer, net, pixels, captions, args, device)
    pipe = build_pipeline(vae.half(), net.half(), tokenizer)
    pipe.save_pretrained(args.output_dir)
    # transformers opens a model in the precision its config names, diffusers in float32: let them agree.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    size = sum(f.stat().st_size for f in args.output_dir.rglob("*") if f.is_file())
    print(f"{args.output_dir}: {size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
