// What the sparse linear ops share on the CPU: checks, activations widened to float32 and padded with zeros, what
// happens to a sum (epilogue.h), products that are asked for again (served.h), and the way to the dense library where
// that is the faster one.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>

#include "epilogue.h"
#include "isa.h"
#include "served.h"
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

// Floats of one call, aligned to a cache line, uninitialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

// The product of an op's arguments, checked, but for x and mul.
class LinearProduct : public Served {
 public:
  LinearProduct(const Tensor& x, int64_t n, const LinearOptions& options);

  // A fresh y [tokens, n]; where this thread records, the product is kept for further x.
  static Tensor serve(std::unique_ptr<LinearProduct> product, const Tensor& x, const std::optional<Tensor>& mul);

  void run(const void* x, const void* mul, void* y) const final { multiply(x, k_, mul, n_, y); }

 protected:
  // The epilogue's y of x [tokens, k], whose rows lie `stride` elements apart.
  virtual void multiply_rows(const void* x, int64_t stride, const Epilogue& epilogue) const = 0;

  // Activations as the kernels for few tokens read them, [tokens, k_padded] float32, contiguous: x itself where it is
  // that, else a copy in the scratch.
  const float* widen_activations(const void* x, int64_t stride, int64_t k_padded, std::optional<Scratch>& copy) const;

  int64_t tokens_, n_, k_;
  Dtype dtype_;

 private:
  void multiply(const void* x, int64_t stride, const void* mul, int64_t mul_stride, void* y) const;

  Epilogue epilogue_{};
  const void* bias_ = nullptr;
  bool live_ = true;  // no copies of the bias or the scales, which would keep what they are now
};

// A product that reads the weight as it is stored, by a kernel for few tokens. Args: what that kernel takes.
template <class Args>
class StoredProduct : public LinearProduct {
 public:
  StoredProduct(const Tensor& x, int64_t n, int64_t k_padded, const LinearOptions& options)
      : LinearProduct(x, n, options) {
    args_.tokens = tokens_;
    args_.k = args_.x_stride = k_padded;
  }

 protected:
  virtual void multiply_all(const Args& args) const = 0;

  void multiply_rows(const void* x, int64_t stride, const Epilogue& epilogue) const final {
    std::optional<Scratch> copy;
    Args args = args_;
    args.x = widen_activations(x, stride, args.k, copy);
    args.out = epilogue;
    multiply_all(args);
  }

  Args args_{};
};

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
