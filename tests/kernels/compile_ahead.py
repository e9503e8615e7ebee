"""Compiles what the strategies launch, for GPUs that are not there; prints a JSON line for each.

Run without TRITON_INTERPRET: `python -m tests.kernels.compile_ahead`. The kernels' launchers are
replaced: instead of running, every new combination of program and types is compiled for each
architecture, with the argument properties that Triton would find, and its PTX is looked into.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from sampler_kernels import Lin, selection, settle, triton_kernels, triton_ops, use_backend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from sampler import registry
from sampler.core.benchmark import APG
from tests.kernels.canary import engine, flow_levels, vp_levels
from tests.laws.world import FLOW_ONLY

ARCHITECTURES = (80, 90)
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Compiler:
    """Takes the place of a kernel's launcher."""

    compiles = True  # else only `seen` grows

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, set()

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps, enable_fp_fusion, **constants):
        names = self.kernel.arg_names
        types, fixed, hints = {}, {(names.index(k),): v for k, v in constants.items()}, {}
        for i, value in enumerate(args):
            parameter = self.kernel.params[i]
            generic = parameter.do_not_specialize
            aligned = not (generic or parameter.do_not_specialize_on_alignment)
            types[names[i]] = described(value, (i,), fixed, hints, generic, aligned)
        types.update({name: "constexpr" for name in constants})
        key = repr((types, fixed, hints))
        if key in self.seen:
            return
        self.seen.add(key)
        if not self.compiles:
            return
        source = ASTSource(self.kernel, types, fixed, hints)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        for arch in ARCHITECTURES:
            done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            print(json.dumps({**self.facts(args, constants), **read(done.asm["ptx"], arch)}))

    def facts(self, args, constants):
        latents = self.kernel is not triton_kernels.scalar_kernel
        return {
            "kernel": self.kernel.__name__,
            "inputs": [str(t.dtype) for t in args[0]],
            "outputs": [str(t.dtype) for t in args[1]] if latents else [],
            "code": constants["CODE"],
            "pairs": constants.get("P", 0),
        }


def described(value, path, fixed, hints, generic=False, aligned=True):
    """The type of an argument as Triton names it; notes constants and divisibility by 16."""
    if isinstance(value, tuple):
        rest = (fixed, hints, generic, aligned)
        return tuple(described(v, (*path, k), *rest) for k, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1 and not generic):
        fixed[path] = value
        return "constexpr"
    number = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if not isinstance(value, float) and aligned and number % 16 == 0:
        hints[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


def read(ptx, arch):
    """Facts of a PTX text: widths of memory accesses, roundings, spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = f"-arch={sm_arch_from_capability(arch)}"
        command = [get_ptxas(arch).path, "-v", target, path, "-o", Path(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return {
        "arch": arch,
        "loads": re.findall(r"\bld\.global\S*", ptx),
        "stores": re.findall(r"\bst\.global\S*", ptx),
        "roundings": sorted(set(re.findall(r"\b(?:cvt|div|sqrt)\.\S*f32\S*", ptx))),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "spilled": sum(spills),
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
    }


def step_through(rule, method, dtype, rows=2):
    flow = rule == "cfg_zero" or getattr(method, "name", method) in FLOW_ONLY
    grid = (flow_levels if flow else vp_levels)(3)
    model, cond = engine(dtype, "velocity" if flow else "v", rows)
    snap, levels = model.start(torch.zeros(rows, 4, 64, 64), grid, cond, method, rule)
    while snap.index < len(levels) - 1:
        snap = next(model.steps(snap, levels, cond, method, rule))


def programs(rows):
    """The programs, specialized as Triton would, that some strategies launch for a batch size."""
    Compiler.compiles = False
    compilers = install()
    for rule, method in (("cfg", "ddim"), (APG, "ghvb"), ("adaptive", "ddim"), ("cfg", "ab")):
        step_through(rule, method, torch.bfloat16, rows)
    return sorted(key for compiler in compilers for key in compiler.seen)


def install():
    found = []
    for name in ("formula", "gram", "scalar"):
        found.append(Compiler(getattr(triton_kernels, f"{name}_kernel")))
        setattr(triton_ops, f"_{name}", found[-1])
    return found


def main():
    selection.works = lambda device: True
    triton_ops.new = lambda shape, dtype, device: torch.ones(tuple(shape), dtype=dtype)
    triton_ops.new_like = lambda x, dtype, n: [torch.ones_like(x, dtype=dtype) for _ in range(n)]
    install()
    with torch.no_grad(), use_backend("triton"):
        for method in registry.names("sampler"):
            if method not in {"reddiff", "daps", "admm", "difface"}:
                step_through("cfg", method, torch.bfloat16)
        for rule in (APG, "adaptive", "cfg_zero", {"name": "cfg", "rescale": 0.7}):
            step_through(rule, "ddim", torch.bfloat16)
        step_through(APG, "ghvb", torch.float16)
        x = torch.ones(2, 4096)
        for dtype in (torch.float16, torch.bfloat16):
            (Lin.of(x.to(dtype)) * 2.0 - Lin.of(x) / 3.0).tensor(dtype)
        settle(Lin.of(x[:, :777]) - Lin.of(x[:, 1:778]) * 2.0)
        for rows in (1, 2, 16):
            print(json.dumps({"rows": rows, "programs": programs(rows)}))


if __name__ == "__main__":
    main()
