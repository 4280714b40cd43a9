"""The trainers' own training step on random weights and data, for the programs beside it."""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, not needed here

import diffusers
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from official_unets import SD15, UNETS, random_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the trainers
diffusers.utils.logging.set_verbosity_error()

SD21 = SD15 | {"sample_size": 96, "cross_attention_dim": 1024, "use_linear_projection": True}
MODELS = UNETS | {"sd21": SD21 | {"attention_head_dim": (5, 10, 20, 20)}}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
# Width and layers of the text encoders.
ENCODERS = {
    "sd15": [(768, 12)],
    "sd21": [(1024, 23)],
    "sdxl": [(768, 12), (1280, 32)],
    "ssd1b": [(768, 12), (1280, 32)],
}
PATHS = ["--num_ddim_timesteps", "10"]  # data with trajectories have so many steps
# What can be switched on, and the trainer's flags for it. First kinds of data: encoded, with the
# teacher's trajectories (no pass of the teacher), with these as the target (nor one of it).
DATA = {
    "encoded": [],
    "trajectories": PATHS,
    "trajectory_target": [*PATHS, "--target", "trajectory"],
}
OPTIONS = DATA | {
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "torch_compile": ["--torch_compile"],
    "nf4": ["--quantize_base", "nf4"],
    "use_8bit_adam": ["--use_8bit_adam"],
    "allow_tf32": ["--allow_tf32"],
}


def fail(message):
    """End with one line and exit status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def check_model(name):
    """An argparse type: an official shape or a teacher folder."""
    if name not in MODELS and not Path(name, "model_index.json").is_file():
        options = f"{', '.join(MODELS)} or a teacher folder with model_index.json"
        fail(f"--model {name}: give {options}")
    return name


def add_model_flags(add):
    """The flags that say what is trained, and at which size."""
    model, shapes = str(ROOT / "demo/teacher-sdxl"), f"{', '.join(MODELS)}, or a teacher folder"
    add("--model", type=check_model, default=model, help=shapes)
    side = "side of the images (default: the teacher's native resolution)"
    add("--resolution", type=int, metavar="PIXELS", help=side)


def describe(model):
    """(Family, folder of tokenizers and scheduler, configs of UNet, VAE and text encoders)."""
    if model not in MODELS:
        family = "sdxl" if "XL" in DiffusionPipeline.load_config(model)["_class_name"] else "sd15"
        unet = UNet2DConditionModel.load_config(model, subfolder="unet")
        vae = AutoencoderKL.load_config(model, subfolder="vae")
        folders = ["text_encoder", "text_encoder_2"][: 1 + (family == "sdxl")]
        encoders = [CLIPTextConfig.from_pretrained(model, subfolder=name) for name in folders]
        return family, Path(model), unet, vae, encoders
    family = "sdxl" if len(ENCODERS[model]) == 2 else "sd15"
    encoders = [
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
            vocab_size=49408,
            max_position_embeddings=77,
        )
        for width, layers in ENCODERS[model]
    ]
    vae = VAE | {"force_upcast": family == "sdxl"}
    return family, ROOT / f"demo/teacher-{family}", MODELS[model], vae, encoders


def random_pipe(model, dtype, device, encoded):
    """A pipeline like that of the trainer's load_teacher, but of random weights.

    For encoded data it has no text encoders, and of the VAE only the config.
    """
    family, folder, unet, vae, encoders = describe(model)
    parts = {"scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler")}
    parts["unet"] = random_module(lambda: UNet2DConditionModel.from_config(unet), dtype, device)
    if encoded:
        with torch.device("meta"):
            parts["vae"] = AutoencoderKL.from_config(vae)
    else:  # as there, SDXL's is float32 where the base is fp16
        exact = dtype == torch.float16 and family == "sdxl" and vae["force_upcast"]
        precision = torch.float32 if exact else dtype
        parts["vae"] = random_module(lambda: AutoencoderKL.from_config(vae), precision, device)
    kinds = CLIPTextModel, CLIPTextModelWithProjection
    for part, config, kind in zip(("text_encoder", "text_encoder_2"), encoders, kinds):
        name = part.replace("text_encoder", "tokenizer")
        parts[name] = tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=name)
        tokenizer.model_max_length = config.max_position_embeddings
        config.eos_token_id = tokenizer.eos_token_id
        parts[part] = None
        if not encoded:
            parts[part] = random_module(lambda c=config, k=kind: k(c), dtype, device)
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    parts |= {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


class Training:
    """A trainer's Run, made by its own functions; `step` takes a step on random data."""

    def __init__(self, model, resolution, batch, precision, options, more=()):
        """Of a model as --model names it, with some of OPTIONS and `more` flags of the trainer."""
        family, *_ = describe(model)
        self.trainer = trainer = importlib.import_module(f"train_lcm_lora_{family}")
        flags = ["--pretrained_teacher_model", model, "--mixed_precision", precision]
        flags += ["--train_batch_size", str(batch), "--max_train_steps", "1000000"]
        flags += "--train_data_dir none --report_to none --center_crop".split()
        flags += [*more, *(flag for option in options for flag in OPTIONS[option])]
        self.args = args = trainer.parse_args(flags)
        AcceleratorState._reset_state(True)
        self.accelerator = trainer.make_accelerator(args)
        device, dtype = self.accelerator.device, trainer.DTYPES[precision]
        torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
        kinds = {*DATA} & {*options}
        if len(kinds) > 1:
            fail(f"--options {'+'.join(sorted(kinds))}: give one kind of data, {' or '.join(DATA)}")
        self.encoded, self.trajectories = bool(kinds), bool(kinds - {"encoded"})
        self.pipe = pipe = random_pipe(model, dtype, device, self.encoded)
        self.teacher = unet = pipe.unet
        args.resolution = resolution or unet.config.sample_size * pipe.vae_scale_factor
        if args.resolution % pipe.vae_scale_factor:
            advice = f"it must be a multiple of the VAE's factor, {pipe.vae_scale_factor}"
            fail(f"--resolution {args.resolution}: {advice}")
        self.schedule = trainer.NoiseSchedule(pipe.scheduler.config, device)
        self.target = trainer.make_student(pipe, args, device)
        self.trained = [p for p in self.target.parameters() if p.requires_grad]
        steps = trainer.ddim_timesteps(args.num_ddim_timesteps, len(self.schedule.alpha))
        self.timesteps = steps.to(device)
        self.batch, self.c_null = self.random_batch(batch, dtype)
        optimizer, self.lr_scheduler = trainer.make_optimizer(self.trained, args)
        self.student, self.optimizer = self.accelerator.prepare(self.target, optimizer)
        self.accelerator.unwrap_model(self.student, keep_fp32_wrapper=False)
        self.ema, self.step = None, 0

    def random_batch(self, size, dtype):
        """(A batch as the trainer's loader gives it, the conditions of the empty prompt)."""
        side, device, config = self.args.resolution, self.accelerator.device, self.teacher.config
        is_xl = config.addition_embed_type == "text_time"
        batch = {"place": list(range(size))}
        if is_xl:
            batch["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * size)
        if not self.encoded:
            batch["pixels"] = torch.rand(size, 3, side, side) * 2 - 1
            batch["caption"] = ["a red apple"] * size
            return batch, self.trainer.encode_captions(self.pipe, [""])
        side //= self.pipe.vae_scale_factor
        shapes = {"prompt": (self.pipe.tokenizer.model_max_length, config.cross_attention_dim)}
        if is_xl:
            sizes = 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - sizes,)
        c = {name: torch.randn(size, *shape).to(dtype) for name, shape in shapes.items()}
        channels = config.in_channels
        if self.trajectories:
            points = (self.args.num_ddim_timesteps + 1) * channels
            batch["path"] = torch.randn(size, points, side, side)
        else:
            batch["moments"] = torch.randn(size, 2 * channels, side, side).to(dtype)
        return batch | c, {name: value[:1].to(device) for name, value in c.items()}

    def take_step(self, number=0):
        """One optimizer step, as the trainer's loop takes it; what it logs of it."""
        trainer, args = self.trainer, self.args
        batch = self.batch | {"step": [number]}
        loss = trainer.distillation_loss(self, *trainer.sample_batch(self, batch, args), args)
        self.accelerator.backward(loss)
        row, _, _ = trainer.optimizer_step(self, [loss.detach()], args)
        return row


class Fetched(TorchDispatchMode):
    """Numbers fetched from tensors that hold none are 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Answer for .item(); leave the rest."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


def swap(old, new):
    """What Module.to does with tensors without memory, less its check for references to them."""
    old.__dict__, new.__dict__ = new.__dict__, old.__dict__
    torch._C._swap_tensor_impl(old, new)


@contextmanager
def fake_tensors():
    """Tensors made within are a CPU's in all but memory: they have none; nothing is computed."""
    cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
    swapped = mock.patch("torch.utils.swap_tensors", swap)
    with cpu, swapped, FakeTensorMode(allow_non_fake_inputs=True), Fetched():
        yield
