// Vectors of attention.cpp, which includes this once for each instruction set.
//
// HERMES_TARGET: the attribute of its functions. kVectorBytes: of a register. kColumns: registers
// that a line of a product's tile is wide; 4 lines of them, what they are made from and a number
// to multiply with must fit into the registers there are.

template <class T, int kCount>
using Lanes __attribute__((vector_size(kCount * sizeof(T)))) = T;
template <class R>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(R));
template <class R>
using Vector = Lanes<R, kWidth<R>>;
using Bits = Lanes<std::uint32_t, kWidth<float>>;
using Integers = Lanes<std::int32_t, kWidth<float>>;
using HalfBits = Lanes<std::uint16_t, kWidth<float>>;

template <class To, class From>
HERMES_TARGET HERMES_INLINE To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class R>
HERMES_TARGET HERMES_INLINE Vector<R> load(const R* from) {
    Vector<R> to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class R, class From>
HERMES_TARGET HERMES_INLINE void store(R* to, const From& from) {
    static_assert(std::is_same_v<From, Vector<R>>);
    std::memcpy(to, &from, sizeof from);
}

// ---- elements, widened and rounded ------------------------------------------------------------

HERMES_TARGET HERMES_INLINE Vector<float> widened(const float* from) {
    return load(from);
}
HERMES_TARGET HERMES_INLINE Vector<double> widened(const double* from) {
    return load(from);
}
HERMES_TARGET HERMES_INLINE Vector<float> widened(const Bfloat16* from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof half);
    return as<Vector<float>>(__builtin_convertvector(half, Bits) << 16);
}
HERMES_TARGET HERMES_INLINE Vector<float> widened(const Float16* from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits);
    const Bits sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff, wide = magnitude << 13;
    // A subnormal by way of an integer: a processor that flushes subnormals never sees one.
    const auto tiny = __builtin_convertvector(as<Integers>(magnitude), Vector<float>) * 0x1p-24f;
    const Bits normal = wide + (112U << 23), large = wide | 0x7f800000;
    const Bits kept = magnitude < 0x400 ? as<Bits>(tiny) : magnitude < 0x7c00 ? normal : large;
    return as<Vector<float>>(kept | sign);
}

HERMES_TARGET HERMES_INLINE void round_into(float* to, const Vector<float>& from) {
    store(to, from);
}
HERMES_TARGET HERMES_INLINE void round_into(double* to, const Vector<double>& from) {
    store(to, from);
}
HERMES_TARGET HERMES_INLINE void round_into(Bfloat16* to, const Vector<float>& from) {
    const Bits bits = as<Bits>(from);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits kept = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    const HalfBits half = __builtin_convertvector(kept, HalfBits);
    std::memcpy(to, &half, sizeof half);
}
HERMES_TARGET HERMES_INLINE void round_into(Float16* to, const Vector<float>& from) {
    const Bits bits = as<Bits>(from), magnitude = bits & 0x7fffffff;
    // Adding a half makes the unit in the last place that of a subnormal; the processor rounds.
    const Bits tiny = as<Bits>(as<Vector<float>>(magnitude) + 0.5f) - 0x3f000000;
    const Bits normal = (magnitude - (112U << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits large = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits kept = magnitude < (113U << 23) ? tiny : magnitude < (143U << 23) ? normal : large;
    const HalfBits half = __builtin_convertvector(kept | ((bits >> 16) & 0x8000), HalfBits);
    std::memcpy(to, &half, sizeof half);
}

// `size` elements as reals, and zeros behind them up to `room`, a whole number of vectors.
template <class Element>
HERMES_TARGET HERMES_INLINE void widen(const Element* from, std::int64_t size, std::int64_t room,
                                       Real<Element>* to) {
    constexpr int width = kWidth<Real<Element>>;
    std::int64_t i = 0;
    for (; i + width <= size; i += width) {
        store(to + i, widened(from + i));
    }
    if (i < size) {
        Element rest[width] = {};
        std::memcpy(rest, from + i, static_cast<std::size_t>(size - i) * sizeof(Element));
        store(to + i, widened(rest));
        i += width;
    }
    for (; i < room; i += width) {
        store(to + i, Vector<Real<Element>>{});
    }
}

// The other way, times `factor`; reads to the end of the last vector, and writes `size` elements.
template <class Element>
HERMES_TARGET HERMES_INLINE void narrow(const Real<Element>* from, Real<Element> factor,
                                        std::int64_t size, Element* to) {
    constexpr int width = kWidth<Real<Element>>;
    std::int64_t i = 0;
    for (; i + width <= size; i += width) {
        round_into(to + i, load(from + i) * factor);
    }
    if (i < size) {
        Element rest[width];
        round_into(rest, load(from + i) * factor);
        std::memcpy(to + i, rest, static_cast<std::size_t>(size - i) * sizeof(Element));
    }
}

// ---- functions --------------------------------------------------------------------------------

// e^x for x to 88, within two units in the last place; 0 where it is subnormal. NaN stays NaN.
HERMES_TARGET HERMES_INLINE Vector<float> exp_of(const Vector<float>& x) {
    constexpr float shift = 0x1.8p23f;  // a sum with it is rounded to an integer, in its last bits
    const Vector<float> shifted = x * 1.44269504f + shift;
    const Vector<float> twos = shifted - shift;
    const Vector<float> f = x - twos * 0.693359375f + twos * 2.12194440e-4f;  // Cephes, expf
    Vector<float> power = 1.9875691500e-4f * f + 1.3981999507e-3f;
    power = power * f + 8.3334519073e-3f;
    power = power * f + 4.1665795894e-2f;
    power = power * f + 1.6666665459e-1f;
    power = power * f + 5.0000001201e-1f;
    power = power * (f * f) + f + 1.0f;
    const Bits scale = (as<Bits>(shifted) << 23) + (127U << 23);
    return x < -87.3f ? Vector<float>{} : power * as<Vector<float>>(scale);
}
HERMES_TARGET HERMES_INLINE Vector<double> exp_of(const Vector<double>& x) {
    Vector<double> power;
    for (int i = 0; i < kWidth<double>; ++i) {
        power[i] = std::exp(x[i]);
    }
    return power;
}

template <class R>
HERMES_TARGET HERMES_INLINE R sum_of(const Vector<R>& x) {
    R sum = 0;
    for (int i = 0; i < kWidth<R>; ++i) {
        sum += x[i];
    }
    return sum;
}

// First halves of a and b, or their second ones, by turns: a0 b0 a1 b1 ...
template <int kFirst, class R, int... kPlaces>
HERMES_TARGET HERMES_INLINE Vector<R> interleaved(const Vector<R>& a, const Vector<R>& b,
                                                  std::integer_sequence<int, kPlaces...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (kFirst + kPlaces / 2 + kPlaces % 2 * kWidth<R>)...);
#else
    using Index = std::conditional_t<sizeof(R) == 8, std::int64_t, std::int32_t>;
    using Order = Lanes<Index, kWidth<R>>;
    return __builtin_shuffle(a, b, Order{(kFirst + kPlaces / 2 + kPlaces % 2 * kWidth<R>)...});
#endif
}

// A square of one vector's width, transposed: each round doubles the distance of what it joins.
template <class R>
HERMES_TARGET HERMES_INLINE void transpose_square(const R* from, std::int64_t from_stride, R* to,
                                                  std::int64_t to_stride) {
    constexpr int width = kWidth<R>, half = width / 2;
    constexpr std::make_integer_sequence<int, width> places;
    Vector<R> rows[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
        rows[i] = load(from + i * from_stride);
    }
#pragma GCC unroll 4
    for (int round = 1; round < width; round *= 2) {
        Vector<R> next[width];
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            next[2 * i] = interleaved<0, R>(rows[i], rows[i + half], places);
            next[2 * i + 1] = interleaved<half, R>(rows[i], rows[i + half], places);
        }
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
            rows[i] = next[i];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
        store(to + i * to_stride, rows[i]);
    }
}

// [rows, columns] to [columns, rows]; both numbers multiples of a vector's width.
template <class R>
HERMES_TARGET void transpose(const R* from, std::int64_t from_stride, std::int64_t rows,
                             std::int64_t columns, R* to, std::int64_t to_stride) {
    constexpr int width = kWidth<R>;
    for (std::int64_t i = 0; i < rows; i += width) {
        for (std::int64_t j = 0; j < columns; j += width) {
            transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i,
                             to_stride);
        }
    }
}

// ---- products ---------------------------------------------------------------------------------

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
