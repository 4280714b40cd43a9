#!/usr/bin/env python
"""Rebuild the demo's data: emoji with captions, from pinned npm packages.

    python scripts/demo/build_dataset.py --output_dir demo/data

The everyday things of concepts.txt in three styles (Noto, Fluent flat, Fluent 3D). Twemoji is kept
apart as a style the demo teacher has never seen. The caption of each image is
"{label}, {style} style". Needs npm (to fetch the packages) and, from scripts/demo/requirements.txt,
resvg_py (to render the SVG files).
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

WEBP_QUALITY = 90  # below 95 nothing is seen at these sizes, and the data stay small
CONCEPTS = Path(__file__).resolve().parent / "concepts.txt"

CAPTIONS = (
    "emojibase-data@17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
STYLES = {  # name in the caption: (npm package, sha256 of its tarball, parquet file)
    "noto": (
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "train",
    ),
    "fluent flat": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "train",
    ),
    "fluent 3D": (  # 256 px WebP
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "train",
    ),
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji",
    ),
}


def fetch(package, sha256, folder):
    """Download one npm package and return its files, path: bytes."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    tarball = Path(folder) / done.stdout.split()[-1]
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{package}: sha256 is {found}, expected {sha256}: not the pinned package")
    with tarfile.open(tarball) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()
            for member in tar
            if member.isfile()
        }


def code_points(hexcode):
    """'1F481-200D-FE0F' -> '1f481-200d': without the variation selector, as the sets disagree."""
    return "-".join(p for p in hexcode.lower().split("-") if p != "fe0f")


def everyday():
    """Read concepts.txt: {label: category}."""
    concepts = {}
    text = re.sub(r"^#.*\n", "", CONCEPTS.read_text(encoding="utf-8"), flags=re.M)
    for category, labels in re.findall(r"\[(.+)\]\n([^\[]+)", text):
        concepts |= {" ".join(label.split()): category for label in labels.split(";")}
    return concepts


def read_concepts(folder):
    """The concepts of concepts.txt in emojibase's order: (code points, label, category)."""
    data = json.loads(fetch(*CAPTIONS, folder)["en/data.json"])
    data = sorted(data, key=lambda e: e.get("order", 0))
    wanted = everyday()
    unknown = sorted(set(wanted) - {e["label"] for e in data})
    if unknown:
        sys.exit(f"{CONCEPTS.name}: {CAPTIONS[0]} has no label {unknown[0]!r}")
    # A typographic apostrophe would fall apart into bytes in the tokenizer.
    return [
        (code_points(e["hexcode"]), e["label"].replace("’", "'"), wanted[e["label"]])
        for e in data
        if e["label"] in wanted
    ]


def svg_source(files):
    """An Iconify package as {code points: SVG text}."""
    icon_set, chars = (json.loads(files[name]) for name in ("icons.json", "chars.json"))
    source = {}
    for hexcode, name in chars.items():
        name = icon_set["aliases"].get(name, {}).get("parent", name)
        if name in icon_set["icons"]:
            icon = icon_set["icons"][name]
            width, height = (icon.get(k, icon_set[k]) for k in ("width", "height"))
            source[code_points(hexcode)] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
    return source


def bitmap_source(files):
    """A package of WebP files named by their code points as {code points: bytes}."""
    return {code_points(Path(f).stem): data for f, data in files.items() if f.endswith(".webp")}


def render(source, side):
    """One SVG text or WebP file on white, side x side, as WebP bytes."""
    if isinstance(source, str):
        # Four times too large, then reduced: thin lines keep their weight.
        source = resvg_py.svg_to_bytes(
            svg_string=source, width=4 * side, height=4 * side, background="white"
        )
    image = PILImage.open(io.BytesIO(bytes(source))).convert("RGBA")
    white = PILImage.new("RGBA", image.size, "white")
    image = PILImage.alpha_composite(white, image).convert("RGB")
    image = ImageOps.pad(image, (side, side), PILImage.Resampling.BOX, color="white")
    out = io.BytesIO()
    image.save(out, "WEBP", quality=WEBP_QUALITY, method=6)
    return out.getvalue()


def main():
    """Fetch, render, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo_data = Path(__file__).resolve().parents[2] / "demo" / "data"
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--output_dir", type=Path, default=demo_data, help="default: demo/data")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    rows = {"train": [], "twemoji": []}
    with tempfile.TemporaryDirectory() as folder:
        concepts = read_concepts(folder)
        for style, (package, sha256, split) in STYLES.items():
            files = fetch(package, sha256, folder)
            source = svg_source(files) if "icons.json" in files else bitmap_source(files)
            found = 0
            for hexcode, label, category in concepts:
                if hexcode not in source:
                    continue
                image = {"bytes": render(source[hexcode], args.side), "path": f"{hexcode}.webp"}
                text = f"{label}, {style} style"
                row = {"image": image, "text": text, "style": style, "category": category}
                rows[split].append(row)
                found += 1
            print(f"{style}: {found} of {len(concepts)} concepts", flush=True)

    features = {"image": Image()} | dict.fromkeys(("text", "style", "category"), Value("string"))
    for split, records in rows.items():
        path = args.output_dir / f"{split}.parquet"
        Dataset.from_list(records, features=Features(features)).to_parquet(path)
        print(f"{path}: {len(records)} images, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
