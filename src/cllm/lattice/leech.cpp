// Nearest points of the Leech lattice, LANES targets side by side.
//
// Of each quarter of the lattice (see leech.py) every word of the hexacode is decided exactly: lower bounds first would
// spare nothing, as nearly every word is needed by some target of the LANES. Two columns are joined once for all words
// that have their two elements. Targets stand in lanes of vectors and none is summed with another: how they are shared
// out does not change a bit.
//
// Compiled by leech_kernel.py for the machine it runs on.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

// Of a vector that the processor has: a wider one is taken apart, and choices in it become loops.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / sizeof(REAL);
constexpr int COLUMNS = 6, ROWS = 4, PATTERNS = 16, PAIRS = 3, WORDS = 64, QUARTERS = 4;

// LANES numbers; GNU's extension, which clang has too.
typedef REAL Lane __attribute__((vector_size(BYTES)));
typedef std::conditional_t<sizeof(REAL) == 4, int32_t, int64_t> Whole;
typedef Whole Wholes __attribute__((vector_size(BYTES)));

Lane least(Lane a, Lane b) { return b < a ? b : a; }
Lane size_of(Lane a) { return a < 0 ? -a : a; }

// The nearest whole numbers, the even one of two: what is added and taken away leaves no room for more. Numbers are
// below 2^22 (float) and 2^51 (double), which the caller has seen to.
Lane nearest_whole(Lane a) {
    const REAL high = sizeof(REAL) == 4 ? REAL(12582912) : REAL(6755399441055744);
    return (a + high) - high;
}

// +1 for even and -1 for odd whole numbers.
Lane parity_sign(Lane whole) {
    const Lane half = whole * REAL(0.5);
    return 1 - 4 * size_of(half - nearest_whole(half));
}

// x, out (m, 24); words (64, 6) of the hexacode; patterns (2, 4, 2): the bits of a column by its parity, its element
// and its top bit.
struct Arguments {
    int64_t m;
    double scale, unit;
    const REAL *x;
    REAL *out;
    const int32_t *words, *patterns;
};

// Squared distances in units of 4 / scale, as in leech.py.
struct Costs {
    // Of a column with a pattern of code bits, its b of even or odd sum, counted from all code bits 0.
    Lane column[2][COLUMNS][PATTERNS][2];
    // What they are counted from, for each m.
    Lane base[2];

    void take(const Lane *x, double scale, int m) {
        base[m] = Lane{};
        for (int j = 0; j < COLUMNS; ++j) {
            // Of each row with code bit 0 or 1: the cost, what the other parity of b costs more, and +1 or -1 for b.
            Lane cost[ROWS][2], more[ROWS][2], sign[ROWS][2];
            for (int i = 0; i < ROWS; ++i) {
                const Lane y = (x[ROWS * j + i] * REAL(scale) - REAL(m)) * REAL(0.25);
                const Lane whole = nearest_whole(y), size = size_of(y - whole);
                base[m] += size * size;
                cost[i][0] = Lane{}, cost[i][1] = REAL(0.25) - size;
                more[i][0] = 1 - 2 * size, more[i][1] = 2 * size;
                sign[i][0] = parity_sign(whole), sign[i][1] = parity_sign(whole > y ? whole - 1 : whole);
            }
            for (int p = 0; p < PATTERNS; ++p) {
                const int b[ROWS] = {p & 1, p >> 1 & 1, p >> 2 & 1, p >> 3 & 1};
                const Lane total = (cost[0][b[0]] + cost[1][b[1]]) + (cost[2][b[2]] + cost[3][b[3]]);
                const Lane extra = least(least(more[0][b[0]], more[1][b[1]]), least(more[2][b[2]], more[3][b[3]]));
                const Lane even = sign[0][b[0]] * sign[1][b[1]] * sign[2][b[2]] * sign[3][b[3]];
                column[m][j][p][0] = even > 0 ? total : total + extra;
                column[m][j][p][1] = even > 0 ? total + extra : total;
            }
        }
    }
};

// What every two columns cost together, by their elements, in each state: 2 (top bits) + (parity of b).
struct Pairs {
    Lane state[PAIRS][16][4];

    void take(const Costs &costs, const int32_t *patterns, int m, int h) {
        for (int k = 0; k < PAIRS; ++k)
            for (int e = 0; e < 16; ++e) {
                const int32_t *first = patterns + 8 * h + 2 * (e / 4), *second = patterns + 8 * h + 2 * (e % 4);
                const auto &left = costs.column[m][2 * k], &right = costs.column[m][2 * k + 1];
                const Lane a[4] = {left[first[0]][0], left[first[0]][1], left[first[1]][0], left[first[1]][1]};
                const Lane b[4] = {right[second[0]][0], right[second[0]][1], right[second[1]][0], right[second[1]][1]};
                Lane *to = state[k][e];
                for (int s = 0; s < 4; ++s)
                    to[s] = least(least(a[0] + b[s], a[1] + b[s ^ 1]), least(a[2] + b[s ^ 2], a[3] + b[s ^ 3]));
            }
    }
};

// The least cost so far, and the number 64 quarter + word that has it.
struct Best {
    Lane cost = Lane{} + std::numeric_limits<REAL>::infinity();
    Wholes number = Wholes{};

    void offer(const Pairs &pairs, const Lane &base, const int32_t *word, int need, Whole its_number) {
        const int e[PAIRS] = {4 * word[0] + word[1], 4 * word[2] + word[3], 4 * word[4] + word[5]};
        const Lane *a = pairs.state[0][e[0]], *b = pairs.state[1][e[1]], *c = pairs.state[2][e[2]];
        Lane found[4];
        for (int s = 0; s < 4; ++s)
            found[s] = least(least(a[0] + b[s], a[1] + b[s ^ 1]), least(a[2] + b[s ^ 2], a[3] + b[s ^ 3])) + c[s ^ need];
        const Lane mine = least(least(found[0], found[1]), least(found[2], found[3])) + base;
        number = mine < cost ? Wholes{} + its_number : number;
        cost = least(mine, cost);
    }
};

// The points of the lanes' best words, in steps of the lattice's unit.
struct Points {
    Lane coordinate[24];

    Points(const Arguments &a, const Costs &costs, const Lane *x, const Wholes &number) {
        const int32_t *word[LANES], *patterns[LANES];
        Lane cost[COLUMNS][4], m;
        Wholes need;
        for (int l = 0; l < LANES; ++l) {
            const int quarter = int(number[l]) / WORDS, odd = quarter / 2, h = quarter % 2;
            word[l] = a.words + COLUMNS * (int(number[l]) % WORDS), patterns[l] = a.patterns + 8 * h;
            m[l] = REAL(odd), need[l] = 2 * h + odd;
            for (int j = 0; j < COLUMNS; ++j)
                for (int s = 0; s < 4; ++s)
                    cost[j][s][l] = costs.column[odd][j][patterns[l][2 * word[l][j] + (s >> 1)]][s & 1][l];
        }
        Wholes states[COLUMNS];
        trellis(cost, need, states);
        for (int j = 0; j < COLUMNS; ++j) {
            Lane bit[ROWS];
            for (int l = 0; l < LANES; ++l) {
                const int32_t pattern = patterns[l][2 * word[l][j] + int(states[j][l] >> 1)];
                for (int i = 0; i < ROWS; ++i) bit[i][l] = REAL(pattern >> i & 1);
            }
            column(x + ROWS * j, REAL(a.scale), m, bit, states[j], coordinate + ROWS * j);
        }
    }

    // The states of the six columns, exclusive or ``need``, of least total cost: back through a four-state trellis.
    static void trellis(const Lane cost[COLUMNS][4], Wholes need, Wholes states[COLUMNS]) {
        Lane reached[COLUMNS][4];
        std::copy(cost[0], cost[0] + 4, reached[0]);
        for (int j = 1; j < COLUMNS; ++j)
            for (int s = 0; s < 4; ++s) {
                const Lane *r = reached[j - 1], *c = cost[j];
                reached[j][s] = least(least(c[0] + r[s], c[1] + r[s ^ 1]), least(c[2] + r[s ^ 2], c[3] + r[s ^ 3]));
            }
        for (int j = COLUMNS - 1; j > 0; --j) {
            Lane best = cost[j][0] + of(reached[j - 1], need);
            states[j] = Wholes{};
            for (int s = 1; s < 4; ++s) {
                const Lane tried = cost[j][s] + of(reached[j - 1], need ^ Whole(s));
                states[j] = tried < best ? Wholes{} + Whole(s) : states[j];
                best = least(best, tried);
            }
            need ^= states[j];
        }
        states[0] = need;
    }

    // The number of its own state for each lane.
    static Lane of(const Lane values[4], Wholes state) {
        const Lane low = (state & 1) != 0 ? values[1] : values[0], high = (state & 1) != 0 ? values[3] : values[2];
        return (state & 2) != 0 ? high : low;
    }

    // Four coordinates whose code bits and parity of b are known.
    static void column(const Lane *x, REAL scale, Lane m, const Lane bit[ROWS], Wholes state, Lane *out) {
        Lane b[ROWS], error[ROWS], sum = Lane{}, worst = Lane{} - 1;
        Wholes place = Wholes{};
        for (int i = 0; i < ROWS; ++i) {
            const Lane y = (x[i] * scale - m) * REAL(0.25) - bit[i] * REAL(0.5);
            b[i] = nearest_whole(y), error[i] = y - b[i], sum += b[i];
            place = size_of(error[i]) >= worst ? Wholes{} + Whole(i) : place;
            worst = size_of(error[i]) >= worst ? size_of(error[i]) : worst;
        }
        // To the other parity of b at the cheapest coordinate of a column that needs it.
        const Lane wanted = (state & 1) != 0 ? Lane{} - 1 : Lane{} + 1;
        const Wholes turn = parity_sign(sum) != wanted;
        for (int i = 0; i < ROWS; ++i) {
            const Lane step = error[i] < 0 ? Lane{} - 1 : Lane{} + 1;
            b[i] += (turn & (place == Whole(i))) != 0 ? step : Lane{};
            out[i] = 4 * b[i] + 2 * bit[i] + m;
        }
    }
};

void decode(const Arguments &a, int64_t first) {
    const int count = int(std::min<int64_t>(LANES, a.m - first));
    Lane x[24];
    for (int l = 0; l < LANES; ++l)
        for (int i = 0; i < 24; ++i) x[i][l] = a.x[24 * (first + std::min(l, count - 1)) + i];
    Costs costs;
    Pairs pairs;
    Best best;
    for (int m = 0; m < 2; ++m) costs.take(x, a.scale, m);
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
        const int m = quarter / 2, h = quarter % 2;
        pairs.take(costs, a.patterns, m, h);
        for (int w = 0; w < WORDS; ++w)
            best.offer(pairs, costs.base[m], a.words + COLUMNS * w, 2 * h + m, WORDS * quarter + w);
    }
    const Points points(a, costs, x, best.number);
    for (int l = 0; l < count; ++l)
        for (int i = 0; i < 24; ++i) a.out[24 * (first + l) + i] = points.coordinate[i][l] * REAL(a.unit);
}

}  // namespace

extern "C" void nearest(const Arguments *a) {
    for (int64_t first = 0; first < a->m; first += LANES) decode(*a, first);
}
