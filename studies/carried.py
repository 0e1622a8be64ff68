"""A model in parts that fit a transfer: the codes of its GGUF file, and the Hugging Face directory made from them again.

    python -m studies.carried pack --gguf FILE --model DIR --out PARTS [--used mixture.npz ...]
    python -m studies.carried unpack --parts PARTS --out DIR

A part is a slice of one stream: a line of JSON, the model's other files, and the codes of its tensors, 4 to 8 bits a weight.
DIR of `pack` is the model that was made from the GGUF file; `pack` refuses a tensor whose codes do not decode to exactly its
bfloat16 values, and `unpack` one whose values have another hash. So what arrives is bit for bit the same model.

With --used the embedding keeps the tokens of these mixture files, and the first FIRST: the model's token i is then the
tokenizer's token `vocabulary.npy`[i]. Probabilities are those of the kept tokens alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import load_file, save_file

from adafuse_jax.core.atomic_files import new_directory
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import require

MEGABYTE = 10**6
FIRST = 1000
"""Tokens that are kept although no mixture has them: all bytes, and the most frequent pieces."""
VOCABULARY = "vocabulary.npy"
EMBEDDING = "model.embed_tokens.weight"
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"token_embd.weight": EMBEDDING, "output.weight": EMBEDDING, "output_norm.weight": "model.norm.weight"}
INTERLEAVED = ("attn_q.weight", "attn_k.weight")
"""Linears whose rows a GGUF file of Llama has in the order of interleaved rotary pairs."""


def carried_vocabulary(model: str | Path) -> Int[np.ndarray, " V"] | None:
    """The tokenizer's tokens that a model directory of `unpack` has, ascending; None for a model with all of them."""
    path = Path(model) / VOCABULARY
    return np.load(path, allow_pickle=False) if path.exists() else None


def pack(gguf_file: Path, model: Path, out: Path, *, used: Sequence[Path], part_bytes: int) -> dict[str, Any]:
    """Write the parts into the new directory `out`. Returns the counts of tensors, tokens, bytes and parts."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    heads = _interleaved_heads(reader)
    expected = load_file(model / "model.safetensors")
    vocabulary = tokens_of(used, len(expected[EMBEDDING])) if used else None
    tensors, codes = [], []
    has_head = any(tensor.name == "output.weight" for tensor in reader.tensors)
    for tensor in reader.tensors:
        if has_head and tensor.name == "token_embd.weight":
            continue  # the head, which is tied to the embedding, has the finer codes
        name = _hf_name(tensor.name)
        rows = np.asarray(tensor.data)
        wanted = expected.pop(name)
        if name == EMBEDDING and vocabulary is not None:
            rows, wanted = rows[vocabulary], wanted[vocabulary]
        entry = {
            "name": name, "type": int(tensor.tensor_type), "dtype": str(rows.dtype), "shape": rows.shape,
            "heads": heads.get(tensor.name.partition(".")[2].partition(".")[2], 0), "sha256": _hash(wanted),
        }  # fmt: skip
        require(
            _hash(_decoded(rows, entry)) == entry["sha256"],
            f"{gguf_file}: {tensor.name} does not decode to {name} of {model}; give the model that was made from this file",
        )
        tensors.append(entry)
        codes.append(rows.tobytes())
    require(
        not expected,
        f"{gguf_file}: lacks {', '.join(sorted(expected)[:3])} of {model}; give the model that was made from it",
    )
    others: dict[str, bytes] = {
        path.name: path.read_bytes() for path in sorted(model.iterdir()) if path.suffix in (".json", ".jinja")
    }
    if vocabulary is not None:
        others["config.json"] = _narrowed(json.loads(others["config.json"]), vocabulary)
        others.pop("generation_config.json", None)
    files = {name: gzip.compress(data, mtime=0) for name, data in others.items()}
    head: dict[str, Any] = {
        "tensors": tensors,
        "files": {name: len(data) for name, data in files.items()},
        "vocabulary": None if vocabulary is None else vocabulary.tolist(),
    }
    stream = b"".join([json.dumps(head).encode(), b"\n", *files.values(), *codes])
    with new_directory(out) as folder:
        starts = range(0, len(stream), part_bytes)
        for i, at in enumerate(starts):
            data = stream[at : at + part_bytes]
            name = f"part-{i + 1:02d}-of-{len(starts):02d}-{hashlib.sha256(data).hexdigest()[:16]}"
            (folder / name).write_bytes(data)
    return {
        "tensors": len(tensors), "tokens": len(vocabulary) if vocabulary is not None else None, "bytes": len(stream),
        "parts": len(starts),
    }  # fmt: skip


def unpack(parts: Path, out: Path) -> None:
    """Write the model into the new directory `out`. Raises `UserError` for a part that is missing or damaged."""
    stream = _joined(parts)
    line, _, data = stream.partition(b"\n")
    head = json.loads(line)
    at = 0
    with new_directory(out) as folder:
        for name, size in head["files"].items():
            (folder / name).write_bytes(gzip.decompress(data[at : at + size]))
            at += size
        tensors = {}
        for entry in head["tensors"]:
            rows = np.frombuffer(data, entry["dtype"], int(np.prod(entry["shape"])), at).reshape(entry["shape"])
            at += rows.nbytes
            values = _decoded(rows, entry)
            require(
                _hash(values) == entry["sha256"], f"{parts}: {entry['name']} decodes to other values; use gguf 0.19"
            )
            tensors[entry["name"]] = values
        require(at == len(data), f"{parts}: has {len(data) - at} bytes too many; pack the model again")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if head["vocabulary"] is not None:
            np.save(folder / VOCABULARY, np.array(head["vocabulary"], np.int32))


def tokens_of(mixtures: Sequence[Path], size: int) -> Int[np.ndarray, " V"]:
    """Tokens in mixture files, and the first FIRST of `size`, ascending."""
    found = [np.arange(min(FIRST, size))]
    for path in mixtures:
        with np.load(path, allow_pickle=False) as file:
            found += [np.unique(file[name]) for name in file.files if name.endswith(("tokens", "wanted"))]
            found.append(np.array(json.loads(str(file["contents"]))["stops"]))
    return np.unique(np.concatenate(found)).astype(np.int32)


def _hf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LINEARS[part]}.{kind}"


def _interleaved_heads(reader: Any) -> dict[str, int]:
    """Part of a tensor's name → heads whose rows are interleaved; empty for other families than Llama."""
    if reader.fields["general.architecture"].contents() != "llama":
        return {}
    counts = ("llama.attention.head_count", "llama.attention.head_count_kv")
    return {name: int(reader.fields[field].contents()) for name, field in zip(INTERLEAVED, counts, strict=True)}


def _decoded(rows: UInt8[np.ndarray, "out bytes"] | Float[np.ndarray, "*shape"], entry: dict[str, Any]) -> np.ndarray:
    """The bfloat16 values of a tensor's codes, in Hugging Face's order of rows."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = np.asarray(dequantize(rows, GGMLQuantizationType(entry["type"])), np.float32)
    if entry["heads"]:
        out, width = values.shape
        pairs = values.reshape(entry["heads"], out // entry["heads"] // 2, 2, width)
        values = pairs.swapaxes(1, 2).reshape(out, width)
    return np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).astype(ml_dtypes.bfloat16).tobytes()).hexdigest()


def _narrowed(config: dict[str, Any], vocabulary: Int[np.ndarray, " V"]) -> bytes:
    """The config with fewer tokens; an id of a token that is not kept becomes None."""
    place = {int(token): i for i, token in enumerate(vocabulary)}

    def of(token: Any) -> Any:
        return [place[t] for t in token if t in place] if isinstance(token, list) else place.get(token)

    ids = {key: of(value) for key, value in config.items() if re.fullmatch("(bos|eos|pad)_token_id", key)}
    return json.dumps(config | ids | {"vocab_size": len(vocabulary)}, indent=2).encode()


def _joined(parts: Path) -> bytes:
    names = sorted(path.name for path in parts.glob("part-*"))
    matches = [re.fullmatch(r"part-(\d+)-of-(\d+)-([0-9a-f]{16})", name) for name in names]
    found = {int(match[1]): (match[3], name) for match, name in zip(matches, names, strict=True) if match}
    count = max((int(match[2]) for match in matches if match), default=0)
    missing = [i for i in range(1, count + 1) if i not in found]
    require(bool(found) and not missing, f"{parts}: part {missing[0] if missing else 1} is missing; carry it too")
    joined = []
    for digest, name in (found[i] for i in range(1, count + 1)):
        data = (parts / name).read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != digest:
            raise UserError(f"{parts / name}: is damaged; carry it again")
        joined.append(data)
    return b"".join(joined)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    packing, unpacking = actions.add_parser("pack"), actions.add_parser("unpack")
    packing.add_argument("--gguf", type=Path, required=True, help="the GGUF file")
    packing.add_argument("--model", type=Path, required=True, help="Hugging Face directory that was made from it")
    packing.add_argument(
        "--used", type=Path, nargs="+", default=[], help="mixture files whose tokens are kept (default: all)"
    )
    packing.add_argument("--part-mb", type=int, default=56, help="megabytes of a part, at most")
    unpacking.add_argument("--parts", type=Path, required=True, help="folder with all parts")
    for action in (packing, unpacking):
        action.add_argument("--out", type=Path, required=True, help="new directory")
    given = parser.parse_args(argv)
    if given.action == "unpack":
        unpack(given.parts, given.out)
    else:
        require(given.part_mb > 0, f"--part-mb is {given.part_mb}: it must be greater than 0")
        print(
            json.dumps(pack(given.gguf, given.model, given.out, used=given.used, part_bytes=given.part_mb * MEGABYTE))
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
