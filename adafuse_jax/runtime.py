"""Process-wide settings of the two scripts: quiet libraries, our own log lines, the persistent compilation cache."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def set_up() -> None:
    """Call before JAX or transformers is used. Respects JAX_COMPILATION_CACHE_DIR if it is set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.ERROR)
    logging.getLogger("adafuse_jax").setLevel(logging.INFO)
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "adafuse-jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
