//! Where a document is cut.

use proto::Piece;
use text_splitter::{ChunkConfig, ChunkSizer, MarkdownSplitter, TextSplitter};

struct Sizer<F>(F);

impl<F: Fn(&str) -> usize> ChunkSizer for Sizer<F> {
    fn size(&self, chunk: &str) -> usize {
        (self.0)(chunk)
    }
}

/// Cuts `text` where its form suggests it: Markdown at headings and blocks, other text and source
/// code at blank lines, then lines, then sentences. The parts, joined, are the text again; each has
/// at most `limit` by `size`, but for runs that have no boundary at all.
pub fn split<'t>(
    text: &'t str,
    source: Option<&str>,
    limit: usize,
    size: impl Fn(&str) -> usize,
) -> Vec<&'t str> {
    if size(text) <= limit {
        return vec![text];
    }
    // Whitespace is content: indentation is most of what there is to Python.
    let config = ChunkConfig::new(limit).with_sizer(Sizer(size)).with_trim(false);
    match source.and_then(|s| s.rsplit_once('.')).map(|(_, extension)| extension) {
        Some("md" | "markdown" | "mdx") => MarkdownSplitter::new(config).chunks(text).collect(),
        _ => TextSplitter::new(config).chunks(text).collect(),
    }
}

/// Cuts a piece that is too long into windows of at most `limit` tokens. Each later window starts
/// with the quarter of a window before it, read but not learned again, so that nothing is learned
/// without context and nothing twice. Windows in which nothing is learned are left out.
pub fn windows(piece: &Piece, limit: usize) -> Vec<Piece> {
    let length = piece.tokens.len();
    if length <= limit {
        return if piece.learned.is_empty() { Vec::new() } else { vec![piece.clone()] };
    }
    let overlap = limit / 4;
    let mut out = Vec::new();
    let mut from = 0; // first token that no window has covered yet
    while from < length {
        let start = from.saturating_sub(overlap);
        let end = length.min(start + limit);
        let cut = |&(a, b): &(u32, u32)| {
            let (a, b) = ((a as usize).max(from), (b as usize).min(end));
            (a < b).then(|| ((a - start) as u32, (b - start) as u32))
        };
        let learned: Vec<_> = piece.learned.iter().filter_map(cut).collect();
        if !learned.is_empty() {
            out.push(Piece { tokens: piece.tokens[start..end].to_vec(), learned });
        }
        from = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_learn_every_token_once() {
        for length in [1_usize, 15, 16, 17, 40, 333] {
            let tokens: Vec<u32> = (0..length as u32).collect();
            let piece = Piece { tokens, learned: vec![(0, length as u32)] };
            let mut seen = Vec::new();
            for window in windows(&piece, 16) {
                assert!(window.tokens.len() <= 16);
                for &(a, b) in &window.learned {
                    seen.extend_from_slice(&window.tokens[a as usize..b as usize]);
                }
            }
            assert_eq!(seen, piece.tokens);
        }
    }

    #[test]
    fn a_long_prompt_keeps_its_end_before_the_answer() {
        let piece = Piece { tokens: (0..100).collect(), learned: vec![(98, 100)] };
        let windows = windows(&piece, 16);
        assert_eq!(windows.len(), 1);
        let learned = windows[0].learned[0];
        assert_eq!(&windows[0].tokens[learned.0 as usize..learned.1 as usize], &[98, 99]);
        assert!(learned.0 >= 4, "the answer has context before it");
    }
}
