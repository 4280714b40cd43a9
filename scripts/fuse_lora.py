"""Merge LoRAs into their base model: a diffusers folder that needs no LoRA any more.

    python scripts/fuse_lora.py --lora runs/my-lora --fused_output my-fast-model
    python scripts/fuse_lora.py --lora runs/my-lora --style_lora ink:0.5 --fused_output my-ink-model

This is `python infer.py` with --fused_output, and takes its flags. The folder has an LCMScheduler
with the steps that the LoRA was distilled over.
"""

import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    # infer.py reads the flags, merges the LoRAs and hands the pipeline back to save().
    runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
    raise SystemExit

sys.path.insert(0, str(ROOT))
import infer


def save(pipe, folder):
    """Write the pipeline as a diffusers folder, which appears when it is complete."""
    folder = folder.resolve()
    with infer.or_fail(f"--fused_output {folder}: cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch, folder.name)
            pipe.save_pretrained(made)
            # safetensors makes its files private; the others have what the umask gives.
            for file in made.rglob("*.safetensors"):
                file.chmod((made / "model_index.json").stat().st_mode)
            if folder.exists():
                folder.rmdir()  # it is empty; not every system renames over it
            made.rename(folder)
    print(f"{folder}: the base model with the LoRA merged in")
