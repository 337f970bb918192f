// K-best over the nearest-plane tree, one target after the other, with its beams in cache.
//
// The search that beam.py describes. A beam is a line of open centres; the choice of parent and the effect
// of the decided coefficient are one pass over it. Coefficients are not carried along: each row notes
// whose child a beam is, and the best beam's path is followed back at the end. Rows are decided in blocks;
// what a block decided reaches the centres before it by one product with registers as sums.
//
// Compiled by beam_kernel.py for the machine it runs on. Loops of WIDTH are meant for the vectoriser.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t WIDTH = 32 / sizeof(REAL);  // centres that move together
constexpr int64_t BLOCK = 8 * WIDTH;   // rows of a block
constexpr int64_t STRIP = 2 * WIDTH;   // centres of one product
constexpr int64_t QUAD = 4;            // beams of one product
constexpr int64_t COUNTED = 64;        // children that are ranked by counting

template <typename T> struct Bits;
template <> struct Bits<float> { using type = int32_t; };
template <> struct Bits<double> { using type = int64_t; };

// WIDTH numbers; GNU's extension, which clang has too.
template <typename T> struct VectorOf { typedef T type __attribute__((vector_size(WIDTH * sizeof(T)))); };
template <typename T> using Vector = typename VectorOf<T>::type;

template <typename T> Vector<T> load(const T *from) {
    Vector<T> to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}

template <typename T> struct Arguments {
    int64_t m, n, stride, K, children, keep_first;
    const T *opened, *effects, *squares, *low, *high, *step, *offset, *base;
    const uint8_t *classes;
    const T *costs;
    int64_t magnitudes;
    T *out;
};

int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// COUNTED zeros, and then ones.
template <typename I> struct Steps {
    I values[2 * COUNTED];
    Steps() { for (int64_t i = 0; i < 2 * COUNTED; ++i) values[i] = i >= COUNTED; }
};

// Of more, those at or below a threshold, which is halved in until as many as are wanted remain; of those that
// equal it the first. In the order of their numbers.
template <typename I> void threshold(const I *keys, int64_t count, int64_t K, int32_t *chosen) {
    using U = std::make_unsigned_t<I>;
    I low = keys[0], high = keys[0];
    for (int64_t i = 1; i < count; ++i) low = std::min(low, keys[i]), high = std::max(high, keys[i]);
    int64_t below = count;
    while (low < high && below != K) {
        const I middle = low + I((U(high) - U(low)) / 2);
        I within = 0;
        for (int64_t i = 0; i < count; ++i) within += keys[i] <= middle;
        if (within < K) low = middle + 1;
        else high = middle, below = within;
    }
    int64_t ties = K, k = 0;
    for (int64_t i = 0; i < count; ++i) ties -= keys[i] < high;
    for (int64_t i = 0; i < count; ++i) {
        chosen[k] = int32_t(i);
        const bool tie = keys[i] == high && ties > 0;
        ties -= tie, k += keys[i] < high || tie;
    }
}

// Numbers of the ``K`` smallest of ``count`` costs, of which the smallest comes first where they are few and where it
// is child 0; ties go to the first.
// Bits of non-negative floats order as integers, and as integers everything has an order, even NaN: a
// number is never out of range.
template <typename T, int64_t COUNT>
void select(const T *cost, int64_t count, int64_t K, int32_t *chosen) {
    using I = typename Bits<T>::type;
    const int64_t size = COUNT ? COUNT : count;
    if (size <= COUNTED) {
        static const Steps<I> steps;
        I keys[COUNTED], rank[COUNTED];
        std::memcpy(keys, cost, size * sizeof(T));
        for (int64_t i = 0; i < size; ++i) rank[i] = 0;
        for (int64_t j = 0; j < size; ++j) {
            const I key = keys[j];
            const I *later = steps.values + COUNTED - 1 - j;  // 1 where i > j
            for (int64_t i = 0; i < size; ++i) rank[i] += key < keys[i] + later[i];
        }
        int32_t order[COUNTED];
        for (int64_t i = 0; i < size; ++i) order[rank[i]] = int32_t(i);
        std::memcpy(chosen, order, K * sizeof(int32_t));
        return;
    }
    threshold(reinterpret_cast<const I *>(cost), size, K, chosen);
}

template <typename T> struct Scratch {
    std::vector<T> lines, others, coefficients, amounts, costs, choices, distance, gap, sides;
    std::vector<int32_t> parents, origin, chosen;
    T *line, *other;

    explicit Scratch(const Arguments<T> &a)
        : lines(a.K * a.stride + WIDTH), others(a.K * a.stride + WIDTH), coefficients(a.n * a.K),
          amounts(BLOCK * rounded(a.K, QUAD)), costs(a.children * a.K), choices(a.children * a.K),
          distance(a.K), gap(a.K), sides(a.K), parents(a.n * a.K), origin(rounded(a.K, QUAD)),
          chosen(a.children * a.K + 1), line(lines.data()), other(others.data()) {}
};

// The children of all beams in row i: costs and coefficients, child c of beam k at c·K + k.
template <typename T, int64_t FIXED_K, int64_t FIXED_CHILDREN>
void offer(const Arguments<T> &a, Scratch<T> &s, int64_t t, int64_t i) {
    const int64_t K = FIXED_K ? FIXED_K : a.K, children = FIXED_CHILDREN ? FIXED_CHILDREN : a.children;
    const T offset = a.offset ? a.offset[t * a.n + i] : T(0), step = a.step ? a.step[t * a.n + i] : T(1);
    const T inverse = 1 / step, square = a.squares[i] * step * step;
    const T inf = std::numeric_limits<T>::infinity();
    T *__restrict cost = s.costs.data(), *__restrict x = s.choices.data(), *__restrict gap = s.gap.data();
    const T *__restrict line = s.line + i, *__restrict distance = s.distance.data();
    T *__restrict sides = s.sides.data();
    for (int64_t k = 0; k < K; ++k) gap[k] = (line[k * a.stride] - offset) * inverse;
    if (a.low) {
        const T low = a.low[i], high = a.high[i];
        for (int64_t k = 0; k < K; ++k) {
            const T near = std::min(std::max(std::rint(gap[k]), low), high);
            T to = std::copysign(T(1), gap[k] - near);
            to = near + to < low || near + to > high ? -to : to;
            x[k] = near, sides[k] = to, gap[k] = (gap[k] - near) * to;
        }
    } else {
        for (int64_t k = 0; k < K; ++k) {
            const T near = std::rint(gap[k]), to = std::copysign(T(1), gap[k] - near);
            x[k] = near, sides[k] = to, gap[k] = (gap[k] - near) * to;
        }
    }
    for (int64_t k = 0; k < K; ++k) cost[k] = distance[k] + square * gap[k] * gap[k];
    for (int64_t c = 1; c < children; ++c) {
        const T to = c % 2 ? T((c + 1) / 2) : -T(c / 2);
        T *__restrict my_cost = cost + c * K, *__restrict my_x = x + c * K;
        for (int64_t k = 0; k < K; ++k) {
            const T off = gap[k] - to;
            my_x[k] = x[k] + sides[k] * to;
            my_cost[k] = distance[k] + square * off * off;
        }
        if (!a.low) continue;
        const T low = a.low[i], high = a.high[i];
        for (int64_t k = 0; k < K; ++k) my_cost[k] = my_x[k] < low || my_x[k] > high ? inf : my_cost[k];
    }
    if (!a.costs) return;
    const T *price = a.costs + int64_t(a.classes[t * a.n + i]) * a.magnitudes;
    const T most = T(a.magnitudes - 1);
    for (int64_t c = 0; c < children * K; ++c) cost[c] += price[int64_t(std::min(most, std::abs(x[c])))];  // most for NaN
}

// Decide row i: beams become the best children, and their open centres of the block feel it.
template <typename T, int64_t FIXED_K, int64_t FIXED_CHILDREN>
void decide(const Arguments<T> &a, Scratch<T> &s, int64_t t, int64_t i, int64_t begin) {
    const int64_t K = FIXED_K ? FIXED_K : a.K, children = FIXED_CHILDREN ? FIXED_CHILDREN : a.children;
    offer<T, FIXED_K, FIXED_CHILDREN>(a, s, t, i);
    T *cost = s.costs.data(), *x = s.choices.data();
    int32_t *chosen = s.chosen.data(), *parents = s.parents.data() + i * K;
    T first = 0;
    if (a.keep_first) {  // the cheapest child of beam 0 stands first, whatever it costs
        int64_t best = 0;
        if (a.costs)
            for (int64_t c = 1; c < children; ++c)
                if (cost[c * K] < cost[best * K]) best = c;
        std::swap(cost[0], cost[best * K]), std::swap(x[0], x[best * K]);
        first = cost[0], cost[0] = 0;
    }
    // Equal keys keep their order, so that the one set to 0 comes first.
    select<T, FIXED_K * FIXED_CHILDREN>(cost, children * K, K, chosen);
    if (a.keep_first) cost[0] = first;
    const T offset = a.offset ? a.offset[t * a.n + i] : T(0), step = a.step ? a.step[t * a.n + i] : T(1);
    const T base = a.base ? a.base[t * a.n + i] : T(0);
    const T *effects = a.effects + i * a.stride;
    T *coefficients = s.coefficients.data() + i * K;
    for (int64_t k = 0; k < K; ++k) {
        const int32_t child = chosen[k], parent = int32_t(child % K);
        const T amount = offset + step * x[child] - base;
        s.distance[k] = cost[child], coefficients[k] = x[child], parents[k] = parent;
        const T *__restrict from = s.line + parent * a.stride;
        T *__restrict to = s.other + k * a.stride;
        for (int64_t r = begin; r < i; r += WIDTH)
            for (int64_t w = 0; w < WIDTH; ++w) to[r + w] = from[r + w] - amount * effects[r + w];
    }
    std::swap(s.line, s.other);
}

// The centres before a block, of the beams that came out of it.
template <typename T> void carry(const Arguments<T> &a, Scratch<T> &s, int64_t t, int64_t begin, int64_t end) {
    const int64_t K = a.K, padded = rounded(K, QUAD);
    // They are where they were before the block, from which on lines were swapped at every row.
    if ((end - begin) % 2) std::swap(s.line, s.other);
    T *amounts = s.amounts.data();
    std::memset(amounts, 0, BLOCK * padded * sizeof(T));
    for (int64_t k = 0; k < padded; ++k) s.origin[k] = int32_t(std::min(k, K - 1));
    for (int64_t i = begin; i < end; ++i) {
        const T offset = a.offset ? a.offset[t * a.n + i] : T(0), step = a.step ? a.step[t * a.n + i] : T(1);
        const T base = a.base ? a.base[t * a.n + i] : T(0);
        for (int64_t k = 0; k < padded; ++k) {
            const int64_t place = i * K + s.origin[k];
            amounts[(i - begin) * padded + k] = offset + step * s.coefficients[place] - base;
            s.origin[k] = s.parents[place];
        }
    }
    for (int64_t r = 0; r < begin; r += STRIP)
        for (int64_t k = 0; k < padded; k += QUAD) {
            const T *from[QUAD];
            for (int64_t q = 0; q < QUAD; ++q) from[q] = s.line + s.origin[k + q] * a.stride + r;
            Vector<T> s0 = load(from[0]), s1 = load(from[0] + WIDTH), s2 = load(from[1]), s3 = load(from[1] + WIDTH),
                      s4 = load(from[2]), s5 = load(from[2] + WIDTH), s6 = load(from[3]), s7 = load(from[3] + WIDTH);
            for (int64_t i = 0; i < end - begin; ++i) {
                const T *amount = amounts + i * padded + k, *effects = a.effects + (begin + i) * a.stride + r;
                const Vector<T> left = load(effects), right = load(effects + WIDTH);
                s0 -= amount[0] * left, s1 -= amount[0] * right;
                s2 -= amount[1] * left, s3 -= amount[1] * right;
                s4 -= amount[2] * left, s5 -= amount[2] * right;
                s6 -= amount[3] * left, s7 -= amount[3] * right;
            }
            const Vector<T> sums[QUAD][2] = {{s0, s1}, {s2, s3}, {s4, s5}, {s6, s7}};
            for (int64_t q = 0; q < QUAD && k + q < K; ++q)
                std::memcpy(s.other + (k + q) * a.stride + r, sums[q], STRIP * sizeof(T));
        }
    std::swap(s.line, s.other);
}

template <typename T, int64_t FIXED_K, int64_t FIXED_CHILDREN>
void search(const Arguments<T> &a) {
    Scratch<T> s(a);
    const int64_t K = a.K;
    for (int64_t t = 0; t < a.m; ++t) {
        for (int64_t k = 0; k < K; ++k)
            std::memcpy(s.line + k * a.stride, a.opened + t * a.n, a.n * sizeof(T));
        std::fill(s.distance.begin(), s.distance.end(), std::numeric_limits<T>::infinity());
        s.distance[0] = 0;
        for (int64_t begin = (a.n - 1) / BLOCK * BLOCK, end = a.n; end > 0; end = begin, begin -= BLOCK) {
            for (int64_t i = end - 1; i >= begin; --i) decide<T, FIXED_K, FIXED_CHILDREN>(a, s, t, i, begin);
            if (begin) carry<T>(a, s, t, begin, end);
        }
        int64_t beam = 0;
        for (int64_t k = 1; k < K; ++k)
            if (s.distance[k] < s.distance[beam]) beam = k;
        for (int64_t i = 0; i < a.n; ++i) {
            a.out[t * a.n + i] = s.coefficients[i * K + beam];
            beam = s.parents[i * K + beam];
        }
    }
}

template <typename T> void dispatch(const Arguments<T> &a) {
    if (a.children == 2 && a.K == 16) search<T, 16, 2>(a);
    else search<T, 0, 0>(a);
}

}  // namespace

extern "C" void beam(const Arguments<REAL> *a) { dispatch<REAL>(*a); }
