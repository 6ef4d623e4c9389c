#include "mapping.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace hermes {

Mapping map_file(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        throw std::system_error(errno, std::generic_category(), path);
    }
    struct stat status{};
    void* data = MAP_FAILED;
    int error = 0;
    if (::fstat(file, &status) != 0) {
        error = errno;
    } else if (status.st_size == 0) {
        error = EINVAL;
    } else {
        data = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_SHARED,
                      file, 0);
        error = errno;
    }
    ::close(file);
    if (data == MAP_FAILED) {
        throw std::system_error(error, std::generic_category(), path);
    }
    return {static_cast<const std::uint8_t*>(data), static_cast<std::int64_t>(status.st_size)};
}

void unmap(const Mapping& mapping) noexcept {
    ::munmap(const_cast<std::uint8_t*>(mapping.data), static_cast<std::size_t>(mapping.size));
}

}  // namespace hermes
