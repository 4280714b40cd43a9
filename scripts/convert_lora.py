"""Repair a LoRA written by Hugging Face's scripts, and convert LoRAs between the three namings.

    python scripts/convert_lora.py broken.safetensors fixed.safetensors --alpha 64
    python scripts/convert_lora.py lora.safetensors folder --to peft
    python scripts/convert_lora.py output-folder small.safetensors --save_precision fp16

Reads what infer.py reads: any of the namings, mixed ones too, the prefix `base_model.model.`, a
file without alpha. Writes
- kohya      lora_unet_X.lora_down.weight and alpha tensors: ComfyUI, A1111, Forge, InvokeAI,
             kohya's tools, diffusers; of SDXL's family X is a name of the original code
- diffusers  unet.X.lora_A.weight, alpha in the header
- peft       a folder for peft.PeftModel.from_pretrained(pipe.unet, folder)

The output is read back, and each matrix and scaling compared: a lost layer is an error.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from help_formatter import HelpFormatter, command_line

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of infer.py


# All words in the module names of a UNet2DConditionModel and of CLIP's text encoders: with them a
# name whose dots have become _ can be read without the model.
WORDS = (
    "down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers transformer_blocks "
    "conv conv1 conv2 conv_shortcut conv_in conv_out conv_norm_out conv_act time_emb_proj "
    "time_embedding time_proj add_embedding add_time_proj linear_1 linear_2 proj_in proj_out proj "
    "attn1 attn2 to_q to_k to_v to_out ff net norm norm1 norm2 norm3 act nonlinearity dropout "
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
).split()
WORD = re.compile(rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))}|\d+)(?=_|$)")
# A header's words for the kind of base.
VERSIONS = ("family", "ss_base_model_version", "modelspec.architecture")
# A header's digests of tensors under their old names.
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags] INPUT OUTPUT",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    where = "a .safetensors file, an output folder of a trainer, or a PEFT folder"
    add("input", metavar="INPUT", help=where)
    where = "a new .safetensors file, for peft a new folder"
    add("output", metavar="OUTPUT", type=lambda text: Path(infer.usable_path(text)), help=where)
    add("--to", choices=["kohya", "diffusers", "peft"], default="kohya", help="naming to write")
    alpha = "alpha the LoRA was trained with, for a file that does not contain it"
    add("--alpha", type=float, metavar="NUMBER", help=f"{alpha} (default: the rank)")
    precision = "precision of the matrices (default: as in the input)"
    add("--save_precision", choices=["fp32", "fp16", "bf16"], help=precision)
    args = parser.parse_args(command_line(argv))
    if args.output.exists():
        infer.fail(f"{args.output} already exists and is never overwritten: choose a new output")
    if (args.output.suffix == ".safetensors") == (args.to == "peft"):
        kind = "folder" if args.to == "peft" else ".safetensors file"
        infer.fail(f"{args.output}: --to {args.to} writes a {kind}")
    if args.alpha is not None and not math.isfinite(args.alpha):
        infer.fail(f"--alpha {args.alpha}: must be a finite number")
    return args


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse_args()  # at once: the libraries that infer.py imports take seconds to load

import infer
from train_lcm_lora_sdxl import name_in_file, save


def dotted(path, name):
    """A module's name with its dots: mid_block_resnets_0_conv1 is mid_block.resnets.0.conv1."""
    words = WORD.findall(name.replace(".", "_"))
    if "_".join(words) != name.replace(".", "_"):
        kind = "a Stable Diffusion UNet or text encoder"
        infer.fail(f"LoRA {path}: {name} is no module name of {kind}")
    return ".".join(words)


def prompt_widths(unet):
    """The widths of the prompts' embeddings that the LoRA's layers take."""
    ends = ("attn2.to_k", "attn2.to_v")
    return {layer["A"].shape[1] for name, layer in unet.items() if name.endswith(ends)}


def block_depth(unet):
    """Layers in a block of the UNet: two in all official ones, in others what the names show."""
    numbered = r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)"
    found = [re.match(numbered, name) for name in unet]
    depth = max((int(m[2]) + (m[1] == "down") for m in found if m), default=2)
    return depth if prompt_widths(unet) - {768, 1024, 2048} else max(depth, 2)


def full_names(path, layers):
    """{component: {module path: layer}} of what infer.py read."""
    for depth in (2, 1):  # by which original names count
        parts = {}
        for name, layer in layers.items():
            component, _, module = name.partition(".")
            module = dotted(path, infer.diffusers_name(module, depth))
            if module in parts.setdefault(component, {}):
                infer.fail(f"LoRA {path}: layer {name} is in the file twice, under two names")
            parts[component][module] = layer
        if block_depth(parts.get("unet", {})) == depth:
            break
    return parts


def is_xl(keys, parts, metadata):
    """Whether a LoRA is one of SDXL's family: by the prompts' width, its names, its header."""
    unet = parts.get("unet", {})
    widths = prompt_widths(unet)
    if widths & {768, 1024}:  # of SD 1.x and 2.x
        return False
    # Names that only SDXL's files have: in SD transformers are one block deep.
    names = r"lora_te[12]_|text_encoder_2|lora_unet_(input|middle|output)_block"
    named = any(re.match(names, key) for key in keys)
    named |= any(re.search(r"transformer_blocks\.[1-9]|^add_embedding", name) for name in unet)
    said = " ".join(metadata.get(key, "") for key in VERSIONS)
    return named or 2048 in widths or "xl" in said


def kohya_names(unet):
    """{module path: name in a file of SDXL's family}; diffusers' where it could not read others."""
    depth = block_depth(unet)
    if depth > 2 or any(re.match(r"(down|up)_blocks\.[3-9]", name) for name in unet):
        return {}
    config = SimpleNamespace(layers_per_block=depth, up_block_types=())
    return {name: name_in_file(name, config) for name in unet}


def header(metadata, layers, output):
    """The header metadata that remain true, with rank and alpha if all layers share them."""
    kept = {key: text for key, text in metadata.items() if key not in (*STALE, infer.PEFT_KEY)}
    for key, kohyas in ("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"):
        values = {layer[key] for layer in layers}
        text = f"{values.pop():g}" if len(values) == 1 else None
        for name in (key, *([kohyas] if kohyas in kept else [])):
            kept.pop(name, None)
            kept |= {name: text} if text else {}
    if "ss_output_name" in kept:  # by which A1111 lists it
        kept["ss_output_name"] = output.name.removesuffix(".safetensors")
    return kept | {"format": "pt"}


def write(folder, naming, parts, metadata, keys):
    """Write layers, read from these keys, in a naming into an empty folder; the LoRA file."""
    import torch
    from peft import LoraConfig

    if naming != "kohya" and parts.keys() != {"unet"}:
        found = f"the LoRA has some in {', '.join(parts)}"
        infer.fail(f"--to {naming} writes layers of a UNet only; {found}: use --to kohya")
    unet = parts.get("unet", {})
    if naming == "kohya":
        tensors = {}
        two = is_xl(keys, parts, metadata)
        names = kohya_names(unet) if two else {}
        first = "lora_te1" if two or any(key.startswith("lora_te1_") for key in keys) else "lora_te"
        prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}
        for component, layers in parts.items():
            for name, layer in layers.items():
                key = f"{prefixes[component]}_{names.get(name, name).replace('.', '_')}"
                tensors |= {
                    f"{key}.lora_down.weight": layer["A"],
                    f"{key}.lora_up.weight": layer["B"],
                }
                tensors[f"{key}.alpha"] = torch.tensor(float(layer["alpha"]))
    else:
        prefix = {"diffusers": "unet", "peft": "base_model.model"}[naming]
        tensors = {
            f"{prefix}.{name}.lora_{part}.weight": layer[part]
            for name, layer in unet.items()
            for part in "AB"
        }
    file = folder / (infer.PEFT_NAME if naming == "peft" else infer.WEIGHTS_NAME)
    if naming == "diffusers":
        settings = {f"unet.{key}": value for key, value in infer.peft_settings(unet).items()}
        metadata = metadata | {infer.PEFT_KEY: json.dumps(settings, sort_keys=True)}
    if naming == "peft":
        settings = LoraConfig(**infer.peft_settings(unet), inference_mode=True).to_dict()
        settings["target_modules"] = sorted(unet)
        settings["base_model_name_or_path"] = metadata.get("base_model")
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    file.write_bytes(save(tensors, metadata))  # others may read it, not what save_file writes
    return file


def compare(output, parts, again):
    """Fail unless the layers read back have the same matrices and scalings as those written."""
    import torch

    ours, theirs = (
        {(component, name): layers[name] for component, layers in read.items() for name in layers}
        for read in (parts, again)
    )
    good = {
        key
        for key in ours.keys() & theirs.keys()
        if all(torch.equal(ours[key][part], theirs[key][part]) for part in "AB")
        and math.isclose(ours[key]["alpha"], theirs[key]["alpha"], rel_tol=1e-6)
    }
    if wrong := sorted((ours.keys() | theirs.keys()) - good):
        lost = f"{len(wrong)} of {len(ours)} layers lost, first {'.'.join(wrong[0])}"
        infer.fail(f"{output}: not written, {lost}")


def main(argv=None):
    """Read, convert, write beside the output, read back, and only then give it its name."""
    args = parse_args(argv)
    source = infer.find_lora(args.input, "input")
    import torch

    tensors, metadata = infer.read_lora(source)
    alphas = sum(key.endswith(".alpha") for key in tensors)
    known = 3 * alphas == len(tensors) or "lora_alpha" in metadata.get(infer.PEFT_KEY, "")
    if known and args.alpha is not None:
        infer.fail(f"--alpha {args.alpha:g}: {source} contains its alpha; remove the flag")
    layers = infer.group_layers(source, tensors, metadata, args.alpha)
    parts = full_names(source, layers)
    flat = [layer for layers in parts.values() for layer in layers.values()]
    print(f"{source}: {len(flat)} layers found, {infer.irregular(flat) or 'in one naming'}")
    if not known and args.alpha is None:
        used = "using alpha = rank (scaling 1). Set it with --alpha"
        infer.warn(f"{source} contains no alpha; {used}")
    if precision := args.save_precision:
        for layer in flat:
            for part in "AB":
                layer[part] = layer[part].to(getattr(torch, infer.DTYPES[precision]))
                if not layer[part].isfinite().all():
                    infer.fail(f"--save_precision {precision}: numbers in {source} are too large")

    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
            folder = Path(scratch, "lora")
            folder.mkdir()
            about = header(metadata, flat, args.output)
            file = write(folder, args.to, parts, about, tensors)
            path, layers, _ = infer.open_lora(file)
            compare(args.output, parts, full_names(path, layers))
            (folder if args.to == "peft" else file).rename(args.output)
    except OSError as error:
        infer.fail(f"{args.output}: cannot be written ({error})")
    print(f"{args.output}: {len(flat)} of {len(flat)} layers written in {args.to}'s naming, 0 lost")


if __name__ == "__main__":
    main()
