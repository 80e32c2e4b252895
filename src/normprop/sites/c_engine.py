"""The scales of sites by compiled arithmetic, as one autograd function."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.native.library import library
from normprop.native.operands import is_unshared
from normprop.sites.reference import Scale, plain_backward
from normprop.sites.rows import Form, Operands, from_rows, sites_of, taps_first, to_rows

# Sites with fewer weights than this are not divided among threads.
_DIVIDED = 1 << 14


def native_scales(forms: Sequence[Form], operands: Sequence[Operands]) -> list[Scale]:
    """What `engine.scales` gives, for operands that the compiled functions handle.

    Args:
        forms: of the layers.
        operands: of the sites.
    """
    flat = _NativeScales.apply(tuple(forms), *(t for one in operands for t in one))
    return [Scale(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


class _NativeScales(torch.autograd.Function):
    """Scales of several sites with the derivatives that `normprop.sites.engine` writes out, all of a filter at once.

    A weight is read once forward and once backward. Its gradient is written into what its filters got, which is nobody
    else's. Differentiated again, the backward is `plain_scale`'s.
    """

    @staticmethod
    def forward(ctx: Any, forms: Sequence[Form], *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.forms = forms
        ctx.set_materialize_grads(False)
        call = Call(forms, sites_of(tensors))
        columns, filters = call.scales()
        factors, offsets = (row.split(call.sizes) for row in columns[:2].unbind())
        ctx.save_for_backward(*tensors, columns)
        outputs: list[Tensor | None] = []
        for multiplied, f, b in zip(filters, factors, offsets, strict=True):
            outputs += multiplied, f if multiplied is None else None, b
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, columns = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *plain_backward(ctx.forms, tensors, grads))
        call = Call(ctx.forms, sites_of(tensors))
        needs = ctx.needs_input_grad[1 :: len(Operands._fields)]
        found = call.apart(*call.gradients(columns, grads, needs))
        width = len(Operands._fields)
        asked = [any(g is not None for g in grads[i : i + 3]) for i in range(0, len(grads), 3)]
        return (None, *(g if asked[i // width] else None for i, g in enumerate(found)))


class Geometry(NamedTuple):
    """How a site's numbers lie.

    Attributes:
        numbers: of the weight.
        blocks: how many threads may share the site.
        fields: the last ones of scales.c's `site`.
    """

    numbers: int
    blocks: int
    fields: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def geometry(form: Form, size: int, shape: tuple[int, ...], outside: bool, threads: int, directions: int) -> Geometry:
    """The geometry of a site with `size` outputs behind a weight of that shape; without a layer, of ``()``."""
    if not shape:
        return Geometry(0, 1, (1, size, 0, 0, 0, 1, 0, 1, 0))
    numbers = math.prod(shape)
    blocks = min(threads, size) if numbers >= _DIVIDED else 1
    inputs = shape[0] // form.groups if form.transposed else shape[1]
    rows = (form.groups, size // form.groups, inputs, math.prod(shape[2:]), outside)
    return Geometry(numbers, blocks, (*rows, form.stride, form.center_steps, blocks, directions // form.groups))


class Layer:
    """A weight whose filters lie one behind the other in memory.

    Args:
        weight: of a layer.
        form: of that layer.

    Attributes:
        memory: the weight itself if it lies so, else a copy.
    """

    def __init__(self, weight: Tensor, form: Form) -> None:
        self.weight, self.form = weight, form
        self.outside = not form.transposed and taps_first(weight)
        self.itself = not form.transposed and (self.outside or weight.is_contiguous())
        self.memory = weight if self.itself else to_rows(weight, form).contiguous()

    def empty(self) -> Tensor:
        """Memory for another weight that lies the same way."""
        return torch.empty_like(self.memory)

    def shaped(self, memory: Tensor) -> Tensor:
        """Such memory in the shape of the weight."""
        return memory if self.itself else from_rows(memory, self.weight, self.form).contiguous()

    def laid(self, grad: Tensor) -> Tensor:
        """A gradient that lies the same way: itself if it does."""
        if not self.itself:
            return to_rows(grad, self.form, like=self.weight).contiguous()
        if taps_first(grad) if self.outside else grad.is_contiguous():
            return grad
        return self.empty().copy_(grad)

    def rows(self, filters: Tensor) -> Tensor:
        """Other filters of the same fan-in, one behind the other in memory as those of the weight are."""
        return to_rows(filters, self.form, like=self.weight).contiguous()


class Call:
    """Sites as the compiled arithmetic takes them.

    Args:
        forms: of the layers.
        sites: their tensors.
    """

    def __init__(self, forms: Sequence[Form], sites: Sequence[Operands]) -> None:
        self.forms, self.sites = forms, sites
        self.layers = [s.weight if s.weight is None else Layer(s.weight, f) for s, f in zip(sites, forms, strict=True)]
        self.sizes = [site.gamma.shape[0] for site in sites]
        self.alive: list[Tensor | None] = []  # what the arithmetic reads besides

    @functools.cached_property
    def _geometries(self) -> list[Geometry]:
        threads = torch.get_num_threads()
        return [
            geometry(form, size, (), False, threads, 0)
            if layer is None
            else geometry(
                form,
                size,
                layer.weight.shape,
                layer.outside,
                threads,
                0 if site.directions is None else len(site.directions),
            )
            for form, size, layer, site in zip(self.forms, self.sizes, self.layers, self.sites, strict=True)
        ]

    def scales(self) -> tuple[Tensor, list[Tensor | None]]:
        """Numbers a filter, ``(5, channels of all sites)``: f, b, its mean, E and V; and filters."""
        columns = self.sites[0].gamma.new_empty(5, sum(self.sizes))
        memory = [None if layer is None else layer.empty() for layer in self.layers]
        self._run(columns, memory)
        return columns, self._shaped(memory)

    def gradients(
        self, columns: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool], *, in_place: bool = True
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Gradients of weights; of all means and variances, one behind the other; of γ and β, ``(2, channels)``.

        Args:
            columns: what `scales` gave.
            grads: of filters, factor and offset of each site; None for zero.
            needs: which weights need one.
            in_place: write them into those of the filters, where nobody else holds these.
        """
        moments = [t.numel() for site in self.sites for t in site[1:3] if t is not None]
        blocks = max(geometry.blocks for geometry in self._geometries)
        by_moments, by_constants = columns.new_zeros(blocks, sum(moments)), columns.new_empty(2, columns.shape[1])
        into, place, step = by_moments.data_ptr(), by_constants.data_ptr(), columns.element_size()
        address = self._address
        weights: list[Tensor | None] = []
        fields: list[int] = []
        for i, (site, layer) in enumerate(zip(self.sites, self.layers, strict=True)):
            by_filters, *others = grads[3 * i : 3 * i + 3]
            given = layer.laid(by_filters) if layer is not None and by_filters is not None else None
            self.alive.append(given)
            weight = None
            if layer is not None and needs[i]:
                free = given is not None and (given is not by_filters or is_unshared(given))
                weight = given if in_place and free else layer.empty()
            weights.append(weight)
            fields += [0 if t is None else address(t) for t in (given, *others, weight)]
            for t in site[1:3]:
                fields.append(0 if t is None else into)
                into += 0 if t is None else t.numel() * step
            fields += place, place + columns.shape[1] * step, by_moments.shape[1], 0
            place += self.sizes[i] * step
        self._run(columns, [None] * len(self.sites), fields)
        return self._shaped(weights), by_moments.sum(0) if blocks > 1 else by_moments[0], by_constants

    def apart(self, weights: Sequence[Tensor | None], by_moments: Tensor, by_constants: Tensor) -> list[Tensor | None]:
        """What `gradients` gave, for each operand in order."""
        parts = iter(by_moments.split([t.numel() for site in self.sites for t in site[1:3] if t is not None]))
        by_gamma, by_beta = (row.split(self.sizes) for row in by_constants.unbind())
        results: list[Tensor | None] = []
        for site, weight, gamma, beta in zip(self.sites, weights, by_gamma, by_beta, strict=True):
            both = (None if t is None else next(parts).reshape(t.shape) for t in site[1:3])
            results += weight, *both, gamma, beta, None, None, None
        return results

    def _shaped(self, memory: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            None if layer is None or one is None else layer.shaped(one)
            for layer, one in zip(self.layers, memory, strict=True)
        ]

    def _run(self, columns: Tensor, filters: Sequence[Tensor | None], gradients: Sequence[int] | None = None) -> None:
        """Compute into `columns` and `filters`, or the gradients whose fields are given."""
        fields: list[int] = []
        step, reach = columns.element_size(), columns.shape[1] * columns.element_size()
        place, address = columns.data_ptr(), self._address
        for site, layer, size, into, geometry in zip(
            self.sites, self.layers, self.sizes, filters, self._geometries, strict=True
        ):
            fields.append(0 if layer is None else layer.memory.data_ptr())
            fields += [0 if t is None else address(t) for t in site[1:-1]]
            directions = None if layer is None or site.directions is None else layer.rows(site.directions)
            fields.append(0 if directions is None else directions.data_ptr())
            self.alive.append(directions)
            fields.append(0 if into is None else into.data_ptr())
            fields += range(place, place + 5 * reach, reach)
            fields += geometry.fields
            place += size * step
        native = library()
        assert not isinstance(native, str)
        numbers = sum(geometry.numbers for geometry in self._geometries)
        native.scales(columns.dtype, fields, gradients, len(self.sites), numbers)

    def _address(self, tensor: Tensor) -> int:
        """Where the numbers of a tensor are, one behind the other."""
        if not (tensor.is_contiguous() or taps_first(tensor)):
            tensor = tensor.contiguous()
            self.alive.append(tensor)
        return tensor.data_ptr()
