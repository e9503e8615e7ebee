"""Stand-ins for the parts of `torch.cuda` that captures use: they record device, stream and pool.

Work runs on the CPU at once. `Fake.refusal` makes a captured call invalid, as an operation that may
not be captured does: the call raises, and then `capture_end` raises another error. `Fake.syncs`
makes a call synchronize with the host, which only sync_debug_mode "error" notices.
"""

from contextlib import contextmanager

import torch

CAUSE = "operation not permitted when stream is capturing"


class Fake:
    def __init__(self):
        self.device = torch.device("cuda:0")
        self.stream = "main"
        self.mode = 0
        self.capturing = None  # the graph that is being captured
        self.log = []  # (event, device, stream)
        self.pools, self.modes = [], []
        self.refusal = self.syncs = False
        self.handles = 0

    def note(self, event):
        self.log.append((event, str(self.device), self.stream))

    def called(self):
        """To be called by the network: fails as CUDA would."""
        self.note("captured call" if self.capturing else "call")
        if self.syncs and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.refusal and self.capturing:
            self.capturing.invalid = True
            raise RuntimeError(CAUSE)

    @contextmanager
    def use(self, name, value):
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    def install(self, monkeypatch):
        fake = self

        class Stream:
            def __init__(self, name="side"):
                fake.note("new stream")
                self.name = name

            def wait_stream(self, other):
                pass

        class StreamContext:
            """As torch.cuda.stream, which `torch.cuda.graph` also uses by its two methods."""

            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, fake.stream = fake.stream, self.stream.name

            def __exit__(self, *error):
                fake.stream = self.before

        class Event:
            def record(self):
                fake.note("event")

            def synchronize(self):
                pass

        class CUDAGraph:
            invalid = False

            def capture_begin(self, pool=None, capture_error_mode="global"):
                fake.note("begin")
                fake.capturing = self
                fake.pools.append(pool)
                fake.modes.append(capture_error_mode)

            def capture_end(self):
                fake.note("end")
                fake.capturing = None
                if self.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                fake.note("replay")

        def handle():
            fake.handles += 1
            return ("pool", fake.handles)

        patches = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "stream": StreamContext,
            "current_stream": lambda device=None: Stream(fake.stream),
            "device": lambda device: fake.use("device", torch.device(device)),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": handle,
            "get_sync_debug_mode": lambda: fake.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
        }
        for name, value in patches.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return fake
