"""The trainers' own training step on random weights and pictures; benchmark.py and memory.py import it."""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # it warns of torchvision, which nothing here needs

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
from full_size import ROOT, SD15, UNETS, random_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(ROOT))  # the trainers
diffusers.utils.logging.set_verbosity_error()

SD21 = SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
}
MODELS = UNETS | {"sd21": SD21 | {"use_linear_projection": True}}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "sample_size": 512,
}  # fmt: skip
# Width and layers of the text encoders.
ENCODERS = {
    "sd15": [(768, 12)],
    "sd21": [(1024, 23)],
    "sdxl": [(768, 12), (1280, 32)],
    "ssd1b": [(768, 12), (1280, 32)],
}
# What can be switched on, and the trainer's flags for it.
OPTIONS = {
    "caches": ["--cache_latents", "--cache_text_embeddings"],
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "torch_compile": ["--torch_compile"],
    "nf4": ["--quantize_base", "nf4"],
    "int8": ["--quantize_base", "int8"],
    "use_8bit_adam": ["--use_8bit_adam"],
    "allow_tf32": ["--allow_tf32"],
}


def fail(message):
    """End with one line and exit status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def check_model(name):
    """An argparse type: an official shape or a teacher folder."""
    if name not in MODELS and not Path(name, "model_index.json").is_file():
        fail(f"--model {name}: give {', '.join(MODELS)} or a teacher folder with model_index.json")
    return name


def add_model_flags(add):
    """The flags that say what is trained, and at which size."""
    says = f"{', '.join(MODELS)}, or a teacher folder"
    add("--model", type=check_model, default=str(ROOT / "demo/teacher-sdxl"), help=says)
    add(
        "--resolution",
        type=int,
        help="side of the pictures in pixels (default: what the teacher draws)",
    )


def describe(model):
    """(family, folder of tokenizers and scheduler, config of the UNet, of the VAE, configs of the text encoders)."""
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
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width, vocab_size=49408, max_position_embeddings=77,
        )
        for width, layers in ENCODERS[model]
    ]  # fmt: skip
    return (
        family,
        ROOT / f"demo/teacher-{family}",
        MODELS[model],
        VAE | {"force_upcast": family == "sdxl"},
        encoders,
    )


def random_pipe(model, dtype, device, cached):
    """A pipeline as the trainer's load_teacher gives it, but of random weights, which need no loading."""
    family, folder, unet, vae, encoders = describe(model)
    parts = {"scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler")}
    parts["unet"] = random_module(lambda: UNet2DConditionModel.from_config(unet), dtype, device)
    if cached:  # only the config is needed
        with torch.device("meta"):
            parts["vae"] = AutoencoderKL.from_config(vae)
    else:  # as there, SDXL's is float32 where the base is fp16
        exact = dtype == torch.float16 and family == "sdxl" and vae["force_upcast"]
        parts["vae"] = random_module(
            lambda: AutoencoderKL.from_config(vae), torch.float32 if exact else dtype, device
        )
    kinds = CLIPTextModel, CLIPTextModelWithProjection
    for name, config, kind in zip(("text_encoder", "text_encoder_2"), encoders, kinds):
        length = config.max_position_embeddings
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, subfolder=name.replace("text_encoder", "tokenizer")
        )
        tokenizer.model_max_length = length
        config.eos_token_id = tokenizer.eos_token_id
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer
        parts[name] = (
            None if cached else random_module(lambda c=config, k=kind: k(c), dtype, device)
        )
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


class Training:
    """All that a training step needs, made by the trainer's own functions; `step` takes one, and data are random."""

    def __init__(self, model, resolution, batch, precision, options, more=()):
        family, *_ = describe(model)
        self.trainer = trainer = importlib.import_module(f"train_lcm_lora_{family}")
        flags = [
            "--pretrained_teacher_model",
            model,
            "--train_data_dir",
            "none",
            "--report_to",
            "none",
            "--center_crop",
        ]
        flags += [
            "--train_batch_size",
            str(batch),
            "--mixed_precision",
            precision,
            "--max_train_steps",
            "1000000",
            *more,
        ]
        self.args = args = trainer.parse_args(
            flags + [flag for option in options for flag in OPTIONS[option]]
        )
        AcceleratorState._reset_state(True)
        self.accelerator = trainer.make_accelerator(args)
        device, dtype = self.accelerator.device, trainer.DTYPES[precision]
        torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
        self.cached = ["vae", *trainer.TEXT_ENCODERS] if "caches" in options else []
        self.pipe = pipe = random_pipe(model, dtype, device, self.cached)
        self.teacher, args.resolution = (
            pipe.unet,
            resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor,
        )
        if args.resolution % pipe.vae_scale_factor:
            fail(
                f"--resolution {args.resolution}: it must be a multiple of the VAE's factor, {pipe.vae_scale_factor}"
            )
        self.schedule = trainer.NoiseSchedule(pipe.scheduler.config, device)
        self.target = trainer.make_student(pipe, args, device, self.cached)
        self.trained = [p for p in self.target.parameters() if p.requires_grad]
        self.timesteps = trainer.ddim_timesteps(
            args.num_ddim_timesteps, len(self.schedule.alpha)
        ).to(device)
        self.batch, self.c_null = self.random_batch(batch, dtype)
        optimizer, _ = trainer.make_optimizer(self.trained, args)
        self.student, self.optimizer = self.accelerator.prepare(self.target, optimizer)

    def random_batch(self, size, dtype):
        """(a batch as the trainer's loader gives it, the conditions of the empty prompt)."""
        side, device, config = self.args.resolution, self.accelerator.device, self.teacher.config
        batch = {"place": list(range(size))}
        if config.addition_embed_type == "text_time":
            batch["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * size)
        if not self.cached:
            batch |= {
                "pixels": torch.rand(size, 3, side, side) * 2 - 1,
                "caption": ["a red apple"] * size,
            }
            return batch, self.trainer.encode_captions(self.pipe, [""])
        side //= self.pipe.vae_scale_factor
        shapes = {"prompt": (self.pipe.tokenizer.model_max_length, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            sizes = 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - sizes,)
        c = {name: torch.randn(size, *shape).to(dtype) for name, shape in shapes.items()}
        moments = torch.randn(size, 2 * config.in_channels, side, side).to(dtype)
        return batch | c | {"moments": moments}, {
            name: value[:1].to(device) for name, value in c.items()
        }

    def step(self, number=0):
        """One optimizer step: (loss, gradient norm, whether they are finite)."""
        trainer, args = self.trainer, self.args
        drawn = trainer.sample_batch(
            self.pipe, self.batch, self.c_null, self.timesteps, number, args
        )
        loss = trainer.distillation_loss(
            self.teacher, self.student, self.target, *drawn, self.schedule, args
        )
        self.accelerator.backward(loss)
        return trainer.optimizer_step(
            self.accelerator, self.optimizer, self.trained, [loss.detach()], args
        )


class Fetched(TorchDispatchMode):
    """Numbers fetched from tensors that hold none are 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


def swap(old, new):
    """What Module.to does with tensors that have no memory, without its check for references, which stay right here."""
    old.__dict__, new.__dict__ = new.__dict__, old.__dict__
    torch._C._swap_tensor_impl(old, new)


@contextmanager
def fake_tensors():
    """Tensors made within are a CPU's in all but memory: they have none, and nothing is computed."""
    cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
    with (
        cpu,
        mock.patch("torch.utils.swap_tensors", swap),
        FakeTensorMode(allow_non_fake_inputs=True),
        Fetched(),
    ):
        yield
