// NumPy arrays as the bindings take them: checked, named in errors, never copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "pool.hpp"

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

// A new array, of any contents, in memory that is used again when it dies.
template <class T, std::size_t N>
Array<T> recycled(const std::array<py::ssize_t, N>& shape) {
    constexpr std::size_t small = std::size_t{32} << 10;  // which malloc has warm
    std::size_t size = sizeof(T);
    for (const py::ssize_t extent : shape) {
        size *= static_cast<std::size_t>(extent);
    }
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
