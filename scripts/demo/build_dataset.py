#!/usr/bin/env python
"""Rebuild demo/data: 64 px emoji with captions, from four pinned npm packages.

    python scripts/demo/build_dataset.py --output_dir demo/data

Two styles (Noto, Fluent flat) are the training set; a third (Twemoji) is kept apart as a style the
demo teacher has never seen. Skin tones and flags are left out. The caption of each image is
"{label}, {style} style". Needs npm (to fetch the packages) and, from
scripts/demo/requirements.txt, resvg_py (to render the SVG files).
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

SIDE = 64  # pixels
WEBP_QUALITY = 90  # below 95 nothing is seen at this size, and the data stay under 5 MB
SKIPPED_GROUPS = {2, 9}  # emojibase: components (swatches of skin and hair) and flags

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
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji",
    ),
}


def fetch(package, sha256, folder):
    """Download one npm package and return a function that reads a JSON file of it."""
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
        sys.exit(f"{package}: sha256 is {found}, not {sha256}: this is not the pinned package")

    def read(name):
        """The content of a JSON file."""
        with tarfile.open(tarball) as tar:
            return json.load(tar.extractfile(f"package/{name}"))

    return read


def code_points(hexcode):
    """'1F481-200D-FE0F' -> '1f481-200d': without the variation selector, on which sets disagree."""
    return "-".join(p for p in hexcode.lower().split("-") if p != "fe0f")


def render(icon, icon_set):
    """Render one icon on white, SIDE x SIDE, and return it as WebP bytes."""
    width, height = icon.get("width", icon_set["width"]), icon.get("height", icon_set["height"])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    # Four times too large, then reduced: thin lines keep their weight.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIDE, height=4 * SIDE, background="white")
    image = (
        PILImage.open(io.BytesIO(bytes(png)))
        .convert("RGB")
        .resize((SIDE, SIDE), PILImage.Resampling.BOX)
    )
    out = io.BytesIO()
    image.save(out, "WEBP", quality=WEBP_QUALITY, method=6)
    return out.getvalue()


def main():
    """Fetch, render, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    data = Path(__file__).resolve().parents[2] / "demo" / "data"
    parser.add_argument("--output_dir", type=Path, default=data, help="gets the parquet files")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    rows = {"train": [], "twemoji": []}
    with tempfile.TemporaryDirectory() as folder:
        concepts = [
            (code_points(e["hexcode"]), e["label"])
            for e in sorted(
                fetch(*CAPTIONS, folder)("en/data.json"), key=lambda e: e.get("order", 0)
            )
            if "group" in e and e["group"] not in SKIPPED_GROUPS
        ]
        for style, (package, sha256, split) in STYLES.items():
            read = fetch(package, sha256, folder)
            icon_set = read("icons.json")
            names = {code_points(hexcode): name for hexcode, name in read("chars.json").items()}
            found = 0
            for hexcode, label in concepts:
                name = names.get(hexcode)
                name = icon_set["aliases"].get(name, {}).get("parent", name)
                if name not in icon_set["icons"]:
                    continue
                image = {
                    "bytes": render(icon_set["icons"][name], icon_set),
                    "path": f"{hexcode}.webp",
                }
                rows[split].append(
                    {"image": image, "text": f"{label}, {style} style", "style": style}
                )
                found += 1
            print(f"{style}: {found} of {len(concepts)} concepts", flush=True)

    features = Features({"image": Image(), "text": Value("string"), "style": Value("string")})
    for split, records in rows.items():
        path = args.output_dir / f"{split}.parquet"
        Dataset.from_list(records, features=features).to_parquet(path)
        print(f"{path}: {len(records)} images, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
