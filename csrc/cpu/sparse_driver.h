// What sparse24_linear and bitmap_linear share on the CPU: activations widened to float32 and padded with zeros, the
// bias widened, the output allocated, and the way to the dense library where many tokens make that the faster one.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "torch_glue.h"

namespace pyfast {

// Activations as the kernels read them: [tokens, k_padded] float32, contiguous.
Tensor widen_activations(const Tensor& x, int64_t k_padded);

// The bias as float32, where there is one.
std::optional<Tensor> widen_bias(const std::optional<Tensor>& bias);

// x [tokens, k] against a weight of n rows: checks shared by both formats.
void check_linear(const Tensor& x, const Tensor& values, int64_t n, const std::optional<Tensor>& bias);

// y = x Wᵀ + bias through aten::linear, a panel of rows at a time: decompress(dense, begin) writes the dense rows of W
// from begin on, as many as `dense` [rows, k] has. One panel is made and used again: it stays in the cache.
Tensor linear_by_panels(const Tensor& x, int64_t n, const std::optional<Tensor>& bias,
                        const std::function<void(Tensor&, int64_t)>& decompress);

// Writes the rows of a weight from `begin` on into dense [rows, k]. n: the rows of the weight; begin a multiple of 16
// for the bitmap.
void bitmap_decompress_rows(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n,
                            Tensor& dense, int64_t begin);
void sparse24_decompress_rows(const Tensor& values, const Tensor& metadata, Tensor& dense, int64_t begin);

}  // namespace pyfast
