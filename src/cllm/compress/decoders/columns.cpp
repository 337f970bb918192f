// Nearest plane and coordinate descent of weight rows, one column after the other, LANES rows side by side.
//
// The two decisions that nearest.py and descent.py describe. Rows stand in lanes of vectors, and each lane is
// summed in one order whatever stands beside it: how rows are shared out does not change a bit. What columns that
// are decided weigh on the next TILE ones is one product with registers as sums.
//
// Compiled by columns_kernel.py for the machine it runs on. Loops of LANES are meant for the vectoriser.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t WIDTH = 32 / sizeof(REAL);  // rows of a vector
constexpr int64_t LANES = 2 * WIDTH;          // rows that are decided together
constexpr int64_t TILE = 4;                   // columns of one product

// WIDTH numbers; GNU's extension, which clang has too.
template <typename T> struct VectorOf { typedef T type __attribute__((vector_size(WIDTH * sizeof(T)))); };
template <typename T> using Vector = typename VectorOf<T>::type;

template <typename T> Vector<T> load(const T *from) {
    Vector<T> to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}

// Row by row: weight, step, offset, codes (m, n) and matrix (n, n).
template <typename T> struct Arguments {
    int64_t m, n, sweeps;
    const T *weight, *matrix, *step, *offset;
    double low, high;
    T *codes;
};

// Columns as lines of LANES rows; lanes without a row hold zeros with a step of 1.
template <typename T> struct Lines {
    std::vector<T> weight, step, offset, codes, errors;

    explicit Lines(int64_t n)
        : weight(n * LANES), step(n * LANES), offset(n * LANES), codes(n * LANES), errors(n * LANES) {}

    void take(const Arguments<T> &a, int64_t first, bool decided) {
        const int64_t count = std::min(LANES, a.m - first);
        for (int64_t j = 0; j < a.n; ++j)
            for (int64_t l = 0; l < LANES; ++l) {
                const int64_t to = j * LANES + l, from = (first + l) * a.n + j;
                const bool is = l < count;
                weight[to] = is ? a.weight[from] : T(0), step[to] = is ? a.step[from] : T(1);
                offset[to] = is ? a.offset[from] : T(0), codes[to] = is && decided ? a.codes[from] : T(0);
            }
    }

    void give(const Arguments<T> &a, int64_t first) const {
        const int64_t count = std::min(LANES, a.m - first);
        for (int64_t l = 0; l < count; ++l)
            for (int64_t j = 0; j < a.n; ++j) a.codes[(first + l) * a.n + j] = codes[j * LANES + l];
    }
};

// sums[r] = Σ of matrix[begin + r, i] · errors[i] over the columns i from ``from`` to before ``to``.
template <typename T>
void product(const Arguments<T> &a, const T *errors, int64_t begin, int64_t count, int64_t from, int64_t to,
             T (*sums)[LANES]) {
    const T *rows[TILE];
    for (int64_t r = 0; r < TILE; ++r) rows[r] = a.matrix + (begin + std::min(r, count - 1)) * a.n;
    Vector<T> s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};
    for (int64_t i = from; i < to; ++i) {
        const Vector<T> left = load(errors + i * LANES), right = load(errors + i * LANES + WIDTH);
        s0 += rows[0][i] * left, s1 += rows[0][i] * right;
        s2 += rows[1][i] * left, s3 += rows[1][i] * right;
        s4 += rows[2][i] * left, s5 += rows[2][i] * right;
        s6 += rows[3][i] * left, s7 += rows[3][i] * right;
    }
    const Vector<T> all[TILE][2] = {{s0, s1}, {s2, s3}, {s4, s5}, {s6, s7}};
    std::memcpy(sums, all, sizeof(all));
}

template <typename T> void decide_nearest(const Arguments<T> &a, Lines<T> &lines) {
    const T low = T(a.low), high = T(a.high);
    T sums[TILE][LANES];
    for (int64_t stop = a.n, begin; stop > 0; stop = begin) {
        begin = std::max<int64_t>(0, stop - TILE);
        product<T>(a, lines.errors.data(), begin, stop - begin, stop, a.n, sums);
        for (int64_t j = stop - 1; j >= begin; --j) {
            T *__restrict sum = sums[j - begin];
            for (int64_t i = j + 1; i < stop; ++i) {
                const T effect = a.matrix[j * a.n + i];
                const T *__restrict error = lines.errors.data() + i * LANES;
                for (int64_t l = 0; l < LANES; ++l) sum[l] += effect * error[l];
            }
            const T *__restrict weight = lines.weight.data() + j * LANES, *__restrict step = lines.step.data() + j * LANES;
            const T *__restrict offset = lines.offset.data() + j * LANES;
            T *__restrict codes = lines.codes.data() + j * LANES, *__restrict error = lines.errors.data() + j * LANES;
            for (int64_t l = 0; l < LANES; ++l) {
                const T code = std::rint((weight[l] + sum[l] - offset[l]) / step[l]);
                codes[l] = std::min(std::max(code, low), high);
                error[l] = weight[l] - (offset[l] + step[l] * codes[l]);
            }
        }
    }
}

// Whether a code moved.
template <typename T> bool sweep(const Arguments<T> &a, Lines<T> &lines) {
    const T low = T(a.low), high = T(a.high);
    T sums[TILE][LANES], change[LANES];
    bool moved = false;
    for (int64_t begin = 0, stop; begin < a.n; begin = stop) {
        stop = std::min(begin + TILE, a.n);
        product<T>(a, lines.errors.data(), begin, stop - begin, 0, a.n, sums);
        for (int64_t j = begin; j < stop; ++j) {
            const T square = a.matrix[j * a.n + j];
            const T *__restrict sum = sums[j - begin], *__restrict step = lines.step.data() + j * LANES;
            T *__restrict codes = lines.codes.data() + j * LANES, *__restrict error = lines.errors.data() + j * LANES;
            T most = 0;
            // The objective in this code is a parabola; its box is convex, so clipping its minimum is exact once
            // rounded. Ties stay: a move must pay for itself.
            for (int64_t l = 0; l < LANES; ++l) {
                const T wanted = std::rint(codes[l] + sum[l] / (square * step[l]));
                const T code = std::min(std::max(wanted, low), high), by = (code - codes[l]) * step[l];
                const bool pays = by * (2 * sum[l] - square * by) > 0;
                change[l] = pays ? by : T(0), codes[l] = pays ? code : codes[l];
                error[l] -= change[l], most = std::max(most, std::abs(change[l]));
            }
            if (!(most > 0)) continue;
            moved = true;
            for (int64_t i = j + 1; i < stop; ++i) {
                const T effect = a.matrix[i * a.n + j];
                T *__restrict later = sums[i - begin];
                for (int64_t l = 0; l < LANES; ++l) later[l] -= effect * change[l];
            }
        }
    }
    return moved;
}

}  // namespace

extern "C" void nearest(const Arguments<REAL> *a) {
    Lines<REAL> lines(a->n);
    for (int64_t first = 0; first < a->m; first += LANES) {
        lines.take(*a, first, false);
        decide_nearest<REAL>(*a, lines);
        lines.give(*a, first);
    }
}

extern "C" void descend(const Arguments<REAL> *a) {
    Lines<REAL> lines(a->n);
    for (int64_t first = 0; first < a->m; first += LANES) {
        lines.take(*a, first, true);
        for (int64_t i = 0; i < a->n * LANES; ++i)
            lines.errors[i] = lines.weight[i] - (lines.offset[i] + lines.step[i] * lines.codes[i]);
        for (int64_t s = 0; s < a->sweeps && sweep<REAL>(*a, lines); ++s) {}
        lines.give(*a, first);
    }
}
