"""scripts/train_*.sh: their commands, parsed by the programs they name; scripts/accelerate/."""

import os
import shlex
import signal
import subprocess
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, load_script, run

LAUNCHERS = sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh"))
DATA = {"DATA": "some/dataset", "DATASET": "some/dataset"}


def printed(name, *words, cwd=ROOT, **environment):
    """The command that a launcher would run: (accelerate's arguments, the trainer's arguments)."""
    done = run(
        "bash", ROOT / "scripts" / name, *words, cwd=cwd, DRY_RUN="1", **{**DATA, **environment}
    )
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:2] == ["accelerate", "launch"]
    outer = launch_command_parser().parse_args(command[2:])
    program = outer.training_script.removeprefix(f"{ROOT}/")
    return outer, program, load_script(program).parse_args(outer.training_script_args)


def test_there_are_four():
    """The launchers of the design."""
    assert LAUNCHERS == [
        "train_sd15.sh",
        "train_sdxl.sh",
        "train_sdxl_pokemon.sh",
        "train_ssd1b.sh",
    ]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher(name, tmp_path):
    """Its family's trainer, from any folder; extra arguments win; without data it says so."""
    outer, program, args = printed(name, "--seed", "77", "--lora_rank", "3", cwd=tmp_path)
    assert program == f"train_lcm_lora_{'sd15' if 'sd15' in name else 'sdxl'}.py"
    assert outer.mixed_precision == "fp16"
    assert (args.seed, args.lora_rank, args.dataset_name) == (77, 3, "some/dataset")
    assert "sdxl-vae-fp16-fix" in (args.pretrained_vae_model_name_or_path or "") or "sd15" in name
    without = run("bash", ROOT / "scripts" / name, DRY_RUN="1")
    assert without.returncode != 0 and "DATA" in without.stderr


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if "pokemon" not in name])
def test_environment_overrides(name, images):
    """Variables change the model, the data and the settings."""
    own = {
        "MODEL": "my/model",
        "DATA": images,
        "STEPS": 7,
        "BATCH_SIZE": 3,
        "OUTPUT": "a b",
        "PROMPT": "two words",
    }
    _, _, args = printed(name, **{key: str(value) for key, value in own.items()})
    assert (args.pretrained_teacher_model, args.train_data_dir) == ("my/model", str(images))
    assert (args.max_train_steps, args.train_batch_size, args.output_dir) == (7, 3, "a b")
    assert args.validation_prompts == ["two words"]


@pytest.mark.parametrize(
    "files,flag",
    [
        (["a.png", "a.txt"], "train_data_dir"),
        (["10_cats/a.JPG", "10_cats/a.caption", "old.tar"], "train_data_dir"),
        (["a.png", "metadata.csv"], "train_data_dir"),
        (["train.parquet", "README.md"], "dataset_name"),
        (["data/train-0.parquet"], "dataset_name"),
        (["data-00000-of-00001.arrow", "dataset_info.json"], "dataset_name"),
        (["encoded.json"], "dataset_name"),
    ],
    ids=str,
)
def test_data_is_given_by_its_flag(tmp_path, files, flag):
    """DATA=folder of images as README has it, with caption files too; or of a dataset."""
    for name in files:
        path = tmp_path / "my data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _, _, args = printed("train_sd15.sh", DATA="my data", cwd=tmp_path)
    given = {"train_data_dir": args.train_data_dir, "dataset_name": args.dataset_name}
    assert given == {"train_data_dir": None, "dataset_name": None, flag: "my data"}


def test_the_source_pages_recipe():
    """lcm_xl_lora_pokemon_blip of diffengine."""
    _, _, args = printed("train_sdxl_pokemon.sh")
    recipe = {
        "pretrained_teacher_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "resolution": 1024,
        "lora_rank": 8,
        "lora_alpha": 8,
        "learning_rate": 1e-5,
        "optimizer": "adamw8bit",
        "adam_weight_decay": 0,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 50,
        "max_train_steps": None,
        "loss_type": "huber",
        "w_min": 3,
        "w_max": 15,
        "num_ddim_timesteps": 50,
        "validation_prompts": ["yoda pokemon"] * 4,
    }
    assert {name: getattr(args, name) for name in recipe} == recipe


CONFIGS = {
    "one_gpu": ("NO", 1, 1),
    "eight_gpus": ("MULTI_GPU", 1, 8),
    "two_nodes": ("MULTI_GPU", 2, 16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config(name):
    """As accelerate reads it, and as its launcher takes it."""
    path = f"{ROOT}/scripts/accelerate/{name}.yaml"
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == CONFIGS[
        name
    ]
    assert config.mixed_precision == "fp16" and not config.use_cpu
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, "train.py"])
    )
    assert (args.multi_gpu, args.num_machines, args.num_processes) == (
        name != "one_gpu",
        *CONFIGS[name][1:],
    )
    assert name != "two_nodes" or (args.rdzv_backend, args.main_process_port) == ("static", 29500)


@pytest.fixture
def slurm(tmp_path):
    """slurm(accelerate=shell text) -> slurm.sh, running with stand-ins for Slurm and accelerate."""
    show = 'if [ "$1" = show ]; then echo first; echo second'
    programs = {
        "srun": 'SLURM_NODEID=1 exec "$@"',
        "scontrol": f'{show}; else echo "$@" > requeued; fi',
        "scancel": 'echo "$@" > cancelled',
    }

    def slurm(accelerate):
        for name, text in {
            **programs,
            "accelerate": f'printf "%q " "$@" > command\n{accelerate}',
        }.items():
            path = tmp_path / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes"}
        words = [
            "bash",
            ROOT / "scripts/accelerate/slurm.sh",
            "--pretrained_teacher_model",
            "m",
            "--train_data_dir",
            "a b",
        ]
        return subprocess.Popen(words, env=os.environ | places | job)

    return slurm


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_runs_to_the_end(slurm, tmp_path, sdxl, code):
    """Each node's command parses; without a signal the job ends with its code."""
    assert slurm(f"exit {code}").wait(20) == code and not (tmp_path / "requeued").exists()
    words = shlex.split((tmp_path / "command").read_text())
    outer = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and outer.config_file == "scripts/accelerate/two_nodes.yaml"
    assert (outer.machine_rank, outer.main_process_ip) == (1, "first") and (
        ROOT / outer.training_script
    ).is_file()
    args = sdxl.parse_args(outer.training_script_args)
    assert (args.resume_from_checkpoint, args.train_data_dir) == ("latest", "a b")


def test_slurm_queues_again(slurm, tmp_path):
    """On the signal before the time limit: passed to the trainers; the launchers outlive it."""
    job = slurm(
        "kill -USR1 $$; touch survived; until [ -f cancelled ]; do sleep 0.1; done; "
        "sleep 0.5; touch ended; exit 1"
    )
    while not (tmp_path / "survived").exists():
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0 and (tmp_path / "ended").exists()
    assert (tmp_path / "cancelled").read_text() == "--signal=USR1 7\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "#SBATCH --signal=B:USR1@" in (ROOT / "scripts/accelerate/slurm.sh").read_text()
