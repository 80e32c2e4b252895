"""The results of Arpit et al. (2016), typed from the paper; readings from its plots are good to half a percent point."""

from __future__ import annotations

# Section 5.2, figure 1: best validation accuracy in %, the same for both data normalisations.
DATA_NORM_BEST = 90.35

# Section 5.3, figure 2: |mean of the input| to one unit, averaged over hidden layers. "none" is in the tens.
UNIT_MEAN = {"paper": 0.19, "batch": 0.33}

# Figure 3: epoch → validation accuracy in %.
CURVES = {
    "paper": {5: 78.7, 10: 80.0, 20: 85.0, 29: 87.3, 50: 90.2},
    "batch": {5: 68.8, 10: 72.5, 20: 79.0, 29: 80.7, 50: 89.5},
}

# Figure 4: batch size → validation accuracy in % at the end.
BATCH_SIZES = {1: 90.0, 50: 90.3, 100: 89.9, 250: 88.3}

# Table 1: (data, flips) → test error in %.
TEST_ERROR = {
    ("cifar10", False): {"paper": 9.11, "batch": 9.41},
    ("cifar10", True): {"paper": 7.47, "batch": 7.25},
    ("cifar100", False): {"paper": 32.19, "batch": 35.32},
    ("cifar100", True): {"paper": 29.24, "batch": 30.26},
    ("svhn", False): {"paper": 1.88, "batch": 2.25},
}

# Section 5.6: seconds of one epoch on CIFAR-10.
EPOCH_SECONDS = {"paper": 84.0, "batch": 96.0}
