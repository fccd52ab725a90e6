"""A GPU that is only pretended: its tensors say that they are elsewhere, lie on the CPU, and refuse to be mixed with the CPU's.

So a machine without a GPU finds what would fail on one: a word vector that stayed behind, a generator of the wrong device, an
array that is read without fetching it. How fast anything is, and whether kernels agree, only a real one can tell."""
from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
READS = (aten._local_scalar_dense.default, aten.equal.default)      # what they give back is no tensor
PUT = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
INDEX = (aten.index.Tensor, *PUT)                                   # these take numbers of rows from the CPU, too


class There(torch.Tensor):
    "A tensor on the pretended device; `here` is where its numbers are."
    @staticmethod
    def __new__(cls, here):
        shape = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=torch.device(NAME, 0), **shape)

    def __init__(self, here): self.here = here
    def __repr__(self, *args, **kwargs): return f"There({self.here})"
    def __format__(self, spec): return format(self.item(), spec) if self.ndim == 0 else repr(self)
    def tolist(self): return self.detach().cpu().tolist()
    def numpy(self, *args, **kwargs): raise TypeError(f"a tensor on {self.device} is no array: fetch it first, with .cpu()")
    __array__ = numpy

    def __deepcopy__(self, memo):
        copy = There(self.here.clone())
        if isinstance(self, torch.nn.Parameter): copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy.requires_grad_(self.requires_grad))

    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})


def here(x):
    if isinstance(x, There): return x.here
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def there(x): return There(x) if isinstance(x, torch.Tensor) and not isinstance(x, There) else x


def run(op, args, kwargs):
    "An operation on the CPU, if all its tensors are on one device; its results are there, or where they are asked for."
    tensors, to = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)], kwargs.get("device")
    ours = any(isinstance(t, There) for t in tensors)
    arrives = ours if to is None else torch.device(to).type == NAME
    if not ours and not arrives: return op(*args, **kwargs)
    compute = lambda: op(*tree_map(here, args), **tree_map(here, kwargs))
    if op in MOVES:
        out = compute()
        return args[0] if op is aten.copy_.default else there(out) if arrives else out
    checked = [args[0], *args[2:3]] if op in INDEX else tensors if ours else []
    if any(isinstance(t, torch.Tensor) and t.dim() and not isinstance(t, There) for t in checked):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found {NAME}:0 and cpu")
    if (g := kwargs.get("generator")) is not None: raise RuntimeError(f"{op}: a generator on {g.device} cannot draw there")
    out = compute()
    return out if op in READS or not arrives else return_and_correct_aliasing(op, args, kwargs, tree_map(there, out))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})


def setup() -> str:
    "Make the device known to torch, once; why that is not possible, else nothing."
    register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is None: return f"torch {torch.__version__} knows no backends in Python"
    if hasattr(torch, NAME): return ""
    class Backend(backend_registration._DummyBackendModule):
        is_initialized = is_available = lambda self: True
        _is_in_bad_fork = lambda self: False
        current_device, device_count = lambda self: 0, lambda self: 1
        manual_seed = manual_seed_all = synchronize = set_device = empty_cache = lambda self, *args: None
        get_amp_supported_dtype = lambda self: [torch.bfloat16]
    register(NAME, Backend())
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)
    setup.kept = library                                          # its rules end with it
    return ""


@contextmanager
def pretended():
    "Within, the device `pretend:0` works."
    future = torch.__future__
    before, lifted = future.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    future.set_overwrite_module_params_on_conversion(True)       # `module.to` makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Mode(): yield torch.device(NAME, 0)
    finally:
        future.set_overwrite_module_params_on_conversion(before)
        torch._C._set_only_lift_cpu_tensors(lifted)
