"""Draw with an LCM-LoRA: few steps, no guidance, any number of prompts, or a grid against its teacher.

    python infer.py --lora runs/my-lora --prompt "a red apple, Noto style" --output apple.png
    python infer.py --lora runs/my-lora --prompt "a red apple" "a house" --compare --output grid.png
    python infer.py --lora runs/my-lora --prompt "a red apple" --image sketch.png --strength 0.6 --steps 2 4 8
    python infer.py --lora runs/my-lora --fused_output my-fast-model

The base model and the number of DDIM steps come from the header of the LoRA file. After loading, every matrix and every
scaling in the UNet is compared with the file: a LoRA that is only partly applied stops the program.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
PEFT_KEY = "lora_adapter_metadata"  # PEFT's settings in the header of a file that diffusers wrote
ADAPTER = "lcm"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# The key by which diffusers knows the text encoder of a checkpoint in one file, and the pipeline of such a checkpoint.
ONE_FILE = {
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",  # SD 1.x
    "cond_stage_model.model.token_embedding.weight": "StableDiffusionPipeline",  # SD 2.x
    "conditioner.embedders.1.model.positional_embedding": "StableDiffusionXLPipeline",
}
# A LoRA tensor's key: in kohya's naming lora_unet_X.lora_down.weight, in diffusers' unet.X.lora_A.weight, formerly
# unet.X.lora.down.weight or unet.X.processor.to_q_lora.down.weight, in PEFT's base_model.model.X.lora_A.weight.
LORA_KEY = re.compile(
    r"(?P<component>lora_unet_|lora_te[12]?_|unet\.|text_encoder(?:_2)?\.)?(?P<peft>base_model\.model\.)?(?P<name>.+?)"
    r"(?:[._]lora[._](?:linear_layer\.)?(?P<part>down|up|A|B)\.weight)?(?P<alpha>\.alpha)?"
)
COMPONENTS = {
    "": "unet", "unet.": "unet", "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
}  # fmt: skip
# {name in the original code, with _ for every dot as in kohya's SDXL files: name in diffusers}
ORIGINAL_NAMES = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2", "in_layers_2": "conv1", "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
# What a key of another kind of adapter holds.
UNSUPPORTED = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a core tensor", ".diff": "difference of whole weights",
}  # fmt: skip
# What --scheduler names: the class in diffusers, the name in A1111, the group of columns in a grid and its colour.
SCHEDULERS = {
    "lcm": ("LCMScheduler", "LCM", "LCM-LoRA", "#0969da"),
    "tcd": ("TCDScheduler", "TCD", "LCM-LoRA, TCD", "#8250df"),
    "ddim": ("DDIMScheduler", "DDIM", "Teacher, DDIM", "#57606a"),
    "dpm++": ("DPMSolverMultistepScheduler", "DPM++ 2M", "Teacher, DPM-Solver++", "#bc4c00"),
    "euler": ("EulerDiscreteScheduler", "Euler", "Teacher, Euler", "#9a6700"),
}
DISTILLED = ("lcm", "tcd")  # those that step over the LoRA's own timesteps
SEEDS, PIXELS = (0, 2**32 - 1), (1, 10**6)
# What a line of --prompts_file may hold.
LINE_KEYS = {
    "prompt": (str, None, None),
    "negative_prompt": (str, None, None),
    "seed": (int, *SEEDS),
    "height": (int, *PIXELS),
    "width": (int, *PIXELS),
}
HERE = Path(__file__).resolve().parent


def fail(message):
    """End the program with one line on stderr and exit code 1."""
    raise SystemExit("error: " + " ".join(str(message).split()))


def warn(message):
    """Say on stderr what probably is not meant that way."""
    print(f"warning: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Arguments


def number(kind, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} from {low} to {high}")
        return value

    return convert


def weighted(weight, default):
    """An argparse type: PATH or PATH:WEIGHT, as (path, weight); a colon may belong to the path, as in C:\\x or a:b."""

    def convert(text):
        path, _, last = text.rpartition(":")
        try:
            float(last)
        except ValueError:
            return text, default
        return (path, weight(last)) if path and not Path(text).exists() else (text, default)

    return convert


def parse_args(argv=None):
    """Read the command line; what can be judged without a model is judged here."""
    count, seed = number(int, *PIXELS), number(int, *SEEDS)
    scale, strength = number(float, 0, 1000), number(float, -10, 10)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (python infer.py --help lists every flag)")

    group = parser.add_argument_group("Model")
    says = "the LCM-LoRA: a .safetensors file, an output folder, a PEFT folder"
    group.add_argument("--lora", required=True, metavar="PATH", help=says)
    group.add_argument("--lcm_weight", "--lora_scale", type=strength, default=1.0, help="1 (default): as trained")
    group.add_argument(
        "--style_lora",
        metavar="PATH[:WEIGHT]",
        nargs="+",
        action="extend",
        type=weighted(strength, 0.8),
        default=[],
        help="LoRAs that are added to the LCM-LoRA; weight 0.8 by default",
    )
    group.add_argument(
        "--base_model", metavar="PATH_OR_ID", help="folder, .safetensors file or hub id; default: what the header names"
    )
    group.add_argument(
        "--base_config",
        "--teacher_config",
        metavar="FOLDER_OR_ID",
        help="of a base model in one file; default: what the header names, else the hub's",
    )
    group.add_argument("--variant", help="kind of weight files to take from the base model, e.g. fp16")
    group.add_argument("--tiny_vae", metavar="FOLDER_OR_ID", help="an AutoencoderTiny in place of the base model's VAE")
    group.add_argument("--device", default="auto", help="auto (default: cuda, else mps, else cpu), or e.g. cuda:1")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: fp16 on cuda, else fp32")
    group.add_argument("--compile", action="store_true", help="compile the UNet's blocks: slow at first, then faster")

    group = parser.add_argument_group("Picture")
    group.add_argument("--prompt", nargs="+", default=[], help="one or more, each in quotes")
    group.add_argument(
        "--prompts_file",
        metavar="FILE",
        help="a prompt a line (# starts a comment); .jsonl: {"
        + ", ".join(f'"{key}": ...' for key in LINE_KEYS)
        + "} a line, of which only prompt is needed",
    )
    group.add_argument("--negative_prompt", help="has an effect only where guidance is above 1")
    group.add_argument(
        "--steps",
        type=number(int, 1, 1000),
        nargs="+",
        help="one UNet pass each (default 4); several: a picture for each, in a grid a column",
    )
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        nargs="+",
        help="lcm (default); several in a grid, where all but lcm and tcd are the teacher",
    )
    group.add_argument("--guidance_scale", type=scale, default=1.0, help="1 (default) to 2; above 1 passes double")
    group.add_argument("--seed", type=seed, default=0, help="picture i is drawn from seed + i")
    group.add_argument("--num_images", type=count, help="pictures for each prompt (default 1)")
    size = "in pixels; default: that of --image, else what the base model was made for"
    group.add_argument("--height", type=count, help=size)
    group.add_argument("--width", type=count, help=size)
    group.add_argument("--batch_size", type=count, default=4, help="most pictures at a time: memory and speed only")

    group = parser.add_argument_group("Pictures to start from")
    group.add_argument("--image", metavar="FILE", help="drawn over: img2img, or inpainting where --mask is given")
    group.add_argument("--mask", metavar="FILE", help="white is redrawn, black stays as it is in --image")
    group.add_argument(
        "--strength", type=number(float, 0, 1), help="part of the steps that is taken (0.8; 1 where --mask is given)"
    )
    group.add_argument("--controlnet", metavar="FOLDER_OR_ID", help="a ControlNet of the base model's layout")
    group.add_argument("--control_image", metavar="FILE", help="what the ControlNet follows: edges, depth, a pose ...")
    group.add_argument("--controlnet_scale", type=scale, default=1.0, help="1 (default): as strong as trained")

    group = parser.add_argument_group("Output")
    group.add_argument("--output", type=Path, default=Path("lcm.png"), help="a .png; x-0.png, x-1.png ... if several")
    group.add_argument(
        "--compare",
        action="store_true",
        help="one grid: teacher in 50, 1, 2, 4 steps, LoRA in 1, 2, 4, 8; or a column for each --scheduler and --steps",
    )
    group.add_argument("--compare_guidance", type=scale, metavar="G", help="of the teacher (1 + mean omega, else 7.5)")
    group.add_argument(
        "--fused_output", type=Path, metavar="DIR", help="save the base with the LoRA merged in, as a diffusers folder"
    )

    args = parser.parse_args(argv)
    check_args(args, parser)
    args.plan, args.num_images = make_plan(args), args.num_images or 1
    teacher = [name not in DISTILLED for name, _ in args.plan]
    if args.compare_guidance is not None and not (args.compare and any(teacher)):
        fail("--compare_guidance has no effect without --compare and a column of the teacher")
    if args.guidance_scale != 1 and args.compare and all(teacher):
        fail("--guidance_scale has no effect without a column of the LCM-LoRA; the teacher's is --compare_guidance")
    if args.guidance_scale > 2 and args.lcm_weight:
        warn(f"--guidance_scale {args.guidance_scale:g}: guidance is distilled in already; above 2 pictures burn out")
    if args.image:
        args.strength = (1.0 if args.mask else 0.8) if args.strength is None else args.strength
        for steps in sorted({steps for _, steps in args.plan if enough(args.strength, steps) != args.strength}):
            says = f"--strength {args.strength:g} x {plural(steps, 'step')} is less than one step"
            warn(f"{says}: raised to {enough(args.strength, steps):.3g}, so that one is taken")
    return args


def check_args(args, parser):
    """Refuse what does not go together."""
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
    drawing = "image controlnet steps scheduler seed num_images height width batch_size guidance_scale negative_prompt"
    # (flags, what they need to have an effect, its name)
    for names, effect, needed in (
        (f"{drawing} compare output compile", prompts, "--prompt or --prompts_file"),
        ("mask strength", args.image, "--image"),
        ("controlnet", args.control_image, "--control_image"),
        ("control_image controlnet_scale", args.controlnet, "--controlnet"),
    ):
        for name in names.split():
            if getattr(args, name) != parser.get_default(name) and not effect:
                fail(f"--{name} has no effect without {needed}")
    if args.compare and args.num_images:
        fail("--num_images does not go with --compare: one picture a cell")
    if len(args.scheduler or ()) > 1 and not args.compare:
        fail(f"--scheduler {' '.join(args.scheduler)}: several need --compare")


def make_plan(args):
    """[(scheduler, steps)]: the columns of a grid, or one scheduler and a picture for each number of steps."""
    if args.compare and not (args.scheduler or args.steps):
        plan = {"ddim": [50], "dpm++": [1, 2, 4], "lcm": [1, 2, 4, 8]}
    else:
        schedulers, steps = (["dpm++", "lcm"], [1, 2, 4, 8]) if args.compare else (["lcm"], [4])
        plan = dict.fromkeys(args.scheduler or schedulers, dict.fromkeys(args.steps or steps))  # each of them once
    return [(name, steps) for name, counts in plan.items() for steps in counts]


def enough(strength, steps):
    """`strength`, or what it needs to be for one step: pipelines take int(steps * strength) steps."""
    return strength if int(steps * strength) else math.nextafter(1 / steps, 1)  # 49 * (1 / 49) is below 1


class Job(NamedTuple):
    """A picture to draw; height and width are in pixels."""

    prompt: str
    negative_prompt: str | None
    seed: int
    height: int | None
    width: int | None


def read_lines(file):
    """The lines of --prompts_file as dicts of LINE_KEYS."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts_file {file}: cannot be read as text ({error})")
    rows = []
    for index, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        row = {"prompt": line}
        if Path(file).suffix.lower() == ".jsonl":
            where = f"--prompts_file {file}, line {index}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{where}: not JSON ({error})")
            if not isinstance(row, dict) or "prompt" not in row or row.keys() - LINE_KEYS.keys():
                fail(f'{where}: must be {{"prompt": ...}}, beside it only {", ".join([*LINE_KEYS][1:])}')
            for key, value in row.items():
                kind, low, high = LINE_KEYS[key]
                if type(value) is not kind or kind is int and not low <= value <= high:
                    fail(f"{where}: {key} is {value!r}, needed is " + (f"{low} to {high}" if kind is int else "a text"))
        rows.append(row)
    return rows or fail(f"--prompts_file {file}: it holds no prompt")


def read_jobs(args):
    """The pictures to draw: picture i from seed + i, where its line names no seed."""
    jobs, defaults = [], {"negative_prompt": args.negative_prompt, "height": args.height, "width": args.width}
    for row in read_lines(args.prompts_file) if args.prompts_file else [{"prompt": prompt} for prompt in args.prompt]:
        for copy in range(args.num_images):
            seed = row["seed"] + copy if "seed" in row else args.seed + len(jobs)
            jobs.append(Job(**defaults | row | {"seed": seed}))
    distilled = not args.compare or any(name in DISTILLED for name, _ in args.plan)
    if any(job.negative_prompt for job in jobs) and args.guidance_scale <= 1 and distilled:
        where = "in the LCM-LoRA columns" if args.compare else "here"
        warn(f"--negative_prompt does nothing {where}: it needs a --guidance_scale above 1")
    return jobs


def read_pictures(args):
    """{argument of the pipeline: picture} of --image, --mask and --control_image, upright, on white."""
    from PIL import Image, ImageOps

    # A pipeline with a ControlNet and nothing to draw over calls the control image `image`.
    control = "control_image" if args.image else "image"
    pictures = {}
    for flag, key, mode in ("image", "image", "RGB"), ("mask", "mask_image", "L"), ("control_image", control, "RGB"):
        if file := getattr(args, flag):
            try:
                picture = ImageOps.exif_transpose(Image.open(file))
                if picture.mode.startswith("I"):  # 16-bit grey, such as a depth map, which Pillow would clip
                    picture = picture.point(lambda tone: tone / 256).convert("L")
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                pictures[key] = picture.convert(mode)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                fail(f"--{flag} {file}: not a picture that can be read ({error})")
    return pictures


# ----------------------------------------------------------------------------------------------------------------------
# 2. The LoRA file


def find_lora(name, flag="--lora"):
    """The .safetensors file that a user means by a file or a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        for file in (path / WEIGHTS_NAME, path / PEFT_NAME, path / "unet" / PEFT_NAME):
            if file.is_file():
                return file
        others = sorted(str(f.relative_to(path)) for stem in ("*", "*/*") for f in path.glob(f"{stem}.safetensors"))
        hint = f", but {', '.join(others)}" if others else ""
        fail(f"{flag} {name}: no {WEIGHTS_NAME} or {PEFT_NAME} in this folder{hint}")
    if not path.is_file():
        fail(f"{flag} {name}: no such file or folder")
    if path.suffix != ".safetensors":
        valid = f"a .safetensors file, or a folder with {WEIGHTS_NAME} or {PEFT_NAME}"
        fail(f"{flag} {name}: must be {valid}; pickled weights are not read")
    return path


def read_lora(path):
    """All tensors, every value finite, and the header metadata; PEFT's adapter_config.json becomes a part of it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        fail(f"LoRA {path}: not a whole safetensors file ({error})")
    if bad := [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        fail(f"LoRA {path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, first {bad[0]}")
    if metadata.get("lcm_lora_version", "1") != "1":
        fail(f"LoRA {path}: format version {metadata['lcm_lora_version']}; this infer.py reads version 1")
    config = path.with_name("adapter_config.json")
    if path.name == PEFT_NAME and config.is_file():
        try:
            settings = dict(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            fail(f"LoRA {path}: {config.name} beside it cannot be read ({error})")
        metadata[PEFT_KEY] = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        if settings.get("base_model_name_or_path"):
            metadata.setdefault("base_model", settings["base_model_name_or_path"])
    elif path.name == PEFT_NAME:
        warn(f"LoRA {path}: no {config.name} beside it, which tells alpha: the rank is taken")
    return tensors, metadata


def header(path, metadata, key, default, read=float):
    """A value of the header metadata, where all are strings."""
    try:
        return read(metadata.get(key, default))
    except (ValueError, TypeError):
        fail(f"LoRA {path}: the header's {key} is {metadata[key]!r}, which cannot be read")


def parse_key(key):
    """(layer, part, naming) of a tensor's key, None if it is of no LoRA layer; the part is A, B or alpha."""
    match = LORA_KEY.fullmatch(key)
    if not match or not (match["part"] or match["alpha"]):
        return None
    component, name = match["component"] or "", match["name"]
    name = re.sub(r"(?<=[._])processor[._]", "", name)
    name = re.sub(r"(self_attn[._])to_(q|k|v|out)$", r"\1\2_proj", name)
    name = re.sub(r"([._])to_out$", r"\1to_out\g<1>0", name)
    part = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["part"], match["part"])
    naming = "lora_A/B" if match["part"] in ("A", "B") else f"lora{'_' if component.startswith('lora') else '.'}down/up"
    if component and match["peft"]:
        naming = f"{component}{match['peft']}*.{naming}"
    return f"{COMPONENTS[component]}.{name}", part, naming


def group_layers(path, tensors, metadata, alpha=None):
    """{layer: {A, B, alpha, rank, naming}} of a file in whatever naming, `alpha` being for layers that tell none.

    A layer is unet.X, text_encoder.X or text_encoder_2.X; X is the module path, in kohya's naming with _ for every dot.
    """
    layers = {}
    for key, tensor in tensors.items():
        if kind := next((kind for word, kind in UNSUPPORTED.items() if word in key), None):
            fail(f"LoRA {path}: {key} belongs to a {kind}; only plain LoRA is supported, two matrices a layer")
        if not (parsed := parse_key(key)):
            fail(f"LoRA {path}: cannot read {key}; only LoRA layers of a UNet and its text encoders are known")
        name, part, naming = parsed
        layer = layers.setdefault(name, {})
        if part in layer:
            fail(f"LoRA {path}: {key} is in the file twice, under two names")
        if part == "alpha" and tensor.numel() != 1:
            fail(f"LoRA {path}: {key} is no number but of shape {[*tensor.shape]}")
        layer[part] = tensor.item() if part == "alpha" else tensor
        if part == "A":
            layer["naming"] = naming
    if not layers:
        fail(f"LoRA {path}: the file holds no LoRA layer")
    config = header(path, metadata, PEFT_KEY, "{}", lambda text: dict(json.loads(text)))
    for name, layer in layers.items():
        for part, word in ("A", "down"), ("B", "up"):
            if part not in layer:
                fail(f"LoRA {path}: layer {name} has no {word} matrix ({part}); the file is incomplete")
        down, up = layer["A"].shape, layer["B"].shape
        if len(down) not in (2, 4) or len(up) != len(down) or down[0] != up[1] or down[0] == 0:
            fail(f"LoRA {path}: the matrices of layer {name} do not fit together: {[*down]} and {[*up]}")
        layer["rank"] = down[0]
        if "alpha" not in layer:
            # Without any alpha the scaling is 1.
            choices = (peft_alpha(config, *name.split(".", 1), down[0]), alpha, down[0])
            layer["alpha"] = next(value for value in choices if value is not None)
    return layers


def peft_alpha(config, component, name, rank):
    """alpha of a layer by the settings that PEFT keeps, such that the scaling is alpha / rank; None where they are silent."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(f"{component}.alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, name), config.get(f"{component}.lora_alpha"))
    return alpha * math.sqrt(rank) if alpha is not None and config.get(f"{component}.use_rslora") else alpha


def open_lora(path):
    """(path, layers, metadata) of a LoRA file."""
    tensors, metadata = read_lora(path)
    return path, group_layers(path, tensors, metadata), metadata


def irregular(layers):
    """What a file's naming is, if it is one that diffusers refuses or, looking at the first key only, reads in part."""
    namings = Counter(layer["naming"] for layer in layers)
    if len(namings) == 1 and "base_model" not in next(iter(namings)):
        return ""
    counts = ", ".join(f"{count} as {naming}" for naming, count in namings.most_common())
    return f"in the naming of Hugging Face's scripts: {counts}"


def diffusers_name(name, layers_per_block):
    """A UNet layer's name in kohya's writing, its blocks counted as diffusers does and not through as the original code.

    diffusers' own renaming takes the upsamplers of SD 1.x for attention, and input_blocks_10 for a part of input_blocks_1.
    """
    name = ORIGINAL_NAMES.get(name, name)
    if not (match := re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(?:([0-2])_)?(.+)", name)):
        return name
    side, count, place, rest = match.groups()
    block, layer = divmod(int(count) - (side == "input"), layers_per_block + 1)
    rest = ORIGINAL_NAMES.get(rest, rest)
    if side == "middle":
        return f"mid_block_{'attentions_0' if count == '1' else f'resnets_{int(count) // 2}'}_{rest}"
    start = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{start}_{'down' if rest == 'op' else 'up'}samplers_0_conv"
    return f"{start}_{'resnets' if place == '0' else 'attentions'}_{layer}_{rest}"


def layout(names, family=None):
    """What a UNet, or a LoRA of all its attention, was made for, by its layers' names; None where they do not tell.

    In Stable Diffusion 1.x and 2.x transformers are one block deep, in SDXL deeper; SSD-1B has none in the middle.
    """
    names = [re.sub("^(unet|model_diffusion_model)_", "", name.replace(".", "_")) for name in names]
    # down_blocks, mid_block, up_blocks; in the original code input_blocks, middle_block, output_blocks.
    places = {name[0] for name in names if "_transformer_blocks_" in name}
    if not (places & set("di") and places & set("uo")):
        return None
    xl = family == "sdxl" or any(
        "_transformer_blocks_1_" in name or name.startswith(("add_embedding", "label_emb")) for name in names
    )
    return "Stable Diffusion 1.x / 2.x" if not xl else "SDXL" if "m" in places else "SSD-1B"


def match_layout(loras, base, names):
    """Each LoRA was trained for the layout of the base UNet, whose layers have these `names`."""
    names = list(names)
    theirs, shallow = layout(names), layout([name for name in names if "transformer_blocks" in name])
    for path, layers, metadata in loras.values():
        ours = layout(layers, metadata.get("family"))
        # A header without a family leaves the transformers to tell; in a small SDXL they may be as shallow as in SD 1.x.
        if ours and theirs and ours not in ((theirs,) if "family" in metadata else (theirs, shallow)):
            origin = f" (base {metadata['base_model']})" if "base_model" in metadata else ""
            says = f"was trained for the {ours} layout{origin}"
            fail(f"LoRA {path} {says}; --base_model {base} is of the {theirs} layout")


def match_base(pipe, path, layers, metadata, base):
    """{component: {module path: layer}}: every layer of the file is one module of the base, with fitting shapes."""

    def plain(component, name):
        # The text encoders have all their layers in text_model, or have not, by the version of transformers.
        return f"{component}_{name}".replace(".", "_").replace("_text_model_", "_")

    # The base's own modules are the dictionary: turning _ back into . by rules would be guesswork. A module that bears
    # a LoRA already has become its base_layer.
    modules = {}
    for component in set(COMPONENTS.values()):
        for name, module in getattr(getattr(pipe, component, None), "named_modules", tuple)():
            if getattr(module, "weight", None) is not None:
                name = name.removesuffix(".base_layer")
                modules[plain(component, name)] = name, module.weight
    origin = [metadata[key] for key in ("family", "base_model") if metadata.get(key)] or ["another base (unnamed)"]
    matched = {}
    for name, layer in layers.items():
        says = f"LoRA {path} was trained for {' '.join(origin)}, it does not fit --base_model {base}: layer {name}"
        component, _, module = name.partition(".")
        found = modules.get(plain(component, diffusers_name(module, pipe.unet.config.layers_per_block)))
        if not found:
            fail(f"{says} has no counterpart there")
        module, weight = found
        if module in matched.setdefault(component, {}):
            fail(f"LoRA {path}: layer {name} is in the file twice, under two names")
        rank = layer["rank"]
        down, up = [rank, *weight.shape[1:]], [weight.shape[0], rank] + [1] * (weight.ndim - 2)
        if [*layer["A"].shape] != down or [*layer["B"].shape] != up:
            fail(f"{says} is {[*layer['A'].shape]} and {[*layer['B'].shape]}, needed are {down} and {up}")
        matched[component][module] = layer
    return matched


def peft_settings(layers):
    """PEFT's words for {module path: layer}: the commonest rank and alpha, and patterns for the layers that differ."""
    settings = {"target_modules": sorted(layers)}
    for key, word in ("rank", "r"), ("alpha", "lora_alpha"):
        settings[word] = common = Counter(layer[key] for layer in layers.values()).most_common(1)[0][0]
        settings[f"{key}_pattern"] = {name: layer[key] for name, layer in layers.items() if layer[key] != common}
    return settings


def attach_lora(pipe, adapter, path, layers, metadata, base):
    """Put the layers into the pipeline, then prove that all of them arrived: each A, each B, each scaling."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    def arrived(module, layer):
        pairs = ((layer["A"], module.lora_A[adapter].weight), (layer["B"], module.lora_B[adapter].weight))
        same = (bool((live.cpu() == ours.to(live.dtype)).all()) for ours, live in pairs)
        return all(same) and math.isclose(module.scaling[adapter], layer["alpha"] / layer["rank"], rel_tol=1e-6)

    matched, wrong = match_base(pipe, path, layers, metadata, base), []
    for component, layers in matched.items():
        model = getattr(pipe, component)
        state = {f"{name}.lora_{part}.weight": layer[part] for name, layer in layers.items() for part in "AB"}
        try:
            model.add_adapter(LoraConfig(**peft_settings(layers)), adapter_name=adapter)
            set_peft_model_state_dict(model, state, adapter_name=adapter)
        except Exception as error:  # noqa: BLE001 (the libraries raise whatever a strange layer leads to)
            fail(f"LoRA {path}: PEFT cannot load it ({type(error).__name__}: {error})")
        live = {name: module for name, module in model.named_modules() if adapter in getattr(module, "lora_A", {})}
        good = {name for name in live.keys() & layers.keys() if arrived(live[name], layers[name])}
        wrong += [f"{component}.{name}" for name in sorted((live.keys() | layers.keys()) - good)]
    flat = [layer for layers in matched.values() for layer in layers.values()]
    if wrong:
        loaded = f"{len(flat) - len(wrong)} of {len(flat)} layers loaded"
        fail(f"LoRA {path}: {loaded}, first missing or different: {wrong[0]}")

    # One number where all layers agree, else the span.
    facts = []
    for key in "rank", "alpha":
        low, high = (pick(layer[key] for layer in flat) for pick in (min, max))
        facts.append(f"{key} {low:g}" if low == high else f"{key} {low:g} to {high:g}")
    facts += [f"{len(layers)} in {component}" for component, layers in matched.items() if component != "unet"]
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
    else:
        # Switched off, a LoRA layer calls its base layer and nothing else.
        pipe.disable_lora()


def fuse(pipe):
    """Merge the LoRAs, at the weights they are set to, into the base: as fast as the base alone, and for good."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()


# ----------------------------------------------------------------------------------------------------------------------
# 3. The pipeline


def pick_device(device, dtype):
    """Resolve --device and --dtype."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {device}: not usable here ({reason(error)}); valid are auto, cpu, cuda, cuda:N, mps")
    if dtype == "auto":
        dtype = "fp16" if device.startswith("cuda") else "fp32"
    return device, getattr(torch, DTYPES[dtype])


def check_compiler(device):
    """torch.compile works for this device, and may compile as many kinds of calls as a UNet has."""
    import torch

    # SD has three widths, each called for one picture or more, with guidance or without, with LoRA or without.
    torch._dynamo.config.recompile_limit = 64
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 (a missing compiler shows as whatever it leads to; none is swallowed)
        says = "torch.compile needs a C++ compiler on a CPU and Triton on CUDA"
        fail(f"--compile does not work here ({reason(error)}); {says}")


def local(name):
    """The file or folder of this name here, else beside this file: a header's "demo/..." works from any directory."""
    return next((path for path in (Path(name).expanduser(), HERE / name) if path.exists()), None)


def reason(error):
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def open_file(file, config, match, **more):
    """The pipeline of a checkpoint in one .safetensors file, in the key names of the original code."""
    import diffusers
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            keys = set(opened.keys())
    except (SafetensorError, OSError) as error:
        fail(f"base model {file}: not a whole safetensors file ({error})")
    match(keys)
    kind = next((kind for key, kind in ONE_FILE.items() if key in keys), None)
    if kind is None:
        fail(f"base model {file}: it holds no text encoder of Stable Diffusion 1.x, 2.x or SDXL")
    advice = f"its configs are those of {config or 'the hub'}; --base_config names another folder or hub id"
    config = config and str(local(config) or config)
    try:
        pipe = getattr(diffusers, kind).from_single_file(str(file), config=config, **more)
    except Exception as error:  # noqa: BLE001 (hub, configs, and its converters raise whatever a strange file leads to)
        fail(f"base model {file} cannot be opened ({reason(error)}); {advice}")
    # Without a word diffusers drops what the configs do not describe, and leaves empty what the file does not hold.
    surplus = sum(key.startswith("model.diffusion_model.") for key in keys) - len(pipe.unet.state_dict())
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if surplus or any(tensor.is_meta for part in parts for tensor in part.parameters()):
        fail(f"base model {file} does not hold just the tensors that its configs describe; {advice}")
    return pipe


def load_pipeline(base, config, variant, tiny_vae, device, dtype, match):
    """The base model as a text-to-image pipeline, from a folder, a file or the hub; `match` judges its layers' names."""
    from diffusers import AutoencoderTiny, AutoPipelineForText2Image, UNet2DConditionModel

    place, one_file = local(base), base.endswith(".safetensors")
    if not place and (one_file or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base)):
        valid = "a folder in diffusers' layout, a .safetensors file or a hub id"
        fail(f"base model {base}: no such file or folder; give --base_model {valid}")
    if place and place.is_file() and not one_file:
        fail(f"base model {base}: a file must be a .safetensors one; pickled weights are not read")
    if not place:
        print(f"{base} is no folder here or beside infer.py: asking the model hub")
    kinds = {"dtype": dtype}
    if tiny_vae:  # the VAE is then not even read
        kinds["vae"] = load_part(AutoencoderTiny, "tiny_vae", tiny_vae, dtype)
    if one_file:
        pipe = open_file(place, config, match, **kinds)
    else:
        kinds |= {"variant": variant, "use_safetensors": True}
        try:
            pipe = AutoPipelineForText2Image.from_pretrained(str(place or base), **kinds)
        except Exception as error:  # noqa: BLE001 (hub, network, configs, weights: each library has its own; none is swallowed)
            where = "cannot be opened" if place else "is not here, not beside infer.py, and not to be had from the hub"
            fail(f"base model {base} {where} ({reason(error)}); --base_model names another")
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or not hasattr(pipe, "load_lora_weights"):
        fail(f"--base_model {base} is a {type(pipe).__name__}; valid are Stable Diffusion 1.x, 2.x and SDXL layouts")
    match(name for name, _ in pipe.unet.named_modules())
    if tiny_vae:
        check_tiny_vae(pipe, tiny_vae, place if not one_file else config and local(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_part(kind, flag, name, dtype):
    """The model of the class `kind` that a flag names."""
    place = str(local(name) or name)
    try:
        part, info = kind.from_pretrained(place, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # noqa: BLE001 (hub, network, configs, weights: each library has its own; none is swallowed)
        fail(f"--{flag} {name} cannot be opened ({reason(error)}); valid are a diffusers folder or a hub id")
    if info["missing_keys"] or info["unexpected_keys"]:
        fail(f"--{flag} {name}: its weights are not those of {kind.__name__}")
    return part


def check_tiny_vae(pipe, name, folder):
    """The tiny VAE is for latents of the base model's shape; the config of its VAE is in `folder` unless on the hub."""
    channels, factor = pipe.unet.config.out_channels, pipe.vae_scale_factor
    if folder and (config := folder / "vae" / "config.json").is_file():
        factor = 2 ** (len(json.loads(config.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
    if (ours := (pipe.vae.config.latent_channels, pipe.vae_scale_factor)) != (channels, factor):
        has = "latents of {} channels and a side of 1/{}"
        fail(f"--tiny_vae {name} is for {has.format(*ours)}; the base model has {has.format(channels, factor)}")


def load_controlnet(name, pipe):
    """A ControlNet that fits the base model, of its device and type."""
    from diffusers import ControlNetModel

    net = load_part(ControlNetModel, "controlnet", name, pipe.dtype)
    for key in "cross_attention_dim", "addition_embed_type", "block_out_channels", "layers_per_block":
        if net.config[key] != pipe.unet.config[key]:
            says = f"of another layout than the base model: {key} is {net.config[key]}"
            fail(f"--controlnet {name} is {says}, needed is {pipe.unet.config[key]}")
    return net.to(pipe.device)


def with_pictures(pipe, args):
    """The pipeline that takes the pictures given, over the same weights."""
    import diffusers

    task = "Inpainting" if args.mask else "Image2Image" if args.image else "Text2Image"
    more = {"controlnet": load_controlnet(args.controlnet, pipe)} if args.controlnet else {}
    pipe = getattr(diffusers, f"AutoPipelineFor{task}").from_pipe(pipe, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_scheduler(name, config, original_steps):
    """A scheduler of --scheduler over the noise schedule of `config`."""
    import diffusers

    settings = {
        # Latents are not pictures: never clip to [-1, 1].
        "lcm": {"original_inference_steps": original_steps, "clip_sample": False},
        "tcd": {"original_inference_steps": original_steps, "clip_sample": False},
        # 999, 979 ... 19: the grid that the LoRA was distilled on.
        "ddim": {"timestep_spacing": "trailing", "clip_sample": False},
        # Trailing spacing starts at t = 999, where the latent really is noise: with "leading", SD's usual setting, one
        # step would start at t = 1 and return noise. Second order, the last step first order (the library's default
        # below 15 steps) and down to sigma = 0, so one step is the teacher's own prediction of the clean latent.
        "dpm++": {
            "timestep_spacing": "trailing",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "final_sigmas_type": "zero",
        },
        "euler": {"timestep_spacing": "trailing"},
    }
    return getattr(diffusers, SCHEDULERS[name][0]).from_config(config, **settings[name])


def with_sizes(jobs, args, pictures, pipe):
    """The jobs with height and width in pixels: their own, else those of --image, else what the UNet was made for."""
    multiple = math.lcm(8, pipe.vae_scale_factor)
    sample = pipe.unet.config.sample_size
    default = [side * pipe.vae_scale_factor for side in ((sample, sample) if isinstance(sample, int) else sample)]
    if args.image:
        default = [max(round(side / multiple), 1) * multiple for side in reversed(pictures["image"].size)]
    sized = [job._replace(height=job.height or default[0], width=job.width or default[1]) for job in jobs]
    for job in sized:
        for name, value, chosen in ("height", job.height, args.height), ("width", job.width, args.width):
            if value % multiple:
                flag = f"--{name}" if value == chosen or not args.prompts_file else f"--prompts_file: {name}"
                fail(f"{flag} {value}: must be a multiple of {multiple}, e.g. {-(-value // multiple) * multiple}")
    return sized


def batches(jobs, size):
    """Places in `jobs`, at most `size` at a time, of pictures of one size that all have a negative prompt or none."""
    kinds = {}
    for place, job in enumerate(jobs):
        kinds.setdefault((job.height, job.width, job.negative_prompt is None), []).append(place)
    return [places[i : i + size] for places in kinds.values() for i in range(0, len(places), size)]


def draw(pipe, args, pictures, jobs, steps, guidance, seen):
    """Pictures, seconds an image with text encoding and VAE, and how many are timed; each picture has its own generator.

    The first call of a process pays for allocations, kernel choice and compilation: batches of a kind that is not in
    `seen` are left out, unless there are no others (0 are timed).
    """
    import torch
    from PIL import Image

    images, times = {}, []
    for places in batches(jobs, args.batch_size):
        start, part = time.perf_counter(), [jobs[place] for place in places]
        height, width = part[0].height, part[0].width
        given = {}
        for key, image in pictures.items():  # Lanczos is sharp, but overshoots: black in a mask would not stay black
            how = Image.Resampling.BILINEAR if key == "mask_image" else Image.Resampling.LANCZOS
            given[key] = image.resize((width, height), how)
        more = {key: [image] * len(part) for key, image in given.items()}
        more |= {"strength": enough(args.strength, steps)} if args.image else {}
        more |= {"controlnet_conditioning_scale": args.controlnet_scale} if args.controlnet else {}
        drawn = pipe(
            [job.prompt for job in part],
            negative_prompt=None if part[0].negative_prompt is None else [job.negative_prompt for job in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            # Noise drawn on the CPU is the same on every device, and one generator a picture the same in every batch.
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in part],
            eta=0.3 if type(pipe.scheduler).__name__ == "TCDScheduler" else 0.0,  # TCD's own default
            **more,
        ).images
        if args.mask:  # the VAE does not give back to the bit what is to stay
            drawn = [Image.composite(image, given["image"], given["mask_image"]) for image in drawn]
        images |= zip(places, drawn)
        # Pillow's pictures lie in main memory: the device has done its work.
        kind = (len(part) == 1, height, width) if args.compile else "any"
        times.append((time.perf_counter() - start, len(part), kind in seen))
        seen.add(kind)
    timed = [row for row in times if row[-1]]
    seconds, count, _ = map(sum, zip(*timed or times))
    return [images[place] for place in range(len(jobs))], seconds / count, count if timed else 0


def save_fused(pipe, folder):
    """The pipeline as a diffusers folder, which is there when it is whole."""
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            pipe.save_pretrained(Path(place) / folder.name)
            if folder.exists():
                folder.rmdir()  # it is empty; not every system renames over it
            (Path(place) / folder.name).rename(folder)
    except OSError as error:
        fail(f"--fused_output {folder}: cannot be written ({error})")
    print(f"{folder}: the base model with the LoRA merged in")


# ----------------------------------------------------------------------------------------------------------------------
# 4. The comparison


def compare(pipe, args, pictures, jobs, schedulers, teacher_guidance):
    """All columns of the grid, each a dict with its pictures (a row a prompt), UNet passes and seconds an image."""
    columns, seen = [], set()
    for name, steps in args.plan:
        group, teacher = SCHEDULERS[name][2], name not in DISTILLED
        guidance = teacher_guidance if teacher else args.guidance_scale
        pipe.scheduler = schedulers[name]
        set_loras(pipe, args, lcm=not teacher)
        if args.compile:
            seen.clear()  # a LoRA or guidance that goes on or off is compiled anew
        if not seen:
            draw(pipe, args, pictures, jobs[: args.batch_size], 1, guidance, seen)  # not timed: the first call is slow
        images, seconds, _ = draw(pipe, args, pictures, jobs, steps, guidance, seen)
        passes = int(steps * enough(args.strength, steps)) if args.image else steps
        column = {"group": group, "scheduler": name, "steps": steps, "guidance": guidance}
        column |= {"passes": passes * (2 if guidance > 1 else 1), "seconds": seconds}
        columns.append(column | {"images": images})
        print(f"{group}, {plural(steps, 'step')}: {plural(column['passes'], 'UNet pass')}, {seconds:.3g} s/image")
    set_loras(pipe, args)
    return columns


def plural(count, noun):
    """1 step, 2 steps, 2 passes."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def wrap(text, font, width, limit):
    """At most `limit` lines of about `width` pixels; what is left out shows as three dots."""
    letters = int(26 * width / font.getlength("abcdefghijklmnopqrstuvwxyz"))
    return textwrap.wrap(text, max(letters, 4), max_lines=limit, placeholder="...") or [""]


def grid(columns, prompts, title):
    """One picture of all columns: title, a band for each group, a header for each column, prompts at the left."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    # Small pictures grow by a whole factor to 128 px or more; large ones shrink to 512 so that the grid fits a screen.
    width, height = columns[-1]["images"][0].size
    factor = -(-128 // min(width, height)) if min(width, height) < 128 else min(1, 512 / max(width, height))
    width, height = round(width * factor), round(height * factor)
    font, large = (ImageFont.load_default(size=max(13, round(width / divisor))) for divisor in (11, 9))
    line, gap, label = round(font.size * 1.4), max(6, width // 20), round(width * 1.35)
    ink, faint = "#1f2328", "#656d76"
    colours = {group: colour for _, _, group, colour in SCHEDULERS.values()}

    # Columns of one group stand close, groups apart.
    lefts, left = [], label + 2 * gap
    for before, column in zip([None, *columns], columns):
        left += 2 * gap if before and before["group"] != column["group"] else 0
        lefts.append(left)
        left += width + gap
    top = 2 * gap + 2 * line + 6 * line  # title, band, column header
    sheet = Image.new("RGB", (left + gap, top + len(prompts) * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * gap, 2 * gap), wrap(title, large, sheet.width - 4 * gap, 1)[0], ink, large)

    band = 2 * gap + 2 * line
    for group, members in itertools.groupby(zip(lefts, columns), lambda member: member[1]["group"]):
        (first, column), *_, (last, _) = [*members] * 2
        colour, right = colours.get(group, faint), last + width - 1
        pen.text((first, band), group, colour, font)
        if "guidance" in column:
            pen.text((first, band + line), f"guidance {column['guidance']:g}", faint, font)
        pen.rectangle((first, band + 2.2 * line, right, band + 2.2 * line + max(2, gap // 3)), colour)
    for x, column in zip(lefts, columns):
        counts = [("steps", "step"), ("passes", "UNet pass")]
        texts = [plural(column[key], word) for key, word in counts if key in column]
        texts += [column["label"]] if "label" in column else [f"{column['seconds']:.3g} s/image"]
        for row, text in enumerate(texts):
            place = (x + width / 2, band + round((2.6 + row) * line))
            pen.text(place, text, ink if row == 0 else faint, font, anchor="ma")
        for row, image in enumerate(column["images"]):
            image, y = image.convert("RGB"), top + row * (height + gap)
            sheet.paste(ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, "white"), (x, y))
            if "label" in column:  # a mask is white on the white sheet
                pen.rectangle((x, y, x + width - 1, y + height - 1), outline=faint)
    for row, prompt in enumerate(prompts):
        lines = wrap(prompt, font, label - gap, max(1, height // line))
        y = top + row * (height + gap) + (height - len(lines) * line) // 2
        for index, text in enumerate(lines):
            pen.text((2 * gap, y + index * line), text, ink, font)
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# 5. Output


def parameters(settings):
    """The settings in the words that A1111, Forge and their relatives read back from a PNG."""
    loras = [(settings["lora"], settings["lcm_weight"]), *settings["style_lora"]]
    pairs = {
        "Steps": str(settings["steps"]),
        "Sampler": SCHEDULERS[settings["scheduler"]][1],
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": str(settings["seed"]),
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["base_model"]).name,
        "Lora": ", ".join(f"{lora_name(path)} {weight:g}" for path, weight in loras),
    }
    if settings["image"]:
        pairs["Denoising strength"] = f"{settings['strength']:.3g}"
    # A value with a comma or colon would end early: it is quoted.
    quoted = {key: json.dumps(text) if re.search("[,:]", text) else text for key, text in pairs.items()}
    negative = [f"Negative prompt: {settings['negative_prompt']}"] if settings["negative_prompt"] else []
    return "\n".join([settings["prompt"], *negative, ", ".join(f"{key}: {text}" for key, text in quoted.items())])


def lora_name(path):
    """What a user calls this LoRA: the file, or its folder where all files have one name."""
    path = Path(path).resolve()
    return path.parent.name if path.name in (WEIGHTS_NAME, PEFT_NAME) else path.stem


def save(image, path, settings, chunks):
    """Write a PNG with its settings: `infer_args` as JSON, and further text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in {**chunks, "infer_args": json.dumps(settings)}.items():
        info.add_text(key, text)
    try:
        image.save(path, pnginfo=info)
    except OSError as error:
        fail(f"--output {path}: cannot be written ({error})")


def draw_all(pipe, args, pictures, jobs, schedulers, settings):
    """Each job in each number of steps, each picture a file with its settings."""
    seen, report = set(), []
    if len(args.plan) > 1:  # step counts are compared: none of them pays for the first call
        pipe.scheduler = schedulers[args.plan[0][0]]
        draw(pipe, args, pictures, jobs[: args.batch_size], 1, args.guidance_scale, seen)
    for name, steps in args.plan:
        pipe.scheduler = schedulers[name]
        images, seconds, count = draw(pipe, args, pictures, jobs, steps, args.guidance_scale, seen)
        timed = f"{count} of {len(jobs)} timed, after a" if count else "no batch came after the"
        report.append(f"{plural(steps, 'step')}: {seconds:.3g} s a picture ({timed} warm-up)")
        for index, (image, job) in enumerate(zip(images, jobs)):
            ending = (f"-{index}" if len(jobs) > 1 else "") + (f"-steps{steps}" if len(args.plan) > 1 else "")
            output = args.output.with_stem(args.output.stem + ending)
            one = settings | job._asdict() | {"scheduler": name, "steps": steps}
            one |= {"strength": enough(args.strength, steps)} if args.image else {}
            save(image, output, one, {"parameters": parameters(one)})
            print(output)
    print(*report, sep="\n")


def import_quietly():
    """Import the libraries without their chatter about optional parts and coming versions; errors still show."""
    warnings.filterwarnings("ignore", module="diffusers|huggingface_hub|peft|transformers")
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()  # before diffusers, which imports the rest of transformers
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def main(argv=None):
    """Load, check, draw, save."""
    args = parse_args(argv)
    jobs, pictures = read_jobs(args), read_pictures(args)
    files = {ADAPTER: find_lora(args.lora)}
    files |= {f"style_{index}": find_lora(name, "--style_lora") for index, (name, _) in enumerate(args.style_lora)}
    import_quietly()
    import diffusers

    loras = {adapter: open_lora(file) for adapter, file in files.items()}  # damage is seen before a base is fetched
    path, metadata = loras[ADAPTER][0], loras[ADAPTER][2]
    base = args.base_model or metadata.get("base_model")
    if not base:
        fail(f"--lora {path}: the header names no base model; give --base_model FOLDER_OR_HUB_ID")
    one_file, base_config = base.endswith(".safetensors"), args.base_config
    if base_config and not one_file or args.variant and one_file:
        flag, kind = ("variant", "one file") if one_file else ("base_config", "no .safetensors file")
        fail(f"--{flag} has no effect: base model {base} is {kind}")
    if one_file and not base_config:
        base_config = header(path, metadata, "training_args", "{}", json.loads).get("teacher_config")
    original_steps = int(header(path, metadata, "num_ddim_timesteps", 50))
    if args.compare and not (args.scheduler or args.steps):
        args.plan = [(name, steps) for name, steps in args.plan if name not in DISTILLED or steps <= original_steps]
    for name, steps in args.plan if jobs else ():
        if name in DISTILLED and steps > original_steps:
            fail(f"--steps {steps}: must be from 1 to {original_steps}, the DDIM steps this LoRA was distilled over")
    mean_omega = sum(header(path, metadata, key, 6.5) for key in ("w_min", "w_max")) / 2
    teacher_guidance = 1 + mean_omega if args.compare_guidance is None else args.compare_guidance

    device, dtype = pick_device(args.device, args.dtype)
    if args.compile:
        check_compiler(device)
    match = functools.partial(match_layout, loras, base)
    pipe = load_pipeline(base, base_config, args.variant, args.tiny_vae, device, dtype, match)
    jobs = with_sizes(jobs, args, pictures, pipe)
    for adapter in files:
        attach_lora(pipe, adapter, *loras.pop(adapter), base)  # of which no second copy is kept
    set_loras(pipe, args)
    if not args.compare:
        fuse(pipe)
    if args.compile:
        pipe.unet.compile_repeated_blocks(dynamic=True)  # its transformer blocks, for pictures of every size
    drawing = with_pictures(pipe, args)
    schedulers = {name: make_scheduler(name, pipe.scheduler.config, original_steps) for name in SCHEDULERS}
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {args.output}: its folder cannot be made ({error})")
    # From here on the libraries' warnings are about the user's input, such as a prompt that is cut at 77 tokens.
    diffusers.utils.logging.set_verbosity_warning()
    # SDXL's pipelines take their VAE to float32 and back, about which this one warns at each picture.
    diffusers.utils.logging.get_logger("diffusers.models.modeling_utils").setLevel("ERROR")

    left_out = ("prompt", "prompts_file", "output", "num_images", "compare", "fused_output", "plan")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    settings["style_lora"] = [(str(files[f"style_{i}"]), weight) for i, (_, weight) in enumerate(args.style_lora)]
    settings |= {"lora": str(path), "base_model": base, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    more = {"original_inference_steps": original_steps, "diffusers": diffusers.__version__}
    settings |= {"base_config": base_config} | more
    if args.compare:
        columns = compare(drawing, args, pictures, jobs, schedulers, teacher_guidance)
        given = {"image": args.image, "mask": args.mask, "control": args.control_image}
        sources = [
            {"group": "Source", "label": label, "images": [picture] * len(jobs)}
            for label, picture in zip(filter(given.get, given), pictures.values())
        ]
        title = f"{lora_name(path)} on {Path(base).name}, {jobs[0].width} x {jobs[0].height} px, seed {args.seed}"
        sheet = grid(sources + columns, [job.prompt for job in jobs], title)
        facts = [{key: value for key, value in column.items() if key != "images"} for column in columns]
        settings |= {"jobs": [job._asdict() for job in jobs], "columns": facts, "compare_guidance": teacher_guidance}
        save(sheet, args.output, settings, {})
        print(f"{args.output} ({sum(column['seconds'] for column in columns):.3g} s a row)")
    elif jobs:
        draw_all(drawing, args, pictures, jobs, schedulers, settings)
    if args.fused_output:
        if args.compare:
            fuse(pipe)
        pipe.scheduler = schedulers["lcm"]
        save_fused(pipe, args.fused_output)


if __name__ == "__main__":
    main()
