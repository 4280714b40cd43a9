"""train_lcm_lora_sd15.py from end to end on small random models.

Its files, its invariants, the defects it must not have.
"""

import argparse
import errno
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

import datasets
import diffusers
import numpy as np
import peft
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import (
    LORA,
    QUICK,
    ROOT,
    SMOOTH,
    command_line,
    difference,
    documented_commands,
    image_bytes,
    launch,
    load_script,
    log,
    lora_file,
    near,
    run,
    same,
    series,
    size_of_b,
)
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = "train_lcm_lora_sd15.py"
TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROW = {"step", "loss", "grad_norm", "lr", "skipped", "overflows", "images_per_s", "data_wait"}
ROW |= {"memory_gib"}


def target_modules(teacher):
    """The names of the teacher's modules that a LoRA layer belongs on."""
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in TARGETS)]


def output(unet):
    """What a UNet says to a fixed input."""
    random = torch.Generator().manual_seed(0)
    z, c = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 16, 32, generator=random)
    with torch.no_grad():
        return unet(z, torch.tensor([259, 999]), encoder_hidden_states=c).sample


@pytest.fixture(scope="session")
def plain(train):
    """The output of a run of four steps with a checkpoint at 2 and at 4."""
    return train(checkpointing_steps=2)


@pytest.fixture
def nets(sd15, monkeypatch):
    """A list that fills with (teacher, student, target) of each step of this test's runs."""
    seen, step = [], sd15.distillation_loss

    def spy(run, *rest):
        seen.append((run.teacher, run.student, run.target))
        return step(run, *rest)

    monkeypatch.setattr(sd15, "distillation_loss", spy)
    return seen


# -------------------------------------------------------------------------------- as a user runs it


def test_alone_in_a_folder(teacher, images, tmp_path):
    """The script copied to an empty folder.

    `accelerate launch` runs it, and these are the files, all of them.
    """
    shutil.copy(ROOT / SCRIPT, tmp_path)
    flags = {
        "pretrained_teacher_model": teacher, "train_data_dir": images, "output_dir": "out",
        "resolution": 32, "lora_rank": 4, "train_batch_size": 2, "max_train_steps": 4,
        "checkpointing_steps": 2, "report_to": "tensorboard",
        "validation_prompts": ["red apple", "rain"], "validation_steps": 2,
    }  # fmt: skip
    done = launch(SCRIPT, *command_line(flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layers read back equal" in done.stdout
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    events = {
        name
        for name in files
        if name.startswith("out/logs/lcm-lora/") and ("/events.out" in name or name.endswith("yml"))
    }
    lora = [LORA, "unet/adapter_config.json", "unet/adapter_model.safetensors"]
    expected = {
        SCRIPT,
        "out/.lock",
        "out/args.json",
        "out/log.jsonl",
        "out/README.md",
        *(f"out/{name}" for name in lora),
    }
    expected |= {
        f"out/checkpoint-{step}/{name}"
        for step in (2, 4)
        for name in [*lora, "training_state.pt", "flags.json", "manifest.json"]
    }
    expected |= {f"out/validation/step-{step:06}.png" for step in (2, 4)}
    assert files - events == expected and events
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]
    assert all(
        set(row) == ROW and np.isfinite(list(row.values())).all() for row in log(tmp_path / "out")
    )
    about = json.loads((tmp_path / "out" / "args.json").read_text())
    assert about["processes"] == 1 and about["versions"]["diffusers"] == diffusers.__version__
    assert about["arguments"]["max_train_steps"] == 4 and about["arguments"]["lora_alpha"] == 4
    assert Image.open(tmp_path / "out/validation/step-000002.png").size == (64, 32)


def test_documented_commands_parse(capsys, monkeypatch):
    """Each command of README.md, docs/ and scripts/*.sh, by the parsers of its programs."""

    monkeypatch.setitem(
        sys.modules, "resvg_py", ModuleType("resvg_py")
    )  # of scripts/demo, perhaps not installed

    class Parsed(Exception):
        """The command line was taken."""

    def parse(program, flags):
        """By the program's `parse_args`, else by its `main`, which ends after parsing."""
        if flags[:1] in (["teacher"], ["lora"]):  # evaluate.py hands these over
            program = "evaluate_demo.py"
        module = load_script(program)
        if hasattr(module, "parse_args"):
            return module.parse_args(flags)
        taken = argparse.ArgumentParser.parse_args

        def parse_and_end(self, args=None, namespace=None):
            taken(self, args, namespace)
            raise Parsed

        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(sys, "argv", [program, *flags])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
            module.main()

    for source, words in documented_commands():
        program = next(word for word in words if word.endswith((".py", ".sh")))
        where = f"{source}: {' '.join(words)}"
        if program.endswith(".sh"):
            assert run("bash", "-n", ROOT / program).returncode == 0, where
            continue
        flags = words[words.index(program) + 1 :]
        try:
            if words[0] == "accelerate":
                parsed = launch_command_parser().parse_args(words[2:])
                assert (parsed.training_script, parsed.training_script_args) == (program, flags), (
                    where
                )
            parse(program, flags)
        except SystemExit as end:
            pytest.fail(f"{where}\n{end} {capsys.readouterr().err}")


def test_log_and_arguments(plain):
    rows = log(plain)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["lr"] == 1e-2 for row in rows)


# --------------------------------------------------------------------------------- weights and LoRA


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_defect_17_one_copy_of_the_base(train, nets, teacher, precision):
    """Student and teacher hold the same Parameter objects.

    They are bit-identical to the file's after training; the LoRA is float32.
    """
    train(mixed_precision=precision)
    base, _, student = nets[-1]
    dtype = DTYPES[precision]
    on_disk = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", dtype=dtype)
    on_disk = on_disk.state_dict()
    of_teacher, of_student = dict(base.named_parameters()), dict(student.named_parameters())
    shared = {
        name.replace(".base_layer", ""): p for name, p in of_student.items() if "lora_" not in name
    }
    assert base is not student and shared.keys() == of_teacher.keys() == on_disk.keys()
    assert all(
        shared[name] is of_teacher[name] and torch.equal(shared[name], on_disk[name])
        for name in shared
    )
    assert not any(p.requires_grad for p in shared.values())
    lora = [p for name, p in of_student.items() if "lora_" in name]
    assert len(lora) == 2 * len(target_modules(teacher))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora)


@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 8, "lora_alpha": 4}], ids=["default", "rank 8 alpha 4"]
)
def test_defect_04_alpha_is_kept(train, nets, teacher, flags):
    """diffusers and PEFT load every layer that was trained.

    Both then say what the live student says.
    """
    out = train(**flags)
    live, base = output(nets[-1][2]), output(nets[-1][0])
    rank = flags.get("lora_rank", 4)
    assert (live - base).abs().max() > 1e-2
    with_diffusers = StableDiffusionPipeline.from_pretrained(teacher)
    with_diffusers.load_lora_weights(out)
    with_peft = peft.PeftModel.from_pretrained(
        StableDiffusionPipeline.from_pretrained(teacher).unet, out / "unet"
    )
    for unet in (with_diffusers.unet, with_peft.base_model.model):
        layers = {
            name: m for name, m in unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
        }
        assert sorted(layers) == sorted(target_modules(teacher))
        assert all(
            [*m.scaling.values()] == [flags.get("lora_alpha", rank) / rank] for m in layers.values()
        )
        assert (output(unet) - live).abs().max() < 1e-5


def test_defect_01_keys_are_those_that_every_tool_reads(plain, teacher):
    tensors, _ = lora_file(plain)
    names = ["lora_unet_" + name.replace(".", "_") for name in target_modules(teacher)]
    assert sorted(tensors) == sorted(
        f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")
    )


def test_defect_02_attention_layers_are_loaded(plain, teacher):
    """Every matrix of the file, attention included, is in the UNet after load_lora_weights."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(plain)
    tensors, _ = lora_file(plain)
    loaded = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            key, adapter = "lora_unet_" + name.replace(".", "_"), *module.lora_A
            loaded[f"{key}.lora_down.weight"] = module.lora_A[adapter].weight
            loaded[f"{key}.lora_up.weight"] = module.lora_B[adapter].weight
    assert sum("attn" in key for key in loaded) >= 16
    assert loaded.keys() == {key for key in tensors if not key.endswith("alpha")}
    assert all(torch.equal(loaded[key], tensors[key]) for key in loaded)


def test_peft_folder_tells_what_the_file_tells(plain):
    """Both headers are one, so infer.py knows the solver's steps from either."""
    with safe_open(plain / "unet" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == lora_file(plain)[1]


def test_defect_22_peft_keys_have_their_prefix(plain):
    tensors = load_file(plain / "unet" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(lora_file(plain)[0]) // 3
    assert all(
        key.startswith("base_model.model.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key in tensors
    )
    config = json.loads((plain / "unet" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS) and config["r"] == config["lora_alpha"] == 4


def test_defect_23_alpha_tensors_are_alpha(train):
    tensors, about = lora_file(train(lora_rank=8, lora_alpha=4, max_train_steps=1))
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {4.0}
    assert (about["rank"], about["alpha"]) == ("8", "4")


def test_the_header(plain, teacher, images):
    _, about = lora_file(plain)
    assert (
        about["base_model"] == str(teacher) and about["family"] == "sd15" and about["step"] == "4"
    )
    assert about["num_ddim_timesteps"] == "50" and "lora_adapter_metadata" not in about
    settings = json.loads(about["training_args"])
    assert settings["learning_rate"] == 1e-2 and settings["train_data_dir"] == images.name
    assert lora_file(plain / "checkpoint-2")[1]["step"] == "2"


def test_a_file_that_reads_back_wrong_is_an_error(sd15, train, monkeypatch):
    """The check after each save is no formality: a wrong alpha in the file ends the run."""
    real = sd15.save

    def spoil(tensors, metadata):
        return real({k: v * 2 if k.endswith("alpha") else v for k, v in tensors.items()}, metadata)

    monkeypatch.setattr(sd15, "save", spoil)
    with pytest.raises(SystemExit, match="79 of 79 layers are missing or differ"):
        train(max_train_steps=1)


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_have_the_permissions_of_the_umask(train, umask):
    """So that a colleague or a web server can read a LoRA, and a checkpoint can be shared."""
    before = os.umask(umask)
    try:
        out = train(max_train_steps=2, checkpointing_steps=1, validation_prompts=["rain"])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (out, *out.rglob("*"))}
    wrong = [
        f"{path}: {mode:o}"
        for path, mode in modes.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    ]
    assert len(modes) > 20 and wrong == []


@pytest.mark.parametrize("how", ["the disk is full", "one number is wrong"])
def test_a_last_save_that_fails_keeps_the_old_files(sd15, train, monkeypatch, how):
    """Half-way through the writing, and where what was written is not what was trained."""
    out = train()
    files = [out / LORA, *(out / "unet").iterdir(), out / "README.md"]
    before, write, save = {path: path.read_bytes() for path in files}, Path.write_bytes, sd15.save
    save_lora = sd15.save_lora

    def write_half(path, content):
        if ".safetensors" not in path.name:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def spoil(tensors, metadata):
        for key in [key for key in tensors if key.endswith("lora_up.weight")][:1]:
            tensors[key] = tensors[key].clone()
            tensors[key].view(-1)[0] += 1
        return save(tensors, metadata)

    full = how == "the disk is full"
    patch = (Path, "write_bytes", write_half) if full else (sd15, "save", spoil)

    def last(run, folder, args):
        """The checkpoint before it is saved as always."""
        with monkeypatch.context() as here:
            if folder == args.output_dir:
                here.setattr(*patch)
            return save_lora(run, folder, args)

    monkeypatch.setattr(sd15, "save_lora", last)
    said = "--output_dir .*cannot be saved .*No space left" if full else f"{LORA}.* 1 of 79 layers"
    with pytest.raises(SystemExit, match=said) as end:
        train(output_dir=out, resume_from_checkpoint="latest", max_train_steps=5)
    assert str(end.value).startswith(f"{SCRIPT}: error: ") and "\n" not in str(end.value)
    assert {path: path.read_bytes() for path in files} == before


def test_defect_03_validation_uses_the_student(train, teacher):
    """Its images are those of a user's pipeline with the finished LoRA, not those of the base."""
    out = train(validation_prompts=["red apple"], max_train_steps=3, learning_rate=3e-2)
    validation = np.asarray(Image.open(out / "validation" / "step-000003.png"), np.int16)
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 1, "height": 32, "width": 32}

    def generate():
        random = torch.Generator().manual_seed(0)
        return np.asarray(pipe("red apple", **settings, generator=random).images[0], np.int16)

    base = generate()
    pipe.load_lora_weights(out)
    assert abs(generate() - validation).max() <= 1
    assert abs(base - validation).max() > 5


def test_defect_07_gradients_are_clipped(train, plain):
    """With a norm far below Adam's epsilon nothing moves.

    The logged norm is that before clipping.
    """
    out = train(max_grad_norm=1e-12)
    assert size_of_b(plain) > 1e-2 and size_of_b(out) < 1e-4
    assert series(out, "grad_norm")[0] == series(plain, "grad_norm")[0]


@pytest.mark.parametrize("launcher", [False, True], ids=["flag", "accelerate config"])
def test_defect_08_lora_is_float32_under_bf16(train, nets, monkeypatch, capsys, launcher):
    """Its weights too fine for bf16, Adam's state float32, the base bf16.

    Also where the launcher chose the precision.
    """
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = train(mixed_precision=None if launcher else "bf16", checkpointing_steps=4)
    tensors, _ = lora_file(out)
    assert next(nets[-1][0].parameters()).dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert any(
        not torch.equal(t.bfloat16().float(), t) for key, t in tensors.items() if "up" in key
    )
    state = torch.load(out / "checkpoint-4" / "training_state.pt", weights_only=True)["optimizer"][
        "state"
    ]
    assert state and all(s["exp_avg"].dtype == torch.float32 for s in state.values())
    assert all(np.isfinite(row).all() for row in series(out, "loss", "grad_norm"))


@pytest.mark.parametrize("quantized", [None, "nf4"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_base_saves_resumes_and_is_started_from(request, train, nets, precision, quantized):
    """The LoRA is float32 whatever is below it, is read back, and goes on to the bit."""
    if precision == "fp16":
        request.getfixturevalue("fp16_on_the_cpu")
    flags = {"quantize_base": quantized, "mixed_precision": precision, "checkpointing_steps": 1}
    whole = train(**flags, max_train_steps=2)
    teacher, _, student = nets[-1]
    dtypes = {p.dtype for name, p in student.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32} and teacher.dtype == DTYPES[precision]
    assert (torch.uint8 in {p.dtype for p in teacher.parameters()}) == bool(quantized)
    assert np.isfinite(series(whole, "loss", "grad_norm")).all() and size_of_b(whole) > 1e-3
    half = train(**flags, max_train_steps=2, resume_from_checkpoint=whole / "checkpoint-1")
    assert same(whole, half) and series(half) == series(whole)[1:]
    another = train(**flags, max_train_steps=1, lora_path=whole, learning_rate=1e-12)
    assert difference(whole, another) < 1e-9


# --------------------------------------------------------------------------------------- invariants


def test_one_seed_one_lora(train, plain):
    """Two runs write the same LoRA, in checkpoints too; another seed another one."""
    again, other = train(checkpointing_steps=2), train(checkpointing_steps=2, seed=1)
    assert same(plain, again) and same(plain / "checkpoint-2", again / "checkpoint-2")
    assert series(plain, "loss", "grad_norm", "lr") == series(again, "loss", "grad_norm", "lr")
    assert difference(plain, other) > 1e-2
    assert len({(run / "unet" / "adapter_config.json").read_text() for run in (plain, again)}) == 1
    ours, theirs = (load_file(run / "unet" / "adapter_model.safetensors") for run in (plain, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {
            "mixed_precision": "bf16",
            "lora_dropout": 0.1,
            "lr_scheduler": "cosine",
            "random_flip": True,
            "lora_alpha": 2,
        },
        {
            "use_8bit_adam": True,
            "lora_rank": 16,
            "scale_lr": True,
            "learning_rate": 1e-3,
            "gradient_checkpointing": True,
        },
    ],
    ids=["plain", "accumulation", "bf16 dropout cosine flip", "8-bit"],
)
def test_defect_19_resumed_is_uninterrupted(train, flags):
    """To the bit, from a path; the log of the resumed run goes on where the checkpoint was made."""
    whole = train(checkpointing_steps=2, **flags)
    rest = train(checkpointing_steps=2, resume_from_checkpoint=whole / "checkpoint-2", **flags)
    assert same(whole, rest) and same(whole / "checkpoint-4", rest / "checkpoint-4")
    columns = ("step", "loss", "grad_norm", "lr")
    assert series(rest, *columns) == series(whole, *columns)[2:]


def test_resume_latest(train, plain, tmp_path):
    """In the same folder: nothing there yet, then after an interruption, then all is done."""
    out = tmp_path / "out"
    flags = {"output_dir": out, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    train(**flags)
    assert same(out, plain)
    shutil.rmtree(out / "checkpoint-4")
    (out / LORA).unlink()
    (out / "checkpoint-6.part").mkdir()
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(**flags)
    assert same(out, plain) and series(out, "step") == [[1], [2], [3], [4]]
    train(**flags)
    assert same(out, plain) and series(out, "step") == [[1], [2], [3], [4]]


def test_accumulation_is_a_larger_batch(train):
    one = train(**SMOOTH)
    four = train(**SMOOTH | {"train_batch_size": 1, "gradient_accumulation_steps": 4})
    assert near(one, four)
    assert difference(one, four) < 1e-5 and size_of_b(one) > 1e-3


def test_gradient_checkpointing_changes_nothing(train, nets):
    off, on = train(**SMOOTH), train(**SMOOTH, gradient_checkpointing=True)
    assert nets[-1][2].is_gradient_checkpointing and not nets[0][2].is_gradient_checkpointing
    assert near(off, on)
    assert difference(off, on) < 1e-5 and size_of_b(on) > 1e-3


def test_defect_05_two_processes_are_one(train, teacher, images, tmp_path):
    """Losses and LoRA of one process with the same global batch.

    So no rank shares noise (11), and the schedule ends (13).

    The checkpoint of the two continues in one (12).
    """
    flags = SMOOTH | {"resolution": 32, "lora_rank": 4, "max_train_steps": 4, "phases": 1}
    flags |= {"lr_scheduler": "linear", "checkpointing_steps": 2}
    one, two = train(**flags), tmp_path / "out"
    where = {
        "pretrained_teacher_model": teacher,
        "train_data_dir": images,
        "output_dir": two,
        "report_to": "none",
    }
    done = launch(
        ROOT / SCRIPT,
        *command_line(flags | where | {"train_batch_size": 2}),
        count=2,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((two / "args.json").read_text())["processes"] == 2
    assert near(one, two)
    assert difference(one, two) < 1e-5
    assert difference(one, train(**flags, resume_from_checkpoint=two / "checkpoint-2")) < 1e-5


# ---------------------------------------------------------------------------------- flags that work


@pytest.mark.parametrize(
    "flags",
    [
        {"w_min": 0, "w_max": 0},
        {"num_ddim_timesteps": 20},
        {"loss_type": "l2"},
        {"huber_c": 0.1},
        {"loss_units": "output"},
        {"center_crop": True},
        {"random_flip": True},
        {"max_train_samples": 3},
        {"lora_dropout": 0.5},
        {"lora_rank": 2},
        {"lora_alpha": 1},
        {"lora_target_modules": "to_q,to_k"},
        {"learning_rate": 1e-3},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_weight_decay": 10.0},
        {"adam_epsilon": 1e-2},
    ],
    ids=lambda flags: " ".join(flags),
)
def test_flag_changes_the_losses(train, plain, flags):
    losses = series(train(**flags))
    assert np.isfinite(losses).all()
    assert abs(np.array(losses) - series(plain)).max() > 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        {"dataloader_num_workers": 2},
        {"validation_prompts": ["rain"], "validation_steps": 2},
        {"allow_tf32": True},
    ],
    ids=lambda flags: " ".join(flags),
)
def test_flag_leaves_the_losses(train, plain, flags):
    assert near(train(**flags), plain)


def test_another_vae(train, plain, make_teacher):
    other = make_teacher(seed=5) / "vae"
    assert (
        abs(np.array(series(train(pretrained_vae_model_name_or_path=other))) - series(plain)).max()
        > 1e-4
    )


def test_v_prediction_with_zero_terminal_snr(train, v_teacher):
    out = train(pretrained_teacher_model=v_teacher, max_train_steps=8, train_batch_size=8)
    assert np.isfinite(series(out, "loss", "grad_norm")).all() and size_of_b(out) > 1e-2


def test_8_bit_adam(train, plain):
    """The state of matrices of 4,096 elements and more is bytes; losses stay near AdamW's."""
    out = train(use_8bit_adam=True, lora_rank=16, checkpointing_steps=4)
    state = torch.load(out / "checkpoint-4" / "training_state.pt", weights_only=True)["optimizer"][
        "state"
    ]
    parts = [
        part
        for of_weight in state.values()
        for part in of_weight.values()
        if isinstance(part, dict)
    ]
    assert {part["state1"].dtype for part in parts} == {torch.uint8, torch.float32}
    assert np.allclose(series(out), series(train(lora_rank=16)), rtol=0.1)


def test_number_of_epochs(train, capsys):
    """Two passes over twelve images by fives are five steps."""
    out = train(max_train_steps=None, num_train_epochs=2, train_batch_size=5)
    assert [step for (step,) in series(out, "step")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_defect_13_learning_rate_is_scaled_and_decays(train, accumulation):
    """--scale_lr multiplies by the global batch, and the schedule is counted in optimizer steps."""
    flags = {
        "learning_rate": 1e-4,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler": "linear",
        "scale_lr": True,
    }
    expected = [[2e-4 * accumulation * (4 - step) / 4] for step in range(4)]
    assert np.allclose(series(train(**flags), "lr"), expected, rtol=1e-12)


def test_warm_up_is_counted_in_steps(train):
    out = train(learning_rate=1e-4, lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=6)
    assert np.allclose(
        series(out, "lr"), [[lr * 1e-4] for lr in (0, 0.5, 1, 0.75, 0.5, 0.25)], rtol=1e-12
    )


def test_checkpoints_total_limit(train):
    out = train(checkpointing_steps=1, checkpoints_total_limit=2)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("kind", ["save_to_disk", "save_to_disk with splits", "parquet"])
def test_forms_of_a_dataset(train, plain, images, tmp_path, kind):
    """The same images in another form give the same losses."""
    data = datasets.load_dataset("imagefolder", data_dir=str(images))
    folder = tmp_path / "data"
    if kind == "parquet":
        folder.mkdir()
        data["train"].to_parquet(folder / "train-00000-of-00001.parquet")
    else:
        (data if "splits" in kind else data["train"]).save_to_disk(folder)
    assert series(train(dataset_name=folder)) == series(plain)


def test_other_columns_and_no_caption(train, images, tmp_path):
    """Columns go by any name; a caption that is missing is the empty one."""
    data = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    data = data.rename_columns({"image": "photo", "text": "words"}).map(
        lambda row: {"words": None}, load_from_cache_file=False
    )
    data = data.cast_column("words", datasets.Value("string"))
    data.save_to_disk(tmp_path / "data")
    out = train(dataset_name=tmp_path / "data", image_column="photo", caption_column="words")
    assert series(out) == series(train(proportion_empty_prompts=1))


def test_cache_dir_is_used(train, images, tmp_path):
    data = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data/train.parquet")
    train(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", max_train_steps=1)
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_captions_reach_the_text_encoder(sd15, train, monkeypatch, capsys):
    """Those of the images; with --proportion_empty_prompts 1 only the empty one."""
    seen, encode = [], sd15.encode_captions

    def spy(pipe, captions, chunks):
        seen.extend(captions)
        return encode(pipe, captions, chunks)

    monkeypatch.setattr(sd15, "encode_captions", spy)
    train(max_train_samples=3)
    assert (
        set(seen[1:]) == {"red apple", "green pear", "a house"}
        and seen[0] == ""
        and len(seen) == 1 + 4 * 2
    )
    seen.clear()
    train(proportion_empty_prompts=1)
    assert set(seen) == {""} and len(seen) == 1 + 4 * 2
    seen.clear()
    train(proportion_empty_prompts=0.5, max_train_steps=10, train_batch_size=10)
    assert 30 < seen[1:].count("") < 70


# ----------------------------------------------------------------------------------------- trackers


@pytest.fixture(scope="module")
def tracked(train, tmp_path_factory):
    """A run with every tracker there is and two validation prompts."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        out = train(
            output_dir=work / "out",
            report_to="all",
            validation_prompts=["red apple", "rain"],
            validation_steps=2,
        )
    return work, out


def test_tensorboard_is_read_back(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(tracked[1] / "logs" / "lcm-lora"), size_guidance={"images": 0, "scalars": 0}
    ).Reload()
    rows = log(tracked[1])
    for name in ROW - {"step"}:
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert np.allclose(scalars, [(row["step"], row[name]) for row in rows], rtol=1e-6), name
    images = [event for tag in events.Tags()["images"] for event in events.Images(tag)]
    assert [event.step for event in images] == [2, 4]
    assert all(event.width * event.height == 2 * 32 * 32 for event in images)


def wandb_records(path):
    """The records of an offline run: after 7 bytes, LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_defect_18_wandb_gets_images_too(tracked):
    """Read from the offline run's own file.

    Scalars of each step, and the images that validation wrote.
    """
    (file,) = tracked[0].rglob("run-*.wandb")
    history = [
        record.history
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    steps = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in one.item}
        for one in history
    ]
    for row, step in zip(log(tracked[1]), steps, strict=True):
        assert all(step["_step" if name == "step" else name] == row[name] for name in ROW)
    assert [step.get("validation/count") for step in steps] == [None, 2, None, 2]
    (files,) = tracked[0].rglob("offline-run-*/files")
    of_wandb = [
        np.asarray(Image.open(files / name).convert("RGB"))
        for name in steps[3]["validation/filenames"]
    ]
    strip = Image.open(tracked[1] / "validation" / "step-000004.png")
    assert np.array_equal(np.concatenate(of_wandb, 1), np.asarray(strip))


def test_trackers_write_into_the_output_folder(tracked):
    assert {path.name for path in tracked[0].iterdir()} == {"out"}


# --------------------------------------------------------------------------------------- bad inputs

SOURCES = "give one of --train_data_dir.*--dataset_name.*--train_shards_path_or_url"
BAD = {
    "no such teacher": (
        {"pretrained_teacher_model": "/nowhere/teacher"},
        "--pretrained_teacher_model /nowhere/teacher",
    ),
    "no such teacher on the hub": (
        {"pretrained_teacher_model": "nobody/nothing"},
        "--pretrained_teacher_model nobody/nothing",
    ),
    "no such VAE": (
        {"pretrained_vae_model_name_or_path": "/nowhere"},
        "--pretrained_vae_model_name_or_path /nowhere",
    ),
    "no such variant": ({"variant": "fp99"}, "--pretrained_teacher_model .*fp99"),
    "SDXL teacher": (
        {"pretrained_teacher_model": "xl_teacher"},
        "--pretrained_teacher_model .*text_encoder_2.*train_lcm_lora_sdxl.py",
    ),
    "epsilon with zero SNR": ({"pretrained_teacher_model": "zero_snr"}, "rescale_betas_zero_snr"),
    "a UNet for inpainting": ({"pretrained_teacher_model": "inpainting"}, "UNet takes 9 channels"),
    "no such folder": ({"train_data_dir": "/nowhere"}, "--train_data_dir /nowhere"),
    "no such dataset": ({"dataset_name": "nobody/nothing"}, "--dataset_name nobody/nothing"),
    "no data": ({"train_data_dir": None}, SOURCES),
    "two sets of data": ({"dataset_name": "a/b", "train_data_dir": "/tmp"}, SOURCES),
    "shards and images": (
        {"train_shards_path_or_url": "{0..9}.tar", "train_data_dir": "/tmp"},
        SOURCES,
    ),
    "an empty folder": ({"train_data_dir": "empty"}, "--train_data_dir"),
    "wrong caption column": (
        {"caption_column": "words"},
        "rows without words .*'text': .*--caption_column words",
    ),
    "wrong image column": (
        {"image_column": "photo"},
        "rows without .*photo_file_name.*--image_column photo",
    ),
    "image column of text": ({"image_column": "text"}, "--(image|caption)_column text"),
    "caption column of images": ({"caption_column": "image"}, "--caption_column image"),
    "images without captions": (
        {"train_data_dir": "captionless"},
        "3 images without a caption .first .*00.png.*--caption_column text",
    ),
    "captions of numbers": ({"train_data_dir": "numbers"}, "the first: .*0[012].png .*is not text"),
    "no readable image": (
        {"train_data_dir": "unreadable"},
        "not one record .*the first: .*0[012].png",
    ),
    "resolution": ({"resolution": 30}, "--resolution 30.* 4"),
    "rank 0": ({"lora_rank": 0}, "--lora_rank.* 0"),
    "rank -1": ({"lora_rank": -1}, "--lora_rank.* -1"),
    "alpha 0": ({"lora_alpha": 0}, "--lora_alpha.* 0"),
    "batch 0": ({"train_batch_size": 0}, "--train_batch_size.* 0"),
    "no steps": ({"max_train_steps": 0}, "--max_train_steps.* 0"),
    "not a number": ({"learning_rate": "nan"}, "--learning_rate.* nan"),
    "infinite": ({"w_max": "inf"}, "--w_max.* inf"),
    "beta of 1": ({"adam_beta2": 1}, "--adam_beta2.* 1"),
    "a seed of 65 bits": ({"seed": 2**64}, "--seed.* 18446744073709551616"),
    "polynomial, only warm-up": (
        {"lr_scheduler": "polynomial", "lr_warmup_steps": 4},
        "--lr_warmup_steps 4",
    ),
    "polynomial, low": (
        {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
        "--lr_scheduler polynomial .*(rate|lr)",
    ),
    "dropout 1.5": ({"lora_dropout": 1.5}, "--lora_dropout.* 1.5"),
    "share of 2": ({"proportion_empty_prompts": 2}, "--proportion_empty_prompts.* 2"),
    "omega": ({"w_min": 5, "w_max": 4}, "--w_min 5.*--w_max 4"),
    "solver steps": ({"num_ddim_timesteps": 2000}, "--num_ddim_timesteps 2000"),
    "layers": ({"lora_target_modules": "nothing like it"}, "--lora_target_modules"),
    "learning-rate schedule": ({"lr_scheduler": "upwards"}, "--lr_scheduler.*upwards.*cosine"),
    "tracker": ({"report_to": "paper"}, "--report_to.*paper"),
    "seed": ({"seed": -1}, "--seed.* -1"),
    "no checkpoint": (
        {"resume_from_checkpoint": "empty"},
        "--resume_from_checkpoint .*no whole checkpoint",
    ),
    "no such checkpoint": (
        {"resume_from_checkpoint": "/nowhere"},
        "--resume_from_checkpoint /nowhere",
    ),
    "checkpoint of another rank": (
        {"resume_from_checkpoint": "checkpoint", "lora_rank": 2},
        "--resume_from_checkpoint .*_rank",
    ),
}


@pytest.fixture(scope="session")
def stand_ins(xl_teacher, make_teacher, make_images, plain, tmp_path_factory):
    """Folders that stand behind words in BAD."""
    captionless, numbers, inpainting = make_images(3), make_images(3), make_teacher()
    config = UNet2DConditionModel.load_config(inpainting / "unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(inpainting / "unet")
    (captionless / "metadata.jsonl").unlink()
    rows = [json.dumps({"file_name": f"0{i}.png", "text": i}) for i in range(3)]
    (numbers / "metadata.jsonl").write_text("\n".join(rows))
    return {
        "xl_teacher": xl_teacher,
        "inpainting": inpainting,
        "zero_snr": make_teacher(rescale_betas_zero_snr=True),
        "empty": tmp_path_factory.mktemp("empty"),
        "unreadable": make_images(3, broken=range(3)),
        "captionless": captionless,
        "numbers": numbers,
        "checkpoint": plain / "checkpoint-2",
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input(train, stand_ins, tmp_path, case):
    """One line that names the flag, and nothing written."""
    flags, message = BAD[case]
    flags = {k: stand_ins.get(v, v) if isinstance(v, str) else v for k, v in flags.items()}
    with pytest.raises(SystemExit, match=message) as end:
        train(output_dir=tmp_path / "new" / "out", **flags)
    assert str(end.value).startswith(f"{SCRIPT}: error: ") and "\n" not in str(end.value)
    assert not any(tmp_path.iterdir())


def as_python(*words):
    """python SCRIPT ..."""
    return run(sys.executable, *words)


def as_launched(*words):
    """accelerate launch --quiet SCRIPT ..."""
    return launch(*words, flags=["--quiet"])


@pytest.mark.parametrize(
    "start", [as_python, as_launched], ids=["python", "accelerate launch --quiet"]
)
@pytest.mark.parametrize(
    "case", ["wrong caption column", pytest.param("SDXL teacher", marks=pytest.mark.slow)]
)
def test_bad_input_as_a_program(teacher, images, stand_ins, tmp_path, case, start):
    """Exit status not 0, one line, no traceback."""
    flags = {k: stand_ins.get(v, v) for k, v in BAD[case][0].items()}
    defaults = {"pretrained_teacher_model": teacher, "train_data_dir": images, "resolution": 32}
    words = [ROOT / SCRIPT, *command_line(defaults | flags | {"output_dir": tmp_path / "out"})]
    done = start(*words)
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def test_one_unreadable_image_is_named(train, make_images, capsys):
    out = train(train_data_dir=make_images(broken=[3]), train_batch_size=4, max_train_steps=6)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "unusable record" in line]
    assert len(log(out)) == 6
    assert len(warnings) == 1 and "1 unusable record" in warnings[0] and "03.png" in warnings[0]


def test_defect_15_unreadable_images_are_counted(train, make_images, capsys):
    """Three of five, with two readers; training goes on with the others."""
    out = train(
        train_data_dir=make_images(5, broken=[0, 2, 3]),
        dataloader_num_workers=2,
        train_batch_size=5,
    )
    text = capsys.readouterr().err
    assert len(log(out)) == 4
    assert "3 unusable records" in text and "4 unusable records" not in text
    assert all(name in text for name in ("00.png", "02.png", "03.png"))


# ------------------------------------------------------------------------------------------- images

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(size, box, first=RED, second=BLUE):
    """An image of `second` with `first` in the box."""
    image = Image.new("RGB", size, second)
    image.paste(first, box)
    return image


def colours(image):
    """The set of an image's colours."""
    return {colour for _, colour in image.getcolors()}


@pytest.mark.parametrize(
    "size,first",
    [((20, 40), (0, 0, 20, 20)), ((40, 20), (0, 0, 20, 20))],
    ids=["portrait", "landscape"],
)
def test_crop_is_where_it_should_be(sd15, size, first):
    """Top or left at (0, 0), bottom or right at (1, 1), both halves in the middle."""
    image = halves(size, first)
    crops = {p: sd15.resize_and_crop(image, (20, 20), (p, p), False)[0] for p in (0, 0.5, 1)}
    assert all(crop.size == (20, 20) for crop in crops.values())
    assert colours(crops[0]) == {RED} and colours(crops[1]) == {BLUE}
    middle = np.asarray(crops[0.5])[..., 0] == 255
    assert (
        middle.sum() == 200
        and middle[(0, 19) if size[0] == 20 else 0, 0].any()
        and middle[0, 0]
        and not middle[19, 19]
    )


@pytest.mark.parametrize("size", [(20, 33), (33, 20), (7, 301), (100, 99), (5, 5)])
def test_any_shape_becomes_the_square(sd15, size):
    for place in ((0, 0), (1, 1), (0.3, 0.7)):
        assert sd15.resize_and_crop(Image.new("RGB", size), (16, 16), place, False)[0].size == (
            16,
            16,
        )


def test_shapes_are_kept(sd15):
    """A square in a portrait stays one, at a third of its size."""
    square, _, _ = sd15.resize_and_crop(halves((60, 90), (0, 0, 30, 30)), (20, 20), (0, 0), False)
    red = np.asarray(square)[..., 0]
    assert (red[:10, :10] > 220).all() and (red[10:] < 35).all() and (red[:, 10:] < 35).all()


def test_crop_is_counted_in_the_mirrored_image(sd15):
    """The edges that come back are those of the square in the image as it was mirrored."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8))
    for flip, source in ((False, image), (True, ImageOps.mirror(image))):
        square, left, top = sd15.resize_and_crop(image, (20, 20), (0.2, 0), flip)
        assert (left, top) == (6, 0) and square.tobytes() == source.crop((6, 0, 26, 20)).tobytes()


def test_enlarged_images_are_interpolated(sd15):
    """By Lanczos: between the two colours there are others."""
    square, _, _ = sd15.resize_and_crop(halves((8, 8), (0, 0, 4, 8)), (20, 20), (0, 0), False)
    assert len(colours(square)) > 2 and {RED, BLUE} < colours(square)


def test_transparency_becomes_white(sd15):
    """RGBA, a palette with a transparent colour, grey with alpha, RGB with a transparent colour."""
    rgba = Image.new("RGBA", (2, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 255, 0, 0)])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    grey = Image.new("LA", (2, 1))
    grey.putdata([(7, 255), (7, 0)])
    rgb = Image.new("RGB", (2, 1))
    rgb.putdata([RED, (0, 255, 0)])
    for record, first in (
        (image_bytes(rgba), RED),
        (image_bytes(palette, transparency=1), RED),
        (image_bytes(grey), (7, 7, 7)),
        (image_bytes(rgb, transparency=(0, 255, 0)), RED),
    ):
        image = sd15.open_image(record)
        assert image.mode == "RGB" and [image.getpixel((x, 0)) for x in (0, 1)] == [first, WHITE]
    half = image_bytes(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert sd15.open_image(half).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(sd15, orientation):
    """An image stored turned comes out upright: the red corner is top left."""
    upright = halves((8, 4), (0, 0, 2, 2))
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose(stored[orientation]) if orientation > 1 else upright
    assert sd15.open_image(image_bytes(turned, exif=exif)).tobytes() == upright.tobytes()


def test_16_bit_grey_keeps_its_tones(sd15):
    ramp = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16)[None])
    tones = np.asarray(sd15.open_image(image_bytes(ramp)))[0, :, 0]
    assert abs(tones - np.linspace(0, 255, 64)).max() <= 1


@pytest.fixture
def samples(sd15):
    """samples(image, *flags) -> the pixels of 64 samples of a dataset of one image."""

    def samples(image, *flags):
        args = sd15.parse_args(
            [
                "--pretrained_teacher_model",
                "x",
                "--train_data_dir",
                "y",
                "--resolution",
                "8",
                *flags,
            ]
        )
        data = sd15.Samples([{"image": image_bytes(image), "text": "a"}], None, args, 8)
        return torch.stack([data[step, place]["pixels"] for step in range(8) for place in range(8)])

    return samples


def test_pixels_are_minus_one_to_one(samples):
    """Black is -1, white is 1; each sample has its own crop, or all have the middle."""
    image = halves((8, 16), (0, 0, 8, 8), (0, 0, 0), WHITE)
    pixels = samples(image)
    assert pixels.shape == (64, 3, 8, 8) and pixels.dtype == torch.float32
    assert pixels.unique().tolist() == [-1, 1]
    assert len(pixels.sum((1, 2, 3)).unique()) == 9
    assert samples(image, "--center_crop").sum((1, 2, 3)).tolist() == [0] * 64


def test_half_of_the_images_are_flipped(samples):
    image = halves((8, 8), (0, 0, 4, 8), (0, 0, 0), WHITE)
    assert (samples(image)[:, 0, 0, 0] == -1).all()
    assert 16 < (samples(image, "--random_flip")[:, 0, 0, 0] == 1).sum() < 48


# ----------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def pipe(teacher):
    """The small teacher as a pipeline."""
    return StableDiffusionPipeline.from_pretrained(teacher)


def test_images_become_latents(sd15, pipe):
    """A sample of the VAE's posterior, times its scaling factor.

    In float32, however many are encoded at once.
    """
    random = torch.Generator().manual_seed(0)
    pixels, noise = (
        torch.rand(5, 3, 32, 32, generator=random) * 2 - 1,
        torch.randn(5, 4, 8, 8, generator=random),
    )
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    expected = 0.18215 * (posterior.mean + posterior.logvar.exp().sqrt() * noise)
    assert posterior.std.mean() > 0.1
    for at_once in (1, 2, 5):
        moments = sd15.encode_images(pipe.vae, pixels, at_once)
        latents = sd15.sample_posterior(moments, noise, 0.18215)
        assert latents.dtype == torch.float32 and torch.allclose(latents, expected, atol=1e-5)


def test_prompts_are_encoded_as_stable_diffusion_does(sd15, pipe):
    """Short, empty, and longer than the text encoder reads, each to the encoder's whole length."""
    captions = ["red apple", "", "one two three four five six seven"]
    ours = sd15.encode_captions(pipe, captions)["prompt"]
    ids = [
        pipe.tokenizer(caption, padding="max_length", truncation=True).input_ids
        for caption in captions
    ]
    expected = pipe.text_encoder(torch.tensor(ids)).last_hidden_state
    assert ours.shape == (3, 16, 32) and torch.allclose(ours, expected, atol=1e-5)
    assert abs(ours[0] - ours[1]).max() > 0.1


def test_names_that_the_terminal_cannot_show(teacher, images, tmp_path):
    """Where only ASCII can be printed, a folder's name is printed in escapes: no run ends by it."""
    flags = QUICK | {"pretrained_teacher_model": teacher, "train_data_dir": images}
    flags |= {"max_train_steps": 1, "output_dir": tmp_path / "é"}
    program = ROOT / "train_lcm_lora_sd15.py"
    done = run(sys.executable, program, *command_line(flags), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "layers read back equal" in done.stdout and "\\xe9" in done.stdout
