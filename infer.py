"""Generate images with an LCM-LoRA: few steps, no guidance, any number of prompts.

    python infer.py --lora runs/my-lora --prompt "a red apple, Noto style" --output apple.png
    python infer.py --lora runs/my-lora --prompt "a red apple" "a house" --compare --output grid.png
    python infer.py --lora runs/my-lora --prompt "a cat" --image cat.png --strength 0.6 --steps 2 4
    python infer.py --lora runs/my-lora --fused_output my-fast-model

The base model and the number of DDIM steps are read from the header of the LoRA file. After
loading, every matrix and every scaling is compared with the file: a LoRA that is only partly
applied is an error. scripts/compare.py makes the grids, scripts/fuse_lora.py the merged models.
"""

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import re
import runpy
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin


def fail(message):
    """End the program with one line on stderr and exit code 1."""
    raise SystemExit("error: " + " ".join(str(message).split()))


@contextlib.contextmanager
def or_fail(what, advice=""):
    """A block that ends the program with one line on any error: each library has its own."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        fail(f"{what} ({type(error).__name__}: {reason})" + (f"; {advice}" if advice else ""))


def warn(message):
    """Say on stderr what probably is not intended."""
    print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------- 1. Arguments

HERE = Path(__file__).resolve().parent
COMPARE, FUSE = (HERE / "scripts" / name for name in ("compare.py", "fuse_lora.py"))
# Trailing spacing, 999, 979 ... 19, is the grid that the LoRA was distilled on. It starts at
# t = 999, where the latent really is noise: with "leading", SD's usual setting, one step would
# start at t = 1 and return noise. Latents are not images: they are never clipped to [-1, 1].
TRAILING, UNCLIPPED = {"timestep_spacing": "trailing"}, {"clip_sample": False}
# Second order, the last step first order (the library's default below 15 steps) and down to
# sigma = 0, so one step is the teacher's own prediction of the clean latent.
SECOND_ORDER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
# {what --scheduler names: (class in diffusers, name in A1111, settings)}
SCHEDULERS = {
    "lcm": ("LCMScheduler", "LCM", UNCLIPPED),
    "tcd": ("TCDScheduler", "TCD", UNCLIPPED),
    "ddim": ("DDIMScheduler", "DDIM", TRAILING | UNCLIPPED),
    "dpm++": ("DPMSolverMultistepScheduler", "DPM++ 2M", TRAILING | SECOND_ORDER),
    "euler": ("EulerDiscreteScheduler", "Euler", TRAILING),
}
DISTILLED = ("lcm", "tcd")  # those that step over the LoRA's own timesteps
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LIMITS = {"seed": (0, 2**32 - 1), "height": (1, 10**6), "width": (1, 10**6)}
USAGE = """%(prog)s --lora PATH --prompt TEXT [TEXT ...] [--output FILE.png] [more flags]
       %(prog)s --lora PATH --prompt TEXT [TEXT ...] --compare [--output GRID.png] [more flags]
       %(prog)s --lora PATH --fused_output FOLDER [more flags]"""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action):
        none = str(action.default) in ("None", "False", "[]")
        return action.help if none else super()._get_help_string(action)


def number(kind, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} from {low} to {high}")

    return convert


def weighted(weight, default):
    """An argparse type: PATH or PATH:WEIGHT, as (path, weight); a path may contain a colon."""

    def convert(text):
        match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", text)
        split = match and not Path(text).exists()
        return (match[1], weight(match[2])) if split else (text, default)

    return convert


def parse_args(argv=None):
    """Read the command line; what can be judged without a model is judged here."""
    parser = argparse.ArgumentParser(description=__doc__, usage=USAGE)
    parser.formatter_class = lambda prog: Help(prog, max_help_position=32)
    parser.error = lambda message: fail(f"{message} (python infer.py --help lists every flag)")
    model, file, text = ({"metavar": name} for name in ("FOLDER_OR_ID", "FILE", "TEXT"))
    png, folder = ({"metavar": name, "type": Path} for name in ("FILE.png", "FOLDER"))
    weight = {"metavar": "WEIGHT", "type": number(float, -10, 10)}
    styles = {"metavar": "PATH[:WEIGHT]", "type": weighted(weight["type"], 0.8)}
    styles |= {"nargs": "+", "action": "extend"}
    names = {"metavar": "NAME", "choices": SCHEDULERS, "nargs": "+"}
    steps = {"metavar": "STEPS", "type": number(int, 1, 1000), "nargs": "+"}
    count = {"metavar": "IMAGES", "type": number(int, 1, 10**6)}
    pixels = {"metavar": "PIXELS", "type": number(int, *LIMITS["width"])}
    seed = {"metavar": "SEED", "type": number(int, *LIMITS["seed"]), "default": 0}
    scale = {"metavar": "SCALE", "type": number(float, 0, 1000)}
    share = {"metavar": "SHARE", "type": number(float, 0, 1)}

    add = parser.add_argument_group("Model").add_argument
    add("--lora", required=True, metavar="PATH", help="LCM-LoRA: .safetensors file or a folder")
    add("--lcm_weight", "--lora_scale", **weight, default=1.0, help="1: as strong as trained")
    add("--style_lora", **styles, default=[], help="LoRAs to add (default WEIGHT: 0.8)")
    add("--base_model", metavar="PATH_OR_ID", help="default: the one in the LoRA's header")
    add("--base_config", "--teacher_config", **model, help="configs of a base model in one file")
    add("--variant", metavar="NAME", help="variant of the base model's weight files, e.g. fp16")
    add("--tiny_vae", **model, help="AutoencoderTiny instead of the base model's VAE")
    add("--device", default="auto", help="auto: cuda, else mps, else cpu; or e.g. cuda:1")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: fp16 on cuda, else fp32")
    add("--compile", action="store_true", help="compile the UNet: slow at first, then faster")

    add = parser.add_argument_group("Image").add_argument
    add("--prompt", **text, nargs="+", default=[], help="one or more, each in quotes")
    add("--prompts_file", **file, help="a prompt per line; or .jsonl: " + ", ".join(Job._fields))
    add("--negative_prompt", **text, help="has an effect only if guidance is above 1")
    add("--steps", **steps, help="UNet passes per image (default: 4); several: an image for each")
    add("--scheduler", **names, help=f"{', '.join(SCHEDULERS)} (default: lcm); several in a grid")
    add("--guidance_scale", **scale, default=1.0, help="1 to 2; above 1 a step is two UNet passes")
    add("--seed", **seed, help="of the first image; image i has SEED + i")
    add("--num_images", **count, default=1, help="per prompt")
    add("--height", **pixels, help="default: that of --image, else the base model's own")
    add("--width", **pixels, help="default: that of --image, else the base model's own")
    add("--batch_size", **count, default=4, help="at a time: a matter of memory and speed only")

    add = parser.add_argument_group("Images to start from").add_argument
    add("--image", **file, help="start of img2img, or of inpainting if --mask is given")
    add("--mask", **file, help="white is generated, black stays as it is in --image")
    add("--strength", **share, help="of the steps that are taken (default: 0.8, with --mask 1)")
    add("--controlnet", **model, help="a ControlNet of the base model's layout")
    add("--control_image", **file, help="input of the ControlNet: edges, depth, a pose ...")
    add("--controlnet_scale", **scale, default=1.0, help="1: as strong as trained")

    add = parser.add_argument_group("Output").add_argument
    add("--output", **png, default=Path("lcm.png"), help="several: FILE-0.png, FILE-1.png ...")
    add("--compare", action="store_true", help="a grid: a column per scheduler and step count")
    add("--compare_guidance", **scale, help="of the teacher (default: 1 + mean training omega)")
    add("--fused_output", **folder, help="save the base model with the LoRA merged in")

    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args, parser):
    """Refuse what does not go together; fill in the strength."""
    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        fail(f"--output {args.output}: must name a .png file")
    if args.prompt and args.prompts_file:
        fail("--prompt and --prompts_file do not go together: give one of them")
    folder = args.fused_output
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"--fused_output {folder}: must be a new or an empty folder")
    prompts = args.prompt or args.prompts_file
    if not prompts and not args.fused_output:
        fail("nothing to do: give --prompt, --prompts_file or --fused_output")
    image = "image controlnet steps scheduler seed num_images height width batch_size"
    output = "guidance_scale negative_prompt compare output compile"
    # (flags, what they need to have an effect, its name)
    for names, effect, needed in (
        (f"{image} {output}", prompts, "--prompt or --prompts_file"),
        ("mask strength", args.image, "--image"),
        ("controlnet", args.control_image, "--control_image"),
        ("control_image controlnet_scale", args.controlnet, "--controlnet"),
        ("compare_guidance", args.compare, "--compare"),
    ):
        for name in names.split():
            if getattr(args, name) != parser.get_default(name) and not effect:
                fail(f"--{name} has no effect without {needed}")
    for flag, program in ("compare", COMPARE), ("fused_output", FUSE):
        if getattr(args, flag) and not program.is_file():
            fail(f"--{flag} needs scripts/{program.name} beside infer.py: copy it there too")
    if args.compare and args.num_images != 1:
        fail("--num_images does not go with --compare: one image per cell")
    if len(args.scheduler or ()) > 1 and not args.compare:
        fail(f"--scheduler {' '.join(args.scheduler)}: several need --compare")
    if args.image and args.strength is None:
        args.strength = 1.0 if args.mask else 0.8


class Job(NamedTuple):
    """An image to generate; height and width are in pixels."""

    prompt: str
    negative_prompt: str | None
    seed: int
    height: int | None
    width: int | None


def read_lines(file):
    """The prompts in --prompts_file, each a dict of the fields of a job that its line names."""
    with or_fail(f"--prompts_file {file}: cannot be read as text"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for index, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            rows.append({"prompt": line})
            if Path(file).suffix.lower() == ".jsonl":
                rows[-1] = read_row(line, f"--prompts_file {file}, line {index}")
    return rows or fail(f"--prompts_file {file}: it contains no prompt")


def read_row(line, where):
    """A line of a .jsonl file: an object with a prompt, no unknown key and valid values."""
    with or_fail(f"{where}: not JSON"):
        row = json.loads(line)
    if not isinstance(row, dict) or "prompt" not in row or row.keys() - set(Job._fields):
        fail(f'{where}: must be {{"prompt": ...}}, optionally with {", ".join(Job._fields[1:])}')
    for key, value in row.items():
        low, high = LIMITS.get(key, (0, 0))
        kind, valid = (int, f"{low} to {high}") if key in LIMITS else (str, "a text")
        if type(value) is not kind or kind is int and not low <= value <= high:
            fail(f"{where}: {key} is {value!r}, must be {valid}")
    return row


def read_jobs(args):
    """The images to generate: image i from seed + i, unless its line names a seed."""
    defaults = {"negative_prompt": args.negative_prompt, "height": args.height, "width": args.width}
    jobs, rows = [], [{"prompt": prompt} for prompt in args.prompt]
    for row in read_lines(args.prompts_file) if args.prompts_file else rows:
        for copy in range(args.num_images):
            seed = row["seed"] + copy if "seed" in row else args.seed + len(jobs)
            jobs.append(Job(**defaults | row | {"seed": seed}))
    return jobs


def read_images(args):
    """{argument of the pipeline: image} of --image, --mask and --control_image."""
    # A pipeline with a ControlNet and no image to start from calls the control image `image`.
    control = "control_image" if args.image else "image"
    keys = {"image": "image", "mask": "mask_image", "control_image": control}
    given = {flag: file for flag in keys if (file := getattr(args, flag))}
    return {keys[flag]: read_image(flag, file) for flag, file in given.items()}


def read_image(flag, file):
    """The image that a flag names, as a viewer shows it."""
    with or_fail(f"--{flag} {file}: not a readable image"):
        return to_rgb(Image.open(file)).convert("L" if flag == "mask" else "RGB")


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


if __name__ == "__main__":
    # Mistakes and --help are answered at once: the libraries take seconds to load.
    read_jobs(parse_args())

# Hide the libraries' messages about optional parts and coming versions; errors still show.
warnings.filterwarnings("ignore", module="diffusers|huggingface_hub|peft|transformers")
os.environ |= {"HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels, unused here

import diffusers
import torch
import transformers
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open

for library in diffusers, transformers:
    library.utils.logging.disable_progress_bar()

# --------------------------------------------------------------------------------- 2. The LoRA file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
ADAPTER = "lcm"  # PEFT's name of the LCM-LoRA; styles are style_0, style_1, ...
PEFT_KEY = "lora_adapter_metadata"  # PEFT's settings in the header of a file that diffusers wrote


def find_lora(name, flag="--lora"):
    """The .safetensors file that a user means by a file or a folder."""
    path = Path(name).expanduser()
    for file in (path, path / WEIGHTS_NAME, path / PEFT_NAME, path / "unet" / PEFT_NAME):
        if file.is_file() and file.suffix == ".safetensors":
            return file
    if path.is_dir():
        files = [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
        others = ", ".join(sorted(file.relative_to(path).as_posix() for file in files))
        hint = f", but {others}" if others else ""
        fail(f"{flag} {name}: no {WEIGHTS_NAME} or {PEFT_NAME} in this folder{hint}")
    valid = "must be a .safetensors file or a folder with one; pickled weights are not read"
    fail(f"{flag} {name}: {valid if path.is_file() else 'no such file or folder'}")


def lora_name(path):
    """What a user calls this LoRA: the file, or its folder where all files have one name."""
    path = Path(path).resolve()
    return path.parent.name if path.name in (WEIGHTS_NAME, PEFT_NAME) else path.stem


def read_lora(path):
    """All tensors, every value finite, and the header with PEFT's adapter_config.json added."""
    with or_fail(f"LoRA {path}: not a whole safetensors file"), safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if bad := [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        fail(f"LoRA {path}: {len(bad)} of {len(tensors)} tensors hold NaN or inf, first {bad[0]}")
    if (version := metadata.get("lcm_lora_version", "1")) != "1":
        fail(f"LoRA {path}: format version {version}; this infer.py reads version 1")
    config = path.with_name("adapter_config.json")
    if path.name == PEFT_NAME and config.is_file():
        with or_fail(f"LoRA {path}: {config.name} beside it cannot be read"):
            settings = dict(json.loads(config.read_text(encoding="utf-8")))
        metadata[PEFT_KEY] = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        if settings.get("base_model_name_or_path"):
            metadata.setdefault("base_model", settings["base_model_name_or_path"])
    elif path.name == PEFT_NAME:
        warn(f"LoRA {path}: {config.name}, which contains alpha, is missing; using alpha = rank")
    return tensors, metadata


def header(path, metadata, key, default, read=float):
    """A value of the header metadata, where all are strings."""
    text = metadata.get(key, default)
    with or_fail(f"LoRA {path}: the header's {key} is {text!r}, which cannot be read"):
        return read(text)


# A LoRA tensor's key: in kohya's naming lora_unet_X.lora_down.weight, in diffusers'
# unet.X.lora_A.weight, formerly unet.X.lora.down.weight or
# unet.X.processor.to_q_lora.down.weight, in PEFT's base_model.model.X.lora_A.weight.
LORA_KEY = re.compile(
    r"(?:(?P<kohya>lora_(?:unet|te[12]?)_)|(?P<component>unet|text_encoder(?:_2)?)\.)?"
    r"(?P<peft>base_model\.model\.)?(?P<name>.+?)"
    r"(?:[._]lora[._](?:linear_layer\.)?(?P<part>down|up|A|B)\.weight)?(?P<alpha>\.alpha)?"
)
KOHYA = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


def parse_key(key):
    """(layer, part, naming) of a LoRA tensor's key; the part is A, B or alpha."""
    match = LORA_KEY.fullmatch(key)
    if not match or not (match["part"] or match["alpha"]):
        return None
    component, name = match["component"] or KOHYA.get(match["kohya"], "unet"), match["name"]
    name = re.sub(r"(?<=[._])processor[._]", "", name)
    name = re.sub(r"(self_attn[._])to_(q|k|v|out)$", r"\1\2_proj", name)
    name = re.sub(r"([._])to_out$", r"\1to_out\g<1>0", name)
    part = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["part"], match["part"])
    naming = "lora_down/up" if match["kohya"] else "lora.down/up"
    naming = "lora_A/B" if match["part"] in ("A", "B") else naming
    if match["component"] and match["peft"]:
        naming = f"{component}.{match['peft']}*.{naming}"
    return f"{component}.{name}", part, naming


# {what a key of another kind of adapter contains: its name}
UNSUPPORTED = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a core tensor", ".diff": "difference of whole weights",
}  # fmt: skip


def group_layers(path, tensors, metadata, alpha=None):
    """{layer: {A, B, alpha, rank, naming}} of a file in any naming; `alpha` for layers without one.

    A layer is unet.X, text_encoder.X or text_encoder_2.X; X is a module path, in kohya's with _.
    """
    layers = {}
    for key, tensor in tensors.items():
        if kind := next((kind for word, kind in UNSUPPORTED.items() if word in key), None):
            fail(f"LoRA {path}: {key} belongs to a {kind}; only plain LoRA (A and B) is supported")
        if not (parsed := parse_key(key)):
            fail(f"LoRA {path}: cannot read {key}; known are UNet and text encoder layers")
        name, part, naming = parsed
        layer = layers.setdefault(name, {})
        if part in layer:
            fail(f"LoRA {path}: {key} is in the file twice, under two names")
        if part == "alpha" and tensor.numel() != 1:
            fail(f"LoRA {path}: {key} is not a number but has the shape {[*tensor.shape]}")
        layer[part] = tensor.item() if part == "alpha" else tensor
        if part == "A":
            layer["naming"] = naming
    if not layers:
        fail(f"LoRA {path}: the file contains no LoRA layer")
    config = header(path, metadata, PEFT_KEY, "{}", lambda text: dict(json.loads(text)))
    for name, layer in layers.items():
        if "A" not in layer or "B" not in layer:
            missing = "up" if "A" in layer else "down"
            fail(f"LoRA {path}: layer {name} has no {missing} matrix; the file is incomplete")
        down, up = [*layer["A"].shape], [*layer["B"].shape]
        if len(down) not in (2, 4) or len(up) != len(down) or down[0] != up[1] or down[0] == 0:
            fail(f"LoRA {path}: the matrices of layer {name} do not fit together: {down} and {up}")
        layer["rank"] = down[0]
        if "alpha" not in layer:  # without any, the scaling is 1
            choices = (peft_alpha(config, *name.split(".", 1), down[0]), alpha, down[0])
            layer["alpha"] = next(value for value in choices if value is not None)
    return layers


def peft_alpha(config, component, name, rank):
    """A layer's alpha in PEFT's settings, if any, such that the scaling is alpha / rank."""
    patterns = config.get(f"{component}.alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, name), config.get(f"{component}.lora_alpha"))
    rank_stabilised = config.get(f"{component}.use_rslora") and alpha is not None
    return alpha * math.sqrt(rank) if rank_stabilised else alpha


def open_lora(path):
    """(path, layers, metadata) of a LoRA file."""
    tensors, metadata = read_lora(path)
    return path, group_layers(path, tensors, metadata), metadata


def irregular(layers):
    """A file's naming, if diffusers refuses it or, judging by the first key, reads only a part."""
    namings = Counter(layer["naming"] for layer in layers)
    if len(namings) == 1 and "base_model" not in next(iter(namings)):
        return ""
    counts = ", ".join(f"{count} as {naming}" for naming, count in namings.most_common())
    return f"in the naming of Hugging Face's scripts: {counts}"


# {name in the original code, with _ for every dot as in kohya's SDXL files: name in diffusers}
ORIGINAL_NAMES = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2", "in_layers_2": "conv1", "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip


def diffusers_name(name, layers_per_block):
    """A UNet layer's name in kohya's spelling, its blocks counted as in diffusers.

    Whose own renaming takes SD 1.x's upsamplers for attention, input_blocks_10 for input_blocks_1.
    """
    name = ORIGINAL_NAMES.get(name, name)
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(?:([0-2])_)?(.+)", name)
    if not match:
        return name
    side, count, place, rest = match.groups()
    block, layer = divmod(int(count) - (side == "input"), layers_per_block + 1)
    rest = ORIGINAL_NAMES.get(rest, rest)
    if side == "middle":
        module = "attentions_0" if count == "1" else f"resnets_{int(count) // 2}"
        return f"mid_block_{module}_{rest}"
    start = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{start}_{'down' if rest == 'op' else 'up'}samplers_0_conv"
    return f"{start}_{'resnets' if place == '0' else 'attentions'}_{layer}_{rest}"


def layout(names, family=None):
    """What a UNet, or a LoRA of all its attention, was made for, by the names of its layers.

    In SD 1.x and 2.x transformers are one block deep, in SDXL deeper; SSD-1B's middle has none.
    """
    names = [re.sub("^(unet|model_diffusion_model)_", "", name.replace(".", "_")) for name in names]
    # down_blocks, mid_block, up_blocks; in the original code input_, middle_, output_blocks.
    places = {name[0] for name in names if "_transformer_blocks_" in name}
    if not (places & set("di") and places & set("uo")):
        return None
    xl = re.compile("(add_embedding|label_emb|.*_transformer_blocks_1_)")
    if family != "sdxl" and not any(map(xl.match, names)):
        return "Stable Diffusion 1.x / 2.x"
    return "SDXL" if "m" in places else "SSD-1B"


def match_layout(loras, base, names):
    """Each LoRA was trained for the layout of the base UNet, whose layers have these `names`."""
    theirs = layout(names)
    # A header without a family leaves it to the transformers, which a small SDXL may have shallow.
    shallow = layout([name for name in names if "transformer_blocks" in name])
    for path, layers, metadata in loras.values():
        ours = layout(layers, metadata.get("family"))
        if ours and theirs and ours not in (theirs, theirs if "family" in metadata else shallow):
            origin = f" (base {metadata['base_model']})" if "base_model" in metadata else ""
            says = f"was trained for the {ours} layout{origin}"
            fail(f"LoRA {path} {says}; --base_model {base} has the {theirs} layout")


def match_base(pipe, path, layers, metadata, base):
    """{component: {module path: layer}}: each layer is one module of the base and fits it."""

    def plain(component, name):
        # Whether text encoders have a text_model depends on the version of transformers.
        return f"{component}_{name}".replace(".", "_").replace("_text_model_", "_")

    # The base's own modules are the dictionary: turning _ back into . by rules would be guesswork.
    # A module that already has a LoRA has become its base_layer.
    modules, matched = {}, {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model else ():
            if getattr(module, "weight", None) is not None:
                name = name.removesuffix(".base_layer")
                modules[plain(component, name)] = name, module.weight
    origin = " ".join(metadata[key] for key in ("family", "base_model") if metadata.get(key))
    for name, layer in layers.items():
        says = f"LoRA {path} was trained for {origin or 'another base (unnamed)'}, "
        says += f"it does not fit --base_model {base}: layer {name}"
        component, _, module = name.partition(".")
        module = diffusers_name(module, pipe.unet.config.layers_per_block)
        if plain(component, module) not in modules:
            fail(f"{says} has no counterpart there")
        module, weight = modules[plain(component, module)]
        if module in matched.setdefault(component, {}):
            fail(f"LoRA {path}: layer {name} is in the file twice, under two names")
        rank, ours = layer["rank"], [[*layer[part].shape] for part in "AB"]
        down, up = [rank, *weight.shape[1:]], [weight.shape[0], rank] + [1] * (weight.ndim - 2)
        if ours != [down, up]:
            fail(f"{says} has the shapes {ours[0]} and {ours[1]}, needed are {down} and {up}")
        matched[component][module] = layer
    return matched


def peft_settings(layers):
    """PEFT's words for {module path: layer}: the commonest rank and alpha, and the others."""
    settings = {"target_modules": sorted(layers)}
    for key, word in ("rank", "r"), ("alpha", "lora_alpha"):
        values = {name: layer[key] for name, layer in layers.items()}
        ((common, _),) = Counter(values.values()).most_common(1)
        others = {name: value for name, value in values.items() if value != common}
        settings |= {word: common, f"{key}_pattern": others}
    return settings


def attach_lora(pipe, adapter, path, layers, metadata, base):
    """Put the layers into the pipeline, then prove that all of them arrived."""

    def arrived(module, layer):
        live = {"A": module.lora_A[adapter].weight.cpu(), "B": module.lora_B[adapter].weight.cpu()}
        same = all(torch.equal(live[part], layer[part].to(live[part].dtype)) for part in live)
        scaling = layer["alpha"] / layer["rank"]
        return same and math.isclose(module.scaling[adapter], scaling, rel_tol=1e-6)

    matched, wrong = match_base(pipe, path, layers, metadata, base), []
    for component, layers in matched.items():
        model = getattr(pipe, component)
        state = {f"{n}.lora_{part}.weight": layers[n][part] for n in layers for part in "AB"}
        with or_fail(f"LoRA {path}: PEFT cannot load it"):
            model.add_adapter(LoraConfig(**peft_settings(layers)), adapter_name=adapter)
            set_peft_model_state_dict(model, state, adapter_name=adapter)
        modules = dict(model.named_modules())
        live = {name for name in modules if adapter in getattr(modules[name], "lora_A", ())}
        good = {name for name in live & layers.keys() if arrived(modules[name], layers[name])}
        wrong += [f"{component}.{name}" for name in sorted((live | layers.keys()) - good)]
    flat = [layer for layers in matched.values() for layer in layers.values()]
    if wrong:
        loaded = f"{len(flat) - len(wrong)} of {len(flat)} layers loaded"
        fail(f"LoRA {path}: {loaded}, first missing or different: {wrong[0]}")

    # One number where all layers agree, else the span.
    facts = []
    for key in "rank", "alpha":
        low, high = (pick(layer[key] for layer in flat) for pick in (min, max))
        facts.append(f"{key} {low:g}" if low == high else f"{key} {low:g} to {high:g}")
    facts += [f"{len(matched[part])} in {part}" for part in sorted(matched.keys() - {"unet"})]
    facts += [f"trained from {metadata['base_model']}"] if "base_model" in metadata else []
    facts += [f"{metadata['step']} steps"] if "step" in metadata else []
    facts += [naming] if (naming := irregular(flat)) else []
    title = "LoRA" if adapter == ADAPTER else f"Style LoRA {lora_name(path)}"
    print(f"{title}: {len(flat)} of {len(flat)} layers loaded ({', '.join(facts)})")


def set_loras(pipe, args, lcm=True):
    """tau' = lambda_1 tau_style + lambda_2 tau_LCM; with no LoRA left, the base to the bit."""
    weights = {f"style_{index}": weight for index, (_, weight) in enumerate(args.style_lora)}
    weights |= {ADAPTER: args.lcm_weight} if lcm else {}
    if weights:
        pipe.enable_lora()
        pipe.set_adapters(list(weights), list(weights.values()))
    else:  # a LoRA layer then calls its base layer and nothing else
        pipe.disable_lora()


def fuse(pipe):
    """Merge the LoRAs, at their weights, into the base: as fast as the base alone, and for good."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()


# ---------------------------------------------------------------------------------- 3. The pipeline


def pick_device(args):
    """Resolve --device and --dtype, and try --compile there."""
    device, dtype = args.device, args.dtype
    if device == "auto":
        others = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else others
    with or_fail(f"--device {device}: not usable", "valid are auto, cpu, cuda, cuda:N, mps"):
        one = torch.ones(1, device=device)
    if args.compile:
        # SD has three widths, each called for one image or more, with or without guidance and LoRA.
        torch._dynamo.config.recompile_limit = 64
        with or_fail("--compile does not work here", "it needs a C++ compiler, on CUDA Triton"):
            torch.compile(torch.nn.functional.gelu)(one)
    usual = "fp16" if device.startswith("cuda") else "fp32"
    return device, getattr(torch, DTYPES[usual if dtype == "auto" else dtype])


def local(name):
    """This file or folder, here or beside infer.py: a header's "demo/..." works from anywhere."""
    return next((path for path in (Path(name).expanduser(), HERE / name) if path.exists()), None)


def open_file(file, config, loras, **more):
    """The pipeline of a checkpoint in one .safetensors file, with the original code's names."""
    with or_fail(f"base model {file}: not a whole safetensors file"), safe_open(file, "pt") as data:
        keys = set(data.keys())
    match_layout(loras, file, keys)
    # By this key diffusers knows SDXL's text encoders.
    xl = "conditioner.embedders.1.model.positional_embedding" in keys
    advice = f"its configs are those of {config or 'the Hub'}; --base_config names others"
    config = config and str(local(config) or config)
    with or_fail(f"base model {file} cannot be opened", advice):
        kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
        pipe = kind.from_single_file(str(file), config=config, **more)
    # diffusers silently drops what the configs do not describe, and leaves empty what is missing.
    in_file = sum(key.startswith("model.diffusion_model.") for key in keys)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    missing = any(tensor.is_meta for part in parts for tensor in part.parameters())
    if missing or in_file != len(pipe.unet.state_dict()):
        fail(f"base model {file}: its tensors do not match its configs; {advice}")
    return pipe


def load_pipeline(base, config, variant, tiny_vae, device, dtype, loras):
    """The base model as a text-to-image pipeline of the layout that the LoRAs were trained for."""
    place, one_file = local(base), base.endswith(".safetensors")
    if not place and (one_file or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base)):
        valid = "a folder in diffusers' layout, a .safetensors file or a Hub id"
        fail(f"base model {base}: no such file or folder; give --base_model {valid}")
    if place and place.is_file() and not one_file:
        fail(f"base model {base}: a file must be a .safetensors one; pickled weights are not read")
    if not place:
        print(f"{base} is not a folder here or next to infer.py: looking on the Hub")
    kinds = {"dtype": dtype}
    if tiny_vae:  # the VAE is then not even read
        kinds["vae"] = load_part(diffusers.AutoencoderTiny, "tiny_vae", tiny_vae, dtype)
    if one_file:
        pipe = open_file(place, config, loras, **kinds)
    else:
        kinds |= {"variant": variant, "use_safetensors": True}
        missing = "was not found locally, next to infer.py, or on the Hub"
        what = f"base model {base} {'cannot be opened' if place else missing}"
        with or_fail(what, "--base_model names another"):
            pipe = diffusers.AutoPipelineForText2Image.from_pretrained(str(place or base), **kinds)
    has_unet = isinstance(getattr(pipe, "unet", None), diffusers.UNet2DConditionModel)
    if not has_unet or not hasattr(pipe, "load_lora_weights"):
        fail(f"--base_model {base} is a {type(pipe).__name__}, not of SD 1.x, 2.x or SDXL")
    match_layout(loras, base, dict(pipe.unet.named_modules()))
    if tiny_vae:
        check_tiny_vae(pipe, tiny_vae, place if not one_file else config and local(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_part(kind, flag, name, dtype):
    """The model of the class `kind` that a flag names."""
    more = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with or_fail(f"--{flag} {name} cannot be opened", "valid are a diffusers folder or a Hub id"):
        part, info = kind.from_pretrained(str(local(name) or name), **more)
    if info["missing_keys"] or info["unexpected_keys"]:
        fail(f"--{flag} {name}: its weights are not those of {kind.__name__}")
    return part


def check_tiny_vae(pipe, name, folder):
    """The tiny VAE fits the base model, whose VAE's config is in `folder`, unless on the Hub."""
    channels, factor = pipe.unet.config.out_channels, pipe.vae_scale_factor
    if folder and (folder / "vae" / "config.json").is_file():
        config = diffusers.AutoencoderKL.load_config(folder / "vae")
        factor = 2 ** (len(config["block_out_channels"]) - 1)
    if (ours := (pipe.vae.config.latent_channels, pipe.vae_scale_factor)) != (channels, factor):
        has = "latents of {} channels and a side of 1/{}"
        ours, theirs = has.format(*ours), has.format(channels, factor)
        fail(f"--tiny_vae {name} is for {ours}; the base model has {theirs}")


def load_controlnet(name, pipe):
    """A ControlNet that fits the base model, of its device and type."""
    net = load_part(diffusers.ControlNetModel, "controlnet", name, pipe.dtype)
    sizes = ("cross_attention_dim", "addition_embed_type", "block_out_channels", "layers_per_block")
    for key in sizes:
        if net.config[key] != pipe.unet.config[key]:
            says = f"has another layout than the base model: {key} is {net.config[key]}"
            fail(f"--controlnet {name} {says}, needed is {pipe.unet.config[key]}")
    return net.to(pipe.device)


def with_images(pipe, args):
    """The pipeline that takes the images given, over the same weights."""
    task = "Inpainting" if args.mask else "Image2Image" if args.image else "Text2Image"
    more = {"controlnet": load_controlnet(args.controlnet, pipe)} if args.controlnet else {}
    pipe = getattr(diffusers, f"AutoPipelineFor{task}").from_pipe(pipe, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_sizes(jobs, args, images, pipe):
    """The jobs with a size in pixels: their own, else that of --image, else the base model's."""
    multiple, sample = math.lcm(8, pipe.vae_scale_factor), pipe.unet.config.sample_size
    latent = (sample, sample) if isinstance(sample, int) else sample
    height, width = (side * pipe.vae_scale_factor for side in latent)
    if args.image:
        width, height = (max(round(side / multiple), 1) * multiple for side in images["image"].size)
    sized = [job._replace(height=job.height or height, width=job.width or width) for job in jobs]
    for job, name in itertools.product(sized, ("height", "width")):
        if (value := getattr(job, name)) % multiple:
            by_flag = value == getattr(args, name) or not args.prompts_file
            flag = f"--{name}" if by_flag else f"--prompts_file: {name}"
            example = -(-value // multiple) * multiple
            fail(f"{flag} {value}: must be a multiple of {multiple}, e.g. {example}")
    return sized


def check_plan(args, plan, jobs, original_steps):
    """Judge the [(scheduler, steps)] of a run, once the LoRA's header and the prompts are read."""
    if args.guidance_scale > 2 and args.lcm_weight:
        warn(f"--guidance_scale {args.guidance_scale:g}: above 2, images of an LCM-LoRA burn out")
    for name, steps in plan if jobs else ():
        if name in DISTILLED and steps > original_steps:
            fail(f"--steps {steps}: must be from 1 to {original_steps}, the LoRA's own DDIM steps")
    for steps in sorted({steps for _, steps in plan}) if args.image else ():
        if (raised := enough(args.strength, steps)) != args.strength:
            taken = f"{args.strength:g} x {steps} step{'s' * (steps > 1)}"
            warn(f"--strength {taken} is less than one step: raised to {raised:.3g} to take one")
    affected = not args.compare or any(name in DISTILLED for name, _ in plan)
    if affected and args.guidance_scale <= 1 and any(job.negative_prompt for job in jobs):
        where = "in the LCM-LoRA columns" if args.compare else "here"
        warn(f"--negative_prompt does nothing {where}: it needs a --guidance_scale above 1")


def enough(strength, steps):
    """`strength`, or what it must be for one step: pipelines take int(steps * strength) steps."""
    # 1 / steps would not always do: 49 * (1 / 49) is below 1.
    return strength if int(steps * strength) else math.nextafter(1 / steps, 1)


# -------------------------------------------------------------------------------------- 4. Generate


def generate(pipe, args, images, jobs, steps, guidance, seen):
    """Images, seconds an image with text encoding and VAE, and how many of them are timed.

    The first call of a process pays for allocations, kernel choice and compilation: batches of a
    kind that is not in `seen` are left out, unless there are no others (0 are timed).
    """
    kinds, made, times = {}, {}, []
    for place, job in enumerate(jobs):
        kinds.setdefault((job.height, job.width, job.negative_prompt is None), []).append(place)
    size = args.batch_size
    batches = [alike[i : i + size] for alike in kinds.values() for i in range(0, len(alike), size)]
    for places in batches:
        start, batch = time.perf_counter(), [jobs[place] for place in places]
        # The images of Pillow are in main memory: the device has done its work.
        made |= zip(places, generate_batch(pipe, args, images, batch, steps, guidance))
        kind = (len(batch) == 1, batch[0].height, batch[0].width) if args.compile else "any"
        times.append((time.perf_counter() - start, len(batch), kind in seen))
        seen.add(kind)
    timed = [row for row in times if row[-1]]
    seconds, count, _ = map(sum, zip(*timed or times))
    return [made[place] for place in range(len(jobs))], seconds / count, count if timed else 0


def generate_batch(pipe, args, images, jobs, steps, guidance):
    """One call of the pipeline; each image has its own generator."""
    height, width, negative = jobs[0].height, jobs[0].width, jobs[0].negative_prompt
    given = {}
    for key, image in images.items():
        # Lanczos is sharp, but overshoots: black in a mask would not stay black.
        how = Image.Resampling.BILINEAR if key == "mask_image" else Image.Resampling.LANCZOS
        given[key] = image.resize((width, height), how)
    more = {key: [image] * len(jobs) for key, image in given.items()}
    more |= {"strength": enough(args.strength, steps)} if args.image else {}
    more |= {"controlnet_conditioning_scale": args.controlnet_scale} if args.controlnet else {}
    made = pipe(
        [job.prompt for job in jobs],
        negative_prompt=None if negative is None else [job.negative_prompt for job in jobs],
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        # Noise from the CPU, with one generator each, is the same on every device, in every batch.
        generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        eta=0.3 if type(pipe.scheduler).__name__ == "TCDScheduler" else 0.0,  # TCD's default
        **more,
    ).images
    if args.mask:  # the VAE does not give back to the bit what is to stay
        made = [Image.composite(image, given["image"], given["mask_image"]) for image in made]
    return made


def generate_all(pipe, args, images, jobs, plan, schedulers, settings):
    """Each job by each (scheduler, steps) of the plan, each image a file with its settings."""
    seen, report = set(), []
    if len(plan) > 1:  # step counts are compared: none of them pays for the first call
        pipe.scheduler = schedulers[plan[0][0]]
        generate(pipe, args, images, jobs[: args.batch_size], 1, args.guidance_scale, seen)
    for name, steps in plan:
        pipe.scheduler = schedulers[name]
        made, seconds, count = generate(pipe, args, images, jobs, steps, args.guidance_scale, seen)
        timed = f"{count} of {len(jobs)} timed, after a" if count else "no batch came after the"
        report.append(f"{steps} step{'s' * (steps > 1)}: {seconds:.3g} s/image ({timed} warm-up)")
        for index, (image, job) in enumerate(zip(made, jobs)):
            ending = f"-{index}" * (len(jobs) > 1) + f"-steps{steps}" * (len(plan) > 1)
            output = args.output.with_stem(args.output.stem + ending)
            one = settings | job._asdict() | {"scheduler": name, "steps": steps}
            one |= {"strength": enough(args.strength, steps)} if args.image else {}
            save(image, output, one, {"parameters": parameters(one)})
            print(output)
    print(*report, sep="\n")


# ------------------------------------------------------------------------------------------ 5. Save


def parameters(settings):
    """The settings in the words that A1111, Forge and their relatives read back from a PNG."""
    loras = [(settings["lora"], settings["lcm_weight"]), *settings["style_lora"]]
    facts = {
        "Steps": settings["steps"],
        "Sampler": SCHEDULERS[settings["scheduler"]][1],
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["base_model"]).name,
        "Lora": ", ".join(f"{lora_name(path)} {weight:g}" for path, weight in loras),
    }
    facts |= {"Denoising strength": f"{settings['strength']:.3g}"} if settings["image"] else {}
    for key, value in facts.items():  # a text with a comma or colon would end early: it is quoted
        facts[key] = json.dumps(value) if re.search("[,:]", str(value)) else value
    negative = settings["negative_prompt"]
    prompts = settings["prompt"] + (f"\nNegative prompt: {negative}" if negative else "")
    return prompts + "\n" + ", ".join(f"{key}: {value}" for key, value in facts.items())


def save(image, path, settings, chunks):
    """Write a PNG with its settings: `infer_args` as JSON, and further text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, text in {**chunks, "infer_args": json.dumps(settings)}.items():
        info.add_text(key, text)
    with or_fail(f"--output {path}: cannot be written"):
        image.save(path, pnginfo=info)


# ------------------------------------------------------------------------------------------ 6. Main


def read_inputs(args):
    """(jobs, images, {adapter: LoRA}, settings to record), before a base model is fetched."""
    jobs, images, files = read_jobs(args), read_images(args), {ADAPTER: find_lora(args.lora)}
    for index, (name, _) in enumerate(args.style_lora):
        files[f"style_{index}"] = find_lora(name, "--style_lora")
    loras = {adapter: open_lora(file) for adapter, file in files.items()}
    path, _, metadata = loras[ADAPTER]
    base, config = args.base_model or metadata.get("base_model"), args.base_config
    if not base:
        fail(f"--lora {path}: the header names no base model; give --base_model FOLDER_OR_HUB_ID")
    one_file = base.endswith(".safetensors")
    if config and not one_file:
        fail(f"--base_config has no effect: base model {base} is no .safetensors file")
    if args.variant and one_file:
        fail(f"--variant has no effect: base model {base} is one file")
    if one_file and not config:
        config = header(path, metadata, "training_args", "{}", json.loads).get("teacher_config")

    left_out = ("prompt", "prompts_file", "output", "num_images", "compare", "fused_output")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    styles = [(str(files[f"style_{i}"]), weight) for i, (_, weight) in enumerate(args.style_lora)]
    settings |= {"lora": str(path), "style_lora": styles, "base_model": base, "base_config": config}
    settings["original_inference_steps"] = int(header(path, metadata, "num_ddim_timesteps", 50))
    return jobs, images, loras, settings | {"diffusers": diffusers.__version__}


def load(args, jobs, images, loras, settings):
    """(pipeline, pipeline that takes the images, jobs with sizes, {name: scheduler})."""
    diffusers.utils.logging.set_verbosity_error()
    device, dtype = pick_device(args)
    settings |= {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    base, config = settings["base_model"], settings["base_config"]
    pipe = load_pipeline(base, config, args.variant, args.tiny_vae, device, dtype, loras)
    jobs = with_sizes(jobs, args, images, pipe)
    for adapter in [*loras]:
        attach_lora(pipe, adapter, *loras.pop(adapter), base)  # no second copy is kept
    set_loras(pipe, args)
    if not args.compare:
        fuse(pipe)
    if args.compile:
        pipe.unet.compile_repeated_blocks(dynamic=True)  # its transformers, for every size
    task = with_images(pipe, args)
    grid, schedulers = {"original_inference_steps": settings["original_inference_steps"]}, {}
    for name, (kind, _, more) in SCHEDULERS.items():
        more = more | grid if name in DISTILLED else more
        schedulers[name] = getattr(diffusers, kind).from_config(pipe.scheduler.config, **more)
    with or_fail(f"--output {args.output}: its folder cannot be made"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    # From here on the libraries warn about the user's input, such as a prompt cut at 77 tokens.
    diffusers.utils.logging.set_verbosity_warning()
    # SDXL's pipelines take their VAE to float32 and back, of which this one warns at each image.
    diffusers.utils.logging.get_logger("diffusers.models.modeling_utils").setLevel("ERROR")
    return pipe, task, jobs, schedulers


def main(argv=None):
    """Read, load, generate, save."""
    args = parse_args(argv)
    if args.compare:
        return runpy.run_path(str(COMPARE))["compare"](args)
    jobs, images, loras, settings = read_inputs(args)
    steps = dict.fromkeys(args.steps or [4])
    plan = [(name, count) for name in args.scheduler or ["lcm"] for count in steps]
    check_plan(args, plan, jobs, settings["original_inference_steps"])
    pipe, task, jobs, schedulers = load(args, jobs, images, loras, settings)
    if jobs:
        generate_all(task, args, images, jobs, plan, schedulers, settings)
    if args.fused_output:
        pipe.scheduler = schedulers["lcm"]
        runpy.run_path(str(FUSE))["save"](pipe, args.fused_output)


if __name__ == "__main__":
    main()
