"""Teachers and base models that are not whole, or not what the programs are for.

Each is refused with one line, by the trainers, by what uses their loading, and by infer.py; and
what only looks unusual is taken.
"""

import importlib
import itertools
import json
import shutil

import check_data
import encode_data
import pytest
import torch
from conftest import command_line
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from single_file import as_single_file

import infer

FAMILIES = {"sd15": "unet vae text_encoder", "sdxl": "unet vae text_encoder text_encoder_2"}
PARTS = [(family, part) for family, parts in FAMILIES.items() for part in parts.split()]
PROGRAMS = ("trainer", "infer")


@pytest.fixture
def copy(teacher, xl_teacher, tmp_path):
    """copy(family) -> a teacher's folder that a test may break."""
    numbers = itertools.count()

    def make(family="sd15"):
        source = {"sd15": teacher, "sdxl": xl_teacher}[family]
        return shutil.copytree(source, tmp_path / f"teacher-{next(numbers)}")

    return make


def load(program, family, folder, dtype=torch.float32, **flags):
    """The pipeline of a teacher as a trainer or infer.py opens it."""
    if program == "infer":
        words = {"lora": "x", "prompt": ["a"], "base_model": folder}
        config = flags.pop("teacher_config", None)
        args = infer.parse_args(command_line(words | flags))
        return infer.load_pipeline(str(folder), config and str(config), args, "cpu", dtype, {})
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    words = {"pretrained_teacher_model": folder, "train_data_dir": "x"}
    args = trainer.parse_args(command_line(words | flags))
    pipe = trainer.load_teacher(args, dtype)
    trainer.NoiseSchedule(pipe.scheduler.config, "cpu")
    trainer.check_teacher(pipe, args)
    return pipe


def refused(message, *given, **flags):
    """The one line with which a teacher is refused."""
    with pytest.raises(SystemExit, match=message) as end:
        load(*given, **flags)
    assert "\n" not in str(end.value)


def change(folder, part, edit):
    """Rewrite the tensors of a part."""
    (file,) = (folder / part).glob("*.safetensors")
    save_file(edit(load_file(file)), file, {"format": "pt"})


def change_json(path, **values):
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_last(tensors):
    """All tensors but the one whose name is last."""
    return {name: tensors[name] for name in sorted(tensors)[:-1]}


def of_another_shape(tensors):
    """The same names, the first tensor longer."""
    first = min(tensors)
    return tensors | {first: torch.cat([tensors[first]] * 2)}


DAMAGE = {
    "missing": (without_last, "1 (are )?missing"),
    "left over": (lambda t: t | {"q_proj.lora_A.weight": torch.ones(2)}, "1 (are )?unexpected"),
    "wrapped": (lambda t: {f"module.{k}": v for k, v in t.items()}, r"\d+ (are )?missing"),
    "PEFT's": (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, r"\d+ (are )?missing"),
    "of another shape": (of_another_shape, "1 (are )?mismatched"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_each_part_has_its_own_weights(copy, program, family, part):
    """A tensor that is missing, left over or of another shape is named, and how many are."""
    folder = copy(family)
    (file,) = (folder / part).glob("*.safetensors")
    whole = file.read_bytes()
    for edit, message in DAMAGE.values():
        change(folder, part, edit)
        refused(f"{folder}.*{part}.*{message}.*first", program, family, folder)
        file.write_bytes(whole)
    load(program, family, folder)


@pytest.mark.parametrize("program", PROGRAMS)
def test_layers_of_the_config_count(copy, program):
    """A text encoder with more or fewer layers than its config says."""
    folder = copy()
    for layers, how in ((1, "unexpected"), (3, "missing")):
        change_json(folder / "text_encoder" / "config.json", num_hidden_layers=layers)
        refused(f"text_encoder.*16 (are )?{how}", program, "sd15", folder)


def test_separate_vae(copy):
    """--pretrained_vae_model_name_or_path is as whole as the teacher's own."""
    folder, other = copy(), copy()
    flags = {"pretrained_vae_model_name_or_path": other / "vae"}
    load("trainer", "sd15", folder, **flags)
    change(other, "vae", without_last)
    message = f"--pretrained_vae_model_name_or_path {other}/vae.*1 missing"
    refused(message, "trainer", "sd15", folder, **flags)


def test_teacher_in_the_hub_cache(copy, tmp_path):
    """What was downloaded before is checked as a folder is."""
    place = tmp_path / "models--a--b"
    folder = place / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    shutil.move(copy(), folder)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(folder.name)
    load("trainer", "sd15", "a/b", cache_dir=tmp_path)
    change(folder, "text_encoder", without_last)
    refused("a/b.*text_encoder.*1 missing", "trainer", "sd15", "a/b", cache_dir=tmp_path)


def test_encode_data_checks_too(copy, images, tmp_path):
    """Embeddings of random weights are not written."""
    folder, out = copy(), tmp_path / "out"
    change(folder, "text_encoder", without_last)
    words = {"family": "sd15", "pretrained_teacher_model": folder, "train_data_dir": images}
    words |= {"center_crop": True, "resolution": 32, "output": out}
    with pytest.raises(SystemExit, match=f"{folder}.*text_encoder.*1 missing"):
        encode_data.main(command_line(words))
    assert not [*out.glob("*.arrow")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_unusual_but_whole(copy, program):
    """Shards, variants, old names, an old buffer: the same weights as before."""
    folder = copy()
    before = load(program, "sd15", folder)
    pipe = load("trainer", "sd15", folder)
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len([*(folder / "unet").glob("*.safetensors")]) > 2
    for part in "vae", "text_encoder":  # a variant that the UNet does not have
        getattr(pipe, part).save_pretrained(folder / part, variant="fp16")
        (plain,) = (
            file for file in (folder / part).glob("*.safetensors") if "fp16" not in file.name
        )
        plain.unlink()
    (file,) = (folder / "vae").glob("*.safetensors")
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    position_ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(load_file(file) | position_ids, file, {"format": "pt"})
    after = load(program, "sd15", folder, variant="fp16")
    for part in "unet", "vae", "text_encoder":
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (before, after))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    refused("variant=bf16", program, "sd15", copy(), variant="bf16")


def without_tokens(folder):
    """None of the files of the vocabulary."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def without_limit(folder):
    """No config: the library then takes any length."""
    (folder / "tokenizer_config.json").unlink()


def without_merges(folder):
    """A vocabulary with a word that nothing puts together."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red</w>"] = vocabulary.pop("~")  # a word that needs merges
    path.write_text(json.dumps(content))


TOKENIZERS = {
    "no tokens": (without_tokens, "tokens of 190"),
    "no length": (without_limit, "length 1e[+]30 of 16"),
    "no merges": (without_merges, "merges.txt"),
    "too long": (
        lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=17),
        "length 17 of 16",
    ),
}


@pytest.mark.parametrize("program", [*PROGRAMS, "check_data"])
@pytest.mark.parametrize("fault", TOKENIZERS)
@pytest.mark.parametrize(("family", "name"), [("sd15", "tokenizer"), ("sdxl", "tokenizer_2")])
def test_tokenizer_is_the_text_encoders(copy, images, program, fault, family, name):
    """Else all captions may be the same tokens; the files to look at are named."""
    folder, (damage, message) = copy(family), TOKENIZERS[fault]
    damage(folder / name)
    message = f"{folder}: {name} does not fit .*{message}.*tokenizer_config.json"
    if program != "check_data":
        return refused(message, program, family, folder)
    words = {"family": family, "pretrained_teacher_model": folder, "train_data_dir": images}
    with pytest.raises(SystemExit, match=message):
        check_data.main(command_line(words))


ENCODERS = {  # a config's value, the embeddings whose rows it says, and the message; None: taken
    "end token": ("eos_token_id", 5, None, "ends 189 of 5"),
    "old end token": ("eos_token_id", 2, None, None),
    "positions": ("max_position_embeddings", 8, "position_embedding", "length 16 of 8"),
    "too few rows": ("vocab_size", 189, "token_embedding", "190 tokens of 189"),
    "padded rows": ("vocab_size", 192, "token_embedding", None),
    "rows of others": ("vocab_size", 400, "token_embedding", "190 tokens of 400"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_text_encoder_is_the_tokenizers(copy, program, kind):
    """Rows of the embeddings, positions and the end token; old configs' end token is taken."""
    folder, (key, value, embedding, message) = copy(), ENCODERS[kind]
    change_json(folder / "text_encoder" / "config.json", **{key: value})
    if embedding:
        name, rows = f"embeddings.{embedding}.weight", torch.ones(value, 32)
        change(folder, "text_encoder", lambda tensors: tensors | {name: rows})
    if message:
        refused(f"tokenizer does not fit .*{message}", program, "sd15", folder)
    else:
        load(program, "sd15", folder)


@pytest.fixture(scope="module")
def one_file(make_teacher):
    """A teacher in one file, and its folders of configs, epsilon and v-prediction."""
    v = {"prediction_type": "v_prediction"}
    folder = make_teacher()
    return as_single_file(folder), folder, make_teacher(**v)


@pytest.mark.parametrize("program", ["trainer"])  # infer.py: test_infer_recipe.py
@pytest.mark.parametrize(
    ("keys", "marked", "fits"),
    [
        ([], None, "epsilon v"),
        ([], "epsilon", "epsilon"),
        ([], "v", "v"),
        (["v_pred"], None, "v"),
        (["v_pred"], "epsilon", "v"),
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], None, ""),
    ],
)
def test_one_file_says_what_it_predicts(one_file, tmp_path, program, keys, marked, fits):
    """A contradiction to the scheduler's config ends the run and names the flag."""
    file, *configs = one_file
    about = {"modelspec.prediction_type": marked} if marked else {}
    tensors = load_file(file) | {key: torch.zeros(1) for key in keys}
    save_file(tensors, tmp_path / "x.safetensors", about)
    for kind, config in zip(("epsilon", "v"), configs, strict=True):
        given = program, "sd15", tmp_path / "x.safetensors"
        if kind in fits.split():
            assert (
                load(*given, teacher_config=config).scheduler.config.prediction_type[0] == kind[0]
            )
        else:
            said = "v_prediction" if "v_pred" in keys or marked == "v" else "epsilon"
            said = f"{said} by its marker.*--prediction_type {said}"
            said = "edm_.* cannot be used" if "edm" in "".join(keys) else said
            refused(f"x.safetensors.*{said}", *given, teacher_config=config)


def test_zero_terminal_snr_of_one_file(one_file, make_teacher, tmp_path):
    """The mark ztsnr needs a scheduler with rescale_betas_zero_snr."""
    file, _, plain = one_file
    rescaled = make_teacher(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    marks = {key: torch.zeros(1) for key in ("v_pred", "ztsnr")}
    save_file(load_file(file) | marks, tmp_path / "x.safetensors")
    load("trainer", "sd15", tmp_path / "x.safetensors", teacher_config=rescaled)
    given = "trainer", "sd15", tmp_path / "x.safetensors"
    refused("True by its marker.*--rescale_betas_zero_snr", *given, teacher_config=plain)


CONTINUOUS = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}
BETAS = [0.0001 + 1e-5 * i for i in range(1000)]
SCHEDULERS = {  # settings, what the message says; None: it is taken
    "needs scipy": ({"_class_name": "LMSDiscreteScheduler"}, None),
    "needs torchsde": ({"_class_name": "DPMSolverSDEScheduler"}, None),
    "own betas": ({"trained_betas": BETAS}, None),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, None),
    "sigmoid": ({"beta_schedule": "sigmoid"}, "scaled_linear"),
    "unknown": ({"beta_schedule": "x"}, "scaled_linear"),
    "sample": ({"prediction_type": "sample"}, "sample"),
    "continuous": (CONTINUOUS, "Euler"),
    "flow": ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "DPMSolver"),
    "EDM": (None, "EDMEulerScheduler"),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(copy, program, kind):
    """Only betas count, whatever a scheduler's class needs; others are named before loading."""
    folder, (settings, message) = copy(), SCHEDULERS[kind]
    path = folder / "scheduler" / "scheduler_config.json"
    if settings is None:
        path.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}))
    else:
        change_json(path, **settings)
    if name := (settings or {}).get("_class_name"):
        change_json(folder / "model_index.json", scheduler=["diffusers", name])
    if message is None:
        pipe = load(program, "sd15", folder)
        config = {
            key: value for key, value in json.loads(path.read_text()).items() if key[0] != "_"
        }
        betas = {key: value for key, value in config.items() if "beta" in key}
        expected = DDPMScheduler(**betas).alphas_cumprod
        assert torch.equal(pipe.scheduler.alphas_cumprod, expected)
        assert pipe.config["scheduler"] == ("diffusers", "LCMScheduler")  # saved with the others
        return None
    shutil.rmtree(folder / "unet")
    config = json.dumps({"in_channels": 4})
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(config)  # no weights: none are looked for
    return refused(f"(scheduler|prediction_type).*{message}", program, "sd15", folder)


def test_own_betas_are_a_schedule(copy):
    """As many as there are timesteps, between 0 and 1."""
    folder = copy()
    path = folder / "scheduler" / "scheduler_config.json"
    for betas in (BETAS[:-1], [2.0] * 1000, [0.0] * 1000, [float("nan")] * 1000):
        change_json(path, trained_betas=betas)
        refused("betas are not 1000", "trainer", "sd15", folder)


VAES = {
    "latents_mean": ({"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "latents_mean"),
    "tiny": (None, "vae.*AutoencoderKL|vae.*missing"),
}


@pytest.mark.parametrize("kind", VAES)
def test_vaes(copy, tmp_path, kind):
    """Latents that are more than scaled, and another class of VAE."""
    folder, (settings, message) = copy(), VAES[kind]
    if settings:
        change_json(folder / "vae" / "config.json", **settings)
        refused(message, "infer", "sd15", folder)
    else:
        from diffusers import AutoencoderTiny

        shutil.rmtree(folder / "vae")
        AutoencoderTiny(latent_channels=4).save_pretrained(folder / "vae")
        change_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    refused(message, "trainer", "sd15", folder)


UNFIT = {  # (config of the UNet, entries of model_index.json), what infer.py says
    "inpainting": ({"in_channels": 9}, {}, "9 channels.*--mask"),
    "depth": ({"in_channels": 5}, {}, "5 channels"),
    "LCM": ({"time_cond_proj_dim": 256}, {}, "an LCM itself"),
    "Flux": ({}, {"_class_name": "FluxPipeline", "unet": [None, None]}, "FluxPipeline"),
    "Kolors": (
        {},
        {"_class_name": "KolorsPipeline", "text_encoder": ["kolors", "ChatGLMModel"]},
        "KolorsPipeline",
    ),
    "refiner": (
        {},
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
        "StableDiffusionXLImg2ImgPipeline",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_infer_names_what_it_cannot_use(copy, monkeypatch, kind):
    """Before any weights are loaded."""
    folder, (unet, index, message) = copy(), UNFIT[kind]
    change_json(folder / "unet" / "config.json", **unet)
    change_json(folder / "model_index.json", **index)
    monkeypatch.setattr(infer, "load_part", lambda *_, **__: pytest.fail("weights were loaded"))
    refused(f"--base_model {folder}.*{message}", "infer", "sd15", folder)


def test_lcm_is_no_teacher(copy):
    """Its UNet wants omega as an input."""
    folder = copy()
    unet = infer.diffusers.UNet2DConditionModel
    config = unet.load_config(folder / "unet") | {"time_cond_proj_dim": 8}
    unet.from_config(config).save_pretrained(folder / "unet")
    refused("an LCM already", "trainer", "sd15", folder)


@pytest.mark.parametrize("index", ["StableDiffusionPAGPipeline", "StableDiffusionImg2ImgPipeline"])
def test_other_pipelines_of_the_same_parts(copy, index):
    """What counts is the parts, not the class that a folder was saved by."""
    folder = copy()
    change_json(folder / "model_index.json", _class_name=index)
    assert type(load("infer", "sd15", folder)).__name__ == "StableDiffusionPipeline"
    load("trainer", "sd15", folder)


def test_inpainting_base_with_a_mask(copy):
    """Nine channels are right where there is a mask."""
    folder = copy()
    unet = infer.diffusers.UNet2DConditionModel
    config = unet.load_config(folder / "unet") | {"in_channels": 9}
    unet.from_config(config).save_pretrained(folder / "unet")
    flags = {"image": folder / "a.png", "mask": folder / "m.png"}
    args = infer.parse_args(command_line({"lora": "x", "prompt": ["a"], "steps": [1]} | flags))
    pipe = infer.load_pipeline(str(folder), None, args, "cpu", torch.float32, {})
    image = infer.Image.new("RGB", (32, 32), "red")
    images = {"image": image, "mask_image": image.convert("L")}
    task = infer.with_images(pipe, args)
    jobs = [infer.Job("a", None, 0, 32, 32)]
    pipe.scheduler = task.scheduler
    (made,) = infer.generate_batch(task, args, images, jobs, 1, 1.0)
    assert made.size == (32, 32)
