"""Samplers, guidance rules and reward fine-tuners as small strategies over diffusers pipelines.

    engine = sampler.load()
    result = engine.generate(["a red apple on a blue background"], steps=20,
                             sampler="ddim", guidance={"name": "cfg", "scale": 3})

Nothing heavy is imported before it is used: `import sampler` takes milliseconds. The public names
and their modules are listed in `__init__.pyi`.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
