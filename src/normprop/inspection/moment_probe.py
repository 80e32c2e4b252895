"""Means and standard deviations of a network's layers while it trains, beside what is predicted."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from normprop.errors import NormPropError, TracingError
from normprop.graph.example_inputs import Inputs
from normprop.graph.input_moments import input_moments
from normprop.graph.walk import Walk
from normprop.inspection.look import Look, Seen, drift_of, rows_by_path
from normprop.inspection.probe_log import PREFIX, key_of
from normprop.inspection.probe_writers import Writer, writers_for
from normprop.inspection.rewalk import claimed, walk_of
from normprop.inspection.row import Row
from normprop.precision import reference_tensor

SHARE = 0.01  # of the time that training takes
_PREDICTIONS = 10  # looks for which one prediction is used


class MomentProbe:
    """Looks at a network in training now and then: mean and standard deviation of each module's output, and its drift.

    Every look is a flat dictionary of numbers: ``step``, the count of forwards in training mode; for every module with a
    moment rule ``normprop/PATH/mean`` and ``normprop/PATH/std``, pooled over samples, positions and channels, and
    ``normprop/PATH/drift``, measured over predicted standard deviation in octaves, rms over channels (of all channels
    together where each has fewer than 32 values, as at batch size 1); and ``normprop/largest_drift``. A module's second
    call in one forward is ``PATH:2``.

    Between looks a forward runs one hook, which counts. By default looks are as far apart as it takes for them to need a
    hundredth of the time. A layer that drifts further than `threshold` gives one warning.

    Args:
        model: the network; gets a hook on itself, and hooks on its modules for the time of a look.
        interval: forwards from one look to the next; by default as many as keep all looks below 1 % of the time.
        log: where numbers go: a path (JSON lines), an object with ``add_scalar`` (TensorBoard's SummaryWriter), a callable
            that takes the dictionary, or a list of these.
        threshold: octaves of drift beyond which a layer is warned of.
        input: moments of the input, standard normal by default.
        example: what the model's forward takes, see `convert`; by default what its first forward is given.

    Attributes:
        step: forwards in training mode so far; may be set.
        latest: the numbers of the last look; empty before the first.

    Raises:
        NormPropError: an interval below 1, or a log that cannot be written to. The first forward raises UnsupportedOpError
            for operations without a moment rule.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> with normprop.MomentProbe(net, interval=10) as probe:
        ...     _ = net(torch.randn(256, 4))
        >>> sorted(probe.latest)[:3], probe.latest["step"]
        (['normprop/0/drift', 'normprop/0/mean', 'normprop/0/std'], 0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        interval: int | None = None,
        log: Any = None,
        threshold: float = 2.0,
        input: Any = None,
        example: Any = None,
    ) -> None:
        if interval is not None and interval < 1:
            raise NormPropError(f"interval is {interval}.\nUse 1 or more, or None.")
        self.model = model
        self.interval = interval
        self.threshold = threshold
        self.step = 0
        self.latest: dict[str, float] = {}
        self._writers: list[Writer] = writers_for(log)
        self._example = example
        self._input = input
        self._walk: Walk | None = None
        self._rows: dict[str, Row] = {}
        self._looks = 0
        self._warned: set[str] = set()
        self._due = 0
        self._began = time.perf_counter()
        self._spent = 0.0
        self._look: Look | None = None
        hook = _Hook(self)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(hook.before, with_kwargs=True),
            model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks away and close the log."""
        for handle in self._handles:
            handle.remove()
        for writer in self._writers:
            writer.close()
        self._handles, self._writers = [], []

    def __enter__(self) -> MomentProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def trainer_callback(self) -> Any:
        """A callback for Hugging Face's Trainer: steps are the trainer's, and its log gets the numbers.

        Raises:
            NormPropError: transformers is not installed.
        """
        from normprop.inspection.trainer_callback import callback_for

        return callback_for(self)

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward begins with these arguments."""
        if not self.model.training or torch.compiler.is_compiling() or self.step < self._due:
            return
        began = time.perf_counter()
        if self._looks % _PREDICTIONS == 0:
            if self._walk is None and not self._record(args, kwargs):
                return
            assert self._walk is not None
            inputs = input_moments(self._walk.shapes(), self._input, reference_tensor(self.model))
            self._rows = rows_by_path(claimed(self._walk), inputs)
        self._looks += 1
        self._look = Look(self.model, self._rows)
        self._spent += time.perf_counter() - began

    def _record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Record the network; False for inputs that it doesn't run on, of which its own forward tells more."""
        try:
            self._walk = walk_of(self.model, example=Inputs(args, kwargs) if self._example is None else self._example)
        except TracingError as error:
            warnings.warn(f"MomentProbe cannot look: {error}", stacklevel=3)
            return False
        return True

    def after(self) -> None:
        """A forward ends, whether it went well or not."""
        if not self.model.training or torch.compiler.is_compiling():
            return
        if self._look is not None:
            began = time.perf_counter()
            self._look.end()
            self.latest = self._numbers(self._look.found)
            self._spent += self._look.seconds
            self._look = None
            for writer in self._writers:
                writer.write(self.latest)
            self._warn()
            self._spent += time.perf_counter() - began
            self._due = self.step + (self.interval or 1)
        self.step += 1
        if self.interval is None and self._spent > SHARE * (time.perf_counter() - self._began):
            self._due = max(self._due, self.step + 1)

    def _numbers(self, found: Mapping[str, Seen]) -> dict[str, float]:
        """The dictionary of a look, by one transfer from the device."""
        numbers: dict[str, float] = {"step": self.step}
        if not found:
            return numbers
        keys, values = [], []
        for path, (moments, count, row) in found.items():
            pooled = moments.pooled(range(moments.mean.dim()))
            keys += [key_of(path, key) for key in ("mean", "std", "drift")]
            values += [pooled.mean.reshape(()), pooled.std.reshape(()), drift_of(moments, row.predicted, count)]
        listed = torch.stack(values).tolist()
        numbers |= {
            key: value for key, value in zip(keys, listed, strict=True) if not math.isnan(value) or "drift" not in key
        }
        drifts = [value for key, value in numbers.items() if key.endswith("/drift")]
        return numbers | ({f"{PREFIX}/largest_drift": max(drifts)} if drifts else {})

    def _warn(self) -> None:
        for path in self._rows:
            drift = self.latest.get(key_of(path, "drift"), 0.0)
            if drift > self.threshold and path not in self._warned:
                self._warned.add(path)
                warnings.warn(
                    f"{path} has drifted {drift:.2g} octaves from its predicted standard deviation at step {self.step}. "
                    "Look with normprop.inspect; normprop.recalibrate brings a converted network back.",
                    stacklevel=2,
                )


class _Hook:
    """The hooks of a probe on its model. A copy or pickle of the model keeps hooks that do nothing."""

    def __init__(self, probe: MomentProbe | None = None) -> None:
        self.probe: Callable[[], MomentProbe | None] = weakref.ref(probe) if probe is not None else lambda: None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if (probe := self.probe()) is not None and probe.model is module:
            probe.before(args, kwargs)

    def after(self, module: nn.Module, *_: Any) -> None:
        if (probe := self.probe()) is not None and probe.model is module:
            probe.after()

    def __reduce__(self) -> Any:
        return _Hook, ()
