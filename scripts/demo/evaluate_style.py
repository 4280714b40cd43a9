"""Is the LCM-LoRA universal? Plug it, untrained, into a style LoRA and into a fine-tuned teacher, and measure both.

    python scripts/demo/evaluate_style.py --lora outputs/quickstart-sd15 --style_lora outputs/style-lora \
        --fine_tune outputs/style-teacher --output_dir outputs/style

The style is Twemoji, which neither teacher nor LCM-LoRA saw; scripts/demo/train_style_lora.py makes the other two, and
scripts/demo/style.sh everything. The settings are those of the LCM-LoRA report's figure 3: DPM-Solver++ at guidance 7.5, and the
style LoRA with weight 0.8 beside the LCM-LoRA, 1 alone. DPM-Solver++ also draws at the guidance that suits it best in 8 steps,
a harder comparison. Writes README.md, with a table of distances to the style's real pictures and what each comparison says, and
style.png, after that figure. Exit code 0 if the LCM-LoRA in 4 steps is closer than DPM-Solver++ in 4 at the report's guidance,
with intervals that do not overlap, for the style LoRA and for the fine-tuned teacher; else 1.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from evaluate import (
    LORA_FILE,
    ROOT,
    TEACHER_STEPS,
    Studio,
    contact_sheet,
    estimate,
    frechet,
    load_lora,
    provenance,
    quiet_libraries,
    read_data,
    resampling,
    show,
    stage,
    table,
)
from safetensors import safe_open
from torchmetrics.image.kid import poly_kernel

BEST_STEPS = (4, 8)  # with the best guidance, which is found in 8
DPM, BEST, LCM = "DPM-Solver++", "DPM-Solver++ (best guidance)", "LCM-LoRA"
REPORT_GUIDANCE = 7.5
STYLE, FINE_TUNE = "style LoRA", "fine-tuned teacher"
STYLE_WEIGHT = 0.8
SHEET_PROMPTS = 4


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo/teacher-sd15", help="base model of both LoRAs")
    add("--lora", type=Path, required=True, help=f"LCM-LoRA: folder with {LORA_FILE}")
    add("--style_lora", type=Path, required=True, help="style LoRA of the same base, likewise")
    add("--fine_tune", type=Path, required=True, help="the base model, fine-tuned on the style")
    add("--data", type=Path, default=ROOT / "demo" / "data", help="folder with twemoji.parquet: image, text")
    add("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="columns; 4 must be among them")
    add("--num_prompts", type=int, default=250)
    add("--guidance", type=float, nargs="+", default=[2.5, 1.5, 4], help="among these is the best for DPM-Solver++")
    add("--batch_size", type=int, default=64)
    add("--bootstrap", type=int, default=2000, help="resamples of drawn and of real pictures, for the 95%% intervals")
    add("--seed", type=int, default=0, help="of prompts, noise and resamples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output_dir", type=Path, required=True, help="gets README.md and style.png")
    args = parser.parse_args(argv)
    args.gallery = ["twemoji"]
    if 4 not in args.steps:
        parser.error("--steps: 4 must be among them, where the methods are judged")
    return args


def kid_to(x, y, weights_x, weights_y):
    """KID of pictures x [n,D] to y [m,D] for each row of resampling weights [R,n], [R,m]; [R].

    KID(w, v) = sum_{i!=j} w_i w_j k(x_i,x_j) / sum_{i!=j} w_i w_j, the same of y and v, and
                - 2 sum_ij w_i v_j k(x_i,y_j) / sum_ij w_i v_j
    Copies of one picture in a resample are not paired with each other: they would count as perfect matches.
    """

    def within(f, w):
        kernel = poly_kernel(f, f).fill_diagonal_(0)
        return ((w @ kernel) * w).sum(1) / (w.sum(1).square() - w.square().sum(1))

    cross = ((weights_x @ poly_kernel(x, y)) * weights_y).sum(1) / (weights_x.sum(1) * weights_y.sum(1))
    return within(x, weights_x) + within(y, weights_y) - 2 * cross


def plug(unet, adapters):
    """Switch on just these adapters, {name: weight}."""
    if adapters:
        unet.enable_lora()
        unet.set_adapters(list(adapters), list(adapters.values()))
    else:
        unet.disable_lora()


def draw(studio, method, steps, guidance, lcm_steps):
    """Features of all prompts drawn with the adapters that are on, and the first pictures."""
    if method == LCM:
        # More steps than the LoRA was distilled over lie between its timesteps.
        grid = lcm_steps if steps <= lcm_steps else TEACHER_STEPS
        scheduler = studio.scheduler(LCMScheduler, original_inference_steps=grid)
    else:
        scheduler = studio.scheduler(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2)
    with stage(f"{method}, {steps} steps, guidance {guidance:g}"):
        return studio.look(studio.sample(scheduler, steps, guidance)[0], keep=SHEET_PROMPTS)


def draw_all(studio, adapters, lcm_steps, args, kid):
    """{(method, steps): (features, first pictures)} of all methods, and their guidances."""
    plug(studio.pipe.unet, adapters[DPM])
    tried = {g: draw(studio, DPM, BEST_STEPS[-1], g, lcm_steps) for g in args.guidance}
    best = min(tried, key=lambda g: kid(tried[g][0])["value"])
    drawn, guidance = {(BEST, BEST_STEPS[-1]): tried[best]}, {LCM: 1, DPM: REPORT_GUIDANCE, BEST: best}
    for method in guidance:
        plug(studio.pipe.unet, adapters[method])
        for steps in BEST_STEPS if method == BEST else args.steps:
            if (method, steps) not in drawn:
                drawn[method, steps] = draw(studio, method, steps, guidance[method], lcm_steps)
    return drawn, guidance


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
    studio = Studio(args, args.model if styled else args.fine_tune, captions)
    load_lora(studio.pipe, args.lora / LORA_FILE)
    if styled:
        load_style(studio.pipe, args.style_lora / LORA_FILE)
    alone, beside = ({"style": 1.0}, {"style": STYLE_WEIGHT}) if styled else ({}, {})
    return studio, {DPM: alone, BEST: alone, LCM: beside | {"lcm": 1.0}}


@torch.no_grad()
def main(argv=None):
    """Draw, measure, write; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    for name, file in ("lora", LORA_FILE), ("style_lora", LORA_FILE), ("fine_tune", "model_index.json"):
        if not (getattr(args, name) / file).is_file():
            raise SystemExit(f"--{name} {getattr(args, name)}: no {file} there")
    quiet_libraries()
    with safe_open(args.lora / LORA_FILE, "pt") as file:
        lcm_steps = int(file.metadata()["num_ddim_timesteps"])
    pictures, order, texts = read_data(args)
    own, others = order[: args.num_prompts], order[args.num_prompts :]
    captions = [texts[i] for i in own]
    weights = resampling(len(own), args.bootstrap, args.seed), resampling(len(others), args.bootstrap, args.seed + 1)
    rows, verdicts, sheet = [], [], []

    def kid(x):
        return estimate(kid_to(x, real[others], *weights))

    def add_row(name, guidance, passes, x):
        rows.append([name, guidance, passes, show(kid(x), 1000), f"{frechet(x, real[others]):.1f}"])

    for name in STYLE, FINE_TUNE:
        with stage(f"loading: {name}"):
            studio, adapters = open_subject(args, name, captions)
        if name == STYLE:  # what does not depend on the subject
            with stage(f"features of {len(pictures)} real pictures"):
                real = studio.look_at_real(pictures)
            add_row("real pictures (floor)", "", "", real[own])
            with stage("VAE reconstructions"):
                add_row("VAE reconstructions", "", "", studio.reconstruct([pictures[i] for i in own]))
            plug(studio.pipe.unet, {})
            bare, _ = draw(studio, DPM, BEST_STEPS[-1], args.guidance[0], lcm_steps)
            add_row(f"neither LoRA, {DPM} {BEST_STEPS[-1]}", f"{args.guidance[0]:g}", 2 * BEST_STEPS[-1], bare)
        drawn, guidance = draw_all(studio, adapters, lcm_steps, args, kid)
        for method, steps in sorted(drawn, key=lambda key: (list(guidance).index(key[0]), key[1])):
            passes = steps if method == LCM else 2 * steps
            add_row(f"{name}, {method} {steps}", f"{guidance[method]:g}", passes, drawn[method, steps][0])
        at_4 = {method: kid(drawn[method, 4][0]) for method in guidance}
        for method in DPM, BEST:
            apart = at_4[LCM]["high"] < at_4[method]["low"]
            says = f"{name}, 4 steps: {LCM} {show(at_4[LCM], 1000)}, {method} at {guidance[method]:g} {show(at_4[method], 1000)}"
            verdicts.append((method, apart, says))
        if name == STYLE:
            for i in range(SHEET_PROMPTS):
                for method in DPM, LCM:
                    sheet += [(drawn[method, n][1][i], f"{method} {n}: {captions[i]}") for n in args.steps]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    contact_sheet(*zip(*sheet), args.output_dir / "style.png", columns=len(args.steps))
    lines = "".join(f"- {'closer' if apart else 'not closer'}: {says}\n" for _, apart, says in verdicts)
    text = f"""# LCM-LoRA as a universal module

{provenance(argv, "scripts/demo/evaluate_style.py")}
{len(own)} captions of the Twemoji pictures by a seeded shuffle. KID and Frechet distance, in EfficientNet-lite0 features, to the
{len(others)} other Twemoji pictures; the floor is the real pictures of the same captions. Style LoRA and fine-tune learned from all
of them. {DPM} draws at {REPORT_GUIDANCE:g}, the report's guidance, and at the one of {", ".join(f"{g:g}" for g in args.guidance)} whose KID in {BEST_STEPS[-1]}
steps is least; LCM-LoRA without guidance, in more than its {lcm_steps} solver steps on timesteps between them. The style LoRA has
weight 1 alone, {STYLE_WEIGHT} beside the LCM-LoRA. Brackets are 95% bootstrap intervals over drawn and real pictures
({args.bootstrap} resamples); "closer" is said where they do not overlap.

{lines}
{table(["", "guidance", "UNet passes", "KID x 1000", "Frechet"], rows)}
The first {SHEET_PROMPTS} captions: the style LoRA with {DPM} at guidance {REPORT_GUIDANCE:g}, then with the LCM-LoRA, in {", ".join(map(str, args.steps))} steps.

![style](style.png)
"""
    print("\n" + text)
    (args.output_dir / "README.md").write_text(text)
    return 0 if all(apart for method, apart, _ in verdicts if method == DPM) else 1


if __name__ == "__main__":
    sys.exit(main())
