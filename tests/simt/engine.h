// The state of an execution, shared by simt.cpp (scheduler, barriers, launch), memory.cpp (every load and store) and
// instructions.cpp (what a warp does together). These files are compiled without -fsanitize=thread.
#pragma once

#include <setjmp.h>

#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

// Time counts barriers: two accesses are ordered where a barrier that both threads passed lies between them.
using Time = uint32_t;

// ---- Memory -------------------------------------------------------------------------------------------------------

// Who used a byte last. `spread` says among whom the users of that kind lie, as far as no barrier orders them.
enum Spread : uint8_t { kLane, kWarp, kBlock, kCluster, kGrid, kSpreads };

struct Access {
  Time time = 0;
  uint16_t rank = 0, thread = 0;  // block of the cluster, thread of the block
  Spread spread = kLane;
  bool atomic = false;
};

enum class Content : uint8_t { unwritten, written, in_flight };

struct Byte {
  Content content = Content::unwritten;
  Access read, write;  // time 0: none
};

struct Block;

// A piece of memory that kernels may touch. A read-only one needs no bytes: it is written and nobody changes it.
struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  bool read_only = false;
  bool arguments = false;  // of the kernel
  Block* owner = nullptr;  // of shared memory
  std::vector<Byte> bytes;
  std::unique_ptr<char[]> storage;
  const void* key = nullptr;
};

enum class Use { read, write, atomic };

// Where in the kernel: a line that a wrapper was called at, or an address in the code that host.py turns into a line.
struct Place {
  const void* code = nullptr;
  Where where{};
  Place(const void* address) : code(address) {}
  Place(Where line) : where(line) {}
};
std::string spell(Place place);

// Judges an access of the running lane and records it. Vector accesses (aligned) must lie at a multiple of their size.
void touch(uintptr_t address, size_t bytes, Use use, bool aligned, Place where);
Region& add_region(const std::string& name, uintptr_t begin, size_t bytes, bool read_only);

// ---- Threads ------------------------------------------------------------------------------------------------------

struct Copy {
  uintptr_t to;
  unsigned group;
  int bytes;
  char content[16];
};

enum class State { ready, waiting, exited };

struct Warp;

struct Lane {
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0;  // in the block
  Dim3 index;
  State state = State::ready;
  bool started = false;
  jmp_buf context;
  char* stack = nullptr;
  const char* waits_for = "";
  Where waits_at;
  std::vector<Copy> copies;
  unsigned groups = 0;                   // closed ones
  bool overlaps = false, early = false;  // after launch_dependents; and before wait_prerequisites
};

// Lanes of a warp that come together: the last one performs for all.
struct Meeting {
  const char* what = nullptr;
  Where where;
  uint32_t mask = 0, arrived = 0;
  void* arguments[32] = {};
};

struct Warp {
  Time synced = 0;
  std::vector<Lane*> lanes;
  std::vector<Meeting> meetings;
};

struct Barrier {
  size_t arrived = 0;
  Where where;
};

struct Block {
  Dim3 index;
  uint16_t rank = 0;
  Time synced = 0;
  Time used_by_others = 0;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Region>> shared;
  size_t exited = 0;
  Barrier barrier;
};

// A number taken with ticket(), at time `at`. It releases what the taker did before, and what its block did from
// `first` until the barrier at `synced`, its warp until that at `warp_synced`: all that is ordered before what the
// block or the warp of a later taker does after its next barrier.
struct Ticket {
  const void* counter;
  Time first, synced, warp_synced, at;
  uint16_t rank, thread;
};

struct Engine {
  Shape shape;
  unsigned order = 0;  // of lanes and blocks: 0 ascending, 1 descending, above: a shuffle with that seed
  Errors errors;
  std::string error;

  Lane* lane = nullptr;  // the running one
  jmp_buf scheduler;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;

  Time now = 1, launch_begin = 1, cluster_begin = 1, cluster_synced = 1;
  std::vector<std::unique_ptr<Block>> blocks;  // of the running cluster
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Region>> global;
  std::vector<Ticket> released;  // by earlier clusters of the launch
  std::vector<Ticket> taken;     // by the running cluster
};

inline constexpr size_t kStackBytes = 64 * 1024;
inline constexpr size_t kSharedLimit = 227 * 1024;
inline constexpr unsigned kMaxThreads = 1024;

extern Engine engine;

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// Ends the launch with a message that names the place and the running lane.
[[noreturn]] void fail(Place where, const std::string& message);

// The lane waits until all lanes of mask have come to the same `what` at the same place; the last one performs.
void meet(const char* what, uint32_t mask, void* argument, void (*perform)(const Meeting&), Where where);

}  // namespace simt
