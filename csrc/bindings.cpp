// Python's door to csrc/: checks arguments, releases the GIL around loops, copies no input.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "buffer.hpp"
#include "choice.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "mapping.hpp"
#include "packing.hpp"
#include "random.hpp"
#include "window.hpp"

void bind_rows(py::module_& m);       // row_bindings.cpp
void bind_attention(py::module_& m);  // attention_bindings.cpp

namespace {

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

// Room for `count`, and for so many more `words` of 32 bits as scratch past those of the result.
// NumPy's own memory begins anywhere, so that much of it lies in small pages.
Int64Array room_for(std::int64_t count, std::size_t words = 0) {
    const std::size_t size = std::max(static_cast<std::size_t>(count), (words + 1) / 2);
    auto buffer = std::make_unique<hermes::Buffer<std::int64_t>>(size);
    std::int64_t* data = buffer->data();
    const py::capsule owner(buffer.release(),
                            [](void* p) { delete static_cast<hermes::Buffer<std::int64_t>*>(p); });
    return Int64Array(count, data, owner);
}

// What is to be packed, and what a first look at its lengths found.
struct Samples {
    hermes::Lengths lengths;
    hermes::Limits limits;
    hermes::Scan scanned;
};

Samples samples_of(const py::array& given, std::int64_t row_length, const std::string& too_long,
                   std::int64_t max_samples) {
    Samples samples{lengths_of(given), {row_length, max_samples}, {}};
    check_range("len(lengths)", samples.lengths.count, 0, hermes::kMaxSamples);
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("max_samples", max_samples, 1, hermes::kMaxSamples);
    if (too_long != "error" && too_long != "drop" && too_long != "truncate") {
        throw py::value_error("too_long is '" + too_long + "', want 'error', 'drop' or 'truncate'");
    }
    {
        py::gil_scoped_release release;
        samples.scanned = hermes::scan(samples.lengths, row_length, too_long == "truncate");
    }
    if (samples.scanned.too_small >= 0) {
        refuse_length(samples.lengths, samples.scanned.too_small, true, row_length);
    }
    if (samples.scanned.too_long >= 0 && too_long == "error") {
        refuse_length(samples.lengths, samples.scanned.too_long, false, row_length);
    }
    return samples;
}

struct Packed {
    Int64Array samples, row_offsets, dropped;
    std::int64_t lower_bound, tokens, longest, shortest;
    std::string strategy;
};

Packed measured(const std::vector<hermes::LengthClass>& classes) {
    Packed packed{};
    for (const hermes::LengthClass& c : classes) {
        packed.tokens += c.length * c.count;
    }
    if (!classes.empty()) {
        packed.longest = classes.front().length;
        packed.shortest = classes.back().length;
    }
    return packed;
}

// The first `count` elements of an array.
Int64Array first_of(const Int64Array& all, std::int64_t count) {
    return all.size() == count ? all : Int64Array({count}, {8}, all.data(), all);
}

// The vector's own memory.
Int64Array array_of(std::vector<std::int64_t>&& values) {
    auto moved = std::make_unique<std::vector<std::int64_t>>(std::move(values));
    const auto size = static_cast<py::ssize_t>(moved->size());
    std::int64_t* data = moved->data();
    const py::capsule owner(moved.release(),
                            [](void* p) { delete static_cast<std::vector<std::int64_t>*>(p); });
    return Int64Array(size, data, owner);
}

Packed pack(const py::array& given, std::int64_t row_length, const std::string& strategy_name,
            const std::string& too_long, std::int64_t max_samples,
            const std::vector<std::uint64_t>& seed_words) {
    const auto strategies = strategies_of(strategy_name);
    const hermes::Seed seed = seed_of(seed_words);
    const auto [lengths, limits, scanned] = samples_of(given, row_length, too_long, max_samples);
    // The result's memory is the scratch as well: its two halves hold the ids while they move.
    Int64Array all = room_for(lengths.count, hermes::layout_words(lengths, scanned));
    std::int64_t* samples = all.mutable_data();
    hermes::Sorted sorted;
    hermes::Choice choice{};
    {
        py::gil_scoped_release release;
        sorted =
            hermes::sort_lengths(lengths, scanned, row_length, hermes::spare_in(samples, lengths));
        choice = hermes::best_plan(sorted.classes, limits, strategies);
    }
    Packed packed = measured(sorted.classes);
    packed.strategy = name_of(choice.strategy);
    packed.lower_bound = choice.lower_bound;
    packed.row_offsets = room_for(choice.plan.rows + 1);
    std::int64_t* row_offsets = packed.row_offsets.mutable_data();
    packed.dropped = Int64Array(sorted.dropped);
    std::int64_t* dropped = packed.dropped.mutable_data();
    {
        py::gil_scoped_release release;
        hermes::lay_out(choice.plan, seed_words.empty() ? nullptr : &seed, lengths, scanned,
                        samples, row_offsets, dropped, sorted.dropped);
    }
    packed.samples = first_of(all, lengths.count - sorted.dropped);
    return packed;
}

Packed pack_in_windows(const py::array& given, std::int64_t row_length, const std::string& too_long,
                       std::int64_t max_samples, const std::vector<std::uint64_t>& seed_words,
                       std::int64_t window) {
    check_range("window", window, 1, hermes::kMaxSamples);
    const hermes::Seed seed = seed_of(seed_words);
    const auto [lengths, limits, scanned] = samples_of(given, row_length, too_long, max_samples);
    const auto count = static_cast<std::size_t>(lengths.count);
    Int64Array all = room_for(lengths.count);
    std::int64_t* samples = all.mutable_data();
    hermes::Sorted sorted;
    hermes::Windowed made;
    std::vector<std::int64_t> dropped;
    std::int64_t lower_bound = 0;
    {
        py::gil_scoped_release release;
        hermes::Buffer<std::uint32_t> ids(count);
        sorted = hermes::sort_lengths(lengths, scanned, row_length, ids.data());
        lower_bound = hermes::lower_bound(sorted.classes, limits);
        std::iota(ids.begin(), ids.end(), 0U);
        if (!seed_words.empty()) {
            hermes::Xoshiro256 random(seed);
            hermes::shuffle(ids.data(), count, random);
        }
        if (sorted.dropped > 0) {
            dropped = hermes::drop_longer(lengths, row_length, ids.data());
        }
        const auto left = lengths.count - static_cast<std::int64_t>(dropped.size());
        made = hermes::pack_windows(lengths, ids.data(), left, {}, {window, limits, seed, 0, true},
                                    samples);
    }
    Packed packed = measured(sorted.classes);
    packed.strategy = "windowed";
    packed.lower_bound = lower_bound;
    packed.samples = first_of(all, made.samples);
    packed.row_offsets = array_of(std::move(made.row_offsets));
    packed.dropped = array_of(std::move(dropped));
    return packed;
}

struct Windows {
    Int64Array samples, row_offsets, carried, ages;
};

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
    for (py::ssize_t i = 0; i < ages.size(); ++i) {
        check_range("ages", waited[i], 0, INT64_MAX);
    }
    const hermes::Windows windows{
        window, {row_length, max_samples}, seed_of(seed_words), first_window, finish};
    Int64Array all = room_for(lengths.size());
    std::int64_t* samples = all.mutable_data();
    hermes::Windowed made;
    {
        py::gil_scoped_release release;
        made =
            hermes::pack_windows({values, lengths.size(), hermes::Dtype::int64}, nullptr,
                                 lengths.size(), {waited, waited + ages.size()}, windows, samples);
    }
    return {first_of(all, made.samples), array_of(std::move(made.row_offsets)),
            array_of(std::move(made.carried)), array_of(std::move(made.ages))};
}

// ---- mapping ----------------------------------------------------------------------------------

// A path is bytes: the names of files need be no text.
Array<std::uint8_t> map_file(const py::bytes& name) {
    const std::string path(name);
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
    m.attr("MAX_ROW_LENGTH") = hermes::kMaxRowLength;
    m.attr("MAX_SAMPLES") = hermes::kMaxSamples;

    m.def(
        "this_cpu",
        [] {
            const hermes::Cpu cpu = hermes::this_cpu();
            return py::make_tuple(cpu.is_intel, cpu.multiplies_bf16, cpu.multiplies_fp16);
        },
        "Is it Intel's; has it instructions to multiply bf16, and fp16?");
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
    m.def("pack_in_windows", &pack_in_windows, "lengths"_a.noconvert(), py::kw_only(),
          "row_length"_a, "too_long"_a, "max_samples"_a, "seed_words"_a, "window"_a,
          "The same, a window of samples at a time, which the words shuffle before.");

    py::class_<Windows>(m, "Windows", "What `pack_windows` returns: rows, and who waits.")
        .def_readonly("samples", &Windows::samples)
        .def_readonly("row_offsets", &Windows::row_offsets)
        .def_readonly("carried", &Windows::carried)
        .def_readonly("ages", &Windows::ages);
    m.def("pack_windows", &pack_windows, "lengths"_a.noconvert(), "ages"_a.noconvert(),
          py::kw_only(), "window"_a, "row_length"_a, "max_samples"_a, "seed_words"_a,
          "first_window"_a, "finish"_a,
          "Full rows, a window of samples at a time; those with ages have waited so long.");
    bind_rows(m);
    bind_attention(m);

    m.def("map_file", &map_file, "path"_a,
          "The bytes of a file, mapped read-only; holds no file descriptor.");
}
