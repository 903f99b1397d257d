// What the sparse linear ops share on the CPU: checks, activations widened to float32 and padded with zeros, what
// happens to a sum (epilogue.h), and the way to the dense library where that is the faster one.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "epilogue.h"
#include "isa.h"
#include "torch_glue.h"

namespace pyfast {

// dtype of a sparse weight's values: one of the three, or int8.
Stored stored_as(const Tensor& values);

// body(U{}), U the unsigned integer of an element's size: conversions move bits, whatever they mean.
template <class Body>
void with_bits_of(const Tensor& elements, const char* name, const Body& body) {
  if (elements.scalar_type() == ScalarType::Char) return body(uint8_t{});
  if (dtype_of(elements, name) == Dtype::f32) return body(uint32_t{});
  return body(uint16_t{});
}

// What follows a sum, as the ops get it.
struct LinearOptions {
  const std::optional<Tensor>& scales;  // [n] float32; for int8 values, and for them alone
  const std::optional<Tensor>& bias;    // [n] in x's dtype
  int64_t activation;                   // an Activation
  const std::optional<Tensor>& mul;     // [tokens, n] in x's dtype
};

// x [tokens, k] against a weight of n rows whose values are stored so.
void check_linear(const Tensor& x, Stored stored, int64_t n, const LinearOptions& options);

// A fresh y [tokens, n] and the epilogue that fills it; keeps alive what the epilogue points to.
struct LinearOutput {
  LinearOutput(const Tensor& x, int64_t n, const LinearOptions& options);

  Tensor y;
  Epilogue epilogue{};

 private:
  std::optional<Tensor> bias_, scales_, mul_;
};

// Activations as the kernels for few tokens read them: [tokens, k_padded] float32, contiguous.
Tensor widen_activations(const Tensor& x, int64_t k_padded);

// Above so many tokens, decompressing a panel and calling the dense library beats the kernels for few (measured).
int64_t few_tokens();

// y = f(x Wᵀ + bias) · mul by dense_linear.h, a panel of rows at a time: decompress(dense, begin) writes the dense
// rows of W from begin on, as many as `dense` [rows, k] has. One panel is made and used again: it stays in the cache.
Tensor linear_by_panels(const Tensor& x, int64_t n, const LinearOptions& options,
                        const std::function<void(Tensor&, int64_t)>& decompress);

// Writes the rows of a weight from `begin` on into dense [rows, k]. n: the rows of the weight; begin a multiple of 16
// for the bitmap.
void bitmap_decompress_rows(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n,
                            Tensor& dense, int64_t begin);
void sparse24_decompress_rows(const Tensor& values, const Tensor& metadata, Tensor& dense, int64_t begin);

}  // namespace pyfast
