"""What an attack or a federation costs: arithmetic, seconds, memory, energy.

Arithmetic is counted, not estimated: matrix products and convolutions, a multiply-add as two
operations. What is done element by element is left out, as is usual. Costs are in GFLOP, and in
backprop equivalents: GFLOP over `backprop_gflop` of the same model and batch.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedsec.types import Batch

aten = torch.ops.aten
T = TypeVar("T")


# ---- arithmetic ---------------------------------------------------------------------------------


def _convolution_backward(*args, out_val) -> int:
    """PyTorch's formula, which counts the weight gradient of a grouped convolution `groups` times.

    vmap turns convolutions with one weight for each lane into grouped ones, so that would count a
    step over v lanes up to v times too high.
    """
    *shared, groups, mask = args
    count = flop_registry[aten.convolution_backward]
    inputs = count(*shared, groups, [mask[0], False, False], out_val=out_val)
    weights = count(*shared, groups, [False, mask[1], False], out_val=out_val)
    return inputs + weights // groups


_FORMULAS: dict = {
    **flop_registry,
    aten.convolution_backward: _convolution_backward,
    # products with a vector, which PyTorch counts as nothing
    aten.mv: lambda a, x, out_val: 2 * a.numel(),
    aten.addmv: lambda bias, a, x, out_val, **scales: 2 * a.numel(),
    aten.dot: lambda x, y, out_val: 2 * x.numel(),
    # differences, their squares and sums
    aten._cdist_forward: lambda x, y, p, mode, out_val: 3 * out_val.numel() * x.shape[-1],
}


@functools.cache
def _composite(func: torch._ops.OpOverload) -> bool:
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    return func is not aten.detach.default and known(func.name(), "CompositeImplicitAutograd")


class _Counter(TorchDispatchMode):
    """Adds up operations as they are dispatched, below autograd and vmap.

    PyTorch's FlopCounterMode would do, but for the above, and for the hooks by which it tells
    modules apart: they make torch.autograd.grad with respect to a model's input fail.
    """

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and _composite(func):  # inference mode passes those on whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        return out


def counted(fn: Callable[[], T]) -> tuple[T, float]:
    """What `fn` returns, and the GFLOP of this one call, which is eager.

    Right under torch.func's vmap and grad and through double backward: v lanes count v times one.
    A function compiled by torch.compile hides its products: count its eager twin. Counting slows
    a small model several times, so count one step and multiply.
    """
    with _Counter() as counter:
        made = fn()
    return made, counter.operations / 1e9


def flops(fn: Callable[[], object]) -> float:
    """GFLOP of one call of `fn`: see `counted`."""
    return counted(fn)[1]


_counted: dict[str, float] = {}  # GFLOP, by what was counted


def flops_once(fn: Callable[[], object], model: nn.Module, what: str) -> float:
    """`flops(fn)`; where `what` was counted before of such a model in this process, that.

    Counting a step of a small model costs as much as ten steps. `what` has to say all that decides
    the arithmetic besides the model's architecture, shapes and mode.
    """
    plain = (bool, int, float, str, tuple, type(None))
    parts = [what]
    for name, module in model.named_modules():
        said = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        held = {**module._parameters, **module._buffers}
        shapes = {k: None if t is None else (tuple(t.shape), t.dtype) for k, t in held.items()}
        parts.append(f"{name} {id(type(module))} {said} {shapes}")
    key = "\n".join(parts)
    if key not in _counted:
        _counted[key] = flops(fn)
    return _counted[key]


def backprop_gflop(model: nn.Module, batch: Batch) -> float:
    """GFLOP of one forward and backward pass: all weight gradients, no gradient of the images.

    The unit of a backprop equivalent. The model is not changed.
    """
    weights = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}

    def once() -> None:
        output = functional_call(model, {**weights, **buffers}, (batch.images.detach(),))
        loss = F.cross_entropy(output, batch.targets)
        torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    with torch.enable_grad():
        return flops_once(once, model, f"backprop {tuple(batch.images.shape)}")


def update_gflop(model: nn.Module, count: int, shape: tuple[int, ...]) -> float:
    """`backprop_gflop` of a batch of `count` images, which need not be known for that."""
    like = next(model.parameters())
    images = torch.zeros(max(2, count), *shape).to(like)  # BatchNorm may refuse a single one
    with torch.no_grad():
        classes = model(images).shape[1]
    targets = torch.full((len(images), classes), 1 / classes).to(like)
    return backprop_gflop(model, Batch(images, targets)) * count / len(images)


# ---- seconds, memory, energy --------------------------------------------------------------------


@dataclass
class Clock:
    """Measures the block that it is the context of: `with Clock(device) as clock: ...`.

    Afterwards, also when the block raised: `seconds` of wall time, the device synchronised at both
    ends; `peak_mb`, the most memory (in 1e6 bytes) that the block held above what was held at its
    start, on the GPU for `cuda`, of the whole process for `cpu`; `joules` that the GPU drew, other
    processes and idling included. What could not be measured is None, with the reason in `reasons`
    under its name. Clocks may be nested, not overlapped between threads.
    """

    device: torch.device | str = "cpu"
    seconds: float = float("nan")
    peak_mb: float | None = None
    joules: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Clock:
        device = torch.device(self.device)
        self._memory = _CudaMemory(device) if device.type == "cuda" else _ProcessMemory()
        self._meter, reason = _energy_meter(device)
        if self._meter is None:
            self.reasons["joules"] = reason
        _note_peaks()
        self._held, self._peak = None, 0
        try:
            self._memory.reset()
            self._held = self._memory.held()
        except (OSError, KeyError) as error:
            self.reasons["peak_mb"] = f"no peak memory of this process: {error}"
        _open.append(self)
        _synchronise(device)
        self._joules = self._meter() if self._meter else 0.0
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        try:
            _synchronise(torch.device(self.device))
        finally:
            self.seconds = time.perf_counter() - self._start
            _note_peaks()
            _open.remove(self)
        if self._held is not None:
            self.peak_mb = max(0, self._peak - self._held) / 1e6
        if self._meter:
            self.joules = self._meter() - self._joules


_open: list[Clock] = []  # clocks that are running, outermost first


def _note_peaks() -> None:
    """Tell every running clock the peak so far, before another one resets it or it is over."""
    for clock in _open:
        if clock._held is not None:
            clock._peak = max(clock._peak, clock._memory.peak())


class _ProcessMemory:
    """Resident memory of this process, in bytes; Linux only."""

    root = Path("/proc/self")

    def held(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM")

    def reset(self) -> None:
        _return_free_memory()
        (self.root / "clear_refs").write_text("5")  # peak := now, proc_pid_clear_refs(5)

    def _read(self, name: str) -> int:
        lines = (self.root / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields[name].split()[0]) * 1024


def _return_free_memory() -> None:
    """Give back what the C allocator keeps free: a block that re-uses it would seem to need none.

    Only glibc can; elsewhere the figure is too low after an earlier, larger block.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _CudaMemory:
    """Memory that PyTorch's allocator has handed out on one GPU, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


@functools.cache
def loaded() -> None:
    """Load what torch.func loads when it is first used: 83 MB and a second, once in a process.

    To be called before the clock of an attack that uses it, or the first attack seems to need them.
    """
    grad(torch.sum)(torch.zeros(1))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _energy_meter(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    """Reads the joules drawn by a GPU since its driver was loaded; or None, and why."""
    if device.type != "cuda":
        return None, "energy is measured on NVIDIA GPUs only"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]: an extra
    except ImportError:
        return None, "energy needs nvidia-ml-py: pip install 'fedsec[gpu]'"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # NVML numbers GPUs otherwise
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"NVML gives no energy: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, ""  # from mJ
