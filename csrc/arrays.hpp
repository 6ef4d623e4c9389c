// What the bindings take, NumPy arrays above all: checked, named in errors, never copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

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

inline void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) {
        throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", outside [" +
                              std::to_string(low) + ", " + std::to_string(high) + "]");
    }
}

inline void check_size(const char* name, std::int64_t size, std::int64_t wanted) {
    if (size != wanted) {
        throw py::value_error(std::string(name) + " has " + std::to_string(size) +
                              " elements, want " + std::to_string(wanted));
    }
}

// What was given in place of a wanted array, in words.
inline std::string described(const py::handle& object) {
    if (!py::isinstance<py::array>(object)) {
        return py::str(py::type::handle_of(object).attr("__name__"));
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    const int flags = array.flags();
    return std::string(py::str(array.dtype())) + " " +
           std::string(py::str(py::list(array.attr("shape")))) +
           (array.writeable() ? "" : ", read-only") +
           ((flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 ? "" : ", unaligned") +
           ((flags & py::array::c_style) != 0 ? "" : ", not contiguous");
}

struct Int64s {
    const std::int64_t* data;
    std::int64_t size;
};

// As data_of, for what every call of a loop passes: an array_t in a signature has NumPy convert an
// array to itself.
inline Int64s int64_of(const py::handle& object, const char* name) {
    if (!Int64Array::check_(object)) {
        throw py::type_error(std::string(name) + " is " + described(object) +
                             ", want a contiguous array of int64");
    }
    const auto array = py::reinterpret_borrow<Int64Array>(object);
    return {data_of(array, 1, name), array.size()};
}

// An integer, or what stands for one.
inline std::int64_t integer_of(const char* name, const py::object& value, std::int64_t low,
                               std::int64_t high) {
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) {
            throw py::error_already_set();
        }
        PyErr_Clear();
        throw py::type_error(std::string(name) + " is " + std::string(py::repr(value)) +
                             ", want an integer");
    }
    int overflow = 0;
    const std::int64_t integer = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0 || integer < low || integer > high) {
        throw py::value_error(std::string(name) + " is " + std::string(py::str(number)) +
                              ", outside [" + std::to_string(low) + ", " + std::to_string(high) +
                              "]");
    }
    return integer;
}

// The numbers of a range, each inside [0, count).
inline std::vector<std::int64_t> numbers_of(const char* name, const py::handle& range,
                                            std::int64_t count) {
    if (!PyRange_Check(range.ptr())) {
        throw py::type_error(std::string(name) + " is " + described(range) + ", want a range");
    }
    const auto item = [&](py::ssize_t i) {
        return py::reinterpret_steal<py::object>(PySequence_GetItem(range.ptr(), i));
    };
    const auto number = [&](py::ssize_t i) {  // -1: outside
        int overflow = 0;
        const std::int64_t n = PyLong_AsLongLongAndOverflow(item(i).ptr(), &overflow);
        return overflow == 0 && n >= 0 && n < count ? n : -1;
    };
    py::ssize_t size = PyObject_Size(range.ptr());
    if (size < 0) {  // more than can be counted, or listed
        PyErr_Clear();
        size = PY_SSIZE_T_MAX;
    }
    if (size == 0) {
        return {};
    }
    const std::int64_t first = number(0), last = number(size - 1);
    if (first < 0 || last < 0) {
        py::ssize_t inside = -1, outside = first < 0 ? 0 : size - 1;
        while (outside - inside > 1) {
            const py::ssize_t middle = inside + (outside - inside) / 2;
            (number(middle) < 0 ? outside : inside) = middle;
        }
        throw py::value_error(std::string(name) + "[" + std::to_string(outside) + "] is " +
                              std::string(py::str(item(outside))) + ", outside [0, " +
                              std::to_string(count) + ")");
    }
    std::vector<std::int64_t> numbers(static_cast<std::size_t>(size), first);
    const std::int64_t step = size == 1 ? 0 : (last - first) / (size - 1);
    for (std::size_t i = 1; i < numbers.size(); ++i) {
        numbers[i] = numbers[i - 1] + step;
    }
    return numbers;
}
