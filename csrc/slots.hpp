// Numbers for lengths, the longest first: what a search asks of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packing.hpp"

namespace hermes {

// One for each length that occurs.
class ClassSlots {
public:
    ClassSlots(const std::vector<LengthClass>& classes, std::int64_t row_length)
        : classes_(&classes), fitting_(classes, row_length) {}
    std::size_t size() const {
        return classes_->size();
    }
    std::int64_t length(std::size_t slot) const {
        return (*classes_)[slot].length;
    }
    // The first whose length is no more than `room`, or the number of slots.
    std::size_t fitting(std::int64_t room) const {
        return fitting_(room);
    }
    // The one of this length, or the number of slots.
    std::size_t find(std::int64_t length) const {
        const std::size_t slot = fitting_(length);
        return slot < size() && this->length(slot) == length ? slot : size();
    }

private:
    const std::vector<LengthClass>* classes_;
    FirstFitting fitting_;
};

// One for each length that is possible.
class LengthSlots {
public:
    explicit LengthSlots(std::int64_t longest) : longest_(longest) {}
    std::size_t size() const {
        return static_cast<std::size_t>(longest_);
    }
    std::int64_t length(std::size_t slot) const {
        return longest_ - static_cast<std::int64_t>(slot);
    }
    std::size_t fitting(std::int64_t room) const {
        return room < longest_ ? static_cast<std::size_t>(longest_ - room) : 0;
    }
    std::size_t find(std::int64_t length) const {
        return length <= longest_ ? static_cast<std::size_t>(longest_ - length) : size();
    }

private:
    std::int64_t longest_;
};

}  // namespace hermes
