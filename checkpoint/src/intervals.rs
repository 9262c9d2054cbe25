//! A set of addresses, kept as ranges.

use std::collections::BTreeMap;

/// Disjoint ranges `start..end` that do not touch.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    pub(crate) fn insert(&mut self, (mut start, mut end): (u64, u64)) {
        if start >= end {
            return;
        }
        // Swallow what overlaps or touches.
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.0.remove(&s);
        }
        self.0.insert(start, end);
    }

    pub(crate) fn remove(&mut self, (start, end): (u64, u64)) {
        while let Some((&s, &e)) = self.0.range(..end).next_back() {
            if e <= start {
                break;
            }
            self.0.remove(&s);
            if s < start {
                self.0.insert(s, start);
            }
            if end < e {
                self.0.insert(end, e);
            }
            if s < start {
                break;
            }
        }
    }

    /// Whether any address of the range is in the set.
    pub(crate) fn touches(&self, (start, end): (u64, u64)) -> bool {
        self.0.range(..end).next_back().is_some_and(|(_, &e)| start < e)
    }

    /// The parts of the set inside a range.
    pub(crate) fn within(&self, (start, end): (u64, u64)) -> Vec<(u64, u64)> {
        let first = self.0.range(..=start).next_back().map_or(start, |(&s, _)| s);
        self.0
            .range(first..end)
            .map(|(&s, &e)| (s.max(start), e.min(end)))
            .filter(|(s, e)| s < e)
            .collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(&s, &e)| (s, e))
    }
}

impl Extend<(u64, u64)> for Intervals {
    fn extend<I: IntoIterator<Item = (u64, u64)>>(&mut self, ranges: I) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(
            steps in proptest::collection::vec((any::<bool>(), 0_u64..60, 0_u64..60), 0..40),
            probe in (0_u64..60, 0_u64..60),
        ) {
            let (mut set, mut model) = (Intervals::default(), BTreeSet::new());
            for (insert, start, end) in steps {
                if insert {
                    set.insert((start, end));
                    model.extend(start..end);
                } else if start < end {
                    set.remove((start, end));
                    model.retain(|n| !(start..end).contains(n));
                }
            }
            let numbers: BTreeSet<u64> = set.iter().flat_map(|(s, e)| s..e).collect();
            prop_assert_eq!(&numbers, &model);
            let ranges: Vec<_> = set.iter().collect();
            prop_assert!(ranges.windows(2).all(|w| w[0].1 < w[1].0));
            if probe.0 < probe.1 {
                let inside: BTreeSet<u64> =
                    set.within(probe).into_iter().flat_map(|(s, e)| s..e).collect();
                let expected: BTreeSet<u64> =
                    model.iter().copied().filter(|n| (probe.0..probe.1).contains(n)).collect();
                prop_assert_eq!(set.touches(probe), !expected.is_empty());
                prop_assert_eq!(inside, expected);
            }
        }
    }
}
