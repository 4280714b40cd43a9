"""What infer.py's --tiny_vae buys: the decoders of SD's VAE and of a TAESD in their official shapes, random weights, timed in turn.

    python scripts/measure/decode_speed.py --resolution 512

The shape of TAESD is the default one of diffusers' AutoencoderTiny.
"""

import argparse
import statistics
import time

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from full_size import random_module
from random_training import VAE


def main(argv=None):
    """Print seconds a picture of both and the median ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=3)
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
            print(
                f"VAE {seconds['vae']:.2f} s, tiny {seconds['tiny']:.2f} s a picture of {side} px: {ratios[-1]:.1f}"
            )
    print(
        f"{torch.get_num_threads()} threads, {device}, {dtype}: {statistics.median(ratios):.1f} times as fast"
    )


if __name__ == "__main__":
    main()
