#!/usr/bin/env python3
"""Export the LoRAs that PEFT saved in peft/ with this project, for make_peft.py --exports: `export_loras.py DIR`.

DIR/<name>/peft is a PEFT directory again, DIR/<name>/huggingface the merged model.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from tiny_loras import LORAS  # noqa: E402
from tiny_models import CASES, write_model_dir  # noqa: E402

from adafuse_jax.export import ExportConfig, export  # noqa: E402


def main(out: Path) -> None:
    for name, case in LORAS.items():
        model = write_model_dir(CASES[case.model], out / name / "model")
        for form in ("peft", "huggingface"):
            export(
                ExportConfig(
                    model=str(model), adapter=str(HERE / "peft" / name), output=str(out / name / form), format=form
                )
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
