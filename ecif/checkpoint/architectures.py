"""Which of open_clip's architectures weights are of, by the shapes of a few of them."""

from torch import Tensor

# Where open_clip's configurations leave a size out.
VISION = {"width": 768, "layers": 12, "patch_size": 16, "image_size": 224}
OTHER = {"timm_model_name", "hf_model_name", "multimodal_cfg", "quick_gelu"}  # of architectures that are left out
TEXT = {"width": 512, "layers": 12, "context_length": 77, "vocab_size": 49408}


def architectures_of(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the architectures of open_clip's own transformers, with GELU, that have the sizes of the weights."""
    import open_clip

    try:
        conv, positions, projection = (
            tensors[f"visual.{key}"].shape for key in ("conv1.weight", "positional_embedding", "proj")
        )
        text = {key.removeprefix("text."): tensor.shape for key, tensor in tensors.items()}
        context, vocabulary = text["positional_embedding"], text["token_embedding.weight"]
        grid = round((positions[0] - 1) ** 0.5)
        sizes = (
            conv[0],
            _layers(tensors, "visual."),
            conv[-1],
            conv[-1] * grid,
            projection[1],
            vocabulary[1],
            context[0],
            vocabulary[0],
        )
    except (KeyError, IndexError):
        return []
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, words = VISION | config["vision_cfg"], TEXT | config["text_cfg"]
        said = (
            *(vision[key] for key in VISION),
            config["embed_dim"],
            *(words[key] for key in ("width", "context_length", "vocab_size")),
        )
        if said == sizes and not (OTHER & {*config, *vision, *words}):
            found.append(name)
    return found


def _layers(tensors: dict[str, Tensor], tower: str) -> int:
    start = f"{tower}transformer.resblocks."
    return len({key.removeprefix(start).partition(".")[0] for key in tensors if key.startswith(start)})
