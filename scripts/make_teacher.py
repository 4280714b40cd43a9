"""Make a teacher of a checkpoint and a recipe: a diffusers folder with all of it merged in.

    python scripts/make_teacher.py --base model.safetensors --style_lora ink.safetensors:0.7 \\
      --clip_skip 2 --negative_prompt "blurry" --guidance_scale 7 --output my-teacher
    python scripts/make_teacher.py --from_image good.png --models ~/ComfyUI/models \\
      --output my-teacher

LoRAs in any naming are merged at their weights, each layer proven to have arrived. The folder's
recipe.json holds what belongs to no weight: negative prompt, guidance, size. Trainers,
generate_data.py and infer.py take it as their defaults.

--from_image reads the settings of an image of A1111, Forge, ComfyUI or infer.py. Flags win over
the image; what was taken, and what is not mapped, is printed.

The folder is written as OUTPUT.part, read back by the trainer that will use it, then renamed.
"""

import argparse
import contextlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # infer.py and the trainers, help_formatter.py
import read_recipe
from help_formatter import HelpFormatter, command_line

RECIPE = "recipe.json"
# {what recipe.json holds: (type, least, most)}
NUMBERS = {
    "guidance_scale": (float, 1, 1000),
    "guidance_rescale": (float, 0, 1),
    "width": (int, 8, 10**6),
    "height": (int, 8, 10**6),
    "max_prompt_chunks": (int, 1, 100),
}
WEIGHTS = (-10, 10)  # of a LoRA
LAYERS = (1, 100)  # --clip_skip
PREDICTIONS = ("epsilon", "v_prediction")
SETTINGS = (  # that an image may name too
    "base variant base_config loras vae clip_skip prediction_type rescale_betas_zero_snr "
    "negative_prompt"
).split() + [*NUMBERS]


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (--base MODEL | --from_image IMAGE --models FOLDER ...) --output FOLDER "
        "[flags]",
        description=__doc__,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=100),
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"error: {message}")

    def path(text):
        return infer.usable_path(text) if text else parser.error("a path is empty")

    def checked(kind, low, high):
        return lambda text: infer.number(kind, low, high)(text)

    add, where = parser.add_argument, {"metavar": "PATH_OR_ID", "type": path}
    # infer.py's messages name the second one
    add("--base", "--base_model", **where, help=".safetensors file, diffusers folder or Hub id")
    add("--base_config", **where, help="configs and tokenizers of a base in one file")
    add("--variant", metavar="NAME", help="variant of the base's weight files, e.g. fp16")
    styles = {"type": lambda text: infer.weighted(checked(float, *WEIGHTS), 0.8)(text)}
    styles |= {"metavar": "PATH[:WEIGHT]", "nargs": "*", "action": "extend", "dest": "loras"}
    add("--style_lora", **styles, help="LoRAs to merge (default WEIGHT: 0.8); none: no LoRA")
    add("--vae", **where, help="another VAE; a .safetensors file, too")
    layers = "end CLIP at its Nth last layer: 1 is all of it, as in UIs"
    add("--clip_skip", metavar="N", type=checked(int, *LAYERS), help=layers)
    add("--prediction_type", choices=PREDICTIONS, help="of the base, if it is told wrongly")
    zero = "whether its noise schedule ends at zero SNR"
    add("--rescale_betas_zero_snr", action=argparse.BooleanOptionalAction, help=zero)
    text = {"metavar": "TEXT", "type": lambda text: infer.plain_text(text)}
    add("--negative_prompt", **text, help="what the teacher is guided away from")
    for name, (what, of) in {
        "guidance_scale": ("SCALE", "as in its user's UI, e.g. 7"),
        "guidance_rescale": ("SHARE", "0 to 1, of guided outputs to the contrast of unguided ones"),
        "width": ("PIXELS", "of the images it generates"),
        "height": ("PIXELS", "of the images it generates"),
        "max_prompt_chunks": ("N", "pieces of 75 tokens in which CLIP reads a prompt"),
    }.items():
        add(f"--{name}", metavar=what, type=checked(*NUMBERS[name]), help=of)
    add("--from_image", metavar="IMAGE", type=path, help="image whose settings are taken")
    models = "where the models that the image names are looked up, with all that is inside"
    add("--models", metavar="FOLDER", type=path, nargs="+", default=[], help=models)
    add("--dtype", choices=["fp16", "fp32"], default="fp32", help="of the weights written")
    new = {"metavar": "FOLDER", "type": lambda text: Path(path(text)), "required": True}
    add("--output", **new, help="a new or an empty folder")
    args = parser.parse_args(command_line(argv))
    for side in "width", "height":
        if (value := vars(args)[side]) and value % 8:
            parser.error(f"--{side} {value}: must be a multiple of 8, e.g. {-(-value // 8) * 8}")
    if args.from_image is None and (args.base is None or args.models):
        parser.error("--base is missing" if args.base is None else "--models needs --from_image")
    return args


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse_args()  # at once: the libraries that infer.py imports take seconds to load

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer

# ----------------------------------------------------------------------------- 1. What is asked for


def check_output(folder):
    """The place beside the output where the folder is made, cleared of a run that was stopped."""
    part = folder.with_name(f"{folder.name}.part")
    with infer.or_fail(f"--output {folder}: cannot be read"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            infer.fail(f"--output {folder}: must be a new or an empty folder")
        if folder.suffix.lower() == ".safetensors":
            infer.fail(f"--output {folder}: a folder is written, its name may not end so")
        known = "unet vae text_encoder* tokenizer* scheduler feature_extractor model_index.json"
        ours = {file for name in (*known.split(), RECIPE) for file in part.glob(name)}
        if part.is_file() or part.is_dir() and {*part.iterdir()} - ours:
            infer.fail(f"--output {folder}: {part} is in the way; move it")
    with infer.or_fail(f"--output {folder}: cannot be written"):
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
    return part


def check_setting(key, value):
    """A value of an image or a recipe.json; refuse what the flag of its name would refuse."""
    if key in NUMBERS or key == "clip_skip":
        kind, low, high = NUMBERS.get(key, (int, *LAYERS))
        fits = type(value) in (int, float) and low <= value <= high and kind(value) == value
        multiple = " and a multiple of 8" * (key in ("width", "height"))
        if not fits or multiple and value % 8:
            valid = f"{kind.__name__} from {low} to {high}{multiple}"
            raise ValueError(f"{key} is {value!r:.80}, must be {valid}")
        return kind(value)
    if key == "loras":
        for name, *weights in value:
            fits = all(WEIGHTS[0] <= weight <= WEIGHTS[1] for weight in weights)
            if not fits or not isinstance(name, str):
                low, high = WEIGHTS
                raise ValueError(f"LoRA {name!r:.80}: its weight must be {low} to {high}")
        return value
    kind = bool if key == "rescale_betas_zero_snr" else str
    if not isinstance(value, kind) or key == "prediction_type" and value not in PREDICTIONS:
        raise ValueError(f"{key} is {value!r:.80}, which cannot be used")
    if kind is str:
        value.encode()  # ends in ValueError where it is no valid text
    return value


def take_image(args):
    """Fill in what no flag gives by the settings of --from_image; all that is taken is printed."""
    where = f"--from_image {args.from_image}"
    try:
        settings, notes = read_recipe.read(args.from_image)
    except ValueError as error:
        infer.fail(f"{where}: {error}")
    for note in notes:
        print(f"not mapped: {note}")
    paths = settings.get("paths")
    args.prompt = str(settings.get("prompt") or "").encode(errors="replace").decode()
    for folder in args.models:
        if not Path(folder).is_dir():
            infer.fail(f"--models {folder}: no such folder")
    if args.base:  # another base has its own configs and variant
        settings.pop("base_config", None), settings.pop("variant", None)
    models, missing = None, []
    for key in SETTINGS:
        if vars(args)[key] is not None or settings.get(key) is None:
            continue
        try:
            value = check_setting(key, settings[key])
        except ValueError as error:
            infer.warn(f"{where}: {error}: not taken")
            continue
        if key in ("base", "loras", "vae"):
            models = read_recipe.list_models(args.models) if models is None else models
        if key == "loras":
            value = [
                (found, (te, unet))
                for name, te, unet in value
                if (found := find(name, "LoRA", models, missing, paths)) and (te or unet)
            ]
        elif key in ("base", "vae"):
            value = find(value, key if key == "base" else "VAE", models, missing, paths)
        setattr(args, key, value)
        if key == "loras":
            shown = ", ".join(f"{name} ({weight_words(weight)})" for name, weight in value)
            print(f"from the image: LoRAs {shown or 'none'}")
        else:
            print(f"from the image: {key} {value!r}")
    if missing:
        flags = "--models names the folders; --base, --style_lora and --vae win over the image"
        infer.fail(f"{where}: {'; '.join(missing)}; {flags}")
    scale = settings.get("guidance_scale")
    if scale == args.guidance_scale and (scale or 9) <= 2:
        infer.warn(f"{where}: guidance_scale {scale:g} is of few steps, a teacher needs more")
    if args.base is None:
        infer.fail(f"{where}: it names no checkpoint; give --base")


def find(name, kind, models, missing, paths):
    """The path of a model that an image names; where there is none, the reason is kept."""
    if paths and infer.local(name):
        return name
    try:
        return str(read_recipe.find(name, models, kind))
    except ValueError as error:
        if paths and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            return name  # of the Hub
        missing.append(str(error))


def weight_words(weight):
    """A LoRA's weight, or its two."""
    te, unet = weight if isinstance(weight, tuple) else (weight, weight)
    return f"{unet:g}" if te == unet else f"UNet {unet:g}, text encoders {te:g}"


def check_texts(pipe, args):
    """Warn of what CLIP does not read as UIs do, in the prompts that are known."""
    room = (pipe.tokenizer.model_max_length - 2) * (args.max_prompt_chunks or 1)
    for what in "negative_prompt", "prompt":
        text = vars(args).get(what) or ""
        for sign in r"\([^()\n]+:[\d.]+\)", r"\bembedding:\S+":
            if match := re.search(sign, text):
                infer.warn(f"{what}: {match[0][:80]} is a UI's, CLIP reads it as text here")
        if (tokens := len(pipe.tokenizer(text, add_special_tokens=False).input_ids)) > room:
            way = "--max_prompt_chunks takes more"
            infer.warn(f"{what}: it has {tokens} tokens, of which {room} are read; {way}")


def base_recipe(base):
    """The settings of recipe.json in a base that this program made."""
    file = Path(infer.local(base) or base, RECIPE)
    if not file.is_file():
        return {}
    with infer.or_fail(f"{file}: cannot be used"):
        recipe = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict) or recipe.get("format") != 1:
            raise ValueError("it is no object of format 1")
        keys = ["negative_prompt", *NUMBERS]
        return {key: check_setting(key, recipe[key]) for key in keys if key in recipe}


# ----------------------------------------------------------------------------------- 2. The teacher


def configs_of(args):
    """The folder or Hub id of the base's configs; None: those that diffusers takes for a file."""
    return args.base_config if args.base.lower().endswith(".safetensors") else args.base


def open_vae(file, args, folder):
    """A VAE in one .safetensors file, of either naming, as a diffusers folder; its path."""
    with infer.or_fail(f"--vae {file}: cannot be opened", "a diffusers folder is taken, too"):
        source = configs_of(args)
        if not source:  # as diffusers does for the rest of the base
            tensors = load_file(infer.local(args.base) or args.base)
            source = diffusers.loaders.single_file_utils.fetch_diffusers_config(tensors)
            source = source["pretrained_model_name_or_path"]
        source = str(infer.local(source) or source)
        config = diffusers.AutoencoderKL.load_config(source, subfolder="vae")
        tensors = load_file(file)
        if not any("_blocks." in key for key in tensors):
            convert = diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint
            tensors = convert(tensors, config)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / diffusers.utils.SAFETENSORS_WEIGHTS_NAME)
    infer.load_part(diffusers.AutoencoderKL, f"--vae {file}", folder, torch.float32)
    return str(folder)


def skip_layers(pipe, clip_skip):
    """End the text encoder of SD 1.x and 2.x at its Nth last layer; the last norm follows it."""
    if hasattr(pipe, "text_encoder_2"):
        if clip_skip > 2:
            why = "the pooled embedding needs the last layer of the second encoder"
            infer.fail(f"--clip_skip {clip_skip}: SDXL takes 1 or 2, which change nothing: {why}")
        why = "SDXL always reads the layer before the last"
        print(f"--clip_skip {clip_skip} changes nothing: {why}")
        return
    encoder = pipe.text_encoder
    # Whether it has a text_model depends on the version of transformers.
    stack = getattr(encoder, "text_model", encoder).encoder
    if clip_skip > (count := len(stack.layers)):
        infer.fail(f"--clip_skip {clip_skip}: its text encoder has {count} layers")
    stack.layers = stack.layers[: count - clip_skip + 1]
    encoder.config.num_hidden_layers = len(stack.layers)


def make_scheduler(pipe, args):
    """The base's own scheduler, with what the model predicts; DDIM where its class cannot."""
    settled, source = pipe.scheduler.config, configs_of(args)
    own = dict(infer.read_configs(str(infer.local(source) or source))[1] if source else settled)
    own.pop("_use_default_values", None)  # values under these names would not count
    name, key = own.get("_class_name"), "rescale_betas_zero_snr"
    if source and name in ("LCMScheduler", "TCDScheduler"):
        infer.fail(f"--base {args.base}: an LCM-LoRA is merged in, by its scheduler ({name})")
    if settled.get(key) and not (source and own.get(key)):
        own["timestep_spacing"] = "trailing"  # else no image would begin at SNR 0
    own |= {name: settled[name] for name in ("prediction_type", key) if name in settled}
    with infer.or_fail(f"--base {args.base}: its scheduler config cannot be used"):
        kind = getattr(diffusers, str(name), diffusers.DDIMScheduler)
        knows = inspect.signature(kind).parameters
        if not source or own.get(key) and key not in knows or "beta_schedule" not in knows:
            kind = diffusers.DDIMScheduler  # it may also be a stand-in for one of another library
        return kind.from_config(own)


def make_pipe(args, part):
    """The pipeline with all merged in, in float32, and [(LoRA's name, weight)]."""
    weights = [weight for _, weight in args.loras]
    loras, names = {}, []
    for index, (name, _) in enumerate(args.loras):
        path, layers, about = infer.open_lora(infer.find_lora(name, "--style_lora"))
        if about.get("lcm_lora_version"):
            infer.fail(f"--style_lora {name}: an LCM-LoRA; a teacher is the model without it")
        loras[f"style_{index}"] = path, layers, about
        names.append(name if not infer.local(name) else infer.lora_name(path, about))
    # What infer.py needs to know, as its own command line says it
    settings = infer.parse_args(["--base_model", args.base, "--prompt", ""])
    for key in "base_config variant prediction_type rescale_betas_zero_snr vae".split():
        setattr(settings, key, vars(args)[key])
    if args.vae and args.vae.lower().endswith(".safetensors"):
        settings.vae = open_vae(args.vae, args, part / "vae")
    where = ("cpu", torch.float32)
    pipe = infer.load_pipeline(args.base, args.base_config, settings, *where, dict(loras))
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    settings.style_lora = [
        (name, dict.fromkeys(parts, weight[0]) | {"unet": weight[1]})
        if isinstance(weight, tuple)
        else (name, weight)
        for name, weight in args.loras
    ]
    infer.fuse(pipe, settings, loras, args.base)
    return pipe, list(zip(names, weights))


# ------------------------------------------------------------------------------------ 3. The folder


def write(pipe, part, args, names):
    """Write the teacher with its recipe."""
    for name in "safety_checker", "feature_extractor", "image_encoder":
        if hasattr(pipe, name):
            pipe.register_modules(**{name: None})
    if not hasattr(pipe, "text_encoder_2"):
        pipe.register_to_config(requires_safety_checker=False)
    if args.dtype == "fp16":
        pipe.to(dtype=torch.float16)
    recipe = {"format": 1}
    recipe |= {k: vars(args)[k] for k in ("negative_prompt", *NUMBERS) if vars(args)[k] is not None}
    pipe.save_pretrained(part)
    text = json.dumps(recipe | {"made_from": made_from(args, names, pipe)}, indent=1)
    (part / RECIPE).write_text(text + "\n", encoding="utf-8")
    # safetensors makes its files private; the others have what the umask gives.
    for file in part.rglob("*.safetensors"):
        file.chmod((part / RECIPE).stat().st_mode)


def made_from(args, names, pipe):
    """Where a teacher comes from, by names that mean something elsewhere: no paths."""

    def short(name):
        return Path(name).resolve().name if infer.local(name) else name

    loras = []
    for name, weight in names:
        te, unet = weight if isinstance(weight, tuple) else (weight, weight)
        loras.append({"name": name, "weight": unet})
        loras[-1] |= {"text_encoder_weight": te} if te != unet else {}
    about = {"base": short(args.base), "style_loras": loras, "vae": args.vae and short(args.vae)}
    about |= {"clip_skip": args.clip_skip, "dtype": args.dtype}
    keys = ("prediction_type", "rescale_betas_zero_snr")
    about |= {key: pipe.scheduler.config.get(key) for key in keys}
    about["image"] = args.from_image and Path(args.from_image).name
    return {key: value for key, value in about.items() if value not in (None, [])}


def read_back(part, xl):
    """Every tensor is finite, and the trainer of its family opens it as it will."""
    for file in sorted(part.rglob("*.safetensors")):
        with safe_open(file, "pt") as data:
            for key in data.keys():  # noqa: SIM118
                if not data.get_tensor(key).isfinite().all():
                    way = "--dtype fp32, or lower weights of LoRAs, may help"
                    infer.fail(f"{file.relative_to(part)}: {key} holds NaN or inf; {way}")
    if xl:
        import train_lcm_lora_sdxl as trainer
    else:
        import train_lcm_lora_sd15 as trainer
    trainer.__file__ = __file__  # its messages name this program
    flags = ["--pretrained_teacher_model", str(part), "--dataset_name", "none"]
    with contextlib.redirect_stdout(None):  # it says that it read recipe.json
        args = trainer.parse_args([*flags, "--output_dir", str(part), "--max_train_steps", "1"])
    trainer.check_teacher(trainer.load_teacher(args, torch.float32), args)


def main(argv=None):
    """Read, load, merge, write, read back, rename."""
    args = parse_args(argv)
    args.output = args.output.resolve()
    if args.from_image:
        take_image(args)
    args.loras = args.loras or []
    for key, value in base_recipe(args.base).items():
        if vars(args)[key] is None:
            setattr(args, key, value)
            print(f"from the base's {RECIPE}: {key} {value}")
    for library in diffusers, infer.transformers:
        library.utils.logging.set_verbosity_error()
    part = check_output(args.output)
    try:
        pipe, names = make_pipe(args, part)
        if args.clip_skip:
            skip_layers(pipe, args.clip_skip)
        check_texts(pipe, args)
        pipe.register_modules(scheduler=make_scheduler(pipe, args))
        xl = hasattr(pipe, "text_encoder_2")
        with infer.or_fail(f"--output {args.output}: cannot be written"):
            write(pipe, part, args, names)
        del pipe
        read_back(part, xl)
        with infer.or_fail(f"--output {args.output}: cannot be written"):
            if args.output.exists():
                args.output.rmdir()  # it is empty; not every system renames over it
            part.rename(args.output)
    except KeyboardInterrupt:
        sys.exit("stopped: nothing is written")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    says = f"{len(names)} LoRA{'s' * (len(names) != 1)} merged in"
    print(f"{args.output}: a teacher, {says}, settings in {RECIPE}")


if __name__ == "__main__":
    sys.excepthook = infer.last_words  # where nothing reads the output any more
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    main()
