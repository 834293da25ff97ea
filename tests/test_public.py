"""The public names, the command table and the config keys, pinned as literals."""

from pathlib import Path

import umup
from umup.cli.main import COMMANDS
from umup.config.sections import RunConfig


def test_public_names():
    assert umup.__all__ == [
        "__version__",
        "CheckPlan",
        "ConfigError",
        "InputError",
        "ModelPlan",
        "Monomial",
        "ParamSpec",
        "Plan",
        "PlanError",
        "Role",
        "RunConfig",
        "RunError",
        "SCHEMES",
        "Sampling",
        "ScaleKeeper",
        "UmupError",
        "build",
        "coord_check",
        "load_config",
        "load_run",
        "param_groups",
        "plan",
        "plan_for",
        "run_training",
        "to_fp8",
        "transfer_check",
        "unit_scale",
    ]


def test_public_names_load():
    for name in umup.__all__:
        assert getattr(umup, name) is not None


def test_no_public_name_is_a_subpackage():
    """`import umup.train.loop` would put the package over a public function of that name."""
    packages = {p.name for p in Path(umup.__file__).parent.iterdir()}
    assert not packages & set(umup.__all__)


def test_commands():
    assert list(COMMANDS) == [
        "demo",
        "train",
        "generate",
        "data",
        "rules",
        "explain",
        "coord-check",
        "ranges",
        "sweep",
        "transfer-check",
        "transfer",
        "export",
        "convert",
        "bench",
    ]


def test_config_sections():
    assert list(RunConfig.model_fields) == [
        "model",
        "parametrization",
        "optimizer",
        "schedule",
        "data",
        "train",
        "precision",
    ]
