// Every load and store of a kernel. The compiler's ThreadSanitizer pass reports them (hooks at the end of this file);
// the judgement is ours: inside a region, aligned, written, landed, ordered by barriers.
#include <algorithm>

#include "engine.h"

namespace simt {
namespace {

const char* const kAmong[kSpreads] = {"this thread", "its warp", "its block", "its cluster", "another cluster"};

Spread relation(const Access& past, const Lane& lane) {
  if (past.time < engine.cluster_begin) return kGrid;
  if (past.rank != lane.block->rank) return kCluster;
  if (past.thread / 32 != lane.number / 32) return kBlock;
  return past.thread == lane.number ? kLane : kWarp;
}

bool ordered_by_tickets(const Access& past, const Lane& lane) {
  const auto releases = [&](const Ticket& ticket) {
    if (past.time < ticket.first) return false;  // of an earlier cluster
    if (past.time < ticket.synced) return true;
    if (past.rank != ticket.rank || past.thread / 32 != ticket.thread / 32 || past.spread > kWarp) return false;
    return past.time < ticket.warp_synced ||
           (past.time <= ticket.at && past.thread == ticket.thread && past.spread == kLane);
  };
  const auto acquires = [&](const Ticket& ticket) {
    const bool warp = lane.block->rank == ticket.rank && lane.number / 32 == ticket.thread / 32u;
    return lane.block->synced > ticket.at || (warp && lane.warp->synced > ticket.at);
  };
  for (const Ticket& mine : engine.taken)
    for (const Ticket& theirs : engine.released)
      if (theirs.counter == mine.counter && acquires(mine) && releases(theirs)) return true;
  return false;
}

// Do barriers order all users that `past` stands for before the running lane?
bool ordered(const Access& past, const Lane& lane, Spread* among) {
  if (past.time < engine.launch_begin) return true;
  *among = std::max(past.spread, relation(past, lane));
  switch (*among) {
    case kLane:
      return true;
    case kWarp:
      return past.time < lane.warp->synced;
    case kBlock:
      return past.time < lane.block->synced;
    case kCluster:
      return past.time < engine.cluster_synced;
    default:
      return past.spread < kGrid && ordered_by_tickets(past, lane);
  }
}

void note(Access& access, const Lane& lane, bool atomic) {
  Spread among = kLane;
  const bool alone = ordered(access, lane, &among);
  access = {engine.now, lane.block->rank, static_cast<uint16_t>(lane.number), alone ? kLane : among, atomic};
}

std::string name_of(const Access& access) {
  return format("thread %u%s", access.thread,
                engine.blocks.size() > 1 ? format(" of block %u", access.rank).c_str() : "");
}

Region* find(uintptr_t address) {
  static Region* last = nullptr;
  static Time launched = 0;
  if (launched == engine.cluster_begin && last != nullptr && address - last->begin < last->end - last->begin)
    return last;
  launched = engine.cluster_begin;
  for (const auto& block : engine.blocks)
    for (const auto& region : block->shared)
      if (address >= region->begin && address < region->end) return last = region.get();
  for (const auto& region : engine.global)
    if (address >= region->begin && address < region->end) return last = region.get();
  return nullptr;
}

// The region that begins or ends nearest to the address, for the message.
std::string nearest(uintptr_t address) {
  const Region* best = nullptr;
  uintptr_t least = ~uintptr_t{0};
  const auto consider = [&](const Region& region) {
    const uintptr_t distance = address < region.begin ? region.begin - address : address - region.end;
    if (distance < least) least = distance, best = &region;
  };
  for (const auto& region : engine.global) consider(*region);
  for (const auto& block : engine.blocks)
    for (const auto& region : block->shared) consider(*region);
  if (best == nullptr) return "there is none";
  return address < best->begin ? format("%zu bytes before %s", size_t{least}, best->name.c_str())
                               : format("%zu bytes past the end of %s", size_t{least}, best->name.c_str());
}

void check_remote(Region& region, Place where) {
  Block& owner = *region.owner;
  if (owner.exited == owner.lanes.size())
    fail(where, format("shared memory of block %u of the cluster, which has exited", owner.rank));
  if (engine.cluster_synced == engine.cluster_begin)
    fail(where, format("shared memory of block %u before the first cluster_sync: it may not have begun", owner.rank));
  owner.used_by_others = engine.now;
}

}  // namespace

Region& add_region(const std::string& name, uintptr_t begin, size_t bytes, bool read_only) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = begin;
  region->end = begin + bytes;
  region->read_only = read_only;
  if (!read_only) region->bytes.resize(bytes);
  engine.global.push_back(std::move(region));
  return *engine.global.back();
}

void touch(uintptr_t address, size_t bytes, Use use, bool aligned, Place where) {
  Lane* const lane = engine.lane;
  if (lane == nullptr || bytes == 0) return;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(lane->stack);
  if (address - stack < kStackBytes) return;
  const char* const does = use == Use::read ? "reads" : use == Use::write ? "writes" : "adds to";
  Region* const region = find(address);
  if (region == nullptr)
    fail(where, format("%s %zu bytes outside all memory: %s", does, bytes, nearest(address).c_str()));
  const size_t first = address - region->begin;
  const auto here = [&] { return format("%s %zu bytes of %s at byte %zu", does, bytes, region->name.c_str(), first); };
  if (address + bytes > region->end)
    fail(where, here() + format(", past its end at %zu", size_t{region->end - region->begin}));
  if (aligned && address % bytes != 0) fail(where, here() + ": not a multiple of the size");
  if (region->owner != nullptr && region->owner != lane->block) check_remote(*region, where);
  if (lane->early && region->owner == nullptr && !region->arguments) fail(where, here() + " before wait_prerequisites");
  if (region->read_only) {
    if (use != Use::read) fail(where, here() + ", which is an input");
    return;
  }
  for (size_t i = first; i < first + bytes; ++i) {
    Byte& byte = region->bytes[i];
    if (byte.content == Content::in_flight)
      fail(where, here() + ": a cp_async of " + name_of(byte.write) + " has not been waited for");
    if (byte.content == Content::unwritten && use != Use::write) fail(where, here() + ", which nobody has written");
    Spread among = kLane;
    const bool both_atomic = use == Use::atomic && byte.write.atomic;
    if (!both_atomic && !ordered(byte.write, *lane, &among))
      fail(where,
           here() + format(": no barrier after the write of %s (%s)", name_of(byte.write).c_str(), kAmong[among]));
    if (use != Use::read && !ordered(byte.read, *lane, &among))
      fail(where, here() + format(": no barrier after the read of %s (%s)", name_of(byte.read).c_str(), kAmong[among]));
    if (use != Use::read) byte.content = Content::written;
    note(use == Use::read ? byte.read : byte.write, *lane, use == Use::atomic);
  }
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, bool there, Where where) {
  Lane& lane = *engine.lane;
  Copy copy{reinterpret_cast<uintptr_t>(shared), lane.groups, bytes, {}};
  const uintptr_t from = reinterpret_cast<uintptr_t>(global);
  if (there) {
    if (from % bytes != 0) fail(where, format("cp_async<%d>: the source is not a multiple of that", bytes));
    const Region* const source = find(from);
    if (source == nullptr || source->owner != nullptr)
      fail(where, format("reads %d bytes outside all memory that is global: %s", bytes,
                         source == nullptr ? nearest(from).c_str() : source->name.c_str()));
    touch(from, bytes, Use::read, false, where);
    std::memcpy(copy.content, global, bytes);
  }
  Region* const region = find(copy.to);
  if (region == nullptr || region->owner != lane.block)
    fail(where, format("cp_async<%d>: the target is outside the shared memory of the block", bytes));
  touch(copy.to, bytes, Use::write, true, where);
  for (int i = 0; i < bytes; ++i) region->bytes[copy.to - region->begin + i].content = Content::in_flight;
  lane.copies.push_back(copy);
}

void copy_commit() { ++engine.lane->groups; }

void copy_wait(unsigned pending) {
  Lane& lane = *engine.lane;
  std::vector<Copy> later;
  for (const Copy& copy : lane.copies) {
    if (copy.group + pending >= lane.groups) {
      later.push_back(copy);
      continue;
    }
    std::memcpy(reinterpret_cast<void*>(copy.to), copy.content, copy.bytes);
    Region& region = *find(copy.to);
    for (int i = 0; i < copy.bytes; ++i) {
      Byte& byte = region.bytes[copy.to - region.begin + i];
      byte.content = Content::written;
      note(byte.write, lane, false);
    }
  }
  lane.copies.swap(later);
}

void load(void* to, const void* from, size_t bytes, Where where) {
  touch(reinterpret_cast<uintptr_t>(from), bytes, Use::read, true, where);
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes, Where where) {
  touch(reinterpret_cast<uintptr_t>(to), bytes, Use::write, true, where);
  std::memcpy(to, from, bytes);
}

void add(float* to, float value, Where where) {
  touch(reinterpret_cast<uintptr_t>(to), sizeof(float), Use::atomic, true, where);
  *to += value;
}

void minimum(uint64_t* to, uint64_t value, Where where) {
  touch(reinterpret_cast<uintptr_t>(to), sizeof(uint64_t), Use::atomic, true, where);
  if (value < *to) *to = value;
}

uint32_t ticket(uint32_t* counter, uint32_t count, Where where) {
  touch(reinterpret_cast<uintptr_t>(counter), sizeof(uint32_t), Use::atomic, true, where);
  const Lane& lane = *engine.lane;
  const Ticket taken{counter,
                     engine.cluster_begin,
                     lane.block->synced,
                     lane.warp->synced,
                     engine.now,
                     lane.block->rank,
                     static_cast<uint16_t>(lane.number)};
  engine.released.push_back(taken);
  engine.taken.push_back(taken);
  const uint32_t number = *counter;
  *counter = number + 1 < count ? number + 1 : 0;
  return number;
}

}  // namespace simt

// ---- The hooks that -fsanitize=thread calls -------------------------------------------------------------------------

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define HERE (simt::Place{__builtin_return_address(0)})
#define SIZED_HOOKS(size)                                                                             \
  HOOK __tsan_read##size(void* at) { simt::touch(uintptr_t(at), size, simt::Use::read, true, HERE); } \
  HOOK __tsan_write##size(void* at) { simt::touch(uintptr_t(at), size, simt::Use::write, true, HERE); }

SIZED_HOOKS(1)
SIZED_HOOKS(2)
SIZED_HOOKS(4)
SIZED_HOOKS(8)
SIZED_HOOKS(16)
HOOK __tsan_read_range(void* at, size_t bytes) { simt::touch(uintptr_t(at), bytes, simt::Use::read, false, HERE); }
HOOK __tsan_write_range(void* at, size_t bytes) { simt::touch(uintptr_t(at), bytes, simt::Use::write, false, HERE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
