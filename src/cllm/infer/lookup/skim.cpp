// One query's way through the cells of an index, approximately: see Search.skim in search.py, which does the
// same by array passes. Reading the rows is what takes the time, so each is read once and nothing is kept of it
// but its key.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr int64_t LANES = 8;    // partial sums of an inner product
constexpr int64_t BINS = 1024;  // of the histogram of keys
constexpr int64_t AHEAD = 8;    // rows whose lines are asked for before their turn

inline __attribute__((always_inline)) float dot(const float* a, const float* b, int64_t n) {
  float lane[LANES] = {0};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES)
    for (int64_t l = 0; l < LANES; ++l) lane[l] += a[j + l] * b[j + l];
  for (; j < n; ++j) lane[j % LANES] += a[j] * b[j];
  for (int64_t step = LANES / 2; step; step /= 2)
    for (int64_t l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

void ask_for(const float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(row + j);
}

// Inner products of rows (n, WIDTH) with q.
template <int64_t WIDTH>
void products(const float* rows, int64_t n, const float* q, int64_t width, float* out) {
  for (int64_t r = 0; r < n; ++r)
    out[r] = WIDTH ? dot(rows + r * WIDTH, q, WIDTH) : dot(rows + r * width, q, width);
}

}  // namespace

extern "C" {

struct Index {
  int64_t cells, width, leading;
  const int64_t* starts;   // (cells + 1)
  const float* centres;    // (cells, width), rotated
  const float* head;       // (rows, leading), rotated
  const float* tail;       // (rows)
  const float* vectors;    // (rows, width)
  const float* offset;     // (rows), taken from keys by leading coordinates, or null
  const float* half;       // (rows), taken from whole keys, or null
  const float* inverse;    // (rows), multiplies keys, or null
  int64_t distances;       // whether keys are of distances: what is left of the query lies about the centre
};

struct Query {
  const float* promise;    // (cells)
  const float* rotated;    // (width)
  const float* whole;      // (width), as it came
  int64_t k, wanted;       // rows to find and to skim
  int64_t skimmed, least;  // one row in so many is looked at in full, and so many at least
  float share, error;
};

// Writes numbers and keys of the rows that can be among the best k of those looked at; returns how many. Both
// outputs have room for all rows of the cells chosen: wanted, and the largest cell.
int64_t skim(const Index* index, const Query* query, int32_t* numbers, float* keys) {
  const int64_t cells = index->cells, width = index->width, leading = index->leading;
  const float* promise = query->promise;

  // The most promising cells that hold the wanted rows, then in the order in which they lie.
  std::vector<int32_t> chosen(cells);
  for (int64_t c = 0; c < cells; ++c) chosen[c] = static_cast<int32_t>(c);
  auto before = [promise](int32_t a, int32_t b) {
    return promise[a] != promise[b] ? promise[a] > promise[b] : a < b;
  };
  const int64_t rows = index->starts[cells];
  int64_t known = 0, taken = 0, total = 0;
  while (total < query->wanted && taken < cells) {
    if (taken == known) {
      const int64_t guess = 2 * (query->wanted - total) * cells / rows + 8;
      known = std::min(cells, known + guess);
      if (known < cells)
        std::nth_element(chosen.begin() + taken, chosen.begin() + known, chosen.end(), before);
      std::sort(chosen.begin() + taken, chosen.begin() + known, before);
    }
    const int32_t c = chosen[taken++];
    total += index->starts[c + 1] - index->starts[c];
  }
  std::sort(chosen.begin(), chosen.begin() + taken);

  // Keys as the leading coordinates show them.
  const float* q = query->rotated;
  const int64_t others = width - leading;
  auto inner = leading == 16 ? products<16> : leading == 32 ? products<32> : products<0>;
  float far = std::sqrt(dot(q + leading, q + leading, others));
  int64_t done = 0;
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t c = chosen[i], first = index->starts[c], last = index->starts[c + 1];
    const float* centre = index->centres + c * width + leading;
    const float base = dot(centre, q + leading, others);
    if (index->distances) {
      float square = 0;
      for (int64_t j = 0; j < others; ++j) {
        const float lean = q[leading + j] - centre[j];
        square += lean * lean;
      }
      far = std::sqrt(square);
    }
    if (i + 1 < taken) ask_for(index->head + index->starts[chosen[i + 1]] * leading, 4 * leading);
    float* mine = keys + done;
    const int64_t size = last - first;
    inner(index->head + first * leading, size, q, leading, mine);
    const float wide = query->share * far;
    for (int64_t r = 0; r < size; ++r) mine[r] += base + wide * index->tail[first + r];
    if (index->offset)
      for (int64_t r = 0; r < size; ++r) mine[r] -= index->offset[first + r];
    if (index->inverse)
      for (int64_t r = 0; r < size; ++r) mine[r] *= index->inverse[first + r];
    for (int64_t r = 0; r < size; ++r) {
      low = std::min(low, mine[r]);
      high = std::max(high, mine[r]);
      numbers[done + r] = static_cast<int32_t>(first + r);
    }
    done += size;
  }

  // Those of the highest keys, to the width of a bin.
  const int64_t count = std::max(total / query->skimmed, query->least);
  int64_t able = total;
  if (count < total / 2 && low < high) {
    const double scale = BINS / (static_cast<double>(high) - low);  // finite however near they are
    auto bin = [low, scale](float key) {
      return std::min<int64_t>(static_cast<int64_t>((static_cast<double>(key) - low) * scale), BINS - 1);
    };
    int64_t bins[BINS] = {0};
    for (int64_t i = 0; i < total; ++i) ++bins[bin(keys[i])];
    int64_t least = BINS, held = 0;
    while (held < count) held += bins[--least];
    able = 0;
    for (int64_t i = 0; i < total; ++i)
      if (bin(keys[i]) >= least) numbers[able++] = numbers[i];
  }

  // Their whole keys, of which the k best stay and what rounding may have put behind them.
  for (int64_t i = 0; i < able; ++i) {
    if (i + AHEAD < able) ask_for(index->vectors + numbers[i + AHEAD] * width, width);
    const int64_t r = numbers[i];
    float key = dot(index->vectors + r * width, query->whole, width);
    if (index->half) key -= index->half[r];
    if (index->inverse) key *= index->inverse[r];
    keys[i] = key;
  }
  float needed = -INFINITY;
  if (able > query->k) {
    std::vector<float> order(keys, keys + able);
    std::nth_element(order.begin(), order.begin() + (query->k - 1), order.end(), std::greater<float>());
    needed = order[query->k - 1] - 2 * query->error;
  }
  int64_t found = 0;
  for (int64_t i = 0; i < able; ++i)
    if (keys[i] >= needed) {
      numbers[found] = numbers[i];
      keys[found++] = keys[i];
    }
  return found;
}
}
