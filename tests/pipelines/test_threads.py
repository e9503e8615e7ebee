"""One engine in several threads: tokenizers, VAEs and offloading hooks are used one at a time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

import sampler
from sampler.core.locks import exclusive
from tests import tiny

TEXTS = ["a fox on a green background", "a red apple", "a frog", "a dog on a red background"]


class Overlaps:
    """Wraps a function and counts the calls that begin while another one runs."""

    def __init__(self, function):
        self.function, self.running, self.count = function, 0, 0

    def __call__(self, *args, **kwargs):
        self.running += 1
        self.count += self.running > 1
        time.sleep(0.005)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.running -= 1


def in_threads(function, repeats=4):
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, list(range(4)) * repeats))


def test_embeddings_keep_their_padding():
    """The padding of a fast tokenizer is state of the tokenizer: tokenizers #537."""
    adapter = sampler.load().pipeline
    size = adapter.size(None, None)

    def encoded(i):
        with torch.no_grad():
            return adapter.encode([TEXTS[i]], [""], True, size)

    expected = [encoded(i) for i in range(4)]
    for number, cond in enumerate(in_threads(encoded, 40)):
        for branch in ("cond", "uncond"):
            a, b = (
                getattr(c, branch)["encoder_hidden_states"] for c in (cond, expected[number % 4])
            )
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl, tiny.flux])
def test_one_thread_at_a_time_uses_tokenizers_and_vae(build, monkeypatch):
    pipe = build()
    encoding, decoding = Overlaps(pipe.encode_prompt), Overlaps(pipe.vae.decode)
    monkeypatch.setattr(pipe, "encode_prompt", encoding)
    monkeypatch.setattr(pipe.vae, "decode", decoding)
    engines = [sampler.load(pipe), sampler.load(pipe)]  # they share the components

    def images(i):
        settings = {"seeds": i, "steps": 2, "output": "tensor", "height": 32, "width": 32}
        return engines[i % 2].generate(TEXTS[i], **settings).images

    expected = [images(i) for i in range(4)]
    found = in_threads(images, 2)
    assert encoding.count == decoding.count == 0
    for number, image in enumerate(found):
        assert torch.allclose(image, expected[number % 4], atol=1e-4)


def test_offloaded_pipelines_run_one_batch_at_a_time():
    """A part that is moved for one thread is moved away from under another one."""
    pipe = tiny.sd()
    pipe.enable_model_cpu_offload(device="cpu")
    engine = sampler.load(pipe)
    adapter, order, task = engine.pipeline, [], threading.local()
    predict, decode = adapter.forward, adapter.decode

    def forward(*args):
        order.append(task.number)
        time.sleep(0.002)
        return predict(*args)

    def decoded(x):
        order.append(task.number)
        return decode(x)

    def images(i):
        task.number = i
        engine.generate(TEXTS[i], seeds=i, steps=3)

    adapter.forward, adapter.decode = forward, decoded
    in_threads(images, 1)
    assert len(order) == 16 and sum(a != b for a, b in pairwise(order)) == 3


def test_locks_are_of_the_object_and_can_be_taken_again():
    class Part:
        pass

    one, other = Part(), Part()
    taken = []

    def take(part):
        with exclusive(part):
            taken.append(part)

    with exclusive(one, None, one), exclusive(one):
        waiting = threading.Thread(target=take, args=(one,))
        free = threading.Thread(target=take, args=(other,))
        waiting.start()
        free.start()
        free.join(60)
        assert taken == [other]
    waiting.join(60)
    assert taken == [other, one]
