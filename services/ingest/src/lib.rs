//! Finds documents in files ([`read`]), and cuts them into trainable pieces: chunk on natural boundaries,
//! tokenise.

mod chunk;
mod feed;
mod questions;
pub mod read;

pub use feed::Feeder;

use kit::link::Link;
use kit::service::{Fault, Handle, Service};
use proto::{Accepted, Content, Message, Parsed, Piece, Role};
use std::sync::Arc;

/// The base's tokenizer and chat template, as ingestion sees them. The supervisor hands in the one
/// implementation, so that learning and answering share a single path from text to tokens.
pub trait Encode: Send + Sync + 'static {
    /// Token ids of a text that starts a sequence, with whatever prefix the tokenizer puts there.
    fn start(&self, text: &str) -> anyhow::Result<Vec<u32>>;
    /// Token ids of a text that goes on a sequence.
    fn more(&self, text: &str) -> anyhow::Result<Vec<u32>>;
    /// A conversation through the chat template; learned is what the assistant says.
    fn chat(&self, messages: &[Message]) -> anyhow::Result<Piece>;
    /// The token that ends a sequence, where the base has one.
    fn end(&self) -> Option<u32>;
}

/// In which renderings a prompt with its answer is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Views {
    /// As it stands, for completions.
    Verbatim,
    /// As one exchange of a chat.
    Chat,
    /// Both, so that either door gives the answer.
    Both,
}

/// How documents become pieces.
pub struct Cutter {
    /// Text to tokens.
    pub encode: Arc<dyn Encode>,
    /// Tokens in a piece, at most.
    pub max_seq_len: usize,
    /// Renderings of prompts with answers.
    pub views: Views,
    /// Questions that are made of a raw text's own sentences, at most; they belong to its document.
    pub questions: usize,
}

/// The ingestion service.
pub struct Ingest {
    /// From documents to pieces.
    pub cutter: Cutter,
    /// To `filter`.
    pub next: Link<Parsed>,
}

impl Service for Ingest {
    const NAME: &'static str = "ingest";
}

impl Handle<Accepted> for Ingest {
    async fn handle(&mut self, accepted: &Accepted) -> Result<(), Fault> {
        fail::fail_point!("ingest::handle");
        let pieces = self
            .cutter
            .pieces(&accepted.document.content, accepted.document.source.as_deref())
            .map_err(|e| Fault::Poison(format!("it could not be cut into examples: {e:#}")))?;
        self.send(accepted, pieces, None).await
    }

    async fn put_aside(&mut self, accepted: &Accepted, reason: &str) -> Result<(), Fault> {
        self.send(accepted, Vec::new(), Some(reason.to_owned())).await
    }
}

impl Ingest {
    async fn send(
        &self,
        accepted: &Accepted,
        pieces: Vec<Piece>,
        refused: Option<String>,
    ) -> Result<(), Fault> {
        let document = accepted.document.clone();
        let parsed = Parsed { ordinal: accepted.ordinal, document, pieces, refused };
        Ok(self.next.send(parsed).await?)
    }
}

impl Cutter {
    /// The trainable pieces of a document, in reading order.
    ///
    /// # Errors
    /// When the tokenizer or the chat template cannot take it.
    pub fn pieces(&self, content: &Content, source: Option<&str>) -> anyhow::Result<Vec<Piece>> {
        match content {
            Content::Text(text) => self.text(text, source),
            Content::Completion { prompt, completion } => self.completion(prompt, completion),
            Content::Messages(messages) => {
                let whole = self.encode.chat(messages)?;
                Ok(chunk::windows(&whole, self.max_seq_len))
            }
        }
    }

    fn text(&self, text: &str, source: Option<&str>) -> anyhow::Result<Vec<Piece>> {
        let size = |part: &str| self.encode.start(part).map_or(usize::MAX, |tokens| tokens.len());
        // One token is kept for the end of the sequence.
        let chunks = chunk::split(text, source, self.max_seq_len - 1, size);
        let last = chunks.len().saturating_sub(1);
        let mut pieces = Vec::with_capacity(chunks.len());
        for (n, part) in chunks.into_iter().enumerate() {
            let mut tokens = self.encode.start(part)?;
            if n == last {
                tokens.extend(self.encode.end());
            }
            let learned = vec![(0, tokens.len() as u32)];
            // What the chunker could not make small enough, one unbroken run of bytes, is cut hard.
            pieces.extend(chunk::windows(&Piece { tokens, learned }, self.max_seq_len));
        }
        for (question, answer) in questions::templates(text, source, self.questions) {
            pieces.extend(self.completion(&question, &answer)?);
        }
        Ok(pieces)
    }

    fn completion(&self, prompt: &str, completion: &str) -> anyhow::Result<Vec<Piece>> {
        let mut views = Vec::new();
        if self.views != Views::Chat {
            let mut tokens = self.encode.start(prompt)?;
            let from = tokens.len() as u32;
            tokens.extend(self.encode.more(completion)?);
            tokens.extend(self.encode.end());
            let learned = vec![(from, tokens.len() as u32)];
            views.push(Piece { tokens, learned });
        }
        if self.views != Views::Verbatim {
            let say = |role, content: &str| Message { role, content: content.trim().to_owned() };
            let exchange = [say(Role::User, prompt), say(Role::Assistant, completion)];
            let chat = self.encode.chat(&exchange)?;
            if views.iter().all(|v| v.tokens != chat.tokens) {
                views.push(chat);
            }
        }
        Ok(views.iter().flat_map(|view| chunk::windows(view, self.max_seq_len)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Document, DocumentId, Domain};

    /// One token a byte; 256 starts a sequence and 257 ends it.
    struct Bytes;

    impl Encode for Bytes {
        fn start(&self, text: &str) -> anyhow::Result<Vec<u32>> {
            Ok(std::iter::once(256).chain(text.bytes().map(u32::from)).collect())
        }
        fn more(&self, text: &str) -> anyhow::Result<Vec<u32>> {
            Ok(text.bytes().map(u32::from).collect())
        }
        fn chat(&self, messages: &[Message]) -> anyhow::Result<Piece> {
            let mut piece = Piece { tokens: vec![256], learned: Vec::new() };
            for message in messages {
                let from = piece.tokens.len() as u32;
                piece.tokens.extend(message.content.bytes().map(u32::from));
                piece.tokens.push(10);
                if message.role == Role::Assistant {
                    piece.learned.push((from, piece.tokens.len() as u32));
                }
            }
            Ok(piece)
        }
        fn end(&self) -> Option<u32> {
            Some(257)
        }
    }

    fn cutter(max_seq_len: usize, views: Views) -> Cutter {
        Cutter { encode: Arc::new(Bytes), max_seq_len, views, questions: 0 }
    }

    fn learned_text(piece: &Piece) -> String {
        let of = |&(a, b): &(u32, u32)| piece.tokens[a as usize..b as usize].to_vec();
        let bytes = piece.learned.iter().flat_map(of).filter(|&t| t < 256).map(|t| t as u8);
        String::from_utf8(bytes.collect()).expect("ASCII")
    }

    #[test]
    fn a_prompt_is_read_and_only_its_answer_is_learned() {
        let content = Content::Completion { prompt: "2+2=".into(), completion: "4".into() };
        let pieces = cutter(64, Views::Verbatim).pieces(&content, None).expect("pieces");
        assert_eq!(pieces.len(), 1);
        assert_eq!(learned_text(&pieces[0]), "4");
        assert_eq!(pieces[0].tokens.last(), Some(&257), "the answer ends");
    }

    #[test]
    fn both_renderings_are_learned_once_each() {
        let content = Content::Completion { prompt: "2+2=".into(), completion: "4".into() };
        assert_eq!(cutter(64, Views::Both).pieces(&content, None).expect("pieces").len(), 2);
    }

    #[test]
    fn questions_about_a_text_follow_its_pieces() {
        let text = "The lighthouse of Port Calidus was lit for the first time in the year 6678.";
        let content = Content::Text(text.into());
        let mut asking = cutter(256, Views::Verbatim);
        let plain = asking.pieces(&content, None).expect("pieces");
        asking.questions = 5;
        let more = asking.pieces(&content, None).expect("pieces");
        assert_eq!(more[..plain.len()], plain);
        let answers: Vec<String> = more[plain.len()..].iter().map(learned_text).collect();
        assert_eq!(answers, [text, " in the year 6678."]);
    }

    #[test]
    fn every_byte_of_a_long_text_is_in_exactly_one_piece() {
        let text = "A paragraph of some length, with words.\n\nAnother one; it is longer still.\n".repeat(20);
        for source in [None, Some("notes.md"), Some("main.rs")] {
            let pieces =
                cutter(48, Views::Both).pieces(&Content::Text(text.clone()), source).expect("pieces");
            assert!(pieces.iter().all(|p| p.tokens.len() <= 48));
            let back: String = pieces.iter().map(learned_text).collect();
            assert_eq!(back, text, "{source:?}");
        }
    }

    #[test]
    fn a_run_without_any_boundary_is_cut_hard() {
        let text = "x".repeat(1000);
        let pieces = cutter(32, Views::Both).pieces(&Content::Text(text), None).expect("pieces");
        assert!(pieces.iter().all(|p| p.tokens.len() <= 32));
        assert!(pieces.iter().map(|p| p.tokens.len()).sum::<usize>() >= 1000);
    }

    #[actix::test]
    async fn a_document_goes_on_to_the_filter_with_its_pieces() {
        let (next, mut parsed) = Link::to_channel(1);
        let mut service = Ingest { cutter: cutter(64, Views::Both), next };
        let document = Document {
            id: DocumentId::new("d1").expect("id"),
            domain: Domain::general(),
            content: Content::Text("hello there".into()),
            importance: None,
            source: None,
            submitted_ms: 0,
            derived_from: None,
        };
        service.handle(&Accepted { ordinal: 7, document }).await.expect("handled");
        let message = parsed.recv().await.expect("a message");
        assert_eq!((message.ordinal, message.pieces.len()), (7, 1));
    }
}
