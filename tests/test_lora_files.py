"""infer.py reads every LoRA people have, completely or not at all.

Namings, alphas, text encoders, weights, bad files.
"""

import argparse
import copy
import functools
import json
import pickle
import random
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import LORA, ROOT, load_script
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import unet_name

infer = load_script("infer.py")
PARTS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "time_emb_proj"
).split()


@functools.cache
def opened(folder, dtype):
    """A teacher's pipeline, read once."""
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype)


def open_pipe(folder, dtype=torch.float32):
    """A teacher's pipeline for one use."""
    return copy.deepcopy(opened(folder, dtype))


def randomise(unet, seed):
    """Give every LoRA matrix random values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.weight.data.normal_(0, 0.2, generator=generator)


def train(trainer, teacher, folder, seed=0, rank=4, alpha=2, targets=PARTS):
    """A student with random LoRA weights, as the trainer would leave and save it: the UNet."""
    flags = {
        "pretrained_teacher_model": teacher,
        "train_data_dir": ROOT,
        "output_dir": folder,
        "lora_rank": rank,
    }
    flags |= {"lora_alpha": alpha, "lora_target_modules": ",".join(targets)}
    args = trainer.parse_args(
        [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    )
    pipe = open_pipe(teacher)
    student = trainer.attach_lora(trainer.share_weights(pipe.unet), args)
    randomise(student, seed)
    trainer.save_lora(SimpleNamespace(pipe=pipe, target=student, step=1, changes=()), folder, args)
    return student


@torch.no_grad()
def forward(unet):
    """The UNet's output on fixed inputs."""
    random = torch.Generator().manual_seed(0)
    width, dtype = unet.config.cross_attention_dim, unet.dtype
    z, c = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((2, 4, 8, 8), (2, 16, width))
    )
    added = {
        "text_embeds": torch.randn(2, 32, generator=random).to(dtype),
        "time_ids": torch.ones(2, 6, dtype=dtype),
    }
    added = added if unet.config.addition_embed_type else None
    return unet(z, torch.tensor([999, 19]), c, added_cond_kwargs=added).sample


def load(pipe, *paths, weights=None):
    """Load LoRAs as infer.py does, the first as the LCM-LoRA; the files may be given by folder."""
    weights = weights or [1] * len(paths)
    for index, path in enumerate(paths):
        adapter = f"style_{index - 1}" if index else infer.ADAPTER
        infer.attach_lora(pipe, adapter, *infer.open_lora(infer.find_lora(path)), "base")
    args = argparse.Namespace(
        lcm_weight=weights[0], style_lora=[("x", weight) for weight in weights[1:]]
    )
    infer.set_loras(pipe, args, [infer.ADAPTER, *(f"style_{i}" for i in range(len(paths) - 1))])
    return pipe.unet


def merge(pipe):
    """Merge the LoRAs that are attached, as infer.fuse does."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def count(unet):
    """How many layers bear a LoRA."""
    return sum(isinstance(module, LoraLayer) for module in unet.modules())


def huggingface_mixed(student, folder):
    """Save as Hugging Face's SDXL script does."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(student))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def in_diffusers_naming(student, folder):
    """Save in diffusers' naming, with the alpha that PEFT knows in the header."""
    state = get_peft_model_state_dict(student)
    settings = student.peft_config["default"].to_dict() | {"runtime_config": None}
    StableDiffusionPipeline.save_lora_weights(folder, state, unet_lora_adapter_metadata=settings)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_file_to_forward_equals_the_student(layout, make_teacher, tmp_path):
    """Random ranks, alphas and targets.

    In kohya's, diffusers' and PEFT's naming, PEFT's folder and a whole output folder.
    """
    teacher, trainer = make_teacher(layout), load_script(f"train_lcm_lora_{layout}.py")
    for seed in range({"sd15": 4, "sdxl": 2}[layout]):
        rng = random.Random(seed)
        rank, alpha = rng.randint(1, 9), rng.randint(1, 80) / 4
        targets = rng.sample(PARTS, rng.randint(1, len(PARTS)))
        out = tmp_path / str(seed)
        student = train(trainer, teacher, out, seed, rank, alpha, targets)
        in_diffusers_naming(student, out / "diffusers")
        (out / "bare").mkdir()
        save_file(
            load_file(out / "unet" / infer.PEFT_NAME), out / "bare" / "x.safetensors"
        )  # no alpha: 1 x rank
        expected, base = forward(student), forward(open_pipe(teacher).unet)
        assert (expected - base).abs().max() > 1e-3
        for path in (
            out / LORA,
            out,
            out / "unet",
            out / "unet" / infer.PEFT_NAME,
            out / "diffusers",
        ):
            unet = load(open_pipe(teacher), path)
            assert count(unet) == count(student) and torch.allclose(
                forward(unet), expected, atol=1e-6
            ), (seed, path)
        unet = load(open_pipe(teacher), out / "bare" / "x.safetensors", weights=[alpha / rank])
        assert torch.allclose(forward(unet), expected, atol=1e-6)


def test_peft_folder_with_patterns(teacher, tmp_path):
    """From PEFT's own folder: some layers' own ranks and alphas, rank-stabilised scaling."""
    for rslora in (False, True):
        unet = open_pipe(teacher).unet
        settings = {
            "rank_pattern": {"conv1": 3, r".*attn2\.to_k": 6},
            "alpha_pattern": {"conv1": 5, "to_q": 0.5},
        }
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=PARTS, use_rslora=rslora, **settings
        )
        model = peft.get_peft_model(unet, config)
        randomise(model, 0)
        model.save_pretrained(tmp_path / str(rslora))
        scalings = {
            layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)
        }
        assert len(scalings) == 4
        ours = load(open_pipe(teacher), tmp_path / str(rslora))
        assert torch.allclose(forward(ours), forward(model.base_model.model), atol=1e-6)


def test_weights_scale_exactly_and_add_linearly(sd15, teacher, tmp_path):
    """Weights 0.5 and 2 scale each layer's update to the bit.

    Fused, the two LoRAs' updates are added to the base.
    """
    for index in range(2):
        train(sd15, teacher, tmp_path / str(index), index, 4, 3, PARTS if index else PARTS[:6])
    paths = [tmp_path / "0", tmp_path / "1"]

    def updates(weights):
        unet = load(open_pipe(teacher, torch.float64), *paths, weights=weights)
        layers = {
            name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)
        }
        return [
            {
                name: layer.get_delta_weight(key).detach()
                for name, layer in layers.items()
                if key in layer.scaling
            }
            for key in ("lcm", "style_0")
        ]

    lcm, style = updates([1, 1])
    scaled_lcm, scaled_style = updates([2, 0.5])
    assert len(style) > len(lcm) > 20
    assert all(torch.equal(scaled_lcm[name], 2 * lcm[name]) for name in lcm)
    assert all(torch.equal(scaled_style[name], 0.5 * style[name]) for name in style)

    pipe, base = (
        open_pipe(teacher, torch.float64),
        open_pipe(teacher, torch.float64).unet.state_dict(),
    )
    separate = forward(load(pipe, *paths, weights=[2, 0.5]))
    merge(pipe)
    assert count(pipe.unet) == 0 and torch.allclose(forward(pipe.unet), separate, atol=1e-12)
    for name, weight in pipe.unet.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = base[name] + 2 * lcm.get(layer, 0) + 0.5 * style.get(layer, 0)
        assert torch.allclose(weight, expected, rtol=0, atol=1e-12), name


def test_lcm_off_leaves_the_styles_on(sd15, teacher, tmp_path):
    """Of the adapters attached, those named act, and alone."""
    for index in range(2):
        train(sd15, teacher, tmp_path / str(index), index)
    pipe = open_pipe(teacher)
    args = argparse.Namespace(lcm_weight=1, style_lora=[("x", 0.8)])
    load(pipe, tmp_path / "0", tmp_path / "1")
    both = forward(pipe.unet)
    infer.set_loras(pipe, args, ["style_0"])
    alone = forward(load(open_pipe(teacher), tmp_path / "1", weights=[0.8]))
    assert torch.allclose(forward(pipe.unet), alone, atol=1e-6) and not torch.allclose(
        both, alone, atol=1e-3
    )
    infer.set_loras(pipe, args, ["lcm"])
    assert torch.allclose(
        forward(pipe.unet), forward(load(open_pipe(teacher), tmp_path / "0")), atol=1e-6
    )


def test_defect_2_mixed_naming(sdxl, xl_teacher, tmp_path, capsys):
    """A file as Hugging Face's SDXL script writes it.

    diffusers drops the attention layers, infer.py loads all and says so.
    """
    student = train(sdxl, xl_teacher, tmp_path, rank=4, alpha=4)
    huggingface_mixed(student, tmp_path / "hf")
    names = [name for name, module in student.named_modules() if isinstance(module, LoraLayer)]
    attention = [name for name in names if ".to_" in name]

    pipe = open_pipe(xl_teacher)
    pipe.load_lora_weights(tmp_path / "hf" / LORA)
    loaded = {name for name, module in pipe.unet.named_modules() if isinstance(module, LoraLayer)}
    assert len(attention) > 20 and loaded == set(names) - set(attention)

    unet = load(open_pipe(xl_teacher), tmp_path / "hf")
    assert count(unet) == len(names) and torch.allclose(forward(unet), forward(student), atol=1e-6)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"LoRA: {len(names)} of {len(names)} layers loaded (rank 4, alpha 4, ")
    assert "in the naming of Hugging Face's scripts" in line
    assert f"{len(attention)} as lora.down/up" in line and f"{len(loaded)} as lora_A/B" in line


def test_defect_1_prefix(sd15, teacher, tmp_path, capsys):
    """A file as Hugging Face's tar-shard scripts write it.

    diffusers refuses it, infer.py loads all and says so.
    """
    student = train(sd15, teacher, tmp_path, rank=4, alpha=4)
    state = {
        f"base_model.model.{key}": tensor
        for key, tensor in get_peft_model_state_dict(student).items()
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "hf", state)
    pipe = open_pipe(teacher)
    with pytest.raises(ValueError):
        pipe.load_lora_weights(tmp_path / "hf" / LORA)
    unet = load(open_pipe(teacher), tmp_path / "hf")
    assert torch.allclose(forward(unet), forward(student), atol=1e-6)
    assert "as unet.base_model.model.*.lora_A/B" in capsys.readouterr().out


def test_defect_22_missing_prefix(sd15, teacher, tmp_path):
    """A PEFT folder without PEFT's prefix: PEFT changes nothing, infer.py loads all."""
    student = train(sd15, teacher, tmp_path)
    file = tmp_path / "unet" / infer.PEFT_NAME
    save_file(
        {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()},
        file,
    )
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = peft.PeftModel.from_pretrained(open_pipe(teacher).unet, tmp_path / "unet")
    assert torch.equal(forward(model.base_model.model), forward(open_pipe(teacher).unet))
    assert torch.allclose(
        forward(load(open_pipe(teacher), tmp_path / "unet")), forward(student), atol=1e-6
    )


def test_older_attention_names(sd15, teacher, tmp_path):
    """unet.X.processor.to_q_lora.down.weight, and to_out without its 0."""
    student = train(sd15, teacher, tmp_path, rank=4, alpha=4, targets=["to_q", "to_out.0"])
    names = {"to_q.lora_A": "processor.to_q_lora.down", "to_q.lora_B": "processor.to_q_lora.up"}
    names |= {
        "to_out.0.lora_A": "processor.to_out_lora.down",
        "to_out.0.lora_B": "processor.to_out_lora.up",
    }
    state = get_peft_model_state_dict(student)
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): tensor for key, tensor in state.items()}
    save_file(
        {f"unet.{key}": tensor.clone() for key, tensor in state.items()},
        tmp_path / "old.safetensors",
    )
    unet = load(open_pipe(teacher), tmp_path / "old.safetensors")
    assert count(unet) == count(student) and torch.allclose(
        forward(unet), forward(student), atol=1e-6
    )


def test_original_block_names(sdxl, xl_teacher, tmp_path):
    """Files of SDXL's family count the blocks as the original code does.

    Such as lora_unet_input_blocks_3_1_... Those with diffusers' names, as they were once, are read
    too.
    """
    student = train(sdxl, xl_teacher, tmp_path)
    names = {
        unet_name(path, student).replace(".", "_"): path.replace(".", "_")
        for path, _ in student.named_modules()
        if path.endswith(tuple(PARTS))
    }
    tensors, old = load_file(tmp_path / LORA), {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("lora_unet_").partition(".")
        old[f"lora_unet_{names[name]}.{part}"] = tensor
    assert any("input_blocks_3_1" in key for key in tensors) and len(old) == len(tensors)
    save_file(old, tmp_path / "old.safetensors", infer.read_lora(tmp_path / LORA)[1])
    for file in (tmp_path / LORA, tmp_path / "old.safetensors"):
        unet = load(open_pipe(xl_teacher), file)
        assert count(unet) == count(student) and torch.allclose(
            forward(unet), forward(student), atol=1e-6
        )
    read = sdxl.read_lora(open_pipe(xl_teacher), tmp_path / "old.safetensors")
    live = sdxl.lora_layers(student)
    assert read.keys() == live.keys()
    assert all(torch.equal(read[path][0], live[path][0]) for path in live)


def spelled(unet, names):
    """{name: layer of rank 1} that fits the UNet."""
    shapes = {name: unet.get_submodule(name).weight.shape for name in names}
    return {
        name: {
            "A": torch.ones(1, *shape[1:]),
            "B": torch.ones(shape[0], 1, *[1] * (len(shape) - 2)),
            "rank": 1,
            "alpha": 1,
        }
        for name, shape in shapes.items()
    }


def test_shallow_sdxl_without_a_header(tmp_path):
    """The transformers of the SDXL demo teacher are one block deep.

    A LoRA that tells no family is not taken for SD 1.x's.
    """
    unet = DiffusionPipeline.from_pretrained(ROOT / "demo" / "teacher-sdxl").unet
    names = [name for name, _ in unet.named_modules()]
    layers = [name for name in names if name.endswith(tuple(PARTS))]
    assert infer.layout(names) == "SDXL" and infer.layout(layers) == "Stable Diffusion 1.x / 2.x"
    lora = {f"unet.{name}": layer for name, layer in spelled(unet, layers).items()}
    assert len(infer.match_base(SimpleNamespace(unet=unet), "x", lora, {}, "base")["unet"]) > 20
    lora["unet.foo"] = lora["unet.conv_in"] = next(iter(lora.values()))
    with pytest.raises(SystemExit, match="^error: LoRA x was trained for the Stable Diffusion 1.x"):
        infer.match_base(SimpleNamespace(unet=unet), "x", lora, {"family": "sd15"}, "base")


TEXT_NAMES = {
    "kohya": ("lora_te1_text_model_{}", "lora_te2_text_model_{}", "lora_down", "lora_up"),
    "diffusers": ("text_encoder.text_model.{}", "text_encoder_2.text_model.{}", "lora_A", "lora_B"),
    "older": (
        "text_encoder.text_model.{}",
        "text_encoder_2.text_model.{}",
        "lora_linear_layer.down",
        "lora_linear_layer.up",
    ),
}


def text_tensors(naming, alpha=True):
    """LoRA tensors of a few text encoder layers of both encoders, and {(encoder, layer): A, B}."""
    tensors, layers, random = {}, {}, torch.Generator().manual_seed(3)
    *encoders, down, up = TEXT_NAMES[naming]
    for index, encoder in enumerate(encoders):
        for layer, rows, columns in (
            ("encoder.layers.0.self_attn.q_proj", 32, 32),
            ("encoder.layers.1.self_attn.out_proj", 32, 32),
            ("encoder.layers.1.mlp.fc1", 64, 32),
        ):
            name = encoder.format(layer.replace(".", "_") if naming == "kohya" else layer)
            a, b = torch.randn(2, columns, generator=random), torch.randn(rows, 2, generator=random)
            tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
            tensors |= {f"{name}.alpha": torch.tensor(1.0)} if alpha else {}
            layers[index, layer] = a, b
    return tensors, layers


@pytest.mark.parametrize("naming", TEXT_NAMES)
def test_text_encoders(naming, xl_teacher, tmp_path, capsys):
    """A style LoRA's text encoder layers load and are counted.

    alpha / rank x B A is added to the weights.
    """
    tensors, layers = text_tensors(naming)
    save_file(tensors, tmp_path / "style.safetensors")
    pipe, base = open_pipe(xl_teacher), open_pipe(xl_teacher)
    load(pipe, tmp_path / "style.safetensors", weights=[0.8])
    assert (
        "LoRA: 6 of 6 layers loaded (rank 2, alpha 1, 3 in text_encoder, 3 in text_encoder_2"
        in capsys.readouterr().out
    )
    merge(pipe)
    for (index, layer), (a, b) in layers.items():
        encoder = ("text_encoder", "text_encoder_2")[index]
        ours, theirs = (
            {
                name.removeprefix("text_model."): tensor
                for name, tensor in getattr(p, encoder).state_dict().items()
            }
            for p in (pipe, base)
        )
        expected = theirs[f"{layer}.weight"] + 0.8 * 0.5 * b @ a
        assert torch.allclose(ours[f"{layer}.weight"], expected, atol=1e-6)
    assert torch.equal(pipe.unet.conv_in.weight, base.unet.conv_in.weight)


def test_style_loras_are_used(sd15, teacher, tmp_path, capsys):
    """Several LoRAs from the command line, a line for each.

    The settings in the image name all of them.
    """
    for index in range(3):
        train(sd15, teacher, tmp_path / f"run{index}", index, targets=PARTS[: 4 + index])
    text, layers = text_tensors("kohya")
    unet = load_file(tmp_path / "run1" / LORA)
    save_file(
        unet | {key.replace("te1", "te"): tensor for key, tensor in text.items() if "te1" in key},
        tmp_path / "style.safetensors",
    )

    def generate(name, *flags):
        infer.main(
            [
                "--lora",
                str(tmp_path / "run0"),
                "--prompt",
                "a",
                "--output",
                str(tmp_path / name),
                *flags,
            ]
        )
        return Image.open(tmp_path / name)

    plain = generate("plain.png")
    styled = generate(
        "styled.png",
        "--style_lora",
        f"{tmp_path}/style.safetensors",
        f"{tmp_path}/run2:0.5",
        "--lcm_weight",
        "0.9",
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "layers loaded" in line] == [
        "LoRA", "LoRA", "Style LoRA style", "Style LoRA run2"
    ]  # fmt: skip
    assert "3 in text_encoder" in next(line for line in lines if "Style LoRA style" in line)
    asked = styled.text["parameters"].splitlines()[0]
    assert asked == "a <lora:run0:0.9> <lora:style:0.8> <lora:run2:0.5>"
    assert json.loads(styled.text["infer_args"])["style_lora"][1] == [
        str(tmp_path / "run2" / LORA),
        0.5,
    ]
    assert plain.tobytes() != styled.tobytes()
    with pytest.raises(
        SystemExit, match=r"^error: .*style_lora: .*20.* is not float from -10 to 10"
    ):
        generate("x.png", "--style_lora", f"{tmp_path}/run2:20")
    assert not (tmp_path / "x.png").exists()


def test_weight_after_the_last_colon(tmp_path, monkeypatch):
    """A colon may belong to the path.

    Only a number after the last one is a weight, and a path that exists is never torn.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    read = infer.weighted(infer.number(float, -10, 10), 0.8)
    for text, expected in {
        "a.safetensors": ("a.safetensors", 0.8),
        "a.safetensors:1.5": ("a.safetensors", 1.5),
        "a:-1e-1": ("a", -0.1),
        r"C:\x.safetensors": (r"C:\x.safetensors", 0.8),
        r"C:\x.safetensors:0.6": (r"C:\x.safetensors", 0.6),
        "my:style": ("my:style", 0.8),
        "my:style:.5": ("my:style", 0.5),
        "run:2": ("run:2", 0.8),
        "run:2:2": ("run:2", 2),
        "a:": ("a:", 0.8),
    }.items():
        assert read(text) == expected
    args = infer.parse_args(
        [
            "--lora",
            "l",
            "--prompt",
            "a",
            "--lora_scale",
            "0.5",
            "--style_lora",
            "a",
            "b:2",
            "--style_lora",
            "c",
        ]
    )
    assert args.lcm_weight == 0.5 and args.style_lora == [("a", 0.8), ("b", 2), ("c", 0.8)]


GOOD = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
    "lora_unet_conv_in.lora_up.weight": torch.ones(32, 2, 1, 1),
}


LAYER = "lora_unet_conv_in"
BAD = [
    ({}, "contains no LoRA layer"),
    (
        GOOD | {f"{LAYER}.lora_up.weight": torch.full((32, 2, 1, 1), torch.nan)},
        "1 of 2 tensors hold NaN",
    ),
    ({f"{LAYER}.lora_down.weight": torch.ones(2, 4)}, "layer unet.conv_in has no up matrix"),
    (GOOD | {"unet.conv_out.bias": torch.ones(2)}, "cannot read unet.conv_out.bias"),
    (GOOD | {f"{LAYER}.hada_w1_a": torch.ones(2)}, "belongs to a LoHa"),
    (GOOD | {f"{LAYER}.lokr_w1": torch.ones(2)}, "belongs to a LoKr"),
    (GOOD | {f"{LAYER}.dora_scale": torch.ones(2)}, "belongs to a DoRA"),
    (GOOD | {f"{LAYER}.lora_mid.weight": torch.ones(2)}, "belongs to a LoCon with a core tensor"),
    (
        GOOD | {f"{LAYER}.alpha": torch.ones(2)},
        r"conv_in.alpha is not a number but has the shape \[2\]",
    ),
    (
        GOOD | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)},
        "conv_in.lora_A.* is in the file twice",
    ),
    (
        GOOD | {f"{LAYER}.lora_up.weight": torch.ones(32, 3, 1, 1)},
        "layer unet.conv_in do not fit together",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
@pytest.mark.parametrize("flag", ["lora", "style_lora"])
def test_bad_tensors(tmp_path, flag, tensors, message):
    """One line that names the file and what is wrong, before any base model is looked for."""
    save_file(GOOD, tmp_path / "good.safetensors")
    save_file(tensors, tmp_path / "bad.safetensors")
    files = {"lora": tmp_path / "good.safetensors"} | {flag: tmp_path / "bad.safetensors"}
    refused(files, f"bad.safetensors: .*{message}", tmp_path)


def refused(files, message, folder):
    """infer.py ends with one line on stderr that holds `message`, and generates nothing."""
    flags = [word for flag, path in files.items() for word in (f"--{flag}", str(path))]
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        infer.main(
            [
                *flags,
                "--prompt",
                "a",
                "--base_model",
                "/no/such/base",
                "--output",
                str(folder / "x.png"),
            ]
        )
    assert "\n" not in str(caught.value) and not (folder / "x.png").exists()


def test_bad_files(tmp_path):
    """Pickles, texts, torn and empty files, folders without a LoRA, broken PEFT settings.

    One line each.
    """
    save_file(GOOD, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    for name, content in {
        "pickle.safetensors": pickle.dumps({"a": 1}),
        "text.safetensors": b"not a LoRA",
        "empty.safetensors": b"",
        "torn.safetensors": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        refused({"lora": tmp_path / name}, f"LoRA .*{name}: not a whole safetensors file", tmp_path)
        refused(
            {"lora": tmp_path / "good.safetensors", "style_lora": tmp_path / name},
            f"{name}: not a whole",
            tmp_path,
        )
    for ending in ("pt", "bin", "ckpt", "txt"):
        (tmp_path / f"x.{ending}").write_bytes(pickle.dumps({"a": 1}))
        refused(
            {"lora": tmp_path / f"x.{ending}"},
            rf"--lora .*x.{ending}: must be a .safetensors file.*pickled",
            tmp_path,
        )
    (tmp_path / "empty").mkdir()
    refused(
        {"lora": tmp_path / "empty"},
        f"--lora .*empty: no {LORA} or {infer.PEFT_NAME} in this folder$",
        tmp_path,
    )
    (tmp_path / "many" / "one").mkdir(parents=True)
    for name in ("b.safetensors", f"one/{LORA}"):
        save_file(GOOD, tmp_path / "many" / name)
    refused(
        {"lora": tmp_path / "many"}, f"in this folder, but b.safetensors, one/{LORA}$", tmp_path
    )
    files = {"lora": tmp_path / "good.safetensors", "style_lora": tmp_path / "nowhere"}
    refused(files, "--style_lora .*nowhere: no such file or folder", tmp_path)
    for text in ("{", "[1]"):
        save_file(GOOD, tmp_path / infer.PEFT_NAME)
        (tmp_path / "adapter_config.json").write_text(text)
        refused(
            {"lora": tmp_path / infer.PEFT_NAME},
            "adapter_config.json beside it cannot be read",
            tmp_path,
        )


def test_layers_of_no_module(teacher, tmp_path):
    """A layer that the base has not, and one that is in the file under two names.

    Nothing is loaded.
    """
    unknown = {key.replace("conv_in", "foo"): tensor for key, tensor in GOOD.items()}
    names = ("lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1")
    shapes = {"down": (2, 32), "up": (128, 2)}
    twice = {
        f"{name}.lora_{part}.weight": torch.ones(shapes[part]) for name in names for part in shapes
    }
    for tensors, message in (
        (unknown, "layer unet.foo has no counterpart there"),
        (twice, "layer unet.time_embedding.linear_1 is in the file twice, under two names"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            load(open_pipe(teacher), tmp_path / "x.safetensors")


def spell(student, naming):
    """The student's LoRA tensors as another tool names and shapes them."""
    tensors = {}
    for key, tensor in get_peft_model_state_dict(student).items():
        path, part = key.removesuffix(".weight").rsplit(".lora_", 1)
        original = unet_name(path, student)
        flat, down_up = path.replace(".", "_"), {"A": "lora_down", "B": "lora_up"}[part]
        name = {
            "ComfyUI": f"diffusion_model.{original}.lora_{part}.weight",
            "ComfyUI, down and up": f"diffusion_model.{original}.{down_up}.weight",
            "checkpoint": f"model.diffusion_model.{original}.lora_{part}.weight",
            "LyCORIS": f"lycoris_{flat}.{down_up}.weight",
            "LyCORIS, UNet named": f"lycoris_unet_{flat}.{down_up}.weight",
            "PEFT's state": f"base_model.model.{path}.lora_{part}.default.weight",
            "PEFT's adapter": f"base_model.model.{path}.lora_{part}.my-style.weight",
            "DDP": f"module.{path}.lora_{part}.weight",
            "DDP of PEFT": f"module.base_model.model.{path}.lora_{part}.weight",
            "compiled": f"_orig_mod.{path}.lora_{part}.weight",
            "UNet of DDP": f"unet.module.{path}.lora_{part}.weight",
            "kohya": f"lora_unet_{flat}.{down_up}.weight",
            "kohya, original": f"lora_unet_{original.replace('.', '_')}.{down_up}.weight",
            "diffusers, once": f"unet.{path}.lora.{down_up.removeprefix('lora_')}.weight",
            "bare": f"{path}.lora_{part}.weight",
            "matrices": f"lora_unet_{flat}.{down_up}.weight",
            "convolutions": f"unet.{path}.lora_{part}.weight",
        }[naming]
        if naming == "matrices" and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if naming == "convolutions" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor.clone()
    return tensors


NAMINGS = (
    "ComfyUI,ComfyUI: down and up,checkpoint,LyCORIS,LyCORIS: UNet named,PEFT's state,"
    "PEFT's adapter,DDP,DDP of PEFT,compiled,UNet of DDP,kohya,kohya: original,diffusers: once,"
    "bare,matrices,convolutions"
).split(",")


@pytest.mark.parametrize("alpha", [False, True], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_any_tools_naming_is_read(layout, alpha, make_teacher, tmp_path):
    """Every layer in every naming, to the same forward pass; alpha 1 of rank 4, or none."""
    teacher, trainer = make_teacher(layout), load_script(f"train_lcm_lora_{layout}.py")
    student = train(trainer, teacher, tmp_path, rank=4, alpha=1 if alpha else 4)
    expected = forward(student)
    for naming in NAMINGS:
        tensors = spell(student, naming.replace(":", ","))
        if alpha:
            ups = [key for key in tensors if "lora_A" in key or "down" in key.split("lora")[-1]]
            stems = [key[: key.replace("lora.", "lora_").rindex("lora_") - 1] for key in ups]
            tensors |= {f"{stem}.alpha": torch.tensor(1.0) for stem in stems}
        save_file(tensors, tmp_path / "x.SAFETENSORS")
        unet = load(open_pipe(teacher), tmp_path / "x.SAFETENSORS")
        assert count(unet) == count(student), naming
        assert torch.allclose(forward(unet), expected, atol=1e-6), naming


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("lycoris_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2"),
        ("text_encoder_2.base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
    ],
)
def test_text_encoders_of_any_tool(key, layer):
    """The encoder that a prefix names; without any it is the first."""
    name, part, _ = infer.parse_key(f"{key}.lora_A.weight")
    assert part == "A" and name.partition(".")[0] == layer
    assert name.replace("_", ".").endswith("text.model.encoder.layers.0.mlp.fc1")


def test_bundled_embeddings_are_left_out(sd15, teacher, tmp_path, capsys):
    """The LoRA beside them is used whole, and the line names them."""
    student = train(sd15, teacher, tmp_path)
    tensors = load_file(tmp_path / LORA)
    tensors["bundle_emb.red-hat.clip_l"] = torch.ones(2, 32)
    tensors["bundle_emb.red-hat.string_to_param.*"] = torch.ones(2, 32)
    save_file(tensors, tmp_path / "bundle.safetensors")
    unet = load(open_pipe(teacher), tmp_path / "bundle.safetensors")
    assert torch.allclose(forward(unet), forward(student), atol=1e-6)
    warning = capsys.readouterr().err
    assert "red-hat" in warning and "embeddings" in warning and warning.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.diff", "whole weights"),
        ("lora_unet_conv_in.diff_b", "whole weights"),
        ("lycoris_conv_in.hada_w1_a", "LoHa"),
        ("diffusion_model.out.2.lokr_w1", "LoKr"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("base_model.model.conv_in.lora_B.bias", "biases"),
    ],
)
def test_other_adapters_are_named(tmp_path, key, kind):
    """By what they are, with a way out."""
    save_file(GOOD | {key: torch.ones(2)}, tmp_path / "x.safetensors")
    refused({"lora": tmp_path / "x.safetensors"}, f"{kind}.*merge it", tmp_path)


@pytest.mark.parametrize("drop", ["mid_block", "mid_block_attentions"])
@pytest.mark.parametrize("header", [{"family": "sdxl"}, {}], ids=["header", "bare"])
def test_part_of_the_layers_proves_no_layout(sdxl, xl_teacher, tmp_path, drop, header, capsys):
    """An SDXL LoRA without some layers is used on its base, without a warning, all of it."""
    train(sdxl, xl_teacher, tmp_path)
    tensors = {key: t for key, t in load_file(tmp_path / LORA).items() if drop not in key}
    base = {"base_model": str(xl_teacher)}
    save_file(tensors, tmp_path / "x.safetensors", base | header)
    words = ["--lora", tmp_path / "x.safetensors", "--prompt", "a", "--steps", 1, "--output"]
    infer.main([*map(str, [*words, tmp_path / "x.png"])])
    said, count = capsys.readouterr(), len(tensors) // 3
    assert said.err == "" and f"LoRA: {count} of {count} layers loaded" in said.out


def test_depth_tells_sdxl_from_ssd1b():
    """The blocks before the middle are ten deep in SDXL, in either spelling, four in SSD-1B."""
    up = "unet.up_blocks.0.attentions.0.transformer_blocks.9.attn1.to_q"
    for start in "unet.down_blocks.2.attentions.1", "unet.input_blocks_8_1":
        for depth, layout in (9, "SDXL"), (3, "SSD-1B"):
            names = [f"{start}.transformer_blocks.{i}.attn1.to_q" for i in range(depth + 1)]
            assert infer.layout([*names, up]) == layout


HEADERS = [
    ({"num_ddim_timesteps": "nan"}, "num_ddim_timesteps"),
    ({"num_ddim_timesteps": "-5"}, "num_ddim_timesteps"),
    ({"num_ddim_timesteps": "9" * 5000}, "num_ddim_timesteps"),
    ({"lora_adapter_metadata": "[" * 100000}, "lora_adapter_metadata"),
    ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "alpha of layer"),
    ({"lora_adapter_metadata": '{"unet.lora_alpha": "abc"}'}, "alpha of layer"),
    ({"lora_adapter_metadata": '{"unet.lora_alpha": [1]}'}, "alpha of layer"),
    ({"lora_adapter_metadata": f'{{"unet.lora_alpha": {"9" * 400}}}'}, "alpha of layer"),
    ({"lora_adapter_metadata": '{"unet.alpha_pattern": [3]}'}, "alpha of layer"),
    ({"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 3}}'}, "alpha of layer"),
    ({"lora_adapter_metadata": "7"}, "lora_adapter_metadata"),
    ({"base_model": "x" * 5000}, "base_model"),
    ({"base_model": "a\0b"}, "base_model"),
    ({"base_model": "./x.safetensors", "training_args": "[1]"}, "training_args"),
    ({"lcm_lora_version": "\n2"}, "version"),
]


@pytest.mark.parametrize(("metadata", "message"), HEADERS)
def test_strange_numbers_in_a_header(tmp_path, metadata, message):
    """One line that names the file and the field."""
    save_file(GOOD, tmp_path / "x.safetensors", {"base_model": "/no/such/base"} | metadata)
    words = ["--lora", tmp_path / "x.safetensors", "--prompt", "a"]
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        infer.main([*map(str, words), "--output", str(tmp_path / "x.png")])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000


def test_types_that_are_no_weights(tmp_path):
    """Integers and complex numbers are refused by name."""
    for dtype in torch.int64, torch.complex64:
        bad = {key: tensor.to(dtype) for key, tensor in GOOD.items()}
        save_file(bad, tmp_path / "x.safetensors")
        refused({"lora": tmp_path / "x.safetensors"}, "must be of a floating-point", tmp_path)


def test_lora_from_the_hub(sd15, teacher, tmp_path, monkeypatch):
    """USER/REPO gives the usual or the only file, USER/REPO:FILE the one named."""
    from huggingface_hub.errors import EntryNotFoundError

    train(sd15, teacher, tmp_path / "run")
    files = {"me/run": [LORA, "other.safetensors"], "me/one": ["a.safetensors"]}
    files |= {"me/two": ["a.safetensors", "b.safetensors"], "me/none": ["a.bin"]}

    def download(repo, name):
        if name not in files[repo]:
            raise EntryNotFoundError(name)
        return str(tmp_path / "hub" / repo / name)

    monkeypatch.setattr(infer, "hf_hub_download", download)
    monkeypatch.setattr(infer, "list_repo_files", files.get)
    for name, file in {
        "me/run": f"me/run/{LORA}",
        "me/run:other.safetensors": "me/run/other.safetensors",
        "me/one": "me/one/a.safetensors",
    }.items():
        assert infer.find_lora(name) == tmp_path / "hub" / file
    read = infer.weighted(infer.number(float, -10, 10), 0.8)
    assert read("me/run:other.safetensors:0.5") == ("me/run:other.safetensors", 0.5)
    for name, message in (
        ("me/two", "name its file, me/two:FILE; it has a.safetensors, b.safetensors"),
        ("me/none", "it has none"),
        ("me/one:z.safetensors", "not to be had from the Hub"),
    ):
        with pytest.raises(SystemExit, match=f"^error: --style_lora {name}: .*{message}"):
            infer.find_lora(name, "--style_lora")


def test_hub_without_a_network(tmp_path):
    """One line that says that the path is not here either."""
    files = {"lora": "nobody/nothing"}
    refused(files, "--lora nobody/nothing: no such file or folder here, .*USER/REPO", tmp_path)
