"""What odd_inputs.py tries: each kind is a function that makes a case of one of its variants.

`kind(rng, folder, variant)` writes its files into a new folder and returns a `Case`; what is left
open in a variant comes from `rng`. KINDS lists all of them. "A1" to "G40" are the numbers of the
reports that they stand for.
"""

import csv
import functools
import io
import itertools
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SHARED = Path()  # teachers, data and finished runs, which all cases read; `main` sets it
LORA = "pytorch_lora_weights.safetensors"
INFER, CONVERT = "infer.py", "scripts/convert_lora.py"
CHECK, ENCODE = "scripts/check_data.py", "scripts/encode_data.py"
PREPARE, FUSE = "scripts/prepare_data.py", "scripts/fuse_lora.py"
SEPARATORS = "\u2028\u2029\x85\x0c\x1e"  # which str.splitlines() takes for ends of lines
CAPTIONS = ["red apple", "a house", "two cats", "blue car", "old tree", "the moon"]
LEFT, RIGHT = (200, 40, 90), (30, 160, 220)  # of the image whose colours are known
QUICK = (
    "--resolution 32 --lora_rank 4 --learning_rate 0.05 --train_batch_size 2 --center_crop "
    "--max_train_steps 2 --phases 1 --checkpointing_steps 2 --report_to none --output_dir out"
).split()


class Case(NamedTuple):
    """Commands that run one after the other in a folder of their own, and what is right."""

    number: str  # the defect that it stands for, as the list of them has it
    commands: list  # of words, the first a program
    check: object = None  # of (folder, text): what is wrong with the result, "" if nothing
    must: str = ""  # "work" or "refuse", where only one of the two is right
    names: tuple = ()  # the line of an error has one of these words
    env: dict = {}  # variables; None takes one away
    outputs: tuple = ("out",)  # what may be written in the folder
    interrupt: str = ""  # Ctrl-C as soon as a file matches this pattern
    fails_with: tuple = ()  # exit codes without a line that are right as well
    file_limit: int = 0  # bytes after which the disk is full
    closed: bool = False  # what reads the output is gone, as after `| head -1`


# ---------------------------------------------------------------------------------- What is shared


def make_teacher(layout, folder):
    """Save a random teacher of 32 px whose words are letters."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{x}</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
    place = folder / "tokenizer"
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    both = str(place / "vocab.json"), str(place / "merges.txt")
    tokenizer = transformers.CLIPTokenizer(*both, model_max_length=16)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=32,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    xl = {
        "cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "use_linear_projection": True, "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": (1, 2),
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **xl if layout == "sdxl" else {"cross_attention_dim": 32},
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": tokenizer}
    parts["text_encoder"] = transformers.CLIPTextModel(text)
    if layout == "sdxl":
        second = transformers.CLIPTextModelWithProjection(text)
        parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **more)
        net = {"conditioning_embedding_out_channels": (16, 32, 96)}
        diffusers.ControlNetModel.from_unet(unet, **net).save_pretrained(SHARED / "controlnet")
    pipe.save_pretrained(folder)


def two_colours(mode="RGB", size=(32, 32)):
    """An image whose left and right half have colours of their own, grey ones without colour."""
    image = Image.new("RGB", size, LEFT)
    image.paste(RIGHT, (size[0] // 2, 0, *size))
    return image if mode == "RGB" else image.convert(mode)


def write_images(folder, names, metadata=True):
    """Captioned images, each of other pixels; {name: caption}."""
    captions = dict(zip(names, itertools.cycle(CAPTIONS)))
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = two_colours(size=(48, 40))
        image.paste((40 * i % 256, 90, 255 - 30 * i % 256), (4, 4, 20, 20))
        image.save(path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    if metadata:
        rows = [json.dumps({"file_name": k, "text": v}) for k, v in captions.items()]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return captions


def train(*more, family="sd15", data="--train_data_dir"):
    """A training of two steps; a flag that comes again counts."""
    words = [f"train_lcm_lora_{family}.py", "--pretrained_teacher_model", SHARED / family, *QUICK]
    return [*words, *([data, SHARED / "images"] if data == "--train_data_dir" else []), *more]


def infer(*more, family="sd15", lora=None):
    """An image in two steps."""
    words = [INFER, "--lora", lora or SHARED / f"run-{family}", "--steps", 2]
    return [*words, "--prompt", "red apple", "--output", "out/a.png", *more]


def encode(*more, out="out"):
    """Latents and captions of data, with the names of the records."""
    words = [ENCODE, "--family", "sd15", "--pretrained_teacher_model", SHARED / "sd15"]
    return [*words, "--resolution", 32, "--center_crop", "--output", out, *more]


# ------------------------------------------------------------------------------------------- Checks


def difference(a, b):
    """The largest difference of two images' pixels; of other sizes 256."""
    import numpy as np

    a, b = (np.asarray(x if isinstance(x, Image.Image) else Image.open(x), int) for x in (a, b))
    return abs(a - b).max() if a.shape == b.shape else 256


def same_image(family):
    """A check: out/a.png is what the plain LoRA and teacher generate."""

    def check(folder, _):
        off = difference(folder / "out/a.png", SHARED / f"{family}.png")
        return f"another image: {off} off" if off > 2 else ""

    return check


def has(*texts):
    """A check: the program says each of these texts."""
    return lambda folder, text: next((f"it does not say {t!r}" for t in texts if t not in text), "")


def rows(folder):
    """The steps in a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_losses(folder, _):
    """The steps are those of the shared run: same data, captions, teacher and precision."""
    ours, theirs = ([row["loss"] for row in rows(x)] for x in (folder / "out", SHARED / "run-sd15"))
    close = len(ours) == len(theirs) and max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-5
    return "" if close else f"other losses: {ours}, not {theirs}"


def trained(steps):
    """A check: so many steps were taken and the LoRA file is there."""

    def check(folder, _):
        if not (folder / "out" / LORA).exists():
            return "no LoRA"
        last = rows(folder / "out")[-1]["step"]
        return f"{last} steps, not {steps}" if last != steps else ""

    return check


def read_data(folder, text, captions, exact=True):
    """What is wrong with the images and captions that a program has read, in its own output."""
    import datasets

    out = folder / "out"
    if (out / "report.md").exists():
        found = (out / "report.md").read_text(encoding="utf-8")
        return has(f"Usable: {len(captions)};")(folder, found)
    if (out / "log.jsonl").exists():
        return has(f"data: {len(captions)} images")(folder, text)
    if (out / "state.json").exists():
        data = datasets.load_from_disk(str(out))
        texts = [row["captions"] for row in data.select_columns("captions") if row["captions"]]
        found = sorted(text for some in texts for text in some)
    else:
        data = datasets.load_dataset("parquet", data_dir=str(out), split="train", cache_dir=out)
        found = sorted(itertools.chain(*(x if isinstance(x, list) else [x] for x in data["text"])))
    missing = sorted({*captions.values()} - {*found})
    if exact and len(found) != len(captions) or missing:
        return f"{len(found)} captions {found[:7]}, not {[*captions.values()]}"
    return ""


def data_command(rng, flag, source, *more):
    """One of the programs that read training data, with this source."""
    programs = [encode, train, CHECK] + [PREPARE] * (flag == "--train_data_dir" and not more)
    chosen = rng.choice(programs)
    if chosen == PREPARE:
        return [PREPARE, source, "--output", "out", "--drop_unreadable"]
    if chosen == CHECK:
        return [CHECK, flag, source, "--output_dir", "out", "--resolution", 32, *more]
    return chosen(flag, source, *more) if chosen == encode else train(flag, source, *more, data="")


# -------------------------------------------------------------------------------------------- LoRAs

# {tool: key of a LoRA tensor}: path is diffusers' name of a layer, original that of the original
# code, _path and _original have _ for dots, part is down or up, AB is A or B
NAMINGS = {
    "kohya": "lora_unet_{_path}.lora_{part}.weight",
    "kohya, original blocks": "lora_unet_{_original}.lora_{part}.weight",
    "diffusers": "unet.{path}.lora_{AB}.weight",
    "diffusers, formerly": "unet.{path}.lora.{part}.weight",
    "PEFT": "base_model.model.{path}.lora_{AB}.weight",
    "PEFT, with its adapter": "base_model.model.{path}.lora_{AB}.default.weight",
    "diffusers, with its adapter": "unet.{path}.lora_{AB}.default.weight",
    "DDP": "module.unet.{path}.lora_{AB}.weight",
    "DDP of PEFT": "module.base_model.model.{path}.lora_{AB}.weight",
    "Hugging Face's scripts": "unet.base_model.model.{path}.lora_{AB}.weight",
    "ComfyUI": "diffusion_model.{original}.lora_{part}.weight",
    "ComfyUI, A and B": "diffusion_model.{original}.lora_{AB}.weight",
    "original code": "model.diffusion_model.{original}.lora_{part}.weight",
    "LyCORIS": "lycoris_{_path}.lora_{part}.weight",
    "LyCORIS of a UNet": "lycoris_unet_{_path}.lora_{part}.weight",
}
INNER = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip


def original(path):
    """The original code's name of a layer of a UNet with two layers in a block."""
    where, *rest = path.split(".")
    if where == "mid_block":
        kind, number, *rest = rest
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, *rest = rest
        first = 1 + 3 * int(block) if where == "down_blocks" else 3 * int(block)
        if kind == "downsamplers":
            return f"input_blocks.{first + 2}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{first + 2}.{2 if block == '0' else 1}.conv"
        block = f"{'input' if where == 'down_blocks' else 'output'}_blocks.{first + int(number)}"
        block += ".1" if kind == "attentions" else ".0"
    inner = ".".join(rest)
    return f"{block}.{INNER.get(inner, inner)}"


def layers(family):
    """{path: (A, B)} of the shared LoRA, whose alpha is its rank, 4."""
    from safetensors.torch import load_file

    tensors = load_file(SHARED / f"run-{family}/unet/adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    key = "base_model.model.{}.lora_{}.weight"
    return {path: tuple(tensors[key.format(path, x)] for x in "AB") for path in sorted(paths)}


def write_lora(file, family, tool, alpha=True, change=lambda path, a, b: (a, b), **more):
    """The shared LoRA in a tool's naming; the number of its layers."""
    import torch
    from safetensors.torch import save_file

    tensors, count = {}, 0
    for path, (a, b) in layers(family).items():
        names = {"path": path, "_path": path.replace(".", "_"), "original": original(path)}
        names["_original"] = names["original"].replace(".", "_")
        changed = change(path, a, b)
        count += changed is not None
        for weight, part, letter in zip(changed or (), ("down", "up"), "AB"):
            key = NAMINGS[tool].format(part=part, AB=letter, **names)
            tensors[key] = weight.contiguous()
        if changed and alpha and "_lora_" not in key and "lora_up" in key:
            tensors[key.split(".lora_")[0] + ".alpha"] = torch.tensor(4.0)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | more.get("tensors", {}), file, more.get("metadata"))
    return count


def loras(rng, folder, variant):
    """A LoRA in a naming, spelling or shape that another tool writes: the same image."""
    import torch

    family, tool = rng.choice(["sd15", "sdxl"]), variant if variant in NAMINGS else "kohya"
    name, more = rng.choice(["lora.safetensors", "my lora (1).safetensors"]), {}
    if variant == "capital ending":
        name = "LORA.SAFETENSORS"
    if variant == "bundled embedding":
        more = {"tensors": {"bundle_emb.style.string_to_param.*": torch.zeros(2, 32)}}
    if variant == "no layers in the middle":
        family = "sdxl"
    check = same_image(family)

    def change(path, a, b):
        if variant == "no layers in the middle" and path.startswith("mid_block"):
            return None
        if variant == "1x1 convolutions as matrices" and a.shape[2:] in ((), (1, 1)):
            return a.reshape(a.shape[:2]), b.reshape(b.shape[:2])
        if variant == "matrices as 1x1 convolutions" and a.ndim == 2:
            return a[..., None, None], b[..., None, None]
        return a, b

    count = write_lora(folder / name, family, tool, rng.random() < 0.5, change, **more)
    command = infer("--base_model", SHARED / family, lora=name)
    if variant == "no layers in the middle":
        check = has(f"{count} of {count} layers")
    commands = [command]
    if rng.random() < 0.3:  # through convert_lora.py
        to = rng.choice(["kohya", "diffusers", "peft"])
        made = "out/lora" if to == "peft" else "out/lora.safetensors"
        commands = [[CONVERT, name, made, "--to", to]]
        commands += [infer("--base_model", SHARED / family, lora=made)]
    number = "D18" if "middle" in variant else "A1" if "kohya" in variant else "D22"
    return Case(number, commands, check, "work")


def broken_loras(rng, folder, variant):
    """A LoRA that is none, or damaged: one line names the file."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "lora.safetensors"
    write_lora(file, "sd15", "kohya")
    data, tensors = file.read_bytes(), load_file(file)
    key = rng.choice([key for key in tensors if "lora_up" in key])
    content = {
        "empty": b"", "cut off": data[: rng.randrange(1, len(data))], "noise": rng.randbytes(999),
        "long header": struct.pack("<Q", 2**60) + data[8:], "text": b"<!DOCTYPE html>" * 40,
        "header no JSON": struct.pack("<Q", 20) + b"x" * 40, "no tensors": b"",
        "pickled": b"\x80\x04K\x01.", "nested": struct.pack("<Q", 10**6) + b"[" * 10**6,
    }.get(variant)  # fmt: skip
    changed = {
        "NaN": torch.full_like(tensors[key], float("nan")), "no up": None,
        "whole numbers": tensors[key].to(torch.int32), "wrong rank": tensors[key][:, :1],
        "three axes": tensors[key][None], "no elements": tensors[key][:, :0],
        "infinite": tensors[key] / 0, "another width": torch.cat([tensors[key]] * 2),
    }  # fmt: skip
    if content is not None:
        file.write_bytes(content)
    if variant in changed:
        tensors[key] = changed[variant]
    if variant == "twice":
        other = key.replace("lora_unet_", "unet.").replace(".lora_up", ".lora_B")
        tensors[other] = tensors[key].clone()
    if variant == "odd alpha":
        tensors[key.replace("lora_up.weight", "alpha")] = torch.zeros(rng.randrange(2, 5))
    if variant == "alpha NaN":
        tensors[key.replace("lora_up.weight", "alpha")] = torch.tensor(float("nan"))
    if variant in ("LoHa", "DoRA", "LoKr"):
        word = {"LoHa": "hada_w1_a", "DoRA": "dora_scale", "LoKr": "lokr_w1"}[variant]
        tensors[key.replace("lora_up.weight", word)] = torch.zeros(2, 2)
    if variant == "no tensors":
        tensors = {}
    if content is None or variant == "no tensors":
        save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, file)
    commands = {
        "infer": infer("--base_model", SHARED / "sd15", lora=file.name),
        "convert": [CONVERT, file.name, "out/made.safetensors"],
        "style": infer("--style_lora", f"{file.name}:0.5"),
        "start": train("--lora_path", file.name),
    }
    only_fits = variant in ("wrong rank", "another width")  # whether it fits a model shows there
    chosen = "infer" if only_fits else rng.choice([*commands])
    must = "" if variant == "whole numbers" else "refuse"
    return Case("D21", [commands[chosen]], None, must, (file.name,))


def headers(rng, folder, variant):
    """Odd numbers and texts in a LoRA's header or adapter_config.json: read, or one line."""
    key, *_ = variant.split("=")
    long, deep = "1" + "0" * rng.randrange(400, 5000), "[" * rng.choice([999, 10**5])
    odd = rng.choice(["", "abc", "nan", "inf", "-5", "0", "1e400", long, deep, "[]", "null", "{}"])
    odd = rng.choice(["\ud800", odd]).encode(errors="ignore").decode()
    named = "lora.safetensors"
    if key == "adapter_config.json":
        named = "lora/adapter_model.safetensors"
        write_lora(folder / named, "sd15", "PEFT")
        value = rng.choice([None, "x", -1, 1e400, [], {}, 10**400, {"": []}, {"(": 1}, True])
        config = {variant.split("=")[1]: value, "base_model_name_or_path": str(SHARED / "sd15")}
        text = rng.choice([json.dumps(config)] * 4 + [deep, "", "\x00"])
        (folder / "lora/adapter_config.json").write_text(text)
        names = ("adapter", "lora")
    else:
        about = {"base_model": str(SHARED / "sd15"), "lcm_lora_version": "1", key: odd}
        write_lora(folder / named, "sd15", "kohya", metadata=about)
        names = (key, "base model", "--base_model", "lora.safetensors")
    more = ["--compare", "--scheduler", "lcm"] if key.startswith("w_") else []
    command = infer(*more, lora=named)
    if rng.random() < 0.2:
        command = [CONVERT, named, "out/made.safetensors"]
    return Case("D21", [command], None, "", names)


# --------------------------------------------------------------------------------------------- Data


def folders(rng, folder, variant):
    """A folder of captioned images as people have it: all of them are read, or named."""
    top, names = "data", {
        "words of splits": ["steam train.png", "test.png", "dev-1.png", "my validation.png"],
        "folders named as splits": ["train/1.png", "test/2.png", "others/3.png", "4.png"],
        "deep": ["1.png", "d/2.png", "d/d/3.png", "d/d/d/4.png"],
        "capitals": ["A.PNG", "b.Jpg", "c.JPEG", "d.png"],
        "unicode": ["été.png", "猫.png", "🍎 1.png", "e\u0301.png"],
    }.get(variant) or rng.sample([f"image {i}.png" for i in range(9)], 4)  # fmt: skip
    if variant == "glob signs":
        top = rng.choice(["pics[1]", "a*b", "what?", "{a,b}", "x[!1]"])
        write_images(folder / top.translate(str.maketrans("", "", "[]!*?{},")), ["neighbour.png"])
    data, unusable = folder / top, ()
    data.mkdir()
    beside = variant in (".txt", ".caption", "mixed", "folder of kohya", "separators")
    captions = write_images(data, names, metadata=not beside)
    for i, (name, text) in enumerate(captions.items() if beside else ()):
        ending = ".caption" if variant == ".caption" or variant == "mixed" and i % 2 else ".txt"
        if variant == "separators":
            captions[name] = text = rng.choice(SEPARATORS).join(["a", f"b {i}"])
        (data / name).with_suffix(ending).write_text(text, encoding="utf-8")
    if variant == "folder of kohya":
        data.rename(folder / "10_cat")
        data.mkdir()
        (folder / "10_cat").rename(data / "10_cat")
    if variant == "metadata.csv":
        (data / "metadata.jsonl").unlink()
        with open(data / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("file_name", "text"), *captions.items()])
    if variant == "no line in metadata":
        write_images(data, ["extra.png"], metadata=False)
        unusable = ("extra.png",)
    if variant == "strays":
        for name in ("Thumbs.db", ".DS_Store", "notes.md", "movie.mp4", "list.csv", "old.zip"):
            (data / name).write_bytes(b"\x00\x01")
        with tarfile.open(data / "images.tar", "w") as tar:
            tar.add(data / names[0], "x.png")
    if variant == "linked folder":
        data.rename(folder / "real")
        data.mkdir()
        (data / "link").symlink_to("../real")
    if variant == "broken image":
        (data / names[0]).write_bytes(rng.choice([b"", b"no image", b"\x89PNG\r\n\x1a\n"]))
        unusable = (names[0],)
    if variant == "name that is no UTF-8":
        os.rename(data / names[0], os.fsencode(data) + b"/\xff\xfe.png")
    more = {
        "missing file": '{"file_name": "gone.png", "text": "x"}', "deep metadata": "[" * 10**5,
        "other metadata": rng.choice(['{"file_name": 1}', "{", "[]", '{"text": "x"}',
                                      '{"file_name": "\\ud800.png"}']),
    }.get(variant)  # fmt: skip
    if more:
        with open(data / "metadata.jsonl", "a") as file:
            file.write(more + "\n")
        unusable = ("gone.png",) * (variant == "missing file")
    if variant == "empty":
        shutil.rmtree(data)
        data.mkdir()
    command = data_command(rng, "--train_data_dir", top)

    def check(folder, text):
        report = folder / "out/report.md"
        text += report.read_text(encoding="utf-8") if report.exists() else ""
        return has(*unusable)(folder, text) if any_of else read_data(folder, text, captions)

    any_of = bool(unusable or more or variant == "name that is no UTF-8")
    must = "" if any_of else "refuse" if variant == "empty" else "work"
    number = {"strays": "B6", "separators": "B9", "linked folder": "B9"}.get(variant, "B5")
    codes = (1,) if unusable and command[0] == CHECK else ()
    names = (top, "metadata", "no images", "records", *unusable)
    return Case(number, [command], check, must, names, fails_with=codes)


def tars(rng, folder, variant):
    """Tar shards in other layouts: every image with its caption, or one line."""
    sources = write_images(folder / "plain", [f"{i}.png" for i in range(4)], metadata=False)
    image, text, flag = ".png", ".txt", "shards.tar"
    image = {"capitals": ".PNG", "jpeg": ".JPEG"}.get(variant, image)
    stem = {"dots": "img.000{}", "folders": "d{}/same", "long names": "n" * 150 + "{}"}
    stem = stem.get(variant, "s{}")
    column, more, parts = rng.choice(["caption", "prompt", "text_en"]), [], []
    for i, (name, caption) in enumerate(sources.items()):
        data = (folder / "plain" / name).read_bytes()
        body = caption.encode()
        if variant in ("json, another key", "json, its key"):
            text, body = ".json", json.dumps({column: caption}).encode()
        if variant == "not UTF-8":
            body = b"\xff\xfe\xe9"
        parts += [(stem.format(i) + image, data), (stem.format(i) + text, body)]
    if variant == "json, its key":
        more = ["--caption_column", column]
    if variant == "images first":
        parts = sorted(parts, key=lambda part: part[0].endswith(text))
    if variant in ("glob signs", "braces"):
        flag = "my {shards} [1]/shards.tar" if variant == "braces" else "set[1]/shards.tar"
        (folder / flag).parent.mkdir()
    if variant == "no captions":
        parts = parts[::2]
    with tarfile.open(folder / flag, "w:gz" if variant == "compressed" else "w") as tar:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if variant == "cut off":
        (folder / flag).write_bytes((folder / flag).read_bytes()[: rng.randrange(600, 4000)])
    if variant == "empty":
        (folder / flag).write_bytes(b"")
    command = data_command(rng, "--train_shards_path_or_url", flag, *more)
    if variant == "an URL":
        command = train("--train_shards_path_or_url", "http://127.0.0.1:9/{0..3}.tar", data="")
    if rng.random() < 0.4 and variant != "an URL":
        command = [PREPARE, flag, "--output", "out", *more]
    good = "capitals dots jpeg folders braces compressed".split() + [
        "long names", "json, its key", "images first", "glob signs",
    ]  # fmt: skip

    def check(folder, text):
        return read_data(folder, text, sources) if variant in good else ""

    names = (flag, "caption", column, "shards", "127.0.0.1", "record")
    codes = (1,) if command[0] == CHECK else ()
    must = "work" if variant in good else "refuse" if variant in ("empty", "an URL") else ""
    return Case("B7", [command], check, must, names, fails_with=codes)


def tables(rng, folder, variant):
    """Tables of images for prepare_data.py: all rows, or one line."""
    sources = write_images(folder / "pics", [f"{i}.png" for i in range(3)], metadata=False)
    pairs, delimiter, encoding = [(f"pics/{k}", v) for k, v in sources.items()], ",", "utf-8"
    head, name, more = ("image", "text"), "list.csv", ["--image_column", "image"]
    if variant == "quoted lines":
        pairs = [(k, f'two\nlines, "{v}"') for k, v in pairs]
    if variant == "tabs":
        name, delimiter = "list.tsv", "\t"
    if variant == "BOM":
        encoding = "utf-8-sig"
    if variant == "Latin-1":
        encoding, pairs = "latin-1", [(k, f"é {v}") for k, v in pairs]
    if variant == "a missing image":
        pairs.append(("pics/gone.png", "x"))
    if variant == "URLs":
        pairs = [(f"http://127.0.0.1:9/{k}", v) for k, v in pairs]
    if variant == "no such column":
        more = ["--image_column", rng.choice(["nothing", "", "ïmage", "a b"])]
    if variant == "separators":
        pairs = [(k, f"a\u2028b\x85c {v}") for k, v in pairs]
    if variant == "numbers as captions":
        pairs = [(k, i) for i, (k, v) in enumerate(pairs)]
    if variant == "empty":
        pairs = []
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *pairs])
    if variant == "jsonl":
        name = "list.jsonl"
        lines = [json.dumps(dict(zip(head, pair))) for pair in pairs]
        (folder / name).write_text("\n\n".join(lines) + "\n")
    if variant == "jsonl, broken":
        name = "list.jsonl"
        (folder / name).write_text('{"image": "pics/0.png", "text": "x"}\n{"image": \n')
    good = variant in ("quoted lines", "tabs", "BOM", "separators", "jsonl", "absolute")
    captions = dict(pairs)
    check = functools.partial(read_data, captions=captions) if good else None
    refuse = variant in ("no such column", "empty", "jsonl, broken", "URLs")
    names = (name, "column", "caption", "127.0.0.1")
    command = [PREPARE, name, "--output", "out", *more, "--caption_column", "text"]
    must = "work" if good else "refuse" if refuse else ""
    return Case("B9" if variant == "separators" else "B7", [command], check, must, names)


# {ending: modes} that a viewer shows and Pillow writes
MODES = {
    "png": "1 L LA P RGB RGBA I;16 transparent broken-EXIF", "tif": "1 L RGB RGBA CMYK LAB I I;16 "
    "I;16B F YCbCr turned", "gif": "1 L P RGB transparent frames", "webp": "RGB RGBA frames",
    "jpg": "L RGB CMYK turned broken-EXIF", "jp2": "L RGB RGBA I;16", "bmp": "1 L P RGB",
    "ppm": "L RGB I", "tga": "L RGB RGBA", "sgi": "L RGB", "pcx": "L P RGB", "avif": "RGB RGBA",
    "ico": "RGBA", "dds": "RGB RGBA", "pfm": "F",
}  # fmt: skip
IMAGES = [f"{ending} {mode}" for ending, modes in MODES.items() for mode in modes.split()]
BROKEN = "cut-off empty text bomb strip svg".split()


def make_image(rng, path, mode):
    """Write the image of two colours in a mode; what a viewer shows."""
    colour, options, ending = two_colours(), {}, path.suffix[1:]
    grey = two_colours("L")
    image = shown = colour
    if mode in ("L", "LA", "1", "I", "I;16", "I;16B", "F"):
        shown = grey.convert("1", dither=0) if mode == "1" else grey
        image = shown.convert(mode) if mode in ("L", "LA", "1") else grey
    if mode == "F":
        image = grey.convert("F").point(lambda v: v / 255 + 0)
    if mode in ("I", "I;16", "I;16B"):
        image = Image.new("I", grey.size)
        image.putdata([v * 257 for v in grey.get_flattened_data()])
        if mode != "I":
            image = image.convert("I;16")
        if mode == "I;16B":
            image = Image.frombytes("I;16B", grey.size, b"".join(
                struct.pack(">H", v * 257) for v in grey.get_flattened_data()))  # fmt: skip
    if mode in ("P", "CMYK", "YCbCr", "RGBA"):
        image = colour.quantize(4) if mode == "P" else colour.convert(mode)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
    if mode == "transparent":  # the right half, which is white on white
        image = colour.convert("RGBA")
        image.paste((0, 0, 0, 0), (16, 0, 32, 32))
        shown = Image.new("RGB", (32, 32), "white")
        shown.paste(LEFT, (0, 0, 16, 32))
    if mode == "frames":
        options = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "black")]}
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"], image = exif, colour.transpose(Image.Transpose.ROTATE_90)
    if mode == "broken-EXIF":
        options["exif"] = b"Exif\0\0" + rng.randbytes(rng.randrange(1, 40))
    options |= {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    options |= {"quality": 100, "subsampling": "4:4:4"} if ending == "avif" else {}
    options |= {"lossless": True} if ending == "webp" else {}
    options |= {"sizes": [(32, 32)]} if ending == "ico" else {}
    image.save(path, "PPM" if ending == "pfm" else None, **options)
    return shown.convert("RGB")


def images(rng, folder, variant):
    """An image in a mode and a format: every program sees what a viewer shows."""
    import numpy as np

    ending, mode = (variant.split() + [""])[:2] if variant in IMAGES else ("png", variant)
    data = folder / "data"
    data.mkdir()
    path, shown = data / f"a.{ending}", None
    if variant in IMAGES:
        shown = make_image(rng, path, mode)
        shown.save(data / "plain.png")
    else:
        two_colours().save(path)
        whole = path.read_bytes()
        bomb = whole[:16] + struct.pack(">II", 50000, 50000) + whole[24:]
        strip = io.BytesIO()
        Image.new("RGB", (6000, 1), LEFT).save(strip, "PNG")
        content = {"cut-off": whole[: len(whole) // 2], "empty": b"", "text": b"no image" * 9}
        content |= {"svg": b"<svg/>", "bomb": bomb, "strip": strip.getvalue()}
        path.write_bytes(content[variant])
    if rng.random() < 0.5 or variant in BROKEN:  # infer.py keeps what is black in the mask
        Image.new("L", (32, 32)).save(folder / "mask.png")
        flags = ["--image", path.relative_to(folder), "--mask", "mask.png"]
        more = ["--height", 32, "--width", 32] if variant == "strip" else []

        def check(folder, text):
            off = difference(Image.open(folder / "out/a.png"), shown) if shown else 0
            return f"infer.py shows other colours: {off} off" if off > 8 else ""

        must = "work" if shown or variant == "strip" else "refuse"
        return Case("B8", [infer(*flags, *more)], check, must, ("--image",))
    rows = [{"file_name": name, "text": "x"} for name in (path.name, "plain.png")]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def check_moments(folder, text):
        import datasets

        rows = list(datasets.load_from_disk(str(folder / "out")).with_format("numpy"))
        if any(row.get("unusable") for row in rows):
            return "an unusable record"
        (a, b), black = (np.array(row["moments"])[:4] for row in rows), 0.3
        off = abs(a - b).max() / (abs(b).max() + 1e-6)
        return f"encoded as another image: {off:.2f} off" if off > black else ""

    return Case("B8", [encode("--train_data_dir", "data")], check_moments, "work")


# ----------------------------------------------------------------------------------------- Teachers


def teacher_command(rng, programs="train infer encode check"):
    """One of the programs with the teacher in ./teacher."""
    flag = ["--pretrained_teacher_model", "teacher"]
    check = [CHECK, *flag, "--train_data_dir", SHARED / "images", "--output_dir", "out"]
    commands = {"train": train(*flag), "infer": infer("--base_model", "teacher"), "check": check}
    commands["encode"] = encode("--train_data_dir", SHARED / "images", *flag)
    name = rng.choice(programs.split())
    right = {"train": same_losses, "infer": same_image("sd15")}
    return commands[name], right.get(name)


WEIGHTS = [f"{part}: {how}" for part in ("text_encoder", "unet", "vae") for how in (
    "prefix", "missing", "left over", "wrong shape", "cut off", "pickled", "NaN")]  # fmt: skip


def teachers(rng, folder, variant):
    """A teacher folder with weights that do not fit: one line, never random weights."""
    from safetensors.torch import load_file, save_file

    part, how = variant.split(": ")
    teacher = Path(shutil.copytree(SHARED / "sd15", folder / "teacher"))
    (file,) = (teacher / part).glob("*.safetensors")
    tensors, data = load_file(file), file.read_bytes()
    key = rng.choice([key for key, value in sorted(tensors.items()) if value.ndim > 1])
    if how == "prefix":
        prefix = rng.choice(["module.", "base_model.model.", "model.", "_orig_mod."])
        tensors = {prefix + key: value for key, value in tensors.items()}
    if how == "missing":
        del tensors[key]
    if how == "left over":
        more = {"lora": ".lora_A.default.weight", "x": ".extra"}
        tensors[key.removesuffix(".weight") + more[rng.choice([*more])]] = tensors[key].clone()
    if how == "wrong shape":
        tensors[key] = tensors[key][:-1]
    if how == "NaN":  # in all of them: a training does not use a VAE's decoder
        tensors = {key: value / 0 * 0 for key, value in tensors.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
    if how == "cut off":
        file.write_bytes(data[: rng.randrange(len(data))])
    if how == "pickled":
        file.rename(file.with_suffix(".bin"))
    programs = {"unet": "train infer", "vae": "train infer encode"}.get(part, "train infer encode")
    command, _ = teacher_command(rng, programs)
    if how == "NaN":  # the first steps of a training may be skipped, each with a warning
        return Case("D16", [command], has("warning"), "", ("teacher", "finite", "NaN"))
    return Case("E25", [command], None, "refuse", ("teacher", "--base_model"))


SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TOKENIZER, INDEX = "tokenizer/tokenizer_config.json", "model_index.json"
# {what: (number, what is right, file or folder, its new values, its new text or None to remove it)}
# "same" is the result of before, "same?" that or one line, "other?" not that or one line
CONFIGS = {
    "no tokenizer.json": ("E26", "same?", "tokenizer/tokenizer.json", None),
    "no tokenizer_config.json": ("E26", "same?", TOKENIZER, None),
    "no vocabulary": ("E26", "same?", "tokenizer/vocab.json", None),
    "no tokenizer": ("E26", "refuse", "tokenizer", None),
    "a broken tokenizer": ("E26", "refuse", "tokenizer/tokenizer.json", "{"),
    "a longer tokenizer": ("E26", "", TOKENIZER, {"model_max_length": 77}),
    "fewer embeddings": ("E26", "refuse", "text_encoder/config.json", {"vocab_size": 90}),
    "Euler": ("E28", "same", SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}),
    "KDPM2": ("E28", "same", SCHEDULER, {"_class_name": "KDPM2DiscreteScheduler"}),
    "SDE": ("E28", "same", SCHEDULER, {"_class_name": "DPMSolverSDEScheduler"}),
    "PNDM": ("E28", "same", SCHEDULER, {"_class_name": "PNDMScheduler"}),
    "UniPC": ("E28", "same", SCHEDULER, {"_class_name": "UniPCMultistepScheduler"}),
    "no scheduler's class": ("D20", "same?", SCHEDULER, {"_class_name": "NoScheduler"}),
    "flow matching": ("D20", "refuse", SCHEDULER, {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": ...}),
    "EDM": ("D20", "refuse", SCHEDULER, {
        "_class_name": "EDMEulerScheduler", "beta_schedule": ...}),
    "sigmoid": ("E28", "other?", SCHEDULER, {"beta_schedule": "sigmoid"}),
    "no beta schedule": ("E28", "refuse", SCHEDULER, {"beta_schedule": "nonsense"}),
    "prediction sample": ("D20", "refuse", SCHEDULER, {"prediction_type": "sample"}),
    "v-prediction": ("E27", "other?", SCHEDULER, {"prediction_type": "v_prediction"}),
    "no timesteps": ("E28", "refuse", SCHEDULER, {"num_train_timesteps": 0}),
    "9 channels": ("D20", "refuse", UNET, {"in_channels": 9}),
    "an LCM": ("D20", "refuse", UNET, {"time_cond_proj_dim": 64}),
    "no sample size": ("E25", "same?", UNET, {"sample_size": None}),
    "two sample sizes": ("E25", "same?", UNET, {"sample_size": [8, 8]}),
    "another width": ("E25", "refuse", UNET, {"cross_attention_dim": 48}),
    "latents_mean": ("E28", "other?", VAE, {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}),
    "16 channels": ("E28", "refuse", VAE, {"latent_channels": 16}),
    "a tiny VAE by name": ("E28", "same?", INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}),
    "PAG": ("D20", "", INDEX, {"_class_name": "StableDiffusionPAGPipeline"}),
    "no pipeline": ("D20", "same?", INDEX, {"_class_name": "NoPipeline"}),
    "its own code": ("D20", "refuse", INDEX, {"unet": ["my_code", "MyUNet"]}),
    "no index": ("E25", "refuse", INDEX, None),
    "a broken index": ("E25", "refuse", INDEX, "{"),
    "an index that is a list": ("E25", "refuse", INDEX, "[]"),
    "a broken config": ("E25", "refuse", UNET, '{"a": '),
    "a deep config": ("D21", "refuse", VAE, "[" * 10**5),
    "no UNet": ("E25", "refuse", "unet", None),
}  # fmt: skip


def configs(rng, folder, variant):
    """A teacher folder with other configs, tokenizers, schedulers: as it was, or one line."""
    number, right, name, new = CONFIGS[variant]
    path = Path(shutil.copytree(SHARED / "sd15", folder / "teacher"), name)
    if new is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        old = json.loads(path.read_text()) | (new if isinstance(new, dict) else {})
        text = json.dumps({key: value for key, value in old.items() if value is not ...})
        path.write_text(new if isinstance(new, str) else text)
    command, same = teacher_command(rng, "train infer check" if number == "E26" else "train infer")

    def check(folder, text):
        differs = same(folder, text) if same else right == "other?"
        return "the same result" if right == "other?" and not differs else differs

    must = {"same": "work", "refuse": "refuse"}.get(right, "")
    return Case(number, [command], check if right else None, must, ("teacher", "--base_model"))


def one_file(rng, folder, variant):
    """A teacher in one file that is none: one line."""
    from safetensors.torch import load_file, save_file

    file = folder / "teacher.safetensors"
    source = {"a LoRA": f"run-sd15/{LORA}", "a VAE": "sd15/vae/diffusion_pytorch_model.safetensors",
              "a UNet": "sd15/unet/diffusion_pytorch_model.safetensors"}  # fmt: skip
    if variant in source:
        shutil.copy(SHARED / source[variant], file)
    elif variant == "names of the original code":
        tensors = load_file(SHARED / source["a UNet"])
        save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, file)
    elif variant == "another ending":
        file = folder / rng.choice(["teacher.ckpt", "teacher.pt", "teacher.gguf", "teacher.bin"])
        file.write_bytes(rng.randbytes(99))
    else:
        file.write_bytes({"empty": b"", "noise": rng.randbytes(5000)}[variant])
    flags = ["--pretrained_teacher_model", file.name]
    config = ["--teacher_config", SHARED / "sd15"] if file.suffix == ".safetensors" else []
    base = ["--base_model", file.name, *(["--base_config", SHARED / "sd15"] if config else [])]
    command = rng.choice([train(*flags, *config), infer(*base)])
    return Case("E25", [command], None, "refuse", (file.name,))


# ----------------------------------------------------------------------------------------- Training

# {what differs from the run of before: a value that changes the result}
OTHERS = {
    "learning_rate": 0.5, "loss_type": "l2", "seed": 9, "train_batch_size": 1, "w_min": 1,
    "w_max": 20, "num_ddim_timesteps": 25, "huber_c": 0.1, "loss_units": "output",
    "lora_alpha": 1, "gradient_accumulation_steps": 2, "random_flip": None, "resolution": 16,
    "proportion_empty_prompts": 0.9, "lora_dropout": 0.5, "mixed_precision": "bf16",
    "ema_decay": 0.5, "lr_scheduler": "cosine", "adam_beta1": 0.1, "max_train_samples": 3,
    "adam_weight_decay": 0.3, "lora_rank": 8, "max_grad_norm": 1e-3, "optimizer": "adamw8bit",
}  # fmt: skip
FREE = {"checkpointing_steps": 1, "validation_steps": 3, "checkpoints_total_limit": 1,
        "tracker_project_name": "other", "max_train_hours": 9, "vae_encode_batch_size": 2,
        "dataloader_num_workers": 1}  # fmt: skip


def resumes(rng, folder, variant):
    """A finished run that is gone on with, by other flags or from damaged files."""
    out, names = Path(shutil.copytree(SHARED / "run-sd15", folder / "out")), ()
    latest, more, must, check = ["--resume_from_checkpoint", "latest"], [], "", None
    steps = ["--max_train_steps", 4]
    if variant in OTHERS | FREE:
        value = (OTHERS | FREE)[variant]
        more, names = [f"--{variant}", *([] if value is None else [value])], (f"--{variant}",)
        names += ("data", "teacher") if variant == "max_train_samples" else ()
        must, check = ("refuse", None) if variant in OTHERS else ("work", trained(4))
    if variant == "another teacher":
        shutil.copytree(SHARED / "sd15", folder / "teacher")
        from safetensors.torch import load_file, save_file

        file = folder / "teacher/unet/diffusion_pytorch_model.safetensors"
        tensors = {key: 1.01 * value for key, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        more, must, names = ["--pretrained_teacher_model", "teacher"], "refuse", ("teacher",)
        steps = rng.choice([steps, []])
    if variant == "other data":
        write_images(folder / "other", ["x.png", "y.png"])
        more, must = ["--train_data_dir", "other"], "refuse"
        names = ("--train_data_dir", "data")
    if variant == "nothing left":
        steps, must, check = [], "work", trained(2)
    if variant == "fewer steps":
        steps = ["--max_train_steps", 1]
    if variant == "without the flag":
        latest, must, names, steps = [], "refuse", ("--output_dir",), rng.choice([steps, []])
    if variant == "no checkpoint":
        latest, must, names = [], "refuse", ("--output_dir",)
        shutil.rmtree(out / "checkpoint-2")
    if variant == "broken log":
        with open(out / "log.jsonl", "a") as file:
            file.write(rng.choice(["{", "x\n", '{"step": 3', "null\n", '{"a": 1}\n', "[]\n"]))
        check, must = trained(4), "work"
    if variant in ("cut off", "no manifest", "empty", "odd manifest"):
        state = out / "checkpoint-2/training_state.pt"
        if variant == "empty":
            shutil.rmtree(out / "checkpoint-2")
            (out / "checkpoint-2").mkdir()
        elif variant == "cut off":
            state.write_bytes(state.read_bytes()[:100])
        else:
            manifest = out / "checkpoint-2/manifest.json"
            manifest.write_text(rng.choice(["[]", "", "null", '{"x": 1}', "[" * 10**5]))
        must, names = "refuse", ("--resume_from_checkpoint",)
    if variant == "odd names":
        for name in ("checkpoint-x", "checkpoint-²", "checkpoint-00002", "checkpoint-"):
            (out / name).mkdir()
        check, must = trained(4), "work"
    if variant == "a LoRA":
        latest[1], must, names = f"out/{LORA}", "refuse", ("--resume_from_checkpoint",)
    number = "C10" if variant in OTHERS or "other" in variant else "C12"
    number = {"broken log": "F32", "no checkpoint": "F31"}.get(variant, number)
    return Case(number, [train(*latest, *steps, *more)], check, must, names)


RESUMES = [*OTHERS, *FREE, *(
    "another teacher,other data,nothing left,fewer steps,without the flag,no checkpoint,broken log,"
    "cut off,no manifest,empty,odd manifest,odd names,a LoRA").split(",")]  # fmt: skip

ENVIRONMENTS = {
    "accumulation": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
    "accumulation, odd": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"},
    "precision bf16": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "precision fp8": {"ACCELERATE_MIXED_PRECISION": "fp8"},
    "precision, odd": {"ACCELERATE_MIXED_PRECISION": "yes"},
    "FSDP": {"ACCELERATE_USE_FSDP": "true"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Dynamo": {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    "Dynamo, odd": {"ACCELERATE_DYNAMO_BACKEND": "x"},
    "debug": {"ACCELERATE_DEBUG_MODE": "1"},
    "log level": {"ACCELERATE_LOG_LEVEL": "chatty"},
    "rank": {"RANK": "0", "LOCAL_RANK": "0"},
    "world": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    "odd world": {"WORLD_SIZE": "many"},
    "another rank alone": {"RANK": "1"},
    "ASCII": {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"},
    "wandb off": {"WANDB_MODE": "disabled"},
    "wandb without a key": {"WANDB_MODE": "online", "WANDB_API_KEY": None},
    "wandb, odd mode": {"WANDB_MODE": "sometimes"},
    "no HOME": {"HOME": "/nonexistent"},
    "no TMPDIR": {"TMPDIR": "/nonexistent"},
    "COLUMNS": {"COLUMNS": "x", "TQDM_MININTERVAL": "x"},
}


def environments(rng, folder, variant):
    """Variables that other programs or shells leave behind: the flags hold, or one line."""
    more = ["--report_to", "wandb"] if variant.startswith("wandb") else []
    if variant == "wandb, odd mode":
        more += ["--tracker_project_name", "a/b:c" + "x" * 130]
    if variant == "ASCII":
        more += ["--validation_prompts", "café 猫", "--output_dir", "out/é猫"]
    must = "work" if variant in ("accumulation", "ASCII", "wandb off", "no HOME",
                                 "COLUMNS", "log level", "debug") else ""  # fmt: skip

    def check(folder, text):
        out = next(path.parent for path in (folder / "out").rglob("args.json"))
        used = json.loads((out / "args.json").read_text())["arguments"]["mixed_precision"]
        if rows(out)[-1]["step"] != 2:
            return f"{rows(out)[-1]['step']} steps, not 2"
        wanted = ENVIRONMENTS[variant].get("ACCELERATE_MIXED_PRECISION", "no")
        if used != wanted:
            return f"mixed precision {used} in args.json, {wanted} in the environment"
        return same_losses(folder, text) if used == "no" and out.name == "out" else ""

    names = (*ENVIRONMENTS[variant], "wandb", "accelerate", "FSDP", "DEEPSPEED", "precision",
             "tracker", "temporary", "--report_to", "launch")  # fmt: skip
    number = "F30" if "wandb" in variant else "D21" if variant == "ASCII" else "F29"
    return Case(number, [train(*more)], check, must, names, ENVIRONMENTS[variant])


# {flags: what is right: "work", "refuse" or ""}
FLAGS = {
    "--seed 9223372036854775808": "work", "--seed -1": "refuse", "--seed 1e3": "refuse",
    "--seed １２": "", "--learning_rate nan": "refuse", "--learning_rate 1e400": "refuse",
    "--learning_rate 1e30": "", "--learning_rate -1": "refuse", "--lora_rank 0": "refuse",
    "--lora_rank 100000000": "", "--resolution 30": "refuse", "--resolution 1000000": "",
    "--resolution 4": "", "--lora_alpha 1e-300": "", "--lora_alpha 1e300": "",
    "--timestep_scaling_factor 7": "refuse", "--timestep_scaling_factor 10": "",
    "--validation_prompt cat": "refuse", "--validation_step 3": "refuse", "--loss_typ l2": "refuse",
    "--validation_prompts (": "work", "--report_to tensorboard,wandb": "refuse",
    "--report_to tensorboard --tracker_project_name a/../../b": "",
    "--report_to tensorboard --logging_dir ../logs": "", "--lora_target_modules [": "refuse",
    "--lora_target_modules nothing": "refuse", "--lora_target_modules .*": "",
    "--lora_target_modules conv_in": "", "--lora_target_modules norm1": "refuse",
    "--lora_target_modules time_embedding.linear_1": "", "--lora_dropout 1": "",
    "--w_min 5 --w_max 4": "refuse", "--w_min -1 --w_max -1": "work", "--w_min nan": "refuse",
    "--num_ddim_timesteps 1": "", "--num_ddim_timesteps 1000": "work",
    "--num_ddim_timesteps 1001": "refuse", "--num_ddim_timesteps 7": "",
    "--train_batch_size 100": "work", "--gradient_accumulation_steps 9": "work",
    "--max_train_steps 0": "refuse", "--num_train_epochs 0": "refuse",
    "--vae_encode_batch_size 1000": "work", "--huber_c 1e30": "", "--max_grad_norm 1e-12": "work",
    "--adam_beta1 1": "refuse", "--adam_beta1 0 --adam_beta2 0": "work",
    "--lr_scheduler cosine --lr_warmup_steps 5": "refuse", "--ema_decay 1": "refuse",
    "--lr_scheduler polynomial --learning_rate 1e-9": "", "--optimizer paged_adamw8bit": "refuse",
    "--max_train_samples 1 --train_batch_size 5": "work", "--streaming --max_train_steps 1": "",
    "--dataloader_num_workers 3": "work", "--checkpoints_total_limit 1": "work",
    "--max_train_hours 1e-12": "", "--image_column nothing": "refuse", "--variant fp16": "",
    "--caption_column nothing": "", "--caption_column file_name": "", "--dataset_name x": "refuse",
    "--teacher_config x": "refuse", "--hub_model_id x": "refuse", "--push_to_hub": "refuse",
    "--mixed_precision fp16": "", "--allow_tf32": "work", "--quantize_base nf3": "refuse",
    "--proportion_empty_prompts 1": "work", "--shuffle_buffer_size 0": "refuse",
    "--teacher_revision x": "", "--dataset_config_name x": "", "--cache_dir out/cache": "work",
}  # fmt: skip


def flags(rng, folder, variant):
    """Odd values of a trainer's flags: they work, or one line names the flag."""
    words = variant.split()
    family = rng.choice(["sd15", "sd15", "sdxl"])
    names = tuple(word.strip("-") for word in words if word.startswith("--"))
    names += ("not finite", "memory", "stopped by")

    def check(folder, _):
        return "" if (folder / "out" / LORA).exists() else "exit code 0, but no LoRA"

    codes = (142,) if "max_train_hours" in variant else ()
    must = FLAGS[variant]
    number = {"--timestep_scaling_factor 7": "C11", "--validation_prompt cat": "F36"}
    return Case(number.get(variant, "D21"), [train(*words, family=family)], check, must, names,
                outputs=("out", "logs"), fails_with=codes)  # fmt: skip


PRECISIONS = [f"{precision} {base} {then}" for precision in ("no", "bf16", "fp16")
              for base in ("nf4", "int8", "whole") for then in ("resume", "start")]  # fmt: skip


def precisions(rng, folder, variant):
    """Each precision with each kind of base: saved, read back and gone on with."""
    precision, base, then = variant.split()
    more = ["--mixed_precision", precision]
    more += ["--quantize_base", base] if base != "whole" else []
    more += rng.choice([[], ["--gradient_checkpointing"], ["--ema_decay", 0.9]])
    first, check = train(*more), trained(4)
    go_on = ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    if then == "start":
        go_on, check = ["--lora_path", "out", "--output_dir", "out/2"], None
    commands = [first, train(*more, *go_on), infer(lora="out")]
    if base == "int8":  # there is none any more: on CUDA it rounds the activations too
        return Case("G40", [first], must="refuse", names=("--quantize_base",))
    return Case("G38", commands, lambda folder, text: check(folder, text) if check else "", "work")


# --------------------------------------------------------------------------------- infer.py, paths

# {flags of infer.py: (number, what is right)}
REQUESTS = {
    "--seed -1": ("D24", ""), "--seed 4294967296": ("D24", ""), "--seed 18446744073709551616":
    ("D24", ""), "--output out/a.jpg": ("D24", ""), "--output out/a.webp": ("D24", ""),
    "--output out/a.PNG": ("D24", "work"), "--output out/a": ("D24", ""), "--output .":
    ("D24", "refuse"), "--steps 0": ("D21", "refuse"), "--steps 51": ("D21", "refuse"),
    "--steps 2 2 2": ("D21", ""), "--guidance_scale 1000": ("D21", ""), "--guidance_scale nan":
    ("D21", "refuse"), "--lcm_weight 1e9": ("D21", "refuse"), "--device cuda": ("D21", "refuse"),
    "--device cpu:7": ("D21", ""), "--device tpu": ("D21", "refuse"), "--dtype fp16": ("D21", ""),
    "--dtype bf16": ("D21", "work"), "--height 33": ("D21", "refuse"), "--height 8 --width 8":
    ("D21", ""), "--height 800000 --width 800000": ("D21", ""), "--num_images 0": ("D21", "refuse"),
    "--batch_size 999": ("D21", "work"), "--base_model nowhere/x": ("D20", "refuse"),
    "--base_model a:b?": ("D20", "refuse"), "--style_lora x:0.5": ("D24", "refuse"),
    "--style_lora org/name": ("D24", "refuse"), "--tiny_vae nowhere": ("D16", "refuse"),
    "--vae nowhere": ("D16", "refuse"), "--controlnet x": ("D19", "refuse"), "--mask x.png":
    ("D21", "refuse"), "--strength 0.5": ("D21", "refuse"), "--compare --scheduler lcm":
    ("D23", "work"), "--compare --num_images 2": ("D21", "refuse"), "--fused_output out/m":
    ("D24", "work"), "--scheduler lcm tcd": ("D21", "refuse"), "--scheduler tcd": ("D21", "work"),
    "--negative_prompt x": ("D21", "work"), "--lcm_weight -0": ("D21", "work"),
}  # fmt: skip
SPECIAL = (
    "huge weights,wide control,wide image,there already,fused again,closed stdout,"
    "a stdout of ASCII,interrupt"
)


def requests(rng, folder, variant):
    """Odd values of infer.py's flags: an image that is right, or one line."""
    if variant in REQUESTS:
        number, must = REQUESTS[variant]
        words = variant.split()

        def check(folder, _):
            made = [*folder.glob("out/*")]
            return "" if made else "exit code 0, but no image"

        names = tuple(word for word in words if word.startswith("--")) + ("memory", "base model")
        return Case(number, [infer(*words)], check, must, names)
    if variant == "huge weights":
        scale = rng.choice([1e18, 1e30])
        write_lora(folder / "x.safetensors", "sd15", "kohya", change=lambda p, a, b: (a * scale, b))
        command = infer("--base_model", SHARED / "sd15", lora="x.safetensors")
        return Case("D16", [command], has("warning"), "", ("finite", "NaN", "black", "x.safe"))
    if variant in ("wide control", "wide image"):
        two_colours(size=(96, 48)).save(folder / "wide.png")
        flags = ["--controlnet", SHARED / "controlnet", "--control_image", "wide.png"]
        flags = flags if variant == "wide control" else ["--image", "wide.png", "--height", 32]

        def wide(folder, text):
            width, height = Image.open(folder / "out/a.png").size
            return "" if width == 2 * height or "crop" in text else f"{width} x {height}, squeezed"

        return Case("D19", [infer(*flags)], wide, "work")
    if variant == "there already":
        (folder / "out").mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "out/a.png")
        old = (folder / "out/a.png").read_bytes()

        def kept(folder, text):
            same = (folder / "out/a.png").read_bytes() == old
            return "" if same or "overwr" in text else "another's image was overwritten silently"

        return Case("F36", [infer()], kept, "", ("--output",))
    if variant == "fused again":
        fused = [FUSE, "--lora", SHARED / "run-sd15", "--fused_output", "out/m"]
        return Case("D21", [fused, fused], None, "refuse", ("--fused_output",))
    if variant == "closed stdout":
        return Case("D21", [infer()], None, fails_with=(1, 120), closed=True)
    if variant == "a stdout of ASCII":
        words = infer("--output", "out/\u00e9\u732b.png")
        return Case("D21", [words], None, "work", env={"PYTHONIOENCODING": "ascii"})
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(3000)))
    command = [INFER, "--lora", SHARED / "run-sd15", "--prompts_file", "prompts.txt", "--steps", 1]

    def some(folder, text):
        return "" if [*folder.glob("out/*.png")] else "Ctrl-C, and no image is there"

    return Case("D17", [[*command, "--output", "out/a.png"]], some, interrupt="out/a-*.png")


PROMPTS = {
    "surrogate": "a \ud800 cat",
    "not UTF-8": "caf\udce9",
    "empty": "",
    "spaces": "  ",
    "long": "word " * 5000,
    "emoji": "🍎 猫 é",
    "weights": "a (red:1.3) apple [x]",
    "a LoRA": "<lora:style:0.8> cat",
    "a dash": "-cat",
    "special": "<|endoftext|> cat",
    "braces": "{cat|dog}",
    "lines": "a\nb\r\nc",
    "zero width": "a\u200bb\ufeff",
    "RTL": "قطة حمراء",
}
LINES = {
    "lines of Unicode": "a\u2028b\nc\x85d\ne\x0cf\n",
    "Windows": "a\r\nb\r\nc\r\n",
    "BOM": "\ufeffa\nb\nc\n",
    "comments": "# x\na\n\nb\n  \nc",
    "nothing": "\n# x\n",
}
JSONS = {
    "surrogate": '{"prompt": "\\ud800"}', "number": '{"prompt": 1}', "huge": '{"prompt": "a", '
    '"seed": 1' + "0" * 5000 + "}", "deep": "[" * 10**5, "deep value": '{"prompt": ' + "[" * 10**5,
    "a list": '["a"]', "NaN": '{"prompt": "a", "seed": NaN}', "unknown": '{"prompt": "a", "x": 1}',
    "true": '{"prompt": "a", "seed": true}', "twice": '{"prompt": "a", "prompt": "b"}',
    "null": '{"prompt": "a", "seed": null}', "fraction": '{"prompt": "a", "seed": 1.0}',
    "height": '{"prompt": "a", "height": 33}', "cut off": '{"prompt": "a', "empty": "{}",
    "negative": '{"prompt": "a", "seed": -1}', "no size": '{"prompt": "a", "width": 0}',
}  # fmt: skip


def prompts(rng, folder, variant):
    """Odd prompts, in the command line, in a file, as a caption: images, or one line."""
    where, name = variant.split(": ")
    if where == "flag":
        text = PROMPTS[name]
        commands = [infer("--prompt", text), train("--validation_prompts", text, "a house")]
        if name == "a dash":
            commands = [infer(f"--prompt={text}")]
        return Case("D21", [rng.choice(commands)], None, "", ("prompt", "expected"))
    if where == "lines":
        (folder / "p.txt").write_bytes(LINES[name].encode())
        count = 3 if name != "nothing" else 0

        def check(folder, _):
            made = len([*folder.glob("out/a-*.png")])
            return f"{made} images, not {count}" if made != count else ""

        must = "work" if count else "refuse"
        words = infer("--prompts_file", "p.txt")
        del words[words.index("--prompt") : words.index("--prompt") + 2]
        return Case("B9", [words], check, must, ("--prompts_file",))
    (folder / "p.jsonl").write_text(JSONS[name])
    words = infer("--prompts_file", "p.jsonl")
    del words[words.index("--prompt") : words.index("--prompt") + 2]
    return Case("D21", [words], None, "", ("p.jsonl", "prompt", "height"))


PATHS = {
    "255 bytes": "n" * 255, "256 bytes": "n" * 256, "5000 bytes": "n/" * 2500, "wide": "猫" * 100,
    "home": "~/x", "nobody": "~nobody/x", "glob": "a[1]*?/x", "unicode": "é猫🍎",
    "surrogate": "\udcff",
    "line": "a\nb", "nothing": "", "device": "/dev/null", "inside a file": "file/x",
    "process": "/proc/self/x", "spaces": " a b ", "percent": "%s{}%(x)s", "colon": "c:\\x:0.5",
}  # fmt: skip
PATH_FLAGS = {
    "train": "pretrained_teacher_model pretrained_vae_model_name_or_path lora_path train_data_dir "
    "output_dir cache_dir resume_from_checkpoint logging_dir train_shards_path_or_url dataset_name",
    "infer": "lora style_lora base_model tiny_vae prompts_file image output fused_output",
    "convert": "input output", "encode": "output", "prepare": "source output",
    "check": "output_dir",
}  # fmt: skip


def paths(rng, folder, variant):
    """A path as people have it, in any flag: used as it is, or one line names it."""
    path = PATHS[variant]
    name = rng.choice([*PATH_FLAGS])
    flag = rng.choice(PATH_FLAGS[name].split())
    (folder / "file").write_text("x")
    (folder / "home").mkdir()
    commands = {
        "train": train(data="" if flag in ("train_shards_path_or_url", "dataset_name") else
                       "--train_data_dir"),
        "infer": infer(), "encode": encode("--train_data_dir", SHARED / "images"),
        "check": [CHECK, "--resolution", 32, "--train_data_dir", SHARED / "images"],
        "convert": [CONVERT, SHARED / "run-sd15", "out/made.safetensors"],
        "prepare": [PREPARE, SHARED / "images", "--output", "out"],
    }  # fmt: skip
    words = commands[name]
    if name == "infer" and flag == "output" and not path.startswith("/"):
        path += ".png"
    if name == "infer" and flag == "prompts_file":
        del words[words.index("--prompt") : words.index("--prompt") + 2]
    if flag in ("input", "source"):
        words[1] = path
    elif name == "convert":
        words[2] = path = f"{path}.safetensors"
    elif flag == "resume_from_checkpoint" or flag == "style_lora":
        words = [*words, f"--{flag}={path}"]
    else:
        words = [*words, f"--{flag}={path}"]
    must, source = "", {
        "train_data_dir": "images", "source": "images", "lora": "run-sd15", "input": "run-sd15",
        "lora_path": "run-sd15", "pretrained_teacher_model": "sd15", "base_model": "sd15",
        "style_lora": "run-sd15",
    }.get(flag)  # fmt: skip
    if source and variant in ("home", "glob", "unicode", "line", "spaces", "percent", "surrogate"):
        shutil.copytree(SHARED / source, folder / path.replace("~", "home"))
        must = "" if variant == "surrogate" else "work"
    written = {"output_dir", "output", "fused_output", "cache_dir", "logging_dir"}
    inside = path.split("/")[0] if flag in written and path else "out"
    inside = {"~": "home"}.get(inside, inside)
    names = (
        f"--{flag}",
        flag,
        path,
        "input",
        "base model",
        "LoRA",
        *((repr(path),) if path else ()),
    )
    if flag in written and variant == "home":  # what is made stands in the home folder

        def check(folder, _):
            return "a folder named ~ was made" if (folder / "~").exists() else ""
    else:
        check = None
    outputs = ("out", inside, "home/.cache", f"{inside}.png", "data-check")
    return Case("F32" if variant == "home" else "D21", [words], check, must, names,
                {"HOME": str(folder / "home")}, outputs)  # fmt: skip


def outputs(rng, folder, variant):
    """A full disk, an output among the data, a file in its place: nothing lost, one line."""
    where, program = variant.split(", ")
    commands = {
        "train": train(), "infer": infer(), "encode": encode("--train_data_dir", SHARED / "images"),
        "check": [CHECK, "--resolution", 32, "--train_data_dir", SHARED / "images", "--output_dir",
                  "out"],
        "convert": [CONVERT, SHARED / "run-sd15", "out/made.safetensors"],
        "fuse": [FUSE, "--lora", SHARED / "run-sd15", "--fused_output", "out"],
        "prepare": [PREPARE, SHARED / "images", "--output", "out"],
    }  # fmt: skip
    words = commands[program]
    if where == "full disk":
        limit = rng.choice([100, 1000, 4000])
        return Case("F32", [words], None, "", ("out",), file_limit=limit)
    if where == "a file there":
        (folder / "out").write_text("mine")

        def kept(folder, _):
            return "" if (folder / "out").is_file() else "the file is gone"

        return Case("F32", [words], kept, "refuse", ("out",))
    shutil.copytree(SHARED / "images", folder / "data")
    words = [w if w != SHARED / "images" else "data" for w in words]
    words = [
        "data/out" if w == "out" else "data/out/a.png" if w == "out/a.png" else w for w in words
    ]
    again = [*words, "--resume_from_checkpoint", "latest"] if program == "train" else words
    words = [*words, "--validation_prompts", "red apple"] if program == "train" else words
    again = [*words, *again[-2:]] if program == "train" else words
    commands = [words, again] if program in ("train", "check") else [words]

    def check(folder, text):
        return has("data: 6 images")(folder, text) if program == "train" else ""

    return Case("F31", commands, check, "", ("out", "data"), outputs=("data/out",))


OUTPUTS = [f"{where}, {name}" for where in ("full disk", "a file there") for name in (
    "train", "infer", "encode", "check", "convert", "fuse", "prepare")]  # fmt: skip
OUTPUTS += [f"among the data, {name}" for name in ("train", "encode", "check", "prepare")]


def interrupts(rng, folder, variant):
    """Ctrl-C in a training: a checkpoint, and one line that says how to go on."""
    pattern = {"training": "out/log.jsonl", "validation": "out/validation/*", "save":
               "out/checkpoint-*"}[variant]  # fmt: skip
    more = ["--max_train_steps", 500, "--checkpointing_steps", 5, "--validation_steps", 3]
    words = train(*more, "--validation_prompts", "red apple")
    check = has("resume with:")
    return Case("C14", [words], check, interrupt=pattern)


KINDS = {
    loras: [*NAMINGS, "capital ending", "bundled embedding", "1x1 convolutions as matrices",
            "matrices as 1x1 convolutions", "no layers in the middle"],
    broken_loras: ("empty,cut off,noise,long header,text,header no JSON,no tensors,pickled,nested,"
                   "NaN,no up,whole numbers,wrong rank,three axes,no elements,infinite,twice,"
                   "odd alpha,alpha NaN,LoHa,DoRA,LoKr,another width").split(","),
    headers: [*"base_model num_ddim_timesteps lcm_lora_version lora_adapter_metadata family step "
              "w_min w_max rank alpha training_args".split(), *(f"adapter_config.json={key}" for key
              in "r lora_alpha alpha_pattern rank_pattern use_rslora target_modules".split())],
    folders: ("words of splits,folders named as splits,deep,capitals,unicode,glob signs,.txt,"
              ".caption,mixed,folder of kohya,separators,metadata.csv,no line in metadata,strays,"
              "linked folder,broken image,name that is no UTF-8,missing file,deep metadata,"
              "other metadata,empty").split(","),
    tars: ("capitals;dots;jpeg;folders;long names;json, another key;json, its key;not UTF-8;braces;"
           "images first;glob signs;no captions;compressed;cut off;empty;an URL").split(";"),
    tables: ("quoted lines,tabs,BOM,Latin-1,a missing image,URLs,no such column,separators,"
             "numbers as captions,empty,jsonl").split(","),
    images: [*IMAGES, *BROKEN],
    teachers: WEIGHTS,
    configs: [*CONFIGS],
    one_file: ["a LoRA", "a VAE", "a UNet", "names of the original code", "another ending", "empty",
               "noise"],
    resumes: RESUMES,
    environments: [*ENVIRONMENTS],
    flags: [*FLAGS],
    precisions: PRECISIONS,
    requests: [*REQUESTS, *SPECIAL.split(",")],
    prompts: [f"{where}: {name}" for where, table in (("flag", PROMPTS), ("lines", LINES),
              ("json", JSONS)) for name in table],
    paths: [*PATHS],
    outputs: OUTPUTS,
    interrupts: ["training", "validation", "save"],
}  # fmt: skip
