// The driver: instruction set dispatch, memory, and the only place with threads.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "kernel.h"

namespace vsb {

#define VSB_ISA(name, lanes, bf16_dot, int8_dot, features) \
  namespace name {                                         \
  const Kernels &kernels(int32_t dtype);                   \
  }
#include "isa.def"
#undef VSB_ISA

namespace {

struct Isa {
  const char *name;
  const Kernels &(*kernels)(int32_t);
  bool usable;
};

// __builtin_cpu_supports also asks whether the operating system saves the registers.
const std::vector<Isa> &isas() {
  static const std::vector<Isa> all = [] {
    __builtin_cpu_init();
    return std::vector<Isa>{
#ifdef VSB_EMULATED  // every path compiled for AVX2, so that it can be tested there
#define F(feature)
#define VSB_ISA(name, lanes, bf16_dot, int8_dot, features) \
  {#name, name::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
#else
#define F(feature) &&__builtin_cpu_supports(#feature)
#define VSB_ISA(name, lanes, bf16_dot, int8_dot, features) {#name, name::kernels, true features},
#endif
#include "isa.def"
#undef VSB_ISA
#undef F
    };
  }();
  return all;
}

const Isa *find(const char *name) {
  for (const Isa &isa : isas())
    if (!strcmp(isa.name, name)) return &isa;
  return nullptr;
}

// Memory that lives on from call to call, so that no call pays for page faults again.
struct Buffer {
  char *data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
  char *at_least(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = (char *)std::aligned_alloc(4096, size);
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};

Buffer shared_buffer;                // codes of the keys; guarded by `running`
thread_local Buffer thread_scratch;  // of one work item
std::mutex running;

// Codes are kept for as many kv heads at once as fit in here for each thread (at least one head:
// 18 MB at 128K tokens and head_dim 128). More threads need more heads to share out.
constexpr int64_t kCodeBytesPerThread = 16 << 20;

struct Memory {
  char *base;
  int64_t used = 0;
  template <class T>
  T *take(int64_t count) {
    T *piece = reinterpret_cast<T *>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

constexpr int kCodeBits[4] = {8, 6, 4, VSB_FP4};  // of KvHead::codes

bool needs_codes(const VsbPolicy &p, int32_t seq_len, int bits) {
  return is_followed(p, seq_len) && is_scored(p) && p.tau > 0 && p.bits == bits;
}

// Lays one kv head's codes out in memory; with a null base only counts.
KvHead lay_out(const VsbProblem &p, const VsbRequest &request, int32_t head, Memory &memory) {
  const int64_t pages = ceil_div(request.seq_len, p.page_size),
                group = p.num_heads / p.num_kv_heads;
  const int64_t subs = pages * (p.page_size / kSub);
  KvHead kv = {&request, head, nullptr, nullptr, {}};
  const VsbPolicy *policies = p.policies + head * group;
  for (int i = 0; i < 4; i++) {
    const bool needed = std::any_of(policies, policies + group, [&](const VsbPolicy &policy) {
      return needs_codes(policy, request.seq_len, kCodeBits[i]);
    });
    if (!needed) continue;
    if (!kv.mean) {
      kv.mean = memory.take<float>(p.head_dim);
      kv.page_sums = memory.take<double>(pages * p.head_dim);
    }
    kv.codes[i].codes = memory.take<int8_t>(subs * kSub * p.head_dim);
    kv.codes[i].shifts = memory.take<int32_t>(subs * kSub);
    kv.codes[i].step = memory.take<float>(subs);
  }
  return kv;
}

struct Item {
  int32_t kv, index, count;  // which of the wave's kv heads; page, or q blocks from there on
  double cost;
};

// From so many query rows of so long a context on, q blocks go in pairs: before, there may be too
// few items for many threads. By the shape alone, so that no result depends on the threads.
constexpr int32_t kPairedRows = 1024, kPairedContext = 8192;

struct Wave {
  std::vector<KvHead> heads;
  std::vector<Item> pages, blocks;
};

// Dense heads see every key; the others mostly a share of it. Only the order depends on this.
double cost_of(const VsbProblem &p, int32_t kv_head, int32_t keys) {
  const int32_t group = p.num_heads / p.num_kv_heads;
  double cost = 0;
  for (int32_t g = 0; g < group; g++)
    cost += p.policies[kv_head * group + g].selector == VSB_DENSE ? 8 : 1;
  return cost * keys;
}

void plan_wave(const VsbProblem &p, Wave &wave) {
  for (int32_t i = 0; i < static_cast<int32_t>(wave.heads.size()); i++) {
    const KvHead &kv = wave.heads[i];
    const VsbRequest &r = *kv.request;
    if (kv.mean)
      for (int32_t page = 0; page * p.page_size < r.seq_len; page++)
        wave.pages.push_back({i, page, 1, 0});
    const bool paired = r.query_len >= kPairedRows && r.seq_len >= kPairedContext;
    const int32_t first = (r.seq_len - r.query_len) / kQBlock, all = ceil_div(r.seq_len, kQBlock);
    for (int32_t b = first, count; b < all; b += count) {
      count = paired ? std::min(most_blocks(p), all - b) : 1;
      wave.blocks.push_back({i, b, count, cost_of(p, kv.head, count * (b + count) * kQBlock)});
    }
  }
  std::stable_sort(wave.blocks.begin(), wave.blocks.end(),
                   [](const Item &a, const Item &b) { return a.cost > b.cost; });
}

void finish_mean(const VsbProblem &p, const KvHead &kv) {
  const int32_t pages = ceil_div(kv.request->seq_len, p.page_size);
  for (int32_t d = 0; d < p.head_dim; d++) {
    double sum = 0;
    for (int32_t page = 0; page < pages; page++)
      sum += kv.page_sums[page * (int64_t)p.head_dim + d];
    kv.mean[d] = static_cast<float>(sum / kv.request->seq_len);
  }
}

void run_wave(const VsbProblem &p, const Kernels &k, const Wave &wave, int64_t scratch_bytes) {
  std::atomic<size_t> next_sum{0}, next_mean{0}, next_page{0}, next_block{0};
  std::atomic<bool> out_of_memory{false};
  auto each = [](std::atomic<size_t> &next, size_t count, auto &&work) {
    for (size_t i; (i = next.fetch_add(1)) < count;) work(i);
  };
#pragma omp parallel
  {
    char *scratch = nullptr;
    std::vector<int64_t> tiles;
    try {
      scratch = thread_scratch.at_least(scratch_bytes);
      tiles.resize(2 * p.num_heads);
    } catch (const std::bad_alloc &) {
      out_of_memory = true;
    }
    double began = omp_get_wtime();
    each(next_sum, wave.pages.size(),
         [&](size_t i) { k.sum_keys(p, wave.heads[wave.pages[i].kv], wave.pages[i].index); });
    double packing = omp_get_wtime() - began;
#pragma omp barrier
    each(next_mean, wave.heads.size(), [&](size_t i) {
      if (wave.heads[i].mean) finish_mean(p, wave.heads[i]);
    });
#pragma omp barrier
    began = omp_get_wtime();
    each(next_page, wave.pages.size(),
         [&](size_t i) { k.quantize_keys(p, wave.heads[wave.pages[i].kv], wave.pages[i].index); });
    packing += omp_get_wtime() - began;
#pragma omp barrier
    if (!out_of_memory) {
      ItemStats stats = {tiles.data(), tiles.data() + p.num_heads, 0, 0};
      each(next_block, wave.blocks.size(), [&](size_t i) {
        const Item &item = wave.blocks[i];
        k.attend(p, wave.heads[item.kv], item.index, item.count, scratch, stats);
      });
#pragma omp critical
      {
        for (int32_t h = 0; h < p.num_heads; h++) {
          p.tiles_computed[h] += stats.tiles_computed[h];
          p.tiles_causal[h] += stats.tiles_causal[h];
        }
        *p.pack_seconds += packing;
        *p.select_seconds += stats.select_seconds;
        *p.attend_seconds += stats.attend_seconds;
      }
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

void forward(const VsbProblem &p, const Kernels &k) {
  int32_t longest = 0;
  for (int32_t r = 0; r < p.num_requests; r++) longest = std::max(longest, p.requests[r].seq_len);
  const int64_t scratch_bytes = k.scratch_bytes(p, longest);
  const int64_t code_bytes = kCodeBytesPerThread * omp_get_max_threads();
  const int32_t pairs = p.num_requests * p.num_kv_heads;
  for (int32_t at = 0; at < pairs;) {
    // As many kv heads as the memory for codes allows, laid out first on paper.
    Memory counter{nullptr};
    int32_t stop = at;
    do {
      lay_out(p, p.requests[stop / p.num_kv_heads], stop % p.num_kv_heads, counter);
      stop++;
    } while (stop < pairs && counter.used < code_bytes);
    Memory memory{shared_buffer.at_least(counter.used + 64)};
    Wave wave;
    for (; at < stop; at++)
      wave.heads.push_back(
          lay_out(p, p.requests[at / p.num_kv_heads], at % p.num_kv_heads, memory));
    plan_wave(p, wave);
    run_wave(p, k, wave, scratch_bytes);
  }
}

}  // namespace
}  // namespace vsb

extern "C" {

int32_t vsb_abi(void) { return 8; }

const char *vsb_isas(void) {
  static const std::string names = [] {
    std::string all;
    for (const vsb::Isa &isa : vsb::isas()) all += (all.empty() ? "" : ",") + std::string(isa.name);
    return all;
  }();
  return names.c_str();
}

int32_t vsb_usable(const char *name) {
  const vsb::Isa *isa = vsb::find(name);
  return isa ? isa->usable : -1;
}

int32_t vsb_peak(const char *name, double *gops) {
  const vsb::Isa *isa = vsb::find(name);
  if (!isa || !isa->usable) return -1;
  isa->kernels(VSB_BF16).peak(gops);
  return 0;
}

int32_t vsb_forward(const char *name, const VsbProblem *problem) {
  const vsb::Isa *isa = vsb::find(name);
  if (!isa || !isa->usable) return -1;
  try {
    std::lock_guard<std::mutex> guard(vsb::running);
    vsb::forward(*problem, isa->kernels(problem->dtype));
  } catch (const std::bad_alloc &) {
    return -1;
  }
  return 0;
}
}
