"""infer.py takes a teacher as its owner uses it.

What it predicts, prompts in pieces, guidance that is rescaled or kept, and recipe.json's defaults.
"""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, ROOT, load_script
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import as_single_file
from test_infer import compare, difference, infer, make_lora, start

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
MARKS = {key: torch.zeros(1) for key in ("v_pred", "ztsnr")}


@pytest.fixture(scope="module")
def kit(make_teacher, tmp_path_factory):
    """Small teachers by name, in folders and in one file, and a LoRA of each family."""
    folder = tmp_path_factory.mktemp("kit")
    for name, layout, scheduler in (
        ("sd15", "sd15", {}),
        ("sd15-v", "sd15", ZERO_SNR),
        ("sdxl", "sdxl", {}),
        ("sdxl-v", "sdxl", ZERO_SNR),
    ):
        shutil.move(make_teacher(layout, **scheduler), folder / name)
    for family in "sd15", "sdxl":
        file = as_single_file(folder / family)  # SDXL's text encoders are made anew for it
        save_file(load_file(file) | MARKS, folder / f"{family}-marked.safetensors")
        for part in ("text_encoder", "text_encoder_2"):
            if (folder / family / part).exists():
                shutil.rmtree(folder / f"{family}-v" / part)
                shutil.copytree(folder / family / part, folder / f"{family}-v" / part)
        unet = UNet2DConditionModel.from_pretrained(folder / family, subfolder="unet")
        base = folder / family
        make_lora(unet, folder / f"{family}-lora.safetensors", base, family=family)
        torch.manual_seed(0)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        net.save_pretrained(folder / f"{family}-control")
    Image.effect_noise((32, 32), 90).convert("RGB").save(folder / "image.png")
    return folder


def lora(kit, family, **header):
    """A copy of the LoRA of a family with this header, `training_args` as a dict."""
    if "training_args" in header:
        header["training_args"] = json.dumps(header["training_args"])
    unet = UNet2DConditionModel.from_pretrained(kit / family, subfolder="unet")
    path = kit / f"lora-{len(list(kit.iterdir()))}.safetensors"
    make_lora(unet, path, header.pop("base_model", kit / family), family=family, **header)
    return path


def run(output, *flags, lora):
    """Generate one image in two steps, in float32."""
    words = (*DEVICE, "--prompt", "a cat", "--steps", 2, "--output", output)
    start("--lora", lora, *words, *flags)
    return output


def refused(message, output, *flags, lora):
    """infer.py ends with one line and generates nothing."""
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as end:
        run(output, *flags, lora=lora)
    assert "\n" not in str(end.value) and not output.exists()


def settings(path):
    """What an image says about itself."""
    return json.loads(Image.open(path).text["infer_args"])


def recipe(kit, tmp_path, family="sd15", **values):
    """A copy of a teacher with a recipe."""
    folder = shutil.copytree(kit / family, tmp_path / "teacher")
    (folder / "recipe.json").write_text(json.dumps({"format": 1} | values))
    return folder


# ------------------------------------------------------------------ What the model predicts


def test_a_marked_file_is_a_folder_of_its_kind(kit, tmp_path, capsys):
    """The file generates what the folder of that scheduler does, and not what epsilon gives."""
    plain = kit / "sdxl-lora.safetensors"
    file = ("--base_model", kit / "sdxl-marked.safetensors", "--base_config", kit / "sdxl-v")
    folder = run(tmp_path / "folder.png", "--base_model", kit / "sdxl-v", lora=plain)
    assert difference(folder, run(tmp_path / "file.png", *file, lora=plain)) <= 1
    assert "is taken as" not in capsys.readouterr().out  # it is what the config says
    assert difference(folder, run(tmp_path / "epsilon.png", lora=plain)) > 8


ZERO = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
EPSILON = ["--prediction_type", "epsilon", "--no-rescale_betas_zero_snr"]


@pytest.mark.parametrize(
    ("base", "flags", "header", "is_v"),
    [
        ("sd15-marked.safetensors", ZERO, {}, True),
        ("sd15-marked.safetensors", [], ZERO_SNR, True),
        ("sd15.safetensors", ZERO, {}, True),
        ("sd15", ZERO, {}, True),
        ("sd15", [], ZERO_SNR, True),
        ("sd15", EPSILON, ZERO_SNR, False),
        ("sd15", [], {}, False),
    ],
)
def test_flag_header_and_config(kit, tmp_path, capsys, base, flags, header, is_v):
    """Of a base whose config says epsilon: a flag goes before the LoRA's header, both before it."""
    path = lora(kit, "sd15", training_args=header)
    flags = ["--base_model", kit / base, "--prompt", "a", *flags]
    flags += ["--base_config", kit / "sd15"] * base.endswith("s")
    args = infer.parse_args([*map(str, ["--lora", path, *DEVICE, *flags])])
    jobs, images, loras, settings = infer.read_inputs(args)
    pipe, _, _, schedulers = infer.load(args, jobs, images, {}, settings)
    usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    expected = ZERO_SNR if is_v else usual
    for scheduler in [pipe.scheduler, *schedulers.values()]:
        assert expected.items() <= scheduler.config.items()
    said = re.findall("(.*) is taken as (.*)\n", capsys.readouterr().out)
    assert said == [(str(kit / base), "v_prediction, zero terminal SNR")] * is_v
    assert settings["prediction_type"] in (None, expected["prediction_type"])


def test_another_prediction_is_another_image(kit, tmp_path):
    """The same command with the flag does not take the image that is there for its own."""
    words = ["--lora", kit / "sd15-lora.safetensors", "--prompt", "a", "--output"]
    words = [*map(str, [*words, tmp_path / "x.png", "--steps", 1, *DEVICE])]
    infer.main(words)
    with pytest.raises(SystemExit, match="exists, of other settings"):
        infer.main([*words, "--prediction_type", "v_prediction"])


CONTRADICTIONS = {
    # markers, ModelSpec, config, flags, what the line says
    "config": (MARKS, {}, "sd15", [], "v_prediction by its marker, epsilon by the config"),
    "flag": (
        MARKS,
        {},
        "sd15-v",
        ["--prediction_type", "epsilon"],
        "v_prediction by its marker, epsilon by --prediction_type",
    ),
    "zero SNR": (
        MARKS,
        {},
        "sd15-v",
        ["--no-rescale_betas_zero_snr"],
        "rescale_betas_zero_snr is True by its marker, False by --rescale_betas_zero_snr",
    ),
    "ModelSpec": ({}, {"modelspec.prediction_type": "v"}, "sd15", [], "epsilon by the config"),
    "both": (  # the tensor goes before ModelSpec
        {"v_pred": torch.zeros(1)},
        {"modelspec.prediction_type": "epsilon"},
        "sd15",
        [],
        "v_prediction by its marker, epsilon by the config",
    ),
    "EDM": ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "sd15", [], "holds edm_vpred.sigma_max"),
    "ztsnr alone": (
        {"ztsnr": torch.zeros(1)},
        {},
        "sd15",
        ["--rescale_betas_zero_snr"],
        "zero SNR, which needs --prediction_type v_prediction",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_one_line(kit, tmp_path, case):
    """Before the weights are read."""
    marks, about, config, flags, message = CONTRADICTIONS[case]
    file = tmp_path / "x.safetensors"
    save_file(load_file(kit / "sd15.safetensors") | marks, file, about)
    flags = ["--base_model", file, "--base_config", kit / config, *flags]
    refused(message, tmp_path / "x.png", *flags, lora=kit / "sd15-lora.safetensors")


def test_a_folder_of_epsilon_and_zero_snr(kit, tmp_path):
    """Nothing could be generated at t = 999; the flags say which of both is wrong."""
    flags, plain = ("--base_model", kit / "sd15-v"), kit / "sd15-lora.safetensors"
    message = "zero SNR, which needs --prediction_type v_prediction"
    refused(message, tmp_path / "x.png", *flags, "--prediction_type", "epsilon", lora=plain)
    flags += ("--prediction_type", "epsilon", "--no-rescale_betas_zero_snr")
    made = run(tmp_path / "a.png", *flags, lora=plain)
    assert difference(made, run(tmp_path / "b.png", lora=plain)) <= 1  # of the same weights


@pytest.mark.parametrize("value", ["sample", 3, ["epsilon"], {}])
def test_a_strange_header(kit, tmp_path, value):
    """The line names the file and the key."""
    path = lora(kit, "sd15", training_args={"prediction_type": value})
    message = f'LoRA {path}: training_args: prediction_type is .*must be one of "epsilon"'
    refused(message, tmp_path / "x.png", lora=path)


def test_older_headers_and_headers_of_nothing(kit, tmp_path):
    """The same image without the keys, with nulls and with the defaults."""
    usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "negative_prompt": ""}
    usual |= {"guidance_rescale": 0.0, "max_prompt_chunks": 1}
    made = [
        run(tmp_path / f"{i}.png", "--guidance_scale", 1.5, lora=lora(kit, "sd15", **header))
        for i, header in enumerate(
            [{}, {"training_args": dict.fromkeys(usual)}, {"training_args": usual}]
        )
    ]
    assert difference(made[0], made[1]) == difference(made[0], made[2]) == 0


def test_configs_of_the_library_are_guesses(kit, capsys):
    """Without --base_config a marker goes before the config that the Hub has for SD 1.x."""
    place = Path(HF_HUB_CACHE, "models--stable-diffusion-v1-5--stable-diffusion-v1-5")
    folder = place / "snapshots" / ("0" * 40)
    shutil.copytree(kit / "sd15", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())  # as SD 1.5's own, without what is the usual
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ZERO_SNR}))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(folder.name)
    args = infer.parse_args(["--lora", "x", "--prompt", "a"])
    try:
        for name, kind, zero in ("sd15-marked", "v_prediction", True), ("sd15", "epsilon", False):
            file = str(kit / f"{name}.safetensors")
            pipe = infer.load_pipeline(file, None, args, "cpu", torch.float32, {})
            assert pipe.scheduler.config.prediction_type == kind
            assert pipe.scheduler.config.rescale_betas_zero_snr is zero
            assert f"{name}.safetensors is taken as {kind}" in capsys.readouterr().out
    finally:
        shutil.rmtree(place)


def test_guess_of_sd2(tmp_path):
    """An SD 2.x file without a marker is told by one bias, as ComfyUI tells it."""
    unet = "model.diffusion_model."
    width = f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    bias = f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    noise = torch.randn(320, generator=torch.Generator().manual_seed(0))
    for columns, spread, kind in (
        (1024, 0.12, "v_prediction"),
        (1024, 0.05, "epsilon"),
        (768, 0.12, None),
    ):
        file = tmp_path / "x.safetensors"
        save_file({width: torch.zeros(8, columns), bias: spread * noise}, file)
        assert infer.read_markers(file) == ({}, {"prediction_type": kind} if kind else {})


def test_fused_folder_tells_what_it_predicts(kit, tmp_path):
    """diffusers alone generates from the folder what infer.py generates from the marked file."""
    plain = kit / "sd15-lora.safetensors"
    flags = ("--base_model", kit / "sd15-marked.safetensors", "--base_config", kit / "sd15-v")
    start("--lora", plain, *DEVICE, *flags, "--fused_output", tmp_path / "fused")
    config = json.loads((tmp_path / "fused/scheduler/scheduler_config.json").read_text())
    assert ZERO_SNR.items() <= config.items()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    pipe.set_progress_bar_config(disable=True)
    more = {"num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator("cpu").manual_seed(0)
    pipe("a cat", generator=generator, **more).images[0].save(tmp_path / "theirs.png")
    ours = run(tmp_path / "ours.png", *flags, lora=plain)
    assert difference(ours, tmp_path / "theirs.png") <= 3


# --------------------------------------------------------------------------- Prompts in pieces


@pytest.fixture(scope="module")
def tokenizer():
    """One of 5,001 tokens, reading 77 at once as CLIP's do."""
    from transformers import CLIPTokenizer

    folder = ROOT / "demo" / "teacher-sd15" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def packed(text, tokenizer, room):
    """The tokens of a prompt in pieces, words one by one: for words that fit into a piece."""
    pieces = [[]]
    for word in text.split():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) <= room
        if len(pieces[-1]) + len(ids) > room:
            pieces.append([])
        pieces[-1] += ids
    return pieces


TEXTS = {
    "empty": "",
    "spaces": " " * 300,
    "short": "a cat",
    "75": "a " * 75,
    "76": "a " * 76,
    "150": " a" * 150,
    "151": "\ta" * 151,
    "runs of spaces": "  a \t\n cat   on\u3000the\u00a0 mat  " * 40,
    "words of several tokens": "a photograph of zzyzx, in the style-of_x; " * 20,
    "tags": "1girl, solo, long_hair, (smile), looking at viewer, masterpiece, best quality, " * 8,
    "Russian": "красный дом у реки, " * 20,
    "Chinese": "一只红色的 猫 坐在 屋顶上 " * 12,
    "Hindi": "लाल सेब मेज पर " * 12,
    "decomposed": "cafe\u0301 e\u0301te\u0301 " * 30,
    "emoji": "a \U0001f600 cat \U0001f468\u200d\U0001f469\u200d\U0001f467 " * 12,
    "special tokens": "a <|endoftext|> b " * 40,
}
LONG_WORDS = {
    "no spaces": "a" * 1000,
    "Chinese": "一只红色的猫坐在屋顶上" * 30,
    "emoji": "\U0001f600" * 100,
    "emoji after letters": "x" + "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 30,
    "between words": "a cat " + "pneumono" * 60 + " on a mat",
    "commas": "a," * 200,
    "accents": "e\u0301" * 300,
    "zalgo": ("e" + "\u0301\u0323\u0489" * 3) * 60,
    "controls": "a\x1f\u200b" * 100,
    "musical": "\U0001d160" * 40,
}


@pytest.mark.parametrize("name", TEXTS)
def test_split_prompt(tokenizer, name):
    """Token for token what packing the words one by one gives, and no letter is lost."""
    text, room = TEXTS[name], tokenizer.model_max_length - 2
    expected = packed(text, tokenizer, room)
    for chunks in (1, len(expected), len(expected) + 2):
        pieces = infer.split_prompt(text, tokenizer, chunks)
        ids = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
        assert ids == (expected + [[]] * chunks)[:chunks]
    assert "".join(pieces) == text
    if name in ("75", "76", "150", "151"):
        assert len(expected) == {"75": 1, "76": 2, "150": 2, "151": 3}[name]


@pytest.mark.parametrize("name", LONG_WORDS)
@pytest.mark.parametrize("length", [16, 77])
def test_split_prompt_in_words(tokenizer, name, length):
    """A word longer than a piece: all letters, each piece fits and is nearly full."""
    tokenizer.model_max_length, before = length, tokenizer.model_max_length
    try:
        text, room = LONG_WORDS[name], length - 2
        *pieces, last = filter(None, infer.split_prompt(text, tokenizer, 1000))
        assert "".join(pieces) + last == text and len(pieces) > 0
        counts = [len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces]
        assert max(counts) <= room
        full = counts[1:-1] if name == "between words" else counts
        assert min(full, default=room) >= room - 12
        assert len(tokenizer(last, add_special_tokens=False).input_ids) <= room
    finally:
        tokenizer.model_max_length = before


def embeddings(pipe, text, chunks):
    """([chunks * L, D], pooled) of a prompt: own pieces of tokens, encoders called directly."""
    rows, pooled = [], None
    ends = [("", 0)] + [("_2", 1)] * hasattr(pipe, "text_encoder_2")
    for end, xl in ends:
        tokenizer = getattr(pipe, f"tokenizer{end}")
        encoder, length = getattr(pipe, f"text_encoder{end}"), tokenizer.model_max_length
        pieces, states = packed(text, tokenizer, length - 2), []
        for piece in [*pieces, *[[]] * chunks][:chunks]:
            ids = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (length - len(ids))
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
            states.append(out.hidden_states[-2][0] if len(ends) > 1 else out.last_hidden_state[0])
            if xl and pooled is None:
                pooled = out.text_embeds[0]
        rows.append(torch.cat(states))
    return torch.cat(rows, 1), pooled


PROMPTS = ("a b", "one two three four five six seven", "x " * 40)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.no_grad()
def test_embeddings_of_long_prompts(kit, family):
    """Of three pieces, by a second implementation, to 1e-5; with one as the pipeline has them."""
    pipe = DiffusionPipeline.from_pretrained(kit / family)
    for negative in (None, "ugly " * 8):
        jobs = [infer.Job(prompt, negative, 0, 32, 32) for prompt in PROMPTS]
        made = infer.encode_prompts(pipe, jobs, 3, True)
        for i, prompt in enumerate(PROMPTS):
            for sign, text in ("", prompt), ("negative_", negative or ""):
                states, pooled = embeddings(pipe, text, 3)
                zeros = text == "" and family == "sdxl"  # force_zeros_for_empty_prompt
                ours = made[f"{sign}prompt_embeds"][i]
                assert ours.shape == (48, states.shape[1])
                assert torch.allclose(ours, states * (not zeros), rtol=0, atol=1e-5)
                if pooled is not None:
                    ours = made[f"{sign}pooled_prompt_embeds"][i]
                    assert torch.allclose(ours, pooled * (not zeros), rtol=0, atol=1e-5)
    made = infer.encode_prompts(pipe, jobs, 1, False)
    theirs = pipe.encode_prompt([*PROMPTS], device="cpu", num_images_per_prompt=1,
                                do_classifier_free_guidance=False)  # fmt: skip
    assert torch.equal(made["prompt_embeds"], theirs[0])
    names = ["prompt_embeds", "pooled_prompt_embeds"][: len(theirs) // 2]
    assert [*made] == names


@pytest.mark.parametrize("given", ["", "image", "image mask", "control", "control image mask"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_long_prompts_reach_the_network(kit, tmp_path, monkeypatch, capsys, family, given):
    """Text and negative text in three pieces, whatever else is given; nothing is left out."""
    seen, forward = [], UNet2DConditionModel.forward

    def watched(self, x, t, encoder_hidden_states, **more):
        seen.append(encoder_hidden_states)
        return forward(self, x, t, encoder_hidden_states, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    image = kit / "image.png"
    files = {"image": ["--image", image], "mask": ["--mask", image]}
    files["control"] = ["--controlnet", kit / f"{family}-control", "--control_image", image]
    flags = [word for name in given.split() for word in files[name]]
    flags += ["--max_prompt_chunks", 3, "--negative_prompt", "ugly " * 8, "--guidance_scale", 1.5]
    flags += ["--prompt", *PROMPTS[1:]]
    start("--lora", kit / f"{family}-lora.safetensors", *DEVICE, "--steps", 2, *flags,
          "--output", tmp_path / "x.png")  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(kit / family)
    with torch.no_grad():
        texts = ["ugly " * 8] * 2 + [*PROMPTS[1:]]
        expected = torch.stack([embeddings(pipe, text, 3)[0] for text in texts])
    assert seen and all(torch.allclose(x.cpu(), expected, rtol=0, atol=1e-5) for x in seen)
    assert "warning:" not in capsys.readouterr().err


def test_what_is_beyond_the_pieces(kit, tmp_path, capsys):
    """It is counted, and the flag named; a header's number of pieces is the default."""
    path = lora(kit, "sd15", training_args={"max_prompt_chunks": 2})
    flags = ("--prompt", "a " * 28, "a " * 31)
    for more, says in (
        (
            (),
            r"1 of 2 prompts exceed the 2 x 16 tokens .* 3 are left out, .*--max_prompt_chunks 3 ",
        ),
        (("--max_prompt_chunks", 1), "2 of 2 prompts exceed the 1 x 16 .* 14 are left out"),
        (("--max_prompt_chunks", 3), ""),
    ):
        run(tmp_path / "x.png", *flags, *more, lora=path)
        error = capsys.readouterr().err
        assert re.match(f"warning: {says}" if says else "$", error) and error.count("\n") <= 1


# ------------------------------------------------------------------------ Guidance and recipes


@pytest.fixture
def calls(monkeypatch):
    """What the pipelines were called with."""
    seen = []
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        kind = getattr(infer.diffusers, name)

        def watched(self, _call=kind.__call__, **given):
            seen.append(given)
            return _call(self, **given)

        watched.__signature__ = inspect.signature(kind.__call__)
        monkeypatch.setattr(kind, "__call__", watched)
    return seen


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_guidance_rescale(kit, tmp_path, family):
    """The teacher's column is what diffusers generates with it; it changes the image."""
    cells, grid = [], compare.grid
    flags = ("--compare", "--scheduler", "ddim", "lcm", "--negative_prompt", "x")
    flags += ("--compare_guidance", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compare, "grid", lambda columns, *a: cells.extend(columns) or grid(columns, *a)
        )
        for more in (), ("--guidance_rescale", 0.7):
            run(tmp_path / "g.png", *flags, *more, lora=kit / f"{family}-lora.safetensors")
    plain, rescaled = (cells[i]["images"][0] for i in (0, 2))
    pipe = DiffusionPipeline.from_pretrained(kit / family)
    pipe.set_progress_bar_config(disable=True)
    more = {"timestep_spacing": "trailing", "clip_sample": False}
    pipe.scheduler = infer.diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **more)
    generator = torch.Generator("cpu").manual_seed(0)
    theirs = pipe("a cat", negative_prompt="x", num_inference_steps=2, guidance_scale=6.0,
                  guidance_rescale=0.7, generator=generator)  # fmt: skip
    for name, image in ("a", plain), ("b", rescaled), ("c", theirs.images[0]):
        image.save(tmp_path / f"{name}.png")
    assert difference(tmp_path / "b.png", tmp_path / "c.png") <= 1
    assert difference(tmp_path / "a.png", tmp_path / "b.png") > 0
    assert cells[1]["images"][0] == cells[3]["images"][0]  # without guidance it does nothing


def test_guidance_rescale_without_effect(kit, tmp_path, capsys):
    """Without guidance it is refused; a pipeline that does not know it gets one warning."""
    plain, flags = kit / "sd15-lora.safetensors", ("--guidance_rescale", 0.5)
    refused("--guidance_rescale has no effect without a --guidance_scale above 1 or --compare",
            tmp_path / "x.png", *flags, lora=plain)  # fmt: skip
    flags += ("--guidance_scale", 1.5, "--image", kit / "image.png")
    path = run(tmp_path / "x.png", *flags, lora=plain)
    error = capsys.readouterr().err
    assert re.fullmatch("warning: --guidance_rescale does nothing here: .*Img2Img.*\n", error)
    assert settings(path)["guidance_rescale"] is None


RECIPE = {"negative_prompt": "blurry", "guidance_scale": 6.0, "guidance_rescale": 0.3}
RECIPE |= {"width": 48, "height": 64, "max_prompt_chunks": 2, "made_from": {"x": [1]}}


def test_recipe_gives_defaults(kit, tmp_path, calls, capsys):
    """What the recipe says is taken where no flag and no header says otherwise."""
    base = recipe(kit, tmp_path, **RECIPE)
    plain, flags = kit / "sd15-lora.safetensors", ("--base_model", base)
    path = run(tmp_path / "x.png", *flags, lora=plain)
    assert Image.open(path).size == (48, 64)
    out, error = capsys.readouterr()
    assert error == "" and f"Defaults are those of {base / 'recipe.json'}\n" in out
    assert calls[-1]["prompt_embeds"].shape[1] == 32 and calls[-1]["guidance_rescale"] == 0.3
    assert "negative_prompt_embeds" not in calls[-1]

    run(tmp_path / "x.png", *flags, "--guidance_scale", 2, lora=plain)
    assert calls[-1]["negative_prompt_embeds"].shape[1] == 32
    own = ("--negative_prompt", "", "--guidance_rescale", 0.6, "--max_prompt_chunks", 1)
    own += ("--width", 32, "--height", 32, "--guidance_scale", 2)
    path = run(tmp_path / "x.png", *flags, *own, lora=plain)
    assert Image.open(path).size == (32, 32) and settings(path)["negative_prompt"] == ""
    assert calls[-1]["prompt_embeds"].shape[1] == 16 and calls[-1]["guidance_rescale"] == 0.6
    told = {"negative_prompt": "ugly", "guidance_rescale": 0.9, "max_prompt_chunks": 3}
    path = run(tmp_path / "x.png", *flags, lora=lora(kit, "sd15", training_args=told))
    assert settings(path)["negative_prompt"] == "ugly" and settings(path)["width"] == 48
    assert calls[-1]["prompt_embeds"].shape[1] == 48 and calls[-1]["guidance_rescale"] == 0.9
    assert capsys.readouterr().err == ""
    image = ("--image", kit / "image.png", "--guidance_rescale", 0, "--guidance_scale", 1.1)
    assert Image.open(run(tmp_path / "x.png", *flags, *image, lora=plain)).size == (32, 32)


def test_another_recipe_is_another_image(kit, tmp_path):
    """An image that is there was made by the recipe that was there."""
    base = recipe(kit, tmp_path, **RECIPE)
    words = ["--lora", kit / "sd15-lora.safetensors", "--prompt", "a", *DEVICE, "--steps"]
    words += [1, "--output", tmp_path / "x.png", "--base_model", base, "--guidance_scale", 2]
    infer.main([*map(str, words)])
    (base / "recipe.json").write_text(json.dumps({"format": 1} | RECIPE | {"negative_prompt": "b"}))
    with pytest.raises(SystemExit, match="exists, of other settings"):
        infer.main([*map(str, words)])


def test_negative_prompt_of_a_recipe_in_a_grid(kit, tmp_path, calls, capsys):
    """It counts for the teacher, without a warning of the LoRA; guidance is the recipe's."""
    base, bare = recipe(kit, tmp_path, **RECIPE), dict(load_file(kit / "sd15-lora.safetensors"))
    save_file(bare, tmp_path / "bare.safetensors")  # its header does not tell omega
    flags = ("--compare", "--scheduler", "ddim", "lcm", "--base_model", base)
    path = run(tmp_path / "x.png", *flags, lora=tmp_path / "bare.safetensors")
    assert [column["guidance"] for column in settings(path)["columns"]] == [6.0, 1.0]
    assert capsys.readouterr().err == ""
    teacher, student = ([c for c in calls if c["guidance_scale"] == g] for g in (6.0, 1.0))
    assert teacher and student
    pipe = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        negative, _ = embeddings(pipe, "blurry", 2)
    for call in teacher:
        assert torch.allclose(call["negative_prompt_embeds"][0], negative, rtol=0, atol=1e-5)
    path = run(tmp_path / "x.png", *flags, lora=kit / "sd15-lora.safetensors")
    assert settings(path)["columns"][0]["guidance"] == 5.0  # omega 3 to 5, by the header


BROKEN = {
    "": "not an object in JSON",
    "[1]": "not an object in JSON",
    '"x"': "not an object in JSON",
    "{": "not an object in JSON",
    "{}": "format is None, must be 1 to 1",
    '{"format": 2}': "format is 2",
    '{"format": true}': "format is True",
    '{"format": 1, "guidance_scale": "7"}': "guidance_scale is '7', must be 0.0 to 1000.0",
    '{"format": 1, "guidance_scale": NaN}': "guidance_scale is nan",
    '{"format": 1, "guidance_rescale": 1.5}': "guidance_rescale is 1.5, must be 0.0 to 1.0",
    '{"format": 1, "width": 832.0}': "width is 832.0",
    '{"format": 1, "width": 833}': "width is 833, must be a multiple of 8",
    '{"format": 1, "height": -8}': "height is -8",
    '{"format": 1, "height": null}': "height is None",
    '{"format": 1, "max_prompt_chunks": 0}': "max_prompt_chunks is 0, must be 1 to 100",
    '{"format": 1, "negative_prompt": 3}': "negative_prompt is 3, must be a text",
    '{"format": 1, "negative_prompt": "\\ud800"}': "negative_prompt is '.ud800', must be a text",
}


@pytest.mark.parametrize("text", [*BROKEN, b"\xff\xfe{", None])
def test_broken_recipe(kit, tmp_path, text):
    """One line, which names the file and the key, before the base is read."""
    base = shutil.copytree(kit / "sd15", tmp_path / "teacher")
    file = base / "recipe.json"
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = f"{file}: .*" + re.escape(BROKEN.get(text, "not an object")).replace(r"\.ud", ".ud")
    shutil.rmtree(base / "unet")
    lora = kit / "sd15-lora.safetensors"
    refused(message, tmp_path / "x.png", "--base_model", base, lora=lora)


def test_a_lora_that_keeps_guidance(kit, tmp_path, calls, capsys):
    """With omega 0 any guidance is taken without a warning, in a grid by teacher and LoRA alike."""
    path = lora(kit, "sd15", w_min="0.0", w_max="0.0")
    flags = ("--guidance_scale", 7, "--negative_prompt", "x")
    with_text = run(tmp_path / "x.png", *flags, lora=path)
    assert difference(with_text, run(tmp_path / "y.png", *flags[:2], lora=path)) > 0
    grid = ("--compare", "--scheduler", "ddim", "lcm")
    columns = settings(run(tmp_path / "grid.png", *flags, *grid, lora=path))["columns"]
    assert [(column["guidance"], column["passes"]) for column in columns] == [(7, 4)] * 2
    more = ("--compare_guidance", 3)
    columns = settings(run(tmp_path / "grid.png", *flags, *grid, *more, lora=path))["columns"]
    assert [column["guidance"] for column in columns] == [3, 7]
    assert capsys.readouterr().err == ""
    run(tmp_path / "x.png", lora=path)
    assert "This LoRA keeps guidance: " in capsys.readouterr().out
    run(tmp_path / "x.png", *flags, lora=lora(kit, "sd15", w_min="0.0", w_max="1.0"))
    assert "burn out" in capsys.readouterr().err


def test_trainers_have_the_same_functions():
    """Copies of what a trainer and infer.py both need."""
    for trainer in "train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py":
        for name in (
            "read_markers",
            "settle_prediction",
            "split_prompt",
            "check_tokenizer",
            "to_rgb",
        ):
            theirs = getattr(load_script(trainer), name)
            assert inspect.getsource(theirs) == inspect.getsource(getattr(infer, name))
