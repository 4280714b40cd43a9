"""scripts/demo/evaluate_style.py: its KID against sums written out, and the adapters in use."""

import evaluate_demo
import evaluate_style as style
import metrics
import pytest
import torch
import train_style_lora
from conftest import ROOT
from test_infer import make_lora


def normal(*shape, seed=0):
    """Standard normal float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_is_the_weighted_sum_over_distinct_images():
    x, y = normal(5, 3), normal(6, 3, seed=1) + 0.5
    w = torch.tensor([[1.0] * 5, [2, 0, 1, 1, 1]], dtype=torch.float64)
    v = torch.tensor([[1.0] * 6, [0, 3, 1, 1, 0, 1]], dtype=torch.float64)

    def mean(pairs):
        return sum(weight * (a @ b / 3 + 1) ** 3 for weight, a, b in pairs) / sum(
            weight for weight, _, _ in pairs
        )

    def within(f, weights):
        return [
            (weights[i] * weights[j], f[i], f[j])
            for i in range(len(f))
            for j in range(len(f))
            if i != j
        ]

    for a, b, got in zip(w, v, metrics.kid_to(x, y, w, v)):
        across = [(a[i] * b[j], x[i], y[j]) for i in range(5) for j in range(6)]
        torch.testing.assert_close(got, mean(within(x, a)) + mean(within(y, b)) - 2 * mean(across))


def test_kid_of_one_resample_is_evaluates():
    x, y = normal(20, 4), normal(30, 4, seed=1)
    ones = torch.ones(1, 20, dtype=torch.float64), torch.ones(1, 30, dtype=torch.float64)
    torch.testing.assert_close(metrics.kid_to(x, y, *ones)[0], metrics.kid(x, y))


def test_style_lora_trains_and_adapters_are_plugged(tmp_path, umask):
    """A LoRA of a few steps changes the demo teacher's prediction; plug() adds and removes it."""
    flags = "--steps 2 --batch_size 2 --learning_rate 1e-2 --output_dir".split()
    train_style_lora.main([*flags, str(tmp_path)])
    assert (tmp_path / style.LORA_FILE).stat().st_mode & 0o777 == 0o666 & ~umask
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ROOT / "demo" / "teacher-sd15", use_safetensors=True)
    z, t, prompt = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 32, 128)

    @torch.no_grad()
    def predict():
        return pipe.unet(z, t, prompt).sample

    bare = predict()
    style.load_style(pipe, tmp_path / style.LORA_FILE)
    pipe.load_lora_weights(tmp_path / style.LORA_FILE, adapter_name="lcm", use_safetensors=True)
    style.plug(pipe.unet, {})
    assert torch.equal(predict(), bare)
    style.plug(pipe.unet, {"style": 0.5, "lcm": 0.5})
    both = predict()
    style.plug(pipe.unet, {"style": 1.0})
    torch.testing.assert_close(predict(), both, rtol=0, atol=1e-5)
    assert (both - bare).abs().max() > 1e-4


def test_every_column_can_be_generated():
    """A LoRA of 10 solver steps samples in 16 and 32 too, from t = 999; the best guidance stays."""
    from diffusers import DDIMScheduler, UNet2DModel

    class Studio:
        """Generates nothing, but sets the steps and says what was asked."""

        class pipe:
            class unet(UNet2DModel):
                enable_lora = disable_lora = set_adapters = staticmethod(lambda *_: None)

        asked = []

        def scheduler(self, kind, **options):
            return kind.from_config(DDIMScheduler().config, timestep_spacing="trailing", **options)

        def sample(self, scheduler, steps, guidance):
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == steps and scheduler.timesteps[0] == 999
            self.asked.append((type(scheduler).__name__, steps, guidance))
            return guidance, None

        def look(self, latents, keep):
            return latents, []

    adapters = {method: {"x": 1.0} for method in (style.LCM, style.DPM, style.BEST)}
    flags = "--lora a --style_lora b --fine_tune c --output_dir d --guidance 2.5 1.5 4".split()
    args = style.parse_args(flags)
    generated, guidance = style.generate_all(
        Studio(), adapters, 10, args, lambda x: {"value": abs(x - 2.4)}
    )
    assert guidance == {style.LCM: 1, style.DPM: 7.5, style.BEST: 2.5}
    assert {key for key in generated if key[0] == style.LCM} == {
        (style.LCM, steps) for steps in (2, 4, 8, 16, 32)
    }
    assert (
        generated[style.BEST, 8][0] == 2.5
        and ("DPMSolverMultistepScheduler", 4, 2.5) in Studio.asked
    )


@pytest.mark.parametrize("missing", ["lora", "style_lora", "fine_tune"])
def test_what_is_not_there_is_named(tmp_path, missing):
    """One line, before anything is generated."""
    for name in ("lora", "style_lora", "fine_tune"):
        (tmp_path / name).mkdir()
        if name != missing:
            (
                tmp_path / name / ("model_index.json" if name == "fine_tune" else style.LORA_FILE)
            ).touch()
    flags = [
        word
        for name in ("lora", "style_lora", "fine_tune")
        for word in (f"--{name}", str(tmp_path / name))
    ]
    with pytest.raises(SystemExit, match=f"^--{missing} .*: no "):
        style.main([*flags, "--output_dir", str(tmp_path / "out")])


def test_the_figure_alone(tmp_path, monkeypatch):
    """--only_figure: base, style LoRA and both LoRAs for each caption, and nothing measured."""
    from diffusers import UNet2DConditionModel

    class Features(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 1)

    folders = {name: tmp_path / name for name in ("lora", "style_lora")}
    flags = "--steps 1 --batch_size 2 --learning_rate 1e-2 --output_dir".split()
    train_style_lora.main([*flags, str(folders["style_lora"])])
    base = ROOT / "demo" / "teacher-sd15"
    folders["lora"].mkdir()
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    make_lora(unet, folders["lora"] / style.LORA_FILE, base)
    columns, grid, asked, generate = [], style.grid, [], style.generate
    monkeypatch.setattr(style, "grid", lambda *given: columns.extend(given[0]) or grid(*given))
    monkeypatch.setattr(style, "generate", lambda *a: asked.append(a[1:4]) or generate(*a))
    monkeypatch.setattr(evaluate_demo, "EfficientNetFeatures", Features)
    monkeypatch.setattr(style, "FIGURE_PROMPTS", 2)
    monkeypatch.setattr(style, "FIGURE_STEPS", 3)
    words = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    assert style.main([*words, "--output_dir", str(tmp_path / "out"), "--only_figure"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["style.png"]
    assert asked == [(style.DPM, 3, 5.0), (style.DPM, 3, 5.0), (style.LCM, 4, 1)]
    shown = [[image.tobytes() for image in column["images"]] for column in columns]
    assert len(columns) == 3 and all(len(set(row)) == 3 for row in zip(*shown, strict=True))
