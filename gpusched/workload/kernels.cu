// What the workload runs on a GPU: filling memory from a seed, and a digest of it. content.py has the same formulas.
//
// kernels.ptx is made from this file, for the oldest GPU and driver that are of use (the driver compiles it on load):
//
//     nvcc -ptx -arch=compute_75 -o kernels.ptx kernels.cu && sed -i 's/^\.version .*/.version 7.5/' kernels.ptx
//
// Only 64-bit integer arithmetic, warp shuffles and one atomic addition are used, all of them in PTX 7.5.

typedef unsigned long long u64;

// The finalizer of SplitMix64: every bit of z touches every bit of the result.
static __device__ __forceinline__ u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

static __device__ __forceinline__ u64 step(u64 start, u64 index) {
  return mix(start + (index + 1) * 0x9E3779B97F4A7C15ull);
}

// words[i] for i < count is word number first + i of the whole contents.
extern "C" __global__ void fill(u64 *words, u64 count, u64 first, u64 seed) {
  u64 stride = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
    words[i] = step(seed, first + i);
}

// Adds the digest of these words to *sum. A sum has no order, but each word is mixed with its own index, so a word
// that is changed or in the wrong place changes the sum. blockDim.x is a multiple of 32.
extern "C" __global__ void digest(const u64 *words, u64 count, u64 first, u64 *sum) {
  u64 stride = (u64)gridDim.x * blockDim.x;
  u64 part = 0;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
    part += step(words[i], first + i);
  for (int offset = 16; offset > 0; offset /= 2)
    part += __shfl_down_sync(0xFFFFFFFFu, part, offset);
  if (threadIdx.x % 32 == 0)
    atomicAdd(sum, part);
}
