#!/usr/bin/env python
"""A teacher of an official shape with random weights, and images, for programs that want files.

    python scripts/measure/random_teacher.py sdxl FOLDER --resolution 1024

FOLDER gets `teacher`, a pipeline in fp16 with UNet, VAE and text encoders of full size (SDXL: 7
GB), and `images`, a data set of random images of that side with captions. Speed and memory are
those of the real model; what it generates is noise.
"""

import argparse
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from random_training import check_model, fail, random_pipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter, command_line, given_path


def random_image(number, side):
    """A smooth image, a little larger than the side: it has to be resized as real ones."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels).resize((side * 5 // 4,) * 2, Image.Resampling.BICUBIC)


def main(argv=None):
    """Write both."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL FOLDER [--resolution PIXELS] [--num_images N]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    add(
        "model", type=check_model, help="sd15, sd21, ssd1b, sdxl, or a teacher folder for its shape"
    )
    add("folder", type=given_path, metavar="FOLDER", help="gets teacher and images")
    add("--resolution", type=int, default=1024, metavar="PIXELS", help="side of the images")
    add("--num_images", **count, default=64, help="with captions")
    args = parser.parse_args(command_line(argv))
    if min(args.resolution, args.num_images) < 1:
        fail("--resolution and --num_images must be 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_pipe(args.model, torch.float16, device, False).save_pretrained(args.folder / "teacher")
    images = [random_image(number, args.resolution) for number in range(args.num_images)]
    captions = [f"image {number} of many colours" for number in range(args.num_images)]
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": images, "text": captions}, features=kinds)
    (args.folder / "images").mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(args.folder / "images" / "train.parquet"))


if __name__ == "__main__":
    sys.exit(main())
