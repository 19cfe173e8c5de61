//! How many neighbours come along with a page that somebody waits for.

/// The most that come along.
const MOST: usize = 64;

/// Pre-paging: the window doubles when a neighbour that came along was wanted, and halves when none was until the next page
/// is waited for.
#[derive(Clone, Debug)]
pub struct Window {
    pages: usize,
    hits: u32,
}

impl Default for Window {
    fn default() -> Self {
        Window { pages: 8, hits: 1 }
    }
}

impl Window {
    /// Somebody waits for a page for which nothing was done yet: how many come along.
    pub fn missed(&mut self) -> usize {
        if self.hits == 0 {
            self.pages = (self.pages / 2).max(1);
        }
        self.hits = 0;
        self.pages
    }

    /// A page was wanted that had come along, or was about to.
    pub fn hit(&mut self) {
        if self.hits == 0 {
            self.pages = (self.pages * 2).min(MOST);
        }
        self.hits += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_is_wanted() {
        let mut window = Window::default();
        assert_eq!(window.missed(), 8);
        assert_eq!((window.missed(), window.missed(), window.missed()), (4, 2, 1));
        assert_eq!(window.missed(), 1);
        for _ in 0..10 {
            window.hit();
            window.hit();
            window.missed();
        }
        assert_eq!(window.missed(), MOST / 2);
    }
}
