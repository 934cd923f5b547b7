"""Imports go one way, the package is light to import, and what it promises is there."""

import ast
import graphlib
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trl_crisp

PACKAGE = Path(trl_crisp.__file__).parent
ROOT = PACKAGE.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What a room, or a module beside the rooms, may import of ours at most
MAY_IMPORT = {
    "_upstream": set(),
    "config": {"config_ranges", "prompts"},
    "config_ranges": set(),
    "prompts": set(),
    "loss": {"_upstream"},
    "run": set(),
    # The weights that vLLM gets may be sharded, and only one module knows shards
    "rollouts": {"loss", "teacher.sharding"},
    # What a prompt is, is one rule for rows that are loaded and for rows that a user passes
    "rows": {"prompts"},
    "data": {"rows"},
    "models": {"_upstream", "config", "loss", "prompts", "rows"},
    "teacher": {"_upstream", "config", "models", "run"},
    "trainer": {"_upstream", "config", "loss", "models", "prompts", "publish", "rollouts", "rows", "run", "teacher"},
    "evaluation": {"models", "prompts", "rollouts", "rows", "run"},
    # The trainer is attached to, by one call, and imported by nobody below it
    "health": {"_upstream", "config", "evaluation", "loss", "models", "prompts", "rows", "run"},
    "preflight": {"config", "evaluation", "health", "loss", "models", "prompts", "rows", "run"},
    # It reads results and compares them again; it never samples or grades
    "report": {"evaluation.comparison", "evaluation.metrics", "evaluation.records", "evaluation.results"},
    # The trainer's card and push come from here; it knows no trainer's class
    "publish": {"_upstream", "config", "evaluation", "models", "prompts", "report", "rows", "run"},
    "train": None,
    "cli": None,
}


def imports_of(path: Path, module: str) -> set[str]:
    """Return the full names that a file imports anywhere in it: `from a import b` gives a.b, and a."""
    names = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *([source] if source else [])])
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def our_imports(module: str) -> set[str]:
    """Return the modules of ours that a module imports, without the package's name."""
    names = imports_of(MODULES[module], module)
    ours = {name for name in names if name in MODULES} - {"trl_crisp"}
    # `from trl_crisp import CRISPConfig` imports the module that the name is resolved from
    homes = {f"trl_crisp.{name}": f"trl_crisp.{home}" for name, home in trl_crisp._HOMES.items()}
    ours |= {homes[name] for name in names if name in homes}
    return {name.removeprefix("trl_crisp.") for name in ours} - {module.removeprefix("trl_crisp.")}


def in_part(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def test_every_module_is_in_a_room_that_has_a_rule():
    parts = {module.removeprefix("trl_crisp.").split(".")[0] for module in MODULES if module != "trl_crisp"}
    assert parts == MAY_IMPORT.keys(), "a room without a rule, or a rule without a room"


@pytest.mark.parametrize("part", [part for part, allowed in MAY_IMPORT.items() if allowed is not None])
def test_imports_go_one_way(part):
    allowed = MAY_IMPORT[part]
    assert {f"trl_crisp.{name}" for name in allowed} <= MODULES.keys(), "a rule names a module that does not exist"
    for module in MODULES:
        short = module.removeprefix("trl_crisp.")
        if in_part(short, part):
            others = {name for name in our_imports(module) if not in_part(name, part)}
            # A package's own name comes along with its modules
            packages = {name.rpartition(".")[0] for name in allowed}
            stray = {name for name in others - packages if not any(in_part(name, one) for one in allowed)}
            assert not stray, f"{module} imports {stray}"


def test_nobody_imports_the_command_line():
    for module in MODULES:
        if module not in ("trl_crisp.cli", "trl_crisp.__main__"):
            assert not any(in_part(name, "cli") for name in our_imports(module)), module


def test_nothing_but_training_and_the_command_line_imports_the_trainer():
    users = {m.removeprefix("trl_crisp.") for m in MODULES if "trainer" in our_imports(m)} - {"trl_crisp"}
    assert users <= {"train", "cli", "preflight"}


def test_evaluation_never_imports_the_trainer_not_even_through_others():
    reached = set()
    queue = [m for m in MODULES if in_part(m, "trl_crisp.evaluation")]
    while queue:
        module = queue.pop()
        if module not in reached:
            reached.add(module)
            queue += [f"trl_crisp.{name}" for name in our_imports(module)]
    assert not reached & {"trl_crisp.trainer", "trl_crisp.config", "trl_crisp._upstream"}


def test_evaluation_never_imports_trl():
    for module, path in MODULES.items():
        if in_part(module, "trl_crisp.evaluation"):
            assert not any(in_part(name, "trl") for name in imports_of(path, module)), module


def test_the_report_never_imports_torch():
    for module, path in MODULES.items():
        if in_part(module, "trl_crisp.report"):
            heavy = {name.split(".")[0] for name in imports_of(path, module)} & {
                "torch",
                "transformers",
                "trl",
                "peft",
            }
            assert not heavy, f"{module} imports {heavy}"


def test_there_are_no_cycles():
    graph = {module.removeprefix("trl_crisp."): our_imports(module) for module in MODULES if module != "trl_crisp"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_only_upstream_imports_trls_private_names():
    import trl

    for module, path in MODULES.items():
        for name in imports_of(path, module):
            if module == "trl_crisp._upstream" or not in_part(name, "trl") or name == "trl":
                continue
            parts = name.split(".")
            assert len(parts) == 2, f"{module} imports {name}; take it through _upstream.py"
            assert not parts[1].startswith("_"), f"{module} imports {name}; take it through _upstream.py"
            assert parts[1] in dir(trl), f"{module} imports {name}, which trl does not export"


def test_upstream_imports_what_it_lists():
    from trl_crisp import _upstream

    assert all(hasattr(_upstream, name) for name in _upstream.__all__)
    names = imports_of(MODULES["trl_crisp._upstream"], "trl_crisp._upstream")
    assert {name.rpartition(".")[2] for name in names if name.rpartition(".")[2] in _upstream.__all__} == set(
        _upstream.__all__
    )


def test_the_parser_of_imports_sees_them(tmp_path):
    """The tests above pass on nothing if it is blind."""
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b as c\nfrom . import d\nfrom .e import f\nfrom ..g import h\ndef i():\n    from trl.k import _l\n"
        "importlib.import_module('m')\n"
    )
    assert imports_of(path, "trl_crisp.report.module") == {
        "a.b",
        "trl_crisp.report",
        "trl_crisp.report.d",
        "trl_crisp.report.e",
        "trl_crisp.report.e.f",
        "trl_crisp.g",
        "trl_crisp.g.h",
        "trl.k",
        "trl.k._l",
        "m",
    }
    assert {"config", "_upstream", "teacher"} <= our_imports("trl_crisp.trainer")


@pytest.mark.parametrize("statement", ["import trl_crisp", "import trl_crisp; trl_crisp.__version__; dir(trl_crisp)"])
def test_importing_the_package_is_light(statement):
    code = f"import sys; {statement}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "trl_crisp" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy"}


def test_the_instructions_are_light_too():
    code = "import sys; from trl_crisp import INSTRUCTIONS; print('torch' in sys.modules, len(INSTRUCTIONS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "6"]


def test_every_public_name_resolves():
    for name in trl_crisp.__all__:
        assert getattr(trl_crisp, name) is not None
    assert set(dir(trl_crisp)) == set(trl_crisp.__all__)
    assert set(trl_crisp._HOMES) == set(trl_crisp.__all__) - {"__version__"}
    for name, home in trl_crisp._HOMES.items():
        assert getattr(trl_crisp, name) is getattr(importlib.import_module(f"trl_crisp.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'CRISPTraner'"):
        _ = trl_crisp.CRISPTraner


def test_what_type_checkers_see_is_what_is_resolved():
    [block] = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    seen = {(a.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == {(name, f"trl_crisp.{home}") for name, home in trl_crisp._HOMES.items()}


def test_the_wheel_carries_py_typed_and_every_module(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "trl_crisp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
        else:
            (source / name).touch()
    for folder in ("examples",):  # what a build may take from beside the package
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source)
    [wheel] = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    assert "trl_crisp/py.typed" in carried
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py") if p.parent in packages}
    assert expected <= carried
