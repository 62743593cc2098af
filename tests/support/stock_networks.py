"""Networks of timm, transformers and torchvision as they come, with random weights and small inputs: cases as data.

Where a library is missing its cases are skipped. All of them return logits of three classes; the ones of transformers
return them in an object of their own.
"""

import importlib
import sys
import types

import pytest
import torch

CLASSES = 3

TIMM = {  # with the options that make them small
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "cait_xxs24_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "mobilevit_xxs": {},
    "pvt_v2_b0": {},
    "efficientvit_b0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv2_035": {},
    "efficientnet_b0": {},
    "tf_mobilenetv3_small_075": {},
    "regnety_002": {},
    "resnet10t": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32), "stem_chs": 8},
    "ghostnet_050": {},
    "edgenext_xx_small": {},
}

_TEXT = {
    "vocab_size": 12,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 10,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 24}
_DISTIL = {"vocab_size": 12, "dim": 48, "n_layers": 1, "n_heads": 2, "hidden_dim": 96, "max_position_embeddings": 10}
_GPT = {
    "vocab_size": 12,
    "n_embd": 48,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 10,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_PATCHES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS = {  # class prefix: task, configuration
    "GPT2": ("SequenceClassification", _GPT),
    "OpenAIGPT": ("SequenceClassification", _GPT),
    "GPTNeo": (
        "SequenceClassification",
        {
            "vocab_size": 12,
            "hidden_size": 48,
            "num_layers": 1,
            "num_heads": 2,
            "attention_types": [[["global"], 1]],
            "max_position_embeddings": 10,
        },
    ),
    "GPTNeoX": ("SequenceClassification", _TEXT),
    "OPT": (
        "SequenceClassification",
        {**_TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48},
    ),
    "Llama": ("SequenceClassification", _TEXT),
    "Mistral": ("SequenceClassification", _GROUPED),
    "Qwen2": ("SequenceClassification", {**_TEXT, "num_key_value_heads": 2}),
    "Qwen3": ("SequenceClassification", _GROUPED),
    "Gemma": ("SequenceClassification", _GROUPED),
    "Gemma2": ("SequenceClassification", _GROUPED),
    "Phi": ("SequenceClassification", _TEXT),
    "Bert": ("SequenceClassification", _TEXT),
    "Roberta": ("SequenceClassification", {**_TEXT, "max_position_embeddings": 12}),
    "DistilBert": ("SequenceClassification", _DISTIL),
    "Albert": ("SequenceClassification", {**_TEXT, "embedding_size": 24}),
    "Electra": ("SequenceClassification", {**_TEXT, "embedding_size": 24}),
    "ViT": ("ImageClassification", _PATCHES),
    "Deit": ("ImageClassification", _PATCHES),
    "Dinov2": ("ImageClassification", _PATCHES),
}

TORCHVISION = {  # with the size of the images
    "resnet18": 32,
    "densenet121": 32,
    "googlenet": 32,
    "squeezenet1_0": 32,
    "squeezenet1_1": 32,
    "shufflenet_v2_x0_5": 32,
    "shufflenet_v2_x1_0": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "mobilenet_v3_large": 32,
    "mnasnet0_5": 32,
    "mnasnet0_75": 32,
    "efficientnet_b0": 32,
    "efficientnet_b1": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "ConvNeXt": 32,
    "SwinTransformer": 32,
    "SwinTransformerV2": 32,
    "VisionTransformer": 32,
}

LARGE = [
    *(
        f"timm/{name}"
        for name in ("vit_tiny_patch16_224", "mobilevit_xxs", "pvt_v2_b0", "efficientvit_b0", "resnet10t")
    ),
    *(f"timm/{name}" for name in ("mobilenetv3_small_050", "mobilenetv2_035", "tf_mobilenetv3_small_075")),
    *(f"timm/{name}" for name in ("efficientnet_b0", "regnety_002", "ghostnet_050", "edgenext_xx_small")),
    *(f"torchvision/{name}" for name in TORCHVISION if name[0].islower()),
]
"""Those with more than 300,000 parameters, which cannot be made smaller."""

NAMES = [
    *(f"timm/{name}" for name in TIMM),
    *(f"transformers/{name}" for name in TRANSFORMERS),
    *(f"torchvision/{name}" for name in TORCHVISION),
]


def stock_network(name):
    """The network, in evaluation mode, and inputs; skips the test where the library is missing or does not have it."""
    library, _, which = name.partition("/")
    torch.manual_seed(0)
    model, x = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision}[library](which)
    return model.eval(), x


def _library(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # built for another device: the kernels that it misses are none of these networks'
            registrations = "torchvision._meta_registrations"
            sys.modules[registrations] = types.ModuleType(registrations)
            importlib.import_module("torchvision")
    return importlib.import_module(name)


def _timm(name):
    timm = _library("timm")
    options = TIMM[name]
    size = options.get("img_size", 32)
    return timm.create_model(name, num_classes=CLASSES, **options), torch.randn(3, 3, size, size)


def _transformers(name):
    transformers = _library("transformers")
    task, options = TRANSFORMERS[name]
    prefix = {"Deit": "DeiT"}.get(name, name)
    config = getattr(transformers, f"{prefix}Config")(num_labels=CLASSES, **options)
    config.pad_token_id = 0
    model = getattr(transformers, f"{prefix}For{task}")(config)
    images = task == "ImageClassification"
    return model, torch.randn(3, 3, 32, 32) if images else torch.randint(1, 12, (3, 8))


def _torchvision(name):
    torchvision = _library("torchvision")
    size = TORCHVISION[name]
    return _torchvision_model(torchvision.models, name), torch.randn(3, 3, size, size)


def _torchvision_model(models, name):
    if name == "VisionTransformer":
        return models.VisionTransformer(32, 8, 1, 2, hidden_dim=48, mlp_dim=96, num_classes=CLASSES)
    if name.startswith("Swin"):
        swin = models.swin_transformer
        options = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return models.SwinTransformer(
            [4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=CLASSES, **(options if name.endswith("V2") else {})
        )
    if name == "ConvNeXt":
        setting = models.convnext.CNBlockConfig
        return models.ConvNeXt([setting(16, 32, 1), setting(32, None, 1)], num_classes=CLASSES)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, num_classes=CLASSES, **options)
