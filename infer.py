"""Generate images with an LCM-LoRA: few steps, no guidance, any number of prompts.

    python infer.py --lora runs/my-lora --prompt "a red apple, Noto style" --output apple.png
    python infer.py --lora runs/my-lora --prompt "a red apple" "a house" --compare --output grid.png
    python infer.py --lora runs/my-lora --prompt "a cat" --image cat.png --strength 0.6 --steps 2 4
    python infer.py --lora runs/my-lora --fused_output my-fast-model

The base model and the number of DDIM steps are read from the header of the LoRA file. After
loading, every matrix and every scaling is compared with the file: a LoRA that is only partly
applied is an error. Images are saved batch by batch; the same command again skips those that are
there. scripts/compare.py makes the grids, scripts/fuse_lora.py the merged models.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import runpy
import secrets
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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
        reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
        if re.search("(?i)out ?of ?memory|t allocate memory|^MemoryError", f"{error!r} {reason}"):
            advice = "--batch_size 1, --tiny_vae and smaller images need less memory"
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            advice = "make that place writable, free some space, or name another (HF_HOME)"
        fail(f"{what} ({type(error).__name__}: {reason})" + (f"; {advice}" if advice else ""))


def warn(message):
    """Say on stderr what probably is not intended."""
    print(f"warning: {message}", file=sys.stderr)


def last_words(kind, error, traceback):
    """The program's excepthook: Ctrl-C, a closed pipe (`| head`) or a full disk end in one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; images named above are complete", file=sys.stderr)
    elif issubclass(kind, OSError):  # or_fail names all files but stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at exit
        closed = issubclass(kind, BrokenPipeError)
        says = "nothing reads the output any more" if closed else f"no output possible: {error}"
        print(f"stopped: {says}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if __name__ == "__main__":
    sys.excepthook = last_words
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it may be closed
    # A file's name may have letters that the terminal's encoding has not.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


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
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# What a line of --prompts_file, recipe.json and a LoRA's header may say
CHOICES = {"prediction_type": ("epsilon", "v_prediction"), "rescale_betas_zero_snr": (True, False)}
LIMITS = {"seed": (-1, 2**64 - 1), "height": (1, 10**6), "width": (1, 10**6), "format": (1, 1)}
LIMITS |= {"guidance_scale": (0.0, 1e3), "guidance_rescale": (0.0, 1.0)}
LIMITS |= {"max_prompt_chunks": (1, 100)}
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
        valid = f"{kind.__name__} from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not {valid}")

    return convert


def plain_text(text):
    """An argparse type: text that is valid Unicode, which bytes of another encoding are not."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return text
    raise argparse.ArgumentTypeError(f"{text!a:.80} is not valid UTF-8 text")


def usable_path(text):
    """An argparse type: a path, with ~ replaced, of which the system can tell what is there."""
    path = os.path.expanduser(text)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text!a:.80} is no usable path ({reason})") from None
    return path


def weighted(weight, default):
    """An argparse type: PATH or PATH:WEIGHT, as (path, weight); a path may contain a colon."""

    def convert(text):
        match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", text)
        split = match and not os.path.exists(text)
        return (usable_path(match[1]), weight(match[2])) if split else (usable_path(text), default)

    return convert


def parse_args(argv=None):
    """Read the command line; what can be judged without a model is judged here."""
    parser = argparse.ArgumentParser(description=__doc__, usage=USAGE)
    parser.formatter_class = lambda prog: Help(prog, max_help_position=32)
    parser.error = lambda message: fail(f"{message} (python infer.py --help lists every flag)")
    model, file = ({"metavar": name, "type": usable_path} for name in ("FOLDER_OR_ID", "FILE"))
    text = {"metavar": "TEXT", "type": plain_text}
    new = {"type": lambda text: Path(usable_path(text))}
    weight = {"metavar": "WEIGHT", "type": number(float, -10, 10)}
    styles = {"metavar": "PATH[:WEIGHT]", "type": weighted(weight["type"], 0.8)}
    styles |= {"nargs": "+", "action": "extend"}
    names = {"metavar": "NAME", "choices": SCHEDULERS, "nargs": "+"}
    steps = {"metavar": "STEPS", "type": number(int, 1, 1000), "nargs": "+"}
    count = {"metavar": "IMAGES", "type": number(int, 1, 10**6)}
    pixels = {"metavar": "PIXELS", "type": number(int, *LIMITS["width"])}
    seed = {"metavar": "SEED", "type": number(int, *LIMITS["seed"]), "default": 0}
    scale = {"metavar": "SCALE", "type": number(float, *LIMITS["guidance_scale"])}
    share = {"metavar": "SHARE", "type": number(float, 0, 1)}

    add = parser.add_argument_group("Model").add_argument
    ids = "USER/REPO[:FILE] on the Hub"
    add("--lora", metavar="PATH", type=usable_path, help=f"LCM-LoRA: .safetensors, folder or {ids}")
    add("--lcm_weight", "--lora_scale", **weight, default=1.0, help="1: as strong as trained")
    add("--style_lora", **styles, default=[], help="LoRAs to add (default WEIGHT: 0.8)")
    add("--base_model", metavar="PATH_OR_ID", type=usable_path, help="default: as the LoRA says")
    add("--base_config", "--teacher_config", **model, help="configs of a base model in one file")
    add("--prediction_type", choices=CHOICES["prediction_type"], help="default: as the model says")
    switch = {"action": argparse.BooleanOptionalAction}
    add("--rescale_betas_zero_snr", **switch, help="its noise ends at zero SNR (default: the same)")
    add("--variant", metavar="NAME", help="variant of the base model's weight files, e.g. fp16")
    add("--vae", **model, help="another VAE, e.g. madebyollin/sdxl-vae-fp16-fix")
    add("--tiny_vae", **model, help="AutoencoderTiny instead of the base model's VAE")
    add("--device", default="auto", help="auto: cuda, else mps, else cpu; or e.g. cuda:1")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: fp16 on cuda, else fp32")
    add("--compile", action="store_true", help="compile the UNet: slow at first, then faster")

    add = parser.add_argument_group("Image").add_argument
    add("--prompt", **text, nargs="+", default=[], help="one or more, each in quotes")
    add("--prompts_file", **file, help="a prompt per line; or .jsonl: " + ", ".join(Job._fields))
    add("--negative_prompt", **text, help="has an effect only if guidance is above 1")
    chunks = {"metavar": "N", "type": number(int, *LIMITS["max_prompt_chunks"])}
    add("--max_prompt_chunks", **chunks, help="CLIP reads a prompt in N pieces (default: 1)")
    add("--steps", **steps, help="UNet passes per image (default: 4); several: an image for each")
    known = f"{', '.join(SCHEDULERS)} (default: as the LoRA says)"
    add("--scheduler", **names, help=f"{known}; several in a grid")
    add("--guidance_scale", **scale, default=1.0, help="1 to 2; above 1 a step is two UNet passes")
    add("--guidance_rescale", **share, help="of guided outputs, to the contrast of unguided ones")
    add("--seed", **seed, help="of image 0; image i has SEED + i; -1: random")
    add("--num_images", **count, default=1, help="per prompt")
    size = "default: that of --image, --control_image, or the base model's own"
    add("--height", **pixels, help=size)
    add("--width", **pixels, help=size)
    add("--batch_size", **count, default=4, help="at a time: a matter of memory and speed only")

    add = parser.add_argument_group("Images to start from").add_argument
    add("--image", **file, help="start of img2img, or of inpainting if --mask is given")
    add("--mask", **file, help="white is generated, black stays as it is in --image")
    add("--strength", **share, help="of the steps that are taken (default: 0.8, with --mask 1)")
    add("--controlnet", **model, help="a ControlNet of the base model's layout")
    add("--control_image", **file, help="input of the ControlNet: edges, depth, a pose ...")
    add("--controlnet_scale", **scale, default=1.0, help="1: as strong as trained")

    add = parser.add_argument_group("Output").add_argument
    add("--output", **new, metavar="FILE.png", default=Path("lcm.png"), help=".png, .jpg or .webp")
    add("--overwrite", action="store_true", help="generate again what is there; else it is skipped")
    add("--compare", action="store_true", help="a grid: a column per scheduler and step count")
    add("--compare_guidance", **scale, help="of the teacher (default: 1 + mean training omega)")
    add("--fused_output", **new, metavar="FOLDER", help="the base model with the LoRA merged in")

    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args, parser):
    """Refuse what does not go together; fill in the strength."""
    if args.output.suffix.lower() not in ENDINGS or args.output.is_dir():
        fail(f"--output {args.output}: must name a file that ends in {', '.join(ENDINGS)}")
    if not args.lora and not args.base_model:
        fail("--lora is missing: give one, or a --base_model that has its LCM-LoRA merged in")
    for one, other in ("vae", "tiny_vae"), ("prompt", "prompts_file"):
        if getattr(args, one) and getattr(args, other):
            fail(f"--{one} and --{other} do not go together: give one of them")
    folder = args.fused_output
    with or_fail(f"--fused_output {folder}: cannot be read"):
        if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            fail(f"--fused_output {folder}: must be a new or an empty folder")
    prompts = args.prompt or args.prompts_file
    if not prompts and not args.fused_output:
        fail("nothing to do: give --prompt, --prompts_file or --fused_output")
    image = "image controlnet steps scheduler seed num_images height width batch_size"
    output = "guidance_scale negative_prompt max_prompt_chunks compare output overwrite compile"
    guided = args.compare or args.guidance_scale > 1
    # (flags, what they need to have an effect, its name)
    for names, effect, needed in (
        (f"{image} {output}", prompts, "--prompt or --prompts_file"),
        ("mask strength", args.image, "--image"),
        ("controlnet", args.control_image, "--control_image"),
        ("control_image controlnet_scale", args.controlnet, "--controlnet"),
        ("compare_guidance", args.compare, "--compare"),
        ("guidance_rescale", guided, "a --guidance_scale above 1 or --compare"),
        ("compare fused_output lcm_weight", args.lora, "--lora"),
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
    with or_fail(f"{where}: not JSON of UTF-8 text and numbers"):
        row = json.loads(line)
        if not isinstance(row, dict) or "prompt" not in row or row.keys() - set(Job._fields):
            says = f"optionally with {', '.join(Job._fields[1:])}"
            fail(f'{where}: must be {{"prompt": ...}}, {says}')
        for key, value in row.items():
            check_value(where, key, value)
    return row


def check_value(where, key, value):
    """Refuse a value of JSON that is not what its key takes."""
    if key in CHOICES:
        fits, valid = value in CHOICES[key], f"one of {', '.join(map(json.dumps, CHOICES[key]))}"
    elif key in LIMITS:
        low, high = LIMITS[key]
        fits, valid = type(value) in (int, type(low)) and low <= value <= high, f"{low} to {high}"
    else:
        fits = isinstance(value, str) and value == value.encode(errors="replace").decode()
        valid = "a text"
    if not fits:
        fail(f"{where}: {key} is {value!a:.80}, must be {valid}")


def read_jobs(args):
    """The images to generate: image i from seed + i, unless its line names a seed."""
    defaults = {"negative_prompt": args.negative_prompt, "height": args.height, "width": args.width}
    jobs, rows = [], [{"prompt": prompt} for prompt in args.prompt]
    for row in read_lines(args.prompts_file) if args.prompts_file else rows:
        for copy in range(args.num_images):
            seed = row["seed"] + copy if "seed" in row else args.seed + len(jobs)
            seed = secrets.randbelow(2**32) if row.get("seed") == -1 else seed % 2**64
            jobs.append(Job(**defaults | row | {"seed": seed}))
    return jobs


def read_images(args):
    """{argument of the pipeline: image} of --image, --mask and --control_image."""
    # A pipeline with a ControlNet and no image to start from calls the control image `image`.
    control = "control_image" if args.image else "image"
    keys = {"image": "image", "mask": "mask_image", "control_image": control}
    images = {}
    for flag, key in keys.items():
        if file := getattr(args, flag):
            with or_fail(f"--{flag} {file}: not a readable image"):
                images[key] = to_rgb(Image.open(file)).convert("L" if flag == "mask" else "RGB")
    return images


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
import numpy as np
import torch
import transformers
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tqdm import tqdm

for library in diffusers, transformers:
    library.utils.logging.disable_progress_bar()

# --------------------------------------------------------------------------------- 2. The LoRA file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
ADAPTER = "lcm"  # PEFT's name of the LCM-LoRA; styles are style_0, style_1, ...
PEFT_KEY = "lora_adapter_metadata"  # PEFT's settings in the header of a file that diffusers wrote


def find_lora(name, flag="--lora"):
    """The .safetensors file that a user means by a file, a folder or a Hub id."""
    path = Path(os.path.expanduser(name))
    for file in (path, path / WEIGHTS_NAME, path / PEFT_NAME, path / "unet" / PEFT_NAME):
        if os.path.isfile(file) and file.suffix.lower() == ".safetensors":
            return file
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::(.+))?", str(name))
    if hub and not os.path.exists(path):
        return fetch_lora(*hub.groups(), f"{flag} {name}")
    if os.path.isdir(path):
        files = [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
        others = ", ".join(sorted(file.relative_to(path).as_posix() for file in files))
        hint = f", but {others}" if others else ""
        fail(f"{flag} {name}: no {WEIGHTS_NAME} or {PEFT_NAME} in this folder{hint}")
    valid = "must be a .safetensors file or a folder with one; pickled weights are not read"
    fail(f"{flag} {name}: {valid if os.path.isfile(path) else 'no such file or folder'}")


def fetch_lora(repo, file, what):
    """The path of a LoRA from the Hub: the file named, one of a usual name, or the only one."""
    valid = "valid are a .safetensors file, a folder, USER/REPO or USER/REPO:FILE.safetensors"
    with or_fail(f"{what}: no such file or folder here, and not to be had from the Hub", valid):
        for usual in () if file else (WEIGHTS_NAME, PEFT_NAME):
            with contextlib.suppress(EntryNotFoundError):  # found without a network if it is cached
                hf_hub_download(repo, usual)
                file = file or usual
        if not file:
            names = [name for name in list_repo_files(repo) if name.endswith(".safetensors")]
            if len(names) != 1:
                fail(f"{what}: name its file, {repo}:FILE; it has {', '.join(names) or 'none'}")
            file = names[0]
        if Path(file).name == PEFT_NAME:
            with contextlib.suppress(EntryNotFoundError):  # it has alpha; read_lora misses it
                hf_hub_download(repo, Path(file).with_name("adapter_config.json").as_posix())
        return Path(hf_hub_download(repo, file))


def lora_name(path, metadata):
    """What a user and A1111 call this LoRA: the file; where all have one name, what its run did."""
    path = Path(path).absolute()
    if path.name not in (WEIGHTS_NAME, PEFT_NAME):
        return path.stem
    if path.parent.parent.name == "snapshots":  # the Hub's: models--USER--REPO/snapshots/COMMIT/
        return path.parts[-4].split("--")[-1]
    return metadata.get("ss_output_name", path.parent.resolve().name)


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
            metadata.setdefault("base_model", str(settings["base_model_name_or_path"]))
    elif path.name == PEFT_NAME:
        warn(f"LoRA {path}: {config.name}, which contains alpha, is missing; using alpha = rank")
    return tensors, metadata


def header(path, metadata, key, default, read=float):
    """A value of the header metadata, where all are strings."""
    text = metadata.get(key, default)
    with or_fail(f"LoRA {path}: the header's {key} is {text!r:.80}, which cannot be read"):
        return read(text)


# A LoRA tensor's key is prefixes, a module's path and a role, with . or _ between them:
# lora_unet_X.lora_down.weight (kohya), diffusion_model.X.lora_A.weight (ComfyUI), lycoris_X.alpha,
# unet.X.lora.down.weight, unet.X.processor.to_q_lora.down.weight (diffusers, once),
# base_model.model.X.lora_A.default.weight (PEFT), module.X (DDP).
PREFIX = re.compile(
    r"(?:(?P<text_encoder_2>text_encoder_2|te2|clip_g)|(?P<text_encoder>text_encoder|te1?|clip_l)"
    r"|(?P<unet>unet|diffusion_model)|base_model[._]model|model(?=[._]diffusion_model)|module"
    r"|_orig_mod|lora|lycoris|text_encoders|transformer(?=[._]text_model))[._]"
)
ROLE = re.compile(
    r"(.+?)[._]lora[._](?:linear_layer\.)?(down|up|A|B)(?:\.[\w-]+)?\.weight"
    r"|(.+?)(?:[._]lora)?\.alpha"
)


def parse_key(key):
    """(layer, part, naming) of a LoRA tensor's key; the part is A, B or alpha."""
    if not (match := ROLE.fullmatch(key)):
        return None
    name, part, component = match[1] or match[3], match[2] or "alpha", None
    while prefix := PREFIX.match(name):
        name, component = name[prefix.end() :], prefix.lastgroup or component
    component = component or ("text_encoder" if name.startswith("text_model") else "unet")
    name = re.sub(r"(?<=[._])processor[._]", "", name)
    name = re.sub(r"(self_attn[._])to_(q|k|v|out)$", r"\1\2_proj", name)
    name = re.sub(r"([._])to_out$", r"\1to_out\g<1>0", name)
    naming = "lora_A/B" if part in "AB" else re.sub(r".*(lora[._]).*", r"\1down/up", key)
    if re.match(r"(unet|text_encoder(_2)?)\.base_model\.model\.", key):
        naming = f"{component}.base_model.model.*.{naming}"
    return f"{component}.{name}", {"down": "A", "up": "B"}.get(part, part), naming


# {what a key of another kind of adapter contains: its name}
UNSUPPORTED = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a core tensor", r"\.diff(_b)?$": "difference of whole weights",
    r"\.b?oft_": "OFT", r"lora_B\.(\w+\.)?bias$": "LoRA with biases",
}  # fmt: skip


def group_layers(path, tensors, metadata, alpha=None):
    """{layer: {A, B, alpha, rank, naming}} of a file in any naming; `alpha` for layers without one.

    A layer is unet.X, text_encoder.X or text_encoder_2.X; X is a module path, in kohya's with _.
    """
    layers, bundled = {}, {key.split(".")[1] for key in tensors if key.startswith("bundle_emb.")}
    if names := ", ".join(sorted(bundled)):
        warn(f"LoRA {path}: its bundled embeddings ({names}) are not used, only its LoRA is")
    for key, tensor in tensors.items():
        if key.startswith("bundle_emb."):
            continue
        if kind := next((UNSUPPORTED[word] for word in UNSUPPORTED if re.search(word, key)), None):
            says = f"LoRA {path}: {key} belongs to a {kind}; only plain LoRA (A and B) is supported"
            fail(f"{says}: merge it by the tool that made it and give the result as --base_model")
        if not (parsed := parse_key(key)):
            fail(f"LoRA {path}: cannot read {key}; known are UNet and text encoder layers")
        name, part, naming = parsed
        layer = layers.setdefault(name, {})
        if part in layer:
            fail(f"LoRA {path}: {key} is in the file twice, under two names")
        if part == "alpha" and tensor.numel() != 1:
            fail(f"LoRA {path}: {key} is not a number but has the shape {[*tensor.shape]}")
        if not tensor.is_floating_point() and part != "alpha":
            fail(f"LoRA {path}: {key} is of type {tensor.dtype}, must be of a floating-point one")
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
        shapes = len(down) in (2, 4) and len(up) in (2, 4) and {*up[2:]} <= {1}
        if not shapes or down[0] != up[1] or down[0] == 0:
            fail(f"LoRA {path}: the matrices of layer {name} do not fit together: {down} and {up}")
        layer["rank"] = down[0]
        with or_fail(f"LoRA {path}: the alpha of layer {name} is no number"):
            if "alpha" not in layer:  # without any, the scaling is 1
                choices = (peft_alpha(config, *name.split(".", 1), down[0]), alpha, down[0])
                layer["alpha"] = next(value for value in choices if value is not None)
            if not math.isfinite(layer["alpha"]):
                raise ValueError(layer["alpha"])
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
    flat = name.replace(".", "_")
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(?:([0-2])_)?(.+)", flat)
    if flat in ORIGINAL_NAMES or not match:
        return ORIGINAL_NAMES.get(flat, name)
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

    In SD 1.x and 2.x transformers are one block deep, in SDXL deeper; SSD-1B's middle has none, and
    those before it have up to four. It is a guess: a LoRA may be of some layers only.
    """
    names = [re.sub("^(unet|model_diffusion_model)_", "", name.replace(".", "_")) for name in names]
    # down_blocks, mid_block, up_blocks; in the original code input_, middle_, output_blocks.
    places = {name[0] for name in names if "_transformer_blocks_" in name}
    if not (places & set("di") and places & set("uo")):
        return None
    xl = re.compile("(add_embedding|label_emb|.*_transformer_blocks_1_)")
    if family != "sdxl" and not any(map(xl.match, names)):
        return "Stable Diffusion 1.x / 2.x"
    deep = re.compile(r"(down_blocks_2|input_blocks_[78])_.*_transformer_blocks_[4-9]_")
    return "SDXL" if "m" in places or any(map(deep.match, names)) else "SSD-1B"


def other_layout(path, layers, metadata, base, names):
    """Words for a LoRA that seems to be for another layout than the base with these layers has."""
    ours, theirs = layout(layers, metadata.get("family")), layout(names)
    if not ours or not theirs or ours == theirs:
        return ""
    origin = f" (base {metadata['base_model']})" if "base_model" in metadata else ""
    says = f"was trained for the {ours} layout{origin}; --base_model {base} has the {theirs} layout"
    return f"LoRA {path} {says}"


def match_base(pipe, path, layers, metadata, base):
    """{component: {module path: layer}}: each layer is one module of the base and fits it."""

    def plain(component, name):
        # Whether text encoders have a text_model depends on the version of transformers.
        return f"{component}_{name}".replace(".", "_").replace("_text_model_", "_")

    def sides(shape):
        # 1x1 convolutions may be stored as matrices, and matrices as 1x1 convolutions.
        return shape[:2] if {*shape[2:]} <= {1} else shape

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
    says = f"LoRA {path} was trained for {origin or 'another base (unnamed)'}, "
    says += f"it does not fit --base_model {base}"
    says = other_layout(path, layers, metadata, base, dict(pipe.unet.named_modules())) or says
    for name, layer in layers.items():
        component, _, module = name.partition(".")
        module = diffusers_name(module, pipe.unet.config.layers_per_block)
        if plain(component, module) not in modules:
            fail(f"{says}: layer {name} has no counterpart there")
        module, weight = modules[plain(component, module)]
        if module in matched.setdefault(component, {}):
            fail(f"LoRA {path}: layer {name} is in the file twice, under two names")
        rank, found = layer["rank"], [[*layer[part].shape] for part in "AB"]
        needed = [[rank, *weight.shape[1:]], [weight.shape[0], rank] + [1] * (weight.ndim - 2)]
        if [*map(sides, found)] != [*map(sides, needed)]:
            shapes = f"{found[0]} and {found[1]}, needed are {needed[0]} and {needed[1]}"
            fail(f"{says}: layer {name} has the shapes {shapes}")
        parts = {part: layer[part].reshape(shape) for part, shape in zip("AB", needed)}
        matched[component][module] = layer | parts
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
    says = other_layout(path, layers, metadata, base, dict(pipe.unet.named_modules()))
    if says and "SSD-1B" in says and base != metadata.get("base_model"):
        # It fits nevertheless: all that SSD-1B has is in SDXL, at other places in the sequence.
        warn(f"{says}; going by its layers, of which the base has all")
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
    title = "LoRA" if adapter == ADAPTER else f"Style LoRA {lora_name(path, metadata)}"
    print(f"{title}: {len(flat)} of {len(flat)} layers loaded ({', '.join(facts)})")


def set_loras(pipe, args, adapters):
    """tau' = lambda_1 tau_style + lambda_2 tau_LCM, of the adapters attached."""
    weights = {f"style_{index}": weight for index, (_, weight) in enumerate(args.style_lora)}
    weights |= {ADAPTER: args.lcm_weight}
    names = [name for name in weights if name in adapters]
    pipe.set_adapters(names, [weights[name] for name in names])


def fuse(pipe, args, loras, base):
    """Attach LoRAs and merge them, at their weights, into the base: as fast as it, and for good."""
    if adapters := [*loras]:
        for adapter in adapters:
            attach_lora(pipe, adapter, *loras.pop(adapter), base)  # no second copy is kept
        set_loras(pipe, args, adapters)
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
        (one := torch.ones(1, device=device)).cpu()  # "meta" holds no numbers
    if args.compile:
        # SD has three widths, each called for one image or more, with or without guidance and LoRA.
        torch._dynamo.config.recompile_limit = 64
        with or_fail("--compile does not work here", "it needs a C++ compiler, on CUDA Triton"):
            torch.compile(torch.nn.functional.gelu)(one)
    usual = "fp16" if device.startswith("cuda") else "fp32"
    return device, getattr(torch, DTYPES[usual if dtype == "auto" else dtype])


PIPELINES = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
NETWORKS = [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.AutoencoderTiny]
NETWORKS += [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]


def local(name):
    """This file or folder, here or beside infer.py: a header's "demo/..." works from anywhere."""
    paths = (Path(os.path.expanduser(name)), HERE / name)
    return next((path for path in paths if os.path.exists(path)), None)


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


def open_file(file, config, args, loras, **given):
    """The pipeline of a checkpoint in one .safetensors file, with the original code's names."""
    with or_fail(f"base model {file}: not a whole safetensors file"), safe_open(file, "pt") as data:
        keys = set(data.keys())
    # By this key diffusers knows SDXL's text encoders.
    xl = "conditioner.embedders.1.model.positional_embedding" in keys
    advice = f"its configs are those of {config or 'the Hub'}; --base_config names others"
    for lora in loras.values():
        advice = other_layout(*lora, file, keys) or advice
    config = config and str(local(config) or config)
    with or_fail(f"base model {file} cannot be opened", advice):
        if config:  # the scheduler's own class may take further libraries
            given["scheduler"] = check_base(file, *read_configs(config), args)
        pipe = PIPELINES[xl].from_single_file(str(file), config=config, **given)
    if not config:
        scheduler = check_base(file, pipe.unet.config, pipe.scheduler.config, args, explicit=False)
        pipe.register_modules(scheduler=scheduler)
    # diffusers silently drops what the configs do not describe, and leaves empty what is missing.
    in_file = sum(key.startswith("model.diffusion_model.") for key in keys)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    missing = [name for part in parts for name, p in part.named_parameters() if p.is_meta]
    if missing or in_file != len(pipe.unet.state_dict()):
        which = f" ({len(missing)} are missing, the first {missing[0]})" if missing else ""
        fail(f"base model {file}: its tensors do not match its configs{which}; {advice}")
    return pipe


def open_folder(base, place, args, dtype, **given):
    """The pipeline of a folder or a Hub id in diffusers' layout, each part with all its weights."""
    source = str(place or base)
    index = diffusers.DiffusionPipeline.load_config(source)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    kinds = {part: index[part][1] for part in parts if (index.get(part) or [None])[0]}
    known = {kind.__name__: kind for kind in NETWORKS}
    if not {*parts[:3]} <= kinds.keys() or not {*kinds.values()} <= known.keys():
        fail(f"--base_model {base} is a {index['_class_name']}, not of SD 1.x, 2.x or SDXL")
    scheduler = check_base(base, *read_configs(source), args)
    given["scheduler"] = None  # whose class may take further libraries
    pipeline = PIPELINES["text_encoder_2" in kinds]
    more = {"use_safetensors": True, "dtype": dtype, "variant": args.variant}
    folder = place or Path(pipeline.download(base, **given, **more))
    for part in kinds.keys() - given.keys():
        # Some parts may have no such variant.
        has_variant = any((folder / part).glob(f"*.{args.variant}*.safetensors"))
        where = {"subfolder": part, "variant": args.variant if has_variant else None}
        what, kind = f"--base_model {base}, {part}", known[kinds[part]]
        given[part] = load_part(kind, what, folder, dtype, **where)
    pipe = pipeline.from_pretrained(folder, **given, **more)
    pipe.register_modules(scheduler=scheduler)
    return pipe


def read_configs(source):
    """The configs of UNet and scheduler in a folder or on the Hub."""
    unet = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet")
    return unet, diffusers.LCMScheduler.load_config(source, subfolder="scheduler")


def check_base(base, unet, scheduler, args, explicit=True):
    """The schedule of a base model, by its configs; refuse what LCM-LoRAs are not for."""
    usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    advice = "--prediction_type, --rescale_betas_zero_snr go before configs and a LoRA's header"
    with or_fail(f"base model {base} cannot be opened", advice):
        settled = usual | settle_prediction(args, str(base), scheduler, explicit)
    kind, zero = (settled[key] for key in usual)
    if [kind, zero] != [scheduler.get(key, usual[key]) for key in usual] or not explicit:
        print(f"{base} is taken as {kind}{', zero terminal SNR' * bool(zero)}")
    channels, its = unet["in_channels"], f"--base_model {base}: its"
    if unet.get("time_cond_proj_dim"):
        fail(f"--base_model {base} is an LCM itself; give the model that it was distilled from")
    if channels != 4 and not (channels == 9 and args.mask):
        advice = "; 9 are for inpainting with --image and --mask"
        fail(f"{its} UNet takes {channels} channels, text-to-image takes 4{advice}")
    name = scheduler.get("_class_name")
    flow = scheduler.get("use_flow_sigmas") or scheduler.get("timestep_type") == "continuous"
    if flow or "beta_schedule" not in scheduler or kind not in ("epsilon", "v_prediction"):
        says = "needed are betas and epsilon or v_prediction"
        fail(f"{its} scheduler is {name} with prediction_type {kind}; {says}")
    if zero and kind == "epsilon":  # at SNR 0 the noise is the input: it tells nothing of an image
        fail(f"{its} noise reaches zero SNR, which needs --prediction_type v_prediction")
    kinds = "beta_schedule may be linear, scaled_linear or squaredcos_cap_v2"
    with or_fail(f"{its} scheduler config cannot be used", kinds):
        return diffusers.LCMScheduler.from_config(settled)


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


def load_pipeline(base, config, args, device, dtype, loras):
    """The base model as a text-to-image pipeline."""
    place, one_file = local(base), base.lower().endswith(".safetensors")
    if not place and (one_file or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base)):
        valid = "a folder in diffusers' layout, a .safetensors file or a Hub id"
        fail(f"base model {base}: no such file or folder; give --base_model {valid}")
    if place and place.is_file() and not one_file:
        fail(f"base model {base}: a file must be a .safetensors one; pickled weights are not read")
    if not place:
        print(f"{base} is not a folder here or next to infer.py: looking on the Hub")
    given, config = {"dtype": dtype}, config if one_file else place or base
    vae = f"--vae {args.vae}" if args.vae else f"--tiny_vae {args.tiny_vae}"
    if name := args.vae or args.tiny_vae:  # the base model's VAE is then not even read
        kind = diffusers.AutoencoderKL if args.vae else diffusers.AutoencoderTiny
        given["vae"] = load_part(kind, vae, name, dtype)
    if one_file:
        pipe = open_file(place, config, args, loras, **given)
    else:
        missing = "was not found locally, next to infer.py, or on the Hub"
        what = f"base model {base} {'cannot be opened' if place else missing}"
        with or_fail(what, "--base_model names another"):
            pipe = open_folder(base, place, args, **given)
    if "vae" in given:
        check_vae(pipe, vae, config and local(config))
    for end in ("", "_2"):
        if encoder := getattr(pipe, f"text_encoder{end}", None):
            what = f"--base_model {base}: tokenizer{end}"
            check_tokenizer(getattr(pipe, f"tokenizer{end}"), encoder.config, what)
    if not hasattr(pipe, "text_encoder_2") and pipe.vae.config.get("latents_mean"):
        fail(f"--base_model {base}: its VAE has latents_mean, which only SDXL's pipelines know")
    guard(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    with or_fail(f"--device {device}: the base model cannot be put there"):
        return pipe.to(device)


def load_part(kind, what, name, dtype, **where):
    """A network with all of its weights and no others."""
    where |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with or_fail(f"{what} cannot be opened", "valid are a diffusers folder or a Hub id"):
        source = str(local(name) or name)
        part, info = kind.from_pretrained(source, ignore_mismatched_sizes=True, **where)
    for how in ("missing", "unexpected", "mismatched"):
        if keys := sorted(info[f"{how}_keys"]):
            which = f"{len(keys)} are {how}, the first {keys[0]}"
            fail(f"{what}: its weights are not those of {kind.__name__}: {which}")
    return part


def check_vae(pipe, what, folder):
    """The VAE given fits the base model, whose VAE's config is in `folder`, unless on the Hub."""
    channels, factor = pipe.unet.config.out_channels, pipe.vae_scale_factor
    if folder and (folder / "vae" / "config.json").is_file():
        config = diffusers.AutoencoderKL.load_config(folder / "vae")
        factor = 2 ** (len(config["block_out_channels"]) - 1)
    if (ours := (pipe.vae.config.latent_channels, pipe.vae_scale_factor)) != (channels, factor):
        has = "latents of {} channels and a side of 1/{}"
        ours, theirs = has.format(*ours), has.format(channels, factor)
        fail(f"{what} is for {ours}; the base model has {theirs}")


def guard(vae):
    """Stop at NaN and infinite numbers, which would be a black image, with their row of the batch.

    A VAE that overflows in 16 bits is taken to 32 for the batch. The pipelines do so by themselves
    for a VAE of SDXL whose config says force_upcast.
    """
    once = functools.cache(warn)

    def check(tensor, reason):
        if not (finite := tensor.isfinite().flatten(1).all(1)).all():
            raise FloatingPointError(int((~finite).nonzero()[0]), f"NaN or inf {reason}")
        return tensor

    def checked(part, call, x):
        way = "try --dtype fp32 or bf16, or a lower weight of each LoRA"
        check(x, f"in the latents, from the UNet or a LoRA: {way}")
        image = call(x)
        if x.dtype != torch.float32 and not image.isfinite().all():
            once(f"the VAE overflows in {x.dtype}: taken to float32; --vae can name another")
            part.float()
            image = call(x.float()).to(x.dtype)
            part.to(x.dtype)
        way = "--vae names another, SDXL's for fp16 is madebyollin/sdxl-vae-fp16-fix"
        return check(image, f"from the VAE, not from the latents: {way}")

    vae.enable_slicing()  # one image at a time: of 1024 px each takes over a GiB
    encode, decode = vae.encoder.forward, vae.decode
    vae.encoder.forward = lambda x: checked(vae.encoder, encode, x)
    vae.decode = lambda x, **more: (checked(vae, lambda y: decode(y, **more)[0], x),)  # a tuple


def load_controlnet(name, pipe):
    """A ControlNet that fits the base model, of its device and type."""
    net = load_part(diffusers.ControlNetModel, f"--controlnet {name}", name, pipe.dtype)
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
    """The jobs with a size in pixels: their own, else that of an image given, else the base's."""
    multiple, sample = math.lcm(8, pipe.vae_scale_factor), pipe.unet.config.sample_size
    latent = (sample, sample) if isinstance(sample, int) else sample
    height, width = (side * pipe.vae_scale_factor for side in latent)
    height, width = args.height or height, args.width or width  # recipe.json may name them
    flag = "--image" if args.image else "--control_image"
    if images:
        width, height = (max(round(side / multiple), 1) * multiple for side in images["image"].size)
        if any(None in (job.width, job.height) for job in jobs):
            print(f"Size: {width} x {height}, that of {flag} in multiples of {multiple}")
    rest = {"height": height, "width": width, "negative_prompt": args.negative_prompt or None}
    sized = [job._replace(**{k: rest[k] for k in rest if getattr(job, k) is None}) for job in jobs]
    for job, name in itertools.product(sized, ("height", "width")):
        if (value := getattr(job, name)) % multiple:
            by_flag = value == getattr(args, name) or not args.prompts_file
            flag = f"--{name}" if by_flag else f"--prompts_file: {name}"
            example = -(-value // multiple) * multiple
            fail(f"{flag} {value}: must be a multiple of {multiple}, e.g. {example}")
    sizes = dict.fromkeys((job.width, job.height) for job in sized)
    # A mask is cropped as its image is.
    for name, size in itertools.product(images.keys() - {"mask_image"}, sizes):
        scale = max(new / old for new, old in zip(size, images[name].size))
        cut = (old * scale - new for new, old in zip(size, images[name].size))
        if max(cut) >= multiple:
            which = flag if name == "image" else "--control_image"
            given, taken = ("{} x {}".format(*sides) for sides in (images[name].size, size))
            print(f"{which}: {given}, cropped at its edges to the proportions of {taken}")
    return sized


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
def encode_prompts(pipe, jobs, chunks, guided):
    """A pipeline's arguments for its texts: embeddings [B, chunks * 77, D], XL's pooled [B, D]."""

    def pieces(texts):
        if None in texts or chunks == 1:  # the pipeline's own way
            return texts if texts[0] is not None else None
        return [piece for text in texts for piece in split_prompt(text, pipe.tokenizer, chunks)]

    prompts, negatives = (pieces([job[field] for job in jobs]) for field in (0, 1))
    given = {"device": pipe.device, "do_classifier_free_guidance": guided}
    given |= {"num_images_per_prompt": 1, "negative_prompt": negatives}
    names = [f"{a}{b}prompt_embeds" for b in ("", "pooled_") for a in ("", "negative_")]
    return {
        name: x[::chunks] if "pooled" in name else x.reshape(len(jobs), -1, x.shape[-1])
        for name, x in zip(names, pipe.encode_prompt(prompts, **given))
        if x is not None
    }


def check_prompts(pipe, jobs, chunks):
    """Warn of prompts of which CLIP reads the beginning only."""
    tokenizer, limit = pipe.tokenizer, pipe.tokenizer.model_max_length
    texts = dict.fromkeys(text for job in jobs for text in (job.prompt, job.negative_prompt))
    read = {text: "".join(split_prompt(text, tokenizer, chunks)) for text in texts if text}
    if long := {text: text[len(kept) :] for text, kept in read.items() if kept != text}:
        text, lost = next(iter(long.items()))
        count = len(tokenizer(lost, add_special_tokens=False).input_ids)
        says = f"{len(long)} of {len(read)} prompts exceed the {chunks} x {limit} tokens read"
        says = f"{says}: of {text[:30]!r} {count} are left out, {lost[:60]!r}"
        warn(f"{says}; --max_prompt_chunks {chunks + 1} reads more")


def check_plan(args, plan, jobs, original_steps, keeps_guidance=False):
    """Judge the [(scheduler, steps)] of a run, once the LoRA's header and the prompts are read."""
    if keeps_guidance and args.guidance_scale <= 1 and jobs:
        print("This LoRA keeps guidance: give its teacher's by --guidance_scale")
    if args.guidance_scale > 2 and args.lcm_weight and not keeps_guidance:
        warn(f"--guidance_scale {args.guidance_scale:g}: above 2, images of an LCM-LoRA burn out")
    for name, steps in plan if jobs else ():
        if name in DISTILLED and steps > original_steps:
            fail(f"--steps {steps}: must be from 1 to {original_steps}, the LoRA's own DDIM steps")
    for steps in sorted({steps for _, steps in plan}) if args.image else ():
        if (raised := enough(args.strength, steps)) != args.strength:
            taken = f"{args.strength:g} x {steps} step{'s' * (steps > 1)}"
            warn(f"--strength {taken} is less than one step: raised to {raised:.3g} to take one")
    text = "\n".join(f"{job.prompt}\n{job.negative_prompt}" for job in jobs)
    ways = {r"\([^()\n]+:[\d.]+\)": "write it without", "<lora:[^>\n]*>": "--style_lora"}
    for sign, way in ways.items():
        if match := re.search(sign, text):
            warn(f"--prompt: {match[0][:80]} is A1111's, CLIP reads it as text; here use: {way}")
    affected = not args.compare or any(name in DISTILLED for name, _ in plan)
    if affected and args.guidance_scale <= 1 and any(job.negative_prompt for job in jobs):
        where = "in the LCM-LoRA columns" if args.compare else "here"
        warn(f"--negative_prompt does nothing {where}: it needs a --guidance_scale above 1")


def enough(strength, steps):
    """`strength`, or what it must be for one step: pipelines take int(steps * strength) steps."""
    # 1 / steps would not always do: 49 * (1 / 49) is below 1.
    return strength if int(steps * strength) else math.nextafter(1 / steps, 1)


# -------------------------------------------------------------------------------------- 4. Generate


def generate(pipe, args, images, jobs, steps, guidance, seen, keep=lambda place, image: image):
    """Images, seconds an image with text encoding and VAE, and how many of them are timed.

    Of each image is kept what `keep` returns, which is called after each batch.
    The first call of a process pays for allocations, kernel choice and compilation: batches of a
    kind that is not in `seen` are left out, unless there are no others (0 are timed).
    """
    kinds, made, times = {}, {}, []
    for place, job in enumerate(jobs):
        kinds.setdefault((job.height, job.width, job.negative_prompt is None), []).append(place)
    size = args.batch_size
    batches = [alike[i : i + size] for alike in kinds.values() for i in range(0, len(alike), size)]
    bar = tqdm(total=len(jobs), desc=f"{steps} steps", unit="image", disable=None, leave=False)
    for places in batches:
        start, batch = time.perf_counter(), [jobs[place] for place in places]
        # The images of Pillow are in main memory: the device has done its work.
        new = generate_batch(pipe, args, images, batch, steps, guidance)
        kind = (len(batch) == 1, batch[0].height, batch[0].width) if args.compile else "any"
        times.append((time.perf_counter() - start, len(batch), kind in seen))
        seen.add(kind)
        made |= {place: keep(place, image) for place, image in zip(places, new)}
        bar.update(len(batch))
    bar.close()
    timed = [row for row in times if row[-1]]
    seconds, count, _ = map(sum, zip(*timed or times))
    return [made[place] for place in range(len(jobs))], seconds / count, count if timed else 0


def generate_batch(pipe, args, images, jobs, steps, guidance):
    """One call of the pipeline; each image has its own generator."""
    height, width, given = jobs[0].height, jobs[0].width, {}
    for key, image in images.items():
        # Lanczos is sharp, but overshoots: black in a mask would not stay black.
        how = Image.Resampling.BILINEAR if key == "mask_image" else Image.Resampling.LANCZOS
        if key == "mask_image" and image.size != images["image"].size:
            image = image.resize(images["image"].size, how)
        given[key] = ImageOps.fit(image, (width, height), how)
    more = {key: [image] * len(jobs) for key, image in given.items()}
    more |= {"strength": enough(args.strength, steps)} if args.image else {}
    more |= {"controlnet_conditioning_scale": args.controlnet_scale} if args.controlnet else {}
    more |= {"guidance_rescale": args.guidance_rescale} if args.guidance_rescale else {}
    with or_fail(f"--seed {jobs[0].seed}, --prompt {jobs[0].prompt!a:.80} cannot be generated"):
        try:
            more |= encode_prompts(pipe, jobs, args.max_prompt_chunks or 1, guidance > 1)
            made = pipe(
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                # Noise from the CPU, by a generator each: the same on all devices, in any batch.
                generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
                # TCD's default; a LoRA with phases was trained for no new noise
                eta=args.eta if type(pipe.scheduler).__name__ == "TCDScheduler" else 0.0,
                **more,
            ).images
        except FloatingPointError as error:
            row, reason = error.args
            fail(f"--seed {jobs[row].seed}, --prompt {jobs[row].prompt!a:.80}: {reason}")
    if args.mask:  # the VAE does not give back to the bit what is to stay
        made = [Image.composite(image, given["image"], given["mask_image"]) for image in made]
    return made


def save_job(args, settings, jobs, files, name, steps, place, image):
    """Save the image of job `place` with its settings."""
    output, mark = files[place]
    one = settings | jobs[place]._asdict() | {"scheduler": name, "steps": steps}
    one |= {"strength": enough(args.strength, steps)} if args.image else {}
    save(image, output, one | {"fingerprint": mark}, parameters(one))
    tqdm.write(str(output))


def generate_all(pipe, args, images, jobs, work, schedulers, settings):
    """Each job that `work` names, each image a file with its settings as soon as it is there."""
    guidance, seen, report = args.guidance_scale, set(), []
    if len(work) > 1:  # step counts are compared: none of them pays for the first call
        pipe.scheduler = schedulers[next(iter(work))[0]]
        generate(pipe, args, images, jobs[: args.batch_size], 1, guidance, seen)
    for (name, steps), files in work.items():
        pipe.scheduler, todo = schedulers[name], [jobs[index] for index in files]
        keep = functools.partial(save_job, args, settings, todo, [*files.values()], name, steps)
        _, seconds, count = generate(pipe, args, images, todo, steps, guidance, seen, keep)
        timed = f"{count} of {len(todo)} timed, after a" if count else "no batch came after the"
        report.append(f"{steps} step{'s' * (steps > 1)}: {seconds:.3g} s/image ({timed} warm-up)")
    print(*report, sep="\n")


# ------------------------------------------------------------------------------------------ 5. Save


def parameters(settings):
    """The settings in the words that A1111, Forge and their relatives read back from a PNG."""
    facts = {
        "Steps": settings["steps"],
        "Sampler": SCHEDULERS[settings["scheduler"]][1],
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["base_model"]).name,
    }
    facts |= {"Denoising strength": f"{settings['strength']:.3g}"} if settings["image"] else {}
    for key, value in facts.items():  # a text with a comma or colon would end early: it is quoted
        facts[key] = json.dumps(value) if re.search("[,:]", str(value)) else value
    prompts, negative = settings["prompt"], settings["negative_prompt"]
    prompts += "".join(f" <lora:{name}:{weight:g}>" for name, weight in settings["loras"])
    prompts += f"\nNegative prompt: {negative}" if negative else ""
    return prompts + "\n" + ", ".join(f"{key}: {value}" for key, value in facts.items())


def save(image, path, settings, text=None):
    """Write an image with its settings: `infer_args` as JSON, `parameters` as `text`.

    It is written beside its place first: a file of its name is whole.
    """
    said, part = json.dumps(settings), path.with_name(f".{os.getpid()}.part{path.suffix}")
    if path.suffix.lower() == ".png":
        more = {"pnginfo": PngImagePlugin.PngInfo()}
        for key, chunk in {"parameters": text, "infer_args": said}.items():
            if chunk is not None:
                more["pnginfo"].add_text(key, chunk.encode(errors="replace").decode())
    else:  # the fields ImageDescription and UserComment, the latter as A1111 has it
        more, comment = {"exif": Image.Exif(), "quality": 95}, text or ""
        if len(said) + 2 * len(comment) > 60000:  # more than a JPEG has room for
            said, comment = json.dumps({"fingerprint": settings["fingerprint"]}), ""
        more["exif"][0x010E] = said
        comment = b"UNICODE\0" + comment.encode("utf-16-be", errors="replace")
        more["exif"].get_ifd(0x8769)[0x9286] = comment
    with or_fail(f"--output {path}: cannot be written"):
        try:
            image.save(part, **more)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def fingerprint(settings, *facts):
    """What an image depends on, in short: the same command has the same, other weights another."""
    left_out = ("batch_size", "compile", "device", "seed", "diffusers")
    known = {key: value for key, value in settings.items() if key not in left_out}
    text = json.dumps([known, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_there(path, mark, args):
    """Whether this image is there already; another file is not replaced without a word."""
    if args.overwrite or not os.path.lexists(path):
        return False
    with contextlib.suppress(Exception), Image.open(path) as image:  # any other file is another's
        said = image.info.get("infer_args") or image.getexif().get(0x010E)
        if json.loads(said)["fingerprint"] == mark:
            return True
    fail(f"--output {path}: exists, of other settings; name another, or replace it by --overwrite")


def try_output(path):
    """Make the folder of --output and try whether a file of such a name can be written there."""
    with or_fail(f"--output {path}: cannot be written"):
        usable_path(str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


# ------------------------------------------------------------------------------------------ 6. Main


def read_inputs(args):
    """(jobs, images, {adapter: LoRA}, settings to record), before a base model is fetched."""
    if args.seed == -1:
        args.seed = secrets.randbelow(2**32)
        print(f"--seed {args.seed}")
    jobs, images = read_jobs(args), read_images(args)
    loras = {ADAPTER: open_lora(find_lora(args.lora))} if args.lora else {}
    path, _, metadata = loras.get(ADAPTER, (None, None, {}))
    for index, (name, _) in enumerate(args.style_lora):
        loras[f"style_{index}"] = open_lora(find_lora(name, "--style_lora"))
    base, config = args.base_model or metadata.get("base_model"), args.base_config
    if not base:
        fail(f"--lora {path}: the header names no base model; give --base_model FOLDER_OR_HUB_ID")
    one_file = base.lower().endswith(".safetensors")
    if config and not one_file:
        fail(f"--base_config has no effect: base model {base} is no .safetensors file")
    if args.variant and one_file:
        fail(f"--variant has no effect: base model {base} is one file")
    trained = header(path, metadata, "training_args", "{}", lambda text: dict(json.loads(text)))
    if one_file and not config:
        config = trained.get("teacher_config") and str(trained["teacher_config"])
    recipe = take_defaults(args, path, trained, local(base))
    left_out = "prompt prompts_file output overwrite num_images compare fused_output".split()
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    settings |= {"lora": path and str(path), "base_model": base, "base_config": config}
    weights = [args.lcm_weight] * bool(path) + [weight for _, weight in args.style_lora]
    names = [lora_name(file, about) for file, _, about in loras.values()]
    settings["loras"] = list(zip(names, weights, strict=True))
    files = [str(file) for file, _, _ in loras.values()]
    settings["style_lora"] = list(zip(files, weights))[bool(path) :]
    steps = header(path, metadata, "num_ddim_timesteps", "50", number(int, 1, 1000))
    sampler = header(path, metadata, "sampler", "lcm", DISTILLED.index)
    trained = (steps, DISTILLED[sampler]) if path else merged(base)
    settings["original_inference_steps"], settings["sampler"] = trained
    settings["eta"] = args.eta = 0.0 if settings["sampler"] == "tcd" else 0.3
    omegas = [header(path, metadata, key, math.nan) for key in ("w_min", "w_max")]
    settings["keeps_guidance"] = omegas == [0, 0]  # it is not distilled into the LoRA
    settings["recipe_guidance"] = recipe.get("guidance_scale", 7.5)
    # A rerun sees whether a file of the same name is another one.
    used = {*files, *filter(None, (args.image, args.mask, args.control_image))}
    digests = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in used}
    settings |= {"sha256": digests, "diffusers": diffusers.__version__}
    return jobs, images, loras, settings


def take_defaults(args, path, trained, base):
    """Set flags not given as a LoRA's header says, else recipe.json of the base; the recipe."""
    file, recipe = base and base / "recipe.json", {}
    if file and file.exists():
        with or_fail(f"{file}: not an object in JSON"):
            recipe = {"format": None, **json.loads(file.read_text(encoding="utf-8"))}
        print(f"Defaults are those of {file}")
    trained = {key: value for key, value in trained.items() if value is not None}
    names = "format negative_prompt guidance_scale guidance_rescale width height max_prompt_chunks"
    for where, given in (f"LoRA {path}: training_args", trained), (file, recipe):
        for key in filter(given.__contains__, [*CHOICES, *names.split()]):
            check_value(where, key, given[key])
            if key in ("width", "height") and given[key] % 8:
                fail(f"{where}: {key} is {given[key]}, must be a multiple of 8")
            if vars(args).get(key, "") is None:  # a flag that is not given
                setattr(args, key, given[key])
    return recipe


def merged(base):
    """(DDIM steps, sampler) of a base model with its LCM-LoRA inside, of --fused_output."""
    with or_fail(f"--base_model {base}: without --lora its scheduler is needed, and not found"):
        config = diffusers.LCMScheduler.load_config(local(base) or base, subfolder="scheduler")
    kinds = {SCHEDULERS[name][0]: name for name in DISTILLED}
    if config.get("_class_name") not in kinds:
        fail(f"--base_model {base}: no LCM-LoRA is merged in, by its scheduler: give --lora")
    return config.get("original_inference_steps", 50), kinds[config["_class_name"]]


def find_work(args, jobs, plan, settings):
    """{(scheduler, steps): {index of a job: (file, fingerprint)}} of what is not there yet."""
    work, count = {}, len(plan) * len(jobs)
    for (name, steps), (index, job) in itertools.product(plan, enumerate(jobs)):
        ending = f"-{index}" * (len(jobs) > 1) + f"-steps{steps}" * (len(plan) > 1)
        output = args.output.with_stem(args.output.stem + ending)
        mark = fingerprint(settings, job, name, steps)
        if not is_there(output, mark, args):
            work.setdefault((name, steps), {})[index] = output, mark
    if work:
        try_output(output)  # the last name is the longest
    if done := count - sum(map(len, work.values())):
        print(f"{done} of {count} images are there already (--overwrite generates them again)")
    return work


def load(args, jobs, images, loras, settings):
    """(pipeline, pipeline that takes the images, jobs with sizes, {name: scheduler})."""
    diffusers.utils.logging.set_verbosity_error()
    device, dtype = pick_device(args)
    settings |= {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    base = settings["base_model"]
    pipe = load_pipeline(base, settings["base_config"], args, device, dtype, loras)
    jobs = with_sizes(jobs, args, images, pipe)
    check_prompts(pipe, jobs, args.max_prompt_chunks or 1)
    # In a grid the LCM-LoRA comes after the teacher's columns.
    first = [name for name in loras if name != ADAPTER or not args.compare]
    fuse(pipe, args, {name: loras.pop(name) for name in first}, base)
    if args.compile:
        pipe.unet.compile_repeated_blocks(dynamic=True)  # its transformers, for every size
    task = with_images(pipe, args)
    if args.guidance_rescale and "guidance_rescale" not in inspect.signature(task).parameters:
        args.guidance_rescale = settings["guidance_rescale"] = None
        if args.compare or args.guidance_scale > 1:
            warn(f"--guidance_rescale does nothing here: {type(task).__name__} does not know it")
    grid, schedulers = {"original_inference_steps": settings["original_inference_steps"]}, {}
    for name, (kind, _, more) in SCHEDULERS.items():
        more = more | grid if name in DISTILLED else more
        schedulers[name] = getattr(diffusers, kind).from_config(pipe.scheduler.config, **more)
    return pipe, task, jobs, schedulers


def main(argv=None):
    """Read, load, generate, save."""
    args = parse_args(argv)
    if args.compare:
        return runpy.run_path(str(COMPARE))["compare"](args)
    jobs, images, loras, settings = read_inputs(args)
    names, steps = args.scheduler or [settings["sampler"]], args.steps or [4]
    plan = [*itertools.product(names, dict.fromkeys(steps))]
    check_plan(args, plan, jobs, settings["original_inference_steps"], settings["keeps_guidance"])
    work = find_work(args, jobs, plan, settings)
    if not work and not args.fused_output:
        return
    pipe, task, jobs, schedulers = load(args, jobs, images, loras, settings)
    if work:
        generate_all(task, args, images, jobs, work, schedulers, settings)
    if args.fused_output:
        pipe.scheduler = schedulers[settings["sampler"]]
        runpy.run_path(str(FUSE))["save"](pipe, args.fused_output)


if __name__ == "__main__":
    main()
