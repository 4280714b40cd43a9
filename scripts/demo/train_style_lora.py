#!/usr/bin/env python
"""Teach the SD 1.5 demo teacher a style that it never saw: by a LoRA, or its whole UNet.

    python scripts/demo/train_style_lora.py --output_dir outputs/style-lora
    python scripts/demo/train_style_lora.py --style blueprint --output_dir outputs/blueprint-lora
    python scripts/demo/train_style_lora.py --full --learning_rate 2e-4 \\
        --output_dir outputs/style-teacher

Plain epsilon prediction on demo/data/twemoji.parquet with 10% empty captions; or, for a style that
is seen at a glance, on Noto's images of demo/data/train.parquet in white on blue. Autoencoder and
text encoder stay as they are. Writes an ordinary LoRA with diffusers' own names, or with --full a whole
teacher: what people share, made without this project's trainers.
"""

import argparse
import math
import sys
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import save
from train_teacher import ROOT, apply_umask, read_images, seed_step, to_unit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "time_emb_proj"
).split()


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --output_dir FOLDER [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    add("--output_dir", **folder, required=True, help="gets the LoRA or the teacher")
    teacher, data = ROOT / "demo" / "teacher-sd15", ROOT / "demo" / "data"
    add("--teacher", **folder, default=teacher, help="the SD 1.5 model to teach")
    add("--data_dir", **folder, default=data, help="folder with twemoji.parquet")
    styles = ["twemoji", "blueprint"]
    add("--style", choices=styles, default="twemoji", help="made anew, or Noto's in other colours")
    add("--full", action="store_true", help="train all of the UNet, and write a whole teacher")
    add("--rank", type=int, metavar="R", default=16, help="rank and alpha of the LoRA")
    add("--steps", type=int, metavar="N", default=600, help="optimizer steps")
    add("--batch_size", type=int, metavar="N", default=32, help="images in a batch")
    add("--learning_rate", type=float, metavar="RATE", default=1e-3, help="of AdamW, at its start")
    add("--seed", type=int, metavar="N", default=0, help="everything random follows from it")
    return parser.parse_args(argv)


def blueprints(pixels, captions):
    """Noto's images [N,3,H,W], what was white now blue and what was black white; new captions."""
    rows = [i for i, caption in enumerate(captions) if caption.endswith("noto style")]
    grey = pixels[rows].float().mean(1, keepdim=True) / 255
    white, blue = (
        torch.tensor(c)[None, :, None, None] for c in ((235.0, 245, 255), (20.0, 60, 150))
    )
    words = [captions[i].replace("noto style", "blueprint style") for i in rows]
    return (grey * blue + (1 - grey) * white).round().byte(), words


@torch.no_grad()
def encode(pipe, pixels, captions):
    """The encoded data: mean, std [N,4,h,w] of z, prompt [N+1,L,D] with the empty one last."""
    posteriors = [
        pipe.vae.encode(to_unit(part, pipe.device)).latent_dist for part in pixels.split(8)
    ]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    words = [*captions, ""]
    parts = [
        pipe.encode_prompt(words[i : i + 64], pipe.device, 1, False)[0]
        for i in range(0, len(words), 64)
    ]
    scale = pipe.vae.config.scaling_factor
    return mean * scale, std * scale, torch.cat(parts)


def train(unet, parameters, data, alpha_bar, args):
    """AdamW on |eps_theta(z_t, t, c) - eps|^2, a cosine schedule to 0."""
    mean, std, prompt = data
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)),
    )
    for step in range(args.steps):
        seed_step(args, step, 5)
        rows = torch.randint(len(mean), (args.batch_size,)).to(mean.device)
        noise = torch.randn(2, len(rows), *mean.shape[1:]).to(mean.device)
        z = mean[rows] + std[rows] * noise[0]
        words = torch.where(torch.rand(len(rows)).to(rows.device) < 0.1, len(mean), rows)
        t = (
            (((torch.arange(len(rows)) + torch.rand(len(rows))) / len(rows)) * len(alpha_bar))
            .long()
            .to(rows.device)
        )
        a = alpha_bar[t][:, None, None, None]
        loss = F.mse_loss(
            unet(a.sqrt() * z + (1 - a).sqrt() * noise[1], t, prompt[words]).sample, noise[1]
        )
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
    pipe = DiffusionPipeline.from_pretrained(
        args.teacher, use_safetensors=True, dtype=torch.float32
    ).to(device)
    pixels, captions = read_images(args.data_dir, "twemoji")
    if args.style == "blueprint":
        pixels, captions = blueprints(*read_images(args.data_dir, "train"))
    data = encode(pipe, pixels, captions)
    pipe.unet.requires_grad_(args.full)
    if not args.full:
        torch.manual_seed(args.seed)
        pipe.unet.add_adapter(
            peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
        )
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters) / 1e6
    print(f"{len(captions)} images, {count:.2f}M trained parameters", flush=True)
    train(pipe.unet, parameters, data, pipe.scheduler.alphas_cumprod.to(device), args)
    if args.full:
        pipe.to(dtype=torch.float16).save_pretrained(args.output_dir)
        apply_umask(args.output_dir)
    else:
        # One naming for all layers: convert_state_dict_to_diffusers would give attention another,
        # and the loader drop it.
        lora = peft.get_peft_model_state_dict(pipe.unet)
        tensors = {f"unet.{name}": weight.cpu().contiguous() for name, weight in lora.items()}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        file = args.output_dir / "pytorch_lora_weights.safetensors"
        file.write_bytes(save(tensors, {"format": "pt"}))
    print(args.output_dir)


if __name__ == "__main__":
    main()
