"""The demo from start to finish: data → backbone → adapters → answers of both → which experts each skill used."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.session import Session
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.trainer import train
from examples.skills.answers import Answers, answer_all
from examples.skills.backbone import BATCH_SIZE, pretrain
from examples.skills.config import DemoConfig
from examples.skills.report import (
    answers_table,
    expert_shares,
    expert_table,
    mean_exact_match,
    plot_expert_use,
    show,
    step,
)
from examples.skills.skills import SKILLS, Case, Material, draw_material

MARKER = ".made-by-adafuse-demo"
WRITTEN = ("data", "backbone", "run", "expert_use.png")
"""Names in the directory of a demo."""
LINES_PER_ROW = 4
BACKBONE_AT_MOST, ADAPTED_AT_LEAST = 0.10, 0.90


def run_demo(config: DemoConfig) -> int:
    """Run it all, print it, and leave in `config.output`: `data/`, `backbone/`, `run/` (what train.py leaves) and
    `expert_use.png`. Returns 0, or 1 if the backbone knew the skills already or the adapters did not learn them.

    Raises:
      UserError: `config.output` holds something that is not an earlier demo.
    """
    begun = time.perf_counter()
    out = Path(config.output)
    claim(out)
    show(f"AdaFuse-JAX demo: {len(SKILLS)} skills, a backbone that has none of them, and adapters that teach it all.")

    with step(f"Data: made-up words and numbers, in {out}/data"):
        material = draw_material(
            config.seed,
            raw=config.pretrain_steps * BATCH_SIZE * LINES_PER_ROW,
            train=config.train_prompts,
            held_out=config.held_out_prompts,
        )
        _write_data(material, out / "data")
        show(f"  {len(material.raw):,} lines for the backbone, such as  {_inline(material.raw[0])}")
        show(f"  {len(material.train):,} prompts for the adapters, such as  {_inline(material.train[0])}")

    with step(f"Backbone: a Llama of 4 layers and 0.9 M weights, pre-trained on the lines, in {out}/backbone"):
        pretrain(
            material.raw,
            out / "backbone",
            steps=config.pretrain_steps,
            seed=config.seed,
            log=lambda text: show(f"  {text}"),
        )

    train_config, adapter_config = adapter_configs(config)
    experts, linears = adapter_config.num_experts, len(adapter_config.targets)
    with step(
        f"Adapters: {experts} experts in each of the {linears} linears of every layer, one router, frozen backbone"
    ):
        show(f"  the same as  {command('train.py', train_config, adapter_config)}")
        train(train_config, adapter_config)

    adapted_config = DecodeConfig(model=train_config.model, adapter=f"{train_config.output}/adapter")
    with step(f"Answers to {config.held_out_prompts} held-out prompts of every skill, without and with the adapters"):
        backbone = _answers(DecodeConfig(model=train_config.model), material)
        adapted = _answers(adapted_config, material)
    show("\n" + answers_table(backbone, adapted))

    picture, skills, shares = out / "expert_use.png", list(adapted), expert_shares(adapted)
    plot_expert_use(skills, shares, picture)
    show(f"\n● Experts that read the answers of each skill: share of the assignments (as a picture: {picture})")
    show(
        f"  All {linears} linears are targets, which teaches fastest. With q_proj the router sees one token at a time:"
    )
    show("  skills that write the same alphabet share experts; capitals, digits and hyphens bring others.\n")
    show(expert_table(skills, shares))

    example = dataclasses.replace(adapted_config, prompt="Write backwards: world", stats=True)
    show(f"\nAll of it took {time.perf_counter() - begun:.0f} s. Ask something yourself:")
    show(f"  {command('decode.py', example)}")
    return verdict(mean_exact_match(backbone), mean_exact_match(adapted))


def claim(out: Path) -> None:
    """A directory `out` with the demo's mark and nothing else; what an earlier demo wrote there is removed.

    Raises `UserError`, and removes nothing, if `out` is or holds anything else.
    """
    try:
        if out.exists():
            present = {path.name for path in out.iterdir()} if out.is_dir() else {""}
            if present and (MARKER not in present or not present <= {MARKER, *WRITTEN}):
                raise UserError(f"--output {out}: holds something that is not an earlier demo; give another directory")
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
        for name in WRITTEN:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {out}: cannot be written ({error.strerror or error}); give another directory"
        ) from error


def adapter_configs(config: DemoConfig) -> tuple[TrainConfig, AdapterConfig]:
    """Configs of the demo's training run."""
    out = config.output
    training = TrainConfig(
        model=f"{out}/backbone",
        dataset=(f"{out}/data/train.jsonl",),
        eval_dataset=(f"{out}/data/held_out.jsonl",),
        output=f"{out}/run",
        steps=config.train_steps,
        batch_size=16,
        max_length=64,
        learning_rate=3e-3,
        beta2=0.98,
        warmup_ratio=0.1,
        dtype="float32",
        remat="none",
        checkpoint_every=config.train_steps,
        eval_every=config.train_steps,
        seed=config.seed,
    )
    return training, AdapterConfig(rank=16, alpha=64.0, balance_coefficient=0.05)


def command(script: str, *configs: Any) -> str:
    """The command line that gives `configs`: every setting that is not its default, or its method's preset."""
    python = Path(sys.executable)
    words = [str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python", script]
    for config in configs:
        preset = AdapterConfig(adapter=config.adapter) if isinstance(config, AdapterConfig) else None
        for field in dataclasses.fields(config):
            value, flag = getattr(config, field.name), field.name.replace("_", "-")
            if value == (field.default if preset is None or field.name == "adapter" else getattr(preset, field.name)):
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def verdict(backbone: float, adapted: float) -> int:
    """0 if the adapters made the difference; else 1, with a line that names the failure."""
    if backbone > BACKBONE_AT_MOST:
        show(f"\nFAILED: the backbone alone answers {backbone:.0%} (at most {BACKBONE_AT_MOST:.0%} were expected)")
    if adapted < ADAPTED_AT_LEAST:
        show(f"\nFAILED: with adapters {adapted:.0%} are right (at least {ADAPTED_AT_LEAST:.0%} were expected)")
    return int(backbone > BACKBONE_AT_MOST or adapted < ADAPTED_AT_LEAST)


def _answers(config: DecodeConfig, material: Material) -> dict[str, Answers]:
    session = Session(config)
    return {skill: answer_all(session, cases) for skill, cases in material.held_out.items()}


def _write_data(material: Material, directory: Path) -> None:
    directory.mkdir()
    held_out = [case for cases in material.held_out.values() for case in cases]
    for name, cases in (("train", material.train), ("held_out", held_out)):
        (directory / f"{name}.jsonl").write_text(_jsonl(cases), encoding="utf-8")
    (directory / "pretrain.txt").write_text("".join(f"{c.prompt}{c.answer}\n" for c in material.raw), encoding="utf-8")


def _jsonl(cases: Sequence[Case]) -> str:
    rows = ({"instruction": case.prompt, "output": case.answer, "skill": case.skill} for case in cases)
    return "".join(json.dumps(row) + "\n" for row in rows)


def _inline(case: Case) -> str:
    return f"{case.prompt.strip()} → {case.answer}"
