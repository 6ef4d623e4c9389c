// Python's door to rows of logits: PyTorch's memory, bfloat16 and float16 as uint16.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>

#include "arrays.hpp"
#include "loss.hpp"
#include "rows.hpp"

namespace {

using Floats = std::optional<py::array>;

template <class Element>
using Stored = std::conditional_t<sizeof(Element) == 2, std::uint16_t, Element>;

[[noreturn]] void refuse(const char* name, const py::handle& array, const std::string& wanted) {
    throw py::value_error(std::string(name) + " is " + described(array) + ", want " + wanted);
}

// One value of type T for each row.
template <class T>
T* of_rows(const py::array& array, const char* name, std::int64_t rows) {
    if (!Array<T>::check_(array) || array.ndim() != 1 || array.shape(0) != rows ||
        !array.writeable()) {
        refuse(name, array,
               "a contiguous array of " + std::string(py::str(py::dtype::of<T>())) + " [" +
                   std::to_string(rows) + "] that can be written");
    }
    return static_cast<T*>(const_cast<void*>(array.data()));
}

// Calls call(logits, vector), where vector(array, name) is one number for each row.
template <class Call>
void with_logits(const py::array& logits, const py::array& column, const std::string& dtype,
                 std::int64_t threads, const Call& call) {
    check_range("threads", threads, 1, hermes::kMaxThreads);
    const auto call_as = [&](auto zero) {
        using Element = decltype(zero);
        const std::int64_t bytes = sizeof(Element);
        const bool fits = py::isinstance<py::array_t<Stored<Element>>>(logits) &&
                          logits.ndim() == 2 && logits.writeable() && logits.shape(1) > 0 &&
                          logits.strides(1) == bytes && logits.strides(0) % bytes == 0 &&
                          (logits.shape(0) < 2 || logits.strides(0) >= logits.shape(1) * bytes) &&
                          reinterpret_cast<std::uintptr_t>(logits.data()) % alignof(Element) == 0;
        if (!fits) {
            refuse("logits", logits,
                   "rows of " + std::string(py::str(py::dtype::of<Stored<Element>>())) +
                       " side by side, not empty, that can be written");
        }
        const std::int64_t rows = logits.shape(0);
        const hermes::Logits<Element> all{static_cast<Element*>(const_cast<void*>(logits.data())),
                                          rows,
                                          logits.shape(1),
                                          logits.strides(0) / bytes,
                                          of_rows<std::int64_t>(column, "column", rows),
                                          threads};
        call(all, [&](const py::array& array, const char* name) {
            return of_rows<float>(array, name, rows);
        });
    };
    if (dtype == "float32") {
        call_as(float{});
    } else if (dtype == "bfloat16") {
        call_as(hermes::Bfloat16{});
    } else if (dtype == "float16") {
        call_as(hermes::Float16{});
    } else {
        throw py::value_error("dtype is '" + dtype + "', want float32, bfloat16 or float16");
    }
}

void find_statistics(const py::array& logits, const py::array& column, const py::array& lse,
                     const py::array& target, const py::array& expected, const std::string& dtype,
                     std::int64_t threads) {
    with_logits(logits, column, dtype, threads, [&](const auto& all, const auto& vector) {
        float *const l = vector(lse, "lse"), *const t = vector(target, "target"),
                     *const e = vector(expected, "expected");
        py::gil_scoped_release release;
        hermes::find_statistics(all, l, t, e);
    });
}

void differentiate_loss(const py::array& logits, const py::array& column, const py::array& weight,
                        const py::array& lse, const py::array& target, double z_loss,
                        const std::string& dtype, std::int64_t threads) {
    with_logits(logits, column, dtype, threads, [&](const auto& all, const auto& vector) {
        float *const w = vector(weight, "weight"), *const l = vector(lse, "lse"),
                     *const t = vector(target, "target");
        py::gil_scoped_release release;
        hermes::differentiate_loss(all, w, static_cast<float>(z_loss), l, t);
    });
}

void differentiate_rows(const py::array& logits, const py::array& column, const py::array& lse,
                        const py::array& scale, const Floats& tilt, const py::array& weight,
                        const std::string& dtype, std::int64_t threads) {
    with_logits(logits, column, dtype, threads, [&](const auto& all, const auto& vector) {
        float *const l = vector(lse, "lse"), *const s = vector(scale, "scale"),
                     *const w = vector(weight, "weight");
        float* const t = tilt ? vector(*tilt, "tilt") : nullptr;
        py::gil_scoped_release release;
        hermes::differentiate_rows(all, l, s, t, w);
    });
}

}  // namespace

void bind_loss(py::module_& m) {
    m.def("find_statistics", &find_statistics, "logits"_a.noconvert(), "column"_a.noconvert(),
          "lse"_a.noconvert(), "target"_a.noconvert(), "expected"_a.noconvert(), py::kw_only(),
          "dtype"_a, "threads"_a,
          "Log-sum-exp, target logit and expected logit of each row, written to the last three.");
    m.def("differentiate_loss", &differentiate_loss, "logits"_a.noconvert(), "column"_a.noconvert(),
          "weight"_a.noconvert(), "lse"_a.noconvert(), "target"_a.noconvert(), py::kw_only(),
          "z_loss"_a, "dtype"_a, "threads"_a,
          "Overwrite logits by the loss's gradient; writes log-sum-exp and target logit.");
    m.def("differentiate_rows", &differentiate_rows, "logits"_a.noconvert(), "column"_a.noconvert(),
          "lse"_a.noconvert(), "scale"_a.noconvert(), "tilt"_a.noconvert(), "weight"_a.noconvert(),
          py::kw_only(), "dtype"_a, "threads"_a,
          "Overwrite logits by p * (scale + tilt * log p) - weight * [target].");
}
