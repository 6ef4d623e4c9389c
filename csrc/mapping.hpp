// Read-only memory maps of whole files that hold no file descriptor.
//
// Python's mmap keeps a descriptor for each map, so a store of a few thousand shards would run
// into the usual limit of 1,024 open files.
#pragma once

#include <cstdint>
#include <string>

namespace hermes {

struct Mapping {
    const std::uint8_t* data;
    std::int64_t size;
};

Mapping map_file(const std::string& path);  // std::system_error with errno when it cannot
void unmap(const Mapping& mapping) noexcept;

}  // namespace hermes
