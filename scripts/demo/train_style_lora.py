#!/usr/bin/env python
"""Teach the SD 1.5 demo teacher the style that it never saw, Twemoji: by an ordinary LoRA, or --full, by all of its UNet.

    python scripts/demo/train_style_lora.py --output_dir outputs/style-lora
    python scripts/demo/train_style_lora.py --full --learning_rate 2e-4 --output_dir outputs/style-teacher

Plain epsilon prediction on demo/data/twemoji.parquet with 10% empty captions. Autoencoder and text encoder stay as they are. Writes
the LoRA with diffusers' own names, or with --full a whole teacher: what people share, made without this project's trainers.
"""

import argparse
import math
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from train_teacher import ROOT, read_pictures, seed_step, to_unit

TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj".split()
)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", type=Path, default=ROOT / "demo" / "teacher-sd15")
    p.add_argument("--data_dir", type=Path, default=ROOT / "demo" / "data", help="folder with twemoji.parquet")
    p.add_argument("--full", action="store_true", help="train all weights of the UNet, and write a whole teacher")
    p.add_argument("--rank", type=int, default=16, help="of the LoRA, and its alpha")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--learning_rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output_dir", type=Path, required=True)
    return p.parse_args(argv)


@torch.no_grad()
def encode(pipe, pixels, captions):
    """Each picture's and caption's encoding: mean, std [N,4,h,w] of z, and prompt [N+1,L,D] with the empty one last."""
    posteriors = [pipe.vae.encode(to_unit(part, pipe.device)).latent_dist for part in pixels.split(8)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    words = [*captions, ""]
    parts = [pipe.encode_prompt(words[i : i + 64], pipe.device, 1, False)[0] for i in range(0, len(words), 64)]
    return mean * pipe.vae.config.scaling_factor, std * pipe.vae.config.scaling_factor, torch.cat(parts)


def train(unet, parameters, data, alpha_bar, args):
    """AdamW on |eps_theta(z_t, t, c) - eps|^2, a cosine schedule to 0."""
    mean, std, prompt = data
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    for step in range(args.steps):
        seed_step(args, step, 5)
        rows = torch.randint(len(mean), (args.batch_size,)).to(mean.device)
        noise = torch.randn(2, len(rows), *mean.shape[1:]).to(mean.device)
        z = mean[rows] + std[rows] * noise[0]
        words = torch.where(torch.rand(len(rows)).to(rows.device) < 0.1, len(mean), rows)
        t = (((torch.arange(len(rows)) + torch.rand(len(rows))) / len(rows)) * len(alpha_bar)).long().to(rows.device)
        a = alpha_bar[t][:, None, None, None]
        loss = F.mse_loss(unet(a.sqrt() * z + (1 - a).sqrt() * noise[1], t, prompt[words]).sample, noise[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1}/{args.steps} loss {loss.item():.4f}", flush=True)


def main(argv=None):
    """Load, train, write."""
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(args.teacher, use_safetensors=True, dtype=torch.float32).to(device)
    pixels, captions = read_pictures(args.data_dir, "twemoji")
    data = encode(pipe, pixels, captions)
    pipe.unet.requires_grad_(args.full)
    if not args.full:
        torch.manual_seed(args.seed)
        pipe.unet.add_adapter(peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    print(f"{len(captions)} pictures, {sum(p.numel() for p in parameters) / 1e6:.2f}M trained parameters", flush=True)
    train(pipe.unet, parameters, data, pipe.scheduler.alphas_cumprod.to(device), args)
    if args.full:
        pipe.to(dtype=torch.float16).save_pretrained(args.output_dir)
    else:
        # One naming for all layers: convert_state_dict_to_diffusers would give attention another, and the loader drop it.
        StableDiffusionPipeline.save_lora_weights(args.output_dir, peft.get_peft_model_state_dict(pipe.unet))
    print(args.output_dir)


if __name__ == "__main__":
    main()
