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

hermes::Request request_of(const Int64s& samples, const Int64s& row_offsets, const Int64s& rows,
                           std::int64_t row_length, bool truncate) {
    check_range("row_length", row_length, 1, hermes::kMaxRowLength);
    check_range("len(row_offsets)", row_offsets.size, 1, INT64_MAX);
    return {samples.data, samples.size, row_offsets.data, row_offsets.size - 1,
            rows.data,    rows.size,    row_length,       truncate};
}

void check_countable(std::int64_t rows, std::int64_t row_length) {
    if (rows > INT32_MAX / row_length) {
        throw py::value_error(std::to_string(rows) + " rows of " + std::to_string(row_length) +
                              " tokens are more than the 2**31 - 1 that cu_seqlens can count; "
                              "build fewer rows at once");
    }
}

// Calls `then`, without Python's lock, with where the samples of these rows lie, in shards that are
// there by now.
template <class Then>
void with_places(Shards& shards, const Load& load, const hermes::Request& request,
                 const Then& then) {
    for (;;) {
        std::vector<std::int64_t> missing;
        {
            py::gil_scoped_release release;
            hermes::Places places = hermes::find_places(shards.table, request);
            if (places.missing.empty()) {
                then(places);
                return;
            }
            missing = std::move(places.missing);
        }
        load_shards(shards, load, missing);
    }
}

void read_ahead(Shards& shards, const Load& load, const py::object& samples,
                const py::object& row_offsets, const py::object& rows, std::int64_t row_length) {
    const hermes::Request request =
        request_of(int64_of(samples, "samples"), int64_of(row_offsets, "row_offsets"),
                   int64_of(rows, "rows"), row_length, true);
    with_places(shards, load, request, [&](const hermes::Places& places) {
        hermes::read_ahead(shards.table, places, row_length);
    });
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

// Bytes of an id by a dtype as the caller gave it; None is that of `out`, or int64.
std::int64_t id_bytes_of(const py::object& dtype, const std::optional<Columns>& out) {
    py::object wanted = dtype;
    if (wanted.is_none()) {
        if (!out || !py::isinstance<py::array>((*out)[0])) {
            return 8;
        }
        wanted = (*out)[0].attr("dtype");
    }
    const py::dtype ids = py::dtype::from_args(wanted);
    if (ids.equal(py::dtype::of<std::int64_t>())) {
        return 8;
    }
    if (ids.equal(py::dtype::of<std::int32_t>())) {
        return 4;
    }
    throw py::type_error("dtype is " + std::string(py::str(ids)) + ", want int64 or int32");
}

// A `Rows` with these fields, set past its __init__, which takes longer than all else that a call
// does for a small batch; its __setattr__ refuses, as that of a frozen dataclass.
template <class Id>
py::object made(const py::type& rows_type, const Arrays<Id>& all, std::int64_t kept) {
    static const std::array<PyObject*, 5> names{
        PyUnicode_InternFromString("input_ids"), PyUnicode_InternFromString("labels"),
        PyUnicode_InternFromString("positions"), PyUnicode_InternFromString("cu_seqlens"),
        PyUnicode_InternFromString("_kept_count")};
    const py::int_ count(kept);
    const std::array<PyObject*, 5> values{all.input_ids.ptr(), all.labels.ptr(),
                                          all.positions.ptr(), all.cu_seqlens.ptr(), count.ptr()};
    auto* const python = reinterpret_cast<PyTypeObject*>(rows_type.ptr());
    const auto rows = py::reinterpret_steal<py::object>(python->tp_alloc(python, 0));
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (!rows || PyObject_GenericSetAttr(rows.ptr(), names[i], values[i]) != 0) {
            throw py::error_already_set();
        }
    }
    return rows;
}

template <class Id>
py::object filled(const py::type& rows_type, const hermes::Layout& layout,
                  const hermes::Request& request, std::int64_t pad_id,
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
    return made(rows_type, all, layout.kept);
}

py::object build_rows(const py::type& rows_type, Shards& shards, const Load& load,
                      const py::object& samples, const py::object& row_offsets,
                      const py::object& rows, std::int64_t row_length, bool truncate,
                      const py::object& pad_id, const py::object& dtype,
                      const std::optional<Columns>& out, const py::object& threads) {
    if (out) {
        check_size("out", static_cast<std::int64_t>(out->size()), 4);
    }
    const bool wide = id_bytes_of(dtype, out) == 8;
    const std::int64_t pad = integer_of("pad_id", pad_id, 0, wide ? INT64_MAX : INT32_MAX);
    const std::int64_t writers = integer_of("threads", threads, 1, hermes::kMaxThreads);
    const Int64s offsets = int64_of(row_offsets, "row_offsets");
    std::vector<std::int64_t> numbers;
    Int64s wanted{};
    if (PyRange_Check(rows.ptr())) {
        numbers = numbers_of("rows", rows, offsets.size - 1);
        wanted = {numbers.data(), static_cast<std::int64_t>(numbers.size())};
    } else {
        wanted = int64_of(rows, "rows");
    }
    const hermes::Request request =
        request_of(int64_of(samples, "samples"), offsets, wanted, row_length, truncate);
    check_countable(request.row_count, row_length);
    hermes::Layout layout;
    with_places(shards, load, request, [&](const hermes::Places& places) {
        layout = hermes::lay_out_rows(shards.table, places, request);
    });
    return wide ? filled<std::int64_t>(rows_type, layout, request, pad, out, writers)
                : filled<std::int32_t>(rows_type, layout, request, pad, out, writers);
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
    m.def("build_rows", &build_rows, "rows_type"_a, "shards"_a, "load"_a, "samples"_a,
          "row_offsets"_a, "rows"_a, "row_length"_a, "truncate"_a, "pad_id"_a, "dtype"_a, "out"_a,
          "threads"_a, "These rows of a plan, as a `Rows`; rows: a range, or an array of int64.");
    m.def(
        "range_numbers",
        [](const py::object& range, std::int64_t count) {
            const std::vector<std::int64_t> numbers = numbers_of("rows", range, count);
            return Int64Array(static_cast<py::ssize_t>(numbers.size()), numbers.data());
        },
        "range"_a, "count"_a, "The numbers of a range, each inside [0, count).");
    m.def("read_ahead", &read_ahead, "shards"_a, "load"_a, "samples"_a, "row_offsets"_a, "rows"_a,
          "row_length"_a,
          "Ask the kernel to read what these rows will need, and do not wait for it.");
    m.def("pool_state", &hermes::pool_state, "Blocks and bytes that wait to be used again.");
}
