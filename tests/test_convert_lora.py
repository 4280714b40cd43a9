"""scripts/convert_lora.py: names read without a model, files repaired and converted, refusals."""

import itertools
import json

import convert_lora as convert
import official_unets
import peft
import pytest
import torch
from conftest import LORA
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from single_file import unet_name
from test_lora_files import (
    PARTS,
    count,
    forward,
    huggingface_mixed,
    load,
    open_pipe,
    text_tensors,
    train,
)

import infer


def run(source, output, *flags):
    """Convert, from a path to a path."""
    convert.main([str(source), str(output), *map(str, flags)])
    return output


def refused(message, source, output, *flags):
    """The program ends with one line that holds `message`, and leaves nothing new behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(source, output, *flags)
    assert "\n" not in str(caught.value) and sorted(output.parent.rglob("*")) == before


def read(path):
    """(tensors, metadata, layers) of a LoRA that was written."""
    tensors, metadata = infer.read_lora(infer.find_lora(path))
    return tensors, metadata, infer.group_layers(path, tensors, metadata)


@pytest.mark.parametrize("name", ["SD15", "SDXL", "SSD1B"])
def test_every_module_name_is_read_without_the_model(name, tmp_path):
    """Of the official UNets: kohya's names get their dots back, those of the original code too."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**getattr(official_unets, name))
    names = [path for path, _ in unet.named_modules() if path]
    assert len(names) > 700
    assert [convert.dotted("x", path.replace(".", "_")) for path in names] == names

    targets = [
        path
        for path in names
        if path.endswith(
            (*PARTS, "samplers.0.conv", "time_embedding.linear_1", "conv_in", "conv_out")
        )
    ]
    width = torch.ones(1, unet.config.cross_attention_dim)
    layers = {path: {"A": width, "path": path} for path in targets}
    written = {f"unet.{unet_name(path, unet).replace('.', '_')}": layers[path] for path in targets}
    assert len(written) == len(targets) > 250
    parts = convert.full_names("x", written)
    assert parts["unet"].keys() == {*targets}
    assert all(layer["path"] == path for path, layer in parts["unet"].items())


def test_text_encoder_names_are_read(xl_teacher):
    """The linear layers of both encoders."""
    pipe = open_pipe(xl_teacher)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        names = [
            name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)
        ]
        assert (
            len(names) >= 12
            and [convert.dotted("x", name.replace(".", "_")) for name in names] == names
        )


def test_repaired_files_load_in_diffusers(sdxl, xl_teacher, tmp_path, capsys):
    """Mixed names, prefix, lost alpha: diffusers and PEFT load all, at the right strength."""
    student = train(sdxl, xl_teacher, tmp_path / "run", rank=8, alpha=4)
    total, expected = count(student), forward(student)
    huggingface_mixed(student, tmp_path / "mixed")
    state = {
        f"base_model.model.{key}": tensor
        for key, tensor in get_peft_model_state_dict(student).items()
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "prefix", state)
    for broken in ("mixed", "prefix"):
        for naming in ("kohya", "diffusers"):
            fixed = run(
                tmp_path / broken,
                tmp_path / f"{broken}-{naming}.safetensors",
                "--to",
                naming,
                "--alpha",
                4,
            )
            found, written = capsys.readouterr().out.splitlines()[-2:]
            assert f"{total} layers found, in the naming of Hugging Face's scripts" in found
            assert f"{total} of {total} layers written in {naming}'s naming, 0 lost" in written
            pipe = open_pipe(xl_teacher)
            pipe.load_lora_weights(fixed)
            scalings = {
                layer.scaling["default_0"]
                for layer in pipe.unet.modules()
                if isinstance(layer, LoraLayer)
            }
            assert count(pipe.unet) == total and scalings == {0.5}
            assert torch.allclose(forward(pipe.unet), expected, atol=1e-6)
        folder = run(tmp_path / broken, tmp_path / f"{broken}-peft", "--to", "peft", "--alpha", 4)
        model = peft.PeftModel.from_pretrained(open_pipe(xl_teacher).unet, folder)
        assert torch.allclose(forward(model.base_model.model), expected, atol=1e-6)
        assert torch.allclose(forward(load(open_pipe(xl_teacher), folder)), expected, atol=1e-6)

    capsys.readouterr()
    run(tmp_path / "mixed", tmp_path / "no-alpha.safetensors")
    assert "contains no alpha; using alpha = rank (scaling 1)" in capsys.readouterr().err
    assert {layer["alpha"] for layer in read(tmp_path / "no-alpha.safetensors")[2].values()} == {8}


def test_round_trips_lose_nothing(sd15, teacher, tmp_path):
    """Through all namings: tensors to the bit, scalings, and the header but for its digests."""
    train(sd15, teacher, tmp_path / "run", rank=4, alpha=2.5)
    source, (tensors, metadata, _) = tmp_path / "start.safetensors", read(tmp_path / "run")
    metadata |= {"ss_network_dim": "4", "ss_network_alpha": "2.5", "sshs_model_hash": "0"}
    save_file(tensors, source, metadata)
    for index, naming in enumerate(("diffusers", "kohya", "peft", "diffusers", "peft", "kohya")):
        source = run(
            source,
            tmp_path / f"{index}{'' if naming == 'peft' else '.safetensors'}",
            "--to",
            naming,
        )
    again, header, _ = read(source)
    assert again.keys() == tensors.keys() and all(
        torch.equal(again[key], tensors[key]) for key in tensors
    )
    kept = {key: text for key, text in metadata.items() if key != "sshs_model_hash"}
    assert header == kept | {"ss_output_name": "5"}
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize("layout", ["sdxl", "ssd1b"])
def test_round_trips_in_sdxls_names(sdxl, make_teacher, tmp_path, layout):
    """From the trainer's file, whose blocks have one layer each: none is taken for another."""
    teacher = make_teacher(layout)
    student = train(sdxl, teacher, tmp_path / "run", rank=4, alpha=2.5)
    folder = run(tmp_path / "run", tmp_path / "0", "--to", "peft")
    unet = peft.PeftModel.from_pretrained(open_pipe(teacher).unet, folder).base_model.model
    assert torch.allclose(forward(unet), forward(student), atol=1e-6)
    tensors = load_file(tmp_path / "run" / LORA)
    for source in (folder, tmp_path / "run" / "unet"):
        again = load_file(run(source, tmp_path / f"{source.name}.safetensors"))
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert any("input_blocks_3_1" in key for key in tensors)


def test_layers_of_their_own_rank(teacher, tmp_path):
    """Ranks and alphas that differ between layers survive, and the header names none of them."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=PARTS,
        rank_pattern={"conv1": 3},
        alpha_pattern={"to_q": 2},
    )
    model = peft.get_peft_model(open_pipe(teacher).unet, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "0")
    expected = forward(model.base_model.model)
    made = tmp_path / "0"
    for naming, target in (
        ("kohya", "1.safetensors"),
        ("diffusers", "2.safetensors"),
        ("peft", "3"),
    ):
        made = run(made, tmp_path / target, "--to", naming)
        assert torch.allclose(forward(load(open_pipe(teacher), made)), expected, atol=1e-6)
        _, metadata, layers = read(made)
        assert {layer["rank"] for layer in layers.values()} == {3, 4} and not {
            "rank",
            "alpha",
        } & metadata.keys()
    unet = peft.PeftModel.from_pretrained(open_pipe(teacher).unet, made).base_model.model
    assert torch.allclose(forward(unet), expected, atol=1e-6)
    pipe = open_pipe(teacher)
    pipe.load_lora_weights(tmp_path / "2.safetensors")
    assert torch.allclose(forward(pipe.unet), expected, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_save_precision(sd15, teacher, tmp_path, precision):
    """The matrices have the precision asked for, rounded to nearest; alpha is exact."""
    train(sd15, teacher, tmp_path / "run", alpha=3)
    tensors, *_ = read(tmp_path / "run")
    small, metadata, _ = read(
        run(tmp_path / "run", tmp_path / "x.safetensors", "--save_precision", precision)
    )
    kind = getattr(torch, infer.DTYPES[precision])
    for key, tensor in tensors.items():
        assert torch.equal(small[key], tensor if key.endswith("alpha") else tensor.to(kind))
    assert metadata["alpha"] == "3" and metadata["base_model"] == str(teacher)


def test_text_encoders(xl_teacher, tmp_path):
    """Text encoder layers are kept in kohya's naming, which diffusers loads; others refuse them."""
    tensors, layers = text_tensors("diffusers", alpha=False)
    source = tmp_path / "style.safetensors"
    save_file(tensors, source)
    made = run(source, tmp_path / "kohya.safetensors", "--alpha", 1)
    assert len(load_file(made)) == 3 * len(layers) and all(
        key.startswith(("lora_te1_text_model_", "lora_te2_")) for key in load_file(made)
    )
    pipe = open_pipe(xl_teacher)
    pipe.load_lora_weights(made)
    for index, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2)):
        live = {
            name.removeprefix("text_model."): m
            for name, m in encoder.named_modules()
            if isinstance(m, LoraLayer)
        }
        assert live.keys() == {layer for place, layer in layers if place == index}
        for layer, module in live.items():
            a, b = layers[index, layer]
            assert (
                torch.equal(module.lora_A["default_0"].weight, a)
                and module.scaling["default_0"] == 0.5
            )
            assert torch.equal(module.lora_B["default_0"].weight, b)
    for naming, output in (("diffusers", "x.safetensors"), ("peft", "x")):
        refused(
            f"--to {naming} writes layers of a UNet only", source, tmp_path / output, "--to", naming
        )


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "peft"])
def test_others_may_read_the_output(tmp_path, umask, naming):
    """All that is written has the permissions that the umask gives."""
    tensors = {f"unet.conv_in.lora_{part}.weight": torch.ones(2, 2, 1, 1) for part in "AB"}
    save_file(tensors, tmp_path / "x.safetensors")
    output = tmp_path / ("peft" if naming == "peft" else "new.safetensors")
    run(tmp_path / "x.safetensors", output, "--to", naming)
    files = [output]
    if naming == "peft":
        assert output.stat().st_mode & 0o777 == 0o777 & ~umask
        files = [*output.iterdir()]
        assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_refusals(tmp_path):
    """Nothing is overwritten, nothing half-written, and what cannot be read or kept is named."""
    a, b = torch.ones(2, 4), torch.full((4, 2), 1e6)
    good, layer = tmp_path / "good.safetensors", "lora_unet_mid_block_resnets_0_time_emb_proj"
    save_file(
        {
            f"{layer}.lora_down.weight": a,
            f"{layer}.lora_up.weight": b,
            f"{layer}.alpha": torch.tensor(1.0),
        },
        good,
    )
    unknown = tmp_path / "unknown.safetensors"
    save_file(
        {
            "lora_unet_mid_block_foo_0.lora_down.weight": a,
            "lora_unet_mid_block_foo_0.lora_up.weight": b,
        },
        unknown,
    )
    twice, names = (
        tmp_path / "twice.safetensors",
        (layer, f"unet.{layer.removeprefix('lora_unet_').replace('_0_', '.0.')}"),
    )
    save_file(
        {
            f"{name}.lora_{part}.weight": w.clone()
            for name in names
            for part, w in (("down", a), ("up", b))
        },
        twice,
    )
    output = tmp_path / "new.safetensors"
    content = good.read_bytes()
    refused("good.safetensors already exists and is never overwritten", good, good)
    refused("--to peft writes a folder", good, output, "--to", "peft")
    refused("--to kohya writes a .safetensors file", good, tmp_path / "new")
    refused("--alpha 8: .* contains its alpha", good, output, "--alpha", 8)
    refused("--alpha nan: must be a finite number", good, output, "--alpha", "nan")
    refused("mid_block_foo_0 is no module name", unknown, output)
    refused("under two names", twice, output)
    refused("--save_precision fp16: .* too large", good, output, "--save_precision", "fp16")
    refused("input .*nowhere: no such file or folder", tmp_path / "nowhere", output)
    assert good.read_bytes() == content


def test_a_lost_layer_is_an_error(tmp_path, monkeypatch):
    """A writer that loses a layer, changes a matrix or a scaling is caught by the reading back."""
    tensors = {
        f"unet.conv_{place}.lora_{part}.weight": torch.ones(2, 2, 1, 1)
        for place, part in itertools.product(("in", "out"), "AB")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    save = convert.write

    def spoil(change):
        def write(folder, *args):
            file = save(folder, *args)
            tensors, metadata = infer.read_lora(file)
            change(tensors)
            save_file(tensors, file, metadata)
            return file

        return write

    for change in (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "conv_in" in key],
        lambda tensors: tensors["lora_unet_conv_in.lora_up.weight"].mul_(2),
        lambda tensors: tensors["lora_unet_conv_in.alpha"].mul_(2),
    ):
        monkeypatch.setattr(convert, "write", spoil(change))
        refused(
            "new.safetensors: not written, 1 of 2 layers lost, first unet.conv_in",
            tmp_path / "x.safetensors",
            tmp_path / "new.safetensors",
        )
    monkeypatch.undo()
    run(tmp_path / "x.safetensors", tmp_path / "new.safetensors")


def test_peft_settings_are_plain(sd15, teacher, tmp_path):
    """adapter_config.json is what PEFT writes: its reader gives the same rank, alpha, targets."""
    train(sd15, teacher, tmp_path / "run", rank=4, alpha=2)
    made = run(tmp_path / "run", tmp_path / "peft", "--to", "peft")
    ours, theirs = (
        peft.LoraConfig.from_pretrained(made),
        peft.LoraConfig.from_pretrained(tmp_path / "run" / "unet"),
    )
    assert (ours.r, ours.lora_alpha, ours.base_model_name_or_path) == (
        theirs.r,
        theirs.lora_alpha,
        theirs.base_model_name_or_path,
    )
    text = json.loads((made / "adapter_config.json").read_text())
    assert (
        text["target_modules"] == sorted(text["target_modules"])
        and len(text["target_modules"]) > 50
    )
    assert (tmp_path / "run" / LORA).exists()


def test_names_that_are_too_long(tmp_path, capsys):
    """Over 255 bytes, as input and as output: one line."""
    for words in (["x" * 300, tmp_path / "y.safetensors"], ["x.safetensors", "x" * 300]):
        with pytest.raises(SystemExit) as caught:
            convert.main([*map(str, words)])
        said = str(caught.value) + capsys.readouterr().err
        assert "x" * 60 in said and "Traceback" not in said
