#include "reuse.h"

#include <cstdlib>
#include <mutex>
#include <new>

namespace pyfast {
namespace {

constexpr uint64_t kPage = uint64_t{2} << 20;  // a huge page
constexpr uint64_t kSmall = 2 * kPage;         // below this malloc keeps the memory itself

struct Block {
  void* data = nullptr;
  uint64_t bytes = 0;
};

std::mutex mutex;
Block kept;

Block take(uint64_t bytes) {
  {
    const std::lock_guard lock(mutex);
    if (kept.data != nullptr && kept.bytes >= bytes && kept.bytes <= bytes + bytes / 4) {
      const Block block = kept;
      kept = {};
      return block;
    }
  }
  release_memory();  // of another size: do not hold both
  const Block block{std::aligned_alloc(kPage, bytes), bytes};
  if (block.data == nullptr) throw std::bad_alloc();
  return block;
}

void give_back(Block block) {
  {
    const std::lock_guard lock(mutex);
    std::swap(block, kept);
  }
  std::free(block.data);
}

}  // namespace

Tensor reusable_empty(const Tensor& like, int64_t rows, int64_t columns) {
  const uint64_t wanted = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) * like.element_size();
  if (wanted < kSmall) return torch::stable::new_empty(like, {rows, columns});
  const Block block = take((wanted + kPage - 1) / kPage * kPage);
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  Tensor tensor = torch::stable::from_blob(block.data, {sizes, 2}, {strides, 2}, like.device(), like.scalar_type(),
                                           [block](void*) { give_back(block); });
  advise_huge_pages(tensor);
  return tensor;
}

int64_t release_memory() {
  Block block;
  {
    const std::lock_guard lock(mutex);
    std::swap(block, kept);
  }
  std::free(block.data);
  return static_cast<int64_t>(block.bytes);
}

}  // namespace pyfast
