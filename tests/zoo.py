"""Networks for the promises: small ones of every shape of graph, and the real ones of torchvision and timm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Residual(nn.Module):
    """Two residual blocks, the second with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(16)
        self.skip = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.bn1(self.conv1(x)))
        x = F.leaky_relu(x + y, 0.1)
        x = F.silu(self.bn2(self.conv2(x)) + self.skip(x))
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """BatchNorm after cat, add and pooling: sites without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 10, 1, groups=2)
        self.bn3 = nn.BatchNorm2d(10, affine=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.cat([x, self.conv1(torch.relu(self.bn1(x)))], 1)
        x = x + self.conv2(F.hardswish(self.bn2(x)))
        x = F.max_pool2d(torch.tanh(self.bn3(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gated(nn.Module):
    """Depthwise convolutions with squeeze-and-excitation, channel shuffle and a learned PReLU slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.act = nn.PReLU(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)
        self.bn3 = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.expand(x)))
        b, c, h, w = x.size()
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        x = F.relu6(self.bn2(self.depthwise(x)))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.bn3(self.project(x)) * self.scale
        return self.head(x.flatten(2).permute(0, 2, 1).mean(1))


class Shared(nn.Module):
    """One layer and one BatchNorm called twice under different moments, and an auxiliary head while training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.aux = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.elu(self.bn(self.conv(x)))
        y = F.dropout(self.bn(self.conv(2 * x)), 0.5, training=self.training)
        out = F.interpolate(self.head(torch.sigmoid(y)), scale_factor=2, mode="bilinear")
        return {"out": out, "aux": self.aux(x)} if self.training else {"out": out}


class Decoder(nn.Module):
    """Transposed convolutions, plain and grouped, after a linear layer on a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn0 = nn.Linear(10, 8 * 4 * 4), nn.BatchNorm1d(8 * 4 * 4)
        self.up1, self.bn1 = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6)
        self.up2, self.bn2 = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.fc(z))).unflatten(1, (8, 4, 4))
        x = F.softplus(self.bn1(self.up1(x)))
        return torch.tanh(self.out(F.mish(self.bn2(self.up2(x)))))


class WrittenOut(nn.Module):
    """Activations that are written in tensor arithmetic, with learned parameters and modules among it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.beta = nn.Parameter(torch.linspace(0.5, 2.0, 6).reshape(6, 1, 1))
        self.relu6, self.act, self.head = nn.ReLU6(), nn.PReLU(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = x * torch.sigmoid(self.beta * x)
        x = self.bn2(self.conv2(x))
        x = F.relu(x) ** 2 + x * self.relu6(x + 3) / 6
        x = self.bn3(self.conv3(x))
        return self.head((torch.where(x > 1, x.log1p(), self.act(x)) - 0.1 * x).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8),
        nn.Identity(), nn.BatchNorm1d(8), nn.Softsign(), nn.Linear(8, 3),
    )  # fmt: skip


def sequence() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ELU(), nn.AvgPool1d(2), nn.Conv1d(8, 8, 3, stride=2),
        nn.BatchNorm1d(8), nn.Hardtanh(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.SELU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, (1, 3, 3)),
        nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


Small = tuple[Callable[[], nn.Module], tuple[int, ...]]

SMALL: dict[str, Small] = {
    "residual": (Residual, (3, 12, 12)),
    "pre-activation": (PreActivation, (3, 12, 12)),
    "gated": (Gated, (3, 9, 9)),
    "shared": (Shared, (3, 8, 8)),
    "decoder": (Decoder, (10,)),
    "written out": (WrittenOut, (3, 9, 9)),
    "mlp": (mlp, (3, 4, 4)),
    "sequence": (sequence, (4, 32)),
    "video": (video, (3, 6, 10, 10)),
}

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg16_bn densenet121 mobilenet_v2 mobilenet_v3_large "
    "efficientnet_b0 regnet_y_400mf shufflenet_v2_x1_0 googlenet inception_v3 mnasnet1_0 "
    "segmentation.deeplabv3_resnet50 segmentation.fcn_resnet50 video.r3d_18"
).split()

TIMM = (
    "resnet26d resnetv2_50 seresnet50 ghostnet_100 dla34 hrnet_w18 res2net50_26w_4s cspresnet50 vovnet39a repvgg_b0 "
    "mobileone_s0 convmixer_768_32 mixnet_s regnetx_002 xception41 levit_128s efficientformer_l1 tf_efficientnetv2_s "
    "rexnet_100 darknet53 selecsls42 dpn68 skresnet18 fastvit_t8 mobilenetv4_conv_small"
).split()

FAST = ("torchvision:resnet18", "torchvision:mobilenet_v3_large", "timm:repvgg_b0", "timm:levit_128s", "timm:resnetv2_50")


def build(name: str) -> nn.Module:
    """A real model without weights, by ``library:name``."""
    library, _, short = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(short)  # type: ignore[no-any-return]
        constructor: Any = torchvision.models
        for part in short.split("."):
            constructor = getattr(constructor, part)
        options: dict[str, Any] = {"weights_backbone": None} if short.startswith("segmentation") else {}
        if short in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        return constructor(weights=None, **options)  # type: ignore[no-any-return]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm running statistics, γ and β that hide nothing, and every layer before it a bias that counts."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _NormBase):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            if module.weight is not None:
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d) and module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model


def outputs(value: Any) -> list[Tensor]:
    """The tensors of an output, whatever holds them."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in outputs(v)]


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
