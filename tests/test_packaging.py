"""What is shipped: the wheel, its contents, its use from another folder, and the pins."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml by itself")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tracked sources, built without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "sampler", "kernels", "pyproject.toml",
         "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_code_the_model_and_the_licences(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("diffusion_sampler-")
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "sampler",
        "sampler_kernels",
        "diffusion_sampler",
    }
    for folder, package in ((ROOT / "sampler", "sampler"), (ROOT / "kernels", "")):
        for path in folder.rglob("*"):
            inside = (Path(package) / path.relative_to(folder)).as_posix()
            shipped = path.suffix in (".py", ".typed") or path.suffix == ".safetensors"
            if path.is_file() and shipped and "__pycache__" not in path.parts:
                assert inside in names
    assert "sampler/bundled/pipeline/model_index.json" in names
    assert any("LICENSE.noto-emoji" in name for name in names)
    metadata = [name for name in names if name.endswith("entry_points.txt")]
    assert b"sampler = sampler.cli:main" in zipfile.ZipFile(wheel).read(metadata[0])


def test_the_bundled_folder_is_small(wheel):
    infos = zipfile.ZipFile(wheel).infolist()
    size = sum(info.file_size for info in infos if info.filename.startswith("sampler/bundled/"))
    assert size <= 20 * 2**20  # the few-step student may add 6


def test_the_installed_wheel_works_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True, timeout=300)
    code = (
        "import sampler, sampler_kernels, sys; print(sampler.__file__, sampler_kernels.__file__)\n"
        "result = sampler.load().generate('a fox on a red background', steps=2)\n"
        "assert result.images[0].size[0] > 0 and result.nfe == [4]\n"
        "from sampler.cli import main; sys.exit(main(['generate', 'a', '--steps', '1', '-o', 'o']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(target)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[:2] == [
        str(target / "sampler" / "__init__.py"),
        str(target / "sampler_kernels" / "__init__.py"),
    ]
    assert len(list((tmp_path / "o").rglob("*.png"))) == 1


def test_no_import_package_is_called_kernels(wheel):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("kernels/")]


def test_the_source_folder_does_not_shadow_hugging_faces_kernels(tmp_path):
    """From the repository's root, another regular package `kernels` later on the path wins."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    code = (
        f"import sys; sys.path.insert(0, ''); sys.path.append({str(tmp_path)!r})\n"
        "import kernels; assert kernels.WHOSE == 'theirs'\n"
        "import transformers, diffusers, sampler_kernels; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "fine\n", done.stderr[-2000:]


def requirements(*extras):
    found = list(PROJECT["dependencies"])
    for extra in extras:
        found += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in found]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): version
        for name, _, version in (
            line.split("#")[0].strip().partition("==")
            for line in lines
            if line[:1] not in ("#", "")
        )
    }


def test_every_requirement_is_pinned_to_what_fits():
    pinned = constraints()
    for requirement in requirements("dev", "fast", "data"):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_pins_are_plain_and_portable():
    text = (ROOT / "constraints.txt").read_text()
    assert all(re.fullmatch(r"[\w.]+(\.[\w]+)*", version) for version in constraints().values())
    assert "://" not in text and "@" not in text and "+" not in text


def test_floors_are_the_documented_ones():
    floors = {r.name: str(r.specifier) for r in requirements()}
    assert (floors["torch"], floors["transformers"], floors["diffusers"]) == (
        ">=2.10",
        ">=5.3",
        ">=0.38",
    )
    assert "torchvision" not in floors
    wanted = {"triton", "xformers", "fast", "data", "track", "ray", "metrics", "dev"}
    assert wanted <= set(PROJECT["optional-dependencies"])
