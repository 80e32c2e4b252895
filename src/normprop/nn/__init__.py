"""The layers of Normalization Propagation, with the argument order of torch.nn."""

from normprop.nn.activation import Activation
from normprop.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose2d
from normprop.nn.linear import Linear
from normprop.nn.recurrent import GRU, LSTM, RNN
from normprop.nn.residual import ResidualSum

__all__ = [
    "Activation", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "GRU", "LSTM", "Linear", "RNN", "ResidualSum",
]  # fmt: skip
