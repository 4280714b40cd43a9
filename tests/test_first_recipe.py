"""README's five commands: a checkpoint in one file, its recipe, and no images."""

import json
import sys

from conftest import ROOT, documented_commands, run
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from test_infer import make_lora

PROGRAMS = ["make_teacher.py", "generate_data.py", "train_lcm_lora_sd15.py", "infer.py"]
PROGRAMS += ["evaluate.py"]
# What makes them fit for a test: later flags win
MORE = {
    "make_teacher.py": ["--base_config", ROOT / "demo/teacher-sd15"],
    "generate_data.py": "--num_images 12 --solver_steps 4 --mixed_precision no".split(),
    "train_lcm_lora_sd15.py": "--mixed_precision no --max_train_steps 4 --train_batch_size 2 "
    "--lora_rank 4 --report_to none".split(),
    "infer.py": "--scheduler dpm++ lcm --steps 2".split(),
    "evaluate.py": "--steps 1 2 --reference_steps 4 --bootstrap 100 --grid_prompts 2".split(),
}
THINGS = "apple dog house tree cup car horse rose fish moon".split()


def five_commands():
    """README's, as [(program, words)]."""
    commands = [words for page, words in documented_commands() if page == "README.md"]
    first = next(i for i, words in enumerate(commands) if "scripts/make_teacher.py" in words)
    return [(words[1].split("/")[-1], words) for words in commands[first : first + 5]]


def test_my_checkpoint_my_recipe_and_no_images(tmp_path, clip):
    """On the demo teacher in one file with a style LoRA; each command takes what the last made."""
    pipe = DiffusionPipeline.from_pretrained(ROOT / "demo/teacher-sd15")
    write_single_file(pipe, tmp_path / "my-model.safetensors")
    make_lora(pipe.unet, tmp_path / "ink.safetensors", "demo", alpha=1)
    save_file(load_file(tmp_path / "ink.safetensors"), tmp_path / "ink.safetensors")  # of any tool
    lines = [f"{word}, {style} style" for word in THINGS for style in ("noto", "fluent flat")]
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:12]))
    commands = five_commands()
    assert [program for program, _ in commands] == PROGRAMS
    flag = "--mixed_precision"  # the data's and the run's
    given = [words[words.index(flag) + 1] for _, words in commands if flag in words]
    assert len(given) == 2 and len({*given}) == 1
    for program, (_, path, *words) in commands:
        words += MORE[program] + (["--features", clip] if program == "evaluate.py" else [])
        done = run(sys.executable, ROOT / path, *words, cwd=tmp_path)
        assert done.returncode == 0, f"{program}: {done.stderr[-2000:]}"
    recipe = json.loads((tmp_path / "my-teacher/recipe.json").read_text())
    assert (recipe["negative_prompt"], recipe["guidance_scale"]) == ("blurry, text", 6)
    with safe_open(tmp_path / "my-lcm-lora/pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata()
    assert (float(about["w_min"]), float(about["w_max"])) == (5, 5)
    assert json.loads(about["training_args"])["negative_prompt"] == "blurry, text"
    assert load_file(tmp_path / "my-lcm-lora/pytorch_lora_weights.safetensors")
    with Image.open(tmp_path / "compare.png") as image:
        assert min(image.size) > 128
    assert "DPM" in (tmp_path / "my-figures/README.md").read_text()
