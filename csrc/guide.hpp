// How rows should be made up, by a linear programme over all the rows that there can be.
//
// Its dual gives each sample a worth, a share of a row, such that no row is worth more than one;
// what all samples are worth together is then a lower bound on rows. Worth is kept to functions of
// length that run straight between some lengths, the knots, and never fall. That leaves a programme
// of some hundred rows for any number of samples, and makes the row that is worth most easy to
// find: of two samples between knots one can be longer and the other shorter, without loss, until
// one of them meets a knot. So a best row has at most one sample that is no knot.
#pragma once

#include <cstdint>
#include <vector>

#include "exact_gap.hpp"
#include "packing.hpp"

namespace hermes {

struct Pattern {  // of a row
    std::vector<Part> parts;
    double rows;  // so many should be like it
};

struct Guide {
    std::vector<Pattern> patterns;
    std::vector<std::uint32_t> knots;  // classes, rising, the first and the last among them
    std::vector<double> passed;  // for each knot, the share of its places that shorter samples take
    std::vector<double> worth;   // of a sample of each class
    double bound = 0;            // no plan has fewer rows
    std::int64_t slack = 0;      // tokens that a pattern may leave free, for each of its samples
};

// Without patterns if rows hold more samples than can be counted. `work` is lowered by what it cost
// in elementary steps; the guide is coarser, and no less true, where that was too little.
Guide make_guide(const std::vector<LengthClass>& classes, const Limits& limits, std::int64_t& work);

}  // namespace hermes
