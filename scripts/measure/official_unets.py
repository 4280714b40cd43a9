"""The UNets of the report's three models, as their config files have them, and random weights."""

import torch

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SSD1B = SDXL | {
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
UNETS = {"sd15": SD15, "sdxl": SDXL, "ssd1b": SSD1B}


def random_module(make, dtype, device):
    """What `make()` makes, with random weights, made on the device in that precision."""
    with torch.device("meta"):
        module = make().to(dtype)
    module = module.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        # about what the layers would be initialised with, but faster
        for key, p in module.named_parameters():
            p.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
            if p.ndim > 1:
                p.uniform_(-1, 1, generator=random).mul_(p[0].numel() ** -0.5)
        for buffer in module.buffers():  # only text encoders have one, the positions
            buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return module
