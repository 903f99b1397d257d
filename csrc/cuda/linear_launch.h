// What the launchers of products with sparse weights share: checks of x, bias and mul, and x as the kernels read it.
// Only <op>.cu files include it.
#pragma once

#include <algorithm>
#include <optional>

#include "epilogue.cuh"
#include "launch.h"

namespace pyfast::cuda {

// x [tokens, k] in the dtype and on the device of the weight's values, at most `few` tokens.
inline void check_x(const Tensor& x, const Tensor& values, int64_t few) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == values.get_device_index() && x.dim() == 2 &&
                      x.scalar_type() == values.scalar_type(),
                  "x: must be [tokens, in_features] of the dtype and device of values");
  STD_TORCH_CHECK(x.size(0) <= few, "x: has ", x.size(0), " tokens, at most ", few);
}

// The epilogue that fills y [tokens, n], a fresh tensor; bias and mul are checked against it.
inline Epilogue make_epilogue(const Tensor& y, const std::optional<Tensor>& bias, int64_t activation,
                              const std::optional<Tensor>& mul) {
  const int64_t tokens = y.size(0), n = y.size(1);
  Epilogue out{nullptr, nullptr, y.mutable_data_ptr(), n, Activation::none};
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: got ", activation, ", accepted: 0 to ",
                  kActivationCount - 1);
  out.activation = static_cast<Activation>(activation);
  if (bias.has_value()) {
    check_tensor(*bias, "bias", 1, y);
    STD_TORCH_CHECK(bias->scalar_type() == y.scalar_type() && bias->size(0) == n, "bias: must be [", n,
                    "] in the dtype of x");
    out.bias = bias->const_data_ptr();
  }
  if (mul.has_value()) {
    check_tensor(*mul, "mul", 2, y);
    STD_TORCH_CHECK(mul->scalar_type() == y.scalar_type() && mul->size(0) == tokens && mul->size(1) == n,
                    "mul: must be [", tokens, ", ", n, "] in the dtype of x");
    out.mul = mul->const_data_ptr();
  }
  return out;
}

// launch(part) for every `most` tokens of x, `all` in number. Args holds x, x_stride, tokens, out; elements have 16
// bits.
template <class Args, class Launch>
void launch_token_groups(const Args& args, int64_t all, int64_t most, const Launch& launch) {
  for (int64_t first = 0; first < all; first += most) {
    Args part = args;
    part.tokens = static_cast<int32_t>(std::min(most, all - first));
    part.x += first * args.x_stride;
    part.out.y = static_cast<uint16_t*>(args.out.y) + first * args.out.n;
    if (args.out.mul != nullptr) part.out.mul = static_cast<const uint16_t*>(args.out.mul) + first * args.out.n;
    launch(part);
  }
}

// x [tokens, k] of 16 bits with rows of a multiple of `columns` (8 or a multiple of it) elements, at multiples of 16
// bytes: a copy, padded with zeros, where it is not so.
inline Tensor aligned_rows(const Tensor& x, int64_t columns = 8) {
  const int64_t tail = x.size(1) % columns;
  const Tensor rows = x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  if (tail != 0) return torch::stable::pad(rows, {0, columns - tail});
  const bool aligned = is_aligned(rows.const_data_ptr(), 16) && (rows.size(0) == 1 || rows.stride(0) % 8 == 0);
  return aligned ? rows : torch::stable::clone(torch::stable::contiguous(rows));
}

}  // namespace pyfast::cuda
