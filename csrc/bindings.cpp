// Python's door to csrc/: checks arguments, releases the GIL around loops, copies no input.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "choice.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "mapping.hpp"
#include "packing.hpp"
#include "random.hpp"
#include "rows.hpp"
#include "window.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// Taken with noconvert(): C-contiguous arrays of exactly this dtype, or a TypeError; never a copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Int64Array = Array<std::int64_t>;

template <class T>
const T* data_of(const Array<T>& array, int ndim, const char* name) {
    if (array.ndim() != ndim) {
        throw py::value_error(std::string(name) + " is " + std::to_string(array.ndim()) +
                              "-D, want " + std::to_string(ndim) + "-D");
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
        throw py::value_error(std::string(name) + " is not aligned in memory; pass a copy of it");
    }
    return array.data();
}

void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) {
        throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", outside [" +
                              std::to_string(low) + ", " + std::to_string(high) + "]");
    }
}

void check_size(const char* name, std::int64_t size, std::int64_t wanted) {
    if (size != wanted) {
        throw py::value_error(std::string(name) + " has " + std::to_string(size) +
                              " elements, want " + std::to_string(wanted));
    }
}

// ---- packing ----------------------------------------------------------------------------------

hermes::Lengths lengths_of(const py::array& array) {
    using hermes::Dtype;
    const auto size = array.dtype().itemsize();
    const char kind = array.dtype().kind();
    if ((kind != 'i' && kind != 'u') || size > 8 || array.dtype().byteorder() == '>') {
        throw py::type_error("lengths is " + std::string(py::str(array.dtype())) +
                             ", want native integers");
    }
    if (array.ndim() != 1 || (array.flags() & py::array::c_style) == 0 ||
        reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::size_t>(size) != 0) {
        throw py::value_error("lengths is not one aligned row of memory; pass a copy of it");
    }
    const Dtype dtype = kind == 'i' ? (size == 1   ? Dtype::int8
                                       : size == 2 ? Dtype::int16
                                       : size == 4 ? Dtype::int32
                                                   : Dtype::int64)
                                    : (size == 1   ? Dtype::uint8
                                       : size == 2 ? Dtype::uint16
                                       : size == 4 ? Dtype::uint32
                                                   : Dtype::uint64);
    return {array.data(), array.size(), dtype};
}

const char* name_of(hermes::Strategy strategy) {
    switch (strategy) {
        case hermes::Strategy::first_fit: return "first_fit_decreasing";
        case hermes::Strategy::best_fit: return "best_fit_decreasing";
        case hermes::Strategy::guided: return "guided";
        default: return "exact_gap";
    }
}

// The strategies to run, cheapest first; the plan with the fewest rows is kept.
std::vector<hermes::Strategy> strategies_of(const std::string& name) {
    std::vector<hermes::Strategy> all{hermes::Strategy::best_fit, hermes::Strategy::first_fit,
                                      hermes::Strategy::exact_gap};
    if (name == "best") {
        return all;
    }
    if (name == "guided") {
        all.push_back(hermes::Strategy::guided);
        return all;
    }
    for (const auto strategy : all) {
        if (name == name_of(strategy)) {
            return {strategy};
        }
    }
    throw py::value_error("strategy is '" + name +
                          "', want 'best', 'exact_gap', 'best_fit_decreasing', "
                          "'first_fit_decreasing', 'guided' or 'windowed'");
}

[[noreturn]] void refuse_length(const hermes::Lengths& lengths, std::int64_t index, bool too_small,
                                std::int64_t row_length) {
    throw py::value_error("lengths[" + std::to_string(index) + "] is " +
                          hermes::length_text(lengths, index) + ", outside [1, " +
                          std::to_string(row_length) + "]; " +
                          (too_small ? "every sample needs at least one token"
                                     : "set too_long to 'drop' or 'truncate', or a longer row"));
}

hermes::Seed seed_of(const std::vector<std::uint64_t>& words) {
    hermes::Seed seed{1, 0, 0, 0};
    if (!words.empty()) {
        check_size("seed_words", static_cast<std::int64_t>(words.size()), 4);
        std::copy(words.begin(), words.end(), seed.begin());
    }
    return seed;
}

struct Packed {
    Int64Array samples, row_offsets, dropped;
    std::int64_t lower_bound, tokens, longest, shortest;
    std::string strategy;
};

Packed pack(const py::array& given, std::int64_t row_length, const std::string& strategy_name,
            const std::string& too_long, std::int64_t max_samples,
            const std::vector<std::uint64_t>& seed_words) {
    const hermes::Lengths lengths = lengths_of(given);
    check_range("len(lengths)", lengths.count, 0, hermes::kMaxSamples);
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("max_samples", max_samples, 1, hermes::kMaxSamples);
    const auto strategies = strategies_of(strategy_name);
    if (too_long != "error" && too_long != "drop" && too_long != "truncate") {
        throw py::value_error("too_long is '" + too_long + "', want 'error', 'drop' or 'truncate'");
    }
    const hermes::Seed seed = seed_of(seed_words);
    const hermes::Limits limits{row_length, max_samples};
    hermes::Scan scanned;
    {
        py::gil_scoped_release release;
        scanned = hermes::scan(lengths, row_length);
    }
    if (scanned.too_small >= 0) {
        refuse_length(lengths, scanned.too_small, true, row_length);
    }
    if (scanned.too_long >= 0 && too_long == "error") {
        refuse_length(lengths, scanned.too_long, false, row_length);
    }
    // The result's memory is the scratch as well: its two halves hold the ids while they move.
    const Int64Array all(lengths.count);
    auto* samples = const_cast<std::int64_t*>(all.data());
    auto* ids = reinterpret_cast<std::uint32_t*>(samples);
    hermes::Sorted sorted;
    hermes::Choice choice{};
    Packed packed{};
    {
        py::gil_scoped_release release;
        sorted = hermes::sort_by_length(lengths, scanned, row_length, too_long == "truncate", ids,
                                        ids + lengths.count);
        choice = hermes::best_plan(sorted.classes, limits, strategies);
    }
    const hermes::Plan& plan = choice.plan;
    packed.strategy = name_of(choice.strategy);
    packed.lower_bound = choice.lower_bound;
    for (const hermes::LengthClass& c : sorted.classes) {
        packed.tokens += c.length * c.count;
    }
    if (!sorted.classes.empty()) {
        packed.longest = sorted.classes.front().length;
        packed.shortest = sorted.classes.back().length;
    }
    packed.row_offsets = Int64Array(plan.rows + 1);
    packed.dropped = Int64Array(sorted.dropped);
    std::copy_n(ids, sorted.dropped, packed.dropped.mutable_data());
    std::int64_t* row_offsets = packed.row_offsets.mutable_data();
    {
        py::gil_scoped_release release;
        hermes::lay_out(plan, seed_words.empty() ? nullptr : &seed, lengths.count, sorted.dropped,
                        samples, row_offsets);
    }
    packed.samples =
        sorted.dropped == 0 ? all : Int64Array({lengths.count - sorted.dropped}, {8}, samples, all);
    return packed;
}

struct Windows {
    Int64Array samples, row_offsets, carried, ages;
};

Int64Array array_of(const std::vector<std::int64_t>& values) {
    return Int64Array(static_cast<py::ssize_t>(values.size()), values.data());
}

Windows pack_windows(const Int64Array& lengths, const Int64Array& ages, std::int64_t window,
                     std::int64_t row_length, std::int64_t max_samples,
                     const std::vector<std::uint64_t>& seed_words, std::int64_t first_window,
                     bool finish) {
    const std::int64_t* values = data_of(lengths, 1, "lengths");
    const std::int64_t* waited = data_of(ages, 1, "ages");
    check_range("len(lengths)", lengths.size(), ages.size(), hermes::kMaxSamples);
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("max_samples", max_samples, 1, hermes::kMaxSamples);
    check_range("window", window, 1, hermes::kMaxSamples);
    check_range("first_window", first_window, 0, INT64_MAX);
    for (py::ssize_t i = 0; i < lengths.size(); ++i) {
        check_range("lengths", values[i], 1, row_length);
    }
    const hermes::Seed seed = seed_of(seed_words);
    hermes::Windowed made;
    {
        py::gil_scoped_release release;
        made = hermes::pack_windows(values, lengths.size(), {waited, waited + ages.size()}, window,
                                    {row_length, max_samples}, seed,
                                    static_cast<std::uint64_t>(first_window), finish);
    }
    return {array_of(made.samples), array_of(made.row_offsets), array_of(made.carried),
            array_of(made.ages)};
}

Int64Array shuffle(std::int64_t count, const std::vector<std::uint64_t>& seed_words) {
    check_range("count", count, 0, hermes::kMaxSamples);
    hermes::Xoshiro256 random(seed_of(seed_words));
    Int64Array order(count);
    std::int64_t* ids = order.mutable_data();
    py::gil_scoped_release release;
    std::iota(ids, ids + count, std::int64_t{0});
    hermes::shuffle(ids, static_cast<std::size_t>(count), random);
    return order;
}

// ---- rows -------------------------------------------------------------------------------------

using ShardTuple = py::typing::Tuple<py::array, Int64Array, Array<std::uint32_t>, Int64Array>;

template <class T>
Array<T> exactly(const py::handle& object, const char* name, const char* wanted) {
    if (!Array<T>::check_(object)) {
        throw py::type_error(std::string(name) + " of a shard must be a C-contiguous array of " +
                             wanted);
    }
    return py::reinterpret_borrow<Array<T>>(object);
}

hermes::Shard shard_of(const py::tuple& parts) {
    check_size("a shard", static_cast<std::int64_t>(parts.size()), 4);
    hermes::Shard shard{};
    if (Array<std::uint16_t>::check_(parts[0])) {
        const auto tokens = py::reinterpret_borrow<Array<std::uint16_t>>(parts[0]);
        shard.tokens = data_of(tokens, 1, "tokens");
        shard.token_bytes = 2;
        shard.token_count = tokens.size();
    } else {
        const auto tokens = exactly<std::uint32_t>(parts[0], "tokens", "uint16 or uint32");
        shard.tokens = data_of(tokens, 1, "tokens");
        shard.token_bytes = 4;
        shard.token_count = tokens.size();
    }
    const auto offsets = exactly<std::int64_t>(parts[1], "offsets", "int64");
    const auto spans = exactly<std::uint32_t>(parts[2], "spans", "uint32");
    const auto span_offsets = exactly<std::int64_t>(parts[3], "span_offsets", "int64");
    shard.offsets = data_of(offsets, 1, "offsets");
    shard.spans = data_of(spans, 2, "spans");
    shard.span_offsets = data_of(span_offsets, 1, "span_offsets");
    shard.samples = offsets.size() - 1;
    shard.span_count = spans.shape(0);
    check_range("len(offsets)", offsets.size(), 1, INT64_MAX);
    check_size("span_offsets", span_offsets.size(), offsets.size());
    check_size("a span", spans.shape(1), 2);
    return shard;
}

struct RowArrays {
    Int64Array input_ids, labels, positions;
    Array<std::int32_t> cu_seqlens;
    Int64Array kept;
};

RowArrays build_rows(const py::typing::List<ShardTuple>& shards, const Int64Array& shard_indices,
                     const Int64Array& sample_indices, const Int64Array& row_starts,
                     std::int64_t row_length, std::int64_t pad_id, bool truncate) {
    hermes::Request request{};
    for (const py::handle shard : shards) {
        if (!py::isinstance<py::tuple>(shard)) {
            throw py::type_error("a shard must be a tuple of four arrays");
        }
        request.shards.push_back(shard_of(py::reinterpret_borrow<py::tuple>(shard)));
    }
    request.shard_of = data_of(shard_indices, 1, "shard_indices");
    request.sample_of = data_of(sample_indices, 1, "sample_indices");
    request.row_starts = data_of(row_starts, 1, "row_starts");
    request.places = shard_indices.size();
    request.rows = row_starts.size() - 1;
    request.row_length = row_length;
    request.pad_id = pad_id;
    request.truncate = truncate;
    check_size("sample_indices", sample_indices.size(), request.places);
    check_range("len(row_starts)", row_starts.size(), 1, INT32_MAX);
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("rows * row_length", request.rows * row_length, 0, INT32_MAX);
    check_range("row_starts[0]", request.row_starts[0], 0, 0);
    for (std::int64_t row = 0; row < request.rows; ++row) {
        check_range("row_starts", request.row_starts[row + 1], request.row_starts[row],
                    request.places);
    }
    hermes::Layout layout;
    {
        py::gil_scoped_release release;
        layout = hermes::lay_out_rows(request);
    }
    const std::array<py::ssize_t, 2> shape{request.rows, row_length};
    RowArrays out{Int64Array(shape), Int64Array(shape), Int64Array(shape),
                  Array<std::int32_t>(static_cast<py::ssize_t>(layout.segments.size()) + 1),
                  Int64Array(layout.kept)};
    const hermes::Batch batch{out.input_ids.mutable_data(), out.labels.mutable_data(),
                              out.positions.mutable_data(), out.kept.mutable_data(),
                              out.cu_seqlens.mutable_data()};
    {
        py::gil_scoped_release release;
        hermes::fill_rows(request, layout, batch);
    }
    return out;
}

// ---- mapping ----------------------------------------------------------------------------------

Array<std::uint8_t> map_file(const std::string& path) {
    hermes::Mapping* mapping = nullptr;
    try {
        mapping = new hermes::Mapping(hermes::map_file(path));
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        throw py::error_already_set();
    }
    const py::capsule owner(mapping, [](void* p) {
        auto* mapped = static_cast<hermes::Mapping*>(p);
        hermes::unmap(*mapped);
        delete mapped;
    });
    Array<std::uint8_t> bytes(mapping->size, mapping->data, owner);
    py::detail::array_proxy(bytes.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return bytes;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Compiled core of hermes_core. Private: call it through hermes_core.";
    m.attr("IGNORE_INDEX") = hermes::kIgnoreIndex;
    m.attr("MAX_ROW_LENGTH") = hermes::kMaxRowLength;
    m.attr("MAX_SAMPLES") = hermes::kMaxSamples;

    m.def(
        "active_isa", [] { return std::string(hermes::isa_name(hermes::active_isa())); },
        "Instruction set in use: 'scalar', 'avx2' or 'avx512'.");

    py::class_<Packed>(m, "Packed", "What `pack` returns: a plan, and what it was measured by.")
        .def_readonly("samples", &Packed::samples)
        .def_readonly("row_offsets", &Packed::row_offsets)
        .def_readonly("dropped", &Packed::dropped)
        .def_readonly("lower_bound", &Packed::lower_bound)
        .def_readonly("tokens", &Packed::tokens)
        .def_readonly("longest", &Packed::longest)
        .def_readonly("shortest", &Packed::shortest)
        .def_readonly("strategy", &Packed::strategy);
    m.def("pack", &pack, "lengths"_a.noconvert(), py::kw_only(), "row_length"_a, "strategy"_a,
          "too_long"_a, "max_samples"_a, "seed_words"_a,
          "Plan of whole samples in rows; four random words shuffle them, none leave them.");

    py::class_<Windows>(m, "Windows", "What `pack_windows` returns: rows, and who waits.")
        .def_readonly("samples", &Windows::samples)
        .def_readonly("row_offsets", &Windows::row_offsets)
        .def_readonly("carried", &Windows::carried)
        .def_readonly("ages", &Windows::ages);
    m.def("pack_windows", &pack_windows, "lengths"_a.noconvert(), "ages"_a.noconvert(),
          py::kw_only(), "window"_a, "row_length"_a, "max_samples"_a, "seed_words"_a,
          "first_window"_a, "finish"_a,
          "Full rows, a window of samples at a time; those with ages have waited so long.");
    m.def("shuffle", &shuffle, "count"_a, py::kw_only(), "seed_words"_a,
          "The numbers below count in an order that four random words decide.");

    py::class_<RowArrays>(m, "RowArrays", "What `build_rows` returns: the arrays of one batch.")
        .def_readonly("input_ids", &RowArrays::input_ids)
        .def_readonly("labels", &RowArrays::labels)
        .def_readonly("positions", &RowArrays::positions)
        .def_readonly("cu_seqlens", &RowArrays::cu_seqlens)
        .def_readonly("kept", &RowArrays::kept);
    m.def("build_rows", &build_rows, "shards"_a, "shard_indices"_a.noconvert(),
          "sample_indices"_a.noconvert(), "row_starts"_a.noconvert(), py::kw_only(), "row_length"_a,
          "pad_id"_a, "truncate"_a,
          "Rows row_starts[r]:row_starts[r + 1] of (shard index, sample index) pairs.");

    m.def("map_file", &map_file, "path"_a,
          "The bytes of a file, mapped read-only; holds no file descriptor.");
}
