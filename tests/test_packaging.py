"""The sdist and the wheel built from it, what they hold and need; and how setup.py decides about CUDA."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
from native_build import load_setup, needed, outside_the_stable_abi

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Built:
    sdist: Path
    wheel: Path

    @property
    def sdist_names(self) -> set[str]:
        """Files of the sdist, without its top folder."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if member.isfile()}

    @property
    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def dist_info(self, name: str) -> str:
        with zipfile.ZipFile(self.wheel) as archive:
            (path,) = [entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
            return archive.read(path).decode()


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what steers the build or the import, and with the changes."""
    steering = ("PYFAST_", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)} | changes


def run(command: list[str | Path], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)


def git_files() -> list[str]:
    """What a commit of the working tree would hold."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in git_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel made from the sdist alone."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
    done = run(command, env=environment(PYFAST_CUDA="0"), cwd=out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip put the wheel, with nothing else in it."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*pip, "--no-index", "--no-deps", "--target", folder, built.wheel])
    assert done.returncode == 0, done.stderr
    return folder


def test_sdist_holds_every_source(built: Built) -> None:
    names = built.sdist_names
    wanted = {name for name in git_files() if name.startswith(("csrc/", "pyfast/", "triton_kernels/", "tests/"))}
    assert any(name.endswith(".cuh") for name in wanted) and any(name.endswith(".h") for name in wanted)
    assert wanted | {"setup.py", "pyproject.toml", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = built.wheel_names
    assert {re.sub(r"-.*\.dist-info$", ".dist-info", name.split("/")[0]) for name in names} == {
        "pyfast",
        "pyfast_kernels.dist-info",
    }
    python = {name for name in git_files() if name.endswith(".py")}
    wanted = {name for name in python if name.startswith("pyfast/")}
    wanted |= {f"pyfast/{name}" for name in python if name.startswith("triton_kernels/")}
    assert {name for name in names if name.endswith(".py")} == wanted
    native = {name for name in names if name.endswith(".so")}
    assert len(native) == 2 and "pyfast/_C.abi3.so" in native
    assert [name for name in native if re.fullmatch(r"pyfast/_host\.cpython-\d+-[\w-]+\.so", name)]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh", ".o"))]


def test_wheel_says_what_it_is(built: Built) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{python}-{python}-linux_"  # not abi3: _host is built for one Python
    assert f"-{tag}" in built.wheel.name
    assert f"\nTag: {tag}" in built.dist_info("WHEEL")
    assert "\nRoot-Is-Purelib: false" in built.dist_info("WHEEL")
    entries = configparser.ConfigParser()
    entries.read_string(built.dist_info("entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"pyfast": "pyfast.cli:main"}
    metadata = built.dist_info("METADATA")
    assert "\nName: pyfast-kernels\n" in metadata and "\nRequires-Python: >=3.10\n" in metadata
    assert "\nRequires-Dist: torch>=2.11\n" in metadata


SMOKE = """
import pathlib, sys
import numpy, torch
import pyfast, pyfast._C, pyfast._host, pyfast.triton_kernels
from pyfast import backends

here = pathlib.Path(sys.argv[1])
for module in (pyfast, pyfast._C, pyfast._host, pyfast.triton_kernels):
    assert here in pathlib.Path(module.__file__).parents, module
assert backends.build_info()["version"] == pyfast.__version__
weight = torch.randn(40, 96)
weight[:, ::2] = 0
packed = pyfast.Sparse24Weight.from_dense(weight)
assert torch.equal(packed.to_dense(), weight)
x = torch.randn(3, 96)
torch.testing.assert_close(pyfast.sparse_linear(x, packed), x @ weight.T)
loss = pyfast.distillation_loss(x, x + 1, backend="native")
rows, _ = pyfast._host.distill_kl(x.numpy(), (x * 2).numpy())
assert abs(float(loss)) < 1e-6 and rows.shape == (3,) and (rows > 0).all()
print("works", backends.active_isa())
"""


def test_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", SMOKE, installed], cwd=tmp_path, env=environment(PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("works ")
    command = run([installed / "bin" / "pyfast", "--version"], cwd=tmp_path, env=environment(PYTHONPATH=str(installed)))
    assert command.returncode == 0, command.stderr
    assert re.fullmatch(r"pyfast \d+\.\d+\.\d+\S*\n", command.stdout)


def test_triton_kernels_refuses_to_be_a_top_level_module(installed: Path) -> None:
    assert not (installed / "triton_kernels").exists()
    done = run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, env=environment())
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "pyfast.triton_kernels" in last


def test_native_modules_need_only_stable_interfaces(installed: Path) -> None:
    assert outside_the_stable_abi(needed(installed / "pyfast" / "_C.abi3.so")) == set()
    (host,) = (installed / "pyfast").glob("_host*.so")
    assert {symbol for symbol in needed(host) if not re.fullmatch(r"_?Py\w+", symbol)} == set()


@pytest.fixture
def setup_py(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_setup(tree, monkeypatch)


def test_the_host_module_takes_the_objects_that_are_up_to_date(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels that pyfast._C has compiled; one that is older than its source is compiled again."""
    torch_side, host = setup_py.cpu_extensions()
    kernels = setup_py.cpu_kernels()
    assert host.sources == ["csrc/host.cpp", *kernels] and set(kernels) < set(torch_side.sources)
    command = setup_py.BuildNative(setuptools.Distribution({"name": "pyfast-kernels"}))
    command.build_temp = str(tmp_path)
    for source in kernels[1:]:
        compiled = (tmp_path / source).with_suffix(".o")
        compiled.parent.mkdir(parents=True, exist_ok=True)
        compiled.touch()
    old, *fresh = kernels[1:]
    os.utime((tmp_path / old).with_suffix(".o"), (0, 0))
    built = []
    monkeypatch.setattr(setup_py.BuildExtension, "build_extension", lambda self, extension: built.append(extension))
    command.build_extension(torch_side)
    command.build_extension(host)
    assert built == [torch_side, host] and not torch_side.extra_objects
    assert host.sources == ["csrc/host.cpp", kernels[0], old]
    assert host.extra_objects == [str((tmp_path / source).with_suffix(".o")) for source in fresh]


def test_pyfast_cuda_takes_0_or_1(tree: Path) -> None:
    done = run([sys.executable, "setup.py", "--name"], cwd=tree, env=environment(PYFAST_CUDA="maybe"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "PYFAST_CUDA: got 'maybe', accepted: 0 or 1"


def test_cuda_wanted_without_nvcc_fails(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_py.Path, "exists", lambda path: False)  # /usr/local/cuda too
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PYFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"PYFAST_CUDA=1, but there is no nvcc.*CUDA_HOME"):
        setup_py.cuda_extensions()
    monkeypatch.delenv("PYFAST_CUDA")
    monkeypatch.setattr(setup_py.torch.version, "cuda", "13.0")
    assert setup_py.cuda_extensions() == []  # not asked for: left out


def test_cuda_is_built_where_it_can_be(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py.find_cuda_home() == home
    monkeypatch.setattr(setup_py.torch.version, "cuda", None)
    assert setup_py.cuda_extensions() == []  # a CPU build of torch
    monkeypatch.setenv("PYFAST_CUDA", "1")
    (extension,) = setup_py.cuda_extensions()
    assert extension.name == "pyfast._cuda"
    assert {Path(name).name for name in extension.sources} == {
        path.name for pattern in ("*.cu", "*.cpp") for path in (ROOT / "csrc" / "cuda").glob(pattern)
    }
    monkeypatch.delenv("PYFAST_CUDA")
    monkeypatch.setattr(setup_py.torch.version, "cuda", "13.0")
    assert len(setup_py.cuda_extensions()) == 1
    monkeypatch.setenv("PYFAST_CUDA", "0")
    assert setup_py.cuda_extensions() == []


def test_a_folder_with_nvcc_alone_is_no_toolkit(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert setup_py.shutil.which("nvcc") == str(wrapper)
    assert setup_py.find_cuda_home() != tmp_path


def test_architectures(setup_py: ModuleType) -> None:
    assert setup_py.gencode_flags("8.0 9.0a;12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    default = setup_py.gencode_flags(setup_py.DEFAULT_CUDA_ARCHS)
    assert [flag.partition("code=")[2].partition("code=")[2] for flag in default] == [
        *("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        "compute_120",
    ]


@pytest.mark.parametrize("wrong", ["90", "sm_90", "Hopper", "9.0+ptx", "8.0 nine", "9.0,8.0"])
def test_wrong_architectures_are_refused(setup_py: ModuleType, wrong: str) -> None:
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: got .*accepted: numbers such as 9\.0"):
        setup_py.gencode_flags(wrong)
