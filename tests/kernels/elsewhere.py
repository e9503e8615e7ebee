"""A device that is not there: tensors that say they lie on one, and refuse to be waited for.

They compute on the CPU behind their back. Whatever would make a host wait for a GPU raises: a
number or a bool of a tensor, a copy from or to the CPU that is not asynchronous, shapes that depend
on values. An operation on tensors of both places raises too, as it does on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # the one device besides the CPU that torch knows on any machine
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, dtype=here.dtype, device=DEVICE, strides=here.stride()
        )
        made.here = here
        return made

    def __repr__(self):
        return f"Elsewhere({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        chosen = name == "index" and any(t.dtype == torch.bool for t in _tensors(args[1]))
        if name in WAITS or chosen:
            raise AssertionError(f"{name} waits for the device")
        target = kwargs.get("device", DEVICE)
        leaves = torch.device(target).type == "cpu"
        if name == "copy_" or (name == "_to_copy" and leaves):
            crosses = {isinstance(v, cls) for v in args[:2] if isinstance(v, torch.Tensor)}
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and (name == "_to_copy" or len(crosses) > 1):
                raise AssertionError(f"{name} to or from the CPU waits for the device")
        elif any(type(v) is torch.Tensor and v.ndim for v in _tensors((args, kwargs))):
            raise AssertionError(f"{name} of tensors of two devices")
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map(_here, (args, kwargs))
        out = func(*args, **kwargs)
        if leaves:
            return out
        return args[0] if name == "copy_" else tree_map(_there, out)


class Device(TorchDispatchMode):
    """Inside, what is made for DEVICE is `Elsewhere`; what comes from the CPU must not wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = kwargs.get("device")
        if given is None or torch.device(given) != DEVICE or Elsewhere in types:
            return func(*args, **kwargs)
        moved = [v for v in args if type(v) is torch.Tensor]
        if moved and not kwargs.get("non_blocking"):
            raise AssertionError(f"{func} from the CPU waits for the device")
        return tree_map(_there, func(*args, **{**kwargs, "device": "cpu"}))


def _tensors(tree):
    found = []
    tree_map(lambda v: found.append(v) if isinstance(v, torch.Tensor) else None, tree)
    return found


def _here(value):
    return value.here if isinstance(value, Elsewhere) else value


def _there(value):
    return Elsewhere(value) if type(value) is torch.Tensor else value
