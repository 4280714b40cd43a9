"""What infer.py's --tiny_vae buys: SD's VAE decoder and a TAESD's, timed in turn.

    python scripts/measure/decode_speed.py --resolution 512

Both have their official shapes and random weights; that of TAESD is the default one of diffusers'
AutoencoderTiny.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from official_unets import random_module
from random_training import VAE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter


def main(argv=None):
    """Print seconds an image of both and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    side = "side of the image"
    parser.add_argument("--resolution", type=int, metavar="PIXELS", default=512, help=side)
    rounds = "measurements, after one to warm up"
    parser.add_argument("--rounds", type=int, metavar="N", default=3, help=rounds)
    args = parser.parse_args(argv)
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: give a multiple of 8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    makers = {"vae": lambda: AutoencoderKL.from_config(VAE), "tiny": AutoencoderTiny}
    models = {name: random_module(make, dtype, device).eval() for name, make in makers.items()}
    side, ratios = args.resolution, []
    z = torch.randn(1, 4, side // 8, side // 8, device=device, dtype=dtype)
    for number in range(args.rounds + 1):
        seconds = {}
        for name, model in models.items():
            start = time.perf_counter()
            with torch.no_grad():
                shape = model.decode(z).sample.float().cpu().shape
            seconds[name] = time.perf_counter() - start
            assert shape == (1, 3, side, side)
        if number:  # the first warms up
            ratios.append(seconds["vae"] / seconds["tiny"])
            both = f"VAE {seconds['vae']:.2f} s, tiny {seconds['tiny']:.2f} s"
            print(f"{both} an image of {side} px: {ratios[-1]:.1f}")
    threads, gain = torch.get_num_threads(), statistics.median(ratios)
    print(f"{threads} threads, {device}, {dtype}: {gain:.1f} times as fast")


if __name__ == "__main__":
    main()
