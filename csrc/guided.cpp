#include "guided.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

#include "exact_gap.hpp"
#include "guide.hpp"

namespace hermes {
namespace {

constexpr std::int64_t kWork = std::int64_t{1} << 32;  // elementary steps of all: some seconds
constexpr std::int64_t kWorkOfGuide = kWork / 4;       // that one may take to be made
constexpr std::int64_t kWorkOfLook = 8;                // at a class, which is in no cache
constexpr std::int64_t kWorkOfRest = 128;              // for each class that exact gap packs
constexpr int kGuides = 32;                            // one after another, each of what is left
constexpr int kIdle = 3;                               // of them that save no row: the last
constexpr int kTurns = 8;            // in which a guide is followed, a part of each pattern in each
constexpr std::int64_t kShare = 2;   // equal rows take at most one in so many of a class
constexpr std::size_t kLooks = 512;  // at classes, for one sample
constexpr std::int64_t kAlone = 4;   // samples of a part that are chosen one by one
constexpr double kLoss = 1e-3;       // rows may be worth so much less than one
constexpr double kNoLoss = 1e-7;
constexpr std::size_t kNone = ~std::size_t{0};

// Makes rows near the patterns of a guide.
class Maker {
public:
    Maker(const std::vector<LengthClass>& classes, const Limits& limits, const Guide& guide)
        : classes_(classes),
          limits_(limits),
          guide_(guide),
          fitting_(classes, limits.tokens),
          is_exact_(guide.knots.size() == classes.size()),
          owed_(guide.knots.size()) {
        for (const LengthClass& c : classes) {
            left_.push_back(c.count);
        }
    }

    // The parts of a row; none if samples near the pattern's do not make one that is worth it.
    std::vector<Part> make_row(const Pattern& pattern) {
        begin(pattern);
        const std::size_t size = wanted_.size();
        const std::size_t few = is_full_ ? 2 : 1;  // are chosen for what they leave
        bool found = size > 0;
        for (std::size_t i = 0; i + few < size && found; ++i) {
            found = choose(i);
        }
        if (found && (size < 2 || !is_full_ || !choose_two(wanted_[size - 2], wanted_[size - 1]))) {
            found = (size < 2 || !is_full_ || choose(size - 2)) && choose_last(wanted_[size - 1]);
        }
        for (const Part& part : row_) {
            left_[part.of_class] += part.samples;
        }
        if (!found) {
            return {};
        }
        join_parts(row_);
        return row_;
    }

    // Takes samples for `most` rows of these parts or fewer; how many.
    std::int64_t use(const std::vector<Part>& parts, std::int64_t most) {
        for (const Part& part : parts) {
            const std::int64_t rows = left_[part.of_class] / part.samples / kShare;
            most = std::min(most, std::max<std::int64_t>(rows, 1));
        }
        for (const Part& part : parts) {
            left_[part.of_class] -= most * part.samples;
        }
        for (const Place& place : places_) {
            const double owed = guide_.passed[place.knot] - (place.is_passed ? 1 : 0);
            owed_[place.knot] += owed * static_cast<double>(place.samples * most);
        }
        return most;
    }

    std::int64_t left(std::size_t c) const {
        return left_[c];
    }

    std::int64_t looks() const {  // at classes, so far
        return looks_;
    }

private:
    struct Place {  // of a row
        std::size_t knot;
        std::int64_t samples;
        bool is_passed;  // to the next knot
    };
    struct Range {  // of classes; of very many, some
        std::size_t begin, end, start, step;
    };

    void begin(const Pattern& pattern) {
        wanted_.clear();
        places_.clear();
        row_.clear();
        gap_ = limits_.tokens;
        ahead_ = 0;
        worth_ = 0;
        ++rows_;
        for (const Part& part : pattern.parts) {
            std::int64_t some = part.samples;
            for (; some > kAlone; some -= some / 2) {
                want(part.of_class, some / 2);
            }
            for (; some > 0; --some) {
                want(part.of_class, 1);
            }
        }
        std::stable_sort(wanted_.begin(), wanted_.end(),
                         [](const Part& a, const Part& b) { return a.of_class < b.of_class; });
        std::int64_t hole = limits_.tokens, samples = 0;
        for (const Part& part : wanted_) {
            hole -= part.samples * classes_[part.of_class].length;
            samples += part.samples;
        }
        is_full_ = hole <= samples * guide_.slack;
        look_ahead(hole);
    }

    // Wants samples of a class or, where the guide has shorter ones in their place, of a knot
    // below.
    void want(std::uint32_t c, std::int64_t samples) {
        const auto& knots = guide_.knots;
        const auto above = std::upper_bound(knots.begin(), knots.end(), c) - 1;
        for (auto k = static_cast<std::size_t>(above - knots.begin()); k < knots.size(); ++k) {
            const bool is_passed = !is_exact_ && owed_[k] > 0.5;
            places_.push_back({k, samples, is_passed});
            if (!is_passed) {
                wanted_.push_back({std::max(c, knots[k]), samples});
                return;
            }
        }
    }

    // How far the samples behind each can make up for those before.
    void look_ahead(std::int64_t hole) {
        const std::size_t size = wanted_.size();
        shorter_.assign(size, hole);
        longer_.assign(size, is_full_ ? 0 : limits_.tokens);
        for (std::size_t i = size; i-- > 1;) {
            const Part& part = wanted_[i];
            const Range range = near(part.of_class);
            const std::int64_t length = classes_[part.of_class].length;
            shorter_[i - 1] =
                shorter_[i] + part.samples * (length - classes_[range.end - 1].length);
            longer_[i - 1] = longer_[i] + part.samples * (classes_[range.begin].length - length);
        }
    }

    // The classes from the knot before to the knot behind, or between two knots.
    Range near(std::size_t c) const {
        std::size_t begin = c, end = c + 1;
        if (!is_exact_) {
            const auto& knots = guide_.knots;
            const auto at = std::lower_bound(knots.begin(), knots.end(), c);
            begin = at == knots.begin() ? c : *(at - 1);
            end = (*at == c && at + 1 != knots.end() ? *(at + 1) : *at) + std::size_t{1};
        }
        const std::size_t step = (end - begin - 1) / kLooks + 1;
        return {begin, end, begin + rows_ % step, step};
    }

    // Through the range; where every class has its patterns, on to shorter ones until one is found.
    bool goes_on(std::size_t c, const Range& range, std::size_t found) {
        ++looks_;
        return c < range.end || (is_exact_ && c < classes_.size() && found == kNone);
    }

    double share_left(std::size_t c) const {
        return static_cast<double>(left_[c]) / static_cast<double>(classes_[c].count);
    }

    double loss_with(double worth) const {
        return std::max(0.0, 1 - worth_ - worth);
    }

    void take(std::size_t c, std::int64_t samples) {
        left_[c] -= samples;
        gap_ -= samples * classes_[c].length;
        worth_ += static_cast<double>(samples) * guide_.worth[c];
        row_.push_back({static_cast<std::uint32_t>(c), samples});
    }

    // Takes wanted samples: in a full row of any class near, else of one that is worth as much.
    bool choose(std::size_t i) {
        const Part& wanted = wanted_[i];
        const std::int64_t length = classes_[wanted.of_class].length;
        const double enough = guide_.worth[wanted.of_class] - kLoss;
        const Range range = near(wanted.of_class);
        std::size_t best = kNone;
        double most = 0;
        for (std::size_t c = range.start; goes_on(c, range, best); c += range.step) {
            const std::int64_t ahead = ahead_ + wanted.samples * (classes_[c].length - length);
            const bool is_near = is_full_ && c < range.end && -2 * ahead <= longer_[i];
            if (left_[c] >= wanted.samples && share_left(c) > most && 2 * ahead <= shorter_[i] &&
                wanted.samples * classes_[c].length <= gap_ &&
                (is_near || guide_.worth[c] >= enough)) {
                most = share_left(c);
                best = c;
            }
        }
        if (best == kNone) {
            return false;
        }
        ahead_ += wanted.samples * (classes_[best].length - length);
        take(best, wanted.samples);
        return true;
    }

    // Takes one of which much is left and by which little is lost.
    bool choose_last(const Part& wanted) {
        const Range range = near(wanted.of_class);
        std::size_t best = kNone;
        double most = -1;
        for (std::size_t c = range.start; goes_on(c, range, best); c += range.step) {
            const double loss = loss_with(guide_.worth[c]);
            const double score = share_left(c) - loss / kLoss;
            if (left_[c] > 0 && classes_[c].length <= gap_ && loss < kLoss && score > most) {
                most = score;
                best = c;
            }
        }
        if (best == kNone) {
            return false;
        }
        take(best, 1);
        return true;
    }

    // Takes two that fill the row to its last token; if there are none, those that lose least.
    bool choose_two(const Part& first, const Part& second) {
        const Range range = near(first.of_class), other = near(second.of_class);
        std::size_t best_a = kNone, best_b = kNone;
        double most = 0;
        for (std::size_t a = range.start; a < range.end; a += range.step) {
            ++looks_;
            const std::int64_t rest = gap_ - classes_[a].length;
            if (rest <= 0 || left_[a] == 0 || 1 + share_left(a) <= most) {
                continue;
            }
            const std::size_t b = std::max<std::size_t>(fitting_(rest), other.begin);
            if (b >= other.end || left_[b] <= (a == b ? 1 : 0)) {
                continue;
            }
            const double loss = loss_with(guide_.worth[a] + guide_.worth[b]);
            const double score = classes_[b].length == rest || loss < kNoLoss
                                     ? 1 + std::min(share_left(a), share_left(b))
                                     : 1 - loss / kLoss;
            if (loss < kLoss && score > most) {
                most = score;
                best_a = a;
                best_b = b;
            }
        }
        if (best_a == kNone) {
            return false;
        }
        take(best_a, 1);
        take(best_b, 1);
        return true;
    }

    const std::vector<LengthClass>& classes_;
    Limits limits_;
    const Guide& guide_;
    FirstFitting fitting_;
    bool is_exact_;  // every class is a knot, and is wanted by itself
    std::vector<std::int64_t> left_;
    std::vector<double> owed_;        // of each knot, places that are still to be passed
    std::vector<Part> wanted_, row_;  // what the row should hold; what it does
    std::vector<Place> places_;
    std::vector<std::int64_t> shorter_, longer_;  // tokens that those behind can be
    bool is_full_ = false;
    std::int64_t gap_ = 0, ahead_ = 0, looks_ = 0;  // ahead: tokens more than wanted
    std::size_t rows_ = 0;
    double worth_ = 0;
};

// Classes of which samples are left, and which they are among all.
struct Rest {
    std::vector<LengthClass> classes;
    std::vector<std::uint32_t> of_class;
};

// Makes rows by a guide, its patterns side by side; what is left.
Rest follow(const Guide& guide, const Rest& rest, const Limits& limits, std::int64_t& work,
            RowList& made) {
    Maker maker(rest.classes, limits, guide);
    std::vector<std::int64_t> rows(guide.patterns.size());
    for (int turn = 1; turn <= kTurns; ++turn) {
        for (std::size_t p = 0; p < rows.size(); ++p) {
            const Pattern& pattern = guide.patterns[p];
            const double part = pattern.rows * turn / kTurns + (turn == kTurns ? 0.5 : 0);
            while (rows[p] < static_cast<std::int64_t>(part) &&
                   maker.looks() < work / kWorkOfLook) {
                const std::vector<Part> parts = maker.make_row(pattern);
                if (parts.empty()) {
                    break;
                }
                const std::int64_t some =
                    maker.use(parts, static_cast<std::int64_t>(part) - rows[p]);
                made.add(parts, some, rest.of_class);
                rows[p] += some;
            }
        }
    }
    work -= maker.looks() * kWorkOfLook;
    Rest after;
    for (std::size_t c = 0; c < rest.classes.size(); ++c) {
        if (maker.left(c) > 0) {
            after.classes.push_back({rest.classes[c].length, maker.left(c)});
            after.of_class.push_back(rest.of_class[c]);
        }
    }
    return after;
}

}  // namespace

Guided plan_guided(const std::vector<LengthClass>& classes, const Limits& limits) {
    Rest rest{classes, std::vector<std::uint32_t>(classes.size())};
    std::iota(rest.of_class.begin(), rest.of_class.end(), 0U);
    RowList made, best;
    std::int64_t work = kWork, bound = 0;
    for (int guides = 0, idle = 0; guides < kGuides && idle < kIdle && work > 0; ++guides) {
        const std::int64_t before = made.rows();
        if (!rest.classes.empty()) {
            const std::int64_t most = std::min(work, kWorkOfGuide);
            std::int64_t unused = most;
            const Guide guide = make_guide(rest.classes, limits, unused);
            work -= most - unused;
            if (guides == 0) {  // a sum of doubles, exact to far more than nine digits
                bound = static_cast<std::int64_t>(std::ceil(guide.bound * (1 - 1e-9)));
            }
            rest = follow(guide, rest, limits, work, made);
        }
        RowList whole = made;
        add_by_exact_gap(rest.classes, rest.of_class, limits, whole);
        work -= kWorkOfRest * static_cast<std::int64_t>(rest.classes.size());
        ++idle;
        if (guides == 0 || whole.rows() < best.rows()) {
            best = std::move(whole);
            idle = 0;
        }
        if (made.rows() == before || best.rows() <= bound) {
            break;
        }
    }
    return {best.plan(classes.size()), bound};
}

}  // namespace hermes
