#include "reuse.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace pyfast {
namespace {

constexpr uint64_t kPage = uint64_t{2} << 20;  // a huge page
constexpr uint64_t kSmall = 2 * kPage;         // below this malloc keeps the memory itself

struct Block {
  void* data;
  uint64_t bytes;
};

class Pool {
 public:
  Block take(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->bytes < bytes || block->bytes > bytes + bytes / 4) continue;
      const Block found = *block;
      kept_.erase(block);
      kept_bytes_ -= found.bytes;
      return use(found);
    }
    const uint64_t will_be = in_use_ + bytes;
    free_until(std::max(most_, will_be) - will_be);
    Block fresh{std::aligned_alloc(kPage, bytes), bytes};
    if (fresh.data == nullptr && !kept_.empty()) {
      free_until(0);
      fresh.data = std::aligned_alloc(kPage, bytes);
    }
    if (fresh.data == nullptr) throw std::bad_alloc();
    return use(fresh);
  }

  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    in_use_ -= block.bytes;
    kept_bytes_ += block.bytes;
    kept_.push_back(block);
  }

  int64_t kept_bytes() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(kept_bytes_);
  }

  int64_t release() {
    const std::lock_guard lock(mutex_);
    const uint64_t bytes = kept_bytes_;
    free_until(0);
    most_ = in_use_;
    return static_cast<int64_t>(bytes);
  }

 private:
  Block use(Block block) {
    in_use_ += block.bytes;
    most_ = std::max(most_, in_use_);
    return block;
  }

  // No more than `bytes` stay.
  void free_until(uint64_t bytes) {
    while (kept_bytes_ > bytes) {
      std::free(kept_.front().data);
      kept_bytes_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
  uint64_t in_use_ = 0, kept_bytes_ = 0, most_ = 0;
};

Pool& pool() {
  static Pool* const one = new Pool;  // for as long as tensors may be freed: to the very end
  return *one;
}

}  // namespace

Tensor reusable_empty(const Tensor& like, int64_t rows, int64_t columns) {
  const uint64_t wanted = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) * like.element_size();
  if (wanted < kSmall) return torch::stable::new_empty(like, {rows, columns});
  const Block block = pool().take((wanted + kPage - 1) / kPage * kPage);
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  Tensor tensor = torch::stable::from_blob(block.data, {sizes, 2}, {strides, 2}, like.device(), like.scalar_type(),
                                           [block](void*) { pool().give_back(block); });
  advise_huge_pages(tensor);
  return tensor;
}

int64_t kept_memory() { return pool().kept_bytes(); }

int64_t release_memory() { return pool().release(); }

namespace {

Tensor reusable(const Tensor& like, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows, columns: accepted: 0 or more");
  return reusable_empty(like, rows, columns);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("reusable_empty", TORCH_BOX(&pyfast::reusable)); }
