"""What a network's BatchNorms are: trained or fresh, with statistics or without."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.rules import normalization
from normprop.rules.table import TABLE


def is_trained(root: nn.Module) -> bool:
    """Whether any BatchNorm's running statistics have left their initial values, or are frozen."""
    for module in root.modules():
        if isinstance(module, _NormBase) or is_frozen(module):
            mean, var = module.running_mean, module.running_var
            if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
                continue
            if bool((mean != 0).any()) or bool((var != 1).any()):
                return True
    return False


def looks_at_batch(model: nn.Module) -> bool:
    """Whether some BatchNorm has no running statistics: what it computes in evaluation can't be kept."""
    return any(isinstance(m, _NormBase) and m.running_mean is None and not is_instance(m) for m in model.modules())


def is_instance(module: nn.Module) -> bool:
    """Whether a module normalises each sample by itself."""
    return isinstance(module, nn.modules.instancenorm._InstanceNorm)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose statistics are constants."""
    rule = TABLE.for_module(module)
    return rule is not None and rule.function is normalization.frozen_batch_norm
