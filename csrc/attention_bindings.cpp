// Python's door to attention: arrays that are PyTorch's memory, bfloat16 and float16 as uint16.
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "attention.hpp"
#include "rows.hpp"

namespace {

using Sizes = std::vector<std::int64_t>;

Sizes sizes_of(const py::array& array) {
    return Sizes(array.shape(), array.shape() + array.ndim());
}

std::string in_words(const Sizes& sizes) {
    std::string words;
    for (const std::int64_t size : sizes) {
        words += (words.empty() ? "[" : ", ") + std::to_string(size);
    }
    return words + "]";
}

template <class Element>
using Stored = std::conditional_t<sizeof(Element) == 2, std::uint16_t, Element>;

// Elements of an array that can be read as it lies.
template <class Element>
const Element* read(const py::array& array, const char* name, const Sizes& sizes) {
    const bool typed = py::isinstance<py::array_t<Stored<Element>>>(array);
    const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Element) == 0;
    if (typed && aligned && Array<Stored<Element>>::check_(array) && sizes_of(array) == sizes) {
        return static_cast<const Element*>(array.data());
    }
    const std::string message =
        std::string(name) + " is " + described(array) + ", want an aligned, contiguous array of " +
        std::string(py::str(py::dtype::of<Stored<Element>>())) + " " + in_words(sizes);
    if (typed) {
        throw py::value_error(message);
    }
    throw py::type_error(message);
}

template <class Element>
Element* write(py::array& array, const char* name, const Sizes& sizes) {
    read<Element>(array, name, sizes);
    if (!array.writeable()) {
        throw py::value_error(std::string(name) + " is " + described(array) +
                              ", want an array that can be written");
    }
    return static_cast<Element*>(array.mutable_data());
}

// Sizes that q and k say; everything else has to follow them.
hermes::AttentionShape shape_of(const py::array& q, const py::array& k, const py::array& lse,
                                const py::array& starts, double scale, std::int64_t threads) {
    for (const auto& [name, array] : {std::pair{"q", q}, std::pair{"k", k}}) {
        if (array.ndim() != 3 || array.size() == 0) {
            throw py::value_error(std::string(name) + " is " + described(array) +
                                  ", want [tokens, heads, head size], none of them 0");
        }
    }
    if (q.shape(1) % k.shape(1) != 0) {
        throw py::value_error("q has " + std::to_string(q.shape(1)) +
                              " heads, not a multiple of the " + std::to_string(k.shape(1)) +
                              " of k");
    }
    if (lse.ndim() != 2 || lse.shape(1) < q.shape(0)) {
        throw py::value_error("lse is " + described(lse) + ", want [" + std::to_string(q.shape(1)) +
                              ", at least " + std::to_string(q.shape(0)) + "]");
    }
    if (!(static_cast<float>(scale) > 0 && std::isfinite(scale))) {
        throw py::value_error("scale is " + std::to_string(scale) +
                              ", want a positive, finite number of float32");
    }
    check_range("threads", threads, 1, hermes::kMaxThreads);
    const auto* first = read<std::int32_t>(starts, "starts", {q.shape(0)});
    return {q.shape(0), q.shape(1), k.shape(1), q.shape(2), lse.shape(1), first, scale, threads};
}

// Calls call(Element{}), whose type says what the arrays hold.
template <class Call>
void call_with_element(const std::string& dtype, const Call& call) {
    if (dtype == "float32") {
        call(float{});
    } else if (dtype == "float64") {
        call(double{});
    } else if (dtype == "bfloat16") {
        call(hermes::Bfloat16{});
    } else if (dtype == "float16") {
        call(hermes::Float16{});
    } else {
        throw py::value_error("dtype is '" + dtype +
                              "', want float32, float64, bfloat16 or float16");
    }
}

void attend(const py::array& q, const py::array& k, const py::array& v, const py::array& starts,
            py::array& out, py::array& lse, const std::string& dtype, double scale,
            std::int64_t threads) {
    const hermes::AttentionShape shape = shape_of(q, k, lse, starts, scale, threads);
    const Sizes queries{shape.tokens, shape.heads, shape.size};
    const Sizes keys{shape.tokens, shape.key_heads, shape.size};
    call_with_element(dtype, [&](auto zero) {
        using Element = decltype(zero);
        const hermes::AttentionForward<Element> arrays{
            read<Element>(q, "q", queries), read<Element>(k, "k", keys),
            read<Element>(v, "v", keys), write<Element>(out, "out", queries),
            write<hermes::Real<Element>>(lse, "lse", {shape.heads, shape.lse_stride})};
        py::gil_scoped_release release;
        hermes::attend(shape, arrays);
    });
}

void differentiate_attention(const py::array& grad, const py::array& q, const py::array& k,
                             const py::array& v, const py::array& out, const py::array& lse,
                             const py::array& starts, py::array& dq, py::array& dk, py::array& dv,
                             const std::string& dtype, double scale, std::int64_t threads) {
    const hermes::AttentionShape shape = shape_of(q, k, lse, starts, scale, threads);
    const Sizes queries{shape.tokens, shape.heads, shape.size};
    const Sizes keys{shape.tokens, shape.key_heads, shape.size};
    call_with_element(dtype, [&](auto zero) {
        using Element = decltype(zero);
        const hermes::AttentionBackward<Element> arrays{
            read<Element>(grad, "grad", queries),
            read<Element>(q, "q", queries),
            read<Element>(k, "k", keys),
            read<Element>(v, "v", keys),
            read<Element>(out, "out", queries),
            read<hermes::Real<Element>>(lse, "lse", {shape.heads, shape.lse_stride}),
            write<Element>(dq, "dq", queries),
            write<Element>(dk, "dk", keys),
            write<Element>(dv, "dv", keys)};
        py::gil_scoped_release release;
        hermes::differentiate_attention(shape, arrays);
    });
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attend", &attend, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
          "starts"_a.noconvert(), "out"_a.noconvert(), "lse"_a.noconvert(), py::kw_only(),
          "dtype"_a, "scale"_a, "threads"_a,
          "Causal attention inside segments, written to `out`, and its log-sum-exps to `lse`.");
    m.def(
        "differentiate_attention", &differentiate_attention, "grad"_a.noconvert(),
        "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "out"_a.noconvert(),
        "lse"_a.noconvert(), "starts"_a.noconvert(), "dq"_a.noconvert(), "dk"_a.noconvert(),
        "dv"_a.noconvert(), py::kw_only(), "dtype"_a, "scale"_a, "threads"_a,
        "Gradients of q, k and v for a gradient of attention's output, written to the last three.");
}
