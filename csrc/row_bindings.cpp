// Python's door to row building: shards as they are needed, memory for the arrays of a batch.
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "packing.hpp"
#include "pool.hpp"
#include "rows.hpp"
#include "shards.hpp"

namespace {

// ---- shards -----------------------------------------------------------------------------------

// The shards in use, and the arrays that they point into.
struct Shards {
    explicit Shards(const Int64Array& first_samples)
        : table([&] {
              const std::int64_t* first = data_of(first_samples, 1, "first_samples");
              return std::vector<std::int64_t>(first, first + first_samples.size());
          }()),
          owners(static_cast<std::size_t>(table.shards())) {}

    hermes::ShardTable table;
    std::vector<py::object> owners;
    std::mutex filling;  // where Python has no lock of its own
};

template <class T>
Array<T> exactly(const py::handle& object, const char* name, const char* wanted) {
    if (!Array<T>::check_(object)) {
        throw py::type_error(std::string(name) + " of a shard must be a C-contiguous array of " +
                             wanted);
    }
    return py::reinterpret_borrow<Array<T>>(object);
}

hermes::Shard shard_of(const py::tuple& parts) {
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

using Load = py::typing::Callable<py::object(std::int64_t)>;

void load_shards(Shards& shards, const Load& load, const std::vector<std::int64_t>& numbers) {
    for (const std::int64_t number : numbers) {
        const py::object made = load(number);
        const py::tuple parts = py::make_tuple(made.attr("tokens"), made.attr("offsets"),
                                               made.attr("spans"), made.attr("span_offsets"));
        const hermes::Shard shard = shard_of(parts);
        const std::lock_guard lock(shards.filling);
        if (shards.table.find(number) == nullptr) {
            shards.table.put(number, shard);
            shards.owners[static_cast<std::size_t>(number)] = parts;
        }
    }
}

// ---- a plan -----------------------------------------------------------------------------------

hermes::Request request_of(const Int64Array& samples, const Int64Array& row_offsets,
                           const Int64Array& rows, std::int64_t row_length, bool truncate) {
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("len(row_offsets)", row_offsets.size(), 1, INT64_MAX);
    if (rows.size() > INT32_MAX / row_length) {
        throw py::value_error(std::to_string(rows.size()) + " rows of " +
                              std::to_string(row_length) +
                              " tokens are more than the 2**31 - 1 that cu_seqlens can count; "
                              "build fewer rows at once");
    }
    return {data_of(samples, 1, "samples"),
            samples.size(),
            data_of(row_offsets, 1, "row_offsets"),
            row_offsets.size() - 1,
            data_of(rows, 1, "rows"),
            rows.size(),
            row_length,
            truncate};
}

// Where the samples of these rows lie, in shards that are there by now.
hermes::Places found_places(Shards& shards, const Load& load, const hermes::Request& request) {
    for (;;) {
        hermes::Places places;
        {
            py::gil_scoped_release release;
            places = hermes::find_places(shards.table, request);
        }
        if (places.missing.empty()) {
            return places;
        }
        load_shards(shards, load, places.missing);
    }
}

void read_ahead(Shards& shards, const Load& load, const Int64Array& samples,
                const Int64Array& row_offsets, const Int64Array& rows, std::int64_t row_length) {
    const hermes::Request request = request_of(samples, row_offsets, rows, row_length, true);
    const hermes::Places places = found_places(shards, load, request);
    py::gil_scoped_release release;
    hermes::read_ahead(shards.table, places, row_length);
}

// ---- memory of a batch ------------------------------------------------------------------------

// An array of the caller's, refused unless it can be written as it is; `shape` as words, too.
template <class T>
Array<T> writable(const py::handle& object, const char* name, bool fits, const std::string& shape) {
    const bool typed = py::isinstance<py::array_t<T>>(object);
    if (typed && fits && Array<T>::check_(object)) {
        const auto array = py::reinterpret_borrow<Array<T>>(object);
        if (array.writeable() && reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0) {
            return array;
        }
    }
    const std::string message = "out." + std::string(name) + " is " + described(object) +
                                ", want a writeable, aligned, contiguous array of " +
                                std::string(py::str(py::dtype::of<T>())) + " " + shape;
    if (typed) {
        throw py::value_error(message);
    }
    throw py::type_error(message);
}

template <class T>
Array<T> writable_column(const py::handle& object, const char* name, std::int64_t rows,
                         std::int64_t row_length) {
    bool fits = false;
    if (py::isinstance<py::array>(object)) {
        const auto array = py::reinterpret_borrow<py::array>(object);
        fits = array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == row_length;
    }
    return writable<T>(object, name, fits,
                       "[" + std::to_string(rows) + ", " + std::to_string(row_length) + "]");
}

template <class T>
Array<T> recycled_column(std::int64_t rows, std::int64_t row_length) {
    constexpr std::size_t small = std::size_t{32} << 10;  // which malloc has warm
    const std::array<py::ssize_t, 2> shape{rows, row_length};
    const std::size_t size = static_cast<std::size_t>(rows * row_length) * sizeof(T);
    if (size < small) {
        return Array<T>(shape);
    }
    auto block = std::make_unique<hermes::Block>(hermes::take_block(size));
    auto* data = reinterpret_cast<T*>(block->data());
    const py::capsule owner(block.release(), [](void* p) {
        const std::unique_ptr<hermes::Block> back(static_cast<hermes::Block*>(p));
        hermes::give_block(std::move(*back));
    });
    return Array<T>(shape, data, owner);
}

struct Span {  // of memory
    const char* name;
    std::uintptr_t begin, end;
};

template <class T>
Span span_of(const char* name, const Array<T>& array) {
    const auto begin = reinterpret_cast<std::uintptr_t>(array.data());
    return {name, begin, begin + static_cast<std::uintptr_t>(array.nbytes())};
}

void check_disjoint(std::array<Span, 4> spans) {
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < spans.size(); ++i) {
        if (spans[i].begin < spans[i - 1].end) {
            throw py::value_error(std::string("out.") + spans[i].name + " shares memory with out." +
                                  spans[i - 1].name);
        }
    }
}

template <class Id>
struct Arrays {
    Array<Id> input_ids, labels, positions;
    Array<std::int32_t> cu_seqlens;
};

template <class Id>
Arrays<Id> new_arrays(std::int64_t rows, std::int64_t row_length, std::int64_t ends) {
    return {recycled_column<Id>(rows, row_length), recycled_column<Id>(rows, row_length),
            recycled_column<Id>(rows, row_length), Array<std::int32_t>(ends)};
}

template <class Id>
Arrays<Id> given_arrays(const py::tuple& out, std::int64_t rows, std::int64_t row_length,
                        std::int64_t ends) {
    check_size("out", static_cast<std::int64_t>(out.size()), 4);
    bool fits = false;
    if (py::isinstance<py::array>(out[3])) {
        const auto array = py::reinterpret_borrow<py::array>(out[3]);
        fits = array.ndim() == 1 && array.size() >= ends;
    }
    Arrays<Id> all{writable_column<Id>(out[0], "input_ids", rows, row_length),
                   writable_column<Id>(out[1], "labels", rows, row_length),
                   writable_column<Id>(out[2], "positions", rows, row_length),
                   writable<std::int32_t>(out[3], "cu_seqlens", fits,
                                          "[at least " + std::to_string(ends) + "]")};
    check_disjoint({span_of("input_ids", all.input_ids), span_of("labels", all.labels),
                    span_of("positions", all.positions), span_of("cu_seqlens", all.cu_seqlens)});
    all.cu_seqlens = Array<std::int32_t>(ends, all.cu_seqlens.data(), all.cu_seqlens);
    return all;
}

// ---- rows -------------------------------------------------------------------------------------

using Columns = py::typing::Tuple<py::array, py::array, py::array, Array<std::int32_t>>;
using Built = py::typing::Tuple<py::array, py::array, py::array, Array<std::int32_t>, py::int_>;

template <class Id>
Built filled(const hermes::Layout& layout, const hermes::Request& request, std::int64_t pad_id,
             const std::optional<Columns>& out, std::int64_t threads) {
    const std::int64_t rows = request.row_count, row_length = request.row_length;
    const auto ends = static_cast<std::int64_t>(layout.segments.size()) + 1;
    Arrays<Id> all = out ? given_arrays<Id>(*out, rows, row_length, ends)
                         : new_arrays<Id>(rows, row_length, ends);
    const hermes::Batch<Id> batch{all.input_ids.mutable_data(), all.labels.mutable_data(),
                                  all.positions.mutable_data()};
    std::int32_t* cu_seqlens = all.cu_seqlens.mutable_data();
    {
        py::gil_scoped_release release;
        hermes::fill_rows(layout, static_cast<Id>(pad_id), batch, threads);
        hermes::fill_cu_seqlens(layout, cu_seqlens);
    }
    return py::make_tuple(std::move(all.input_ids), std::move(all.labels), std::move(all.positions),
                          std::move(all.cu_seqlens), layout.kept);
}

Built build_rows(Shards& shards, const Load& load, const Int64Array& samples,
                 const Int64Array& row_offsets, const Int64Array& rows, std::int64_t row_length,
                 bool truncate, std::int64_t pad_id, std::int64_t id_bytes,
                 const std::optional<Columns>& out, std::int64_t threads) {
    check_range("threads", threads, 1, hermes::kMaxThreads);
    const hermes::Request request = request_of(samples, row_offsets, rows, row_length, truncate);
    const hermes::Places places = found_places(shards, load, request);
    hermes::Layout layout;
    {
        py::gil_scoped_release release;
        layout = hermes::lay_out_rows(shards.table, places, request);
    }
    switch (id_bytes) {
        case 4: return filled<std::int32_t>(layout, request, pad_id, out, threads);
        case 8: return filled<std::int64_t>(layout, request, pad_id, out, threads);
        default: throw py::value_error("id_bytes is " + std::to_string(id_bytes) + ", want 4 or 8");
    }
}

}  // namespace

void bind_rows(py::module_& m) {
    m.attr("IGNORE_INDEX") = hermes::kIgnoreIndex;
    m.attr("MAX_THREADS") = hermes::kMaxThreads;
    m.attr("POOL_BLOCKS") = hermes::kPoolBlocks;
    m.attr("POOL_BYTES") = hermes::kPoolBytes;

    py::class_<Shards>(m, "Shards", "Shards in use of samples that are numbered through.")
        .def(py::init<const Int64Array&>(), "first_samples"_a.noconvert())
        .def(py::pickle(
            [](const Shards& shards) {
                const auto& first = shards.table.first_samples();
                return Int64Array(static_cast<py::ssize_t>(first.size()), first.data());
            },
            [](const Int64Array& first) { return std::make_unique<Shards>(first); }));
    m.def("build_rows", &build_rows, "shards"_a, "load"_a, "samples"_a.noconvert(),
          "row_offsets"_a.noconvert(), "rows"_a.noconvert(), "row_length"_a, "truncate"_a,
          "pad_id"_a, "id_bytes"_a, "out"_a, "threads"_a,
          "Input ids, labels, positions, cu_seqlens of these rows of a plan; how many are kept.");
    m.def("read_ahead", &read_ahead, "shards"_a, "load"_a, "samples"_a.noconvert(),
          "row_offsets"_a.noconvert(), "rows"_a.noconvert(), "row_length"_a,
          "Ask the kernel to read what these rows will need, and do not wait for it.");
    m.def("pool_state", &hermes::pool_state, "Blocks and bytes that wait to be used again.");
}
