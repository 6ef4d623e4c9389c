// Products of attention.cpp, which includes this once for each instruction set.
//
// HERMES_TARGET, kVectorBytes: of vectors.hpp. kColumns: registers that a line of a product's tile
// is wide; 4 lines of them, what they are made from and a number to multiply with must fit into the
// registers there are.

#include "vectors.hpp"

template <class R>
struct Left {  // element (row, depth) of the left factor
    const R* data;
    std::int64_t row_stride, depth_stride;
};
template <class R>
struct Lines {  // lines of vectors: [depth, columns] of the right factor, [rows, columns] of a sum
    R* data;
    std::int64_t stride;
};

enum class Into { fresh, sum, rescaled_sum };  // what the product is written over or added to

// 4 rows and kWide vectors of a product, in registers.
template <Into kInto, int kWide, class R>
HERMES_TARGET HERMES_INLINE void multiply_tile(const Left<R>& left, const Lines<const R>& right,
                                               std::int64_t depth, const Lines<R>& to,
                                               const R* factors) {
    constexpr int width = kWidth<R>;
    Vector<R> sums[kRowsOfTile][kWide] = {};
    for (std::int64_t d = 0; d < depth; ++d) {
        Vector<R> line[kWide];
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) {
            line[j] = load(right.data + d * right.stride + j * width);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRowsOfTile; ++i) {
            const R factor = left.data[i * left.row_stride + d * left.depth_stride];
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) {
                sums[i][j] += factor * line[j];
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRowsOfTile; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) {
            R* const at = to.data + i * to.stride + j * width;
            if constexpr (kInto == Into::sum) {
                sums[i][j] += load<R>(at);
            } else if constexpr (kInto == Into::rescaled_sum) {
                sums[i][j] += load<R>(at) * load(factors + j * width);
            }
            store(at, sums[i][j]);
        }
    }
}

// left [rows, depth] @ right [depth, vectors]. Reads and writes rows up to a multiple of 4.
template <Into kInto, class R>
HERMES_TARGET void multiply_slice(const Left<R>& left, const Lines<const R>& right,
                                  std::int64_t rows, std::int64_t vectors, std::int64_t depth,
                                  const Lines<R>& to, const R* factors) {
    for (std::int64_t done = 0; done < vectors;) {
        const std::int64_t wide = std::min<std::int64_t>(vectors - done, kColumns);
        const std::int64_t column = done * kWidth<R>;
        const Lines<const R> lines{right.data + column, right.stride};
        const R* const scale = kInto == Into::rescaled_sum ? factors + column : nullptr;
        for (std::int64_t row = 0; row < rows; row += kRowsOfTile) {
            const Left<R> part{left.data + row * left.row_stride, left.row_stride,
                               left.depth_stride};
            const Lines<R> at{to.data + row * to.stride + column, to.stride};
            switch (wide) {
                case 1: multiply_tile<kInto, 1>(part, lines, depth, at, scale); break;
                case 2: multiply_tile<kInto, 2>(part, lines, depth, at, scale); break;
                case 3: multiply_tile<kInto, 3>(part, lines, depth, at, scale); break;
                default: multiply_tile<kInto, 4>(part, lines, depth, at, scale);
            }
        }
        done += wide;
    }
}

// The same for any depth, in slices: a sum of sums errs less than one long sum.
// rescaled_sum: what is there is multiplied by its column's one of `factors` first.
template <Into kInto, class R>
HERMES_TARGET void multiply(const Left<R>& left, const Lines<const R>& right, std::int64_t rows,
                            std::int64_t vectors, std::int64_t depth, const Lines<R>& to,
                            const R* factors = nullptr) {
    multiply_slice<kInto>(left, right, rows, vectors, std::min(depth, kDepth), to, factors);
    for (std::int64_t d = kDepth; d < depth; d += kDepth) {
        multiply_slice<Into::sum, R>(
            {left.data + d * left.depth_stride, left.row_stride, left.depth_stride},
            {right.data + d * right.stride, right.stride}, rows, vectors,
            std::min(depth - d, kDepth), to, nullptr);
    }
}
