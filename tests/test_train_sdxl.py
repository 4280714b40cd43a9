"""train_lcm_lora_sdxl.py: what it does not share with the SD 1.5 trainer.

And both trainers end to end.
"""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LORA,
    ROOT,
    SMOOTH,
    command_line,
    image_bytes,
    launch,
    load_script,
    log,
    lora_file,
    near,
    same,
    series,
)
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from PIL import Image
from test_maths import algorithm_1

SCRIPT = "train_lcm_lora_sdxl.py"
PIPELINES = {
    "sd15": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "ssd1b": StableDiffusionXLPipeline,
}


@pytest.fixture(scope="session")
def family(request, train_by, make_teacher):
    """family(layout) -> (the trainer's module, a teacher's folder, train).

    train(flag=value, ...) -> output folder.
    """
    made = {}

    def family(layout, **settings):
        key = (layout, *sorted(settings.items()))
        if key not in made:
            module = load_script("train_lcm_lora_sd15.py" if layout == "sd15" else SCRIPT)
            teacher = make_teacher(layout, **settings)
            made[key] = module, teacher, train_by(module, teacher)
        return made[key]

    return family


@pytest.fixture(scope="module")
def plain_xl(train_xl):
    """The output of a run of four steps with a checkpoint at 2 and at 4."""
    return train_xl(checkpointing_steps=2)


@pytest.fixture(scope="module")
def pipe(xl_teacher):
    """The small teacher as a pipeline."""
    return StableDiffusionXLPipeline.from_pretrained(xl_teacher)


# ------------------------------------------------------------------------------------- conditioning


def sample(sdxl, size, *flags, orientation=None, place=0):
    """A training sample of an image of `size` (width, height), at resolution 20; and the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    words = [
        "--pretrained_teacher_model",
        "x",
        "--train_data_dir",
        "y",
        "--resolution",
        "20",
        *flags,
    ]
    record = {"image": image_bytes(image, exif=exif), "text": "a"}
    return sdxl.Samples([record], None, sdxl.parse_args(words), 64)[0, place], image


def crop_of(pixels, left, top):
    """The 20 x 20 crop of an image as pixels [3,20,20] in -1..1."""
    return torch.from_numpy(pixels[top : top + 20, left : left + 20]).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    "size", [(20, 44), (44, 20), (20, 20)], ids=["portrait", "landscape", "square"]
)
@pytest.mark.parametrize(
    "flags", [(), ("--center_crop",), ("--random_flip",)], ids=["random", "centre", "flipped"]
)
def test_defect_14_sizes_are_those_of_the_crop(sdxl, size, flags):
    """Height before width; the crop's edges are those of the pixels trained on.

    Used on the (mirrored) image itself they give these very pixels.
    """
    mirrored, edges = 0, set()
    for place in range(12):
        one, image = sample(sdxl, size, *flags, place=place)
        height, width, top, left, *target = one["time_ids"].tolist()
        assert (width, height) == size and target == [20, 20]
        versions = [np.asarray(image), np.asarray(image)[:, ::-1]]
        fits = [
            torch.allclose(crop_of(pixels.copy(), left, top), one["pixels"], atol=1e-6)
            for pixels in versions
        ]
        assert any(fits)
        mirrored += not fits[0]
        edges.add((top, left))
    assert (0 < mirrored < 12) == ("--random_flip" in flags)
    if "--center_crop" in flags:
        assert edges == {((size[1] - 20) // 2, (size[0] - 20) // 2)}
    elif size != (20, 20):
        assert len(edges) > 4 and {top for top, _ in edges if size[1] == 20} <= {0}


def test_size_is_that_of_the_upright_picture_before_resizing(sdxl):
    """An image twice as large, stored turned.

    Its own upright size, the crop's place in the resized one.
    """
    one, _ = sample(sdxl, (88, 40), "--center_crop", orientation=6)
    assert one["time_ids"].tolist() == [88, 40, 12, 0, 20, 20]


def test_fixed_size(sdxl):
    one, _ = sample(sdxl, (88, 40), "--use_fix_crop_and_size")
    assert one["time_ids"].tolist() == [20, 20, 0, 0, 20, 20]


def test_prompts_are_encoded_as_sdxl_does(sdxl, pipe):
    """Penultimate layers of both encoders side by side, the pooled output of the second."""
    captions = ["red apple", "one two three four five six seven"]
    c = sdxl.encode_captions(pipe, captions)
    ids = torch.tensor(
        [pipe.tokenizer(text, padding="max_length", truncation=True).input_ids for text in captions]
    )
    with torch.no_grad():
        first = pipe.text_encoder(ids, output_hidden_states=True)
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    assert c.keys() == {"prompt", "text_embeds"} and c["prompt"].shape == (2, 16, 64)
    assert torch.allclose(c["prompt"], expected, atol=1e-5)
    assert torch.allclose(c["text_embeds"], second.text_embeds, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_defect_20_the_empty_prompt_is_the_teachers(sdxl, pipe, zeros):
    """Zeros where the teacher's force_zeros_for_empty_prompt says so, as in sampling.

    Else what the encoders make of it.
    """
    pipe = copy.copy(pipe)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    c = sdxl.encode_captions(pipe, ["red apple", ""])
    assert c["prompt"][0].abs().max() > 0.1 and c["text_embeds"][0].abs().max() > 0.01
    _, empty, _, pooled = pipe.encode_prompt(
        "red apple", device="cpu", do_classifier_free_guidance=True
    )
    assert torch.allclose(c["prompt"][1], empty[0], atol=1e-5) and torch.allclose(
        c["text_embeds"][1], pooled[0], atol=1e-5
    )
    assert (c["prompt"][1].abs().max() == 0) == zeros


def test_null_keeps_the_sizes(sdxl, train_xl, monkeypatch):
    """The teacher gets each image's sizes, with the prompt and without it.

    Nothing else of what it gets without the prompt is the image's.
    """
    seen, predict, teachers, step = [], sdxl.predict, [], sdxl.distillation_loss

    def spy_on_the_step(run, *rest):
        teachers.append(run.teacher)
        return step(run, *rest)

    def spy(unet, z_t, t, c):
        if unet is teachers[-1]:
            seen.append([{name: value[i : i + 2] for name, value in c.items()} for i in (0, 2)])
        return predict(unet, z_t, t, c)

    monkeypatch.setattr(sdxl, "distillation_loss", spy_on_the_step)
    monkeypatch.setattr(sdxl, "predict", spy)
    train_xl(max_train_steps=6)
    assert len(seen) == 6
    sizes = torch.cat([c["time_ids"] for c, _ in seen])
    assert len({tuple(row[:2]) for row in sizes.tolist()}) > 4  # the images' sides differ
    for c, null in seen:
        assert torch.equal(c["time_ids"], null["time_ids"]) and c["time_ids"].shape == (2, 6)
        assert null["prompt"].abs().max() == 0 and null["text_embeds"].abs().max() == 0
        assert c["prompt"].abs().max() > 0.1


@pytest.mark.parametrize("flag", ["use_fix_crop_and_size", "center_crop"])
def test_sizes_reach_the_unet(train_xl, plain_xl, flag):
    assert series(train_xl(**{flag: True})) != series(plain_xl)


# ----------------------------------------------------------------------- Algorithm 1, a second time


def as_double(unet):
    """A float64 copy of a UNet that is called like the toy networks of test_maths.

    With all conditions as one dict.
    """
    unet = copy.deepcopy(unet).double()

    def call(z, t, c):
        added = {name: c[name] for name in ("text_embeds", "time_ids") if name in c}
        return unet(z, t, encoder_hidden_states=c["prompt"], added_cond_kwargs=added)

    return call


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_losses_of_ten_steps_are_those_of_algorithm_1(family, monkeypatch, layout, prediction_type):
    """Every loss of a real run against float64 code written from the report.

    On the same random numbers and the same weights.
    """
    module, _, train = family(layout, prediction_type=prediction_type)
    step, expected = module.distillation_loss, []

    def spy(run, z, c, noise, t_nk, omega, args):
        nets, kinds = (as_double(run.teacher), as_double(run.target)), (prediction_type, "huber")
        with torch.no_grad():
            batch = (z, c, run.c_null, noise, t_nk, omega)
            expected.append(algorithm_1(*nets, *batch, *kinds, args.huber_c).item())
        return step(run, z, c, noise, t_nk, omega, args)

    monkeypatch.setattr(module, "distillation_loss", spy)
    out = train(max_train_steps=10, huber_c=0.01)
    losses = [row["loss"] for row in log(out)]
    assert len(losses) == len(expected) == 10
    assert np.allclose(losses, expected, rtol=2e-5, atol=0)
    assert max(losses) > 1.05 * min(losses)


def test_v_prediction_with_zero_terminal_snr(family):
    """All noise at t = 999, where nothing is left of the image."""
    _, _, train = family("sdxl", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    losses = np.array(series(train(num_ddim_timesteps=1)))
    assert np.isfinite(losses).all() and (losses > 0).all()


def test_epsilon_with_zero_terminal_snr_is_refused(family):
    _, _, train = family("sdxl", rescale_betas_zero_snr=True)
    with pytest.raises(SystemExit, match=r"prediction_type.*rescale_betas_zero_snr"):
        train()


# -------------------------------------------------------------------------------- files, end to end


@pytest.mark.parametrize("layout", ["sdxl", "ssd1b"])
def test_defects_01_02_04_all_layers_are_loaded(family, layout):
    """By diffusers and by PEFT: as many layers as were trained, at the trained strength.

    Attention is among them.
    """
    _, teacher, train = family(layout)
    out = train(lora_rank=8, lora_alpha=4)
    tensors, header = lora_file(out)
    trained = {key.split(".")[0] for key in tensors}
    assert header["family"] == "sdxl" and sum("attn" in name for name in trained) > 20
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(out)
    peft_unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    peft_unet = PeftModel.from_pretrained(peft_unet, out / "unet")
    for unet in (pipe.unet, peft_unet):
        layers = [module for module in unet.modules() if hasattr(module, "lora_A")]
        assert len(layers) == len(trained) == len(tensors) / 3
        assert all(next(iter(layer.scaling.values())) == 0.5 for layer in layers)
    random = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=random),
        torch.tensor([259, 999]),
        torch.randn(2, 16, 64, generator=random),
    )
    added = {
        "text_embeds": torch.randn(2, 32, generator=random),
        "time_ids": torch.full((2, 6), 32.0),
    }
    with torch.no_grad():
        a, b = (unet(*inputs, added_cond_kwargs=added).sample for unet in (pipe.unet, peft_unet))
        pipe.unet.disable_lora()
        base = pipe.unet(*inputs, added_cond_kwargs=added).sample
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, base, atol=1e-3)


@pytest.mark.parametrize("layout", ["sd15", "sdxl", "ssd1b"])
def test_code_of_the_source_page(family, layout):
    """Its inference code on a checkpoint folder, but for names, sizes and precision."""
    _, teacher, train = family(layout)
    out = train(checkpointing_steps=4)
    DiffusionPipeline, AutoencoderKL = (
        PIPELINES[layout],
        type(PIPELINES[layout].from_pretrained(teacher).vae),
    )

    checkpoint = Path(out / "checkpoint-4")
    prompt = "yoda pokemon"

    vae = AutoencoderKL.from_pretrained(teacher / "vae")
    pipe = DiffusionPipeline.from_pretrained(
        teacher, vae=vae, scheduler=LCMScheduler.from_pretrained(teacher, subfolder="scheduler")
    )
    pipe.to("cpu")
    base = pipe.unet
    pipe.unet = PeftModel.from_pretrained(pipe.unet, checkpoint / "unet", adapter_name="default")
    assert (
        not (checkpoint / "text_encoder_one").exists()
        and not (checkpoint / "text_encoder_two").exists()
    )

    def generate():
        settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}
        return pipe(prompt, **settings, generator=torch.manual_seed(0)).images[0]

    image = generate()
    assert image.size == (32, 32)
    pipe.unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    assert isinstance(base, UNet2DConditionModel) and generate().tobytes() != image.tobytes()


@pytest.mark.parametrize("layout", ["sdxl", "ssd1b"])
def test_one_seed_one_lora_and_exact_resume(family, layout):
    _, _, train = family(layout)
    whole, again = train(checkpointing_steps=2), train(checkpointing_steps=2)
    assert same(whole, again)
    shutil.rmtree(again / "checkpoint-4")
    (again / LORA).unlink()
    assert same(
        whole, train(output_dir=again, resume_from_checkpoint="latest", checkpointing_steps=2)
    )


def test_defect_05_two_processes_are_one(train_xl, xl_teacher, images, tmp_path):
    flags = {
        "pretrained_teacher_model": xl_teacher, "train_data_dir": images,
        "output_dir": tmp_path / "two", "resolution": 32, "lora_rank": 4, "max_train_steps": 3,
        "report_to": "none", "phases": 1,
    }  # fmt: skip
    done = launch(
        ROOT / SCRIPT,
        *command_line(flags | SMOOTH | {"train_batch_size": 2}),
        count=2,
    )
    assert done.returncode == 0, done.stderr
    assert "in a step 2 x 1 accumulated x 2 processes" in done.stdout
    assert near(tmp_path / "two", train_xl(**SMOOTH, max_train_steps=3))


def test_alone_in_a_folder(xl_teacher, images, tmp_path):
    """The script copied to an empty folder, with validation images and bf16."""
    shutil.copy(ROOT / SCRIPT, tmp_path)
    flags = {
        "pretrained_teacher_model": xl_teacher, "train_data_dir": images, "output_dir": "out",
        "lora_rank": 4, "train_batch_size": 2, "max_train_steps": 2, "report_to": "none",
        "validation_prompts": ["red apple"], "mixed_precision": "bf16",
    }  # fmt: skip
    done = launch(tmp_path / SCRIPT, *command_line(flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    lora = [LORA, "unet/adapter_config.json", "unet/adapter_model.safetensors"]
    kept = [*lora, "training_state.pt", "flags.json", "manifest.json"]
    assert found == {
        *lora, *(f"checkpoint-2/{name}" for name in kept), "args.json", "log.jsonl", "README.md",
        "validation/step-000002.png", ".lock",
    }  # fmt: skip
    assert len(log(tmp_path / "out")) == 2


@pytest.mark.parametrize("upcast", [True, False])
def test_vae_in_fp16_only_where_it_can(sdxl, xl_teacher, upcast):
    """SDXL's own VAE overflows in fp16 and says so with force_upcast.

    The rest of the teacher is fp16 all the same.
    """
    args = sdxl.parse_args(["--pretrained_teacher_model", str(xl_teacher), "--train_data_dir", "x"])
    with pytest.MonkeyPatch.context() as patch:
        opened, open_teacher = [], sdxl.open_teacher

        def open_with_config(*given):
            pipe = open_teacher(*given)
            pipe.vae.register_to_config(force_upcast=upcast)
            opened.append(pipe)
            return pipe

        patch.setattr(sdxl, "open_teacher", open_with_config)
        pipe = sdxl.load_teacher(args, torch.float16)
    assert opened == [pipe] and pipe.unet.dtype == pipe.text_encoder_2.dtype == torch.float16
    assert pipe.vae.dtype == (torch.float32 if upcast else torch.float16)


def test_fp16_vae_upcast_encodes(sdxl, xl_teacher):
    """A float32 VAE beside an fp16 UNet: images are encoded by it."""
    args = sdxl.parse_args(["--pretrained_teacher_model", str(xl_teacher), "--train_data_dir", "x"])
    pipe = sdxl.load_teacher(args, torch.float16)
    moments = sdxl.encode_images(pipe.vae, torch.zeros(1, 3, 32, 32), 8)
    z = sdxl.sample_posterior(moments, torch.zeros(1, 4, 8, 8), pipe.vae.config.scaling_factor)
    assert moments.dtype == torch.float32 and z.dtype == torch.float32 and z.shape == (1, 4, 8, 8)


def test_resolution_is_the_teachers(train_xl):
    """Without the flag: the UNet's sample size times the VAE's factor."""
    args = train_xl(resolution=None, max_train_steps=1) / "args.json"
    assert '"resolution": 32' in args.read_text()


# ---------------------------------------------------------------------------------------- bad input


BAD = {
    "SD 1.5 teacher": ("teacher", "--pretrained_teacher_model .*train_lcm_lora_sd15.py"),
    "no such teacher": ("/nowhere", "--pretrained_teacher_model /nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_teacher(train_xl, teacher, tmp_path, case):
    name, message = BAD[case]
    with pytest.raises(SystemExit, match=message) as end:
        train_xl(
            pretrained_teacher_model=teacher if name == "teacher" else name,
            output_dir=tmp_path / "out",
        )
    assert str(end.value).startswith(f"{SCRIPT}: error: ") and "\n" not in str(end.value)
    assert not any(tmp_path.iterdir())
