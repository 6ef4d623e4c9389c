// Scratch memory for large tables: not cleared, and in huge pages where the system has them.
//
// Sorting five million ids scatters writes over 20 MB. In pages of 4 KiB nearly each write misses
// the TLB, and the first touch of each page costs a fault: huge pages halve the time of a plan.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hermes {

template <class T>
class Buffer {
    static_assert(std::is_trivial_v<T>, "elements start uninitialised");

public:
    Buffer() = default;
    explicit Buffer(std::size_t size) : data_(allocate(size)), size_(size) {}
    std::size_t size() const {
        return size_;
    }
    T* data() {
        return data_.get();
    }
    const T* data() const {
        return data_.get();
    }
    T& operator[](std::size_t i) {
        return data_[i];
    }
    const T& operator[](std::size_t i) const {
        return data_[i];
    }
    T* begin() {
        return data();
    }
    T* end() {
        return data() + size_;
    }

private:
    struct Free {
        void operator()(T* data) const {
            std::free(data);
        }
    };
    static T* allocate(std::size_t size) {
        constexpr std::size_t huge = std::size_t{1} << 21;
        std::size_t bytes = size * sizeof(T);
        const std::size_t alignment = bytes < huge ? 64 : huge;
        bytes = (bytes / alignment + 1) * alignment;
        void* data = std::aligned_alloc(alignment, bytes);
        if (data == nullptr) {
            throw std::bad_alloc();
        }
#ifdef __linux__
        if (alignment == huge) {
            ::madvise(data, bytes, MADV_HUGEPAGE);  // a hint: failure costs speed alone
        }
#endif
        return static_cast<T*>(data);
    }
    std::unique_ptr<T[], Free> data_;
    std::size_t size_ = 0;
};

}  // namespace hermes
