"""The direction of imports and the places of things, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("service", "training") for path in (ROOT / package).rglob("*.py"))

CONTRACT = {
    *("training.spec", "training.records", "training.progress", "training.artifact", "training.storage"),
    "training.pooling",
}
# Who may use training beyond the contract and the renderer, and what.
BRIDGES = {
    "service.jobs.run_actor": {"training.ray_run"},
    "service.jobs.launchers": {"training.loop"},
    "service.jobs.tasks": {"training.plan", "training.bases"},
    "service.jobs.preview": {"training.plan", "training.estimate", "training.probe", "training.model_shape"},
}
TORCH_FREE_TRAINING = CONTRACT | {"training.render", "training.plan", "training.estimate", "training.bases"}
MAX_LINES = 350


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at top level or inside a function, type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_package(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def modules_of(path: Path) -> set[str]:
    known = {module_name(source) for source in SOURCES}
    return imports(path) & known


def test_training_never_imports_service() -> None:
    offenders = [str(p) for p in SOURCES if module_name(p).startswith("training") and imports_package(p, "service")]
    assert not offenders


def test_service_uses_only_the_contract_and_the_renderer_of_training() -> None:
    for path in SOURCES:
        name = module_name(path)
        if name.startswith("service"):
            used = {module for module in modules_of(path) if module.startswith("training.")}
            allowed = CONTRACT | {"training.render"} | BRIDGES.get(name, set())
            assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_engines_and_training_run_without_ray() -> None:
    for path in SOURCES:
        name = module_name(path)
        if name.startswith("service.engine") or (name.startswith("training") and name != "training.ray_run"):
            assert not imports_package(path, "ray"), name


def test_ray_tune_stays_in_one_file() -> None:
    for path in SOURCES:
        assert module_name(path) == "service.jobs.ray_tune" or not imports_package(path, "ray.tune"), path


def test_torch_stays_in_training_and_the_native_engine() -> None:
    for path in SOURCES:
        name = module_name(path)
        may = (name.startswith("training") and name not in TORCH_FREE_TRAINING) or name.startswith(
            "service.engine.native"
        )
        assert may or not imports_package(path, "torch"), name


def test_sql_stays_in_the_store() -> None:
    harmless = {"sqlalchemy.orm", "sqlalchemy.orm.Session", "sqlalchemy.exc"}
    for path in SOURCES:
        name = module_name(path)
        if not name.startswith("service.store"):
            used = {module for module in imports(path) if module.startswith("sqlalchemy")}
            used = {module for module in used if not module.startswith("sqlalchemy.exc")}
            assert used <= harmless, f"{name} imports {sorted(used - harmless)}"


def test_the_environment_is_read_in_settings_only() -> None:
    for path in SOURCES:
        if module_name(path) != "service.settings":
            for node in ast.walk(ast.parse(path.read_text())):
                is_environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
                assert not is_environ, f"{path}:{getattr(node, 'lineno', '?')} reads the environment"


def test_every_file_has_a_docstring_and_fits_its_size() -> None:
    for path in SOURCES:
        text = path.read_text()
        is_generated = "migrations/versions" in str(path)
        assert is_generated or text.count("\n") <= MAX_LINES, f"{path} has {text.count(chr(10))} lines"
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


@pytest.mark.parametrize(
    "module", ["service.app", "service.cli", "training.render", "training.plan", *sorted(CONTRACT)]
)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tracker_libraries_wait_for_a_run_that_needs_them() -> None:
    code = "import sys, service.app, service.jobs.run_actor, service.trackers.chosen; "
    code += "assert not {'wandb', 'mlflow', 'tensorboard'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_contract_needs_no_service_library() -> None:
    heavy = "('ray', 'fastapi', 'sqlalchemy', 'transformers', 'datasets')"
    code = f"import sys, {', '.join(sorted(CONTRACT))}; assert not [m for m in {heavy} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
