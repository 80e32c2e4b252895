"""The layers of Normalization Propagation, with the argument order of torch.nn."""

from normprop.nn.activation import Activation
from normprop.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose2d
from normprop.nn.linear import Linear
from normprop.nn.orthogonal_embedding import OrthogonalEmbedding
from normprop.nn.recurrent import GRU, LSTM, RNN
from normprop.nn.recurrent_cell import GRUCell, LSTMCell, RNNCell
from normprop.nn.residual import ResidualSum

__all__ = [
    "Activation", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "GRU", "GRUCell", "LSTM", "LSTMCell", "Linear",
    "OrthogonalEmbedding", "RNN", "RNNCell", "ResidualSum",
]  # fmt: skip
