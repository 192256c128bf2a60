// The CUDA operators, torch glue included, for CPU tensors in a namespace of their own: mtlkernels_emulated.
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(mtlkernels_emulated, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(mtlkernels_emulated, CPU, m, C10_UID)

#define MTL_SLAB_BYTES 1024  // several slabs of a small batch
#include "../library.cpp"
#include "esmm_loss.cu"
#include "expert_linear.cu"
#include "expert_mix.cu"
#include "hard_concrete.cu"
#include "masked_bce.cu"
#include "mix.cu"
#include "partitioned_norm.cu"
#include "snr_linear.cu"
#include "star_linear.cu"
