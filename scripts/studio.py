"""Images of a pipeline, sampled step by step: prompts are encoded once, each has its own noise."""

import argparse
import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import diffusers
import numpy as np
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import infer


def quiet_libraries():
    """No progress bars and advice of libraries."""
    datasets.disable_progress_bars()
    for library in diffusers, transformers:
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


@contextmanager
def stage(name):
    """Print a stage's name when it starts and its seconds when it ends."""
    print(f"{name} ... ", end="", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)


def batches(items, size):
    """Consecutive parts of `size` items, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


def read_data(args):
    """The gallery's images (PIL), a seeded order of the train set's places in it, its captions."""
    data = [
        datasets.Dataset.from_parquet(str(args.data / f"{name}.parquet")) for name in args.gallery
    ]
    order = np.random.default_rng([args.seed, 0]).permutation(len(data[0]))
    if args.num_prompts > len(order) - 2:
        said = f"the train set has {len(order)} captions"
        raise SystemExit(f"--num_prompts {args.num_prompts}: {said}")
    images = [image.convert("RGB") for part in data for image in part["image"]]
    return images, order, data[0]["text"]


def as_tensor(images):
    """PIL images of one size -> uint8 [N,3,H,W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def open_pipeline(base, config=None, loras=(), device="cpu", dtype=torch.float32, **parts):
    """infer.py's text-to-image pipeline, its VAE in float32; `parts`: a --vae, a --variant."""
    given = {"vae": None, "variant": None, "tiny_vae": None, "mask": None} | parts
    given = argparse.Namespace(**given)
    pipe = infer.load_pipeline(str(base), config, given, device, dtype, dict(loras))
    pipe.vae.float()  # 16 bits would show in what is measured, and SDXL's VAE overflows in them
    return pipe


class Studio:
    """A pipeline, which may be replaced by another with the same text encoders, and its prompts.

    `negative` is the negative prompt of all, `size` is (height, width) in pixels, by default the
    UNet's own.
    """

    def __init__(self, pipe, prompts, seed, batch_size, negative=None, size=None):
        """Nothing is encoded yet."""
        self.pipe, self.device, self.seed, self.batch_size = pipe, pipe.device, seed, batch_size
        self.prompts, self.negative = prompts, negative
        side = pipe.unet.config.sample_size
        native = (side, side) if isinstance(side, int) else tuple(side)
        factor = pipe.vae_scale_factor
        self.latent = tuple(pixels // factor for pixels in size) if size else native
        self.size = tuple(factor * n for n in self.latent)

    @functools.cached_property
    def conditions(self):
        """The UNet's conditions {name: [n,...]} of all prompts, and {name: [1,...]} without one."""
        parts = [self.encode(part) for part in batches(self.prompts, self.batch_size)]
        context = {name: torch.cat([given[name] for given, _ in parts]) for name in parts[0][0]}
        return context, {name: value[:1] for name, value in parts[0][1].items()}

    @torch.no_grad()
    def encode(self, prompts):
        """The UNet's conditions for these prompts, and for the negative one: two {name: [n,...]}.

        Without a negative prompt SDXL takes zeros, where its config says so.
        """
        found = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=[self.negative] * len(prompts) if self.negative else None,
        )
        if len(found) == 2:
            return tuple({"prompt": prompt} for prompt in found)
        # SDXL: the size that is generated, nothing cropped
        sizes = [[*self.size, 0, 0, *self.size]] * len(prompts)
        sizes = torch.tensor(sizes, device=self.device)
        pairs = zip(found[:2], found[2:])
        return tuple(
            {"prompt": prompt, "text_embeds": pooled, "time_ids": sizes} for prompt, pooled in pairs
        )

    def predict(self, z, t, c):
        """The UNet's output for conditions c, in float32."""
        added = {name: value for name, value in c.items() if name != "prompt"}
        z = z.to(self.pipe.unet.dtype)
        return self.pipe.unet(z, t, c["prompt"], added_cond_kwargs=added).sample.float()

    def scheduler(self, kind, **options):
        """A scheduler on the teacher's noise schedule, from t = 999; no clipping of latents."""
        options |= {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
        return kind.from_config(self.pipe.scheduler.config, **options)

    def output(self, z, t, rows, guidance):
        """The UNet's output [B,4,h,w] for prompts `rows`: uncond + guidance (cond - uncond).

        At guidance 1 only cond is run.
        """
        context, null = self.conditions
        given = {name: value[rows] for name, value in context.items()}
        if guidance == 1:
            return self.predict(z, t, given)
        both = {
            name: torch.cat([null[name].expand_as(value), value]) for name, value in given.items()
        }
        uncond, cond = self.predict(torch.cat([z, z]), t, both).chunk(2)
        return uncond + guidance * (cond - uncond)

    def sample_batch(self, rows, scheduler, steps, guidance, series=0, see=None):
        """Latents [B,4,h,w] of prompts `rows`; see(t, z_t, scheduler's output) after each step.

        Each prompt's noise is its own, a function of seed, series and place, so batch size and
        device do not matter.
        """
        seeds = [
            np.random.SeedSequence([self.seed, series, i]).generate_state(1) for i in rows.tolist()
        ]
        generators = [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]
        shape = (1, self.pipe.unet.config.in_channels, *self.latent)
        z = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        # TCD's own default adds noise.
        more = {"eta": 0.0} if type(scheduler).__name__ == "TCDScheduler" else {}
        scheduler.set_timesteps(steps, device=self.device)
        for t in scheduler.timesteps:
            given = {"generator": generators, **more}
            step = scheduler.step(self.output(z, t, rows, guidance), t, z, **given)
            if see:
                see(int(t), z, step)
            z = step.prev_sample
        return z

    def decode(self, latents):
        """Images uint8 [B,3,H,W] of latents, as a PNG would hold them."""
        vae = self.pipe.vae
        z = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        x = vae.decode(z)[0].float()
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()


def provenance(argv, program="scripts/evaluate.py"):
    """The command, the commit, the machine and the versions behind the figures, as Markdown."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")
        ]
        cpu = (models or [cpu])[0]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = ", ".join(
        f"{m.__name__} {m.__version__}" for m in (torch, diffusers, peft, transformers)
    )
    command = shlex.join(["python", program, *argv])
    machine = f"{cpu}, {os.cpu_count()} cores{gpu}. Python {platform.python_version()}"
    return f"`{command}`\n\nCommit {commit}. {machine}, {versions}.\n"
