"""The teacher as its owner uses it: predictions, recipe.json, negative and long prompts."""

import importlib
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ROOT, command_line, lora_file, run, series
from safetensors.torch import load_file, save_file
from single_file import as_single_file
from transformers import CLIPTokenizer

V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
MARKS = {key: torch.zeros(1) for key in ("v_pred", "ztsnr")}
FEW = {"lora_target_modules": "to_q", "max_train_steps": 2}
FAMILIES = ("sd15", "sdxl")


def with_scheduler(folder, target, drop=(), **settings):
    """A copy of a teacher whose scheduler's config says other things."""
    path = shutil.copytree(folder, target) / "scheduler" / "scheduler_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | settings))
    return target


def write_recipe(folder, **recipe):
    """recipe.json of a teacher's folder."""
    (folder / "recipe.json").write_text(json.dumps({"format": 1} | recipe))
    return folder


# ------------------------------------------------------------------------- what a teacher predicts


@pytest.fixture(scope="module", params=FAMILIES)
def marked(request, make_teacher, tmp_path_factory):
    """A v-prediction teacher with zero terminal SNR, as it is shared.

    (trainer, folder, its file with the markers, without them, configs that say nothing of it)
    """
    layout, place = request.param, tmp_path_factory.mktemp("marked")
    folder = make_teacher(layout, **V)
    plain = as_single_file(folder)
    save_file(load_file(plain) | MARKS, place / "marked.safetensors")
    silent = with_scheduler(folder, place / "silent", drop=V)
    trainer = importlib.import_module(f"train_lcm_lora_{layout}")
    return trainer, folder, place / "marked.safetensors", plain, silent


def test_marked_file_trains_as_its_folder(marked, train_by, tmp_path, capsys):
    """To the bit; start line, header and card agree. Without the marks it is epsilon, as before."""
    trainer, folder, file, plain, silent = marked
    out = train_by(trainer, file)(teacher_config=silent, **FEW)
    assert ", v_prediction, zero terminal SNR;" in capsys.readouterr().out
    assert series(out) == series(train_by(trainer, folder)(**FEW))
    about = lora_file(out)[1]
    settings = json.loads(about["training_args"])
    assert {key: settings[key] for key in V} == V
    assert about["modelspec.prediction_type"] == "v"
    card = (out / "README.md").read_text()
    assert 'prediction_type="v_prediction", rescale_betas_zero_snr=True' in card
    as_epsilon = train_by(trainer, plain)(teacher_config=silent, **FEW)
    assert "epsilon" in capsys.readouterr().out.rsplit("teacher: ", 1)[1].split(";")[0]
    epsilon = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    other = with_scheduler(folder, tmp_path / "epsilon", **epsilon)
    assert series(as_epsilon) == series(train_by(trainer, other)(**FEW)) != series(out)


def test_flags_are_as_good_as_marks(marked, train_by, tmp_path):
    """For a file without them, and for a folder, whose config they override; the card says so."""
    trainer, folder, _, plain, silent = marked
    epsilon = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    other = with_scheduler(folder, tmp_path / "epsilon", **epsilon)
    expected = series(train_by(trainer, folder)(**FEW))
    assert series(train_by(trainer, plain)(teacher_config=silent, **FEW, **V)) == expected
    assert series(train_by(trainer, other)(**FEW, **V)) == expected
    back = {"prediction_type": "epsilon", "no-rescale_betas_zero_snr": True}
    out = train_by(trainer, folder)(**FEW, **back)
    assert series(out) == series(train_by(trainer, other)(**FEW))
    card = (out / "README.md").read_text()
    assert 'prediction_type="epsilon", rescale_betas_zero_snr=False' in card


CONTRADICTIONS = {  # tensors, ModelSpec, flags, config: what the line says
    "flag, v_pred": (
        MARKS,
        None,
        {"prediction_type": "epsilon"},
        {},
        "epsilon by --prediction_type",
    ),
    "flag, header": ({}, "v", {"prediction_type": "epsilon"}, {}, "epsilon by --prediction_type"),
    "flag, epsilon": ({}, "epsilon", V, {}, "v_prediction by --prediction_type"),
    "no zero SNR": (MARKS, None, {"no-rescale_betas_zero_snr": True}, {}, "False by --rescale"),
    "config": (MARKS, None, {}, {"prediction_type": "epsilon"}, "give --prediction_type v_pred"),
    "config, SNR": (
        MARKS,
        None,
        {},
        {"rescale_betas_zero_snr": False},
        "give --rescale_betas_zero",
    ),
    "EDM v": ({"edm_vpred.sigma_max": MARKS["v_pred"]}, None, {}, {}, "edm_vpred.sigma_max.*EDM"),
    "EDM": ({"edm_mean": torch.ones(1)} | MARKS, None, V, {}, "edm_mean.*EDM"),
    "epsilon, SNR": ({"ztsnr": MARKS["ztsnr"]}, None, {}, {}, "it needs v_prediction"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions_are_one_line(marked, train_by, tmp_path, kind):
    """Of marks, flags and configs; nothing is written."""
    trainer, _, _, plain, silent = marked
    tensors, said, flags, config, message = CONTRADICTIONS[kind]
    about = {"modelspec.prediction_type": said} if said else None
    save_file(load_file(plain) | tensors, tmp_path / "x.safetensors", about)
    config = with_scheduler(silent, tmp_path / "config", **config)
    out = tmp_path / "out"
    train = train_by(trainer, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match=message) as end:
        train(teacher_config=config, output_dir=out, **flags)
    assert "\n" not in str(end.value) and not out.exists()


@pytest.mark.parametrize("said", ["epsilon", "v", "V", "", "flow"])
def test_a_silent_config_contradicts_nothing(sd15, marked, tmp_path, said):
    """What ModelSpec says and no config denies is taken; words it does not have say nothing."""
    _, _, _, plain, _ = marked
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"modelspec.prediction_type": said}
    )
    args = SimpleNamespace(prediction_type=None, rescale_betas_zero_snr=None)
    settled = sd15.settle_prediction(args, str(tmp_path / "x.safetensors"), {}, True)
    kinds = {"epsilon": "epsilon", "v": "v_prediction"}
    assert settled.get("prediction_type") == kinds.get(said)


@pytest.mark.parametrize("width", [768, 1024, 2048])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.1, 1.0])
def test_guess_of_sd2(sd15, tmp_path, width, spread):
    """By one bias, where nobody has said it; a config named, a mark or a flag counts more."""
    unet, bias = "model.diffusion_model.", torch.tensor([1.0, -1.0] * 8)
    tensors = {
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width),
        f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias": (spread * bias).half(),
    }
    file, marked = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    save_file(tensors, file)
    save_file(tensors, marked, {"modelspec.prediction_type": "v"})

    def settled(file, explicit=False, flag=None, **config):
        args = SimpleNamespace(prediction_type=flag, rescale_betas_zero_snr=None)
        return sd15.settle_prediction(args, file, config, explicit).get("prediction_type")

    guess = {True: "v_prediction", False: "epsilon"}[spread > 0.09] if width == 1024 else "x"
    assert settled(file, prediction_type="x") == guess
    assert settled(file, True, prediction_type="x") == "x"
    assert settled(file, flag="y") == settled(file, True, flag="y") == "y"
    assert settled(marked, prediction_type="x") == "v_prediction"


def test_a_file_without_configs(marked, train_by, tmp_path, capsys):
    """Configs of diffusers' own choice are nobody's word: the marks win, and no line is needed.

    Also where the scheduler of the configs has them as its class's defaults.
    """
    trainer, folder, file, _, silent = marked
    hub = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"  # of all tiny files
    with_scheduler(silent, hub / "snapshots" / "abc", prediction_type="epsilon")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    out = train_by(trainer, file)(cache_dir=tmp_path, **FEW)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "teacher: " in line]
    assert "v_prediction, zero terminal SNR" in line
    assert series(out) == series(train_by(trainer, folder)(**FEW))


# -------------------------------------------------------------- negative prompt, rescale, guidance


def pipeline_of(folder):
    """A teacher's pipeline, quiet, with plain DDIM."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("negative", ["", "blurry, ugly"])
@pytest.mark.parametrize("settings", [{}, V], ids=["epsilon", "v"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_guided_output_is_the_pipelines(make_teacher, layout, settings, negative, rescale):
    """As diffusers' pipeline hands it to its scheduler, at the same z, t; SDXL's null too."""
    trainer = importlib.import_module(f"train_lcm_lora_{layout}")
    pipe = pipeline_of(make_teacher(layout, **settings))
    seen, step, texts = [], pipe.scheduler.step, ["a red apple", "two cats"]

    def record(output, t, z, **options):
        seen.append((output, t, z))
        return step(output, t, z, **options)

    pipe.scheduler.step = record
    given = {"num_inference_steps": 3, "guidance_scale": 7.5, "guidance_rescale": rescale}
    # SDXL's pipeline takes an empty text for a text, its absence for zeros
    null = {"negative_prompt": [negative] * 2 if negative else None}
    random = torch.Generator().manual_seed(0)
    pipe(texts, **null, **given, height=32, width=32, generator=random, output_type="latent")
    batch = {"caption": texts}
    if layout == "sdxl":
        batch["time_ids"] = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    c = trainer.conditions(pipe, batch, torch.device("cpu"), 1)
    c_null = trainer.conditions(pipe, {"caption": [negative]}, torch.device("cpu"), 1)
    run = SimpleNamespace(teacher=pipe.unet, c_null=c_null)
    args = SimpleNamespace(w_min=6.5, w_max=6.5, guidance_rescale=rescale)
    omega = torch.full((2, 1, 1, 1), 6.5)
    for output, t, z in seen:
        with torch.no_grad():
            ours = trainer.guided_output(run, z, t.repeat(2), c, omega, args)
        assert torch.allclose(ours, output, rtol=1e-5, atol=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("layout", FAMILIES)
def test_without_guidance_one_pass_of_the_teacher(make_teacher, layout):
    """Its value is that of omega 0; a rescale of what is not guided changes nothing."""
    trainer = importlib.import_module(f"train_lcm_lora_{layout}")
    pipe, sizes = pipeline_of(make_teacher(layout)), []
    pipe.unet.register_forward_hook(lambda net, given, result: sizes.append(len(given[0])))
    batch = {"caption": ["a house", "fish", "rain"]}
    if layout == "sdxl":
        batch["time_ids"] = torch.tensor([[32, 32, 0, 0, 32, 32]] * 3)
    c = trainer.conditions(pipe, batch, torch.device("cpu"), 1)
    c_null = trainer.conditions(pipe, {"caption": ["ugly"]}, torch.device("cpu"), 1)
    run = SimpleNamespace(teacher=pipe.unet, c_null=c_null)
    z, t = torch.randn(3, 4, 8, 8), torch.tensor([19, 499, 999])
    with torch.no_grad():
        one, other, rescaled = (
            trainer.guided_output(run, z, t, c, torch.zeros(3, 1, 1, 1), SimpleNamespace(**args))
            for args in (
                {"w_min": 0.0, "w_max": 0.0, "guidance_rescale": 0.0},
                {"w_min": 0.0, "w_max": 1.0, "guidance_rescale": 0.0},
                {"w_min": 0.0, "w_max": 0.0, "guidance_rescale": 0.7},
            )
        )
    assert sizes == [3, 6, 3]
    assert torch.allclose(one, other, atol=1e-6) and torch.equal(one, rescaled)


def test_a_lora_that_keeps_guidance(train):
    """Header and card say so; the null prompt is not needed, and its text changes no loss."""
    kept = {"w_min": 0, "w_max": 0, **FEW}
    out = train(**kept)
    about, card = lora_file(out)[1], (out / "README.md").read_text()
    assert "CFG scale and negative prompt of the base" in about["modelspec.usage_hint"]
    assert about["w_min"] == about["w_max"] == "0"
    assert card.count("CFG scale and negative prompt of the base") == 3
    assert '"guidance_scale": 7.5' in card and "lcm.png --guidance_scale 7.5`" in card
    assert series(train(negative_prompt="ugly", **kept)) == series(out)
    guided = train(**FEW)
    assert series(train(negative_prompt="ugly", **FEW)) != series(guided) != series(out)
    assert '"guidance_scale": 1.0' in (guided / "README.md").read_text()
    assert "CFG scale 1" in lora_file(guided)[1]["modelspec.usage_hint"]


# ------------------------------------------------------------------------------------ long prompts


def byte_tokenizer(folder, length=77):
    """A CLIP tokenizer that knows every text: its tokens are bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=length)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One of 75 tokens between its ends."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tokens(tokenizer, text):
    """The numbers of a text without its ends."""
    return tokenizer(text, add_special_tokens=False).input_ids


def pieces_by_words(tokenizer, text, room):
    """Tokens in pieces, another way: word after word, each in the piece before while it fits."""
    pieces = [[]]
    for word in re.split(r"\s+", text):
        new = tokens(tokenizer, word)
        if len(pieces[-1]) + len(new) > room:
            pieces.append([])
        pieces[-1] += new
    return pieces


TEXTS = {
    "empty": "",
    "spaces": "   ",
    "tabs": " \t\n ",
    "one": "a",
    "75": "a " * 75,
    "75b": "ab " * 37 + "a",
    "76": "a " * 76,
    "150": "a " * 150,
    "151": "a " * 151,
    "boundary in a word": "a " * 74 + "bcd e",
    "boundary after": "a " * 73 + "bc de",
    "runs of spaces": "  \n" + "a \t\n  b   " * 70,
    "tags": "1girl, solo, (red hair:1.2), " * 20,
    "no-break spaces": "a\u00a0b\u3000c" * 40,
    "combining": "e\u0301 " * 60,
    "Hangul": "\u1112\u1161\u11ab " * 60,
    "Turkish": "İ " * 60,
    "German": "größer straße " * 30,
    "Chinese": "红色 苹果 " * 30,
    "Arabic": "تفاحة حمراء " * 20,
    "emoji": "😀 " * 60,
    "emoji at the boundary": "a " * 74 + "😀",
    "and in it": "a " * 73 + "😀 b c",
    "flags": "🏳️‍🌈 " * 20,
    "mathematical": "𝒳 " * 90,
    "zero width": "a\u200bb " * 60,
    "special": "<|endoftext|> a " * 50,
    "nothing but marks": "\u0301 " * 60,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_of_odd_texts(sd15, tokenizer, kind):
    """No piece has more than 75 tokens, all together are the text, cut at ends of words."""
    text = TEXTS[kind]
    pieces = sd15.split_prompt(text, tokenizer, 30)
    assert len(pieces) == 30 and "".join(pieces) == text
    expected = pieces_by_words(tokenizer, text, 75)
    assert [tokens(tokenizer, piece) for piece in pieces] == [*expected, *[[]] * 30][:30]
    for chunks in 1, 2, 3:
        assert sd15.split_prompt(text, tokenizer, chunks) == pieces[:chunks]


@pytest.mark.parametrize(
    "text",
    [
        "x" * 200,
        "a " * 70 + "x" * 200 + " b",
        "红" * 90,
        "😀" * 70,
        "e\u0301" * 150,
        "e" + "\u0301" * 200,
        "🏳️‍🌈" * 40,
        "a,b;" * 60,
    ],
)
def test_a_word_of_more_than_a_piece(sd15, tokenizer, text):
    """It is cut inside, between characters; what is before it stays in the piece before."""
    pieces = sd15.split_prompt(text, tokenizer, 30)
    assert "".join(pieces) == text
    sizes = [len(tokens(tokenizer, piece)) for piece in pieces]
    assert max(sizes) <= 75 and sum(sizes) >= len(tokens(tokenizer, text))
    if text[0] == "a" and " " in text:
        assert pieces[0] == "a " * 70


def test_pieces_of_a_real_vocabulary(sd15):
    """Of the demo's tokenizer, with merges: seeded texts of its own words."""
    from conftest import ROOT

    real = CLIPTokenizer.from_pretrained(ROOT / "demo/teacher-sd15/tokenizer")
    words = [word.removesuffix("</w>") for word in real.get_vocab() if word.endswith("</w>")]
    words = [word for word in words if word.isascii() and "<" not in word]
    random = torch.Generator().manual_seed(0)
    for count in (70, 75, 76, 150, 300):
        chosen = torch.randint(len(words), (count,), generator=random).tolist()
        text = " ".join(words[i] for i in chosen)
        pieces = sd15.split_prompt(text, real, 9)
        expected = pieces_by_words(real, text, real.model_max_length - 2)
        assert [tokens(real, piece) for piece in pieces] == [*expected, *[[]] * 9][:9]


CAPTIONS = ["", "red apple", "ab cd ef gh ij kl mn op", "abc " * 20, " a\tb\nc " * 9, "x" * 60]


@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_long_prompts_are_encoded_piece_by_piece(make_teacher, layout, chunks):
    """By tokens, the text encoders called directly; the pooled embedding is the first piece's."""
    trainer = importlib.import_module(f"train_lcm_lora_{layout}")
    pipe = pipeline_of(make_teacher(layout, force_zeros=False))
    room = pipe.tokenizer.model_max_length - 2
    ours = trainer.encode_captions(pipe, CAPTIONS, chunks)
    for i, text in enumerate(CAPTIONS):
        if text == "x" * 60:
            parts = [tokens(pipe.tokenizer, "x" * n) for n in (room, room, room)]
        else:
            parts = pieces_by_words(pipe.tokenizer, text, room)
        if chunks == 1:  # nothing changes: it is the tokenizer that cuts, inside a word too
            parts = [tokens(pipe.tokenizer, text)[:room]]
        found, pooled = [], None
        for part in [*parts, *[[]] * chunks][:chunks]:
            ends = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
            ids = [ends[0], *part, ends[1]]
            ids = torch.tensor([ids + [pipe.tokenizer.pad_token_id] * (room + 2 - len(ids))])
            with torch.no_grad():
                if layout == "sd15":
                    found.append(pipe.text_encoder(ids).last_hidden_state)
                    continue
                both = [
                    net(ids, output_hidden_states=True)
                    for net in (pipe.text_encoder, pipe.text_encoder_2)
                ]
            found.append(torch.cat([out.hidden_states[-2] for out in both], -1))
            pooled = both[1].text_embeds if pooled is None else pooled
        expected = torch.cat(found, 1)
        assert ours["prompt"][i : i + 1].shape == expected.shape
        assert torch.allclose(ours["prompt"][i : i + 1], expected, atol=1e-5)
        if layout == "sdxl":
            assert torch.allclose(ours["text_embeds"][i : i + 1], pooled, atol=1e-5)


def test_one_piece_is_as_before(make_teacher, sdxl):
    """Chunks that are not needed change nothing but the length; the empty prompt stays zeros."""
    pipe = pipeline_of(make_teacher("sdxl"))
    one, two = (sdxl.encode_captions(pipe, ["", "rain"], n) for n in (1, 2))
    assert torch.allclose(one["text_embeds"], two["text_embeds"], atol=1e-6)
    assert torch.allclose(one["prompt"], two["prompt"][:, :16], atol=1e-6)
    assert not two["prompt"][0].any() and two["prompt"][1, 16:].any()


def test_long_captions_train(train, make_images):
    """Every piece counts: with more the losses differ. Dropped captions have as many pieces."""
    folder = make_images(4)
    long = [{"file_name": f"{i:02}.png", "text": "red apple in the rain " * 4} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, long)))
    given = FEW | {"train_data_dir": folder, "proportion_empty_prompts": 0.3}
    one, two = (train(max_prompt_chunks=n, **given) for n in (1, 2))
    assert series(one) != series(two)
    assert "max_prompt_chunks 2" in (two / "README.md").read_text()
    assert "max_prompt_chunks" not in (one / "README.md").read_text()


# ------------------------------------------------------------------------------------- recipe.json


@pytest.fixture
def own(teacher, tmp_path):
    """A teacher's folder to put a recipe into."""
    return shutil.copytree(teacher, tmp_path / "my teacher ö")


def parsed(trainer, folder, **flags):
    """The arguments of a training of this teacher."""
    words = {"pretrained_teacher_model": folder, "train_data_dir": "x"} | flags
    return trainer.parse_args(command_line(words))


RECIPE = {
    "negative_prompt": "-- ugly, 'blurry' {}\n~ second line",
    "guidance_scale": 5.5,
    "guidance_rescale": 0.7,
    "width": 64,
    "height": 64,
    "max_prompt_chunks": 3,
}


def test_recipe_is_the_default(sd15, sdxl, own):
    """Of each flag; one that is given wins, also where it says the usual value."""
    write_recipe(own, **RECIPE, made_from={"anything": [None]}, unknown=1)
    for trainer in (sd15, sdxl):
        args = parsed(trainer, own)
        assert (args.w_min, args.w_max, args.resolution) == (4.5, 4.5, 64)
        for name in ("negative_prompt", "guidance_rescale", "max_prompt_chunks"):
            assert vars(args)[name] == RECIPE[name]
    flags = {
        "w_min": 3.0,
        "w_max": 15.0,
        "resolution": 32,
        "guidance_rescale": 0.0,
        "max_prompt_chunks": 1,
    }
    args = parsed(sd15, own, **flags, negative_prompt="")
    assert {name: vars(args)[name] for name in flags} == flags and args.negative_prompt == ""
    write_recipe(own, width=832, height=1216)
    args = parsed(sd15, own)
    assert (args.resolution, args.w_min, args.w_max) == (None, 3.0, 15.0)
    write_recipe(own, guidance_scale=1)
    assert parsed(sd15, own).w_min == parsed(sd15, own).w_max == 0


def test_recipe_is_that_of_the_teacher(sd15, own, monkeypatch):
    """Of a ~ too, and of no folder but the teacher's; the last one that is named."""
    write_recipe(own, guidance_scale=5.5)
    monkeypatch.setenv("HOME", str(own.parent))
    assert parsed(sd15, f"~/{own.name}").w_min == 4.5
    monkeypatch.chdir(own)
    assert parsed(sd15, "hub/id").w_min == 3.0 and parsed(sd15, ".").w_min == 4.5
    words = command_line({"pretrained_teacher_model": own, "train_data_dir": "x"})
    assert sd15.parse_args([*words, "--pretrained_teacher_model", "hub/id"]).w_min == 3.0


@pytest.mark.parametrize("text", ["~", "~root", "hf_abc", "-x", "--steps", "", " ", "\n", "ж 😀"])
def test_any_negative_prompt(sd15, own, text):
    """It is a text, no path: it stays as it is, from a flag and from a recipe."""
    words = command_line({"pretrained_teacher_model": own, "train_data_dir": "x"})
    assert sd15.parse_args([*words, f"--negative_prompt={text}"]).negative_prompt == text
    write_recipe(own, negative_prompt=text)
    assert sd15.parse_args(words).negative_prompt == text


@pytest.mark.parametrize("flag", ["negative_prompt", "validation_prompts"])
@pytest.mark.parametrize("text", ["a \udcff", "\ud800"])
def test_prompts_that_are_no_text(sd15, flag, text):
    """Bytes of a shell that are not UTF-8, which no tokenizer takes."""
    with pytest.raises(SystemExit, match="the prompt .* is not UTF-8") as end:
        parsed(sd15, "x", **{flag: text})
    str(end.value).encode()  # it can be shown


BROKEN = {  # the text of recipe.json, and what the line says
    "empty": ("", "JSON"),
    "no JSON": ("{", "JSON"),
    "bytes": (b"\xff\xfe{}", "utf-8|JSON"),
    "NUL": (b"\0" * 64, "JSON"),
    "list": ("[]", "list"),
    "pairs": ('[["format", 1]]', "list"),
    "text": ('"x"', "str"),
    "null": ("null", "None"),
    "deep": ("[" * 100000, "recipe.json"),
    "no format": ("{}", "format is None"),
    "format": ('{"format": 2}', "format is 2"),
}
WRONG = {
    "negative_prompt": (None, 3, ["ugly"], {"a": 1}, True, "\ud800"),
    "guidance_scale": (None, "7", [7], True, -1, math.nan, math.inf, 1e300, 10**400),
    "guidance_rescale": (None, "0.7", -0.1, 1.1, math.nan, [], False),
    "max_prompt_chunks": (None, "2", 0, -1, 1.5, 10**9, math.nan, True),
    "width": (None, "512", 0, -8, 512.5, math.inf, [512], 10**12),
}
CASES = [
    *((key, *case) for key, case in BROKEN.items()),
    *(
        (f"{key} {value!r:.30}", json.dumps({"format": 1, "height": 8, key: value}), key)
        for key, values in WRONG.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("text", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_broken_recipe_is_one_line(sd15, own, text, message):
    """It names the file and, where one value is wrong, the key; no flag makes up for it."""
    file = own / "recipe.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(SystemExit) as end:
        parsed(sd15, own, w_min=3)
    line = str(end.value)
    assert "\n" not in line and str(file) in line and len(line) < 500
    if message in WRONG and message != "negative_prompt":
        assert f"{message} is" in line
    elif message not in WRONG:
        assert re.search(message, line)


def test_a_recipe_is_part_of_the_run(train_by, sd15, own):
    """Trained with, in header and card; a resume after it was changed is refused and names it."""
    write_recipe(own, negative_prompt="ugly", guidance_scale=4, guidance_rescale=0.5)
    train = train_by(sd15, own)
    out, flags = train(**FEW), {"w_min": 3, "w_max": 3, "guidance_rescale": 0.5}
    settings = json.loads(lora_file(out)[1]["training_args"])
    assert settings["negative_prompt"] == "ugly" and settings["w_min"] == settings["w_max"] == 3
    card = (out / "README.md").read_text()
    assert "negative_prompt 'ugly'" in card and "guidance_rescale 0.5" in card
    write_recipe(own, negative_prompt="bad", guidance_scale=4, guidance_rescale=0.5)
    more = {"output_dir": out, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit, match="--negative_prompt bad .it was ugly"):
        train(**FEW | more)
    (own / "recipe.json").unlink()  # flags say the same as the file did
    train(**FEW | more, **flags, negative_prompt="ugly")
    write_recipe(own, negative_prompt="ugly", guidance_scale=4, guidance_rescale=0.5)
    assert series(out) == series(train(**FEW | {"max_train_steps": 3}))


def test_prompts_of_several_lines_are_refused_in_one(sd15, own, tmp_path):
    """As UIs write negative prompts: a message that quotes one is a line all the same."""
    args = sd15.parse_args(command_line({"pretrained_teacher_model": own, "dataset_name": "x"}))
    what = ["trajectories"]
    stamp = sd15.make_stamp(args, what) | {"what": what, "negative_prompt": "bad\nhands"}
    (tmp_path / "encoded.json").write_text(json.dumps(stamp))
    with pytest.raises(SystemExit) as end:
        sd15.check_stamp(tmp_path, ["path"], args)
    assert "negative_prompt bad hands, this run has" in str(end.value)
    assert "\n" not in str(end.value)


def test_a_negative_prompt_that_is_cut(train, capsys):
    """It is said, as of prompts: negative prompts tend to be long."""
    for text, chunks, said in ("abcde fghij klmno", 1, 1), ("abcde fghij klmno", 2, 0), ("a", 1, 0):
        train(negative_prompt=text, max_prompt_chunks=chunks, **FEW | {"max_train_steps": 1})
        warning = f"warning: it is cut (--max_prompt_chunks): {text!r}"
        assert capsys.readouterr().out.count(warning) == said


def test_a_recipe_is_named_once(own, tmp_path):
    """Though the flags are read twice, before the libraries and after."""
    write_recipe(own, negative_prompt="ugly")
    words = ["--pretrained_teacher_model", own, "--dataset_name", tmp_path / "none"]
    done = run(sys.executable, ROOT / "train_lcm_lora_sd15.py", *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and done.stdout.count(f"defaults are those of {own}") == 1


def test_half_of_a_recipe_is_overridden(sd15, own):
    """One end of omega's range: the line says what is wrong with both."""
    write_recipe(own, guidance_scale=5)
    with pytest.raises(SystemExit, match="--w_min 8 is above --w_max 4"):
        parsed(sd15, own, w_min=8)
