"""Normalisation of every expert of a bank at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertBatchNorm(nn.Module):
    """E ``torch.nn.BatchNorm1d(N)`` as one: [B,E,N] -> [B,E,N], each expert feature normalised over the batch.

    Parameters ``weight``, ``bias`` [E,N]; buffers ``running_mean``, ``running_var`` [E,N], ``num_batches_tracked`` [E].
    """

    kind = "batch"

    def __init__(
        self, num_experts: int, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None
    ) -> None:
        super().__init__()
        shape = (num_experts, num_features)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.empty(num_experts, device=device, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running mean 0 and variance 1."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        if not self.weight.numel():  # of a rank without experts, say: batch_norm refuses no features
            return x * self.weight + self.bias
        return F.batch_norm(
            x.reshape(x.shape[0], self.weight.numel()),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            self.training,
            self.momentum,
            self.eps,
        ).view(x.shape)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, momentum={self.momentum}"


class ExpertLayerNorm(nn.Module):
    """E ``torch.nn.LayerNorm(N)`` as one: [B,E,N] -> [B,E,N]. Parameters ``weight``, ``bias`` [E,N]."""

    kind = "layer"

    def __init__(self, num_experts: int, num_features: int, *, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_experts, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, y, self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


NORMS = {"batch": ExpertBatchNorm, "layer": ExpertLayerNorm}
