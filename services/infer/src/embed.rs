//! What a text means, as a vector: the mean of the model's final states.

use crate::Infer;
use kit::service::{Answer, Fault};
use proto::{Adapters, Choice, Embed, Embedded, Prompt, Refusal, Weighted};

impl Answer<Embed> for Infer {
    type Reply = Result<Embedded, Refusal>;

    async fn answer(&mut self, ask: Embed) -> Result<Self::Reply, Fault> {
        let adapters = match self.readers(ask.adapters) {
            Ok(adapters) => adapters,
            Err((param, message)) => return Ok(Err(Refusal::Invalid { param, message })),
        };
        let at_input = |message| Refusal::Invalid { param: "input".to_owned(), message };
        let tokens = match self.encode(&Prompt::Text(ask.text)) {
            Ok(tokens) => tokens,
            Err((_, message)) => return Ok(Err(at_input(message))),
        };
        for id in adapters.iter().filter_map(|weighted| weighted.generation.as_ref()) {
            // A fixed generation may be an old one, whose files are no longer there.
            if let Err(error) = self.load(id).await {
                let message = format!("generation {id} cannot be served: {error:#}");
                return Ok(Err(Refusal::Invalid { param: "model".to_owned(), message }));
            }
        }
        // Learning makes room for it, as for any answer.
        let _turn = self.turn.enter();
        let (count, readers) = (tokens.len() as u32, adapters.clone());
        let vector = self.engine.run(move |engine| engine.embed(&tokens, &readers)).await?;
        Ok(match vector {
            Ok(vector) => {
                Ok(Embedded { vector, choice: Choice { adapters, confidence: None }, tokens: count })
            }
            Err(error) => Err(at_input(format!("{error:#}"))),
        })
    }
}

impl Infer {
    /// The adapters that a text is read through, each at a generation.
    fn readers(&self, asked: Adapters) -> Result<Vec<Weighted>, (String, String)> {
        let fixed = match asked {
            Adapters::Base => return Ok(Vec::new()),
            Adapters::Fixed(fixed) => fixed,
            Adapters::Auto => {
                let message = "vectors of different adapters do not compare: name one, or 'base'";
                return Err(("model".to_owned(), message.to_owned()));
            }
        };
        let mut readers = Vec::new();
        for weighted in fixed {
            // A lineage that only has the base yet adds nothing to it.
            if let Some(id) = self.resolve(&weighted)? {
                readers.push(Weighted { generation: Some(id), ..weighted });
            }
        }
        Ok(readers)
    }
}
