"""infer.py on a tiny Stable Diffusion 1.5: what it generates, what it says, what it refuses."""

import errno
import json
import pickle
import random
import re
import shutil
import sys

import pytest
import torch
from conftest import DEVICE, ROOT, load_script
from conftest import run as run_program
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_file import as_single_file

compare = load_script("scripts/compare.py")
infer = compare.infer

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
)
TARGETS += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def make_base(folder, channels=(32, 64)):
    """Write a pipeline of 32 px images (latents 16 x 16) with random weights."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    # The byte letters of CLIP's tokenizer, each alone and at the end of a word.
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + index) for index in range(256 - len(letters))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({word: index for index, word in enumerate(words)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    text = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    blocks = {"block_out_channels": channels, "norm_num_groups": 8}
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**text, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            **blocks,
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_lora(unet, path, base, rank=8, alpha=4, **header):
    """Write random LoRA weights for every target of `unet` in this project's layout."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in unet.named_modules():
        if name.endswith(TARGETS) and hasattr(module, "weight"):
            shape, key = module.weight.shape, "lora_unet_" + name.replace(".", "_")
            down, up = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
            tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    metadata = {
        "format": "pt",
        "lcm_lora_version": "1",
        "base_model": str(base),
        "family": "sd15",
        "rank": str(rank),
    }
    metadata |= {
        "alpha": str(alpha),
        "num_ddim_timesteps": "50",
        "w_min": "3.0",
        "w_max": "5.0",
        "step": "600",
        "training_args": "{}",
    }
    save_file(tensors, path, metadata | header)
    return len(tensors) // 3


def make_tiny_vae(folder, factor=4, **settings):
    """An AutoencoderTiny with random weights."""
    from diffusers import AutoencoderTiny

    blocks = {2: 2, 4: 3, 8: 4}[factor]
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        **settings,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A base, a base with other widths, and a LoRA of the first in a training output folder."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("tiny")
    make_base(folder / "base")
    make_base(folder / "wide", (32, 96))
    (folder / "run").mkdir()
    unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    count = make_lora(unet, folder / "run" / WEIGHTS_NAME, folder / "base")
    return folder, count


def start(*words):
    """infer.main; a grid by this process's own scripts/compare.py, in which tests replace parts."""
    words = [*map(str, words)]
    if "--prompt" in words or "--prompts_file" in words:
        words.append("--overwrite")  # a test asks for an image, not for one that is there
    if "--compare" in words:
        compare.compare(infer.parse_args(words))
    else:
        infer.main(words)


def run(folder, *flags, lora="run"):
    """Generate, in float32."""
    start("--lora", folder / lora, *DEVICE, *flags)


def difference(a, b):
    """Largest difference of two images, in levels of 255."""
    channels = ImageChops.difference(Image.open(a), Image.open(b)).getextrema()
    return max(high for _, high in channels)


def test_generates_and_reports(tiny, tmp_path, capsys):
    """One image with its settings inside; every layer is counted; the LoRA changes the image."""
    folder, count = tiny
    run(folder, "--prompt", "a cat, big", "--output", tmp_path / "new" / "x.png", "--seed", 3)
    out = capsys.readouterr().out
    line = f"LoRA: {count} of {count} layers loaded (rank 8, alpha 4, "
    line += f"trained from {folder / 'base'}, 600 steps)"
    assert line in out
    assert re.search(r"x.png\n4 steps: \S+ s/image \(no batch came after the warm-up\)\n$", out)
    image = Image.open(tmp_path / "new" / "x.png")
    assert image.size == (32, 32)
    prompt, last = image.text["parameters"].split("\n")
    assert prompt == "a cat, big <lora:run:1>"
    assert last == "Steps: 4, Sampler: LCM, CFG scale: 1, Seed: 3, Size: 32x32, Model: base"
    settings = json.loads(image.text["infer_args"])
    assert (
        settings["seed"] == 3
        and settings["dtype"] == "float32"
        and settings["base_model"] == str(folder / "base")
    )
    run(
        folder,
        "--prompt",
        "a cat, big",
        "--output",
        tmp_path / "off.png",
        "--seed",
        3,
        "--lora_scale",
        0,
    )
    assert difference(tmp_path / "new" / "x.png", tmp_path / "off.png") > 8


def test_same_as_diffusers(tiny, tmp_path):
    """Rank 8, alpha 4: the image is what a user's own diffusers pipeline generates."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    folder, _ = tiny
    run(folder, "--prompt", "a cat", "--output", tmp_path / "x.png")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(folder / "run" / WEIGHTS_NAME)
    generator = torch.Generator("cpu").manual_seed(0)
    pipe("a cat", num_inference_steps=4, guidance_scale=1, generator=generator).images[0].save(
        tmp_path / "y.png"
    )
    assert difference(tmp_path / "x.png", tmp_path / "y.png") <= 1  # infer.py fuses: rounding


def test_an_image_does_not_depend_on_its_batch(tiny, tmp_path):
    """Two prompts, two images each: four files, alike at every batch size, from a seed each."""
    folder, _ = tiny
    for size in (1, 3):
        flags = ("--prompt", "a", "b", "--num_images", 2, "--batch_size", size)
        run(folder, *flags, "--output", tmp_path / str(size) / "x.png")
    assert sorted(file.name for file in (tmp_path / "3").iterdir()) == [
        f"x-{index}.png" for index in range(4)
    ]
    for index in range(4):
        assert difference(tmp_path / "1" / f"x-{index}.png", tmp_path / "3" / f"x-{index}.png") <= 1
    run(folder, "--prompt", "b", "--seed", 3, "--output", tmp_path / "last.png")
    assert difference(tmp_path / "last.png", tmp_path / "3" / "x-3.png") <= 1
    assert difference(tmp_path / "3" / "x-2.png", tmp_path / "3" / "x-3.png") > 8


def test_prompts_are_generated_together(tiny, tmp_path, monkeypatch):
    """Five prompts at --batch_size 2 are three calls of the UNet in one step: 2, 2 and 1 images."""
    from diffusers import UNet2DConditionModel

    sizes, forward = [], UNet2DConditionModel.forward
    monkeypatch.setattr(
        UNet2DConditionModel,
        "forward",
        lambda self, x, *a, **k: sizes.append(len(x)) or forward(self, x, *a, **k),
    )
    flags = ("--steps", 1, "--batch_size", 2, "--output", tmp_path / "x.png")
    run(tiny[0], "--prompt", *"abcde", *flags)
    assert sizes == [2, 2, 1]


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and what the test compiles is forgotten; counts the graphs."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compile(tmp_path, capsys, fresh_compiler):
    """Compiled blocks generate what uncompiled ones do, to 2 levels of 255."""
    from diffusers import UNet2DConditionModel

    make_base(tmp_path / "base", (32, 32))  # of one width: one kind of block
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base", subfolder="unet")
    make_lora(unet, tmp_path / "lora.safetensors", tmp_path / "base")
    for name, flags in ("plain", ()), ("compiled", ("--compile",)):
        flags += ("--prompt", "a cat", "a dog", "--output", tmp_path / f"{name}.png")
        run(tmp_path, *flags, lora="lora.safetensors")
        assert fresh_compiler() == (
            0 if name == "plain" else 2
        )  # a check of the compiler, one code for all blocks
    for index in range(2):
        assert difference(tmp_path / f"plain-{index}.png", tmp_path / f"compiled-{index}.png") <= 2
    assert capsys.readouterr().err == ""


def test_compile_in_a_grid(tiny, tmp_path, monkeypatch, fresh_compiler):
    """Compiled code follows the LoRA going on and off; columns are timed after compilation.

    Here it is not lowered to C++, which takes most of the time.
    """
    from diffusers import UNet2DConditionModel

    cells, grid, compile_blocks = [], compare.grid, UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        compare, "grid", lambda columns, *rest: cells.append(columns) or grid(columns, *rest)
    )
    monkeypatch.setattr(
        UNet2DConditionModel,
        "compile_repeated_blocks",
        lambda *a, **k: compile_blocks(*a, **k, backend="aot_eager"),
    )
    steps, generate = [], infer.generate
    monkeypatch.setattr(infer, "generate", lambda *args: steps.append(args[4]) or generate(*args))
    flags = ("--prompt", "a cat", "--compare", "--scheduler", "lcm", "ddim", "tcd", "--steps", 2)
    for compiled in (), ("--compile",):
        run(tiny[0], *flags, "--output", tmp_path / "grid.png", *compiled)
    assert fresh_compiler() > 4 and steps == [1, 2, 1, 2, 2] + [1, 2] * 3
    for columns in zip(*cells):
        for name, column in zip(("plain", "compiled"), columns):
            column["images"][0].save(tmp_path / f"{column['scheduler']}-{name}.png")
    for name in "lcm", "ddim", "tcd":
        assert difference(tmp_path / f"{name}-plain.png", tmp_path / f"{name}-compiled.png") <= 2
    assert difference(tmp_path / "lcm-compiled.png", tmp_path / "ddim-compiled.png") > 8


def test_compile_without_a_compiler(tiny, tmp_path, monkeypatch, fresh_compiler):
    """One line, which names the flag, before a base is read."""
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("the base was read"))
    with pytest.raises(
        SystemExit, match="^error: --compile does not work here .*no-such-compiler.* needs a C"
    ) as caught:
        run(tiny[0], "--prompt", "a", "--compile", "--output", tmp_path / "x.png")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_file_may_have_moved(tiny, tmp_path, monkeypatch):
    """A relative base model in the header is found here and next to infer.py."""
    folder, _ = tiny
    tensors = load_file(folder / "run" / WEIGHTS_NAME)
    save_file(tensors, tmp_path / "style.safetensors", {"base_model": "base"})
    for change in (
        lambda: monkeypatch.chdir(folder),
        lambda: monkeypatch.setattr(infer, "HERE", folder),
    ):
        monkeypatch.chdir(tmp_path)
        change()
        run(
            tmp_path,
            "--prompt",
            "a",
            "--steps",
            1,
            "--output",
            tmp_path / "x.png",
            lora="style.safetensors",
        )
        assert " <lora:style:1>" in Image.open(tmp_path / "x.png").text["parameters"]


def rename(folder, target, style):
    """Write the LoRA without alphas under `unet.` keys; `style(layer)` is peft or old."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    names = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in unet.named_modules()}
    tensors = {}
    for key, tensor in load_file(folder / "run" / WEIGHTS_NAME).items():
        layer, _, part = key.partition(".")
        if part != "alpha":
            words = {"peft": ("lora_A", "lora_B"), "old": ("lora.down", "lora.up")}[style(layer)]
            tensors[f"unet.{names[layer]}.{words[part == 'lora_up.weight']}.weight"] = tensor
    save_file(tensors, target)


@pytest.mark.parametrize(("style", "dtype"), [("peft", "bf16"), ("old", "fp32")])
def test_other_layouts_load_completely(tiny, tmp_path, capsys, style, dtype):
    """Files in diffusers' own layouts, without a header; the comparison holds in bf16 too."""
    folder, count = tiny
    rename(folder, tmp_path / "other.safetensors", lambda layer: style)
    flags = (
        "--prompt",
        "a",
        "--steps",
        1,
        "--output",
        tmp_path / "x.png",
        "--base_model",
        folder / "base",
    )
    run(tmp_path, *flags, "--dtype", dtype, lora="other.safetensors")
    assert f"LoRA: {count} of {count} layers loaded (rank 8, alpha 8)" in capsys.readouterr().out


def test_defect_2_mixed_naming_loads_completely(tiny, tmp_path, capsys):
    """Attention as lora.down/up, the rest as lora_A/B: the same image as in one naming."""
    folder, count = tiny
    rename(
        folder, tmp_path / "mixed.safetensors", lambda layer: "old" if "attn" in layer else "peft"
    )
    rename(folder, tmp_path / "one.safetensors", lambda layer: "peft")
    for name in ("mixed", "one"):
        flags = (
            "--prompt",
            "a",
            "--steps",
            1,
            "--output",
            tmp_path / f"{name}.png",
            "--base_model",
            folder / "base",
        )
        run(tmp_path, *flags, lora=f"{name}.safetensors")
    mixed, one = (line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA"))
    with safe_open(tmp_path / "mixed.safetensors", "pt") as file:
        keys = list(file.keys())
    old, peft = (sum(word in key for key in keys) for word in ("lora.down", "lora_A"))
    assert old and peft and old + peft == count
    assert mixed.startswith(f"LoRA: {count} of {count} layers loaded")
    assert (
        f"{peft} as lora_A/B" in mixed
        and f"{old} as lora.down/up" in mixed
        and "Hugging Face" not in one
    )
    assert difference(tmp_path / "mixed.png", tmp_path / "one.png") == 0


def test_defect_4_wrong_scaling_stops(tiny, tmp_path, monkeypatch):
    """A loader that forgets alpha is caught."""
    folder, _ = tiny
    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

    load = UNet2DConditionModel.add_adapter

    def forget(unet, *args, **kwargs):
        load(unet, *args, **kwargs)
        for module in unet.modules():
            if isinstance(module, LoraLayer):
                module.scaling = dict.fromkeys(module.scaling, 1.0)

    monkeypatch.setattr(UNet2DConditionModel, "add_adapter", forget)
    with pytest.raises(
        SystemExit, match="error: .* 0 of .* loaded, first missing or different: unet.down_blocks"
    ):
        run(folder, "--prompt", "a", "--output", tmp_path / "x.png")


def test_compare(tiny, tmp_path, capsys, monkeypatch):
    """8 columns, headers, prompts; the teacher is the base to the bit, LCM cells are as alone."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder, _ = tiny
    cells, grid = [], compare.grid
    monkeypatch.setattr(
        compare, "grid", lambda columns, *rest: cells.extend(columns) or grid(columns, *rest)
    )
    prompts = ["a cat", "a very long prompt " * 20 + "Supercalifragilisticexpialidocious" * 3]
    flags = ("--batch_size", 1, "--seed", 5)
    run(folder, "--prompt", *prompts, "--compare", "--output", tmp_path / "grid.png", *flags)
    out = capsys.readouterr().out
    for text in (
        "DDIM, 50 steps: 100 UNet passes, ",
        "Solver++, 1 step: 2 UNet passes",
        "LoRA, 8 steps: 8 UNet passes",
    ):
        assert text in out

    sheet = Image.open(tmp_path / "grid.png")
    columns = json.loads(sheet.text["infer_args"])["columns"]
    assert [column["passes"] for column in columns] == [100, 2, 4, 8, 1, 2, 4, 8]
    assert {column["guidance"] for column in columns[:4]} == {5.0} and all(
        column["seconds"] > 0 for column in columns
    )
    assert sheet.width >= 9 * 128 and sheet.height >= 2 * 128

    def ink(*box):
        return sum(sheet.convert("L").crop(box).histogram()[:128])

    top = sheet.height - 2 * 128 - 20
    assert ink(180, 0, sheet.width, top) > 500
    assert all(ink(0, top + 134 * row, 170, top + 134 * row + 128) > 20 for row in range(2))

    pipe = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    generator = torch.Generator("cpu").manual_seed(5)
    teacher = pipe("a cat", num_inference_steps=50, guidance_scale=5.0, generator=generator).images[
        0
    ]
    assert teacher.tobytes() == cells[0]["images"][0].tobytes()
    run(folder, "--prompt", "a cat", *flags, "--output", tmp_path / "lcm.png")
    cells[6]["images"][0].save(tmp_path / "cell.png")
    assert (
        difference(tmp_path / "lcm.png", tmp_path / "cell.png") <= 1
    )  # there the LoRA is fused: rounding


@pytest.mark.parametrize("program", ["infer.py --compare", "scripts/compare.py"])
def test_the_programs_that_make_grids(tiny, tmp_path, program):
    """Both, started by a user, are the compare module's grid: the same columns and cells."""
    words = ["--lora", tiny[0] / "run", "--prompt", "a", "--steps", 2, "--output"]
    start(*words, tmp_path / "here.png", "--compare", *DEVICE)
    name, *flag = program.split()
    done = run_program(
        sys.executable, ROOT / name, *words, tmp_path / "there.png", *flag, *DEVICE[2:]
    )
    assert done.returncode == 0 and "LCM-LoRA, 2 steps: 2 UNet passes, " in done.stdout, done.stderr
    here, there = (Image.open(tmp_path / f"{name}.png") for name in ("here", "there"))
    ours, theirs = (json.loads(image.text["infer_args"]) for image in (here, there))
    for settings in ours, theirs:
        for column in settings["columns"]:
            del column["seconds"]
        del settings["device"]
    assert ours == theirs and len(ours["columns"]) == 2
    cells = (180, here.height - 128 - 10, here.width, here.height)
    assert here.crop(cells).tobytes() == there.crop(cells).tobytes()


@pytest.mark.parametrize(
    ("program", "words"),
    [("compare.py", ["--compare", "--prompt", "a"]), ("fuse_lora.py", ["--fused_output", "new"])],
)
def test_a_program_is_missing(tmp_path, program, words):
    """infer.py copied alone says what it needs, in one line, and does the rest alone."""
    shutil.copy(ROOT / "infer.py", tmp_path)
    lora = ("--lora", tmp_path / "none.safetensors")
    done = run_program(sys.executable, "infer.py", *lora, *words, cwd=tmp_path)
    says = f"{words[0]} needs scripts/{program} beside infer.py: copy it there too"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {says}\n")
    done = run_program(sys.executable, "infer.py", *lora, "--prompt", "a", cwd=tmp_path)
    assert done.stderr.endswith("none.safetensors: no such file or folder\n")


def test_help():
    """Three lines of usage, every flag with its default and unit, and no library loaded."""
    code = "import runpy, sys; sys.argv = ['infer.py', '--help']\n"
    code += "try: runpy.run_path('infer.py', run_name='__main__')\n"
    done = run_program(
        sys.executable,
        "-c",
        code + "except SystemExit: print('torch' in sys.modules)",
        COLUMNS="100",
    )
    usage, _, page = done.stdout.partition("\n\n")
    assert usage.startswith("usage: infer.py --lora PATH") and len(usage.splitlines()) == 3
    assert page.endswith("False\n")
    for flag in vars(infer.parse_args(["--lora", "x", "--prompt", "a"])):
        assert re.search(f"--{flag}[ ,]", page), flag
    for part in (
        "--height PIXELS",
        "--batch_size IMAGES",
        "(default: 4)",
        "(default: as the LoRA says)",
        "(default: lcm.png)",
    ):
        assert part in page, part
    assert "default: None" not in page and "default: False" not in page


def bad_file(kind, folder, path):
    """Write a damaged copy of the LoRA."""
    good = folder / "run" / WEIGHTS_NAME
    tensors = load_file(good)
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    if kind == "incomplete":
        del tensors[first]
    if kind == "nan":
        tensors[first][0, 0] = float("nan")
    if kind in ("incomplete", "nan", "no base"):
        save_file(tensors, path)
    elif kind == "no layer":
        save_file({}, path)
    else:
        path.write_bytes(
            {"truncated": good.read_bytes()[:5000], "empty": b"", "pickle": pickle.dumps({"a": 1})}[
                kind
            ]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("incomplete", "has no up matrix"),
        ("nan", "1 of .* tensors hold NaN"),
        ("truncated", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("pickle", "not a whole safetensors file"),
        ("no layer", "contains no LoRA layer"),
        ("no base", "give --base_model"),
    ],
)
def test_bad_file(tiny, tmp_path, kind, message):
    """A damaged file ends with one line that names it, before any base model is loaded."""
    bad_file(kind, tiny[0], tmp_path / "bad.safetensors")
    with pytest.raises(SystemExit, match=f"^error: .*bad.safetensors.*{message}") as caught:
        run(tmp_path, "--prompt", "a", "--output", tmp_path / "x.png", lora="bad.safetensors")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.gif"], r"--output x.gif: must name a file that ends in .png, .jpg"),
        (["--steps", "0"], "--steps.*from 1 to"),
        (["--steps", "51"], "--steps 51: must be from 1 to 50"),
        (["--num_images", "2", "--compare"], "does not go with --compare"),
        (["--height", "60"], "--height 60: must be a multiple of 8, e.g. 64"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--base_model", "./nowhere"], "nowhere: no such file or folder; give --base_model"),
        (
            ["--base_model", "nowhere.safetensors"],
            "nowhere.safetensors: no such file or folder; give --base_model",
        ),
        (
            ["--base_config", "x"],
            "--base_config has no effect: base model .*base is no .safetensors file",
        ),
        (["--lora", "nowhere"], "--lora nowhere: no such file or folder"),
        (["--lora", "."], f"--lora .: no {WEIGHTS_NAME} or .* in this folder"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_bad_flag(tiny, tmp_path, monkeypatch, flags, message):
    """A bad flag ends with one line that names it and what would be valid."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(tiny[0], "--prompt", "a", *flags)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_lora_of_another_base(tiny, tmp_path):
    """Other channel widths: the message names family, base and the first layer in question."""
    folder, _ = tiny
    with pytest.raises(
        SystemExit,
        match=r"trained for sd15 .*base, it does not fit .*wide: layer unet.down_blocks_1",
    ):
        run(
            folder, "--prompt", "a", "--base_model", folder / "wide", "--output", tmp_path / "x.png"
        )
    assert not (tmp_path / "x.png").exists()


LAYOUTS = {"sd15": "Stable Diffusion 1.x / 2.x", "sdxl": "SDXL", "ssd1b": "SSD-1B"}


@pytest.fixture(scope="session")
def layouts(make_teacher):
    """{layout: (folder, the same base in one file, a LoRA whose header has their names)}."""
    from diffusers import UNet2DConditionModel

    made = {}
    for layout in LAYOUTS:
        folder = make_teacher(layout)
        file, lora = as_single_file(folder), folder / "lora.safetensors"
        family, settings = (
            "sd15" if layout == "sd15" else "sdxl",
            json.dumps({"teacher_config": folder.name}),
        )
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        make_lora(unet, lora, file.name, family=family, training_args=settings)
        made[layout] = folder, file, lora
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_base_in_one_file(layouts, tmp_path, monkeypatch, layout):
    """The file generates what the folder does, named by flags or by the header."""
    folder, file, lora = layouts[layout]
    flags = ("--prompt", "a cat", "--steps", 2, "--output")
    run(folder, *flags, tmp_path / "folder.png", "--base_model", folder, lora=lora.name)
    run(
        folder,
        *flags,
        tmp_path / "flags.png",
        "--base_model",
        file,
        "--base_config",
        folder,
        lora=lora.name,
    )
    monkeypatch.setattr(infer, "HERE", file.parent)
    run(folder, *flags, tmp_path / "file.png", lora=lora.name)
    # Weights elsewhere in memory may be multiplied in another order: one level is rounding.
    assert difference(tmp_path / "folder.png", tmp_path / "flags.png") <= 1
    assert difference(tmp_path / "folder.png", tmp_path / "file.png") <= 1
    settings = json.loads(Image.open(tmp_path / "file.png").text["infer_args"])
    assert (settings["base_model"], settings["base_config"]) == (file.name, folder.name)


def test_tiny_vae_with_a_base_in_one_file(layouts, tmp_path, monkeypatch):
    """The file's own VAE is not made; the image is that of the folder."""
    from diffusers import AutoencoderKL

    folder, file, lora = layouts["sd15"]
    monkeypatch.setattr(
        AutoencoderKL, "__init__", lambda *args, **kwargs: pytest.fail("the VAE was made")
    )
    flags = ("--prompt", "a", "--tiny_vae", make_tiny_vae(tmp_path / "vae"), "--output")
    run(folder, *flags, tmp_path / "folder.png", "--base_model", folder, lora=lora.name)
    run(
        folder,
        *flags,
        tmp_path / "file.png",
        "--base_model",
        file,
        "--base_config",
        folder,
        lora=lora.name,
    )
    assert difference(tmp_path / "folder.png", tmp_path / "file.png") <= 1
    wrong = make_tiny_vae(tmp_path / "wrong", factor=8)
    flags = ("--tiny_vae", wrong, "--base_model", file, "--base_config", folder)
    refused(
        lora,
        f"--tiny_vae {wrong} is for latents of 4 channels and a side of 1/8; ",
        tmp_path / "x.png",
        *flags,
    )


def test_layout_by_names(layouts):
    """The layout of a LoRA without a header and of a UNet; LoRAs of a part of it have none."""
    from diffusers import UNet2DConditionModel

    for layout, (folder, file, lora) in layouts.items():
        layers = infer.group_layers(lora, load_file(lora), {})
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        for names in (layers, load_file(file), [name for name, _ in unet.named_modules()]):
            assert infer.layout(names) == LAYOUTS[layout]
        assert infer.layout([name for name in layers if "conv" in name]) is None
        assert infer.layout([name for name in layers if name.startswith("unet.up_blocks")]) is None


def refused(lora, message, out, *flags):
    """infer.py ends with one line, which holds `message`, and generates nothing."""
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(lora.parent, "--prompt", "a", "--output", out, *flags, lora=lora.name)
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("lora", "base"), [("sd15", "sdxl"), ("sdxl", "sd15"), ("sdxl", "ssd1b"), ("ssd1b", "sdxl")]
)
def test_lora_of_another_layout(layouts, tmp_path, lora, base, one_file, capsys):
    """Both layouts are named; of an SSD-1B LoRA SDXL has all layers: it loads, with a warning."""
    ours, theirs = layouts[lora], layouts[base]
    says = rf"was trained for the {LAYOUTS[lora]} layout \(base {ours[1].name}\); "
    says += f"--base_model .* has the {LAYOUTS[base]} layout"
    flags = ("--base_model", theirs[one_file], "--base_config", theirs[0])
    flags = flags if one_file else flags[:2]
    if lora == "ssd1b":
        words = ("--prompt", "a", "--steps", 1, "--output", tmp_path / "x.png", *flags)
        run(ours[2].parent, *words, lora=ours[2].name)
        assert re.fullmatch(f"warning: LoRA .* {says}; .*\n", capsys.readouterr().err)
        return
    refused(ours[2], f"lora.safetensors {says}: layer unet", tmp_path / "x.png", *flags)
    if one_file:  # by the configs of the LoRA's own teacher, which the header names
        refused(ours[2], f"cannot be opened .*; .* {says}$", tmp_path / "x.png", *flags[:2])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("cond_stage_model", "cannot be opened .*CLIPTextModel.*; its configs are those of"),
        ("first_stage_model", "cannot be opened .*AutoencoderKL.*; its configs are those of"),
        ("model.diffusion_model.out.", "cannot be opened .*; its configs are those of"),
        (
            "cond_stage_model.transformer.text_model.final",
            "its tensors .* its configs .2 are missing, the first final_layer_norm",
        ),
    ],
)
def test_incomplete_base_in_one_file(layouts, tmp_path, start, message):
    """Nothing is generated with parts that are random or empty for want of tensors in the file."""
    folder, file, lora = layouts["sd15"]
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(start)}
    save_file(tensors, tmp_path / "part.safetensors")
    flags = ("--base_model", tmp_path / "part.safetensors", "--base_config", folder)
    refused(lora, f"part.safetensors:? {message}", tmp_path / "x.png", *flags)


def test_bad_base_in_one_file(layouts, tmp_path):
    """The line names the file or the flag that helps."""
    (folder, file, lora), (_, xl_file, xl_lora), (ssd1b, _, _) = layouts.values()
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "x.safetensors").write_bytes(file.read_bytes()[:5000])
    save_file(load_file(lora), tmp_path / "bare.safetensors")
    advice = "--base_config names others"
    for one, message, *flags in (
        (lora, "x.ckpt: .* pickled weights are not read", "--base_model", tmp_path / "x.ckpt"),
        (
            lora,
            "x.safetensors: not a whole safetensors file",
            "--base_model",
            tmp_path / "x.safetensors",
        ),
        (
            lora,
            "--variant has no effect: .* is one file",
            "--base_model",
            file,
            "--variant",
            "fp16",
        ),
        (
            lora,
            f"those of {folder.name}; {advice}",
            "--base_model",
            file,
        ),  # what the header names is not here
        (
            lora,
            f"those of /no/such/folder; {advice}",
            "--base_model",
            file,
            "--base_config",
            "/no/such/folder",
        ),
        (tmp_path / "bare.safetensors", f"those of the Hub; {advice}", "--base_model", file),
        (
            xl_lora,
            f"its tensors do not match its configs; .*{advice}",
            "--base_model",
            xl_file,
            "--base_config",
            ssd1b,
        ),
    ):
        refused(one, message, tmp_path / "x.png", *flags)


def test_warnings(tiny, tmp_path, capsys):
    """High guidance, and a negative prompt without it, are warned of; else stderr is empty."""
    folder, _ = tiny
    flags = ("--prompt", "a", "--steps", 1, "--output", tmp_path / "x.png")
    run(folder, *flags)
    assert capsys.readouterr().err == ""
    run(folder, *flags, "--negative_prompt", "b")
    assert "--negative_prompt does nothing here" in capsys.readouterr().err
    run(folder, *flags, "--negative_prompt", "b", "--guidance_scale", "7.5")
    assert "--guidance_scale 7.5" in capsys.readouterr().err
    assert "\nNegative prompt: b\n" in Image.open(tmp_path / "x.png").text["parameters"]


TEXTS = [
    "a cat",
    "",
    "\udcff",
    "x\ud800",
    "a " * 3000,
    "(red:1.3)",
    "\U0001f600",
    "\u2028",
    "%s{x}",
]
PATHS = [
    "no such",
    "x" * 300,
    "a/" * 3000,
    "~nobody/x",
    "",
    ".",
    "/",
    "a/b",
    "\udcff",
    "text",
    "\ud800",
]
NUMBERS = [
    "nan",
    "inf",
    "-1",
    "1e400",
    "9" * 5000,
    "0",
    "1",
    "2",
    "0x10",
    "\uff11",
    "",
    "1.5",
    "64",
]
VALUES = {
    "prompt": TEXTS, "negative_prompt": TEXTS, "lora": PATHS, "style_lora": PATHS, "image": PATHS,
    "mask": PATHS, "control_image": PATHS, "controlnet": PATHS, "vae": PATHS, "tiny_vae": PATHS,
    "base_model": PATHS, "base_config": PATHS, "variant": PATHS, "prompts_file": PATHS,
    "output": [f"{path}.png" for path in PATHS] + PATHS, "fused_output": PATHS, "steps": NUMBERS,
    "seed": NUMBERS, "width": NUMBERS, "height": NUMBERS, "strength": NUMBERS,
    "lcm_weight": NUMBERS, "guidance_scale": NUMBERS, "batch_size": NUMBERS, "num_images": NUMBERS,
    "device": ["cpu", "meta", "cuda:99", "nonsense", "\udcff"], "dtype": ["fp16", "bf16", "int8"],
    "scheduler": ["lcm", "euler", "pndm"], "controlnet_scale": NUMBERS, "compare_guidance": NUMBERS,
    "prediction_type": ["v_prediction", "epsilon", "v"], "max_prompt_chunks": NUMBERS,
    "guidance_rescale": NUMBERS,
}  # fmt: skip
JSON = ["{", "[" * 99999, "[[" * 490 + "]]" * 490, "9" * 5000, "NaN", '"\\ud800"', "null", "-1"]
JSON += ["1e999", "{}", "[]", "true", '"a"', '{"a": 1}', "3", "1", '"\\u0000"', "\udcff"]


def strange_case(random, folder):
    """A command line of infer.py and its files in `folder`: each but for one to three things good.

    Flags, prompt files, a LoRA's header and matrices, and the settings of PEFT beside it.
    """
    good = load_file(folder.parent / "good.safetensors")
    header = {"base_model": str(folder.parent / "base"), "num_ddim_timesteps": "50"}
    flags = {"prompt": "a", "lora": "lora.safetensors", "steps": "1", "output": "x.png"}
    lora = folder / "lora.safetensors"
    for _ in range(random.randint(1, 3)):
        kind = random.choice(["flag", "flag", "flag", "prompts", "header", "tensors", "config"])
        if kind == "flag":
            name = random.choice(sorted(VALUES))
            flags[name] = random.choice(VALUES[name])
        elif kind == "prompts":
            flags.pop("prompt", None)
            flags["prompts_file"] = random.choice(["p.txt", "p.jsonl"])
            keys = random.sample(("prompt", "seed", "width", "negative_prompt", "x"), 2)
            row = ", ".join(f'"{key}": {random.choice(JSON)}' for key in keys)
            lines = [f"{{{row}}}", random.choice(JSON), random.choice(TEXTS), '{"prompt": "a"}']
            text = random.choice(["\n", "\r\n"]).join(random.sample(lines, random.randint(0, 3)))
            (folder / flags["prompts_file"]).write_bytes(text.encode(errors="surrogatepass"))
        elif kind == "header":
            keys = [
                "base_model",
                "family",
                "step",
                "rank",
                "lora_adapter_metadata",
                "training_args",
            ]
            keys += ["num_ddim_timesteps", "w_min", "lcm_lora_version"]
            text = random.choice(NUMBERS + PATHS + JSON + ['{"unet.lora_alpha": "abc"}'])
            header[random.choice(keys)] = text.encode(errors="replace").decode()
        elif kind == "tensors":
            key = random.choice(sorted(good))
            tensor = good.pop(key)
            change = random.choice("drop twist integers rename huge empty".split())
            if change == "twist":
                good[key] = tensor[None].clone()
            elif change == "integers":
                good[key] = tensor.to(torch.int8)
            elif change == "huge":
                good[key] = tensor * 1e38
            elif change == "empty":
                good[key] = tensor.flatten()[:0].clone()
            elif change == "rename":
                name = random.choice(["x", "lora_unet_", f"{key}.alpha", "a.lora_A.weight", "."])
                good[name] = tensor
        else:
            lora = folder / "adapter_model.safetensors"
            flags["lora"] = "."
            keys = ["lora_alpha", "alpha_pattern", "use_rslora", "base_model_name_or_path"]
            rows = (f'"{key}": {random.choice(JSON)}' for key in random.sample(keys, 2))
            text = random.choice([f"{{{', '.join(rows)}}}", random.choice(JSON)])
            (folder / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
    save_file(good, lora, header)
    (folder / "text").write_text("no image")
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 330), marks=pytest.mark.slow)], ids=["30", "300"]
)
def test_strange_input_is_a_result_or_one_line(tiny, tmp_path, monkeypatch, seeds):
    """Never a traceback, several lines, a half-written or a black file."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(tiny[0] / "base", tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base", subfolder="unet")
    make_lora(unet, tmp_path / "good.safetensors", "base", rank=2)
    ends = {"image": 0, "line": 0}
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = strange_case(random.Random(seed), folder)
        try:
            infer.main(words)
        except SystemExit as stop:
            assert re.fullmatch("error: [^\n]+", str(stop)), (seed, words)
            ends["line"] += 1
        except BaseException as error:
            raise AssertionError(f"case {seed}: {str(words)[:500]}") from error
        else:
            ends["image"] += 1
        assert not list(folder.glob(".*.part*")), seed
        for path in folder.glob("*.png"):
            low, high = Image.open(path).convert("L").getextrema()
            assert low < high, (seed, words)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert min(ends.values()) > len(seeds) // 20, ends


def test_a_line_of_prompts_ends_at_a_line_break_only(tmp_path):
    """Not at U+2028, U+0085 or a form feed."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028still one\r\ntwo\x85two\ftwo\nthree".encode())
    prompts = [row["prompt"] for row in infer.read_lines(str(file))]
    assert prompts == ["one\u2028still one", "two\x85two\ftwo", "three"]


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENOSPC"])
def test_a_place_that_cannot_be_written_gets_its_own_advice(number):
    """Such as a cache of another user."""
    place = infer.or_fail("--base_model a/b: cannot be opened", "--base_model names another")
    with pytest.raises(SystemExit, match="HF_HOME"), place:
        raise OSError(getattr(errno, number), "no", "/somewhere")
