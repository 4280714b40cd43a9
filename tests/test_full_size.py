"""Table 1 of the LCM-LoRA report: sizes of the three official UNets and of their LoRA."""

import full_size
import pytest
import torch
from diffusers import UNet2DConditionModel
from official_unets import SD15, SDXL, SSD1B

# Here in millions: full UNet and LoRA of rank 64; printed in the report: LoRA.
TABLE_1 = {
    "SD-V1.5": ("sd15", SD15, 859.5, 67.25, 67.5),
    "SSD-1B": ("sdxl", SSD1B, 1331.3, 104.90, 105),
    "SDXL": ("sdxl", SDXL, 2567.5, 196.75, 197),
}


@pytest.mark.parametrize("model", TABLE_1)
def test_table_1(request, model):
    """The report's counts of trained parameters, and with 788 layers on SDXL."""
    trainer, config, full, lora, printed = TABLE_1[model]
    trainer = request.getfixturevalue(trainer)
    args = trainer.parse_args(["--pretrained_teacher_model", "x", "--train_data_dir", "y"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        count = sum(p.numel() for p in unet.parameters()) / 1e6
        unet = trainer.attach_lora(unet, args)
    layers = trainer.lora_layers(unet)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad) / 1e6
    assert args.lora_rank == 64
    assert round(count, 1) == full
    assert sum(w.numel() for a, b, _ in layers.values() for w in (a, b)) / 1e6 == pytest.approx(
        trained
    )
    assert round(trained, 2) == lora and trained == pytest.approx(printed, rel=0.004)
    assert model != "SDXL" or len(layers) == 788
    # what the program expects in the file
    shapes = {path: tuple(b.shape[:1] + a.shape[1:]) for path, (a, b, _) in layers.items()}
    expected = full_size.expected_layers(shapes, trainer, unet.config, 64)
    name = (
        "lora_unet_input_blocks_1_0_in_layers_2"
        if trainer.FAMILY == "sdxl"
        else ("lora_unet_down_blocks_0_resnets_0_conv1")
    )
    assert len(expected) == 2 * len(layers)
    assert expected[f"{name}.lora_down.weight"] == (64, 320, 3, 3)
