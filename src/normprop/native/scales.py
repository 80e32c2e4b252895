"""The scales of sites by compiled arithmetic, as one autograd function."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.filter_rows import Form, Operands, from_rows, sites_of, taps_first, to_rows
from normprop.native.library import library
from normprop.scale import Scale, plain_backward

# Sites with fewer weights than this are not divided among threads.
_DIVIDED = 1 << 14


def native_scales(forms: Sequence[Form], multiplied: Sequence[bool], operands: Sequence[Operands]) -> list[Scale]:
    """What `normprop.scales.scales` gives, for operands that the compiled functions handle.

    Args:
        forms: of the layers.
        multiplied: which layers' filters are to come multiplied by their factor.
        operands: of the sites.
    """
    flat = _NativeScales.apply(tuple(forms), tuple(multiplied), *(t for one in operands for t in one))
    return [Scale(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


class _NativeScales(torch.autograd.Function):
    """Scales of several sites with the derivatives that `normprop.scales` writes out, all of a filter at once.

    A weight is read once forward and once backward. Its gradient is written into what its filters got, which is nobody
    else's. Differentiated again, the backward is `plain_scale`'s.
    """

    @staticmethod
    def forward(ctx: Any, forms: Sequence[Form], multiplied: Sequence[bool], *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.forms, ctx.multiplied = forms, multiplied
        ctx.set_materialize_grads(False)
        call = _Call(forms, multiplied, sites_of(tensors))
        columns = call.sites[0].gamma.new_empty(5, sum(call.sizes))  # f, b, means of the filters, E + d, V
        filters = [layer.empty() if layer and m else None for layer, m in zip(call.layers, multiplied, strict=True)]
        call.run(columns, filters)
        factors, offsets, averages = (row.split(call.sizes) for row in columns[:3].unbind())
        outputs: list[Tensor | None] = []
        for i, layer in enumerate(call.layers):
            if layer is None:
                outputs += None, factors[i], offsets[i], None
            elif (memory := filters[i]) is not None:
                outputs += layer.shaped(memory), None, offsets[i], None
            else:
                outputs += (
                    layer.weight.view_as(layer.weight),
                    factors[i],
                    offsets[i],
                    averages[i] if forms[i].center else None,
                )
        ctx.save_for_backward(*tensors, columns)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, columns = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, *plain_backward(ctx.forms, ctx.multiplied, tensors, grads))
        call = _Call(ctx.forms, ctx.multiplied, sites_of(tensors))
        return (None, None, *call.gradients(columns, grads, ctx.needs_input_grad[2:]))


class _Geometry(NamedTuple):
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
def _geometry(form: Form, size: int, shape: tuple[int, ...], outside: bool, multiplied: bool, threads: int) -> _Geometry:
    """The geometry of a site with `size` outputs behind a weight of that shape; without a layer, of ``()``."""
    if not shape:
        return _Geometry(0, 1, (1, size, 0, 0, 0, 1, False, False, 1))
    numbers = math.prod(shape)
    blocks = min(threads, size) if numbers >= _DIVIDED else 1
    inputs = shape[0] // form.groups if form.transposed else shape[1]
    rows = (form.groups, size // form.groups, inputs, math.prod(shape[2:]), outside)
    return _Geometry(numbers, blocks, (*rows, round(1 / form.share), form.center, multiplied, blocks))


class _Layer:
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
        return memory if self.itself else from_rows(memory, self.weight, self.form)

    def laid(self, grad: Tensor) -> Tensor:
        """A gradient that lies the same way: itself if it does."""
        if not self.itself:
            return to_rows(grad, self.form, like=self.weight).contiguous()
        if taps_first(grad) if self.outside else grad.is_contiguous():
            return grad
        return self.empty().copy_(grad)


class _Call:
    """Sites as the compiled arithmetic takes them.

    Args:
        forms: of the layers.
        multiplied: which layers' filters are given multiplied by their factor.
        sites: their tensors.
    """

    def __init__(self, forms: Sequence[Form], multiplied: Sequence[bool], sites: Sequence[Operands]) -> None:
        self.sites = sites
        self.layers = [s.weight if s.weight is None else _Layer(s.weight, f) for s, f in zip(sites, forms, strict=True)]
        self.sizes = [site.gamma.shape[0] for site in sites]
        threads = torch.get_num_threads()
        self.geometries = [
            _geometry(form, size, (), False, False, threads)
            if layer is None
            else _geometry(form, size, layer.weight.shape, layer.outside, product, threads)
            for form, size, layer, product in zip(forms, self.sizes, self.layers, multiplied, strict=True)
        ]
        self.alive: list[Tensor | None] = []  # what the arithmetic reads besides

    def run(self, columns: Tensor, filters: Sequence[Tensor | None], gradients: Sequence[int] | None = None) -> None:
        """Compute into `columns` and `filters`, or the gradients whose fields are given."""
        fields: list[int] = []
        step, reach = columns.element_size(), columns.shape[1] * columns.element_size()
        place, address = columns.data_ptr(), self._address
        for site, layer, size, into, geometry in zip(
            self.sites, self.layers, self.sizes, filters, self.geometries, strict=True
        ):
            fields.append(0 if layer is None else layer.memory.data_ptr())
            fields += [0 if t is None else address(t) for t in site[1:]]
            fields.append(0 if into is None else into.data_ptr())
            fields += range(place, place + 5 * reach, reach)
            fields += geometry.fields
            place += size * step
        native = library()
        assert not isinstance(native, str)
        native.scales(
            columns.dtype, fields, gradients, len(self.sites), sum(geometry.numbers for geometry in self.geometries)
        )

    def gradients(self, columns: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of all operands from those of the outputs, in their order."""
        moments = [t for site in self.sites for t in site[1:3] if t is not None]
        blocks, total = max(geometry.blocks for geometry in self.geometries), sum(t.numel() for t in moments)
        by_moments, by_constants = columns.new_zeros(blocks, total), columns.new_empty(2, columns.shape[1])
        into, place, step = by_moments.data_ptr(), by_constants.data_ptr(), columns.element_size()
        address = self._address
        weights: list[Tensor | None] = []  # memory for their gradients
        fields: list[int] = []
        for i, (site, layer) in enumerate(zip(self.sites, self.layers, strict=True)):
            by_filters, *others = grads[4 * i : 4 * i + 4]
            given = layer.laid(by_filters) if layer is not None and by_filters is not None else None
            self.alive.append(given)
            weight = None
            if layer is not None and needs[len(site) * i]:
                weight = layer.empty() if given is None else given
            weights.append(weight)
            fields += [0 if t is None else address(t) for t in (given, *others, weight)]
            for t in site[1:3]:
                fields.append(0 if t is None else into)
                into += 0 if t is None else t.numel() * step
            fields += place, place + columns.shape[1] * step, total
            place += self.sizes[i] * step
        self.run(columns, [None] * len(self.sites), fields)
        summed = by_moments.sum(0) if blocks > 1 else by_moments[0]
        parts = iter(summed.split([t.numel() for t in moments]))
        by_gamma, by_beta = (row.split(self.sizes) for row in by_constants.unbind())
        results: list[Tensor | None] = []
        for i, (site, layer, memory) in enumerate(zip(self.sites, self.layers, weights, strict=True)):
            weight = None if layer is None or memory is None else layer.shaped(memory)
            both = (None if t is None else next(parts).reshape(t.shape) for t in site[1:3])
            results += weight, *both, by_gamma[i], by_beta[i], None, None
        return results

    def _address(self, tensor: Tensor) -> int:
        """Where the numbers of a tensor are, one behind the other."""
        if not (tensor.is_contiguous() or taps_first(tensor)):
            tensor = tensor.contiguous()
            self.alive.append(tensor)
        return tensor.data_ptr()
