// Tokens of a Llama-like model in float32, several a call, by a team of threads.
//
// Rows are (token, slot, position). All rows of a pass go through each matrix together; a matrix lies in
// panels of 16 of its rows, so that a panel is read once for six rows of numbers, or several panels for one,
// and the sums stay in registers. Keys and values go into the engine's cache: slots x groups x capacity x width.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

namespace {

constexpr int PANEL = 16, TILE = 6;
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i8{__VA_ARGS__})
#endif

inline v8 load(const float *p) { return *reinterpret_cast<const v8 *>(p); }
inline void store(float *p, v8 x) { *reinterpret_cast<v8 *>(p) = x; }

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// e^x by 2^n e^r, |r| <= ln 2 / 2, and Taylor's series: an error of some units in the last place. NaN stays.
inline v8 exponential(v8 given) {
    const v8 nothing = {};
    v8 x = given == given ? given : nothing;
    x = x < -87.0f ? nothing - 87.0f : x;
    x = x > 88.0f ? nothing + 88.0f : x;
    const i8 n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? nothing - 0.5f : nothing + 0.5f), i8);
    const v8 m = __builtin_convertvector(n, v8);
    const v8 r = (x - m * 0.693145752f) - m * 1.42860677e-6f;
    v8 y = nothing + 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const i8 bits = (n + 127) << 23;
    v8 power;
    std::memcpy(&power, &bits, sizeof power);
    return given == given ? y * power : given;
}

inline float sum_of(v8 x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

// The sums of eight vectors, as one: halves of neighbours are added three times.
inline v8 sums_of(const v8 *x) {
    v8 pairs[4], fours[2];
    for (int i = 0; i < 4; ++i) {
        const v8 a = x[2 * i], b = x[2 * i + 1];
        pairs[i] = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const v8 a = pairs[2 * i], b = pairs[2 * i + 1];
        fours[i] = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    const v8 a = fours[0], b = fours[1];
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

// Values (seen, K) weighted by their shares: 8 W of the K numbers. Meanwhile as much is fetched at `next`.
template <int W>
inline void mix(const float *share, const float *v, int64_t seen, int64_t K, float scale,
                const float *next, float *out) {
    v8 sum[2][W];
    for (int w = 0; w < W; ++w) sum[0][w] = sum[1][w] = v8{};
    int64_t c = 0;
    for (; c + 2 <= seen; c += 2)
        for (int u = 0; u < 2; ++u) {
            for (int w = 0; w < W; w += 2) __builtin_prefetch(next + (c + u) * K + 8 * w);
            for (int w = 0; w < W; ++w) sum[u][w] += load(v + (c + u) * K + 8 * w) * share[c + u];
        }
    if (c < seen)
        for (int w = 0; w < W; ++w) sum[0][w] += load(v + c * K + 8 * w) * share[c];
    for (int w = 0; w < W; ++w) store(out + 8 * w, (sum[0][w] + sum[1][w]) * scale);
}

// Threads that wait for each other by spinning: work between two waits takes microseconds.
class Barrier {
  public:
    void wait(int count) {
        if (count == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < 4000) pause();
            else std::this_thread::yield();
        }
    }

  private:
    std::atomic<int> arrived_{0}, phase_{0};
};

// R rows through P panels: as many sums as keep the processor busy, and as its registers hold. Each sum is
// added up in the order of the width whatever R and P are, so that a row's numbers do not depend on who else
// is in the batch. Meanwhile the panels at `next` are fetched, as memory is slower than this.
template <int R, int P>
inline void tile(const float *panels, const float *x, int64_t width, const float *next,
                 float (*out)[PANEL]) {
    v8 sum[P][R][2];
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) sum[p][r][0] = sum[p][r][1] = v8{};
    for (int64_t k = 0; k < width; ++k)
        for (int p = 0; p < P; ++p) {
            const int64_t at = (p * width + k) * PANEL;
            if (P == 1) __builtin_prefetch(next + at);
            const v8 a = load(panels + at), b = load(panels + at + 8);
            for (int r = 0; r < R; ++r) {
                const float f = x[r * width + k];
                sum[p][r][0] += a * f;
                sum[p][r][1] += b * f;
            }
        }
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) {
            store(out[p * R + r], sum[p][r][0]);
            store(out[p * R + r] + 8, sum[p][r][1]);
        }
}

// Rows begin…end of a batch through a number of panels from one on.
struct Block {
    int64_t begin, end, panel;
    int panels;
    bool last;  // of the rows: the next block has other panels

    int rows() const { return static_cast<int>(end - begin); }
    int pieces() const { return panels * rows(); }  // of PANEL numbers each
    int64_t row_of(int piece) const { return begin + piece % rows(); }
    int64_t column_of(int piece) const { return (panel + piece / rows()) * PANEL; }

    // Pieces of the products of `in` (rows, width) with a matrix.
    void multiply(const float *in, int64_t width, const float *matrix, float (*out)[PANEL]) const {
        const float *from = matrix + panel * PANEL * width, *x = in + begin * width;
        const float *next = last ? from + panels * PANEL * width : from;
        switch (8 * panels + rows()) {
        case 8 + 1: return tile<1, 1>(from, x, width, next, out);
        case 8 + 2: return tile<2, 1>(from, x, width, next, out);
        case 8 + 3: return tile<3, 1>(from, x, width, next, out);
        case 8 + 4: return tile<4, 1>(from, x, width, next, out);
        case 8 + 5: return tile<5, 1>(from, x, width, next, out);
        case 8 + 6: return tile<6, 1>(from, x, width, next, out);
        case 16 + 1: return tile<1, 2>(from, x, width, next, out);
        case 16 + 2: return tile<2, 2>(from, x, width, next, out);
        case 16 + 3: return tile<3, 2>(from, x, width, next, out);
        case 24 + 1: return tile<1, 3>(from, x, width, next, out);
        default: return tile<1, 4>(from, x, width, next, out);
        }
    }
};

// n rows through a thread's share of `all` panels. Few rows take several panels at once; of many, each panel
// is read by near six at a time.
template <class Work> inline void share_out(int me, int count, int64_t n, int64_t all, Work work) {
    const int64_t first = all * me / count, last = all * (me + 1) / count;
    if (n <= 3) {
        const int64_t most = n == 1 ? 4 : 2;
        for (int64_t p = first; p < last; p += most)
            work(Block{0, n, p, static_cast<int>(std::min(most, last - p)), true});
        return;
    }
    const int64_t parts = (n + TILE - 1) / TILE;
    for (int64_t p = first; p < last; ++p)
        for (int64_t i = 0; i < parts; ++i)
            work(Block{n * i / parts, n * (i + 1) / parts, p, 1, i + 1 == parts});
}

}  // namespace

extern "C" {

// What Python fills in (native.py has the same order).
struct Shape {
    int64_t layers, width, heads, groups, head, hidden, vocab, slots, capacity, rows, threads;
    float eps;
    const float *table, *gain, *scores, *cos, *sin;
    const float *const *weights;  // of each layer: qkv, out, gate, up, down, in panels
    float *const *caches;         // of each layer: keys, values
    float *logits;                // rows x the vocabulary, rounded up to whole panels
};

// How the tokens of a row are chosen; uniform numbers come step by step.
struct Draw {
    double temperature, top_p, min_p;
    int64_t top_k;
};

}  // extern "C"

namespace {

class Model {
  public:
    explicit Model(const Shape &shape)
        : s(shape), padded((s.vocab + PANEL - 1) / PANEL * PANEL),
          qkv_rows((s.heads + 2 * s.groups) * s.head), x(s.rows * s.width),
          normed(s.threads * s.rows * s.width), qkv(s.rows * qkv_rows),
          mixed(s.rows * s.heads * s.head), act(s.rows * s.hidden),
          scores(s.threads * (s.capacity + 8)), best(s.rows), finite(s.rows) {}

    void begin() {  // not by the constructor: a thread that is refused would leave the others behind
        for (int64_t number = 1; number < s.threads; ++number)
            team.emplace_back([this, number] { serve(static_cast<int>(number)); });
    }

    ~Model() {
        {
            std::lock_guard<std::mutex> hold(mutex);
            over = true;
            epoch.fetch_add(1);
        }
        wake.notify_all();
        for (auto &thread : team) thread.join();
    }

    // Rows through all layers, and logits of those that are scored; every thread of the team calls it.
    void pass(int me, int count, int64_t n, const int64_t *token, const int64_t *slot,
              const int64_t *place, bool apart, int64_t scored, const int64_t *which) {
        const auto part = [&](int64_t all, int64_t &begin, int64_t &end) {
            begin = all * me / count, end = all * (me + 1) / count;
        };
        int64_t begin, end;
        part(n, begin, end);
        for (int64_t r = begin; r < end; ++r)
            std::memcpy(&x[r * s.width], s.table + token[r] * s.width, s.width * sizeof(float));
        barrier.wait(count);
        for (int64_t layer = 0; layer < s.layers; ++layer) {
            const float *const *w = s.weights + 5 * layer;
            float *keys = s.caches[2 * layer], *values = s.caches[2 * layer + 1];
            const float *h = norm(me, count, n);
            product(me, count, n, h, s.width, w[0], qkv_rows, &qkv[0], qkv_rows, false);
            barrier.wait(count);
            // Rows of slots of their own need no key of one another.
            if (!apart) {
                part(n, begin, end);
                for (int64_t r = begin; r < end; ++r)
                    for (int64_t g = 0; g < s.groups; ++g) keep(r, g, slot[r], place[r], keys, values);
                barrier.wait(count);
            }
            part(n * s.groups, begin, end);
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t r = unit / s.groups, g = unit % s.groups;
                if (apart) keep(r, g, slot[r], place[r], keys, values);
                const int64_t then = std::min(unit + 1, end - 1);
                attend(me, r, g, slot[r], place[r], keys, values,
                       keys + (slot[then / s.groups] * s.groups + then % s.groups) * s.capacity * s.head);
            }
            barrier.wait(count);
            product(me, count, n, &mixed[0], s.heads * s.head, w[1], s.width, &x[0], s.width, true);
            barrier.wait(count);
            h = norm(me, count, n);
            gated(me, count, n, h, w[2], w[3]);
            barrier.wait(count);
            product(me, count, n, &act[0], s.hidden, w[4], s.width, &x[0], s.width, true);
            barrier.wait(count);
        }
        if (!scored) return;
        float *h = &normed[0];
        part(scored, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            normalise(&x[which[i] * s.width], h + i * s.width);
            for (int64_t d = 0; d < s.width; ++d) h[i * s.width + d] *= s.gain[d];
        }
        barrier.wait(count);
        product(me, count, scored, h, s.width, s.scores, padded, s.logits, padded, false);
        barrier.wait(count);
        part(scored, begin, end);
        for (int64_t i = begin; i < end; ++i) likeliest(i);
        barrier.wait(count);
    }

    // Run `job(thread, threads)` on `count` threads of the team.
    template <class Job> void together(int count, Job job) {
        if (count == 1) return job(0, 1);
        work = [&job, count](int me) {
            if (me < count) job(me, count);
        };
        running.store(static_cast<int>(s.threads) - 1);
        {
            std::lock_guard<std::mutex> hold(mutex);
            epoch.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        job(0, count);
        for (int spins = 0; running.load(std::memory_order_acquire); ++spins) {
            if (spins < 4000) pause();
            else std::this_thread::yield();
        }
    }

    int64_t draw(int64_t row, const Draw &how, double uniform) const;

    const Shape s;
    const int64_t padded, qkv_rows;
    Barrier barrier;

  private:
    void serve(int me) {
        int64_t seen = 0;
        for (;;) {
            for (int spins = 0; spins < 20000 && epoch.load(std::memory_order_acquire) == seen; ++spins)
                pause();
            {
                std::unique_lock<std::mutex> hold(mutex);
                wake.wait(hold, [&] { return epoch.load() != seen; });
                seen = epoch.load();
            }
            if (over) return;
            work(me);
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    void normalise(const float *from, float *to) const {
        v8 squares = {};
        for (int64_t d = 0; d < s.width; d += 8) squares += load(from + d) * load(from + d);
        float sum = 0;
        for (int i = 0; i < 8; ++i) sum += squares[i];
        const float scale = 1 / std::sqrt(sum / static_cast<float>(s.width) + s.eps);
        for (int64_t d = 0; d < s.width; d += 8) store(to + d, load(from + d) * scale);
    }

    // The rows of x normalised: of few, each thread makes its own copy and waits for nobody.
    const float *norm(int me, int count, int64_t n) {
        if (n <= 4 || count == 1) {
            float *own = &normed[me * s.rows * s.width];
            for (int64_t r = 0; r < n; ++r) normalise(&x[r * s.width], own + r * s.width);
            return own;
        }
        for (int64_t r = n * me / count; r < n * (me + 1) / count; ++r)
            normalise(&x[r * s.width], &normed[r * s.width]);
        barrier.wait(count);
        return &normed[0];
    }

    void product(int me, int count, int64_t n, const float *in, int64_t width, const float *matrix,
                 int64_t out_rows, float *out, int64_t stride, bool add) const {
        share_out(me, count, n, out_rows / PANEL, [&](const Block &block) {
            float made[TILE][PANEL];
            block.multiply(in, width, matrix, made);
            for (int i = 0; i < block.pieces(); ++i) {
                float *to = out + block.row_of(i) * stride + block.column_of(i);
                for (int j = 0; j < PANEL; j += 8)
                    store(to + j, add ? load(to + j) + load(made[i] + j) : load(made[i] + j));
            }
        });
    }

    void gated(int me, int count, int64_t n, const float *in, const float *gate, const float *up) {
        share_out(me, count, n, s.hidden / PANEL, [&](const Block &block) {
            float a[TILE][PANEL], b[TILE][PANEL];
            block.multiply(in, s.width, gate, a);
            block.multiply(in, s.width, up, b);
            for (int i = 0; i < block.pieces(); ++i) {
                float *to = &act[block.row_of(i) * s.hidden + block.column_of(i)];
                for (int j = 0; j < PANEL; j += 8) {
                    const v8 g = load(a[i] + j);
                    store(to + j, g / (1.0f + exponential(-g)) * load(b[i] + j));
                }
            }
        });
    }

    // Queries of a group turned and divided by the root of their width; its key and value into the cache.
    void keep(int64_t r, int64_t g, int64_t slot, int64_t place, float *keys, float *values) {
        const int64_t per = s.heads / s.groups, K = s.head;
        float *row = &qkv[r * qkv_rows];
        const float scale = 1 / std::sqrt(static_cast<float>(K));
        for (int64_t h = g * per; h < (g + 1) * per; ++h) turn(row + h * K, place, scale);
        float *key = row + (s.heads + g) * K;
        turn(key, place, 1);
        const int64_t at = ((slot * s.groups + g) * s.capacity + place) * K;
        std::memcpy(keys + at, key, K * sizeof(float));
        std::memcpy(values + at, row + (s.heads + s.groups + g) * K, K * sizeof(float));
    }

    void turn(float *vector, int64_t place, float scale) const {
        const int64_t half = s.head / 2;
        const float *c = s.cos + place * s.head, *n = s.sin + place * s.head;
        for (int64_t i = 0; i < half; ++i) {
            const float a = vector[i], b = vector[i + half];
            vector[i] = (a * c[i] - b * n[i]) * scale;
            vector[i + half] = (b * c[i + half] + a * n[i + half]) * scale;
        }
    }

    // Memory is slower than arithmetic: values are fetched while keys are read, and then the keys at `next`,
    // those of the unit that comes after.
    void attend(int me, int64_t r, int64_t g, int64_t slot, int64_t place, const float *keys,
                const float *values, const float *next) {
        const int64_t per = s.heads / s.groups, K = s.head, seen = place + 1;
        const int64_t first = (slot * s.groups + g) * s.capacity * K;
        float *share = &scores[me * (s.capacity + 8)];
        for (int64_t h = g * per; h < (g + 1) * per; ++h) {
            const float *q = &qkv[r * qkv_rows + h * K];
            v8 tops = v8{} - std::numeric_limits<float>::infinity();
            for (int64_t c = 0; c < seen; c += 8) {  // beyond the last the last again: no top changes
                v8 sum[8];
                for (int j = 0; j < 8; ++j) {
                    const int64_t at = first + std::min(c + j, seen - 1) * K;
                    const float *k = keys + at;
                    sum[j] = load(q) * load(k);
                    for (int64_t d = 8; d < K; d += 8) sum[j] += load(q + d) * load(k + d);
                    for (int64_t d = 0; d < K; d += 16) __builtin_prefetch(values + at + d);
                }
                const v8 dots = sums_of(sum);
                tops = dots > tops ? dots : tops;
                store(share + c, dots);
            }
            float top = tops[0];
            for (int j = 1; j < 8; ++j) top = std::max(top, tops[j]);
            v8 totals = {};
            int64_t c = 0;
            for (; c + 8 <= seen; c += 8) {
                const v8 one = exponential(load(share + c) - top);
                totals += one;
                store(share + c, one);
            }
            store(share + c, exponential(load(share + c) - top));
            float total = sum_of(totals);
            for (; c < seen; ++c) total += share[c];
            float *out = &mixed[(r * s.heads + h) * K];
            const float *v = values + first;
            int64_t d = 0;
            for (; d + 32 <= K; d += 32) mix<4>(share, v + d, seen, K, 1 / total, next + d, out + d);
            for (; d < K; d += 8) mix<1>(share, v + d, seen, K, 1 / total, next + d, out + d);
        }
    }

    void likeliest(int64_t row) {
        const float *logits = s.logits + row * padded;
        v8 tops = {}, nothing = {};
        for (int i = 0; i < 8; ++i) tops[i] = logits[0];  // of fewer than 8 no padding counts
        int64_t v = 0;
        for (; v + 8 <= s.vocab; v += 8) {
            const v8 one = load(logits + v);
            tops = one > tops ? one : tops;
            nothing += one * 0.0f;  // a NaN as soon as one is not finite
        }
        float top = tops[0], sum = nothing[0];
        for (int i = 1; i < 8; ++i) top = std::max(top, tops[i]), sum += nothing[i];
        for (; v < s.vocab; ++v) top = std::max(top, logits[v]), sum += logits[v] * 0.0f;
        finite[row] = sum == 0;
        best[row] = finite[row] ? std::find(logits, logits + s.vocab, top) - logits : 0;
    }

    std::vector<float> x, normed, qkv, mixed, act, scores;

  public:
    std::vector<int64_t> best;
    std::vector<char> finite;

  private:
    std::vector<std::thread> team;
    std::function<void(int)> work;
    std::atomic<int64_t> epoch{0};
    std::atomic<int> running{0};
    std::mutex mutex;
    std::condition_variable wake;
    bool over = false;
};

// As cllm.infer.sampling: the inverse of the cumulative distribution at `uniform`.
int64_t Model::draw(int64_t row, const Draw &how, double uniform) const {
    // What is not finite has no order: sorting it would leave the array.
    if (how.temperature == 0 || !finite[row]) return best[row];
    const float *logits = s.logits + row * padded;
    std::vector<int32_t> ids(s.vocab);
    std::iota(ids.begin(), ids.end(), 0);
    const auto before = [&](int32_t a, int32_t b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    if (how.top_k > 0 && how.top_k < s.vocab) {
        // Only what reaches the k-th largest is sorted.
        std::vector<float> all(logits, logits + s.vocab);
        std::nth_element(all.begin(), all.begin() + how.top_k - 1, all.end(), std::greater<float>());
        const float least = all[how.top_k - 1];
        ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int32_t v) { return logits[v] < least; }),
                  ids.end());
        std::sort(ids.begin(), ids.end(), before);
        ids.resize(how.top_k);
    } else if (how.top_p < 1) {
        std::sort(ids.begin(), ids.end(), before);
    }
    std::vector<double> share(ids.size());
    const double top = logits[best[row]];
    double total = 0;
    for (size_t i = 0; i < ids.size(); ++i)
        total += share[i] = std::exp((logits[ids[i]] - top) / how.temperature);
    double kept = 0;
    for (double &one : share) {
        one /= total;
        if (how.min_p > 0 && one < how.min_p / total) one = 0;
        kept += one;
    }
    if (how.top_p < 1) {
        double sum = 0, left = 0;
        for (double &one : share) {
            const double before_it = sum;
            sum += one;
            if (before_it >= how.top_p * kept) one = 0;
            left += one;
        }
        kept = left;
    }
    double sum = 0;
    int64_t last = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        sum += share[i];
        if (share[i] > 0) last = static_cast<int64_t>(i);
        if (sum > uniform * kept) return ids[i];
    }
    return ids[last];
}

}  // namespace

extern "C" {

// Rows of a matrix in panels of 16: out[panel][column][row in the panel], rows that are missing are 0.
void cllm_pack(const float *from, int64_t rows, int64_t width, float *out) {
    for (int64_t p = 0; p * PANEL < rows; ++p)
        for (int64_t k = 0; k < width; ++k)
            for (int64_t j = 0; j < PANEL; ++j)
                *out++ = p * PANEL + j < rows ? from[(p * PANEL + j) * width + k] : 0;
}

// Null where memory or threads are refused: no exception may leave for Python.
void *cllm_open(const Shape *shape) {
    try {
        auto model = std::make_unique<Model>(*shape);
        model->begin();
        return model.release();
    } catch (...) {
        return nullptr;
    }
}

void cllm_close(void *handle) { delete static_cast<Model *>(handle); }

// Read n rows of one slot in the order of their places; logits of the last are left in the buffer. Returns 0,
// or 1 if one of them is not finite.
int64_t cllm_read(void *handle, int64_t threads, int64_t n, const int64_t *token, const int64_t *slot,
                  const int64_t *place, int64_t *best) {
    Model &model = *static_cast<Model *>(handle);
    const int64_t most = model.s.rows;
    model.together(static_cast<int>(threads), [&](int me, int count) {
        for (int64_t begin = 0; begin < n; begin += most) {
            const int64_t rows = std::min(most, n - begin), which = rows - 1;
            model.pass(me, count, rows, token + begin, slot + begin, place + begin, false,
                       begin + rows == n ? 1 : 0, &which);
        }
    });
    *best = model.best[0];
    return !model.finite[0];
}

// A token by the logits that `cllm_read` left.
int64_t cllm_draw(void *handle, const Draw *how, double uniform) {
    return static_cast<Model *>(handle)->draw(0, *how, uniform);
}

// `steps` tokens after each of n slots: out[step][row], -1 from the row's end token on. Logits of the last
// step are left in the buffer, by row. Returns 0, or 1 if a logit was not finite.
int64_t cllm_write(void *handle, int64_t threads, int64_t steps, int64_t n, const int64_t *slots,
                   const int64_t *tokens, const int64_t *places, const Draw *draws,
                   const double *uniforms, int64_t end, int64_t *out) {
    Model &model = *static_cast<Model *>(handle);
    std::vector<int64_t> row(n), token(tokens, tokens + n), slot(slots, slots + n),
        place(places, places + n);
    std::iota(row.begin(), row.end(), 0);
    std::vector<int64_t> which(row), chosen(n);
    std::fill(out, out + steps * n, -1);
    int64_t live = n;
    bool damaged = false;
    model.together(static_cast<int>(threads), [&](int me, int count) {
        for (int64_t step = 0; step < steps && live && !damaged; ++step) {
            const int64_t rows = live;
            model.pass(me, count, rows, token.data(), slot.data(), place.data(), true, rows, which.data());
            for (int64_t i = rows * me / count; i < rows * (me + 1) / count; ++i)
                chosen[i] = draws ? model.draw(i, draws[row[i]], uniforms[step * n + row[i]])
                                  : model.best[i];
            model.barrier.wait(count);
            if (me == 0) {
                live = 0;
                for (int64_t i = 0; i < rows; ++i) {
                    damaged |= !model.finite[i];
                    out[step * n + row[i]] = chosen[i];
                    if (chosen[i] == end) continue;
                    row[live] = row[i], slot[live] = slot[i];
                    token[live] = chosen[i], place[live] = place[i] + 1;
                    ++live;
                }
            }
            model.barrier.wait(count);
        }
    });
    return damaged;
}

}  // extern "C"
