"""One expert of a bank at a time, in numpy, from the arrays of its parameters; and models for such comparisons."""

import numpy as np
import torch

ACTIVATIONS = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def linear(arrays, prefix, e, h):
    return h @ arrays[f"{prefix}.weight"][e].T + arrays[f"{prefix}.bias"][e]


def mlp(arrays, prefix, e, h, activation="relu", norm=None):
    """Expert e of the ExpertMLP `prefix` on h [B,K]: linear, norm (of this batch), activation."""
    k = 0
    while f"{prefix}.linears.{k}.weight" in arrays:
        h = linear(arrays, f"{prefix}.linears.{k}", e, h)
        if norm is not None:
            axis = {"batch": 0, "layer": 1}[norm]
            h = (h - h.mean(axis, keepdims=True)) / np.sqrt(h.var(axis, keepdims=True) + 1e-5)
            h = h * arrays[f"{prefix}.norms.{k}.weight"][e] + arrays[f"{prefix}.norms.{k}.bias"][e]
        h = ACTIVATIONS[activation](h)
        k += 1
    assert k, f"no layer {prefix}"
    return h


def units(x, tasks):
    """What each task reads of x [B,K] or [B,T,K]."""
    return [x if x.ndim == 2 else x[:, t] for t in range(tasks)]


def inputs(model, x):
    """The tensors a model's output depends on, by name."""
    return dict(model.named_parameters()) | {"x": x.requires_grad_()}


def moved(model):
    """The model with no parameter where it started: a bias of 0 or a weight of 1 would hide what is wrong with it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
