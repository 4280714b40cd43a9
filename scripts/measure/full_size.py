"""One optimizer step of a full-size UNet with random weights through the trainer itself, on a CPU or a GPU.

    python scripts/measure/full_size.py sdxl        # or ssd1b, sd15; 6 GB of disk for sdxl

A CPU without bf16 instructions (AVX-512 BF16, AMX) multiplies bf16 tens of times slower than float32, and the step lasts half an
hour: there, `--mixed_precision no` shows the same layers in minutes, with twice the memory for the base.

Latents of 32 x 32, batch 1, gradient checkpointing, a small VAE and small text encoders. Prints peak memory, seconds
and the LoRA layers written, and fails unless they are the targets of the UNet, with their shapes.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from official_unets import SD15, SDXL, SSD1B  # noqa: E402

UNETS = {"sd15": SD15, "sdxl": SDXL, "ssd1b": SSD1B}


def text_encoder(tokenizer, width, kind=CLIPTextModel):
    """Two layers; as wide as the real one, for the UNet's sake."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).to(torch.bfloat16)


def random_module(make, dtype, device):
    """What `make()` makes, with random weights, right on the device and in its precision."""
    with torch.device("meta"):
        module = make().to(dtype)
    module = module.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for (
            key,
            p,
        ) in (
            module.named_parameters()
        ):  # about what the layers would be initialised with, but faster
            p.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
            if p.ndim > 1:
                p.uniform_(-1, 1, generator=random).mul_(p[0].numel() ** -0.5)
        for buffer in module.buffers():  # only text encoders have one, the positions
            buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return module


def write_teacher(name, folder):
    """A teacher with a full-size UNet of random bf16 weights, and its UNet's layers {name: weight's shape}."""
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    unet = random_module(lambda: UNet2DConditionModel(**UNETS[name]), torch.bfloat16, "cpu")
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae.to(torch.bfloat16), "tokenizer": tokenizer}
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    if name == "sd15":
        parts |= {
            "text_encoder": text_encoder(tokenizer, 768),
            "safety_checker": None,
            "feature_extractor": None,
        }
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        second = text_encoder(tokenizer, 1280, CLIPTextModelWithProjection)
        parts |= {
            "text_encoder": text_encoder(tokenizer, 768),
            "text_encoder_2": second,
            "tokenizer_2": tokenizer,
        }
        pipe = StableDiffusionXLPipeline(**parts)
    pipe.save_pretrained(folder / "teacher")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        path: tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(module, kinds)
    }


def expected_layers(layers, targets, rank):
    """{key of the LoRA file: shape} of down and up matrices, for every layer that is a target."""
    shapes = {}
    for path, (out, *inner) in layers.items():
        if any(path == target or path.endswith(f".{target}") for target in targets):
            key = "lora_unet_" + path.replace(".", "_")
            shapes |= {f"{key}.lora_down.weight": (rank, *inner)}
            shapes |= {f"{key}.lora_up.weight": (out, rank, *[1] * (len(inner) - 1))}
    return shapes


def main(argv=None):
    """Write the teacher, train one step, check the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=UNETS)
    parser.add_argument(
        "--mixed_precision", choices=["bf16", "no"], default="bf16", help="precision of the base"
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        help="where the random teacher is written (default: a temporary folder)",
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        folder = Path(folder)
        print(f"writing a random {args.model}", flush=True)
        layers = write_teacher(args.model, folder)
        (folder / "pictures").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / "a.png")
        (folder / "pictures" / "metadata.jsonl").write_text(
            '{"file_name": "a.png", "text": "noise"}\n'
        )
        trainer = ROOT / f"train_lcm_lora_{'sd15' if args.model == 'sd15' else 'sdxl'}.py"
        command = [
            sys.executable, trainer, "--pretrained_teacher_model", folder / "teacher", "--train_data_dir",
            folder / "pictures", "--resolution", 256, "--mixed_precision", args.mixed_precision, "--gradient_checkpointing",
            "--train_batch_size", 1, "--max_train_steps", 1, "--report_to", "none", "--output_dir", folder / "out",
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True)
        seconds = time.perf_counter() - start
        spec = importlib.util.spec_from_file_location("trainer", trainer)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with safe_open(folder / "out" / module.LORA_FILE, "pt") as file:
            written = {
                key: tuple(file.get_slice(key).get_shape())
                for key in file.keys()
                if "alpha" not in key
            }  # noqa: SIM118
        expected = expected_layers(layers, module.TARGET_MODULES.split(), 64)
        if written != expected:
            wrong = [
                key
                for key in written.keys() | expected.keys()
                if written.get(key) != expected.get(key)
            ]
            sys.exit(
                f"{len(wrong)} matrices are missing, unexpected or of another shape, the first: {wrong[0]}"
            )
        row = json.loads((folder / "out" / "log.jsonl").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(
        f"{args.model}, mixed precision {args.mixed_precision}: {len(written) // 2} LoRA layers written, all as expected; loss {row['loss']:.3f}, "
        f"{1 / row['images_per_s']:.0f} s for the step, {seconds:.0f} s in all, peak memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
