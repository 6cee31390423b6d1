"""What a client does behind one reply, seen through PyTorch's own hooks: no line of it changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fedsec.audit.structure import Structure, of_module

if TYPE_CHECKING:
    from torch import Tensor, nn


class Watch:
    """Steps and batch sizes of one client's training; the network's structure, once.

    With `keep` it also holds on to what an attack is measured against: the network as it was
    before the first step, and the batches with their labels.
    """

    def __init__(self, structure: Structure | None = None, keep: bool = False):
        self.structure, self.keep = structure, keep
        self.model: nn.Module | None = None
        self.before: nn.Module | None = None
        self.batches: list[int] = []
        self.inputs: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.steps, self.lr, self.optimiser = 0, None, ""
        self.called: list[nn.Module] = []

    @contextmanager
    def __call__(self) -> Iterator[Watch]:
        """Watches what happens within, where PyTorch is loaded."""
        if "torch" not in sys.modules:
            yield self
            return
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        with ExitStack() as stack:
            self.looking = register_module_forward_pre_hook(self._first)
            stepping = register_optimizer_step_post_hook(self._stepped)
            stack.callback(stepping.remove)
            stack.callback(lambda: self.looking.remove())
            if self.keep:
                stack.enter_context(self._labels_heard())
            self.stack = stack
            yield self

    def _first(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Every module's call, until the network is found and its first pass is over."""
        import torch

        if self.model is not None:
            self.called.append(module)
            return
        trains = module.training and torch.is_grad_enabled()
        if not trains or next(module.parameters(), None) is None:
            return
        self.model = module
        if self.keep:
            from copy import deepcopy

            self.before = deepcopy(module)
        self.called.append(module)
        self._counted(module, inputs)  # its own hooks of this very call are chosen by now
        counting = module.register_forward_pre_hook(self._counted)
        self.stack.callback(counting.remove)
        if self.structure is None:
            done = module.register_forward_hook(self._passed)
            self.stack.callback(done.remove)
        else:
            self.looking.remove()

    def _counted(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        import torch

        if not (module.training and torch.is_grad_enabled()):
            return
        batch = next((each for each in inputs if isinstance(each, torch.Tensor)), None)
        if batch is not None and batch.ndim:
            self.batches.append(len(batch))
            if self.keep:
                self.inputs.append(batch.detach().clone())

    def _passed(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """The end of the first pass: who was called in which order is known."""
        self.looking.remove()
        if self.structure is None:
            names = {id(each): name for name, each in module.named_modules()}
            called = [names[id(each)] for each in self.called if id(each) in names]
            self.structure = of_module(module, called)

    def _stepped(self, optimiser: Any, arguments: Any, keywords: Any) -> None:
        self.steps += 1
        self.optimiser = type(optimiser).__name__
        rate = optimiser.param_groups[0].get("lr")
        self.lr = float(rate) if rate is not None else None

    @contextmanager
    def _labels_heard(self) -> Iterator[None]:
        import torch.nn.functional as F

        plain = F.cross_entropy

        def heard(input: Tensor, target: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            self.labels.append(target.detach().clone())
            return plain(input, target, *arguments, **keywords)

        F.cross_entropy = heard
        try:
            yield
        finally:
            F.cross_entropy = plain
