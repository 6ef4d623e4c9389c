// Scratch memory for large tables: not cleared, and in huge pages where the system has them.
//
// Sorting five million ids scatters writes over 20 MB. In pages of 4 KiB nearly each write misses
// the TLB, and the first touch of each page costs a fault: huge pages halve the time of a plan.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hermes {

inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
    constexpr std::uintptr_t huge = std::uintptr_t{1} << 21;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + huge - 1) / huge * huge;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / huge * huge;
    if (begin < end) {  // a hint: failure costs speed alone
        ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
}

// For an empty vector, before its memory is touched.
template <class T>
void reserve_in_huge_pages(std::vector<T>& elements, std::size_t count) {
    elements.reserve(count);
    prefer_huge_pages(elements.data(), count * sizeof(T));
}

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
        prefer_huge_pages(data, bytes);
        return static_cast<T*>(data);
    }
    std::unique_ptr<T[], Free> data_;
    std::size_t size_ = 0;
};

}  // namespace hermes
