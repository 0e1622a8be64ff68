"""Fixtures of the tests of training runs."""

from training_runs import run_folder, shared_programs  # noqa: F401 - fixtures
