"""Check that the two trainers have not drifted apart: equal names, equal texts.

    python scripts/proofs/drift.py     # list what differs; exit code 1 if anything does
    python scripts/proofs/drift.py --fix train_lcm_lora_sd15.py     # take that file's versions

Compared are functions, classes and constants at the top level, byte for byte. What may differ is
in DIFFERS, with the reason.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py")
DIFFERS = {
    "FAMILY": "the name of the layout, in the LoRA's header",
    "parse_args": "SDXL has a flag more, --use_fix_crop_and_size",
    "prepare_image": "SDXL is conditioned on the image's size and crop",
    "load_teacher": "another pipeline; SDXL's first VAE overflows in fp16",
    "name_in_file": "all programs read the original code's names for SDXL, diffusers' for SD",
    "encode_captions": "SDXL has two text encoders and a pooled output",
}


def definitions(source):
    """{name: its text} of functions, classes and constants at the top level.

    A text begins after the definition above it ends: a comment belongs to what is below it.
    """
    lines, found, end = source.splitlines(keepends=True), {}, 0
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AugAssign) else [])
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        for name in names:
            name = f"{name} again" if name in found else name
            found[name] = "".join(lines[end : node.end_lineno])
        end = node.end_lineno
    return found


def drifted(one, other):
    """Names whose definitions differ and may not, and names of DIFFERS that do not differ."""
    a, b = definitions(one), definitions(other)
    different = {name for name in a.keys() & b.keys() if a[name] != b[name]}
    return sorted(different - DIFFERS.keys()), sorted(DIFFERS.keys() - different)


def main(argv=None):
    """Compare, or copy; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fix", choices=TRAINERS, help="the trainer whose versions are right")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parents[2], help="of the trainers"
    )
    args = parser.parse_args(argv)
    texts = {name: (args.folder / name).read_text() for name in TRAINERS}
    names, needless = drifted(*texts.values())
    if args.fix:
        (other,) = set(TRAINERS) - {args.fix}
        right, wrong = definitions(texts[args.fix]), definitions(texts[other])
        for name in names:
            texts[other] = texts[other].replace(wrong[name], right[name])
            print(f"{other}: {name} taken from {args.fix}")
        (args.folder / other).write_text(texts[other])
        names, needless = drifted(*texts.values())
    for name in names:
        print(f"{name} differs: --fix {' or '.join(TRAINERS)}, or give a reason in DIFFERS")
    for name in needless:
        print(f"DIFFERS: {name} is the same in both, or not in both: remove it")
    return 1 if names or needless else 0


if __name__ == "__main__":
    sys.exit(main())
