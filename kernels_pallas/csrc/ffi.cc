// The kernels as a function of XLA: buffers in, columns shared out among the threads of XLA's own pool.
//
// Threads take the next piece of columns until there is none, the calling one too. It waits only for pieces that others
// have begun, so it never waits for a thread that it might itself be keeping from running. Nor does a thread that comes
// to help keep the calling one from running: Linux puts it where it or who woke it ran last, which is often the same
// processor, and sees only some milliseconds later that another one is idle.
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" {
#ifdef MPQ_X86
extern const Kernel mpq_kernel_avx512, mpq_kernel_avx2;
#elif defined(MPQ_ARM)
extern const Kernel mpq_kernel_dotprod;
#endif
extern const Kernel mpq_kernel_base;
const char *mpq_kernels();
}

namespace {

const std::vector<const Kernel *> &Kernels() {
  static const std::vector<const Kernel *> here = [] {
    std::vector<const Kernel *> all, found;
#if defined(MPQ_X86)
    __builtin_cpu_init();
    all = {&mpq_kernel_avx512, &mpq_kernel_avx2};
#elif defined(MPQ_ARM)
    all = {&mpq_kernel_dotprod};
#endif
    all.push_back(&mpq_kernel_base);
    for (const Kernel *kernel : all)
      if (kernel->supported()) found.push_back(kernel);
    return found;
  }();
  return here;
}

// Memory at a multiple of 64 bytes, once it is asked for.
class Buffer {
 public:
  void *Get(int64_t bytes) {
    if (!memory_) memory_.reset(new char[bytes + 63]);
    return reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
};

int64_t Divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return Divide(a, b) * b; }

inline void Pause() {
#if defined(MPQ_X86)
  __builtin_ia32_pause();
#elif defined(MPQ_ARM)
  asm volatile("yield");
#endif
}

// The processor that this thread is on; -1: unknown.
int Here() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to another processor that it may use, if there is one.
void MoveOn() {
#if defined(__linux__)
  cpu_set_t all, others;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  others = all;
  CPU_CLR(sched_getcpu(), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof all, &all);
#endif
}

// One call, shared with threads that may come late, when it is over: those find no piece left and touch no buffer.
struct Work {
  Problem problem;
  const Way *way;
  int64_t columns, column_pieces, tokens, pieces;
  int caller = Here();
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::atomic<int64_t> done{0};

  void Help() {
    if (caller >= 0 && Here() == caller && next < pieces) MoveOn();
    Run();
  }

  void Run() {
    int64_t mine = 0;
    Buffer own;
    for (int64_t i; (i = next.fetch_add(1)) < pieces; ++mine) {
      const int64_t column = i % column_pieces * columns, token = i / column_pieces * tokens;
      const Part part = {column, std::min(problem.n, column + columns), token, std::min(problem.m, token + tokens)};
      way->multiply(&problem, part, own.Get(way->own_bytes));
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == pieces) finished.notify_one();
  }

  // The others are about as far as this thread. It looks for some 300 microseconds, since to be woken takes longer than
  // they mostly do.
  void Wait() {
    for (int i = 0; i < 20000; ++i) {
      if (done == pieces) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done == pieces; });
  }
};

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scales,
                  ffi::Buffer<ffi::F32> levels, ffi::ResultBuffer<ffi::F32> y, int64_t bits, std::string_view isa,
                  int64_t least) {
  auto work = std::make_shared<Work>();
  Problem &p = work->problem;
  const bool integer = x.element_type() == ffi::S8;
  p.x = integer ? nullptr : static_cast<const float *>(x.untyped_data());
  p.q = integer ? static_cast<const int8_t *>(x.untyped_data()) : nullptr;
  p.codes = static_cast<const uint8_t *>(codes.untyped_data());
  p.scales = scales.typed_data();
  p.levels = levels.typed_data();
  p.y = y->typed_data();
  p.m = x.dimensions()[0];
  p.stride = codes.dimensions()[0];
  p.n = codes.dimensions()[1];
  p.segment = codes.dimensions()[2];
  p.groups = scales.dimensions()[0];
  p.scale_columns = scales.dimensions()[1];
  p.bits = static_cast<int>(bits);

  const auto &kernels = Kernels();
  auto named = [&](const Kernel *kernel) { return isa.empty() || isa == kernel->name; };
  auto found = std::find_if(kernels.begin(), kernels.end(), named);
  if (found == kernels.end()) return ffi::Error::InvalidArgument("this machine has no " + std::string(isa));
  const int64_t k = p.stride * p.segment * 8 / p.bits;
  const bool many = k > 0 && p.m >= (least ? least : (*found)->least(&p));
  const Way &way = *(work->way = many ? (*found)->many : &(*found)->few);
  Buffer shared;
  p.scratch = shared.Get(way.shared_bytes(&p));
  way.prepare(&p);

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // A piece of a million products outweighs handing it out; eight for a thread even out what else the machine does.
  const int64_t smallest = 1 + (1 << 20) / std::max<int64_t>(1, p.m * k);
  work->columns = RoundUp(std::max(smallest, Divide(p.n, 8 * threads)), PART_COLUMNS);
  work->column_pieces = Divide(p.n, work->columns);
  work->tokens = std::max<int64_t>(1, p.m);
  // Tokens are shared out, too, where columns are too few for all threads: so many that unpacking is not most of it.
  if (many && work->column_pieces < threads) {
    const int64_t least_tokens = std::max<int64_t>(48, 1 + (1 << 20) / (work->columns * k));
    const int64_t shares = Divide(threads, std::max<int64_t>(1, work->column_pieces));
    work->tokens = RoundUp(std::max(least_tokens, Divide(p.m, shares)), 12);
  }
  work->pieces = work->column_pieces * Divide(p.m, work->tokens);
  for (int64_t i = 1; i < std::min(threads, work->pieces); ++i) pool.Schedule([work] { work->Help(); });
  work->Run();
  if (work->pieces > 0) work->Wait();
  return ffi::Error::Success();
}

}  // namespace

// Names of the instruction sets that this machine has, the fastest first, separated by spaces.
const char *mpq_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const Kernel *kernel : Kernels()) all += (all.empty() ? "" : " ") + std::string(kernel->name);
    return all;
  }();
  return names.c_str();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpq_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("isa")
                                  .Attr<int64_t>("least"));
