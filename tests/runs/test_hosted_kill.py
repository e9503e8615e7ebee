"""A run folder of inpaintings and ControlNet images survives kills like any other."""

import csv
import os
import signal

import pytest

from sampler.cli import main
from tests import tiny
from tests.guidance.stock_hosted import half_mask, picture, save_controlnet
from tests.runs.test_kill import in_child, state_of

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 12  # of each kind


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model, a ControlNet, and a table of both kinds of images."""
    root = tmp_path_factory.mktemp("project")
    tiny.sd().save_pretrained(root / "sd")
    save_controlnet(root / "canny")
    half_mask().save(root / "mask.png")
    names = ("input.control_image", "input.image", "input.mask_image")
    with open(root / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "seed", *names])
        for k in range(COUNT):
            picture(k).save(root / f"{k}.png")
            own = root / f"{k}.png"
            table.writerow([f"a fox {k}", k, own, "", ""])
            table.writerow([f"a fox {k}", k, own, own, root / "mask.png"])
    return root


def generate(project, where):
    line = ["generate", "--prompts", project / "table.csv", "--model", project / "sd", "-q"]
    line += ["--controlnet", project / "canny", "--steps", 1, "--device", "cpu", "-o", where]
    return main([*map(str, line)])


def killed_at_rename(action, number):
    """Run `action` in a fork that dies before its rename `number`; True if it died there."""

    def child():
        left, real = [number], os.replace

        def replace(*paths):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*paths)

        os.replace = replace
        action()

    return os.waitpid(in_child(child), 0)[1] == signal.SIGKILL


def test_killed_three_times_it_is_as_if_never_killed(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(project, tmp_path / "whole") == 0
    whole, _ = state_of(tmp_path / "whole")
    assert len(whole) == 2 * COUNT and len(set(whole.values())) == 2 * COUNT
    where = tmp_path / "killed"
    for number in (2, 9, 8):  # the first ones are those of the plan
        assert killed_at_rename(lambda: generate(project, where), number)
    assert 0 < len(list((where / "images").iterdir())) < 2 * COUNT
    assert generate(project, where) == 0
    images, recorded = state_of(where)
    assert images == whole and all(count == 1 for key, count in recorded.items() if key)
    assert not [path for path in where.rglob("*") if path.name.startswith(".tmp")]
