"""An engine that costs nothing: a smooth function in the network's place, 16 × 16 images.

Everything above it is real: the loop, the noise, the plan, the writers, the journal.
"""

import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch

from sampler.core.errors import UsageError
from sampler.core.schedule import Schedule
from sampler.engine import Engine
from sampler.pipelines.base import Adapter
from sampler.runs import png
from sampler.runs.jobs import JobSettings, Model
from sampler.runs.location import RunLocation, open_locked
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.settings import RunDefaults, complete_spec
from sampler.runs.start import plan_run, start
from sampler.runs.stop import StopFlag
from sampler.types import Cond
from sampler.workers.execute import execute
from sampler.workers.work import WorkOptions

MODEL = Model("files:" + "5" * 64, label="stub", native=(16, 16))
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.001, "beta_end": 0.02,
            "beta_schedule": "linear", "prediction_type": "epsilon"}  # fmt: skip


class StubAdapter(Adapter):
    """pause: seconds per evaluation. trouble(rows of prompts): raises where a test wants it to."""

    def __init__(self, pause=0.0, trouble=None):
        self.pipe = SimpleNamespace(tokenizer=None, vae=None)
        self.network = torch.nn.Linear(1, 1)
        self.networks = {"main": self.network}
        self.models = ("main",)
        self.schedule = Schedule.from_config(SCHEDULE, "DDIMScheduler")
        self.pause, self.trouble = pause, trouble
        self.encoded = 0
        self.batches = []

    device = torch.device("cpu")
    dtype = torch.float32

    def size(self, height, width):
        return height or 16, width or 16

    def latent_shape(self, height, width):
        return (3, height, width)

    def encode(self, prompts, negative, guided, size):
        self.encoded += len(prompts)
        cond = torch.tensor([[sum(map(ord, p)) % 97 / 97.0] for p in prompts])
        uncond = torch.tensor([[len(n) / 10.0] for n in negative])
        self.last = list(prompts)
        return Cond({"c": cond}, {"c": uncond} if guided else None)

    def forward(self, x, level, cond, model):
        self.batches.append(x.shape[0])
        if self.pause:
            time.sleep(self.pause)
        if self.trouble is not None:
            self.trouble(self, x, cond)
        return torch.tanh(x + cond["c"][:, :, None, None])

    def decode(self, latents):
        return (latents / 4 + 0.5).clamp(0, 1)


def engine(**options):
    adapter = StubAdapter(**options)
    return Engine(adapter, adapter, "ddim", {"name": "cfg", "scale": 3.0})


def defaults(steps=3, **changes):
    settings = JobSettings(steps, None, None, complete_spec("sampler", "ddim"),
                        complete_spec("guidance", {"name": "cfg", "scale": 3.0}))  # fmt: skip
    return RunDefaults(settings, **changes)


def prompts(count):
    return [RawLine(f"test:{k + 1}", {"prompt": f"picture {k}"}) for k in range(count)]


def planned(store, table, batch_size=4, steps=3, output=None, model=MODEL, **options):
    """Plan lines, given as RawLine or (where, cells), into a store."""
    planner = Planner(model, defaults(steps), batch_size, **options)
    return start(store, plan_run(planner, (RawLine(*line) for line in table), output))


def make(where, table, made_by=None, location=None, work_options=None, stop=None, on_written=None,
         **options):  # fmt: skip
    """Plan and complete a run in this process. Returns (run, tally)."""
    with open_locked(location or RunLocation(str(where))) as store:
        run = planned(store, table, **options)
        arguments = [on_written] if on_written else []
        tally = execute(run, lambda: made_by or engine(), location or RunLocation(str(where)),
                        work_options or WorkOptions(), stop or StopFlag(), *arguments)  # fmt: skip
    return run, tally


def is_intact(data):
    """Every chunk of a PNG is complete with a valid checksum, and its pixels decode."""
    if not data.startswith(png.SIGNATURE):
        return False
    position, kind = len(png.SIGNATURE), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            return False
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        position = end
    try:
        png.decode(data)
    except UsageError:
        return False
    return True


def pictures(where):
    """{name: bytes} of the images of a run."""
    root = Path(where) / "images"
    return {path.name: path.read_bytes() for path in sorted(root.rglob("*.png"))}


def contents(where):
    """{name: (pixels, texts)} of the images of a run, for those that were made in other processes.

    isal once compressed equal pixels to other bytes there, as deflate allows.
    """
    found = {name: png.decode(data) for name, data in pictures(where).items()}
    return {name: (pixels.tobytes(), texts) for name, (pixels, texts) in found.items()}
