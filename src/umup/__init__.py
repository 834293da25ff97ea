"""umup: tune small, train large, in FP8, and know that it worked.

Public names load on first use, so that `import umup` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ConfigError": "umup.errors",
    "InputError": "umup.errors",
    "PlanError": "umup.errors",
    "RunError": "umup.errors",
    "UmupError": "umup.errors",
    "Monomial": "umup.rules.monomial",
    "ParamSpec": "umup.rules.roles",
    "Role": "umup.rules.roles",
    "SCHEMES": "umup.rules.schemes",
    "Plan": "umup.rules.plan",
    "ModelPlan": "umup.adapt.model_plan",
    "plan": "umup.adapt.model_plan",
    "unit_scale": "umup.adapt.unit_scale",
    "to_fp8": "umup.adapt.to_fp8",
    "RunConfig": "umup.config.sections",
    "load_config": "umup.config.load",
    "plan_for": "umup.models.specs",
    "build": "umup.models.build",
    "param_groups": "umup.optim.groups",
    "run_training": "umup.train.loop",
    "coord_check": "umup.study.coord_check",
    "ScaleKeeper": "umup.train.precision",
    "Sampling": "umup.inference.generate",
    "CheckPlan": "umup.study.transfer_check",
    "transfer_check": "umup.study.transfer_check",
    "load_run": "umup.inference.completion",
}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'umup' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
