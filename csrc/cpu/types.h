// Storage types of the CPU kernels. Sums are kept in float, of doubles in double.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace mtl {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// The same by number, the order of every table of kernels by storage type.
enum class Storage : int { kDouble, kFloat, kBFloat16, kHalf };

template <class S>
using SumOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace mtl
