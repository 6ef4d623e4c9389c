// A linear programme of some hundred rows whose columns arrive one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace hermes {

struct Entry {  // of a column
    std::uint32_t row;
    double value;
};

// Least cost of x >= 0 with A x = wanted, by the primal simplex method with a dense inverse.
// Deterministic: no clock, no chance, and of equals the first.
class Simplex {
public:
    // Starts from one column of cost 1 for each row, which it alone fills by `diagonal`.
    Simplex(std::vector<double> wanted, const std::vector<double>& diagonal);

    // Columns are numbered as they come, the start's first.
    void add(double cost, const std::vector<Entry>& entries);

    // Pivots until no column helps or `work` elementary steps are done; how many were.
    std::int64_t improve(std::int64_t work);

    // What one more of each row would cost.
    const std::vector<double>& duals() const {
        return duals_;
    }

    // The columns in use, rising, and how much of each.
    std::vector<std::pair<std::size_t, double>> solution() const;

private:
    std::size_t best_column() const;
    double reduced_cost(std::size_t column) const;
    std::size_t leaving_row() const;
    bool pivot(std::size_t column);
    double error();
    bool invert();

    std::size_t rows_;
    std::vector<double> wanted_;
    std::vector<double> costs_;
    std::vector<std::size_t> starts_;  // of each column in entries_, then the end
    std::vector<Entry> entries_;
    std::vector<std::size_t> basis_;  // the column of each row
    std::vector<char> is_basic_;
    std::vector<double> inverse_;    // [rows, rows] of the basis
    std::vector<double> direction_;  // a column in terms of the basis
    std::vector<double> amounts_, duals_;
    std::int64_t since_checked_ = 0, work_ = 0;
};

}  // namespace hermes
