"""scripts/make_teacher.py: the folder it writes, and what --from_image reads."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import make_teacher
import numpy as np
import pytest
import read_recipe
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LCMScheduler
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_file import as_single_file, vae_name

LAYOUTS = ("sd15", "sdxl")


def write_lora(pipe, path, seed, text_encoders=True, about=None):
    """A LoRA in kohya's naming of the attention of the UNet and of the text encoders."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    second = hasattr(pipe, "text_encoder_2")
    parts = {"lora_unet": pipe.unet}
    if text_encoders:
        parts["lora_te1" if second else "lora_te"] = pipe.text_encoder
        parts |= {"lora_te2": pipe.text_encoder_2} if second else {}
    for prefix, model in parts.items():
        for name, module in model.named_modules():
            if name.endswith(("to_q", "to_v", "_proj", "fc1", "conv1")) and hasattr(
                module, "weight"
            ):
                shape, key = module.weight.shape, f"{prefix}_{name}".replace(".", "_")
                if prefix != "lora_unet" and "_text_model_" not in key:
                    key = key.replace(f"{prefix}_", f"{prefix}_text_model_")
                down, up = (4, *shape[1:]), (shape[0], 4, *[1] * (len(shape) - 2))
                tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.3
                tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.3
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, about)
    return path


@pytest.fixture(scope="module")
def kit(make_teacher, tmp_path_factory):
    """{layout: (base, [LoRA, LoRA], VAE)}: v-prediction with zero SNR for SDXL's layout."""
    kit, folder = {}, tmp_path_factory.mktemp("kit")
    for layout in LAYOUTS:
        more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        base = make_teacher(layout, **(more if layout == "sdxl" else {}))
        pipe = DiffusionPipeline.from_pretrained(base)
        loras = [write_lora(pipe, folder / f"{layout} {i}.safetensors", i) for i in range(2)]
        torch.manual_seed(7)
        vae = AutoencoderKL.from_config(pipe.vae.config, scaling_factor=0.3)
        vae.save_pretrained(folder / f"vae {layout}")
        kit[layout] = base, loras, folder / f"vae {layout}"
    return kit


def make(*words):
    """make_teacher.main; the folder it wrote."""
    make_teacher.main([*map(str, words)])
    return words[words.index("--output") + 1]


def generate(pipe, clip_skip=0):
    """One guided image as numbers from 0 to 1.

    UIs' clip skip is of both prompts, that of diffusers' call of the positive one only: each is
    encoded by itself.
    """
    pipe.set_progress_bar_config(disable=True)
    texts, keys = ("a cat", "dog"), ("prompt", "negative_prompt")
    if clip_skip:
        texts = [pipe.encode_prompt(one, "cpu", 1, False, clip_skip=clip_skip)[0] for one in texts]
        keys = ("prompt_embeds", "negative_prompt_embeds")
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    return pipe(**dict(zip(keys, texts)), generator=generator, **settings).images[0]


def by_hand(base, loras, vae=None):
    """The base with LoRAs and VAE as a user of diffusers sets them."""
    pipe = DiffusionPipeline.from_pretrained(base)
    for index, (path, _) in enumerate(loras):
        pipe.load_lora_weights(str(path), adapter_name=f"a{index}")
    pipe.set_adapters([f"a{i}" for i in range(len(loras))], [weight for _, weight in loras])
    if not hasattr(pipe.text_encoder, "text_model"):  # clip_skip of diffusers 0.42 asks for it
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    if vae:
        pipe.vae = AutoencoderKL.from_pretrained(vae)
    return pipe


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_generates_what_the_parts_do(kit, tmp_path, layout):
    """LoRAs with text encoder layers, one of negative weight, VAE and clip skip: as by hand."""
    base, (one, two), vae = kit[layout]
    flags = ["--style_lora", f"{one}:0.7", f"{two}:-0.4", "--vae", vae, "--clip_skip", 2]
    folder = make("--base", base, *flags, "--output", tmp_path / "new" / "teacher")
    ours = DiffusionPipeline.from_pretrained(folder)
    theirs = generate(by_hand(base, [(one, 0.7), (two, -0.4)], vae), int(layout == "sd15"))
    assert np.abs(generate(ours) - theirs).max() < 1e-4
    assert np.abs(generate(DiffusionPipeline.from_pretrained(base)) - theirs).max() > 1e-2
    assert dict(ours.scheduler.config) == dict(
        DiffusionPipeline.from_pretrained(base).scheduler.config
    )
    made = json.loads((folder / "recipe.json").read_text())["made_from"]
    assert made["style_loras"] == [
        {"name": one.stem, "weight": 0.7},
        {"name": two.stem, "weight": -0.4},
    ]
    assert made["base"] == base.name and made["vae"] == vae.name and made["clip_skip"] == 2
    assert str(tmp_path) not in json.dumps(made) and str(base) not in json.dumps(made)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["teacher"]


def test_clip_skip_alone_is_the_calls(kit, tmp_path, capsys):
    """It changes the image; more layers than there are, and more than 2 of SDXL, are refused."""
    base, _, _ = kit["sd15"]
    folder = make("--base", base, "--clip_skip", 2, "--output", tmp_path / "a")
    pipe = DiffusionPipeline.from_pretrained(base)
    assert np.abs(generate(DiffusionPipeline.from_pretrained(folder)) - generate(pipe)).max() > 1e-3
    with pytest.raises(SystemExit, match="--clip_skip 3: its text encoder has 2 layers"):
        make("--base", base, "--clip_skip", 3, "--output", tmp_path / "b")
    base, _, _ = kit["sdxl"]
    with pytest.raises(SystemExit, match="--clip_skip 3: .*second encoder"):
        make("--base", base, "--clip_skip", 3, "--output", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_file_and_a_vae_in_one_file(make_teacher, tmp_path):
    """The same teacher as of the folder; a VAE of either naming is the one it was written from."""
    base = make_teacher(seed=3)
    torch.manual_seed(9)
    config = AutoencoderKL.load_config(base / "vae")
    vae = AutoencoderKL.from_config(config)
    original = {}
    for name, tensor in vae.state_dict().items():
        layer, _, end = name.rpartition(".")
        attention = "attentions" in name and tensor.ndim == 2
        tensor = tensor[:, :, None, None] if attention else tensor
        original[f"{vae_name(layer, vae)}.{end}"] = tensor.contiguous()
    save_file(original, tmp_path / "original.safetensors")
    save_file(vae.state_dict(), tmp_path / "diffusers.safetensors")
    file = as_single_file(base)
    for name, start in (
        ("original", ["--base", file, "--base_config", base]),
        (
            "diffusers",
            ["--base", base],
        ),
    ):
        vae_file = tmp_path / f"{name}.safetensors"
        folder = make(*start, "--vae", vae_file, "--output", tmp_path / name)
        ours = DiffusionPipeline.from_pretrained(folder)
        parts = {"unet": DiffusionPipeline.from_pretrained(base).unet, "vae": vae}
        for part, net in parts.items():
            state = getattr(ours, part).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in net.state_dict().items())
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match="--vae .*x.safetensors: its weights are not"):
        make("--base", base, "--vae", tmp_path / "x.safetensors", "--output", tmp_path / "no")


def test_recipe_and_prediction(kit, tmp_path, capsys):
    """What no weight holds is in recipe.json; a base that has one hands it on; fp16."""
    base, _, _ = kit["sd15"]
    flags = {"negative_prompt": "a, b", "guidance_scale": 6.5, "guidance_rescale": 0.7}
    flags |= {"width": 832, "height": 1216, "max_prompt_chunks": 3}
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    words += ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--dtype", "fp16"]
    first = make("--base", base, *words, "--output", tmp_path / "first")
    recipe = json.loads((first / "recipe.json").read_text())
    assert {key: recipe[key] for key in flags} == flags and recipe["format"] == 1
    config = json.loads((first / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    assert config["timestep_spacing"] == "trailing" and config["_class_name"] == "DDIMScheduler"
    assert {t.dtype for t in load_file(first / "unet" / WEIGHTS).values()} == {torch.float16}
    second = make("--base", first, "--width", 64, "--output", tmp_path / "second")
    again = json.loads((second / "recipe.json").read_text())
    assert {key: again[key] for key in flags} == flags | {"width": 64}
    out = capsys.readouterr().out  # no word of the folder that is renamed at the end
    assert "guidance_scale 6.5" in out and ".part" not in out
    for text in ("[]", "{", '{"format": 2}', '{"format": 1, "width": "8"}'):
        (second / "recipe.json").write_text(text)
        with pytest.raises(SystemExit, match="^error: .*second/recipe.json"):
            make("--base", second, "--output", tmp_path / "third")


def test_scheduler_of_a_file_whose_configs_are_the_librarys():
    """DDIM with what its markers say; at zero SNR it begins at the last timestep."""
    for zero_snr, spacing in (True, "trailing"), (False, "leading"):
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
        pipe = SimpleNamespace(scheduler=LCMScheduler(steps_offset=1, **settings))
        args = SimpleNamespace(base="a.safetensors", base_config=None)
        made = make_teacher.make_scheduler(pipe, args)
        assert type(made) is DDIMScheduler and made.config.steps_offset == 1
        assert made.config.timestep_spacing == spacing and not made.config.clip_sample
        assert {key: made.config[key] for key in settings} == settings


WEIGHTS = "diffusion_pytorch_model.safetensors"
BAD = {  # what is wrong: flags, what the one line says
    "output is there": ("--base {base} --output {base}", "must be a new or an empty folder"),
    "output like a file": ("--base {base} --output x.safetensors", "may not end so"),
    "part of another": ("--base {base} --output other", "other.part is in the way"),
    "no base": ("--output new", "--base is missing"),
    "no such base": ("--base ./nowhere --output new", "no such file or folder"),
    "no such LoRA": ("--base {base} --style_lora nowhere --output new", "--style_lora nowhere"),
    "weight": ("--base {base} --style_lora {lora}:99 --output new", "'99' is not float"),
    "LoRA of another": ("--base {base} --style_lora {xl} --output new", "xl 0.safetensors"),
    "LCM-LoRA": ("--base {base} --style_lora lcm.safetensors --output new", "an LCM-LoRA"),
    "models": ("--base {base} --models x --output new", "--models needs --from_image"),
    "width": ("--base {base} --width 100 --output new", "multiple of 8, e.g. 104"),
    "guidance": ("--base {base} --guidance_scale nan --output new", "'nan' is not float"),
    "no image": ("--from_image nowhere.png --output new", "nowhere.png: not a readable image"),
    "empty path": ("--base  --output new", "a path is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(kit, tmp_path, monkeypatch, case):
    """One line, and nothing is written."""
    (base, (lora, _), _), xl = kit["sd15"], kit["sdxl"][1][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "thesis.txt").touch()
    write_lora(DiffusionPipeline.from_pretrained(base), "lcm.safetensors", 0, False, LCM)
    before = sorted(tmp_path.rglob("*"))
    flags, message = BAD[case]
    words = [word.format(base=base, lora=lora, xl=xl) for word in flags.split(" ")]
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as end:
        make_teacher.main(words)
    assert "\n" not in str(end.value) and sorted(tmp_path.rglob("*")) == before


LCM = {"lcm_lora_version": "1"}


def test_whole_or_absent(kit, tmp_path, monkeypatch):
    """A full disk leaves nothing; NaN from a LoRA leaves nothing; a left-over is replaced."""
    base, (lora, _), _ = kit["sd15"]
    (tmp_path / "t.part" / "unet").mkdir(parents=True)

    def full(pipe, folder, **kwargs):
        (folder / "model_index.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        kind = type(DiffusionPipeline.from_pretrained(base))
        patch.setattr(kind, "save_pretrained", full)
        with pytest.raises(SystemExit, match="^error: --output .*cannot be written .*No space"):
            make("--base", base, "--output", tmp_path / "t")
    assert not [*tmp_path.iterdir()]
    tensors = {key: tensor * 1e4 for key, tensor in load_file(lora).items()}
    save_file(tensors, tmp_path / "huge.safetensors")
    flags = ["--style_lora", f"{tmp_path / 'huge.safetensors'}:1", "--dtype", "fp16"]
    with pytest.raises(SystemExit, match="^error: .*holds NaN or inf"):
        make("--base", base, *flags, "--output", tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["huge.safetensors"]


@pytest.mark.slow  # for its start
def test_killed(kit, tmp_path):
    """What a kill leaves does not look whole, and the same command ends with the teacher."""
    base, _, _ = kit["sd15"]
    words = ["--base", base, "--output", tmp_path / "t"]
    program = ROOT / "scripts" / "make_teacher.py"
    run = subprocess.Popen([sys.executable, program, *map(str, words)], stdout=subprocess.DEVNULL)
    while run.poll() is None and not (tmp_path / "t.part" / "unet").exists():
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not (tmp_path / "t").exists()
    make(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


# ------------------------------------------------------------------------------------ --from_image

FACTS = (
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1, Size: 832x1216, "
    'Model hash: 0123456789, Model: "base, of mine", VAE hash: 00, VAE: my.vae.safetensors, '
    "Denoising strength: 0.4, Clip skip: 2, CFG Rescale: 0.7, Hires upscale: 2, "
    'Hires upscaler: "a, b: c", Lora hashes: "ink: 0, fog: 1", Version: v1.10.1'
)
A1111 = (
    "masterpiece, (a cat:1.2), {red|blue} __colour__, <lora:ink:0.7> <lora:sub/fog:0.5:-0.25>\n"
    "<lora:Te:te=0.1:unet=0.2>\nNegative prompt: blurry, Size: 3x3,\nbad <lora:no:1> hands\n"
    + FACTS
)
TAKEN = {
    "base": "base, of mine", "vae": "my.vae.safetensors", "clip_skip": 2.0, "width": 832,
    "height": 1216, "guidance_scale": 6.5, "guidance_rescale": 0.7,
    "negative_prompt": "blurry, Size: 3x3,\nbad  hands",
    "loras": [("ink", 0.7, 0.7), ("sub/fog", 0.5, -0.25), ("Te", 0.1, 0.2)],
}  # fmt: skip


def node(kind, **inputs):
    """A node of ComfyUI's API format."""
    return {"class_type": kind, "inputs": inputs}


PROMPT = {
    "1": node("CheckpointLoaderSimple", ckpt_name="xl\\Base.safetensors"),
    "2": node(
        "LoraLoader", lora_name="a.safetensors", strength_model=0.8, strength_clip=0.5,
        model=["1", 0], clip=["1", 1],
    ),
    "3": node(
        "LoraLoaderModelOnly", lora_name="s/b.safetensors", strength_model=-0.3, model=["2", 0]
    ),
    "4": node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True, model=["3", 0]),
    "5": node("RescaleCFG", multiplier=0.7, model=["4", 0]),
    "6": node("FreeU_V2", b1=1.1, model=["5", 0]),
    "7": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["2", 1]),
    "8": node("CLIPTextEncode", text="a cat", clip=["7", 0]),
    "9": node("CLIPTextEncode", text=["20", 0], clip=["7", 0]),
    "10": node("EmptyLatentImage", width=832, height=1216, batch_size=1),
    "11": node(
        "KSampler", seed=1, steps=20, cfg=5.5, sampler_name="euler", scheduler="normal",
        denoise=1, model=["6", 0], positive=["12", 0], negative=["12", 1], latent_image=["10", 0],
    ),
    "12": node(
        "ControlNetApplyAdvanced", positive=["8", 0], negative=["9", 0], control_net=["13", 0]
    ),
    "13": node("ControlNetLoader", control_net_name="c"),
    "14": node("VAEDecode", samples=["11", 0], vae=["15", 0]),
    "15": node("VAELoader", vae_name="v.safetensors"),
    "16": node("SaveImage", images=["14", 0]),
    "17": node("KSampler", cfg=9, model=["1", 0], positive=["8", 0], negative=["8", 0]),
    "20": node("PrimitiveString", value="blurry <lora:x:1>"),
}  # fmt: skip
COMFY = {
    "base": "xl\\Base.safetensors", "vae": "v.safetensors", "clip_skip": 2.0, "width": 832,
    "height": 1216, "guidance_scale": 5.5, "guidance_rescale": 0.7, "negative_prompt": "blurry",
    "prompt": "a cat", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "loras": [("a.safetensors", 0.5, 0.8), ("s/b.safetensors", 0.0, -0.3)],
}  # fmt: skip


def workflow(prompt, old=False):
    """The editor's format of a graph of the API's."""
    links, nodes = [], []
    for key, one in prompt.items():
        given, slots = one["inputs"], []
        for name, value in given.items():
            if isinstance(value, list):
                links.append([len(links), int(value[0]), value[1], int(key), len(slots), "*"])
                slots.append({"name": name, "type": "*", "link": len(links) - 1})
        names = read_recipe.WIDGETS.get(one["class_type"], "value").split()
        values = [given.get(name, "randomize" if "control" in name else None) for name in names]
        if old:
            values = [value for value in values if value != "randomize"]
        nodes.append({"id": int(key), "type": one["class_type"], "mode": 0, "inputs": slots})
        nodes[-1]["widgets_values"] = values
    return {"nodes": nodes, "links": links}


def write_image(path, exif=None, **texts):
    """A small image with text chunks, or with a UserComment."""
    chunks, more = PngImagePlugin.PngInfo(), {}
    for key, text in texts.items():
        chunks.add_text(key, text if isinstance(text, str) else json.dumps(text))
    if exif is not None:
        more["exif"] = Image.Exif()
        more["exif"].get_ifd(0x8769)[0x9286] = exif
    Image.new("RGB", (8, 8)).save(path, **({"pnginfo": chunks} if texts else more))
    return path


def test_parameters_are_read(tmp_path):
    """From a PNG, and from UserComment of a JPEG and a WebP in either order of bytes."""
    files = [write_image(tmp_path / "a.png", parameters=A1111)]
    for name, codec in ("b.jpg", "utf-16-be"), ("c.webp", "utf-16-le"):
        files.append(write_image(tmp_path / name, b"UNICODE\0" + A1111.encode(codec)))
    files.append(write_image(tmp_path / "d.jpg", b"ASCII\0\0\0" + A1111.encode()))
    for file in files:
        settings, notes = read_recipe.read(file)
        prompt = settings.pop("prompt")
        assert prompt.startswith("masterpiece, (a cat:1.2), {red|blue} __colour__,")
        assert settings == TAKEN
        assert notes == ["Hires upscale: 2", "Hires upscaler: a, b: c"]


@pytest.mark.parametrize("form", ["prompt", "workflow", "old workflow"])
def test_comfyui_is_read(tmp_path, form):
    """Both formats, along the links of the sampler whose image is saved; the rest is named."""
    data = PROMPT if form == "prompt" else workflow(PROMPT, form.startswith("old"))
    settings, notes = read_recipe.read(write_image(tmp_path / "a.png", **{form[-8:]: data}))
    assert settings == COMFY
    assert notes == [
        "KSampler (node 17), after or beside node 11",
        "FreeU_V2 (node 6)",
        "ControlNetApplyAdvanced (node 12)",
    ]


def test_a_bypassed_node_hands_on(tmp_path):
    """A LoRA that is switched off in the editor is not taken, what is before it is."""
    data = workflow(PROMPT)
    next(node for node in data["nodes"] if node["id"] == 2)["mode"] = 4
    settings, _ = read_recipe.read(write_image(tmp_path / "a.png", workflow=data))
    assert settings == COMFY | {"loras": COMFY["loras"][1:]}


STRANGE = {
    "nothing": {},
    "other texts": {"Title": "a", "Comment": '{"prompt": "x"}'},
    "no JSON": {"prompt": "{", "workflow": "[]"},
    "another program's": {"parameters": '{"sui_image_params": {"prompt": "x"}}'},
    "only a prompt": {"parameters": "a cat"},
    "empty": {"parameters": "", "prompt": " "},
    "a list": {"prompt": [1, 2], "workflow": [None]},
    "odd nodes": {"prompt": {"1": 3, "2": {"class_type": None}, "3": node("KSampler", cfg={})}},
    "no inputs": {"prompt": {"1": {"class_type": "KSampler", "inputs": [1]}}},
    "odd links": {"workflow": {"nodes": [{"id": 1, "type": "KSampler"}, 3], "links": [[1], 2]}},
    "no number": {"parameters": "a\nSteps: 2, CFG scale: much, Size: 8x8"},
    "odd weight": {"parameters": "a <lora:x:much>\nSteps: 2, CFG scale: 7, Size: 8x8"},
    "deep": {"prompt": "[" * 100000},
    "infinite": {"prompt": {"1": node("KSampler", cfg=float("inf"))}},
    "infer without": {"infer_args": '{"fingerprint": "0"}'},
    "infer, odd": {"infer_args": '{"base_model": "x", "lora": "y", "loras": []}'},
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_images(tmp_path, case):
    """One line that says what is wrong."""
    file = write_image(tmp_path / "a.png", **STRANGE[case])
    with pytest.raises(SystemExit, match=f"^error: --from_image {file}: ") as end:
        make_teacher.main(["--from_image", str(file), "--output", str(tmp_path / "new")])
    assert "\n" not in str(end.value) and [*tmp_path.iterdir()] == [file]


def test_no_image_and_a_huge_chunk(tmp_path):
    """Other files, folders, cut images; a compressed chunk that unpacks to more than is read."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a" * 2**23, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "zip.png", pnginfo=chunks)
    whole = write_image(tmp_path / "whole.png", parameters="x" * 3000).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("zip.png", "cut.png", "empty.png", "folder.png"):
        with pytest.raises(ValueError, match="^(not a readable image|it holds nothing)"):
            read_recipe.read(tmp_path / name)


def test_loops_and_flat_texts():
    """Links that go round end; one line that holds everything is taken apart."""
    loop = PROMPT | {"3": node("LoraLoaderModelOnly", lora_name="b", strength_model=1,
                               model=["6", 0])}  # fmt: skip
    settings, _ = read_recipe.from_prompt(json.dumps(loop))
    assert "base" not in settings and settings["guidance_scale"] == 5.5
    flat = "a cat Negative prompt: a dog Steps: 20, Sampler: Euler, CFG scale: 7, Model: m"
    settings, _ = read_recipe.from_parameters(flat)
    assert settings == {
        "prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 7.0, "base": "m",
        "loras": [],
    }  # fmt: skip


def test_long_texts_take_no_time():
    """Runs of one sign, which a careless pattern would read again from each of them."""
    start = time.monotonic()
    for sign in (" ", "a", ",", ":", '"', "a:", '"a:', "<lora:", "Steps: ", "A:b, ", "(", "\n"):
        for text in (
            sign * 100000,
            "Steps: 2, " + sign * 100000,
            "\nNegative prompt:" + sign * 9999,
        ):
            with contextlib.suppress(ValueError):
                read_recipe.from_parameters(text)
    assert time.monotonic() - start < 10


def test_infers_names_are_paths_or_hub_ids(tmp_path, capsys):
    """A base of the Hub is taken by its id, as is a file that is there, before any of --models."""
    said = {"base_model": "user/repo", "loras": [["lcm", 1], ["ink", 0.5]], "lora": "lcm"}
    said |= {"style_lora": [[str(tmp_path / "ink.safetensors"), 0.5]], "guidance_scale": 1.5}
    (tmp_path / "ink.safetensors").touch()
    (tmp_path / "repo.safetensors").touch()
    image = write_image(tmp_path / "a.png", infer_args=said)
    args = make_teacher.parse_args(["--from_image", str(image), "--output", str(tmp_path / "t")])
    make_teacher.take_image(args)
    assert args.base == "user/repo"
    assert args.loras == [(str(tmp_path / "ink.safetensors"), (0.5, 0.5))]
    # Its guidance is not the teacher's, unless the LoRA keeps the teacher's
    assert args.guidance_scale is None
    assert "not mapped: guidance_scale 1.5: the LCM-LoRA's" in capsys.readouterr().out
    image = write_image(tmp_path / "b.png", infer_args=said | {"keeps_guidance": True})
    args = make_teacher.parse_args(["--from_image", str(image), "--output", str(tmp_path / "t")])
    make_teacher.take_image(args)
    assert args.guidance_scale == 1.5
    assert "guidance_scale 1.5 is of few steps" in capsys.readouterr().err


def test_lora_without_a_way_to_the_text_encoder():
    """It has its strength_clip there, which is said."""
    graph = PROMPT | {"12": node("Odd", a=["8", 0], b=["9", 0])}
    settings, notes = read_recipe.from_prompt(json.dumps(graph))
    assert settings["loras"] == COMFY["loras"]
    assert "the way to the text encoders" in notes[-1] and "negative_prompt" not in settings


def test_models_are_found(tmp_path):
    """In any case, with or without ending, below subfolders as UIs write them."""
    for (
        name
    ) in "a/Ink.safetensors b/v1.5.safetensors b/c/fog.safetensors d/fog.safetensors".split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / name)
    save_file({"model.diffusion_model.x": torch.ones(1)}, tmp_path / "INK.safetensors")
    (tmp_path / "old.ckpt").touch()
    (tmp_path / "my-lora").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "my-lora" / "pytorch_lora_weights.safetensors")
    os.symlink(tmp_path, tmp_path / "b" / "round")
    models = read_recipe.list_models([tmp_path, tmp_path / "a"])

    def found(name, kind="LoRA"):
        return read_recipe.find(name, models, kind).relative_to(tmp_path).as_posix()

    assert found("ink") == found("a\\INK.safetensors") == "a/Ink.safetensors"
    assert found("INK", "base") == found("ink [0123456789]", "base") == "INK.safetensors"
    assert found("v1.5") == found("V1.5.SAFETENSORS") == found("x/v1.5") == "b/v1.5.safetensors"
    assert found("c/fog") == found("c_fog") == found("b\\c\\fog.safetensors")
    assert found("d/fog.safetensors") == "d/fog.safetensors" and found("my-lora") == "my-lora"
    for name, message in ("fog", "is one of 2: .*c/fog.*d/fog"), ("no", "is not there"), (
        "old.ckpt", "pickled"):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            found(name)


def test_from_image_to_a_teacher(kit, tmp_path, capsys):
    """Weights that differ between text encoder and UNet; flags win; the rest is printed."""
    base, (one, two), vae = kit["sd15"]
    models = tmp_path / "models"
    shutil.copytree(base, models / "checkpoints" / "base, of mine")
    (models / "loras" / "sub").mkdir(parents=True)
    for file, name in (one, "Ink"), (two, "sub/FOG"):
        shutil.copy(file, models / "loras" / f"{name}.safetensors")
    text = A1111.replace("<lora:Te:te=0.1:unet=0.2>", "").replace("my.vae.safetensors", "None")
    image = write_image(tmp_path / "good image.png", parameters=text)
    words = ["--from_image", image, "--models", models, "--guidance_scale", 3]
    folder = make(*words, "--vae", vae, "--output", tmp_path / "t")
    out, err = capsys.readouterr()
    assert "not mapped: Hires upscale: 2" in out and "from the image: clip_skip 2" in out
    assert "(UNet -0.25, text encoders 0.5)" in out and "guidance_scale 6.5" not in out
    assert "(a cat:1.2) is a UI's" in err and "--max_prompt_chunks" in err
    recipe = json.loads((folder / "recipe.json").read_text())
    made = recipe.pop("made_from")
    assert recipe == {
        "format": 1, "negative_prompt": TAKEN["negative_prompt"], "guidance_scale": 3,
        "guidance_rescale": 0.7, "width": 832, "height": 1216,
    }  # fmt: skip
    assert made["image"] == "good image.png" and made["base"] == "base, of mine"
    assert made["style_loras"][1] == {"name": "FOG", "weight": -0.25, "text_encoder_weight": 0.5}
    weights = [(one, 0.7), (two, {"unet": -0.25, "text_encoder": 0.5})]
    theirs = generate(by_hand(base, weights, vae), 1)
    assert np.abs(generate(DiffusionPipeline.from_pretrained(folder)) - theirs).max() < 1e-4
    (models / "checkpoints" / "FOG.safetensors").write_bytes(two.read_bytes())
    shutil.rmtree(models / "checkpoints" / "base, of mine")
    (models / "loras" / "Ink.safetensors").unlink()
    with pytest.raises(SystemExit, match="base 'base, of mine' .*; LoRA 'ink' of the image is not"):
        make(*words, "--vae", vae, "--output", tmp_path / "u")


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_images_of_infer(kit, tmp_path, capsys, ending):
    """Their settings come back; the LCM-LoRA is left out by name."""
    import infer

    base, (one, two), _ = kit["sd15"]
    lcm = write_lora(DiffusionPipeline.from_pretrained(base), tmp_path / "lcm.safetensors", 5,
                     False, LCM)  # fmt: skip
    words = ["--lora", lcm, "--base_model", base, "--style_lora", f"{one}:0.6", f"{two}:-0.2"]
    words += ["--guidance_scale", 1.5, "--negative_prompt", "dog", "--steps", 1, "--width", 24]
    words += ["--height", 32, "--prompt", "a", "--output", tmp_path / f"x{ending}"]
    infer.main([*map(str, words)])
    settings, notes = read_recipe.read(tmp_path / f"x{ending}")
    assert settings == {
        "prompt": "a", "negative_prompt": "dog", "width": 24, "height": 32,
        "base": str(base), "paths": True, "loras": [(str(one), 0.6, 0.6), (str(two), -0.2, -0.2)],
    }  # fmt: skip
    assert notes == [
        "the LCM-LoRA lcm: a teacher is the model without it",
        "guidance_scale 1.5: the LCM-LoRA's",
    ]
    make("--from_image", tmp_path / f"x{ending}", "--output", tmp_path / "t")
    with safe_open(tmp_path / "t" / "unet" / WEIGHTS, "pt") as file:
        assert len([*file.keys()]) > 10
