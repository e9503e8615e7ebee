"""Contents of the distribution: the wheel, its use from another folder, and the pins."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
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
    assert b"sampler = sampler.cli.entry:main" in zipfile.ZipFile(wheel).read(metadata[0])


def test_the_bundled_folder_is_small(wheel):
    infos = zipfile.ZipFile(wheel).infolist()
    size = sum(info.file_size for info in infos if info.filename.startswith("sampler/bundled/"))
    assert size <= 32 * 2**20  # 14, and 6 for each of the two students and the small SD3


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(folder), str(wheel)], check=True, timeout=300)
    return folder


BLOCKER = """
import sys


class Absent:
    \"\"\"Import packages of distributions that a plain installation would not have.\"\"\"

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
import importlib.util

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in {absent!r} else real(name, package)
)
"""
EXTRAS = {
    "triton": "triton",
    "xformers": "xformers",
    "isal": "fast",
    "pyarrow": "data",
    "tensorboard": "track",
    "trackio": "track",
    "ray": "ray",
    "gradio": "ui",
    "mkdocs": "docs",
    "matplotlib": "dev",
}


def core():
    """Our distribution and all that it requires without extras, transitively, as installed here."""
    found, left = set(), ["diffusion-sampler"]
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        needed = [
            r for r in map(Requirement, wanted) if not r.marker or r.marker.evaluate({"extra": ""})
        ]
        left += [requirement.name for requirement in needed]
    return found


@pytest.fixture(scope="module")
def plain(target, tmp_path_factory):
    """Runs Python with the wheel, and without what only extras bring."""
    blocker = tmp_path_factory.mktemp("blocker")
    needed = core()
    absent = {
        package
        for package, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & needed
    }
    absent |= {*EXTRAS} - {canonicalize_name(name) for name in needed}
    (blocker / "sitecustomize.py").write_text(BLOCKER.format(absent=absent))
    path = os.pathsep.join(map(str, (blocker, target)))

    def run(code, folder):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    return run


def test_the_plain_installation_generates_guides_and_fine_tunes(plain, target, tmp_path):
    """The wheel, from another folder."""
    code = (
        """
import sys, torch, sampler, sampler_kernels
from diffusers import StableDiffusionPipeline
from sampler.bundled import FOLDER
from sampler.cli import main

print(sampler.__file__, sampler_kernels.__file__)
result = sampler.load().generate("a fox on a red background", steps=2)
assert result.images[0].size[0] > 0 and result.nfe == [4]
assert main(["generate", "a fox", "--steps", "2", "-q", "-o", "out"]) == 0
for kind in ("samplers", "guidance", "rewards", "trainers", "schedulers"):
    assert main(["list", kind, "--json"]) == 0
for command in ("verify out", "gallery out", "export out --to csv", "doctor"):
    assert main(command.split()) == 0, command
pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "pipeline", dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = sampler.scheduler("ghvb", pipe.scheduler)
with sampler.guide(pipe, {"name": "apg", "scale": 7.5}):
    assert pipe("a fox", num_inference_steps=2).images[0].size == (64, 64)
fit = ["--set", "fit.batch=1", "--set", "fit.steps=2", "--updates", "1"]
assert main(["finetune", "--reward", "brightness", "--prompts", "p.txt", "-o", "fit", *fit]) == 0
extras = """
        + repr([*EXTRAS])
        + """
assert not [name for name in extras if name in sys.modules], "an extra was imported"
"""
    )
    (tmp_path / "p.txt").write_text("a fox\n")
    done = plain(code, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.split()[:2] == [
        str(target / "sampler" / "__init__.py"),
        str(target / "sampler_kernels" / "__init__.py"),
    ]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
    assert (tmp_path / "fit" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 2


def test_what_needs_an_extra_names_it_in_one_sentence(plain, tmp_path):
    code = """
import json, os, warnings
import torch, sampler, sampler_kernels
from sampler.cli import main

assert main(["generate", "a fox", "--steps", "1", "-q", "-o", "out"]) == 0
tune = "finetune --reward brightness --prompts p.txt -o fit --set fit.batch=1 --set fit.log_with="
for line in (
    "generate --prompts p.parquet -o x",
    "export out --to parquet",
    "generate a --steps 1 --executor ray -o y",
    tune + "tensorboard",
    tune + "trackio",
    "ui",
    "calibrate momentum --prompts p.txt -o m.json --plot m.png",
):
    print("code", main(line.split()), flush=True)
try:
    sampler.load(attention="xformers")
except sampler.SamplerError as error:
    print("xformers", error)
x = torch.ones(1, 4)
with warnings.catch_warnings(record=True) as told, sampler_kernels.use_backend("triton"):
    warnings.simplefilter("always")
    assert torch.equal(sampler_kernels.settle(2 * sampler_kernels.Lin.of(x)), 2 * x)
print("triton", *(w.message for w in told))
"""
    (tmp_path / "p.txt").write_text("a fox\n")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    done = plain(code, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    out = done.stdout.splitlines()
    assert [line for line in out if line.startswith("code")] == ["code 2"] * 7
    errors = [line for line in done.stderr.splitlines() if line.startswith("sampler: ")]
    named = ["[data]", "[data]", "[ray]", "[track]", "[track]", "[ui]", "matplotlib"]
    assert len(errors) == len(named), done.stderr
    assert all(name in line for name, line in zip(named, errors, strict=True)), errors
    assert "Traceback" not in done.stderr and not (tmp_path / "m.json").exists()
    assert "xformers" in out[-2] and "'native'" in out[-2]  # refused for the CPU before the import
    assert "[triton]" in out[-1] and "plain torch computes instead" in out[-1]


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
        ">=5.6",
        ">=0.41",
    )
    assert "torchvision" not in floors
    wanted = {"triton", "xformers", "fast", "data", "track", "ray", "ui", "docs", "dev"}
    assert wanted <= set(PROJECT["optional-dependencies"])
