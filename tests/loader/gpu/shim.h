/* What sha256.cu needs of CUDA, for a C++ compiler of the host. Threads of a block are real threads, so that a missing barrier is
 * a race here as well. Loads are checked by nothing: what lies behind a buffer is the tests' business. */
#include <pthread.h>

#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Index {
  unsigned x;
};

static thread_local Index threadIdx, blockIdx, blockDim;
static thread_local pthread_barrier_t *barrier;

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
static inline T __ldg(const T *at) {
  return *at;
}

static inline void __syncthreads() { pthread_barrier_wait(barrier); }

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

/* As cuLaunchKernel: `args` points to the values, one after the other in the order of the parameters. */
template <class... Parameters, std::size_t... At>
static void run(void (*kernel)(Parameters...), unsigned grid, unsigned block, void **args, std::index_sequence<At...>) {
  for (unsigned number = 0; number < grid; number++) {
    pthread_barrier_t shared;
    pthread_barrier_init(&shared, nullptr, block);
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < block; thread++)
      threads.emplace_back([=, &shared] {
        threadIdx.x = thread, blockIdx.x = number, blockDim.x = block, barrier = &shared;
        kernel(*static_cast<Parameters *>(args[At])...);
      });
    for (std::thread &thread : threads) thread.join();
    pthread_barrier_destroy(&shared);
  }
}

template <class... Parameters>
static void run(void (*kernel)(Parameters...), unsigned grid, unsigned block, void **args) {
  run(kernel, grid, block, args, std::index_sequence_for<Parameters...>());
}

#define RUNNER(kernel) \
  extern "C" void run_##kernel(unsigned grid, unsigned block, void **args) { run(kernel, grid, block, args); }
