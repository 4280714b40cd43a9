"""One optimizer step of a full-size UNet with random weights through the trainer itself.

    python scripts/measure/full_size.py sdxl        # or ssd1b, sd15; 6 GB of disk for sdxl
    python scripts/measure/full_size.py sdxl --mixed_precision fp16 -- --quantize_base nf4

On a CPU or a GPU. A CPU without bf16 instructions (AVX-512 BF16, AMX) multiplies bf16 tens of times
slower than float32, and the step lasts half an hour: there, `--mixed_precision no` shows the same
layers in minutes, with twice the memory for the base.

Latents of 32 x 32, batch 1, gradient checkpointing, a small VAE and small text encoders; the
trainer's flags after `--` come on top. Prints peak memory (the GPU's, else the process's), seconds
and the LoRA layers written, and fails unless they are the targets of the UNet, with their shapes.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from official_unets import UNETS, random_module
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the trainers, help_formatter.py
from help_formatter import HelpFormatter


def text_encoder(tokenizer, width, kind=CLIPTextModel):
    """Two layers; as wide as the real one, for the UNet's sake."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).to(torch.bfloat16)


def write_teacher(name, folder):
    """Write a teacher whose full-size UNet has random bf16 weights; {layer: weight's shape}."""
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = CLIPTokenizer(*files, model_max_length=77)
    unet = random_module(lambda: UNet2DConditionModel(**UNETS[name]), torch.bfloat16, "cpu")
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    parts = {"unet": unet, "vae": vae.to(torch.bfloat16), "tokenizer": tokenizer}
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    parts["text_encoder"] = text_encoder(tokenizer, 768)
    if name == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        second = text_encoder(tokenizer, 1280, CLIPTextModelWithProjection)
        parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        pipe = StableDiffusionXLPipeline(**parts)
    pipe.save_pretrained(folder / "teacher")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {path: module for path, module in unet.named_modules() if isinstance(module, kinds)}
    return {path: tuple(layer.weight.shape) for path, layer in layers.items()}


def expected_layers(layers, trainer, unet, rank):
    """{key of the LoRA file: shape} of down and up matrices, for every layer that is a target."""
    shapes, targets = {}, trainer.TARGET_MODULES.split()
    for path, (out, *inner) in layers.items():
        if any(path == target or path.endswith(f".{target}") for target in targets):
            key = "lora_unet_" + trainer.name_in_file(path, unet).replace(".", "_")
            shapes |= {f"{key}.lora_down.weight": (rank, *inner)}
            shapes |= {f"{key}.lora_up.weight": (out, rank, *[1] * (len(inner) - 1))}
    return shapes


def train(folder, family, precision, flags):
    """One step on an image of noise, with further flags; the seconds it took."""
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    row = '{"file_name": "a.png", "text": "noise"}\n'
    (folder / "images" / "metadata.jsonl").write_text(row)
    command = [sys.executable, ROOT / f"train_lcm_lora_{family}.py"]
    command += ["--pretrained_teacher_model", folder / "teacher"]
    command += ["--train_data_dir", folder / "images", "--output_dir", folder / "out"]
    command += "--resolution 256 --train_batch_size 1 --max_train_steps 1".split()
    command += f"--gradient_checkpointing --mixed_precision {precision} --report_to none".split()
    command += flags
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def main(argv=None):
    """Write the teacher, train one step, check the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add, base = parser.add_argument, "precision of the base"
    add("model", choices=UNETS, help="the UNet to train")
    add("--mixed_precision", choices=["bf16", "fp16", "no"], default="bf16", help=base)
    where = "where the random teacher is written (default: a temporary folder)"
    add("--work_dir", type=Path, metavar="FOLDER", help=where)
    add("flags", nargs="*", metavar="-- FLAG", help="of the trainer, on top")
    args = parser.parse_args(argv)
    family = "sd15" if args.model == "sd15" else "sdxl"
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        folder = Path(folder)
        print(f"writing a random {args.model}", file=sys.stderr)
        layers = write_teacher(args.model, folder)
        seconds = train(folder, family, args.mixed_precision, args.flags)
        with safe_open(folder / "out" / trainer.LORA_FILE, "pt") as file:
            keys = [key for key in file.keys() if "alpha" not in key]  # noqa: SIM118
            written = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        expected = expected_layers(layers, trainer, SimpleNamespace(**UNETS[args.model]), 64)
        keys = written.keys() | expected.keys()
        if wrong := [key for key in keys if written.get(key) != expected.get(key)]:
            problem = "matrices are missing, unexpected or of another shape"
            sys.exit(f"{len(wrong)} {problem}, the first: {wrong[0]}")
        row = json.loads((folder / "out" / "log.jsonl").read_text())
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    if torch.cuda.is_available():
        peak = row["memory_gib"]
    settings = ", ".join([f"mixed precision {args.mixed_precision}", *args.flags])
    print(
        f"{args.model}, {settings}: {len(written) // 2} LoRA layers "
        f"written, all as expected; loss {row['loss']:.3f}, {1 / row['images_per_s']:.0f} s for "
        f"the step, {seconds:.0f} s in all, peak memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
