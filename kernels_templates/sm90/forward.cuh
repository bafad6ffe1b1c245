// The forward kernel of Hopper: TMA loads, wgmma, one warpgroup that plans, loads and stores and one or more that
// compute. Compiled behind cuda/params.h, sm90/config.h, the emitted Mod in its folded form, kConfig and the products
// that the compiler writes for it: multiply_qk, multiply_pv, wait_for_scores, wait_for_all.
//
// docs/sm90.md explains roles, barriers and what was tried.
namespace attnjit::sm90 {

using cuda::anew;
using cuda::exp2_approx;
using cuda::IndexRange;
using cuda::Mod;
using cuda::Tile;
using cuda::TileKind;

constexpr int kWarpgroups = kConfig.warpgroups;
constexpr int kTileM = tile_m(kConfig);
constexpr int kTileN = kConfig.tile_n;
constexpr int kStages = kConfig.stages;
constexpr int kThreads = threads(kConfig);
constexpr int kRows = kRowsOfWarpgroup;
constexpr int kQColumns = columns(kConfig.head_dim);
constexpr int kVColumns = columns(kConfig.head_dim_v);
constexpr int kScores = kTileN / 2;                       // of a thread: elements of S
constexpr int kProbabilities = kTileN / 4;                // words of P
constexpr int kOutputs = padded(kConfig.head_dim_v) / 2;  // elements of O
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
constexpr float kLn2 = 0.693147180559945309f;

static_assert(kWarpgroups >= (kConfig.ping_pong ? 2 : 1) && kWarpgroups <= 4 && kTileN % 16 == 0 && kTileN <= 256);

// Registers of a thread, of the loading warpgroup and of the others; a block gets no more than it starts with.
constexpr int kLoaderRegisters = kWarpgroups == 1 ? 96 : kWarpgroups == 2 ? 40 : 32;
constexpr int kComputeRegisters = kWarpgroups <= 2 ? 232 : kWarpgroups == 3 ? 160 : 112;

// Whether tiles of which each query keeps all keys or none are worth telling apart: their scores need no mask, but a
// reference by row.
constexpr bool kSeesRows = Mod::kKnowsRows && Mod::kIdentity && kConfig.frozen;
// By FMAs the exponential of -inf would not be 0.
static_assert(!kSeesRows || kConfig.fma_exponentials == 0);

template <bool kIs>
struct Choice {
  static constexpr bool kValue = kIs;
};

// ---- Shared memory

using Address = unsigned;  // in the shared window

constexpr int kQBuffers = kConfig.q_buffers;
constexpr int kQOfWarpgroup = q_bytes_of_warpgroup(kConfig);
constexpr int kKAt = kQBuffers * q_bytes(kConfig);
constexpr int kVAt = kKAt + kStages * k_bytes(kConfig);
constexpr int kBarriersAt = kVAt + kStages * v_bytes(kConfig);
// Of a warpgroup's part of the queries.
constexpr int q_at(int buffer, int warpgroup) { return buffer * q_bytes(kConfig) + warpgroup * kQOfWarpgroup; }

// Of a load of K, and the V beside it. Unsigned, which takes fewer instructions.
constexpr int stage_of(int load) { return static_cast<int>(static_cast<unsigned>(load) % kStages); }
constexpr int parity_of(int load) { return static_cast<int>(static_cast<unsigned>(load) / kStages % 2); }

// Barriers, as bytes behind kBarriersAt; of stages and slots one behind the other.
constexpr int kKFull = 0;
constexpr int kKEmpty = kKFull + 8 * kStages;
constexpr int kVFull = kKEmpty + 8 * kStages;
constexpr int kVEmpty = kVFull + 8 * kStages;
constexpr int kQFull = kVEmpty + 8 * kStages;
constexpr int kOFull = kQFull + 8 * kQBuffers;
constexpr int kVerdictSlots = 4;
constexpr int kJudged = kOFull + 8 * kQBuffers;
// A tile is taken no earlier than it has to be: where no verdict is waited for, only the slots hold the planning warp
// back.
constexpr int kMessageSlots = kConfig.frozen ? 4 : 2;
constexpr int kMessageFull = kJudged + 8 * kVerdictSlots;
constexpr int kMessageEmpty = kMessageFull + 8 * kMessageSlots;
// And what warps tell each other.
constexpr int kMessages = (kMessageEmpty + 8 * kMessageSlots + 15) / 16 * 16;
constexpr int kMessageBytes = 64;
// By slot and warpgroup: the tile to be done again and 1, or 0.
constexpr int kVerdicts = kMessages + kMessageBytes * kMessageSlots;
constexpr int kNumbers = kVerdicts + 16 * kVerdictSlots;  // by stage: that of its tile of keys
static_assert(kNumbers + 4 * kStages <= kBarrierBytes);

__device__ __forceinline__ void store_shared(Address address, int x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ int load_shared(Address address) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

// The same value in every lane, and known to be: what is computed from it, descriptors above all, stays in uniform
// registers. Of loop bounds, too.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Likewise, and in such a register from here on: what it is computed from ptxas would compute anew for each use. The
// same in all lanes already.
__device__ __forceinline__ unsigned kept_uniform(unsigned x) {
  asm volatile("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(x));
  return x;
}

// ---- Barriers

__device__ __forceinline__ void init(Address barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(Address barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(Address barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE_%=;\n"
      "bra AGAIN_%=;\nDONE_%=:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Whether a barrier's phase is complete, or becomes so within about as many nanoseconds.
__device__ __forceinline__ bool is_complete(Address barrier, int parity, int within) {
  int result;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2, %3;\n"
      "selp.s32 %0, 1, 0, done;\n}"
      : "=r"(result)
      : "r"(barrier), "r"(parity), "r"(within)
      : "memory");
  return uniform(result) != 0;
}
// Named barriers.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
constexpr int kTurnBarrier = 1;  // and one per warpgroup; likewise for what a warpgroup does together
constexpr int kOwnBarrier = 8;

// Whether `condition` holds in any thread of the warpgroup; all of them ask.
__device__ __forceinline__ bool any_of_warpgroup(int warpgroup, bool condition) {
  int result = condition;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %0, 0;\nbarrier.cta.red.or.pred q, %1, 128, p;\nselp.s32 %0, 1, 0, q;\n}"
      : "+r"(result)
      : "r"(kOwnBarrier + warpgroup)
      : "memory");
  return uniform(result) != 0;
}

// In the place of a product, so that what is waited for is the same.
__device__ __forceinline__ void multiply_nothing() {
  asm volatile("wgmma.fence.sync.aligned;\nwgmma.commit_group.sync.aligned;" ::: "memory");
}

// ---- TMA

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// `kColumns` boxes of `rows` rows from row `row` on.
template <int kColumns>
__device__ __forceinline__ void load_tile(Address to, const TensorMap& map, Address barrier, int rows, int row, int h,
                                          int b) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(to + c * rows * 128),
        "l"(&map), "r"(barrier), "r"(64 * c), "r"(row), "r"(h), "r"(b)
        : "memory");
  }
}
__device__ __forceinline__ void store_column(const TensorMap& map, Address from, int column, int row, int h, int b) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(column), "r"(row), "r"(h), "r"(b)
               : "memory");
}

// ---- Jobs

// A job is a tile of queries of one head, and the tiles of keys that some warpgroup needs. All are told of it in one
// message or more, each of tiles that lie one behind the other.
struct Message {
  int first_query;
  int h, b;
  int tile;           // the number of the tile of queries; kEnd: there is no more work
  int n, count;       // tiles of keys: the number of the first, the others follow in the direction of the job
  bool again;         // the second time, exactly
  bool ascending;     // the keys go by in their order, else backwards
  bool begins, ends;  // whether it is a job's first message, and last
};
constexpr int kEnd = -1;

__device__ __forceinline__ void store_message(Address slot, const Message& m) {
  const int flags = (m.again ? 1 : 0) | (m.ascending ? 2 : 0) | (m.begins ? 4 : 0) | (m.ends ? 8 : 0);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(slot), "r"(m.first_query), "r"(m.h), "r"(m.b),
               "r"(m.tile)
               : "memory");
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(slot + 16), "r"(m.n), "r"(m.count), "r"(flags), "r"(0)
               : "memory");
}
__device__ __forceinline__ void store_kinds(Address slot, int warpgroup, const Kinds& kinds) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(slot + 32 + 8 * warpgroup), "r"(kinds.skipped), "r"(kinds.full)
               : "memory");
}
// In all lanes. The lane that will say that it may be written again reads for its warp.
__device__ __forceinline__ Message load_message(Address slot) {
  int words[8] = {};
  if (threadIdx.x % 32 == 0) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(slot)
                 : "memory");
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[4]), "=r"(words[5]), "=r"(words[6]), "=r"(words[7])
                 : "r"(slot + 16)
                 : "memory");
  }
#pragma unroll
  for (int& word : words) word = uniform(word);
  const int flags = words[6];
  return {words[0], words[1],         words[2],         words[3],         words[4],
          words[5], (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
}
__device__ __forceinline__ Kinds load_kinds(Address slot, int warpgroup) {
  int words[2] = {};
  if (threadIdx.x % 32 == 0) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(slot + 32 + 8 * warpgroup)
                 : "memory");
  }
  return {static_cast<unsigned>(uniform(words[0])), static_cast<unsigned>(uniform(words[1]))};
}
__device__ __forceinline__ Address message_full(Address barriers, int number) {
  return barriers + kMessageFull + 8 * (static_cast<unsigned>(number) % kMessageSlots);
}
__device__ __forceinline__ Address message_empty(Address barriers, int number) {
  return barriers + kMessageEmpty + 8 * (static_cast<unsigned>(number) % kMessageSlots);
}
__device__ __forceinline__ Address message_at(Address barriers, int number) {
  return barriers + kMessages + kMessageBytes * (static_cast<unsigned>(number) % kMessageSlots);
}
constexpr int message_parity(int number) { return static_cast<int>(static_cast<unsigned>(number) / kMessageSlots % 2); }

// ---- The planning warp

// One lane of the warp, the same everywhere.
__device__ __forceinline__ bool elected() {
  int is_elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.s32 %0, 1, 0, p;\n}" : "=r"(is_elected));
  return is_elected != 0;
}

// Finds out what jobs consist of, as far ahead as there is room for it.
struct Planner {
  const ForwardParams& params;
  Address shared;
  int jobs = 0;      // so far
  int messages = 0;  // likewise
  int round = 0;     // of the block's own tiles

  __device__ __forceinline__ Address barrier(int which) const { return shared + kBarriersAt + which; }

  // This block's tile number `round`: of the schedule, of the counter that the blocks share, or round robin. None where
  // it is negative or not below params.tiles.
  __device__ __forceinline__ int tile_of_round(int round) const {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int at = round * blocks + block;
    if (params.schedule != nullptr) return round < params.rounds ? params.schedule[at] : -1;
    if (params.counter == nullptr || round == 0) return at;
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(params.counter, 1);
    return blocks + uniform(taken);
  }

  // `rows` queries, or those of them that there are, and all keys.
  __device__ __forceinline__ Tile whole_tile(const Message& job, int first_query, int rows) const {
    const cuda::ForwardParams& call = params.call;
    return {.b = job.b,
            .h_first = job.h,
            .h_last = job.h,
            .q_first = call.q_idx_origin + first_query,
            .q_last = call.q_idx_origin + min(first_query + rows, call.seqlen_q) - 1,
            .kv_first = call.kv_idx_origin,
            .kv_last = call.kv_idx_origin + call.seqlen_kv - 1};
  }

  static constexpr int kFullShift = 4;
  static constexpr unsigned kSkippedByAll = (1 << kWarpgroups) - 1;
  static constexpr unsigned kFullForAll = 1 << 2 * kFullShift;

  // What tile `n` of keys is to the warpgroups: their bits of Kinds::skipped, from kFullShift on those of Kinds::full,
  // and kFullForAll.
  __device__ __forceinline__ unsigned look(const Message& job, int n) const {
    const bool whole = (n + 1) * kTileN <= params.call.seqlen_kv;
    unsigned kinds = whole ? kFullForAll : 0;
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) {
      const int first_query = job.first_query + w * kRows;
      const bool exists = first_query < params.call.seqlen_q;
      // A warpgroup without queries asks about the last one.
      Tile tile = whole_tile(job, min(first_query, params.call.seqlen_q - 1), kRows);
      tile.kv_first += n * kTileN;
      tile.kv_last = tile.kv_first + kTileN - 1;
      const TileKind kind = Mod::tile_kind(params.call.captured, tile);
      const bool by_row = kSeesRows && kind == TileKind::kByRow && whole && exists;
      const bool skips = kind == TileKind::kSkip || !exists;
      const bool full = kind == TileKind::kFull && whole && exists;
      kinds |= static_cast<unsigned>(skips || by_row) << w;
      kinds |= static_cast<unsigned>(full || by_row) << (kFullShift + w);
      if (exists && !full) kinds &= ~kFullForAll;
    }
    return kinds;
  }
  static __device__ __forceinline__ bool is_needed(unsigned kinds) {
    return (kinds & (kSkippedByAll | kSkippedByAll << kFullShift)) != kSkippedByAll;
  }

  __device__ __forceinline__ Address slot() const { return message_at(shared + kBarriersAt, messages); }
  __device__ __forceinline__ void await_slot() const {
    wait(message_empty(shared + kBarriersAt, messages), message_parity(messages) ^ 1);
  }
  // Sends a message, whose kinds are in the slot already.
  __device__ __forceinline__ void send(const Message& message) {
    if (elected()) {
      store_message(slot(), message);
      arrive(message_full(shared + kBarriersAt, messages));
    }
    ++messages;
  }

  __device__ __forceinline__ void store_all(const Kinds& kinds) const {
    if (!elected()) return;
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) store_kinds(slot(), w, kinds);
  }

  // The tiles of keys of a job, of which it is asked what they are: all messages but the last, which is left in `job`.
  __device__ __forceinline__ void ask(Message& job, int first, int count) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    bool may_grow = false;  // whether what comes behind the message is full
#pragma unroll 1
    for (int number = 0; number < count; number += 32) {
      // Also in lanes beyond the last tile: what is asked about exists.
      const int own = number + min(lane, count - number - 1);
      const unsigned kinds = look(job, job.ascending ? first + own : first - own);
      unsigned left = __ballot_sync(0xffffffffu, is_needed(kinds) && lane < count - number);
      const unsigned full = __ballot_sync(0xffffffffu, (kinds & kFullForAll) != 0);
#pragma unroll 1
      while (left != 0) {
        const BitRun run = lowest_run(left);
        left &= ones_from(run.first + run.length);
        const int n = job.ascending ? first + number + run.first : first - number - run.first;
        const bool is_next = n == (job.ascending ? job.n + job.count : job.n - job.count);
        if (may_grow && is_next && cut_out({0, full}, run).full == ~0u) {
          job.count += run.length;
          continue;
        }
        if (job.count != 0) {
          send(job);
          job.begins = false;
          await_slot();
        }
        job.n = n;
        job.count = run.length;
        may_grow = true;
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w) {
          const Kinds of = cut_out({__ballot_sync(0xffffffffu, (kinds >> w & 1) != 0),
                                    __ballot_sync(0xffffffffu, (kinds >> (kFullShift + w) & 1) != 0)},
                                   run);
          may_grow &= (of.full & ~of.skipped) >> 31 != 0;
          if (elected()) store_kinds(slot(), w, of);
        }
      }
    }
  }

  // The tile of a job if some warpgroup found its sums too high, once, or -1; as soon as all have ended the job.
  __device__ __forceinline__ int failed(int job) const {
    if (job < 0) return -1;
    const int slot = job % kVerdictSlots;
    wait(barrier(kJudged + 8 * slot), job / kVerdictSlots % 2);
    int words[4] = {};
    // The lane that lets them be written again reads.
    if (threadIdx.x % 32 == 0) {
      const Address from = barrier(kVerdicts + 16 * slot);
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\nst.shared.v4.b32 [%4], {%5, %5, %5, %5};"
                   : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
                   : "r"(from), "r"(0)
                   : "memory");
    }
    return uniform(max(max(words[0], words[1]), max(words[2], words[3]))) - 1;
  }

  // The next tile to be worked on, one that failed again; kEnd where there is none.
  __device__ __forceinline__ int next_tile(bool& again) {
    // Before this job's verdict takes one of the four slots, that on the job three before it is heard.
    int behind = 3;
#pragma unroll 1
    while (true) {
      if constexpr (kConfig.frozen) {
        const int tile = failed(jobs - behind);
        again = tile >= 0;
        if (again) return tile;
      }
      if (behind == 3) {
        const int tile = tile_of_round(round);
        if (tile >= 0 && tile < params.tiles) {
          ++round;
          return tile;
        }
      }
      // There is no other work than what may have failed of what is under way.
      if (--behind == 0 || !kConfig.frozen) return kEnd;
    }
  }

  // All jobs of this block, and again those whose sums ran too high.
  __device__ __forceinline__ void run() {
    const cuda::ForwardParams& call = params.call;
#pragma unroll 1
    while (true) {
      // Not before there is room: work is taken as late as may be.
      await_slot();
      Message job = {};
      job.begins = true;
      job.tile = next_tile(job.again);
      if (job.tile == kEnd) {
        send(job);
        break;
      }
      const auto [head, m] = Mod::kHasMask ? masked_place(job.tile, params) : plain_place(job.tile, params);
      job.b = quotient(head, params.by_heads);
      job.h = head - job.b * call.num_heads;
      job.first_query = m * kTileM;
      int begin = 0, end = (call.seqlen_kv + kTileN - 1) / kTileN;
      if constexpr (Mod::kKnowsRanges) {
        const IndexRange range = Mod::kv_range(call.captured, whole_tile(job, job.first_query, kTileM));
        const bool none = range.first > range.last;
        begin = none ? 0 : (range.first - call.kv_idx_origin) / kTileN;
        end = none ? 0 : (range.last - call.kv_idx_origin) / kTileN + 1;
      }
      if constexpr (Mod::kLinear) {
        job.ascending = Mod::slope(call.captured, Mod::block(call.captured, job.b, job.h)) > 0.0f;
      }
      if constexpr (Mod::kKnowsTiles) {
        ask(job, job.ascending ? begin : end - 1, end - begin);
      } else {
        // The last tile of keys, if it is not a whole one, comes first or last. A mask is looked at in any case.
        const int cut = Mod::kHasMask || call.seqlen_kv % kTileN == 0 ? 0 : 1;
        Kinds kinds = {0, Mod::kHasMask ? 0 : 0xffffffffu};
        job.n = job.ascending ? 0 : end - 1;
        job.count = end;
        if (cut != 0 && !job.ascending) kinds.full &= ~1u;
        if (cut != 0 && job.ascending && end > 1) {
          job.count = end - 1;
          store_all(kinds);
          send(job);
          job.begins = false;
          await_slot();
          job.n = end - 1;
          job.count = 1;
        }
        if (cut != 0 && job.ascending) kinds.full = 0;
        store_all(kinds);
      }
      job.ends = true;
      send(job);
      ++jobs;
    }
  }
};

// ---- The loading warp

// Loads what jobs need, in the order in which it is used.
struct Loader {
  const ForwardParams& params;
  Address shared;
  int loads = 0;  // of K, so far

  __device__ __forceinline__ Address barrier(int which) const { return shared + kBarriersAt + which; }

  __device__ __forceinline__ void load_k(int b, int h_kv, int n) {
    const int stage = stage_of(loads);
    wait(barrier(kKEmpty + 8 * stage), parity_of(loads) ^ 1);
    if (elected()) {
      store_shared(barrier(kNumbers + 4 * stage), n);
      arrive_expecting(barrier(kKFull + 8 * stage), k_bytes(kConfig));
      load_tile<kQColumns>(shared + kKAt + stage * k_bytes(kConfig), params.k, barrier(kKFull + 8 * stage), kTileN,
                           n * kTileN, h_kv, b);
    }
    ++loads;
  }
  // Beside the load of K number `load`.
  __device__ __forceinline__ void load_v(int b, int h_kv, int n, int load) {
    const int stage = stage_of(load);
    wait(barrier(kVEmpty + 8 * stage), parity_of(load) ^ 1);
    if (elected()) {
      arrive_expecting(barrier(kVFull + 8 * stage), v_bytes(kConfig));
      load_tile<kVColumns>(shared + kVAt + stage * v_bytes(kConfig), params.v, barrier(kVFull + 8 * stage), kTileN,
                           n * kTileN, h_kv, b);
    }
  }

  __device__ __forceinline__ void run() {
    const Address barriers = shared + kBarriersAt;
    // The tile whose V is to come, of the job. Hidden, else the loop is taken apart for what it starts with.
    int previous = anew(-1);
#pragma unroll 1
    for (int messages = 0;; ++messages) {
      wait(message_full(barriers, messages), message_parity(messages));
      const Message job = load_message(message_at(barriers, messages));
      if (elected()) arrive(message_empty(barriers, messages));
      if (job.tile == kEnd) break;
      const int h_kv = quotient(job.h, params.by_group);
      int n = job.n;
#pragma unroll 1
      for (int left = job.count; left > 0; --left) {
        load_k(job.b, h_kv, n);
        if (previous >= 0) load_v(job.b, h_kv, previous, loads - 2);
        previous = n;
        n += job.ascending ? 1 : -1;
      }
      if (job.ends && previous >= 0) {
        load_v(job.b, h_kv, previous, loads - 1);
        previous = -1;
      }
    }
  }
};

// ---- The queries' warp

// Brings queries, and takes what the computing warps leave in their place.
struct Porter {
  const ForwardParams& params;
  Address shared;

  // For an output, in nanoseconds, before it is looked whether there is a job: one is known long before its Q is
  // needed.
  static constexpr int kPatience = 1000;

  __device__ __forceinline__ Address barrier(int which) const { return shared + kBarriersAt + which; }

  __device__ __forceinline__ void load_q(const Message& job, int jobs) const {
    const int buffer = jobs % kQBuffers;
    const Address full = barrier(kQFull + 8 * buffer);
    if (!elected()) return;
    if (job.count == 0) {
      arrive(full);
      return;
    }
    arrive_expecting(full, kWarpgroups * tile_bytes(kRows, kConfig.head_dim));
#pragma unroll 1
    for (int w = 0; w < kWarpgroups; ++w) {
      load_tile<kQColumns>(shared + q_at(buffer, w), params.q, full, kRows, job.first_query + w * kRows, job.h, job.b);
    }
  }
  // When it returns, its memory is free.
  __device__ __forceinline__ void store_o(const Message& job, int jobs) const {
    const int buffer = jobs % kQBuffers;
    wait(barrier(kOFull + 8 * buffer), jobs / kQBuffers % 2);
    if (!elected()) return;
    // What is done again is written after what was.
    if (job.again) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#pragma unroll 1
    for (int w = 0; w < kWarpgroups; ++w) {
      const int row = job.first_query + w * kRows;
      if (row >= params.call.seqlen_q) break;
#pragma unroll
      for (int c = 0; c < kVColumns; ++c) {
        store_column(params.o, shared + q_at(buffer, w) + c * kRows * 128, 64 * c, row, job.h, job.b);
      }
    }
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
  }

  __device__ __forceinline__ void run() {
    const Address barriers = shared + kBarriersAt;
    Message open[kQBuffers] = {};  // jobs whose output has not left, the oldest first
    int count = 0;
    int jobs = 0;
    const auto store_oldest = [&] {
      store_o(open[0], jobs - count);
#pragma unroll
      for (int i = 1; i < kQBuffers; ++i) open[i - 1] = open[i];
      --count;
    };
#pragma unroll 1
    for (int messages = 0;; ++messages) {
      const Address full = message_full(barriers, messages);
      // Output leaves when there is nothing else to do, or its memory is needed.
      while (count > 0 && !is_complete(full, message_parity(messages), 0)) {
        const int oldest = jobs - count;
        if (is_complete(barrier(kOFull + 8 * (oldest % kQBuffers)), oldest / kQBuffers % 2, kPatience)) store_oldest();
      }
      wait(full, message_parity(messages));
      const Message job = load_message(message_at(barriers, messages));
      if (elected()) arrive(message_empty(barriers, messages));
      if (!job.begins) continue;
      while (count > (job.tile == kEnd ? 0 : kQBuffers - 1)) store_oldest();
      if (job.tile == kEnd) break;
      load_q(job, jobs);
#pragma unroll
      for (int i = 0; i < kQBuffers; ++i) {
        if (i == count) open[i] = job;
      }
      ++count;
      ++jobs;
    }
  }
};

// ---- The computing warpgroups

// Element 4 * j + 2 * r + e of a thread's scores is row warp * 16 + lane / 4 + 8 * r, column 8 * j + 2 * (lane % 4) +
// e. A word of P is two neighbouring elements.

// Where the mod leaves the scores as they are, the scale is applied inside the exponential, in one fused operation. It
// is positive, so that the maximum of the products is that of the scores.
constexpr bool kIdentity = Mod::kIdentity;

// Whether it matters of what kind a tile is. Not where all are computed exactly; without it, ptxas finds registers for
// four warpgroups and a dense bias, and with it for two and a table.
constexpr bool kLooksAtKinds = kConfig.frozen || Mod::kKnowsTiles || kWarpgroups < 4;

// Captured values may be -inf, and leave rows without a reference that no mask drops.
constexpr bool kMayEmptyRows = !kIdentity && !Mod::kLinear && Mod::kReadsCaptured;

// 2^x without the special function unit: 2^floor(x) by the exponent's bits, the rest by a polynomial (minimax on [0,
// 1), relative error 2.7e-6). Above 2^127 it is that, below 2^-126 that, and of NaN the largest float: the sum then is
// too high to stand. Bounded mods, which stay within, do without both ends: beyond them the outcome may be negative,
// which no sum shows.
__device__ __forceinline__ float exp2_by_fma(float x) {
  if constexpr (!kConfig.bounded) x = cuda::min_nan(cuda::max_nan(x, -126.0f), 127.0f);
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's last bit counts whole numbers
  float floored;
  asm("add.rm.ftz.f32 %0, %1, %2;" : "=f"(floored) : "f"(x), "f"(kToInteger));
  const float rest = x - (floored - kToInteger);
  float y = fmaf(rest, 1.35341678e-2f, 5.20114601e-2f);
  y = fmaf(y, rest, 2.41442755e-1f);
  y = fmaf(y, rest, 6.93003833e-1f);
  y = fmaf(y, rest, 1.00000262f);
  return __int_as_float((__float_as_int(floored) << 23) + __float_as_int(y));
}

struct RowState {
  float reference[2];  // of the exponentials, in units of log2 over the factor; the maximum so far, unless frozen
  float sum[2];        // of the exponentials of this thread's columns
};

// Two values rounded to the element type, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned word;
  if constexpr (kConfig.element == Element::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
template <int kSize>
__device__ __forceinline__ void pack_all(unsigned (&words)[kSize], const float (&x)[2 * kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) words[i] = pack(x[2 * i], x[2 * i + 1]);
}

// Another lane's value.
template <typename T>
__device__ __forceinline__ T from_lane(const T& x, int lane) {
  unsigned words[(sizeof(T) + 3) / 4] = {};
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_sync(0xffffffffu, word, lane);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

template <typename Block, typename Row>
struct Warpgroup {
  const ForwardParams& params;
  const Block& block;
  const Row (&rows)[2];
  int first_row;     // logical position of this thread's first row
  int first_column;  // of this thread, in a tile
  float factor;      // on what the softmax is given

  using Column = decltype(Mod::column(nullptr, Block(), 0));
  static constexpr int kOwnColumns = Mod::kColumnLoads ? (kTileN + 31) / 32 : 1;

  // Where a tile of keys is: found out while its products are under way.
  struct Keys {
    int n;
    int first;       // logical position of this thread's first
    int difference;  // of the first row's and that
    float difference_float;
    // With kColumnLoads: of every 32 columns the one that has this lane's number. A thread's elements lie in as many
    // columns as the warp's: each lane asks for some, and for_each hands them round.
    Column own[kOwnColumns];
  };
  __device__ __forceinline__ Keys keys(int n) const {
    const int start = params.call.kv_idx_origin + n * kTileN;
    const int difference = first_row - start - first_column;
    Keys keys = {n, start + first_column, difference, static_cast<float>(difference), {}};
    if constexpr (Mod::kColumnLoads) {
#pragma unroll
      for (int i = 0; i < kOwnColumns; ++i) {
        const int column = min(32 * i + static_cast<int>(threadIdx.x) % 32, kTileN - 1);
        keys.own[i] = Mod::column(params.call.captured, block, start + column);
      }
    }
    return keys;
  }
  // Of this thread's column 8 * j + e.
  __device__ __forceinline__ Column column(const Keys& keys, int j, int e) const {
    if constexpr (Mod::kColumnLoads) {
      return from_lane(keys.own[8 * j / 32], 8 * j % 32 + first_column + e);
    } else {
      return Mod::column(params.call.captured, block, keys.first + 8 * j + e);
    }
  }

  // Calls f(element, row, column, diagonal) for each. Row r and column j lie on diagonal r - j of those 8 apart: each j
  // brings a new one, and the second row has the first's before.
  template <typename F>
  __device__ __forceinline__ void for_each(const Keys& keys, const F& f) const {
    const auto diagonal = [&](int offset) {
      return Mod::diagonal(params.call.captured, block, keys.difference + offset,
                           keys.difference_float + static_cast<float>(offset));
    };
    decltype(diagonal(0)) before[2] = {diagonal(8), diagonal(7)};
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Column column = this->column(keys, j, e);
        const auto own = diagonal(-8 * j - e);
        f(4 * j + e, 0, column, own);
        f(4 * j + 2 + e, 1, column, before[e]);
        before[e] = own;
      }
    }
  }

  // What the softmax is given, of all elements, in place: -inf where the mask drops it or there is no key.
  __device__ __forceinline__ void modify(float (&s)[kScores], const Keys& keys) const {
    const cuda::ForwardParams& call = params.call;
    if (call.score_prescale != 1.0f) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] *= call.score_prescale;
    }
    if constexpr (!kIdentity || Mod::kHasMask) {
      for_each(keys, [&](int i, int r, const auto& column, const auto& diagonal) {
        const float score = kIdentity && !Mod::kMaskReadsScore ? s[i] : s[i] * call.score_scale;
        float value = score;
        if constexpr (!kIdentity) value = Mod::score(call.captured, score, block, rows[r], column, diagonal);
        if constexpr (Mod::kHasMask) {
          if (!Mod::keep(call.captured, score, block, rows[r], column, diagonal)) value = -kInfinity;
        }
        s[i] = value;
      });
    }
    if (keys.n * kTileN + kTileN > call.seqlen_kv) {
      const int keys_left = call.seqlen_kv - keys.n * kTileN - first_column;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (8 * (i / 4) + i % 2 >= keys_left) s[i] = -kInfinity;
      }
    }
  }

  // The maximum of row `r`.
  static __device__ __forceinline__ float row_max(const float (&s)[kScores], int r) {
    float max[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
    for (int j = 1; j < kTileN / 8; ++j) {
      max[0] = fmaxf(max[0], s[4 * j + 2 * r]);
      max[1] = fmaxf(max[1], s[4 * j + 2 * r + 1]);
    }
    max[0] = fmaxf(max[0], max[1]);
    max[0] = fmaxf(max[0], __shfl_xor_sync(0xffffffffu, max[0], 1));
    return fmaxf(max[0], __shfl_xor_sync(0xffffffffu, max[0], 2));
  }

  // Scores to probabilities against the running maximum. `rescale`: for what was summed before.
  __device__ __forceinline__ void exact_softmax(float (&s)[kScores], RowState& state, float (&rescale)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float max = fmaxf(row_max(s, r), state.reference[r]);
      // Every element so far dropped: any finite reference makes their exponentials 0.
      const float finite_max = max == -kInfinity ? 0.0f : max;
      rescale[r] = exp2_approx((state.reference[r] - finite_max) * factor);
      state.reference[r] = max;
      const float offset = -finite_max * factor;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          x = exp2_approx(kIdentity ? fmaf(x, factor, offset) : x + offset);
          sum += x;
        }
      }
      state.sum[r] = fmaf(state.sum[r], rescale[r], sum);
    }
  }

  // Of element `i`: some exponentials are left to the FMA units.
  __device__ __forceinline__ float exponential(int i, float x) const {
    return i / 4 % 8 < kConfig.fma_exponentials ? exp2_by_fma(x) : exp2_approx(x);
  }

  // Of tiles of keys that lie one behind the other and whose kind is by row: where they are, and of tile `i` in lane
  // `i` the column that stands for all.
  struct TilesByRow {
    int first, step;  // logical positions
    Column column;
  };
  __device__ __forceinline__ TilesByRow tiles_by_row(int n, bool ascending, int count) const {
    const int first = params.call.kv_idx_origin + n * kTileN;
    const int step = ascending ? kTileN : -kTileN;
    const int own = min(static_cast<int>(threadIdx.x) % 32, count - 1);
    return {first, step, Mod::column(params.call.captured, block, first + own * step)};
  }
  // Which of this thread's rows keep the keys of tile `i`.
  struct KeptRows {
    bool row[2];
  };
  __device__ __forceinline__ KeptRows kept_rows(const TilesByRow& tiles, int i) const {
    const cuda::CapturedView* const captured = params.call.captured;
    const Column column = from_lane(tiles.column, i);
    const auto keeps = [&](int r) {
      const int difference = first_row + 8 * r - (tiles.first + i * tiles.step);
      const auto diagonal = Mod::diagonal(captured, block, difference, static_cast<float>(difference));
      return Mod::keep(captured, 0.0f, block, rows[r], column, diagonal);
    };
    return {{keeps(0), keeps(1)}};
  }
  // Rows that keep these keys, and none before, have their maximum as their reference.
  __device__ __forceinline__ void set_references(const float (&s)[kScores], const KeptRows& kept,
                                                 RowState& state) const {
    const auto is_unset = [&](int r) { return kept.row[r] && state.reference[r] == -kInfinity; };
    if (!__any_sync(0xffffffffu, is_unset(0) || is_unset(1))) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float max = row_max(s, r);
      if (is_unset(r)) state.reference[r] = max;
    }
  }

  // Scores, unmodified, of rows that keep them all or none, to probabilities against the reference as it is.
  __device__ __forceinline__ void frozen_softmax(float (&s)[kScores], RowState& state, const Keys& keys,
                                                 const KeptRows& kept) const {
    const cuda::ForwardParams& call = params.call;
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) offset[r] = kept.row[r] ? -state.reference[r] * factor : -kInfinity;
    if constexpr (kIdentity) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = exponential(i, fmaf(s[i], factor, offset[i / 2 % 2]));
    } else if constexpr (Mod::kLinear) {
      const float slope = Mod::slope(call.captured, block);
      const float base[2] = {fmaf(slope, keys.difference_float, offset[0]),
                             fmaf(slope, keys.difference_float + 8.0f, offset[1])};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float term = fmaf(slope, -static_cast<float>(8 * (i / 4) + i % 2), base[i / 2 % 2]);
        s[i] = exponential(i, fmaf(s[i], call.score_scale, term));
      }
    } else if constexpr (Mod::kAdditive) {
      for_each(keys, [&](int i, int r, const auto& column, const auto& diagonal) {
        const float term = Mod::term(call.captured, block, rows[r], column, diagonal) + offset[r];
        s[i] = exponential(i, fmaf(s[i], call.score_scale, term));
      });
    } else {
      for_each(keys, [&](int i, int r, const auto& column, const auto& diagonal) {
        const float value = Mod::score(call.captured, s[i] * call.score_scale, block, rows[r], column, diagonal);
        s[i] = exponential(i, value + offset[r]);
      });
    }
    // The order of the sums decides how ptxas orders all before them: by pairs it keeps the offset of a row at hand,
    // but loses more elsewhere where a mod has work of its own and the special function unit all exponentials.
    constexpr bool kByPairs = kIdentity || kConfig.fma_exponentials > 0;
    float sum[2] = {s[0] + s[1], s[2] + s[3]};
#pragma unroll
    for (int i = 4; i < kScores; i += 2) {
      float& of_row = sum[i / 2 % 2];
      of_row = kByPairs ? of_row + (s[i] + s[i + 1]) : of_row + s[i] + s[i + 1];
    }
    state.sum[0] += sum[0];
    state.sum[1] += sum[1];
  }
};

// ---- Epilogue

// A frozen sum that is not below this is done again: of NaN, too, and where P may have left the element type's range.
constexpr float kHighestSum = kConfig.element == Element::kBF16 ? 18446744073709551616.0f : 65504.0f;

// Writes lse and row_max of this thread's rows, of which `query` is the first, and finds what O is to be multiplied by:
// 0 of a row without keys, whose O is 0 whatever it was. Whether a frozen sum is too high to stand.
template <typename Block, typename Row>
__device__ __forceinline__ bool finish_rows(const Warpgroup<Block, Row>& own, const Message& job, int query,
                                            const RowState& state, float (&inverse)[2]) {
  const cuda::ForwardParams& call = own.params.call;
  bool is_high = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float reference = state.reference[r] * own.factor;
    bool empty = state.reference[r] == -kInfinity && sum == 0.0f;
    float shift = 0.0f;
    if constexpr (Mod::kHasShift) {
      shift = Mod::shift(call.captured, own.block, own.rows[r]);
      empty |= shift == -kInfinity && sum == sum;
      // Infinite less itself: NaN spreads over the row.
      if (!empty) sum += shift - shift;
    }
    inverse[r] = empty ? 0.0f : cuda::reciprocal_approx(sum);
    const int row = query + 8 * r;
    if (row >= call.seqlen_q) continue;
    is_high |= !(sum < kHighestSum);
    if (threadIdx.x % 4 != 0) continue;
    if (call.lse) {
      float log_sum;
      asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log_sum) : "f"(sum));
      call.lse[job.b * call.lse_stride[0] + job.h * call.lse_stride[1] + row * call.lse_stride[2]] =
          empty ? -kInfinity : (reference + shift + log_sum) * kLn2;
    }
    if constexpr (!kConfig.frozen) {
      if (call.row_max) {
        const float max = reference + shift;
        call.row_max[job.b * call.row_max_stride[0] + job.h * call.row_max_stride[1] + row * call.row_max_stride[2]] =
            empty                            ? -kInfinity
            : sum != sum && max != kInfinity ? sum
                                             : max * kLn2;
      }
    }
  }
  return is_high;
}

// Writes this warp's rows of O times `inverse` to shared memory as TMA takes them. Whether all that exist are finite.
__device__ __forceinline__ bool stage_output(const float (&o)[kOutputs], const float (&inverse)[2], int existing_rows,
                                             Address tile, int warp, int lane) {
  const Address row = tile + (warp * 16 + lane % 16) * 128;
  // What V has that is not finite stays out of rows without keys.
  const unsigned kept[2] = {inverse[0] == 0.0f ? 0 : ~0u, inverse[1] == 0.0f ? 0 : ~0u};
  unsigned largest[2] = {};
#pragma unroll
  for (int i = 0; i < kOutputs / 8; ++i) {
    unsigned words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int r = k % 2;
      words[k] = pack(o[8 * i + 2 * k] * inverse[r], o[8 * i + 2 * k + 1] * inverse[r]) & kept[r];
      if constexpr (!kConfig.frozen) continue;
      if constexpr (kConfig.element == Element::kBF16) {
        asm("max.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(largest[r]) : "r"(words[k]));
      } else {
        asm("max.NaN.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(largest[r]) : "r"(words[k]));
      }
    }
    const int chunk = 2 * i % 8 + lane / 16;  // of 16 bytes; 8 features
    const Address address = row + i / 4 * kRows * 128 + ((chunk ^ lane % 8) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
  constexpr unsigned kInfinite = kConfig.element == Element::kBF16 ? 0x7f80 : 0x7c00;
  const auto is_finite = [](unsigned word) { return (word & 0x7fff) < kInfinite && (word >> 16 & 0x7fff) < kInfinite; };
  return (existing_rows < 1 || is_finite(largest[0])) && (existing_rows < 2 || is_finite(largest[1]));
}

// ---- A warpgroup's work

__device__ __forceinline__ void compute(const ForwardParams& params, Address shared, int warpgroup) {
  const cuda::ForwardParams& call = params.call;
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const auto barrier = [&](int which) { return shared + kBarriersAt + which; };
  const auto release = [&](Address to) {
    if (lane == 0) arrive(to);
  };
  // Shared memory as wgmma is told of it. The low word holds the place, and the bytes from one column of 64 to the next
  // where they are read across columns.
  const auto low_word = [&](int at, int column_bytes) {
    return static_cast<unsigned>(column_bytes >> 4) << 16 | (shared + at) >> 4;
  };
  const auto descriptor = [&](unsigned low) {
    return static_cast<unsigned long long>(params.descriptors_high) << 32 | low;
  };
  const unsigned first_k = kept_uniform(low_word(kKAt, 16));
  const unsigned first_v = kept_uniform(low_word(kVAt, kTileN * 128));
  // Where K and V of a load are.
  struct Place {
    Address barriers;  // of the stage; kKFull and the others are offsets from here
    unsigned k, v;     // low words
    int parity;
  };
  const auto place_of = [&](int load) {
    const int stage = stage_of(load);
    return Place{.barriers = barrier(8 * stage),
                 .k = first_k + stage * (k_bytes(kConfig) >> 4),
                 .v = first_v + stage * (v_bytes(kConfig) >> 4),
                 .parity = parity_of(load)};
  };

  const int next_turn = uniform(kTurnBarrier + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1));
  // The warpgroups issue their products in turns, so that one's softmax runs beside another's products.
  const auto await_turn = [&] {
    if constexpr (kConfig.ping_pong) sync_threads(kTurnBarrier + warpgroup, 256);
  };
  const auto pass_turn = [&] {
    if constexpr (kConfig.ping_pong) arrive_threads(next_turn, 256);
  };
  if (kConfig.ping_pong && warpgroup == 0) arrive_threads(kTurnBarrier, 256);

  int messages = 0;  // so far
  Kinds kinds = {};  // of the last
  const auto next_message = [&] {
    wait(message_full(shared + kBarriersAt, messages), message_parity(messages));
    const Address slot = message_at(shared + kBarriersAt, messages);
    const Message message = load_message(slot);
    kinds = load_kinds(slot, warpgroup);
    release(message_empty(shared + kBarriersAt, messages));
    ++messages;
    return message;
  };

  // The number of a stage's tile of keys. A warpgroup could reckon it, but then what depends on it would come between
  // the products and delay them. The lane that will say that the stage may be written again reads for its warp.
  const auto number_of = [&](int stage) {
    int n = 0;
    if (lane == 0) n = load_shared(barrier(kNumbers + 4 * stage));
    return uniform(n);
  };

  int load = 0;  // of K: the number of the next step's
  // A scale of 0 or below, or beyond float's range: only exact steps look at it. Afterwards: some sum ran too high.
  bool always_exact = !kConfig.frozen || call.score_prescale != 1.0f;

  using Block = decltype(Mod::block(call.captured, 0, 0));
  using Row = decltype(Mod::row(call.captured, Block(), 0));
  using Own = Warpgroup<Block, Row>;

#pragma unroll 1
  for (int jobs = 0;; ++jobs) {
    const Message job = next_message();
    if (job.tile == kEnd) break;
    const int buffer = jobs % kQBuffers;
    const bool exact = always_exact || job.again;
    const int query = job.first_query + warpgroup * kRows + warp * 16 + lane / 4;
    const int first_row = call.q_idx_origin + query;
    const Block block = Mod::block(call.captured, job.b, job.h);
    const Row rows[2] = {Mod::row(call.captured, block, first_row), Mod::row(call.captured, block, first_row + 8)};
    const Own own{.params = params,
                  .block = block,
                  .rows = rows,
                  .first_row = first_row,
                  .first_column = lane % 4 * 2,
                  .factor = kIdentity ? call.score_scale : 1.0f};

    float s[kScores];
    float o[kOutputs];
    unsigned p[kProbabilities];
    RowState state = {{-kInfinity, -kInfinity}, {0.0f, 0.0f}};
#pragma unroll
    for (float& x : o) x = 0.0f;

    wait(barrier(kQFull + 8 * buffer), jobs / kQBuffers % 2);
    const unsigned long long q = descriptor(low_word(q_at(buffer, warpgroup), 16));
    bool pending = anew(0) != 0;  // whether P of the step before waits for its V; else the loop is taken apart for it
    // All warpgroups begin at once, and take turns from the second step on, also at steps that they leave out.
    bool takes_turn = false;
    int begin = load;  // of the message's steps
    int end = load + job.count;
    bool ends = job.ends;
    // Whether a row of this thread has met no key yet that its mask keeps.
    const auto is_unset = [&] {
      return (state.reference[0] == -kInfinity && query < call.seqlen_q) ||
             (state.reference[1] == -kInfinity && query + 8 < call.seqlen_q);
    };

    int by_row_from = 0;  // the step of the first of these
    typename Own::TilesByRow tiles_by_row = {};
    // S of a tile of keys beside O of the one before, if there is one. `by_row`: the tile's kind; of steps that are not
    // exact. `before`: where those of the step before are; then, where these.
    const auto advance = [&](auto is_exact, bool by_row, Place& before) {
      constexpr bool kExact = decltype(is_exact)::kValue;
      const bool has_v = !kExact || pending;
      const bool in_turn = !kExact || (Mod::kKnowsTiles ? takes_turn : pending);  // the same where nothing is left out
      const Place place = place_of(load);
      wait(place.barriers + kKFull, place.parity);
      if (in_turn) await_turn();
      multiply_qk(s, q, descriptor(place.k));
      if (has_v) {
        wait(before.barriers + kVFull, before.parity);
        multiply_pv(o, p, descriptor(before.v));
      } else {
        multiply_nothing();
      }
      if (in_turn) pass_turn();
      typename Own::Keys keys = {};
      if constexpr (kExact || !kIdentity) keys = own.keys(number_of(stage_of(load)));
      typename Own::KeptRows kept = {{true, true}};
      if (!kExact && kSeesRows && by_row) kept = own.kept_rows(tiles_by_row, load - by_row_from);
      wait_for_scores(s);
      release(place.barriers + kKEmpty);
      float rescale[2];
      if constexpr (kExact) {
        own.modify(s, keys);
        own.exact_softmax(s, state, rescale);
      } else {
        if (kSeesRows && by_row) own.set_references(s, kept, state);
        own.frozen_softmax(s, state, keys, kept);
      }
      wait_for_all(s, o);
      if (has_v) release(before.barriers + kVEmpty);
      before = place;
      if constexpr (kExact) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
      }
      pending = true;
      takes_turn = true;
      pack_all(p, s);
      ++load;
    };
    // O of the step before, alone.
    const auto catch_up = [&] {
      const Place before = place_of(load - 1);
      wait(before.barriers + kVFull, before.parity);
      multiply_pv(o, p, descriptor(before.v));
      wait_for_output(o);
      release(before.barriers + kVEmpty);
      pending = false;
    };

    bool settled = false;  // whether all rows are known to have a reference
#pragma unroll 1
    while (true) {
      if (load >= end) {
        if (ends) break;
        const Message next = next_message();
        begin = load;
        end = load + next.count;
        ends = next.ends;
      }
      const int bit = min(load - begin, 31);
      if (Mod::kKnowsTiles && is_skipped(kinds, bit)) {
        if (pending) catch_up();
        const Place place = place_of(load);
        wait(place.barriers + kKFull, place.parity);
        if (takes_turn) {
          await_turn();
          pass_turn();
        }
        takes_turn = true;
        release(place.barriers + kKEmpty);
        wait(place.barriers + kVFull, place.parity);
        release(place.barriers + kVEmpty);
        ++load;
        continue;
      }
      // As far as tiles are of one kind.
      const int same_end = kLooksAtKinds ? load + same_from(kinds, load - begin, end - begin) : end;
      int exact_end = same_end, frozen_end = same_end;
      const bool by_row = kSeesRows && !exact && is_by_row(kinds, bit);
      if (by_row) exact_end = pending ? load : load + 1;
      if constexpr (kConfig.frozen) {
        const bool full = is_full(kinds, bit);
        if (full && !exact) {
          if ((Mod::kHasMask || kMayEmptyRows) && pending && !settled) {
            settled = !any_of_warpgroup(warpgroup, is_unset());
          }
          exact_end = settled && pending ? load : load + 1;
          if (kMayEmptyRows && !settled) frozen_end = exact_end;
        }
        settled |= !kMayEmptyRows && (full || !Mod::kHasMask);
      }
      Place before = place_of(load - 1);
#pragma unroll 1
      while (load < exact_end) advance(Choice<true>(), false, before);
      if constexpr (kConfig.frozen) {
        if (load < frozen_end) {
          if (by_row) {
            // What of the mask they need is asked for before: they are 32 at most, as messages grow by full tiles.
            by_row_from = load;
            const Place place = place_of(load);
            wait(place.barriers + kKFull, place.parity);
            tiles_by_row = own.tiles_by_row(number_of(stage_of(load)), job.ascending, frozen_end - load);
          }
#pragma unroll 1
          while (load < frozen_end) advance(Choice<false>(), by_row, before);
          // An exact step to come would rescale a sum that ran too high, and hide it.
#pragma unroll
          for (float& sum : state.sum) sum = sum < kHighestSum ? sum : kInfinity;
        }
      }
    }
    if (pending) catch_up();
    // All of the warpgroup are done with Q: O may take its place.
    sync_threads(kOwnBarrier + warpgroup, 128);
    float inverse[2];  // 0 of a row without keys
    const bool is_high = finish_rows(own, job, query, state, inverse);
    const int existing_rows = query + 8 < call.seqlen_q ? 2 : query < call.seqlen_q ? 1 : 0;
    const bool is_finite = stage_output(o, inverse, existing_rows, shared + q_at(buffer, warpgroup), warp, lane);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    release(barrier(kOFull + 8 * buffer));
    if constexpr (kConfig.frozen) {
      const bool failed = any_of_warpgroup(warpgroup, !exact && (is_high || !is_finite));
      if (thread == 0) {
        const int slot = jobs % kVerdictSlots;
        store_shared(barrier(kVerdicts + 16 * slot + 4 * warpgroup), failed ? job.tile + 1 : 0);
        arrive(barrier(kJudged + 8 * slot));
      }
      // Which block takes which tile off a counter is chance, and must not decide what is computed exactly.
      always_exact |= failed && params.counter == nullptr;
    }
  }
}

}  // namespace attnjit::sm90

extern "C" __global__ void __launch_bounds__(attnjit::sm90::kThreads, 1)
    attnjit_forward(const __grid_constant__ attnjit::sm90::ForwardParams params) {
  using namespace attnjit::sm90;
  extern __shared__ char dynamic[];
  const Address shared =
      (static_cast<Address>(__cvta_generic_to_shared(dynamic)) + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  const Address barriers = shared + kBarriersAt;
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    prefetch_map(params.q);
    prefetch_map(params.k);
    prefetch_map(params.v);
    prefetch_map(params.o);
    constexpr int kWarps = 4 * kWarpgroups;
    for (int stage = 0; stage < kStages; ++stage) {
      init(barriers + kKFull + 8 * stage, 1);
      init(barriers + kKEmpty + 8 * stage, kWarps);
      init(barriers + kVFull + 8 * stage, 1);
      init(barriers + kVEmpty + 8 * stage, kWarps);
    }
    for (int buffer = 0; buffer < kQBuffers; ++buffer) {
      init(barriers + kQFull + 8 * buffer, 1);
      init(barriers + kOFull + 8 * buffer, kWarps);
    }
    for (int slot = 0; slot < kVerdictSlots; ++slot) init(barriers + kJudged + 8 * slot, kWarpgroups);
    for (int slot = 0; slot < kMessageSlots; ++slot) {
      init(barriers + kMessageFull + 8 * slot, 1);
      init(barriers + kMessageEmpty + 8 * slot, kWarps + 2);
    }
    for (int i = 0; i < 4 * kVerdictSlots; ++i) store_shared(barriers + kVerdicts + 4 * i, 0);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoaderRegisters));
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == 0) Loader{params, shared}.run();
    if (warp == 1) Planner{params, shared}.run();
    if (warp == 2) Porter{params, shared}.run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kComputeRegisters));
    compute(params, shared, warpgroup - 1);
  }
}
