//! Costs of the examples of a step -> the examples of each rank, so that all ranks work for about the same time.
//!
//! The dealing depends on lengths and facts only. So every rank computes the same one, and it does not change from run
//! to run.

use crate::facts::Facts;
use crate::memory::cost::{ATTENTION_SHARE, MATRIX_SHARE};

/// FLOPs of an example, each weighted by the share of the highest rate that it reaches.
#[derive(Clone, Debug)]
pub struct Cost {
    /// The cost of each token, in products.
    token: f64,
    /// The cost of each pair of tokens, in the attention of one layer.
    pair: f64,
    /// The window of each layer.
    windows: Vec<Option<usize>>,
}

impl Cost {
    /// Returns the costs of training a model of these facts.
    pub fn of(facts: &Facts) -> Cost {
        let values = |rows: usize, cols: usize| (rows * cols) as f64;
        let layers = facts.layers.iter().flat_map(|layer| layer.projections());
        let layers: f64 = layers.map(|projection| values(projection.rows, projection.cols)).sum();
        let heads = facts.heads();
        Cost {
            // One product forward and one backward, of two FLOPs each.
            token: 4.0 * (layers + values(facts.vocab, facts.width)) / MATRIX_SHARE,
            // Two products forward, five backward.
            pair: 14.0 * (heads.query * heads.width) as f64 / ATTENTION_SHARE,
            windows: facts.layers.iter().map(|layer| layer.attention.heads.window).collect(),
        }
    }

    /// Returns the cost of an example of so many tokens.
    pub fn of_example(&self, tokens: usize) -> u64 {
        let tokens = tokens as f64;
        let seen =
            |window: &Option<usize>| window.map_or(tokens / 2.0, |window| (tokens / 2.0).min(window as f64));
        let pairs: f64 = self.windows.iter().map(|window| tokens * seen(window)).sum();
        (self.token * tokens + self.pair * pairs) as u64
    }
}

/// Returns the indices of the costs that each rank gets, ascending: the most costly first, each to the rank with the
/// least work so far. Among equals the lower index and the lower rank come first.
pub fn deal(costs: &[u64], world: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(costs[index]));
    let mut ranks = vec![(0u128, Vec::new()); world.max(1)];
    for index in order {
        let least = ranks.iter_mut().min_by_key(|(work, _)| *work).expect("at least one rank");
        least.0 += u128::from(costs[index]);
        least.1.push(index);
    }
    let sorted = |(_, mut list): (u128, Vec<usize>)| {
        list.sort_unstable();
        list
    };
    ranks.into_iter().map(sorted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::shapes;

    #[test]
    fn the_most_costly_are_dealt_first_and_every_one_once() {
        assert_eq!(deal(&[3, 9, 3, 4, 2], 2), [vec![1, 4], vec![0, 2, 3]]);
        assert_eq!(deal(&[5, 5, 5], 4), [vec![0], vec![1], vec![2], vec![]]);
        assert_eq!(deal(&[7, 1, 2], 1), [vec![0, 1, 2]], "one rank has everything in its order");
        assert_eq!(deal(&[], 3), [vec![], vec![], Vec::<usize>::new()]);
        for seed in 0..200 {
            let cost = |index: u64| 1 + crate::ops::dropout::mix(seed * 1000 + index) % 5000;
            let costs: Vec<u64> = (0..seed % 60).map(cost).collect();
            let world = 1 + seed as usize % 7;
            let dealt = deal(&costs, world);
            let mut all = dealt.concat();
            all.sort_unstable();
            assert_eq!(all, (0..costs.len()).collect::<Vec<_>>());
            // Graham's bound: nobody works more than the mean and one example.
            let work = |list: &Vec<usize>| list.iter().map(|&index| costs[index]).sum::<u64>();
            let mean = costs.iter().sum::<u64>() / world as u64;
            let most = dealt.iter().map(work).max().unwrap();
            assert!(most <= mean + costs.iter().max().unwrap_or(&0), "{most} of {mean}");
        }
    }

    #[test]
    fn a_long_example_costs_more_than_its_tokens_and_a_window_less() {
        let plain = Cost::of(&shapes::facts("llama3.1-8b").unwrap());
        let (short, long) = (plain.of_example(1000), plain.of_example(8000));
        assert!(long > 8 * short && long < 16 * short, "{short} and {long}");
        // Products alone are 4 FLOPs a weight, of which the plain model has 7.5 billion.
        let token = plain.of_example(1) as f64 * MATRIX_SHARE;
        assert!((29e9..31e9).contains(&token), "{token}");
        let mut windowed = plain.clone();
        windowed.windows.iter_mut().for_each(|window| *window = Some(100));
        assert!(windowed.of_example(8000) < long);
        assert_eq!(windowed.of_example(100), plain.of_example(100));
    }
}
