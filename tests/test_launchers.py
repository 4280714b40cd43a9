"""scripts/train_*.sh: the commands that they run, printed by DRY_RUN=1 and parsed by the programs they name."""

import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, load_script, run

LAUNCHERS = sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh"))
DATA = {"DATA": "some/dataset", "DATASET": "some/dataset"}


def printed(name, *words, cwd=ROOT, **environment):
    """The command that a launcher would run: (accelerate's arguments, the trainer's arguments)."""
    done = run("bash", ROOT / "scripts" / name, *words, cwd=cwd, DRY_RUN="1", **{**DATA, **environment})
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:2] == ["accelerate", "launch"]
    outer = launch_command_parser().parse_args(command[2:])
    program = outer.training_script.removeprefix(f"{ROOT}/")
    return outer, program, load_script(program).parse_args(outer.training_script_args)


def test_there_are_four():
    assert LAUNCHERS == ["train_sd15.sh", "train_sdxl.sh", "train_sdxl_pokemon.sh", "train_ssd1b.sh"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher(name, tmp_path):
    """It names its family's trainer, from any folder; extra arguments come last and win; without data it says so."""
    outer, program, args = printed(name, "--seed", "77", "--lora_rank", "3", cwd=tmp_path)
    assert program == f"train_lcm_lora_{'sd15' if 'sd15' in name else 'sdxl'}.py"
    assert outer.mixed_precision == "fp16"
    assert (args.seed, args.lora_rank, args.dataset_name) == (77, 3, "some/dataset")
    assert "sdxl-vae-fp16-fix" in (args.pretrained_vae_model_name_or_path or "") or "sd15" in name
    without = run("bash", ROOT / "scripts" / name, DRY_RUN="1")
    assert without.returncode != 0 and "DATA" in without.stderr


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if "pokemon" not in name])
def test_environment_overrides(name, pictures):
    own = {"MODEL": "my/model", "DATA": pictures, "STEPS": 7, "BATCH_SIZE": 3, "OUTPUT": "a b", "PROMPT": "two words"}
    _, _, args = printed(name, **{key: str(value) for key, value in own.items()})
    assert (args.pretrained_teacher_model, args.train_data_dir) == ("my/model", str(pictures))
    assert (args.max_train_steps, args.train_batch_size, args.output_dir) == (7, 3, "a b")
    assert args.validation_prompts == ["two words"]


def test_the_source_pages_recipe():
    """lcm_xl_lora_pokemon_blip of diffengine."""
    _, _, args = printed("train_sdxl_pokemon.sh")
    recipe = {
        "lora_rank": 8, "lora_alpha": 8, "learning_rate": 1e-5, "use_8bit_adam": True, "adam_weight_decay": 0,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 50, "max_train_steps": None,
        "loss_type": "huber", "w_min": 3, "w_max": 15, "num_ddim_timesteps": 50, "resolution": 1024,
        "cache_text_embeddings": True, "pretrained_teacher_model": "stabilityai/stable-diffusion-xl-base-1.0", "validation_prompts": ["yoda pokemon"] * 4,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in recipe} == recipe
