// The scheduler behind `host.h`. Compiled without sanitizers: they are told of the coroutines, and see the kernels
// alone.

#include "host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#ifdef HOST_ADDRESS_SANITIZER
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** stack, size_t* size);
#endif
#ifdef HOST_THREAD_SANITIZER
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
constexpr unsigned WITHOUT_ORDER = 1;  // a switch of coroutines orders nothing: only barriers and launches do
#else
void __tsan_acquire(void*) {}
void __tsan_release(void*) {}
#endif

namespace {

// What a test may choose of the device.
int capability = 87, processors = 16;
const void* foreign = nullptr;  // memory that is not the device's
const void* moved = nullptr;    // memory that the device knows by another address
cudaError_t launch_error = cudaSuccess;

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32, MOST_WORDS = 6;

struct Meeting {
  int arrived = 0;
  unsigned round = 0;
};

struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t stack_size = STACK;
  void* sanitizer = nullptr;
  bool done = true;
  dim3 index;
  std::deque<std::vector<host::Copy>> groups;  // committed
  std::vector<host::Copy> open;
};

struct Warp {
  Meeting meeting;
  uint32_t words[2][WARP * MOST_WORDS];  // in turn: some lanes still read the last exchange's
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber outside;  // the thread that launched
Fiber* running = &outside;
Meeting block;
unsigned char* shared = nullptr;
const std::function<void()>* body = nullptr;
int threads = 0;
bool progress = false;
char launched, finished;  // what the thread sanitizer knows these moments by

void switch_to(Fiber* to) {
  Fiber* from = running;
  running = to;
  threadIdx = to->index;
#ifdef HOST_ADDRESS_SANITIZER
  void* save = nullptr;
  __sanitizer_start_switch_fiber(&save, to->stack, to->stack_size);
#endif
#ifdef HOST_THREAD_SANITIZER
  __tsan_switch_to_fiber(to->sanitizer, WITHOUT_ORDER);
#endif
  swapcontext(&from->context, &to->context);
#ifdef HOST_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(save, nullptr, nullptr);
#endif
}

void enter() {
#ifdef HOST_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &outside.stack, &outside.stack_size);  // it came from there
#endif
  for (;;) {
    __tsan_acquire(&launched);
    (*body)();
    __tsan_release(&finished);
    running->done = progress = true;
    switch_to(&outside);
  }
}

// Until `count` coroutines are here.
void meet(Meeting& meeting, int count) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.round;
    progress = true;
  }
  while (meeting.round == round) switch_to(&outside);
}

void grow(int count) {
  while (int(fibers.size()) < count) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED || getcontext(&fiber->context) != 0) std::abort();
    fiber->stack = fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
#ifdef HOST_THREAD_SANITIZER
    fiber->sanitizer = __tsan_create_fiber(0);
#endif
    fibers.push_back(std::move(fiber));
  }
}

void run_block() {
  int left = threads;
  while (left > 0) {
    progress = false;
    left = 0;
    for (int i = 0; i < threads; ++i)
      if (!fibers[i]->done) {
        switch_to(fibers[i].get());
        left += !fibers[i]->done;
      }
    if (!progress) {
      std::fprintf(stderr, "deadlock: %d of %d threads wait at a barrier that the others do not reach\n", left,
                   threads);
      std::abort();
    }
  }
}

}  // namespace

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

bool copies_at_once = false;

unsigned char* shared_memory() { return shared; }

void barrier() {
  __tsan_release(&block);
  meet(block, threads);
  __tsan_acquire(&block);
}

const uint32_t* exchange(const uint32_t* words, int count) {
  Warp& warp = warps[threadIdx.x / WARP];
  const int lane = threadIdx.x % WARP;
  uint32_t* all = warp.words[warp.meeting.round % 2];
  for (int i = 0; i < count; ++i) all[lane * count + i] = words[i];
  meet(warp.meeting, WARP);
  return all;
}

void push(const Copy& one) { running->open.push_back(one); }

void commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

bool pop(int left, Copy* due) {
  auto& groups = running->groups;
  while (int(groups.size()) > left) {
    if (!groups.front().empty()) {
      *due = groups.front().back();
      groups.front().pop_back();
      return true;
    }
    groups.pop_front();
  }
  return false;
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& thread) {
  threads = size.x;
  if (size.y != 1 || size.z != 1 || threads % WARP != 0 || threads > 1024 || shared_bytes > 48 * 1024) std::abort();
  grow(threads);
  warps.assign(threads / WARP, {});
  block = {};
  body = &thread;
  blockDim = size;
  gridDim = grid;
#ifdef HOST_THREAD_SANITIZER
  outside.sanitizer = __tsan_get_current_fiber();
#endif
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, shared_bytes) != 0) std::abort();
        shared = static_cast<unsigned char*>(memory);
        for (size_t i = 0; i < shared_bytes; ++i) shared[i] = 0xff;  // NaN in every dtype
        for (int i = 0; i < threads; ++i) {
          Fiber& fiber = *fibers[i];
          fiber.done = false;
          fiber.index = dim3(i, 0, 0);
          fiber.groups.clear();
          fiber.open.clear();
        }
        __tsan_release(&launched);
        run_block();
        __tsan_acquire(&finished);
        std::free(memory);
      }
}

}  // namespace host

// The runtime --------------------------------------------------------------------------------------------------------

// Chooses the device that the library sees: 87 for 8.7, its multiprocessors, a pointer that is not the device's memory
// and one that it knows by another address, an error of every launch (0 for none), and whether copies to shared memory
// arrive at once or as late as they may.
extern "C" void host_device(int new_capability, int new_processors, const void* new_foreign, const void* new_moved,
                            int new_launch_error, int new_copies_at_once) {
  capability = new_capability;
  processors = new_processors;
  foreign = new_foreign;
  moved = new_moved;
  launch_error = static_cast<cudaError_t>(new_launch_error);
  host::copies_at_once = new_copies_at_once != 0;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {pointer == foreign ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice, 0,
                 pointer == moved ? nullptr : pointer};
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                  : "error";
}

cudaError_t host_launch_error() { return launch_error; }
