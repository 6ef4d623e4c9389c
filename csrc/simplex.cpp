#include "simplex.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace hermes {
namespace {

constexpr double kTiny = 1e-9;
constexpr double kSingular = 1e-12;
constexpr double kError = 1e-9;  // of an amount or a dual: then the inverse is made anew
constexpr std::int64_t kPivotsOfCheck = 100;

// row -= factor * other
void subtract(double* row, double factor, const double* other, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) {
        row[i] -= factor * other[i];
    }
}

}  // namespace

Simplex::Simplex(std::vector<double> wanted, const std::vector<double>& diagonal)
    : rows_(wanted.size()),
      wanted_(std::move(wanted)),
      starts_{0},
      inverse_(rows_ * rows_),
      direction_(rows_) {
    for (std::uint32_t r = 0; r < rows_; ++r) {
        add(1, {{r, diagonal[r]}});
        is_basic_[r] = 1;
        basis_.push_back(r);
        inverse_[r * rows_ + r] = 1 / diagonal[r];
        amounts_.push_back(wanted_[r] / diagonal[r]);
        duals_.push_back(1 / diagonal[r]);
    }
}

void Simplex::add(double cost, const std::vector<Entry>& entries) {
    costs_.push_back(cost);
    entries_.insert(entries_.end(), entries.begin(), entries.end());
    starts_.push_back(entries_.size());
    is_basic_.push_back(0);
}

std::int64_t Simplex::improve(std::int64_t work) {
    work_ = 0;
    while (work_ < work) {
        work_ += static_cast<std::int64_t>(entries_.size() + rows_ * rows_ / 4);
        const std::size_t column = best_column();
        if (column == costs_.size() || !pivot(column)) {
            break;
        }
    }
    return work_;
}

std::vector<std::pair<std::size_t, double>> Simplex::solution() const {
    std::vector<std::pair<std::size_t, double>> used;
    for (std::size_t r = 0; r < rows_; ++r) {
        if (amounts_[r] > kTiny) {
            used.emplace_back(basis_[r], amounts_[r]);
        }
    }
    std::sort(used.begin(), used.end());
    return used;
}

// The column that lowers the cost most for each of it, or their number.
std::size_t Simplex::best_column() const {
    std::size_t best = costs_.size();
    double least = -kTiny;
    for (std::size_t column = 0; column < costs_.size(); ++column) {
        const double change = is_basic_[column] != 0 ? 0 : reduced_cost(column);
        if (change < least) {
            least = change;
            best = column;
        }
    }
    return best;
}

double Simplex::reduced_cost(std::size_t column) const {
    double change = costs_[column];
    for (std::size_t e = starts_[column]; e < starts_[column + 1]; ++e) {
        change -= duals_[entries_[e].row] * entries_[e].value;
    }
    return change;
}

// The row whose column is used up first, or their number.
std::size_t Simplex::leaving_row() const {
    std::size_t leaving = rows_;
    double least = 0;
    for (std::size_t r = 0; r < rows_; ++r) {
        if (direction_[r] > kTiny) {
            const double step = std::max(0.0, amounts_[r]) / direction_[r];
            if (leaving == rows_ || step < least ||
                (step == least && direction_[r] > direction_[leaving])) {
                leaving = r;
                least = step;
            }
        }
    }
    return leaving;
}

// Takes the column into the basis; false if that cannot be.
bool Simplex::pivot(std::size_t column) {
    std::fill(direction_.begin(), direction_.end(), 0.0);
    for (std::size_t e = starts_[column]; e < starts_[column + 1]; ++e) {
        for (std::size_t r = 0; r < rows_; ++r) {
            direction_[r] += inverse_[r * rows_ + entries_[e].row] * entries_[e].value;
        }
    }
    const std::size_t leaving = leaving_row();
    if (leaving == rows_) {
        return false;
    }
    const double step = std::max(0.0, amounts_[leaving]) / direction_[leaving];
    const double change = reduced_cost(column);
    double* const row = &inverse_[leaving * rows_];
    for (std::size_t i = 0; i < rows_; ++i) {
        row[i] /= direction_[leaving];
        duals_[i] += change * row[i];
    }
    for (std::size_t r = 0; r < rows_; ++r) {
        if (r != leaving && direction_[r] != 0) {
            subtract(&inverse_[r * rows_], direction_[r], row, rows_);
            amounts_[r] -= direction_[r] * step;
        }
    }
    amounts_[leaving] = step;
    is_basic_[basis_[leaving]] = 0;
    is_basic_[column] = 1;
    basis_[leaving] = column;
    return ++since_checked_ < kPivotsOfCheck || error() < kError || invert();
}

// How far amounts and duals are from what they should give.
double Simplex::error() {
    since_checked_ = 0;
    std::vector<double> missing = wanted_;
    double most = 0;
    for (std::size_t r = 0; r < rows_; ++r) {
        const std::size_t column = basis_[r];
        for (std::size_t e = starts_[column]; e < starts_[column + 1]; ++e) {
            missing[entries_[e].row] -= entries_[e].value * amounts_[r];
        }
        most = std::max(most, std::abs(reduced_cost(column)));
    }
    for (const double value : missing) {
        most = std::max(most, std::abs(value));
    }
    return most;
}

// The inverse of the basis anew, by Gauss and Jordan; false if there is none.
bool Simplex::invert() {
    work_ += static_cast<std::int64_t>(rows_ * rows_ * rows_ / 2);
    std::vector<double> left(rows_ * rows_), right(rows_ * rows_);
    for (std::size_t r = 0; r < rows_; ++r) {
        for (std::size_t e = starts_[basis_[r]]; e < starts_[basis_[r] + 1]; ++e) {
            left[entries_[e].row * rows_ + r] += entries_[e].value;
        }
        right[r * rows_ + r] = 1;
    }
    for (std::size_t k = 0; k < rows_; ++k) {
        std::size_t largest = k;
        for (std::size_t r = k + 1; r < rows_; ++r) {
            if (std::abs(left[r * rows_ + k]) > std::abs(left[largest * rows_ + k])) {
                largest = r;
            }
        }
        const double value = left[largest * rows_ + k];
        if (std::abs(value) < kSingular) {
            return false;
        }
        for (auto* matrix : {&left, &right}) {
            double* const row = &(*matrix)[k * rows_];
            if (largest != k) {
                std::swap_ranges(row, row + rows_, &(*matrix)[largest * rows_]);
            }
            for (std::size_t i = 0; i < rows_; ++i) {
                row[i] /= value;
            }
        }
        for (std::size_t r = 0; r < rows_; ++r) {
            const double factor = left[r * rows_ + k];
            if (r != k && factor != 0) {
                subtract(&left[r * rows_], factor, &left[k * rows_], rows_);
                subtract(&right[r * rows_], factor, &right[k * rows_], rows_);
            }
        }
    }
    inverse_ = std::move(right);
    std::fill(amounts_.begin(), amounts_.end(), 0.0);
    std::fill(duals_.begin(), duals_.end(), 0.0);
    for (std::size_t r = 0; r < rows_; ++r) {
        for (std::size_t i = 0; i < rows_; ++i) {
            amounts_[r] += inverse_[r * rows_ + i] * wanted_[i];
            duals_[i] += costs_[basis_[r]] * inverse_[r * rows_ + i];
        }
    }
    return true;
}

}  // namespace hermes
