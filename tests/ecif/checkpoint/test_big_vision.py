"""Google's own SigLIP files: arrays under big_vision's names, converted by open_clip."""

import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP

from ecif.checkpoint import load_into, read
from tests.support.small_models import TINY

VISION = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 64,
}


def siglip(seed):
    torch.manual_seed(seed)
    model = CustomTextCLIP(64, VISION, TINY["text_cfg"] | {"proj_bias": True}, init_logit_bias=-10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def block(arrays, place, heads, norms, qkv, out, mlp):
    """A transformer's block. torch's [out, in] matrices are [in, heads, out / heads] there."""
    width = out.weight.shape[0]
    for i, norm in enumerate(norms):
        arrays |= {f"{place}LayerNorm_{i}/scale": norm.weight, f"{place}LayerNorm_{i}/bias": norm.bias}
    attention = f"{place}MultiHeadDotProductAttention_0/"
    for name, weight, bias in zip(("query", "key", "value"), qkv[0].chunk(3), qkv[1].chunk(3), strict=True):
        arrays[f"{attention}{name}/kernel"] = weight.T.reshape(-1, heads, width // heads)
        arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
    arrays |= {f"{attention}out/kernel": out.weight.T.reshape(heads, -1, width), f"{attention}out/bias": out.bias}
    for i, layer in enumerate(mlp):
        arrays[f"{place}MlpBlock_0/Dense_{i}/kernel"], arrays[f"{place}MlpBlock_0/Dense_{i}/bias"] = layer.weight.T, layer.bias


def big_vision(model):
    """The weights of a model as big_vision writes them."""
    trunk, text, arrays = model.visual.trunk, model.text, {}
    patch = trunk.patch_embed.proj
    arrays |= {"img/embedding/kernel": patch.weight.permute(2, 3, 1, 0), "img/embedding/bias": patch.bias}
    arrays |= {"img/pos_embedding": trunk.pos_embed}
    if trunk.cls_token is not None:
        arrays["img/cls"] = trunk.cls_token
    for i, b in enumerate(trunk.blocks):
        qkv = b.attn.qkv.weight, b.attn.qkv.bias
        place = f"img/Transformer/encoderblock_{i}/"
        block(arrays, place, b.attn.num_heads, (b.norm1, b.norm2), qkv, b.attn.proj, (b.mlp.fc1, b.mlp.fc2))
    arrays |= {"img/Transformer/encoder_norm/scale": trunk.norm.weight, "img/Transformer/encoder_norm/bias": trunk.norm.bias}
    pool = trunk.attn_pool
    qkv = torch.cat([pool.q.weight, pool.kv.weight]), torch.cat([pool.q.bias, pool.kv.bias])
    block(arrays, "img/MAPHead_0/", pool.num_heads, (pool.norm,), qkv, pool.proj, (pool.mlp.fc1, pool.mlp.fc2))
    arrays |= {"img/MAPHead_0/probe": pool.latent}
    arrays |= {"txt/Embed_0/embedding": text.token_embedding.weight, "txt/pos_embedding": text.positional_embedding[None]}
    for i, b in enumerate(text.transformer.resblocks):
        qkv = b.attn.in_proj_weight, b.attn.in_proj_bias
        place = f"txt/Encoder_0/encoderblock_{i}/"
        block(arrays, place, b.attn.num_heads, (b.ln_1, b.ln_2), qkv, b.attn.out_proj, (b.mlp.c_fc, b.mlp.c_proj))
    arrays |= {"txt/Encoder_0/encoder_norm/scale": text.ln_final.weight, "txt/Encoder_0/encoder_norm/bias": text.ln_final.bias}
    arrays |= {"txt/head/kernel": text.text_projection.weight.T, "txt/head/bias": text.text_projection.bias}
    arrays |= {"t": model.logit_scale.reshape(1), "b": model.logit_bias.reshape(1)}
    return {f"params/{name}": value.detach().numpy() for name, value in arrays.items()}


@pytest.mark.parametrize("name", ["webli.npz", "webli.pt"])
def test_weights_of_big_vision(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        np.savez(file, **big_vision(siglip(1)))
    model = siglip(2)
    assert load_into(model, read(str(tmp_path / name)), "siglip") == []
    wrong = [key for key, value in siglip(1).state_dict().items() if not torch.equal(model.state_dict()[key], value)]
    assert wrong == []
