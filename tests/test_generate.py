"""What infer.py generates from images, prompt files, by schedulers, in grids and fused."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, ROOT
from conftest import run as run_program
from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat
from test_infer import compare, difference, infer, make_lora, make_tiny_vae, start

DEMO = {family: ROOT / "demo" / f"teacher-{family}" for family in ("sd15", "sdxl")}
NAMES = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """A random LoRA and ControlNet per demo teacher; apple.png (180 x 128), half-white mask.png."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("kit")
    for family, base in DEMO.items():
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        make_lora(unet, folder / f"{family}.safetensors", base, family=family)
        torch.manual_seed(0)
        net = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(16, 32, 64, 96)
        )  # this VAE's factor is 8
        for weight in net.parameters():
            if not weight.any():  # the zero convolutions, where training starts
                torch.nn.init.normal_(weight, std=0.05)
        net.save_pretrained(folder / f"control-{family}")
    apple, mask = Image.new("RGB", (180, 128), "white"), Image.new("L", (128, 128))
    ImageDraw.Draw(apple).ellipse((40, 16, 140, 120), fill="#d02020")
    ImageDraw.Draw(mask).rectangle((64, 0, 128, 128), fill=255)
    apple.save(folder / "apple.png")
    mask.save(folder / "mask.png")
    return folder


def run(kit, output, *flags, family="sd15", prompt=("a cat",)):
    """Generate in float32; the path of the image."""
    prompt = ["--prompt", *prompt] if prompt else []
    output_flag = ["--output", output] if output else []
    words = [
        "--lora",
        kit / f"{family}.safetensors",
        *DEVICE,
        *prompt,
        *output_flag,
        *flags,
    ]
    start(*words)
    return output


def settings(path):
    """What an image says about itself."""
    return json.loads(Image.open(path).text["infer_args"])


def is_image(path, size=(128, 128)):
    """Whether a file is an RGB image of this size, neither flat nor black, white or clipped."""
    image = Image.open(path)
    low, high = image.convert("L").getextrema()
    edges = image.convert("L").histogram()
    return (
        (image.size, image.mode) == (size, "RGB")
        and high - low > 30
        and edges[0] + edges[255] < 0.9 * sum(edges)
    )


def pipeline(kit, kind, family="sd15", scheduler=("LCMScheduler", {}), lora=True, **parts):
    """A user's own pipeline of this class with the LoRA, by diffusers alone."""
    import diffusers

    pipe = getattr(diffusers, NAMES[family] + kind).from_pretrained(DEMO[family], **parts)
    pipe.set_progress_bar_config(disable=True)
    name, more = scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    if lora:
        pipe.load_lora_weights(kit / f"{family}.safetensors")
    return pipe


def fitted(path, size=(176, 128)):
    """An image as infer.py takes it: its edges cropped, not stretched."""
    return ImageOps.fit(Image.open(path), size, Image.Resampling.LANCZOS)


def call(pipe, path, *args, steps=4, guidance=1.0, seed=0, **kwargs):
    """The pipeline's image as a file."""
    generator = torch.Generator("cpu").manual_seed(seed)
    kwargs |= {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
    pipe(*args, **kwargs).images[0].save(path)
    return path


@pytest.fixture
def cells(monkeypatch):
    """The columns of the grids that the test generates."""
    seen, grid = [], compare.grid
    monkeypatch.setattr(
        compare, "grid", lambda columns, *rest: seen.extend(columns) or grid(columns, *rest)
    )
    return seen


TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "theirs", "eta"),
    [
        ("lcm", ("LCMScheduler", {"original_inference_steps": 50}), 0),
        ("tcd", ("TCDScheduler", {"original_inference_steps": 50}), 0.3),
        ("ddim", ("DDIMScheduler", TRAILING | {"clip_sample": False}), 0),
        ("dpm++", ("DPMSolverMultistepScheduler", TRAILING), 0),
        ("euler", ("EulerDiscreteScheduler", TRAILING), 0),
    ],
)
@pytest.mark.parametrize("family", DEMO)
def test_scheduler(kit, tmp_path, family, name, theirs, eta):
    """Each generates what diffusers does with it and the LoRA, not the base, and is named."""
    path = run(kit, tmp_path / "x.png", "--scheduler", name, family=family)
    assert is_image(path)
    pipe = pipeline(kit, "Pipeline", family, scheduler=theirs)
    assert difference(path, call(pipe, tmp_path / "y.png", "a cat", eta=eta)) <= 1
    pipe.disable_lora()
    assert difference(path, call(pipe, tmp_path / "base.png", "a cat", eta=eta)) > 8
    assert f"Sampler: {infer.SCHEDULERS[name][1]}, " in Image.open(path).text["parameters"]
    assert settings(path)["scheduler"] == name


def test_original_steps_of_the_header(kit, tmp_path, cells):
    """With 20 DDIM steps, 3 steps of lcm and tcd differ from those of 50; 21 steps are refused."""
    from safetensors.torch import load_file, save_file

    header = {"base_model": str(DEMO["sd15"]), "num_ddim_timesteps": "20"}
    save_file(load_file(kit / "sd15.safetensors"), tmp_path / "sd15.safetensors", header)
    flags = ("--scheduler", "lcm", "tcd", "--steps", 3, "--compare")
    assert settings(run(tmp_path, tmp_path / "20.png", *flags))["original_inference_steps"] == 20
    assert settings(run(kit, tmp_path / "50.png", *flags))["original_inference_steps"] == 50
    images = [column["images"][0] for column in cells]
    for ours, theirs in zip(images[:2], images[2:]):
        assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) > 2
    for name in "lcm", "tcd":
        with pytest.raises(SystemExit, match="--steps 21: must be from 1 to 20"):
            run(tmp_path, tmp_path / "x.png", "--scheduler", name, "--steps", 21)


@pytest.mark.parametrize("family", DEMO)
def test_img2img(kit, tmp_path, family, capsys):
    """As diffusers does it, of the image's size; half the strength: half the steps, and nearer."""
    flags = ("--image", kit / "apple.png", "--strength")
    half = run(kit, tmp_path / "half.png", *flags, 0.5, family=family)
    assert capsys.readouterr().err == ""
    assert is_image(half, (176, 128))
    source = fitted(kit / "apple.png")
    pipe = pipeline(kit, "Img2ImgPipeline", family)
    # img2img wants an image per prompt: with one image, a list of generators would share its noise.
    theirs = call(pipe, tmp_path / "theirs.png", "a cat", image=source, strength=0.5)
    assert difference(half, theirs) <= 1
    full = run(kit, tmp_path / "full.png", *flags, 1, family=family)
    source.save(tmp_path / "source.png")

    def distance(path):
        return sum(
            i * n
            for i, n in enumerate(
                ImageChops.difference(Image.open(path), source).convert("L").histogram()
            )
        )

    assert distance(half) < distance(full)
    base = run(kit, tmp_path / "base.png", *flags, 0.5, "--lora_scale", 0, family=family)
    assert difference(half, base) > 8
    said = settings(half)
    assert (said["image"], said["strength"], said["mask"]) == (str(kit / "apple.png"), 0.5, None)
    assert "Denoising strength: 0.5" in Image.open(half).text["parameters"]


@pytest.mark.parametrize("name", infer.SCHEDULERS)
def test_each_scheduler_starts_from_images(kit, tmp_path, name):
    """img2img, inpainting, ControlNet with each: of the image's size, not as without the LoRA."""
    control = ("--controlnet", kit / "control-sd15", "--control_image", kit / "apple.png")
    for kind, flags, size in (
        ("img2img", ("--image", kit / "apple.png"), (176, 128)),
        ("inpainting", ("--image", kit / "apple.png", "--mask", kit / "mask.png"), (176, 128)),
        ("controlnet", control, (176, 128)),
    ):
        path = run(kit, tmp_path / f"{kind}.png", "--scheduler", name, *flags)
        assert is_image(path, size)
        base = run(
            kit, tmp_path / f"{kind}-base.png", "--scheduler", name, *flags, "--lcm_weight", 0
        )
        assert difference(path, base) > 8


def test_deep_grey_and_transparency(kit, tmp_path):
    """A 16-bit depth map keeps its tones, in RGB and as a mask; what is transparent is white."""
    ramp = torch.arange(256, dtype=torch.int32).repeat(4, 1) * 257
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "depth.png")
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    words = [
        "--lora",
        "x",
        "--prompt",
        "a",
        "--image",
        tmp_path / "clear.png",
        "--mask",
        tmp_path / "depth.png",
    ]
    images = infer.read_images(infer.parse_args([*map(str, words)]))
    assert [images["mask_image"].getpixel((x, 0)) for x in range(256)] == list(range(256))
    assert images["image"].getpixel((0, 0)) == (255, 255, 255) and images["image"].getpixel(
        (1, 1)
    ) == (200, 0, 0)


def test_images_are_read_upright(kit, tmp_path):
    """A camera's turned image, a grey one and one with a palette are what their RGB copy is."""
    apple = Image.open(kit / "apple.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen
    apple.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    apple.convert("P").save(tmp_path / "palette.png")
    expected = run(kit, tmp_path / "x.png", "--image", kit / "apple.png", "--steps", 2)
    assert (
        difference(
            expected, run(kit, tmp_path / "y.png", "--image", tmp_path / "turned.png", "--steps", 2)
        )
        == 0
    )
    args = infer.parse_args(
        ["--lora", "x", "--prompt", "a", "--image", str(tmp_path / "palette.png")]
    )
    assert infer.read_images(args)["image"].mode == "RGB"


@pytest.mark.parametrize("family", DEMO)
def test_inpainting(kit, tmp_path, family, capsys):
    """Black stays as it is, white is generated, and by the LoRA."""
    flags = ("--image", kit / "apple.png", "--mask", kit / "mask.png")
    path = run(kit, tmp_path / "x.png", *flags, family=family)
    assert capsys.readouterr().err == ""
    assert is_image(path, (176, 128)) and settings(path)["strength"] == 1
    base = run(kit, tmp_path / "base.png", *flags, "--lora_scale", 0, family=family)
    source = fitted(kit / "apple.png")

    def moved(path, box, other=source):
        return max(
            high
            for _, high in ImageChops.difference(Image.open(path), other).crop(box).getextrema()
        )

    left, right = (0, 0, 84, 128), (92, 0, 176, 128)
    assert moved(path, left) == 0 and moved(path, right) > 8
    assert moved(path, right, Image.open(base)) > 8


@pytest.mark.parametrize("family", DEMO)
@pytest.mark.parametrize(
    "given", [(), ("image",), ("image", "mask")], ids=["text", "img2img", "inpainting"]
)
def test_controlnet(kit, tmp_path, family, given):
    """The control image steers the image; at scale 0 it does not."""
    files = {"image": kit / "apple.png", "mask": kit / "mask.png"}
    flags = [word for name in given for word in (f"--{name}", files[name])] + [
        "--width",
        128,
        "--steps",
        3,
    ]
    flags += ["--batch_size", 2]
    control = ("--controlnet", kit / f"control-{family}", "--control_image", kit / "mask.png")
    prompt = ("a cat", "a dog")
    run(kit, tmp_path / "on.png", *flags, *control, family=family, prompt=prompt)
    run(kit, tmp_path / "none.png", *flags, family=family, prompt=prompt)
    for index in range(2):
        on, none = (tmp_path / f"{name}-{index}.png" for name in ("on", "none"))
        assert is_image(on) and difference(on, none) > 8
    if family == "sd15":
        run(kit, tmp_path / "off.png", *flags, *control, "--controlnet_scale", 0, prompt=prompt)
        assert difference(tmp_path / "off-1.png", none) <= 1
    assert settings(on)["controlnet"] == str(kit / f"control-{family}")


def test_controlnet_that_does_not_fit(kit, tmp_path):
    """One of another layout, and a folder that holds something else, are refused with one line."""
    from diffusers import ControlNetModel

    small = {
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "norm_num_groups": 8,
    }
    ControlNetModel(cross_attention_dim=64, **small).save_pretrained(tmp_path / "small")
    pipe = pipeline(kit, "Pipeline", lora=False)
    for folder, message in (
        (
            tmp_path / "small",
            "has another layout than the base model: cross_attention_dim is 64, needed is 128",
        ),
        (
            kit / "control-sdxl",
            "has another layout than the base model: addition_embed_type is text_time, needed is",
        ),
        (DEMO["sd15"] / "unet", "its weights are not those of ControlNetModel"),
        (tmp_path / "nowhere", "cannot be opened"),
    ):
        with pytest.raises(
            SystemExit, match=f"^error: --controlnet {folder}:? {message}"
        ) as caught:
            infer.load_controlnet(str(folder), pipe)
        assert "\n" not in str(caught.value)


def test_one_copy_of_the_weights(kit):
    """The pipeline that takes images generates with the very modules of the one that was loaded."""
    pipe = pipeline(kit, "Pipeline", lora=False)
    files = {
        "image": "apple.png",
        "mask": "mask.png",
        "controlnet": "control-sd15",
        "control_image": "mask.png",
    }
    flags = [word for name, file in files.items() for word in (f"--{name}", str(kit / file))]
    generating = infer.with_images(pipe, infer.parse_args(["--lora", "x", "--prompt", "a", *flags]))
    assert type(generating).__name__ == "StableDiffusionControlNetInpaintPipeline"
    assert all(
        getattr(generating, name) is getattr(pipe, name) for name in ("unet", "vae", "text_encoder")
    )


def test_merged_loras_leave_the_weights_of_the_base_alone(kit, tmp_path, monkeypatch):
    """While it generates, all tensors are the base's own, in their places, and small ones."""
    import gc

    def memory():
        tensors = [
            thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
        ]
        return {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.device.type == DEVICE[1]
        }

    def parts(pipe):
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    seen, generate_all, set_loras = {}, infer.generate_all, infer.set_loras
    monkeypatch.setattr(
        infer,
        "set_loras",
        lambda pipe, *rest: seen.update(loaded=parts(pipe)) or set_loras(pipe, *rest),
    )
    monkeypatch.setattr(
        infer,
        "generate_all",
        lambda pipe, *rest: (
            seen.update(parts=parts(pipe), all=memory()) or generate_all(pipe, *rest)
        ),
    )
    gc.collect()
    before = memory()
    run(
        kit,
        tmp_path / "x.png",
        "--style_lora",
        f"{kit / 'sd15.safetensors'}:0.1",
        "--lcm_weight",
        0.5,
    )
    lora = sum(seen["loaded"].values()) - sum(seen["parts"].values())
    assert (
        lora > 2e6 and seen["parts"].items() <= seen["loaded"].items()
    )  # two LoRAs are gone, the base is where it was
    base = pipeline(kit, "Pipeline", lora=False)
    assert sum(parts(base).values()) == sum(seen["parts"].values())
    surplus = seen["all"].keys() - seen["parts"].keys() - before.keys()
    assert sum(seen["all"][place] for place in surplus) < 1e6


@pytest.mark.parametrize("family", DEMO)
@pytest.mark.parametrize(
    "given", [(), ("image",), ("image", "mask")], ids=["text", "img2img", "inpainting"]
)
def test_tiny_vae(kit, tmp_path, monkeypatch, family, given):
    """As diffusers generates with it, decoding and encoding; the base's VAE is not made at all."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae = make_tiny_vae(tmp_path / "vae", factor=8)
    files = {"image": kit / "apple.png", "mask": kit / "mask.png"}
    flags = [word for name in given for word in (f"--{name}", files[name])]
    full = run(kit, tmp_path / "full.png", *flags, family=family)
    with monkeypatch.context() as patch:
        patch.setattr(
            AutoencoderKL, "__init__", lambda *args, **kwargs: pytest.fail("the VAE was made")
        )
        path = run(kit, tmp_path / "x.png", "--tiny_vae", vae, *flags, family=family)
    assert settings(path)["tiny_vae"] == str(vae) and difference(path, full) > 8
    if given == ("image", "mask"):
        black = (0, 0, 84, 128)
        assert Image.open(path).crop(black).tobytes() == Image.open(full).crop(black).tobytes()
        return
    pipe = pipeline(
        kit,
        "Img2ImgPipeline" if given else "Pipeline",
        family,
        vae=AutoencoderTiny.from_pretrained(vae),
    )
    source = fitted(kit / "apple.png")
    more = {"image": source, "strength": 0.8} if given else {}
    assert difference(path, call(pipe, tmp_path / "theirs.png", "a cat", **more)) <= 1


def test_tiny_vae_in_fused_output(kit, tmp_path):
    """It is saved in the VAE's place, and what is saved is a base to generate with."""
    flags = ("--tiny_vae", make_tiny_vae(tmp_path / "vae", factor=8))
    run(kit, None, *flags, "--fused_output", tmp_path / "fused", prompt=())
    ours = run(kit, tmp_path / "ours.png", *flags)
    fused = run(kit, tmp_path / "fused.png", "--base_model", tmp_path / "fused", "--lora_scale", 0)
    assert difference(ours, fused) <= 3
    assert (
        json.loads((tmp_path / "fused" / "model_index.json").read_text())["vae"][1]
        == "AutoencoderTiny"
    )


def test_tiny_vae_that_does_not_fit(kit, tmp_path):
    """One for other latents, and a folder that holds something else, are refused with one line."""
    has = "the base model has latents of 4 channels and a side of 1/8"
    for folder, message in (
        (
            make_tiny_vae(tmp_path / "sd3", factor=8, latent_channels=16),
            f"is for latents of 16 channels and a side of 1/8; {has}",
        ),
        (
            make_tiny_vae(tmp_path / "taef4", factor=4),
            f"is for latents of 4 channels and a side of 1/4; {has}",
        ),
        (DEMO["sd15"] / "vae", "its weights are not those of AutoencoderTiny"),
        (DEMO["sd15"], "cannot be opened"),
        (tmp_path / "nowhere", "cannot be opened .*; valid are a diffusers folder or a Hub id"),
    ):
        with pytest.raises(SystemExit, match=f"^error: --tiny_vae {folder}:? {message}") as caught:
            run(kit, tmp_path / "x.png", "--tiny_vae", folder)
        assert "\n" not in str(caught.value) and not (tmp_path / "x.png").exists()


def test_tiny_vae_is_not_read_from_pickle(kit, tmp_path):
    """Weights in a .bin file are refused."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny.from_pretrained(make_tiny_vae(tmp_path / "vae", factor=8)).save_pretrained(
        tmp_path / "bin", safe_serialization=False
    )
    with pytest.raises(SystemExit, match="^error: --tiny_vae .*bin cannot be opened"):
        run(kit, tmp_path / "x.png", "--tiny_vae", tmp_path / "bin")


def test_strength_is_raised_to_one_step(kit, tmp_path, capsys):
    """0.1 x 4 steps is no step: it becomes 0.25, with a warning; one step is always taken."""
    flags = ("--image", kit / "apple.png", "--strength")
    low = run(kit, tmp_path / "low.png", *flags, 0.1)
    assert (
        "warning: --strength 0.1 x 4 steps is less than one step: raised to 0.25 to take one"
        in capsys.readouterr().err
    )
    assert settings(low)["strength"] == pytest.approx(0.25)
    assert difference(low, run(kit, tmp_path / "quarter.png", *flags, 0.25)) == 0
    assert capsys.readouterr().err == ""
    for steps in range(1, 1001):
        assert int(steps * infer.enough(0.0, steps)) == 1 and infer.enough(0.0, steps) <= 1
    assert infer.enough(0.3, 4) == 0.3


def test_prompts_in_a_text_file(kit, tmp_path):
    """Comments and blank lines are skipped; each line generates what --prompt generates."""
    (tmp_path / "prompts.txt").write_text("\ufeff# two\na cat\n\n  a dog \n", encoding="utf-8")
    run(
        kit,
        tmp_path / "file.png",
        "--prompts_file",
        tmp_path / "prompts.txt",
        "--seed",
        5,
        prompt=(),
    )
    run(kit, tmp_path / "flag.png", "--seed", 5, prompt=("a cat", "a dog"))
    assert len(list(tmp_path.glob("file*.png"))) == 2
    for index in range(2):
        assert difference(tmp_path / f"file-{index}.png", tmp_path / f"flag-{index}.png") == 0


def test_prompts_in_json_lines(kit, tmp_path):
    """Own seeds, sizes, negative prompts, in the order of the lines, each as if generated alone."""
    rows = [
        {"prompt": "a cat", "seed": 7},
        {"prompt": "a dog", "width": 192, "height": 144, "negative_prompt": "red"},
        {"prompt": "a cup", "seed": 2**32 - 1, "negative_prompt": ""},
        {"prompt": "a car", "width": 192, "height": 144},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--steps", 2, "--guidance_scale", 2)
    run(
        kit,
        tmp_path / "x.png",
        "--prompts_file",
        tmp_path / "p.jsonl",
        *flags,
        prompt=(),
        family="sdxl",
    )
    for index, row in enumerate(rows):
        path = tmp_path / f"x-{index}.png"
        assert is_image(path, (row.get("width", 128), row.get("height", 128)))
        said = settings(path)
        assert said["prompt"] == row["prompt"] and said["seed"] == row.get("seed", index)
        assert said["negative_prompt"] == row.get("negative_prompt")
    for index in 1, 2:
        own = [
            word
            for key, value in rows[index].items()
            if key != "prompt"
            for word in (f"--{key}", value)
        ]
        own = own if "seed" in rows[index] else [*own, "--seed", index]
        alone = run(
            kit,
            tmp_path / "alone.png",
            *flags,
            *own,
            prompt=(rows[index]["prompt"],),
            family="sdxl",
        )
        assert difference(tmp_path / f"x-{index}.png", alone) <= 1


def test_steps_list(kit, tmp_path, capsys):
    """An image per number of steps, each as generated alone, the steps in its name and header."""
    run(kit, tmp_path / "x.png", "--steps", 1, 3, 1, prompt=("a cat", "a dog"))
    names = {f"x-{index}-steps{steps}.png" for index in range(2) for steps in (1, 3)}
    assert {path.name for path in tmp_path.iterdir()} == names
    run(kit, tmp_path / "alone.png", "--steps", 3, prompt=("a cat", "a dog"))
    assert difference(tmp_path / "x-1-steps3.png", tmp_path / "alone-1.png") == 0
    assert settings(tmp_path / "x-0-steps1.png")["steps"] == 1
    assert re.findall(r"(.*): \S+ s/image \((.*)\)", capsys.readouterr().out) == [
        ("1 step", "2 of 2 timed, after a warm-up"),
        ("3 steps", "2 of 2 timed, after a warm-up"),
        ("3 steps", "no batch came after the warm-up"),
    ]


def test_first_call_is_not_timed(monkeypatch, tmp_path, capsys):
    """Of several batches the first is left out, unless the pipeline is warm; one alone counts."""

    def seconds(times, compiled=(), seen=(), sizes=(64, 64, 64)):
        clock = iter(
            [moment for i, passed in enumerate(times) for moment in (100 * i, 100 * i + passed)]
        )
        monkeypatch.setattr(infer.time, "perf_counter", lambda: next(clock))
        args = infer.parse_args(["--lora", "x", "--prompt", "a", "--batch_size", "2", *compiled])
        jobs = [infer.Job("a", None, 0, 64, width) for width in sizes]
        return infer.generate(pipe, args, {}, jobs, 1, 1, set(seen))[1:]

    parts = {
        "scheduler": None,
        "device": "cpu",
        "encode_prompt": lambda self, prompts, **kwargs: [torch.zeros(len(prompts), 2, 1)],
        "__call__": lambda self, prompt_embeds, **kwargs: Result(prompt_embeds),
    }
    pipe = type("Pipe", (), parts)()
    Result = type(
        "Result", (), {"__init__": lambda self, prompts: setattr(self, "images", prompts)}
    )
    assert seconds([10, 1]) == (1, 1)
    assert seconds([10, 3, 1], sizes=(64,) * 5) == ((3 + 1) / 3, 3)
    assert seconds([10, 2], seen=["any"]) == ((10 + 2) / 3, 3)
    assert seconds([10], sizes=(64, 64)) == (10 / 2, 0)
    # Compiled code is for a size, and for one image or for several.
    assert seconds([10, 5], ["--compile"]) == ((10 + 5) / 3, 0)
    assert seconds([10, 2, 5, 8], ["--compile"], sizes=(64,) * 5 + (96,) * 2) == (2 / 2, 2)


@pytest.mark.parametrize("family", DEMO)
def test_grid_of_schedulers(kit, tmp_path, cells, family):
    """A column per scheduler and step count: lcm and tcd are the LoRA, the others the teacher."""
    flags = (
        "--compare",
        "--scheduler",
        "euler",
        "lcm",
        "tcd",
        "--steps",
        2,
        4,
        "--compare_guidance",
        3,
    )
    path = run(kit, tmp_path / "grid.png", *flags, family=family, prompt=("a cat", "a dog"))
    columns = settings(path)["columns"]
    facts = [
        (column["scheduler"], column["steps"], column["guidance"], column["passes"])
        for column in columns
    ]
    assert facts == [
        ("euler", 2, 3, 4),
        ("euler", 4, 3, 8),
        *((n, s, 1, s) for n in ("lcm", "tcd") for s in (2, 4)),
    ]
    assert [column["group"] for column in columns[1:4]] == [
        "Teacher, Euler",
        "LCM-LoRA",
        "LCM-LoRA",
    ]
    pipe = pipeline(kit, "Pipeline", family, ("EulerDiscreteScheduler", TRAILING), lora=False)
    images = [column["images"] for column in cells]
    images[1][0].save(tmp_path / "cell.png")
    assert (
        difference(
            tmp_path / "cell.png", call(pipe, tmp_path / "teacher.png", "a cat", guidance=3.0)
        )
        <= 1
    )
    run(kit, tmp_path / "lcm.png", family=family, prompt=("a cat", "a dog"))
    images[3][1].save(tmp_path / "cell.png")
    assert difference(tmp_path / "cell.png", tmp_path / "lcm-1.png") <= 1


def test_grid_plans():
    """What --compare generates by default, with steps alone, with a scheduler alone."""
    fixed = [
        ("ddim", 50),
        ("dpm++", 1),
        ("dpm++", 2),
        ("dpm++", 4),
        ("lcm", 1),
        ("lcm", 2),
        ("lcm", 4),
        ("lcm", 8),
    ]
    for flags, plan in (
        ([], fixed),
        (["--steps", "2", "1"], [("dpm++", 2), ("dpm++", 1), ("lcm", 2), ("lcm", 1)]),
        (["--scheduler", "tcd"], [("tcd", 1), ("tcd", 2), ("tcd", 4), ("tcd", 8)]),
    ):
        args = infer.parse_args(["--lora", "x", "--prompt", "a", "--compare", *flags])
        assert compare.make_plan(args) == plan


@pytest.mark.parametrize("given", ["img2img", "inpainting", "controlnet"])
def test_grid_from_images(kit, tmp_path, cells, given):
    """The images given come first; every cell is generated from them; passes are those taken."""
    files = {"image": kit / "apple.png"} if given != "controlnet" else {}
    files |= {"mask": kit / "mask.png"} if given == "inpainting" else {}
    files |= (
        {"controlnet": kit / "control-sd15", "control_image": kit / "mask.png"}
        if given == "controlnet"
        else {}
    )
    flags = [word for name, file in files.items() for word in (f"--{name}", file)]
    flags += ["--scheduler", "dpm++", "lcm", "--steps", 4, "--compare"]
    path = run(kit, tmp_path / "grid.png", *flags, prompt=("a cat", "a dog"))
    sources = [name.removesuffix("_image") for name in files if name != "controlnet"]
    assert [column.get("label") for column in cells] == [*sources, None, None]
    assert cells[0]["images"][0].size == ((180, 128) if "image" in files else (128, 128))
    taken = 3 if given == "img2img" else 4  # strength 0.8
    assert [column["passes"] for column in settings(path)["columns"]] == [2 * taken, taken]
    run(kit, tmp_path / "lcm.png", *flags[: 2 * len(files)], prompt=("a cat", "a dog"))
    cells[-1]["images"][1].save(tmp_path / "cell.png")
    assert difference(tmp_path / "cell.png", tmp_path / "lcm-1.png") <= 1
    cells[-2]["images"][1].save(tmp_path / "teacher.png")
    assert difference(tmp_path / "cell.png", tmp_path / "teacher.png") > 8
    assert Image.open(path).width > len(cells) * 128


def test_grid_of_several_sizes(kit, tmp_path):
    """Rows of other sizes are fitted into the cells."""
    rows = [{"prompt": "a", "width": 192}, {"prompt": "b", "height": 192}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "grid.png"
    run(kit, path, "--prompts_file", tmp_path / "p.jsonl", "--compare", "--steps", 1, prompt=())
    assert [(job["width"], job["height"]) for job in settings(path)["jobs"]] == [
        (192, 128),
        (128, 192),
    ]


@pytest.mark.parametrize("family", DEMO)
def test_fused_output(kit, tmp_path, family, capsys):
    """A diffusers folder: the base with the LoRA inside, generating what infer.py generates."""
    import diffusers

    folder = tmp_path / "new" / "fused"
    flags = ("--lora_scale", 0.5, "--fused_output", folder)
    run(kit, None, *flags, family=family, prompt=())
    assert [path.name for path in folder.parent.iterdir()] == ["fused"]
    assert f"{folder}: the base model with the LoRA merged in" in capsys.readouterr().out
    (tmp_path / "new" / "file").touch()  # has the permissions that the umask gives
    modes = {path.stat().st_mode for path in [*folder.rglob("*.*"), tmp_path / "new" / "file"]}
    assert len(modes) == 1
    assert not [*folder.rglob("*.bin")] and len([*folder.rglob("*.safetensors")]) == (
        3 if family == "sd15" else 4
    )
    pipe = getattr(diffusers, NAMES[family] + "Pipeline").from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (
        type(pipe.scheduler).__name__ == "LCMScheduler"
        and pipe.scheduler.config.original_inference_steps == 50
    )
    assert not any("lora" in name for name in pipe.unet.state_dict())
    theirs = call(pipe, tmp_path / "theirs.png", "a cat")
    ours = run(kit, tmp_path / "ours.png", "--lora_scale", 0.5, family=family)
    assert difference(ours, theirs) <= 3
    assert difference(theirs, run(kit, tmp_path / "base.png", "--lora_scale", 0, family=family)) > 8
    with pytest.raises(
        SystemExit, match=f"^error: --fused_output {folder}: must be a new or an empty folder"
    ):
        run(kit, None, *flags, family=family, prompt=())


def test_the_program_that_merges(kit, tmp_path):
    """scripts/fuse_lora.py writes the weights that infer.py --fused_output does."""
    from safetensors.torch import load_file

    lora = ("--lora", kit / "sd15.safetensors")
    infer.main([*map(str, lora), "--fused_output", str(tmp_path / "here")])
    program = ROOT / "scripts" / "fuse_lora.py"
    done = run_program(sys.executable, program, *lora, "--fused_output", tmp_path / "there")
    assert (
        done.returncode == 0 and "there: the base model with the LoRA merged in" in done.stdout
    ), done.stderr
    name = "unet/diffusion_pytorch_model.safetensors"
    here, there = (load_file(tmp_path / folder / name) for folder in ("here", "there"))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def test_fused_after_a_grid(kit, tmp_path):
    """The grid switches the LoRA off and on; what is saved has it; the folder may exist, empty."""
    from safetensors.torch import load_file

    weights = []
    for name, flags in (
        ("plain", ()),
        ("grid", ("--compare", "--scheduler", "lcm", "dpm++", "--steps", 1)),
    ):
        (tmp_path / name).mkdir()
        output, prompt = (tmp_path / "x.png", ("a cat",)) if flags else (None, ())
        run(kit, output, "--fused_output", tmp_path / name, *flags, prompt=prompt)
        weights.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    base = load_file(DEMO["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    changed = [key for key in base if not torch.equal(base[key].float(), weights[0][key].float())]
    assert len(changed) == len(load_file(kit / "sd15.safetensors")) // 3


def test_style_lora_in_a_grid_and_fused_after_it(kit, tmp_path, cells):
    """The style stays on in the teacher's columns; what is saved holds both LoRAs, grid or not."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = UNet2DConditionModel.from_pretrained(DEMO["sd15"], subfolder="unet")
    make_lora(unet, tmp_path / "style.safetensors", DEMO["sd15"], rank=4)
    style = ("--style_lora", f"{tmp_path / 'style.safetensors'}:0.5")
    plan = ("--compare", "--scheduler", "lcm", "dpm++", "--steps", 1)
    run(kit, tmp_path / "grid.png", *plan, *style, "--fused_output", tmp_path / "grid")
    run(kit, tmp_path / "bare.png", *plan, "--fused_output", tmp_path / "bare")
    run(kit, None, *style, "--fused_output", tmp_path / "plain", prompt=())
    for ours, theirs in zip(
        cells[:2], cells[2:]
    ):  # with and without the style: both columns change
        change = ImageChops.difference(ours["images"][0], theirs["images"][0]).getextrema()
        assert max(high for _, high in change) > 8
    grid, bare, plain = (
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("grid", "bare", "plain")
    )
    assert all(torch.equal(grid[key], plain[key]) for key in grid)
    assert any(not torch.equal(grid[key], bare[key]) for key in grid)


def test_fused_without_generating_asks_for_no_steps(kit, tmp_path):
    """A LoRA distilled over 2 steps can be merged, though it cannot do the default 4 steps."""
    from safetensors.torch import load_file, save_file

    header = {"base_model": str(DEMO["sd15"]), "num_ddim_timesteps": "2"}
    save_file(load_file(kit / "sd15.safetensors"), tmp_path / "sd15.safetensors", header)
    run(tmp_path, None, "--fused_output", tmp_path / "fused", prompt=())
    assert (tmp_path / "fused" / "model_index.json").is_file()
    with pytest.raises(SystemExit, match="--steps 4: must be from 1 to 2"):
        run(tmp_path, tmp_path / "x.png")


def test_fused_output_is_whole_or_absent(kit, tmp_path, monkeypatch):
    """A disk that is full leaves nothing behind."""
    from diffusers import StableDiffusionPipeline

    def full(pipe, folder, **kwargs):
        folder.mkdir()
        (folder / "model_index.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(
        SystemExit, match="^error: --fused_output .*fused: cannot be written .*No space left"
    ):
        run(kit, None, "--fused_output", tmp_path / "fused", prompt=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"p.jsonl: it contains no prompt"),
        ('{"prompt": "a"}\n{"prompt"', "p.jsonl, line 2: not JSON"),
        ('# x\n["a"]', r'line 2: must be {"prompt": ...}'),
        ('{"seed": 1}', r'line 1: must be {"prompt": ...}'),
        (
            '{"prompt": "a", "steps": 2}',
            "line 1: must be .*optionally with negative_prompt, seed, height, width",
        ),
        ('{"prompt": 3}', "line 1: prompt is 3, must be a text"),
        ('{"prompt": "a", "seed": "1"}', "line 1: seed is '1', must be -1 to 18446744073709551615"),
        ('{"prompt": "a", "seed": -2}', "line 1: seed is -2"),
        ('{"prompt": "a", "width": true}', "line 1: width is True"),
        ('{"prompt": "a", "height": 0}', "line 1: height is 0, must be 1 to"),
        (
            '{"prompt": "a", "height": 60}',
            "--prompts_file: height 60: must be a multiple of 8, e.g. 64",
        ),
    ],
)
def test_bad_prompts_file(kit, tmp_path, line, message):
    """One line, which names the file and the line."""
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(kit, tmp_path / "x.png", "--prompts_file", tmp_path / "p.jsonl", prompt=())
    assert "\n" not in str(caught.value) and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "nothing to do: give --prompt, --prompts_file or --fused_output"),
        ("--prompt a --prompts_file p.txt", "--prompt and --prompts_file do not go together"),
        ("--prompts_file nowhere.txt", "--prompts_file nowhere.txt: cannot be read"),
        ("--prompts_file image.png", "--prompts_file image.png: cannot be read as text"),
        ("--prompt a --strength 0.5", "--strength has no effect without --image"),
        (
            "--prompt a --image image.png --strength 1.5",
            "--strength: '1.5' is not float from 0 to 1",
        ),
        ("--prompt a --mask image.png", "--mask has no effect without --image"),
        ("--prompt a --image nowhere.png", "--image nowhere.png: not a readable image"),
        ("--prompt a --image text.txt", "--image text.txt: not a readable image"),
        ("--prompt a --image cut.png", "--image cut.png: not a readable image"),
        ("--prompt a --controlnet x", "--controlnet has no effect without --control_image"),
        (
            "--prompt a --control_image image.png",
            "--control_image has no effect without --controlnet",
        ),
        (
            "--prompt a --controlnet_scale 2",
            "--controlnet_scale has no effect without --controlnet",
        ),
        ("--prompt a --scheduler lcm tcd", "--scheduler lcm tcd: several need --compare"),
        ("--prompt a --scheduler pndm", "--scheduler: invalid choice: 'pndm' .*euler"),
        ("--prompt a --steps 4 0", "--steps: '0' is not int from 1 to 1000"),
        ("--prompt a --scheduler euler --steps 1001", "--steps: '1001' is not int from 1 to 1000"),
        (
            "--prompt a --compare --scheduler tcd --compare_guidance 3",
            "--compare_guidance has no effect without",
        ),
        (
            "--prompt a --compare --scheduler ddim --guidance_scale 2",
            "--guidance_scale has no effect without",
        ),
        ("--fused_output text.txt", "--fused_output text.txt: must be a new or an empty folder"),
        ("--fused_output .", "--fused_output .: must be a new or an empty folder"),
        (
            "--fused_output new --compare",
            "--compare has no effect without --prompt or --prompts_file",
        ),
        (
            "--fused_output new --compile",
            "--compile has no effect without --prompt or --prompts_file",
        ),
        (
            "--fused_output new --steps 2",
            "--steps has no effect without --prompt or --prompts_file",
        ),
        (
            "--fused_output new --image image.png",
            "--image has no effect without --prompt or --prompts_file",
        ),
    ],
)
def test_bad_flag(kit, tmp_path, monkeypatch, flags, message):
    """One line, which names the flag and what would be valid, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "image.png").write_bytes((kit / "apple.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((kit / "apple.png").read_bytes()[:120])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        infer.main(["--lora", str(kit / "sd15.safetensors"), *DEVICE, *flags.split()])
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--negative_prompt does nothing here: it needs"),
        ("--compare", "--negative_prompt does nothing in the LCM-LoRA columns: it needs"),
        ("--compare --scheduler ddim", None),
    ],
)
def test_warnings(capsys, flags, message):
    """A negative prompt has an effect where guidance is above 1: in the teacher's columns."""
    words = ["--lora", "x", "--prompt", "a", "--negative_prompt", "b", *flags.split()]
    args = infer.parse_args(words)
    plan = compare.make_plan(args) if args.compare else [("lcm", 4)]
    infer.check_plan(args, plan, infer.read_jobs(args), 50)
    assert re.fullmatch(f"warning: {message}.*\n" if message else "", capsys.readouterr().err)


def broken_base(folder, part, tensor, value):
    """The demo base with one weight set to `value`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO["sd15"], folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = torch.full_like(tensors[tensor], value)
    file.unlink()
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("given", [(), ("image",), ("image", "mask"), ("control_image",)])
@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("vae", "decoder.conv_out.bias", "from the VAE.* --vae "),
        ("vae", "post_quant_conv.bias", "from the VAE.* --vae "),
        ("unet", "conv_out.bias", "in the latents, from the UNet or a LoRA.* --dtype"),
    ],
)
def test_nan_stops(kit, tmp_path, part, tensor, message, given):
    """No black image: one line with seed, prompt, where it came from, and a way out."""
    base = broken_base(tmp_path / "base", part, tensor, torch.nan)
    files = {"image": "apple.png", "mask": "mask.png", "control_image": "apple.png"}
    flags = [word for name in given for word in (f"--{name}", kit / files[name])]
    flags += ["--controlnet", kit / "control-sd15"] if "control_image" in given else []
    flags += ["--base_model", base, "--steps", 1, "--seed", 7]
    with pytest.raises(SystemExit, match=f"^error: --seed 7, --prompt 'a cat': .*{message}"):
        run(kit, tmp_path / "x.png", *flags)
    assert not list(tmp_path.glob("*.png"))


def test_nan_names_the_image_of_the_batch(kit, tmp_path, monkeypatch):
    """The one of four that is NaN, though all are generated at once; no file is written for it."""
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode

    def third(vae, latents, **kwargs):
        image = decode(vae, latents, **kwargs)[0]
        image[2:] = torch.inf
        return (image,)

    monkeypatch.setattr(AutoencoderKL, "decode", third)
    with pytest.raises(SystemExit, match="^error: --seed 2, --prompt 'c': NaN or inf from the VAE"):
        run(kit, tmp_path / "x.png", "--steps", 1, prompt="abcd")


@pytest.mark.parametrize("given", [(), ("--image",)])
def test_vae_that_overflows_in_half_precision(kit, tmp_path, capsys, given):
    """It is taken to fp32 with one warning, and generates what it does where all is fp32."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO["sd15"], tmp_path / "base")
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    # Norms take the scale of what is before them away, in fp32.
    for name in "decoder.conv_in", "encoder.conv_in":
        tensors |= {
            f"{name}.{part}": tensors[f"{name}.{part}"] * 1e5 for part in ("weight", "bias")
        }
    file.unlink()
    save_file({key: t.clamp(-6e4, 6e4) for key, t in tensors.items()}, file)
    flags = [word for flag in given for word in (flag, kit / "apple.png", "--strength", 1)]
    flags += ["--base_model", tmp_path / "base", "--steps", 1, "--batch_size", 1]
    run(kit, tmp_path / "full.png", *flags, prompt=("a cat", "a dog"))
    assert capsys.readouterr().err == ""
    run(kit, tmp_path / "half.png", *flags, "--dtype", "fp16", prompt=("a cat", "a dog"))
    assert re.fullmatch(r"warning: the VAE overflows in .*--vae .*\n", capsys.readouterr().err)
    for index in range(2):
        assert difference(tmp_path / f"half-{index}.png", tmp_path / f"full-{index}.png") <= 6


def test_vae(kit, tmp_path, monkeypatch):
    """--vae takes the place of the base's: as diffusers generates with it; others are refused."""
    from diffusers import AutoencoderKL

    vae = broken_base(tmp_path / "base", "vae", "decoder.conv_out.bias", 0.5) / "vae"
    path = run(kit, tmp_path / "x.png", "--vae", vae)
    pipe = pipeline(kit, "Pipeline", vae=AutoencoderKL.from_pretrained(vae))
    assert difference(path, call(pipe, tmp_path / "theirs.png", "a cat")) <= 1
    assert difference(path, run(kit, tmp_path / "base.png")) > 8
    assert settings(path)["vae"] == str(vae)
    tiny = make_tiny_vae(tmp_path / "tiny")
    for flags, message in (
        (["--vae", tiny], "--vae .*tiny"),
        (["--vae", vae, "--tiny_vae", tiny], "--vae and --tiny_vae do not go together"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run(kit, tmp_path / "no.png", *flags)


def generated(monkeypatch):
    """How many images each call of the pipeline generates, from here on."""
    sizes, generate = [], infer.generate_batch
    monkeypatch.setattr(
        infer,
        "generate_batch",
        lambda pipe, args, images, jobs, *rest: (
            sizes.append(len(jobs)) or generate(pipe, args, images, jobs, *rest)
        ),
    )
    return sizes


def again(kit, output, *flags, prompt="abcde"):
    """infer.main as a user repeats it."""
    words = ["--lora", kit / "sd15.safetensors", *DEVICE, "--prompt", *prompt]
    infer.main([*map(str, [*words, "--steps", 1, "--batch_size", 2, "--output", output, *flags])])


def test_stopped_run_goes_on(kit, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second batch leaves the first's images, whole; the same command does the rest.

    Once more it does nothing, and does not even load the base.
    """
    sizes, save = generated(monkeypatch), infer.Image.Image.save

    def stop(image, path, *args, **kwargs):
        if len(list(tmp_path.glob("*.png"))) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(image, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(infer.Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            again(kit, tmp_path / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.png", "x-1.png", "x-2.png"]
    before = [(tmp_path / f"x-{index}.png").stat().st_mtime_ns for index in range(3)]
    sizes.clear()
    again(kit, tmp_path / "x.png")
    assert sizes == [2] and "3 of 5 images are there already" in capsys.readouterr().out
    assert before == [(tmp_path / f"x-{index}.png").stat().st_mtime_ns for index in range(3)]
    assert all(is_image(tmp_path / f"x-{index}.png") for index in range(5))
    run(kit, tmp_path / "alone.png", "--steps", 1, "--seed", 3, prompt="d")
    assert difference(tmp_path / "alone.png", tmp_path / "x-3.png") <= 1
    sizes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("the base was read"))
        again(kit, tmp_path / "x.png")
    again(kit, tmp_path / "x.png", "--overwrite")
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_other_images_are_not_overwritten(kit, tmp_path, monkeypatch, ending):
    """Another prompt, other weights of the same name, a user's own file: one line, no loss."""
    shutil.copy(kit / "sd15.safetensors", tmp_path / "sd15.safetensors")
    sizes, output = generated(monkeypatch), tmp_path / f"x.{ending}"
    again(tmp_path, output, prompt="a")
    again(tmp_path, output, prompt="a")
    assert sizes == [1]
    before = output.read_bytes()
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("the base was read"))
    says = "^error: --output .*: exists.*--overwrite"
    for flags in (["--seed", 2], ["--lcm_weight", 0.5], ["--width", 64], ["--guidance_scale", 2]):
        with pytest.raises(SystemExit, match=says):
            again(tmp_path, output, *flags, prompt="a")
    with pytest.raises(SystemExit, match=says):
        again(tmp_path, output, prompt="b")
    from safetensors.torch import load_file, save_file

    header = {"base_model": str(DEMO["sd15"])}
    save_file(load_file(kit / "sd15.safetensors"), tmp_path / "sd15.safetensors", header)
    with pytest.raises(SystemExit, match=says):
        again(tmp_path, output, prompt="a")
    assert output.read_bytes() == before
    output.write_text("notes")
    with pytest.raises(SystemExit, match=says):
        again(kit, output, prompt="a")
    assert output.read_text() == "notes"


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_other_formats(kit, tmp_path, ending, kind):
    """The image, with settings and with parameters where A1111 reads them."""
    path = run(kit, tmp_path / f"x.{ending}", prompt=("a cät",))
    ours = run(kit, tmp_path / "x.png", prompt=("a cät",))
    image, other = Image.open(path), Image.open(ours)
    assert image.format == kind and image.size == (128, 128)
    apart = ImageChops.difference(image.convert("RGB"), other.convert("RGB"))
    assert sum(ImageStat.Stat(apart).mean) / 3 < 8
    said = json.loads(image.getexif()[0x010E])
    assert said["prompt"] == "a cät" and said["steps"] == 4
    run(kit, path, "--steps", 1, prompt=("a cat " * 9999,))  # more than EXIF has room for
    assert len(json.loads(Image.open(path).getexif()[0x010E])["fingerprint"]) == 16
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[8:].decode("utf-16-be") == other.text["parameters"]


def test_output_folder_is_tried_first(kit, tmp_path, monkeypatch):
    """A file in the folder's place, names that are too long with an ending: before the base."""
    monkeypatch.setattr(infer, "load_pipeline", lambda *args: pytest.fail("the base was read"))
    (tmp_path / "file").touch()
    for output in (
        tmp_path / "file" / "x.png",
        tmp_path / f"{'x' * 300}.png",
        tmp_path / f"{'x' * 251}.png",  # fits, but x...-0.png does not
    ):
        with pytest.raises(SystemExit, match="^error: .*--output"):
            again(kit, output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_are_not_kept(kit, tmp_path, monkeypatch):
    """While a batch is generated, none of the images of earlier ones is in memory."""
    import gc
    import weakref

    seen, generate, alive = [], infer.generate_batch, []

    def watched(*args):
        gc.collect()
        alive.append(sum(image() is not None for image in seen))
        made = generate(*args)
        seen.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(infer, "generate_batch", watched)
    again(kit, tmp_path / "x.png", prompt="abcdefgh")
    assert len(seen) == 8 and max(alive) <= 2


@pytest.mark.parametrize(
    ("flags", "size", "words"),
    [
        (["--image"], (176, 128), ["Size: 176 x 128, that of --image"]),
        (["--control_image"], (176, 128), ["Size: 176 x 128, that of --control_image"]),
        (["--image", "--width", 128], (128, 128), ["--image: 180 x 128, cropped .* of 128 x 128"]),
        (["--control_image", "--height", 192], (176, 192), ["--control_image: 180 x 128, cropped"]),
    ],
)
def test_images_are_cropped_never_stretched(kit, tmp_path, monkeypatch, capsys, flags, size, words):
    """Their size is the default; other proportions crop them, and a line says which."""
    given, fit = [], infer.ImageOps.fit
    monkeypatch.setattr(infer.ImageOps, "fit", lambda *args: given.append(fit(*args)) or given[-1])
    flags = [flags[0], kit / "apple.png", *flags[1:]]
    flags += ["--controlnet", kit / "control-sd15"] if "--control_image" in flags else []
    path = run(kit, tmp_path / "x.png", *flags, "--steps", 1)
    assert Image.open(path).size == size == given[0].size
    out = capsys.readouterr().out
    assert all(len(re.findall(word, out)) == 1 for word in words), out
    # A disc of the image is a disc in what the pipeline gets: its width is its height in scale.
    scale = max(size[0] / 180, size[1] / 128)
    row = [given[0].getpixel((x, size[1] // 2))[1] < 128 for x in range(size[0])]
    assert abs(sum(row) - min(100 * scale, size[0])) <= 8


def test_mask_follows_its_image(kit):
    """A mask of another size is that of the whole image, and cropped with it."""

    class Pipe:
        scheduler, device = None, "cpu"

        def encode_prompt(self, prompts, **kwargs):
            return [torch.zeros(len(prompts), 2, 1)]

        def __call__(self, **kwargs):
            self.given = kwargs
            return type("Result", (), {"images": kwargs["image"]})

    pipe, image = Pipe(), Image.new("RGB", (128, 64), "red")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    words = ["--lora", "x", "--prompt", "a", "--image", "x", "--mask", "x"]
    jobs = [infer.Job("a", None, 0, 64, 64)]
    infer.generate_batch(
        pipe, infer.parse_args(words), {"image": image, "mask_image": mask}, jobs, 1, 1
    )
    (mask,) = pipe.given["mask_image"]
    assert mask.size == (64, 64) and mask.getpixel((20, 32)) < 10 and mask.getpixel((44, 32)) > 245


def test_grid_times_merged_loras(kit, tmp_path, monkeypatch):
    """No LoRA layer is left in the UNet, in any column; its columns are generated last."""
    from peft.tuners.lora import LoraLayer

    seen, generate = [], infer.generate

    def watched(pipe, args, images, jobs, steps, *rest):
        loras = sum(isinstance(module, LoraLayer) for module in pipe.unet.modules())
        seen.append((type(pipe.scheduler).__name__[:3], loras))
        return generate(pipe, args, images, jobs, steps, *rest)

    monkeypatch.setattr(infer, "generate", watched)
    flags = ("--compare", "--scheduler", "lcm", "dpm++", "--steps", 1)
    path = run(kit, tmp_path / "x.png", *flags)
    assert seen == [("DPM", 0)] * 2 + [("LCM", 0)] * 2
    assert [column["scheduler"] for column in settings(path)["columns"]] == ["lcm", "dpm++"]


def test_grid_names_what_made_it(kit, tmp_path, monkeypatch):
    """LoRAs with their weights, and the strength."""
    titles, grid = [], compare.grid
    monkeypatch.setattr(compare, "grid", lambda *args: titles.append(args[-1]) or grid(*args))
    flags = ["--lcm_weight", 0.9, "--style_lora", f"{kit / 'sd15.safetensors'}:0.25"]
    flags += ["--image", kit / "apple.png", "--strength", 0.6]
    run(kit, tmp_path / "x.png", *flags, "--compare", "--scheduler", "lcm", "--steps", 2)
    for words in "sd15 0.9 + sd15 0.25 on teacher-sd15", "176 x 128 px", "seed 0", "strength 0.6":
        assert words in titles[0]


def test_grid_of_prompts_in_other_scripts(kit, tmp_path, monkeypatch, capsys):
    """Where no font has its letters, a row has its number, and the prompt is printed."""
    from PIL import ImageDraw as Draw

    texts, draw = [], Draw.ImageDraw.text
    monkeypatch.setattr(Draw.ImageDraw, "text", lambda *a, **k: texts.append(a[2]) or draw(*a, **k))
    monkeypatch.setattr(compare, "FONTS", ("no such font.ttf",))
    prompts = ("a cat", "красный дом", "\u732b")
    flags = ("--compare", "--scheduler", "lcm", "--steps", 1)
    run(kit, tmp_path / "x.png", *flags, prompt=prompts)
    assert "a cat" in texts and "Row 2" in texts and "Row 3" in texts
    assert "Row 2: красный дом\nRow 3: \u732b\n" in capsys.readouterr().out


def test_grid_keeps_small_images(monkeypatch):
    """Of an image that the grid shrinks only that is kept; too many rows are refused."""
    assert compare.shrink(0, Image.new("RGB", (1024, 512))).size == (512, 256)
    small = Image.new("RGB", (64, 96))
    assert compare.shrink(0, small) is small
    jobs = [infer.Job("a", None, i, None, None) for i in range(compare.ROWS + 1)]
    monkeypatch.setattr(infer, "read_inputs", lambda args: (jobs, {}, {}, {}))
    words = ["--lora", "x", "--prompt", "a", "--compare"]
    for more, says in (
        ([], "--compare: 101 prompts, .* at most 100"),
        (
            ["--output", "x.webp"],
            "--output x.webp: a grid",
        ),
    ):
        with pytest.raises(SystemExit, match=f"^error: {says}"):
            compare.compare(infer.parse_args([*words, *more]))


def test_fused_folder_generates_alone(kit, tmp_path):
    """--base_model without --lora: what the LoRA generates; another base is refused."""
    from safetensors.torch import load_file, save_file

    header = {"base_model": str(DEMO["sd15"]), "num_ddim_timesteps": "20"}
    save_file(load_file(kit / "sd15.safetensors"), tmp_path / "sd15.safetensors", header)
    run(tmp_path, None, "--fused_output", tmp_path / "fused", prompt=())
    ours = run(tmp_path, tmp_path / "ours.png", "--steps", 3)
    flags = ["--prompt", "a cat", *DEVICE, "--base_model"]
    output = ["--steps", 3, "--output", tmp_path / "x.png"]
    start(*flags, tmp_path / "fused", *output)
    assert difference(ours, tmp_path / "x.png") <= 3
    assert settings(tmp_path / "x.png")["original_inference_steps"] == 20
    assert "Lora" not in Image.open(tmp_path / "x.png").text["parameters"]
    style = ["--style_lora", f"{kit / 'sd15.safetensors'}:0.5"]
    start(*flags, tmp_path / "fused", *style, *output[:2], "--output", tmp_path / "style.png")
    assert difference(tmp_path / "style.png", tmp_path / "x.png") > 8
    for words, message in (
        ([*flags, DEMO["sd15"]], "no LCM-LoRA is merged in.* give --lora"),
        ([*flags, tmp_path / "fused", "--steps", 21], "--steps 21: must be from 1 to 20"),
        ([*flags, tmp_path / "fused", "--compare"], "--compare has no effect without --lora"),
        (["--prompt", "a"], "--lora is missing"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            infer.main([*map(str, words)])


def test_seeds(kit, tmp_path, capsys):
    """64 bits, of which the next after the last is 0; -1 is another one each time, and printed."""
    words = ["--lora", "x", "--prompt", "a", "b", "--seed"]
    jobs = infer.read_jobs(infer.parse_args([*words, str(2**64 - 1)]))
    assert [job.seed for job in jobs] == [2**64 - 1, 0]
    path = run(kit, tmp_path / "x.png", "--steps", 1, "--seed", 2**64 - 1)
    assert settings(path)["seed"] == 2**64 - 1
    capsys.readouterr()
    seeds = set()
    for _ in range(2):
        run(kit, path, "--steps", 1, "--seed", -1)
        (seed,) = re.findall(r"--seed (\d+)\n", capsys.readouterr().out)
        assert settings(path)["seed"] == int(seed)
        seeds.add(seed)
    assert len(seeds) == 2


def test_prompts_of_a1111_are_named(capsys):
    """Weights and LoRAs in a prompt, which CLIP reads as text: one line each; brackets are none."""
    for prompt, message in {
        "a (red:1.3) cat": r"warning: --prompt: \(red:1.3\) .*\n",
        "a cat <lora:ink:0.8>": "warning: --prompt: <lora:ink:0.8> .*--style_lora\n",
        "at (about) 12:30, [a|b] <3": "",
    }.items():
        args = infer.parse_args(["--lora", "x", "--prompt", prompt, prompt])
        infer.check_plan(args, [("lcm", 4)], infer.read_jobs(args), 50)
        assert re.fullmatch(message, capsys.readouterr().err), prompt


def test_long_prompts(kit, tmp_path, capsys):
    """One short line tells how many are too long, and what is left out of the first."""
    long = "a cat " * 50 + "with a hat"
    run(kit, tmp_path / "x.png", "--steps", 1, prompt=("a cat", long, long + " red"))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "2 of 3 prompts" in warning and "32 tokens" in warning
    assert len(warning) < 250 and "endoftext" not in warning


def test_out_of_memory_names_the_flags(kit, tmp_path, monkeypatch):
    """Where it is generated, and where the base is put on the device."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text")

    for kind, name in (UNet2DConditionModel, "forward"), (StableDiffusionPipeline, "to"):
        monkeypatch.setattr(kind, name, full)
        with pytest.raises(SystemExit, match="^error: .*--batch_size 1, --tiny_vae") as caught:
            run(kit, tmp_path / "x.png")
        assert "\n" not in str(caught.value) and "More text" not in str(caught.value)


def test_closed_pipe_and_narrow_terminal(kit, tmp_path):
    """`| head` and a stdout of ASCII: no traceback, and the images are whole."""
    program = f"{sys.executable} infer.py --lora {kit / 'sd15.safetensors'} --steps 1"
    program += f" {' '.join(DEVICE)} --prompt a b c --batch_size 1 --output {tmp_path}/cät.png"
    done = run_program("bash", "-c", f"{program} | head -n 1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines() == ["stopped: nothing reads the output any more"]
    done = run_program("bash", "-c", program, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert r"c\xe4t-2.png" in done.stdout
    assert all(is_image(tmp_path / f"cät-{index}.png") for index in range(3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("stdout", "message"),
    [
        ("| true", "stopped: nothing reads the output any more\n"),  # gone before the first line
        ("> /dev/full", "stopped: no output possible: .*No space left.*\n"),
        (">&-", ""),  # it then generates, silently
    ],
)
def test_stdout_that_takes_nothing(kit, tmp_path, stdout, message):
    """From the first line on, which comes while it loads: one line, whole images or none."""
    program = f"{sys.executable} infer.py --lora {kit / 'sd15.safetensors'} --steps 1"
    program += f" {' '.join(DEVICE)} --prompt a --output {tmp_path}/x.png {stdout}"
    program += "; exit ${PIPESTATUS[0]}"
    done = run_program("bash", "-c", program)
    assert re.fullmatch(message, done.stderr), done.stderr
    assert done.returncode == bool(message) and done.stdout == ""
    assert [is_image(path) for path in tmp_path.iterdir()] == [True] * (not message)
    assert run_program("bash", "-c", f"{sys.executable} infer.py --help {stdout}").stderr == ""


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    """The hook for what ends the program; any other error keeps its traceback."""
    infer.last_words(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert re.fullmatch("stopped.*complete\n", capsys.readouterr().err)
    infer.last_words(ValueError, ValueError("x"), None)
    assert "ValueError: x" in capsys.readouterr().err


def test_progress_of_a_run(kit, tmp_path, monkeypatch):
    """A bar counts the images, of which it knows how many there are: tqdm tells the time left."""
    bars, bar = [], infer.tqdm

    class Bar(bar):
        def update(self, n=1):
            bars.append((self.total, n))
            return super().update(n)

    monkeypatch.setattr(infer, "tqdm", Bar)
    again(kit, tmp_path / "x.png")
    assert bars == [(5, 2), (5, 2), (5, 1)]
