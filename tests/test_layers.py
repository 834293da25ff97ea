"""House rule 1 (import only from a lower layer) and rule 2 (what loads without torch)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "umup"

LAYERS = {
    "errors": 0,
    "rules": 1,
    "config": 2,
    "numerics": 3,
    "data": 3,
    "ops": 4,
    "nn": 5,
    "optim": 5,
    "models": 6,
    "adapt": 6,
    "checkpoint": 7,
    "interop": 8,
    "train": 9,
    "inference": 9,
    "study": 10,
    "plots": 11,
    "cli": 12,
}

# Every module of these packages, and these single modules, must load without torch.
TORCH_FREE = [
    "errors",
    "rules",
    "config",
    "data",
    "models.families",
    "models.presets",
    "models.specs",
    "models.memory",
    "interop.torchtitan",
    "interop.fold",
    "interop.hf_config",
    "interop.hf_formats",
    "interop.megatron",
    "interop.cerebras",
    "interop.config_keys",
    "interop.formats",
    "interop.mup_numbers",
    "interop.nanogpt",
    "cli.main",
]

# Heavy or optional packages and the one place that may import them (house rule 4).
HOMES = {
    "matplotlib": "plots",
    "safetensors": "checkpoint",
    "yaml": "config",
    "tokenizers": "data",
    "optuna": "study",
    "transformers": "interop",
}

MODULES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


def package_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(source: str) -> list[str]:
    """Absolute dotted names imported anywhere in a module, function bodies included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer_faults(package: str, source: str) -> list[str]:
    faults = []
    for name in imports_of(source):
        parts = name.split(".")
        if parts[0] == "umup" and len(parts) > 1 and parts[1] != package:
            target = parts[1]
            if target not in LAYERS:
                faults.append(f"{name}: not in the layer table")
            elif LAYERS[target] >= LAYERS[package]:
                faults.append(f"{package} ({LAYERS[package]}) imports {name} ({LAYERS[target]})")
        elif HOMES.get(parts[0], package) != package:
            faults.append(f"{package} imports {name}, whose home is {HOMES[parts[0]]}")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_only_from_lower_layers(path):
    assert layer_faults(package_of(path), path.read_text()) == []


def test_the_layer_test_can_fail():
    assert layer_faults("ops", "from umup.rules.plan import Plan") == []
    assert layer_faults("ops", "from umup.models.build import build") != []
    assert layer_faults("nn", "def f():\n    import umup.optim.groups") != []
    assert layer_faults("train", "import matplotlib") != []
    assert layer_faults("train", "import umup.utils") != []


def torch_free_modules() -> list[str]:
    names = []
    for path in MODULES:
        dotted = ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        if any(dotted == free or dotted.startswith(free + ".") for free in TORCH_FREE):
            names.append(f"umup.{dotted}")
    return names


def loads_torch(statement: str) -> bool:
    code = f"{statement}\nimport sys\nsys.exit(77 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 77), done.stderr
    return done.returncode == 77


def test_pure_modules_load_without_torch():
    assert len(torch_free_modules()) > 10
    assert not loads_torch("import umup\nimport " + ", ".join(torch_free_modules()))


def test_the_torch_probe_can_fail():
    assert loads_torch("import umup.ops.linear")


def test_modules_stay_within_their_budget():
    """House rule 6: 400 lines at most, tables exempt."""
    tables = {"rules/schemes.py"}
    long = {
        str(p.relative_to(SRC)): n
        for p in MODULES
        if (n := len(p.read_text().splitlines())) > 400 and str(p.relative_to(SRC)) not in tables
    }
    assert long == {}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_functions_stay_within_their_budget(path):
    """House rule 6: bodies of about 40 lines; train/loop.py may take 150."""
    limit = 150 if path == SRC / "train" / "loop.py" else 50
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= limit, f"{node.name} has {lines} lines"


def test_no_scheme_or_family_name_is_compared_outside_its_table():
    """`if scheme == ...` exists nowhere outside rules/, `if family == ...` nowhere outside models/families.py."""
    for path in MODULES:
        if package_of(path) == "rules" or path.name == "families.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                named = any(
                    isinstance(part, ast.Constant) and part.value in {"sp", "mup", "umup", "llama", "gpt2"}
                    for part in [node.left, *node.comparators]
                )
                assert not named, f"{path.relative_to(SRC)}:{node.lineno}: {text}"
