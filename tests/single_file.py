"""A pipeline as one .safetensors file in the key names of the original code.

Most fine-tunes are shared in this way.
"""

import re

import torch
from safetensors.torch import save_file

# {name in diffusers: name in the original code}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc",
    "fc2": "c_proj", "final_layer_norm": "ln_final", "text_projection.weight": "text_projection",
}  # fmt: skip


def unet_name(path, unet):
    """The original name of a UNet's layer: blocks are counted through.

    In a block a resnet is 0, what follows 1 and 2.
    """
    if path in UNET_ENDS:
        return UNET_ENDS[path]
    side, block, kind, layer, rest = re.fullmatch(
        r"(\w+)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path
    ).groups()
    rest = RESNET[rest] if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{rest}"
    first = int(block) * (unet.config.layers_per_block + 1)
    last = first + unet.config.layers_per_block
    if kind == "downsamplers":
        return f"input_blocks.{last + 1}.0.op"
    if kind == "upsamplers":
        before = 2 if hasattr(unet.up_blocks[int(block)], "attentions") else 1
        return f"output_blocks.{last}.{before}.conv"
    place = (
        f"input_blocks.{first + int(layer) + 1}"
        if side == "down"
        else f"output_blocks.{first + int(layer)}"
    )
    return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_name(path, vae):
    """The original name of a VAE's layer: the decoder's levels are counted from the image on."""
    last = len(vae.config.up_block_types) - 1
    path = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", path).replace(
        "down_blocks", "down"
    )
    path = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", path)
    path = re.sub(
        r"mid_block\.attentions\.0\.(.+)", lambda m: f"mid.attn_1.{VAE_ATTENTION[m[1]]}", path
    )
    path = re.sub(r"(down|up)samplers\.0", r"\1sample", path).replace("resnets", "block")
    return path.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def open_clip(text_encoder):
    """A text encoder's tensors as open_clip names and shapes them: a layer's q, k and v in one."""
    tensors = {}
    state = {
        name.removeprefix("text_model."): tensor
        for name, tensor in text_encoder.state_dict().items()
    }
    for name, tensor in state.items():
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        elif "k_proj" in name or "v_proj" in name:
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.T if name == "text_projection" else tensor
    return tensors


def write_single_file(pipe, path):
    """Write a pipeline of the layout of Stable Diffusion 1.x or SDXL.

    The inverse of diffusers' from_single_file.
    """
    tensors = {}
    for part, prefix, rename in (
        (pipe.unet, "model.diffusion_model", unet_name),
        (pipe.vae, "first_stage_model", vae_name),
    ):
        for name, tensor in part.state_dict().items():
            layer, _, end = name.rpartition(".")
            if part is pipe.vae and "attentions" in name and tensor.ndim == 2:
                tensor = tensor[
                    :, :, None, None
                ]  # the original's attention was made of 1 x 1 convolutions
            tensors[f"{prefix}.{rename(layer, part)}.{end}"] = tensor
    second = getattr(pipe, "text_encoder_2", None)
    clip = f"{'conditioner.embedders.0' if second else 'cond_stage_model'}.transformer.text_model"
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"{clip}.{name.removeprefix('text_model.')}"] = tensor
    # Real files hold this, which is no weight.
    tensors[f"{clip}.embeddings.position_ids"] = torch.arange(pipe.tokenizer.model_max_length)[None]
    if second:
        tensors |= {
            f"conditioner.embedders.1.model.{name}": tensor
            for name, tensor in open_clip(second).items()
        }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def as_single_file(folder):
    """A teacher's folder as one file beside it.

    SDXL's text encoders are first given different widths: by these from_single_file tells the two
    apart.
    """
    import transformers
    from diffusers import DiffusionPipeline

    if (folder / "text_encoder_2").exists():
        torch.manual_seed(0)
        for part, name, width in (
            ("text_encoder", "CLIPTextModel", 24),
            ("text_encoder_2", "CLIPTextModelWithProjection", 40),
        ):
            config = transformers.CLIPTextConfig.from_pretrained(folder / part, hidden_size=width)
            getattr(transformers, name)(config).save_pretrained(folder / part)
    file = folder.with_name(f"{folder.name}.safetensors")
    write_single_file(DiffusionPipeline.from_pretrained(folder), file)
    return file
