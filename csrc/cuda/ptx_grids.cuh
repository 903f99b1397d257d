// The part of ptx.cuh, which includes it for nvcc, that is about more than a block: grids that overlap and clusters.
#pragma once

#include <cstdint>

namespace pyfast::cuda::ptx {

// ---- Grids that overlap -------------------------------------------------------------------------------------------
// From sm_90 on; below, nothing overlaps and these are no instructions.
//
// A launch with cudaLaunchAttributeProgrammaticStreamSerialization may begin once all blocks of the grid before it on
// the stream have called launch_dependents or ended. Whatever that grid or those before it read or write may not be
// touched before wait_prerequisites, nor may anything be written; only prefetch_l2 comes earlier. Every thread calls
// it: a grid that ended without would not say that those before it have.

// griddepcontrol.launch_dependents: as far as this block is concerned, the next grid may begin.
PYFAST_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// griddepcontrol.wait: until the grids before this one have ended and what they wrote is seen.
PYFAST_DEVICE void wait_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// ---- Clusters of blocks (sm_90 and up: a kernel that uses them guards its body) -------------------------------------

PYFAST_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));  // read again rather than kept in a register
  return rank;
}
PYFAST_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// barrier.cluster arrive.release, wait.acquire: all threads of the cluster; orders their memory accesses. One comes
// before the first access to another block's shared memory (the block may not have begun) and one, or a cluster_leave,
// after the last (it may have ended).
PYFAST_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;"
      :
      :
      : "memory");
}

// barrier.cluster arrive.relaxed, wait: all threads of the cluster; orders nothing, and so waits for no store. After
// the last access to another block's shared memory, whose value has been used: that block may have ended otherwise.
PYFAST_DEVICE void cluster_leave() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n\t"
      "barrier.cluster.wait.aligned;"
      :
      :
      : "memory");
}

// fence.acq_rel.cluster, and barrier.cluster arrive.relaxed, wait.acquire: a cluster_sync() that orders only the
// accesses that threads made before their cluster_fence(). A fence waits for all that its thread has written.
PYFAST_DEVICE void cluster_fence() { asm volatile("fence.acq_rel.cluster;" : : : "memory"); }
PYFAST_DEVICE void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;"
      :
      :
      : "memory");
}

// mapa: the same variable in the shared memory of block `rank` of the cluster; plain loads and stores reach it.
template <class T>
PYFAST_DEVICE T* map_shared_rank(T* shared, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// ld.shared::cluster: the float that block `rank` holds at the place of `shared`.
PYFAST_DEVICE float ld_cluster(const float* shared, uint32_t rank) {
  float value;
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [address]; }"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

// st.shared::cluster: sets it.
PYFAST_DEVICE void st_cluster(float* shared, uint32_t rank, float value) {
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %0, %1;\n\t"
      "st.shared::cluster.f32 [address], %2; }"
      :
      : "r"(shared_address(shared)), "r"(rank), "f"(value)
      : "memory");
}

}  // namespace pyfast::cuda::ptx
