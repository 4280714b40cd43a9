"""What an image says of how it was made: the settings that UIs and infer.py write into it.

For scripts/make_teacher.py. read() knows infer.py's own images, ComfyUI's `prompt` and `workflow`,
and the `parameters` of A1111 and Forge; find() looks up a model that they name. Both raise
ValueError with one line of text.

Settings have the names of make_teacher.py's flags, and besides
    prompt      text
    loras       [(name, weight in the text encoders, weight in the UNet)]
    paths       true where names are paths or Hub ids, as infer.py writes them
"""

import contextlib
import json
import math
import os
import re
import unicodedata
from pathlib import Path

from PIL import Image

# ----------------------------------------------------------------------------- 1. Texts of an image

USER_COMMENT, EXIF_IFD, DESCRIPTION = 0x9286, 0x8769, 0x010E


def texts_of(path):
    """{name: text} of all that an image carries: chunks of a PNG, EXIF of a JPEG or WebP."""
    with Image.open(path) as image:
        if image.format == "PNG":
            with contextlib.suppress(Exception):  # chunks may follow the pixels, which may be cut
                image.load()
        found = {key: text for key, text in image.info.items() if isinstance(text, str)}
        exif = image.getexif()
        values = [*exif.items(), *exif.get_ifd(EXIF_IFD).items()]
    for key, value in values:
        text = decode(value).strip("\0 ")
        named = re.match(r"(prompt|workflow):\s*(?=\{)", text)  # ComfyUI's, in any field
        if named:
            found.setdefault(named[1], text[named.end() :])
        elif key == USER_COMMENT:
            found.setdefault("parameters", text)
        elif key == DESCRIPTION and text.startswith("{"):
            found.setdefault("infer_args", text)
    return found


def decode(value):
    """A text of EXIF, which UserComment begins with the name of its encoding."""
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else ""
    head, body = value[:8], value[8:]
    if head == b"UNICODE\0":  # big-endian by A1111, but not by all
        little = body[1::2].count(0) > body[::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", errors="replace")
    known = head in (b"ASCII\0\0\0", bytes(8))
    return (body if known else value).decode(errors="replace")


def read(path):
    """(settings, [what is not mapped]) of an image."""
    try:
        texts = texts_of(path)
    except Exception as error:  # Pillow has many, and text chunks of any size
        why = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"not a readable image ({why[0][:200]})") from None
    readers = {
        "infer_args": from_infer,
        "prompt": from_prompt,
        "workflow": from_workflow,
        "parameters": from_parameters,
    }
    reasons = []
    for key, reader in readers.items():
        if text := texts.get(key, "").strip():
            try:
                settings, notes = reader(text)
                return settings, [printable(note) for note in dict.fromkeys(notes)]
            except ValueError as error:
                reasons.append(f"{key}: {error}")
            except Exception as error:  # of all that JSON may hold
                reasons.append(f"{key}: not as expected, {type(error).__name__} {error}"[:200])
    others = ", ".join(sorted(map(ascii, texts.keys() - readers.keys())))
    known = "nothing of A1111, Forge, ComfyUI or infer.py" + f", but {others[:200]}" * bool(others)
    raise ValueError(printable("; ".join(reasons) or f"it holds {known}"))


def printable(text):
    """A text of someone's image as one line without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))


def number(value, what):
    """A finite number, which may be written as text."""
    try:
        if isinstance(value, bool) or not math.isfinite(number := float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} is {value!r:.80}, which is no number") from None
    return number


def parse_json(text):
    """An object of JSON."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({str(error)[:100]})") from None
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    return data


# -------------------------------------------------------------------------------------- 2. infer.py

INFER = (
    "prompt negative_prompt guidance_scale guidance_rescale width height max_prompt_chunks "
    "prediction_type rescale_betas_zero_snr vae base_config variant"
).split()


def from_infer(text):
    """infer.py's own JSON; its LCM-LoRA is what a teacher is for, and no part of one."""
    args = parse_json(text)
    if not args.get("base_model"):
        raise ValueError("no settings in it")
    settings = {key: args[key] for key in INFER if args.get(key) is not None}
    settings |= {"base": args["base_model"], "paths": True}
    notes = []
    loras = args.get("loras") or []
    if args.get("lora"):
        notes.append(f"the LCM-LoRA {loras[0][0]}: a teacher is the model without it")
        loras = loras[1:]
        if not args.get("keeps_guidance") and "guidance_scale" in settings:
            notes.append(f"guidance_scale {settings.pop('guidance_scale')}: the LCM-LoRA's")
    files = [file for file, _ in args.get("style_lora") or []]
    settings["loras"] = []
    for file, (name, weight) in zip(files, loras, strict=True):
        weight = number(weight, f"the weight of {name}")
        settings["loras"].append((file if os.path.exists(file) else name, weight, weight))
    if args.get("tiny_vae"):
        notes.append(f"tiny VAE {args['tiny_vae']}")
    return settings, notes


# ------------------------------------------------------------------------------- 3. A1111 and Forge

TAG = re.compile(r"<(\w+):([^:<>]+)((?::[^:<>]*)*)>")
FACT = re.compile(r'([^:,"\s][^:,"]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
LONGEST = 20000  # of a line of facts: more is no such line
# The line of facts begins with Steps, or has it after others; a last resort is one line for all.
FACTS = (
    r"(?m)^(?!Negative prompt:)(?:[A-Z][\w \-/]*:[^,\n]*, *)*Steps: *\d+ *(?:,|$)",
    r"(?m)\sSteps: *\d+ *(?:,|$)",
)
# What says how the image was sampled or by which files, and nothing of the teacher
OF_THE_IMAGE = (
    "steps,sampler,schedule type,seed,model hash,vae,vae hash,lora hashes,hashes,version,rng,size,"
    "denoising strength,module 1,cfg rescale,created date"
).split(",")


def from_parameters(text):
    """A prompt, a line `Negative prompt:` and a line of facts; each may be missing."""
    found = [match for way in FACTS if (match := [*re.finditer(way, text)])]
    place = found[0][-1].start() if found else len(text)
    head, line = text[:place], text[place:].strip().split("\n")[0]
    ways = (r"(?m)^Negative prompt:", r"\sNegative prompt:")
    start = next((match for way in ways if (match := re.search(way, head))), None)
    prompt = head[: start.start()] if start else head
    settings, notes = {"prompt": TAG.sub("", prompt).strip()}, []
    if start:
        settings["negative_prompt"] = TAG.sub("", head[start.end() :]).strip()
    facts = {}
    for key, value in FACT.findall(line[:LONGEST]):
        with contextlib.suppress(ValueError):
            value = json.loads(value) if value.startswith('"') else value
        facts.setdefault(key.strip().lower(), str(value).strip())
    if not facts and not start and not TAG.search(text):
        raise ValueError("no settings in it")

    numbers = {"cfg scale": "guidance_scale", "clip skip": "clip_skip"}
    for key in [*facts]:
        value = facts[key]
        if key in numbers:
            settings[numbers[key]] = number(value, key)
        elif re.search(r"cfg[ _]?rescale|rescale[ _]?cfg", key) and value.lower() != "true":
            disabled = value.lower() in ("false", "none")
            settings["guidance_rescale"] = 0.0 if disabled else number(value, key)
        elif key == "size" and (size := re.fullmatch(r"(\d{1,6})\s*x\s*(\d{1,6})", value)):
            settings |= {"width": int(size[1]), "height": int(size[2])}
        elif key == "model" and value:
            settings["base"] = value
        elif key in ("vae", "module 1") and value.lower() not in ("none", "automatic", ""):
            settings.setdefault("vae", value)
        elif key not in OF_THE_IMAGE and re.fullmatch(r"\w[\w .\-/]*", key):
            notes.append(f"{key.capitalize()}: {value[:60]}")
    settings["loras"] = [*a1111_loras(prompt, notes)]
    if "lora hashes" in facts and not settings["loras"]:
        notes.append(f"Lora hashes: {facts['lora hashes'][:60]}, without weights in the prompt")
    return settings, notes


def a1111_loras(prompt, notes):
    """(name, text encoder weight, UNet weight) of <lora:name:te:unet> and <lora:name:te=1:unet=2>.

    A weight that stands alone is of both.
    """
    for match in TAG.finditer(prompt):
        kind, name, rest = match.groups()
        if kind not in ("lora", "lyco"):
            notes.append(match[0][:80])
            continue
        plain, named = [], {}
        for word in filter(None, rest.split(":")):
            key, sign, value = word.partition("=")
            if not sign:
                plain.append(number(word, f"a weight in {match[0][:80]}"))
            elif key in ("te", "unet"):
                named[key] = number(value, f"a weight in {match[0][:80]}")
            else:
                notes.append(f"{word} in {match[0][:80]}")
        te = named.get("te", (plain or [1.0])[0])
        yield name.strip(), te, named.get("unet", plain[1] if plain[1:] else te)


# --------------------------------------------------------------------------------------- 4. ComfyUI

# {class of a node: its widgets, in the order in which a workflow lists their values}
SAMPLE = "steps cfg sampler_name scheduler"
WIDGETS = {
    "CheckpointLoaderSimple": "ckpt_name",
    "CheckpointLoader": "config_name ckpt_name",
    "LoraLoader": "lora_name strength_model strength_clip",
    "LoraLoaderModelOnly": "lora_name strength_model",
    "CLIPTextEncode": "text",
    "CLIPTextEncodeSDXL": "width height crop_w crop_h target_width target_height text_g text_l",
    "CLIPSetLastLayer": "stop_at_clip_layer",
    "VAELoader": "vae_name",
    "ModelSamplingDiscrete": "sampling zsnr",
    "RescaleCFG": "multiplier",
    "EmptyLatentImage": "width height batch_size",
    "KSampler": f"seed control_after_generate {SAMPLE} denoise",
    "KSamplerAdvanced": f"add_noise noise_seed control_after_generate {SAMPLE} start_at_step "
    "end_at_step return_with_leftover_noise",
    "SamplerCustom": "add_noise noise_seed control_after_generate cfg",
}
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # of a seed, after an image
# Nodes that hand on what they get; (bypassed) is what a workflow switches off
SILENT = {*WIDGETS, "Reroute", "(bypassed)", "VAEDecode", "VAEDecodeTiled"}
PASSES = {  # {what is followed: the inputs by which it may go on, the likeliest first}
    "model": ("model", "model1"),
    "clip": ("clip", "clip1"),
    "conditioning": ("conditioning", "conditioning_to", "conditioning_1"),
    "latent": ("latent_image", "samples", "latent", "pixels", "image", "images"),
}


def from_prompt(text):
    """ComfyUI's API format: {id: {"class_type": ..., "inputs": {name: value or [id, slot]}}}."""
    nodes = {
        str(key): (str(node["class_type"]).split("|")[0], dict(node.get("inputs") or {}))
        for key, node in parse_json(text).items()
        if isinstance(node, dict) and "class_type" in node
    }
    return from_nodes(nodes)


def from_workflow(text):
    """The editor's format, where links have a list of their own and widgets have no names."""
    data, links, nodes = parse_json(text), {}, {}
    for link in data.get("links") or []:
        if isinstance(link, dict):
            link = [link["id"], link["origin_id"], link["origin_slot"]]
        if link:
            links[link[0]] = [str(link[1]), link[2]]
    for node in data.get("nodes") or []:
        kind = str(node["type"]).split("|")[0]  # LoraLoader|pysssss is like LoraLoader
        values = node.get("widgets_values") or []
        mode, inputs = node.get("mode", 0), dict(values) if isinstance(values, dict) else {}
        names = WIDGETS.get(kind, "value").split()
        if isinstance(values, list):
            control = "control_after_generate"  # which old workflows lack
            if control in names and not any(value in CONTROLS for value in values[:3] if value):
                names.remove(control)
            inputs = dict(zip(names, values))
        for place, slot in enumerate(node.get("inputs") or []):
            if slot.get("link") in links:
                inputs[slot.get("name") or f"input {place}"] = links[slot["link"]]
        if mode != 2:  # 2: never runs; 4: hands on its inputs
            nodes[str(node["id"])] = ("(bypassed)" if mode == 4 else kind, inputs)
    return from_nodes(nodes)


def is_link(value):
    """Whether an input comes from another node: [id, slot]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))


def links_of(inputs):
    """An input's links to other nodes."""
    return [value for value in inputs.values() if is_link(value)]


def upstream(nodes, link, what, notes):
    """The nodes from a link back to the source of its model, clip, conditioning or latent."""
    seen = set()
    while is_link(link) and (key := str(link[0])) in nodes and key not in seen:
        seen.add(key)
        kind, inputs = nodes[key]
        yield key, kind, inputs
        if kind not in {*SILENT, *SAMPLERS} and "ckpt_name" not in inputs:
            notes.append(f"{kind} (node {key})")
        if kind == "ConditioningZeroOut":
            return
        if {"positive", "negative"} <= inputs.keys() and what == "conditioning":
            link = inputs["negative" if link[1] == 1 else "positive"]
            continue
        ways = [inputs[name] for name in PASSES[what] if is_link(inputs.get(name))]
        others = links_of(inputs)
        link = ways[0] if ways else others[0] if len(others) == 1 else None


def from_nodes(nodes):
    """The settings of the sampler that comes first on the way back from an image that is saved."""
    used = {str(link[0]) for _, inputs in nodes.values() for link in links_of(inputs)}
    ends = [key for key in nodes if key not in used or "save" in nodes[key][0].lower()]
    ends.sort(key=lambda key: "save" not in nodes[key][0].lower())
    way = everything_before(nodes, ends)
    samplers = [*dict.fromkeys(key for key in way if nodes[key][0] in SAMPLERS)]
    if not samplers:
        raise ValueError(f"no {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]} makes its image")
    first, *others = samplers
    notes = [f"{nodes[key][0]} (node {key}), after or beside node {first}" for key in others]
    inputs, settings = nodes[first][1], {}

    def plain(inputs, name, what):
        """An input's value, which a node of one value may hand over."""
        value = inputs.get(name)
        if is_link(value):
            kind, given = nodes.get(str(value[0]), ("a missing node", {}))
            names = (name, "value", "text", "string", "int", "float", "Value", "input 0")
            value = next((given[name] for name in names if name in given), None)
            if value is None or is_link(value):
                notes.append(f"{what} from {kind}")
                return None
        return value.get("content") if isinstance(value, dict) else value

    def take(key, inputs, name, convert=None):
        value = plain(inputs, name, name)
        if value is not None:
            settings.setdefault(key, convert(value) if convert else value)

    loras = {}  # {node: [name, text encoder weight, UNet weight]}

    def add_lora(key, inputs, place, strength):
        name = plain(inputs, "lora_name", "lora_name")
        weight = number(plain(inputs, strength, strength), f"{strength} of {name}")
        loras.setdefault(key, [name, 0.0, 0.0])[place] = weight

    take("guidance_scale", inputs, "cfg", lambda value: number(value, "cfg"))
    for key, kind, given in upstream(nodes, inputs.get("model"), "model", notes):
        if kind in ("LoraLoader", "LoraLoaderModelOnly"):
            add_lora(key, given, 2, "strength_model")
        elif kind == "ModelSamplingDiscrete" and "prediction_type" not in settings:
            kinds = {"eps": "epsilon", "v_prediction": "v_prediction"}
            if (sampling := str(plain(given, "sampling", "sampling"))) in kinds:
                settings["prediction_type"] = kinds[sampling]
                settings["rescale_betas_zero_snr"] = plain(given, "zsnr", "zsnr") is True
            else:
                notes.append(f"{kind} (node {key}) of {sampling}")
        elif kind == "RescaleCFG":
            take("guidance_rescale", given, "multiplier", lambda value: number(value, "multiplier"))
        elif "ckpt_name" in given:
            take("base", given, "ckpt_name", str)
            if kind not in WIDGETS:
                notes.append(f"{kind} (node {key}), but for ckpt_name")
    clip = None
    for end in "positive", "negative":
        for key, kind, given in upstream(nodes, inputs.get(end), "conditioning", notes):
            name = "text_g" if "text_g" in given else "text"
            if name in given and is_link(given.get("clip")):
                field = "prompt" if end == "positive" else "negative_prompt"
                take(field, given, name, lambda value: TAG.sub("", str(value)).strip())
                if given.get("text_l", given.get("text_g")) != given.get("text_g"):
                    notes.append(f"text_l of {kind} (node {key})")
                clip = clip or given.get("clip")
                break
    if clip is None and loras:
        notes.append("the way to the text encoders: LoRAs have their strength_clip there")
        for key in loras:
            if "strength_clip" in nodes[key][1]:
                add_lora(key, nodes[key][1], 1, "strength_clip")
    for key, kind, given in upstream(nodes, clip, "clip", notes):
        if kind == "LoraLoader":
            add_lora(key, given, 1, "strength_clip")
        elif kind == "CLIPSetLastLayer":
            take("clip_skip", given, "stop_at_clip_layer", lambda n: -number(n, "clip layer"))
    for _, kind, given in upstream(nodes, inputs.get("latent_image"), "latent", notes):
        if kind.startswith("Empty"):
            for side in "width", "height":
                take(side, given, side, lambda value: int(number(value, "size")))
            break
    decoders = [nodes[key][1] for key in way if nodes[key][0].startswith("VAEDecode")]
    source = decoders[0].get("vae") if decoders else None
    if is_link(source):
        kind, given = nodes.get(str(source[0]), ("a missing node", {}))
        take("vae", given, "vae_name", str)
        if not {"vae_name", "ckpt_name"} & {*given}:
            notes.append(f"VAE of {kind} (node {source[0]})")
    settings["loras"] = [(str(n), te, unet) for n, te, unet in reversed([*loras.values()])]
    return settings, notes


def everything_before(nodes, ends):
    """Nodes and all that they depend on: all of the first end, nearest first, then of the next."""
    found = {}
    for end in ends:
        queue = [end]
        for key in queue:  # it grows
            if key in nodes and key not in found:
                found[key] = None
                queue += [str(link[0]) for link in links_of(nodes[key][1])]
    return [*found]


# --------------------------------------------------------------------------- 5. The files they name

WEIGHTS = "pytorch_lora_weights.safetensors adapter_model.safetensors".split()
INSIDE = {"model_index.json", "diffusion_pytorch_model.safetensors", *WEIGHTS}  # of a folder
PICKLED = (".ckpt", ".pt", ".pth", ".bin")


def plain_name(name):
    """A model's name as it is compared: in any case, with either slash, without its ending."""
    name = unicodedata.normalize("NFC", str(name)).replace("\\", "/").casefold().strip("/ ")
    name = re.sub(r" \[[0-9a-f]{8,64}\]$", "", name)  # a hash, of older UIs
    return re.sub(r"\.(safetensors|ckpt|pt|pth|bin)$", "", name)


def list_models(folders):
    """[(name below its folder, path)] of files of weights and of folders that are one model."""
    found, seen = [], set()
    for top in folders:
        for folder, inner, files in os.walk(top, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # links may go round
                inner.clear()
                continue
            seen.add(real)
            paths = [Path(folder, name) for name in files]
            paths = [path for path in paths if path.suffix.lower() in (".safetensors", *PICKLED)]
            paths += [Path(folder)] if INSIDE & {*files} else []
            found += [(plain_name(os.path.relpath(path, top)), path) for path in paths]
    return found


def kind_of(path):
    """Whether a file or folder is a checkpoint, a LoRA or a VAE, by what it holds."""
    from safetensors import safe_open

    if path.is_dir():
        names = {*os.listdir(path)}
        return "base" if "model_index.json" in names else "LoRA" if names & {*WEIGHTS} else "VAE"
    with contextlib.suppress(Exception), safe_open(path, "pt") as file:
        text = "\n".join(file.keys())
        if "model.diffusion_model." in text:
            return "base"
        return "LoRA" if re.search(r"lora|lokr|hada", text) else "VAE"
    return None


def find(name, models, kind):
    """The path of what an image calls `name`, among the models of list_models."""
    wanted, what = plain_name(name), f"{kind} {name!r:.200} of the image"
    base = wanted.split("/")[-1]
    rules = (  # A1111 writes a subfolder's / as _
        lambda parts: "/" in wanted and f"/{'/'.join(parts)}".endswith(f"/{wanted}"),
        lambda parts: wanted in {"_".join(parts[i:]) for i in range(len(parts))},
        lambda parts: parts[-1] == base,
    )
    for rule in rules:
        hits = {path.resolve(): path for name, path in models if rule(name.split("/"))}.values()
        hits = [path for path in hits if path.suffix.lower() not in PICKLED] or [*hits]
        if len(hits) > 1:
            hits = [path for path in hits if kind_of(path) == kind] or hits
        if len(hits) > 1:
            names = ", ".join(sorted(map(str, hits))[:5])
            raise ValueError(f"{what} is one of {len(hits)}: {names}")
        if hits and hits[0].suffix.lower() in PICKLED:
            raise ValueError(f"{what} is {hits[0]}: pickled weights are not read")
        if hits:
            return hits[0]
    raise ValueError(f"{what} is not there")
