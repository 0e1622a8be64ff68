"""Models in parts: codes of a small GGUF file to a Hugging Face directory and back, compared with the directory itself."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.errors import UserError
from studies import carried
from studies.accuracy import mixture

WIDTH, TOKENS, HEADS = 64, 1200, {"attn_q": 2, "attn_k": 1}
CODES = {"attn_q": "Q5_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "ffn_down": "Q4_0"}


def shapes() -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        "attn_q": (64, WIDTH), "attn_k": (32, WIDTH), "attn_v": (32, WIDTH), "attn_output": (WIDTH, 64),
        "ffn_gate": (96, WIDTH), "ffn_up": (96, WIDTH), "ffn_down": (WIDTH, 96), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    named = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    return named | {"token_embd.weight": (TOKENS, WIDTH), "output_norm.weight": (WIDTH,)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.gguf`, with rows of q and k in interleaved pairs, and `model/`, made from its codes."""
    folder, rng = tmp_path_factory.mktemp("carried"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(HEADS["attn_q"])
    writer.add_head_count_kv(HEADS["attn_k"])
    tensors = {}
    for name, shape in shapes().items():
        part = name.split(".")[-2]
        kind = gguf.GGMLQuantizationType[CODES.get(part, "Q8_0" if len(shape) > 1 else "F32")]
        codes = quantize(rng.normal(size=shape).astype(np.float32) / 8, kind)
        writer.add_tensor(name, codes, raw_dtype=kind)
        values = dequantize(codes, kind).astype(np.float32)
        if part in HEADS:  # pair i of a head: rows 2 i and 2 i + 1 there, rows i and i + half here
            heads, size = HEADS[part], shape[0] // HEADS[part]
            order = [h * size + 2 * (i % (size // 2)) + i // (size // 2) for h in range(heads) for i in range(size)]
            values = values[order]
        tensors[carried._hf_name(name)] = values.astype(ml_dtypes.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": WIDTH,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": TOKENS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "bos_token_id": 1101, "eos_token_id": [1150, 1160], "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder


def pack(made: Path, out: Path, *more: str) -> None:
    flags = ["--gguf", str(made / "model.gguf"), "--model", str(made / "model"), "--out", str(out)]
    assert carried.main(["pack", *flags, *more]) == 0


def test_parts_become_the_same_model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(carried, "MEGABYTE", 40_000)
    pack(made, tmp_path / "parts", "--part-mb", "1")
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    assert all(path.stat().st_size <= 40_000 for path in parts)
    assert carried.main(["unpack", "--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "model")]) == 0
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, made))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name].view(np.uint16), values.view(np.uint16), name)
    assert (tmp_path / "model" / "config.json").read_bytes() == (made / "model" / "config.json").read_bytes()
    assert carried.carried_vocabulary(tmp_path / "model") is None

    damaged = bytearray(parts[1].read_bytes())
    damaged[7] ^= 1
    parts[1].write_bytes(damaged)
    with pytest.raises(UserError, match=r"part-02.*is damaged; carry it again"):
        carried.unpack(tmp_path / "parts", tmp_path / "other")
    parts[1].unlink()
    with pytest.raises(UserError, match="part 2 is missing"):
        carried.unpack(tmp_path / "parts", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokens_in_use_alone(made: Path, tmp_path: Path):
    """Logits of the kept tokens, compared with the whole model's at their places."""
    tokens, stops = np.array([[5, 1100, 1150, 3]]), [1150]
    np.savez(tmp_path / "mixture.npz", tokens=tokens, **{"a/wanted": [1180]}, contents=json.dumps({"stops": stops}))
    pack(made, tmp_path / "parts", "--used", str(tmp_path / "mixture.npz"))
    carried.unpack(tmp_path / "parts", tmp_path / "model")
    vocabulary = carried.carried_vocabulary(tmp_path / "model")
    assert vocabulary is not None
    assert vocabulary.tolist() == [*range(1000), 1100, 1150, 1180]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (1003, None, [1001])
    small, whole = (load_backbone(str(folder / "model"), "float32") for folder in (tmp_path, made))
    places = mixture.places(tokens, vocabulary)
    np.testing.assert_allclose(small(places).logits, whole(tokens).logits[..., vocabulary], rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match="1101"):
        mixture.places(np.array([1101]), vocabulary)


def test_another_model_is_refused(made: Path, tmp_path: Path):
    tensors = load_file(made / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"blk.0.ffn_up.weight does not decode to .*give the model that was made from this"
    ):
        carried.pack(made / "model.gguf", tmp_path / "model", tmp_path / "parts", used=[], part_bytes=10**6)
    assert not (tmp_path / "parts").exists()
