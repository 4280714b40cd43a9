"""What the trainers give to other tools and take from them: LoRAs, header, card, the hub."""

import json
import pickle
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LORA, QUICK, command_line, load_script, lora_file, same, size_of_b
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file, save_file

PEFT = "adapter_model.safetensors"
TOKEN = "hf_aPlantedTokenOfThirtyFourLetters"


@pytest.fixture(params=["sd15", "sdxl"])
def trainer(request):
    """Each trainer as a module, with `train` as an attribute."""
    module = request.getfixturevalue(request.param)
    return SimpleNamespace(
        module=module,
        train=request.getfixturevalue("train" if request.param == "sd15" else "train_xl"),
    )


@pytest.fixture(scope="session")
def trained(train, train_xl):
    """trained(trainer) -> the output of a run of rank 4 and alpha 2."""
    made = {}

    def trained(trainer):
        if trainer.train not in made:
            made[trainer.train] = trainer.train(lora_alpha=2)
        return made[trainer.train]

    return trained


@pytest.fixture
def first(monkeypatch):
    """first(trainer, flag=value, ...) -> {layer: its update scaling * B A} before any step."""

    def first(trainer, **flags):
        seen, step = [], trainer.module.distillation_loss

        def spy(run, *rest):
            layers = trainer.module.lora_layers(run.target)
            seen.append(
                {
                    k: scaling * b.flatten(1).detach() @ a.flatten(1).detach()
                    for k, (a, b, scaling) in layers.items()
                }
            )
            return step(run, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.module, "distillation_loss", spy)
            trainer.train(max_train_steps=1, **flags)
        return seen[0]

    return first


def same_tensors(a, b):
    """Whether two safetensors files hold the same tensors, to the bit."""
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def updates(out, scaling=0.5):
    """{layer: its update} of an output folder, from its PEFT file."""
    tensors = load_file(out / "unet" / PEFT)
    names = [
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    ]
    pairs = {
        name: (tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]) for name in names
    }
    return {
        name.removeprefix("base_model.model."): scaling * b.flatten(1) @ a.flatten(1)
        for name, (b, a) in pairs.items()
    }


def equal(a, b, tolerance=0.0):
    """Whether two {layer: update} are equal."""
    return a.keys() == b.keys() and all(
        torch.allclose(a[k], b[k], rtol=tolerance, atol=0) for k in a
    )


# ---------------------------------------------------------------------------------- the LoRA file


def test_resuming_is_exact_whatever_the_base_is(train):
    """On bf16 weights of the base below: the resumed run ends as the whole one."""
    flags = {"mixed_precision": "bf16", "checkpointing_steps": 2}
    whole = train(**flags)
    rest = train(**flags, resume_from_checkpoint=whole / "checkpoint-2")
    assert same(whole, rest)
    assert same_tensors(whole / "unet" / PEFT, rest / "unet" / PEFT)
    assert {tensor.dtype for tensor in lora_file(whole)[0].values()} == {torch.float32}


def test_the_check_after_saving_sees_one_element(trainer, monkeypatch, tmp_path):
    """A file that is not what was to be saved ends the run, and is not left as the LoRA."""
    real = trainer.module.save

    def spoil(tensors, about):
        key = next((key for key in tensors if key.endswith("lora_down.weight")), None)
        if key:
            tensors = tensors | {key: tensors[key].clone()}
            tensors[key].view(-1)[0] *= 1.001
        return real(tensors, about)

    monkeypatch.setattr(trainer.module, "save", spoil)
    with pytest.raises(SystemExit, match="1 of .* layers are missing or differ"):
        trainer.train(max_train_steps=1, output_dir=tmp_path)
    assert not (tmp_path / LORA).exists()


def test_an_alpha_that_is_no_sum_of_powers_of_two(train):
    """0.3 is another number in float32, where other tools read it."""
    tensors, about = lora_file(train(lora_alpha=0.3, max_train_steps=1))
    assert about["alpha"] == "0.3" and next(
        t for k, t in tensors.items() if k.endswith("alpha")
    ).item() == pytest.approx(0.3)


# ---------------------------------------------------------------------------------------- lora_path


def plain_keys(out):
    """{module.lora_A.weight: tensor}, the scaling of rank 4 and alpha 2 in B: there is no alpha."""
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(out / "unet" / PEFT).items()
    }
    return {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in tensors.items()}


def down_up(key):
    """A PEFT name in diffusers' older words."""
    return key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def processor(key):
    """The oldest words, where attention layers belong to a processor."""
    return re.sub(r"\.to_(q|k|v|out)(\.0)?\.lora\.", r".processor.to_\1_lora.", down_up(key))


NAMINGS = {
    "diffusers": lambda key: f"unet.{key}",
    "diffusers, older": lambda key: f"unet.{down_up(key)}",
    "diffusers, oldest": lambda key: f"unet.{processor(key)}",
    "PEFT": lambda key: f"base_model.model.{key}",
    "bare": lambda key: key,
    "Hugging Face's tar scripts": lambda key: f"unet.base_model.model.{key}",
    "Hugging Face's SDXL script": lambda key: f"unet.{down_up(key) if '.attn' in key else key}",
}


def write_naming(naming, out, path):
    """The LoRA of an output folder in another tool's naming; the path."""
    tensors = {NAMINGS[naming](key): tensor for key, tensor in plain_keys(out).items()}
    save_file(dict(sorted(tensors.items(), key=lambda item: ".attn" not in item[0])), path)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_in_another_naming(trainer, trained, first, tmp_path, naming):
    """It is read whole, or refused with the command that converts it: never in part."""
    file = write_naming(naming, trained(trainer), tmp_path / "x.safetensors")
    try:
        start = first(trainer, lora_path=file)
    except SystemExit as end:
        assert f"--lora_path {file}" in str(end) and "scripts/convert_lora.py" in str(end)
        assert "\n" not in str(end)
    else:
        assert equal(start, updates(trained(trainer)))


@pytest.mark.parametrize(
    "naming,to",
    [*((naming, "kohya") for naming in NAMINGS), ("bare", "diffusers"), ("bare", "peft")],
)
def test_training_starts_from_a_converted_lora(trainer, trained, first, tmp_path, naming, to):
    """The first step sees exactly the update of any tool's file, in a run of its own alpha."""
    file = write_naming(naming, trained(trainer), tmp_path / "x.safetensors")
    output = tmp_path / ("folder" if to == "peft" else "converted.safetensors")
    load_script("scripts/convert_lora.py").main([str(file), str(output), "--to", to])
    assert equal(first(trainer, lora_path=output), updates(trained(trainer)))


@pytest.mark.parametrize("place", ["", LORA, "unet", f"unet/{PEFT}"])
@pytest.mark.parametrize("alpha", [2, 8])
def test_training_starts_from_its_own_output(trainer, trained, first, place, alpha):
    """From the folder, the kohya-named file, the PEFT folder, its file; under another alpha too."""
    start = first(trainer, lora_path=trained(trainer) / place, lora_alpha=alpha)
    assert (
        equal(start, updates(trained(trainer)))
        and max(u.abs().max() for u in start.values()) > 1e-4
    )


def test_alpha_in_diffusers_header(sd15, train, trained, first, teacher, tmp_path):
    """A file of diffusers' own writing, with PEFT's configuration in the header."""
    trainer = SimpleNamespace(module=sd15, train=train)
    layers = {
        k.removeprefix("base_model.model."): t
        for k, t in load_file(trained(trainer) / "unet" / PEFT).items()
    }
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]).to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=config)
    assert equal(first(trainer, lora_path=tmp_path), updates(trained(trainer)))


def test_pefts_patterns_are_kept(sd15, train, trained, first, tmp_path):
    """alpha_pattern and rank-stabilised scaling of adapter_config.json decide the strength."""
    trainer = SimpleNamespace(module=sd15, train=train)
    folder = shutil.copytree(trained(trainer) / "unet", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"alpha_pattern": {"conv1": 4}, "use_rslora": True})
    )
    start, plain = first(trainer, lora_path=folder), updates(trained(trainer))
    assert equal(
        start, {name: u * (4 if name.endswith("conv1") else 2) for name, u in plain.items()}
    )


def test_a_mixed_file_is_not_dropped_as_diffusers_does(
    train_xl, sdxl, trained, xl_teacher, tmp_path
):
    """diffusers alone reads the layers of one naming: what the tests above start from is more."""
    tensors = plain_keys(trained(SimpleNamespace(module=sdxl, train=train_xl)))
    mixed = {NAMINGS["Hugging Face's SDXL script"](key): tensor for key, tensor in tensors.items()}
    ordered = dict(sorted(mixed.items(), key=lambda item: ".attn" in item[0]))
    unet = UNet2DConditionModel.from_pretrained(xl_teacher, subfolder="unet")
    unet.load_lora_adapter(ordered, prefix="unet")
    assert 0 < len(sdxl.lora_layers(unet)) < len(tensors) / 2


def test_resuming_wins_over_lora_path(train, trained, sd15, tmp_path):
    """With a checkpoint the run goes on from it; without one it starts from the LoRA."""
    flags = {
        "lora_path": trained(SimpleNamespace(module=sd15, train=train)),
        "checkpointing_steps": 2,
        "lora_alpha": 2,
    }
    whole = train(**flags)
    rest = train(**flags, resume_from_checkpoint=whole / "checkpoint-2")
    fresh = train(**flags, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert same(whole, rest) and same(whole, fresh)


def test_advice_on_other_layers_fits(train, sd15, first):
    """The flags that the message names are those under which the file loads."""
    out = train(lora_rank=2, lora_target_modules="to_q to_k conv1", max_train_steps=2)
    for flags in ({}, {"lora_rank": 2}, {"lora_target_modules": "to_q to_k conv1"}):
        with pytest.raises(SystemExit, match="--lora_path ") as end:
            train(lora_path=out, **flags)
        words = shlex.split(re.search(r"give (--lora_rank.*)", str(end.value))[1])
        assert words == ["--lora_rank", "2", "--lora_target_modules", "conv1 to_k to_q"]
    advised = dict(zip(["lora_rank", "lora_target_modules"], words[1::2], strict=True))
    assert equal(
        first(SimpleNamespace(module=sd15, train=train), lora_path=out, **advised),
        updates(out, 1.0),
    )


def spoiled(kind, out, folder):
    """A file of a kind that is no LoRA of this teacher."""
    path, tensors = folder / "x.safetensors", load_file(out / LORA)
    name = next(iter(tensors)).split(".")[0]
    if kind == "NaN":
        save_file(
            tensors | {f"{name}.lora_up.weight": tensors[f"{name}.lora_up.weight"] * torch.nan},
            path,
        )
    elif kind == "truncated":
        path.write_bytes((out / LORA).read_bytes()[:-100])
    elif kind in ("pickle", "pickle.pt"):
        path = path if kind == "pickle" else folder / "x.pt"
        path.write_bytes(pickle.dumps(tensors))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no tensors":
        save_file({}, path)
    elif kind == "incomplete":
        save_file(
            {key: tensor for key, tensor in tensors.items() if key != f"{name}.lora_up.weight"},
            path,
        )
    elif kind == "DoRA":
        save_file(tensors | {f"{name}.dora_scale": torch.ones(4)}, path)
    elif kind == "text encoder":
        save_file(tensors | {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{part}": torch.ones(4, 4)
                             for part in ("lora_down.weight", "lora_up.weight")}, path)  # fmt: skip
    elif kind == "alphas that differ":  # diffusers would take one for all attention layers
        attention = next(key for key in tensors if "attn1_to_q.alpha" in key)
        save_file(tensors | {attention: torch.tensor(1.0)}, path)
    return path


SPOILED = {
    "NaN": "NaN or infinite",
    "truncated": "incomplete|not fully covered|InvalidHeader|deserializing",
    "pickle": "deserializing",
    "pickle.pt": "deserializing",
    "empty": "deserializing",
    "no tensors": "0 of its 0 layers|empty|no layers",
    "incomplete": "no LoRA that can be read",
    "DoRA": "of its .* layers",
    "text encoder": "of its .* layers",
    "alphas that differ": "differ in alpha",
    "nowhere": "No such file",
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_no_lora_is_refused(sd15, train, trained, tmp_path, kind):
    """One line that says why and what would be valid; nothing written."""
    path = spoiled(kind, trained(SimpleNamespace(module=sd15, train=train)), tmp_path)
    with pytest.raises(
        SystemExit, match=rf"error: --lora_path {path}.*({SPOILED[kind]}).*convert_lora.py"
    ) as end:
        train(lora_path=path, output_dir=tmp_path / "out")
    assert "\n" not in str(end.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_layer_with_an_alpha_of_its_own(sd15, train, trained, first, tmp_path, to):
    """As some tools write them; converted, that layer alone has another strength."""
    trainer = SimpleNamespace(module=sd15, train=train)
    tensors = load_file(trained(trainer) / LORA)
    name = next(key for key in tensors if "attn1_to_q.alpha" in key).removesuffix(".alpha")
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    output = tmp_path / ("folder" if to == "peft" else "converted.safetensors")
    words = [str(tmp_path / "x.safetensors"), str(output), "--to", to]
    load_script("scripts/convert_lora.py").main(words)
    expected = {
        path: update / 2 if f"lora_unet_{path.replace('.', '_')}" == name else update
        for path, update in updates(trained(trainer)).items()
    }
    assert equal(first(trainer, lora_path=output), expected)


def test_a_lora_of_the_other_family_is_refused(trained, sd15, sdxl, train, train_xl):
    xl = trained(SimpleNamespace(module=sdxl, train=train_xl))
    with pytest.raises(SystemExit, match="--lora_path .*no LoRA that can be read"):
        train(lora_path=xl)


# ------------------------------------------------------------------------------------------- header


def test_fields_that_other_tools_show(trainer, trained):
    """ModelSpec's and kohya's, each true; none of a place or time on this machine."""
    out = trained(trainer)
    _, about = lora_file(out)
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_steps": "4",
        "ss_learning_rate": "0.01",
        "ss_mixed_precision": "no",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
        "modelspec.implementation": "sgm" if trainer.module.FAMILY == "sdxl" else "diffusers",
        "ss_output_name": out.name,
    }
    assert {key: about.get(key) for key in expected} == expected
    name = about["base_model"].split("/")[-1]
    assert about["ss_sd_model_name"] == name and about["modelspec.title"] == f"LCM-LoRA of {name}"
    assert "/" not in "".join(
        about[key] for key in about if key.startswith("ss_") or key.endswith("title")
    )
    assert not {"ss_base_model_version", "modelspec.date"} & about.keys()  # nobody's base
    assert "lora_adapter_metadata" not in about and str(out) not in json.dumps(about)


@pytest.mark.parametrize("dim,prediction,deep,version,architecture", [
    (768, "epsilon", None, "sd_v1", "stable-diffusion-v1/lora"),
    (1024, "epsilon", None, "sd_v2", "stable-diffusion-v2-512/lora"),
    (1024, "v_prediction", None, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    (2048, "epsilon", None, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    (2048, "v_prediction", None, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    (2048, "epsilon", [[4, 4, 10], [2, 1, 1], 1], "sdxl_base_v1-0",
     "segmind-stable-diffusion-1b/lora"),
    (32, "epsilon", None, None, "sd15-32/lora"),
])  # fmt: skip
def test_the_base_is_named_where_it_is_proven(sd15, dim, prediction, deep, version, architecture):
    """By A1111's rules: sdxl_* is SDXL, ss_v2 True is 2.x."""
    args = sd15.parse_args(["--pretrained_teacher_model", "a/b", "--train_data_dir", "c"])
    unet = SimpleNamespace(cross_attention_dim=dim, reverse_transformer_layers_per_block=deep)
    scheduler = SimpleNamespace(config={"prediction_type": prediction})
    about = sd15.header(
        SimpleNamespace(unet=SimpleNamespace(config=unet), scheduler=scheduler), args, 7
    )
    assert (
        about.get("ss_base_model_version") == version
        and about.get("modelspec.architecture") == architecture
    )
    assert about.get("ss_v2") == (None if version is None else str(dim == 1024))
    assert about["modelspec.prediction_type"] == prediction.removesuffix("_prediction")
    assert all(isinstance(value, str) for value in about.values())


def test_paths_in_the_header_are_names(train, trained, sd15):
    source = trained(SimpleNamespace(module=sd15, train=train))
    settings = json.loads(
        lora_file(train(lora_path=source / LORA, max_train_steps=1))[1]["training_args"]
    )
    assert settings["lora_path"] == LORA and "/" not in settings["train_data_dir"]


# --------------------------------------------------------------------------------------- model card


@pytest.fixture(scope="module")
def carded(train):
    """A run with two validation prompts, one that a shell would cut."""
    return train(validation_prompts=["a cat's red apple", "rain"], learning_rate=3e-2)


def test_the_card_is_valid_and_can_be_pasted(carded, teacher):
    card = ModelCard.load(carded / "README.md")
    assert card.data.library_name == "diffusers" and {"lora", "lcm"} <= set(card.data.tags)
    assert (
        card.data.base_model is None and card.data.license is None
    )  # a local teacher is not on the hub
    assert f'from_pretrained("{teacher}")' in card.text
    assert f'load_lora_weights("{carded}"' in card.text
    (image,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", card.text)
    assert image == "validation/step-000004.png" and (carded / image).is_file()
    assert "- a cat's red apple\n- rain\n" in card.text
    text = " ".join(card.text.split())
    for tool in (
        "diffusers",
        "peft",
        "ComfyUI",
        "A1111",
        "infer.py",
        LORA,
        "4 steps at 32 px",
        "rank 4",
    ):
        assert tool in text, tool


def test_an_uploaded_card_has_no_paths_of_this_machine(sd15, teacher, tmp_path):
    flags = {"pretrained_teacher_model": teacher, "train_data_dir": "c", "output_dir": tmp_path}
    flags |= {"resolution": 8, "push_to_hub": True, "hub_model_id": "me/fast"}
    args = sd15.parse_args(command_line(flags))
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    sd15.write_card(SimpleNamespace(pipe=pipe, step=3), args)
    text = (tmp_path / "README.md").read_text()
    assert str(teacher.parent) not in text and str(tmp_path) not in text
    assert "infer.py --lora me/fast" in text and f'from_pretrained("{teacher.name}")' in text


def test_the_card_of_a_hub_teacher_names_it(sd15, tmp_path):
    flags = {"pretrained_teacher_model": "a/b", "train_data_dir": "c", "output_dir": tmp_path}
    args = sd15.parse_args(command_line(flags | {"resolution": 8}))
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    sd15.write_card(SimpleNamespace(pipe=pipe, step=3), args)
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        card.data.base_model == "a/b"
        and 'from_pretrained("a/b")' in card.text
        and "![" not in card.text
    )


@pytest.mark.parametrize("tool", ["diffusers", "PEFT"])
def test_the_cards_code_generates(carded, teacher, tmp_path, monkeypatch, tool):
    """Word for word, where teacher and LoRA lie beside each other; each layer is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / teacher.name).symlink_to(teacher)
    (tmp_path / carded.name).symlink_to(carded)
    (code,) = re.findall(r"```python\n(.*?)```", (carded / "README.md").read_text(), re.DOTALL)
    if tool == "PEFT":
        code = re.sub(r"pipe.load_lora_weights.*\n# or, by PEFT: ", "import peft\n", code)
    assert code.count("pipe(") == 1
    scope = {}
    exec(code, scope)
    assert (tmp_path / "lcm.png").stat().st_size > 0
    layers = [m for m in scope["pipe"].unet.modules() if hasattr(m, "lora_A")]
    assert len(layers) == len(lora_file(carded)[0]) / 3


def test_the_cards_command_of_infer_generates(carded, tmp_path, monkeypatch):
    monkeypatch.chdir(carded.parent)
    (command,) = re.findall(r"`(python infer.py .*)`", (carded / "README.md").read_text())
    words = shlex.split(command)[2:]
    assert words[words.index("--prompt") + 1] == "a cat's red apple"
    load_script("infer.py").main([*words[:-1], str(tmp_path / "lcm.png")])
    assert (tmp_path / "lcm.png").is_file()


# ------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch):
    """The calls of the hub's API, [(function, token, arguments)], in order; none goes out."""
    calls = []

    def create_repo(self, repo_id, **more):
        calls.append(("create_repo", get_token(), {"repo_id": repo_id} | more))
        return SimpleNamespace(repo_id=f"someone/{repo_id.split('/')[-1]}")

    def upload_folder(self, **more):
        calls.append(("upload_folder", get_token(), more))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_push_to_hub(trainer, hub):
    """A repository first; at the end the LoRA, the PEFT folder, the card, images and no more."""
    out = trainer.train(
        push_to_hub=True,
        hub_model_id="them/mine",
        checkpointing_steps=2,
        report_to="tensorboard",
        validation_prompts=["rain"],
    )
    (made, _, first), (sent, _, last) = hub
    assert (made, sent) == ("create_repo", "upload_folder")
    assert first == {"repo_id": "them/mine", "exist_ok": True} and last["repo_id"] == "someone/mine"
    files = [
        path.relative_to(last["folder_path"]).as_posix()
        for path in out.rglob("*")
        if path.is_file()
    ]
    sent = filter_repo_objects(
        files, allow_patterns=last["allow_patterns"], ignore_patterns=last.get("ignore_patterns")
    )
    peft = ["unet/adapter_config.json", f"unet/{PEFT}"]
    assert sorted(sent) == sorted([LORA, "README.md", "validation/step-000004.png", *peft])
    assert any(name.startswith("checkpoint-2/") for name in files) and any(
        "logs/" in name for name in files
    )
    assert '"someone/mine"' in (out / "README.md").read_text()


def test_a_name_from_the_output_folder(train, hub):
    train(push_to_hub=True, max_train_steps=1)
    assert hub[0][2]["repo_id"] == "out" and hub[1][2]["repo_id"] == "someone/out"


def test_the_token_goes_nowhere_else(
    trainer, hub, images, teacher, xl_teacher, tmp_path, monkeypatch, capfd
):
    """From HF_TOKEN, with every tracker: no file and no line has it."""
    flags = QUICK | {
        "pretrained_teacher_model": teacher if trainer.module.FAMILY == "sd15" else xl_teacher,
        "train_data_dir": images,
        "output_dir": tmp_path / "out",
        "report_to": "all",
        "push_to_hub": True,
        "checkpointing_steps": 2,
        "validation_prompts": ["rain"],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["train.py", *command_line(flags)])
    AcceleratorState._reset_state(True)
    trainer.module.main()
    assert [token for _, token, _ in hub] == [TOKEN, TOKEN]
    texts = capfd.readouterr()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("wandb" in str(path) for path in files)
    assert any(b"--push_to_hub" in text for text in files.values())  # of the command line
    assert [str(path) for path, text in files.items() if TOKEN.encode() in text] == []
    assert TOKEN not in texts.out + texts.err + repr(sys.argv) and size_of_b(tmp_path / "out") > 0


def test_a_bad_token_ends_the_run_before_it_starts(trainer, monkeypatch, tmp_path, capfd):
    """One line, without the token; no teacher is loaded and nothing written."""

    def refuse(self, repo_id, **more):
        raise OSError("401 Client Error: Unauthorized\nfor the url")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(
        trainer.module, "load_teacher", lambda *_: pytest.fail("the teacher was loaded")
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit, match="error: --push_to_hub: .*401 Client.*HF_TOKEN") as end:
        trainer.train(push_to_hub=True, output_dir=tmp_path / "out")
    texts = capfd.readouterr()
    assert TOKEN not in f"{end.value}{texts.out}{texts.err}" and "\n" not in str(end.value)
    assert not any(tmp_path.iterdir())


def test_a_failed_upload_says_what_to_do(train, hub, monkeypatch, tmp_path):
    def refuse(self, **more):
        raise ConnectionError("gone")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(SystemExit, match="--push_to_hub: the upload failed .*gone.*hf upload"):
        train(push_to_hub=True, output_dir=tmp_path / "out", max_train_steps=1)
    assert (tmp_path / "out" / LORA).is_file() and (tmp_path / "out" / "README.md").is_file()


def test_a_name_on_the_hub_without_a_push_is_refused(trainer):
    with pytest.raises(SystemExit, match="error: --hub_model_id: .*--push_to_hub"):
        trainer.train(hub_model_id="them/mine")


@pytest.mark.parametrize("words", [["--hub_token", TOKEN], [f"--hub_token={TOKEN}"]], ids=len)
def test_a_token_on_the_command_line_is_refused(trainer, words, capfd):
    """With where it belongs; the message does not repeat it."""
    needed = ["--pretrained_teacher_model", "m", "--train_data_dir", "d", "--push_to_hub"]
    with pytest.raises(SystemExit, match="error: --hub_token .*HF_TOKEN") as end:
        trainer.module.parse_args([*needed, *words])
    assert TOKEN not in f"{end.value}{''.join(capfd.readouterr())}"
