"""Is the LCM-LoRA universal? Add it, untrained, to a style LoRA and to a fine-tuned teacher.

    python scripts/demo/evaluate_style.py --lora outputs/quickstart-sd15 \\
        --style_lora outputs/style-lora --fine_tune outputs/style-teacher --output_dir outputs/style

The style is Twemoji, which neither teacher nor LCM-LoRA saw; scripts/demo/train_style_lora.py makes
the other two, and scripts/demo/style.sh everything. The settings are those of the LCM-LoRA report's
figure 3: DPM-Solver++ at guidance 7.5, and the style LoRA with weight 0.8 beside the LCM-LoRA, 1
alone. DPM-Solver++ also samples at the guidance that suits it best in 8 steps, a harder comparison.

Writes style.png, a row per thing: the base and the style LoRA in 25 steps, style LoRA and LCM-LoRA
in 4. Then README.md, with a table of distances to the style's real images and the result of each
comparison; --only_figure leaves it out. Exit code 0 if the LCM-LoRA in 4 steps is closer than
DPM-Solver++ in 4 at the report's guidance, with intervals that do not overlap, for the style LoRA
and for the fine-tuned teacher; else 1.
"""

import argparse
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from compare import grid
from evaluate_demo import LORA_FILE, TEACHER_STEPS, DemoStudio, load_lora
from help_formatter import HelpFormatter
from metrics import estimate, frechet, kid_to, resampling, show, table
from studio import ROOT, provenance, quiet_libraries, read_data, stage

BEST_STEPS = (4, 8)  # with the best guidance, which is found in 8
DPM, BEST, LCM = "DPM-Solver++", "DPM-Solver++ (best guidance)", "LCM-LoRA"
REPORT_GUIDANCE = 7.5
STYLE, FINE_TUNE = "style LoRA", "fine-tuned teacher"
STYLE_WEIGHT = 0.8
FIGURE_PROMPTS, FIGURE_STEPS = 6, 25


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --lora FOLDER --style_lora FOLDER --fine_tune FOLDER --output_dir FOLDER",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    add("--lora", **folder, required=True, help=f"LCM-LoRA: folder with {LORA_FILE}")
    add("--style_lora", **folder, required=True, help="style LoRA of the same base, likewise")
    add("--fine_tune", **folder, help="the base model, fine-tuned on the style")
    add("--output_dir", **folder, required=True, help="gets README.md and style.png")
    add("--only_figure", action="store_true", help="generate style.png, and measure nothing")
    name = "that the style LoRA learned (of another than twemoji only the figure)"
    add("--style", default="twemoji", metavar="NAME", help=name)
    add("--model", default="demo/teacher-sd15", help="base model of both LoRAs")
    data = "folder with twemoji.parquet: image, text"
    add("--data", **folder, default=ROOT / "demo" / "data", help=data)
    steps, columns = [2, 4, 8, 16, 32], "columns; 4 must be among them"
    add("--steps", type=int, nargs="+", metavar="N", default=steps, help=columns)
    scales, best = [4, 2, 3], "scales to try for the best one for DPM-Solver++"
    add("--guidance", type=float, nargs="+", metavar="G", default=scales, help=best)
    add("--num_prompts", type=int, metavar="N", default=250, help="captions to generate images for")
    add("--batch_size", type=int, metavar="N", default=64, help="images generated at once")
    resamples = "resamples of generated and of real images, for the 95%% intervals"
    add("--bootstrap", type=int, metavar="N", default=2000, help=resamples)
    add("--seed", type=int, metavar="N", default=0, help="seed of prompts, noise and resamples")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where torch computes")
    args = parser.parse_args(argv)
    args.gallery = ["twemoji"]
    if not (args.fine_tune or args.only_figure):
        parser.error("--fine_tune is needed without --only_figure")
    if 4 not in args.steps:
        parser.error("--steps: 4 must be among them, where the methods are judged")
    return args


def plug(unet, adapters):
    """Switch on just these adapters, {name: weight}."""
    if adapters:
        unet.enable_lora()
        unet.set_adapters(list(adapters), list(adapters.values()))
    else:
        unet.disable_lora()


def generate(studio, method, steps, guidance, lcm_steps):
    """Features of all prompts generated with the adapters that are on, and the first images."""
    if method == LCM:
        # More steps than the LoRA was distilled over lie between its timesteps.
        grid = lcm_steps if steps <= lcm_steps else TEACHER_STEPS
        scheduler = studio.scheduler(LCMScheduler, original_inference_steps=grid)
    else:
        scheduler = studio.scheduler(
            DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2
        )
    with stage(f"{method}, {steps} steps, guidance {guidance:g}"):
        return studio.look(studio.sample(scheduler, steps, guidance)[0], keep=FIGURE_PROMPTS)


def figure(args, captions, guidance, lcm_steps):
    """style.png: a row per caption; base, style LoRA in 25 steps, style LoRA + LCM-LoRA in 4."""
    with stage("loading: figure"):
        studio, adapters = open_subject(args, STYLE, captions[:FIGURE_PROMPTS])
    columns = []
    for group, plugged, method, steps, scale in (
        ("Base", {}, DPM, FIGURE_STEPS, guidance),
        ("+ style LoRA", adapters[DPM], DPM, FIGURE_STEPS, guidance),
        ("+ LCM-LoRA", adapters[LCM], LCM, 4, 1),
    ):
        plug(studio.pipe.unet, plugged)
        _, images = generate(studio, method, steps, scale, lcm_steps)
        images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        columns.append({"group": group, "label": f"{steps} steps", "images": images})
    title = "A style LoRA, and the LCM-LoRA that never saw it"
    grid(columns, captions[:FIGURE_PROMPTS], title).save(args.output_dir / "style.png")


def generate_all(studio, adapters, lcm_steps, args, kid):
    """{(method, steps): (features, first images)} of all methods, and their guidances."""
    plug(studio.pipe.unet, adapters[DPM])
    tried = {g: generate(studio, DPM, BEST_STEPS[-1], g, lcm_steps) for g in args.guidance}
    best = min(tried, key=lambda g: kid(tried[g][0])["value"])
    generated, guidance = (
        {(BEST, BEST_STEPS[-1]): tried[best]},
        {LCM: 1, DPM: REPORT_GUIDANCE, BEST: best},
    )
    for method in guidance:
        plug(studio.pipe.unet, adapters[method])
        for steps in BEST_STEPS if method == BEST else args.steps:
            if (method, steps) not in generated:
                sampled = generate(studio, method, steps, guidance[method], lcm_steps)
                generated[method, steps] = sampled
    return generated, guidance


def one_a_category(args):
    """The first captions of a seeded shuffle that are each of another category."""
    file = args.data / "twemoji.parquet"
    rows = datasets.Dataset.from_parquet(str(file)).remove_columns("image")
    first = {}
    for place in np.random.default_rng([args.seed, 0]).permutation(len(rows)):
        first.setdefault(rows[int(place)]["category"], rows[int(place)]["text"])
    return [text.replace("twemoji style", f"{args.style} style") for text in first.values()]


def load_style(pipe, path):
    """Plug in the style LoRA, all of it."""
    pipe.load_lora_weights(path, adapter_name="style", use_safetensors=True)
    with safe_open(path, "pt") as file:
        matrices = len(list(file.keys()))
    layers = sum("style" in getattr(module, "lora_A", {}) for module in pipe.unet.modules())
    if 2 * layers != matrices:
        raise SystemExit(f"--style_lora {path}: {layers} of {matrices // 2} layers loaded")


def open_subject(args, name, captions):
    """A studio with the LoRAs loaded, and {method: adapters to switch on}."""
    styled = name == STYLE
    studio = DemoStudio(args, args.model if styled else args.fine_tune, captions)
    load_lora(studio.pipe, args.lora / LORA_FILE)
    if styled:
        load_style(studio.pipe, args.style_lora / LORA_FILE)
    alone, beside = ({"style": 1.0}, {"style": STYLE_WEIGHT}) if styled else ({}, {})
    return studio, {DPM: alone, BEST: alone, LCM: beside | {"lcm": 1.0}}


@torch.no_grad()
def main(argv=None):
    """Generate, measure, write; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    for name, file in (
        ("lora", LORA_FILE),
        ("style_lora", LORA_FILE),
        ("fine_tune", "model_index.json"),
    ):
        if getattr(args, name) and not (getattr(args, name) / file).is_file():
            raise SystemExit(f"--{name} {getattr(args, name)}: no {file} there")
    quiet_libraries()
    with safe_open(args.lora / LORA_FILE, "pt") as file:
        header = file.metadata()
    lcm_steps = int(header["num_ddim_timesteps"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    guidance = 1 + (float(header["w_min"]) + float(header["w_max"])) / 2
    figure(args, one_a_category(args), guidance, lcm_steps)
    if args.only_figure:
        return 0
    images, order, texts = read_data(args)
    own, others = order[: args.num_prompts], order[args.num_prompts :]
    captions = [texts[i] for i in own]
    weights = (
        resampling(len(own), args.bootstrap, args.seed),
        resampling(len(others), args.bootstrap, args.seed + 1),
    )
    rows, verdicts = [], []

    def kid(x):
        """The KID of features to the real images, with its interval."""
        return estimate(kid_to(x, real[others], *weights))

    def add_row(name, guidance, passes, x):
        """A row of the table, for features of generated images."""
        rows.append([name, guidance, passes, show(kid(x), 1000), f"{frechet(x, real[others]):.1f}"])

    for name in STYLE, FINE_TUNE:
        with stage(f"loading: {name}"):
            studio, adapters = open_subject(args, name, captions)
        if name == STYLE:  # what does not depend on the subject
            with stage(f"features of {len(images)} real images"):
                real = studio.look_at_real(images)
            add_row("real images (floor)", "", "", real[own])
            with stage("VAE reconstructions"):
                add_row("VAE reconstructions", "", "", studio.reconstruct([images[i] for i in own]))
            plug(studio.pipe.unet, {})
            bare, _ = generate(studio, DPM, BEST_STEPS[-1], args.guidance[0], lcm_steps)
            add_row(
                f"neither LoRA, {DPM} {BEST_STEPS[-1]}",
                f"{args.guidance[0]:g}",
                2 * BEST_STEPS[-1],
                bare,
            )
        generated, guidance = generate_all(studio, adapters, lcm_steps, args, kid)
        methods = list(guidance)
        for method, steps in sorted(generated, key=lambda key: (methods.index(key[0]), key[1])):
            passes = steps if method == LCM else 2 * steps
            add_row(
                f"{name}, {method} {steps}",
                f"{guidance[method]:g}",
                passes,
                generated[method, steps][0],
            )
        at_4 = {method: kid(generated[method, 4][0]) for method in guidance}
        for method in DPM, BEST:
            apart = at_4[LCM]["high"] < at_4[method]["low"]
            ours, theirs = (show(at_4[one], 1000) for one in (LCM, method))
            says = f"{LCM} {ours}, {method} at {guidance[method]:g} {theirs}"
            verdicts.append((method, apart, f"{name}, 4 steps: {says}"))

    lines = "".join(
        f"- {'closer' if apart else 'not closer'}: {says}\n" for _, apart, says in verdicts
    )
    scales = ", ".join(f"{g:g}" for g in args.guidance)
    text = f"""# LCM-LoRA as a universal module

{provenance(argv, "scripts/demo/evaluate_style.py")}
{len(own)} captions of the Twemoji images by a seeded shuffle. KID and Frechet distance, in
EfficientNet-lite0 features, to the {len(others)} other Twemoji images; the floor is the real images
of the same captions. Style LoRA and fine-tune learned from all of them. {DPM} samples at
{REPORT_GUIDANCE:g}, the report's guidance, and at the one of {scales} whose KID in {BEST_STEPS[-1]}
steps is least; LCM-LoRA without guidance, in more than its {lcm_steps} solver steps on timesteps
between them. The style LoRA has weight 1 alone, {STYLE_WEIGHT} beside the LCM-LoRA. Brackets are
95% bootstrap intervals over generated and real images ({args.bootstrap} resamples); "closer" is
said where they do not overlap.

{lines}
{table(["", "guidance", "UNet passes", "KID x 1000", "Frechet"], rows)}
{FIGURE_PROMPTS} captions, the first of a seeded shuffle that are each of another category: the base
and the style LoRA with {DPM} in {FIGURE_STEPS} steps, the style LoRA with the LCM-LoRA in 4.

![style](style.png)
"""
    print("\n" + text)
    (args.output_dir / "README.md").write_text(text, encoding="utf-8")
    return 0 if all(apart for method, apart, _ in verdicts if method == DPM) else 1


if __name__ == "__main__":
    sys.exit(main())
