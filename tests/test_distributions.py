"""The two distributions with canonical names: built, installed into a folder, and what they import."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {
    "llama-index-llms-rag-blockcache": ("llama_index.llms.rag_blockcache", "llama_index"),
    "langchain-rag-blockcache": ("langchain_rag_blockcache", "langchain"),
}


def test_all_packages_of_the_library_are_installed():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    [(nested, home)] = given["package-dir"].items()
    installed = {package.replace(nested, home).replace(".", "/") for package in given["packages"]}
    assert installed == {
        file.parent.relative_to(ROOT).as_posix()
        for top in ("rag_blockcache", home)
        for file in (ROOT / top).rglob("__init__.py")
        if "distributions" not in file.parts
    }


@pytest.fixture(scope="module", params=HOMES)
def built(request, tmp_path_factory):
    """Return the name of a distribution, and a folder with its files as pip installs them."""
    folder, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    source = folder / "source"
    subprocess.run(["cp", "-r", str(ROOT / "integrations/distributions" / request.param), source], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return request.param, target


def test_a_distribution_offers_the_classes_of_this_package(built):
    name, target = built
    module, integration = HOMES[name]
    code = (
        f"import {module} as shim, rag_blockcache.integrations.{integration} as ours\n"
        "assert shim.__all__ == ours.__all__, (shim.__all__, ours.__all__)\n"
        "assert all(getattr(shim, each) is getattr(ours, each) for each in shim.__all__)\n"
        "print(shim.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(target))


def test_a_distribution_holds_nothing_that_another_owns(built):
    name, target = built
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    code = {each for each in files if ".dist-info/" not in each}
    folder = HOMES[name][0].replace(".", "/")
    assert code == {f"{folder}/__init__.py", f"{folder}/py.typed"}


@pytest.mark.parametrize("name", HOMES)
def test_a_distribution_needs_this_version_of_this_package(name):
    shim, ours = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for folder in (ROOT / "integrations/distributions" / name, ROOT)
    )
    assert shim["version"] == ours["version"]
    assert shim["requires-python"] == ours["requires-python"]
    [needed] = shim["dependencies"]
    extra = needed.partition("[")[2].partition("]")[0]
    assert extra in ours["optional-dependencies"]
    major, minor, _ = ours["version"].split(".")
    assert needed.endswith(f">={major}.{minor},<{major}.{int(minor) + 1}")
