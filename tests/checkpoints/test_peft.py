"""LoRAs from and to PEFT: what PEFT saved gives the logits that PEFT gave, and goes back to the same files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens import family_models, tiny_models
from goldens.tiny_loras import CHANGING, LORAS, VARIANTS, factors
from goldens.tiny_models import CASES, tensor_shapes, write_model_dir
from safetensors.numpy import load_file, save_file

import decode as script
from adafuse_jax import AdapterConfig, UserError, load_backbone
from adafuse_jax.adapters.lora import LoRA, merged
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints import peft_files
from adafuse_jax.checkpoints.adapter_directory import load_adapter, save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.checkpoints.hf_config import parse_hf_config
from adafuse_jax.checkpoints.peft import save_peft_lora
from adafuse_jax.checkpoints.peft_files import tensor_name
from adafuse_jax.data.tokenizer import tokenizer_files
from adafuse_jax.export import ExportConfig, export
from adafuse_jax.export import main as export_script
from adafuse_jax.models.registry import FAMILIES
from adafuse_jax.training.initial import initial_weights

PEFT = tiny.GOLDENS / "peft"
FILES = ("adapter_config.json", "adapter_model.safetensors")
ATOL = 5e-5
"""Tolerance on logits, over their standard deviation. Sums in fp32 differ by up to 2.5e-5, which depends on the CPU,
and PEFT's own, merged and unmerged, by 1.3e-5."""


@pytest.fixture(scope="module", params=LORAS)
def case(request, tmp_path_factory):
    """(name, model directory, backbone, the LoRA as read from PEFT's files, what PEFT gave)."""
    name = request.param
    directory = write_model_dir(CASES[LORAS[name].model], tmp_path_factory.mktemp(name))
    model = load_backbone(directory, "float32")
    lora = load_adapter(PEFT / name, model.config, backbone_identity="", dtype=jnp.float32)
    return name, directory, model, lora, dict(np.load(PEFT / name / "outputs.npz"))


def write_model(name: str, out: Path) -> Path:
    """The directory of a tiny model, of either set."""
    of = tiny_models if name in CASES else family_models
    return of.write_model_dir(of.CASES[name], out)


def check_logits(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, atol=ATOL * wanted.std(), rtol=0)


class TestImport:
    def test_unmerged_logits_are_peft_s(self, case):
        _, _, model, lora, golden = case
        check_logits(model(golden["tokens"], adapter=lora).logits, golden["logits"])
        assert np.abs(model(golden["tokens"]).logits - golden["logits"]).max() > 0.1 * golden["logits"].std()

    def test_merged_logits_are_peft_s(self, case):
        _, _, model, lora, golden = case
        check_logits(merged(model, lora)(golden["tokens"]).logits, golden["merged"])

    def test_settings(self, case):
        name, _, _, lora, _ = case
        wanted = LORAS[name]
        assert (set(lora.config.targets), lora.config.rank) == (set(wanted.targets), wanted.rank)
        assert lora.config.scale == pytest.approx(wanted.alpha / wanted.rank ** (0.5 if wanted.rslora else 1))
        assert lora.config.dropout == 0.1


@pytest.mark.parametrize("name", VARIANTS)
class TestModulesOfTheirOwn:
    """Ranks, scales and layers by name, and modules by expression."""

    def test_logits_are_peft_s(self, name, tmp_path):
        case, golden = VARIANTS[name], np.load(PEFT / name / "outputs.npz")
        model = load_backbone(write_model(case.model, tmp_path / "model"), "float32")
        lora = load_adapter(PEFT / name, model.config, backbone_identity="", dtype=jnp.float32)
        check_logits(model(golden["tokens"], adapter=lora).logits, golden["logits"])
        assert np.abs(model(golden["tokens"]).logits - golden["logits"]).max() > 0.1 * golden["logits"].std()
        assert all(np.asarray(expert.A).any(axis=-1).all() for expert in lora.experts.values()), "A = 0 would not train"
        save_peft_lora(lora, tmp_path / "again", model.config, backbone_name="m")
        again = load_adapter(tmp_path / "again", model.config, backbone_identity="", dtype=jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_a_named_adapter_is_found_in_its_folder(tmp_path, caplog):
    folder = tiny.write_folder(tmp_path / "f")
    shutil.copytree(PEFT / "all_linears", tmp_path / "saved" / "tuned")
    config = parse_hf_config(write_model_dir(CASES["llama_gqa_tied"], tmp_path / "model")).model
    with caplog.at_level("INFO"):
        lora = load_adapter(tmp_path / "saved", config, backbone_identity="", dtype=jnp.float32)
    assert "saved: its adapter tuned is used" in caplog.text
    assert lora.config.rank == LORAS["all_linears"].rank
    shutil.copyfile(folder / "model" / "tokenizer.json", tmp_path / "saved" / "tokenizer.json")
    shutil.copyfile(folder / "model" / "tokenizer_config.json", tmp_path / "saved" / "tuned" / "tokenizer_config.json")
    (tmp_path / "saved" / "chat_template.jinja").write_text("outer")
    assert set(tokenizer_files(folder / "model", tmp_path / "saved")) == {"tokenizer.json", "chat_template.jinja"}
    (tmp_path / "saved" / "tokenizer.json").unlink()
    (tmp_path / "saved" / "tuned" / "chat_template.jinja").write_text("inner")
    assert tokenizer_files(folder / "model", tmp_path / "saved")["chat_template.jinja"] == b"inner"
    shutil.copytree(PEFT / "all_linears", tmp_path / "saved" / "other")
    with pytest.raises(UserError, match=r"2 adapters in its folders \('other', 'tuned'\); give one of them"):
        load_adapter(tmp_path / "saved", config, backbone_identity="", dtype=jnp.float32)


KEYS = (
    dict.fromkeys(CHANGING, "modules_to_save")
    | {"biases": "lora_bias"}
    | dict.fromkeys(("dora", "dora_fused"), "use_dora")
)


@pytest.mark.parametrize("name", CHANGING)
def test_an_adapter_that_changes_the_backbone_is_merged(name, tmp_path):
    """Refuse it as a LoRA, with the command that makes a plain model of it; that has PEFT's logits."""
    directory, golden = write_model(CHANGING[name].model, tmp_path / "model"), PEFT / name
    config = parse_hf_config(directory).model
    with pytest.raises(UserError, match=rf"{KEYS[name]}: changes the backbone's own weights; merge it: python -m adaf"):
        load_adapter(golden, config, backbone_identity="", dtype=jnp.float32)
    export_script([f"--model={directory}", f"--adapter={golden}", f"--output={tmp_path}/out"])
    whole, outputs = load_backbone(tmp_path / "out"), np.load(golden / "outputs.npz")
    check_logits(whole(outputs["tokens"]).logits, outputs["logits"])
    assert whole.config.tie_word_embeddings == (config.tie_word_embeddings and KEYS[name] != "modules_to_save")


def with_files(tmp_path: Path, extra: dict[str, np.ndarray], **keys: object) -> dict[str, str]:
    """Model and adapter, which has more tensors and keys than `all_linears`, as the flags of export."""
    directory = write_model_dir(CASES["llama_gqa_tied"], tmp_path / "model")
    adapter = Path(shutil.copytree(PEFT / "all_linears", tmp_path / "lora", dirs_exist_ok=True))
    (adapter / FILES[0]).write_text(json.dumps(json.loads((adapter / FILES[0]).read_text()) | keys))
    save_file(load_file(PEFT / "all_linears" / FILES[1]) | extra, adapter / FILES[1])
    return {"model": str(directory), "adapter": str(adapter)}


def test_an_embedding_of_more_tokens(tmp_path):
    """PEFT saves the embedding, tied head included, of a model that got new tokens, whatever modules_to_save says."""
    larger = np.random.default_rng(0).standard_normal((100, 64), np.float32)
    extra = {"base_model.model.model.embed_tokens.weight": larger}
    flags = with_files(tmp_path, extra)
    with pytest.raises(UserError, match="tensor embed_tokens: changes the backbone's own weights"):
        load_adapter(
            flags["adapter"], parse_hf_config(tmp_path / "model").model, backbone_identity="", dtype=jnp.float32
        )
    export(ExportConfig(**flags, output=str(tmp_path / "out")))
    whole = load_backbone(tmp_path / "out")
    assert (whole.config.vocab_size, whole.config.tie_word_embeddings) == (100, True)
    np.testing.assert_array_equal(whole.embed_tokens[...], larger)
    flags = with_files(tmp_path, extra, modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="embeddings of 100 tokens and a head of 96"):
        export(ExportConfig(**flags, output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_a_bias_needs_one_in_the_backbone(tmp_path):
    factors_b = {name: value for name, value in load_file(PEFT / "all_linears" / FILES[1]).items() if "lora_B" in name}
    biases = {name.replace("weight", "bias"): np.ones(len(value), np.float32) for name, value in factors_b.items()}
    flags = with_files(tmp_path, biases, lora_bias=True)
    with pytest.raises(UserError, match=r"lora_bias: \w+ of the backbone has no bias"):
        export(ExportConfig(**flags, output=str(tmp_path / "out")))


@pytest.mark.parametrize("is_common", [True, False], ids=["common A", "an A each"])
def test_linears_that_are_one_tensor_are_one_module(tmp_path, monkeypatch, is_common):
    """Three linears, of which k is not adapted, go out as one module and come back as the same products."""
    config = parse_hf_config(write_model_dir(CASES["llama_gqa_tied"], tmp_path / "model")).model
    names = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "model.layers.{layer}.self_attn.qkv_proj.{leaf}")
    fused = replace(FAMILIES["llama"], tensor_names=FAMILIES["llama"].tensor_names | names)
    monkeypatch.setattr(peft_files, "FAMILIES", {"llama": fused})
    settings = AdapterConfig(adapter="lora", rank=2, alpha=3.0, targets=("q_proj", "v_proj", "down_proj"))
    lora = make_adapter(settings, config, rngs=nnx.Rngs(0))
    for index, expert in enumerate(lora.experts.values()):
        expert.B[...] = jax.random.normal(jax.random.key(index), expert.B.shape)
    if is_common:
        lora.experts["v_proj"].A[...] = lora.experts["q_proj"].A[...]
    save_peft_lora(lora, tmp_path / "out", config, backbone_name="m")
    rank = {
        name: tensor.shape[0] for name, tensor in load_file(tmp_path / "out" / FILES[1]).items() if "lora_A" in name
    }
    assert rank[tensor_name(1, "self_attn.qkv_proj", "A")] == (2 if is_common else 4)
    assert rank[tensor_name(1, "mlp.down_proj", "A")] == 2
    again = load_adapter(tmp_path / "out", config, backbone_identity="", dtype=jnp.float32)
    assert again.config.targets == ("q_proj", "k_proj", "v_proj", "down_proj")
    for name in again.config.targets:
        wanted = product(lora, name) if name in lora.experts else 0 * product(again, name)
        np.testing.assert_allclose(product(again, name), wanted, atol=1e-5)


def product(lora: LoRA, name: str) -> np.ndarray:
    expert = lora.experts[name]
    return lora.config.scale * np.einsum("lor,lri->loi", expert.B[:, 0], expert.A[:, 0])


class TestExport:
    def test_peft_files_hold_the_same(self, case, tmp_path):
        name, _, model, lora, _ = case
        save_peft_lora(lora, tmp_path / "out", model.config, backbone_name=LORAS[name].model)
        shapes = tensor_shapes(CASES[LORAS[name].model].config)
        ours, theirs = load_file(tmp_path / "out" / FILES[1]), load_file(PEFT / name / FILES[1])
        assert ours.keys() == theirs.keys() == {f"base_model.model.{key}" for key in factors(name, shapes)}
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)
        ours, theirs = (json.loads((where / FILES[0]).read_text()) for where in (tmp_path / "out", PEFT / name))
        theirs["target_modules"].sort()
        if LORAS[name].rslora:
            assert ours.pop("lora_alpha") == pytest.approx(theirs["lora_alpha"] * theirs["r"] ** 0.5)
            assert ours.pop("use_rslora") is False
        assert ours == {key: theirs[key] for key in ours}

    def test_the_merged_model_is_a_plain_one(self, case, tmp_path):
        name, directory, _, _, golden = case
        export(ExportConfig(model=str(directory), adapter=str(PEFT / name), output=str(tmp_path / "out")))
        again = load_backbone(tmp_path / "out", "float32")
        check_logits(again(golden["tokens"]).logits, golden["merged"])

    def test_an_adapter_of_this_project(self, case, tmp_path):
        name, directory, model, lora, _ = case
        export_script(
            [f"--model={directory}", f"--adapter={PEFT / name}", f"--output={tmp_path}/out", "--format=adafuse-jax"]
        )
        identity = HFCheckpoint.open(directory).identity()
        again = load_adapter(tmp_path / "out", model.config, backbone_identity=identity, dtype=jnp.float32)
        assert again.config == lora.config
        jax.tree.map(np.testing.assert_array_equal, again, lora)
        with pytest.raises(UserError, match="another backbone"):
            load_adapter(tmp_path / "out", model.config, backbone_identity="other", dtype=jnp.float32)

    def test_experts_that_change_are_refused(self, tmp_path):
        directory = write_model_dir(CASES["llama_gqa_tied"], tmp_path / "model")
        model = load_backbone(directory, "float32").config
        adapter = make_adapter(AdapterConfig(adapter="pesc", rank=2), model, rngs=nnx.Rngs(0))
        identity = HFCheckpoint.open(directory).identity()
        save_adapter(adapter, tmp_path / "a", backbone_name="m", backbone_identity=identity)
        settings = {"model": str(directory), "adapter": str(tmp_path / "a"), "output": str(tmp_path / "out")}
        for form in ("peft", "huggingface"):
            with pytest.raises(UserError, match="adapter of pesc"):
                export(ExportConfig(**settings, format=form))
        export(ExportConfig(**settings, format="adafuse-jax"))
        with pytest.raises(UserError, match="not an empty directory"):
            export(ExportConfig(**settings, format="adafuse-jax"))
        with pytest.raises(UserError, match="--dtype is for"):
            ExportConfig(**settings, format="peft", dtype="bfloat16")


class TestInitialLoRA:
    @pytest.mark.parametrize("method", ["lora", "adafuse", "moral", "mola"])
    def test_begins_as_the_lora(self, case, method):
        """Gates sum to 1 and every expert is the LoRA, so the sum is the LoRA: other scales and more linears included."""
        name, _, model, lora, golden = case
        extra = {"mola": {"experts_per_layer": (2, 3)}, "lora": {}}.get(method, {"num_experts": 3})
        config = AdapterConfig(adapter=method, targets=("all",), rank=LORAS[name].rank, alpha=9.0, **extra)
        adapter = initial_weights(config, model, lora, jax.random.key(0))
        check_logits(model(golden["tokens"], adapter=adapter, unroll=True).logits, golden["logits"])
        if method == "mola":
            assert not adapter.experts["q_proj"].lora.B[0, 2].any()


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "dora": ({"use_dora": True}, "use_dora: changes the backbone's own weights"),
    "wrong rank of a pattern": ({"rank_pattern": {"q_proj": 2}}, "has shape"),
    "rank of a pattern is text": ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern: q_proj is '2'"),
    "pattern that never ends": ({"rank_pattern": {"(.|..|...)+[a-i]": 2}}, "rank_pattern: .* cannot be matched"),
    "pattern that is none": ({"target_modules": ".*(q_proj"}, "target_modules: .* cannot be matched"),
    "expression that leaves a module out": ({"target_modules": r".*\.(q|k|v|o|gate|up)_proj"}, "target_modules in"),
    "layer left out": ({"layers_to_transform": [0]}, "layers_to_transform in"),
    "layers of another list": ({"layers_to_transform": [0, 1], "layers_pattern": ["h"]}, "layers_to_transform in"),
    "layer is text": ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    "bias of its own": ({"lora_bias": True}, "lora_bias: changes the backbone's own weights"),
    "whole modules": ({"modules_to_save": ["score"]}, "modules_to_save is .*supported: embed_tokens, lm_head"),
    "rank text": ({"r": "4"}, "r is '4'"),
    "wrong rank": ({"r": 5}, "has shape"),
}


class TestRefused:
    @pytest.fixture
    def directory(self, tmp_path) -> Path:
        return Path(shutil.copytree(PEFT / "all_linears", tmp_path / "lora"))

    @pytest.fixture
    def config(self, tmp_path):
        return parse_hf_config(write_model_dir(CASES["llama_gqa_tied"], tmp_path / "model")).model

    def load(self, directory, config) -> LoRA:
        return load_adapter(directory, config, backbone_identity="", dtype=jnp.float32)

    @pytest.mark.parametrize("name", REFUSED)
    def test_config(self, directory, config, name):
        changes, expected = REFUSED[name]
        table = json.loads((directory / FILES[0]).read_text()) | changes
        (directory / FILES[0]).write_text(json.dumps(table))
        with pytest.raises(UserError, match=expected):
            self.load(directory, config)

    @pytest.mark.parametrize("name", peft_files.PLAIN)
    def test_variants_are_refused_by_their_keys(self, directory, config, name):
        table = json.loads((directory / FILES[0]).read_text()) | {name: "other"}
        (directory / FILES[0]).write_text(json.dumps(table))
        with pytest.raises(UserError, match=f"{name} 'other' is not supported; merge the adapter with PEFT"):
            self.load(directory, config)

    def test_tensors(self, directory, config):
        path = directory / FILES[1]
        tensors = load_file(path)
        missing = tensor_name(1, "mlp.up_proj", "B")
        save_file({k: v for k, v in tensors.items() if k != missing}, path)
        with pytest.raises(UserError, match=r"up_proj.lora_B.weight is missing"):
            self.load(directory, config)
        for name in ("lm_head.lora_A.weight", "lm_head.base_layer.weight", "model.embed_tokens.lora_embedding_A"):
            save_file(tensors | {f"base_model.model.{name}": np.zeros((4, 4))}, path)
            with pytest.raises(UserError, match=r"target_modules has (lm_head|embed_tokens), whose LoRA is not supp"):
                self.load(directory, config)
        save_file(tensors | {"base_model.model.model.layers.0.mlp.up_proj.ia3_l": np.zeros((4, 4))}, path)
        with pytest.raises(UserError, match="not of a LoRA of"):
            self.load(directory, config)
        save_file(tensors | {tensor_name(2, "mlp.up_proj", "B"): tensors[missing]}, path)
        with pytest.raises(UserError, match="of no layer of the backbone"):
            self.load(directory, config)
        path.unlink()
        (directory / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match=r"convert its \.bin"):
            self.load(directory, config)


def test_decode_takes_a_peft_directory_and_merges_it(tmp_path, capsys):
    folder = tiny.write_folder(tmp_path / "f")
    config = parse_hf_config(folder / "model").model
    lora = make_adapter(AdapterConfig(adapter="lora", rank=2), config, rngs=nnx.Rngs(0))
    for expert in lora.experts.values():
        expert.B[...] = jax.random.normal(jax.random.key(1), expert.B.shape)
    save_peft_lora(lora, tmp_path / "peft", config, backbone_name="tiny")
    answers = []
    for changes in ({}, {"adapter": tmp_path / "peft"}, {"adapter": tmp_path / "peft", "strategy": "merged"}):
        script.main(tiny.decode_flags(folder, json=True, max_new_tokens=12, **changes))
        answers.append(json.loads(capsys.readouterr().out))
    export_script([f"--model={folder}/model", f"--adapter={tmp_path}/peft", f"--output={tmp_path}/whole"])
    capsys.readouterr()
    script.main(tiny.decode_flags(folder, json=True, max_new_tokens=12, model=tmp_path / "whole"))
    whole = json.loads(capsys.readouterr().out)
    assert answers[0]["token_ids"] != answers[1]["token_ids"] == answers[2]["token_ids"] == whole["token_ids"]
    assert [answer["strategy"] for answer in answers] == [None, "unmerged", "merged"]
