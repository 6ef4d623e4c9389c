// Work shared by a few threads, which live as long as the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace hermes {

// Calls work(i) once for every i below `count`, at once as far as there are threads to be had: what
// has none is done by the caller. `work` throws nothing.
template <class Work>
void in_threads(std::int64_t count, const Work& work) {
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(count));
    std::int64_t i = 1;
    try {
        for (; i < count; ++i) {
            others.emplace_back(work, i);
        }
    } catch (const std::exception&) {  // no thread, or no memory for one
    }
    for (; i < count; ++i) {
        work(i);
    }
    work(0);
    for (std::thread& other : others) {
        other.join();
    }
}

}  // namespace hermes
