// Host execution of CUDA kernels: what a kernel and its driver see. README.md beside this file says how to use it.
//
// A driver (<kernel>.cpp) includes this file, then the kernel's .cuh, and calls simt::launch from an extern "C"
// function. It is compiled with -fsanitize=thread and without libtsan: the compiler then reports every load and store
// of the kernel to simt.cpp, which judges them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define PYFAST_SIMT 1
#define __global__
#define __launch_bounds__(...)

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using Where = std::source_location;

struct Shape {
  Dim3 grid, block;
  unsigned cluster = 1;     // blocks along x that run together
  size_t shared_bytes = 0;  // of PYFAST_DYNAMIC_SHARED
};

Dim3 thread_index();
Dim3 block_index();
Dim3 block_size();
Dim3 grid_size();

// Executes body(closure) once for each thread; the kernel may read `bytes` bytes of closure.
void execute(const Shape& shape, void (*body)(const void*), const void* closure, size_t bytes);

// kernel<<<grid, block, shared_bytes>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(const Shape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const auto call = [=] { kernel(arguments...); };
  using Call = decltype(call);
  execute(shape, [](const void* closure) { (*static_cast<Call*>(closure))(); }, &call, sizeof(call));
}

// Global memory of `bytes` bytes, unwritten, until the driver's function returns.
void* scratch(size_t bytes);

// The variable of this block that belongs to `key`.
void* shared_variable(const void* key, const char* name, size_t bytes);
unsigned char* dynamic_shared();

// How far approximate instructions may be off, 0 unless host.py says otherwise: `rough` this way or that, reciprocals
// by half as much, `bias` all logarithms alike.
struct Errors {
  float rough = 0.0f, bias = 0.0f;
};
Errors errors();

// What stands behind simt_ptx.h; instructions.cpp has the warp's, simt.cpp the rest.
enum class Shuffle { index, up, down, exclusive_or };
void block_barrier(Where where);
void cluster_barrier(Where where);
void warp_barrier(uint32_t mask, Where where);
uint32_t shuffle(Shuffle mode, uint32_t value, int lane, uint32_t mask, Where where);
uint32_t vote(bool predicate, uint32_t mask, Where where);
void load_matrices(uint32_t* words, int count, bool transposed, const void* row, Where where);
void multiply(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const float* c, Where where);
void multiply_sparse(bool bfloat16, int selector, float* d, const uint32_t* a, const uint32_t* b, const float* c,
                     uint32_t metadata, Where where);
void copy_async(void* shared, const void* global, int bytes, bool there, Where where);
void copy_commit();
void copy_wait(unsigned pending);
void load(void* to, const void* from, size_t bytes, Where where);  // a vector load: all bytes, aligned
void store(void* to, const void* from, size_t bytes, Where where);
void add(float* to, float value, Where where);
void minimum(uint64_t* to, uint64_t value, Where where);
uint32_t ticket(uint32_t* counter, uint32_t count, Where where);
void launch_dependents();
void wait_prerequisites();
void check_alone(Where where);  // a load that the grid before this one must not overlap
uint32_t cluster_rank();
uint32_t cluster_size();
void* map_shared(const void* shared, uint32_t rank, Where where);

}  // namespace simt

using dim3 = simt::Dim3;
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

// A driver's function that host.py calls.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default"))) void
