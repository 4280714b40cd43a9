"""Check that the trainers have not drifted apart: definitions of one name must be byte-identical.

    python scripts/proofs/drift.py            # list what differs; exit code 1 if anything does
    python scripts/proofs/drift.py --fix train_lcm_lora_sd15.py    # copy that file's to the other

Compared are functions, classes and constants at the top level. DIFFERS lists what may differ, with
the reason.
"""

import argparse
import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py")
DIFFERS = {
    "FAMILY": "the name of the layout, in the LoRA's header",
    "parse_args": "SDXL has a flag more, --use_fix_crop_and_size",
    "prepare_image": "SDXL is conditioned on the image's size and crop",
    "load_teacher": "another pipeline; SDXL's first VAE overflows in fp16",
    "encode_captions": "SDXL has two text encoders and a pooled output",
}


def definitions(source):
    """{name: its text} of the functions, classes and constants at the top level.

    A definition's text begins after the one above it ends, so that a comment belongs to what it is
    about; decorators are included.
    """
    lines, found, end = source.splitlines(keepends=True), {}, 0
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [])
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        for name in names:
            found[name] = "".join(lines[end : node.end_lineno])
        end = node.end_lineno
    return found


def drifted(one, other):
    """(Names that differ though DIFFERS does not allow it, names of DIFFERS that do not differ)."""
    a, b = definitions(one), definitions(other)
    different = {name for name in a.keys() & b.keys() if a[name] != b[name]}
    return sorted(different - DIFFERS.keys()), sorted(DIFFERS.keys() - different)


def main(argv=None):
    """Compare, or copy; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--fix", choices=TRAINERS, help="the trainer whose versions are right")
    parser.add_argument("--folder", type=Path, default=ROOT, help="the trainers' folder")
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
        advice = "--fix one of them, or give a reason in DIFFERS"
        print(f"{name} differs in {' and '.join(TRAINERS)}: {advice}")
    for name in needless:
        print(f"DIFFERS: {name} is the same in both, or not in both: remove it")
    return 1 if names or needless else 0


if __name__ == "__main__":
    sys.exit(main())
