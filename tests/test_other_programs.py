"""The LoRA file in other programs: the rule of each for names, on all layers of official UNets.

The rules are what the programs do, in the test's own words: no program is run but diffusers.
"""

import bisect
import json
import re

import convert_lora as convert
import official_unets
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from random_training import SD21
from safetensors.torch import load_file

import infer

# {model: (config, layers that the default targets give)}
MODELS = {
    "SD 1.5": (official_unets.SD15, 278),
    "SD 2.1": (SD21, 278),
    "SDXL": (official_unets.SDXL, 788),
    "SSD-1B": (official_unets.SSD1B, 423),
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@pytest.fixture(scope="module")
def unets():
    """The official UNets, without weights."""
    with torch.device("meta"):
        return {name: UNet2DConditionModel(**config) for name, (config, _) in MODELS.items()}


def layers_of(unet):
    """{module path in diffusers: shape} of all that a LoRA can have a layer for."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = unet.named_modules()
    return {path: tuple(m.weight.shape) for path, m in modules if isinstance(m, kinds)}


def original_names(unet):
    """{module path in diffusers: name in the original code}, which makes one block after another.

    Its lists are input_blocks, middle_block, output_blocks: a block is a resnet, the transformer
    if there is one, and what changes the size; only on the way down that is a block of its own.
    """

    def ways(block):
        transformers = [*getattr(block, "attentions", [])]
        return [[resnet, *transformers[i : i + 1]] for i, resnet in enumerate(block.resnets)]

    inputs, outputs = [[unet.conv_in]], []
    for block in unet.down_blocks:
        inputs += [*ways(block), *([sampler] for sampler in block.downsamplers or [])]
    for block in unet.up_blocks:
        outputs += ways(block)
        outputs[-1] += block.upsamplers or []
    first, *rest = unet.mid_block.resnets
    middle = [first, *filter(None, getattr(unet.mid_block, "attentions", [])), *rest]
    places = {"input_blocks": inputs, "output_blocks": outputs}
    starts = {
        module: f"{side}.{i}.{j}"
        for side, blocks in places.items()
        for i, block in enumerate(blocks)
        for j, module in enumerate(block)
    } | {module: f"middle_block.{i}" for i, module in enumerate(middle)}
    names, paths = dict(ENDS), {module: path for path, module in unet.named_modules()}
    for module, start in starts.items():
        path = paths[module]
        for child in layers_of(module) if path != "conv_in" else ():
            own = RESNET.get(child, child) if ".resnets." in path else child
            own = "op" if ".downsamplers." in path else own
            names[f"{path}.{child}"] = f"{start}.{own}"
    return {path: names[path] for path in layers_of(unet)}


def flat(name):
    """A module's name with _ for every dot."""
    return name.replace(".", "_")


# ------------------------------------------------- rules: {layer of the file: path in diffusers}


def by_diffusers(keys, unet, xl):
    """The installed diffusers' own reader."""
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    tensors = {}
    for number, key in enumerate(keys):
        a = torch.tensor([[float(number)]])
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": a.clone()}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    state, _ = kind.lora_state_dict(tensors, unet_config=unet.config)
    state = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    )
    end = ".lora_A.weight"
    return {
        keys[int(tensor)]: key.removesuffix(end)
        for key, tensor in state.items()
        if key.endswith(end)
    }


def by_comfy(keys, unet, xl):
    """ComfyUI, and Forge, which carries its reader: both names of every module are known."""
    known = {}
    for path, name in original_names(unet).items():
        known |= {f"lora_unet_{flat(name)}": path, f"lora_unet_{flat(path)}": path}
    return {key: known[key] for key in keys if key in known}


def by_a1111(keys, unet, xl):
    """A1111 looks modules up by original names: it renames diffusers' by SD 1.x's arithmetic.

    What is no name of diffusers only gets another beginning.
    """

    def rename(name):
        def place(kind):
            return 1 if kind == "attentions" else 0

        def rest(kind, text):
            return flat(RESNET.get(text, text)) if kind == "resnets" else text

        if m := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
            side, kind = ("input", 1) if m[1] == "down" else ("output", 0), m[3]
            count = side[1] + 3 * int(m[2]) + int(m[4])
            return f"{side[0]}_blocks_{count}_{place(kind)}_{rest(kind, m[5])}"
        if m := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
            return f"middle_block_{place(m[1]) or 2 * int(m[2])}_{rest(m[1], m[3])}"
        if m := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
            return f"input_blocks_{3 * int(m[1]) + 3}_0_op"
        if m := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
            return f"output_blocks_{3 * int(m[1]) + 2}_{2 if int(m[1]) else 1}_conv"
        if m := re.fullmatch(r"time_embedding_linear_(\d)", name):
            return f"time_embed_{2 * int(m[1]) - 2}"
        return {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}.get(name, name)

    known = {flat(name): path for path, name in original_names(unet).items()}
    found = {key: rename(key.removeprefix("lora_unet_")) for key in keys}
    return {key: known[name] for key, name in found.items() if name in known}


def beginnings(levels):
    """{beginning of an original name: diffusers'}: the table that kohya made for SDXL."""
    pairs = {}
    for i in range(levels):
        for j in range(3):
            sides = [("up", "output", 3 * i + j)]
            sides += [("down", "input", 3 * i + j + 1)] if j < 2 else []
            for ours, theirs, number in sides:
                pairs[f"{theirs}_blocks_{number}_1"] = f"{ours}_blocks_{i}_attentions_{j}"
                for new, old in RESNET.items():
                    place = f"{theirs}_blocks_{number}_0_{flat(old)}"
                    pairs[place] = f"{ours}_blocks_{i}_resnets_{j}_{new}"
        pairs[f"input_blocks_{3 * i + 3}_0_op"] = f"down_blocks_{i}_downsamplers_0_conv"
        pairs[f"output_blocks_{3 * i + 2}_2"] = f"up_blocks_{i}_upsamplers_0"
    pairs["middle_block_1"] = "mid_block_attentions_0"
    for j in (0, 1):
        for new, old in RESNET.items():
            pairs[f"middle_block_{2 * j}_{flat(old)}"] = f"mid_block_resnets_{j}_{new}"
    return pairs | {flat(name): flat(path) for path, name in ENDS.items()}


def by_table(keys, unet, levels):
    """What begins as the entry before it in the sorted table is renamed, then looked up."""
    pairs = beginnings(levels)
    table, known, found = sorted(pairs), {flat(path): path for path in layers_of(unet)}, {}
    for key in keys:
        name = key.removeprefix("lora_unet_")
        start = table[bisect.bisect_right(table, name) - 1]
        if name.startswith(start):
            name = name.replace(start, pairs[start])
        found[key] = name
    return {key: known[name] for key, name in found.items() if name in known}


def by_invoke(keys, unet, xl):
    """InvokeAI has the table for SDXL, and refuses a file of which it renames only a part."""
    if not xl:
        return by_table(keys, unet, 0)
    names = beginnings(3)
    renamed = {key.removeprefix("lora_unet_").startswith(tuple(names)) for key in keys}
    return by_table(keys, unet, 3) if len(renamed) == 1 else {}


def by_sdnext(keys, unet, xl):
    """SD.Next has the table with four levels, for all models."""
    return by_table(keys, unet, 4)


def by_kohya(keys, unet, xl):
    """kohya's UNets: of SD diffusers' names, of SDXL the original ones; only layers in blocks."""
    names = original_names(unet) if xl else {path: path for path in layers_of(unet)}
    inside = r"\.(attentions|resnets|downsamplers|upsamplers)\."
    known = {f"lora_unet_{flat(n)}": path for path, n in names.items() if re.search(inside, path)}
    return {key: known[key] for key in keys if key in known}


def by_cpp(keys, unet, xl):
    """stable-diffusion.cpp: _ becomes a dot outside known words, diffusers' names are renamed."""
    words = """
        to_k to_q to_v to_out down_blocks mid_block up_block proj_in proj_out conv_in conv_out
        transformer_blocks time_emb_proj conv_shortcut time_embedding input_blocks output_blocks
        middle_block skip_connection emb_layers in_layers out_layers""".split()
    pairs = []
    for i in range(3 if xl else 4):
        for j in range(2):
            pairs.append((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0."))
            pairs.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1."))
        for j in range(3):
            pairs.append((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0."))
            pairs.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1."))
        pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"))
        place = f"output_blocks.{3 * i + 2}.{2 if i else 1}."
        pairs.append((f"up_blocks.{i}.upsamplers.0.", place))
    pairs += [("output_blocks.2.1.conv", "output_blocks.2.2.conv")] if xl else []
    pairs += [("mid_block.attentions.0.", "middle_block.1.")]
    pairs += [(f"mid_block.resnets.{j}.", f"middle_block.{2 * j}.") for j in (0, 1)]
    found = {}
    for key in keys:
        name = key.removeprefix("lora_unet_")
        for word in words:
            name = name.replace(word, word.replace("_", "~"))
        name = name.replace("_", ".").replace("~", "_")
        name = {path: ENDS[path] for path in ("conv_in", "conv_out")}.get(name, name)
        for new, old in RESNET.items() if ".resnets." in name else ():
            name = name.replace(new, old)
        for start, other in pairs:
            name = name.replace(start, other)
        found[key] = name
    known = {name: path for path, name in original_names(unet).items()}
    return {key: known[name] for key, name in found.items() if name in known}


PROGRAMS = {
    "diffusers": by_diffusers,
    "ComfyUI, Forge": by_comfy,
    "A1111": by_a1111,
    "InvokeAI": by_invoke,
    "SD.Next": by_sdnext,
    "kohya": by_kohya,
    "stable-diffusion.cpp": by_cpp,
}


def targets(trainer, unet, more=""):
    """The paths of the layers that the default targets give, and of others with these endings."""
    endings = tuple(f".{end}" for end in f"{trainer.TARGET_MODULES} {more}".split())
    return [path for path in layers_of(unet) if f".{path}".endswith(endings)]


def our_names(trainer, unet, paths):
    """{layer of the file that the trainer writes: its path in diffusers}."""
    return {f"lora_unet_{flat(trainer.name_in_file(path, unet.config))}": path for path in paths}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layer_is_read(unets, sd15, sdxl, model, program):
    """Each layer of the file is one module of the program's model, the one it was trained for."""
    unet, xl = unets[model], model in ("SDXL", "SSD-1B")
    trainer = sdxl if xl else sd15
    ours = our_names(trainer, unet, targets(trainer, unet))
    assert len(ours) == MODELS[model][1]
    assert PROGRAMS[program]([*ours], unet, xl) == ours
    # and a layer that the model does not have is noticed
    first, *others = ours
    found = PROGRAMS[program]([f"{first}_x", *others], unet, xl)
    assert found.get(f"{first}_x") not in layers_of(unet)


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - {"kohya", "stable-diffusion.cpp"}))
def test_layers_outside_the_blocks_are_read(unets, sdxl, program):
    """Time, sizes, first and last convolution, where a user names them; two programs have none."""
    paths = targets(sdxl, unets["SDXL"], "conv_in conv_out linear_1 linear_2")
    ours = our_names(sdxl, unets["SDXL"], paths)
    assert len(ours) == 794 and PROGRAMS[program]([*ours], unets["SDXL"], True) == ours


def test_what_diffusers_names_would_lose(unets, sdxl):
    """With them A1111 does not find the first upsampler of SDXL, and kohya's tools find nothing."""
    unet = unets["SDXL"]
    keys = {f"lora_unet_{flat(path)}": path for path in targets(sdxl, unet)}
    lost = {name: keys.keys() - rule([*keys], unet, True).keys() for name, rule in PROGRAMS.items()}
    assert lost.pop("A1111") == {"lora_unet_up_blocks_0_upsamplers_0_conv"}
    assert len(lost.pop("kohya")) == 788 and not any(lost.values())


SMALL = {
    "sample_size": 8, "attention_head_dim": 2, "norm_num_groups": 8, "cross_attention_dim": 64,
}  # fmt: skip


def small(depth, ups):
    """A small UNet with these blocks on its way up and the same on its way down."""
    downs = [kind.replace("Up", "Down") for kind in reversed(ups)]
    widths = (32, 64, 64, 64)[: len(ups)]
    kinds = {"down_block_types": downs, "up_block_types": ups}
    with torch.device("meta"):
        return UNet2DConditionModel(
            **SMALL, **kinds, block_out_channels=widths, layers_per_block=depth
        )


ATTENTION, PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"


@pytest.mark.parametrize("depth,ups,original", [
    (1, [ATTENTION, PLAIN], True),
    (2, [ATTENTION, PLAIN], True),
    (1, [ATTENTION, ATTENTION, PLAIN], True),
    (3, [ATTENTION, PLAIN], False),
    ([1, 2], [ATTENTION, PLAIN], False),
    (2, [ATTENTION, ATTENTION, ATTENTION, PLAIN], False),
    (2, [PLAIN, ATTENTION, PLAIN], False),
])  # fmt: skip
def test_other_shapes_of_sdxls_family(sdxl, depth, ups, original):
    """Original names where diffusers and ComfyUI read them, else diffusers', for all layers."""
    unet = small(depth, ups)
    ours = our_names(sdxl, unet, layers_of(unet))
    assert ("lora_unet_mid_block_resnets_0_conv1" not in ours) == original
    assert by_diffusers([*ours], unet, True) == by_comfy([*ours], unet, True) == ours
    read = {infer.diffusers_name(key.removeprefix("lora_unet_"), depth): ours[key] for key in ours}
    assert read == {flat(path): path for path in layers_of(unet)}


@pytest.mark.parametrize("model", ["SD 1.5", "SD 2.1", "SSD-1B"])
def test_convert_lora_writes_the_trainers_names(unets, sd15, sdxl, tmp_path, model):
    """From diffusers' names, and from its own output again."""
    unet, trainer = unets[model], sdxl if model in ("SDXL", "SSD-1B") else sd15
    tensors = {}
    for path in targets(trainer, unet):
        out, into, *size = layers_of(unet)[path]
        tensors[f"unet.{path}.lora_A.weight"] = torch.ones(1, into, *size)
        tensors[f"unet.{path}.lora_B.weight"] = torch.ones(out, 1, *[1] * len(size))
    source, once, twice = (tmp_path / f"{name}.safetensors" for name in "abc")
    source.write_bytes(convert.save(tensors, {"format": "pt"}))
    convert.main([str(source), str(once)])
    convert.main([str(once), str(twice)])
    names = {key.split(".")[0] for key in load_file(once)}
    assert names == our_names(trainer, unet, targets(trainer, unet)).keys()
    assert twice.read_bytes() == once.read_bytes()


def lora(folder, name, keys, metadata=None, width=8):
    """A LoRA file of these layers, of rank 1; the path."""
    tensors = {}
    for key in keys:
        a, b = torch.ones(1, width), torch.ones(width, 1)
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    file = folder / f"{name}.safetensors"
    file.write_bytes(convert.save(tensors, {"format": "pt"} | (metadata or {})))
    return file


TEXT = "text_model_encoder_layers_0_mlp_fc1"
ATTN2 = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
RES, ORIGINAL_RES = "down_blocks_1_resnets_0_conv1", "input_blocks_4_0_in_layers_2"


@pytest.mark.parametrize("keys,metadata,width,expected", [
    # the first text encoder of two, whatever else is in the file
    ([f"lora_te1_{TEXT}"], {}, 8, [f"lora_te1_{TEXT}"]),
    ([f"lora_te1_{TEXT}", f"lora_unet_{RES}"], {}, 8, None),
    ([f"lora_te1_{TEXT}", f"lora_unet_{ATTN2}"], {}, 768,
     [f"lora_te1_{TEXT}", f"lora_unet_{ATTN2}"]),
    ([f"lora_te_{TEXT}"], {}, 8, [f"lora_te_{TEXT}"]),
    ([f"lora_te_{TEXT}"], {"ss_base_model_version": "sdxl_base_v1-0"}, 8, [f"lora_te1_{TEXT}"]),
    ([f"lora_te_{TEXT}"], {"ss_base_model_version": "sd_v1"}, 8, [f"lora_te_{TEXT}"]),
    # the UNet's layers: by the prompts' width, the depth, the names, the header
    ([f"lora_unet_{ATTN2}"], {}, 2048,
     ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"]),
    ([f"lora_unet_{ATTN2}"], {"family": "sdxl"}, 1024, [f"lora_unet_{ATTN2}"]),
    ([f"lora_unet_{ATTN2.replace('blocks_0', 'blocks_1')}"], {}, 2048,
     ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"]),
    ([f"lora_unet_{RES}"], {}, 8, [f"lora_unet_{RES}"]),
    ([f"lora_unet_{RES}"], {"family": "sdxl"}, 8, [f"lora_unet_{ORIGINAL_RES}"]),
    ([f"lora_unet_{RES}"], {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, 8,
     [f"lora_unet_{ORIGINAL_RES}"]),
    ([f"lora_unet_{ORIGINAL_RES}"], {}, 8, [f"lora_unet_{ORIGINAL_RES}"]),
    # one block of SDXL, such as a style's: blocks still have two layers
    (["lora_unet_up_blocks_1_attentions_1_transformer_blocks_1_attn2_to_v"], {}, 2048,
     ["lora_unet_output_blocks_4_1_transformer_blocks_1_attn2_to_v"]),
])  # fmt: skip
def test_convert_lora_knows_the_family(tmp_path, keys, metadata, width, expected):
    """By what proves it; what nothing proves keeps its name."""
    convert.main([str(lora(tmp_path, "a", keys, metadata, width)), str(tmp_path / "b.safetensors")])
    names = {key.split(".")[0] for key in load_file(tmp_path / "b.safetensors")}
    assert names == {*(expected or [f"lora_te1_{TEXT}", f"lora_unet_{ORIGINAL_RES}"])}


# ------------------------------------------------------------------------------------------- header

# ModelSpec 1.0.1, of models that generate images: {field: (needed, what it may be)}
TEXTS = r"[^\x00-\x1f]+"
MODEL_SPEC = {
    "sai_model_spec": (True, r"1\.0\.[01]"),
    # ID of the base / kind of adapter
    "architecture": (True, r"[a-z0-9.-]+/lora"),
    "implementation": (True, r"sgm|diffusers|https://\S+"),
    "title": (True, TEXTS),
    "resolution": (True, r"[1-9]\d*x[1-9]\d*"),
    "description": (False, TEXTS),
    "author": (False, TEXTS),
    "date": (False, r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ?)?"),
    "hash_sha256": (False, "0x[0-9a-f]{64}"),
    "implementation_version": (False, TEXTS),
    "license": (False, TEXTS),
    "usage_hint": (False, TEXTS),
    "tags": (False, TEXTS),
    "thumbnail": (False, r"data:image/jpeg;base64,\S+"),
    "merged_from": (False, TEXTS),
    "trigger_phrase": (False, TEXTS),
    "prediction_type": (False, "v|epsilon"),
    "timestep_range": (False, r"\d+,\d+"),
    "encoder_layer": (False, r"\d+"),
}
# The IDs of the specification's own list, and SSD-1B's, which SwarmUI knows
ARCHITECTURES = {
    "SD 1.5": "stable-diffusion-v1",
    "SD 2.1": "stable-diffusion-v2-768-v",
    "SDXL": "stable-diffusion-xl-v1-base",
    "SSD-1B": "segmind-stable-diffusion-1b",
}


def header_of(trainer, unet, prediction, *flags):
    """The header that the trainer writes for a teacher with this UNet."""
    from types import SimpleNamespace

    args = ["--pretrained_teacher_model", "a/b", "--train_data_dir", "c", "--resolution", "64"]
    args = trainer.parse_args([*args, *flags])
    scheduler = SimpleNamespace(config={"prediction_type": prediction})
    return trainer.header(SimpleNamespace(unet=unet, scheduler=scheduler), args, 7)


@pytest.mark.parametrize("model", [*MODELS, "another"])
def test_header_is_that_of_modelspec(unets, sd15, sdxl, model):
    """All fields that must be there, all that are there are known and of the right kind."""
    trainer = sdxl if model in ("SDXL", "SSD-1B") else sd15
    unet = unets[model] if model in MODELS else small(1, [ATTENTION, PLAIN])
    about = header_of(trainer, unet, "v_prediction" if model == "SD 2.1" else "epsilon")
    spec = {key: text for key, text in about.items() if key.startswith("modelspec.")}
    spec = {key.removeprefix("modelspec."): text for key, text in spec.items()}
    assert {key for key, (needed, _) in MODEL_SPEC.items() if needed} <= spec.keys()
    wrong = {k: t for k, t in spec.items() if not re.fullmatch(MODEL_SPEC[k][1], t)}
    assert not wrong
    known = {f"{name}/lora" for name in ARCHITECTURES.values()}
    if model in MODELS:
        assert spec["architecture"] == f"{ARCHITECTURES[model]}/lora"
    else:
        assert spec["architecture"] not in known
    assert spec["implementation"] == ("sgm" if trainer is sdxl else "diffusers")


def test_name_is_that_of_the_output_folder(sd15, tmp_path):
    """By it A1111 lists the LoRA; that of the file is the same for all."""
    unet = small(1, [ATTENTION, PLAIN])
    for folder in (tmp_path / "red apples v1.5", f"{tmp_path}/x/../red apples v1.5/"):
        about = header_of(sd15, unet, "epsilon", "--output_dir", str(folder))
        assert about["ss_output_name"] == "red apples v1.5" and str(tmp_path) not in str(about)


@pytest.mark.parametrize("writer", ["sd15", "sdxl", "convert"])
def test_equal_content_is_an_equal_file(sd15, sdxl, writer):
    """Whatever the order in which tensors and header are given; the numbers stay aligned."""
    save = {"sd15": sd15, "sdxl": sdxl, "convert": convert}[writer].save
    tensors = {f"t{i}": torch.full((3, i + 1), i, dtype=torch.float16) for i in range(5)}
    about = {f"key {i}": 'é\n"' * i for i in range(30)}
    content = save(tensors, about)
    turned = (dict(reversed(part.items())) for part in (tensors, about))
    assert save(*turned) == content
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and [*head["__metadata__"]] == sorted(about)
    assert head["__metadata__"] == about


def test_the_written_file_is_read_as_it_was(sdxl, tmp_path):
    """By the library's own reader, tensors and header; a folder's name may be no text at all."""
    tensors, about = {"a": torch.randn(3, 5), "b": torch.tensor(2.0)}, {"format": "pt", "x": "ü"}
    (tmp_path / "x.safetensors").write_bytes(sdxl.save(tensors, about | {"y": "a\udcff"}))
    read, header = infer.read_lora(tmp_path / "x.safetensors")
    assert header == about | {"y": "a?"}
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
