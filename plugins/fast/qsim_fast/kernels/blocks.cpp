// Products of 8-bit codes under the scales of their blocks: `qsim_fast.integer_blocks`.
//
// Row by row, the products of a block of columns are added up exactly in int32, converted to float32, multiplied by the
// column's scale, then by the row's, and added to the blocks before, in float32. Every processor gives the same bits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dot.h"

// A product of rows of codes by packed columns, for several matrices. Strides count elements, and are 0 where a matrix,
// a row or a block is shared.
struct BlockProduct {
    const uint8_t *x; // the codes of rows, less the lowest code
    int64_t x_matrix, x_row;
    const float *x_scale;
    int64_t x_scale_matrix, x_scale_row, x_every; // `every`: the number of blocks that share a scale
    const int8_t *w;                              // the columns, as `pack` arranges them
    int64_t w_matrix, w_panel;
    const float *w_scale;
    int64_t w_scale_matrix, w_scale_panel, w_every;
    const int32_t *w_sum; // the sums of the codes of each piece of a column
    int64_t w_sum_matrix, w_sum_panel;
    const float *bias; // null: none
    float *y;
    int64_t y_matrix, y_row;
    int64_t matrices, rows, columns, inner, block; // `inner`: a multiple of 4
    int64_t piece; // columns whose codes have one sum
    int32_t offset;                                // the lowest code of rows, as a positive number
    int32_t wrapped; // the highest bits of a block's sum that are dropped: it wraps around in the others
    int32_t kind;                                  // 0: Dot, 1: WideDot, 2: PortableDot
    int32_t threads;
};

// The columns of several matrices, to be packed: rows of signed codes [columns][row], with `scales` scales each.
struct Columns {
    const int8_t *codes;
    int64_t matrix, row;
    const float *scale;
    int64_t scale_matrix, scale_row, scales;
    int8_t *w; // [matrices][panels][inner / group][panel][group]
    float *w_scale; // [matrices][panels][scales][panel]
    int32_t *w_sum; // [matrices][panels][pieces][panel]
    int64_t matrices, columns, length, inner, piece;
    int32_t kind, threads;
};

namespace {

template <class D> constexpr int panel_of() { return D::vectors * D::lanes; }

// Add the products of `groups` groups of R rows and of a panel of columns to what `part` begins with.
template <class D, int R> inline void add_groups(int64_t groups, const typename D::Code *x, const int8_t *w,
                                                 typename D::Part (&part)[R][D::vectors]) {
    constexpr int V = D::vectors, G = D::group;
    auto add = [&](int64_t at) {
        typename D::Columns columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) columns[v] = D::columns(w + (at * V + v) * D::lanes * G);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            typename D::Row row = D::row(x + (at * R + r) * G);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) part[r][v] = D::add(part[r][v], row, columns[v]);
        }
    };
    if constexpr (D::twice)
        for (; groups > 1; groups -= 2, x += 2 * R * G, w += 2 * V * D::lanes * G) add(0), add(1);
    for (; groups > 0; groups--, x += R * G, w += V * D::lanes * G) add(0);
}

// R rows, whose codes lie in groups side by side, and one panel of columns.
template <class D> struct Tile {
    const typename D::Code *x; // [inner / group][R][group]
    const float *x_scale;
    const int8_t *w;
    const float *w_scale;
    const int32_t *w_sum;
    const float *bias;
    float *y;
    int64_t columns;
};

// Multiply the rows and the columns of a tile. `single`: each block is one piece.
template <class D, int R, bool single> void multiply_tile(const BlockProduct &p, Tile<D> t) {
    using Integers = typename D::Integers;
    using Floats = typename D::Floats;
    constexpr int V = D::vectors, L = D::lanes, panel = V * L, G = D::group;
    const int32_t less = D::shift - p.offset;
    Floats sums[R][V] = {};
    int64_t x_left = p.x_every, w_left = p.w_every;
    for (int64_t k = 0; k < p.inner;) {
        const int64_t end = std::min(p.inner, k + p.block);
        Integers total[R][V];
        for (bool first = true; k < end; first = false) {
            const int64_t stop = single ? end : std::min(end, k + p.piece);
            typename D::Part part[R][V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                typename D::Part start = D::begin(t.w_sum + v * L, less);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) part[r][v] = start;
            }
            if (!single) asm volatile("" : : "r"(total) : "memory"); // registers are for the parts
            add_groups<D, R>((stop - k) / G, t.x + k * R, t.w + k * panel, part);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) {
                    Integers sum = D::end(part[r][v]);
                    total[r][v] = single || first ? sum : total[r][v] + sum;
                }
            t.w_sum += panel, k = stop;
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            if (p.wrapped)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) total[r][v] = (total[r][v] << p.wrapped) >> p.wrapped;
            Floats scale = read<Floats>(t.w_scale + v * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sums[r][v] += __builtin_convertvector(total[r][v], Floats) * scale * t.x_scale[r * p.x_scale_row];
        }
        if (--x_left == 0) t.x_scale++, x_left = p.x_every;
        if (--w_left == 0) t.w_scale += panel, w_left = p.w_every;
    }
    for (int r = 0; r < R; r++) {
        float row[panel];
        std::memcpy(row, sums[r], sizeof row);
        for (int64_t i = 0; i < t.columns; i++) t.y[r * p.y_row + i] = t.bias ? row[i] + t.bias[i] : row[i];
    }
}

// Put the groups of rows side by side: [inner / group][rows][group].
template <class D> void interleave(const uint8_t *x, int64_t x_row, int64_t rows, int64_t inner, typename D::Code *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < inner; k += D::group) {
            const uint8_t *from = x + r * x_row + k;
            uint32_t group;
            if constexpr (sizeof(typename D::Code) == 1) group = read<uint32_t>(from);
            else group = from[0] | uint32_t(from[1]) << 16;
            std::memcpy(to + k * rows + r * D::group, &group, sizeof group);
        }
}

// Multiply fewer than D::rows rows, or as many.
template <class D, int R = D::rows> void multiply_rows(int64_t rows, const BlockProduct &p, const Tile<D> &tile) {
    if (rows < R) {
        if constexpr (R > 1) multiply_rows<D, R - 1>(rows, p, tile);
    } else if (std::min(p.block, p.inner) <= p.piece) {
        multiply_tile<D, R, true>(p, tile);
    } else {
        multiply_tile<D, R, false>(p, tile);
    }
}

constexpr int64_t CACHED = 96 * 1024; // the bytes of rows, and of columns, that stay in the second-level cache

template <class D> void multiply_as(const BlockProduct &given) {
    constexpr int64_t panel = panel_of<D>(), height = D::rows;
    const int64_t panels = (given.columns + panel - 1) / panel, fitting = std::max<int64_t>(1, CACHED / given.inner);
    const int64_t tall = std::min((given.rows + height - 1) / height, std::max<int64_t>(1, fitting / height)) * height;
    const int64_t broad = std::max<int64_t>(1, fitting / panel), down = (given.rows + tall - 1) / tall;
    const int64_t shares = given.matrices * down >= 4 * given.threads ? 1 : std::min<int64_t>(panels, 4 * given.threads);
    const int64_t share = (panels + shares - 1) / shares;
#pragma omp parallel num_threads(given.threads)
    {
        const BlockProduct p = given;
        std::vector<typename D::Code> codes(tall * p.inner);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p.matrices * down * shares; task++) {
            const int64_t matrix = task / (down * shares), top = task / shares % down * tall;
            const int64_t rows = std::min(tall, p.rows - top), last = std::min(panels, (task % shares + 1) * share);
            const float *x_scale = p.x_scale + matrix * p.x_scale_matrix;
            for (int64_t r = 0; r < rows; r += height)
                interleave<D>(p.x + matrix * p.x_matrix + (top + r) * p.x_row, p.x_row, std::min(height, rows - r), p.inner,
                              codes.data() + r * p.inner);
            for (int64_t from = task % shares * share; from < last; from += broad)
                for (int64_t i = from; i < std::min(last, from + broad); i++)
                    for (int64_t r = 0; r < rows; r += height)
                        multiply_rows<D>(std::min(height, rows - r), p,
                                         {codes.data() + r * p.inner, x_scale + (top + r) * p.x_scale_row,
                                          p.w + matrix * p.w_matrix + i * p.w_panel,
                                          p.w_scale + matrix * p.w_scale_matrix + i * p.w_scale_panel,
                                          p.w_sum + matrix * p.w_sum_matrix + i * p.w_sum_panel,
                                          p.bias ? p.bias + i * panel : nullptr,
                                          p.y + matrix * p.y_matrix + (top + r) * p.y_row + i * panel,
                                          std::min(panel, p.columns - i * panel)});
        }
    }
}

template <class D> void pack_as(const Columns &given) {
    constexpr int64_t panel = panel_of<D>(), group = D::group;
    const int64_t panels = (given.columns + panel - 1) / panel, pieces = (given.inner + given.piece - 1) / given.piece;
#pragma omp parallel for num_threads(given.threads)
    for (int64_t task = 0; task < given.matrices * panels; task++) {
        const Columns c = given;
        const int64_t matrix = task / panels, first = task % panels * panel;
        int8_t *w = c.w + task * c.inner * panel;
        float *w_scale = c.w_scale + task * c.scales * panel;
        int32_t *w_sum = c.w_sum + task * pieces * panel;
        std::memset(w_scale, 0, c.scales * panel * sizeof *w_scale);
        if (first + panel > c.columns || c.length < c.inner) std::memset(w, 0, c.inner * panel);
        for (int64_t i = 0; i < std::min(panel, c.columns - first); i++) {
            const int8_t *codes = c.codes + matrix * c.matrix + (first + i) * c.row;
            const float *scale = c.scale + matrix * c.scale_matrix + (first + i) * c.scale_row;
            for (int64_t b = 0; b < c.scales; b++) w_scale[b * panel + i] = scale[b];
            const int64_t whole = c.length / group * group;
            for (int64_t k = 0; k < whole; k += group) std::memcpy(w + k * panel + i * group, codes + k, group);
            std::memcpy(w + whole * panel + i * group, codes + whole, c.length - whole);
        }
        typename D::Code ones[group]; // the sums are a product with these
        std::fill_n(ones, group, typename D::Code(1 + D::shift));
        const typename D::Row row = D::row(ones);
        for (int64_t from = 0; from < c.inner; from += c.piece, w_sum += panel)
            for (int v = 0; v < D::vectors; v++) {
                typename D::Part sum = {};
                for (int64_t k = from; k < std::min(c.inner, from + c.piece); k += group)
                    sum = D::add(sum, row, D::columns(w + k * panel + v * D::lanes * group));
                std::memcpy(w_sum + v * D::lanes, &sum, sizeof sum);
            }
    }
}

} // namespace

extern "C" {

// The columns of a panel, the codes of a group, and 1 if 16 bits have to hold the sum of two products.
void dot_layout(int32_t kind, int32_t *panel, int32_t *group, int32_t *pairs) {
    auto of = [&](auto dot) {
        using D = decltype(dot);
        *panel = panel_of<D>(), *group = D::group, *pairs = D::pairs;
    };
    if (kind == 0) of(Dot{});
    else if (kind == 1) of(WideDot{});
    else of(PortableDot{});
}

void pack_columns(const Columns *columns) {
    if (columns->kind == 0) pack_as<Dot>(*columns);
    else if (columns->kind == 1) pack_as<WideDot>(*columns);
    else pack_as<PortableDot>(*columns);
}

void multiply_blocks(const BlockProduct *product) {
    if (product->kind == 0) multiply_as<Dot>(*product);
    else if (product->kind == 1) multiply_as<WideDot>(*product);
    else multiply_as<PortableDot>(*product);
}
}
