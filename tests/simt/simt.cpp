// Executes a launch: lanes are fibers that run until they wait, blocks run one after another, the blocks of a cluster
// together. Barriers, failures, and the C functions that host.py calls.
#include "simt.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <random>

#include "engine.h"

namespace simt {

Engine engine;

namespace {

enum Return { kFirst, kYielded, kFailed };  // to the scheduler

std::string name_of(const Lane& lane) {
  const Dim3 block = lane.block->index;
  return format("block (%u, %u, %u) thread (%u, %u, %u)", block.x, block.y, block.z, lane.index.x, lane.index.y,
                lane.index.z);
}

void wait(const char* what, Where where) {
  Lane& lane = *engine.lane;
  lane.state = State::waiting;
  lane.waits_for = what;
  lane.waits_at = where;
  if (_setjmp(lane.context) == 0) _longjmp(engine.scheduler, kYielded);
}

bool same(Where a, Where b) { return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0; }

// What every thread must come to before it returns.
void leave() {
  Lane& lane = *engine.lane;
  Block& block = *lane.block;
  lane.state = State::exited;
  ++block.exited;
  const Place nowhere(static_cast<const void*>(nullptr));
  if (lane.early) fail(nowhere, "exits before wait_prerequisites");
  if (!lane.copies.empty()) fail(nowhere, "exits with a cp_async that was not waited for");
  if (block.barrier.arrived > 0) fail(block.barrier.where, "exits, while other threads wait at syncthreads");
  if (engine.cluster_barrier.arrived > 0)
    fail(engine.cluster_barrier.where, "exits, while other threads wait at cluster_sync");
  for (const Meeting& meeting : lane.warp->meetings)
    if (meeting.mask >> lane.number % 32 & 1u)
      fail(meeting.where, format("exits, while other lanes of its warp wait for it at %s", meeting.what));
  if (block.exited == block.lanes.size() && block.used_by_others >= engine.cluster_synced)
    fail(nowhere,
         "is the last of its block to exit, and no cluster_sync came after another block used its shared memory");
}

void enter() {
  engine.body(engine.closure);
  leave();
  _longjmp(engine.scheduler, kYielded);
}

void resume(Lane& lane) {
  engine.lane = &lane;
  if (const int back = _setjmp(engine.scheduler); back == kFirst) {
    if (lane.started) _longjmp(lane.context, 1);
    lane.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = lane.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
  engine.lane = nullptr;
}

// The order in which lanes or blocks run.
template <class T>
void arrange(std::vector<T>& items, std::mt19937& random) {
  if (engine.order == 1) std::reverse(items.begin(), items.end());
  if (engine.order > 1) std::shuffle(items.begin(), items.end(), random);
}

void report_standstill(const std::vector<Lane*>& lanes) {
  engine.error = "no thread can go on:";
  int named = 0;
  for (const Lane* lane : lanes) {
    if (lane->state == State::exited) continue;
    if (++named > 6) break;
    engine.error += format("\n  %s waits at %s, ", name_of(*lane).c_str(), lane->waits_for) + spell(lane->waits_at);
  }
}

void build_block(Block& block, unsigned rank, Dim3 index, char* stacks) {
  const Dim3 size = engine.shape.block;
  const unsigned threads = size.x * size.y * size.z;
  block.rank = static_cast<uint16_t>(rank);
  block.index = index;
  block.synced = engine.now;
  block.lanes.resize(threads);
  block.warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.block = &block;
    lane.warp = &block.warps[i / 32];
    lane.number = i;
    lane.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    lane.stack = stacks + (size_t{rank} * threads + i) * kStackBytes;
    lane.warp->synced = engine.now;
    lane.warp->lanes.push_back(&lane);
  }
}

void run_cluster(const std::vector<Dim3>& indices, char* stacks, std::mt19937& random) {
  engine.cluster_begin = engine.cluster_synced = ++engine.now;
  engine.cluster_barrier = {};
  engine.taken.clear();
  engine.blocks.clear();
  std::vector<Lane*> lanes;
  for (const Dim3 index : indices) {
    engine.blocks.push_back(std::make_unique<Block>());
    build_block(*engine.blocks.back(), static_cast<unsigned>(engine.blocks.size() - 1), index, stacks);
    for (Lane& lane : engine.blocks.back()->lanes) lanes.push_back(&lane);
  }
  if (engine.order == 1) std::reverse(lanes.begin(), lanes.end());
  for (bool alive = true; alive;) {
    if (engine.order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
    alive = false;
    bool moved = false;
    for (Lane* lane : lanes) {
      if (lane->state == State::ready) {
        resume(*lane);
        moved = true;
        if (!engine.error.empty()) return;
      }
      alive |= lane->state != State::exited;
    }
    if (alive && !moved) return report_standstill(lanes);
  }
}

Region& add_shared(Block& block, const void* key, const std::string& name, size_t bytes) {
  size_t total = bytes;
  for (const auto& region : block.shared) total += region->end - region->begin;
  if (total > kSharedLimit) fail(Place(static_cast<const void*>(nullptr)), format("%zu bytes of shared memory", total));
  auto region = std::make_unique<Region>();
  // 1 KB on either side belongs to nobody, wherever the heap puts the storage of other regions.
  region->storage = std::make_unique<char[]>(bytes + 3 * 1024);
  region->begin = (reinterpret_cast<uintptr_t>(region->storage.get()) + 2047) / 1024 * 1024;
  region->end = region->begin + bytes;
  region->name = name;
  region->key = key;
  region->owner = &block;
  region->bytes.resize(bytes);
  block.shared.push_back(std::move(region));
  return *block.shared.back();
}

Region& shared_region(Block& block, const void* key, const std::string& name, size_t bytes) {
  for (const auto& region : block.shared)
    if (region->key == key) return *region;
  return add_shared(block, key, name, bytes);
}

}  // namespace

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

std::string spell(Place place) {
  if (place.code != nullptr) {
    Dl_info module{};
    dladdr(place.code, &module);
    return format("{+0x%zx}", size_t(place.code) - size_t(module.dli_fbase) - 1);  // inside the call, for its line
  }
  const char* const name = std::strrchr(place.where.file_name(), '/');
  return place.where.line() == 0
             ? ""
             : format("%s:%u", name != nullptr ? name + 1 : place.where.file_name(), place.where.line());
}

void fail(Place where, const std::string& message) {
  const std::string place = spell(where);
  engine.error = (place.empty() ? "" : place + ": ") + name_of(*engine.lane) + " " + message;
  _longjmp(engine.scheduler, kFailed);
}

Dim3 thread_index() { return engine.lane->index; }
Dim3 block_index() { return engine.lane->block->index; }
Dim3 block_size() { return engine.shape.block; }
Dim3 grid_size() { return engine.shape.grid; }
void launch_dependents() { engine.lane->overlaps = engine.lane->early = true; }
void wait_prerequisites() { engine.lane->early = false; }
void check_alone(Where where) {
  if (engine.lane->overlaps) fail(where, "ld_nc after launch_dependents: it may come before wait_prerequisites");
}
uint32_t cluster_rank() { return engine.lane->block->rank; }
uint32_t cluster_size() { return engine.shape.cluster; }

void* shared_variable(const void* key, const char* name, size_t bytes) {
  Block& block = *engine.lane->block;
  return reinterpret_cast<void*>(shared_region(block, key, format("shared %s", name), bytes).begin);
}

unsigned char* dynamic_shared() {
  static const char key = 0;
  return static_cast<unsigned char*>(shared_variable(&key, "memory of the launch", engine.shape.shared_bytes));
}

void* map_shared(const void* shared, uint32_t rank, Where where) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (rank >= engine.blocks.size()) fail(where, format("block %u of a cluster of %zu", rank, engine.blocks.size()));
  for (const auto& region : engine.lane->block->shared)
    if (address >= region->begin && address < region->end) {
      const Region& there = shared_region(*engine.blocks[rank], region->key, region->name, region->end - region->begin);
      return reinterpret_cast<void*>(there.begin + (address - region->begin));
    }
  fail(where, "maps a pointer that is not into the shared memory of its block");
}

// ---- Barriers -----------------------------------------------------------------------------------------------------

namespace {

void arrive(Barrier& barrier, size_t expected, size_t exited, const char* what, Where where, void (*release)(Block&)) {
  if (exited > 0) fail(where, format("comes to %s, and %zu threads have exited", what, exited));
  if (barrier.arrived > 0 && !same(barrier.where, where))
    fail(where, format("comes to %s, while other threads wait at that of ", what) + spell(barrier.where));
  barrier.where = where;
  if (++barrier.arrived < expected) return wait(what, where);
  barrier.arrived = 0;
  ++engine.now;
  release(*engine.lane->block);
}

void pass(Block& block) {
  block.synced = engine.now;
  for (Warp& warp : block.warps) warp.synced = engine.now;
  for (Lane& lane : block.lanes) lane.state = State::ready;
}

}  // namespace

void block_barrier(Where where) {
  Block& block = *engine.lane->block;
  arrive(block.barrier, block.lanes.size(), block.exited, "syncthreads", where, pass);
}

void cluster_barrier(Where where) {
  size_t threads = 0, exited = 0;
  for (const auto& block : engine.blocks) threads += block->lanes.size(), exited += block->exited;
  arrive(engine.cluster_barrier, threads, exited, "cluster_sync", where, [](Block&) {
    engine.cluster_synced = engine.now;
    for (const auto& block : engine.blocks) pass(*block);
  });
}

void meet(const char* what, uint32_t mask, void* argument, void (*perform)(const Meeting&), Where where) {
  Lane& lane = *engine.lane;
  Warp& warp = *lane.warp;
  const uint32_t own = 1u << lane.number % 32;
  if ((mask & own) == 0) fail(where, format("%s with a mask (%08x) without its own bit", what, mask));
  for (const Lane* other : warp.lanes)
    if (mask >> other->number % 32 & 1u && other->state == State::exited)
      fail(where, format("%s, but lane %u of the mask has exited", what, other->number % 32));
  if (warp.lanes.size() < 32 && mask >> warp.lanes.size() != 0)
    fail(where, format("%s, but the warp has %zu lanes", what, warp.lanes.size()));
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& other) { return (other.mask & mask) != 0; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back({what, where, mask, 0, {}});
    meeting = warp.meetings.end() - 1;
  }
  if (meeting->what != what || meeting->mask != mask || !same(meeting->where, where))
    fail(where, format("comes to %s (mask %08x), while other lanes wait at %s (mask %08x) of ", what, mask,
                       meeting->what, meeting->mask) +
                    spell(meeting->where));
  meeting->arguments[lane.number % 32] = argument;
  meeting->arrived |= own;
  if (meeting->arrived != mask) return wait(what, where);
  const Meeting complete = *meeting;
  warp.meetings.erase(meeting);
  perform(complete);
  for (Lane* other : warp.lanes)
    if (mask >> other->number % 32 & 1u) other->state = State::ready;
}

void warp_barrier(uint32_t mask, Where where) {
  meet("syncwarp", mask, nullptr, [](const Meeting&) { engine.lane->warp->synced = ++engine.now; }, where);
}

// ---- Launch -------------------------------------------------------------------------------------------------------

void execute(const Shape& shape, void (*body)(const void*), const void* closure, size_t bytes) {
  if (!engine.error.empty()) return;
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  if (threads == 0 || threads > kMaxThreads || shape.cluster == 0 || shape.grid.x % shape.cluster != 0 ||
      shape.shared_bytes > kSharedLimit || shape.grid.y > 65535 || shape.grid.z > 65535) {
    engine.error = format("launch of %u threads, grid (%u, %u, %u), clusters of %u, %zu bytes of shared memory",
                          threads, shape.grid.x, shape.grid.y, shape.grid.z, shape.cluster, shape.shared_bytes);
    return;
  }
  engine.shape = shape;
  engine.body = body;
  engine.closure = closure;
  engine.launch_begin = ++engine.now;
  engine.released.clear();
  add_region("the kernel's arguments", reinterpret_cast<uintptr_t>(closure), bytes, true).arguments = true;
  const size_t stack_bytes = size_t{threads} * shape.cluster * kStackBytes;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* const stacks = static_cast<char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
  std::vector<std::vector<Dim3>> clusters;
  for (unsigned z = 0; z < shape.grid.z; ++z)
    for (unsigned y = 0; y < shape.grid.y; ++y)
      for (unsigned x = 0; x < shape.grid.x; x += shape.cluster) {
        clusters.emplace_back();
        for (unsigned rank = 0; rank < shape.cluster; ++rank) clusters.back().push_back({x + rank, y, z});
      }
  std::mt19937 random(engine.order);
  if (engine.order == 1) std::reverse(clusters.begin(), clusters.end());
  if (engine.order > 1) std::shuffle(clusters.begin(), clusters.end(), random);
  for (const auto& cluster : clusters)
    if (engine.error.empty()) run_cluster(cluster, stacks, random);
  engine.blocks.clear();
  engine.global.pop_back();
  munmap(stacks, stack_bytes);
}

Errors errors() { return engine.errors; }

void* scratch(size_t bytes) {
  auto storage = std::make_unique<char[]>(bytes + 256);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(storage.get()) + 255) / 256 * 256;
  add_region("scratch memory", begin, bytes, false).storage = std::move(storage);
  return reinterpret_cast<void*>(begin);
}

}  // namespace simt

// ---- What host.py calls ---------------------------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void simt_begin(unsigned order) {
  simt::engine.error.clear();
  simt::engine.global.clear();
  simt::engine.order = order;
}

EXPORT void simt_errors(float rough, float bias) { simt::engine.errors = {rough, bias}; }

// role: 0 input, 1 output (unwritten), 2 both (written)
EXPORT void simt_buffer(const char* name, void* data, size_t bytes, int role) {
  simt::Region& region = simt::add_region(name, reinterpret_cast<uintptr_t>(data), bytes, role == 0);
  if (role == 2)
    for (simt::Byte& byte : region.bytes) byte.content = simt::Content::written;
}

EXPORT const char* simt_error() { return simt::engine.error.c_str(); }

// How many bytes of the buffer nobody has written.
EXPORT size_t simt_unwritten(const void* data) {
  for (const auto& region : simt::engine.global)
    if (region->begin == reinterpret_cast<uintptr_t>(data))
      return std::count_if(region->bytes.begin(), region->bytes.end(),
                           [](const simt::Byte& byte) { return byte.content != simt::Content::written; });
  return 0;
}
