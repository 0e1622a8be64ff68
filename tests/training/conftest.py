"""Fixtures of the tests of training runs."""

from training_runs import run_folder  # noqa: F401 - a fixture
