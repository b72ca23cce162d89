"""The direction of imports and the places of things, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("service", "training") for path in (ROOT / package).rglob("*.py"))

CONTRACT = {
    *("training.spec", "training.records", "training.progress", "training.artifact", "training.storage"),
    *("training.pooling", "training.failure"),
}
# Who may use training beyond the contract and the renderer, and what.
BRIDGES = {
    "service.jobs.run_actor": {"training.ray_run"},
    "service.jobs.launchers": {"training.loop"},
    "service.jobs.tasks": {"training.plan", "training.bases"},
    "service.jobs.preview": {"training.plan", "training.estimate", "training.probe", "training.model_shape"},
}
TORCH_FREE_TRAINING = CONTRACT | {"training.render", "training.plan", "training.estimate", "training.bases"}
TRACKERS = {"wandb", "mlflow", "tensorboard"}
LIGHT = [
    (CONTRACT, {"torch", "ray", "fastapi", "sqlalchemy", "transformers", "datasets"}),
    ({"training.render", "training.plan", "training.bases"}, {"torch"}),
    ({"service.cli", "service.app", "service.api.create_job"}, {"torch", "ray.tune"} | TRACKERS),
    ({"service.serving.replica", "service.serving.fleet", "service.serving.engines"}, {"torch"}),
    ({"service.jobs.run_actor", "service.trackers.chosen"}, TRACKERS),
]
MAX_LINES = 350


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, at top level or inside a function, type-checking blocks included."""
    found: set[str] = set()
    for node in nodes(path):
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
            for node in nodes(path):
                is_environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
                assert not is_environ, f"{path}:{getattr(node, 'lineno', '?')} reads the environment"


def test_every_file_has_a_docstring_and_fits_its_size() -> None:
    for path in SOURCES:
        text = path.read_text()
        is_generated = "migrations/versions" in str(path)
        assert is_generated or text.count("\n") <= MAX_LINES, f"{path} has {text.count(chr(10))} lines"
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


def test_heavy_libraries_wait_until_something_needs_them() -> None:
    """Each row of modules is imported after those above it, and none of its libraries may be there then."""
    code = f"import importlib, sys\nfor modules, libraries in {LIGHT!r}:\n"
    code += "    for module in sorted(modules):\n"
    code += "        importlib.import_module(module)\n"
    code += "        assert not libraries & sys.modules.keys(), (module, libraries & sys.modules.keys())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
