//! The state of a cache's pages: free, held by a sequence, or the beginning of a prompt that others may share.
//!
//! A beginning is shared in chunks of `chunk_pages` pages, since rows of whole chunks have the same bits in every
//! sequence. A chunk that nobody uses stays until its pages are needed; the one that was used longest ago goes first.

use std::collections::HashMap;

/// Names the content of a chunk and of everything before it.
pub type Key = [u8; 32];

/// The pages of a cache by number.
pub struct Pool {
    free: Vec<u32>,
    pages: usize,
    chunk_pages: usize,
    chunks: HashMap<Key, Chunk>,
    /// Counts uses: the time of `Chunk::last`.
    clock: u64,
}

struct Chunk {
    pages: Vec<u32>,
    users: usize,
    last: u64,
}

/// The pages and tokens of a sequence.
#[derive(Debug, Default, PartialEq)]
pub struct Held {
    /// The pages in the order of positions.
    pub pages: Vec<u32>,
    /// Chunks at the beginning that belong to the pool; `None`: the chunk's pages are the sequence's own.
    shared: Vec<Option<Key>>,
    /// Chunks that were there already.
    pub found: usize,
}

impl Pool {
    /// Returns a pool whose pages are all free.
    pub fn new(pages: usize, chunk_pages: usize) -> Pool {
        let free = (0..pages as u32).rev().collect();
        Pool { free, pages, chunk_pages: chunk_pages.max(1), chunks: HashMap::new(), clock: 0 }
    }

    /// Reserves `pages` pages, the first of them chunks of these keys as far as they are known. `None`: too few are
    /// free.
    pub fn reserve(&mut self, pages: usize, keys: &[Key]) -> Option<Held> {
        let most = keys.len().min(pages / self.chunk_pages);
        let found = keys[..most].iter().take_while(|key| self.chunks.contains_key(*key)).count();
        let own = pages - found * self.chunk_pages;
        let idle = |chunk: &Chunk| chunk.users == 0;
        let taken = keys[..found].iter().filter(|key| idle(&self.chunks[*key])).count();
        let unused = self.chunks.values().filter(|chunk| idle(chunk)).count() - taken;
        if own > self.free.len() + unused * self.chunk_pages {
            return None;
        }
        let mut held = Held { found, ..Held::default() };
        for key in &keys[..found] {
            self.clock += 1;
            let chunk = self.chunks.get_mut(key).expect("it was found");
            (chunk.users, chunk.last) = (chunk.users + 1, self.clock);
            held.pages.extend(&chunk.pages);
            held.shared.push(Some(*key));
        }
        while self.free.len() < own {
            self.evict();
        }
        held.pages.extend(self.free.split_off(self.free.len() - own));
        Some(held)
    }

    /// Frees the pages of the unused chunk that was used longest ago.
    fn evict(&mut self) {
        let oldest =
            self.chunks.iter().filter(|(_, chunk)| chunk.users == 0).min_by_key(|(_, chunk)| chunk.last);
        let key = *oldest.expect("an unused chunk was counted").0;
        let chunk = self.chunks.remove(&key).expect("it was found");
        self.free.extend(chunk.pages);
    }

    /// Marks the next chunk of the sequence as computed, so that others may use it from now on.
    pub fn share(&mut self, held: &mut Held, key: Key) {
        let from = held.shared.len() * self.chunk_pages;
        self.clock += 1;
        if self.chunks.contains_key(&key) {
            held.shared.push(None); // Another sequence computed it meanwhile.
            return;
        }
        let pages = held.pages[from..from + self.chunk_pages].to_vec();
        self.chunks.insert(key, Chunk { pages, users: 1, last: self.clock });
        held.shared.push(Some(key));
    }

    /// Gives a sequence's own pages back, and leaves its shared chunks to others.
    pub fn release(&mut self, held: Held) {
        for (at, key) in held.shared.iter().enumerate() {
            match key.as_ref().and_then(|key| self.chunks.get_mut(key)) {
                Some(chunk) => chunk.users -= 1,
                None => self.free.extend(&held.pages[at * self.chunk_pages..(at + 1) * self.chunk_pages]),
            }
        }
        self.free.extend(&held.pages[held.shared.len() * self.chunk_pages..]);
    }

    /// Returns the number of all pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Returns the pages that sequences use, from 0 to 1.
    pub fn usage(&self) -> f64 {
        let unused = self.chunks.values().filter(|chunk| chunk.users == 0).count() * self.chunk_pages;
        1.0 - (self.free.len() + unused) as f64 / self.pages.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> Key {
        [number; 32]
    }

    #[test]
    fn a_beginning_is_shared_while_it_is_used_and_kept_until_its_pages_are_needed() {
        let mut pool = Pool::new(10, 2);
        let mut first = pool.reserve(5, &[key(1), key(2)]).unwrap();
        assert_eq!((first.pages.len(), first.found), (5, 0));
        pool.share(&mut first, key(1));
        // Only what is computed is found.
        let second = pool.reserve(5, &[key(1), key(2)]).unwrap();
        assert_eq!((&second.pages[..2], second.found), (&first.pages[..2], 1));
        assert!(second.pages[2..].iter().all(|page| !first.pages.contains(page)));
        assert!(pool.reserve(3, &[]).is_none(), "two pages are left");
        pool.release(first);
        pool.release(second);
        assert_eq!(pool.usage(), 0.0);
        let third = pool.reserve(4, &[key(1)]).unwrap();
        assert_eq!(third.found, 1);
        pool.release(third);
        // All pages at once: the chunk goes.
        let all = pool.reserve(10, &[]).unwrap();
        let mut pages = all.pages.clone();
        pages.sort();
        assert_eq!(pages, (0..10).collect::<Vec<_>>());
        pool.release(all);
        assert_eq!(pool.reserve(4, &[key(1)]).unwrap().found, 0);
    }

    #[test]
    fn a_chunk_that_two_computed_is_kept_once_and_no_page_is_lost() {
        let mut pool = Pool::new(8, 2);
        let mut one = pool.reserve(4, &[key(1)]).unwrap();
        let mut two = pool.reserve(4, &[key(1)]).unwrap();
        pool.share(&mut one, key(1));
        pool.share(&mut two, key(1));
        assert_eq!(pool.usage(), 1.0);
        pool.release(two);
        assert_eq!(pool.usage(), 0.5);
        let three = pool.reserve(4, &[key(1)]).unwrap();
        assert_eq!(three.pages[..2], one.pages[..2]);
        pool.release(one);
        pool.release(three);
        assert_eq!(pool.reserve(8, &[]).unwrap().pages.len(), 8);
    }

    /// The least recently used chunk is dropped first; chunks in use stay.
    #[test]
    fn the_oldest_unused_chunk_is_dropped_first() {
        let mut pool = Pool::new(6, 1);
        for number in 1..=3 {
            let mut held = pool.reserve(1, &[key(number)]).unwrap();
            pool.share(&mut held, key(number));
            pool.release(held);
        }
        let used = pool.reserve(1, &[key(1)]).unwrap();
        let _more = pool.reserve(4, &[]).unwrap();
        let found = |pool: &mut Pool, number| {
            let held = pool.reserve(1, &[key(number)]);
            held.map(|held| {
                let found = held.found;
                pool.release(held);
                found
            })
        };
        assert_eq!(found(&mut pool, 3), Some(1));
        assert_eq!(found(&mut pool, 1), Some(1));
        pool.release(used);
    }
}
